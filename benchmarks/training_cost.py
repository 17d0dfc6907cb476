r"""What does a learned forward process cost per optimiser step and per sampling step, and where does it go?

    python benchmarks/training_cost.py                    # about 5 minutes on one CPU core
    python benchmarks/training_cost.py --preset smoke     # a look, a minute
    python benchmarks/training_cost.py --compile --models diffusion,ndm-x,ndm-flow

``benchmarks/README.md`` says how it is measured. ``--compile`` writes to ``training_cost/compiled``.
"""

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from bench import models, runs
from bench.derivatives import derivatives, difference_error, gradients
from bench.recipes import RECIPES, Recipe
from bench.timing import timed
from matplotlib.figure import Figure

import ndm_ct

SHAPES = {"casp": (10,), "checkers": (2,), "digits": (1, 8, 8), "fashion-mnist": (1, 14, 14)}
MODELS = tuple(f"{model}{kind}{eta}" for model in ("ndm-x", "ndm-moments") for kind in ("", "-neural")
               for eta in ("", "-eta"))  # fmt: skip
MODELS = ("diffusion", "matched", *MODELS, "ndm-flow")
SAMPLED = ("diffusion", "ndm-x", "ndm-x-neural", "ndm-moments")
PRESETS = {
    "smoke": {"rounds": 2, "block": 1, "batch": 8, "steps": 2},
    "full": {"rounds": 7, "block": 2, "batch": None, "steps": 10},
}
"""Rounds, optimiser steps in a block, rows per step (None: the recipe's), steps of a sampling."""

LIMITS = {"limit": 2.3, "aim": 1.8}
"""Costs of an optimiser step that the picture marks."""


def build(name: str, recipe: Recipe, shape: tuple[int, ...]) -> ndm_ct.NDM:
    """An untrained model, one of ``MODELS``."""
    change = "+neural" if "-neural" in name else ""
    return models.build(name.replace("-neural", "") + change, recipe, shape, 1.0, 0)


def compile_networks(built: Iterable[ndm_ct.NDM]) -> None:
    """Compile the networks of models in place."""
    import torch._dynamo.config

    torch._dynamo.config.recompile_limit = 256  # counted for the code, which all models here share
    for module in (module for model in built for module in model.modules()):
        if isinstance(module, ndm_ct.nn.UNet | ndm_ct.nn.MLP | ndm_ct.nn.FromZuko):
            module.compile()


def training(model: ndm_ct.NDM, x: torch.Tensor, steps: int, batch: int) -> Callable[[], Any]:
    """A block of optimiser steps."""
    return lambda: ndm_ct.fit(model, x, steps=steps, batch_size=batch, progress=False)


def sampling(model: ndm_ct.NDM, rows: int, steps: int) -> Callable[[], Any]:
    """A walk by "ddpm", one evaluation of the predictor per step."""
    return lambda: ndm_ct.sample(model, rows, method="ddpm", steps=steps)


def ratio(values: np.ndarray, baseline: np.ndarray) -> tuple[float, float]:
    """Median of the ratios by round, and its standard error."""
    ratios = values / baseline
    middle = float(np.median(ratios))
    spread = 1.4826 * float(np.median(np.abs(ratios - middle)))
    return middle, 1.2533 * spread / len(ratios) ** 0.5


