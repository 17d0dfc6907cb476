r"""A model as a ``torch.distributions`` object: the density and the samples of its probability flow.

.. math::
    \log p(x \mid c) = \log p_1(z_1) + \int_{t_{min}}^1 \nabla \cdot v(z_t, t, c)\, dt, \qquad z_{t_{min}} = x

Gradients follow torch's convention: with grad mode on, ``log_prob`` is differentiable in the value, the conditioning
and the parameters that require it, and ``rsample`` in the last two; that keeps the graph of a whole solve, and
``torch.no_grad()`` or a model with ``requires_grad_(False)`` does without. ``log_prob`` is exact up to 32 dimensions
and beyond an unbiased estimate; its standard error is ``ndm_ct.loglik(..., return_info=True)``.

References:
    Grathwohl et al., FFJORD, https://arxiv.org/abs/1810.01367
    Song et al., Score-Based Generative Modeling through SDEs, https://arxiv.org/abs/2011.13456
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.distribution import Distribution

from ndm_ct._core.checks import validate_dense
from ndm_ct._core.noise import GeneratorLike, as_randomness
from ndm_ct.likelihood.api import Trace, decode, loglik
from ndm_ct.model import NDM

__all__ = ["NDMDistribution", "distribution"]


class NDMDistribution(Distribution):
    """See :func:`distribution`, which makes one.

    Args:
        model: the model.
        batch_shape: leading shape of every conditioning tensor.
        cond: conditioning.
        options: keywords of ``loglik`` and ``decode``.
    """

    has_rsample = True

    def __init__(self, model: NDM, batch_shape: torch.Size, cond: dict[str, Any], options: dict[str, Any]) -> None:
        self.model, self.cond, self.options = model, cond, options
        super().__init__(batch_shape, torch.Size(model.data_shape), validate_args=False)

    @property
    def arg_constraints(self) -> dict[str, Any]:
        """None: the model has been validated."""
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
        found = loglik(self.model, rows, differentiable=self._needs_graph(value), **self.options, **self._rows(batch))
        return found.reshape(batch)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 (the signature of torch)
        """Draws without gradients, ``(*sample_shape, *batch_shape, *E)``."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws with gradients through the solve, ``(*sample_shape, *batch_shape, *E)``."""
        shape, z1, cond = self._noise(sample_shape)
        options = {name: value for name, value in self.options.items() if name not in ("trace", "generator")}
        x = decode(self.model, z1, differentiable=self._needs_graph(), **options, **cond)
        return x.reshape(*shape, *self.event_shape)

    def rsample_and_log_prob(self, sample_shape: Any = torch.Size()) -> tuple[Tensor, Tensor]:  # noqa: B008
        """:meth:`rsample` and the log-density of what was drawn, from one solve."""
        shape, z1, cond = self._noise(sample_shape)
        x, info = decode(self.model, z1, differentiable=self._needs_graph(), return_info=True, **self.options, **cond)
        return x.reshape(*shape, *self.event_shape), info.loglik.reshape(shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "NDMDistribution":
        """The same over a larger batch shape."""
        shape = torch.Size(batch_shape)
        rows = {
            name: value.expand(*shape, *value.shape[len(self.batch_shape) :]) if isinstance(value, Tensor) else value
            for name, value in self.cond.items()
        }
        return type(self)(self.model, shape, rows, self.options)

    def _rows(self, batch: torch.Size) -> dict[str, Any]:
        """Conditioning with one row per event of a flattened batch."""
        wide = self.expand(batch).cond
        return {
            name: value.reshape(-1, *value.shape[len(batch) :]) if isinstance(value, Tensor) else value
            for name, value in wide.items()
        }

    def _noise(self, sample_shape: Any) -> tuple[torch.Size, Tensor, dict[str, Any]]:
        sizes = sample_shape if isinstance(sample_shape, tuple | list) else [None]
        if not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise ValueError(f"sample_shape must be a sequence of sizes such as (4,), got {sample_shape!r}.")
        shape = torch.Size(sample_shape) + self.batch_shape
        dtype, device = self.model.dtype or torch.get_default_dtype(), self.model.device or torch.device("cpu")
        generator = self.options.get("generator")
        z1 = self.model.sample_prior(shape.numel(), generator=generator, dtype=dtype, device=device)
        return shape, z1, self._rows(shape)

    def _needs_graph(self, *values: Tensor) -> bool:
        tensors = (*values, *self.model.parameters(), *self.cond.values())
        return torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in tensors)

    def __repr__(self) -> str:
        names = ", ".join(self.cond)
        return f"NDMDistribution(event_shape={tuple(self.event_shape)}, batch_shape={tuple(self.batch_shape)}" + (
            f", given {names})" if names else ")"
        )


def distribution(
    model: NDM,
    /,
    *,
    trace: Trace = "auto",
    rtol: float | None = None,
    atol: float | None = None,
    method: str | None = None,
    generator: GeneratorLike = None,
    **cond: Any,
) -> NDMDistribution:
    r"""The distribution of data of a model, for whatever works with ``torch.distributions``.

    Args:
        model: the model.
        trace: as in :func:`ndm_ct.loglik`.
        rtol: likewise.
        atol: likewise.
        method: likewise.
        generator: source of samples and probes: a seed, a generator, or one per row; None is torch's own.
        cond: conditioning. Tensors have a leading dimension, the batch shape: ``label=torch.tensor([3, 5])`` makes two
            distributions, ``label=torch.tensor([3])`` a batch of one.

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
    sizes = {name: value.shape[:1] for name, value in cond.items() if isinstance(value, Tensor) and value.ndim > 0}
    if len(set(sizes.values())) > 1:
        came = ", ".join(f"{name} {tuple(size)}" for name, size in sizes.items())
        raise ValueError(f"conditioning tensors must have one leading size, the batch shape, got {came}.")
    batch = next(iter(sizes.values()), torch.Size())
    options: dict[str, Any] = {"trace": trace, "rtol": rtol, "atol": atol, "method": method}
    options["generator"] = as_randomness(generator, None, model.device or "cpu", "distribution")
    made = NDMDistribution(model, batch, cond, options)
    probe = torch.zeros(batch.numel(), *model.data_shape, dtype=model.dtype, device=model.device)
    model.validate(probe, made._rows(batch), distribution)
    return made
