r"""DPM-Solver++: the linear part of the dynamics exact, the prediction D a polynomial in :math:`\lambda`.

With :math:`\lambda = \log\alpha/\sigma`, :math:`h = \lambda_s - \lambda_t > 0` and D of :mod:`ndm_ct.samplers.base`,
the probability flow is

.. math::
    z_s = \frac{\sigma_s}{\sigma_t} z_t + \sigma_s \int_{\lambda_t}^{\lambda_s} e^\lambda D\, d\lambda ,

and the reverse SDE of volatility :math:`\eta`, with :math:`D_\eta = (D + \eta \hat F)/(1 + \eta)`,

.. math::
    z_s = \frac{\sigma_s}{\sigma_t} e^{-\eta h} z_t
    + \sigma_s e^{-\eta\lambda_s} \int_{\lambda_t}^{\lambda_s} (1 + \eta)\, e^{(1 + \eta)\lambda} D_\eta\, d\lambda
    + \sigma_s \sqrt{1 - e^{-2 \eta h}}\, \epsilon .

First order freezes D; second and third extrapolate it from earlier steps ("M") or from a point inside the step ("S").

References:
    Lu et al., DPM-Solver++, https://arxiv.org/abs/2211.01095
    Zhang and Chen, Fast Sampling of Diffusion Models with Exponential Integrator, https://arxiv.org/abs/2204.13902
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ndm_ct._core.checks import is_whole
from ndm_ct._core.noise import Randomness, normal_like
from ndm_ct.model import NDM
from ndm_ct.samplers.base import Sampler, exponential_euler
from ndm_ct.schedules.base import Level

__all__ = ["DPMSolverPP", "DPMSolverPPSDE", "DPMSolverPPSingle", "Multistep"]


class Multistep(Sampler):
    """A sampler that remembers the predictions at the starts of its last steps.

    A step falls back to what the remembered predictions allow: the first steps, a step after a jump, steps next to an
    end where :math:`\\lambda` is infinite.

    Args:
        model: the model.
        order: predictions used, the new one included.
    """

    highest = 3

    def __init__(self, model: NDM, order: int = 2) -> None:
        super().__init__(model)
        if not is_whole(order) or not 1 <= order <= self.highest:
            raise ValueError(f"order of {type(self).__name__} must be 1 to {self.highest}, got {order!r}.")
        self.order = order
        self._history: list[tuple[Level, Tensor]] = []
        self._end: tuple[float, torch.Size] | None = None

    def _step(self, z: Tensor, t: Level, s: Level, generator: Randomness, cond: dict[str, Any]) -> Tensor:
        if self._end != (t.t, z.shape):
            self._forget()
        out = self._advance(z, t, s, generator, cond)
        self._end = (s.t, z.shape)
        return out

    def _forget(self) -> None:
        self._history = []

    def _remember(self, level: Level, value: Tensor) -> list[tuple[Level, Tensor]]:
        """Add a prediction; the list is newest first, with at most ``order`` of them."""
        if not math.isfinite(level.log_snr):
            return [(level, value)]
        self._history = [(level, value), *self._history][: self.order]
        return self._history

    def _advance(self, z: Tensor, t: Level, s: Level, generator: Randomness, cond: dict[str, Any]) -> Tensor:
        raise NotImplementedError


class DPMSolverPP(Multistep):
    r"""The multistep methods 2M and 3M.

    2M is the usual midpoint form, :math:`D \approx D_t + \tfrac{h}{2} D'`. 3M integrates the parabola through three
    predictions exactly; the form in wide use halves its quadratic term, which makes it a second-order method.

    Args:
        model: the model.
        order: 1 (the exponential Euler method; DDIM where F is the identity), 2 or 3.
    """

    def _advance(self, z: Tensor, t: Level, s: Level, generator: Randomness, cond: dict[str, Any]) -> Tensor:
        _, D = self.predict(z, t, cond)
        known = self._remember(t, D)
        h = s.log_snr - t.log_snr
        phi1 = math.expm1(-h)
        if len(known) < 3 or not math.isfinite(h):
            mean = -phi1 * (D + 0.5 * difference(known, h))
        else:
            phi2 = phi1 / h + 1.0
            first, second = derivatives(known, h)
            mean = -phi1 * D + phi2 * first + (1.0 - 2.0 * phi2 / h) * second
        return s.sigma / t.sigma * z + s.alpha * mean


class DPMSolverPPSDE(Multistep):
    """The multistep method 2M for the reverse SDE of the model's volatility.

    Args:
        model: the model; its volatility must not vary over the event.
        order: 1 or 2.
    """

    highest = 2
    uses_volatility = True

    def __init__(self, model: NDM, order: int = 2) -> None:
        super().__init__(model, order)
        with torch.no_grad():
            eta = model.process.eta(torch.ones(1, dtype=torch.float64, device=model.schedule.device))
        if eta.ndim > 1:
            raise ValueError(
                "DPMSolverPPSDE needs a volatility that is one number per time, this model's varies over the event; "
                "use method='sde' or 'ddpm'."
            )

    def _advance(self, z: Tensor, t: Level, s: Level, generator: Randomness, cond: dict[str, Any]) -> Tensor:
        F, D = self.predict(z, t, cond)
        if not self._plain:
            eta = float(self.model.process.eta(t.time))
            D = (D + eta * F) / (1.0 + eta)
        kappa, std = (float(value) for value in self.transition(t, s))
        h = s.log_snr - t.log_snr
        # kappa sigma_t / sigma_s is exp(-eta h), also where eta changes over the step.
        gain = 1.0 - math.exp(-h) * (kappa * t.sigma / s.sigma if s.sigma > 0.0 else 1.0)
        mean = kappa * z + s.alpha * gain * (D + 0.5 * difference(self._remember(t, D), h))
        return mean if std == 0.0 else mean + std * normal_like(z, generator)


class DPMSolverPPSingle(Sampler):
    r"""The singlestep method 2S: a second prediction half-way in :math:`\lambda`.

    A step next to an infinite :math:`\lambda` is of first order.

    Args:
        model: the model.
    """

    stages = 2

    def __init__(self, model: NDM) -> None:
        super().__init__(model)
        self._middles: dict[tuple[float, float], float] = {}

    def cost(self, steps: int) -> int:
        """See :class:`Sampler`; the step from alpha = 0 takes one evaluation."""
        return self.stages * steps - (0 if math.isfinite(self.level(1.0).log_snr) else 1)

    def visited(self, grid: Tensor) -> Tensor:
        """See :class:`Sampler`."""
        with torch.no_grad():
            gamma = self.model.schedule(grid).gamma
        middles = self.model.schedule.time_at(torch.atan(torch.exp(0.25 * (gamma[:-1] + gamma[1:]))))
        self._middles.update(zip(itertools.pairwise(grid.tolist()), middles.tolist(), strict=True))
        return torch.cat([grid, middles])

    def _step(self, z: Tensor, t: Level, s: Level, generator: Randomness, cond: dict[str, Any]) -> Tensor:
        _, D = self.predict(z, t, cond)
        h = s.log_snr - t.log_snr
        if math.isfinite(h):
            if (t.t, s.t) not in self._middles:
                self.visited(torch.stack([t.time, s.time]))
            u = self.level(self._middles[t.t, s.t])
            inside = exponential_euler(z, D, t, u)
            # The middle prediction stands for the whole step: D + (D_u - D) / (2 r) with r = 1/2.
            _, D = self.predict(inside, u, cond)
        return exponential_euler(z, D, t, s)


def difference(known: Sequence[tuple[Level, Tensor]], h: float) -> Tensor | float:
    """The newest prediction's change over h, by the line through the last two; zero if there is one."""
    if len(known) < 2 or not math.isfinite(h):
        return 0.0
    (newest, D), (older, E) = known[:2]
    return h / (newest.log_snr - older.log_snr) * (D - E)


def derivatives(known: Sequence[tuple[Level, Tensor]], h: float) -> tuple[Tensor, Tensor]:
    r"""Of the parabola :math:`D + a\tau + b\tau^2` in :math:`\tau = (\lambda - \lambda_t)/h`: a and b."""
    (t, D0), (u, D1), (w, D2) = known[:3]
    r0, r1 = (t.log_snr - u.log_snr) / h, (u.log_snr - w.log_snr) / h
    near, far = (D0 - D1) / r0, (D1 - D2) / r1
    second = (near - far) / (r0 + r1)
    return near + r0 * second, second
