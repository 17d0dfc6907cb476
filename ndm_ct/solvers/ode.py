r"""Adaptive solves of :math:`dy/dt = f(t, y)` in which every batch row has its own step size.

The pair of Dormand and Prince, of order 5 with an embedded solution of order 4,

.. math::
    k_i = f\Bigl(t + c_i h,\ y + h \sum_{j<i} a_{ij} k_j\Bigr), \qquad
    y^{+} = y + h \sum_i b_i k_i, \qquad
    e = h \sum_i (b_i - \hat b_i)\,k_i,

and its interpolant of order 4, :math:`y(t + \theta h) = y + h \sum_i b_i(\theta) k_i`. A row's step is accepted when

.. math::
    \max_{\text{parts}} \operatorname{rms}\!\left(\frac{e}{\mathrm{atol} + \mathrm{rtol}\,|y|}\right) \le 1

over the tensors of the state; the first of them may have a scale s(t), and then the tolerance
:math:`(\mathrm{atol} + \mathrm{rtol})\,s(t)`. Rows share only the calls of f (:mod:`ndm_ct.solvers.rows`). With one
step size for the whole batch, see :mod:`ndm_ct.solvers.torchdiffeq`.

References:
    Dormand and Prince, A family of embedded Runge-Kutta formulae (1980)
    Shampine, Some Practical Runge-Kutta Formulas (1986), the interpolant
    Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, sections II.4 and II.6
    Gustafsson, Control theoretic techniques for stepsize selection (1991), the controller
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ndm_ct._core import checks
from ndm_ct.solvers.packing import Packing, State
from ndm_ct.solvers.rows import Rows, RowSolve
from ndm_ct.solvers.solution import Solution

__all__ = ["odeint_rows"]

C = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
A = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
"""The last row is also b: the seventh stage is the first of the next step."""
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
"""b minus the weights of the embedded solution."""
INTERPOLANT = (
    (1.0, -8048581381 / 2820520608, 8663915743 / 2820520608, -12715105075 / 11282082432),
    (0.0, 0.0, 0.0, 0.0),
    (0.0, 131558114200 / 32700410799, -68118460800 / 10900136933, 87487479700 / 32700410799),
    (0.0, -1754552775 / 470086768, 14199869525 / 1410260304, -10690763975 / 1880347072),
    (0.0, 127303824393 / 49829197408, -318862633887 / 49829197408, 701980252875 / 199316789632),
    (0.0, -282668133 / 205662961, 2019193451 / 616988883, -1453857185 / 822651844),
    (0.0, 40617522 / 29380423, -110615467 / 29380423, 69997945 / 29380423),
)
r"""Coefficients of :math:`\theta, \theta^2, \theta^3, \theta^4` in :math:`b_i(\theta)`."""

SAFETY, SHRINK, GROW = 0.9, 0.2, 6.0
MEMORY = 0.04
"""Exponent of the last error in the controller: beta in Hairer's code, with his value."""
STRETCH = 1.01
"""The last step may be this much longer than planned, so that no sliver is left; as in Hairer's code."""
_MAX_STEPS = 10_000

RowField = Callable[[Tensor, State, Tensor], tuple[State, State | None]]
"""The field, called as ``f(t (b,), state (b, *), rows (b,))``: ``rows`` are the numbers of the rows still in the batch.

It returns their derivatives and, optionally, the gradient of a functional L of the solution with respect to the state
there, in the shapes of the state. A row whose derivative is NaN takes a smaller step or fails; an exception ends the
solve of all rows."""


