r"""The claims of Neural Diffusion Models, put to the test: does a learned forward process improve the likelihood?

    python benchmarks/paper_claims.py --preset smoke     # every cell in a minute or less, about an hour
    python benchmarks/paper_claims.py --preset small     # about 8 hours on two CPU cores; stop and continue at will
    python benchmarks/paper_claims.py --preset small --data digits,casp --models diffusion,matched,ndm-x --seeds 0
    python benchmarks/paper_claims.py --preset small --on validation    # to choose recipes; never sees the test rows
    python benchmarks/paper_claims.py --preset small --timing           # seconds per step, on a quiet machine
    python benchmarks/paper_claims.py --preset small --ablations --data digits,casp --out runs/ablations
    python benchmarks/paper_claims.py --preset small --data mnist-28 --models ndm-flow --seeds 0 --samples 0 --out \
        benchmarks/results/paper_claims/mnist-28                        # whole MNIST images, an hour and a half
    python benchmarks/paper_claims.py --preset full --data mnist,path/to/cifar10.npz    # for a GPU, whole images

A *cell* is a data set, a model and a seed: a training (``fit``, with checkpoints) and its evaluation on the test set.
Cells are independent; two processes may work on different ``--data`` of one ``--out``. Run again, the same command
continues where it was stopped and computes nothing twice; what ``results.json`` holds counts as finished, so the
committed results are added to by ``--out benchmarks/results/paper_claims/all``. ``--on validation`` scores the same
trainings on validation rows and keeps its results apart.

===============  ======================================================================================================
diffusion        F the identity, the predictor of the NDMs
matched          F the identity, at least as many parameters as the NDMs have with their F: a wider perceptron; the
                 sum of the widest U-Net and of the narrowest second one that make up the number
ndm-x            :math:`F = x + \sum_k b_k(t) f_k(x)` with a network f, head "x"
ndm-moments      the same F, head "moments"
ndm-x-eta        as ndm-x with a learned volatility
ndm-moments-eta  as ndm-moments with a learned volatility
ndm-flow         :math:`F(x, t) = h(x)`, h an invertible spline flow of zuko (INDM), head "x"
===============  ======================================================================================================

``--ablations`` changes one thing at a time in the models above, here and in ``--models`` written behind a +:
``diffusion+cosine`` another schedule (``cosine``, ``vp``, ``rectified``, from the log-SNR at which the first begins, or
``learned``), ``ndm-x+neural`` the transform :math:`x + t\,f(x, t)`, ``ndm-x+F64`` its network's width, and
``ndm-x+history``, ``ndm-x+buckets`` the density of times (``ndm_ct.objectives``), ``ndm-x+scaling`` one learned
factor for every coordinate with the volatility that belongs to it, a log-SNR for every coordinate, and
``ndm-moments+R1`` the weight of both regressions, 0.1 in the models above.

Images are dequantised by uniform noise in the bins, for training and for scores. ``--preset full`` has MNIST and
Fashion-MNIST at 28x28, and any images by their path (an npz file, a folder, idx files: ``benchmarks/data.py``), such as
CIFAR-10 or ImageNet 32x32; ``--device`` is a GPU where there is one.

Reported for each cell: the bound (NELBO, unbiased over times and noise) and the probability flow's negative
log-likelihood, both on test rows, in bits per dimension for images and nats for vectors, with standard errors over
rows; parameters; seconds per optimiser step; for images the Frechet distance of samples at several numbers of steps, by
"ddpm" and by "ddim"; and the energy distance between samples of the flow and of the reverse SDE, two different models
where the head is "x" and F nonlinear (samples are drawn of the first seed's models). Differences from the matched
diffusion are paired, seed by seed, with their standard error over seeds; at equal training time they are read off the
validation curves, where a step takes what ``--timing`` measured: blocks of ``fit``, all models of a data set in turn,
round after round, in seconds of the processor. A curve has one time and noise per validation row, the same at every
step: it compares steps of one model, and models of one schedule, which share most of that error, not schedules. Writes
``results.json``, ``results.md``, ``curves.png`` and ``differences.png`` (with ``--on validation``: ``validation.json``
and so on) into ``--out``.

References:
    Bartosh, Vetrov and Naesseth, Neural Diffusion Models, https://arxiv.org/abs/2310.08337
"""

import argparse
import functools
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import data, features, metrics
from sampling_cost import timed
from steps_vs_fid import levels_of
from torch import Tensor, nn

