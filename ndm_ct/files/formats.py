"""Rows in files: arrays, tables and images in, arrays and tables out.

===================  =================================================================================================
``.npy``             an array ``(N, *E)``, mapped and not read into memory
``.npz``             one array, or the one that is named
``.csv``, ``.tsv``   numbers; a first line that is none names the columns
``.parquet``         a table of numbers (pyarrow)
idx, ``.gz`` too     unsigned bytes, MNIST's format
a folder             images of one size: png, jpg, bmp, webp (Pillow)
===================  =================================================================================================

Unsigned bytes are integer levels 0 ... 255, of images ``(N, C, H, W)``; everything else is real.
"""

import csv
import gzip
import io
import mmap
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ndm_ct.storage.atomic import PathLike, write_atomically

__all__ = ["Rows", "blocks", "idx", "let_go", "levels_of_images", "pictures", "read", "write_table"]

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
"""Endings of the files of an image folder."""

TABLES = (".csv", ".tsv", ".parquet", ".npz")
"""Endings of what :func:`write_table` writes."""

_BLOCK = 2**24
"""Bytes of an array that are looked at at a time; no more of a mapped file is in memory then."""


@dataclass(frozen=True)
class Rows:
    """What a file holds.

    Args:
        values: ``(N, *E)``: uint8 levels of images ``(N, C, H, W)``, or floats. A ``.npy`` file is mapped.
        columns: names of the columns of a table, if it has some.
    """

    values: Any
    columns: tuple[str, ...] | None = None

    @property
    def are_levels(self) -> bool:
        """Whether the values are integers 0 ... 255."""
        return bool(self.values.dtype in (torch.uint8, np.uint8))


def read(path: PathLike, array: str | None = None) -> Rows:
    """Rows of a file or a folder, by its ending.

    Args:
        path: the file, or a folder of images.
        array: name of the array in an npz file that has several.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: an unknown format, a damaged file, values that are no finite numbers (the first is named).
        ImportError: a package is needed that is not there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(f"{folder}/rows.csv").write_text("a,b\\n1,2\\n3,4\\n")
        ...     rows = read(f"{folder}/rows.csv")
        >>> rows.columns, rows.values.tolist()
        (('a', 'b'), [[1.0, 2.0], [3.0, 4.0]])
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no {str(path)!r}.")
    if array is not None and path.suffix != ".npz":
        raise ValueError(f"array={array!r} has no effect on {path}; it names an array of an npz file.")
    if path.is_dir():
        return Rows(_stacked(pictures(path)[0], path))
    if path.suffix == ".npz":
        return _of_array(_npz(path, array), path)
    if path.suffix == ".npy":
        return _of_array(_damaged(path, lambda: np.load(path, mmap_mode="r", allow_pickle=False)), path)
    if path.suffix in (".csv", ".tsv"):
        return _text(path, "," if path.suffix == ".csv" else "\t")
    if path.suffix == ".parquet":
        return _parquet(path)
    if "idx" in path.name or "ubyte" in path.name:
        return _of_array(idx(path), path)
    raise ValueError(f"{path} has an unknown format; give npy, npz, csv, tsv, parquet, idx, or a folder of images.")


def write_table(path: PathLike, table: Mapping[str, Any]) -> None:
    """Write columns of equal length as csv, tsv, parquet or npz, by the ending; the file is whole or as it was.

    Args:
        path: file to write or replace.
        table: columns by name, tensors or arrays ``(N,)``; in npz of any shape ``(N, *E)``.

    Raises:
        ValueError: an unknown ending, or a column with further axes in a format of tables.
        ImportError: parquet without pyarrow.
    """
    path = Path(path)
    columns = {name: np.asarray(torch.as_tensor(values).cpu()) for name, values in table.items()}
    if path.suffix not in TABLES:
        raise ValueError(f"{path} has an unknown ending; tables are written as {', '.join(TABLES)}.")
    deep = [name for name, values in columns.items() if values.ndim != 1]
    if deep and path.suffix != ".npz":
        raise ValueError(f"{', '.join(deep)}: {columns[deep[0]].shape} is no column of a table; write npz.")
    write_atomically(path, _encoded(columns, path.suffix))


def _encoded(columns: Mapping[str, np.ndarray], suffix: str) -> bytes:
    data = io.BytesIO()
    if suffix == ".npz":
        np.savez(data, **columns)  # type: ignore[arg-type]
    elif suffix == ".parquet":
        pyarrow = _pyarrow()
        pyarrow.parquet.write_table(pyarrow.table(dict(columns)), data)
    else:
        text = io.StringIO()
        writer = csv.writer(text, delimiter="," if suffix == ".csv" else "\t", lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*(values.tolist() for values in columns.values()), strict=True))
        data.write(text.getvalue().encode())
    return data.getvalue()


def _of_array(array: np.ndarray, path: Path) -> Rows:
    if array.ndim < 1 or len(array) == 0:
        raise ValueError(f"{path} holds an array of shape {array.shape}; expected rows (N, *E).")
    if array.dtype == np.uint8 and array.ndim > 2:
        return Rows(levels_of_images(array, path))
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{path} holds values of dtype {array.dtype}, expected real numbers or uint8 levels.")
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    return Rows(_finite(array[:, None] if array.ndim == 1 else array, path))


def blocks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """All rows of an array in order, as many at a time as fit in memory in any case; with the number of the first."""
    size = max(1, _BLOCK // max(1, array[:1].nbytes))
    for start in range(0, len(array), size):
        yield start, array[start : start + size]
        if isinstance(array, np.memmap):
            let_go(array)


def let_go(array: np.memmap) -> None:
    """Drop what has been read of a mapped file from this process' memory; it is read again when it is needed."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    # Not of mode "c", whose changes are in memory alone.
    if isinstance(base, mmap.mmap) and array.mode != "c" and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def _finite(array: np.ndarray, path: Path, columns: tuple[str, ...] | None = None) -> np.ndarray:
    """The array as it is."""
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


