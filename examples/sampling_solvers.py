r"""Which solver draws a sample with the fewest network evaluations?
================================================================

Every deterministic method starts from the same noise as a tight solve of the probability flow, so that its error is a
plain difference:

.. math::
    \text{error} = \sqrt{\operatorname{mean} |x_{method} - x_{flow}|^2} \sim \text{evaluations}^{-p} .

There are two models: a mixture of five Gaussians in four dimensions, whose prediction is exact and smooth, and the
committed network for 8x8 digits. On logarithmic axes a method of order p is a line of slope -p. The slope over the last
doubling of the cost is measured, and the legend shows it next to the order that theory gives.

Two things to look for. At few evaluations the order says little: the lines cross. And on the digits multistep methods
of order three and four may come out at two, because they take steps of lower order until they have a history. The
mixture's schedule begins in almost pure noise, where a low order is enough; that of the digits does not.

"ode" and "dopri5" choose their steps by tolerance, "ode" for every sample separately; their cost is that of the sample
that took most evaluations.

``python examples/sampling_solvers.py`` takes under a minute on one CPU core and writes ``sampling_solvers.png`` and
``sampling_solvers.json``. A finer picture:
``python examples/sampling_solvers.py --methods ddim heun unipc --evaluations 5 10 20 40 80 160``.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import ndm_ct
from ndm_ct import schedules
from ndm_ct.reference import GaussianMixture

NETWORK = Path(__file__).parents[1] / "benchmarks" / "weights" / "digits.safetensors"
ORDERS = {
    "euler": 1, "ddim": 1,
    "midpoint": 2, "heun": 2, "edm": 2, "deis1": 2, "dpmpp_2s": 2, "dpmpp_2m": 2, "pndm": 2, "ipndm": 2,
    "deis2": 3, "dpmpp_3m": 3, "unipc": 3,
    "rk4": 4, "deis3": 4, "unipc3": 4,
}  # fmt: skip
"""Every deterministic sampler on a grid, with the order of its steps once it has a history."""

ADAPTIVE = ("ode", "dopri5")
COLOURS = {1: "grey", 2: "tab:blue", 3: "tab:orange", 4: "tab:red", None: "black"}
MARKERS = "osD^v<>P"
PROBLEMS = {"mixture": (128, 1e-10), "digits": (6, 1e-8)}
"""Number of samples, and the tolerance of the tight solve."""


@dataclass(frozen=True)
class Draw:
    """One method at one setting, which is a number of evaluations or a tolerance: its cost and its rms error."""

    problem: str
    method: str
    setting: float
    evaluations: float
    error: float


def mixture(schedule: schedules.Schedule) -> GaussianMixture:
    """Five rotated, anisotropic Gaussians in four dimensions, close enough for a smooth flow."""
    generator = torch.Generator().manual_seed(9)
    factors = 0.3 * torch.randn(5, 4, 4, dtype=torch.float64, generator=generator)
    covs = factors @ factors.mT + 0.04 * torch.eye(4, dtype=torch.float64)
    means = torch.randn(5, 4, dtype=torch.float64, generator=generator)
    return GaussianMixture(torch.arange(1.0, 6.0) / 15.0, means, covs, schedule=schedule)


def draw(model: ndm_ct.NDM, rows: int, seed: int, **options: Any) -> tuple[Tensor, int]:
    """Samples in float64, and the network evaluations of the sample that took most.

    The same seed starts at the same noise, whatever the method. ``options`` are those of ``ndm_ct.sample``.
    """
    generator = torch.Generator().manual_seed(seed)
    x, info = ndm_ct.sample(model, rows, generator=generator, dtype=torch.float64, return_info=True, **options)
    return x, info.nfe


def rms(difference: Tensor) -> float:
    """Root of the mean square, over samples and coordinates."""
    return float(difference.square().mean().sqrt())


def slope(cheap: tuple[float, float], dear: tuple[float, float]) -> float:
    """The p of an error that falls as cost^-p, from two pairs (cost, error)."""
    return math.log(cheap[1] / dear[1]) / math.log(dear[0] / cheap[0])


def model_of(problem: str) -> ndm_ct.NDM:
    """The model, with its network in float64 so that rounding does not hide small errors."""
    if problem == "mixture":
        return mixture(schedules.LinearLogSNR(-6.0, 8.0))
    return ndm_ct.load(NETWORK).requires_grad_(False).double()


def work_precision(
    problem: str, rows: int, methods: Sequence[str], evaluations: Sequence[int], tolerances: Sequence[float], seed: int
) -> list[Draw]:
    """Measure all methods at all costs, from cheap to dear."""
    model, tight, table = model_of(problem), PROBLEMS[problem][1], []
    flow, cost = draw(model, rows, seed, method="ode", rtol=tight, atol=tight)
    print(f"\n{problem}: {rows} samples; the tight solve took {cost:.0f} evaluations each\n{'rms error':>10}", end="")
    print("".join(f"{n:>9}" for n in sorted(evaluations)), "evaluations")
    for method in methods:
        adaptive = method in ADAPTIVE
        print(f"{method:<10}", end="")
        for setting in sorted(tolerances, reverse=True) if adaptive else sorted(evaluations):
            options = {"rtol": setting, "atol": setting} if adaptive else {"nfe": int(setting)}
            x, cost = draw(model, rows, seed, method=method, **options)
            table.append(Draw(problem, method, float(setting), cost, rms(x - flow)))
            spent = f" with {cost:.0f}," if adaptive else ""
            print(f"{table[-1].error:>9.1e}{spent}", end="", flush=True)
        print()
    return table


def last_slopes(table: Sequence[Draw]) -> dict[str, float]:
    """Slope of every method on a grid, between its two dearest draws."""
    methods = dict.fromkeys(d.method for d in table if d.method in ORDERS)
    ends = {method: [(d.evaluations, d.error) for d in table if d.method == method][-2:] for method in methods}
    return {method: slope(cheap, dear) for method, (cheap, dear) in ends.items()}


def reading(tables: dict[str, list[Draw]], slopes: dict[str, dict[str, float]]) -> str:
    """What the numbers say."""
    parts = []
    for problem, table in tables.items():
        fixed = [d for d in table if d.method not in ADAPTIVE]
        budgets = dict.fromkeys(d.setting for d in fixed)
        best = [min((d for d in fixed if d.setting == budget), key=lambda d: d.error) for budget in budgets]
        listed = ", ".join(f"{d.method} at {d.setting:.0f} ({d.error:.0e})" for d in best)
        worst = max(slopes[problem], key=lambda method: ORDERS[method] - slopes[problem][method])
        parts.append(
            f"{problem} the lowest error is that of {listed}; the slope furthest below its order is that of {worst}, "
            f"{slopes[problem][worst]:.1f} instead of {ORDERS[worst]}"
        )
    return "On the " + ". On the ".join(parts) + "."


def plot(tables: dict[str, list[Draw]], slopes: dict[str, dict[str, float]]) -> Figure:
    """Draw one panel per model, and one legend for both."""
    figure = plt.figure(figsize=(5.6 * len(tables) + 3.4, 6.4), layout="constrained")
    axes = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    titles = {"mixture": "five Gaussians in 4-d", "digits": "trained network, 8x8 digits"}
    for axis, (problem, table) in zip(axes, tables.items(), strict=True):
        _lines(axis, table)
        axis.set_title(f"{titles[problem]}: lower left is better", fontsize=11)
        axis.set(xlabel="network evaluations per sample")
    axes[0].set(ylabel="rms error of the samples")
    handles, methods = axes[0].get_legend_handles_labels()
    columns = "".join(f"{problem:>9}" for problem in tables)
    rows = [f"{m:<10}" + (_numbers(m, slopes) if m in ORDERS else f"{'steps by tolerance':>23}") for m in methods]
    font = {"family": "monospace", "size": 9}
    figure.legend(
        handles, rows, title=f"{'measured slope':>{len(rows[0])}}\n{'method':<10}{'order':>5}{columns}", prop=font,
        title_fontproperties=font, alignment="right", loc="outside right center",
    )  # fmt: skip
    return figure


def _numbers(method: str, slopes: dict[str, dict[str, float]]) -> str:
    return f"{ORDERS[method]:>5}" + "".join(f"{column[method]:>9.1f}" for column in slopes.values())


def _lines(axis: Axes, table: Sequence[Draw]) -> None:
    seen: dict[int | None, int] = {}
    for method in dict.fromkeys(d.method for d in table):
        line, order = [d for d in table if d.method == method], ORDERS.get(method)
        number = seen[order] = seen.get(order, -1) + 1
        axis.loglog(
            [d.evaluations for d in line], [d.error for d in line], marker=MARKERS[number % len(MARKERS)], label=method,
            color=COLOURS[order], linewidth=1.2, markersize=5, linestyle="--" if order is None else "-",
        )  # fmt: skip
    ticks = dict.fromkeys(int(d.setting) for d in table if d.method in ORDERS)
    axis.set_xticks(list(ticks), [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and draw; return what the JSON file holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, names = parser.add_argument, [*ORDERS, *ADAPTIVE]
    add("--out", type=Path, default=Path("runs/examples/sampling_solvers"), help="folder to write to (%(default)s)")
    add("--methods", nargs="+", default=names, choices=names, metavar="NAME", help="methods of ndm_ct.sample (all)")
    add("--evaluations", nargs="+", type=int, default=[8, 16, 32, 64, 128], help="costs of methods on a grid")
    add("--tolerances", nargs="+", type=float, default=[1e-2, 1e-3, 1e-4, 1e-5], help="rtol = atol of the others")
    for problem, (count, _) in PROBLEMS.items():
        add(f"--{problem}", type=int, default=count, metavar="N", help=f"samples of the {problem} (%(default)s); or 0")
    add("--seed", type=int, default=0, help="of the common noise")
    options = parser.parse_args(arguments)
    if len(options.evaluations) < 2:
        parser.error("a slope needs two --evaluations.")
    if not set(options.methods) & set(ORDERS) or options.mixture + options.digits < 1:
        parser.error("there is nothing to measure without a method on a grid and samples of one model.")
    rows = {problem: getattr(options, problem) for problem in PROBLEMS}
    costs = options.evaluations, options.tolerances
    tables = {p: work_precision(p, n, options.methods, *costs, options.seed) for p, n in rows.items() if n}
    slopes = {problem: last_slopes(table) for problem, table in tables.items()}
    report = {
        "rows": rows, "seed": options.seed, "orders": ORDERS, "slopes": slopes,
        "draws": [asdict(one) for table in tables.values() for one in table],
        "reading": reading(tables, slopes), "torch": torch.__version__,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    plot(tables, slopes).savefig(options.out / "sampling_solvers.png", dpi=110)
    (options.out / "sampling_solvers.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    print(f"\n{report['reading']}")
    return report


if __name__ == "__main__":
    main()
