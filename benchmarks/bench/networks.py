"""The trained networks the benchmarks measure on, in ``benchmarks/weights``, and the recipe they come from.

They are ordinary diffusion models (F the identity), because that is what the peers can evaluate. Each file is smaller
than 1 MB. ``benchmarks/train_networks.py`` trains them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import ndm_ct
from ndm_ct import nn, schedules
from ndm_ct.quantisation import Quantisation

from . import data

FOLDER = Path(__file__).parents[1] / "weights"


@dataclass(frozen=True)
class Network:
    """A recipe: the untrained model, its data, and how long to train."""

    build: Callable[[], ndm_ct.NDM]
    data: Callable[[], data.Split]
    steps: int
    batch_size: int
    bins: Quantisation | None

    def test_rows(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """The first test rows as the model sees them, uniformly dequantised if they are integers."""
        rows = self.data().test[:count]
        if self.bins is None:
            return rows
        return self.bins.uniform(rows, torch.float32, generator or torch.Generator().manual_seed(0))


def _images(
    size: int, levels: int, gamma_min: float, std: float, *, gamma_max: float = 5.0, width: int = 16
) -> Callable[[], ndm_ct.NDM]:
    def build() -> ndm_ct.NDM:
        predictor = nn.Preconditioned(nn.UNet(1, width=width, levels=levels), data_std=std)
        return ndm_ct.NDM(predictor, (1, size, size), schedule=schedules.LinearLogSNR(gamma_min, gamma_max))

    return build


def _casp() -> ndm_ct.NDM:
    return ndm_ct.NDM(nn.Preconditioned(nn.MLP(10, width=112)), (10,), schedule=schedules.LinearLogSNR(-9.0, 5.0))


NETWORKS = {
    "digits": Network(_images(8, 2, -8.0, 0.75), data.digits, 4000, 64, Quantisation(17)),
    "fashion": Network(
        _images(16, 2, -12.0, 0.7), lambda: data.images("fashion-mnist", 16), 6000, 128, Quantisation(256)
    ),
    "mnist-28": Network(
        _images(28, 3, -9.0, 0.62, gamma_max=7.0, width=12), lambda: data.images("mnist"), 8000, 64, Quantisation(256)
    ),
    "fashion-28": Network(
        _images(28, 3, -9.0, 0.7, gamma_max=7.0, width=12),
        lambda: data.images("fashion-mnist"),
        8000,
        64,
        Quantisation(256),
    ),
    "casp": Network(_casp, data.casp, 8000, 256, None),
}


def load(name: str) -> ndm_ct.NDM:
    """A trained network."""
    path = FOLDER / f"{name}.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; train it with: python benchmarks/train_networks.py {name}")
    return ndm_ct.load(path)


def train(name: str, run_dir: Path) -> None:
    """Train one network and write it."""
    recipe = NETWORKS[name]
    torch.manual_seed(0)
    model, split = recipe.build(), recipe.data()
    result = ndm_ct.fit(
        model, split.train, steps=recipe.steps, batch_size=recipe.batch_size, lr=2e-3, quantisation=recipe.bins,
        validation=split.test[:1000], run_dir=run_dir / name, progress=False,
    )  # fmt: skip
    FOLDER.mkdir(exist_ok=True)
    ndm_ct.save(model, FOLDER / f"{name}.safetensors")
    print(name, result.validation[-1])
