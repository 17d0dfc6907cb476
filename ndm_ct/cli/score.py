"""``ndm-ct loglik`` and ``ndm-ct evaluate``."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ndm_ct.cli.batches import batches_of, conditions, finished_columns, generators_of, rows_of, written_conditions
from ndm_ct.cli.diagnosis import p_values, say_hidden
from ndm_ct.cli.models import load_run
from ndm_ct.cli.parser import UsageError
from ndm_ct.cli.runs import Run
from ndm_ct.cli.tables import evaluate_table, score_table
from ndm_ct.evaluation import Evaluation, evaluate
from ndm_ct.files import TABLES, write_table
from ndm_ct.likelihood.api import loglik
from ndm_ct.likelihood.bits import bits_per_dim
from ndm_ct.storage.tensors import hash_values

__all__ = ["evaluate_run", "run_evaluate", "run_loglik"]


def run_loglik(options: argparse.Namespace) -> int:
    run = load_run(options)
    if options.out.suffix.lower() not in TABLES:
        raise UsageError(f"--out must end in {', '.join(TABLES)}, got {str(options.out)!r}.")
    if run.bins is not None and options.stderr is not None:
        raise UsageError("--stderr is for real values; integers are scored through noise in their bins.")
    if run.table is not None:
        return score_table(options, run)
    usable = rows_of(options, run)
    values, places, total = usable
    given = conditions(options, len(values), run)

    def make(rows: slice) -> dict[str, Tensor]:
        cond = {name: value[rows] for name, value in given.items()}
        return _scores(run, values[rows], options.stderr, generators_of(options, places[rows]), cond)

    data = hash_values(values[rows] for rows in batches_of(options, len(values)))
    settings = {"data": data, "stderr": options.stderr} | written_conditions(options)
    if len(values) < total:
        settings |= {"places": places}
    with finished_columns(options, run, len(values), settings, make) as columns:
        say_hidden(columns.pop("truncation", torch.zeros(0)).numpy())
        found = {name: usable.spread(column) for name, column in columns.items()}
        write_table(options.out, {"row": torch.arange(total)} | found | p_values(options.model, found))
    good = found["log_p"][found["log_p"].isfinite()]
    print(
        f"{options.out}: {total} rows, mean log p {float(good.mean()):.6g} nats"
        + f", {total - len(values)} without finite numbers" * (total > len(values))
        + f", {len(values) - len(good)} failed" * (len(values) > len(good))
    )
    return 0


def _scores(
    run: Run, x: Tensor, stderr: float | None, generators: list[torch.Generator], cond: dict[str, Any]
) -> dict[str, Tensor]:
    """Columns of a batch, float64 on the CPU."""
    if run.bins is None:
        log_p, info = loglik(
            run.model, x, stderr=stderr, on_failure="nan", generator=generators, return_info=True, **cond
        )
        log_p = log_p.double().cpu() - run.log_scale
        return {"log_p": log_p, "stderr": info.stderr.double().cpu(), "truncation": info.truncation.double().cpu()}
    bits, levels = bits_per_dim(
        run.model,
        x,
        quantisation=run.bins,
        dequantisation=run.dequantisation,
        generator=generators,
        return_info=True,
        **cond,
    )
    per_bit = x[0].numel() * math.log(2.0)
    return {
        "log_p": levels.nats.double().cpu(),
        "stderr": per_bit * levels.stderr.double().cpu(),
        "bits_per_dim": bits.double().cpu(),
    }


def evaluate_run(options: argparse.Namespace, run: Run, folder: Path | None) -> tuple[Evaluation, Sequence[int]]:
    """The mean negative log-likelihood of a file in the units of the model, and the numbers of its usable rows.

    Args:
        options: of the command.
        run: the model.
        folder: where scores are kept; None for nowhere.
    """
    (rows, places, _), elbo = rows_of(options, run), options.bound == "elbo"
    result = evaluate(
        run.model, rows, quantisation=run.bins, cond=conditions(options, len(rows), run),
        dequantisation=run.dequantisation if run.bins is not None and not elbo else "uniform",
        bound=options.bound, samples=(64 if options.samples is None else options.samples) if elbo else None,
        stderr=options.stderr, batch_size=options.batch_size, max_rows=options.max_rows,
        on_failure="raise" if elbo else "nan", seed=options.seed, run_dir=folder, progress=not options.quiet,
        time_limit=options.time_limit,
    )  # fmt: skip
    return result, places


def run_evaluate(options: argparse.Namespace) -> int:
    run = load_run(options)
    if options.samples is not None and options.bound != "elbo":
        raise UsageError("--samples is for --bound elbo.")
    if run.table is not None:
        return evaluate_table(options, run)
    result, _ = evaluate_run(options, run, options.out)
    if run.mean is not None:
        print(f"NLL {result.nll + run.log_scale:.6g} ± {result.stderr:.2g} nats per row, in the units of the data")
    print(f"standardised: {result}" if run.mean is not None else result)
    return 0 if result.finished else 130