import ndm_ct
from ndm_ct import schedules, transforms
from ndm_ct.nn import MLP, FromZuko, Preconditioned, UNet
from ndm_ct.objectives.bound import Bound
from ndm_ct.objectives.time_samplers import LearnedBuckets, LossHistory
from ndm_ct.quantisation import Quantisation
from ndm_ct.schedules.volatility import LearnedVolatility, Matched
from ndm_ct.storage import write_atomically

MODELS = ("diffusion", "matched", "ndm-x", "ndm-moments", "ndm-x-eta", "ndm-moments-eta", "ndm-flow")
SCHEDULES = {"cosine": schedules.Cosine, "vp": schedules.VariancePreserving, "rectified": schedules.Rectified}
TIMES = {"history": LossHistory, "buckets": LearnedBuckets}

ABLATIONS = (
    *(f"{base}+{name}" for name in (*SCHEDULES, "learned") for base in ("diffusion", "ndm-x", "ndm-x+neural")),
    "ndm-x+neural", "ndm-moments+neural", "ndm-x-eta+neural", "ndm-x+scaling",
    *(f"{base}+{name}" for name in TIMES for base in ("diffusion", "ndm-x")),
    *(f"ndm-x+F{width}" for width in (4, 16, 32, 128)),
    *(f"ndm-moments+R{weight:g}" for weight in (0.03, 0.3, 1, 3)),
)  # fmt: skip
"""What ``--ablations`` adds to the models."""

TERMS = 2
"""Terms of the separable transform."""

STEP_COUNTS = (100, 50, 10)
"""Steps of samples, "ddpm" and "ddim"."""

ROUNDS, BLOCK = 7, 10
"""Of the timing: rounds, and optimiser steps in a block."""


@dataclass(frozen=True)
class Recipe:
    """How a data set is modelled; everything that may be tuned, on validation data.

    Args:
        load: training and test rows.
        width: of the NDMs' predictor, and of the diffusion of the same predictor.
        transform_width: of the network in F.
        levels: resolutions of a U-Net; 0: a perceptron.
        steps: optimiser steps.
        batch_size: rows per step.
        lr: peak learning rate.
        gamma: ends of the log-SNR schedule.
        test_rows: rows the flow's likelihood is measured on.
        samples: pairs of time and noise per test row for the bound.
        flow: transforms of the spline flow, width of their perceptrons and bins of the splines; None: no such model.
        flow_scale: c, by which it sees values enlarged. Its splines bend in [-5, 5]: of pixels, all in [-1, 1], two or
            three bins would see everything, peaks as narrow as the black of a background too.
    """

    load: Callable[[], data.Split]
    width: int
    transform_width: int
    levels: int
    steps: int
    batch_size: int
    lr: float = 2e-3
    gamma: tuple[float, float] = (-9.0, 5.0)
    test_rows: int = 1000
    samples: int = 64
    flow: tuple[int, int, int] | None = None
    flow_scale: float = 1.0

    @property
    def settings(self) -> dict[str, Any]:
        """What a result depends on."""
        return json.loads(json.dumps({name: value for name, value in vars(self).items() if name != "load"}))

    @property
    def models(self) -> list[str]:
        """Those of ``MODELS`` that fit the data."""
        return [name for name in MODELS if self.flow is not None or name != "ndm-flow"]


def small_images(name: str, size: int) -> Recipe:
    """Of the two large sets, shrunk."""
    return Recipe(
        lambda: data.images(name, size), 16, 4, 2, 2500, 64, gamma=(-13.3, 5.0), test_rows=500, samples=4,
        flow=(1, 16, 8), flow_scale=4.0,
    )  # fmt: skip


def large_images(source: str) -> Recipe:
    """Of images by name or path as they are; hours of a GPU."""
    return Recipe(
        lambda: data.dataset(source), 64, 16, 3, 100_000, 128, lr=1e-3, gamma=(-13.3, 5.0), test_rows=2000, samples=8,
        flow=(1, 64, 8), flow_scale=4.0,
    )  # fmt: skip


