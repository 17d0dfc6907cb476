"""Folders of pictures, read as levels the way a viewer shows them, and pictures written."""

import io
import math
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ndm_ct.files.rows import Rows, raise_if_damaged
from ndm_ct.storage.atomic import PathLike, write_atomically

__all__ = ["image_rows", "pictures", "write_picture"]

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm")
"""Endings of the files of an image folder."""

_DEEP = ("I", "I;16", "I;16B", "I;16L")
"""Pillow's modes of grey pictures with more than eight bits."""


def image_rows(folder: Path) -> Rows:
    """All pictures below a folder as levels ``(N, C, H, W)``, in the order of their names.

    Raises:
        FileNotFoundError, ValueError, ImportError: as :func:`pictures`.
        ValueError: the pictures have several sizes, or some have 8 and some 16 bits.
    """
    images, files = pictures(folder)
    for what, found in (
        ("shapes", [tuple(image.shape[1:]) for image in images]),
        ("numbers of bits", [8 if image.dtype == torch.uint8 else 16 for image in images]),
    ):
        other = next((place for place, each in enumerate(found) if each != found[0]), None)
        if other is not None:
            raise ValueError(
                f"the images in {str(folder)!r} have {len(set(found))} different {what}: {files[0].name} has "
                f"{found[0]}, {files[other].name} has {found[other]}; bring them to one size and one kind."
            )
    notes = [f"{len(images)} images of {images[0].shape[0]} channels, {images[0].shape[1]} x {images[0].shape[2]}"]
    left_out = Counter(
        file.suffix.lower() or "no ending" for file in _visible(folder) if file.suffix.lower() not in PICTURES
    )
    if left_out:
        notes.append(
            "files left out by their ending: "
            + ", ".join(f"{count} of {ending}" for ending, count in sorted(left_out.items()))
        )
    return Rows(torch.stack(images), levels=256 if images[0].dtype == torch.uint8 else 2**16, notes=tuple(notes))


def pictures(folder: Path) -> tuple[list[Tensor], list[Path]]:
    """All pictures below a folder as levels ``(C, H, W)``, in the order of their names; hidden files are skipped.

    All have one channel if all are grey, however they are stored; otherwise all have three. Transparent pixels are
    white. Grey pictures of 16 bits keep their levels, as int32.

    Raises:
        FileNotFoundError: the folder has no pictures.
        ValueError: a picture cannot be read, has colours of 16 bits, or several frames.
        ImportError: Pillow is missing.
    """
    _pillow()
    files = [file for file in _visible(folder) if file.suffix.lower() in PICTURES]
    if not files:
        raise FileNotFoundError(f"{str(folder)!r} holds no images ({', '.join(PICTURES)}).")
    images = [raise_if_damaged(file, partial(_levels, file)) for file in files]
    if all(len(pixels) == 1 or bool((pixels == pixels[:1]).all()) for pixels in images):
        return [pixels[:1] for pixels in images], files
    return [pixels.expand(3, -1, -1) for pixels in images], files


def write_picture(path: PathLike, x: Tensor, levels: int | None) -> None:
    """Write images as one png, side by side in a square with white lines between them.

    Args:
        path: the file to write or replace.
        x: images ``(N, C, H, W)`` of one or three channels.
        levels: number L of their levels: grey 0 ... 255 stands for 0 ... L-1. None is for real values: the lowest
            value of all images becomes black, the highest white.

    Raises:
        ValueError: another number of channels.
        ImportError: Pillow is missing.
    """
    image = _pillow()
    if x.shape[1] not in (1, 3):
        raise ValueError(f"a png has one or three channels, these images have {x.shape[1]}; write npz.")
    x = x.double()
    low, high = (0.0, levels - 1.0) if levels else (float(x.min()), float(x.max()))
    x = ((x - low) / max(high - low, 1e-12) * 255.0).round().to(torch.uint8)
    across = math.ceil(math.sqrt(len(x)))
    blank = x.new_full((across * -(-len(x) // across) - len(x), *x.shape[1:]), 255)
    tiles = torch.nn.functional.pad(torch.cat([x, blank]), (1, 1, 1, 1), value=255)
    tiles = tiles.unflatten(0, (-1, across)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    data = io.BytesIO()
    image.fromarray(tiles.squeeze(-1).numpy()).save(data, format="png")
    write_atomically(path, data.getvalue())


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("pictures need Pillow: pip install 'ndm-ct[files]'.") from error
    return Image


def _visible(folder: Path) -> list[Path]:
    """The files below a folder, without hidden ones and those that macOS adds to archives."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(p.startswith((".", "__MACOSX")) for p in file.relative_to(folder).parts)
    )


def _levels(file: Path) -> Tensor:
    """Levels of a picture, turned as its camera was held: uint8 of one or three channels, or int32 of one."""
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        frames = getattr(opened, "n_frames", 1)
        if frames > 1:
            raise ValueError(f"it has {frames} frames, expected one; save each as a file of its own")
        deep = opened.mode in _DEEP
        if opened.mode == "F" or (not deep and "16" in str(opened.tile)):
            raise ValueError(
                f"pixels of mode {opened.mode} with more than 8 bits; convert it to 8 bits, to grey of 16 bits, or "
                "save all images as one npy array"
            )
        picture = ImageOps.exif_transpose(opened)
        if deep:
            pixels = np.array(picture).astype(np.int64)
            if pixels.min() < 0 or pixels.max() >= 2**16:
                raise ValueError(f"levels from {pixels.min()} to {pixels.max()}, expected 16 bits, 0 to 65535")
            return torch.as_tensor(pixels.astype(np.int32))[None]
        if picture.mode == "1":
            picture = picture.convert("L")
        elif picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        if picture.mode != "L":
            picture = picture.convert("RGB")
        levels = torch.as_tensor(np.array(picture))
    return levels[None] if levels.ndim == 2 else levels.permute(2, 0, 1)
