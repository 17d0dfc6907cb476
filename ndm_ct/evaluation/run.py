"""The loop of an evaluation: batches of rows, reasons to stop, and the folder from which it continues."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ndm_ct._core.checks import some, unpack_numpy, validate_count, validate_positive
from ndm_ct._core.config import Unconfigurable, to_config
from ndm_ct._core.errors import CheckpointError, SolverError
from ndm_ct._core.keywords import validate_cond
from ndm_ct._core.noise import GeneratorLike
from ndm_ct._core.parallel import Group, is_sharded, reshard
from ndm_ct._core.seeds import derive_seeds
from ndm_ct.data.containers import CondFrom, dtype_of
from ndm_ct.data.sources import Bins, Source
from ndm_ct.evaluation.results import Comparison, Evaluation, figures, mean
from ndm_ct.evaluation.scores import LARGEST_PILOT, ORDER, PILOT_ROWS, Scorer, Settings
from ndm_ct.model import NDM
from ndm_ct.quantisation import Quantisation, rename_earlier
from ndm_ct.storage.atomic import PathLike
from ndm_ct.storage.folder import Journal, Record, RunFolder
from ndm_ct.storage.tensors import hash_state

__all__ = ["MINIMUM_ROWS", "Limits", "Run"]

MINIMUM_ROWS = 256
"""Rows before a target may stop an evaluation. The standard error itself is then known to about 5 %."""

UNEVEN = 0.5
"""Relative error of the pilot's variance above which more rows are needed: fewer than about four make it up."""

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When to stop."""

    stderr: float | None
    max_rows: int | None
    time_limit: float | None

    def __post_init__(self) -> None:
        unpack_numpy(self)
        if self.max_rows is not None:
            validate_count("max_rows", self.max_rows)
        for name, unit in (("stderr", "nats"), ("time_limit", "seconds")):
            value = getattr(self, name)
            if value is not None:
                validate_positive(name, value, unit)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A scored batch.

    Args:
        start: position of its first row in the random order.
        rows: row numbers in the data, ``(b,)``.
        nll: estimates of the negative log-likelihood, nats, ``(models, b)``; NaN in failed rows.
        variance: their variance given the rows, ``(models, b)``; NaN where it is unknown.
        nfe: network evaluations by model, summed over the rows.
        seconds: time spent on scoring.
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
    def from_json(cls, record: Record, models: int) -> "Batch":
        """Read a record. Raises ValueError, KeyError, TypeError, OverflowError or RuntimeError if it is damaged."""
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
        return cls(start=record["start"], rows=rows, nll=nll, variance=variance, nfe=nfe, seconds=record["seconds"])


def _without_nan(values: Tensor) -> list[list[float | None]]:
    return [[v if math.isfinite(v) else None for v in row] for row in values.tolist()]


class Folder(RunFolder):
    """``rows.jsonl``, with a line of settings and one per batch, and the result. Without a path nothing is written."""

    def __init__(self, path: PathLike | None, kind: str) -> None:
        super().__init__(path)
        self.kind, self.settings = kind, Record()

    @property
    def journal(self) -> Journal:
        """The rows scored."""
        return Journal(self.path / "rows.jsonl", signed=True)

    def read(self, settings: Record, order: Tensor) -> list[Batch]:
        """Read the batches that were scored before.

        Args:
            settings: settings of this evaluation.
            order: row numbers in the order in which they are scored.

        Raises:
            ValueError: the batches belong to other settings, data or weights.
            CheckpointError: the file is damaged.
        """
        self.settings, header = json.loads(json.dumps(settings)), Record()

        def convert(line: int, record: Record) -> Batch | None:
            if line == 1:
                header.update(_valid_header(record))
                return None
            return Batch.from_json(record, 2 if header["kind"] == "comparison" else 1)

        batches = [batch for batch in self.journal.read(convert) if batch is not None]
        if not header:
            return []
        self.compare({"kind": header["kind"]}, {"kind": self.kind})
        self.compare(rename_earlier(header["settings"]), self.settings)
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

    def add(self, batch: Batch) -> None:
        """Write a batch."""
        if self.is_real and self.group.is_main:
            self.journal.add(batch.to_json(), {"format": FORMAT, "kind": self.kind, "settings": self.settings})


def _valid_header(record: Record) -> Record:
    """Check the first line of a journal. Raises ValueError, KeyError or TypeError if it is not a valid header."""
    _validate_entries(record, ["format", "kind", "settings"])
    if record["format"] != FORMAT:
        raise ValueError(f"format {record['format']!r}, this version reads format {FORMAT}")
    return {"kind": str(record["kind"]), "settings": dict(record["settings"])}


def _validate_entries(record: Record, names: list[str]) -> None:
    others = sorted(record.keys() - names)
    if others:
        raise ValueError(f"unknown entries {', '.join(map(repr, others))}")


class Raw(Bins):
    """Rows without dequantisation, which every model does itself."""

    def __init__(self, model: NDM, quantisation: Quantisation | None, dtype: torch.dtype) -> None:
        super().__init__(model, quantisation, "uniform")
        self.dtype = dtype

    def real(self, x: Tensor, generator: GeneratorLike) -> Tensor:
        return x


class Run:
    """Scores the data under one or two models."""

    def __init__(
        self,
        kind: str,
        models: Mapping[str, NDM],
        data: Any,
        cond: Mapping[str, Any] | None,
        settings: Settings,
        limits: Limits,
        run_dir: PathLike | None,
        resume: bool,
        caller: Callable[..., Any],
        cond_from: CondFrom,
    ) -> None:
        _validate_models(models, settings)
        self.settings, self.limits = settings, limits
        # Dtype and device come from a model with parameters, if there is one.
        model = next((model for model in models.values() if model.dtype is not None), next(iter(models.values())))
        self.raw = Raw(model, settings.quantisation, model.dtype or dtype_of(data))
        self.source = Source(data, {} if cond is None else cond, self.raw, "data", caller, cond_from)
        for each in models.values():
            validate_cond(self.source.cond, each.cond_names, caller)
        self.device = model.device or (data.device if isinstance(data, Tensor) else torch.device("cpu"))
        self.scorers = [Scorer(model=each, settings=settings, device=self.device) for each in models.values()]
        self.has_pilot = kind == "evaluation" and self.scorers[0].pilot is not None
        generator = torch.Generator().manual_seed(derive_seeds(settings.seed, 0, 0, ORDER)[0])
        self.order = torch.randperm(self.source.rows, generator=generator)
        self.folder, self.resume = Folder(run_dir, kind), resume
        self.models, self.caller = models, caller
        # All processes call a sharded network equally often: each scores every batch, and the first one writes.
        for each in models.values():
            reshard(each)
        whole = not any(is_sharded(p) for each in models.values() for p in each.parameters())
        self.group = self.folder.group if whole else Group(alone=True)
        self.batches: list[Batch] = []

    @contextmanager
    def in_folder(self) -> Iterator[None]:
        """Lock the folder, and read the batches that were scored before."""
        several, settings = self.folder.group.size > 1, Record()
        if several or self.folder.is_real:
            settings = self._identity(self.models)
        if several:
            limits = {"stderr": self.limits.stderr, "max_rows": self.limits.max_rows}
            data = {"data": self.source.fingerprint_with_items()}
            self.folder.compare_processes(self.caller.__name__, settings | limits | data)
        with self.folder.locked("rows.jsonl", "scored rows", self.resume):
            if self.folder.is_real:
                self.batches = self.folder.group.of_main(lambda: self.folder.read(settings, self.order))
            yield

    @property
    def visited(self) -> int:
        """Rows scored or failed."""
        return sum(len(batch.rows) for batch in self.batches)

    def run(self, progress: bool) -> str:
        """Score batches until there is a reason to stop; returns the reason."""
        began, before = time.monotonic(), self.visited
        limit = math.inf if self.limits.time_limit is None else self.limits.time_limit
        total = min(self.source.rows, self.limits.max_rows or self.source.rows)
        hidden = not (progress and self.folder.group.is_main)
        bar = tqdm(total=total, initial=before, disable=hidden, unit="row", dynamic_ncols=True)
        try:
            with bar:
                while (reason := self._reason()) is None:
                    late = self.visited > before and time.monotonic() - began >= limit
                    if self.group.any(late, self.device):
                        return "time"
                    bar.update(self._advance())
                    bar.set_postfix_str(figures(*mean(self._figure())), refresh=False)
                return reason
        except KeyboardInterrupt:
            if not self.batches:
                raise
            return "interrupted"

    def _reason(self) -> str | None:
        if self.limits.stderr is not None:
            figure = self._figure()
            if len(figure) >= MINIMUM_ROWS and mean(figure)[1] <= self.limits.stderr:
                return "target"
        if self.visited >= self.source.rows:
            return "data"
        if self.limits.max_rows is not None and self.visited >= self.limits.max_rows:
            return "max_rows"
        return None

    def _advance(self) -> int:
        """Score the next batch, or one batch in each process; returns the number of rows."""
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
        if start < self.pilot:  # how the rows after the pilot are scored depends on it
            end = min(end, self.pilot)
        while start < min(end, self.source.rows) and len(found) < self.group.size:
            found.append((start, self.order[start : min(start + self.settings.batch_size, end)]))
            start += len(found[-1][1])
        return found

    @property
    def pilot(self) -> int:
        """Rows of the pilot: :data:`PILOT_ROWS`, doubled as long as few of them make up its variance."""
        rows = PILOT_ROWS if self.has_pilot else 0
        variance = torch.cat([torch.empty(0), *(batch.variance[0] for batch in self.batches[:LARGEST_PILOT])])
        while 0 < rows < LARGEST_PILOT and rows <= len(variance) and _relative_error(variance[:rows]) > UNEVEN:
            if len(variance) > rows and bool(variance[rows:].isnan().all()):
                break  # an earlier version of this library scored these rows, with a pilot of PILOT_ROWS
            rows *= 2
        return rows

    def _scored(self, start: int, rows: Tensor) -> "Batch | SolverError":
        """Score a batch. An error is returned and not raised, because the other processes have to know of it."""
        began = time.monotonic()
        x, cond = self.source.batch(rows, torch.Generator())
        try:
            scores = [scorer.score(x, cond, start, start < self.pilot) for scorer in self.scorers]
        except SolverError as error:
            failure = _of_data(error, rows)
            failure.__cause__ = error
            return failure
        nll, variance = (torch.stack([getattr(s, name) for s in scores]).cpu() for name in ("nll", "variance"))
        bad = rows[~nll.isfinite().all(0)].tolist()
        if bad and self.settings.on_failure == "raise":
            return SolverError(
                f"the log-likelihood is not finite in rows {some(bad)} of data: it is beyond the range of its dtype. "
                "Rescale or drop them, use a model in float64, or pass on_failure='nan' to leave them out.",
                rows=tuple(bad),
            )
        return Batch(
            start=start, rows=rows, nll=nll, variance=variance, nfe=[s.nfe for s in scores],
            seconds=time.monotonic() - began,
        )  # fmt: skip

    def values(self) -> Tensor:
        """Values of the rows that all models could score, ``(models, n)``."""
        nll = torch.cat([batch.nll for batch in self.batches], 1)
        return nll[:, nll.isfinite().all(0)]

    def _figure(self) -> Tensor:
        """The numbers that are averaged: values of the model, or differences. Empty before the first batch."""
        if not self.batches:
            return torch.empty(0)
        values = self.values()
        return values[0] if len(values) == 1 else values[0] - values[1]

    def estimator_stderr(self) -> tuple[float, float]:
        """The estimator's standard error of the mean of the one model, and the standard error of that number."""
        good = torch.cat([batch.nll[0] for batch in self.batches]).isfinite()
        variance = torch.cat([batch.variance[0] for batch in self.batches])[good]
        known = variance[variance.isfinite()]
        if not len(known):
            return math.nan, math.nan
        unknown = (len(variance) - len(known)) * self.scorers[0].pilot_gain * float(known.mean())
        error = math.sqrt(float(known.sum()) + unknown) / len(variance)
        return error, 0.5 * error * _relative_error(known) if error > 0.0 else 0.0

    def nfe(self, model: int) -> float:
        """Mean network evaluations per row."""
        return sum(batch.nfe[model] for batch in self.batches) / self.visited

    def bits(self, nats: float) -> float | None:
        """Nats per event in bits per dimension; None for real data."""
        return None if self.settings.quantisation is None else self.raw.bits(nats)

    def shared(self, reason: str) -> dict[str, Any]:
        """Fields that Evaluation and Comparison have in common."""
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
        """Write the result without its tensors."""
        numbers = {field.name: getattr(result, field.name) for field in fields(result)}
        scalars = {name: value for name, value in numbers.items() if not isinstance(value, Tensor)}
        self.folder.write_result(f"{self.folder.kind}.json", scalars | {"settings": self.folder.settings})

    def _identity(self, models: Mapping[str, NDM]) -> Record:
        """Everything that determines the score of every row."""
        bins, trace = self.settings.quantisation, self.scorers[0].estimator
        return (
            {field.name: getattr(self.settings, field.name) for field in fields(self.settings)}
            | {
                "quantisation": None if bins is None else {"levels": bins.levels, "edges": bins.edges},
                "trace": repr(trace) if is_dataclass(trace) else type(trace).__qualname__,
                "device": self.device.type,
                "data": self.source.fingerprint(),
            }
            | {name: _described(model) for name, model in models.items()}
        )