RECIPES = {
    "digits": Recipe(
        data.digits, 16, 2, 2, 3000, 64, gamma=(-8.0, 5.0), test_rows=360, samples=32, flow=(1, 16, 8), flow_scale=4.0
    ),
    "mnist": small_images("mnist", 14),
    "fashion-mnist": small_images("fashion-mnist", 14),
    "casp": Recipe(data.casp, 96, 64, 0, 2000, 1024, flow=(1, 64, 16)),
    "magic": Recipe(data.magic, 96, 64, 0, 2000, 1024, flow=(1, 64, 16)),
    "moons": Recipe(data.moons, 48, 32, 0, 1500, 1024, test_rows=2000, flow=(1, 48, 16), flow_scale=2.5),
    "checkers": Recipe(data.checkers, 48, 32, 0, 1500, 1024, flow=(1, 48, 16), flow_scale=2.5),
    "mnist-28": replace(small_images("mnist", 28), levels=3, steps=14_000, flow=(1, 64, 8)),
}

LONG = ("mnist-28",)
"""To compare with published numbers; computed only where asked for, it takes longer than all others of a model."""

PRESETS = {
    "smoke": {"steps": 0.05, "rows": 64, "seeds": [0]},
    "small": {"steps": 1.0, "rows": None, "seeds": [0, 1, 2]},
    "full": {"steps": 1.0, "rows": None, "seeds": [0, 1, 2]},
}
"""Optimiser steps relative to the recipe, most test rows, seeds."""


def recipe_of(source: str, preset: str) -> Recipe:
    """The recipe of a data set, or of images by path.

    Raises:
        FileNotFoundError: neither is there.
    """
    if preset == "full" and source in data.FOLDERS:
        return large_images(source)
    if source in RECIPES:
        return RECIPES[source]
    if not Path(source).exists():
        raise FileNotFoundError(f"{source} unknown; there are {', '.join(RECIPES)}, and images by their path")
    return large_images(source)


def network(recipe: Recipe, shape: tuple[int, ...], width: int, outputs: int | None, time: bool = True) -> nn.Module:
    """A U-Net for images, a perceptron for vectors."""
    if recipe.levels:
        return UNet(shape[0], width=width, levels=recipe.levels, outputs=outputs, time=time)
    return MLP(shape, width=width, outputs=outputs, time=time)


@dataclass(frozen=True)
class Variant:
    """What a model's name says: one of ``MODELS``, then changes of it behind a +."""

    base: str
    schedule: str = "linear"
    transform: str = "separable"
    transform_width: int | None = None
    times: str = "even"
    regressions: float = 0.1

    @staticmethod
    def parse(name: str) -> "Variant":
        """The variant of a name.

        Raises:
            ValueError: an unknown base or change, or one of a transform the base does not have.
        """
        base, *changes = name.split("+")
        learned = base.startswith("ndm") and base != "ndm-flow"  # what a change of F applies to
        found: dict[str, Any] = {"transform": "flow"} if base == "ndm-flow" else {}
        for change in changes:
            if change in SCHEDULES or change == "learned":
                found["schedule"] = change
            elif change in TIMES:
                found["times"] = change
            elif change in ("neural", "scaling") and learned:
                found["transform"] = change
            elif change.startswith("F") and change[1:].isdecimal() and learned:
                found["transform_width"] = int(change[1:])
            elif re.fullmatch(r"R\d+(\.\d+)?", change) and "moments" in base:
                found["regressions"] = float(change[1:])
            else:
                raise ValueError(f"{name}: {change!r} changes nothing in {base!r}")
        if base not in MODELS:
            raise ValueError(f"{name}: {base!r} is none of {', '.join(MODELS)}")
        return Variant(base, **found)

    @property
    def objective(self) -> Bound | None:
        """For ``fit``; None: the library's."""
        sampler = TIMES[self.times]() if self.times in TIMES else None
        if "moments" in self.base:
            return Bound(sampler, regressions=(self.regressions, self.regressions))
        return None if sampler is None else Bound(sampler)


def schedule_of(variant: Variant, recipe: Recipe) -> tuple[schedules.Schedule, float]:
    """The schedule, and the time at which it has the log-SNR that the recipe's begins with."""
    if variant.schedule in SCHEDULES:
        schedule = SCHEDULES[variant.schedule]()
        angle = torch.tensor(math.atan(math.exp(0.5 * recipe.gamma[0])), dtype=torch.float64)
        return schedule, float(schedule.time_at(angle))
    kind = schedules.LearnedLogSNR if variant.schedule == "learned" else schedules.LinearLogSNR
    return kind(*recipe.gamma), 0.0


