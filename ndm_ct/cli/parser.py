"""The options of every command, and their help. This module loads no torch, so that help and usage errors are quick."""

import argparse
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path

from ndm_ct._core.versions import __version__
from ndm_ct.cli.settings import Settings, kind_of

__all__ = ["UsageError", "build_parser"]

EPILOGUE = """\
a first run, of a table with one row per line and numbers only:

  ndm-ct train table.csv --out runs/table      # Ctrl-C stops it; the same command goes on
  ndm-ct evaluate runs/table test.csv          # mean log-likelihood, with its error
  ndm-ct loglik runs/table test.csv --out scores.csv
  ndm-ct sample runs/table -n 1000 --out drawn.csv

exit codes: 0 done; 1 an error, explained; 2 wrong usage; 3 a self-check that failed; 130 interrupted or out of time:
the same command goes on
"""


class UsageError(Exception):
    """Options that do not go together."""


Command = Callable[[str, str, str, str], argparse.ArgumentParser]
"""Adds a command: its name, the function that runs it as ``module:function``, what it does, and more about it."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ndm-ct", description="Neural Diffusion Models in continuous time: train, score and sample.",
        epilog=EPILOGUE, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"ndm-ct {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: str, text: str, more: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.\n\n{more}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        made.set_defaults(run=run)
        return made

    _add_train(command)
    _add_loglik(command)
    _add_evaluate(command)
    _add_compare(command)
    _add_sample(command)
    _add_compress(command)
    _add_info(command)
    _add_selfcheck(command)
    _add_demo(command)
    return parser


MODEL = "folder of a finished 'ndm-ct train', file of ndm_ct.save, or module:function that returns an NDM"


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    _add_cond(parser)


def _add_cond(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cond", action="append", metavar="NAME=NUMBER", help="a condition of all rows, such as label=3; repeatable"
    )


def _add_places(parser: argparse.ArgumentParser) -> None:
    """Where a model of one's own has the levels of integer data."""
    parser.add_argument("--levels", type=int, help="rows are integers 0 ... LEVELS-1; for models of your own")
    parser.add_argument(
        "--centres", type=_pair, metavar="LO,HI", help="where the first and the last level lie: --centres=-1,1"
    )
    parser.add_argument("--edges", type=_pair, metavar="LO,HI", help="instead: the outer edges of their bins")
    parser.add_argument(
        "--dequantisation", choices=("uniform", "process"),
        help="noise in the bins: uniform if the model was trained with it, process if on centres (default: uniform)",
    )  # fmt: skip


def _pair(word: str) -> tuple[float, float]:
    try:
        low, high = map(float, word.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected two numbers, as -1,1, got {word!r}") from error
    return low, high


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="of torch: cpu, cuda, cuda:1 (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_batch_size(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--batch-size", type=int, default=256, help=f"rows {what} together (default: %(default)s)")


def _add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=_seed, default=0, help="seed of all randomness (default: %(default)s)")


def _seed(word: str) -> int:
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {word!r}")
    return int(word)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, help=_help_of("data"))
    _add_reading(parser)


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    """Options of the commands that score many rows for one number."""
    parser.add_argument("--bound", choices=("ode", "elbo"), default="ode", help="flow or ELBO (default: %(default)s)")
    parser.add_argument("--samples", type=int, help="times and noises per row of the ELBO (default: 64)")
    parser.add_argument("--stderr", type=float, help="standard error of the mean to stop at, nats")
    parser.add_argument("--max-rows", type=int, help="rows to score at most")
    _add_places(parser)
    _add_batch_size(parser, "solved")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop after so long")
    _add_seed(parser)
    _add_common(parser)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    for name in ("array", "header"):
        parser.add_argument(f"--{name}", help=_help_of(name))


def _add_train(command: Command) -> None:
    parser = command(
        "train", "train:run_train", "train a model on the rows of a file",
        "Settings come from the defaults, then from --config, then from the options here. The folder keeps them in\n"
        "config.json, with the model, the log and a plot of the training. Ctrl-C stops with a checkpoint; the same\n"
        "command, or 'ndm-ct train --out RUN' alone, goes on. Tables are standardised, and scored in their own units.",
    )  # fmt: skip
    parser.add_argument("data", nargs="?", help=_help_of("data"))
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the run")
    parser.add_argument("--config", type=Path, help="JSON or YAML file of settings, named as the options with _ for -")
    for each in fields(Settings):
        if each.name != "data":
            kind = kind_of(each)
            reader = _seed if each.name == "seed" else kind
            default = "" if each.default in (None, MISSING) else f" (default: {each.default})"
            parser.add_argument(
                f"--{each.name.replace('_', '-')}", dest=each.name, type=reader, default=argparse.SUPPRESS,
                metavar=kind.__name__.upper(), help=_help_of(each.name) + default,
            )  # fmt: skip
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop with a checkpoint after so long")
    _add_common(parser)


def _add_loglik(command: Command) -> None:
    parser = command(
        "loglik", "score:run_loglik", "score the rows of a file, each with its error",
        "Columns: row, log_p (nats, in the units of the data) and stderr; for integers also bits_per_dim, of a bound\n"
        "on log P. Up to 32 dimensions the trace is exact and stderr 0. Rows that cannot be solved are nan.\n"
        "Ctrl-C stops, and the same command goes on with the batches it has finished.",
    )  # fmt: skip
    _add_model(parser)
    _add_data(parser)
    parser.add_argument("--out", type=Path, required=True, help="file to write: .csv, .tsv, .parquet, .npz")
    parser.add_argument("--given", metavar="COLUMNS", help="a,b: score the others given these; of --columns")
    parser.add_argument("--stderr", type=float, help="standard error to reach for every row, nats")
    _add_places(parser)
    _add_batch_size(parser, "solved")
    _add_seed(parser)
    _add_common(parser)


