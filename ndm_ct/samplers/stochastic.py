r"""The reverse SDE :math:`dz = (v - \tfrac12 g^2 s)\,dt + g\,d\bar w`, one step of an SDE solver per interval.

A step from alpha = 0 or to sigma = 0, where the coefficients are infinite, is the frozen-prediction transition of
:mod:`ndm_ct.discrete`, which forgets :math:`z_t` as the SDE would.
"""

from typing import Any

import torch
from torch import Tensor

from ndm_ct import solvers
from ndm_ct._noise import Randomness
from ndm_ct._shapes import choose
from ndm_ct.discrete import DDPM
from ndm_ct.model import NDM
from ndm_ct.process import drift
from ndm_ct.schedules import Level
from ndm_ct.stepping import Sampler, by_time

__all__ = ["SDE"]


class SDE(Sampler):
    """One step of torchsde.

    Args:
        model: the model.
        method: "euler" (Euler-Maruyama), "heun" (stochastic Heun), "midpoint" or "srk" (Roessler's scheme for
            additive noise, strong order 1.5).
    """

    uses_volatility = True

    def __init__(self, model: NDM, method: str = "heun") -> None:
        super().__init__(model)
        self.method = choose("method", method, solvers.SDE_METHODS)
        self.stages = solvers.SDE_METHODS[method][1]
        self._first = DDPM(model)
        self._rates: dict[float, tuple[Tensor, Tensor]] = {}
        self._stepper: tuple[Tensor, solvers.SDEStep] | None = None
        self._cond: dict[str, Any] = {}

    def cost(self, steps: int) -> int:
        """See :class:`Sampler`; the step from alpha = 0 takes one evaluation."""
        return self.stages * steps - (self.stages - 1 if self.level(1.0).alpha == 0.0 else 0)

    def visited(self, grid: Tensor) -> Tensor:
        """See :class:`Sampler`; the stages of "midpoint" and "srk" lie at these times, to the last bit."""
        t, s = -grid[:-1], -grid[1:]
        return torch.cat([grid, -(t + (s - t) / 2), -(t + 0.75 * (s - t)), -(t + (s - t))])

    def remember(self, times: Tensor) -> None:
        """See :class:`Sampler`; keeps volatility and diffusion, too."""
        super().remember(times)
        with torch.no_grad():
            rates = self.model.process.half_rate(times), self.model.process.diffusion(times)
        self._rates.update(zip(times.tolist(), by_time(*rates), strict=True))

    def _step(self, z: Tensor, t: Level, s: Level, generator: Randomness, cond: dict[str, Any]) -> Tensor:
        if t.alpha == 0.0 or s.sigma == 0.0:
            self.evaluations += 1
            return self._first.step(z, t.t, s.t, generator=generator, **cond)
        transform, self._cond = self.model.transform, cond
        y = transform.to_basis(z)
        return transform.from_basis(self._step_like(y)(t.time, s.time, y, generator))

    def _step_like(self, y: Tensor) -> solvers.SDEStep:
        """torchsde's step for states like this one, made once."""
        if self._stepper is None or not _alike(self._stepper[0], y):
            self._stepper = y, solvers.SDEStep(self._drift, self._diffusion, y, (1.0, 0.0), method=self.method)
        return self._stepper[1]

    def _drift(self, t: Tensor, y: Tensor) -> Tensor:
        transform, level = self.model.transform, self.level(t)
        z = transform.from_basis(y)
        F, dF = self.moments(z, level, self._cond)
        return transform.to_basis(drift(z, F, dF, level, transform, self._rates[level.t][0]))

    def _diffusion(self, t: Tensor, y: Tensor) -> Tensor:
        return self._rates[self.level(t).t][1]


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
