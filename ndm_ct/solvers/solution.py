"""What every solver of this package returns, and the checks that they share."""

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ndm_ct._core import checks
from ndm_ct._core.errors import SolverError
from ndm_ct.solvers.packing import State

__all__ = ["Solution", "validate_slope", "validate_tolerance"]


@dataclass(frozen=True)
class Solution:
    r"""The result of a solve, with the cost of each row.

    Args:
        state: the tensors of the initial state, at the end; NaN in failed rows.
        nfe: evaluations of the field, ``(B,)``. Work repeated only to keep NaN out of gradients does not count.
        accepted: accepted steps, ``(B,)``.
        rejected: rejected steps, ``(B,)``.
        failed: whether the row failed, ``(B,)``.
        error: estimate of the error of a functional L of the solution, float64 ``(B,)``:
            :math:`\sum_n |\langle \partial L/\partial y,\, e \rangle|` over the local errors e of accepted steps; NaN
            in failed rows. None unless the field returns the gradient of L (:mod:`ndm_ct.solvers.ode`).
        nodes: the first tensor of the state at the times asked for, ``(N, B, *)``, or None; NaN in failed rows.
        slopes: the part of the slope that the solver interpolates, at these times, ``(N, B, *)``, or None.
    """

    state: State
    nfe: Tensor
    accepted: Tensor
    rejected: Tensor
    failed: Tensor
    error: Tensor | None = None
    nodes: Tensor | None = None
    slopes: Tensor | None = None

    @classmethod
    def of_batch(cls, state: State, nfe: int, accepted: int, rejected: int = 0) -> "Solution":
        """The solution of a batch whose rows share every step."""
        rows = torch.arange(len(state[0]), device=state[0].device)
        counts = {"nfe": nfe, "accepted": accepted, "rejected": rejected}
        return cls(state, failed=rows < 0, **{name: torch.full_like(rows, count) for name, count in counts.items()})

    def with_rows(self, rows: Tensor, other: "Solution") -> "Solution":
        """The solution with some rows, by number, solved again; what both solves have cost is added up.

        Further tensors of the other state are dropped, and values at times that only one of them has.
        """
        states = zip(self.state, other.state, strict=False)
        counts = {name: getattr(self, name).index_add(0, rows, getattr(other, name)) for name in _COUNTS}
        return replace(
            self, state=tuple(mine.index_copy(0, rows, theirs) for mine, theirs in states),
            failed=self.failed.index_copy(0, rows, other.failed), nodes=_copied(self.nodes, other.nodes, rows),
            slopes=_copied(self.slopes, other.slopes, rows), **counts,
        )  # fmt: skip


_COUNTS = ("nfe", "accepted", "rejected")


def _copied(mine: Tensor | None, theirs: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if mine is None or theirs is None else mine.index_copy(1, rows, theirs)


def validate_tolerance(name: str, value: float, dtype: torch.dtype) -> float:
    """Check that a tolerance is positive; warn if ``dtype`` cannot resolve it."""
    checks.validate_positive(name, value)
    floor = 4.0 * torch.finfo(dtype).eps
    if value < floor:
        warnings.warn(f"{name}={value:g} is below what {dtype} can resolve ({floor:.1g}).", stacklevel=3)
    return value


def validate_slope(slope: Tensor, t: Tensor, dt: float) -> None:
    """Check a value of the field, shape ``(B, ...)``, at time ``t``, in a step of size ``dt``.

    Raises:
        SolverError: it holds NaN or inf; the error names time, step and rows.
    """
    rows = checks.bad_rows(slope)
    if rows:
        raise SolverError(
            f"the field is NaN or infinite at t={float(t):.6g} in batch rows {checks.some(rows)}; look at the "
            "network's output there, or use a smaller tolerance if the state itself has run away.",
            t=float(t), dt=dt, rows=rows,
        )  # fmt: skip
