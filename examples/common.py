"""What examples share: a model whose flow is smooth and known, trained networks, counted draws, files, pictures."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import ndm_ct
from benchmarks import data, networks
from ndm_ct import schedules
from ndm_ct.quantisation import Quantisation
from ndm_ct.reference import GaussianMixture

__all__ = ["IMAGE_NETWORKS", "ORDERS", "counted", "image_network", "mixture", "rms", "save", "show", "slope"]

IMAGE_NETWORKS = ("digits", "fashion", "mnist-28", "fashion-28")
"""Names of :func:`image_network`."""

ORDERS = {
    "euler": 1, "ddim": 1,
    "midpoint": 2, "heun": 2, "edm": 2, "deis1": 2, "dpmpp_2s": 2, "dpmpp_2m": 2, "pndm": 2, "ipndm": 2,
    "deis2": 3, "dpmpp_3m": 3, "unipc": 3,
    "rk4": 4, "deis3": 4, "unipc3": 4,
}  # fmt: skip
"""Every deterministic sampler on a grid, with the order of its steps once it has a history."""


def mixture(schedule: schedules.Schedule) -> GaussianMixture:
    """Five rotated, anisotropic Gaussians in four dimensions, near enough for flows that bend and do not tear."""
    generator = torch.Generator().manual_seed(9)
    factors = 0.3 * torch.randn(5, 4, 4, dtype=torch.float64, generator=generator)
    covs = factors @ factors.mT + 0.04 * torch.eye(4, dtype=torch.float64)
    means = torch.randn(5, 4, dtype=torch.float64, generator=generator)
    return GaussianMixture(torch.arange(1.0, 6.0) / 15.0, means, covs, schedule=schedule)


def image_network(name: str) -> tuple[ndm_ct.NDM, data.Split, Quantisation]:
    """A trained network of images, its data and their bins."""
    model, recipe = networks.load(name).requires_grad_(False), networks.NETWORKS[name]
    assert recipe.bins is not None
    return model, recipe.data(), recipe.bins


def show(axis: Axes, image: Tensor) -> None:
    """Draw an image ``(1, H, W)`` with grey levels from -1 to 1, without ticks."""
    axis.imshow(image[0].numpy(), cmap="gray", vmin=-1.0, vmax=1.0)
    axis.set_xticks([])
    axis.set_yticks([])


class _Counting(torch.nn.Module):
    """A predictor that counts the rows it has seen."""

    def __init__(self, predictor: Any) -> None:
        super().__init__()
        self.predictor, self.rows = predictor, 0

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        self.rows += len(z)
        return self.predictor(z, t)


def counted(model: ndm_ct.NDM, rows: int, seed: int, **options: Any) -> tuple[Tensor, float]:
    """Samples in float64, and the network evaluations that one of them took on average.

    The same seed begins at the same noise, whatever the method. ``options`` are those of ``ndm_ct.sample``.
    """
    network = _Counting(model.predictor)
    model = ndm_ct.NDM(
        network, model.event_shape, schedule=model.schedule, prediction=model.prediction, prior=model.prior,
        t_min=model.t_min,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    x = ndm_ct.sample(model, rows, generator=generator, dtype=torch.float64, **options)
    return x, network.rows / rows


def rms(difference: Tensor) -> float:
    """Root of the mean square, over samples and coordinates."""
    return float(difference.square().mean().sqrt())


def slope(cheap: tuple[float, float], dear: tuple[float, float]) -> float:
    """The p of an error that falls as cost^-p, from two pairs (cost, error)."""
    return math.log(cheap[1] / dear[1]) / math.log(dear[0] / cheap[0])


def save(out: Path, name: str, figure: Figure, report: dict[str, Any]) -> dict[str, Any]:
    """Write ``name.png`` and ``name.json`` and say what was read off; the report, with the versions."""
    report |= {"versions": {"torch": torch.__version__}}
    figure.savefig(out / f"{name}.png", dpi=110)
    (out / f"{name}.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    print(f"\n{report['reading']}\n\n{report['seconds']:.0f} s; picture and numbers: {out}/{name}.png, .json")
    return report
