r"""Does a learned forward process improve the likelihood, at equal parameters and at equal time?

    python benchmarks/paper_claims.py --preset smoke     # every cell in a minute or less, about an hour
    python benchmarks/paper_claims.py --preset small     # about 8 hours on two CPU cores; stop and continue at will
    python benchmarks/paper_claims.py --preset small --data digits,casp --models diffusion,matched,ndm-x --seeds 0
    python benchmarks/paper_claims.py --preset small --on validation    # to choose recipes; never sees the test rows
    python benchmarks/paper_claims.py --preset small --timing           # seconds per step, on a quiet machine
    python benchmarks/paper_claims.py --preset small --ablations --data digits,casp --out runs/ablations
    python benchmarks/paper_claims.py --preset small --data mnist-28 --models ndm-flow --seeds 0 --samples 0 --out \
        benchmarks/results/paper_claims/mnist-28         # whole MNIST images, an hour and a half
    python benchmarks/paper_claims.py --preset full --data mnist,path/to/cifar10.npz    # for a GPU, whole images

``benchmarks/README.md`` describes the models, the changes behind a plus sign and the measures. The same command
continues where it was stopped; two processes may work on different ``--data`` of one ``--out``.

Reference: Bartosh, Vetrov and Naesseth, Neural Diffusion Models, https://arxiv.org/abs/2310.08337
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import claims, features, metrics, recipes, runs
from bench.draws import levels_of
from bench.models import ABLATIONS, MODELS, Variant, build, fit, models_of, parameters
from bench.recipes import Recipe, Rows, rows_of, unit
from bench.timing import clock_of, timed

import ndm_ct
from ndm_ct._core.seeds import make_generator

ROUNDS, BLOCK = 7, 10
"""Rounds of ``--timing``, and optimiser steps in a block."""

PRESETS = {
    "smoke": {"steps": 0.05, "rows": 64, "seeds": [0]},
    "small": {"steps": 1.0, "rows": None, "seeds": [0, 1, 2]},
    "full": {"steps": 1.0, "rows": None, "seeds": [0, 1, 2]},
}
"""Optimiser steps relative to the recipe, most test rows, seeds."""


@dataclass(frozen=True)
class Cell:
    """One training with its evaluation."""

    data: str
    model: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.data}-{self.model}-{self.seed}"


def run(cell: Cell, recipe: Recipe, rows: Rows, options: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate one cell, or continue; returns its entry of the results."""
    folder, name = options.out / "cells" / cell.name, results_name(options.on)
    entry = finished(options.out, options.on).get((cell.data, cell.model, cell.seed))
    if entry is not None:
        if entry["recipe"] != recipe.settings:
            raise RuntimeError(
                f"{cell.name} was made by another recipe, {entry['recipe']}; delete {folder} and its entry in "
                f"{options.out / name}.json to make it anew."
            )
        return entry
    model, curve = trained(cell, recipe, rows, folder, options)
    scored = rows.split.test if options.on == "test" else rows.validation
    if rows.bins is not None:
        scored = rows.bins.uniform(scored, torch.float32, torch.Generator().manual_seed(0))
    bound = ndm_ct.evaluate(
        model, scored, bound="elbo", samples=recipe.samples, run_dir=folder / f"elbo-{options.on}",
        max_rows=options.rows, progress=False,
    )  # fmt: skip
    flow = ndm_ct.evaluate(
        model, scored, run_dir=folder / f"ode-{options.on}", on_failure="nan",
        max_rows=options.rows or recipe.test_rows, progress=False,
    )  # fmt: skip
    drawn = options.samples if cell.seed == options.seeds[0] else 0
    entry = asdict(cell) | {
        "recipe": recipe.settings, "parameters": parameters(model), "nelbo": unit(bound, rows), "nll": unit(flow, rows),
        "nll_failed": flow.failed, "nll_nfe": flow.nfe, "curve": curve,
        "fd": distances(model, rows, options) if rows.split.train_labels is not None and drawn else {},
        "sde_ode": asdict(consistency(model, drawn)) if drawn else None,
    }  # fmt: skip
    runs.write_json(folder / f"{name}.json", entry)
    return entry


