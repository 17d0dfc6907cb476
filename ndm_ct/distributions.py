r"""A model as a ``torch.distributions`` object: the density and the samples of its probability flow.

.. math::
    \log p(x \mid c) = \log p_1(z_1) + \int_{t_{min}}^1 \nabla \cdot v(z_t, t, c)\, dt, \qquad z_{t_{min}} = x

Gradients follow torch's convention: with grad mode on, ``log_prob`` is differentiable in the value, the conditioning
and the parameters that require it, and ``rsample`` in the last two. This keeps the graph of a whole solve;
``torch.no_grad()`` or a model with ``requires_grad_(False)`` avoids it. ``log_prob`` is exact up to 32 dimensions and
an unbiased estimate beyond; ``ndm_ct.loglik(..., return_info=True)`` tells its standard error.

References:
    Grathwohl et al., FFJORD, https://arxiv.org/abs/1810.01367
    Song et al., Score-Based Generative Modeling through SDEs, https://arxiv.org/abs/2011.13456
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.distribution import Distribution

from ndm_ct._core.checks import validate_dense
from ndm_ct._core.noise import GeneratorLike, Randomness, as_randomness
from ndm_ct.likelihood.options import Options, Trace
from ndm_ct.model import NDM

__all__ = ["NDMDistribution", "distribution"]


class NDMDistribution(Distribution):
    """See :func:`distribution`, which makes one.

    Args:
        model: the model.
        batch_shape: leading shape of every conditioning tensor.
        cond: conditioning.
        options: how paths are solved.
        generator: source of samples and probes.
    """

    has_rsample = True

    def __init__(
        self, model: NDM, batch_shape: torch.Size, cond: Mapping[str, Any], options: Options, generator: Randomness
    ) -> None:
        self.model, self.cond, self.options, self.generator = model, cond, options, generator
        super().__init__(batch_shape, torch.Size(model.data_shape), validate_args=False)

    @property
    def arg_constraints(self) -> dict[str, Any]:
        """Empty, because the model has been validated."""
        return {}

    @property
    def support(self) -> Any:
        """All real events."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        r""":math:`\log p`, nats.

        Args:
            value: shape ``(..., *E)``, whose leading part broadcasts with the batch shape.

        Raises:
            TypeError: not a dense tensor of real numbers.
            ValueError: the last dimensions are not the event's, or the leading ones do not broadcast.
        """
        event = self.event_shape
        validate_dense(value, "value")
        if value.shape[value.ndim - len(event) :] != event:
            raise ValueError(f"value must end in the event shape {tuple(event)}, got shape {tuple(value.shape)}.")
        leading = value.shape[: value.ndim - len(event)]
        try:
            batch = torch.broadcast_shapes(leading, self.batch_shape)
        except RuntimeError as error:
            raise ValueError(
                f"value of shape {tuple(value.shape)} has leading dimensions {tuple(leading)}, which do not broadcast "
                f"with the batch shape {tuple(self.batch_shape)}."
            ) from error
        rows = value.expand(*batch, *event).reshape(-1, *event)
        given = self.model.validate(rows, self._rows(batch), distribution, name="value")
        generator = as_randomness(self.generator, len(rows), rows.device, "distribution")
        options = replace(self.options, differentiable=self._needs_graph(value))
        info = options.likelihood(self.model, rows, (self.model.t_min, 1.0), given, generator, budget=False)
        return info.loglik.reshape(batch)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 (the signature of torch)
        """Draws without gradients, ``(*sample_shape, *batch_shape, *E)``."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws with gradients through the solve, ``(*sample_shape, *batch_shape, *E)``."""
        shape, x = self._decode(sample_shape, return_info=False)
        return x.reshape(*shape, *self.event_shape)

    def rsample_and_log_prob(self, sample_shape: Any = torch.Size()) -> tuple[Tensor, Tensor]:  # noqa: B008
        """:meth:`rsample` and the log-density of what was drawn, from one solve."""
        shape, (x, info) = self._decode(sample_shape, return_info=True)
        return x.reshape(*shape, *self.event_shape), info.loglik.reshape(shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "NDMDistribution":
        """The same distribution over a larger batch shape."""
        shape = torch.Size(batch_shape)
        rows = {
            name: value.expand(*shape, *value.shape[len(self.batch_shape) :]) if _has_rows(value) else value
            for name, value in self.cond.items()
        }
        return type(self)(self.model, shape, rows, self.options, self.generator)

    def _rows(self, batch: torch.Size) -> dict[str, Any]:
        """Conditioning with one row per event of a flattened batch."""
        wide = self.expand(batch).cond
        return {
            name: value.reshape(-1, *value.shape[len(batch) :]) if _has_rows(value) else value
            for name, value in wide.items()
        }

    def _decode(self, sample_shape: Any, *, return_info: bool) -> tuple[torch.Size, Any]:
        """Shape and rows of draws, the rows with a :class:`LikelihoodInfo` if asked."""
        sizes = sample_shape if isinstance(sample_shape, tuple | list) else [None]
        if not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise ValueError(f"sample_shape must be a sequence of sizes such as (4,), got {sample_shape!r}.")
        model, shape = self.model, torch.Size(sample_shape) + self.batch_shape
        dtype, device = model.dtype or torch.get_default_dtype(), model.device or torch.device("cpu")
        z1 = model.sample_prior(shape.numel(), generator=self.generator, dtype=dtype, device=device)
        given = model.validate_state(z1, self._rows(shape), distribution)
        options, generator = replace(self.options, differentiable=self._needs_graph()), None
        if return_info:
            generator = as_randomness(self.generator, len(z1), device, "distribution")
        else:  # without a density there is no trace to estimate
            options = replace(options, trace=None)
        return shape, options.transport(model, z1, (1.0, model.t_min), given, generator, return_info)

    def _needs_graph(self, *values: Tensor) -> bool:
        tensors = (*values, *self.model.parameters(), *self.cond.values())
        return torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in tensors)

    def __repr__(self) -> str:
        names = ", ".join(self.cond)
        return f"NDMDistribution(event_shape={tuple(self.event_shape)}, batch_shape={tuple(self.batch_shape)}" + (
            f", given {names})" if names else ")"
        )


