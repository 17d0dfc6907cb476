"""Files that are written whole or not at all, and folders that one process at a time works in."""

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

__all__ = ["PathLike", "append", "as_path", "clear_leftovers", "lock_folder", "write_atomically"]

PathLike = str | os.PathLike[str]

_FULL = "free some space or write elsewhere"
_CURES = {errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.EFBIG: _FULL, errno.ENOENT: "make its folder first"}


def as_path(argument: str, value: Any) -> Path:
    """Convert an argument to a path.

    Args:
        argument: its name, for the message.
        value: what the caller passed.

    Raises:
        TypeError: the value is neither a string nor a path.
    """
    try:
        return Path(value)
    except TypeError as error:
        raise TypeError(
            f"{argument} must be a str or a path, got {type(value).__name__} ({value!r}); file objects and descriptors "
            "are not accepted."
        ) from error


@contextmanager
def lock_folder(path: PathLike, name: str) -> Iterator[None]:
    """Make a folder, keep other processes out of it, and remove temporary files of processes that were killed.

    The lock is the operating system's, on the file ``.lock``. It ends with the process, however that ends.

    Args:
        path: the folder.
        name: what messages call it.

    Raises:
        BlockingIOError: another process, or another call of this one, works in the folder.
        OSError: the folder cannot be made or written to.
    """
    folder = Path(path)
    lock = FileLock(folder / ".lock")
    try:
        with _named_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
    except Timeout as error:
        raise BlockingIOError(
            errno.EWOULDBLOCK, f"{name} is in use by another process; wait until that has ended, or choose another."
        ) from error
    try:
        clear_leftovers(folder)
        yield
    finally:
        lock.release()


def clear_leftovers(folder: Path, name: str = "*") -> None:
    """Remove temporary files of processes that were killed in :func:`write_atomically`.

    Args:
        folder: where they are.
        name: pattern for the name of the file that was being written.
    """
    for leftover in folder.glob(f".{name}.{'[0-9a-f]' * 32}.tmp"):
        leftover.unlink(missing_ok=True)


def write_atomically(path: PathLike, data: bytes) -> None:
    """Replace a file; after a failure or a crash the old file is unchanged.

    The data are written to a temporary file in the same folder, flushed to the disk and moved.

    Args:
        path: file to write or replace.
        data: its new content.

    Raises:
        OSError: the file cannot be written.
    """
    path = as_path("path", path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with _named_errors(path):
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # in a folder that cannot be written to, nothing was made
                temporary.unlink(missing_ok=True)
            raise
    if os.name == "posix":  # the folder's new entry has to reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def append(path: PathLike, line: bytes) -> None:
    """Add a line to the end of a file; a failure leaves the file unchanged, a kill may leave part of the line.

    Args:
        path: the file; made if missing.
        line: what to add, with its newline.

    Raises:
        OSError: the file cannot be written.
    """
    with _named_errors(Path(path)), Path(path).open("ab", buffering=0) as file:
        before, rest = file.tell(), memoryview(line)
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(before)
            raise


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Let the system's errors name this path instead of a temporary file, and say what to do."""
    try:
        yield
    except Timeout:  # of the lock
        raise
    except OSError as error:
        cure = _CURES.get(error.errno or 0, "make the place writable or write elsewhere")
        raise OSError(error.errno, f"{error.strerror or error}: nothing was changed; {cure}", str(path)) from error
