r"""What a learned forward process costs: seconds per optimiser step and per sampling step, beside a plain diffusion.

    python benchmarks/training_cost.py                    # about 5 minutes on one CPU core
    python benchmarks/training_cost.py --preset smoke     # a look, a minute
    python benchmarks/training_cost.py --compile --models diffusion,ndm-x,ndm-flow

The models are those of ``paper_claims.py`` with its recipes, and the same with
:math:`F = x + t\,\mathrm{net}(x, t)`, whose time derivative has to be found by forward mode (``-neural``). Timed are
blocks of ``fit`` and of ``sample``, in seconds of the processor on one thread, all models in turn, round after round.
A cost is the median over rounds of the ratio to the plain diffusion with the same predictor *in the same round*; its
error is that of a median, 1.25 standard deviations over the square root of the rounds, the standard deviation from the
median absolute deviation.

Two more tables say where the costs come from. *Time derivatives*: :math:`(F, \dot F)` of one network, in units of its
forward pass. *Two gradients*: head "moments" wants the gradient of bound and regressions in the predictor's weights but
of the bound alone in its state; by a second evaluation at a detached state, by one evaluation of twice the rows, and
by a second backward pass to the state only (what ``loss`` does), in units of one evaluation with its backward pass.

``--compile`` compiles the networks in place (``module.compile()``), which leaves names, checkpoints and averaged
weights as they are. Writes ``training_cost.json``, ``.md`` and ``.png`` (``training_cost_compiled`` with ``--compile``)
into ``--out``.
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import paper_claims
import torch
from sampling_cost import timed
from torch import Tensor, nn

import ndm_ct
from ndm_ct import transforms

RESULTS = Path(__file__).parent / "results"
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

TRAINING_LIMITS = {"limit": 2.3, "aim": 1.8}
DIFFERENCE = 3e-4
"""Step of the central difference in time; of 1e-2, 3e-3, 1e-3, 3e-4 and 1e-4 the one with the least error."""


def build(name: str, recipe: paper_claims.Recipe, shape: tuple[int, ...]) -> ndm_ct.NDM:
    """An untrained model, one of ``MODELS``."""
    change = "+neural" if "-neural" in name else ""
    return paper_claims.build(name.replace("-neural", "") + change, recipe, shape, 1.0, 0)


def compile_networks(models: Iterable[ndm_ct.NDM]) -> None:
    """Compile the networks of models in place."""
    import torch._dynamo.config

    torch._dynamo.config.recompile_limit = 256  # counted for the code, which all models here share
    for module in (module for model in models for module in model.modules()):
        if isinstance(module, ndm_ct.nn.UNet | ndm_ct.nn.MLP | ndm_ct.nn.FromZuko):
            module.compile()


def training(model: ndm_ct.NDM, x: Tensor, steps: int, batch: int) -> Callable[[], Any]:
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


class PlainGroupNorm(nn.GroupNorm):
    """Normalisation of groups as one scale and shift per row and channel, in operations that have derivatives."""

    def forward(self, h: Tensor) -> Tensor:
        """Of shape ``(B, C, *)``."""
        groups = h.flatten(1).unflatten(1, (self.num_groups, -1))
        mean = groups.mean(-1)
        spread = torch.rsqrt((groups * groups).mean(-1) - mean * mean + self.eps)
        each = self.num_channels // self.num_groups
        scale = spread.repeat_interleave(each, 1) * self.weight
        shift = self.bias - mean.repeat_interleave(each, 1) * scale
        shape = (*scale.shape, *(1,) * (h.ndim - 2))
        return torch.addcmul(shift.reshape(shape), h, scale.reshape(shape))


def normalised(net: nn.Module, kind: str) -> nn.Module:
    """The network with its GroupNorms removed, or in plain operations."""
    for parent in list(net.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.GroupNorm):
                plain = PlainGroupNorm(module.num_groups, module.num_channels)
                setattr(parent, name, nn.Identity() if kind == "no GroupNorm" else plain)
    return net


def awake(net: nn.Module) -> nn.Module:
    """The network with its last layer drawn at random: a zero one has a zero derivative."""
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return net


def derivatives(recipe: paper_claims.Recipe, shape: tuple[int, ...], rows: int) -> dict[str, Callable[[], Any]]:
    """Ways to F and its time derivative: bare, and with the backward pass that a training needs."""
    torch.manual_seed(0)
    net = awake(paper_claims.network(recipe, shape, recipe.width, None))
    terms = paper_claims.TERMS
    features = awake(paper_claims.network(recipe, shape, recipe.width, terms, time=False))
    neural, separable = transforms.Neural(net), transforms.Separable(features, transforms.PolynomialBasis(terms))
    x, t = torch.randn(rows, *shape), torch.rand(rows, dtype=torch.float64)

    def difference() -> tuple[Tensor, Tensor]:
        return central_difference(net, x, t)

    ways: dict[str, tuple[nn.Module, Callable[[], tuple[Tensor, ...]]]] = {
        "network alone": (net, lambda: (net(x, t.to(x.dtype)),)),
        "Neural, forward mode": (net, lambda: neural.with_derivative(x, t)),
        "Neural, central difference": (net, difference),
        "Separable, analytic": (features, lambda: separable.with_derivative(x, t)),
    }

    for kind in ("no GroupNorm", "plain GroupNorm") if recipe.levels else ():
        other = normalised(copy.deepcopy(net), kind)
        ways[f"network, {kind}"] = (other, lambda other=other: (other(x, t.to(x.dtype)),))
        ways[f"Neural, forward mode, {kind}"] = (other, partial(transforms.Neural(other).with_derivative, x, t))

    def bare(way: Callable[[], tuple[Tensor, ...]]) -> Callable[[], Any]:
        return torch.no_grad()(way)

    def trained(module: nn.Module, way: Callable[[], tuple[Tensor, ...]]) -> Callable[[], Any]:
        weights = list(module.parameters())
        return lambda: torch.autograd.grad(sum(each.square().sum() for each in way()), weights)

    calls = {name: bare(way) for name, (_, way) in ways.items()}
    return calls | {f"{name}, and backward": trained(*way) for name, way in ways.items()}


def central_difference(net: nn.Module, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The network's mean of two values in time and their difference quotient, one call of twice the rows."""
    times = torch.cat([t - DIFFERENCE, t + DIFFERENCE]).to(x.dtype)
    before, after = net(torch.cat([x, x]), times).chunk(2)
    return 0.5 * (before + after), (after - before) / (2.0 * DIFFERENCE)