def _described(model: NDM) -> Record:
    """Describe the structure and hash the weights of a model."""
    parts: Record = {"sha256": hash_state(model.state_dict()), "prior": type(model.prior).__name__, "model": str(model)}
    own = {"schedule": model.schedule, "transform": model.transform, "predictor": model.predictor}
    own |= {} if model.noise_scale is None else {"noise_scale": model.noise_scale}
    for name, part in own.items():
        try:
            parts[name] = to_config(part)
        except Unconfigurable:
            parts[name] = type(part).__qualname__
    return parts


def _relative_error(variance: Tensor) -> float:
    """Standard error of the mean of some variances, over the mean; one, if a single row makes up all of it."""
    known = variance[variance.isfinite()]
    return float(known.std() / known.mean()) / math.sqrt(len(known)) if len(known) > 1 else math.nan


def _validate_models(models: Mapping[str, NDM], settings: Settings) -> None:
    for name, model in models.items():
        if not isinstance(model, NDM):
            raise TypeError(f"{name} must be an ndm_ct.NDM, got {type(model).__name__}.")
        if settings.quantisation is not None:
            settings.quantisation.validate_placed(model.adapted)
    for attribute in ("data_shape", "dtype", "device"):
        values = [getattr(model, attribute) for model in models.values()]
        if attribute == "dtype" and settings.quantisation is not None:
            values = [value or torch.get_default_dtype() for value in values]
        if len({value for value in values if value is not None}) > 1:
            raise ValueError(
                f"{' and '.join(models)} differ in {attribute}: {' and '.join(map(str, values))}; a paired comparison "
                "needs the same rows and random numbers for both, so make them agree."
            )


def _of_data(error: SolverError, rows: Tensor) -> SolverError:
    """Restate a failure with the rows' numbers in the data."""
    numbers = tuple(rows[list(error.rows)].tolist())
    where = f" In data these are rows {some(numbers)}." if numbers else ""
    return SolverError(f"{error}{where}", t=error.t, dt=error.dt, rows=numbers)
