"""Models in folders with a model card, and on the Hugging Face Hub by ``huggingface_hub``'s own mix-in."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ndm_ct._core.errors import CheckpointError
from ndm_ct._core.versions import __version__
from ndm_ct.model import NDM
from ndm_ct.storage.atomic import PathLike, as_path, write_atomically
from ndm_ct.storage.models import describe, load, save

__all__ = ["card", "load_folder", "push", "save_folder"]

FILE = "model.safetensors"
_TAGS = ("diffusion", "density-estimation", "likelihood")

_USE = """# Neural Diffusion Model

```python
import ndm_ct

model = ndm_ct.NDM.from_pretrained("...")  # this folder, or its id
x = ndm_ct.sample(model, 16)
log_p = ndm_ct.loglik(model, x)  # nats per event
```""".splitlines()


def save_folder(model: NDM, folder: PathLike, evaluation: Any = None, data: str = "") -> None:
    """Write a model and its card into a folder; see :meth:`ndm_ct.NDM.save_pretrained`."""
    folder = as_path("folder", folder)
    text = card(model, evaluation, data)  # before anything is written
    describe(model)
    folder.mkdir(parents=True, exist_ok=True)
    save(model, folder / FILE)
    write_atomically(folder / "README.md", text.encode())


def load_folder(folder_or_id: PathLike, options: Mapping[str, Any], parts: Mapping[str, Any]) -> NDM:
    """Read a model from a folder or from the Hub; see :meth:`ndm_ct.NDM.from_pretrained`."""
    folder = as_path("folder_or_id", folder_or_id)
    if folder.is_dir():
        return load(folder / FILE, **parts)
    words = str(folder_or_id).split("/")
    if len(words) != 2 or not all(words) or words[0] in (".", "..", "~"):
        raise FileNotFoundError(
            f"{str(folder_or_id)!r} is no folder, and no model of the Hugging Face Hub, whose id is 'owner/name'."
        )
    file = _package().hf_hub_download(str(folder_or_id), FILE, library_name="ndm_ct", **options)
    try:
        return load(file, **parts)
    except CheckpointError as error:
        raise CheckpointError(f"{folder_or_id} on the Hugging Face Hub: {error}") from error


def push(model: NDM, repo_id: str, evaluation: Any, data: str, options: Mapping[str, Any]) -> Any:
    """Write a model and its card to the Hub; see :meth:`ndm_ct.NDM.push_to_hub`."""

    class Pushed(_package().ModelHubMixin):  # type: ignore[misc]
        """The package's mix-in makes the repository and uploads what is written here."""

        def _save_pretrained(self, save_directory: Path) -> None:
            save_folder(model, save_directory, evaluation, data or "")

    return Pushed().push_to_hub(repo_id, **options)


def _package() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError('The Hugging Face Hub needs huggingface_hub: pip install "ndm-ct[hub]".') from error
    return huggingface_hub


def card(model: NDM, evaluation: Any = None, data: str = "") -> str:
    """The model card: what the model is, how it is read, and the numbers of an evaluation.

    Args:
        model: the model.
        evaluation: result of :func:`ndm_ct.evaluate`, or None.
        data: what it was evaluated on.

    Raises:
        TypeError: ``evaluation`` is something else.
    """
    if evaluation is not None and not all(hasattr(evaluation, name) for name in ("nll", "stderr", "bits_per_dim")):
        raise TypeError(f"evaluation must be the result of ndm_ct.evaluate, got {type(evaluation).__name__}.")
    weights = sum(parameter.numel() for parameter in model.parameters())
    facts = {
        "events": f"shape {tuple(model.event_shape)}",
        "transform": type(model.transform).__name__,
        "schedule": type(model.schedule).__name__,
        "network": f"{type(model.predictor).__name__}, which predicts {model.prediction}",
        "weights": f"{weights:,}, {model.dtype}",
        "time of the data": f"{model.t_min:g}",
        "version": f"ndm_ct {__version__}",
    }
    head = {"library_name": "ndm_ct", "tags": list(_TAGS)} | _index(evaluation, data)
    lines = ["---", *(f"{name}: {json.dumps(value)}" for name, value in head.items()), "---", "", *_USE, ""]
    lines += _table("part", "this model", facts)
    if evaluation is not None:
        lines += ["", "## Evaluation" + (f" on {data}" if data else ""), ""]
        lines += _table("number", "value", _numbers(evaluation))
    return "\n".join(lines) + "\n"


def _table(name: str, value: str, rows: Mapping[str, str]) -> list[str]:
    return [f"| {name} | {value} |", "|---|---|", *(f"| {key} | {text} |" for key, text in rows.items())]


def _numbers(evaluation: Any) -> dict[str, str]:
    """The numbers of an evaluation with their errors, to read."""
    found = {"negative log-likelihood, nats per event": f"{evaluation.nll:.6g} ± {evaluation.stderr:.2g}"}
    if evaluation.bits_per_dim is not None:
        found["bits per dimension"] = f"{evaluation.bits_per_dim:.6g} ± {evaluation.bits_stderr:.2g}"
    return found | {
        "the estimator's part of the error, nats": f"{evaluation.estimator_stderr:.2g}",
        "rows scored": f"{evaluation.rows}" + (f", {evaluation.failed} failed" if evaluation.failed else ""),
        "network evaluations per row": f"{evaluation.nfe:.4g}",
        "ended by": evaluation.reason,
    }


def _index(evaluation: Any, data: str) -> dict[str, Any]:
    """The numbers as the Hub's ``model-index``; those that are not finite are left out."""
    if evaluation is None:
        return {}
    values = {"nll": evaluation.nll, "nll_stderr": evaluation.stderr, "bits_per_dim": evaluation.bits_per_dim}
    metrics = [
        {"type": name, "value": value} for name, value in values.items() if value is not None and math.isfinite(value)
    ]
    result = {"task": {"type": "density-estimation"}, "dataset": {"name": data or "data", "type": data or "data"}}
    return {"model-index": [{"name": "ndm_ct", "results": [result | {"metrics": metrics}]}]}
