"""Tables in files: text with one row per line, and parquet; and tables written."""

import bz2
import csv
import gzip
import io
import lzma
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ndm_ct._core.checks import choose, some
from ndm_ct.columns import numbers_and_words
from ndm_ct.files.rows import Rows, raise_if_damaged, validate_finite
from ndm_ct.storage.atomic import PathLike, write_atomically

__all__ = ["COMPRESSED", "TABLES", "parquet_rows", "text_rows", "write_table"]

TABLES = (".csv", ".tsv", ".parquet", ".npz")
"""Endings of what :func:`write_table` writes."""

COMPRESSED = (".gz", ".bz2", ".xz", ".zip")
"""Endings that may follow that of a text table."""

_MISSING = {"", "?", "-", "--", ".", "*", "na", "n/a", "#n/a", "<na>", "nan", "null", "none", "nil", "missing"}
"""Usual words for a missing value, in small letters."""

_COMMA = re.compile(r"[+-]?\d*,\d+(e[+-]?\d+)?", re.IGNORECASE)
"""A number with a decimal comma."""

_LOOK = 100
"""Lines that are looked at to find the separator and the names."""


@dataclass(frozen=True)
class _Text:
    """A text table: how its cells are separated. The separator None stands for any white space."""

    path: Path
    separator: str | None
    comma: bool = False

    @property
    def shown(self) -> str:
        return "white space" if self.separator is None else repr(self.separator)

    def open(self) -> IO[str]:
        return io.TextIOWrapper(_binary(self.path), encoding="utf-8-sig", newline="")

    def records(self, file: Iterable[str] | None = None) -> Iterator[tuple[int, list[str]]]:
        """Yield the cells of every record that is not blank or a comment, with the number of its last line."""
        if file is None:
            with self.open() as opened:
                yield from self.records(opened)
            return
        if self.separator is None:
            file = (" ".join(line.split()) for line in file)
        reader = csv.reader(file, delimiter=self.separator or " ", skipinitialspace=True)
        for cells in reader:
            if any(cells) and not (_is_comment(cells[0]) and reader.line_num > 1):
                yield reader.line_num, [cell.strip() for cell in cells]


def text_rows(path: Path, header: str | None, *, words: bool = False, gaps: bool = False) -> Rows:
    """Read a text table. The separator is found from its lines; the first line is names if it holds words only.

    Args:
        path: the file, compressed or not.
        header: "yes" if the first line names the columns, "no" if it is a row; None decides by its cells.
        words: whether columns may hold words, and values may be missing.
        gaps: whether cells may be missing or no numbers, which are NaN.

    Raises:
        ValueError: a cell that is not a number (the first is named), rows of several lengths, or a first line that may
            be names as well as numbers.
    """
    if header is not None:
        choose("header", header, ("yes", "no"))
    table = raise_if_damaged(path, lambda: _recognise(path))
    lines = raise_if_damaged(path, lambda: list(islice(table.records(), _LOOK)))
    if not lines:
        raise ValueError(f"{path} holds no rows.")
    first, rest = lines[0][1], [cells for _, cells in lines[1:]]
    if _is_comment(first[0]):  # names behind a "#", as numpy writes them, or a comment
        first = [cell for cell in [first[0].removeprefix("#").strip(), *first[1:]] if cell]
        if rest and len(first) != len(rest[0]):
            lines, first, rest = lines[1:], rest[0], rest[1:]
    named = header == "yes" if header else _is_names(path, first, rest)
    width = len(rest[0]) if rest else len(first)
    row_names = named and (len(first) < width if table.separator != "," else False)
    if row_names and len(first) == width - 1:
        first = ["", *first]
    if named and rest and len(first) != width:
        raise ValueError(f"{path}: the first line names {len(first)} columns, the rows have {width}.")
    columns = tuple(" ".join(name.split()) for name in first) if named else None
    index = bool(columns) and width > 1 and (columns or "")[0] in ("", "Unnamed: 0")
    if columns:
        columns = tuple(name or f"x{place}" for place, name in enumerate(columns))
    found: dict[int, tuple[str, ...]] = {}
    bad: tuple[int, ...] = ()
    if words:
        values, found, bad = _with_words(table, named, columns, range(int(index), width), gaps)
    else:
        values = _numbers(table, lines[0][0] if named else 0, columns, range(int(index), width), gaps)
    notes = []
    if table.comma:
        notes.append("numbers are written with a decimal comma: 1,5 is read as 1.5")
    if index and columns:
        columns = columns[1:]
        notes.append("the first column has no name: it is taken for an index of the rows and left out")
    if bad:
        notes.append(f"rows {some(bad)} hold cells that do not fit their columns; they have no score")
    checked = _checked(values, path, columns, missing=words or gaps)
    return Rows(checked, columns, notes=(*notes, *_counters(values, columns)), words=found, bad=bad)


