r"""A sampler on a fixed grid as a module of tensors, for ``torch.export``, ONNX and AOTInductor; and its exact density.

The schedule is evaluated when the module is made: the exported program holds its values as numbers, and the network
once per evaluation. Nothing in it looks at values.
"""

import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ndm_ct._core.checks import bad_rows, choose, some, validate_count
from ndm_ct._core.errors import SolverError
from ndm_ct._core.noise import Randomness
from ndm_ct.model import NDM
from ndm_ct.samplers.base import Sampler
from ndm_ct.samplers.grids import time_grid

__all__ = ["FixedGrid"]


class FixedGrid(nn.Module):
    r"""A sampler with its grid: :math:`z_1 \mapsto x`, in a fixed number of network evaluations.

    The density of what a deterministic one draws is :meth:`loglik`.

    Args:
        model: the model; put it, or this module, into eval mode before exporting.
        method: a name of ``ndm_ct.samplers.NAMES``, or a class of samplers (with ``functools.partial`` for options).
            Methods that draw noise draw it in the exported program, from its own generator.
        steps: number of steps. More steps come closer to the exact flow, and make a longer program.
        grid: how times are spaced, or the times themselves, as in :func:`ndm_ct.sample`.
        denoise: return :math:`\hat x` at the start of the last step, in place of that step.

    Raises:
        ValueError: an unknown method or grid; steps below one.

    Example:
        >>> import torch, ndm_ct
        >>> from ndm_ct.samplers import FixedGrid
        >>> model = ndm_ct.NDM(ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2)), event_shape=(2,))
        >>> sampler, z1 = FixedGrid(model, "unipc", steps=5).eval(), torch.randn(4, 2)
        >>> program = torch.export.export(sampler, (z1,))
        >>> torch.allclose(program.module()(z1), sampler(z1), atol=1e-6)
        True
    """

    def __init__(
        self, model: NDM, method: str | Callable[[NDM], Sampler] = "unipc", *, steps: int,
        grid: str | Tensor = "uniform", denoise: bool = False,
    ) -> None:  # fmt: skip
        from ndm_ct.samplers import NAMES

        super().__init__()
        make = NAMES[choose("method", method, NAMES)] if isinstance(method, str) else method
        times = time_grid(model.schedule, model.t_min, validate_count("steps", steps), grid)
        self.model, self.sampler, self.denoise = model, make(model), denoise
        self.sampler.prepare(times)
        self.times: list[float] = times.tolist()

    def forward(self, z1: Tensor, /, **cond: Any) -> Tensor:
        """Samples, shape of ``z1`` ``(B, *E)``: latents for a model whose transform maps data to latents."""
        return self._walk(z1, cond)

    def _walk(self, z: Tensor, cond: dict[str, Any], generator: Randomness = None) -> Tensor:
        for t, s in itertools.pairwise(self.times):
            if self.denoise and s == self.times[-1]:
                return self.sampler.estimate(z, t, **cond)
            # Not by step(), which looks at its arguments.
            z = self.sampler._step(z, self.sampler.level(t), self.sampler.level(s), generator, cond)
        return z

    def loglik(
        self, x: Tensor, /, *, on_failure: str = "raise", batch_size: int | None = None, **cond: Any
    ) -> Tensor:  # fmt: skip
        r"""Log-density of what these steps draw, :math:`\log p_G(x) = \log p_1(G^{-1}(x)) - \log|\det \partial G|`.

        It tends to :func:`ndm_ct.loglik`, the density of the flow, as steps get more; there is no random error. Where
        very few steps fold, so that several noises lead to x, it is the term of one of them, a lower bound
        (:mod:`ndm_ct.samplers.density`). The density of new samples needs no inverse:
        ``sample(method=..., steps=..., trace="exact", return_info=True)`` has it in ``info.logp``.

        Args:
            x: data, shape ``(B, *E)``, at most 64 dimensions.
            on_failure: "raise" a SolverError if no noise is found that leads to a row, or "nan" for such rows.
            batch_size: rows at a time; None bounds the memory. The result does not depend on it.
            cond: conditioning, as in :func:`ndm_ct.loglik`.

        Returns:
            Nats per event, ``(B,)``, in the dtype of x.

        Raises:
            ValueError: the sampler draws noise; events of more than 64 dimensions; unusable data or options.
            SolverError: no noise was found for some rows: few steps may not reach them.

        Example:
            >>> import torch, ndm_ct
            >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
            >>> x = torch.zeros(1, 2, dtype=torch.float64)
            >>> four, many = (ndm_ct.samplers.FixedGrid(model, "heun", steps=n).loglik(x) for n in (4, 64))
            >>> bool((many - ndm_ct.loglik(model, x)).abs() < (four - ndm_ct.loglik(model, x)).abs())
            True
        """
        from ndm_ct.samplers.density import log_density

        choose("on_failure", on_failure, ("raise", "nan"))
        x = self.model.as_data(x)
        given = self.model.validate(x, cond, self.loglik)
        found = log_density(self.model, self._walk, x, given, batch_size)
        if on_failure == "raise" and (failed := bad_rows(found)):
            raise SolverError(
                f"no noise was found from which {len(self.times) - 1} steps lead to batch rows {some(failed)}; take "
                "more steps, or on_failure='nan'.", rows=failed,
            )  # fmt: skip
        return found.to(x.dtype)
