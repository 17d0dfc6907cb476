"""Storage on disk: folders of work, signed tensors, models. A stopped process or a damaged input loses no file."""

from ndm_ct.storage.atomic import PathLike, append, clear_leftovers, lock_folder, write_atomically
from ndm_ct.storage.folder import Batches, Journal, RunFolder, finished_batches
from ndm_ct.storage.models import load, save

__all__ = [
    "Batches",
    "Journal",
    "PathLike",
    "RunFolder",
    "append",
    "clear_leftovers",
    "finished_batches",
    "load",
    "lock_folder",
    "save",
    "write_atomically",
]
