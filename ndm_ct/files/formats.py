"""Files of data, read by their endings in any letter case.

=================================  ===================================================================================
``.npy``                           an array ``(N, *E)``, mapped into memory as it is needed
``.npz``                           one array, or the one that is named
``.csv``, ``.tsv``, ``.txt``,      text: one row per line, cells separated by commas, semicolons, tabs or white space;
``.data``, ``.dat``                also compressed, with ``.gz``, ``.bz2``, ``.xz`` or ``.zip`` appended
``.parquet``                       a table of numbers, or a folder of such files (pyarrow)
idx, ``.gz`` too                   unsigned bytes, MNIST's format
a folder                           images of one size, such as png and jpg (Pillow)
=================================  ===================================================================================

Unsigned bytes of images are integer levels 0 ... 255, ``(N, C, H, W)``; everything else is real.
"""

from pathlib import Path

from ndm_ct.files.arrays import array_rows, idx, npy, npz
from ndm_ct.files.images import image_rows
from ndm_ct.files.rows import Rows
from ndm_ct.files.tables import COMPRESSED, parquet_rows, text_rows
from ndm_ct.storage.atomic import PathLike

__all__ = ["read"]

_TEXT = (".csv", ".tsv", ".txt", ".data", ".dat")


def read(
    path: PathLike, array: str | None = None, header: str | None = None, *, words: bool = False, gaps: bool = False
) -> Rows:
    """Read the rows of a file or a folder, by its ending.

    Args:
        path: the file, or a folder of images or parquet files.
        array: name of the array in an npz file that has several.
        header: "yes" if the first line of a text table names the columns, "no" if it is a row. None decides: a line of
            words is names, a line of numbers is a row; a line that may be both is an error.
        words: whether columns of a text table or a parquet file may hold words, and values may be missing.
        gaps: whether numbers may be missing or not finite; :func:`with_bad_named` names the rows that have such.

    Returns:
        The rows, with notes on what was decided or left out.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: an unknown format, a damaged file, or values that are not finite numbers (the first is named).
        ImportError: a package that the format needs is missing.

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
    ending = path.suffix.lower()
    text = (Path(path.stem).suffix.lower() if ending in COMPRESSED else ending) in _TEXT and not path.is_dir()
    if array is not None and ending != ".npz":
        raise ValueError(f"array={array!r} has no effect on {path}; it names an array of an npz file.")
    if header is not None and not text:
        raise ValueError(f"header={header!r} has no effect on {path}; it is for tables of text.")
    if text:
        return text_rows(path, header, words=words, gaps=gaps)
    if ending == ".parquet" or (path.is_dir() and next(path.rglob("*.parquet"), None)):
        return parquet_rows(path, words=words, gaps=gaps)
    if path.is_dir():
        return image_rows(path)
    if ending == ".npz":
        return array_rows(npz(path, array), path, gaps=gaps)
    if ending == ".npy":
        return array_rows(npy(path), path, gaps=gaps)
    if "idx" in path.name or "ubyte" in path.name:
        return array_rows(idx(path), path)
    packed = f" Unpack {ending} files first." if ending in COMPRESSED else ""
    raise ValueError(
        f"{path} has an unknown format; give npy, npz, csv, tsv, txt, parquet, idx, or a folder of images.{packed}"
    )
