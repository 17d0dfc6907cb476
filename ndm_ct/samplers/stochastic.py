r"""The reverse SDE :math:`dz = (v - \tfrac12 g^2 s)\,dt + g\,d\bar w`, one step of an SDE solver per interval.

:class:`SDE` takes the steps of this library, :class:`TorchSDE` those of torchsde. g depends on time alone, so the Ito
and Stratonovich integrals agree. A stochastic Runge-Kutta method is

.. math::
    z_i = z_t + (s - t) \sum_{j<i} a_{ij} f(z_j, t_j) + \sum_c g(t + c\,(s - t)) \bigl( b_{ic} W + d_{ic} U \bigr) ,

where the last stage is :math:`z_s`. With h = t - s, W is the increment of the Brownian path over the step, and U is the
mean of the path's increment during the step. Both are made of independent standard normal
:math:`\epsilon_1, \epsilon_2`:

.. math::
    W = \sqrt h\, \epsilon_1, \qquad U = \sqrt h\, \bigl( \tfrac12 \epsilon_1 + \epsilon_2/\sqrt{12} \bigr) .

The coefficients are infinite at alpha = 0 and at sigma = 0. A step from or to there is the frozen-prediction transition
of :mod:`ndm_ct.samplers.frozen`, which forgets :math:`z_t` as the SDE does.

References:
    Kloeden and Platen, Numerical Solution of Stochastic Differential Equations (1992)
    Roessler, Runge-Kutta Methods for the Strong Approximation of Solutions of SDEs (2010), SRA1
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ndm_ct._core.autodiff import tensors_behind
from ndm_ct._core.checks import as_time, choose
from ndm_ct._core.conditioning import tensors_in
from ndm_ct._core.noise import Randomness, normal_like
from ndm_ct.model import NDM
from ndm_ct.samplers.base import Factor, Sampler, by_time, inner_times
from ndm_ct.samplers.frozen import DDPM
from ndm_ct.samplers.runge_kutta import advance
from ndm_ct.schedules.base import Level
from ndm_ct.solvers import SDE_METHODS, sdeint, validate_slope

__all__ = ["SCHEMES", "SDE", "TorchSDE", "torchsde_fields"]

Weights = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Stage:
    """A state inside a step, or the one at its end.

    Args:
        node: its place, as a share of the step.
        slopes: weights a of the slopes at the earlier stages. The first stage is the start of the step.
        W: pairs (c, b): the node at which g is taken, and the weight of W.
        U: pairs (c, d): the node at which g is taken, and the weight of U.
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
"""Stages of the methods of :class:`SDE`. Each stage takes one evaluation."""


class _ReverseSDE(Sampler):
    """A sampler of the reverse SDE. Steps next to infinite coefficients are the frozen-prediction transition."""

    uses_volatility = True

    def __init__(self, model: NDM, stages: int) -> None:
        super().__init__(model)
        self.stages = stages
        self._first = DDPM(model)

    def cost(self, steps: int) -> int:
        """See :class:`Sampler`. The step from alpha = 0 takes one evaluation."""
        return self.stages * steps - (self.stages - 1 if self.level(1.0).alpha == 0.0 else 0)

    def _step(self, z: Tensor, t: Level, s: Level, generator: Randomness, cond: dict[str, Any]) -> Tensor:
        if t.alpha == 0.0 or s.sigma == 0.0:
            self.evaluations += 1
            return self._first.step(z, t.t, s.t, generator=generator, **cond)
        return self._inside(z, t, s, generator, cond)

    def _inside(self, z: Tensor, t: Level, s: Level, generator: Randomness, cond: dict[str, Any]) -> Tensor:
        raise NotImplementedError


class SDE(_ReverseSDE):
    """One step of a stochastic Runge-Kutta method.

    Args:
        model: the model.
        method: "euler" (Euler-Maruyama), "heun" (stochastic Heun), "midpoint" or "srk" (Roessler's scheme for
            additive noise, strong order 1.5).
    """

    def __init__(self, model: NDM, method: str = "heun") -> None:
        self.scheme = SCHEMES[choose("method", method, SCHEMES)]
        super().__init__(model, len(self.scheme))
        self._rates: dict[float, tuple[Factor, Factor]] = {}

    def visited(self, grid: Tensor) -> Tensor:
        """See :class:`Sampler`."""
        return torch.cat([grid, inner_times(grid, [stage.node for stage in self.scheme])])

    def remember(self, times: Tensor) -> None:
        """See :class:`Sampler`. Keeps volatility and diffusion too."""
        super().remember(times)
        with torch.no_grad():
            rates = self.model.process.half_rate(times), self.model.process.diffusion(times)
        self._rates.update(zip(times.tolist(), by_time(*rates), strict=True))

    def _inside(self, z: Tensor, t: Level, s: Level, generator: Randomness, cond: dict[str, Any]) -> Tensor:
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
        r""":math:`W/\sqrt h`, and :math:`U/\sqrt h` if the method uses it."""
        W = normal_like(z, generator)
        if not any(stage.U for stage in self.scheme):
            return [W]
        return [W, torch.add(0.5 * W, normal_like(z, generator), alpha=1.0 / math.sqrt(12.0))]


class TorchSDE(_ReverseSDE):
    """One step of torchsde's solver.

    Args:
        model: the model.
        method: one of ``solvers.SDE_METHODS``.
        differentiable: "adjoint" gets gradients from torchsde's adjoint equation. Otherwise they go through the steps,
            where the caller has gradients enabled.
    """

    def __init__(self, model: NDM, method: str = "heun", differentiable: bool | Literal["adjoint"] = False) -> None:
        self.method, self.differentiable = choose("method", method, SDE_METHODS), differentiable
        super().__init__(model, SDE_METHODS[method][1])

    def _inside(self, z: Tensor, t: Level, s: Level, generator: Randomness, cond: dict[str, Any]) -> Tensor:
        transform, grid = self.model.transform, torch.stack([t.time, s.time])
        drift, diffusion, adjoint = torchsde_fields(self.model, z, t.t, self.differentiable, cond)
        solution = sdeint(
            drift, diffusion, transform.to_basis(z), grid, method=self.method, generator=generator, adjoint=adjoint
        )
        self.evaluations += int(solution.nfe.max()) if len(z) else 0
        return transform.from_basis(solution.state[0])


Field = Callable[[Tensor, Tensor], Tensor]


def torchsde_fields(
    model: NDM, z: Tensor, t: float, differentiable: bool | Literal["adjoint"], cond: Mapping[str, Any]
) -> tuple[Field, Field, tuple[Tensor, ...] | None]:
    """Drift and diffusion of the reverse SDE, and the tensors whose gradients its adjoint equation has to find.

    Args:
        model: the model.
        z: a state, shape ``(B, *E)``.
        t: its time, at which the fields are evaluated once for "adjoint", to see what they depend on.
        differentiable: whether gradients are wanted, and how; without "adjoint" the tensors are None.
        cond: conditioning.
    """
    sde = model.reverse_sde(z.dtype, **cond)
    if differentiable != "adjoint":
        return sde.drift, sde.diffusion, None

    def drift(t: Tensor, y: Tensor) -> Tensor:
        # torchsde solves the adjoint equation in the backward pass, after eval mode has ended.
        with model.evaluating():
            return sde.drift(t, y)

    with torch.enable_grad():
        y, time = model.transform.to_basis(z).detach().requires_grad_(), as_time(t, z.device)
        outputs = [drift(time, y), sde.diffusion(time, y)]
        return drift, sde.diffusion, tensors_behind(outputs, [y], tensors_in(dict(cond)))
