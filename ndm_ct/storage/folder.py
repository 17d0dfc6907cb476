"""A folder of work that can be stopped at any moment and continued: lock, identity, journal, results.

Trainings, evaluations and commands all work in a :class:`RunFolder`. One process at a time holds its lock. What is
already in the folder is used only if its settings are those of the call that continues it.
"""

import glob
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor

from ndm_ct._core.errors import CheckpointError
from ndm_ct._core.parallel import Group
from ndm_ct._core.versions import versions
from ndm_ct.storage.atomic import PathLike, append, as_path, clear_leftovers, lock_folder, write_atomically
from ndm_ct.storage.tensors import parse_json, read, write

__all__ = ["Batches", "Journal", "Record", "RunFolder", "finished_batches"]

Record = dict[str, Any]
T = TypeVar("T")

_PART = "part"
_LONGEST = 60
"""Characters of a setting that a message shows."""


class RunFolder:
    """A folder of work. Without a path nothing is written.

    Args:
        path: the folder; made if missing.
        name: what messages call it; by default ``run_dir='...'``.
        group: the processes that work in it together. The first one holds the lock and writes.
    """

    def __init__(self, path: PathLike | None, name: str | None = None, group: Group | None = None) -> None:
        self._path = None if path is None else as_path("run_dir", path)
        self.name, self.group = name or f"run_dir={str(path)!r}", group or Group()

    @property
    def is_real(self) -> bool:
        """Whether there is a folder."""
        return self._path is not None

    @property
    def path(self) -> Path:
        """The folder; only if :attr:`is_real`."""
        return cast(Path, self._path)

    @contextmanager
    def locked(self, holds: str = "", what: str = "", resume: bool = True) -> Iterator[None]:
        """Make the folder and keep other processes out of it.

        Args:
            holds: name of the file that work continues from.
            what: what messages call that file.
            resume: whether the file may exist.

        Raises:
            ValueError: the file exists, and ``resume`` is False.
            BlockingIOError: another process works in the folder.
            OSError: the folder cannot be made or written to.
        """

        def enter() -> None:
            stack.enter_context(lock_folder(self.path, self.name))
            if not resume and (self.path / holds).exists():
                raise ValueError(f"{self.name} holds {what} and resume=False; choose another folder, or delete it.")

        with ExitStack() as stack:
            if self.is_real:
                self.group.of_main(enter)
            yield

    def compare(self, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Check that work in the folder has the settings of this call.

        Args:
            saved: settings of the work, as JSON returns them.
            settings: settings of this call, JSON-serialisable.

        Raises:
            ValueError: some differ; the message names them.
        """
        differing = _differences(saved, json.loads(json.dumps(settings)))
        if differing:
            raise ValueError(
                f"{self.name} holds work of other settings: {'; '.join(differing)}. Repeat them to continue, choose "
                "another place, or delete the folder to begin anew."
            )

    def compare_processes(self, call: str, settings: Mapping[str, Any]) -> None:
        """Check that all processes of the group were called with the same arguments and data.

        Args:
            call: name of the function that they called.
            settings: what must agree, JSON-serialisable.

        Raises:
            ValueError: something differs; the message names it. Every process raises it.
        """
        first, *others = self.group.gathered(json.loads(json.dumps({**settings, "run_dir": self.is_real})))
        for rank, other in enumerate(others, 1):
            unequal = _differences(first, other, wording=f"{{}} is {{}} in process 0, {{}} in process {rank}")
            if unequal:
                raise ValueError(
                    f"ndm_ct.{call} got other arguments in process {rank} than in process 0: {'; '.join(unequal)}. "
                    f"Pass the same arguments and all rows in every process, because {call} itself shares them out. "
                    "Leave out DistributedSampler, split_dataset_by_node and the like, or gather the shards before the "
                    "call."
                )

    def write_result(self, name: str, result: Mapping[str, Any]) -> None:
        """Write a JSON file with a result and the versions that it was computed by.

        Args:
            name: of the file.
            result: JSON-serialisable; None stands for numbers that are not finite.
        """
        if self.is_real and self.group.is_main:
            finite = {key: None if _is_infinite(value) else value for key, value in result.items()}
            text = json.dumps(finite | {"versions": versions()}, indent=2, allow_nan=False) + "\n"
            write_atomically(self.path / name, text.encode())


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _differences(
    saved: Mapping[str, Any], settings: Mapping[str, Any], prefix: str = "", wording: str = "{} was {}, now {}"
) -> list[str]:
    """Settings that differ, with the beginnings of their values; ``wording`` takes name and values."""
    found = []
    for key, value in settings.items():
        before, name = saved.get(key), f"{prefix}{key}".rstrip(".")
        if before == value:
            continue
        shown = [_beginning(each) for each in (before, value)]
        if isinstance(before, dict) and isinstance(value, dict):
            found += _differences(before, value, f"{name}.", wording) or [name]
        elif shown[0] == shown[1] or _unreadable(before) or _unreadable(value):
            found.append(name)
        else:
            found.append(wording.format(name, *shown))
    return found


def _unreadable(value: Any) -> bool:
    """Whether a value is a digest, or a long collection."""
    text = repr(value)
    return len(text) > _LONGEST and (not isinstance(value, str) or set(value) <= set("0123456789abcdef"))


def _beginning(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


class Journal:
    """Records in a file, one JSON object per line. A last line that a kill cut off is dropped.

    Args:
        path: the file.
        signed: whether every record begins with a digest. Its numbers must then be finite.
    """

    def __init__(self, path: Path, signed: bool = False) -> None:
        self.path, self.signed = path, signed

    def _lines(self) -> list[bytes]:
        text = self.path.read_bytes() if self.path.exists() else b""
        return text[: text.rfind(b"\n") + 1].splitlines(keepends=True)

    def read(self, convert: Callable[[int, Record], T]) -> list[T]:
        """Read all records.

        Args:
            convert: called with the number of the line, from 1, and its record. Its errors are those of the line.

        Raises:
            CheckpointError: a line is damaged; the message names it.
        """
        lines, found = self._lines(), list[T]()
        if self.signed and not lines and self.path.exists():
            lines = [self.path.read_bytes()]  # the first line was written whole, so this is damage
        for number, line in enumerate(lines, 1):
            try:
                found.append(self._converted(number, line, convert))
            except (ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:  # RecursionError is one
                cure = "move the file away to start again" if self.signed else "mend or delete the line to continue"
                raise CheckpointError(f"{self.path}: line {number} cannot be read ({error}); {cure}.") from error
        return found

    def keep(self, count: int) -> None:
        """Drop all but the first lines.

        Args:
            count: how many to keep.
        """
        text = b"".join(self._lines()[:count])
        if not self.path.exists() or self.path.read_bytes() != text:
            write_atomically(self.path, text)

    def add(self, record: Record, header: Record | None = None) -> None:
        """Add a record.

        Args:
            record: JSON-serialisable.
            header: the first record of a new file.
        """
        if header is not None and not self.path.exists():
            write_atomically(self.path, self.encoded(header))
        append(self.path, self.encoded(record))

    def encoded(self, record: Record) -> bytes:
        """The line of a record."""
        if self.signed:
            record = {"sha256": _digest(record)} | record
        return json.dumps(record, allow_nan=not self.signed).encode() + b"\n"

    def _converted(self, number: int, line: bytes, convert: Callable[[int, Record], T]) -> T:
        record = parse_json(line) if self.signed else json.loads(line)
        if not isinstance(record, dict):
            raise TypeError(f"it holds a {type(record).__name__}, expected an object")
        digest = record.pop("sha256", None) if self.signed else None  # which lines of early versions lack
        found = convert(number, record)
        if digest not in (None, _digest(record)):
            raise ValueError("the checksum does not match")
        return found


def _digest(record: Record) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


class Batches:
    """Finished batches of rows, one file each, whole or absent.

    Args:
        folder: where they are.
        settings: everything that determines the rows, JSON-serialisable.

    Raises:
        ValueError: the folder holds batches of other settings.
        CheckpointError: a batch is damaged.
    """

    def __init__(self, folder: RunFolder, settings: Record) -> None:
        self.folder, self.settings = folder, settings
        for path in self.files()[:1]:  # the others have the same settings, because each process checked them here
            self._read(path)

    def files(self) -> list[Path]:
        """The file of each batch."""
        return sorted(self.folder.path.glob("*.safetensors"))

    def batch(self, rows: slice, make: Callable[[slice], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Read a finished batch, or make it and keep it.

        Args:
            rows: of the batch.
            make: called as ``make(rows)`` for tensors by name.

        Raises:
            ValueError: the batch has other settings.
            CheckpointError: the batch is damaged.
            OSError: the batch cannot be written.
        """
        path = self.folder.path / f"{rows.start}-{rows.stop}.safetensors"
        if path.exists():
            return self._read(path)
        made = make(rows)
        write(path, made, {"kind": _PART, "settings": self.settings})
        return made

    def _read(self, path: Path) -> dict[str, Tensor]:
        try:
            description, tensors = read(path, _PART)
        except CheckpointError as error:
            raise CheckpointError(f"{error} Delete the file, and its rows are made again.") from error
        saved = description.get("settings")
        self.folder.compare(saved if isinstance(saved, dict) else {}, self.settings)
        return tensors


@contextmanager
def finished_batches(out: Path, settings: Record) -> Iterator[Batches]:
    """Keep the finished batches of an output file in a hidden folder beside it, until the file is written.

    The folder of ``drawn.csv`` is ``.drawn.csv.parts``. On normal exit of the block the output counts as written, and
    the folder is removed. After an error the next process with the same settings continues.

    Args:
        out: the output file.
        settings: everything that determines its rows, JSON-serialisable.

    Raises:
        ValueError: the folder holds batches of other settings.
        CheckpointError: a batch is damaged.
        BlockingIOError: another process works on this output.
        OSError: the folder cannot be made or written to.
    """
    path = out.with_name(f".{out.name}.parts")
    with lock_folder(path, repr(str(out))):
        clear_leftovers(out.parent, glob.escape(out.name))
        batches = Batches(RunFolder(path, repr(str(path))), settings)
        try:
            yield batches
            for file in batches.files():
                file.unlink()
        finally:
            if not batches.files():
                with suppress(OSError):  # where an open file cannot be removed
                    (path / ".lock").unlink()
                    path.rmdir()
