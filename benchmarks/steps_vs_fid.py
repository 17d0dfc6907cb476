r"""How far are samples from real images after how many network evaluations?

    python benchmarks/steps_vs_fid.py                                   # digits, the committed network, 5 to 100 steps
    python benchmarks/steps_vs_fid.py --steps 1000,250,100,50,25,10,5   # longer
    python benchmarks/steps_vs_fid.py --models train --samplers ddpm,ddim,heun   # DDPM and two NDMs, trained here
    python benchmarks/steps_vs_fid.py --data mnist --samples 5000 --batch 100 --seeds 0,1,2 --steps 5,10,20,50 \
        --samplers unipc@karras+denoise,diffusers:UniPCMultistep+karras
    python benchmarks/steps_vs_fid.py --data mnist --samples 5000 --batch 100 --seeds 0 --steps 5,10,20,50 \
        --samplers unipc@karras+denoise --reference-steps 250 --features cnn,efficientnet-lite0
    python benchmarks/steps_vs_fid.py --models map --samplers unipc@karras+denoise,map+denoise --steps 1,2,4,5,10,20
    python benchmarks/steps_vs_fid.py --data my_images/ --size 32 --models my.safetensors --features inception

The same command continues where it was stopped. ``benchmarks/README.md`` says how distances are measured.

``--models``    a network of ``bench/networks.py`` by name, a checkpoint, ``LABEL=`` either, or ``train``: a DDPM and
                Neural Diffusion Models with the heads "x" and "moments", trained in the output folder; or ``map``: the
                committed network of these data, and the flow map that is distilled of it there.
``--samplers``  ``METHOD`` or ``METHOD@GRID`` of ``ndm_ct.sample`` ("ddpm", "heun@karras", ...), with ``+denoise`` for
                the estimate of x in place of the last state; or a scheduler of diffusers (``bench/schedulers.py``).
                Flow maps are sampled by "map" alone, and only they are.
``--steps``     network evaluations per sample. A method of two evaluations per step takes half as many steps; the
                column ``nfe`` has the number it really took.
``--seeds``     seeds of the initial noise, which all methods share at the same seed (column ``noise``, a digest).
"""

import argparse
import csv
import io
from pathlib import Path
from typing import Any

import torch
from bench import data, features, metrics, pictures, runs
from bench.draws import Cell, Drawn, Model, Store, Yardstick, draw, load_models, make, parse_sampler
from tqdm import tqdm

from ndm_ct._core.versions import versions
from ndm_ct.quantisation import Quantisation
from ndm_ct.storage import clear_leftovers, lock_folder

STEPS = "100,50,25,10,5"
SAMPLERS = "ddpm,ddim,dpmpp_2m,unipc@karras+denoise"
FEW_IMAGES = 1000
"""A smaller test set is not used as the reference."""

GRID_COLUMNS = 10


