r"""The likelihood of a data set: a mean over rows with its standard error, to any accuracy the rows allow.

For rows visited in a random order, each with an independent unbiased estimate :math:`\hat\ell_i` of its negative
log-likelihood :math:`\ell_i`,

.. math::
    \bar\ell = \frac1n \sum_{i=1}^n \hat\ell_i, \qquad
    \mathrm{se}^2 = \frac{1}{n (n-1)} \sum_{i=1}^n (\hat\ell_i - \bar\ell)^2, \qquad
    \mathrm{se}_{est}^2 = \frac{1}{n^2} \sum_{i=1}^n \operatorname{Var}(\hat\ell_i \mid x_i) .

The first error is that of the expected value in the population the rows were drawn from: the scatter of the estimates
is that of the data and of the estimator together. The second is that of the mean over exactly these rows, all that is
unknown once the whole data set has been scored. It is known where every row has an error of its own, else measured on
the first rows, the pilot: by further sweeps along the same path, or, for integer data, whose noise is random too, by a
second, independent score. Neither holds the solver's error, which is systematic.

A row may be estimated poorly, because its error averages out with that of the others. With variance D of the data and v
of a sweep, the work for a given standard error is (path + sweep) (D + v), smallest for a sweep of a few products beside
the path's many evaluations; so the default here is one sweep of four nodes, and no error budget.

Two models are compared by the paired differences :math:`d_i = \hat\ell^a_i - \hat\ell^b_i` under common random numbers
(rows, dequantisation noise, nodes, probes); what the models share cancels:

.. math::
    \operatorname{Var} d = \operatorname{Var} \hat\ell^a + \operatorname{Var} \hat\ell^b
    - 2 \operatorname{Cov}(\hat\ell^a, \hat\ell^b) .

All randomness is a function of the seed and of a row's position in the random order: an evaluation that was killed
continues with the bits of one that was not, and batches of another size give the same values, up to rounding.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ndm_ct import objectives
from ndm_ct._core.checks import choose, some, validate_count, validate_positive
from ndm_ct._core.conditioning import Conditioning
from ndm_ct._core.config import Unconfigurable, to_config
from ndm_ct._core.errors import CheckpointError, SolverError
from ndm_ct._core.keywords import validate_cond
from ndm_ct._core.noise import GeneratorLike, Randomness
from ndm_ct._core.seeds import derive_seeds
from ndm_ct.data.sources import Bins, Source
from ndm_ct.divergence import Quadrature, TraceEstimator, resolve
from ndm_ct.likelihood import api as likelihood
from ndm_ct.likelihood import bits
from ndm_ct.likelihood.api import Trace
from ndm_ct.model import NDM
from ndm_ct.quantisation import Quantisation, validate_quantisation
from ndm_ct.storage.atomic import PathLike
from ndm_ct.storage.folder import Journal, Record, RunFolder
from ndm_ct.storage.tensors import hash_state

__all__ = ["Comparison", "Evaluation", "compare", "evaluate"]

SWEEP = Quadrature(nodes=4, probes=1, sweeps=1)
"""The default trace above ``EXACT_UP_TO`` dimensions."""

MINIMUM_ROWS = 256
"""Rows before a target may stop an evaluation: the error itself is then known to about 5 %."""

PILOT_ROWS, PILOT_SWEEPS = 32, 4
"""Rows on which the estimator's variance is measured, and how many sweeps are added to theirs."""

_REASONS = {
    "target": "the target was reached",
    "data": "all data",
    "max_rows": "max_rows was reached",
    "time": "out of time",
    "interrupted": "interrupted",
}

FORMAT = 1

# Last words of the seeds, one per use of randomness.
_NOISE, _TRACE, _ORDER = 0, 1, 2


@dataclass(frozen=True)
class Evaluation:
    """The mean negative log-likelihood of a data set; ``str`` is a line to read.

    Args:
        nll: mean negative log-likelihood, nats per event; for integer data and for the ELBO the bound on it.
        stderr: its standard error as an estimate of the expectation over the population the data came from: scatter
            of the data and of the estimator together, nats; NaN below two rows.
        estimator_stderr: its standard error as an estimate of the mean over exactly the rows scored: what the trace
            estimate contributes, for integer data the dequantisation noise too, for the ELBO times and noise; nats.
        bits_per_dim: the same as ``nll`` in bits per dimension; None for real data.
        bits_stderr: ``stderr`` in bits per dimension; None for real data.
        rows: rows scored.
        failed: rows whose solve failed, which are left out of everything else.
        failed_rows: their numbers in the data.
        finished: False if it was stopped by the time limit or by Ctrl-C.
        reason: why it stopped: "target", "data" (all rows scored), "max_rows", "time" or "interrupted".
        values: negative log-likelihood of each row, nats, float64, ``(rows,)``, in the order scored.
        indices: their row numbers in the data, ``(rows,)``.
        seconds: time spent scoring, earlier runs of the same ``run_dir`` included.
        nfe: mean number of network evaluations per row, the pilot's included.
    """

    nll: float
    stderr: float
    estimator_stderr: float
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
        nll = f"NLL {_figures(self.nll, self.stderr)} nats per event"
        return _line(self, nll, f"estimator's part ± {self.estimator_stderr:.2g}")


