"""``ndm-ct loglik`` and ``ndm-ct evaluate``."""

import argparse
import math

import torch
from torch import Tensor

from ndm_ct.cli.batches import batches_of, finished_columns, generators_of, load_run, rows_of
from ndm_ct.cli.parser import UsageError
from ndm_ct.cli.runs import Run
from ndm_ct.evaluation import evaluate
from ndm_ct.files import TABLES, write_table
from ndm_ct.likelihood.api import loglik
from ndm_ct.likelihood.bits import bits_per_dim
from ndm_ct.storage.tensors import hash_values

__all__ = ["run_evaluate", "run_loglik"]


def run_loglik(options: argparse.Namespace) -> int:
    run = load_run(options)
    if options.out.suffix.lower() not in TABLES:
        raise UsageError(f"--out must end in {', '.join(TABLES)}, got {str(options.out)!r}.")
    if run.bins is not None and options.stderr is not None:
        raise UsageError("--stderr is for real values; integers are scored through noise in their bins.")
    values = rows_of(options, run)

    def make(rows: slice) -> dict[str, Tensor]:
        return _scores(run, values[rows], options.stderr, generators_of(options, rows))

    data = hash_values(values[rows] for rows in batches_of(options, len(values)))
    with finished_columns(options, len(values), {"data": data, "stderr": options.stderr}, make) as columns:
        write_table(options.out, {"row": torch.arange(len(values))} | columns)
    good = columns["log_p"][columns["log_p"].isfinite()]
    failed = len(values) - len(good)
    print(
        f"{options.out}: {len(values)} rows, mean log p {float(good.mean()):.6g} nats"
        + f", {failed} failed" * bool(failed)
    )
    return 0


def _scores(run: Run, x: Tensor, stderr: float | None, generators: list[torch.Generator]) -> dict[str, Tensor]:
    """Columns of a batch, float64 on the CPU."""
    if run.bins is None:
        log_p, info = loglik(run.model, x, stderr=stderr, on_failure="nan", generator=generators, return_info=True)
        return {"log_p": log_p.double().cpu() - run.log_scale, "stderr": info.stderr.double().cpu()}
    bits, levels = bits_per_dim(
        run.model, x, quantisation=run.bins, dequantisation="process", generator=generators, return_info=True
    )
    per_bit = x[0].numel() * math.log(2.0)
    return {
        "log_p": levels.nats.double().cpu(),
        "stderr": per_bit * levels.stderr.double().cpu(),
        "bits_per_dim": bits.double().cpu(),
    }


def run_evaluate(options: argparse.Namespace) -> int:
    run = load_run(options)
    elbo = options.bound == "elbo"
    if options.samples is not None and not elbo:
        raise UsageError("--samples is for --bound elbo.")
    samples = 64 if options.samples is None else options.samples
    centred = run.bins is not None and not elbo
    result = evaluate(
        run.model, rows_of(options, run), quantisation=run.bins,
        dequantisation="process" if centred else "uniform", bound=options.bound,
        samples=samples if elbo else None, stderr=options.stderr, batch_size=options.batch_size,
        max_rows=options.max_rows, on_failure="raise" if elbo else "nan", seed=options.seed, run_dir=options.out,
        progress=not options.quiet, time_limit=options.time_limit,
    )  # fmt: skip
    if run.bins is None:
        print(f"NLL {result.nll + run.log_scale:.6g} ± {result.stderr:.2g} nats per row, in the units of the data")
    print(result if run.bins is not None else f"standardised: {result}")
    return 0 if result.finished else 130
