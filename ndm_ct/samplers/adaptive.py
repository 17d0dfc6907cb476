r"""Adaptive solves of the reverse SDE in which every batch row has its own steps and its own Brownian path.

From t to t - h, with the drift f and the diffusion g of :mod:`ndm_ct.dynamics` and an increment
:math:`\Delta W \sim N(0, h)`, Euler-Maruyama is embedded in stochastic Heun,

.. math::
    z' &= z - h f(z, t) + g(t)\,\Delta W, \\
    z'' &= z - \tfrac h2 \bigl[ f(z, t) + f(z', t - h) \bigr] + \tfrac12 \bigl[ g(t) + g(t - h) \bigr] \Delta W .

The step is accepted, with :math:`z''`, if

.. math::
    E = \operatorname{rms}\!\left(\frac{z'' - z'}{\mathrm{atol} + \mathrm{rtol}\,\max(|z|, |z''|)}\right) \le 1 ,

and the next h is :math:`\min(5, \max(0.2, 0.9\,E^{-2/3}))` times this one: the difference is of order
:math:`h^{3/2}`, the noise of a step acting on the slope of f.

**Rejections.** Whether a trial fails depends on its :math:`\Delta W`. To draw another would select among increments and
spoil the law of the samples, the more the tighter the tolerance: the variance of one coordinate of Gaussian data came
out at 1.4 times its value for tolerances of 0.1, at 2.1 times for 0.01. So the increment is kept: the shorter trial
takes its part of it, given by the Brownian bridge,

.. math::
    W_h \mid W_L = X \;\sim\; N\Bigl( \tfrac hL X,\ \tfrac{h (L - h)}{L} \Bigr), \qquad h < L ,

and what remains waits on the row's stack until the row gets there. Every path is Brownian whatever the steps. A step
ends where a known piece ends, at the latest, and a piece is cut into equal steps, so that no sliver is left.

Where :math:`\sigma/\alpha` exceeds 1000 at t = 1, and g may be infinite, the first step is the transition with frozen
prediction down to 1000.

References:
    Jolicoeur-Martineau et al., Gotta Go Fast When Generating Data with Score-Based Models,
    https://arxiv.org/abs/2105.14080
    Rackauckas and Nie, Adaptive Methods for Stochastic Differential Equations via Natural Embeddings and Rejection
    Sampling with Memory, https://arxiv.org/abs/1703.06727
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ndm_ct._core import checks as _shapes
from ndm_ct._core.checks import as_time, expand
from ndm_ct._core.errors import SolverError
from ndm_ct._core.noise import Randomness, normal_like, rows_of
from ndm_ct.dynamics import ReverseSDE
from ndm_ct.model import NDM
from ndm_ct.samplers.frozen import DDPM
from ndm_ct.schedules.fixed import SAFE_NOISE
from ndm_ct.solvers.backends import validate_tolerance
from ndm_ct.solvers.packing import Rows

__all__ = ["Drawn", "sde_rows"]

SAFETY, SHRINK, GROW = 0.9, 0.2, 5.0
EXPONENT = 2.0 / 3.0
STRETCH = 1.01
"""A step may be this much longer than planned, so that no sliver is left of a piece or of the interval."""
FIRST = 0.1
"""The first step in units of the log-SNR."""
ROUNDING = 1e-9
"""Relative error of sums of steps, below which a step has reached the end."""
VANISHED, VANISHED_WHEN_NAN = 1e-10, 1e-6
"""Steps, relative to the interval, at which a row fails."""
MAX_EVALUATIONS = 20_000


@dataclass(frozen=True)
class Drawn:
    """What a solve returns.

    Args:
        z: the state at t_min, ``(B, *E)``.
        evaluations: of each row, ``(B,)``: the first step with frozen prediction, two for every accepted step, one for
            every rejected one.
        accepted: accepted steps of each row, ``(B,)``, the first one included.
        rejected: rejected steps of each row, ``(B,)``.
    """

    z: Tensor
    evaluations: Tensor
    accepted: Tensor
    rejected: Tensor


def sde_rows(
    model: NDM,
    z: Tensor,
    *,
    rtol: float = 1e-2,
    atol: float = 1e-2,
    generator: Randomness = None,
    max_evaluations: int = MAX_EVALUATIONS,
    callback: Callable[[float], None] | None = None,
    **cond: Any,
) -> Drawn:
    r"""Solve the model's reverse SDE from t = 1 down to t_min, each row with steps of its own.

    With one generator per row a row's sample is a function of its state and its generator, to rounding, whatever batch
    it is in. With one for the batch, the rows share it in an order that depends on all of them.

    Args:
        model: the model, in eval mode.
        z: state at t = 1, shape ``(B, *E)``.
        rtol: relative tolerance.
        atol: absolute tolerance.
        generator: source of the noise, one or one per row.
        max_evaluations: bound on the network evaluations of a row.
        callback: called with the time of the row that is furthest behind, before every evaluation.
        cond: conditioning, tensors with B rows.

    Raises:
        SolverError: a row's prediction is NaN or infinite, its step vanished, or it needs more evaluations.

    Example:
        >>> import ndm_ct
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
        >>> drawn = sde_rows(model, torch.zeros(3, 2))
        >>> bool((drawn.evaluations == 2 * drawn.accepted + drawn.rejected).all())
        True
    """
    for name, value in (("rtol", rtol), ("atol", atol)):
        validate_tolerance(name, value, z.dtype)
    _shapes.validate_count("max_evaluations", max_evaluations)
    with torch.no_grad():
        solve = _Solve(model, rtol, atol, generator, max_evaluations, cond)
        solve.start(z)
        while len(solve.rows.index) > 0:
            if callback is not None:
                callback(float(solve.rows.t.max()))
            solve.evaluate()
        return solve.drawn()


class Brownian:
    """The Brownian paths of some rows ahead of them, known where a rejected trial has looked.

    What is known of a row's path is a stack of pieces, each a length and the increment over it, the nearest on top.

    Args:
        like: a state ``(B, *E)``: shape, dtype and device of increments.
        generator: source of the noise, one or one per row.
    """

    def __init__(self, like: Tensor, generator: Randomness) -> None:
        self.generator = generator
        self.depth = torch.zeros(len(like), dtype=torch.long, device=like.device)
        self.lengths = torch.zeros(len(like), 2, dtype=torch.float64, device=like.device)
        self.pieces = like.new_zeros(len(like), 2, *like.shape[1:])

    def draw(self, wanted: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """The next step and the increment over it.

        Args:
            wanted: its length, float64 ``(B,)``; the answer is at most ``STRETCH`` times as long.
            which: the rows that take a step, a mask ``(B,)``; the others keep what they have.

        Returns:
            Lengths ``(B,)`` and increments ``(B, *E)``, of no meaning outside ``which``.
        """
        known = which & (self.depth > 0)
        if not bool(known.any()):
            return wanted, expand(wanted.sqrt(), self.pieces[:, 0]) * self._normal(which)
        rows, top = torch.arange(len(known), device=known.device), (self.depth - 1).clamp(min=0)
        length, piece = self.lengths[rows, top], self.pieces[rows, top]
        parts = torch.ceil(length / wanted / STRETCH).clamp(min=1.0)
        h = torch.where(known, length / parts, wanted)
        share = torch.where(known, 1.0 / parts, 0.0)
        noise = self._normal(which & ~(known & (parts == 1.0)))
        increment = expand(share, piece) * piece + expand((h * (1.0 - share)).sqrt(), piece) * noise
        self.lengths[rows, top] = torch.where(known, length - h, length)
        self.pieces[rows, top] = torch.where(expand(known, piece).bool(), piece - increment, piece)
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
        index: their numbers in the caller's batch.
        t: time, float64.
        y: state, in the transform's basis.
        g: g(t), broadcastable to y.
        slope: f(y, t).
        wanted: length of the next step.
        h: length of the trial under way.
        end: its end.
        increment: its Brownian increment.
        euler: its Euler-Maruyama state.
        trying: whether there is one; else the slope at t is wanted first.
        finite: whether the last evaluation, or the last trial, met only finite values.
        accepted: accepted steps.
        rejected: rejected steps.
    """

    index: Tensor
    t: Tensor
    y: Tensor
    g: Tensor
    slope: Tensor
    wanted: Tensor
    h: Tensor
    end: Tensor
    increment: Tensor
    euler: Tensor
    trying: Tensor
    finite: Tensor
    accepted: Tensor
    rejected: Tensor