@dataclass(frozen=True)
class Comparison:
    """The paired difference of two models on the same rows; ``str`` is a line to read.

    Args:
        difference: mean of NLL_a - NLL_b, nats per event: positive where model b is better.
        stderr: its standard error from the paired differences, data and estimator together, nats.
        nll_a: mean negative log-likelihood of model a, nats per event.
        nll_b: that of model b.
        stderr_a: standard error of ``nll_a``.
        stderr_b: standard error of ``nll_b``.
        correlation: of the two models' values over the rows.
        variance_reduction: 1 - Var d / (Var a + Var b): the share of an unpaired comparison's variance that is saved.
        bits_per_dim: the difference in bits per dimension; None for real data.
        bits_stderr: its standard error in bits per dimension; None for real data.
        rows: rows scored by both models.
        failed: rows whose solve failed in either model, which are left out of everything else.
        failed_rows: their numbers in the data.
        finished: as in :class:`Evaluation`.
        reason: as in :class:`Evaluation`.
        values_a: negative log-likelihood of each row under model a, nats, float64, ``(rows,)``.
        values_b: that under model b.
        indices: their row numbers in the data, ``(rows,)``.
        seconds: time spent scoring, earlier runs of the same ``run_dir`` included.
        nfe_a: mean number of network evaluations per row, model a.
        nfe_b: that of model b.
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
        difference = f"NLL a - b = {_figures(self.difference, self.stderr)} nats per event"
        a, b = _figures(self.nll_a, self.stderr_a), _figures(self.nll_b, self.stderr_b)
        return _line(self, difference, f"a {a}, b {b}, correlation {self.correlation:.3f}")


def evaluate(
    model: NDM,
    data: Any,
    *,
    cond: Mapping[str, Any] | None = None,
    quantisation: Quantisation | None = None,
    dequantisation: str = "uniform",
    bound: str = "ode",
    samples: int | None = None,
    stderr: float | None = None,
    batch_size: int = 64,
    max_rows: int | None = None,
    trace: Trace | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    method: str | None = None,
    on_failure: str = "raise",
    seed: int = 0,
    run_dir: PathLike | None = None,
    resume: bool = True,
    progress: bool = True,
    time_limit: float | None = None,
) -> Evaluation:
    r"""The mean negative log-likelihood of data, with its standard error.

    Rows are scored in a random order that is a function of the seed, without replacement, so the rows scored so far are
    a random sample of the data at every moment. Ctrl-C returns what is finished.

    With ``run_dir`` the folder receives ``rows.jsonl``, a line per batch, and ``evaluation.json`` with the result. The
    same call continues an evaluation that was killed or stopped; ``stderr``, ``max_rows`` and ``time_limit`` may differ
    from call to call.

    Args:
        model: the model.
        data: tensor or array ``(N, *E)``, or a map-style ``Dataset`` whose items are tensors ``(*E)``. Real values, or
            integers together with ``quantisation``. A float array takes the model's dtype.
        cond: conditioning by name, each with one row per row of ``data``.
        quantisation: the bins of integer data; the result is then the bound on :math:`-\log P(x)` of
            :func:`ndm_ct.bits_per_dim`, in nats and in bits per dimension.
        dequantisation: "uniform" or "truncated-normal", as in :func:`ndm_ct.bits_per_dim`.
        bound: "ode", the probability-flow likelihood, or "elbo", the bound of :func:`ndm_ct.elbo`.
        samples: for "elbo", pairs of time and noise per row, at least 2; None is 2. In few dimensions they scatter far
            more than rows do: take 64.
        stderr: the standard error to stop at, nats per event; looked at after each batch from 256 rows on, so that no
            lucky first batch stops it. None goes through all data.
        batch_size: rows solved together; the pilot, the first 32, is a batch of its own.
        max_rows: rows to score at most; None is all. A batch is cut short to end there.
        trace: for "ode", as in :func:`ndm_ct.loglik`. None or "auto" is exact up to 32 dimensions and else
            ``divergence.Quadrature(nodes=4, probes=1, sweeps=1)``: cheap, because errors of rows average out.
        rtol: for "ode", as in :func:`ndm_ct.loglik`.
        atol: for "ode", as in :func:`ndm_ct.loglik`.
        method: for "ode", as in :func:`ndm_ct.loglik`.
        on_failure: for "ode", "raise", or "nan": rows that cannot be solved are left out, counted and named; the mean
            is then that of the others.
        seed: of the order, the dequantisation noise, nodes and probes.
        run_dir: folder of the evaluation, made if missing.
        resume: continue from the rows in ``run_dir``; False refuses a folder that has some.
        progress: whether to show a progress bar.
        time_limit: seconds after which to stop; one batch at least is scored.

    Returns:
        An :class:`Evaluation`.

    Raises:
        TypeError: integer data without ``quantisation``, or arguments of the wrong type.
        ValueError: an argument out of range or without effect; data that do not fit the model; a ``run_dir`` of other
            settings, data or weights, which are named.
        CheckpointError: the rows in ``run_dir`` are damaged.
        BlockingIOError: another process is at work in ``run_dir``.
        SolverError: the solve failed; carries t, dt and the rows' numbers in the data.
        KeyboardInterrupt: Ctrl-C before anything was finished.

    Example:
        >>> import ndm_ct
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
        >>> x = model.sample_data(64)
        >>> result = evaluate(model, x, progress=False)
        >>> abs(result.nll - 2.838) < 5 * result.stderr, result.rows, result.reason
        (True, 64, 'data')
    """
    run = _Run(
        "evaluation", {"model": model}, data, cond,
        _Settings(
            bound, quantisation, dequantisation, trace, rtol, atol, method, on_failure, batch_size, seed, samples
        ),
        _Limits(stderr, max_rows, time_limit), run_dir, resume, evaluate,
    )  # fmt: skip
    with run.in_folder():
        reason = run.run(progress)
        values = run.values()[0]
        nll, error = _mean(values)
        result = Evaluation(
            nll=nll, stderr=error, estimator_stderr=run.estimator_stderr(), bits_per_dim=run.bits(nll),
            bits_stderr=run.bits(error), values=values, nfe=run.nfe(0), **run.shared(reason),
        )  # fmt: skip
        run.summarise(result)
    return result


def compare(
    model_a: NDM,
    model_b: NDM,
    data: Any,
    *,
    cond: Mapping[str, Any] | None = None,
    quantisation: Quantisation | None = None,
    dequantisation: str = "uniform",
    bound: str = "ode",
    samples: int | None = None,
    stderr: float | None = None,
    batch_size: int = 64,
    max_rows: int | None = None,
    trace: Trace | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    method: str | None = None,
    on_failure: str = "raise",
    seed: int = 0,
    run_dir: PathLike | None = None,
    resume: bool = True,
    progress: bool = True,
    time_limit: float | None = None,
) -> Comparison:
    """Which of two models is better, from paired differences on the same rows with common random numbers.

    Both models see the same rows, dequantisation noise, nodes and probes; truncated-normal noise is each model's own
    width from the same uniform numbers. What the rows have in common cancels, so the difference is known far better
    than either mean.

    Args:
        model_a: one model.
        model_b: the other, of the same event shape, dtype and device; its schedule, transform and head may differ.
        data: as in :func:`evaluate`.
        cond: as in :func:`evaluate`; both models get it.
        quantisation: as in :func:`evaluate`.
        dequantisation: as in :func:`evaluate`.
        bound: as in :func:`evaluate`.
        samples: as in :func:`evaluate`.
        stderr: the standard error of the difference to stop at, nats per event; as in :func:`evaluate`.
        batch_size: as in :func:`evaluate`; there is no pilot.
        max_rows: as in :func:`evaluate`.
        trace: as in :func:`evaluate`.
        rtol: as in :func:`evaluate`.
        atol: as in :func:`evaluate`.
        method: as in :func:`evaluate`.
        on_failure: as in :func:`evaluate`; "nan" leaves out rows that fail in either model.
        seed: as in :func:`evaluate`.
        run_dir: as in :func:`evaluate`; the result is written to ``comparison.json``.
        resume: as in :func:`evaluate`.
        progress: as in :func:`evaluate`.
        time_limit: as in :func:`evaluate`.

    Returns:
        A :class:`Comparison`.

    Raises:
        TypeError, ValueError, CheckpointError, BlockingIOError, SolverError, KeyboardInterrupt: as in :func:`evaluate`.
        ValueError: models that differ in event shape, dtype or device.

    Example:
        >>> import ndm_ct
        >>> wide, right = (ndm_ct.reference.Gaussian(torch.zeros(2), s * torch.eye(2)) for s in (4.0, 1.0))
        >>> x = right.sample_data(64, generator=torch.Generator().manual_seed(0))
        >>> result = compare(wide, right, x, progress=False)
        >>> result.difference > 4 * result.stderr > 0.0
        True
    """
    run = _Run(
        "comparison", {"model_a": model_a, "model_b": model_b}, data, cond,
        _Settings(
            bound, quantisation, dequantisation, trace, rtol, atol, method, on_failure, batch_size, seed, samples
        ),
        _Limits(stderr, max_rows, time_limit), run_dir, resume, compare,
    )  # fmt: skip
    with run.in_folder():
        reason = run.run(progress)
        a, b = run.values()
        (nll_a, error_a), (nll_b, error_b), (difference, error) = _mean(a), _mean(b), _mean(a - b)
        total = error_a**2 + error_b**2
        result = Comparison(
            difference=difference, stderr=error, nll_a=nll_a, nll_b=nll_b, stderr_a=error_a, stderr_b=error_b,
            correlation=float(torch.corrcoef(run.values())[0, 1]) if len(a) > 1 else math.nan,
            variance_reduction=1.0 - error**2 / total if total > 0.0 else math.nan,
            bits_per_dim=run.bits(difference), bits_stderr=run.bits(error), values_a=a, values_b=b, nfe_a=run.nfe(0),
            nfe_b=run.nfe(1), **run.shared(reason),
        )  # fmt: skip
        run.summarise(result)
    return result


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean and standard error; NaN where there are too few values."""
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), error


