"""Arrays in files: npy, npz and idx; and which axis of an array of images holds the channels."""

import gzip
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ndm_ct.files.rows import Rows, raise_if_damaged, validate_finite
from ndm_ct.storage.atomic import PathLike

__all__ = ["array_rows", "idx", "levels_of_images", "npy", "npz"]


def npy(path: Path) -> np.ndarray:
    """The array of an npy file, mapped into memory.

    Raises:
        ValueError: the file is damaged, or holds Python objects.
    """
    return raise_if_damaged(path, lambda: np.load(path, mmap_mode="r", allow_pickle=False))


def npz(path: Path, name: str | None) -> np.ndarray:
    """An array of an npz file.

    Args:
        path: the file.
        name: of the array; None if the file has only one.

    Raises:
        ValueError: the file is damaged, has no such array, or has several and none is named.
    """

    def reading() -> dict[str, np.ndarray]:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {key: file[key] for key in file.files if name in (None, key) or name not in file.files}

    arrays = raise_if_damaged(path, reading)
    if name is None and len(arrays) == 1:
        return next(iter(arrays.values()))
    if name not in arrays:
        wanted = "" if name is None else f", and no {name!r}"
        raise ValueError(f"{path} holds the arrays {', '.join(sorted(arrays))}{wanted}; name one of them.")
    return arrays[name]


def idx(path: Path) -> np.ndarray:
    """An array in the idx format, plain or gzipped.

    Raises:
        ValueError: the values are not unsigned bytes, or the file is cut off.
    """
    opener = gzip.open if path.suffix.lower() == ".gz" else open

    def reading() -> np.ndarray:
        with opener(path, "rb") as file:
            zero, kind, ndim = struct.unpack(">HBB", file.read(4))
            if zero != 0 or kind != 8:
                raise ValueError(f"not an idx file of unsigned bytes: it starts with {zero}, {kind}")
            shape = struct.unpack(f">{ndim}I", file.read(4 * ndim))
            values = np.frombuffer(file.read(), np.uint8)
        if values.size != np.prod(shape):
            raise ValueError(f"cut off: {values.size} values, its header says {shape}")
        return values.reshape(shape)

    return raise_if_damaged(path, reading)


def array_rows(array: np.ndarray, path: Path, *, gaps: bool = False) -> Rows:
    """The rows of an array: levels if it holds images of unsigned bytes, else floats.

    Args:
        array: ``(N, *E)``. Arrays of four axes are images, of three axes too if they hold unsigned bytes.
        path: its file, for messages.
        gaps: whether values may be NaN or infinite.

    Raises:
        ValueError: no rows, values that are not numbers, or that are NaN or infinite.
    """
    if array.ndim < 1 or len(array) == 0:
        raise ValueError(f"{path} holds an array of shape {array.shape}; expected rows (N, *E).")
    notes: tuple[str, ...] = ()
    if array.ndim == 4:
        last = _has_channels_last(array.shape)
        channels, height, width = array.shape[3:] + array.shape[1:3] if last else array.shape[1:]
        notes = (
            f"images of {height} x {width} pixels, channels {'last' if last else 'first'} in the file: {channels}",
        )
    if array.dtype == np.uint8 and array.ndim > 2:
        return Rows(levels_of_images(array, path), levels=256, notes=notes)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{path} holds values of dtype {array.dtype}, expected real numbers or uint8 levels.")
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    if array.ndim == 4 and _has_channels_last(array.shape):
        array = array.transpose(0, 3, 1, 2)
    array = array[:, None] if array.ndim == 1 else array
    return Rows(array if gaps else validate_finite(array, path), notes=notes)


def levels_of_images(array: np.ndarray, path: PathLike) -> Tensor:
    """Images of unsigned bytes as ``(N, C, H, W)``, whatever the place of the channels.

    Args:
        array: ``(N, H, W)``, ``(N, H, W, C)`` or ``(N, C, H, W)``.
        path: its file, for messages.

    Raises:
        ValueError: another dtype or shape.
    """
    if array.dtype != np.uint8:
        raise ValueError(f"{path} holds images of dtype {array.dtype}, expected uint8 levels 0 ... 255.")
    pixels = torch.as_tensor(np.array(array))
    if pixels.ndim == 3:
        return pixels[:, None]
    if pixels.ndim == 4:
        return pixels.permute(0, 3, 1, 2).contiguous() if _has_channels_last(array.shape) else pixels
    raise ValueError(f"{path} holds an array of shape {array.shape}, expected (N, H, W), (N, H, W, C) or (N, C, H, W).")


def _has_channels_last(shape: tuple[int, ...]) -> bool:
    """Whether ``(N, a, b, c)`` is read as height, width and channels.

    One or three channels are found on either side. Otherwise the two sides of a square are height and width, and up to
    four entries are channels; what remains is read as ``(N, C, H, W)``.
    """
    _, a, b, c = shape
    if c in (1, 3) or a in (1, 3):
        return c in (1, 3)
    if a == b or b == c:
        return a == b != c
    return c <= 4 < a