class _Solve:
    """A solve under way. Every evaluation of the network serves all rows: some begin a step, others finish a trial.

    So the number of evaluations is that of every row still in the batch.
    """

    def __init__(
        self, model: NDM, rtol: float, atol: float, generator: Randomness, max_evaluations: int, cond: dict[str, Any]
    ) -> None:
        self.model, self.rtol, self.atol, self.generator = model, rtol, atol, generator
        self.max_evaluations, self.cond = max_evaluations, cond
        self.left: list[tuple[_Rows, int]] = []
        self.evaluations, self.batch, self.length = 0, 0, 0.0
        self.rows: _Rows
        self.brownian: Brownian
        self.sde: ReverseSDE

    def start(self, z: Tensor) -> None:
        """Step over the end where g may be infinite; choose first steps."""
        model, self.batch = self.model, len(z)
        top = self._top()
        if top < 1.0:
            z = DDPM(model).step(z, 1.0, top, generator=self.generator, **self.cond)
            self.evaluations = 1
        index = torch.arange(len(z), device=z.device)
        t = as_time(top, z.device).expand(len(z))
        y, zero = model.transform.to_basis(z), torch.zeros_like(t)
        first = FIRST * model.schedule(as_time(top, model.schedule.device)).inverse_dgamma.to(z.device)
        g = model.reverse_sde(y.dtype).diffusion(t, y)
        self.rows = _Rows(
            index=index, t=t, y=y, g=g, slope=y, wanted=zero + first, h=zero, end=t, increment=y, euler=y,
            trying=index < 0, finite=index >= 0, accepted=index * 0 + self.evaluations, rejected=index * 0,
        )  # fmt: skip
        self.brownian = Brownian(y, self.generator)
        self._fields()
        self.length = top - model.t_min
        if self.length == 0.0 or len(z) == 0:
            self._leave(index >= 0)

    def _top(self) -> float:
        """Where the SDE begins."""
        at_one = self.model.schedule(as_time(1.0, self.model.schedule.device))
        if float(at_one.alpha) >= SAFE_NOISE * float(at_one.sigma):
            return 1.0
        angle = as_time(math.atan(1.0 / SAFE_NOISE), self.model.schedule.device)
        return max(self.model.t_min, float(self.model.schedule.time_at(angle)))

    def _fields(self) -> None:
        cond = _shapes.take_rows(self.cond, self.rows.index, self.batch)
        self.sde = self.model.reverse_sde(self.rows.y.dtype, **cond)

    def evaluate(self) -> None:
        """One evaluation: rows with a trial accept or reject it, the others begin one."""
        rows = self.rows
        trying = expand(rows.trying, rows.y).bool()
        slope = self.sde.drift(torch.where(rows.trying, rows.end, rows.t), torch.where(trying, rows.euler, rows.y))
        self.evaluations += 1
        begin = ~rows.trying
        if bool(begin.any()):
            rows = replace(rows, slope=torch.where(trying, rows.slope, slope), finite=rows.trying | _finite_rows(slope))
        if bool(rows.trying.any()):
            rows, rejected = self._judge(rows, slope)
            begin = begin | rejected
        self.rows = rows
        done = rows.t <= self.model.t_min
        self._refuse(done, begin)
        if bool(begin.any()):
            self._begin(begin)
        if bool(done.any()):
            self._leave(done)

    def _judge(self, rows: _Rows, slope: Tensor) -> tuple[_Rows, Tensor]:
        """Finish the trials: the rows after it, and which of them were rejected."""
        g = self.sde.diffusion(rows.end, rows.y)
        noise = 0.5 * (rows.g + g) * rows.increment
        heun = rows.y - 0.5 * expand(rows.h, rows.y) * (rows.slope + slope) + noise
        tolerance = self.atol + self.rtol * torch.maximum(rows.y.abs(), heun.abs())
        error = _row_means(((heun - rows.euler) / tolerance).square()).sqrt().double()
        error = torch.where(error.isfinite(), error, math.inf)
        accept = rows.trying & (error <= 1.0)
        wide = expand(accept, heun).bool()
        rejected = rows.trying & ~accept
        self.brownian.give_back(rows.h, rows.increment, rejected)
        factor = (SAFETY * error**-EXPONENT).clamp(SHRINK, GROW)
        return replace(
            rows,
            t=torch.where(accept, rows.end, rows.t),
            y=torch.where(wide, heun, rows.y),
            g=torch.where(wide, g, rows.g),
            wanted=torch.where(rows.trying, factor * rows.h, rows.wanted),
            finite=torch.where(rows.trying, error.isfinite(), rows.finite),
            trying=rows.trying & ~accept,
            accepted=rows.accepted + accept.long(),
            rejected=rows.rejected + rejected.long(),
        ), rejected

    def _begin(self, which: Tensor) -> None:
        """Begin a trial in some rows, a mask."""
        rows = self.rows
        remaining = rows.t - self.model.t_min
        wanted = torch.where(STRETCH * rows.wanted >= remaining, remaining, rows.wanted)
        h, increment = self.brownian.draw(wanted, which)
        end = torch.where(h >= (1.0 - ROUNDING) * remaining, self.model.t_min, rows.t - h)
        euler = rows.y - expand(h, rows.y) * rows.slope + rows.g * increment
        wide = expand(which, rows.y).bool()
        self.rows = replace(
            rows,
            h=torch.where(which, h, rows.h),
            end=torch.where(which, end, rows.end),
            increment=torch.where(wide, increment, rows.increment),
            euler=torch.where(wide, euler, rows.euler),
            trying=rows.trying | which,
        )

    def _refuse(self, done: Tensor, begin: Tensor) -> None:
        """Give up if a row cannot go on."""
        rows = self.rows
        hopeless = (rows.wanted <= VANISHED_WHEN_NAN * self.length) | (begin & ~_finite_rows(rows.slope))
        infinite = ~rows.finite & hopeless
        vanished = rows.finite & (rows.wanted <= VANISHED * self.length)
        late = torch.full_like(done, self.evaluations >= self.max_evaluations)
        causes = {
            "the prediction is NaN or infinite": infinite,
            "the step size vanished": vanished,
            f"{self.max_evaluations} evaluations were not enough": late & ~infinite & ~vanished,
        }
        failed = (infinite | vanished | late) & ~done
        if not bool(failed.any()):
            return
        told = "; ".join(
            f"{cause} in batch rows {_shapes.some(rows.index[where & failed].tolist())}"
            for cause, where in causes.items()
            if bool((where & failed).any())
        )
        first = rows.take(torch.nonzero(failed).flatten()[:1])
        t, h = float(first.t[0]), float(first.wanted[0])
        raise SolverError(
            f"the adaptive reverse SDE gave up at t={t:.6g} with step {h:.3g}: {told}. Loosen rtol/atol, raise t_min, "
            "or look at the network's output there.",
            t=t, dt=h, rows=tuple(rows.index[failed].tolist()),
        )  # fmt: skip

    def _leave(self, gone: Tensor) -> None:
        leaving, staying = torch.nonzero(gone).flatten(), torch.nonzero(~gone).flatten()
        self.left.append((self.rows.take(leaving), self.evaluations))
        self.rows = self.rows.take(staying)
        self.brownian.keep(staying)
        self._fields()

    def drawn(self) -> Drawn:
        """What the rows brought home, in the caller's order."""
        order = torch.argsort(torch.cat([rows.index for rows, _ in self.left]))

        def gather(part: Callable[[_Rows, int], Tensor]) -> Tensor:
            return torch.cat([part(rows, evaluations) for rows, evaluations in self.left])[order]

        return Drawn(
            z=self.model.transform.from_basis(gather(lambda rows, _: rows.y)),
            evaluations=gather(lambda rows, evaluations: torch.full_like(rows.index, evaluations)),
            accepted=gather(lambda rows, _: rows.accepted),
            rejected=gather(lambda rows, _: rows.rejected),
        )


def _row_means(y: Tensor) -> Tensor:
    """The mean over each event, ``(B, *E)`` to ``(B,)``."""
    return y.flatten(1).mean(1) if y.ndim > 1 else y


def _finite_rows(y: Tensor) -> Tensor:
    """Which events are finite, a mask ``(B,)``."""
    finite = torch.isfinite(y)
    return finite.flatten(1).all(1) if y.ndim > 1 else finite