def parquet_rows(path: Path, *, words: bool = False, gaps: bool = False) -> Rows:
    """Read a parquet file, or a folder of them. The index that pandas stored beside the columns is left out.

    Raises:
        ValueError: the file is damaged, or a column does not hold numbers.
        ImportError: pyarrow is missing.
    """
    pyarrow = _pyarrow()
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); it is damaged or of another format.") from error
    indices = (table.schema.pandas_metadata or {}).get("index_columns", [])
    indices = [name for name in indices if isinstance(name, str) and name in table.column_names]
    if len(indices) < table.num_columns:
        table = table.drop_columns(indices)
    columns = tuple(table.column_names)
    for name, kind in zip(columns, table.schema.types, strict=True):
        if not words and not (pyarrow.types.is_floating(kind) or pyarrow.types.is_integer(kind)):
            raise ValueError(f"{path}: column {name!r} has type {kind}, expected numbers; leave it out.")
    if not (columns and len(table)):
        raise ValueError(f"{path} holds no rows.")
    found: dict[int, tuple[str, ...]] = {}
    if words:
        parts = [np.array(column.to_pylist(), dtype=object) for column in table.columns]
        values, found = _coded(path, columns, parts)
    else:
        values = np.stack([column.to_numpy().astype(np.float64) for column in table.columns], 1)
    notes = [f"the index {name!r} that pandas stored is left out" for name in indices]
    checked = _checked(values, path, columns, missing=words or gaps)
    return Rows(checked, columns, notes=(*notes, *_counters(values, columns)), words=found)


def write_table(path: PathLike, table: Mapping[str, Any]) -> None:
    """Write columns of equal length. The file is replaced as a whole, or stays as it was.

    Args:
        path: file to write or replace; its ending, .csv, .tsv, .parquet or .npz, is the format.
        table: columns by name, tensors or arrays ``(N,)``, also of words; in npz of any shape ``(N, *E)``.

    Raises:
        ValueError: an unknown ending, or a column with further axes in a format of tables.
        ImportError: parquet without pyarrow.
    """
    path = Path(path)
    columns = {
        name: values if isinstance(values, np.ndarray) else np.asarray(torch.as_tensor(values).cpu())
        for name, values in table.items()
    }
    ending = path.suffix.lower()
    if ending not in TABLES:
        raise ValueError(f"{path} has an unknown ending; tables are written as {', '.join(TABLES)}.")
    deep = [name for name, values in columns.items() if values.ndim != 1]
    if deep and ending != ".npz":
        raise ValueError(f"{', '.join(deep)}: shape {columns[deep[0]].shape} does not fit a column; write npz.")
    write_atomically(path, _encoded(columns, ending))


def _encoded(columns: Mapping[str, np.ndarray], ending: str) -> bytes:
    data = io.BytesIO()
    if ending == ".npz":
        np.savez(data, **columns)  # type: ignore[arg-type]
    elif ending == ".parquet":
        pyarrow = _pyarrow()
        pyarrow.parquet.write_table(pyarrow.table(dict(columns)), data)
    else:
        text = io.StringIO()
        writer = csv.writer(text, delimiter="," if ending == ".csv" else "\t", lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*(values.tolist() for values in columns.values()), strict=True))
        data.write(text.getvalue().encode())
    return data.getvalue()


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("parquet files need pyarrow: pip install 'ndm-ct[files]'.") from error
    return pyarrow