def build(name: str, recipe: Recipe, shape: tuple[int, ...], std: float, seed: int) -> ndm_ct.NDM:
    """An untrained model, one of ``MODELS`` or a variant."""
    variant = Variant.parse(name)
    schedule, t_min = schedule_of(variant, recipe)
    torch.manual_seed(seed)
    if not variant.base.startswith("ndm"):
        matched = variant.base == "matched"
        net = matched_network(recipe, shape) if matched else network(recipe, shape, recipe.width, None)
        return ndm_ct.NDM(Preconditioned(net, data_std=std), shape, schedule=schedule, t_min=t_min)
    head = "moments" if "moments" in variant.base else "x"
    transform = transform_of(variant, recipe, shape)
    net = network(recipe, shape, recipe.width, 2 if head == "moments" else None)
    return ndm_ct.NDM(
        Preconditioned(net, head=head, data_std=std), shape, transform=transform, schedule=schedule, prediction=head,
        volatility=volatility_of(variant), t_min=t_min,
    )  # fmt: skip


def volatility_of(variant: Variant) -> nn.Module | float:
    """Learned, that of a scaling, or one."""
    if variant.transform == "scaling":
        return Matched()
    return LearnedVolatility() if variant.base.endswith("eta") else 1.0


def transform_of(variant: Variant, recipe: Recipe, shape: tuple[int, ...]) -> transforms.Transform:
    """The learned F of a variant."""
    width = variant.transform_width or recipe.transform_width
    if variant.transform == "flow":
        return spline_flow(recipe, shape)
    if variant.transform == "scaling":
        return transforms.LearnedScaling(shape)
    if variant.transform == "neural":
        return transforms.Neural(network(recipe, shape, width, None))
    net = network(recipe, shape, width, TERMS, time=False)
    return transforms.Separable(net, transforms.PolynomialBasis(TERMS))