def _figures(value: float, error: float) -> str:
    """A number to two figures of its error."""
    if not 0.0 < error < math.inf:
        return f"{value:.6g} ± {error:.2g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def _line(result: Evaluation | Comparison, *parts: str) -> str:
    """The parts, with bits per dimension after the first, and how it ended."""
    first, *others = parts
    if result.bits_per_dim is not None and result.bits_stderr is not None:
        first += f" ({_figures(result.bits_per_dim, result.bits_stderr)} bits/dim)"
    failed = f", {result.failed} failed" if result.failed else ""
    return "; ".join([first, *others, f"{result.rows} rows{failed}, {_REASONS[result.reason]}"])


@dataclass(frozen=True)
class _Settings:
    """The options that determine the numbers, as the user gave them."""

    bound: str
    quantisation: Quantisation | None
    dequantisation: str
    trace: Trace | None
    rtol: float | None
    atol: float | None
    method: str | None
    on_failure: str
    batch_size: int
    seed: int
    samples: int | None

    def __post_init__(self) -> None:
        choose("bound", self.bound, ("ode", "elbo"))
        choose("dequantisation", self.dequantisation, bits.DEQUANTISATIONS)
        choose("on_failure", self.on_failure, ("raise", "nan"))
        validate_count("batch_size", self.batch_size)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be an int of at least 0, got {self.seed!r}.")
        validate_quantisation(self.quantisation)
        if self.dequantisation != "uniform" and self.quantisation is None:
            raise ValueError("dequantisation has no effect without quantisation; it is for integer data.")
        if self.bound == "elbo":
            self._refuse_ineffective()
        elif self.samples is not None:
            raise ValueError(f"samples={self.samples!r} has no effect with bound='ode', which draws no times.")
        if self.samples is not None and validate_count("samples", self.samples) < 2:
            raise ValueError("samples=1 gives no standard error; take 2 or more.")

    def _refuse_ineffective(self) -> None:
        given = [name for name in ("trace", "rtol", "atol", "method") if getattr(self, name) is not None]
        defaults = {"on_failure": "raise", "dequantisation": "uniform"}
        given += [name for name, default in defaults.items() if getattr(self, name) != default]
        if given:
            raise ValueError(f"{', '.join(given)} has no effect with bound='elbo', which takes no ODE solve.")

    def estimator(self, event_shape: tuple[int, ...]) -> TraceEstimator:
        """The estimator that ``trace`` names."""
        return resolve("auto" if self.trace is None else self.trace, event_shape, large=SWEEP)


