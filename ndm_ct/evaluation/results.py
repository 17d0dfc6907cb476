"""The results of ``evaluate`` and ``compare``, and how they are printed."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Comparison", "Evaluation", "figures", "mean", "paired"]

_REASONS = {
    "target": "the target was reached",
    "data": "all data",
    "max_rows": "max_rows was reached",
    "time": "out of time",
    "interrupted": "interrupted",
}


@dataclass(frozen=True)
class Evaluation:
    """The mean negative log-likelihood of a data set; ``str`` is a line to read.

    Args:
        nll: mean negative log-likelihood, nats per event. For integer data and for the ELBO it is the bound on it.
        stderr: standard error of ``nll`` as an estimate for the population from which the rows were drawn, nats. It
            includes the scatter of the data and of the estimator. NaN below two rows.
        estimator_stderr: standard error of ``nll`` as an estimate of the mean over exactly the rows scored, nats. It
            includes the random probes of the trace, for integer data also the dequantisation noise, and for the ELBO
            times and noise.
        estimator_uncertainty: the standard error of ``estimator_stderr`` itself, from the scatter of the variances of
            single rows. It is large where few rows make up the variance. Such rows outside the pilot (see
            :func:`ndm_ct.evaluate`) are missed by both numbers, and are part of ``stderr``.
        bits_per_dim: the same as ``nll`` in bits per dimension; None for real data.
        bits_stderr: ``stderr`` in bits per dimension; None for real data.
        rows: rows scored.
        failed: rows whose solve failed. They are left out of everything else.
        failed_rows: their numbers in the data.
        finished: False if the time limit or Ctrl-C stopped the evaluation.
        reason: why it stopped: "target" (``stderr`` was reached), "data" (all rows are scored), "max_rows", "time" or
            "interrupted".
        values: negative log-likelihood of each row, nats, float64, ``(rows,)``, in the order of scoring.
        indices: their row numbers in the data, ``(rows,)``.
        seconds: time spent on scoring, earlier runs of the same ``run_dir`` included.
        nfe: mean number of network evaluations per row, with the additional ones of the pilot.
    """

    nll: float
    stderr: float
    estimator_stderr: float
    estimator_uncertainty: float
    bits_per_dim: float | None
    bits_stderr: float | None
    rows: int
    failed: int
    failed_rows: tuple[int, ...]
    finished: bool
    reason: str
    values: Tensor
    indices: Tensor
    seconds: float
    nfe: float

    def __str__(self) -> str:
        nll = f"NLL {figures(self.nll, self.stderr)} nats per event"
        part = f"estimator's part ± {self.estimator_stderr:.2g}"
        if self.estimator_uncertainty > 0.25 * self.estimator_stderr:
            part += f", itself uncertain by ± {self.estimator_uncertainty:.2g} because few rows make it up"
        if self.estimator_stderr > self.stderr:
            part += ", above the total: few rows determine both"
        return _line(self, nll, part)


@dataclass(frozen=True)
class Comparison:
    """The paired difference of two models on the same rows; ``str`` is a line to read.

    Args:
        difference: mean of NLL_a - NLL_b, nats per event. It is positive if model b is better.
        stderr: its standard error from the paired differences, nats. It includes the scatter of the data and of the
            estimator.
        nll_a: mean negative log-likelihood of model a, nats per event.
        nll_b: mean negative log-likelihood of model b, nats per event.
        stderr_a: standard error of ``nll_a``.
        stderr_b: standard error of ``nll_b``.
        correlation: correlation of the two models' values over the rows.
        variance_reduction: 1 - Var d / (Var a + Var b): the share of the variance of an unpaired comparison that
            pairing removes.
        bits_per_dim: the difference in bits per dimension; None for real data.
        bits_stderr: its standard error in bits per dimension; None for real data.
        rows: rows scored by both models.
        failed: rows whose solve failed in either model. They are left out of everything else.
        failed_rows: their numbers in the data.
        finished: False if the time limit or Ctrl-C stopped the comparison.
        reason: why it stopped: "target" (``stderr`` was reached), "data" (all rows are scored), "max_rows", "time" or
            "interrupted".
        values_a: negative log-likelihood of each row under model a, nats, float64, ``(rows,)``.
        values_b: negative log-likelihood of each row under model b.
        indices: their row numbers in the data, ``(rows,)``.
        seconds: time spent on scoring, earlier runs of the same ``run_dir`` included.
        nfe_a: mean number of network evaluations per row, model a.
        nfe_b: mean number of network evaluations per row, model b.
    """

    difference: float
    stderr: float
    nll_a: float
    nll_b: float
    stderr_a: float
    stderr_b: float
    correlation: float
    variance_reduction: float
    bits_per_dim: float | None
    bits_stderr: float | None
    rows: int
    failed: int
    failed_rows: tuple[int, ...]
    finished: bool
    reason: str
    values_a: Tensor
    values_b: Tensor
    indices: Tensor
    seconds: float
    nfe_a: float
    nfe_b: float

    def __str__(self) -> str:
        difference = f"NLL a - b = {figures(self.difference, self.stderr)} nats per event"
        a, b = figures(self.nll_a, self.stderr_a), figures(self.nll_b, self.stderr_b)
        return _line(self, difference, f"a {a}, b {b}, correlation {self.correlation:.3f}")


def mean(values: Tensor) -> tuple[float, float]:
    """Mean and standard error; NaN where there are too few values."""
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), error


def paired(a: Tensor, b: Tensor) -> dict[str, Any]:
    """What a comparison says of two models' values of the same rows, by the names of :class:`Comparison`.

    Args:
        a: negative log-likelihood of each row under model a, nats, ``(rows,)``.
        b: the same under model b.
    """
    (nll_a, error_a), (nll_b, error_b), (difference, error) = mean(a), mean(b), mean(a - b)
    total = error_a**2 + error_b**2
    correlation = float(torch.corrcoef(torch.stack([a, b]))[0, 1]) if len(a) > 1 else math.nan
    return {
        "difference": difference, "stderr": error, "nll_a": nll_a, "nll_b": nll_b, "stderr_a": error_a,
        "stderr_b": error_b, "correlation": correlation,
        "variance_reduction": 1.0 - error**2 / total if total > 0.0 else math.nan,
    }  # fmt: skip


def figures(value: float, error: float) -> str:
    """The number and its error, rounded to two figures of the error."""
    if not 0.0 < error < math.inf:
        return f"{value:.6g} ± {error:.2g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def _line(result: Evaluation | Comparison, *parts: str) -> str:
    """The parts, with bits per dimension after the first, then the number of rows and why scoring stopped."""
    first, *others = parts
    if result.bits_per_dim is not None and result.bits_stderr is not None:
        first += f" ({figures(result.bits_per_dim, result.bits_stderr)} bits/dim)"
    failed = f", {result.failed} failed" if result.failed else ""
    return "; ".join([first, *others, f"{result.rows} rows{failed}, {_REASONS[result.reason]}"])
