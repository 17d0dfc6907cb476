r"""Where should a sampler put its steps?
=====================================

A grid is a rule for N + 1 times from t = 1 (noise) to t_min (data). What a rule means depends on the schedule, because
samplers see time through the noise level,

.. math::
    \text{log-SNR}(t) = \log \frac{\alpha_t^2}{\sigma_t^2} .

Steps that are even in t are even in log-SNR for LinearLogSNR. For VariancePreserving most of the log-SNR then passes in
the last few steps. The top row of the picture shows where each grid puts its times. The rows below show the effect: the
rms error of samples against a tight solve of the same flow from the same noise, for five Gaussians in four dimensions.

Methods in the log-SNR ("ddim", "dpmpp_2m", "unipc") see only the noise level of a time. Grids that are chosen by noise
level ("logsnr", "karras", "edm") therefore make schedules of the same range alike; "uniform" and "quadratic" do not.
"heun", a method in t, gains where the flow is straight in t, as with Rectified on the uniform grid.

At t = 1 the log-SNR of Rectified and Cosine is minus infinity (arrows). ``python examples/time_grids.py`` takes under
a minute on one CPU core and writes ``time_grids.png`` and ``time_grids.json``. Other methods:
``python examples/time_grids.py --schedules Cosine --methods unipc3 edm --evaluations 5 10 20 40 80``.
"""

import argparse
import json
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
from ndm_ct.samplers.grids import GRIDS, time_grid

SCHEDULES = ("VariancePreserving", "LinearLogSNR", "Rectified", "Cosine")
METHODS = ("ddim", "dpmpp_2m", "unipc", "heun")
OTHERS = (
    "euler",
    "midpoint",
    "edm",
    "deis1",
    "deis2",
    "deis3",
    "dpmpp_2s",
    "dpmpp_3m",
    "pndm",
    "ipndm",
    "rk4",
    "unipc3",
)
STYLES = {
    "uniform": ("black", "o"), "logsnr": ("tab:blue", "s"), "quadratic": ("tab:green", "^"),
    "karras": ("tab:orange", "v"), "edm": ("tab:red", "D"),
}  # fmt: skip
SHOWN = 16
"""Steps of the grids in the top row."""

TIGHT = 1e-9
LEFT, RIGHT = -16.0, 15.0
"""Range of log-SNR in the top row; minus infinity is drawn at its left end."""


@dataclass(frozen=True)
class Draw:
    """One method on one grid at one cost: evaluations per sample and the rms error of the samples."""

    schedule: str
    method: str
    grid: str
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


def places(schedule: str, grid: str, steps: int) -> list[float | None]:
    """Log-SNR at the times of a grid; None for minus infinity."""
    model = mixture(getattr(schedules, schedule)())
    c = model.schedule(time_grid(model.schedule, model.t_min, steps, grid))
    return [-gamma if gamma < 60.0 else None for gamma in c.gamma.tolist()]


def measure(schedule: str, methods: Sequence[str], evaluations: Sequence[int], rows: int, seed: int) -> list[Draw]:
    """Measure all methods on all grids, from cheap to dear."""
    model, table = mixture(getattr(schedules, schedule)()), []
    flow, _ = draw(model, rows, seed, method="ode", rtol=TIGHT, atol=TIGHT)
    print(f"\n{schedule:<22}" + "".join(f"{n:>9}" for n in sorted(evaluations)), "evaluations")
    for method in methods:
        for grid in GRIDS:
            print(f"{method:<12}{grid:<10}", end="")
            for nfe in sorted(evaluations):
                x, cost = draw(model, rows, seed, method=method, nfe=nfe, grid=grid)
                table.append(Draw(schedule, method, grid, cost, rms(x - flow)))
                print(f"{table[-1].error:>9.1e}", end="")
            print(flush=True)
    return table


def reading(table: Sequence[Draw]) -> str:
    """Say which grid is best at the highest cost, and which is worst."""
    parts = []
    for schedule in dict.fromkeys(d.schedule for d in table):
        verdicts = []
        for method in dict.fromkeys(d.method for d in table):
            last = {d.grid: d.error for d in table if (d.schedule, d.method) == (schedule, method)}
            best, worst = min(last, key=last.__getitem__), max(last, key=last.__getitem__)
            verdicts.append(f"{method} {best} ({worst} {last[worst] / last[best]:.1f})")
        parts.append(f"{schedule}: {', '.join(verdicts)}")
    return f"Best grid at the highest cost (how many times larger the error of the worst is): {'; '.join(parts)}."


