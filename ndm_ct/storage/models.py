"""Models and trainings on disk: one safetensors file each, replaced atomically, read without executing anything.

The file's ``__metadata__`` holds one entry, a JSON description under the key ``"ndm_ct"``, which begins with a SHA-256
digest of its other entries and of the tensors. Equal contents make equal files. A model's description names classes of
this library and their constructor arguments; only those are ever rebuilt, and anything else is marked ``"external"``
and has to be passed to :func:`load`.

References:
    The safetensors format, https://github.com/huggingface/safetensors
"""

import errno
import hashlib
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ndm_ct._core.config import Unconfigurable, from_config, to_config
from ndm_ct._core.errors import CheckpointError
from ndm_ct.model import NDM
from ndm_ct.process import ForwardProcess
from ndm_ct.transforms import Transform

__all__ = ["load", "save"]

FORMAT = 1
EXTERNAL = "external"
_PREFIXES = (("predictor.", "predictor"), ("process.transform.", "transform"))
KEY = "ndm_ct"
_MOST_OBJECTS = 1000
_OPERATION = 2**14
"""Bytes that an operation counts for while a model is made: modules take memory, and time, of their own."""

PathLike = str | os.PathLike[str]


def as_path(argument: str, value: Any) -> Path:
    """A path, or an error that says which argument is none.

    Raises:
        TypeError: neither a string nor a path.
    """
    try:
        return Path(value)
    except TypeError as error:
        raise TypeError(
            f"{argument} must be a str or a path, got {type(value).__name__} ({value!r}); open files and their numbers "
            "are not taken."
        ) from error


def save(model: NDM, path: PathLike) -> None:
    """Write a model, weights and configuration, to one file.

    The file is complete or absent at every moment: it is written beside its final place, flushed to the disk and moved.
    A predictor or transform that is not made of this library's classes is saved as weights only.

    Args:
        model: the model.
        path: file to write or replace.

    Raises:
        ValueError: the prior, schedule or volatility cannot be described in the file. Nothing is written.
        TypeError: the model's state holds something that is no tensor. Nothing is written.
        OSError: the file cannot be written. One that was there is as it was.

    Example:
        >>> import tempfile, ndm_ct
        >>> model = ndm_ct.NDM(ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2)), event_shape=(2,))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ndm_ct.save(model, f"{folder}/model.safetensors")
        ...     ndm_ct.load(f"{folder}/model.safetensors").event_shape
        (2,)
    """
    write(path, model.state_dict(), {"kind": "model", "model": describe(model)})


def load(path: PathLike, *, predictor: Any = None, transform: Transform | None = None) -> NDM:
    """Read a model that :func:`save` wrote; it is in eval mode, its weights those saved, bit by bit.

    Args:
        path: the file.
        predictor: the predictor, if the file does not describe its own. Its weights are replaced by the file's; a
            plain function is taken as it is.
        transform: likewise the transform.

    Raises:
        CheckpointError: the file is not a model of this library, is damaged, names unknown classes, or its tensors do
            not fit. Neither the file nor a module passed in has changed.
        ValueError: a predictor or transform is missing, or given though the file describes its own.
        FileNotFoundError: there is no such file.
        TypeError: the path is none.
    """
    description, tensors = read(path, "model")
    try:
        return _rebuild(description["model"], tensors, predictor, transform)
    except KeyError as error:
        raise CheckpointError(f"{path}: the description lacks the entry {error}.") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def describe(model: NDM) -> dict[str, Any]:
    """The JSON description of a model, all but its weights.

    Raises:
        ValueError: the prior, schedule or volatility cannot be described.
    """
    if model.has_custom_prior:
        raise ValueError(
            f"a model with the custom prior {type(model.prior).__name__} cannot be saved: the file has no place "
            "for it. Save model.state_dict() with torch.save, and build the model with its prior before loading it."
        )
    parts: dict[str, Any] = {}
    for name, value in (("schedule", model.schedule), ("volatility", model.process.volatility)):
        try:
            parts[name] = to_config(value)
        except Unconfigurable as error:
            raise ValueError(
                f"the {name} cannot be saved: {error} Use one of this library's, or save model.state_dict() with "
                "torch.save and build the model before loading it."
            ) from error
    for name, part in (("transform", model.transform), ("predictor", model.predictor)):
        try:
            parts[name] = to_config(part)
        except Unconfigurable:
            parts[name] = EXTERNAL
    return parts | {
        "event_shape": list(model.event_shape),
        "prediction": model.prediction,
        "t_min": model.t_min,
    }