def _add_evaluate(command: Command) -> None:
    parser = command(
        "evaluate", "score:run_evaluate", "the mean negative log-likelihood of a file, with its standard error",
        "Rows are scored in a random order until the error asked for is reached, or all are. With --out the scores\n"
        "are kept there: a run that was stopped goes on, and may be given more rows or a smaller error.",
    )  # fmt: skip
    _add_model(parser)
    _add_data(parser)
    parser.add_argument("--out", type=Path, help="folder for the rows scored and evaluation.json")
    _add_scoring(parser)


def _add_compare(command: Command) -> None:
    parser = command(
        "compare", "comparing:run_compare", "which of two models is better on the rows of a file",
        "Both score the same rows in the same order. The difference of the mean negative log-likelihoods is in the\n"
        "units of the data, with the standard error of the paired differences. With --out the scores of both, the\n"
        "result and a picture are kept there, and a comparison that was stopped goes on.",
    )  # fmt: skip
    for name in "ab":
        parser.add_argument(f"model_{name}", metavar=f"MODEL_{name.upper()}", help=MODEL)
    _add_cond(parser)
    _add_data(parser)
    parser.add_argument("--out", type=Path, help="folder for the rows scored, comparison.json and comparison.png")
    _add_scoring(parser)


def _add_sample(command: Command) -> None:
    parser = command(
        "sample", "sampling:run_sample", "draw rows",
        "Tables are written as csv, tsv, parquet or npz, images as npz (array x, levels) or as a png of all of them,\n"
        "in which black is level 0 and white the highest level; real values are stretched from black to white.\n"
        "Every row has a seed of its own: drawing more leaves the first ones as they were.\n"
        "Ctrl-C stops, and the same command goes on with the batches it has finished.",
    )  # fmt: skip
    _add_model(parser)
    parser.add_argument("-n", type=int, default=64, help="number of rows (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, required=True, help="file to write: .csv, .tsv, .parquet, .npz, or .png of images"
    )
    parser.add_argument(
        "--method",
        default="ode",
        help="a sampler: ode, sde, unipc, dpmpp_2m, ddpm, ...; a wrong name is answered by all (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, help="steps on a grid; without it ode, sde and others choose their own")
    parser.add_argument("--nfe", type=int, help="instead of --steps: network evaluations per row")
    parser.add_argument("--grid", help="where the steps are: uniform, logsnr, karras, ... (default: uniform)")
    parser.add_argument("--guidance", type=float, help="scale of classifier-free guidance; needs --cond")
    parser.add_argument("--given", metavar="VALUES", help="a=1.2,b=red: draw the others given these; of --columns")
    parser.add_argument("--denoise", action="store_true", help="end with an estimate of x in place of the noisy state")
    _add_places(parser)
    _add_batch_size(parser, "drawn")
    _add_seed(parser)
    _add_common(parser)


def _add_compress(command: Command) -> None:
    parser = command(
        "compress", "compression:run_compress", "compress a file of integers without loss",
        "Needs constriction. The file can be read by the same model on the same machine, with the same versions.",
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    _add_data(parser)
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--steps", type=int, default=50, help="steps of the chain (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="rows coded together (default: %(default)s)")
    _add_places(parser)
    _add_common(parser)
    parser = command(
        "decompress", "compression:run_decompress", "restore what compress was given",
        "A file that is damaged, of another kind or of another model is an error, never wrong data.",
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("file", type=Path, help="what compress wrote")
    parser.add_argument("--out", type=Path, required=True, help="file to write: .npz, with an array x of levels")
    _add_places(parser)
    _add_common(parser)


def _add_info(command: Command) -> None:
    parser = command(
        "info", "info:run_info", "say what a run or a file of data holds",
        "Of a run: its settings, model, size and how far the training got. Of data: shape, columns, values.",
    )  # fmt: skip
    parser.add_argument("path", help="a model, or rows in any format that train reads")
    _add_reading(parser)


def _add_selfcheck(command: Command) -> None:
    parser = command(
        "selfcheck", "selfcheck:run_selfcheck", "compare this machine's results with exact ones",
        "Likelihoods, bound, samples of Gaussian data, whose densities are known. About half a minute on one CPU core.",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="of torch (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="(default: %(default)s)")
    _add_seed(parser)


def _add_demo(command: Command) -> None:
    parser = command(
        "demo", "demo:run_demo", "train on scikit-learn's digits, report bits/dim with error bars, draw samples",
        "Trains a Neural Diffusion Model and a plain diffusion of the same number of parameters on scikit-learn's\n"
        "8x8 digits, reports test bits per dimension by the probability flow and by the ELBO, each with its standard\n"
        "error, and writes pictures and a JSON report. About three minutes on two CPU cores.",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write to (default: runs/demo)")
    parser.add_argument("--steps", type=int, help="optimiser steps per model (default: enough for three minutes)")
    parser.add_argument("--test-rows", type=int, default=None, help="test images to evaluate (default: all 360)")
    _add_seed(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _help_of(name: str) -> str:
    return str(next(each for each in fields(Settings) if each.name == name).metadata["help"])
