"""Tensors with a description and a checksum, in one safetensors file.

The file's ``__metadata__`` has one entry, ``"ndm_ct"``: a JSON object whose first entry is the SHA-256 digest of its
other entries and of the tensors. Equal contents make equal files. Reading a file executes nothing.

References:
    The safetensors format, https://github.com/huggingface/safetensors
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ndm_ct._core.errors import CheckpointError
from ndm_ct._core.parallel import whole
from ndm_ct.storage.atomic import PathLike, as_path, write_atomically

__all__ = ["compare_tensors", "hash_state", "hash_values", "parse_json", "read", "write"]

FORMAT = 1
KEY = "ndm_ct"


def write(path: PathLike, tensors: Mapping[str, Any], description: dict[str, Any]) -> None:
    """Write tensors and a description to a file, whole or not at all.

    Args:
        path: file to write or replace.
        tensors: by name. Tensors that share memory are written separately.
        description: JSON-serialisable; its entry "kind" says what the file is. The format version is added.

    Raises:
        TypeError: a value is not a tensor, or has a dtype that the format lacks. Nothing is written.
        OSError: the file cannot be written.
    """
    copies = {name: _writable(name, tensor) for name, tensor in tensors.items()}
    text = json.dumps({"format": FORMAT} | description, allow_nan=False)
    write_atomically(path, safetensors.torch.save(copies, {KEY: _signed(text, copies)}))


def read(path: PathLike, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file that :func:`write` wrote.

    Args:
        path: the file.
        kind: what it must hold: "model", "training" or "part".

    Returns:
        The description, and the tensors on the CPU.

    Raises:
        CheckpointError: the file is not of this library, is damaged, has a newer format, or holds another kind.
        FileNotFoundError: there is no such file.
    """
    with as_path("path", path).open("rb"):
        pass  # a missing or unreadable file is the system's own error
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Cloned, because the file may be replaced while the tensors live.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({error}); it is damaged or foreign."
        ) from error
    text = metadata.get(KEY)
    if text is None:
        raise CheckpointError(f"{path}: a safetensors file, but not written by this library (no {KEY!r} metadata).")
    return _description(path, kind, text, tensors), tensors


def _description(path: PathLike, kind: str, text: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    try:
        description = parse_json(text)
        digest, form, found = description.pop("sha256"), description["format"], description["kind"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the description cannot be read ({error}).") from error
    if text != _signed("{" + text[len(_signature(digest)) :], tensors):
        raise CheckpointError(f"{path}: the checksum does not match; the file was damaged or edited.")
    if form != FORMAT:
        raise CheckpointError(f"{path}: format {form!r}, this version reads format {FORMAT}; update the library.")
    if found != kind:
        hint = "; fit(run_dir=...) resumes it; its model is in model.safetensors" if kind == "model" else ""
        raise CheckpointError(f"{path}: holds a {found!r}, expected a {kind!r}{hint}.")
    return description


def compare_tensors(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], converts: Callable[[str], bool] = lambda _: False
) -> None:
    """Check that a file has the tensors that are expected.

    Args:
        expected: tensors of the model, by name.
        tensors: tensors of the file, by name.
        converts: called with a name; whether that tensor may have another floating dtype.

    Raises:
        CheckpointError: names, shapes or dtypes differ.
    """
    for problem, names in (("lacks", expected.keys() - tensors), ("has unexpected", tensors.keys() - expected.keys())):
        if names:
            raise CheckpointError(f"the file {problem} tensors {_some(names)}; the model's structure differs.")
    for name, tensor in tensors.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {tuple(tensor.shape)} in the file, {tuple(wanted.shape)} in the model."
            )
        both_real = tensor.is_floating_point() and wanted.is_floating_point()
        if tensor.dtype != wanted.dtype and not (both_real and converts(name)):
            raise CheckpointError(
                f"tensor {name!r} has dtype {tensor.dtype} in the file, {wanted.dtype} in the model; convert the "
                f"module with .to({tensor.dtype}) before loading."
            )


def parse_json(text: str | bytes) -> Any:
    """Parse JSON whose numbers are finite.

    Raises:
        ValueError: the text is not JSON, or has a NaN or an infinity.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, parse_constant=_finite, parse_float=_finite, parse_int=_whole)


def hash_values(parts: Iterable[Tensor]) -> str:
    """SHA-256 of the values, independent of how they are divided into parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(_memory(part))
    return digest.hexdigest()


def hash_state(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 of names, dtypes, shapes and values.

    Args:
        tensors: by name, in any order.
        text: hashed before them.
    """
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_memory(tensor))
    return digest.hexdigest()


def _memory(tensor: Tensor) -> Any:
    return whole(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"the number {number} is not finite")
    return value


def _whole(number: str) -> int:
    _finite(number)
    return int(number)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _writable(name: str, tensor: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"the state {name!r} is a {type(tensor).__name__}; only tensors can be saved.")
    if tensor.dtype == torch.complex128:
        raise TypeError(f"the state {name!r} has dtype torch.complex128, which the format lacks; keep it as two reals.")
    return tensor.detach().cpu().contiguous().clone()


def _signature(digest: str) -> str:
    return f'{{"sha256": "{digest}", '


def _signed(text: str, tensors: Mapping[str, Tensor]) -> str:
    """The JSON object ``text`` with the digest as its first entry."""
    return _signature(hash_state(tensors, text)) + text[1:]