def finished(out: Path, on: str) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Entries of finished cells, also those of other processes and those whose trainings were deleted."""
    whole = out / f"{results_name(on)}.json"
    entries = list(runs.read_json(whole, {"cells": []})["cells"])
    entries += [runs.read_json(file) for file in sorted((out / "cells").glob(f"*/{whole.name}"))]
    return {(entry["data"], entry["model"], entry["seed"]): entry for entry in entries}


def results_name(on: str) -> str:
    """Name of the files with results on test or validation rows."""
    return "results" if on == "test" else on


def trained(
    cell: Cell, recipe: Recipe, rows: Rows, folder: Path, options: argparse.Namespace
) -> tuple[ndm_ct.NDM, list[list[float]]]:
    """The trained model of a cell and its validation bounds by step; trained here if it is not there yet."""
    model = build(cell.model, recipe, rows.shape, rows.std, cell.seed).to(options.device)
    result = fit(
        model, cell.model, recipe, rows, steps=recipe.steps, seed=cell.seed, validation=rows.validation, run_dir=folder,
        progress=not options.quiet, log_every=max(1, recipe.steps // 40), validate_every=max(1, recipe.steps // 20),
    )  # fmt: skip
    if not result.finished:  # Ctrl-C, which a training turns into a checkpoint
        raise KeyboardInterrupt
    model.requires_grad_(False)
    ndm_ct.save(model, folder / "model.safetensors")
    curve = [[row["step"], row.get("validation_bits_per_dim", -row["validation_elbo"])] for row in result.validation]
    return model, curve


def seconds_per_step(recipe: Recipe, rows: Rows, names: list[str], device: torch.device) -> dict[str, float]:
    """Seconds of an optimiser step, of the processor or the GPU: the median of rounds in which all take turns."""

    def block(name: str) -> Callable[[], Any]:
        model = build(name, recipe, rows.shape, rows.std, 0).to(device)
        return lambda: fit(model, name, recipe, rows, steps=BLOCK, progress=False)

    seconds = timed({name: block(name) for name in names}, ROUNDS, clock_of(device))
    return {name: float(np.median(values)) / BLOCK for name, values in seconds.items()}


def consistency(model: ndm_ct.NDM, samples: int) -> metrics.Distance:
    """Energy distance between samples of the probability flow and of the reverse SDE, and its scatter at one law."""
    ways = {"ode": {"method": "ode"}, "sde": {"method": "sde", "steps": 200}}
    drawn = []
    for name, how in ways.items():
        random = make_generator(name, device=model.device or "cpu")
        drawn.append(ndm_ct.sample(model, samples, batch_size=250, generator=random, **how).flatten(1).cpu())
    return metrics.energy_score(*drawn)


def distances(model: ndm_ct.NDM, rows: Rows, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Extrapolated Frechet distances of samples of classified images by method and number of steps."""
    assert rows.bins is not None
    net = features.load("cnn", rows.split, options.cache)
    enough = len(rows.split.test) >= 1000 and options.on == "test"
    real = rows.split.test if enough else rows.split.train
    reference = metrics.Reference(features.extract(net, real, options.cache))
    found: dict[str, dict[str, float]] = {"ddpm": {}, "ddim": {}}
    for method, steps in ((method, steps) for method in found for steps in claims.STEP_COUNTS):
        x = ndm_ct.sample(
            model, options.samples, method=method, steps=steps, batch_size=250,
            generator=make_generator("distances", device=model.device or "cpu"),
        )  # fmt: skip
        found[method][str(steps)] = metrics.frechet_infinity(net(levels_of(x.cpu(), rows.bins)), reference).value
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = runs.Parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="smoke")
    usual = [name for name in recipes.RECIPES if name not in recipes.LONG]
    add("--data", type=runs.words, default=usual, help=f"of {', '.join(recipes.RECIPES)}, or paths; several by commas")
    add("--models", type=runs.words, help=f"of {', '.join(MODELS)}, or variants; several by commas; default: all")
    add("--ablations", action="store_true", help="train the ablations too")
    add("--seeds", type=runs.numbers, help="default: those of the preset")
    add("--samples", type=int, default=1000, help="samples for the distances (1000); 0: none")
    add("--on", choices=("test", "validation"), default="test", help="rows to score; recipes are chosen on validation")
    add("--timing", action="store_true", help="measure seconds per optimiser step instead, into timing.json")
    add("--cache", type=Path, help="classifiers and features; default: cache in the output folder")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    for name in options.models or []:
        try:
            Variant.parse(name)
        except ValueError as error:
            parser.error(f"--models: {error}.")
    try:
        options.recipes = {Path(source).stem: recipes.recipe_of(source, options.preset) for source in options.data}
    except FileNotFoundError as error:
        parser.error(f"--data: {error}.")
    options.rows = PRESETS[options.preset]["rows"]
    options.seeds = options.seeds or PRESETS[options.preset]["seeds"]
    options.out = options.out or Path("runs/paper_claims") / options.preset
    options.cache = options.cache or options.out / "cache"
    return options


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Train, evaluate and write what is not finished; returns the entries of all cells."""
    options = parse(arguments)
    for name, whole in options.recipes.items():
        recipe = replace(whole, steps=max(1, int(whole.steps * PRESETS[options.preset]["steps"])))
        rows = rows_of(recipe)
        models = options.models or [*models_of(recipe), *(ABLATIONS if options.ablations else ())]
        if options.timing:
            known = runs.read_json(options.out / "timing.json", {})
            known[name] = known.get(name, {}) | seconds_per_step(recipe, rows, models, options.device)
            runs.write_json(options.out / "timing.json", known)
            continue
        for cell in (Cell(name, model, seed) for seed in options.seeds for model in models):
            entry = run(cell, recipe, rows, options)
            print(f"{cell.name}: NELBO {entry['nelbo'][0]:.4f}, NLL {entry['nll'][0]:.4f}", flush=True)
            write(options.out, options.on)
    return write(options.out, options.on)


def write(out: Path, on: str) -> list[dict[str, Any]]:
    """Results from all cells that are finished, those of other processes too."""
    name, seconds = results_name(on), runs.read_json(out / "timing.json", {})
    entries = list(finished(out, on).values())
    entries.sort(key=lambda e: (claims.place(e["data"]), claims.place(e["model"]), e["seed"]))
    runs.write_json(out / f"{name}.json", runs.provenance() | {"seconds_per_step": seconds, "cells": entries})
    runs.write_text(out / f"{name}.md", claims.markdown(entries, seconds, on))
    suffix = "" if on == "test" else f"_{on}"
    if entries:
        runs.save_figure(claims.curves(entries, seconds), out / f"curves{suffix}.png")
    if (figure := claims.differences(entries)) is not None:
        runs.save_figure(figure, out / f"differences{suffix}.png")
    return entries


if __name__ == "__main__":
    main()
