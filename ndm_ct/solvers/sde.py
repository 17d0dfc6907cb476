r"""Adaptive solves of :math:`dy = f(t, y)\,dt + g(t)\,dw` in which every row has its own steps and Brownian path.

Over a step from t to t + h (h negative when time runs backwards), with an increment
:math:`\Delta W \sim N(0, |h|)`, Euler-Maruyama is embedded in stochastic Heun,

.. math::
    y' &= y + h f(t, y) + g(t)\,\Delta W, \\
    y'' &= y + \tfrac h2 \bigl[ f(t, y) + f(t + h, y') \bigr] + \tfrac12 \bigl[ g(t) + g(t + h) \bigr] \Delta W .

The step is accepted, with :math:`y''`, if

.. math::
    E = \operatorname{rms}\!\left(\frac{y'' - y'}{\mathrm{atol} + \mathrm{rtol}\,\max(|y|, |y''|)}\right) \le 1 ,

and the next h is :math:`\min(5, \max(0.2, 0.9\,E^{-2/3}))` times this one: the difference is of order
:math:`h^{3/2}`, the noise of a step acting on the slope of f.

**Rejections.** Whether a trial fails depends on its :math:`\Delta W`. Drawing another one would select among increments
and change the law of the samples, the more the tighter the tolerance. So the increment is kept: the shorter trial takes
its part of it, given by the Brownian bridge,

.. math::
    W_h \mid W_L = X \;\sim\; N\Bigl( \tfrac hL X,\ \tfrac{h (L - h)}{L} \Bigr), \qquad h < L ,

and the rest waits on the row's stack until the row gets there. Every path is Brownian whatever the steps. A step ends
at the latest where a known piece ends, and a piece is cut into equal steps, so that no sliver is left.

References:
    Jolicoeur-Martineau et al., Gotta Go Fast When Generating Data with Score-Based Models,
    https://arxiv.org/abs/2105.14080
    Rackauckas and Nie, Adaptive Methods for Stochastic Differential Equations via Natural Embeddings and Rejection
    Sampling with Memory, https://arxiv.org/abs/1703.06727
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ndm_ct._core import checks
from ndm_ct._core.noise import GeneratorLike, Randomness, as_randomness, normal_like, rows_of
from ndm_ct.solvers.packing import Packing
from ndm_ct.solvers.rows import Rows, RowSolve
from ndm_ct.solvers.solution import Solution, validate_tolerance

__all__ = ["sdeint_rows"]

SAFETY, SHRINK, GROW = 0.9, 0.2, 5.0
EXPONENT = 2.0 / 3.0
STRETCH = 1.01
"""A step may be this much longer than planned, so that no sliver is left of a piece or of the interval."""
ROUNDING = 1e-9
"""Relative error of sums of steps, below which a step has reached the end."""
MAX_EVALUATIONS = 20_000

RowFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A coefficient, called as ``f(t (b,), y (b, *E), rows (b,))``: ``rows`` are the numbers of the rows still in the
batch."""


def sdeint_rows(
    drift: RowFunction,
    diffusion: RowFunction,
    y: Tensor,
    t0: float,
    t1: float,
    *,
    first_step: float,
    rtol: float = 1e-2,
    atol: float = 1e-2,
    generator: GeneratorLike = None,
    max_evaluations: int = MAX_EVALUATIONS,
    callback: Callable[[float], None] | None = None,
) -> Solution:
    r"""Solve :math:`dy = f\,dt + g\,dw` from t0 to t1, in either direction, each row with its own steps.

    The noise is additive and diagonal. The solution carries no graph.

    Args:
        drift: f, which returns ``(b, *E)``; see ``RowFunction``.
        diffusion: g, broadcastable to ``(b, *E)``; it must not depend on the value of y.
        y: initial state ``(B, *E)``.
        t0: start.
        t1: end.
        first_step: length of the first trial step.
        rtol: error allowed in one step, relative to the size of the state. Ten times smaller costs about 4.6 times the
            evaluations.
        atol: error allowed in one step where the state is near zero, in its own units.
        generator: source of the noise. With one per row, a row's result depends on its state and its generator alone,
            up to rounding. With one for the batch, the rows take turns in an order that depends on all of them.
        max_evaluations: bound on the evaluations of a row.
        callback: called with the time of the row that is furthest behind, before every evaluation.

    Raises:
        SolverError: a row's drift is NaN or infinite, its step vanished, or it needs more evaluations.

    Example:
        >>> still, moving = (lambda t, y, rows: 0.0 * y), (lambda t, y, rows: torch.ones_like(y))
        >>> solution = sdeint_rows(still, moving, torch.zeros(3, 2), 0.0, 1.0, first_step=0.1)
        >>> bool((solution.nfe == 2 * solution.accepted + solution.rejected).all())
        True
    """
    for name, value in (("rtol", rtol), ("atol", atol)):
        validate_tolerance(name, value, y.dtype)
    checks.validate_count("max_evaluations", max_evaluations)
    generator = as_randomness(generator, len(y), y.device, "sdeint_rows")
    packing = Packing((y.shape,))

    def packed(function: RowFunction) -> RowFunction:
        def of_packed(t: Tensor, y: Tensor, rows: Tensor) -> Tensor:
            (state,) = packing.unpack(y)
            return function(t, state, rows).expand_as(state).reshape_as(y)

        return of_packed

    with torch.no_grad():
        solve = _Solve(packing, t0, t1, max_evaluations, packed(drift), packed(diffusion), rtol, atol, generator)
        solve.start(packing.pack((y,)), first_step)
        solve.run(callback)
        return solve.solution()


