"""Tables with kinds of columns, ``ndm-ct train --columns``: their training, scores and samples."""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ndm_ct._core.checks import some
from ndm_ct._core.seeds import derive_seeds, seeded_weights
from ndm_ct.cli.batches import finished_columns, generators_of
from ndm_ct.cli.diagnosis import p_values, say_hidden
from ndm_ct.cli.parser import UsageError
from ndm_ct.cli.runs import FORMAT, Run
from ndm_ct.cli.settings import Settings, settings_from_file
from ndm_ct.columns import (
    SAMPLES,
    Coding,
    Scored,
    Table,
    Values,
    columns_of,
    draw_noise,
    row_generators,
    summary,
)
from ndm_ct.files import Rows, read, write_table
from ndm_ct.schedules.base import Schedule
from ndm_ct.storage.tensors import hash_values

__all__ = ["draw_table", "evaluate_table", "prepare_table", "score_table", "scored_rows"]


def prepare_table(
    settings: Settings, rows: Rows, chosen: np.ndarray, held_out: np.ndarray, schedule: Callable[[float], Schedule]
) -> tuple[Run, Tensor, dict[str, Any], dict[str, Any]]:
    """The run of a table, its model untrained; the rows to train on; options of ``fit``; the configuration.

    Args:
        settings: of the training; ``columns`` is a file with a schema, or "infer".
        rows: what was read.
        chosen: numbers of the rows to train on.
        held_out: numbers of the others.
        schedule: makes the schedule from the noise at t = 0.
    """
    if settings.transform != "identity" or settings.head != "x" or settings.levels is not None:
        raise ValueError("columns goes with transform=identity and head=x, and without levels.")
    if rows.values.ndim != 2:
        raise ValueError(f"columns is for tables, got rows of shape {tuple(rows.values.shape[1:])}.")
    values, schema = _values(rows), None
    if settings.columns != "infer":
        schema = settings_from_file(str(settings.columns))
        schema = schema.get("columns", schema)
    columns = columns_of(values, schema)
    print(summary(columns, values))
    random = np.random.default_rng(derive_seeds(settings.seed, "columns"))
    coding = Coding(columns)
    numbers = coding.places_of(values)
    table = Table.of(
        columns, numbers[chosen], conditionals=_wants_conditionals(settings, coding, numbers),
        marginals=settings.marginals, gamma_min=settings.gamma_min, random=random,
    )  # fmt: skip
    with seeded_weights(settings.seed):
        model = table.model(
            schedule(table.gamma_min), width=settings.width or 128, depth=settings.depth, dropout=settings.dropout,
            shares=table.shares(numbers[chosen]),
        )  # fmt: skip
    x, cond, _ = table.training_rows(numbers[chosen], random)
    options: dict[str, Any] = {"cond": cond}
    if len(held_out):
        fresh, given, _ = table.training_rows(numbers[held_out], random, copies=1)
        options |= {"validation": fresh, "validation_cond": given, "validate_every": max(1, settings.steps // 20)}
    config = {
        "format": FORMAT, "settings": asdict(settings), "levels": None, "mean": None, "scale": None,
        "columns": values.names, "event_shape": model.event_shape, "table": table.to_json(),
    }  # fmt: skip
    run = Run(model, settings, None, None, None, values.names, table=table)
    return run, x, options, json.loads(json.dumps(config))


def _wants_conditionals(settings: Settings, coding: Coding, numbers: np.ndarray) -> bool:
    gaps = coding.has_gaps(numbers)
    if settings.conditionals == "no" and gaps:
        raise ValueError("conditionals=no: values are missing, which only a model of all conditionals takes.")
    return gaps or settings.conditionals == "yes"


def _values(rows: Rows) -> Values:
    names = rows.columns or tuple(f"x{k}" for k in range(rows.values.shape[1]))
    return Values(np.asarray(rows.values, dtype=np.float64), names, rows.words)


def _rows_of(options: argparse.Namespace, run: Run) -> tuple[np.ndarray, np.ndarray]:
    """The numbers ``(N, D)`` of the file that is named, its columns found by name; one that it lacks is missing.

    The second array, ``(N,)``, says which rows fit their columns. What the reader decided goes to stderr.
    """
    rows = read(options.data, options.array, options.header, words=True, gaps=True)
    for note in rows.notes:
        print(f"{options.data}: {note}", file=sys.stderr)
    values, fits = _values(rows), np.ones(len(rows.values), dtype=bool)
    fits[list(rows.bad)] = False
    assert run.table is not None
    needed = run.names
    lacking = [name for name in needed if name not in values.names]
    if lacking and not run.table.conditionals:
        raise ValueError(f"{options.data} lacks the column {some(lacking)}, which the model was trained on.")
    places = {name: place for place, name in enumerate(values.names)}
    numbers = np.full((len(values.numbers), len(needed)), np.nan)
    words = dict[int, tuple[Any, ...]]()
    for k, name in enumerate(needed):
        if name in places:
            numbers[:, k] = values.numbers[:, places[name]]
            words |= {k: values.words[places[name]]} if places[name] in values.words else {}
    return run.table.coding.places_of(Values(numbers, needed, words)), fits


def _roles(run: Run, numbers: np.ndarray, given: list[str]) -> np.ndarray | None:
    """The roles of values to score."""
    assert run.table is not None
    unknown = [name for name in given if name not in run.names]
    if unknown:
        raise UsageError(f"--given {unknown[0]}: there are the columns {', '.join(run.names)}.")
    refusal = "missing values and --given need a model trained with --conditionals yes."
    return run.table.roles(numbers, [run.names.index(name) for name in given], refusal)


def score_table(options: argparse.Namespace, run: Run) -> int:
    """``ndm-ct loglik`` of a table with kinds."""
    assert run.table is not None
    table, (numbers, fits) = run.table, _rows_of(options, run)
    given = options.given.split(",") if options.given else []
    roles = _roles(run, numbers, given)

    def make(rows: slice) -> dict[str, Tensor]:
        found = _scored(table, run, numbers[rows], None if roles is None else roles[rows],
                        generators_of(options, range(rows.start, rows.stop)), options.stderr)  # fmt: skip
        for values in found:
            values[~fits[rows]] = np.nan
        return {name: torch.from_numpy(values) for name, values in found._asdict().items()}

    settings = {
        "data": hash_values([torch.from_numpy(numbers), torch.from_numpy(fits)]),
        "stderr": options.stderr,
        "given": given,
    }
    with finished_columns(options, run, len(numbers), settings, make) as columns:
        say_hidden(columns.pop("truncation").numpy())
        found, rare = columns["log_p"], {} if given else p_values(options.model, columns)
        write_table(options.out, {"row": torch.arange(len(numbers))} | columns | rare)
    none = int((found == -math.inf).sum())
    print(f"{options.out}: {len(numbers)} rows, mean log p {float(found[found.isfinite()].mean()):.6g} nats"
          + f", {none} with values that have no mass, -inf, left out of the mean" * bool(none))  # fmt: skip
    return 0


def _scored(
    table: Table, run: Run, numbers: np.ndarray, roles: np.ndarray | None, generators: Any, stderr: float | None
) -> Scored:
    noise = draw_noise(generators, SAMPLES, table.coding.noises)
    return table.score(run.model, numbers, noise, roles=roles, generator=generators, stderr=stderr, on_failure="nan")


def evaluate_table(options: argparse.Namespace, run: Run) -> int:
    """``ndm-ct evaluate`` of a table with kinds: all rows, or ``--max-rows`` of them drawn by the seed."""
    assert run.table is not None
    if options.out is not None:
        raise UsageError("--out is for tables of real values; loglik writes the scores of all rows.")
    scores, errors, truncations = scored_rows(options, run)[1]
    say_hidden(truncations)
    good = np.isfinite(scores)
    error = scores[good].std(ddof=1) / math.sqrt(good.sum())
    print(f"NLL {-scores[good].mean():.6g} ± {error:.2g} nats per row, in the units of the data; "
          f"estimator's part ± {np.linalg.norm(errors[good]) / good.sum():.2g}; {good.sum()} rows"
          + f", {(~good).sum()} without a finite score left out" * bool((~good).any()))  # fmt: skip
    return 0


def scored_rows(options: argparse.Namespace, run: Run) -> tuple[np.ndarray, Scored]:
    """Numbers of all rows of the file, or of ``--max-rows`` of them drawn by the seed, and their scores."""
    assert run.table is not None
    for name in ("samples", "stderr", "time_limit"):
        if getattr(options, name, None) is not None or options.bound != "ode":
            raise UsageError(f"--{name.replace('_', '-')} and --bound are for tables of real values; use loglik.")
    numbers, fits = _rows_of(options, run)
    order = np.random.default_rng(derive_seeds(options.seed, "evaluate")).permutation(len(numbers))[: options.max_rows]
    order = order[fits[order]]
    found = []
    for part in np.array_split(numbers[order], max(1, len(order) // options.batch_size)):
        generators = row_generators(part, "row", options.device)
        found.append(_scored(run.table, run, part, _roles(run, part, []), generators, None))
    return order, Scored(*(np.concatenate(each) for each in zip(*found, strict=True)))


def draw_table(options: argparse.Namespace, run: Run) -> int:
    """``ndm-ct sample`` of a table with kinds."""
    assert run.table is not None
    table, given = run.table, _given(options, run)
    if options.steps is not None and options.nfe is not None:
        raise UsageError("--steps and --nfe both set the number of steps; give one.")
    chosen = {name: getattr(options, name) for name in ("method", "steps", "nfe", "grid")}

    def make(rows: slice) -> dict[str, Tensor]:
        n = rows.stop - rows.start
        generators = generators_of(options, range(rows.start, rows.stop))
        numbers = np.repeat(given, n, axis=0)
        return {"x": torch.from_numpy(
            table.draw(run.model, n, (generators, generators), numbers=numbers, **chosen)
        )}  # fmt: skip

    settings = chosen | {"given": options.given}
    with finished_columns(options, run, options.n, settings, make) as columns:
        x = table.coding.values_of(columns["x"].numpy())
        kept = [k for k, column in enumerate(table.coding.columns) if column.kind != "left out"]
        write_table(options.out, {run.names[k]: _plain(x[:, k]) for k in kept})
    print(f"{options.out}: {options.n} rows by {options.method}")
    return 0


def _plain(column: np.ndarray) -> np.ndarray:
    """Numbers as floats, words as words."""
    words = any(isinstance(value, str) for value in column)
    return column.astype(str) if words else column.astype(np.float64)


def _given(options: argparse.Namespace, run: Run) -> np.ndarray:
    """One row ``(1, D)`` with the values of ``--given a=1,b=red``, NaN elsewhere."""
    assert run.table is not None
    numbers, words = np.full((1, len(run.names)), np.nan), {}
    for word in options.given.split(",") if options.given else []:
        name, sign, value = word.partition("=")
        if not sign or name not in run.names:
            raise UsageError(f"--given {word}: expected COLUMN=VALUE, of the columns {', '.join(run.names)}.")
        place = run.names.index(name)
        column = run.table.coding.columns[place]
        if any(isinstance(each, str) for each in column.values):
            numbers[0, place], words[place] = 0.0, (value,)
        else:
            try:
                numbers[0, place] = float(value)
            except ValueError as error:
                raise UsageError(f"--given {word}: expected a number.") from error
    if options.given and not run.table.conditionals:
        raise UsageError("--given needs a model trained with --conditionals yes.")
    return run.table.coding.places_of(Values(numbers, run.names, words))
