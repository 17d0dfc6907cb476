"""Errors that are not plain ``ValueError`` or ``TypeError``; each message names cause and cure."""

__all__ = ["CheckpointError", "PredictorError", "SolverError"]


class SolverError(RuntimeError):
    """A solve failed.

    Attributes:
        t: time at which it failed, or None.
        dt: step size at which it failed, or None.
        rows: batch rows that caused it (empty: not attributable to rows).
    """

    def __init__(
        self, message: str, *, t: float | None = None, dt: float | None = None, rows: tuple[int, ...] = ()
    ) -> None:
        super().__init__(message)
        self.t, self.dt, self.rows = t, dt, rows


class PredictorError(RuntimeError):
    """The predictor returned something that is not a prediction: wrong shape, dtype, arity, or NaN."""


class CheckpointError(RuntimeError):
    """A file is not a checkpoint of this library, is damaged, or does not fit the model."""
