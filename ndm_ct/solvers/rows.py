"""The row engine: many small solves that share the calls of the field.

Every batch row has its own time, step size and fate. A row leaves the batch when it is finished or has failed, and the
others go on without it; so each row's result equals, up to rounding, that of solving it alone. The engine counts, tells
causes of failure apart, and puts the results back into the caller's order. What a step is, and when it is accepted, is
up to the solver: :mod:`ndm_ct.solvers.ode` and :mod:`ndm_ct.solvers.sde` are the two.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor

from ndm_ct._core.checks import some
from ndm_ct._core.errors import SolverError
from ndm_ct.solvers.packing import Packing
from ndm_ct.solvers.solution import Solution

__all__ = ["RowSolve", "Rows"]


@dataclass(frozen=True)
class Rows:
    """The rows still in the batch; every field has one entry per row.

    Args:
        index: their numbers in the caller's batch.
        t: time, float64.
        y: packed state, ``(b, D)``.
        h: size of the next step, float64, positive in both directions of time.
        finite: whether the last trial met only finite values.
        accepted: accepted steps.
        rejected: rejected steps.
    """

    index: Tensor
    t: Tensor
    y: Tensor
    h: Tensor
    finite: Tensor
    accepted: Tensor
    rejected: Tensor

    def take(self, which: Tensor) -> Self:
        """Some of the rows, by position or mask."""
        return type(self)(*(getattr(self, entry.name)[which] for entry in fields(self)))


R = TypeVar("R", bound=Rows)


@dataclass(frozen=True)
class _Left(Generic[R]):
    """Rows that have left the batch, and what each of them has cost."""

    rows: R
    failed: Tensor
    nfe: int


class RowSolve(Generic[R]):
    """A solve of many rows, under way. A solver is a subclass that sets ``rows`` and defines ``step``.

    Tensors that may carry a graph are replaced, never written to. Every row in the batch has been there since the
    start, so ``rounds`` and ``nfe``, two numbers, count for each of them.

    Args:
        packing: the shapes of the state.
        t0: start.
        t1: end.
        limit: bound on the rounds.
        forgiving: whether a row that fails becomes NaN; else the solve raises.
    """

    name: ClassVar[str]
    """What error messages call the solver."""
    rounds_are: ClassVar[str]
    """What error messages call a round."""
    cure: ClassVar[str]
    """What error messages recommend."""
    vanished: ClassVar[float]
    """Steps, relative to the interval, at which a row fails."""
    vanished_when_nan: ClassVar[float]
    """The same after a trial that met NaN: more steps would only find out where exactly the NaN begins."""

    rows: R

    def __init__(self, packing: Packing, t0: float, t1: float, limit: int, forgiving: bool) -> None:
        self.packing, self.t0, self.t1, self.limit, self.forgiving = packing, t0, t1, limit, forgiving
        self.direction, self.length = (1.0 if t1 >= t0 else -1.0), abs(t1 - t0)
        rounding = 16.0 * sys.float_info.epsilon * max(abs(t0), abs(t1))
        self.smallest = max(self.vanished * self.length, rounding)
        self.left: list[_Left[R]] = []
        self.rounds = self.nfe = 0

    def run(self, callback: Callable[[float], None] | None) -> None:
        """Take rounds until every row has left; ``callback`` gets the time of the row furthest behind before each."""
        while len(self.rows.index) > 0:
            if callback is not None:
                callback(float(self.rows.t.min() if self.direction > 0.0 else self.rows.t.max()))
            done = self.step()
            self.rounds += 1
            failed = ~done & self._hopeless()
            if bool((done | failed).any()):
                self.leave(done | failed, failed)

    def step(self) -> Tensor:
        """One round of every row in the batch; returns the mask of rows that have reached the end."""
        raise NotImplementedError

    def start_rows(self, y: Tensor) -> dict[str, Tensor]:
        """The fields of :class:`Rows` at the start of a solve from the packed state ``y``."""
        index = torch.arange(len(y), device=y.device)
        zero = torch.zeros(len(y), dtype=torch.float64, device=y.device)
        count = torch.zeros_like(index)
        return {
            "index": index, "t": zero + self.t0, "y": y, "h": zero, "finite": index >= 0, "accepted": count,
            "rejected": count,
        }  # fmt: skip

    def leave(self, gone: Tensor, failed: Tensor) -> None:
        """Take the rows of the mask ``gone`` out of the batch; those of ``failed`` have failed.

        Raises:
            SolverError: some have failed, and the solve is not forgiving.
        """
        if not self.forgiving and bool(failed.any()):
            raise self._failure(self.rows.take(failed))
        leaving, staying = torch.nonzero(gone).flatten(), torch.nonzero(~gone).flatten()
        self.left.append(_Left(self.rows.take(leaving), failed[leaving], self.nfe))
        self.rows = self.rows.take(staying)
        self.keep(staying)

    def keep(self, rows: Tensor) -> None:
        """Called when only these rows of the batch, by position, go on."""

    def _vanished(self, rows: R) -> Tensor:
        """Whether the next step is too small to be worth it, or so small that t + h could be t."""
        return rows.h <= torch.where(
            rows.finite, self.smallest, max(self.vanished_when_nan * self.length, self.smallest)
        )

    def _hopeless(self) -> Tensor:
        return torch.ones_like(self.rows.finite) if self.rounds >= self.limit else self._vanished(self.rows)

    def _failure(self, rows: R) -> SolverError:
        vanished = self._vanished(rows)
        causes = {
            "the field is NaN or infinite": vanished & ~rows.finite,
            "the step size vanished": vanished & rows.finite,
            f"{self.limit} {self.rounds_are} were not enough": ~vanished,
        }
        told = "; ".join(
            f"{cause} in batch rows {some(rows.index[where].tolist())}"
            for cause, where in causes.items()
            if bool(where.any())
        )
        t, h = float(rows.t[0]), float(rows.h[0])
        return SolverError(
            f"{self.name} gave up at t={t:.6g} with step {h:.3g}: {told}. {self.cure}",
            t=t, dt=h, rows=tuple(rows.index.tolist()),
        )  # fmt: skip

    def gather(self, column: Callable[[_Left[R]], Tensor]) -> Tensor:
        """A value of every row, in the caller's order."""
        order = torch.argsort(torch.cat([left.rows.index for left in self.left]))
        return torch.cat([column(left) for left in self.left])[order]

    def solution(self, error: Tensor | None = None, nodes: Tensor | None = None) -> Solution:
        """The results of all rows, in the caller's order."""
        failed = self.gather(lambda left: left.failed)
        return Solution(
            state=self.packing.unpack(torch.where(failed[:, None], torch.nan, self.gather(lambda left: left.rows.y))),
            nfe=self.gather(lambda left: torch.full_like(left.rows.index, left.nfe)),
            accepted=self.gather(lambda left: left.rows.accepted),
            rejected=self.gather(lambda left: left.rows.rejected),
            failed=failed,
            error=error,
            nodes=nodes,
        )