class Brownian:
    """The Brownian path ahead of each row, already drawn where a rejected trial has looked.

    The drawn part of a row's path is a stack of pieces, each a length and the increment over it, the nearest on top.

    Args:
        like: a packed state ``(B, D)``: shape, dtype and device of increments.
        generator: source of the noise, one or one per row.
    """

    def __init__(self, like: Tensor, generator: Randomness) -> None:
        self.generator = generator
        self.depth = torch.zeros(len(like), dtype=torch.long, device=like.device)
        self.lengths = torch.zeros(len(like), 2, dtype=torch.float64, device=like.device)
        self.pieces = like.new_zeros(len(like), 2, like.shape[1])

    def draw(self, wanted: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """The next step and the increment over it.

        Args:
            wanted: its length, float64 ``(B,)``; the answer is at most ``STRETCH`` times as long.
            which: the rows that take a step, a mask ``(B,)``; the others keep what they have.

        Returns:
            Lengths ``(B,)`` and increments ``(B, D)``; outside ``which`` they mean nothing.
        """
        known = which & (self.depth > 0)
        if not bool(known.any()):
            return wanted, _column(wanted.sqrt(), self.pieces) * self._normal(which)
        rows, top = torch.arange(len(known), device=known.device), (self.depth - 1).clamp(min=0)
        length, piece = self.lengths[rows, top], self.pieces[rows, top]
        parts = torch.ceil(length / wanted / STRETCH).clamp(min=1.0)
        h = torch.where(known, length / parts, wanted)
        share = torch.where(known, 1.0 / parts, 0.0)
        noise = self._normal(which & ~(known & (parts == 1.0)))
        increment = _column(share, piece) * piece + _column((h * (1.0 - share)).sqrt(), piece) * noise
        self.lengths[rows, top] = torch.where(known, length - h, length)
        self.pieces[rows, top] = torch.where(known[:, None], piece - increment, piece)
        self.depth = self.depth - (known & (parts == 1.0)).long()
        return h, increment

    def give_back(self, h: Tensor, increment: Tensor, which: Tensor) -> None:
        """Put the last step of some rows, a mask, back on their stacks."""
        rows = torch.nonzero(which).flatten()
        if len(rows) == 0:
            return
        top = self.depth[rows]
        if int(top.max()) == self.lengths.shape[1]:
            self.lengths = torch.cat([self.lengths, torch.zeros_like(self.lengths)], 1)
            self.pieces = torch.cat([self.pieces, torch.zeros_like(self.pieces)], 1)
        self.lengths[rows, top], self.pieces[rows, top] = h[rows], increment[rows]
        self.depth[rows] += 1

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.depth, self.lengths, self.pieces = self.depth[rows], self.lengths[rows], self.pieces[rows]
        self.generator = rows_of(self.generator, rows)

    def _normal(self, which: Tensor) -> Tensor:
        """Standard normal numbers for some rows, zero for the others; only theirs are drawn."""
        like = self.pieces[:, 0]
        if bool(which.all()):
            return normal_like(like, self.generator)
        rows, noise = torch.nonzero(which).flatten(), torch.zeros_like(like)
        noise[rows] = normal_like(like[rows], rows_of(self.generator, rows))
        return noise


@dataclass(frozen=True)
class _Rows(Rows):
    """Rows of the batch.

    Args:
        g: g(t), ``(b, D)``.
        slope: f(t, y).
        length: length of the trial under way.
        end: its end.
        increment: its Brownian increment.
        euler: its Euler-Maruyama state.
        trying: whether a trial is under way; otherwise the slope at t is evaluated next.
    """

    g: Tensor
    slope: Tensor
    length: Tensor
    end: Tensor
    increment: Tensor
    euler: Tensor
    trying: Tensor


class _Solve(RowSolve[_Rows]):
    """A solve under way; every round is one evaluation, in which some rows begin a step and others finish a trial."""

    name = 'method "sde"'
    rounds_are = "evaluations"
    cure = "Loosen rtol/atol, raise t_min, or look at the network's output there."
    vanished, vanished_when_nan = 1e-10, 1e-6

    def __init__(
        self, packing: Packing, t0: float, t1: float, limit: int, drift: RowFunction, diffusion: RowFunction,
        rtol: float, atol: float, generator: Randomness,
    ) -> None:  # fmt: skip
        super().__init__(packing, t0, t1, limit, forgiving=False)
        self.drift, self.diffusion, self.rtol, self.atol, self.generator = drift, diffusion, rtol, atol, generator
        self.brownian: Brownian

    def start(self, y: Tensor, first_step: float) -> None:
        """Set up the rows with their first step."""
        common = self.start_rows(y)
        h, every = common["h"] + first_step, common["finite"]
        g = self.diffusion(common["t"], y, common["index"])
        self.rows = _Rows(
            **common | {"h": h}, g=g, slope=y, length=h, end=common["t"], increment=y, euler=y, trying=~every
        )
        self.brownian = Brownian(y, self.generator)
        if self.length == 0.0 or len(y) == 0:
            self.leave(every, failed=~every)

    def step(self) -> Tensor:
        """One evaluation: rows with a trial accept or reject it, the others begin one."""
        rows = self.rows
        trying = rows.trying[:, None]
        t, y = torch.where(rows.trying, rows.end, rows.t), torch.where(trying, rows.euler, rows.y)
        slope = self.drift(t, y, rows.index)
        self.nfe += 1
        begin = ~rows.trying
        if bool(begin.any()):
            # No step is short enough for a row whose slope is not finite, so its next one has length zero.
            finite = rows.trying | torch.isfinite(slope).all(1)
            h = torch.where(finite, rows.h, 0.0)
            rows = replace(rows, slope=torch.where(trying, rows.slope, slope), finite=finite, h=h)
        if bool(rows.trying.any()):
            rows, rejected = self._judge(rows, slope)
            begin = begin | rejected
        self.rows = rows
        if bool(begin.any()):
            self._begin(begin)
        return rows.t == self.t1

    def _judge(self, rows: _Rows, slope: Tensor) -> tuple[_Rows, Tensor]:
        """Finish the trials: the rows after it, and which of them were rejected."""
        g = self.diffusion(rows.end, rows.y, rows.index)
        noise = 0.5 * (rows.g + g) * rows.increment
        heun = rows.y + 0.5 * self._signed(rows.length) * (rows.slope + slope) + noise
        tolerance = self.atol + self.rtol * torch.maximum(rows.y.abs(), heun.abs())
        error = ((heun - rows.euler) / tolerance).square().mean(1).sqrt().double()
        error = torch.where(error.isfinite(), error, math.inf)
        accept = rows.trying & (error <= 1.0)
        wide = accept[:, None]
        rejected = rows.trying & ~accept
        self.brownian.give_back(rows.length, rows.increment, rejected)
        factor = (SAFETY * error**-EXPONENT).clamp(SHRINK, GROW)
        return replace(
            rows,
            t=torch.where(accept, rows.end, rows.t),
            y=torch.where(wide, heun, rows.y),
            g=torch.where(wide, g, rows.g),
            h=torch.where(rows.trying, factor * rows.length, rows.h),
            finite=torch.where(rows.trying, error.isfinite(), rows.finite),
            trying=rows.trying & ~accept,
            accepted=rows.accepted + accept,
            rejected=rows.rejected + rejected,
        ), rejected

    def _begin(self, which: Tensor) -> None:
        """Begin a trial in some rows, a mask."""
        rows = self.rows
        remaining = self.direction * (self.t1 - rows.t)
        wanted = torch.where(STRETCH * rows.h >= remaining, remaining, rows.h)
        length, increment = self.brownian.draw(wanted, which)
        end = torch.where(length >= (1.0 - ROUNDING) * remaining, self.t1, rows.t + self.direction * length)
        euler = rows.y + self._signed(length) * rows.slope + rows.g * increment
        wide = which[:, None]
        self.rows = replace(
            rows,
            length=torch.where(which, length, rows.length),
            end=torch.where(which, end, rows.end),
            increment=torch.where(wide, increment, rows.increment),
            euler=torch.where(wide, euler, rows.euler),
            trying=rows.trying | which,
        )

    def _signed(self, length: Tensor) -> Tensor:
        """A step as a column in the state's dtype, negative when time runs backwards."""
        return _column(self.direction * length, self.rows.y)

    def keep(self, rows: Tensor) -> None:
        self.brownian.keep(rows)


def _column(c: Tensor, like: Tensor) -> Tensor:
    """A number per row as ``(B, 1)``, in the dtype of a state."""
    return c.to(like.dtype)[:, None]