def _damaged(path: Path, reading: Any) -> Any:
    """What a reader returns, its complaints about the file in one type."""
    try:
        return reading()
    except (ValueError, EOFError, OSError, struct.error, KeyError, csv.Error) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise ValueError(f"{path} cannot be read ({error}); it is damaged or of another format.") from error


def _npz(path: Path, name: str | None) -> np.ndarray:
    def reading() -> dict[str, np.ndarray]:
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                return {key: file[key] for key in file.files if name in (None, key) or name not in file.files}
        except zipfile.BadZipFile as error:
            raise ValueError(error) from error

    arrays = _damaged(path, reading)
    if name is None and len(arrays) == 1:
        return next(iter(arrays.values()))
    if name not in arrays:
        wanted = "" if name is None else f", and no {name!r}"
        raise ValueError(f"{path} holds the arrays {', '.join(sorted(arrays))}{wanted}; name one of them.")
    return arrays[name]


def _text(path: Path, delimiter: str) -> Rows:
    first = _damaged(path, lambda: next(_cells(path, delimiter), (1, []))[1])
    named = not all(map(_is_number, first))
    columns = tuple(text.strip() for text in first) if named else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a file without rows, which is an error here
        try:
            values = np.loadtxt(path, delimiter=delimiter, skiprows=int(named), ndmin=2, encoding="utf-8")
        except ValueError as error:
            fault = _damaged(path, lambda: _fault(path, delimiter, columns))
            raise ValueError(f"{path}: {fault or error}") from error
    if not values.size:
        raise ValueError(f"{path} holds no rows.")
    if columns is not None and len(columns) != values.shape[1]:
        raise ValueError(f"{path}: the first line names {len(columns)} columns, the rows have {values.shape[1]}.")
    return Rows(_finite(values, path, columns), columns)