@dataclass(frozen=True)
class _Limits:
    """When to stop."""

    stderr: float | None
    max_rows: int | None
    time_limit: float | None

    def __post_init__(self) -> None:
        if self.max_rows is not None:
            validate_count("max_rows", self.max_rows)
        for name, unit in (("stderr", "nats"), ("time_limit", "seconds")):
            value = getattr(self, name)
            if value is not None:
                validate_positive(name, value, unit)


@dataclass(frozen=True)
class _Scores:
    """One model's scores of a batch.

    Args:
        nll: estimates of the negative log-likelihood, nats, float64, ``(b,)``; NaN in failed rows.
        variance: their variance given the rows, ``(b,)``; NaN where it is not known.
        nfe: network evaluations, summed over the rows.
    """

    nll: Tensor
    variance: Tensor
    nfe: int


@dataclass(frozen=True)
class _Scorer:
    """One model's estimates of its negative log-likelihood."""

    model: NDM
    settings: _Settings
    device: torch.device

    @property
    def estimator(self) -> TraceEstimator:
        return self.settings.estimator(self.model.event_shape)

    @property
    def pilot(self) -> str | None:
        """How a pilot measures the variance: "sweeps", "repeats", or None where every row knows its own."""
        if self.settings.bound == "elbo":
            return None
        if self.settings.quantisation is not None:
            return "repeats"
        if self.estimator.knows_variance:
            return None
        return "sweeps" if self.estimator.sweeps else "repeats"

    @property
    def pilot_gain(self) -> float:
        """Variance of an ordinary row over that of a row of the pilot."""
        sweeps = self.estimator.sweeps
        return (sweeps + PILOT_SWEEPS) / sweeps if self.pilot == "sweeps" else 2.0

    def score(self, x: Tensor, cond: Conditioning, start: int, pilot: bool) -> _Scores:
        """Score rows; ``start`` is the position of the first."""
        estimator, way = self.estimator, self.pilot if pilot else None
        if way == "sweeps":
            estimator = estimator.with_sweeps(estimator.sweeps + PILOT_SWEEPS)
        first = self._once(x, cond, start, 0, estimator)
        if way != "repeats":
            return first
        second = self._once(x, cond, start, 1, estimator)
        half = 0.5 * (first.nll - second.nll)
        return _Scores(first.nll - half, half.square(), first.nfe + second.nfe)

    @torch.no_grad()
    def _once(self, x: Tensor, cond: Conditioning, start: int, repeat: int, estimator: TraceEstimator) -> _Scores:
        settings = self.settings
        noise, probes = (self._generators(start, len(x), repeat, use) for use in (_NOISE, _TRACE))
        if settings.bound == "elbo":
            return self._by_elbo(x, cond, noise)
        log_q: Tensor | float = 0.0
        if settings.quantisation is not None:
            x, log_q = bits.dequantised(self.model, settings.quantisation, x, settings.dequantisation, 1, noise)
        options = likelihood.Options(
            trace=estimator, rtol=settings.rtol, atol=settings.atol, method=settings.method,
            on_failure=settings.on_failure,
        )  # fmt: skip
        info = options.likelihood(self.model, x, (self.model.t_min, 1.0), cond, probes, budget=False)
        variance = info.variance.double()
        if settings.quantisation is not None:  # whose noise is not in it
            variance = torch.full_like(variance, math.nan)
        return _Scores(log_q - info.loglik.double(), variance, int(info.row_nfe.sum()))

    def _by_elbo(self, x: Tensor, cond: Conditioning, noise: Randomness) -> _Scores:
        bins = self.settings.quantisation
        if bins is not None:
            x = bins.centres(x, self.model.dtype or torch.get_default_dtype())
        samples = self.settings.samples or 2
        bound, info = objectives.elbo(
            self.model, x, samples=samples, quantisation=bins, generator=noise, return_info=True, **cond
        )
        return _Scores(-bound.double(), info.stderr.double().square(), samples * len(x))

    def _generators(self, start: int, n: int, repeat: int, use: int) -> list[torch.Generator]:
        """One per row, by its position: what a row draws does not depend on its batch."""
        seeds = (derive_seeds(self.settings.seed, place, repeat, use)[0] for place in range(start, start + n))
        return [torch.Generator(self.device).manual_seed(seed) for seed in seeds]


