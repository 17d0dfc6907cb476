r"""A path of the probability flow by exponential multistep, with one network evaluation per step.

In :math:`w = z/\sigma` and :math:`\varphi = \alpha/\sigma` the linear part of the flow disappears,

.. math::
    dw = D\, d\varphi, \qquad D = \hat F - \frac{\alpha\sigma}{\alpha\sigma' - \sigma\alpha'}\, \hat{\dot F} ,

and D, a denoised estimate, changes slowly. One grid serves all rows (:mod:`ndm_ct.solvers.multistep`). Its steps are
even in :math:`s = \operatorname{arsinh}(k \varphi)`, :math:`k = 10 \min(\rho_1, \rho^*)`, which is the log-SNR up to a
constant where the noise :math:`\rho = 1/\varphi` is smaller than :math:`k`, and finite where alpha is zero.

The number of steps follows the tolerance, :math:`N = 40\, (6 \cdot 10^{-5} / (\mathrm{rtol} + \mathrm{atol}))^{1/4}`.
It is more than two for every period of the fastest time feature of this library's networks; with fewer the steps and
the feature beat, and the error no longer falls with N. A row whose predictor and corrector differ by more than
:math:`100\,(\mathrm{rtol} + \mathrm{atol})` in units of the noise, or whose prediction is not finite, is solved again
with twice as many steps, and if that does not help by the adaptive solver.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ndm_ct._core.checks import append_axes
from ndm_ct.dynamics import ProbabilityFlow
from ndm_ct.model import NDM
from ndm_ct.solvers import Solution, graded_grid, odeint_multistep

__all__ = ["applies", "transport"]

STEPS, TOLERANCE, ORDER = 40, 6e-5, 4
"""Even steps at a tolerance, and the power of the step by which the error falls."""

CHANGE = 100.0
"""Largest difference between predictor and corrector, in tolerances."""


def applies(model: NDM) -> bool:
    """Whether the flow has the form :math:`dw = D\\,d\\varphi` all along: there is noise at both ends."""
    return model.t_noise == model.t_min


def transport(
    model: NDM, flow: Callable[[Tensor | None], ProbabilityFlow], start: Tensor, interval: tuple[float, float],
    tolerance: float, nodes: Tensor | None, callback: Callable[[float], None] | None, *, refined: int = 1,
    with_slopes: bool = False,
) -> Solution:  # fmt: skip
    """Solve for the path of every row on one grid.

    Args:
        model: gives the schedule.
        flow: the field of some rows; None is all.
        start: z at the start, float64, ``(B, *E)``.
        interval: times of start and end.
        tolerance: rtol + atol.
        nodes: times ``(N, B)`` at which z is wanted too.
        callback: called with the time before every step.
        refined: factor of the number of steps.
        with_slopes: whether to return the network part of the velocity that the path follows at the nodes.

    Returns:
        The solution; ``failed`` are the rows that the grid does not suit.
    """
    path = _Grid(model, interval, refined * steps_for(tolerance), start.device)
    c = path.at

    def denoised(n: int, w: Tensor, rows: Tensor) -> Tensor:
        part, _ = flow(None if len(rows) == len(start) else rows).network_part(path.times[n])(c.sigma[n] * w)
        return (-c.sigma[n] / c.wronskian[n]) * part

    at_nodes = None if nodes is None else model.schedule(nodes)
    solved = odeint_multistep(
        denoised, start / c.sigma[0], path.places, path.density, limit=CHANGE * tolerance,
        nodes=None if at_nodes is None else path.inside(at_nodes.alpha / at_nodes.sigma),
        callback=None if callback is None else lambda n: callback(float(path.times[n])), with_slopes=with_slopes,
    )  # fmt: skip
    states = slopes = None
    if solved.nodes is not None and at_nodes is not None:
        states = append_axes(at_nodes.sigma, solved.nodes) * solved.nodes
        if solved.slopes is not None:
            slopes = append_axes(-at_nodes.wronskian / at_nodes.sigma, solved.slopes) * solved.slopes
    return Solution(
        state=(c.sigma[-1] * solved.state,), nfe=solved.nfe, accepted=solved.nfe - 1,
        rejected=torch.zeros_like(solved.nfe), failed=solved.failed, nodes=states, slopes=slopes,
    )  # fmt: skip


def steps_for(tolerance: float) -> int:
    """Even steps of a path.

    Args:
        tolerance: rtol + atol.
    """
    return max(2, math.ceil(STEPS * (TOLERANCE / tolerance) ** (1.0 / ORDER)))


class _Grid:
    """The places s of a path and the times that belong to them.

    Args:
        model: gives the schedule.
        interval: times of start and end.
        steps: even steps.
        device: of the states.
    """

    def __init__(self, model: NDM, interval: tuple[float, float], steps: int, device: torch.device) -> None:
        ends = model.schedule(torch.tensor([*interval, 1.0], dtype=torch.float64, device=device))
        first, last, at_one = ends.alpha / ends.sigma
        self.turn = 10.0 * min(1.0 / float(at_one) if at_one > 0.0 else math.inf, model.schedule.preserved_std)
        self.places = graded_grid(float(self._place(first)), float(self._place(last)), steps, device)
        noise = torch.atan2(
            torch.full_like(self.places, 2.0 * self.turn), torch.exp(self.places) - torch.exp(-self.places)
        )
        self.times = model.schedule.time_at(noise).clamp(min(interval), max(interval))
        self.times[0], self.times[-1] = interval
        self.at = model.schedule(self.times)

    def density(self, s: Tensor) -> Tensor:
        r""":math:`d\varphi/ds`, shape of ``s``."""
        return 0.5 * (torch.exp(s) + torch.exp(-s)) / self.turn

    def inside(self, phi: Tensor) -> Tensor:
        r"""The places of some :math:`\varphi`, moved into the grid."""
        return self._place(phi).clamp(*self.places.aminmax())

    def _place(self, phi: Tensor) -> Tensor:
        # By log, and above by exp: torch's asinh rounds a number by its place in the tensor, and so by its neighbours.
        x = self.turn * phi
        return torch.log(x + torch.sqrt(x * x + 1.0))