def difference_error(recipe: paper_claims.Recipe, shape: tuple[int, ...]) -> float:
    """Error of the central difference in float32 relative to the derivative, root mean squares."""
    torch.manual_seed(0)
    net = awake(paper_claims.network(recipe, shape, recipe.width, None))
    x, t = torch.randn(64, *shape), torch.rand(64, dtype=torch.float64)
    with torch.no_grad():
        found = central_difference(net, x, t)[1].double()
        net, x = net.double(), x.double()
        _, exact = torch.func.jvp(lambda time: net(x, time), (t,), (torch.ones_like(t),))
    return float((found - exact).norm() / exact.norm())


def gradients(recipe: paper_claims.Recipe, shape: tuple[int, ...], rows: int) -> dict[str, Callable[[], Any]]:
    """Ways to two losses' gradients of which only the first reaches the state."""
    torch.manual_seed(0)
    net = awake(paper_claims.network(recipe, shape, recipe.width, 2))
    x, t, gain = torch.randn(rows, *shape), torch.rand(rows), torch.ones((), requires_grad=True)
    wanted = [*net.parameters(), gain]

    def first(output: Tensor) -> Tensor:
        return output.square().sum()

    def second(output: Tensor) -> Tensor:
        return output.abs().sum()

    def single() -> Any:
        return torch.autograd.grad(first(net(gain * x, t)), wanted)

    def two_evaluations() -> Any:
        z = gain * x
        return torch.autograd.grad(first(net(z, t)) + second(net(z.detach(), t)), wanted)

    def twice_the_rows() -> Any:
        z = gain * x
        one, other = net(torch.cat([z, z.detach()]), torch.cat([t, t])).chunk(2)
        return torch.autograd.grad(first(one) + second(other), wanted)

    def two_backward_passes() -> Any:
        z = gain * x
        state = z.detach().requires_grad_()
        output = net(state, t)
        bound = first(output)
        (through,) = torch.autograd.grad(bound, state, retain_graph=True)
        return torch.autograd.grad(bound + second(output) + (through * z).sum(), wanted)

    return {
        "one loss": single, "two evaluations": two_evaluations, "twice the rows": twice_the_rows,
        "two backward passes": two_backward_passes,
    }  # fmt: skip


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All tables of one configuration."""
    recipe, shape, preset = paper_claims.RECIPES[name], SHAPES[name], PRESETS[options.preset]
    rounds, block, steps = preset["rounds"], preset["block"], preset["steps"]
    batch = preset["batch"] or recipe.batch_size
    models = {each: build(each, recipe, shape) for each in options.models}
    if options.compile:
        compile_networks(models.values())
    torch.manual_seed(0)
    x = torch.randn(block * batch, *shape)
    walks = {each: sampling(model, batch, steps) for each, model in models.items() if each in SAMPLED}
    blocks = {each: training(model, x, block, batch) for each, model in models.items()}
    return {
        "parameters": {each: paper_claims.parameters(model) for each, model in models.items()},
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
    for part, title in titles.items():
        lines += [f"### {title}", "", f"| | {' | '.join(results)} |", "|" + "---|" * (1 + len(results))]
        for row in dict.fromkeys(row for entry in results.values() for row in entry[part]):
            cells = [entry[part].get(row) for entry in results.values()]
            values = [
                f"{cell['ratio']:.3f} ± {cell['stderr']:.3f} ({cell['ms']:.3g} ms)" if cell else "–" for cell in cells
            ]
            lines.append(f"| {row} | {' | '.join(values)} |")
        lines.append("")
    errors = ", ".join(f"{entry['difference_error']:.1e} ({name})" for name, entry in results.items())
    lines.append(f"Error of the central difference, float32, relative to the derivative: {errors}.")
    return "\n".join([*lines, ""])


def plot(results: dict[str, Any], path: Path) -> None:
    """Costs of an optimiser step as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 + 2.2 * len(results), 4.2), layout="constrained")
    axes = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axis, (name, entry) in zip(axes, results.items(), strict=True):
        rows = list(entry["training"].items())[::-1]
        values, errors = [row["ratio"] for _, row in rows], [row["stderr"] for _, row in rows]
        axis.barh([model for model, _ in rows], values, xerr=errors, color="C0")
        for (label, limit), style in zip(TRAINING_LIMITS.items(), ("-", "--"), strict=True):
            axis.axvline(limit, color="black", linestyle=style, linewidth=0.8, label=f"{label}, {limit}")
        axis.set_title(name)
        axis.grid(axis="x", alpha=0.3)
    figure.supxlabel("optimiser step / diffusion's", fontsize=10)
    axes[0].legend(loc="upper right", fontsize=8)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line; returns all tables by data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            if unknown := set(text.split(",")) - set(known):
                raise argparse.ArgumentTypeError(f"{', '.join(unknown)} unknown; there are {', '.join(known)}.")
            return text.split(",")

        return parse

    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--data", type=names(tuple(SHAPES)), default=list(SHAPES), help="several by commas")
    parser.add_argument("--models", type=names(MODELS), default=list(MODELS), help="several by commas")
    parser.add_argument("--compile", action="store_true", help="compile the networks")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if "diffusion" not in options.models:
        parser.error("--models needs diffusion, the baseline.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results: dict[str, Any] = {}
        for name in options.data:
            results[name] = measure(name, options)
            write(results, options)
    finally:
        torch.set_num_threads(threads)
    print(markdown(results))
    return results


def write(results: dict[str, Any], options: argparse.Namespace) -> None:
    """All that has been measured so far."""
    options.out.mkdir(parents=True, exist_ok=True)
    stem = "training_cost_compiled" if options.compile else "training_cost"
    report = {"settings": PRESETS[options.preset], "torch": torch.__version__, "results": results}
    (options.out / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / f"{stem}.md").write_text(markdown(results))
    plot(results, options.out / f"{stem}.png")


if __name__ == "__main__":
    main()
