"""The command line: ``python -m ndm_ct demo``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ndm_ct import demo

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ndm-ct", description="Neural Diffusion Models in continuous time.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "demo",
        help="train on scikit-learn's digits, report bits/dim with error bars, draw samples",
        description=(
            "Trains a Neural Diffusion Model and a plain diffusion of the same number of parameters on scikit-learn's "
            "8x8 digits, reports test bits per dimension by the probability flow and by the ELBO, each with its "
            "standard error, and writes pictures and a JSON report. About three minutes on two CPU cores."
        ),
    )
    command.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write to (default: runs/demo)")
    command.add_argument(
        "--steps", type=int, default=demo.STEPS, help="optimiser steps per model (default: %(default)s)"
    )
    command.add_argument("--test-rows", type=int, default=None, help="test images to evaluate (default: all 360)")
    command.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    command.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (0: done, 1: an error it explains, 2: bad usage, 130: interrupted)."""
    options = _parser().parse_args(arguments)
    try:
        demo.run(
            options.out, steps=options.steps, test_rows=options.test_rows, seed=options.seed, progress=not options.quiet
        )
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"ndm-ct {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues the training", file=sys.stderr)
        return 130
    return 0
