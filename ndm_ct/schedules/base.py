r"""What a noise schedule is: :math:`t \mapsto (\alpha_t, \sigma_t)` and their time derivatives.

.. math::
    q(z_t \mid x) = N(\alpha_t F(x, t),\ \sigma_t^2 I), \qquad
    \gamma(t) = \log \sigma_t^2 / \alpha_t^2, \qquad
    \gamma' = \frac{2 (\alpha \sigma' - \sigma \alpha')}{\alpha \sigma} .

Time runs from 0 (data) to 1 (noise). A schedule is a function of float64 time that returns
:class:`Coefficients`; everything else (:math:`\gamma`, its derivative, the angle
:math:`\arctan(\sigma/\alpha)`) follows from the four numbers :math:`\alpha, \sigma, \alpha', \sigma'`. Each schedule
gives these in closed form, without cancellation near either end.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ndm_ct._core.config import Configurable

__all__ = ["SAFE_NOISE", "Coefficients", "Level", "Schedule", "levels"]

SAFE_NOISE = 1e-3
"""Noise-to-signal ratio sigma/alpha, in the schedule's unit, at the default t_min where sigma(0) = 0."""


@dataclass(frozen=True)
class Coefficients:
    r"""The schedule at some times; every field and property has the shape of ``t`` and dtype float64.

    Args:
        alpha: :math:`\alpha_t`.
        sigma: :math:`\sigma_t`.
        dalpha: :math:`\alpha'_t = d\alpha/dt`, not positive.
        dsigma: :math:`\sigma'_t = d\sigma/dt`, positive.
    """

    alpha: Tensor
    sigma: Tensor
    dalpha: Tensor
    dsigma: Tensor

    @property
    def wronskian(self) -> Tensor:
        r""":math:`\alpha\sigma' - \sigma\alpha' > 0`; finite where :math:`\gamma'` is not."""
        return self.alpha * self.dsigma - self.sigma * self.dalpha

    @property
    def gamma(self) -> Tensor:
        r""":math:`\gamma = \log\sigma^2/\alpha^2 = -\log\mathrm{SNR}`; :math:`+\infty` where alpha = 0."""
        return 2.0 * (self.sigma.log() - self.alpha.log())

    @property
    def dgamma(self) -> Tensor:
        r""":math:`\gamma' = d\gamma/dt > 0`."""
        return 2.0 * self.wronskian / (self.alpha * self.sigma)

    @property
    def inverse_dgamma(self) -> Tensor:
        r""":math:`1/\gamma'`; zero where alpha = 0."""
        return self.alpha * self.sigma / (2.0 * self.wronskian)

    @property
    def snr_rate(self) -> Tensor:
        r""":math:`e^{-\gamma}\gamma' = -\mathrm{SNR}'`, the weight of the continuous ELBO; zero where alpha = 0."""
        return 2.0 * self.alpha * self.wronskian / self.sigma**3

    @property
    def dlog_sigma(self) -> Tensor:
        r""":math:`\sigma'/\sigma`."""
        return self.dsigma / self.sigma

    @property
    def angle(self) -> Tensor:
        r""":math:`\theta = \arctan(\sigma/\alpha) \in [0, \pi/2]`: a noise level that stays finite at alpha = 0."""
        return torch.atan2(self.sigma, self.alpha)

    @property
    def dangle(self) -> Tensor:
        r""":math:`\theta' = (\alpha\sigma' - \sigma\alpha')/(\alpha^2 + \sigma^2)`."""
        return self.wronskian / (self.alpha**2 + self.sigma**2)


