"""Work that goes on where it was stopped: finished batches are kept beside the file that they are to become.

While ``drawn.csv`` is being made, the hidden folder ``.drawn.csv.parts`` holds a file for each finished batch, written
whole or not at all, with a checksum and with all that determines its rows. The folder goes when the output is there.
"""

import glob
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ndm_ct._core.errors import CheckpointError
from ndm_ct.storage import models as checkpoint

__all__ = ["Parts", "kept"]

KIND = "part"


class Parts:
    """The finished batches in a folder.

    Args:
        folder: where they are.
        settings: all that determines their rows, JSON-serialisable.

    Raises:
        ValueError: the folder holds batches of other settings.
        CheckpointError: a batch is damaged.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, json.loads(json.dumps(settings))
        for path in self.files()[:1]:  # the others have the same settings: each process began here
            self._read(path)

    def files(self) -> list[Path]:
        """One for each batch."""
        return sorted(self.folder.glob("*.safetensors"))

    def batch(self, rows: slice, make: Callable[[slice], dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch that was kept, or is made and kept now.

        Args:
            rows: of the batch.
            make: called as ``make(rows)`` for tensors by name.

        Raises:
            CheckpointError: the batch that was kept is damaged.
            OSError: the batch cannot be written.
        """
        path = self.folder / f"{rows.start}-{rows.stop}.safetensors"
        if path.exists():
            return self._read(path)
        made = make(rows)
        checkpoint.write(path, made, {"kind": KIND, "settings": self.settings})
        return made

    def _read(self, path: Path) -> dict[str, Tensor]:
        try:
            description, tensors = checkpoint.read(path, KIND)
        except CheckpointError as error:
            raise CheckpointError(f"{error} Delete the file: its rows are made anew.") from error
        saved = description.get("settings")
        if saved != self.settings:
            known = saved if isinstance(saved, dict) else {}
            differing = [name for name, value in self.settings.items() if known.get(name) != value]
            raise ValueError(
                f"{str(self.folder)!r} keeps finished rows that differ in {', '.join(differing)}. Repeat what was "
                "asked for to go on, choose another output, or delete the folder to begin anew."
            )
        return tensors


@contextmanager
def kept(out: Path, settings: dict[str, Any]) -> Iterator[Parts]:
    """The batches kept for an output, for this process alone; leaving the block means that the output is written.

    An error leaves the finished batches to the next process with the same settings.

    Args:
        out: the output.
        settings: all that determines its rows, JSON-serialisable.

    Raises:
        ValueError, CheckpointError: as :class:`Parts`.
        BlockingIOError: another process is at work on this output.
        OSError: the folder cannot be made, or not be written to.
    """
    folder = out.with_name(f".{out.name}.parts")
    with checkpoint.alone_in(folder, repr(str(out))):
        checkpoint.clear_leftovers(out.parent, glob.escape(out.name))
        parts = Parts(folder, settings)
        try:
            yield parts
            for path in parts.files():
                path.unlink()
        finally:
            if not parts.files():
                with suppress(OSError):  # where a file that is open cannot be removed
                    (folder / ".lock").unlink()
                    folder.rmdir()