def _has_rows(value: Any) -> bool:
    """Whether it is a tensor with one entry per distribution of the batch; a number without axes is one for all."""
    return isinstance(value, Tensor) and value.ndim > 0


def distribution(
    model: NDM,
    /,
    *,
    trace: Trace = "auto",
    rtol: float | None = None,
    atol: float | None = None,
    method: str | None = None,
    batch_size: int | None = None,
    generator: GeneratorLike = None,
    **cond: Any,
) -> NDMDistribution:
    r"""The distribution of data of a model, for whatever works with ``torch.distributions``.

    Args:
        model: the model.
        trace: how ``log_prob`` takes the divergence of the flow: "exact", "quadrature", "hutchinson" or an object of
            :mod:`ndm_ct.divergence`. "auto" is exact up to 32 dimensions, else "quadrature", an unbiased estimate.
        rtol: relative tolerance of the solver. A smaller one moves densities and draws closer to those of the exact
            flow and takes more network evaluations. None is 2e-6; for "quadrature" it is 3e-5.
        atol: absolute tolerance of the solver, for states near zero; None as for ``rtol``.
        method: "ode", "exponential" or a torchdiffeq method such as "dopri5"; None as in :func:`ndm_ct.loglik`.
        batch_size: rows solved at a time; more are solved in parts. None bounds the memory; densities do not depend on
            it. With a graph, and with the torchdiffeq methods, None is all.
        generator: source of samples and probes: a seed, a generator, or one per row; None is torch's own.
        cond: conditioning. Tensors have a leading dimension, the batch shape: ``label=torch.tensor([3, 5])`` makes two
            distributions, ``label=torch.tensor([3])`` a batch of one. A tensor without axes, such as
            ``torch.tensor(0.5)``, and any other value is shared by all. Any name is possible that is not an
            option here.

    Raises:
        ValueError: conditioning tensors of different leading sizes, or the model has only a bound (``Encoder``).
        TypeError: conditioning that the model does not take.

    Example:
        >>> import ndm_ct
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
        >>> p = ndm_ct.distribution(model)
        >>> p.sample((3, 4)).shape, p.log_prob(torch.zeros(5, 2, dtype=torch.float64)).shape
        (torch.Size([3, 4, 2]), torch.Size([5]))
    """
    if not model.transform.bijective:
        raise ValueError(
            f"{type(model.transform).__name__} is stochastic, so that log p(x) has only a bound; use ndm_ct.elbo."
        )
    sizes = {name: value.shape[:1] for name, value in cond.items() if _has_rows(value)}
    if len(set(sizes.values())) > 1:
        came = ", ".join(f"{name} {tuple(size)}" for name, size in sizes.items())
        raise ValueError(f"conditioning tensors must have one leading size, the batch shape, got {came}.")
    batch = next(iter(sizes.values()), torch.Size())
    options = Options(trace=trace, rtol=rtol, atol=atol, method=method, batch_size=batch_size)
    source = as_randomness(generator, None, model.device or "cpu", "distribution")
    made = NDMDistribution(model, batch, cond, options, source)
    probe = torch.zeros(batch.numel(), *model.data_shape, dtype=model.dtype, device=model.device)
    model.validate(probe, made._rows(batch), distribution)
    return made
