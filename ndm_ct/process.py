r"""The forward process given x: :math:`z_t = \alpha_t F(x, t) + \sigma_t \epsilon`.

With :math:`F = F(x, t)` and :math:`\dot F = \partial F/\partial t`,

.. math::
    v = \alpha' F + \alpha \dot F + \frac{\sigma'}{\sigma} (z - \alpha F), \qquad
    s = \frac{\alpha F - z}{\sigma^2}, \qquad
    g^2 = \eta\, \sigma^2 \gamma' .

The process is not Markovian: for s < t its posterior is
:math:`q(z_s \mid z_t, x) = N(\alpha_s F(x, s) + \kappa (z_t - \alpha_t F(x, t)),\ \tilde\sigma^2 I)` with
:math:`\kappa = \sqrt{\sigma_s^2 - \tilde\sigma^2} / \sigma_t`. The choice

.. math::
    \tilde\sigma^2 = \sigma_s^2 \Bigl(1 - \exp\bigl(-\textstyle\int_s^t \eta \gamma' du\bigr)\Bigr)

is the exact transition of the reverse SDE with x frozen: DDPM at :math:`\eta = 1`, DDIM at :math:`\eta = 0`.

**General noise.** With a scale :math:`S = e^{r(x, t)}` the marginal is :math:`N(\alpha F, \sigma^2 S^2)`. The same
formulas then hold with (F, dF) replaced by a pair that depends on z as well. With :math:`R = z - \alpha F` and
:math:`w = 1 - e^{-2r}`,

.. math::
    F_e = F + w \frac{R}{\alpha}, \qquad
    \dot F_e = \dot F + \Bigl(\dot r + \tfrac12 \gamma' w\Bigr) \frac{R}{\alpha} ,

so that :math:`v = \alpha' F + \alpha \dot F + (\sigma'/\sigma + \dot r) R` and :math:`s = -R/(\sigma S)^2`; g, which
must not depend on x, is as before. The posterior keeps :math:`\tilde\sigma` where :math:`\sigma_s S_s` is larger, and
:math:`\kappa = \sqrt{\sigma_s^2 S_s^2 - \tilde\sigma^2} / (\sigma_t S_t)`.

References:
    Bartosh, Vetrov and Naesseth, Neural Diffusion Models, https://arxiv.org/abs/2310.08337
    Bartosh, Vetrov and Naesseth, Neural Flow Diffusion Models (noise with a scale), https://arxiv.org/abs/2404.12940
    Song, Meng and Ermon, Denoising Diffusion Implicit Models, https://arxiv.org/abs/2010.02502
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ndm_ct._core.checks import append_axes, expand, of_time, validate_number
from ndm_ct._core.noise import GeneratorLike, as_randomness, normal_like
from ndm_ct.schedules import Coefficients, Matched, Schedule
from ndm_ct.transforms import Identity, Path, Transform
from ndm_ct.transforms.noise import NoiseScale, as_noise_scale

__all__ = ["ForwardProcess", "Instant", "ProcessPath", "denoised", "drift"]

Volatility = float | Callable[[Tensor], Tensor]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)
_LARGEST_EXPONENT = 80.0  # exp(-80) is below the rounding of float64 against 1
_LARGEST_SHARE = 1.0 - 2.0**-20  # of the noise of z_s that may be new: kappa has a derivative below one


def drift(
    z: Tensor,
    F: Tensor,
    dF: Tensor,
    c: Coefficients,
    transform: Transform,
    half_rate: Tensor | None = None,
) -> Tensor:
    r"""The one drift of the library: :math:`v - \tfrac12 h^2 s = \alpha' F + \alpha\dot F + c\,(z - \alpha F)`.

    Here :math:`c = \sigma'/\sigma + \tfrac12 h^2/\sigma^2`. With h = 0 it is the velocity v of the probability flow,
    with h = g the drift of the reverse SDE.

    Args:
        z: state, shape ``(B, *E)``.
        F: :math:`F` at x or at the model's prediction, shape ``(B, *E)``.
        dF: :math:`\dot F`, shape ``(B, *E)``.
        c: coefficients of the schedule at t.
        transform: says in which basis a rate that varies over the event is diagonal.
        half_rate: :math:`\tfrac12 h^2/\sigma^2`, shape ``()``, ``(B,)`` or broadcastable to ``(B, *E)``; None is 0.
    """
    alpha, dalpha, dlog_sigma = (expand(each, z) for each in (c.alpha, c.dalpha, c.dlog_sigma))
    residual = z - alpha * F
    out = dalpha * F + alpha * dF + dlog_sigma * residual
    return out if half_rate is None else out + transform.diagonal(half_rate, residual)


def denoised(z: Tensor, velocity: Tensor, c: Coefficients) -> Tensor:
    r"""The x of a velocity :math:`u = \alpha' x + \sigma' \epsilon`.

    .. math::
        x = \frac{\sigma' z - \sigma u}{\alpha\sigma' - \sigma\alpha'}

    Nothing is divided by :math:`\sigma`; where :math:`\sigma = 0` it is :math:`z/\alpha`.

    Args:
        z: state, shape ``(B, *E)``.
        velocity: u, shape ``(B, *E)``.
        c: coefficients of the schedule at t.
    """
    return expand(c.dsigma / c.wronskian, z) * z - expand(c.sigma / c.wronskian, z) * velocity


@dataclass(frozen=True)
class Instant:
    r"""F and the scale of the noise at data x and time t, with their time derivatives.

    Args:
        c: coefficients of the schedule at t.
        F: :math:`F(x, t)`, shape ``(B, *E)``.
        dF: :math:`\dot F`.
        r: :math:`\log S(x, t)`, shape ``(B, *E)``; None is S = 1.
        dr: :math:`\dot r`.
    """

    c: Coefficients
    F: Tensor
    dF: Tensor
    r: Tensor | None = None
    dr: Tensor | None = None

    @property
    def requires_grad(self) -> bool:
        """Whether F or S is trained."""
        return self.F.requires_grad or (self.r is not None and self.r.requires_grad)

    def detach(self) -> "Instant":
        """The same, held fixed."""
        if self.r is None or self.dr is None:
            return Instant(self.c, self.F.detach(), self.dF.detach())
        return Instant(self.c, self.F.detach(), self.dF.detach(), self.r.detach(), self.dr.detach())

    def state(self, eps: Tensor) -> Tensor:
        r""":math:`z = \alpha F + \sigma S \epsilon`, shape ``(B, *E)``."""
        return expand(self.c.alpha, self.F) * self.F + self.residual(eps)

    def residual(self, eps: Tensor) -> Tensor:
        r""":math:`R = z - \alpha F = \sigma S \epsilon`."""
        noise = expand(self.c.sigma, self.F) * eps
        return noise if self.r is None else noise * self.r.exp()

    def pair(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`(F_e, \dot F_e)` at the state with :math:`R` = ``residual``; (F, dF) where S = 1."""
        if self.r is None or self.dr is None:
            return self.F, self.dF
        c, shift = self.c, residual / expand(self.c.alpha, residual)
        w = -torch.expm1(-2.0 * self.r)
        rate = self.dr + 0.5 * expand(c.dgamma, w) * w
        return self.F + w * shift, self.dF + rate * shift

    def pair_at(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`pair` at the state ``z``, shape ``(B, *E)``."""
        if self.r is None:
            return self.F, self.dF
        return self.pair(z - expand(self.c.alpha, z) * self.F)


@dataclass(frozen=True)
class ProcessPath:
    r"""The process of fixed data at every time, for callers that need several times.

    Args:
        process: the process.
        F: :math:`t \mapsto F(x, t)`.
        r: :math:`t \mapsto \log S(x, t)`; None is S = 1.
    """

    process: "ForwardProcess"
    F: Path
    r: Path | None

    def at(self, t: Tensor) -> Instant:
        """Everything at float64 times ``t``, ``()`` or ``(B,)``."""
        c, (F, dF) = self.process.schedule(t), self.F.with_derivative(t)
        return Instant(c, F, dF) if self.r is None else Instant(c, F, dF, *self.r.with_derivative(t))

    def pair_at(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`Instant.pair` at the state ``z``, shape ``(B, *E)``; without S it takes no schedule."""
        return self.F.with_derivative(t) if self.r is None else self.at(t).pair_at(z)

    def std(self, t: Tensor, like: Tensor) -> Tensor:
        r""":math:`\sigma_t S(x, t)`, broadcastable to ``like``, ``(B, *E)``."""
        sigma = expand(self.process.schedule(t).sigma, like)
        return sigma if self.r is None else sigma * self.r(t).exp()

    def sample(self, t: Tensor, eps: Tensor) -> Tensor:
        r""":math:`z_t = \alpha_t F + \sigma_t S \epsilon`, shape ``(B, *E)``."""
        F = self.F(t)
        return expand(self.process.schedule(t).alpha, F) * F + self.std(t, F) * eps

    def carried(self, z: Tensor, F_t: Tensor, s: Tensor, t: Tensor, std: float | Tensor) -> Tensor:
        r"""What a step takes from R to :math:`F_s` because S is not 1, shape ``(B, *E)``.

        It is :math:`(\kappa_S - \kappa) R/\alpha_s`, with :math:`\kappa_S = \sqrt{\sigma_s^2 S_s^2 - \tilde\sigma^2} /
        (\sigma_t S_t)` and :math:`\kappa` the same for S = 1.

        Args:
            z: the state :math:`z_t`, shape ``(B, *E)``.
            F_t: :math:`F(x, t)`.
            s: the earlier time (less noise).
            t: the later time.
            std: :math:`\tilde\sigma`, a number, ``(B,)``, or broadcastable to ``(B, *E)``.
        """
        start, end = self.process.schedule(s), self.process.schedule(t)
        sigma_s, sigma_t, alpha_s = (expand(each, z) for each in (start.sigma, end.sigma, start.alpha))
        variance = expand(torch.as_tensor(std, dtype=torch.float64, device=z.device) ** 2, z)
        std_s, std_t = self.std(s, z), self.std(t, z)
        share = (variance / std_s**2).clamp(max=_LARGEST_SHARE)
        scaled = std_s * torch.sqrt(1.0 - share) / std_t
        plain = torch.sqrt((sigma_s**2 - variance).clamp(min=0.0)) / sigma_t
        return (scaled - plain) * (z - expand(end.alpha, z) * F_t) / alpha_s

    def posterior(self, F_s: Tensor, eps: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""Mean and variance of :math:`q(z_s \mid z_t, x)`, the latter over :math:`\tilde\sigma^2`, both ``(B, *E)``.

        Args:
            F_s: :math:`F(x, s)`, shape ``(B, *E)``.
            eps: the noise :math:`\epsilon` of :math:`z_t`, shape ``(B, *E)``.
            s: the earlier time (less noise).
            t: the later time.

        Raises:
            ValueError: the volatility varies over the event, where :math:`\tilde\sigma` and S may need two bases.
        """
        new = self.process.transition(s, t)[1]
        if new.ndim > 1:
            raise ValueError(
                "a discrete step with a noise_scale needs one volatility for all coordinates, but volatility(t) varies "
                "over the event; use elbo, or a volatility that depends on t alone."
            )
        std_s, variance = self.std(s, eps), expand(new, eps) ** 2
        share = (variance / std_s**2).clamp(max=_LARGEST_SHARE)
        mean = expand(self.process.schedule(s).alpha, eps) * F_s + std_s * torch.sqrt(1.0 - share) * eps
        return mean, share * std_s**2 / variance


class ForwardProcess(nn.Module):
    r"""Marginals, velocity, score and posterior of z given x.

    Args:
        transform: :math:`F(x, t)`.
        schedule: :math:`\alpha, \sigma`.
        volatility: :math:`\eta \ge 0`, a float or a callable of float64 time that returns the shape of its argument,
            or that shape followed by axes broadcastable to the event (then in the transform's basis).
        volatility_scale: a factor on it.
        noise_scale: :math:`r(x, t) = \log S(x, t)`, a :class:`~ndm_ct.transforms.NoiseScale`, a network or a function;
            None is S = 1.

    Raises:
        TypeError: the volatility is a tensor, or no number and not callable; the noise scale is not callable.
        ValueError: it is negative or not finite, or ``Matched`` with a transform that does not scale coordinates.
    """

    def __init__(
        self, transform: Transform, schedule: Schedule, volatility: Volatility, volatility_scale: float = 1.0,
        noise_scale: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if isinstance(volatility, Tensor):
            raise TypeError(
                "volatility must be a float or a callable of t, got a tensor; for a learned constant pass an nn.Module "
                "whose forward(t) returns it."
            )
        if not callable(volatility):
            validate_number("volatility", volatility)
        if not callable(volatility) and not (math.isfinite(volatility) and volatility >= 0.0):
            raise ValueError(f"volatility must be a float >= 0 or a callable of t, got {volatility!r}.")
        if isinstance(volatility, Matched) and not transform.scales:
            raise ValueError(
                f"a Matched volatility needs a transform that scales the coordinates of its basis, which "
                f"{type(transform).__name__} does not; use LearnedVolatility."
            )
        self.volatility_scale = volatility_scale
        self.transform, self.schedule, self.volatility = transform, schedule, volatility
        self.noise_scale: NoiseScale | None = as_noise_scale(noise_scale)

    @property
    def ordinary(self) -> bool:
        """Whether F is the identity and S = 1: an ordinary diffusion."""
        return isinstance(self.transform, Identity) and self.noise_scale is None

    @property
    def linear(self) -> bool:
        """Whether the pair at :math:`E[x | z]` is the mean of the pair: F is linear in x, and S = 1."""
        return self.transform.linear and self.noise_scale is None

    def along(self, x: Tensor, /, **cond: Any) -> ProcessPath:
        """The process of fixed data ``x``, shape ``(B, *E)``, under fixed conditioning."""
        r = None if self.noise_scale is None else self.noise_scale.along(x, **cond)
        return ProcessPath(self, self.transform.along(x, **cond), r)

    def eta(self, t: Tensor) -> Tensor:
        r""":math:`\eta(t)`, float64, of the shape of ``t``, or ``(B, *E')`` where it varies over the event."""
        if not callable(self.volatility):
            return torch.full_like(t, self.volatility_scale * self.volatility)
        # The volatility is called on a batch of times with one extra time appended: then its first axis is
        # unambiguously time, even if the event happens to have as many entries as there are times.
        flat = t.reshape(-1)
        eta = self._volatility_at(torch.cat([flat, flat[-1:]]))
        if eta.ndim == 0:
            return eta.expand(t.shape)
        if eta.shape[0] != len(flat) + len(flat[-1:]):
            raise ValueError(
                f"volatility(t) returned shape {tuple(eta.shape)} for {len(flat) + 1} times; return one value per "
                "time, or one row of values broadcastable to the event per time."
            )
        eta = eta[: len(flat)]
        if not bool((torch.isfinite(eta) & (eta >= 0.0)).all()):
            raise ValueError(f"volatility(t) must be finite and not negative, got {float(eta.detach().min()):g}.")
        return self.volatility_scale * (eta.reshape(t.shape) if eta.ndim == 1 else eta)

    def _volatility_at(self, t: Tensor) -> Tensor:
        if isinstance(self.volatility, Matched):
            return self.volatility(t, self.transform.log_rate(t), self.schedule(t).inverse_dgamma)
        assert callable(self.volatility)
        return of_time(self.volatility, t)

    def with_volatility(self, scale: float) -> "ForwardProcess":
        r"""The process with :math:`\eta` multiplied by ``scale``."""
        scale = scale * self.volatility_scale
        return ForwardProcess(self.transform, self.schedule, self.volatility, scale, self.noise_scale)

    def mean(self, x: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
        r""":math:`\alpha_t F(x, t)`, shape ``(B, *E)``.

        Args:
            x: data, shape ``(B, *E)``.
            t: float64 time, ``()`` or ``(B,)``.
            cond: conditioning of the transform.
        """
        return expand(self.schedule(t).alpha, x) * self.transform(x, t, **cond)

    def sample(
        self,
        x: Tensor,
        t: Tensor,
        /,
        *,
        eps: Tensor | None = None,
        generator: GeneratorLike = None,
        **cond: Any,
    ) -> Tensor:
        r"""Draw :math:`z_t = \alpha_t F(x, t) + \sigma_t S(x, t)\, \epsilon`.

        Args:
            x: data, shape ``(B, *E)``.
            t: float64 time, ``()`` or ``(B,)``.
            eps: the noise :math:`\epsilon`; drawn if None.
            generator: source of the noise.
            cond: conditioning of the transform.
        """
        if eps is None:
            eps = normal_like(x, as_randomness(generator, len(x), x.device, "process"))
        return self.along(x, **cond).sample(t, eps)

    def velocity(self, z: Tensor, x: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
        r""":math:`v(z, x, t)`: the time derivative of z at fixed x and :math:`\epsilon`, shape of ``z``.

        Args:
            z: state, shape ``(B, *E)``.
            x: the data it came from, shape ``(B, *E)``.
            t: float64 time, ``()`` or ``(B,)``.
            cond: conditioning of the transform.
        """
        here = self.along(x, **cond).at(t)
        return drift(z, *here.pair_at(z), here.c, self.transform)

    def score(self, z: Tensor, x: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
        r""":math:`s(z, x, t) = \nabla_z \log q(z_t \mid x)`; arguments and shape as of :meth:`velocity`."""
        c, path = self.schedule(t), self.along(x, **cond)
        score = (expand(c.alpha, z) * path.F(t) - z) / expand(c.sigma**2, z)
        return score if path.r is None else score * torch.exp(-2.0 * path.r(t))

    def reverse_drift(self, z: Tensor, x: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
        r""":math:`v - \tfrac12 g^2 s`, the drift of the reverse SDE given x; arguments as of :meth:`velocity`."""
        here = self.along(x, **cond).at(t)
        return drift(z, *here.pair_at(z), here.c, self.transform, self.half_rate(t))

    def half_rate(self, t: Tensor) -> Tensor:
        r""":math:`\tfrac12 g^2/\sigma^2 = \tfrac12 \eta \gamma'`, float64."""
        eta = self.eta(t)
        return 0.5 * eta * append_axes(self.schedule(t).dgamma, eta)

    def diffusion(self, t: Tensor) -> Tensor:
        r""":math:`g(t) = \sigma \sqrt{\eta \gamma'}`, float64; infinite where alpha = 0."""
        eta, c = self.eta(t), self.schedule(t)
        return append_axes(c.sigma * c.dgamma.sqrt(), eta) * eta.sqrt()

    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""The frozen-x step from t to s < t.

        Args:
            s: the earlier time (less noise), float64, ``()`` or ``(B,)``.
            t: the later time, of the shape of ``s``.

        Returns:
            :math:`\kappa` and :math:`\tilde\sigma`, float64, with the shape of :math:`\eta(t)`.
        """
        exponent = self._integrated_volatility(s, t)
        at_s = append_axes(self.schedule(s).sigma, exponent)
        at_t = append_axes(self.schedule(t).sigma, exponent)
        return at_s / at_t * torch.exp(-0.5 * exponent), at_s * torch.sqrt(-torch.expm1(-exponent))

    def posterior(self, z: Tensor, F_s: Tensor, F_t: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""Mean and standard deviation of :math:`q(z_s \mid z_t, x)` for S = 1, given F at both times.

        With the model's pair in place of F they are those of its own step, for any S.

        Args:
            z: :math:`z_t`, shape ``(B, *E)``.
            F_s: :math:`F(x, s)`.
            F_t: :math:`F(x, t)`.
            s: the earlier time (less noise).
            t: the later time.

        Returns:
            The mean, shape ``(B, *E)``, and :math:`\tilde\sigma` as a float64 coefficient for
            ``transform.diagonal``.
        """
        kappa, std = self.transition(s, t)
        residual = z - expand(self.schedule(t).alpha, z) * F_t
        return expand(self.schedule(s).alpha, z) * F_s + self.transform.diagonal(kappa, residual), std

    def _integrated_volatility(self, s: Tensor, t: Tensor) -> Tensor:
        r""":math:`\int_s^t \eta\gamma' du`, capped where its exponential is zero anyway."""
        start, end = self.schedule(s).gamma, self.schedule(t).gamma
        if not callable(self.volatility):
            constant = self.volatility_scale * self.volatility
            return torch.zeros_like(end) if constant == 0.0 else constant * (end - start)
        # Gauss-Legendre in gamma: the measure gamma' du is d gamma for every schedule.
        half = 0.5 * (end - start).clamp(max=_LARGEST_EXPONENT)
        total = half.new_zeros(())
        for node, weight in zip(_NODES, _WEIGHTS, strict=True):
            gamma = start + half * (1.0 + node)
            eta = self.eta(self.schedule.time_at(torch.atan(torch.exp(0.5 * gamma))))
            total = total + weight * append_axes(half, eta) * eta
        return torch.where(append_axes(end, total).isinf(), math.inf, total)
