r"""A sampler on a fixed grid as a module of tensors, for ``torch.export``, ONNX and AOTInductor.

The schedule is evaluated when the module is made: the exported program holds its values as numbers, and the network
once per evaluation. Nothing in it looks at values.
"""

import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ndm_ct._core.checks import choose, validate_count
from ndm_ct.model import NDM
from ndm_ct.samplers.base import Sampler
from ndm_ct.samplers.grids import time_grid

__all__ = ["FixedGrid"]


class FixedGrid(nn.Module):
    r"""A sampler with its grid: :math:`z_1 \mapsto x`, in a fixed number of network evaluations.

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
        z, last = z1, self.times[-1]
        for t, s in itertools.pairwise(self.times):
            if self.denoise and s == last:
                return self.sampler.estimate(z, t, **cond)
            # Not by step(), which looks at its arguments.
            z = self.sampler._step(z, self.sampler.level(t), self.sampler.level(s), None, cond)
        return z
