r"""The prior: the distribution of :math:`z_1`, from which generation starts."""

import math
from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from ndm_ct._core.checks import event_size, first_parameter, sum_event, validate_dense
from ndm_ct._core.noise import GeneratorLike, as_randomness, normal_like, uniform

__all__ = ["DataPrior", "IsotropicNormal", "NormalKL", "Prior", "log_prior", "prior_divergence", "sample_prior"]


class Prior(Protocol):
    """The distribution of :math:`z_1`. A ``torch.distributions`` object over events will do."""

    def log_prob(self, z: Tensor, /) -> Tensor:
        """Log density in nats, ``(B, *E)`` to ``(B,)``."""
        ...


@runtime_checkable
class NormalKL(Protocol):
    """A prior whose divergence from a diagonal normal is known in closed form."""

    def kl_from_normal(self, mean: Tensor, std: Tensor) -> Tensor:
        r""":math:`KL(N(\mathrm{mean}, \mathrm{std}^2) \,\|\, p_1)`, ``(B, *E)`` twice to ``(B,)``."""
        ...


class IsotropicNormal:
    r""":math:`N(0, s^2 I)` over an event.

    Args:
        event_shape: E.
        scale: s.
    """

    def __init__(self, event_shape: Sequence[int], scale: float = 1.0) -> None:
        self.event_shape, self.scale = tuple(event_shape), scale

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density in nats, ``(B, *E)`` to ``(B,)``."""
        d = event_size(self.event_shape)
        return -0.5 * (sum_event((z / self.scale) ** 2) + d * math.log(2.0 * math.pi * self.scale**2))

    def sample(
        self,
        n: int,
        *,
        generator: GeneratorLike = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw ``(n, *E)``.

        Args:
            n: number of draws.
            generator: a seed, a generator, or one per draw; None is torch's global generator.
            dtype: of the result; None is torch's default.
            device: of the result; None is torch's default.
        """
        like = torch.empty((n, *self.event_shape), dtype=dtype, device=device)
        noise = normal_like(like, as_randomness(generator, n, like.device, "prior"))
        return self.scale * noise

    def kl_from_normal(self, mean: Tensor, std: Tensor) -> Tensor:
        """See :class:`NormalKL`."""
        ratio = (std / self.scale) ** 2
        return 0.5 * sum_event((mean / self.scale) ** 2 + ratio - ratio.log() - 1.0)


class DataPrior:
    r"""A data set in place of noise: :math:`z_1` is one of its rows, drawn uniformly. It has no density.

    Args:
        data: shape ``(N, *E)``, floating point.

    Raises:
        ValueError: no rows, NaN or infinity.
        TypeError: not a tensor of real numbers.

    Example:
        >>> import torch
        >>> DataPrior(torch.ones(3, 2)).sample(4).shape
        torch.Size([4, 2])
    """

    def __init__(self, data: Tensor) -> None:
        validate_dense(data, "data")
        if not data.is_floating_point():
            raise TypeError(f"data has dtype {data.dtype}, expected real numbers; convert it with data.float().")
        if data.ndim == 0 or len(data) == 0 or not bool(data.isfinite().all()):
            raise ValueError(f"data must have rows and be finite, got shape {tuple(data.shape)}.")
        self.data = data

    def log_prob(self, z: Tensor) -> Tensor:
        """Raises ValueError: the rows are points."""
        raise ValueError(
            "the prior is a data set, which has no density, so that there is no likelihood; use encode, decode and "
            "sample, or give NDM(prior=) a distribution with log_prob."
        )

    def sample(
        self,
        n: int,
        *,
        generator: GeneratorLike = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw ``(n, *E)``; arguments as of :meth:`IsotropicNormal.sample`."""
        device = torch.get_default_device() if device is None else torch.device(device)
        source = as_randomness(generator, n, device, "prior")
        places = (uniform((n,), source, torch.float64, device) * len(self.data)).long()
        return self.data[places.to(self.data.device)].to(device=device, dtype=dtype)


def log_prior(prior: Any, z: Tensor) -> Tensor:
    r""":math:`\log p_1(z)`, nats, ``(B, *E)`` to ``(B,)``, in the dtype of z.

    Args:
        prior: the prior. If it has parameters, it is evaluated in their dtype.
        z: states.

    Raises:
        ValueError: the prior's log_prob does not return one number per row.
    """
    parameter = first_parameter(prior)
    value = prior.log_prob(z if parameter is None else z.to(parameter.dtype))
    if tuple(value.shape) != (z.shape[0],):
        raise ValueError(
            f"prior.log_prob returned shape {tuple(value.shape)} for {z.shape[0]} events, expected "
            f"({z.shape[0]},); wrap the distribution in torch.distributions.Independent."
        )
    return cast(Tensor, value.to(z.dtype))


def prior_divergence(prior: Any, mean: Tensor, std: Tensor, generator: GeneratorLike) -> Tensor:
    r""":math:`KL(N(\mathrm{mean}, \mathrm{std}^2) \,\|\, p_1)`, nats, ``(B,)``.

    Args:
        prior: the prior. The result is exact if it has ``kl_from_normal``, else an estimate from one sample.
        mean: shape ``(B, *E)``.
        std: shape ``(B, *E)``.
        generator: source of the one sample.
    """
    if isinstance(prior, NormalKL):
        return prior.kl_from_normal(mean, std)
    eps = normal_like(mean, as_randomness(generator, len(mean), mean.device, "prior_divergence"))
    log_q = -sum_event(0.5 * eps**2 + std.log() + 0.5 * math.log(2.0 * math.pi))
    return log_q - log_prior(prior, mean + std * eps)


def sample_prior(
    prior: Any, n: int, *, generator: GeneratorLike, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Draw :math:`z_1`, shape ``(n, *E)``.

    Args:
        prior: the prior.
        n: number of draws.
        generator: one generator, a seed, or one generator per draw.
        dtype: of the result.
        device: of the result.

    Raises:
        ValueError: a generator for a ``torch.distributions`` prior, which cannot draw from one.
    """
    source = as_randomness(generator, n, device, "prior")
    if n == 0:
        source = None
    elif not (source is None or isinstance(source, torch.Generator)):
        return torch.cat([sample_prior(prior, 1, generator=each, dtype=dtype, device=device) for each in source])
    if isinstance(prior, torch.distributions.Distribution):
        if source is not None:
            raise ValueError(
                "a torch.distributions prior cannot draw from a generator; give the prior a method "
                "sample(n, generator=, dtype=, device=), or leave generator out."
            )
        return prior.sample(torch.Size((n,))).to(dtype=dtype, device=device)
    return cast(Tensor, prior.sample(n, generator=source, dtype=dtype, device=device))