def _binary(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked."""
    ending = path.suffix.lower()
    if ending == ".zip":
        archive = zipfile.ZipFile(path)
        members = [each for each in archive.namelist() if not each.endswith("/") and not each.startswith("__MACOSX")]
        if len(members) != 1:
            raise ValueError(f"it holds {len(members)} files, expected one table; unpack it")
        return archive.open(members[0])
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(ending, open)
    opened: IO[bytes] = opener(path, "rb")
    return opened


def _recognise(path: Path) -> _Text:
    """Find the separator, one that all of the first lines have, and whether numbers have a decimal comma."""
    for separator in ("\t", ";", ",", None):
        table = _Text(path, separator)
        lines = [cells for _, cells in islice(table.records(), _LOOK)]
        if lines and all(len(cells) > 1 for cells in lines):
            cells = [cell for line in lines[1:] or lines for cell in line]
            comma = separator != "," and any(map(_COMMA.fullmatch, cells))
            return _Text(path, separator, comma)
    return _Text(path, "\t" if ".tsv" in path.name.lower() else ",")


def _is_names(path: Path, first: Sequence[str], rest: Sequence[Sequence[str]]) -> bool:
    """Whether the first line names the columns.

    Raises:
        ValueError: it may be names as well as a row.
    """
    words = [not _is_number(cell) and cell.lower() not in _MISSING for cell in first]
    if all(words[1:]) and (words[0] or (not first[0] and len(first) > 1)):
        return True
    doubt = ""
    if any(words):
        doubt = "has words beside numbers or gaps"
    elif all(map(_is_number, first)) and _may_be_names([float(cell.replace(",", ".")) for cell in first], rest):
        doubt = "holds numbers that may be names"
    if doubt:
        shown = ", ".join(first[:6]) + ", ..." * (len(first) > 6)
        raise ValueError(
            f"header is needed for {path}: its first line, {shown}, {doubt}. Give 'yes' if it names the columns, 'no' "
            "if it is a row."
        )
    return False


def _may_be_names(first: Sequence[float], rest: Sequence[Sequence[str]]) -> bool:
    """Whether numbers look like names: distinct whole numbers above others that are not, or three in equal steps."""
    steps = np.diff(first)
    if len(first) > 2 and steps[0] > 0.0 and np.allclose(steps, steps[0], rtol=1e-6):
        return True
    if not rest or len(set(first)) < len(first) or any(value != int(value) for value in first if abs(value) < 1e15):
        return False
    below = [[cell for cell in column if _is_number(cell)] for column in zip(*rest, strict=False)]
    broken = [sum(not re.fullmatch(r"[+-]?\d+", cell) for cell in column) for column in below]
    return any(2 * count > len(column) for count, column in zip(broken, below, strict=True))


def _is_comment(text: str) -> bool:
    return text.startswith("#") and not text.upper().startswith("#N/A")


def _is_number(text: str) -> bool:
    """Whether a cell is a finite number, perhaps with a decimal comma."""
    try:
        return "_" not in text and bool(np.isfinite(float(text)))
    except ValueError:
        return bool(_COMMA.fullmatch(text))


def _numbers(
    table: _Text, skipped: int, columns: tuple[str, ...] | None, chosen: range, gaps: bool = False
) -> np.ndarray:
    """The cells of the chosen columns, below the lines to skip."""
    separator = table.separator
    with warnings.catch_warnings(), table.open() as file:
        warnings.simplefilter("ignore", UserWarning)  # of a file without rows, which is an error here
        lines: Iterable[str] = islice(file, skipped, None)
        if table.comma:
            lines = (line.replace(",", ".") for line in lines)
        lines = (line for line in lines if not _is_comment(line))
        try:
            values = np.loadtxt(lines, delimiter=separator, comments=None, usecols=chosen, ndmin=2, quotechar='"')
        except ValueError as error:
            if gaps:
                return raise_if_damaged(table.path, lambda: _numbers_and_gaps(table, columns is not None, chosen))
            fault = raise_if_damaged(table.path, lambda: _fault(table, columns, chosen))
            raise ValueError(f"{table.path}: {fault or error}") from error
    if not values.size:
        raise ValueError(f"{table.path} holds no rows.")
    return values


def _numbers_and_gaps(table: _Text, named: bool, chosen: range) -> np.ndarray:
    """The same, with NaN for cells that are no numbers, and in lines of another length."""
    parts = []
    for _, cells in islice(table.records(), int(named), None):
        of_length = len(cells) == chosen.stop
        texts = [cells[place].replace(",", ".") if table.comma else cells[place] for place in chosen if of_length]
        parts.append([float(text) if _is_number(text) else np.nan for text in texts] or [np.nan] * len(chosen))
    return np.array(parts, dtype=np.float64).reshape(len(parts), len(chosen))


def _fault(table: _Text, columns: tuple[str, ...] | None, chosen: range) -> str | None:
    """What is wrong with the first line that is not a row of numbers, and the cure; None if all are."""
    for number, cells in islice(table.records(), 1 if columns else 0, None):
        if len(cells) != chosen.stop:
            return _of_length(table, number, cells, chosen)
        for place in chosen:
            text = cells[place].replace(",", ".") if table.comma else cells[place]
            try:
                float(text)
            except ValueError:
                name = columns[place] if columns else f"x{place}"
                return (
                    f"line {number}, column {name!r} is {cells[place]!r}, expected a number. Drop such rows or "
                    "columns, fill them in, or give columns kinds (ndm-ct train --columns infer); cells are separated "
                    f"by {table.shown}."
                )
    return None


def _of_length(table: _Text, number: int, cells: Sequence[str], chosen: range) -> str:
    return f"line {number} has {len(cells)} cells separated by {table.shown}, those before have {chosen.stop}."


def _with_words(
    table: _Text, named: bool, columns: tuple[str, ...] | None, chosen: range, gaps: bool
) -> tuple[np.ndarray, dict[int, tuple[str, ...]], tuple[int, ...]]:
    """The cells of the chosen columns, the words of columns that hold words, and the numbers of rows that do not fit.

    Raises:
        ValueError: a line of another length, or a word in a column of numbers, without ``gaps``.
    """
    parts: list[list[Any]] = [[] for _ in chosen]
    bad = set[int]()
    for row, (number, cells) in enumerate(islice(table.records(), int(named), None)):
        if len(cells) != chosen.stop:
            if not gaps:
                raise ValueError(f"{table.path}: {_of_length(table, number, cells, chosen)}")
            cells, bad = [""] * chosen.stop, bad | {row}
        for part, place in zip(parts, chosen, strict=True):
            part.append(None if cells[place].lower() in _MISSING else cells[place])
    names = (columns or tuple(f"x{place}" for place in range(chosen.stop)))[-len(parts) :]
    for name, part in zip(names, parts, strict=True):
        numeric = [cell is not None and _is_number(cell) for cell in part]
        words = [cell for cell, is_number in zip(part, numeric, strict=True) if cell is not None and not is_number]
        if len(words) <= sum(numeric):
            if words and not gaps:
                raise ValueError(
                    f"{table.path}: column {name!r} holds numbers and {words[0]!r}; mend or leave empty such cells."
                )
            bad |= {row for row, cell in enumerate(part) if cell is not None and not numeric[row]}
            part[:] = [
                float(cell.replace(",", ".")) if fits else None for cell, fits in zip(part, numeric, strict=True)
            ]
    values, found = _coded(table.path, names, [np.array(part, dtype=object) for part in parts])
    return values, found, tuple(sorted(bad))


def _coded(
    path: Path, names: Sequence[str], parts: Sequence[np.ndarray]
) -> tuple[np.ndarray, dict[int, tuple[str, ...]]]:
    """Columns as numbers, and the words of those that hold words."""
    try:
        found = [numbers_and_words(name, part) for name, part in zip(names, parts, strict=True)]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not len(parts[0]):
        raise ValueError(f"{path} holds no rows.")
    words = {place: tuple(each) for place, (_, each) in enumerate(found) if each is not None}
    return np.stack([numbers for numbers, _ in found], 1), words


def _checked(values: np.ndarray, path: Path, columns: tuple[str, ...] | None, *, missing: bool = False) -> np.ndarray:
    """The values, if they are finite, or perhaps missing, and no two columns have one name."""
    twice = next((name for name in columns or () if (columns or ()).count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path}: two columns are called {twice!r}; give each a name of its own.")
    return values if missing else validate_finite(values, path, columns)


def _counters(values: np.ndarray, columns: tuple[str, ...] | None) -> list[str]:
    """A note on each column that counts the rows."""
    return [
        f"column {columns[place] if columns else f'x{place}'!r} counts the rows; take it out if it is an index"
        for place in range(values.shape[1])
        if len(values) > 2 and np.array_equal(np.diff(values[:, place]), np.ones(len(values) - 1))
    ]