def _cells(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The number of every line that is not empty, and its cells."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file, delimiter=delimiter)
        yield from ((reader.line_num, cells) for cells in reader if cells)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _fault(path: Path, delimiter: str, columns: tuple[str, ...] | None) -> str | None:
    """What is wrong with the first line that is no row of numbers, and the cure; None if all are."""
    width = len(columns) if columns else None
    for number, cells in islice(_cells(path, delimiter), 1 if columns else 0, None):
        width = width or len(cells)
        if len(cells) != width:
            return f"line {number} has {len(cells)} cells separated by {delimiter!r}, those before have {width}."
        for place, text in enumerate(cells):
            if not _is_number(text):
                name = columns[place] if columns else f"x{place}"
                return (
                    f"line {number}, column {name!r} is {text!r}, expected a number. Drop such rows or columns, or "
                    f"fill them in; cells are separated by {delimiter!r}."
                )
    return None


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("parquet files need pyarrow: pip install 'ndm-ct[files]'.") from error
    return pyarrow


def _parquet(path: Path) -> Rows:
    pyarrow = _pyarrow()
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read ({error}); it is damaged or of another format.") from error
    columns = tuple(table.column_names)
    for name in columns:
        kind = table.schema.field(name).type
        if not (pyarrow.types.is_floating(kind) or pyarrow.types.is_integer(kind)):
            raise ValueError(f"{path}: column {name!r} has type {kind}, expected numbers; leave it out.")
    if not (columns and len(table)):
        raise ValueError(f"{path} holds no rows.")
    values = [table.column(name).to_numpy().astype(np.float64) for name in columns]
    return Rows(_finite(np.stack(values, 1), path, columns), columns)


def idx(path: Path) -> np.ndarray:
    """An array in the idx format, plain or gzipped.

    Raises:
        ValueError: it is not one of unsigned bytes, or it is cut off.
    """
    opener = gzip.open if path.suffix == ".gz" else open

    def reading() -> np.ndarray:
        with opener(path, "rb") as file:
            zero, kind, ndim = struct.unpack(">HBB", file.read(4))
            if zero != 0 or kind != 8:
                raise ValueError(f"no idx file of unsigned bytes: it starts with {zero}, {kind}")
            shape = struct.unpack(f">{ndim}I", file.read(4 * ndim))
            values = np.frombuffer(file.read(), np.uint8)
        if values.size != np.prod(shape):
            raise ValueError(f"cut off: {values.size} values, its header says {shape}")
        return values.reshape(shape)

    return _damaged(path, reading)


def levels_of_images(array: np.ndarray, path: PathLike) -> Tensor:
    """Images of unsigned bytes as ``(N, C, H, W)``, whatever the place of the channels.

    Raises:
        ValueError: another dtype or shape.
    """
    if array.dtype != np.uint8:
        raise ValueError(f"{path} holds images of dtype {array.dtype}, expected uint8 levels 0 ... 255.")
    pixels = torch.as_tensor(np.array(array))
    if pixels.ndim == 3:
        return pixels[:, None]
    if pixels.ndim == 4 and pixels.shape[3] in (1, 3):
        return pixels.permute(0, 3, 1, 2).contiguous()
    if pixels.ndim == 4 and pixels.shape[1] in (1, 3):
        return pixels
    raise ValueError(f"{path} holds an array of shape {array.shape}, expected (N, H, W), (N, H, W, C) or (N, C, H, W).")


def pictures(folder: Path) -> tuple[list[Tensor], list[Path]]:
    """All pictures below a folder, levels ``(C, H, W)``, three channels if one has them, in the order of their names.

    Raises:
        FileNotFoundError: there are none.
        ValueError: one cannot be read.
        ImportError: Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("a folder of images needs Pillow: pip install 'ndm-ct[files]'.") from error
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
    if not files:
        raise FileNotFoundError(f"{str(folder)!r} holds no images ({', '.join(PICTURES)}).")

    def opened(file: Path) -> Tensor:
        with Image.open(file) as picture:
            image = picture if picture.mode in ("L", "RGB") else picture.convert("RGBA")
            if image.mode == "RGBA":  # transparent pixels have any colour: they are to be white
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            pixels = torch.as_tensor(np.array(image))
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)

    images = [_damaged(file, lambda file=file: opened(file)) for file in files]
    if any(len(pixels) == 3 for pixels in images):
        images = [pixels.expand(3, -1, -1) for pixels in images]
    return images, files


def _stacked(images: list[Tensor], folder: Path) -> Tensor:
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(f"the images in {str(folder)!r} have {len(shapes)} different shapes; bring them to one size.")
    return torch.stack(images)
