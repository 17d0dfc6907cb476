r"""Network evaluations per sample against the distance of the samples from real images.

    python benchmarks/steps_vs_fid.py                                   # digits, the committed network, 5 to 100 steps
    python benchmarks/steps_vs_fid.py --steps 1000,250,100,50,25,10,5   # longer
    python benchmarks/steps_vs_fid.py --models train --samplers ddpm,ddim,heun   # DDPM and two NDMs, trained here
    python benchmarks/steps_vs_fid.py --data mnist --samples 5000 --batch 100 --seeds 0,1,2 --steps 5,10,20,50 \
        --samplers unipc@karras+denoise,diffusers:UniPCMultistep+karras
    python benchmarks/steps_vs_fid.py --data mnist --samples 5000 --batch 100 --seeds 0 --steps 5,10,20,50 \
        --samplers unipc@karras+denoise --reference-steps 250 --features cnn,efficientnet-lite0
    python benchmarks/steps_vs_fid.py --data my_images/ --size 32 --models my.safetensors --features inception

A *cell* is a model, a sampler, a number of network evaluations and a seed. Its samples are drawn, rounded to integer
levels and kept; features of samples and of real images are compared (``benchmarks/metrics.py``). Run again, the same
command continues where it was stopped, at any moment, and computes nothing twice; another ``--features`` uses the same
samples. Kept files are named by all settings and by versions, not by code: after changing a sampler or a metric, delete
the folder samples or scores.

``--models``    a network of ``benchmarks/networks.py`` by name, a checkpoint, ``LABEL=`` either, or ``train``: a DDPM
                and Neural Diffusion Models with the heads "x" and "moments", trained in the output folder.
``--samplers``  ``METHOD`` or ``METHOD@GRID`` of ``ndm_ct.sample`` ("ddpm", "ddim", "heun@karras", ...), with
                ``+denoise`` behind it for the estimate of x in place of the last state; or a scheduler of diffusers
                (``benchmarks/schedulers.py``): ``diffusers:DPMSolverMultistep+karras``.
``--steps``     network evaluations per sample. A method of two evaluations per step takes half as many steps, and the
                number it really took is the column ``nfe``.
``--seeds``     of the initial noise, which is the same for all methods at the same seed (column ``noise``, a digest).

Distances carry the name of their features: ``FD(cnn)``, ``FD(efficientnet-lite0)``; only those of Inception are called
FID. ``fd`` is the plain value, too large by about a constant over the number of samples, ``fd_inf`` the extrapolation
that removes it, ``kid`` unbiased by itself. The entry ``real`` compares the rest of the real images with the reference:
what a perfect model would get.

Without ``+denoise`` our samplers return a draw at t_min, whose noise (standard deviation 0.011 to 0.018 for these
networks, where grey levels span -1 to 1) the rounding to levels leaves in, while most of diffusers' schedulers end at a
prediction of x. The two differ most where features see single levels.

Writes ``results.csv``, ``results.json`` (every setting, every cell, the means over seeds), ``plot.png`` and
``grids/*.png`` into ``--out``.
"""

import argparse
import csv
import hashlib
import importlib.metadata
import io
import json
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import data, features, metrics, networks, schedulers
from torch import Tensor
from tqdm import tqdm

import ndm_ct
from ndm_ct import nn, schedules, transforms
from ndm_ct.quantisation import Quantisation
from ndm_ct.storage import clear_leftovers, lock_folder, write_atomically

STEPS = "100,50,25,10,5"
SAMPLERS = "ddpm,ddim,dpmpp_2m,unipc@karras+denoise"
FEW_IMAGES = 1000
"""A test set smaller than this is no reference of its own."""

COMMITTED = {("digits", 8): "digits", ("fashion-mnist", 16): "fashion", ("mnist", 28): "mnist-28"} | {
    ("fashion-mnist", 28): "fashion-28"
}
"""The network that is measured unless ``--models`` says otherwise, by data and size."""

GRID_COLUMNS = 10