def plot(table: Sequence[Draw], evaluations: Sequence[int]) -> Figure:
    """Draw one column per schedule: its grids, then one row per method."""
    names, methods = (list(dict.fromkeys(getattr(d, key) for d in table)) for key in ("schedule", "method"))
    figure = plt.figure(figsize=(3.4 * len(names) + 0.8, 2.6 * len(methods) + 2.8), layout="constrained")
    axes = figure.subplots(1 + len(methods), len(names), squeeze=False)
    for axis, schedule in zip(axes[0], names, strict=True):
        _grids(axis, schedule)
        axis.tick_params(labelleft=axis is axes[0][0])
    costs, errors = zip(*((d.evaluations, d.error) for d in table), strict=True)
    for row, method in zip(axes[1:], methods, strict=True):
        for axis, schedule in zip(row, names, strict=True):
            _errors(axis, [d for d in table if (d.schedule, d.method) == (schedule, method)])
            axis.set_title(f"{method}, {schedule}", fontsize=10)
            axis.set_xticks(evaluations, [str(n) for n in evaluations])
            axis.set(xlim=(0.9 * min(costs), 1.1 * max(costs)), ylim=(0.6 * min(errors), 1.6 * max(errors)))
            axis.minorticks_off()
            axis.label_outer()
        row[0].set_ylabel("rms error of the samples")
    for axis in axes[-1]:
        axis.set_xlabel("network evaluations per sample")
    handles = axes[-1][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(GRIDS), title="time grid")
    return figure


def _errors(axis: Axes, table: Sequence[Draw]) -> None:
    for grid, (colour, marker) in STYLES.items():
        line = [(d.evaluations, d.error) for d in table if d.grid == grid]
        axis.loglog(*zip(*line, strict=True), color=colour, marker=marker, label=grid, markersize=4, linewidth=1.2)
    axis.grid(alpha=0.3)


def _grids(axis: Axes, schedule: str) -> None:
    for height, (grid, (colour, marker)) in enumerate(reversed(STYLES.items())):
        values = places(schedule, grid, SHOWN)
        axis.plot([LEFT + 1.0 if v is None else v for v in values], [height] * len(values), color=colour, linewidth=0.6)
        finite = [value for value in values if value is not None]
        axis.plot(finite, [height] * len(finite), color=colour, marker=marker, markersize=4, linestyle="none")
        if len(finite) < len(values):
            axis.plot(LEFT + 1.0, height, color=colour, marker="<", markersize=6, fillstyle="none")
    axis.set_yticks(range(len(STYLES)), reversed(STYLES))
    axis.set(xlim=(LEFT, RIGHT), ylim=(-0.7, len(STYLES) - 0.3), xlabel="log-SNR: noise left, data right")
    axis.set_title(f"times of {SHOWN} steps, {schedule}", fontsize=10)
    axis.grid(alpha=0.3, axis="x")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and draw; return what the JSON file holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, every = parser.add_argument, {"nargs": "+", "metavar": "NAME"}
    add("--out", type=Path, default=Path("runs/examples/time_grids"), help="folder to write to (%(default)s)")
    others = ("SubVariancePreserving", "VarianceExploding", "Trigonometric")
    add("--schedules", **every, default=SCHEDULES, choices=[*SCHEDULES, *others], help="of ndm_ct.schedules")
    add(
        "--methods",
        **every,
        default=METHODS,
        choices=[*METHODS, *OTHERS],
        help="deterministic methods of ndm_ct.sample",
    )
    add("--evaluations", nargs="+", type=int, default=[5, 8, 12, 20, 30, 50], help="network evaluations per sample")
    add("--rows", type=int, default=64, help="samples (%(default)s)")
    add("--seed", type=int, default=0, help="of the common noise")
    options = parser.parse_args(arguments)
    settings = options.methods, options.evaluations, options.rows, options.seed
    table = [one for name in options.schedules for one in measure(name, *settings)]
    report = {
        "rows": options.rows, "seed": options.seed, "draws": [asdict(one) for one in table],
        "places": {name: {grid: places(name, grid, SHOWN) for grid in GRIDS} for name in options.schedules},
        "reading": reading(table), "torch": torch.__version__,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    plot(table, sorted(options.evaluations)).savefig(options.out / "time_grids.png", dpi=110)
    (options.out / "time_grids.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    print(f"\n{report['reading']}")
    return report


if __name__ == "__main__":
    main()
