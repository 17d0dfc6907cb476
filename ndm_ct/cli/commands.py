"""The command line, ``ndm-ct``: train, loglik, evaluate, sample, info, selfcheck, demo.

Every command says what it does and how to go on under ``--help``. Exit codes: 0 done; 1 an error, which is explained;
2 wrong usage; 3 a self-check that failed; 130 interrupted, and the same command goes on.
"""

import argparse
import io
import json
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import ndm_ct
from ndm_ct._core.checks import usable_device, validate_count
from ndm_ct._core.seeds import make_generator
from ndm_ct.cli import demo, runs, selfcheck
from ndm_ct.evaluation import evaluate
from ndm_ct.files.formats import TABLES, read, write_table
from ndm_ct.likelihood.api import loglik
from ndm_ct.likelihood.bits import bits_per_dim
from ndm_ct.samplers.sample import METHODS, sample
from ndm_ct.storage import finished_batches, write_atomically
from ndm_ct.storage.tensors import hash_values

__all__ = ["main"]

EPILOGUE = """\
a first run, of a table with one row per line and numbers only:

  ndm-ct train table.csv --out runs/table      # Ctrl-C stops it; the same command goes on
  ndm-ct evaluate runs/table test.csv          # mean log-likelihood, with its error
  ndm-ct loglik runs/table test.csv --out scores.csv
  ndm-ct sample runs/table -n 1000 --out drawn.csv

exit codes: 0 done; 1 an error, explained; 2 wrong usage; 3 a self-check that failed; 130 interrupted or out of time:
the same command goes on
"""


NOISE = "seed, command and row are hashed together"
"""How the noise of a row is derived. Finished batches keep it, so that batches of another derivation are refused."""


