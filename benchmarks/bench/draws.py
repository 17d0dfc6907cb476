"""Samples of image models at a number of network evaluations, and their distances from real images, kept in files."""

import argparse
import hashlib
import io
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ndm_ct
from ndm_ct import nn, schedules, transforms
from ndm_ct._core.seeds import make_generator
from ndm_ct.quantisation import Quantisation
from ndm_ct.storage import write_atomically

from . import data, features, metrics, networks, schedulers
from .runs import read_json, write_json

COMMITTED = {
    ("digits", 8): "digits", ("fashion-mnist", 16): "fashion", ("mnist", 28): "mnist-28",
    ("fashion-mnist", 28): "fashion-28",
}  # fmt: skip
"""The network that is measured unless ``--models`` says otherwise, by data and size."""


@dataclass(frozen=True)
class Sampler:
    """How samples are drawn: ``method``, ``grid`` and ``denoise`` of ``ndm_ct.sample``, or a scheduler of diffusers."""

    name: str
    method: str = ""
    grid: str = "uniform"
    denoise: bool = False
    scheduler: schedulers.Scheduler | None = None


@dataclass(frozen=True)
class Model:
    """A network under its label, and the digest of its file."""

    label: str
    model: ndm_ct.NDM
    source: str
    sha256: str

    @property
    def described(self) -> dict[str, Any]:
        """What a report says about it."""
        net = self.model
        return {
            "source": self.source, "sha256": self.sha256, "parameters": sum(p.numel() for p in net.parameters()),
            "prediction": net.prediction, "transform": type(net.transform).__name__,
            "schedule": type(net.schedule).__name__, "t_min": net.t_min,
            "sigma_at_t_min": float(net.schedule.sigma(torch.tensor(net.t_min, dtype=torch.float64))),
        }  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One draw: everything that determines the samples."""

    model: Model
    sampler: Sampler
    steps: int
    seed: int


@dataclass(frozen=True)
class Drawn:
    """The samples of a cell as levels ``(N, C, H, W)``, uint8, their cost, and a digest of their initial noise."""

    images: Tensor
    nfe: int
    seconds: float
    noise: str


def parse_sampler(name: str) -> Sampler:
    """A sampler by its name on the command line."""
    if name.startswith(schedulers.PREFIX):
        return Sampler(name, scheduler=schedulers.parse(name))
    place, plus, option = name.partition("+")
    if plus and option != "denoise":
        raise ValueError(f"--samplers: {name!r} has the option {option!r}; there is only denoise.")
    method, _, grid = place.partition("@")
    return Sampler(name, method, grid or "uniform", denoise=bool(plus))


def draw(
    model: ndm_ct.NDM, sampler: Sampler, n: int, budget: int, generator: torch.Generator
) -> tuple[Tensor, int, Tensor]:
    """n samples, the network evaluations each took (at most ``budget``), and the prior draw they began with."""
    if sampler.scheduler is not None:
        drawn = sampler.scheduler.draw(model, n, budget, generator)
        return drawn.x, drawn.nfe, drawn.z
    x, info = ndm_ct.sample(
        model, n, method=sampler.method, nfe=budget, grid=sampler.grid, denoise=sampler.denoise, generator=generator,
        return_info=True,
    )  # fmt: skip
    return x, info.nfe, info.z


def generators(seed: int, count: int, batch: int) -> Iterator[tuple[int, torch.Generator]]:
    """Batch sizes that add up to ``count``, each with a generator that depends on seed and place alone."""
    for place, start in enumerate(range(0, count, batch)):
        yield min(batch, count - start), make_generator(seed, place)


def levels_of(x: Tensor, bins: Quantisation) -> Tensor:
    """The levels of real-valued samples: the bin each value lies in, the outermost ones for values beyond."""
    return bins.nearest(x).to(torch.uint8)


class Store:
    """Files of a run: one per draw and one per comparison, named by everything that determines them.

    ``shared`` are the settings that determine every draw: number of samples, batches, levels, versions.
    """

    def __init__(self, folder: Path, shared: dict[str, Any]) -> None:
        self.folder, self.shared = folder, shared
        for part in ("samples", "scores"):
            (folder / part).mkdir(parents=True, exist_ok=True)

    def key(self, cell: Cell) -> str:
        """Digest of everything that determines the samples."""
        return _digest(self.shared | {
            "model": cell.model.sha256, "sampler": cell.sampler.name, "steps": cell.steps, "seed": cell.seed,
        })  # fmt: skip

    def samples(self, cell: Cell) -> Path:
        """File of a draw."""
        return self.folder / "samples" / f"{self.key(cell)}.npz"

    def read(self, cell: Cell) -> Drawn | None:
        """A draw, or None if it was not made yet."""
        path = self.samples(cell)
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as file:
            return Drawn(torch.as_tensor(file["images"]), **json.loads(str(file["record"])))

    def write(self, cell: Cell, drawn: Drawn) -> None:
        """Keep a draw."""
        buffer, record = io.BytesIO(), {"nfe": drawn.nfe, "seconds": drawn.seconds, "noise": drawn.noise}
        np.savez_compressed(buffer, images=drawn.images.numpy(), record=np.array(json.dumps(record)))
        write_atomically(self.samples(cell), buffer.getvalue())


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Yardstick:
    """A feature network with the reference it compares with."""

    network: features.FeatureNetwork
    reference: metrics.Reference
    reference_sha256: str
    neighbours: int
    store: Store

    def compare(self, name: str, images: Tensor) -> dict[str, Any]:
        """Scores of images, computed once; ``name`` stands for the images."""
        comparison = {
            "features": self.network.fingerprint, "reference": self.reference_sha256, "neighbours": self.neighbours,
            "metrics": [metrics.PARTS, metrics.BLOCKS, metrics.NEIGHBOUR_ROWS],
        }  # fmt: skip
        path = self.store.folder / "scores" / f"{name}-{_digest(comparison)}.json"
        if not path.exists():
            scores = metrics.score(self.network(images), self.reference, neighbours=self.neighbours)
            write_json(path, asdict(scores))
        return read_json(path)

    def row(self, cell: Cell, drawn: Drawn) -> dict[str, Any]:
        """The line of a cell in the results."""
        return {
            "model": cell.model.label, "sampler": cell.sampler.name, "steps": cell.steps, "nfe": drawn.nfe,
            "seed": cell.seed, "features": self.network.name, "metric": self.network.metric,
            **self.compare(self.store.key(cell), drawn.images), "seconds": drawn.seconds, "noise": drawn.noise,
        }  # fmt: skip

    def real(self, images: Tensor, count: int) -> dict[str, Any]:
        """Scores of other real images as if they were samples: the distance that is left to a perfect model."""
        chosen = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]]
        scores = {"samples": len(chosen)}
        if len(chosen) < 2 * metrics.BLOCKS:
            return scores
        return scores | self.compare(f"real-{data.fingerprint(chosen)[:16]}", chosen)


def make(cell: Cell, store: Store, count: int, batch: int, bins: Quantisation) -> Drawn:
    """The samples of a cell, from the store or drawn."""
    known = store.read(cell)
    if known is not None:
        return known
    images, noise, nfe, start = [], hashlib.sha256(), set(), time.perf_counter()
    for size, random in generators(cell.seed, count, batch):
        x, evaluations, z = draw(cell.model.model, cell.sampler, size, cell.steps, random)
        if not bool(torch.isfinite(x).all()):
            raise RuntimeError(f"{cell.sampler.name} at {cell.steps} steps returned values that are not finite.")
        images.append(levels_of(x, bins))
        noise.update(z.contiguous().numpy().tobytes())
        nfe.add(evaluations)
    (evaluations,) = nfe
    drawn = Drawn(torch.cat(images), evaluations, time.perf_counter() - start, noise.hexdigest()[:16])
    store.write(cell, drawn)
    return drawn


def load_model(name: str) -> Model:
    """A committed network by name, a checkpoint, or ``LABEL=`` either."""
    label, _, source = name.rpartition("=")
    if source in networks.NETWORKS:
        networks.load(source)  # if it is missing, the error says how to train it
        return _loaded(label or "DDPM", networks.FOLDER / f"{source}.safetensors", source)
    if not Path(source).is_file():
        known = ", ".join(networks.NETWORKS)
        raise FileNotFoundError(f"--models: {source!r} is neither a file, nor 'train', nor one of {known}.")
    return _loaded(label or Path(source).stem, Path(source), source)


def _loaded(label: str, path: Path, source: str) -> Model:
    model = ndm_ct.load(path)
    model.requires_grad_(False)
    return Model(label, model, source, hashlib.sha256(path.read_bytes()).hexdigest())


def load_models(options: argparse.Namespace, split: data.Split, bins: Quantisation) -> list[Model]:
    """The models asked for, in that order.

    Raises:
        ValueError: unknown names, labels that come twice, or a model of images of another shape.
    """
    shape = tuple(split.train.shape[1:])
    models: list[Model] = []
    committed = COMMITTED.get((options.data, shape[-1]), "train")
    training = options.out, split, bins, options.train_steps, not options.quiet
    for name in options.models or [committed]:
        if name == "train":
            models += trained(*training)
        elif name == "map" and committed == "train":
            raise ValueError(f"--models map: there is no committed network of {options.data} to distil.")
        elif name == "map":
            models += [load_model(committed), distilled(committed, *training)]
        else:
            models.append(load_model(name))
    labels = [model.label for model in models]
    if len(set(labels)) < len(labels):
        raise ValueError(f"--models: labels come twice in {', '.join(labels)}; name them as LABEL=PATH.")
    for model in models:
        if model.model.event_shape != shape:
            raise ValueError(
                f"the model {model.label} makes images of shape {model.model.event_shape}, the data have {shape}; "
                "choose --size, --data or --models to agree."
            )
    return models


def untrained(kind: str, shape: tuple[int, ...], std: float, seed: int = 0) -> ndm_ct.NDM:
    """A network to train: "DDPM", "NDM-x" or "NDM-moments", of about the same size, for data of deviation ``std``."""
    channels, side = shape[0], shape[-1]
    levels, width = 1, 16 if side <= 16 else 12
    while levels < 3 and side % 2 == 0 and side > 4:
        levels, side = levels + 1, side // 2
    schedule = schedules.LinearLogSNR(-8.0, 5.0) if shape[-1] <= 8 else schedules.LinearLogSNR(-9.0, 7.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "DDPM":  # wider, to have as many parameters as the others with their transform
            net = nn.UNet(channels, width=width + 2, levels=levels)
            return ndm_ct.NDM(nn.Preconditioned(net, data_std=std), shape, schedule=schedule)
        head = kind.removeprefix("NDM-")
        transform = transforms.Separable(nn.UNet(channels, width=width // 2, levels=levels, outputs=2, time=False))
        net = nn.UNet(channels, width=width, levels=levels, outputs=2 if head == "moments" else None)
        predictor = nn.Preconditioned(net, prediction=head, data_std=std)
        return ndm_ct.NDM(predictor, shape, transform=transform, schedule=schedule, prediction=head)


def trained(out: Path, split: data.Split, bins: Quantisation, steps: int, progress: bool) -> Iterator[Model]:
    """The three models of ``untrained``, trained or continued in ``out/models``."""
    shape = tuple(split.train.shape[1:])
    std = float(bins.centres(split.train[:5000], torch.float32).std())
    for kind in ("DDPM", "NDM-x", "NDM-moments"):
        model = untrained(kind, shape, std)
        yield _trained(model, kind, out, split, bins, steps, progress, f"trained for {steps} steps")


def distilled(name: str, out: Path, split: data.Split, bins: Quantisation, steps: int, progress: bool) -> Model:
    """The flow map of a committed network, distilled or continued in ``out/models``."""
    teacher = load_model(name).model
    model, objective, _ = ndm_ct.presets.consistency_trajectory(teacher)
    source = f"the network {name}, distilled for {steps} steps"
    return _trained(model, "map", out, split, bins, steps, progress, source, objective=objective, lr=1e-3)


def _trained(
    model: ndm_ct.NDM, label: str, out: Path, split: data.Split, bins: Quantisation, steps: int, progress: bool,
    source: str, **options: Any,
) -> Model:  # fmt: skip
    folder = out / "models" / label
    result = ndm_ct.fit(
        model, split.train, steps=steps, batch_size=min(64, len(split.train)), quantisation=bins, run_dir=folder,
        progress=progress, log_every=max(1, min(100, steps // 10)), **{"lr": 2e-3, **options},
    )  # fmt: skip
    if not result.finished:  # Ctrl-C, which a training turns into a checkpoint
        raise KeyboardInterrupt
    return _loaded(label, folder / "model.safetensors", source)