def summary(seconds: dict[str, np.ndarray], baseline: str, per: int) -> dict[str, dict[str, float]]:
    """Milliseconds per step, ratio to the baseline and its error, by name."""
    found = {}
    for name, values in seconds.items():
        middle, error = ratio(values, seconds[baseline])
        found[name] = {"ms": 1e3 * float(np.median(values)) / per, "ratio": middle, "stderr": error}
    return found


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All tables of one configuration."""
    recipe, shape, preset = RECIPES[name], SHAPES[name], PRESETS[options.preset]
    rounds, block, steps = preset["rounds"], preset["block"], preset["steps"]
    batch = preset["batch"] or recipe.batch_size
    built = {each: build(each, recipe, shape) for each in options.models}
    if options.compile:
        compile_networks(built.values())
    torch.manual_seed(0)
    x = torch.randn(block * batch, *shape)
    walks = {each: sampling(model, batch, steps) for each, model in built.items() if each in SAMPLED}
    blocks = {each: training(model, x, block, batch) for each, model in built.items()}
    return {
        "parameters": {each: models.parameters(model) for each, model in built.items()},
        "training": summary(timed(blocks, rounds), "diffusion", block),
        "sampling": summary(timed(walks, 2 * rounds), "diffusion", steps),
        "derivatives": summary(timed(derivatives(recipe, shape, batch), rounds), "network alone", 1),
        "gradients": summary(timed(gradients(recipe, shape, batch), rounds), "one loss", 1),
        "difference_error": difference_error(recipe, shape),
    }


def markdown(results: dict[str, Any]) -> str:
    """Tables: rows are models or ways, columns data sets."""
    lines = ["# What a learned forward process costs", ""]
    titles = {
        "training": "An optimiser step, relative to the plain diffusion's",
        "sampling": "A sampling step, relative to the plain diffusion's",
        "derivatives": "F and its time derivative, relative to one forward pass",
        "gradients": "Two gradients, relative to one evaluation with its backward pass",
    }

    def cell(entry: dict[str, Any], part: str, row: str) -> str:
        found = entry[part].get(row)
        return f"{found['ratio']:.3f} ± {found['stderr']:.3f} ({found['ms']:.3g} ms)" if found else "–"

    for part, title in titles.items():
        rows = dict.fromkeys(row for entry in results.values() for row in entry[part])
        cells = [(row, *(cell(entry, part, row) for entry in results.values())) for row in rows]
        lines += [f"### {title}", "", *runs.table(["", *results], cells), ""]
    errors = ", ".join(f"{entry['difference_error']:.1e} ({name})" for name, entry in results.items())
    lines.append(f"Error of the central difference, float32, relative to the derivative: {errors}.")
    return "\n".join([*lines, ""])


def plot(results: dict[str, Any]) -> Figure:
    """Costs of an optimiser step as bars."""
    figure = Figure(figsize=(3 + 2.2 * len(results), 4.2), layout="constrained")
    axes = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axis, (name, entry) in zip(axes, results.items(), strict=True):
        rows = list(entry["training"].items())[::-1]
        values, errors = [row["ratio"] for _, row in rows], [row["stderr"] for _, row in rows]
        axis.barh([model for model, _ in rows], values, xerr=errors, color="C0")
        for (label, limit), style in zip(LIMITS.items(), ("-", "--"), strict=True):
            axis.axvline(limit, color="black", linestyle=style, linewidth=0.8, label=f"{label}, {limit}")
        axis.set_title(name)
        axis.grid(axis="x", alpha=0.3)
    figure.supxlabel("optimiser step / diffusion's", fontsize=10)
    axes[0].legend(loc="upper right", fontsize=8)
    return figure


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = runs.Parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="full")
    add("--data", type=runs.names(SHAPES), default=list(SHAPES), help="several by commas")
    add("--models", type=runs.names(MODELS), default=list(MODELS), help="several by commas")
    add("--compile", action="store_true", help="compile the networks")
    options = parser.parse_args(arguments)
    if "diffusion" not in options.models:
        parser.error("--models needs diffusion, the baseline.")
    options.out = options.out or runs.RESULTS / "training_cost" / ("compiled" if options.compile else "all")
    return options


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; returns all tables by data set."""
    options = parse(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results: dict[str, Any] = {}
        for name in options.data:
            results[name] = measure(name, options)
            report = {"settings": PRESETS[options.preset], "results": results}
            runs.write_report(options.out, report, markdown(results), {"plot": plot(results)})
    finally:
        torch.set_num_threads(threads)
    print(markdown(results))
    return results


if __name__ == "__main__":
    main()