class Flat(nn.Module):
    """A flow h of vectors as one of events of any shape: h(cx)/c of the flattened event."""

    def __init__(self, flow: nn.Module, scale: float) -> None:
        super().__init__()
        self.flow, self.scale = flow, scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and its log-determinant."""
        y, logdet = self.flow(self.scale * x.flatten(1))
        return y.reshape(x.shape) / self.scale, logdet

    def inverse(self, y: Tensor) -> Tensor:
        """x."""
        return self.flow.inverse(self.scale * y.flatten(1)).reshape(y.shape) / self.scale


def spline_flow(recipe: Recipe, shape: tuple[int, ...]) -> transforms.Flow:
    """Autoregressive rational-quadratic splines.

    Raises:
        ValueError: the recipe has none.
    """
    if recipe.flow is None:
        raise ValueError("ndm-flow needs a recipe with a flow.")
    import zuko

    count, width, bins = recipe.flow
    hidden = (width,) * (1 if recipe.levels else 2)
    flow = zuko.flows.NSF(math.prod(shape), transforms=count, hidden_features=hidden, bins=bins)
    return transforms.Flow(Flat(FromZuko(flow), recipe.flow_scale))


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


class Sum(nn.Module):
    """Networks of the same arguments whose outputs are added."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """The sum."""
        return sum((part(z, t) for part in self.parts), torch.zeros_like(z))


def matched_network(recipe: Recipe, shape: tuple[int, ...]) -> nn.Module:
    """The predictor of a plain diffusion with at least as many parameters as the largest NDM, and hardly more.

    One more channel makes a U-Net of width 16 larger by an eighth, far more than a small F: the rest is made up by a
    second U-Net beside it.
    """
    needed = max(parameters(build(name, recipe, shape, 1.0, 0)) for name in recipe.models if name.startswith("ndm"))

    def least(of: Callable[[int], nn.Module], width: int) -> int:
        while parameters(of(width)) < needed:
            width += 1
        return width

    def alone(width: int) -> nn.Module:
        return network(recipe, shape, width, None)

    width = least(alone, recipe.width)
    if not recipe.levels or parameters(alone(width)) == needed:
        return alone(width)

    def beside(other: int) -> nn.Module:
        return Sum(alone(width - 1), alone(other))

    return beside(least(beside, 1))


@dataclass(frozen=True)
class Cell:
    """One training with its evaluation."""

    data: str
    model: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.data}-{self.model}-{self.seed}"


@dataclass(frozen=True)
class Rows:
    """A data set in the form the library takes it, and the last part of the training rows, held out."""

    split: data.Split
    validation: Tensor
    bins: Quantisation | None
    std: float


def rows_of(recipe: Recipe) -> Rows:
    """Training, validation (a tenth of the training rows, at most 2,000) and test rows."""
    whole = recipe.load()
    held_out = min(2000, len(whole.train) // 10)
    labels = None if whole.train_labels is None else whole.train_labels[:-held_out]
    split = replace(whole, train=whole.train[:-held_out], train_labels=labels)
    bins = None if split.levels is None else Quantisation(split.levels)
    std = 1.0 if bins is None else float(bins.centres(split.train[:5000], torch.float32).std())
    return Rows(split, whole.train[-held_out:], bins, std)


@functools.cache
def truth(name: str, on: str) -> tuple[float, float] | None:
    """Minus the mean true log-density of all test or validation rows, and its standard error, where it is known."""
    recipe = RECIPES.get(name)
    if recipe is None or recipe.levels:
        return None
    rows = rows_of(recipe)
    if rows.split.log_density is None:
        return None
    values = -rows.split.log_density(rows.split.test if on == "test" else rows.validation)
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def unit(evaluation: ndm_ct.Evaluation, rows: Rows) -> tuple[float, float]:
    """A mean and its standard error, in bits per dimension for dequantised integers, in nats for vectors."""
    if rows.bins is None:
        return evaluation.nll, evaluation.stderr
    scale = rows.split.train[0].numel() * math.log(2.0)
    return evaluation.nll / scale - rows.bins.uniform_offset / math.log(2.0), evaluation.stderr / scale


def run(cell: Cell, recipe: Recipe, rows: Rows, options: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate one cell, or continue; returns its entry of the results."""
    folder = options.out / "cells" / cell.name
    entry = finished(options.out, options.on).get((cell.data, cell.model, cell.seed))
    if entry is not None:
        if entry["recipe"] != recipe.settings:
            raise RuntimeError(
                f"{cell.name} was made by another recipe, {entry['recipe']}; delete {folder} and its entry in "
                f"{options.out / results_name(options.on)}.json to make it anew."
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
    write_atomically(folder / f"{results_name(options.on)}.json", json.dumps(entry, indent=1).encode())
    return entry


def finished(out: Path, on: str) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Entries of finished cells: those of other processes too, and of results whose trainings are gone."""
    whole = out / f"{results_name(on)}.json"
    entries = json.loads(whole.read_text())["cells"] if whole.exists() else []
    entries += [json.loads(file.read_text()) for file in sorted((out / "cells").glob(f"*/{whole.name}"))]
    return {(entry["data"], entry["model"], entry["seed"]): entry for entry in entries}


def results_name(on: str) -> str:
    """Of the files with results on test or validation rows."""
    return "results" if on == "test" else on


def fit(model: ndm_ct.NDM, name: str, recipe: Recipe, rows: Rows, *, steps: int, **settings: Any) -> ndm_ct.FitResult:
    """``ndm_ct.fit`` by a recipe."""
    return ndm_ct.fit(
        model, rows.split.train, steps=steps, batch_size=recipe.batch_size, lr=recipe.lr,
        objective=Variant.parse(name).objective, quantisation=rows.bins,
        **settings,
    )  # fmt: skip


def trained(
    cell: Cell, recipe: Recipe, rows: Rows, folder: Path, options: argparse.Namespace
) -> tuple[ndm_ct.NDM, list[list[float]]]:
    """The trained model of a cell, and its validation bounds by step; trained here if it is not yet there."""
    model = build(cell.model, recipe, tuple(rows.split.train.shape[1:]), rows.std, cell.seed).to(options.device)
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
    """Seconds of an optimiser step, of the processor or the GPU, the median of rounds in which all have their turn."""
    shape = tuple(rows.split.train.shape[1:])

    def block(name: str) -> Callable[[], Any]:
        model = build(name, recipe, shape, rows.std, 0).to(device)
        return lambda: fit(model, name, recipe, rows, steps=BLOCK, progress=False)

    seconds = timed({name: block(name) for name in names}, ROUNDS, clock_of(device))
    return {name: float(np.median(values)) / BLOCK for name, values in seconds.items()}


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds of this process, or where a GPU works, of the wall once it has done what it was given."""
    if device.type == "cpu":
        return time.process_time

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised


def generator(model: ndm_ct.NDM, seed: int) -> torch.Generator:
    """Of the model's device."""
    return torch.Generator(model.device or "cpu").manual_seed(seed)


def consistency(model: ndm_ct.NDM, samples: int) -> metrics.Distance:
    """Energy distance between samples of the probability flow and of the reverse SDE, and its scatter at one law."""
    flow, noisy = (
        ndm_ct.sample(model, samples, batch_size=250, generator=generator(model, seed), **how).flatten(1).cpu()
        for seed, how in enumerate(({"method": "ode"}, {"method": "sde", "steps": 200}))
    )
    return metrics.energy_score(flow, noisy)


def distances(model: ndm_ct.NDM, rows: Rows, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Extrapolated Frechet distances of samples of classified images by method and number of steps."""
    assert rows.bins is not None
    net = features.load("cnn", rows.split, options.cache)
    enough = len(rows.split.test) >= 1000 and options.on == "test"
    real = rows.split.test if enough else rows.split.train
    reference = metrics.Reference(features.extract(net, real, options.cache))
    found: dict[str, dict[str, float]] = {}
    for method in ("ddpm", "ddim"):
        found[method] = {}
        for steps in STEP_COUNTS:
            x = ndm_ct.sample(
                model, options.samples, method=method, steps=steps, batch_size=250, generator=generator(model, 0)
            ).cpu()
            found[method][str(steps)] = metrics.frechet_infinity(net(levels_of(x, rows.bins)), reference).value
    return found


def paired(
    entries: list[dict[str, Any]], key: str, baseline: str = "matched"
) -> dict[tuple[str, str], tuple[float, float]]:
    """Mean difference from the baseline over common seeds, and its standard error, by data set and model."""
    table = {(e["data"], e["model"], e["seed"]): e[key][0] for e in entries}
    found = {}
    for name, model in dict.fromkeys((e["data"], e["model"]) for e in entries):
        seeds = [s for d, m, s in table if (d, m) == (name, model) and (name, baseline, s) in table]
        if not seeds or model == baseline:
            continue
        gaps = np.array([table[name, model, s] - table[name, baseline, s] for s in seeds])
        error = float(gaps.std(ddof=1)) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
        found[name, model] = float(gaps.mean()), error
    return found


def at_equal_time(
    entries: list[dict[str, Any]], seconds: dict[str, dict[str, float]], baseline: str = "matched"
) -> list[dict[str, Any]]:
    """Validation bounds of every model after the time that the baseline of its seed was trained, off the curves.

    Linear between two points of a curve. The learning rate had not come to its end for models that need longer: this
    favours the baseline.
    """
    ends = {(e["data"], e["seed"]): e["recipe"]["steps"] for e in entries if e["model"] == baseline}
    found = []
    for entry in entries:
        cost, last = seconds.get(entry["data"], {}), ends.get((entry["data"], entry["seed"]))
        if last is not None and {entry["model"], baseline} <= cost.keys():
            steps, values = np.array(entry["curve"]).T
            value = float(np.interp(last * cost[baseline] / cost[entry["model"]], steps, values))
            found.append({**entry, "at_time": (value, math.nan)})
    return found


def with_error(gap: float, error: float) -> str:
    """A difference; one seed alone has no error."""
    return f"{gap:+.4f}" if math.isnan(error) else f"{gap:+.4f} ± {error:.4f}"


def markdown(entries: list[dict[str, Any]], seconds: dict[str, dict[str, float]], on: str) -> str:
    """Tables: absolute values, and paired differences from the matched diffusion."""
    lines = ["# Claims", "", "| data | model | seeds | parameters | NELBO | flow NLL | ms / step |", "|" + "---|" * 7]
    gaps = {key: paired(entries, key) for key in ("nelbo", "nll")}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault((entry["data"], entry["model"]), []).append(entry)
    for (name, model), cells in groups.items():
        means = [np.mean([cell[key][0] for cell in cells]) for key in ("nelbo", "nll")]
        step = seconds.get(name, {}).get(model)
        numbers = f"{cells[0]['parameters']} | {means[0]:.4f} | {means[1]:.4f} | {f'{1e3 * step:.1f}' if step else ''}"
        lines.append(f"| {name} | {model} | {len(cells)} | {numbers} |")
    for name, (value, error) in {name: value for (name, _) in groups if (value := truth(name, on))}.items():
        lines += ["", f"The true density of {name} has {value:.4f} ± {error:.4f} on all {on} rows."]
    lines += ["", "Differences from the matched diffusion, paired by seed (negative is better):", ""]
    lines += ["| data | model | NELBO | flow NLL |", "|---|---|---|---|"]
    for (name, model), (gap, error) in gaps["nelbo"].items():
        other, other_error = gaps["nll"][name, model]
        lines.append(f"| {name} | {model} | {with_error(gap, error)} | {with_error(other, other_error)} |")
    timed = paired(at_equal_time(entries, seconds), "at_time")
    if timed:
        lines += ["", "Validation bound at equal training time:", "", "| data | model | difference |", "|---|---|---|"]
        lines += [f"| {name} | {model} | {with_error(*gap)} |" for (name, model), gap in timed.items()]
    drawn = [entry for entry in entries if entry["sde_ode"]]
    if drawn:
        lines += ["", "Energy distance between samples of flow and SDE, over its scatter where they have one law:", ""]
        lines += ["| data | model | seed | distance |", "|---|---|---|---|"]
        for entry in drawn:
            ratio = entry["sde_ode"]["value"] / entry["sde_ode"]["stderr"]
            lines.append(f"| {entry['data']} | {entry['model']} | {entry['seed']} | {ratio:.1f} |")
    with_fd = [entry for entry in entries if entry["fd"]]
    if with_fd:
        head = [f"{method} {steps}" for method in ("ddpm", "ddim") for steps in STEP_COUNTS]
        lines += ["", "FD(cnn), extrapolated:", "", f"| data | model | seed | {' | '.join(head)} |"]
        lines.append("|" + "---|" * (3 + len(head)))
        for entry in with_fd:
            values = [f"{entry['fd'][m][str(s)]:.3f}" for m in ("ddpm", "ddim") for s in STEP_COUNTS]
            lines.append(f"| {entry['data']} | {entry['model']} | {entry['seed']} | {' | '.join(values)} |")
    return "\n".join([*lines, ""])


def plot(entries: list[dict[str, Any]], seconds: dict[str, dict[str, float]], path: Path) -> None:
    """Validation bounds over steps and, where timed, over seconds, a row of panels per data set."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    names, models = (list(dict.fromkeys(entry[key] for entry in entries)) for key in ("data", "model"))
    models.sort(key=place)
    colours = colormaps["tab10"] if len(models) <= 10 else colormaps["turbo"].resampled(len(models))
    columns = 2 if any(name in seconds for name in names) else 1
    height = max(3.2 * len(names), 0.6 + 0.18 * len(models))
    figure = Figure(figsize=(2.0 + 4.75 * columns, height), layout="constrained")
    lines = {}
    for name, axes in zip(names, figure.subplots(len(names), columns, squeeze=False), strict=True):
        for entry in (entry for entry in entries if entry["data"] == name):
            steps, values = np.array(entry["curve"])[1:].T
            style = {"color": colours(models.index(entry["model"])), "linewidth": 0.9}
            (lines[entry["model"]],) = axes[0].plot(steps, values, **style)
            if entry["model"] in seconds.get(name, {}):
                axes[1].plot(seconds[name][entry["model"]] * steps, values, **style)
        axes[0].set(title=name, xlabel="steps", ylabel="validation bound, one draw per row")
        if columns == 2:
            axes[1].set(xlabel="seconds of training")
        for axis in axes:
            axis.grid(alpha=0.3)
    figure.legend([lines[model] for model in models], models, loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=110)


def plot_differences(entries: list[dict[str, Any]], path: Path) -> None:
    """Differences from the matched diffusion with two standard errors over seeds, a panel per data set."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    gaps = {"NELBO": paired(entries, "nelbo"), "flow NLL": paired(entries, "nll")}
    names = list(dict.fromkeys(name for name, _ in gaps["NELBO"]))
    models = sorted({model for _, model in gaps["NELBO"]}, key=place)
    images = {entry["data"]: entry["recipe"]["levels"] > 0 for entry in entries}
    columns = min(len(names), 4)
    rows = -(-len(names) // columns)
    size = (2.0 + 2.3 * columns, rows * (1.0 + 0.24 * len(models)))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for name, axes in zip(names, panels, strict=False):
        for (label, found), marker, lift in zip(gaps.items(), "os", (-0.12, 0.12), strict=True):
            heights = np.array([row for row, model in enumerate(models) if (name, model) in found])
            values, errors = np.array([found[name, models[row]] for row in heights]).T
            bars = 2.0 * np.nan_to_num(errors)
            axes.errorbar(values, heights + lift, xerr=bars, fmt=marker, markersize=4, label=label)
        axes.axvline(0.0, color="0.4", linewidth=0.8)
        unit = "bits/dim" if images[name] else "nats"
        axes.set(title=f"{name}, {unit}", yticks=range(len(models)), yticklabels=models, ylim=(len(models) - 0.5, -0.5))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(alpha=0.3)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)
    figure.supxlabel("difference from the matched diffusion", fontsize=9)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument

    def names(text: str) -> list[str]:
        return text.split(",")

    add("--preset", choices=PRESETS, default="smoke")
    usual = [name for name in RECIPES if name not in LONG]
    add("--data", type=names, default=usual, help=f"of {', '.join(RECIPES)}, or paths; several by commas")
    add("--models", type=names, help=f"of {', '.join(MODELS)}, or variants; several by commas (all of these)")
    add("--ablations", action="store_true", help="the models of ABLATIONS too")
    add("--seeds", type=lambda text: [int(part) for part in text.split(",")], help="default: those of the preset")
    add("--samples", type=int, default=1000, help="samples for the distances (1000); 0: none")
    add("--on", choices=("test", "validation"), default="test", help="rows to score; recipes are chosen on validation")
    add("--timing", action="store_true", help="measure seconds per optimiser step instead, into timing.json")
    add("--out", type=Path, help="default: runs/paper_claims/PRESET")
    add("--cache", type=Path, help="classifiers and features; default: cache in the output folder")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    try:
        recipes = {Path(source).stem: recipe_of(source, options.preset) for source in options.data}
    except FileNotFoundError as error:
        parser.error(f"--data: {error}.")
    try:
        for name in options.models or []:
            Variant.parse(name)
    except ValueError as error:
        parser.error(f"--models: {error}.")
    preset = PRESETS[options.preset]
    options.rows = preset["rows"]
    options.seeds = options.seeds or preset["seeds"]
    options.out = options.out or Path("runs/paper_claims") / options.preset
    options.cache = options.cache or options.out / "cache"
    for name, whole in recipes.items():
        recipe = replace(whole, steps=max(1, int(whole.steps * preset["steps"])))
        rows = rows_of(recipe)
        models = options.models or [*recipe.models, *(ABLATIONS if options.ablations else ())]
        if options.timing:
            known = timing(options.out)
            known[name] = known.get(name, {}) | seconds_per_step(recipe, rows, models, options.device)
            write_atomically(options.out / "timing.json", json.dumps(known, indent=1).encode())
            continue
        for seed in options.seeds:
            for model in models:
                entry = run(Cell(name, model, seed), recipe, rows, options)
                print(
                    f"{name}, {model}, seed {seed}: NELBO {entry['nelbo'][0]:.4f}, NLL {entry['nll'][0]:.4f}",
                    flush=True,
                )
                write(options.out, options.on)
    return write(options.out, options.on)


def timing(out: Path) -> dict[str, dict[str, float]]:
    """Seconds per step by data set and model, as far as measured."""
    file = out / "timing.json"
    return json.loads(file.read_text()) if file.exists() else {}


def place(name: str) -> tuple[int, str]:
    """Of a data set or a model in the tables; unknown ones come last, by name."""
    known = [*RECIPES, *MODELS, *ABLATIONS]
    return (known.index(name), "") if name in known else (len(known), name)


def write(out: Path, on: str) -> list[dict[str, Any]]:
    """Results from all cells that are finished, those of other processes too."""
    name, seconds = results_name(on), timing(out)
    entries = list(finished(out, on).values())
    entries.sort(key=lambda e: (place(e["data"]), place(e["model"]), e["seed"]))
    results = {"torch": torch.__version__, "seconds_per_step": seconds, "cells": entries}
    write_atomically(out / f"{name}.json", (json.dumps(results, indent=1) + "\n").encode())
    write_atomically(out / f"{name}.md", markdown(entries, seconds, on).encode())
    suffix = "" if on == "test" else f"_{on}"
    if entries:
        plot(entries, seconds, out / f"curves{suffix}.png")
    if paired(entries, "nelbo"):
        plot_differences(entries, out / f"differences{suffix}.png")
    return entries


if __name__ == "__main__":
    main()