def _rebuild(config: Any, tensors: dict[str, Tensor], predictor: Any, transform: Transform | None) -> NDM:
    if not isinstance(config, dict):
        raise CheckpointError(f"the model's description is a {type(config).__name__}, expected an object.")
    given = {"predictor": predictor, "transform": transform}
    for name, value in given.items():
        _validate_given(name, value, config[name])
    objects = json.dumps(config).count("{")
    if objects > _MOST_OBJECTS:
        raise CheckpointError(f"the description has {objects} objects, a model at most {_MOST_OBJECTS}.")
    with _describing(), _Budget(tensors), torch.device("meta"):  # names and shapes without memory
        skeleton = _skeleton(_parts(config, given), tensors)
    _compare(skeleton, tensors, config)
    # Forked: the initial weights, soon replaced, take nothing from the caller's random numbers.
    with _describing(), torch.random.fork_rng(devices=[]):
        parts = _parts(config, given)
        model = NDM(
            parts["predictor"],
            config["event_shape"],
            transform=parts["transform"],
            schedule=parts["schedule"],
            volatility=parts["volatility"],
            prediction=config["prediction"],
            t_min=config["t_min"],
        )
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(tensors[name].dtype)
    model.load_state_dict(tensors)
    return model.eval()


@contextmanager
def _describing() -> Iterator[None]:
    """Whatever a constructor finds wrong is the file's fault."""
    try:
        yield
    except (CheckpointError, KeyError):  # a missing entry is named by the caller
        raise
    except Exception as error:
        raise CheckpointError(f"the description does not make a model: {error}") from error


