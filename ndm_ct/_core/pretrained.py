"""Methods of a model that go to folders and to the Hugging Face Hub; what they do stands in ``storage.hub``."""

import importlib
import os
from typing import Any, TypeVar

__all__ = ["Pretrained"]

T = TypeVar("T", bound="Pretrained")


def _hub() -> Any:
    # By name, because the storage of models lies above the models.
    return importlib.import_module(f"{__name__.partition('.')[0]}.storage.hub")


class Pretrained:
    """Mix-in of models: ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``."""

    def save_pretrained(self, folder: str | os.PathLike[str], *, evaluation: Any = None, data: str = "") -> None:
        """Write a folder with the model and a model card, for ``from_pretrained`` or for the Hugging Face Hub.

        The folder receives ``model.safetensors``, as :func:`ndm_ct.save` writes it, and ``README.md``. Both replace
        what is there.

        Args:
            folder: made if missing.
            evaluation: result of :func:`ndm_ct.evaluate`, whose numbers the card holds. None leaves them out.
            data: what the model was evaluated on, for the card.

        Raises:
            ValueError, TypeError, OSError: as :func:`ndm_ct.save`.

        Example:
            >>> import tempfile, ndm_ct
            >>> model = ndm_ct.NDM(ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2)), event_shape=(2,))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     model.save_pretrained(folder)
            ...     ndm_ct.NDM.from_pretrained(folder).event_shape
            (2,)
        """
        _hub().save_folder(self, folder, evaluation, data)

    @classmethod
    def from_pretrained(
        cls: type[T], folder_or_id: str | os.PathLike[str], *, revision: str | None = None, token: Any = None,
        cache_dir: Any = None, local_files_only: bool = False, **parts: Any,
    ) -> T:  # fmt: skip
        """Read a model from a folder, or from the Hugging Face Hub.

        Reading executes nothing that the files hold. The Hub needs ``pip install "ndm-ct[hub]"``, folders need nothing.

        Args:
            folder_or_id: a folder that ``save_pretrained`` wrote, or ``"owner/name"`` of a model on the Hub. A folder
                that exists goes first.
            revision: branch, tag or commit on the Hub.
            token: access token of the Hub; None is the one that is logged in.
            cache_dir: where downloads are kept; None is the Hub's own place.
            local_files_only: whether to read what was downloaded before, without a network.
            parts: networks of your own classes, such as ``predictor=``, as for :func:`ndm_ct.load`.

        Raises:
            FileNotFoundError: there is no such folder, and the name is no id of a model.
            ImportError: the model is on the Hub, and the package huggingface_hub is missing.
            CheckpointError, ValueError: as :func:`ndm_ct.load`.
        """
        options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        return _hub().load_folder(folder_or_id, options, parts)

    def push_to_hub(self, repo_id: str, *, evaluation: Any = None, data: str = "", **options: Any) -> str:
        """Write the model and its card to the Hugging Face Hub. It needs ``pip install "ndm-ct[hub]"``.

        Args:
            repo_id: ``"owner/name"``; made if missing.
            evaluation: result of :func:`ndm_ct.evaluate`, whose numbers the card holds.
            data: what the model was evaluated on, for the card.
            options: of ``huggingface_hub.ModelHubMixin.push_to_hub``, such as ``private=True`` or ``token=``.

        Returns:
            The address of the commit.

        Raises:
            ImportError: the package huggingface_hub is missing.
        """
        return str(_hub().push(self, repo_id, evaluation, data, options))