class Schedule(nn.Module, Configurable):
    r"""A map from time to :class:`Coefficients`. Subclasses implement ``forward``.

    Example:
        >>> from ndm_ct.schedules import LinearLogSNR
        >>> schedule = LinearLogSNR(-10.0, 10.0)
        >>> schedule.gamma(torch.tensor(0.5, dtype=torch.float64))
        tensor(0., dtype=torch.float64)
    """

    def forward(self, t: Tensor) -> Coefficients:
        """Coefficients at float64 times ``t`` of any shape."""
        raise NotImplementedError

    def __call__(self, t: Tensor) -> Coefficients:
        return cast(Coefficients, super().__call__(t))

    def alpha(self, t: Tensor) -> Tensor:
        r""":math:`\alpha_t`, shape of ``t``."""
        return self(t).alpha

    def sigma(self, t: Tensor) -> Tensor:
        r""":math:`\sigma_t`, shape of ``t``."""
        return self(t).sigma

    def gamma(self, t: Tensor) -> Tensor:
        r""":math:`\gamma(t)`, shape of ``t``."""
        return self(t).gamma

    def time_at(self, angle: Tensor) -> Tensor:
        r"""The inverse of :math:`\theta(t) = \arctan(\sigma_t/\alpha_t)`, by bisection to the last bit of float64.

        Args:
            angle: :math:`\theta`, any shape; values outside the schedule's range give 0 or 1. A log-SNR is an angle
                too: :math:`\theta = \arctan e^{\gamma/2}`.

        Returns:
            t, the same shape; no gradient flows through it.
        """
        with torch.no_grad():
            low, high = torch.zeros_like(angle), torch.ones_like(angle)
            for _ in range(64):
                middle = 0.5 * (low + high)
                below = self(middle).angle < angle
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            return 0.5 * (low + high)

    @property
    def device(self) -> torch.device:
        """Device of the schedule's parameters; the CPU if it has none."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    @property
    def safe_t_min(self) -> float:
        r"""0 where :math:`\sigma_0 > 0`; else the time at which :math:`\sigma/\alpha` is 1e-3 units."""
        first, _ = self._ends()
        if first.sigma > 0.0:
            return 0.0
        noise = torch.full_like(first.time, SAFE_NOISE * self.unit)
        return float(self.time_at(torch.atan(noise)))

    @property
    def preserved_std(self) -> float:
        r"""The standard deviation s of data whose variance is the same at both ends of the process.

        It solves :math:`\alpha_0^2 s^2 + \sigma_0^2 = \alpha_1^2 s^2 + \sigma_1^2`, to four digits, so that it
        is exactly 1 for variance-preserving schedules. It is infinite where alpha falls little
        (:math:`\alpha_1^2 \ge \alpha_0^2/2`), and the data drown in noise instead of being scaled down.
        """
        first, last = self._ends()
        if last.alpha**2 >= 0.5 * first.alpha**2:
            return math.inf
        return float(f"{math.sqrt((last.sigma**2 - first.sigma**2) / (first.alpha**2 - last.alpha**2)):.4g}")

    @property
    def unit(self) -> float:
        r"""The scale of the data that the schedule is made for, in the data's own unit.

        It is :attr:`preserved_std` where that is finite, and otherwise :math:`\sqrt{\rho_0 \rho_1}/0.4`, the middle of
        the noise-to-signal ratios :math:`\rho = \sigma/\alpha` on a logarithmic scale. For :math:`\rho_0 = 0` it is
        :math:`\rho_1/80`. The numbers make it 1 for the noise of EDM, 0.002 to 80, which is meant for data in [-1, 1].
        """
        preserved = self.preserved_std
        if math.isfinite(preserved):
            return preserved
        first, last = self._ends()
        return math.sqrt(first.noise * last.noise) / 0.4 if first.sigma > 0.0 else last.noise / 80.0

    @property
    def largest_noise(self) -> float:
        r"""The largest :math:`\rho = \sigma/\alpha` that matters: :math:`\rho_1`, at most 1000 :attr:`preserved_std`.

        Above it nothing is left of the data, and one step with frozen prediction leads there from t = 1.
        """
        return min(self._ends()[1].noise, self.preserved_std / SAFE_NOISE)

    def _ends(self) -> list["Level"]:
        return levels(self, torch.tensor([0.0, 1.0], dtype=torch.float64, device=self.device))


@dataclass(frozen=True)
class Level:
    r"""The schedule at one time, in numbers.

    Args:
        t: the time.
        alpha: :math:`\alpha`.
        sigma: :math:`\sigma`.
        log_snr: :math:`\lambda = \log\alpha/\sigma`, half the log-SNR; infinite where alpha or sigma is zero.
        slope: :math:`dt/d\lambda`; zero where alpha is zero.
        dalpha: :math:`\alpha'`.
        dlog_sigma: :math:`\sigma'/\sigma`; infinite where sigma is zero.
        time: t as a float64 tensor, for the network.
    """

    t: float
    alpha: float
    sigma: float
    log_snr: float
    slope: float
    dalpha: float
    dlog_sigma: float
    time: Tensor

    @property
    def noise(self) -> float:
        r""":math:`\rho = \sigma/\alpha`, infinite where alpha is zero."""
        return self.sigma / self.alpha if self.alpha > 0.0 else math.inf


def levels(schedule: Schedule, times: Tensor) -> list[Level]:
    """The schedule at several times, in one evaluation.

    Args:
        schedule: the schedule.
        times: float64, shape ``(N,)``.
    """
    with torch.no_grad():
        c = schedule(times)
        numbers = (times, c.alpha, c.sigma, -0.5 * c.gamma, -2.0 * c.inverse_dgamma, c.dalpha, c.dlog_sigma)
        columns = [each.tolist() for each in numbers]
    return [Level(*row) for row in zip(*columns, times, strict=True)]
