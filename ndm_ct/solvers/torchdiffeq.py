r"""Adaptive solves of :math:`dy/dt = f(t, y)` by torchdiffeq, with one step size for the whole batch.

torchdiffeq is imported at the first solve. What is added to it:

* the field is never evaluated outside the interval (adaptive torchdiffeq overshoots its end);
* the error norm is the worst row's, so a hard row is not averaged away by easy ones;
* the state consists of tensors of any shape;
* every evaluation is counted, and failures name time, step size and batch rows.

References:
    Chen, torchdiffeq, https://github.com/rtqichen/torchdiffeq
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ndm_ct._core import checks
from ndm_ct._core.errors import SolverError
from ndm_ct.solvers.packing import Packing, State
from ndm_ct.solvers.solution import Solution, validate_slope, validate_tolerance

__all__ = ["ADAPTIVE_METHODS", "odeint"]

ADAPTIVE_METHODS = {"dopri5": 5, "dopri8": 8, "bosh3": 3, "adaptive_heun": 2}
"""Methods and their orders. torchdiffeq's fehlberg2 is left out: it misses its tolerance by a factor of 300."""

_MAX_STEPS = 10_000

Field = Callable[[Tensor, State], State]


class _Guarded:
    """The field as torchdiffeq calls it: clamped in time, counted, checked for NaN."""

    def __init__(
        self,
        function: Field,
        packing: Packing,
        interval: tuple[float, float],
        callback: Callable[[float], None] | None,
    ) -> None:
        self.function, self.packing, self.callback = function, packing, callback
        self.low, self.high = min(interval), max(interval)
        self.nfe = self.accepted = self.rejected = 0
        self.t, self.dt = interval[0], float("nan")
        self.last_norms: Tensor | None = None

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        t = t.to(torch.float64).clamp(self.low, self.high)
        self.nfe += 1
        derivative = self.packing.pack(self.function(t, self.packing.unpack(y)))
        validate_slope(derivative, t, self.dt)
        return derivative

    def norm(self, y: Tensor) -> Tensor:
        self.last_norms = self.packing.row_norms(y)
        return self.last_norms.amax()

    def callback_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        self.t, self.dt = float(t), float(dt)
        if self.callback is not None:
            self.callback(self.t)

    def callback_accept_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        self.accepted += 1

    def callback_reject_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        self.rejected += 1

    def worst_rows(self) -> tuple[int, ...]:
        if self.last_norms is None:
            return ()
        return tuple(torch.nonzero(self.last_norms > 1.0).flatten().tolist())


def odeint(
    function: Field,
    state: State,
    t0: float,
    t1: float,
    *,
    method: str = "dopri5",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = _MAX_STEPS,
    grid: Tensor | None = None,
    adjoint: tuple[Tensor, ...] | None = None,
    callback: Callable[[float], None] | None = None,
) -> Solution:
    r"""Solve :math:`dy/dt = f(t, y)` adaptively from t0 to t1, in either direction.

    A step is accepted when the worst row's error, a root mean square in units of ``atol + rtol |y|`` over each of the
    state's tensors separately, is at most one.

    Args:
        function: f, called with float64 t of shape ``()`` and the state's tensors; returns tensors of their shapes.
        state: initial tensors, each ``(B, *)``, of one dtype.
        t0: start.
        t1: end.
        method: one of ``ADAPTIVE_METHODS``.
        rtol: error allowed in one step, relative to the size of the state.
        atol: error allowed in one step where the state is near zero, in its own units.
        max_steps: bound on the number of steps.
        grid: increasing times ``(N,)`` from one end of the interval to the other. No step, forwards or of the
            adjoint equation, spans more than two of its cells, so that gradients are accurate where the value alone
            would allow longer steps. None sets no bound.
        adjoint: gradients by the adjoint equation, solved backwards, whose memory does not grow with the number of
            steps: all tensors besides the state that f depends on and that need a gradient. None: through the steps.
        callback: called with the time before every step.

    Raises:
        SolverError: the step size vanished, max_steps was reached, or the field is not finite.

    Example:
        >>> y = torch.ones(3, 1, dtype=torch.float64)
        >>> solution = odeint(lambda t, y: (-y[0],), (y,), 0.0, 1.0, rtol=1e-9, atol=1e-9)
        >>> bool((solution.state[0] - torch.exp(torch.tensor(-1.0)).double()).abs().max() < 1e-7)
        True
    """
    checks.choose("method", method, ADAPTIVE_METHODS)
    validate_tolerance("rtol", rtol, torch.float64)
    validate_tolerance("atol", atol, torch.float64)
    if t0 == t1 or state[0].shape[0] == 0:
        return Solution.of_batch(state, 0, 0)
    import torchdiffeq

    packing = Packing(tuple(part.shape for part in state))
    guarded = _Guarded(function, packing, (t0, t1), callback)
    times = torch.tensor([t0, t1], dtype=torch.float64, device=state[0].device)
    options = _bounds(grid, times[1]) | {"max_num_steps": max_steps, "norm": guarded.norm}
    solve = torchdiffeq.odeint
    if adjoint is not None:
        # The gradients of shared parameters have no rows, so the backward solve takes the norm of the rest.
        backwards = _bounds(grid, times[0]) | {"max_num_steps": max_steps, "norm": "seminorm"}
        solve = partial(torchdiffeq.odeint_adjoint, adjoint_params=adjoint, adjoint_options=backwards)
    try:
        y = solve(guarded, packing.pack(state), times, method=method, options=options, rtol=rtol, atol=atol)
    except AssertionError as error:
        rows = guarded.worst_rows()
        raise SolverError(
            f"{method} gave up at t={guarded.t:.6g} with step {guarded.dt:.3g} ({error}) after {guarded.accepted} "
            f"accepted and {guarded.rejected} rejected steps; worst batch rows {checks.some(rows)}. The field is "
            "too stiff or too rough for the tolerance: loosen rtol/atol, or raise t_min.",
            t=guarded.t, dt=guarded.dt, rows=rows,
        ) from error  # fmt: skip
    return Solution.of_batch(packing.unpack(y[-1]), guarded.nfe, guarded.accepted, guarded.rejected)


def _bounds(grid: Tensor | None, end: Tensor) -> dict[str, Any]:
    """Options that keep steps inside the interval, which ends at ``end``, and shorter than two cells of the grid.

    The longest pair of cells bounds every step. Where cells are narrower, steps stop at every second point.
    """
    if grid is None:
        return {"step_t": end[None]}
    points = torch.cat([grid[:-1:2], grid[-1:]])
    width = points.diff()
    narrow = points[1:-1][torch.minimum(width[1:], width[:-1]) < 0.99 * width.max()]
    return {"step_t": torch.cat([narrow, end[None]]), "max_step": float(width.max())}