@dataclass(frozen=True)
class _Batch:
    """A scored batch.

    Args:
        start: position of its first row in the random order.
        rows: row numbers in the data, ``(b,)``.
        nll: as in :class:`_Scores`, ``(models, b)``.
        variance: likewise.
        nfe: likewise, by model.
        seconds: what it took.
    """

    start: int
    rows: Tensor
    nll: Tensor
    variance: Tensor
    nfe: list[int]
    seconds: float

    def to_json(self) -> Record:
        """A record; null stands for NaN."""
        tensors = {"rows": self.rows.tolist(), "nll": _without_nan(self.nll), "variance": _without_nan(self.variance)}
        return {"start": self.start} | tensors | {"nfe": self.nfe, "seconds": self.seconds}

    @classmethod
    def from_json(cls, record: Record, models: int) -> "_Batch":
        """Read a record; raises ValueError, KeyError, TypeError, OverflowError or RuntimeError if it is none."""
        _validate_entries(record, [field.name for field in fields(cls)])
        rows = torch.tensor(record["rows"])
        nll, variance = (
            torch.tensor([[math.nan if v is None else v for v in row] for row in record[name]], dtype=torch.float64)
            for name in ("nll", "variance")
        )
        shape = (models, len(rows))
        if not len(rows) or not rows.dtype == torch.int64 or not shape == nll.shape == variance.shape:
            raise ValueError(f"rows, nll and variance do not describe {models} values of each row")
        nfe = record["nfe"]
        if len(nfe) != models or not all(isinstance(count, int) and count >= 0 for count in nfe):
            raise ValueError(f"nfe is {nfe!r}, expected {models} counts")
        if not record["seconds"] >= 0.0:
            raise ValueError(f"seconds is {record['seconds']!r}, expected a time")
        return cls(record["start"], rows, nll, variance, nfe, record["seconds"])


