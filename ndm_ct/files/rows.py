"""Rows that were read from a file, and access to arrays larger than memory, a part at a time."""

import csv
import mmap
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ndm_ct._core.checks import some

__all__ = ["Rows", "blocks", "let_go", "raise_if_damaged", "spread_rows", "validate_finite", "with_bad_named"]

T = TypeVar("T")

_BLOCK = 2**24
"""Bytes of an array that are looked at at a time; no more of a mapped file is in memory then."""


@dataclass(frozen=True)
class Rows:
    """What a file holds.

    Args:
        values: ``(N, *E)``: floats, or the integer levels of images ``(N, C, H, W)``. A ``.npy`` file is mapped.
        columns: names of the columns of a table that has names.
        levels: number of levels if the values are levels of images, 256 or 65536; None for other values.
        notes: sentences on what the reader decided, such as a column that was left out.
        words: the words of columns that hold words, by their places; the values are places of words, and NaN is
            missing.
        bad: numbers of rows with a value that is missing or no finite number, as :func:`with_bad_named` finds them,
            or with a word in a column of numbers.
    """

    values: Any
    columns: tuple[str, ...] | None = None
    levels: int | None = None
    notes: tuple[str, ...] = ()
    words: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    bad: tuple[int, ...] = ()


def blocks(array: np.ndarray, rows: np.ndarray | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Yield an array in parts of at most 16 MB, each with the number of its first row.

    Args:
        array: the array ``(N, *E)``; parts of a mapped one leave memory again.
        rows: numbers of the rows to take; None takes all.
    """
    total = len(array) if rows is None else len(rows)
    size = max(1, _BLOCK // max(1, array[:1].nbytes))
    for start in range(0, total, size):
        chosen: Any = slice(start, start + size)
        yield start, array[chosen if rows is None else rows[chosen]]
        if isinstance(array, np.memmap):
            let_go(array)


def spread_rows(values: np.ndarray, chosen: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the chosen rows, evenly spaced; a mapped file leaves memory again, part by part."""
    some_rows = chosen[:: -(-len(chosen) // most)] if len(chosen) else chosen
    # In many parts, because every row brings its neighbours in the file into memory.
    parts = [np.array(rows) for part in np.array_split(some_rows, 64) for _, rows in blocks(values, part)]
    return np.concatenate(parts)


def let_go(array: np.memmap) -> None:
    """Drop what has been read of a mapped file from this process' memory; it is read again when it is needed."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    # Not of mode "c", whose changes are in memory alone.
    if isinstance(base, mmap.mmap) and array.mode != "c" and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def validate_finite(array: np.ndarray, path: Path, columns: tuple[str, ...] | None = None) -> np.ndarray:
    """Return the array unchanged.

    Args:
        array: real values ``(N, *E)``.
        path: its file, for the message.
        columns: names of its columns, for the message.

    Raises:
        ValueError: a value is NaN or infinite; the message names the first.
    """
    for start, block in blocks(array):
        bad = np.argwhere(~np.isfinite(block))
        if len(bad):
            row, *place = bad[0].tolist()
            where = columns[place[0]] if columns else place
            raise ValueError(
                f"{path}: row {start + row}, {'column' if columns else 'place'} {where!r} is "
                f"{array[(start + row, *place)]}; a density needs finite numbers. Drop such rows, or fill them in."
            )
    return array


def with_bad_named(rows: Rows) -> Rows:
    """The rows, with the numbers of those that hold no finite number in some place, and a note on them."""
    bad: list[int] = []
    if rows.levels is None:
        for start, block in blocks(rows.values):
            finite = np.isfinite(block.reshape(len(block), -1)).all(1)
            bad += (start + np.flatnonzero(~finite)).tolist()
    if not bad:
        return rows
    note = f"rows {some(bad)} hold values that are missing or no finite numbers; they have no score"
    return replace(rows, bad=tuple(bad), notes=(*rows.notes, note))


def raise_if_damaged(path: Path, reading: Callable[[], T]) -> T:
    """Return what a reader returns, with its errors about the file's content as one type.

    Args:
        path: the file, for the message.
        reading: the reader.

    Raises:
        ValueError: the reader failed, for instance because the file is cut off.
        FileNotFoundError, PermissionError: as the reader raises them.
    """
    try:
        return reading()
    except (ValueError, EOFError, OSError, struct.error, KeyError, csv.Error, zipfile.BadZipFile) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise ValueError(f"{path} cannot be read ({error}); it is damaged or of another format.") from error