class UsageError(Exception):
    """Options that do not go together."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except UsageError as error:
        print(f"ndm-ct {options.command}: {error}", file=sys.stderr)
        return 2
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        print(f"ndm-ct {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ndm-ct", description="Neural Diffusion Models in continuous time: train, score and sample.",
        epilog=EPILOGUE, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"ndm-ct {ndm_ct.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str, more: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.\n\n{more}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        made.set_defaults(run=run)
        return made

    _add_train(command)
    _add_loglik(command)
    _add_evaluate(command)
    _add_sample(command)
    _add_info(command)
    _add_selfcheck(command)
    _add_demo(command)
    return parser


Command = Callable[[str, Callable[[argparse.Namespace], int], str, str], argparse.ArgumentParser]


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="RUN", help="folder of a finished 'ndm-ct train'")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="of torch: cpu, cuda, cuda:1 (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_batch_size(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--batch-size", type=int, default=256, help=f"rows {what} together (default: %(default)s)")


def _add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, help="rows: npy, npz, csv, tsv, parquet, idx, or a folder of images")
    parser.add_argument("--array", help="name of the array in an npz file that has several")


def _run(options: argparse.Namespace) -> runs.Run:
    """The run that is named, its model on the device that is."""
    run = runs.Run.load(options.model)
    run.model.to(usable_device(options.device))
    return run


# ------------------------------------------------------------------------------------------------------------- train


def _add_train(command: Command) -> None:
    parser = command(
        "train", _train, "train a model on the rows of a file",
        "Settings come from the defaults, then from --config, then from the options here. The folder keeps them in\n"
        "config.json, with the model, the log and a plot of the training. Ctrl-C stops with a checkpoint; the same\n"
        "command, or 'ndm-ct train --out RUN' alone, goes on. Tables are standardised, and scored in their own units.",
    )  # fmt: skip
    parser.add_argument("data", nargs="?", help=_help_of("data"))
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the run")
    parser.add_argument("--config", type=Path, help="JSON or YAML file of settings, named as the options with _ for -")
    for each in fields(runs.Settings):
        if each.name != "data":
            kind = runs.kind_of(each)
            default = "" if each.default in (None, MISSING) else f" (default: {each.default})"
            parser.add_argument(
                f"--{each.name.replace('_', '-')}", dest=each.name, type=kind, default=argparse.SUPPRESS,
                metavar=kind.__name__.upper(), help=_help_of(each.name) + default,
            )  # fmt: skip
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop with a checkpoint after so long")
    _add_common(parser)


def _help_of(name: str) -> str:
    return str(next(each for each in fields(runs.Settings) if each.name == name).metadata["help"])


def _train(options: argparse.Namespace) -> int:
    settings = _settings(options)
    run, result = runs.train(
        settings, options.out, device=options.device, progress=not options.quiet, time_limit=options.time_limit
    )
    _plot_training(result, options.out / "training.png")
    if not result.finished:
        print(f"stopped at step {result.step} of {settings.steps}; go on with: ndm-ct train --out {options.out}")
        return 130
    print(f"trained {result.step} steps: {options.out / 'model.safetensors'}")
    if result.validation:
        last = result.validation[-1]
        nats = last["validation_elbo"] - run.log_scale
        bits = last.get("validation_bits_per_dim")
        print(
            f"validation bound: {-nats:.4g} nats per row" if bits is None else f"validation bound: {bits:.4f} bits/dim"
        )
    return 0


def _settings(options: argparse.Namespace) -> runs.Settings:
    """Defaults, or the settings of the run that is there; then the file; then the command line."""
    given = {each.name: getattr(options, each.name) for each in fields(runs.Settings) if each.name in vars(options)}
    if given["data"] is None:
        del given["data"]
    if options.config is not None:
        given = runs.settings_from_file(options.config) | given
    known = options.out / "config.json"
    if known.exists() and not given:
        return runs.settings_of(options.out)
    settings = runs.Settings.of(given, "the command line" if options.config is None else str(options.config))
    if settings.data is None:
        raise UsageError(f"what is the model to be trained on? Name a file, or the folder of a run ({known} is none).")
    return settings


def _plot_training(result: ndm_ct.FitResult, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no plot of the training: pip install "ndm-ct[demo]"', file=sys.stderr)
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    bits = bool(result.history) and "bits_per_dim" in result.history[-1]
    axes.plot([r["step"] for r in result.history], [r["bits_per_dim" if bits else "loss"] for r in result.history],
              label="training", linewidth=0.8)  # fmt: skip
    if result.validation:
        held = [r["validation_bits_per_dim"] if bits else -r["validation_elbo"] for r in result.validation]
        axes.plot([r["step"] for r in result.validation], held, "o-", markersize=3, label="validation")
    axes.set(xlabel="step", ylabel="bits per dimension" if bits else "bound, nats of standardised rows")
    axes.legend()
    axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    write_atomically(path, picture.getvalue())


# ---------------------------------------------------------------------------------------------------------- in batches


def _batches(options: argparse.Namespace, total: int) -> list[slice]:
    """Of so many rows; none of them is one empty batch."""
    size = validate_count("batch_size", options.batch_size)
    return [slice(start, min(start + size, total)) for start in range(0, max(total, 1), size)]


def _generators(options: argparse.Namespace, rows: slice) -> list[torch.Generator]:
    """One generator per row, so that results do not depend on the batch size."""
    words = options.seed, options.command
    return [make_generator(*words, row, device=options.device) for row in range(rows.start, rows.stop)]


@contextmanager
def _made(
    options: argparse.Namespace, total: int, settings: dict[str, Any], make: Callable[[slice], dict[str, Tensor]]
) -> Iterator[dict[str, Tensor]]:
    """Columns of all rows; finished batches are kept beside the output until the block has written it.

    Args:
        options: of the command.
        total: number of rows.
        settings: what determines the rows, beside model, batches, seed and device.
        make: the columns of a batch.
    """
    shared = {
        "command": options.command, "model": runs.fingerprint(options.model), "batch_size": options.batch_size,
        "seed": options.seed, "noise": NOISE, "device": torch.device(options.device).type,
    }  # fmt: skip
    found = []
    with finished_batches(options.out, shared | settings) as batches:
        with tqdm(total=total, unit="row", disable=options.quiet, dynamic_ncols=True) as bar:
            for rows in _batches(options, total):
                found.append(batches.batch(rows, make))
                bar.update(rows.stop - rows.start)
        yield {name: torch.cat([part[name] for part in found]) for name in found[0]}


# ----------------------------------------------------------------------------------------------- loglik and evaluate


def _add_loglik(command: Command) -> None:
    parser = command(
        "loglik", _loglik, "score the rows of a file, each with its error",
        "Columns: row, log_p (nats, in the units of the data) and stderr; for integers also bits_per_dim, of a bound\n"
        "on log P. Up to 32 dimensions the trace is exact and stderr 0. Rows that cannot be solved are nan.\n"
        "Ctrl-C stops, and the same command goes on with the batches it has finished.",
    )  # fmt: skip
    _add_model(parser)
    _add_data(parser)
    parser.add_argument("--out", type=Path, required=True, help=f"file to write: {', '.join(TABLES)}")
    parser.add_argument("--stderr", type=float, help="standard error to reach for every row, nats")
    _add_batch_size(parser, "solved")
    _add_seed(parser)
    _add_common(parser)


def _loglik(options: argparse.Namespace) -> int:
    run = _run(options)
    if options.out.suffix not in TABLES:
        raise UsageError(f"--out must end in {', '.join(TABLES)}, got {str(options.out)!r}.")
    if run.bins is not None and options.stderr is not None:
        raise UsageError("--stderr is for real values; integers are scored through noise in their bins.")
    values = run.rows(options.data, options.array)

    def make(rows: slice) -> dict[str, Tensor]:
        return _scores(run, values[rows], options.stderr, _generators(options, rows))

    data = hash_values(values[rows] for rows in _batches(options, len(values)))
    with _made(options, len(values), {"data": data, "stderr": options.stderr}, make) as columns:
        write_table(options.out, {"row": torch.arange(len(values))} | columns)
    good = columns["log_p"][columns["log_p"].isfinite()]
    failed = len(values) - len(good)
    print(
        f"{options.out}: {len(values)} rows, mean log p {float(good.mean()):.6g} nats"
        + f", {failed} failed" * bool(failed)
    )
    return 0


def _scores(run: runs.Run, x: Tensor, stderr: float | None, generators: list[torch.Generator]) -> dict[str, Tensor]:
    """Columns of a batch, float64 on the CPU."""
    if run.bins is None:
        log_p, info = loglik(run.model, x, stderr=stderr, on_failure="nan", generator=generators, return_info=True)
        return {"log_p": log_p.double().cpu() - run.log_scale, "stderr": info.stderr.double().cpu()}
    bits, levels = bits_per_dim(
        run.model, x, quantisation=run.bins, dequantisation="process", generator=generators, return_info=True
    )
    per_bit = x[0].numel() * float(np.log(2.0))
    return {
        "log_p": levels.nats.double().cpu(),
        "stderr": per_bit * levels.stderr.double().cpu(),
        "bits_per_dim": bits.double().cpu(),
    }


def _add_evaluate(command: Command) -> None:
    parser = command(
        "evaluate", _evaluate, "the mean negative log-likelihood of a file, with its standard error",
        "Rows are scored in a random order until the error asked for is reached, or all are. With --out the scores\n"
        "are kept there: a run that was stopped goes on, and may be given more rows or a smaller error.",
    )  # fmt: skip
    _add_model(parser)
    _add_data(parser)
    parser.add_argument("--out", type=Path, help="folder for the rows scored and evaluation.json")
    parser.add_argument("--bound", choices=("ode", "elbo"), default="ode", help="flow or ELBO (default: %(default)s)")
    parser.add_argument("--samples", type=int, help="times and noises per row of the ELBO (default: 64)")
    parser.add_argument("--stderr", type=float, help="standard error of the mean to stop at, nats")
    parser.add_argument("--max-rows", type=int, help="rows to score at most")
    _add_batch_size(parser, "solved")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop after so long")
    _add_seed(parser)
    _add_common(parser)


def _evaluate(options: argparse.Namespace) -> int:
    run = _run(options)
    elbo = options.bound == "elbo"
    if options.samples is not None and not elbo:
        raise UsageError("--samples is for --bound elbo.")
    centred = run.bins is not None and not elbo
    result = evaluate(
        run.model, run.rows(options.data, options.array), quantisation=run.bins,
        dequantisation="process" if centred else "uniform", bound=options.bound,
        samples=(options.samples or 64) if elbo else None, stderr=options.stderr, batch_size=options.batch_size,
        max_rows=options.max_rows, on_failure="raise" if elbo else "nan", seed=options.seed, run_dir=options.out,
        progress=not options.quiet, time_limit=options.time_limit,
    )  # fmt: skip
    if run.bins is None:
        print(f"NLL {result.nll + run.log_scale:.6g} ± {result.stderr:.2g} nats per row, in the units of the data")
    print(result if run.bins is not None else f"standardised: {result}")
    return 0 if result.finished else 130


# ------------------------------------------------------------------------------------------------------------ sample


def _add_sample(command: Command) -> None:
    parser = command(
        "sample", _sample, "draw rows",
        "Tables are written as csv, tsv, parquet or npz, images as npz (array x, levels) or as a png of all of them.\n"
        "Every row has a seed of its own: drawing more leaves the first ones as they were.\n"
        "Ctrl-C stops, and the same command goes on with the batches it has finished.",
    )  # fmt: skip
    _add_model(parser)
    parser.add_argument("-n", type=int, default=64, help="number of rows (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, required=True, help=f"file to write: {', '.join(TABLES)}, or .png of images"
    )
    parser.add_argument("--method", default="ode", help=f"{', '.join(METHODS)} (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="steps of a method on a grid; ode and other adaptive ones take none")
    _add_batch_size(parser, "drawn")
    _add_seed(parser)
    _add_common(parser)


def _sample(options: argparse.Namespace) -> int:
    run = _run(options)
    images = len(run.model.event_shape) == 3
    if options.out.suffix not in (*TABLES, ".png"):
        raise UsageError(f"--out must end in {', '.join(TABLES)} or .png, got {str(options.out)!r}.")
    if (options.out.suffix == ".png") != images and options.out.suffix != ".npz":
        raise UsageError("images are written as .npz or .png." if images else "a png is for images; write a table.")

    def make(rows: slice) -> dict[str, Tensor]:
        n, generators = rows.stop - rows.start, _generators(options, rows)
        z = sample(run.model, n, method=options.method, steps=options.steps, generator=generators)
        return {"x": run.units(z.cpu())}

    with _made(options, options.n, {"method": options.method, "steps": options.steps}, make) as columns:
        x = columns["x"]
        if options.out.suffix == ".png":
            write_atomically(options.out, _png(x))
        elif len(run.model.event_shape) == 1:
            write_table(options.out, dict(zip(run.names, x.T, strict=True)))
        else:
            write_table(options.out, columns)
    print(f"{options.out}: {len(x)} rows by {options.method}")
    return 0


def _png(x: Tensor) -> bytes:
    """Images in a square, their values stretched over the grey levels."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("a png needs Pillow: pip install 'ndm-ct[files]', or write npz.") from error
    x = x.double()
    low, high = float(x.min()), float(x.max())
    x = ((x - low) / max(high - low, 1e-12) * 255.0).round().to(torch.uint8)
    across = int(np.ceil(np.sqrt(len(x))))
    blank = x.new_full((across * -(-len(x) // across) - len(x), *x.shape[1:]), 255)
    tiles = torch.nn.functional.pad(torch.cat([x, blank]), (1, 1, 1, 1), value=255)
    tiles = tiles.unflatten(0, (-1, across)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    data = io.BytesIO()
    Image.fromarray(tiles.squeeze(-1).numpy()).save(data, format="png")
    return data.getvalue()


# ---------------------------------------------------------------------------------------------------- info and checks


def _add_info(command: Command) -> None:
    parser = command(
        "info", _info, "say what a run or a file of data holds",
        "Of a run: its settings, model, size and how far the training got. Of data: shape, columns, values.",
    )  # fmt: skip
    parser.add_argument("path", type=Path, help="folder of a run, or rows in any format that train reads")
    parser.add_argument("--array", help="name of the array in an npz file that has several")


def _info(options: argparse.Namespace) -> int:
    if (options.path / "config.json").exists():
        for name, value in _of_run(options.path).items():
            print(f"{name + ':':14} {value}")
        return 0
    rows = read(options.path, options.array)
    values = rows.values
    print(f"rows:          {len(values)}\nshape:         {tuple(values.shape[1:])}\ndtype:         {values.dtype}")
    if rows.columns or values.ndim == 2:
        array = np.asarray(values, dtype=np.float64)
        for i in range(array.shape[1]):
            name = rows.columns[i] if rows.columns else f"x{i}"
            column = array[:, i]
            print(f"{name + ':':14} {column.mean():.6g} ± {column.std():.6g}, {column.min():.6g} to {column.max():.6g}")
    else:
        print(f"values:        {values.min()} to {values.max()}")
    return 0


def _of_run(folder: Path) -> dict[str, Any]:
    settings = runs.settings_of(folder)
    changed = {name: value for name, value in asdict(settings).items() if value != getattr(runs.Settings(), name)}
    found: dict[str, Any] = {"settings": ", ".join(f"{name}={value}" for name, value in changed.items()) or "defaults"}
    log = folder / "log.jsonl"
    last = (
        [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")][-1:] if log.exists() else []
    )
    found["training"] = f"step {last[0]['step']} of {settings.steps}" if last else "not begun"
    if not (folder / "model.safetensors").exists():
        return found | {"model": f"none yet; go on with: ndm-ct train --out {folder}"}
    run = runs.Run.load(folder)
    model = run.model
    return found | {
        "model": f"predictor {type(model.predictor).__name__}, head {model.prediction}, events {model.event_shape}",
        "forward": f"F {type(model.transform).__name__}, schedule {type(model.schedule).__name__}",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}, of these in F "
                      f"{sum(p.numel() for p in model.transform.parameters()):,}",
        "data": f"{run.bins.levels} levels" if run.bins else f"real values, columns {', '.join(run.names[:8])}",
    }  # fmt: skip


def _add_selfcheck(command: Command) -> None:
    parser = command(
        "selfcheck", _selfcheck, "compare this machine's results with exact ones",
        "Likelihoods, bound, samples of Gaussian data, whose densities are known. About half a minute on one CPU core.",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="of torch (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="(default: %(default)s)")
    _add_seed(parser)


def _selfcheck(options: argparse.Namespace) -> int:
    print(f"ndm-ct {ndm_ct.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
          f"{options.device}, {options.dtype}")  # fmt: skip
    checks = selfcheck.run(options.device, getattr(torch, options.dtype), options.seed)
    for check in checks:
        verdict = "ok" if check.passed else "FAILED"
        print(f"{check.name:36} {check.value:9.2g} {check.unit:16} (limit {check.limit:g})  {verdict}")
    return 0 if all(check.passed for check in checks) else 3


def _add_demo(command: Command) -> None:
    parser = command(
        "demo", _demo, "train on scikit-learn's digits, report bits/dim with error bars, draw samples",
        "Trains a Neural Diffusion Model and a plain diffusion of the same number of parameters on scikit-learn's\n"
        "8x8 digits, reports test bits per dimension by the probability flow and by the ELBO, each with its standard\n"
        "error, and writes pictures and a JSON report. About three minutes on two CPU cores.",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write to (default: runs/demo)")
    parser.add_argument(
        "--steps", type=int, default=demo.STEPS, help="optimiser steps per model (default: %(default)s)"
    )
    parser.add_argument("--test-rows", type=int, default=None, help="test images to evaluate (default: all 360)")
    _add_seed(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _demo(options: argparse.Namespace) -> int:
    demo.run(
        options.out, steps=options.steps, test_rows=options.test_rows, seed=options.seed, progress=not options.quiet
    )
    return 0
