r"""Runge-Kutta steps of the probability flow, in time and in the noise level.

In time, :math:`dz = v\,dt` by an explicit method with nodes :math:`c_i`, matrix :math:`a_{ij}` and weights
:math:`b_i`. In the noise level :math:`\rho = \sigma/\alpha`, with :math:`y = z/\alpha`,

.. math::
    dy = \hat\epsilon\, d\rho, \qquad
    y_s = y_t + (\rho_s - \rho_t)\, \tfrac12 (\hat\epsilon_t + \hat\epsilon_s) ,

Heun's method of EDM, with :math:`\hat\epsilon_s` from the Euler step; before a step the noise may be raised ("churn"):

.. math::
    \hat\rho = (1 + \gamma_{churn})\, \rho_t, \qquad
    \hat y = y_t + \sqrt{\hat\rho^2 - \rho_t^2}\; S_{noise}\, \epsilon .

References:
    Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, algorithms 1 and 2,
    https://arxiv.org/abs/2206.00364
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ndm_ct._core.checks import choose
from ndm_ct._core.noise import Randomness, normal_like
from ndm_ct.model import NDM
from ndm_ct.samplers.base import Sampler, exponential_euler, inner_times
from ndm_ct.schedules.base import Level

__all__ = ["EDM", "TABLEAUX", "RungeKutta", "advance"]


@dataclass(frozen=True)
class Tableau:
    """An explicit method: nodes, lower triangular matrix by rows (the first, empty, left out), weights, order."""

    nodes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    order: int


TABLEAUX = {
    "euler": Tableau((0.0,), (), (1.0,), 1),
    "midpoint": Tableau((0.0, 0.5), ((0.5,),), (0.0, 1.0), 2),
    "heun": Tableau((0.0, 1.0), ((1.0,),), (0.5, 0.5), 2),
    "rk4": Tableau(
        (0.0, 0.5, 0.5, 1.0), ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1.0 / 6.0, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 6.0), 4
    ),
}
"""Methods of :class:`RungeKutta`."""


class RungeKutta(Sampler):
    """One step of an explicit Runge-Kutta method in time.

    A step to sigma = 0 of a method with a stage there is the exponential Euler step, which has a limit.

    Args:
        model: the model.
        method: a name of ``TABLEAUX``.
    """

    def __init__(self, model: NDM, method: str = "heun") -> None:
        super().__init__(model)
        self.tableau = TABLEAUX[choose("method", method, TABLEAUX)]
        self.stages = len(self.tableau.nodes)

    def visited(self, grid: Tensor) -> Tensor:
        """See :class:`Sampler`."""
        return torch.cat([grid, inner_times(grid, self.tableau.nodes)])

    def _step(self, z: Tensor, t: Level, s: Level, generator: Randomness, cond: dict[str, Any]) -> Tensor:
        if s.sigma == 0.0 and self.tableau.nodes[-1] == 1.0:
            _, D = self.predict(z, t, cond)
            return s.alpha * D
        h, slopes = s.t - t.t, [self.drift(z, t, cond)]
        for c, row in zip(self.tableau.nodes[1:], self.tableau.matrix, strict=True):
            slopes.append(self.drift(advance(z, h, row, slopes), self.inside(t, s, c), cond))
        return advance(z, h, self.tableau.weights, slopes)


def advance(z: Tensor, h: float, weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    r""":math:`z + h \sum_j w_j f_j`."""
    for weight, slope in zip(weights, slopes, strict=True):
        if weight != 0.0:
            z = torch.add(z, slope, alpha=h * weight)
    return z


class EDM(Sampler):
    r"""Heun's method in the noise level, with or without churn.

    A step from alpha = 0 or to sigma = 0 is Euler's, which has a limit there (DDIM). Churn needs F the identity: more
    noise belongs to a later time, and noise alone does not take a moving F there.

    Args:
        model: the model.
        churn: :math:`S_{churn}`; :math:`\gamma_{churn} = \min(S_{churn}/N, \sqrt2 - 1)` on a grid of N steps.
        noise_range: :math:`(S_{min}, S_{max})`, the :math:`\rho` between which noise is added.
        noise_scale: :math:`S_{noise}`.
    """

    stages = 2

    def __init__(
        self,
        model: NDM,
        churn: float = 0.0,
        noise_range: tuple[float, float] = (0.0, math.inf),
        noise_scale: float = 1.0,
    ) -> None:
        super().__init__(model)
        if churn < 0.0 or noise_scale <= 0.0 or not 0.0 <= noise_range[0] <= noise_range[1]:
            raise ValueError(
                f"EDM needs churn >= 0, noise_scale > 0 and an ordered noise_range, got {churn!r}, {noise_scale!r}, "
                f"{noise_range!r}."
            )
        if churn > 0.0 and not model.process.ordinary:
            moves = "noise_scale is given" if model.noise_scale else f"transform is {type(model.transform).__name__}"
            raise ValueError(
                f"EDM's churn raises the noise of a state whose F and S do not move, but {moves}; use churn=0, or "
                "method='sde' or 'ddpm' for noise along the way."
            )
        self.churn, self.noise_range, self.noise_scale = churn, noise_range, noise_scale
        self._raised: dict[float, float] | None = {} if churn == 0.0 else None

    def cost(self, steps: int) -> int:
        """See :class:`Sampler`; the step from alpha = 0 takes one evaluation."""
        return self.stages * steps - (1 if self.level(1.0).alpha == 0.0 else 0)

    def prepare(self, grid: Tensor) -> None:
        """See :class:`Sampler`; fixes the amount of churn per step."""
        super().prepare(grid)
        factor = 1.0 + min(self.churn / (len(grid) - 1), math.sqrt(2.0) - 1.0)
        self._raised = {}
        if factor == 1.0:
            return
        raised_at = self._raised
        here = [self.level(t) for t in grid[:-1].tolist()]
        noise = torch.tensor([factor * level.noise for level in here], dtype=torch.float64, device=grid.device)
        times = self.model.schedule.time_at(torch.atan(noise)).clamp(max=1.0)
        self.remember(times)
        low, high = self.noise_range
        for level, raised in zip(here, times.tolist(), strict=True):
            if low <= level.noise <= high and raised > level.t:
                raised_at[level.t] = raised

    def _step(self, z: Tensor, t: Level, s: Level, generator: Randomness, cond: dict[str, Any]) -> Tensor:
        if self._raised is None:
            raise ValueError("churn is shared out over the steps of a grid; call prepare(grid) before the first step.")
        if t.t in self._raised:
            z, t = self._churned(z, t, self.level(self._raised[t.t]), generator)
        _, D = self.predict(z, t, cond)
        euler = exponential_euler(z, D, t, s)
        if t.alpha == 0.0 or s.sigma == 0.0:
            return euler
        _, D_s = self.predict(euler, s, cond)
        mean = 0.5 * ((z - t.alpha * D) / t.sigma + (euler - s.alpha * D_s) / s.sigma)
        return s.alpha * (z / t.alpha + (s.noise - t.noise) * mean)

    def _churned(self, z: Tensor, t: Level, raised: Level, generator: Randomness) -> tuple[Tensor, Level]:
        std = raised.alpha * math.sqrt(raised.noise**2 - t.noise**2) * self.noise_scale
        return raised.alpha / t.alpha * z + std * normal_like(z, generator), raised