class _Budget(TorchDispatchMode):
    """Refuses to make far more than the file holds, in bytes of tensors and in operations.

    An honest model takes a few times the memory of its file while it is made, a few operations for each tensor, and
    something beside that for what no file holds, such as the bases of a ``Blur``.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = 2**27 + sum(32 * tensor.nbytes + 16 * _OPERATION for tensor in tensors.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.left -= _OPERATION + (result.nbytes if isinstance(result, Tensor) else 0)
        if self.left < 0:
            raise CheckpointError("the description asks for far more memory than the tensors of the file take.")
        return result


def _validate_given(name: str, value: Any, config: Any) -> None:
    if config == EXTERNAL and value is None:
        raise ValueError(
            f"the file holds only the weights of its {name}, which is not made of this library's classes; build it and "
            f"pass load(path, {name}=...)."
        )
    if config != EXTERNAL and value is not None:
        kind = config.get("type") if isinstance(config, dict) else config
        raise ValueError(f"{name} was given, but the file describes its own ({kind}); leave {name} out.")


def _parts(config: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    names = ("predictor", "transform", "schedule", "volatility")
    return {name: given[name] if config[name] == EXTERNAL else from_config(config[name]) for name in names}


def _skeleton(parts: dict[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module with the state names of the model, and none of its behaviour; residuals only if the file has some."""
    skeleton = nn.Module()
    skeleton.process = ForwardProcess(parts["transform"], parts["schedule"], parts["volatility"])
    if isinstance(parts["predictor"], nn.Module):
        skeleton.predictor = parts["predictor"]
    if "residuals" in tensors:  # times, three moments, their errors; of any number of times
        skeleton.register_buffer("residuals", torch.empty(7, tensors["residuals"].numel() // 7))
    return skeleton


def _compare(skeleton: nn.Module, tensors: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    external = tuple(prefix for prefix, part in _PREFIXES if config[part] == EXTERNAL)
    # A network of this library takes the file's precision; one passed in keeps its own.
    compare(skeleton.state_dict(), tensors, lambda name: not name.startswith(external))


def compare(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], converts: Callable[[str], bool] = lambda _: False
) -> None:
    """Check that a file has the tensors that are expected.

    Args:
        expected: by name.
        tensors: the file's.
        converts: whether the tensor of this name takes any floating dtype.

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


def _some(names: Any) -> str:
    names = sorted(names)
    return ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def write(path: PathLike, tensors: Mapping[str, Any], description: dict[str, Any]) -> None:
    """Write tensors and a description to ``path``, all or nothing.

    Args:
        path: file to write or replace.
        tensors: by name; they may share memory, which the file does not keep.
        description: JSON-serialisable; the format version is added.
    """
    copies = {name: _writable(name, tensor) for name, tensor in tensors.items()}
    text = json.dumps({"format": FORMAT} | description, allow_nan=False)
    write_atomically(path, safetensors.torch.save(copies, {KEY: _signed(text, copies)}))


@contextmanager
def open_folder(path: PathLike, holds: str, what: str, resume: bool) -> Iterator[None]:
    """Make the folder of a run, and keep other processes out, see :func:`alone_in`.

    Args:
        path: the folder.
        holds: name of the file that a run continues from.
        what: what that file is, for the message.
        resume: whether it may be there.

    Raises:
        ValueError: it is there, and ``resume`` is False.
        BlockingIOError, OSError: as :func:`alone_in`.
    """
    folder = as_path("run_dir", path)
    with alone_in(folder, f"run_dir={str(path)!r}"):
        if not resume and (folder / holds).exists():
            raise ValueError(
                f"run_dir={str(path)!r} holds {what} and resume=False; choose another folder, or delete it."
            )
        yield


@contextmanager
def alone_in(path: PathLike, name: str) -> Iterator[None]:
    """Make a folder, keep other processes out, and clear away what one that was killed has left.

    The lock is the operating system's, on the file ``.lock``: it ends with the process, however that ends.

    Args:
        path: the folder.
        name: what messages call it.

    Raises:
        BlockingIOError: another process, or another call of this one, is at work in the folder.
        OSError: the folder cannot be made, or not be written to.
    """
    folder = Path(path)
    lock = FileLock(folder / ".lock")
    try:
        with _writing(folder):
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
    """Remove the temporary files that a process left which was killed in :func:`write_atomically`.

    Args:
        folder: where they are.
        name: of the file that was written, a pattern.
    """
    for leftover in folder.glob(f".{name}.{'[0-9a-f]' * 32}.tmp"):
        leftover.unlink(missing_ok=True)


def write_atomically(path: PathLike, data: bytes) -> None:
    """Replace the file at ``path`` by ``data``; a failure or a crash leaves the old file as it was.

    Raises:
        OSError: it cannot be written.
    """
    path = as_path("path", path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with _writing(path):
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # in a folder that cannot be written to there is none
                temporary.unlink(missing_ok=True)
            raise
    if os.name == "posix":  # the rename itself, too, is on the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def append(path: PathLike, line: bytes) -> None:
    """Add a line to the end of a file, which a failure leaves as it was; a kill may leave a part of the line.

    Raises:
        OSError: it cannot be written.
    """
    with _writing(Path(path)), Path(path).open("ab", buffering=0) as file:
        before, rest = file.tell(), memoryview(line)
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(before)
            raise


_FULL = "free some space or write elsewhere"
_CURES = {errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.EFBIG: _FULL, errno.ENOENT: "make its folder first"}


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """The system's errors name this path, not a temporary file or none, and say what to do."""
    try:
        yield
    except Timeout:  # of the lock
        raise
    except OSError as error:
        cure = _CURES.get(error.errno or 0, "make the place writable or write elsewhere")
        raise OSError(error.errno, f"{error.strerror or error}: nothing was changed; {cure}", str(path)) from error


def read(path: PathLike, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what :func:`write` wrote.

    Args:
        path: the file.
        kind: "model" or "training", what it must hold.

    Returns:
        The description and the tensors, on the CPU.

    Raises:
        CheckpointError: not a file of this library, damaged, of a newer format, or of another kind.
    """
    with as_path("path", path).open("rb"):
        pass  # a missing or unreadable file is the system's own error
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Cloned: the file may be replaced while the tensors live.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({error}); it is damaged or foreign."
        ) from error
    text = metadata.get(KEY)
    if text is None:
        raise CheckpointError(f"{path}: a safetensors file, but not written by this library (no {KEY!r} metadata).")
    try:
        description = parse(text)
        digest, found = description.pop("sha256"), (description["format"], description["kind"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the description is no JSON object of this library's kind ({error}).") from error
    if text != _signed("{" + text[len(_signature(digest)) :], tensors):
        raise CheckpointError(f"{path}: the checksum does not match; the file was damaged or edited.")
    if found[0] != FORMAT:
        raise CheckpointError(f"{path}: format {found[0]!r}, this version reads format {FORMAT}; update the library.")
    if found[1] != kind:
        hint = "; fit(run_dir=...) resumes it; its model is in model.safetensors" if kind == "model" else ""
        raise CheckpointError(f"{path}: holds a {found[1]!r}, expected a {kind!r}{hint}.")
    return description, tensors


def parse(text: str | bytes) -> Any:
    """Read JSON whose numbers are finite.

    Raises:
        ValueError: it is no JSON, or has a NaN or an infinity.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, parse_constant=_finite, parse_float=_finite, parse_int=_whole)


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"the number {number} is not finite")
    return value


def _whole(number: str) -> int:
    _finite(number)
    return int(number)


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
    return _signature(_digest(text, tensors)) + text[1:]


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memory(tensor))
    return digest.hexdigest()


def memory(tensor: Tensor) -> Any:
    """The tensor's memory, for hashing."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
