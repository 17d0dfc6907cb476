r"""How should a network's raw outputs become a prediction?

    python benchmarks/heads.py --data casp --steps 2000 --out benchmarks/results/heads/casp       # 20 minutes
    python benchmarks/heads.py --data digits --steps 1500 --out benchmarks/results/heads/digits   # 20 minutes
    python benchmarks/heads.py --data casp --steps 3                                             # a look

``benchmarks/README.md`` has the formulas of the ways. The same command continues after the last training that ended.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import models, runs
from bench.recipes import RECIPES, Recipe, Rows, rows_of
from torch import Tensor, nn

import ndm_ct
from ndm_ct._core.checks import expand
from ndm_ct.objectives.bound import Bound
from ndm_ct.storage import RunFolder

WAYS = {
    "diffusion": ("edm", "x", "eps", "v"),
    "ndm-moments": ("edm + raw", "raw", "eps + raw", "edm + rate", "edm + edm"),
}
"""Ways of each model; the first is the library's."""
OBJECTIVE = Bound()


class Head(nn.Module):
    """The pair of head "moments" from raw outputs, in one of the ways above.

    Args:
        net: ``net(z, t)``, returning ``(B, 2, *E)``.
        way: one of ``WAYS["ndm-moments"]``.
        schedule: schedule of the model.
        data_std: standard deviation s of the data.
    """

    def __init__(self, net: nn.Module, way: str, schedule: ndm_ct.schedules.Schedule, data_std: float) -> None:
        super().__init__()
        self.net, self.way, self.schedule, self.data_std = net, way, schedule, data_std

    def forward(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Estimates of F and of its time derivative, each of the shape of z."""
        c, s = self.schedule(t.double()), self.data_std
        spread = torch.sqrt((c.alpha * s) ** 2 + c.sigma**2)
        out = c.sigma * s / spread
        edm = self.way.startswith("edm")
        first, second = self.net(expand(1.0 / spread, z) * z if edm else z, t).unbind(1)
        if edm:
            first = expand(c.alpha * s**2 / spread**2, z) * z - expand(out, z) * first
        elif self.way.startswith("eps"):
            first = (z - expand(c.sigma, z) * first) / expand(c.alpha, z)
        scales = {"edm + rate": c.dgamma, "edm + edm": out}
        return first, expand(scales.get(self.way, torch.ones_like(out)), z) * second


def build(name: str, way: str, recipe: Recipe, shape: tuple[int, ...], std: float, seed: int) -> ndm_ct.NDM:
    """An untrained model whose network is read in one of the ways."""
    model = models.build(name, recipe, shape, std, seed)
    if way == WAYS[name][0]:
        return model
    if name == "diffusion":
        return ndm_ct.NDM(model.predictor.net, shape, schedule=model.schedule, prediction=way)
    head = Head(model.predictor.net, way, model.schedule, std)
    return ndm_ct.NDM(head, shape, transform=model.transform, schedule=model.schedule, prediction="moments")


def bound(model: ndm_ct.NDM, name: str, recipe: Recipe, rows: Rows, steps: int, seed: int) -> float:
    """Validation NELBO after a training; infinite if the training failed."""
    try:
        trained = models.fit(
            model, name, recipe, rows, steps=steps, seed=seed, ema=0.99, objective=OBJECTIVE,
            validation=rows.validation, validate_every=steps, progress=False,
        )  # fmt: skip
    except RuntimeError as error:  # loss or prediction became infinite
        print(error)
        return float("inf")
    last = trained.validation[-1]
    return float(last.get("validation_bits_per_dim", -last["validation_elbo"]))


def markdown(results: dict[str, dict[str, dict[str, list[float]]]], steps: int) -> str:
    """Mean bounds, and paired differences from the library's way."""
    rows = []
    for data, name in ((data, name) for data, known in results.items() for name in known):
        own = np.array(results[data][name][WAYS[name][0]])
        for way, values in results[data][name].items():
            gap = runs.with_error(*runs.mean(np.array(values) - own), sign="+")
            rows.append((data, name, way, f"{np.mean(values):.4f}", gap))
    table = runs.table(["data", "model", "way", "NELBO", "difference"], rows)
    return "\n".join([f"# Raw outputs to predictions, {steps} steps", "", *table])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = runs.Parser(__doc__, Path("runs/heads"))
    add = parser.add_argument
    add("--data", nargs="+", default=["casp", "digits"], choices=list(RECIPES))
    add("--models", nargs="+", default=list(WAYS), choices=list(WAYS))
    add("--steps", type=int, default=500, help="optimiser steps of a training (500)")
    add("--seeds", type=int, default=2, help="number of seeds (2)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train what is not finished and write; returns the report."""
    options = parse(arguments)
    settings = {"steps": options.steps, "objective": OBJECTIVE.describe(), "torch": torch.__version__}
    report = runs.read_json(options.out / "results.json", {"settings": settings, "results": {}})
    RunFolder(options.out, f"--out {options.out}").compare(report["settings"], settings)
    for data in options.data:
        recipe = RECIPES[data]
        rows = rows_of(recipe)
        for name, seed in itertools.product(options.models, range(options.seeds)):
            ways = report["results"].setdefault(data, {}).setdefault(name, {way: [] for way in WAYS[name]})
            for way, bounds in ways.items():
                if seed < len(bounds):
                    continue
                model = build(name, way, recipe, rows.shape, rows.std, seed)
                bounds.append(bound(model, name, recipe, rows, options.steps, seed))
                print(f"{data}, {name}, {way}, seed {seed}: {bounds[-1]:.4f}", flush=True)
                runs.write_json(options.out / "results.json", report)
    return runs.write_report(options.out, report, markdown(report["results"], options.steps))


if __name__ == "__main__":
    main()