def odeint_rows(
    function: RowField,
    state: State,
    t0: float,
    t1: float,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    scale: Callable[[Tensor], Tensor] | None = None,
    nodes: Tensor | None = None,
    grid: Tensor | None = None,
    on_failure: str = "raise",
    max_steps: int = _MAX_STEPS,
    callback: Callable[[float], None] | None = None,
) -> Solution:
    r"""Solve :math:`dy/dt = f(t, y)` from t0 to t1, in either direction, each row with its own steps.

    With gradients enabled the solution carries the graph of the steps taken, their sizes held fixed.

    Args:
        function: f; see ``RowField``. It gets t in float64, always inside the interval, and the state in its own dtype.
        state: initial tensors, each ``(B, *)``, of one dtype.
        t0: start.
        t1: end.
        rtol: error allowed in one step, relative to the size of the state. Ten times smaller costs about 1.6 times the
            evaluations.
        atol: error allowed in one step where the state is near zero, in its own units.
        scale: s(t) > 0, ``(b,)`` to ``(b,)``, where t is the end of the step: the error allowed in the first tensor is
            then ``(atol + rtol) * s(t)``, whatever its size. None is the size of the tensor.
        nodes: times ``(N, B)`` between t0 and t1, in any order, at which the first tensor is wanted.
        grid: increasing times ``(N,)`` from one end of the interval to the other; no step spans more than two of its
            cells. The error of a step is that of the value, and steps that suit the value can be far too long for its
            gradient; a grid bounds them. None sets no bound.
        on_failure: "raise" a SolverError, or "nan": a failed row becomes NaN and the others go on.
        max_steps: bound on the steps of a row, rejected ones included.
        callback: called with the time of the row that is furthest behind, before every step.

    Raises:
        SolverError: a row's step size vanished, it took max_steps, or its field is not finite.

    Example:
        >>> rate = torch.tensor([1.0, 50.0], dtype=torch.float64)
        >>> def decay(t, state, rows):
        ...     return (-rate[rows, None] * state[0],), None
        >>> solution = odeint_rows(decay, (torch.ones(2, 1, dtype=torch.float64),), 0.0, 1.0, rtol=1e-9, atol=1e-9)
        >>> bool((solution.state[0][:, 0] - torch.exp(-rate)).abs().max() < 1e-7), solution.accepted.tolist()
        (True, [17, 103])
    """
    checks.choose("on_failure", on_failure, ("raise", "nan"))
    checks.validate_count("max_steps", max_steps)
    for name, value in (("rtol", rtol), ("atol", atol)):
        checks.validate_positive(name, value)
    nodes = None if nodes is None else _validate_nodes(nodes, state[0], min(t0, t1), max(t0, t1))
    packing = Packing(tuple(part.shape for part in state))
    solve = _Solve(packing, t0, t1, max_steps, on_failure == "nan", function, rtol, atol, scale, nodes, grid)
    solve.start(packing.pack(state))
    solve.run(callback)
    return solve.solved()


def _validate_nodes(nodes: Tensor, like: Tensor, low: float, high: float) -> Tensor:
    if nodes.ndim != 2 or nodes.shape[1] != like.shape[0]:
        raise ValueError(f"nodes has shape {tuple(nodes.shape)}, expected (N, {like.shape[0]}), N times for each row.")
    nodes = nodes.detach().to(dtype=torch.float64, device=like.device)
    if not bool(((nodes >= low) & (nodes <= high)).all()):
        raise ValueError(
            f"nodes must lie between t0 and t1, in [{low!r}, {high!r}], got times in [{float(nodes.min())!r}, "
            f"{float(nodes.max())!r}]; compute and clamp them in float64."
        )
    return nodes


@dataclass(frozen=True)
class _Rows(Rows):
    """Rows of the batch.

    Args:
        k: f(t, y), the last stage of the step before and the first of the next.
        barrier: end of the last rejected trial; h does not grow before it is passed.
        log_ratio: log of the error of the last accepted step in units of its tolerance.
        error: the error of L so far.
    """

    k: Tensor
    barrier: Tensor
    log_ratio: Tensor
    error: Tensor


@dataclass(frozen=True)
class _Trial:
    """A step of every row, not yet accepted.

    Args:
        t: its end.
        y: the state there.
        step: its size, signed, ``(b, 1)`` in the state's dtype.
        stages: k_1 to k_7.
        gradient: of L at the end.
        error: e, without a graph.
    """

    t: Tensor
    y: Tensor
    step: Tensor
    stages: list[Tensor]
    gradient: Tensor | None
    error: Tensor