@dataclass(frozen=True)
class Sampler:
    """How samples are drawn.

    Args:
        name: as on the command line.
        method: of ``ndm_ct.sample``; unused with a scheduler.
        grid: of ``ndm_ct.sample``.
        denoise: of ``ndm_ct.sample``.
        scheduler: of diffusers, or None.
    """

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


@dataclass(frozen=True)
class Cell:
    """One draw: everything that determines the samples."""

    model: Model
    sampler: Sampler
    steps: int
    seed: int


@dataclass(frozen=True)
class Drawn:
    """The samples of a cell as levels ``(N, C, H, W)``, uint8, and what they cost."""

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
    """n samples, the network evaluations each took (at most ``budget``), and the prior draw they began with.

    The only place where samplers are called.
    """
    if sampler.scheduler is not None:
        drawn = sampler.scheduler.draw(model, n, budget, generator)
        return drawn.x, drawn.nfe, drawn.z
    x, info = ndm_ct.sample(
        model,
        n,
        method=sampler.method,
        nfe=budget,
        grid=sampler.grid,
        denoise=sampler.denoise,
        generator=generator,
        return_info=True,
    )
    return x, info.nfe, info.z


def generators(seed: int, count: int, batch: int) -> Iterator[tuple[int, torch.Generator]]:
    """Batch sizes that add up to ``count``, each with a generator that depends on seed and place alone."""
    for place, start in enumerate(range(0, count, batch)):
        word = np.random.SeedSequence((seed, place)).generate_state(1, np.uint64)[0]
        yield min(batch, count - start), torch.Generator().manual_seed(int(word))


def levels_of(x: Tensor, bins: Quantisation) -> Tensor:
    """The levels of real-valued samples: the bin each value lies in, the outermost ones for values beyond."""
    return bins.nearest(x).to(torch.uint8)


class Store:
    """What a run keeps: one file per draw and one per comparison, named by all that determines it.

    Args:
        folder: the output folder.
        shared: settings that determine every draw: number of samples, batches, levels, versions.
    """

    def __init__(self, folder: Path, shared: dict[str, Any]) -> None:
        self.folder, self.shared = folder, shared
        for part in ("samples", "scores"):
            (folder / part).mkdir(parents=True, exist_ok=True)

    def key(self, cell: Cell) -> str:
        """Digest of all that determines the samples."""
        return _digest(self.shared | {
            "model": cell.model.sha256, "sampler": cell.sampler.name, "steps": cell.steps, "seed": cell.seed,
        })  # fmt: skip

    def samples(self, cell: Cell) -> Path:
        """File of a draw."""
        return self.folder / "samples" / f"{self.key(cell)}.npz"

    def read(self, cell: Cell) -> Drawn | None:
        """A draw, if it was made."""
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

    def scores(self, name: str, comparison: dict[str, Any]) -> Path:
        """File of a comparison of the images ``name`` with a reference."""
        return self.folder / "scores" / f"{name}-{_digest(comparison)}.json"


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
        path = self.store.scores(name, comparison)
        if path.exists():
            return json.loads(path.read_text())
        scores = asdict(metrics.score(self.network(images), self.reference, neighbours=self.neighbours))
        write_atomically(path, json.dumps(scores, allow_nan=False).encode())
        return scores


def make(cell: Cell, store: Store, count: int, batch: int, bins: Quantisation) -> Drawn:
    """The samples of a cell, from the store or drawn."""
    known = store.read(cell)
    if known is not None:
        return known
    images, noise, nfe, start = [], hashlib.sha256(), set(), time.perf_counter()
    for size, generator in generators(cell.seed, count, batch):
        x, evaluations, z = draw(cell.model.model, cell.sampler, size, cell.steps, generator)
        if not bool(torch.isfinite(x).all()):
            raise RuntimeError(f"{cell.sampler.name} at {cell.steps} steps returned values that are not finite.")
        images.append(levels_of(x, bins))
        noise.update(z.contiguous().numpy().tobytes())
        nfe.add(evaluations)
    (evaluations,) = nfe
    drawn = Drawn(torch.cat(images), evaluations, time.perf_counter() - start, noise.hexdigest()[:16])
    store.write(cell, drawn)
    return drawn