def _without_nan(values: Tensor) -> list[list[float | None]]:
    return [[v if math.isfinite(v) else None for v in row] for row in values.tolist()]


class _Folder(RunFolder):
    """``rows.jsonl``, a line of settings and then one per batch, and the result; without a path nothing is written."""

    def __init__(self, path: PathLike | None, kind: str) -> None:
        super().__init__(path)
        self.kind, self.settings = kind, Record()

    @property
    def journal(self) -> Journal:
        """The rows scored."""
        return Journal(self.path / "rows.jsonl", signed=True)

    def read(self, settings: Record, order: Tensor) -> list[_Batch]:
        """The batches scored before.

        Args:
            settings: those of this evaluation.
            order: row numbers in the order in which they are scored.

        Raises:
            ValueError: they belong to other settings, data or weights.
            CheckpointError: they are damaged.
        """
        self.settings, header = json.loads(json.dumps(settings)), Record()

        def convert(line: int, record: Record) -> _Batch | None:
            if line == 1:
                header.update(_valid_header(record))
                return None
            return _Batch.from_json(record, 2 if header["kind"] == "comparison" else 1)

        batches = [batch for batch in self.journal.read(convert) if batch is not None]
        if not header:
            return []
        self.compare({"kind": header["kind"]}, {"kind": self.kind})
        self.compare(header["settings"], self.settings)
        done = 0
        for line, batch in enumerate(batches, 2):
            if batch.start != done or not torch.equal(batch.rows, order[done : done + len(batch.rows)]):
                raise CheckpointError(
                    f"{self.journal.path}: line {line} does not follow the {done} rows before it; move the file away "
                    "to start again."
                )
            done += len(batch.rows)
        self.journal.keep(1 + len(batches))
        return batches

    def add(self, batch: _Batch) -> None:
        """Write a batch."""
        if self.is_real and self.group.is_main:
            self.journal.add(batch.to_json(), {"format": FORMAT, "kind": self.kind, "settings": self.settings})


def _valid_header(record: Record) -> Record:
    """The first line of a journal; raises ValueError, KeyError or TypeError if it is another one."""
    _validate_entries(record, ["format", "kind", "settings"])
    if record["format"] != FORMAT:
        raise ValueError(f"format {record['format']!r}, this version reads format {FORMAT}")
    return {"kind": str(record["kind"]), "settings": dict(record["settings"])}


def _validate_entries(record: Record, names: list[str]) -> None:
    others = sorted(record.keys() - names)
    if others:
        raise ValueError(f"unknown entries {', '.join(map(repr, others))}")


class _Raw(Bins):
    """Rows as they are: every model dequantises them itself."""

    def __init__(self, model: NDM, quantisation: Quantisation | None, dtype: torch.dtype) -> None:
        super().__init__(model, quantisation, "uniform")
        self.dtype = dtype

    def real(self, x: Tensor, generator: GeneratorLike) -> Tensor:
        return x