class _Solve(RowSolve[_Rows]):
    """A solve under way; every round is one trial step of each row."""

    name = 'method "ode"'
    rounds_are = "steps"
    cure = (
        "Loosen rtol/atol, raise t_min, look at the network's output there, or pass on_failure='nan' to lose only "
        "these rows."
    )
    vanished, vanished_when_nan = 1e-13, 1e-7

    def __init__(
        self, packing: Packing, t0: float, t1: float, limit: int, forgiving: bool, function: RowField, rtol: float,
        atol: float, scale: Callable[[Tensor], Tensor] | None, nodes: Tensor | None, grid: Tensor | None,
    ) -> None:  # fmt: skip
        super().__init__(packing, t0, t1, limit, forgiving)
        self.grid = None if grid is None else (self.direction * grid.detach()).sort().values
        self.function, self.rtol, self.atol, self.scale, self.nodes = function, rtol, atol, scale, nodes
        self.at_nodes: list[tuple[Tensor, Tensor, Tensor]] = []
        self.has_gradient = True

    def start(self, y: Tensor) -> None:
        """Nodes at t0, the field there, the first step sizes; a row without a finite field fails at once."""
        common = self.start_rows(y)
        zero, every = common["h"], common["finite"]
        self.rows = _Rows(**common, k=torch.zeros_like(y), barrier=common["t"], log_ratio=zero, error=zero)
        if self.nodes is not None:
            node, row = torch.nonzero(self.nodes == self.t0, as_tuple=True)
            self.at_nodes.append((node, row, y[row, : self.packing.widths[0]]))
        if self.length == 0.0 or len(y) == 0:
            self.leave(every, failed=~every)
            return
        k, gradient = self._evaluate(self.rows.t, y)
        self.nfe, self.has_gradient = 1, gradient is not None
        finite = (torch.isfinite(k) & torch.isfinite(y)).all(1)
        self.rows = replace(self.rows, k=k, finite=finite)
        if not bool(finite.all()):
            self.leave(~finite, failed=~finite)
            if len(self.rows.index) == 0:
                return
            if k.requires_grad:  # without the failed rows, for the reason given in step
                self.rows = replace(self.rows, k=self._evaluate(self.rows.t, self.rows.y)[0])
        self.rows = replace(self.rows, h=self._first_step())
        self.nfe = 2

    def step(self) -> Tensor:
        """One trial step of every row in the batch, accepted or rejected."""
        rows = self.rows
        remaining = self.direction * (self.t1 - rows.t)
        h = self._bounded(rows)
        last = STRETCH * h >= remaining
        h = torch.where(last, remaining, h)
        end = torch.where(last, self.t1, rows.t + self.direction * h)
        trial = self._trial(h, end)
        ratio = self._ratio(trial)
        finite = ratio < torch.inf
        if trial.y.requires_grad and not bool(finite.all()):
            # A value that is not used gets gradient zero, but zero times NaN would reach the field's parameters. So the
            # step is done again, in which the rows that met NaN stand still; the others do what they did before.
            trial = self._trial(torch.where(finite, h, 0.0), torch.where(finite, end, rows.t))
        accept = ratio <= 1.0
        self.nfe += len(C) - 1
        self._collect_nodes(trial, accept)
        self._advance(trial, accept, finite)
        self._control(h, end, ratio, accept)
        return accept & last

    def _bounded(self, rows: _Rows) -> Tensor:
        """The planned step, cut where it would span more than two cells of the grid."""
        if self.grid is None:
            return rows.h
        t = self.direction * rows.t
        after_next = torch.searchsorted(self.grid, t, right=True) + 1
        return torch.minimum(rows.h, self.grid[after_next.clamp(max=len(self.grid) - 1)] - t)

    def _evaluate(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        derivative, gradient = self.function(t, self.packing.unpack(y), self.rows.index)
        return self.packing.pack(derivative).to(y.dtype), None if gradient is None else self.packing.pack(gradient)

    def _trial(self, h: Tensor, end: Tensor) -> _Trial:
        rows, signed = self.rows, self.direction * h
        step = signed.to(rows.y.dtype)[:, None]
        stages, y, gradient = [rows.k], rows.y, None
        for c, a in zip(C[1:], A[1:], strict=True):
            y = torch.addcmul(rows.y, step, _combine(a, stages))
            k, gradient = self._evaluate(end if c == 1.0 else rows.t + c * signed, y)
            stages.append(k)
        with torch.no_grad():
            error = step * _combine(ERROR, stages)
        return _Trial(end, y, step, stages, gradient, error)

    def _ratio(self, trial: _Trial) -> Tensor:
        """The error in units of its tolerance, inf where something is not finite."""
        size = torch.maximum(self.rows.y.detach().abs(), trial.y.detach().abs())
        ratio = self.packing.row_norms(trial.error / self._tolerance(size, trial.t)).double()
        return ratio.nan_to_num(nan=torch.inf, posinf=torch.inf)

    def _tolerance(self, size: Tensor, t: Tensor) -> Tensor:
        tolerance = self.atol + self.rtol * size
        if self.scale is not None:
            tolerance[:, : self.packing.widths[0]] = (self.atol + self.rtol) * self.scale(t).to(size.dtype)[:, None]
        return tolerance

    def _advance(self, trial: _Trial, accept: Tensor, finite: Tensor) -> None:
        rows, chosen, error = self.rows, accept[:, None], self.rows.error
        if trial.gradient is not None:
            change = (trial.gradient.detach() * trial.error).sum(1).abs().double()
            error = error + torch.where(accept, change, 0.0)
        self.rows = replace(
            rows, t=torch.where(accept, trial.t, rows.t), y=torch.where(chosen, trial.y, rows.y),
            k=torch.where(chosen, trial.stages[-1], rows.k), finite=finite, accepted=rows.accepted + accept,
            rejected=rows.rejected + ~accept, error=error,
        )  # fmt: skip

    def _control(self, h: Tensor, end: Tensor, ratio: Tensor, accept: Tensor) -> None:
        """The next step: Gustafsson's controller after an accepted one, the elementary one after a rejected one.

        By exp and log, because torch's pow rounds a number by its place in the tensor, and so by the rows beside it.
        """
        rows, log_ratio = self.rows, ratio.clamp(min=1e-10).log()
        smooth = SAFETY * torch.exp(MEMORY * rows.log_ratio - (0.2 - 0.75 * MEMORY) * log_ratio)
        plain = SAFETY * torch.exp(-0.2 * log_ratio)
        most = torch.where(self.direction * (end - rows.barrier) >= 0.0, GROW, 1.0)
        factor = torch.where(accept, torch.minimum(smooth, most), plain).clamp(min=SHRINK)
        self.rows = replace(
            rows, h=h * factor, barrier=torch.where(accept, rows.barrier, end),
            log_ratio=torch.where(accept, log_ratio.clamp(min=math.log(1e-4)), rows.log_ratio),
        )  # fmt: skip

    @torch.no_grad()
    def _first_step(self) -> Tensor:
        """Hairer's guess from the size of the field and of its change over a small Euler step."""
        rows, short = self.rows, 1e-6 * self.length
        tolerance = self._tolerance(rows.y.abs(), rows.t)
        size = self.packing.row_norms(rows.y / tolerance).double()
        speed = self.packing.row_norms(rows.k / tolerance).double()
        h = torch.where((size < 1e-5) | (speed < 1e-5), short, 0.01 * size / speed).clamp(max=self.length)
        signed = self.direction * h
        # t0 plus the length of the interval can be a rounding error beyond t1.
        t = (rows.t + signed).clamp(min(self.t0, self.t1), max(self.t0, self.t1))
        k, _ = self._evaluate(t, torch.addcmul(rows.y, signed.to(rows.y.dtype)[:, None], rows.k))
        change = self.packing.row_norms((k - rows.k) / tolerance).double() / h
        largest = torch.maximum(speed, change)
        better = torch.where(largest <= 1e-15, (1e-3 * h).clamp(min=short), torch.exp(0.2 * (0.01 / largest).log()))
        guess = torch.where(torch.isfinite(change), torch.minimum(100.0 * h, better), short)
        return guess.clamp(min=10.0 * self.smallest)

    def _collect_nodes(self, trial: _Trial, accept: Tensor) -> None:
        """The interpolant at the nodes passed, t < node <= t + h: every node falls into exactly one accepted step."""
        if self.nodes is None:
            return
        rows, width = self.rows, self.packing.widths[0]
        nodes = self.nodes[:, rows.index]
        ahead, not_beyond = self.direction * (nodes - rows.t) > 0.0, self.direction * (nodes - trial.t) <= 0.0
        node, row = torch.nonzero(ahead & not_beyond & accept, as_tuple=True)
        theta = ((nodes - rows.t) / (trial.t - rows.t))[node, row].to(trial.y.dtype)[:, None]
        value = rows.y[row, :width]
        for (c1, c2, c3, c4), k in zip(INTERPOLANT, trial.stages, strict=True):
            weight = theta * (c1 + theta * (c2 + theta * (c3 + theta * c4)))
            value = torch.addcmul(value, trial.step[row] * weight, k[row, :width])
        self.at_nodes.append((node, rows.index[row], value))

    def solved(self) -> Solution:
        """The solution, with its error estimate and its nodes."""
        failed = self.gather(lambda left: left.failed)
        error = torch.where(failed, torch.nan, self.gather(lambda left: left.rows.error))
        return self.solution(error if self.has_gradient else None, self._values_at_nodes(failed))

    def _values_at_nodes(self, failed: Tensor) -> Tensor | None:
        if self.nodes is None:
            return None
        node, row, value = (torch.cat(parts) for parts in zip(*self.at_nodes, strict=True))
        values = value.new_zeros(*self.nodes.shape, value.shape[1]).index_put((node, row), value)
        values = torch.where(failed[:, None], torch.nan, values)
        return values.reshape(self.nodes.shape + self.packing.shapes[0][1:])


def _combine(coefficients: tuple[float, ...], stages: list[Tensor]) -> Tensor:
    total = coefficients[0] * stages[0]
    for c, k in zip(coefficients[1:], stages[1:], strict=True):
        if c != 0.0:
            total.add_(k, alpha=c)
    return total
