"""Command lines, run folders, reports and their provenance: what every question has in common."""

import argparse
import contextlib
import importlib.metadata
import io
import json
import math
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ndm_ct._core.versions import versions
from ndm_ct.storage import RunFolder, write_atomically

RESULTS = Path(__file__).parents[1] / "results"
"""Committed results: ``QUESTION/DATA/results.json``, ``results.md`` and pictures."""

PACKAGES = ("scikit-learn", "diffusers", "torchmetrics", "prdc", "zuko")


class Parser(argparse.ArgumentParser):
    """The command line of a question: its docstring is the help, and ``--out`` says where results go.

    Args:
        text: docstring of the script.
        out: default of ``--out``; None: the script has a rule of its own.
    """

    def __init__(self, text: str | None, out: Path | None = None) -> None:
        super().__init__(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        root = RESULTS.parents[1]
        where = "see above" if out is None else out.relative_to(root) if out.is_relative_to(root) else out
        self.add_argument("--out", type=Path, default=out, help=f"folder of the results; default: {where}")


def words(text: str) -> list[str]:
    """An option's values, separated by commas."""
    return [part for part in text.split(",") if part]


def numbers(text: str) -> list[int]:
    """An option's whole numbers, separated by commas."""
    return [int(part) for part in words(text)]


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """The type of an option whose values are separated by commas and belong to ``known``."""
    known = list(known)

    def parse(text: str) -> list[str]:
        chosen = words(text)
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} unknown; there are {', '.join(known)}.")
        return chosen

    return parse


def provenance() -> dict[str, Any]:
    """What a results file says about its making: versions of packages, the git commit and the machine."""
    found = versions()
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found = found | {package: importlib.metadata.version(package)}
    return {"versions": found, "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"}


def read_json(path: Path, default: Any = None) -> Any:
    """The content of a JSON file, or ``default`` if there is no file."""
    return json.loads(path.read_text()) if path.exists() else default


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step; a reader sees the old one or the new one."""
    write_text(path, json.dumps(value, indent=1, allow_nan=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step, and its folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())


def save_figure(figure: Any, path: Path, dpi: int = 110) -> None:
    """Write a picture in one step."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format=path.suffix[1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def write_report(out: Path, report: dict[str, Any], text: str, figures: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write ``results.json``, ``results.md`` and pictures into a folder.

    Args:
        out: the folder.
        report: the content of ``results.json``; versions, commit and machine are added.
        text: the content of ``results.md``.
        figures: pictures by their names, without the suffix.

    Returns:
        The content of ``results.json``.
    """
    report = provenance() | report
    write_json(out / "results.json", report)
    write_text(out / "results.md", text.rstrip("\n") + "\n")
    for name, figure in (figures or {}).items():
        save_figure(figure, out / f"{name}.png")
    return report


def kept(path: Path, settings: dict[str, Any], make: Callable[[], Any]) -> Any:
    """A result that is computed once and kept in a JSON file.

    Args:
        path: the file.
        settings: everything the result depends on.
        make: computes the result.

    Raises:
        ValueError: the file holds a result of other settings.
    """
    if not path.exists():
        write_json(path, {"settings": settings, "result": make()})
    known = read_json(path)
    RunFolder(path.parent, str(path)).compare(known["settings"], settings)
    return known["result"]


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]


def mean(values: Any) -> tuple[float, float]:
    """The mean and its standard error, which is NaN for a single value."""
    values = np.asarray(values, dtype=np.float64)
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), error


def with_error(value: float, error: float, digits: int = 4, sign: str = "") -> str:
    """A number with its standard error; a single seed has no error."""
    text = f"{value:{sign}.{digits}f}"
    return text if math.isnan(error) else f"{text} ± {error:.{digits}f}"