class _Run:
    """One or two models on their way through the data."""

    def __init__(
        self,
        kind: str,
        models: Mapping[str, NDM],
        data: Any,
        cond: Mapping[str, Any] | None,
        settings: _Settings,
        limits: _Limits,
        run_dir: PathLike | None,
        resume: bool,
        caller: Callable[..., Any],
    ) -> None:
        _validate_models(models, settings)
        self.settings, self.limits = settings, limits
        # The one whose network prescribes dtype and device, if there is one.
        model = next((model for model in models.values() if model.dtype is not None), next(iter(models.values())))
        self.raw = _Raw(model, settings.quantisation, model.dtype or _dtype_of(data))
        self.source = Source(data, {} if cond is None else cond, self.raw, "data", caller)
        for each in models.values():
            validate_cond(self.source.cond, each.cond_names, caller)
        self.device = model.device or (data.device if isinstance(data, Tensor) else torch.device("cpu"))
        self.scorers = [_Scorer(each, settings, self.device) for each in models.values()]
        self.has_pilot = kind == "evaluation" and self.scorers[0].pilot is not None
        generator = torch.Generator().manual_seed(derive_seeds(settings.seed, 0, 0, _ORDER)[0])
        self.order = torch.randperm(self.source.rows, generator=generator)
        self.folder, self.resume = _Folder(run_dir, kind), resume
        self.models, self.group = models, self.folder.group
        self.batches: list[_Batch] = []

    @contextmanager
    def in_folder(self) -> Iterator[None]:
        """With the batches scored before, and no other process at work there."""
        with self.folder.locked("rows.jsonl", "scored rows", self.resume):
            if self.folder.is_real:
                settings = self._identity(self.models)
                self.batches = self.group.of_main(lambda: self.folder.read(settings, self.order))
            yield

    @property
    def visited(self) -> int:
        """Rows scored or failed."""
        return sum(len(batch.rows) for batch in self.batches)

    def run(self, progress: bool) -> str:
        """Score batches until there is a reason to stop, which is returned."""
        began, before = time.monotonic(), self.visited
        limit = math.inf if self.limits.time_limit is None else self.limits.time_limit
        total = min(self.source.rows, self.limits.max_rows or self.source.rows)
        hidden = not (progress and self.group.is_main)
        bar = tqdm(total=total, initial=before, disable=hidden, unit="row", dynamic_ncols=True)
        try:
            with bar:
                while (reason := self._reason()) is None:
                    late = self.visited > before and time.monotonic() - began >= limit
                    if self.group.any(late, self.device):
                        return "time"
                    bar.update(self._advance())
                    bar.set_postfix_str(_figures(*_mean(self._figure())), refresh=False)
                return reason
        except KeyboardInterrupt:
            if not self.batches:
                raise
            return "interrupted"

    def _reason(self) -> str | None:
        if self.limits.stderr is not None:
            figure = self._figure()
            if len(figure) >= MINIMUM_ROWS and _mean(figure)[1] <= self.limits.stderr:
                return "target"
        if self.visited >= self.source.rows:
            return "data"
        if self.limits.max_rows is not None and self.visited >= self.limits.max_rows:
            return "max_rows"
        return None

    def _advance(self) -> int:
        """Score the next batch, in several processes one in each; returns the number of rows."""
        before, own = self.visited, self.group.share(self._next())
        for outcome in self.group.gathered(self._scored(*own[0][1]) if own else None):
            if isinstance(outcome, SolverError):
                raise outcome
            if outcome is not None:
                self.folder.add(outcome)
                self.batches.append(outcome)
        return self.visited - before

    def _next(self) -> list[tuple[int, Tensor]]:
        """Positions and rows of the next batches, at most one per process."""
        found, start, end = list[tuple[int, Tensor]](), self.visited, self.limits.max_rows or self.source.rows
        while start < min(end, self.source.rows) and len(found) < self.group.size:
            pilot = self._is_pilot(start)
            size = min(self.settings.batch_size, PILOT_ROWS - start) if pilot else self.settings.batch_size
            found.append((start, self.order[start : min(start + size, end)]))
            start += len(found[-1][1])
        return found

    def _is_pilot(self, start: int) -> bool:
        return self.has_pilot and start < PILOT_ROWS

    def _scored(self, start: int, rows: Tensor) -> "_Batch | SolverError":
        """A batch, or why there is none: the other processes have to know."""
        began = time.monotonic()
        x, cond = self.source.batch(rows, torch.Generator())
        try:
            scores = [scorer.score(x, cond, start, self._is_pilot(start)) for scorer in self.scorers]
        except SolverError as error:
            failure = _of_data(error, rows)
            failure.__cause__ = error
            return failure
        nll, variance = (torch.stack([getattr(s, name) for s in scores]).cpu() for name in ("nll", "variance"))
        bad = rows[~nll.isfinite().all(0)].tolist()
        if bad and self.settings.on_failure == "raise":
            return SolverError(
                f"the log-likelihood is not finite in rows {some(bad)} of data, beyond the range of its dtype; rescale "
                "or drop them, use a model in float64, or pass on_failure='nan' to leave them out.",
                rows=tuple(bad),
            )
        return _Batch(start, rows, nll, variance, [s.nfe for s in scores], time.monotonic() - began)

    def values(self) -> Tensor:
        """Values of the rows that every model could score, ``(models, n)``."""
        nll = torch.cat([batch.nll for batch in self.batches], 1)
        return nll[:, nll.isfinite().all(0)]

    def _figure(self) -> Tensor:
        """What is averaged: the values of the model, or the differences; empty before the first batch."""
        if not self.batches:
            return torch.empty(0)
        values = self.values()
        return values[0] if len(values) == 1 else values[0] - values[1]

    def estimator_stderr(self) -> float:
        """The estimator's standard error of the mean of the one model."""
        good = torch.cat([batch.nll[0] for batch in self.batches]).isfinite()
        variance = torch.cat([batch.variance[0] for batch in self.batches])[good]
        known = variance.isfinite()
        if not bool(known.any()):
            return math.nan
        unknown = float((~known).sum()) * self.scorers[0].pilot_gain * float(variance[known].mean())
        return math.sqrt(float(variance[known].sum()) + unknown) / len(variance)

    def nfe(self, model: int) -> float:
        """Mean network evaluations per row."""
        return sum(batch.nfe[model] for batch in self.batches) / self.visited

    def bits(self, nats: float) -> float | None:
        """Nats per event in bits per dimension; None for real data."""
        return None if self.settings.quantisation is None else self.raw.bits(nats)

    def shared(self, reason: str) -> dict[str, Any]:
        """What an Evaluation and a Comparison both tell."""
        indices = torch.cat([batch.rows for batch in self.batches])
        good = torch.cat([batch.nll for batch in self.batches], 1).isfinite().all(0)
        return {
            "rows": int(good.sum()),
            "failed": int((~good).sum()),
            "failed_rows": tuple(indices[~good].tolist()),
            "finished": reason not in ("time", "interrupted"),
            "reason": reason,
            "indices": indices[good],
            "seconds": sum(batch.seconds for batch in self.batches),
        }

    def summarise(self, result: Evaluation | Comparison) -> None:
        """Write the result, all but its tensors."""
        numbers = {field.name: getattr(result, field.name) for field in fields(result)}
        scalars = {name: value for name, value in numbers.items() if not isinstance(value, Tensor)}
        self.folder.write_result(f"{self.folder.kind}.json", scalars | {"settings": self.folder.settings})

    def _identity(self, models: Mapping[str, NDM]) -> Record:
        """All that determines the score of every row."""
        bins, trace = self.settings.quantisation, self.scorers[0].estimator
        return (
            {field.name: getattr(self.settings, field.name) for field in fields(self.settings)}
            | {
                "quantisation": None if bins is None else asdict(bins),
                "trace": repr(trace) if is_dataclass(trace) else type(trace).__qualname__,
                "device": self.device.type,
                "data": self.source.fingerprint(),
            }
            | {name: _described(model) for name, model in models.items()}
        )


