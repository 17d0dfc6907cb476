"""What commands that score or draw rows share: batches of rows, and one generator per row."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ndm_ct._core.checks import validate_count
from ndm_ct._core.seeds import make_generator
from ndm_ct.cli.parser import UsageError
from ndm_ct.cli.runs import Run
from ndm_ct.files import read, with_bad_named
from ndm_ct.storage import finished_batches

__all__ = ["Usable", "batches_of", "conditions", "finished_columns", "generators_of", "rows_of", "written_conditions"]

NOISE = "seed, command and row are hashed together"
"""How the noise of a row is derived. Finished batches keep it, so that batches of another derivation are refused."""


class Usable(NamedTuple):
    """Rows of a file that a model can score.

    Args:
        x: the rows as the model takes them.
        places: their numbers in the file.
        total: number of rows in the file.
    """

    x: Any
    places: Sequence[int]
    total: int

    def spread(self, column: Tensor) -> Tensor:
        """A column of all rows of the file, NaN where a row could not be used."""
        if len(self.places) == self.total:
            return column
        found = torch.full((self.total,), torch.nan, dtype=column.dtype)
        found[torch.tensor(self.places)] = column
        return found


def rows_of(options: argparse.Namespace, run: Run, *, gaps: bool = True) -> Usable:
    """The usable rows of the file that is named.

    What the reader decided goes to stderr.

    Args:
        options: of the command.
        run: the model.
        gaps: whether rows without finite numbers are left out; else they are an error.

    Raises:
        ValueError: no row is usable.
    """
    source = str(options.data)
    raw = read(options.data, options.array, options.header, gaps=gaps)
    try:
        rows = with_bad_named(run.matched(raw, source))
    except ValueError:
        read(options.data, options.array, options.header)  # which says what is wrong with the first cell, if one is
        raise
    total = len(rows.values)
    if len(rows.bad) == total:
        read(options.data, options.array, options.header)  # which says what is wrong with the first row
    for note in rows.notes:
        print(f"{source}: {note}", file=sys.stderr)
    if not rows.bad:
        return Usable(run.of(rows, source), range(total), total)
    good = np.delete(np.arange(total), rows.bad)
    return Usable(run.of(rows, source, good), good.tolist(), total)


def batches_of(options: argparse.Namespace, total: int) -> list[slice]:
    """Slices of ``total`` rows; a single empty slice if there are none."""
    size = validate_count("batch_size", options.batch_size)
    return [slice(start, min(start + size, total)) for start in range(0, max(total, 1), size)]


def generators_of(options: argparse.Namespace, rows: Iterable[int]) -> list[torch.Generator]:
    """One generator for each row, by its number in the file, so that results do not depend on batches."""
    words = options.seed, options.command
    return [make_generator(*words, row, device=options.device) for row in rows]


def conditions(options: argparse.Namespace, total: int, run: Run) -> dict[str, Any]:
    """The conditions ``--cond NAME=NUMBER``, the same for all rows: integers are labels, others real."""
    found: dict[str, Any] = {}
    for name, word in _given(options).items():
        try:
            number: float = int(word) if word.lstrip("+-").isdecimal() else float(word)
        except ValueError as error:
            raise UsageError(f"--cond {name}={word}: expected a number, such as label=3.") from error
        dtype = torch.long if isinstance(number, int) else run.model.dtype
        found[name] = torch.full((total,), number, dtype=dtype, device=run.model.device)
    return found


def written_conditions(options: argparse.Namespace) -> dict[str, Any]:
    """The conditions as finished batches keep them. Without conditions they keep nothing."""
    return {"cond": dict(sorted(_given(options).items()))} if options.cond else {}


def _given(options: argparse.Namespace) -> dict[str, str]:
    words = [word.partition("=") for word in options.cond or []]
    wrong = [name for name, sign, _ in words if not sign or not name.isidentifier()]
    if wrong:
        raise UsageError(f"--cond {wrong[0]}: expected NAME=NUMBER, such as label=3.")
    return {name: value for name, _, value in words}


@contextmanager
def finished_columns(
    options: argparse.Namespace,
    run: Run,
    total: int,
    settings: dict[str, Any],
    make: Callable[[slice], dict[str, Tensor]],
) -> Iterator[dict[str, Tensor]]:  # fmt: skip
    """Columns of all rows; finished batches are kept beside the output until the block has written it.

    Args:
        options: of the command.
        run: the model.
        total: number of rows.
        settings: what determines the rows, beside model, batches, seed and device.
        make: the columns of a batch.
    """
    shared = {
        "command": options.command, "model": run.identity, "batch_size": options.batch_size,
        "seed": options.seed, "noise": NOISE, "device": torch.device(options.device).type,
    }  # fmt: skip
    found = []
    with finished_batches(options.out, shared | settings) as batches:
        with tqdm(total=total, unit="row", disable=options.quiet, dynamic_ncols=True) as bar:
            for rows in batches_of(options, total):
                found.append(batches.batch(rows, make))
                bar.update(rows.stop - rows.start)
        yield {name: torch.cat([part[name] for part in found]) for name in found[0]}
