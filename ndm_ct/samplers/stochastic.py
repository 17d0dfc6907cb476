r"""The reverse SDE :math:`dz = (v - \tfrac12 g^2 s)\,dt + g\,d\bar w`, one step of an SDE solver per interval.

g depends on time alone, so the Ito and Stratonovich readings agree, and a stochastic Runge-Kutta method is

.. math::
    z_i = z_t + (s - t) \sum_{j<i} a_{ij} f(z_j, t_j) + \sum_c g(t + c\,(s - t)) \bigl( b_{ic} W + d_{ic} U \bigr) ,

the last stage being :math:`z_s`. With h = t - s, W is what the Brownian path gains over the step and U the mean of what
it has gained by then, Gaussians made of independent standard normal :math:`\epsilon_1, \epsilon_2`:

.. math::
    W = \sqrt h\, \epsilon_1, \qquad U = \sqrt h\, \bigl( \tfrac12 \epsilon_1 + \epsilon_2/\sqrt{12} \bigr) .

A step from alpha = 0 or to sigma = 0, where the coefficients are infinite, is the frozen-prediction transition of
:mod:`ndm_ct.samplers.frozen`, which forgets :math:`z_t` as the SDE would.

References:
    Kloeden and Platen, Numerical Solution of Stochastic Differential Equations (1992)
    Roessler, Runge-Kutta Methods for the Strong Approximation of Solutions of SDEs (2010), SRA1
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ndm_ct._core.checks import choose
from ndm_ct._core.noise import Randomness, normal_like
from ndm_ct.model import NDM
from ndm_ct.samplers.base import Factor, Sampler, by_time, inner_times
from ndm_ct.samplers.frozen import DDPM
from ndm_ct.samplers.runge_kutta import advance
from ndm_ct.schedules.fixed import Level
from ndm_ct.solvers import validate_slope

__all__ = ["SCHEMES", "SDE"]

Weights = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Stage:
    """A state inside a step, or the one at its end.

    Args:
        node: where it is, as a share of the step.
        slopes: weights a of the slopes at the stages before it, the first of which is the start.
        W: pairs (c, b): the node of a g and its weight on W.
        U: pairs (c, d), likewise on U.
    """

    node: float
    slopes: tuple[float, ...]
    W: Weights = ()
    U: Weights = ()


SCHEMES = {
    "euler": (Stage(1.0, (1.0,), W=((0.0, 1.0),)),),
    "heun": (Stage(1.0, (1.0,), W=((0.0, 1.0),)), Stage(1.0, (0.5, 0.5), W=((0.0, 0.5), (1.0, 0.5)))),
    "midpoint": (Stage(0.5, (0.5,), W=((0.0, 0.5),)), Stage(1.0, (0.0, 1.0), W=((0.5, 1.0),))),
    "srk": (
        Stage(0.75, (0.75,), U=((1.0, 1.5),)),
        Stage(1.0, (1.0 / 3.0, 2.0 / 3.0), W=((1.0, 1.0),), U=((0.0, 1.0), (1.0, -1.0))),
    ),
}
"""Methods of :class:`SDE`: their stages, one evaluation each."""


class SDE(Sampler):
    """One step of a stochastic Runge-Kutta method.

    Args:
        model: the model.
        method: "euler" (Euler-Maruyama), "heun" (stochastic Heun), "midpoint" or "srk" (Roessler's scheme for
            additive noise, strong order 1.5).
    """

    uses_volatility = True

    def __init__(self, model: NDM, method: str = "heun") -> None:
        super().__init__(model)
        self.scheme = SCHEMES[choose("method", method, SCHEMES)]
        self.stages = len(self.scheme)
        self._first = DDPM(model)
        self._rates: dict[float, tuple[Factor, Factor]] = {}

    def cost(self, steps: int) -> int:
        """See :class:`Sampler`; the step from alpha = 0 takes one evaluation."""
        return self.stages * steps - (self.stages - 1 if self.level(1.0).alpha == 0.0 else 0)

    def visited(self, grid: Tensor) -> Tensor:
        """See :class:`Sampler`."""
        return torch.cat([grid, inner_times(grid, [stage.node for stage in self.scheme])])

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
        h, paths, slopes = t.t - s.t, self._paths(z, generator), list[Tensor]()
        state, at = z, t
        for stage in self.scheme:
            slopes.append(self.drift(state, at, cond, self._rates[at.t][0]))
            validate_slope(slopes[-1], at.time, h)
            state = advance(z, -h, stage.slopes, slopes)
            for weights, path in zip((stage.W, stage.U), paths, strict=False):  # there may be no path of U
                for node, weight in weights:
                    g = self._rates[self.inside(t, s, node).t][1]
                    state = self.plus(state, weight * math.sqrt(h) * g, path)
            at = self.inside(t, s, stage.node)
        return state

    def _paths(self, z: Tensor, generator: Randomness) -> list[Tensor]:
        r""":math:`W/\sqrt h`, and :math:`U/\sqrt h` if the method asks for it."""
        W = normal_like(z, generator)
        if not any(stage.U for stage in self.scheme):
            return [W]
        return [W, torch.add(0.5 * W, normal_like(z, generator), alpha=1.0 / math.sqrt(12.0))]
