"""The command line, ``ndm-ct``: train, loglik, evaluate, compare, sample, compress, decompress, info, selfcheck, demo.

Every command says what it does and how to continue under ``--help``. Exit codes: 0 done; 1 an error, which is
explained; 2 wrong usage; 3 a self-check that failed; 130 stopped by Ctrl-C, SIGTERM or SIGUSR1, or out of time.
"""

import argparse
import codecs
import importlib
import io
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields

from ndm_ct._core.signals import stop_signals
from ndm_ct.cli.parser import UsageError, build_parser
from ndm_ct.cli.settings import Settings

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: words of the command line after ``ndm-ct``; None: those of this process.

    Returns:
        The exit code.
    """
    _print_anywhere()
    options = build_parser().parse_args(arguments)
    try:
        with stop_signals():
            return run(options)
    except UsageError as error:
        code, message = 2, str(error)
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        code, message = 1, str(error)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        return 130
    names = [*vars(options), *((each.name for each in fields(Settings)) if options.command == "train" else ())]
    print(f"ndm-ct {options.command}: {_with_options(message, names)}", file=sys.stderr)
    return code


def run(options: argparse.Namespace) -> int:
    """Run the command of parsed options, with the errors as they are raised."""
    module, function = options.run.split(":")
    return int(getattr(importlib.import_module(f"ndm_ct.cli.{module}"), function)(options))


def _print_anywhere() -> None:
    """Print signs that the terminal lacks in another way, "±" as "+/-", where Python would raise."""
    codecs.register_error("ndm_ct", lambda error: (
        "".join({"±": "+/-"}.get(sign, "?") for sign in error.object[error.start : error.end]), error.end
    ) if isinstance(error, UnicodeEncodeError) else ("?", getattr(error, "end", 0)))  # fmt: skip
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="ndm_ct")


def _with_options(message: str, names: Iterable[str]) -> str:
    """The message with the names of arguments, ``batch_size``, replaced by the options, ``--batch-size``."""
    for name in names:
        option = f"--{name.replace('_', '-')}"
        message = re.sub(
            rf"(?<![\w.'-]){name}(?![\w.'])" if "_" in name else rf"^{name}(?= must | is |=)", option, message
        )
    return message