def _described(model: NDM) -> Record:
    """Structure and weights of a model."""
    parts: Record = {"sha256": hash_state(model.state_dict()), "prior": type(model.prior).__name__, "model": str(model)}
    for name, part in (("schedule", model.schedule), ("transform", model.transform), ("predictor", model.predictor)):
        try:
            parts[name] = to_config(part)
        except Unconfigurable:
            parts[name] = type(part).__qualname__
    return parts


def _validate_models(models: Mapping[str, NDM], settings: _Settings) -> None:
    for name, model in models.items():
        if not isinstance(model, NDM):
            raise TypeError(f"{name} must be an ndm_ct.NDM, got {type(model).__name__}.")
    for attribute in ("data_shape", "dtype", "device"):
        values = [getattr(model, attribute) for model in models.values()]
        if attribute == "dtype" and settings.quantisation is not None:
            values = [value or torch.get_default_dtype() for value in values]
        if len({value for value in values if value is not None}) > 1:
            raise ValueError(
                f"{' and '.join(models)} differ in {attribute}: {' and '.join(map(str, values))}; a paired comparison "
                "needs the same rows and random numbers for both, so make them agree."
            )


def _dtype_of(data: Any) -> torch.dtype:
    """The dtype for a model without parameters: that of the data, if they are real."""
    example: Any = data
    if isinstance(data, Dataset) and len(data):  # type: ignore[arg-type]
        example = data[0]
    if isinstance(example, np.ndarray) and example.dtype.kind == "f":
        return torch.float64 if example.dtype.itemsize > 4 else torch.float32
    if isinstance(example, Tensor) and example.is_floating_point():
        return example.dtype
    return torch.get_default_dtype()


def _of_data(error: SolverError, rows: Tensor) -> SolverError:
    """The same failure with the rows' numbers in the data."""
    numbers = tuple(rows[list(error.rows)].tolist())
    where = f" In data these are rows {some(numbers)}." if numbers else ""
    return SolverError(f"{error}{where}", t=error.t, dt=error.dt, rows=numbers)