def write_grids(cells: list[Cell], store: Store, real: torch.Tensor, levels: int, folder: Path) -> None:
    """A picture per model and sampler: the same noise at all numbers of steps, above it real images."""
    for model, sampler in dict.fromkeys((cell.model.label, cell.sampler.name) for cell in cells):
        chosen = [cell for cell in cells if (cell.model.label, cell.sampler.name) == (model, sampler)]
        seed, rows = chosen[0].seed, {"real": real[:GRID_COLUMNS]}
        for cell in sorted((cell for cell in chosen if cell.seed == seed), key=lambda cell: -cell.steps):
            drawn = store.read(cell)
            assert drawn is not None
            rows[f"{cell.steps}"] = drawn.images[:GRID_COLUMNS]
        name = "".join(sign if sign.isalnum() or sign in "-_." else "-" for sign in f"{model}-{sampler}")
        figure = pictures.grid(rows, levels, f"{model}, {sampler}: network evaluations")
        runs.save_figure(figure, folder / f"{name}.png")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = runs.Parser(__doc__)
    add, words, numbers = parser.add_argument, runs.words, runs.numbers
    add("--data", default="digits", help="digits, mnist, fashion-mnist, or a path: idx, npz, folder of images")
    add("--size", type=int, help="average images down to this width and height; default: as they are")
    add("--models", type=words, help="names, files, LABEL=FILE or train; default: the committed network of these data, "
        "or train where there is none")  # fmt: skip
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
    """Draw, compare and write, as the only process in the output folder; returns the content of ``results.json``."""
    options = parse(arguments)
    with lock_folder(options.out, f"--out {options.out}"):
        for folder in options.out.rglob("*"):
            if folder.is_dir():
                clear_leftovers(folder)
        return measure(options)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Draw, compare and write, by the options of the command line."""
    samplers = [parse_sampler(name) for name in options.samplers]
    split = data.dataset(options.data, options.size)
    assert split.levels is not None
    bins = Quantisation(split.levels)
    which = options.reference or ("test" if len(split.test) >= FEW_IMAGES else "train")
    real, other = (split.test, split.train) if which == "test" else (split.train, split.test)
    given = {"cnn": {"classifier_steps": options.classifier_steps}, "inception": {"weights": options.inception_weights}}
    nets = [features.load(name, split, options.cache, **given.get(name, {})) for name in options.features]
    models = load_models(options, split, bins)
    shared = {
        "samples": options.samples, "batch": options.batch, "levels": split.levels,
        "versions": {name: version for name, version in versions().items() if name in ("ndm_ct", "diffusers")},
    }  # fmt: skip
    store, sha256 = Store(options.out, shared), data.fingerprint(real)
    references = [metrics.Reference(features.extract(net, real, options.cache)) for net in nets]
    yardsticks = [
        Yardstick(net, known, sha256, options.neighbours, store) for net, known in zip(nets, references, strict=True)
    ]
    budgets = sorted({*options.steps, *([options.reference_steps] if options.reference_steps else [])}, reverse=True)
    cells = [
        Cell(model, sampler, steps, seed)
        for seed in options.seeds for model in models for sampler in samplers for steps in budgets
        if (sampler.method == "map") == model.model.is_map
    ]  # fmt: skip
    try_out(cells, store)
    report = begin(options, split, models, yardsticks, which)
    report["real"] = {each.network.name: each.real(other, options.samples) for each in yardsticks}
    for warning in report["warnings"]:
        print(f"warning: {warning}", flush=True)
    for cell in tqdm(cells, desc="cells", unit="cell", disable=options.quiet):
        drawn = make(cell, store, options.samples, options.batch, bins)
        write_rows(options, report, cell, drawn, yardsticks)
    labels = {net.name: net.metric for net in nets}
    shape = "x".join(str(size) for size in split.train.shape[-2:])
    title = f"{Path(options.data).name}, {shape}, {options.samples} samples"
    runs.save_figure(pictures.distances(report["summary"], labels, title), options.out / "plot.png", dpi=130)
    write_grids(cells, store, real, split.levels, options.out / "grids")
    print(pictures.lines(report["summary"], labels))
    print(f"results.csv, results.json, plot.png and grids/ in {options.out}/")
    return report


def try_out(cells: list[Cell], store: Store) -> None:
    """Draw one sample of every model and sampler that is not finished, so that mistakes show before hours of work."""
    fewest: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        key = cell.model.label, cell.sampler.name
        if not store.samples(cell).exists() and (key not in fewest or cell.steps < fewest[key].steps):
            fewest[key] = cell
    for cell in fewest.values():
        draw(cell.model.model, cell.sampler, 1, cell.steps, torch.Generator().manual_seed(0))


def begin(
    options: argparse.Namespace, split: data.Split, models: list[Model], yardsticks: list[Yardstick], which: str
) -> dict[str, Any]:
    """The report before any cell: settings, versions, data, models and features."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    nets = [each.network for each in yardsticks]
    count = len(split.test if which == "test" else split.train)
    warned = {net.metric: metrics.too_small(options.samples, count, net.dimension) for net in nets}
    return {
        "settings": plain,
        **runs.provenance(),
        "data": {
            "source": options.data, "sha256": data.fingerprint(split.train, split.test), "levels": split.levels,
            "shape": list(split.train.shape[1:]), "train": len(split.train), "test": len(split.test),
            "reference": which,
        },
        "models": {model.label: model.described for model in models},
        "features": {
            net.name: {"metric": net.metric, "dimension": net.dimension, "sha256": net.fingerprint, **net.info}
            for net in nets
        },
        "metrics": {
            "extrapolation": f"{metrics.PARTS} sizes, {metrics.PARTS * (metrics.PARTS + 1) // 2} disjoint random parts",
            "kid_blocks": metrics.BLOCKS, "neighbour_rows": metrics.NEIGHBOUR_ROWS, "seed": 0,
        },
        "warnings": [f"{name}: {warning}" for name, warning in warned.items() if warning],
        "real": {}, "cells": [], "summary": [],
    }  # fmt: skip


def write_rows(
    options: argparse.Namespace, report: dict[str, Any], cell: Cell, drawn: Drawn, yardsticks: list[Yardstick]
) -> None:
    """Add the lines of a cell to ``results.json`` and ``results.csv``; an empty field of the latter is None."""
    report["cells"] += [each.row(cell, drawn) for each in yardsticks]
    report["summary"] = pictures.summarise(report["cells"], options.reference_steps)
    runs.write_json(options.out / "results.json", report)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(report["cells"][0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(report["cells"])
    runs.write_text(options.out / "results.csv", buffer.getvalue())


if __name__ == "__main__":
    main()