def untrained(kind: str, shape: tuple[int, ...], std: float, seed: int = 0) -> ndm_ct.NDM:
    """A network to train: "DDPM", "NDM-x" or "NDM-moments", of about the same size.

    Args:
        kind: which.
        shape: of the images.
        std: standard deviation of the data.
        seed: of the initial weights.
    """
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
        predictor = nn.Preconditioned(net, head=head, data_std=std)
        return ndm_ct.NDM(predictor, shape, transform=transform, schedule=schedule, prediction=head)


KINDS = ("DDPM", "NDM-x", "NDM-moments")
"""What ``--models train`` trains."""


def trained(out: Path, split: data.Split, bins: Quantisation, steps: int, progress: bool) -> Iterator[Model]:
    """The three models, trained or continued in ``out/models``."""
    shape = tuple(split.train.shape[1:])
    std = float(bins.centres(split.train[:5000], torch.float32).std())
    for kind in KINDS:
        folder = out / "models" / kind
        result = ndm_ct.fit(
            untrained(kind, shape, std), split.train, steps=steps, batch_size=min(64, len(split.train)), lr=2e-3,
            quantisation=bins, run_dir=folder, progress=progress, log_every=max(1, min(100, steps // 10)),
        )  # fmt: skip
        if not result.finished:  # Ctrl-C, which a training turns into a checkpoint
            raise KeyboardInterrupt
        yield _loaded(kind, folder / "model.safetensors", f"trained for {steps} steps")


def _loaded(label: str, path: Path, source: str) -> Model:
    model = ndm_ct.load(path)
    model.requires_grad_(False)
    return Model(label, model, source, hashlib.sha256(path.read_bytes()).hexdigest())


def load_models(options: argparse.Namespace, split: data.Split, bins: Quantisation) -> list[Model]:
    """The models asked for, in that order.

    Raises:
        ValueError: unknown names, labels that come twice, a model of images of another shape.
    """
    side = split.train.shape[-1]
    names = options.models or [COMMITTED.get((options.data, side), "train")]
    models: list[Model] = []
    for name in names:
        if name == "train":
            models += trained(options.out, split, bins, options.train_steps, not options.quiet)
            continue
        label, _, source = name.rpartition("=")
        if source in networks.NETWORKS:
            networks.load(source)  # which says how to train it if it is missing
            models.append(_loaded(label or "DDPM", networks.FOLDER / f"{source}.safetensors", source))
            continue
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(
                f"--models: {source!r} is neither a file, nor 'train', nor one of {', '.join(networks.NETWORKS)}."
            )
        models.append(_loaded(label or path.stem, path, source))
    labels = [model.label for model in models]
    if len(set(labels)) < len(labels):
        raise ValueError(f"--models: labels come twice in {', '.join(labels)}; name them as LABEL=PATH.")
    for model in models:
        if model.model.event_shape != tuple(split.train.shape[1:]):
            raise ValueError(
                f"the model {model.label} makes images of shape {model.model.event_shape}, the data have "
                f"{tuple(split.train.shape[1:])}; choose --size, --data or --models to agree."
            )
    return models


def reference_images(split: data.Split, which: str | None) -> tuple[str, Tensor, Tensor]:
    """Which part of the real images is the reference, that part, and the other one."""
    which = which or ("test" if len(split.test) >= FEW_IMAGES else "train")
    return (which, split.test, split.train) if which == "test" else (which, split.train, split.test)


def summarise(rows: list[dict[str, Any]], reference_steps: int | None) -> list[dict[str, Any]]:
    """Means over seeds by model, sampler, steps and features.

    ``..._seeds_se`` is the standard error of the mean by the spread over seeds; ``fd_inf_se`` and ``kid_se`` are those
    of one cell by its own parts, which hold the uncertainty of the reference, too. ``excess`` is how far ``fd`` lies
    above that of the same sampler at the reference steps, seed by seed.
    """
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        key = row["features"], row["model"], row["sampler"], row["steps"]
        groups.setdefault(key, {})[row["seed"]] = row
    table = []
    for (name, model, sampler, steps), cells in groups.items():
        entry = {"features": name, "model": model, "sampler": sampler, "steps": steps, "seeds": len(cells)}
        entry |= {"nfe": next(iter(cells.values()))["nfe"]}
        for column in ("fd", "fd_inf", "kid"):
            entry |= _mean(column, [cell[column] for cell in cells.values()])
        for column in ("fd_inf_se", "kid_se"):
            entry[column] = float(np.sqrt(np.mean([cell[column] ** 2 for cell in cells.values()])))
        at_reference = groups.get((name, model, sampler, reference_steps), {})
        common = [seed for seed in cells if seed in at_reference]
        if reference_steps is not None and common:
            entry |= _mean("excess", [cells[seed]["fd"] - at_reference[seed]["fd"] for seed in common])
        table.append(entry)
    return table


def _mean(column: str, values: list[float]) -> dict[str, float | None]:
    spread = float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else None
    return {column: float(np.mean(values)), f"{column}_seeds_se": spread}


def to_csv(rows: list[dict[str, Any]]) -> str:
    """The cells as a table; an empty field is None."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def plot(summary: list[dict[str, Any]], labels: dict[str, str], path: Path, title: str) -> None:
    """Evaluations against the extrapolated distance and against KID, a row per feature network."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(entry["features"] for entry in summary))
    figure = Figure(figsize=(13, 4.2 * len(names)), layout="constrained")
    for name, axes in zip(names, figure.subplots(len(names), 2, squeeze=False), strict=True):
        entries = [entry for entry in summary if entry["features"] == name]
        for axis, column, label in ((axes[0], "fd_inf", f"{labels[name]}, extrapolated"), (axes[1], "kid", "KID")):
            _lines(axis, entries, column)
            axis.set(xlabel="network evaluations per sample", ylabel=label if column == "fd_inf" else f"KID({name})")
    handles, texts = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside right upper", fontsize=8)
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    write_atomically(path, buffer.getvalue())


def _lines(axis: Any, entries: list[dict[str, Any]], column: str) -> None:
    """One line per model and sampler, diffusers' dashed."""
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in entries:
        lines.setdefault((entry["model"], entry["sampler"]), []).append(entry)
    for (model, sampler), points in lines.items():
        points = sorted(points, key=lambda point: point["nfe"])
        theirs = sampler.startswith(schedulers.PREFIX)
        axis.errorbar(
            [point["nfe"] for point in points], [point[column] for point in points],
            yerr=[point[f"{column}_seeds_se"] or point[f"{column}_se"] for point in points],
            label=f"{model}, {sampler}", linestyle="--" if theirs else "-", marker="s" if theirs else "o",
            markersize=4, capsize=2,
        )  # fmt: skip
    lowest = min(entry[column] for entry in entries)
    if lowest > 0.0:
        axis.set_yscale("log")
    else:  # an unbiased distance may be negative: what is no larger than that is noise, drawn linearly
        axis.set_yscale("symlog", linthresh=max(-lowest, 1e-12))
    axis.set_xscale("log")
    ticks = sorted({entry["steps"] for entry in entries})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.grid(alpha=0.3)


def picture(rows: dict[str, Tensor], levels: int, path: Path, title: str) -> None:
    """A grid of images, one labelled row each."""
    from matplotlib.figure import Figure

    columns, (channels, height, width) = (
        max(len(images) for images in rows.values()),
        next(iter(rows.values())).shape[1:],
    )
    # One canvas with white lines between the images: an axis for each of them would take seconds to draw.
    canvas = torch.ones(len(rows) * (height + 1) - 1, columns * (width + 1) - 1, channels)
    for row, images in enumerate(rows.values()):
        for column, image in enumerate(images):
            top, left = row * (height + 1), column * (width + 1)
            canvas[top : top + height, left : left + width] = image.permute(1, 2, 0) / (levels - 1.0)
    figure = Figure(figsize=(0.7 * columns + 1.4, 0.7 * len(rows) + 0.5), layout="constrained")
    axis = figure.subplots()
    axis.imshow(canvas.numpy(), cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([(row + 0.5) * (height + 1) - 1.0 for row in range(len(rows))], list(rows), fontsize=8)
    axis.tick_params(length=0)
    axis.set_frame_on(False)
    figure.suptitle(title, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    write_atomically(path, buffer.getvalue())


def grids(cells: Iterable[Cell], store: Store, real: Tensor, levels: int, folder: Path) -> None:
    """A picture per model and sampler: the same noise at all numbers of steps, above it real images."""
    cells, folder = list(cells), Path(folder)
    folder.mkdir(exist_ok=True)
    for model, sampler in dict.fromkeys((cell.model.label, cell.sampler.name) for cell in cells):
        chosen = [cell for cell in cells if (cell.model.label, cell.sampler.name) == (model, sampler)]
        seed, rows = chosen[0].seed, {"real": real[:GRID_COLUMNS]}
        for cell in sorted((cell for cell in chosen if cell.seed == seed), key=lambda cell: -cell.steps):
            drawn = store.read(cell)
            assert drawn is not None
            rows[f"{cell.steps}"] = drawn.images[:GRID_COLUMNS]
        name = "".join(sign if sign.isalnum() or sign in "-_." else "-" for sign in f"{model}-{sampler}")
        picture(rows, levels, folder / f"{name}.png", f"{model}, {sampler}: network evaluations")


def table(summary: list[dict[str, Any]], labels: dict[str, str]) -> str:
    """Extrapolated distances for the terminal: a line per model and sampler, a column per number of steps."""
    lines = []
    for name, metric in labels.items():
        entries = [entry for entry in summary if entry["features"] == name]
        steps = sorted({entry["steps"] for entry in entries})
        found = {(entry["model"], entry["sampler"], entry["steps"]): entry for entry in entries}
        pairs = list(dict.fromkeys((entry["model"], entry["sampler"]) for entry in entries))
        width = max(len(f"{model}, {sampler}") for model, sampler in pairs) + 2
        lines += ["", f"{metric}, extrapolated", " " * width + "".join(f"{step:>10}" for step in steps)]
        for model, sampler in pairs:
            values = (found.get((model, sampler, step)) for step in steps)
            line = "".join(f"{value['fd_inf']:10.4g}" if value else " " * 10 for value in values)
            lines.append(f"{f'{model}, {sampler}':<{width}}{line}")
    return "\n".join(lines[1:])


def versions() -> dict[str, str]:
    """Of everything that can change a number."""
    found = {"python": platform.python_version(), "ndm_ct": ndm_ct.__version__}
    for package in ("torch", "numpy", "scikit-learn", "diffusers", "torchmetrics", "prdc"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def words(text: str) -> list[str]:
    """An option's values, separated by commas."""
    return [part for part in text.split(",") if part]


def numbers(text: str) -> list[int]:
    """An option's numbers, separated by commas."""
    return [int(part) for part in words(text)]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="digits", help="digits, mnist, fashion-mnist, or a path: idx, npz, folder of images")
    add("--size", type=int, help="average images down to this width and height; default: as they are")
    add("--models", type=words, help="names, files, LABEL=FILE or train, separated by commas; default: the committed "
        "network of these data, or train where there is none")  # fmt: skip
    add("--train-steps", type=int, default=4000, help="optimiser steps of each model of --models train (4000)")
    add("--samplers", type=words, default=words(SAMPLERS), help=f"separated by commas ({SAMPLERS})")
    add("--steps", type=numbers, default=numbers(STEPS), help=f"network evaluations per sample ({STEPS})")
    add("--reference-steps", type=int, help="also this many, and report how far the others lie above it")
    add("--features", type=words, default=["cnn"], help=f"of {', '.join(features.NETWORKS)}; several by commas (cnn)")
    add("--inception-weights", type=Path, help="file of Inception's weights; default: torch-fidelity downloads them")
    add("--classifier-steps", type=int, help="training steps of the features cnn; default: two epochs, at least 1000")
    add("--samples", type=int, default=1000, help="samples per cell (1000); more than features, or go by the KID")
    add("--seeds", type=numbers, default=[0], help="seeds of the noise, separated by commas (0)")
    add("--batch", type=int, default=250, help="samples drawn at a time (250); it determines the noise, too")
    add("--reference", choices=("test", "train"), help="real images compared with; default: test, or train where the "
        f"test set has fewer than {FEW_IMAGES} images")  # fmt: skip
    add("--neighbours", type=int, default=5, help="of precision, recall, density, coverage (5); 0 leaves them out")
    add("--out", type=Path, help="output folder; default: runs/steps_vs_fid/DATA")
    add("--cache", type=Path, help="folder of classifiers and real features; default: cache in the output folder")
    add("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    for name, least in (("samples", 2 * metrics.BLOCKS), ("batch", 1), ("train_steps", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}.")
    for name in ("steps", "seeds", "samplers", "features"):
        values = getattr(options, name)
        if not values or len(set(values)) < len(values):
            parser.error(f"--{name} must name at least one, and none twice; got {values}.")
    if min(options.steps) < 1 or min(options.seeds) < 0 or options.neighbours < 0:
        parser.error("--steps must be at least 1, --seeds and --neighbours at least 0.")
    if options.inception_weights is not None and "inception" not in options.features:
        parser.error("--inception-weights has no effect without --features inception.")
    name = Path(options.data).stem + (f"-{options.size}" if options.size else "")
    options.out = options.out or Path("runs/steps_vs_fid") / name
    options.cache = options.cache or options.out / "cache"
    return options


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Draw, compare, write, as the only process in the output folder; returns what ``results.json`` holds."""
    options = parse(arguments)
    with lock_folder(options.out, f"--out {options.out}"):
        for folder in options.out.rglob("*"):
            if folder.is_dir():
                clear_leftovers(folder)
        return measure(options)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Draw, compare, write, by the options of the command line."""
    samplers = [parse_sampler(name) for name in options.samplers]
    split = data.dataset(options.data, options.size)
    assert split.levels is not None
    bins = Quantisation(split.levels)
    which, real, other = reference_images(split, options.reference)
    nets = [
        features.load(
            name, split, options.cache, classifier_steps=options.classifier_steps if name == "cnn" else None,
            weights=options.inception_weights if name == "inception" else None,
        )
        for name in options.features
    ]  # fmt: skip
    models = load_models(options, split, bins)
    shared = {
        "samples": options.samples, "batch": options.batch, "levels": split.levels,
        "versions": {name: version for name, version in versions().items() if name in ("ndm_ct", "diffusers")},
    }  # fmt: skip
    store = Store(options.out, shared)
    sha256 = data.fingerprint(real)
    yardsticks = [
        Yardstick(
            net, metrics.Reference(features.extract(net, real, options.cache)), sha256, options.neighbours, store
        )
        for net in nets
    ]  # fmt: skip
    budgets = sorted({*options.steps, *([options.reference_steps] if options.reference_steps else [])}, reverse=True)
    cells = [
        Cell(model, sampler, steps, seed)
        for seed in options.seeds for model in models for sampler in samplers for steps in budgets
    ]  # fmt: skip
    _try_out(cells, store)
    report = {
        "settings": {name: _plain(value) for name, value in vars(options).items()},
        "versions": versions(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "data": {
            "source": options.data, "sha256": data.fingerprint(split.train, split.test), "levels": split.levels,
            "shape": list(split.train.shape[1:]), "train": len(split.train), "test": len(split.test),
            "reference": which,
        },
        "models": {model.label: _described(model) for model in models},
        "features": {
            net.name: {"metric": net.metric, "dimension": net.dimension, "sha256": net.fingerprint, **net.info}
            for net in nets
        },
        "metrics": {
            "extrapolation": f"{metrics.PARTS} sizes, {metrics.PARTS * (metrics.PARTS + 1) // 2} disjoint random parts",
            "kid_blocks": metrics.BLOCKS, "neighbour_rows": metrics.NEIGHBOUR_ROWS, "seed": 0,
        },
        "warnings": [
            f"{net.metric}: {warning}" for net in nets
            if (warning := metrics.too_small(options.samples, len(real), net.dimension))
        ],
        "real": _real(yardsticks, other, options.samples),
        "cells": [], "summary": [],
    }  # fmt: skip
    for warning in report["warnings"]:
        print(f"warning: {warning}", flush=True)
    with tqdm(cells, desc="cells", unit="cell", disable=options.quiet) as bar:
        for cell in bar:
            bar.set_postfix_str(f"{cell.model.label}, {cell.sampler.name}, {cell.steps} steps, seed {cell.seed}")
            drawn = make(cell, store, options.samples, options.batch, bins)
            report["cells"] += [_row(cell, drawn, yardstick) for yardstick in yardsticks]
            write_results(options.out, report, options.reference_steps)
    labels = {net.name: net.metric for net in nets}
    shape = "x".join(str(size) for size in split.train.shape[-2:])
    title = f"{Path(options.data).name}, {shape}, {options.samples} samples"
    plot(report["summary"], labels, options.out / "plot.png", title)
    grids(cells, store, real, split.levels, options.out / "grids")
    print(table(report["summary"], labels))
    print(f"results.csv, results.json, plot.png and grids/ in {options.out}/")
    return report


def _try_out(cells: list[Cell], store: Store) -> None:
    """One sample of every model and sampler still to be drawn: what cannot work says so before hours of what can."""
    fewest: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        key = cell.model.label, cell.sampler.name
        if not store.samples(cell).exists() and (key not in fewest or cell.steps < fewest[key].steps):
            fewest[key] = cell
    for cell in fewest.values():
        draw(cell.model.model, cell.sampler, 1, cell.steps, torch.Generator().manual_seed(0))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _described(model: Model) -> dict[str, Any]:
    net = model.model
    return {
        "source": model.source, "sha256": model.sha256, "parameters": sum(p.numel() for p in net.parameters()),
        "prediction": net.prediction, "transform": type(net.transform).__name__,
        "schedule": type(net.schedule).__name__, "t_min": net.t_min,
        "sigma_at_t_min": float(net.schedule.sigma(torch.tensor(net.t_min, dtype=torch.float64))),
    }  # fmt: skip


def _real(yardsticks: list[Yardstick], other: Tensor, count: int) -> dict[str, Any]:
    """The other part of the real data as if it were samples: the distance that is left to a perfect model."""
    images = other[torch.randperm(len(other), generator=torch.Generator().manual_seed(0))[:count]]
    if len(images) < 2 * metrics.BLOCKS:
        return {yardstick.network.name: {"samples": len(images)} for yardstick in yardsticks}
    name = f"real-{data.fingerprint(images)[:16]}"
    return {
        yardstick.network.name: {"samples": len(images), **yardstick.compare(name, images)} for yardstick in yardsticks
    }


def _row(cell: Cell, drawn: Drawn, yardstick: Yardstick) -> dict[str, Any]:
    scores = yardstick.compare(yardstick.store.key(cell), drawn.images)
    return {
        "model": cell.model.label, "sampler": cell.sampler.name, "steps": cell.steps, "nfe": drawn.nfe,
        "seed": cell.seed, "features": yardstick.network.name, "metric": yardstick.network.metric, **scores,
        "seconds": drawn.seconds, "noise": drawn.noise,
    }  # fmt: skip


def write_results(out: Path, report: dict[str, Any], reference_steps: int | None) -> None:
    """Both files, from what there is by now."""
    report["summary"] = summarise(report["cells"], reference_steps)
    write_atomically(out / "results.json", (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    write_atomically(out / "results.csv", to_csv(report["cells"]).encode())


if __name__ == "__main__":
    main()
