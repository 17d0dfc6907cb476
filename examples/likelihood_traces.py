r"""Which trace for a likelihood in many dimensions?
================================================

The change of log p along the probability flow is the trace of a Jacobian. The exact trace takes one vector-Jacobian
product per dimension. Two estimates are cheaper: "hutchinson" solves the equation with frozen random probes, and
"quadrature" solves the path first and then samples the trace at random nodes along it.

The model is a Gaussian on an 8x8 grid with covariance exp(-distance/2), so that neighbours go together as pixels do.
Its log p is a closed formula. For every estimate,

.. math::
    \text{RMSE} = \sqrt{\operatorname{mean} (\log \hat p(x) - \log p_{t_{min}}(x))^2}

over rows and repeats is drawn over the passes through the network per row: evaluations and vector-Jacobian products,
including those of the error budget. The printed "error/reported" is the spread of the error in units of the reported
standard error; it is one if the error bars are right.

``python examples/likelihood_traces.py`` takes under a minute on one CPU core and writes ``likelihood_traces.png`` and
``likelihood_traces.json``.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

import ndm_ct
from ndm_ct import divergence
from ndm_ct.reference import Gaussian

PROBES = (1, 2, 4, 8, 16)
SWEEPS = ((8, 1, 1), (16, 1, 2), (16, 1, 4), (16, 2, 8), (32, 2, 8))
"""Sizes of ``divergence.Quadrature``: nodes, probes, sweeps."""

PATH_TOLERANCE, EXACT_TOLERANCES = 3e-5, (1e-2, 1e-3, 1e-4)
STYLES = {"hutchinson": ("tab:blue", "s"), "quadrature": ("black", "o"), "exact": ("tab:green", "D")}
MEANING = {"hutchinson": "frozen probes", "quadrature": "nodes x probes x sweeps", "exact": "tolerance"}


@dataclass(frozen=True)
class Estimate:
    """One trace estimate: passes per row, RMSE in nats, and the spread of error / reported error."""

    trace: str
    setting: str
    passes: float
    rmse: float
    calibration: float | None


def grid_gaussian(size: int = 8, length: float = 2.0) -> Gaussian:
    """A Gaussian on a square grid with covariance exp(-distance / length)."""
    places = torch.cartesian_prod(*2 * [torch.arange(size, dtype=torch.float64)])
    return Gaussian(torch.zeros(size, size), torch.exp(-torch.cdist(places, places) / length))


def measure(rows: int, repeats: int, seed: int) -> list[Estimate]:
    """Run every estimate on the grid. Repeats of a row are rows of the batch, with their own random numbers."""
    model = grid_gaussian()
    x = model.sample_data(rows, generator=torch.Generator().manual_seed(seed))
    settings: list[tuple[str, str, Any, float]] = [
        *(("hutchinson", str(k), divergence.Hutchinson(k), PATH_TOLERANCE) for k in PROBES),
        *(("quadrature", "x".join(map(str, s)), divergence.Quadrature(*s), PATH_TOLERANCE) for s in SWEEPS),
        *(("exact", f"{tol:.0e}", divergence.Exact(), tol) for tol in EXACT_TOLERANCES),
    ]
    table = []
    for trace, setting, estimator, tol in settings:
        batch = x if trace == "exact" else x.repeat_interleave(repeats, 0)
        generator = torch.Generator().manual_seed(seed)
        logp, info = ndm_ct.loglik(
            model, batch, trace=estimator, rtol=tol, atol=tol, generator=generator, return_info=True
        )
        error, passes = logp - model.log_prob(batch), (info.row_nfe + info.row_vjps).double()
        calibration = float((error / info.stderr).std()) if bool((info.stderr > 0.0).all()) else None
        table.append(Estimate(trace, setting, float(passes.mean()), float(error.square().mean().sqrt()), calibration))
        e, spread = table[-1], "-" if calibration is None else f"{calibration:.2f}"
        print(f"{e.trace:<12}{e.setting:<11}{e.passes:>8.0f}{e.rmse:>11.3g}{spread:>16}", flush=True)
    return table


def advantage(table: Sequence[Estimate]) -> dict[str, float]:
    """Hutchinson's RMSE divided by that of each setting of the quadrature at the same number of passes.

    Hutchinson's RMSE is interpolated between logarithms. Settings outside its range of passes are left out.
    """
    hutchinson = sorted((e.passes, e.rmse) for e in table if e.trace == "hutchinson")
    if not hutchinson:
        return {}
    passes, rmse = np.log(np.array(hutchinson)).T
    return {
        e.setting: math.exp(np.interp(math.log(e.passes), passes, rmse)) / e.rmse
        for e in table
        if e.trace == "quadrature" and passes[0] <= math.log(e.passes) <= passes[-1]
    }


def reading(table: Sequence[Estimate]) -> str:
    """Say how the two estimates compare at the same cost."""
    ratios = advantage(table).values()
    if not ratios:
        return "No setting of the quadrature costs as much as one of hutchinson."
    return f"At equal passes the RMSE of hutchinson is {min(ratios):.1f} to {max(ratios):.1f} times that of quadrature."


def plot(estimates: Sequence[Estimate]) -> Figure:
    """Draw the RMSE over the passes."""
    figure, axis = plt.subplots(figsize=(8.0, 5.0), layout="constrained")
    for trace, (colour, marker) in STYLES.items():
        chosen = sorted((e for e in estimates if e.trace == trace), key=lambda e: e.passes)
        label = f"{trace} ({MEANING[trace]})"
        axis.loglog([e.passes for e in chosen], [e.rmse for e in chosen], marker=marker, color=colour, label=label)
        place = {"xytext": (-5, -11), "ha": "right"} if trace == "quadrature" else {"xytext": (5, 4), "ha": "left"}
        for e in chosen:
            axis.annotate(
                e.setting, (e.passes, e.rmse), textcoords="offset points", fontsize=8, color=colour, **place
            )  # fmt: skip
    axis.margins(x=0.12, y=0.08)
    axis.set(xlabel="network passes per row (evaluations + vector-Jacobian products)", ylabel="RMSE of log p, nats")
    axis.set_title("64-d Gaussian with local correlations: lower left is better", fontsize=11)
    axis.legend(fontsize=8, loc="lower left")
    axis.grid(alpha=0.3)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and draw; return what the JSON file holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/examples/likelihood_traces"), help="folder to write to (%(default)s)")
    add("--rows", type=int, default=4, help="rows of the Gaussian (%(default)s)")
    add("--repeats", type=int, default=16, help="repeats of every random estimate on each of them (%(default)s)")
    add("--seed", type=int, default=0, help="of rows, probes and nodes")
    options = parser.parse_args(arguments)
    print(f"{'trace':<12}{'setting':<11}{'passes':>8}{'RMSE':>11}{'error/reported':>16}")
    table = measure(options.rows, options.repeats, options.seed)
    report = {
        "rows": options.rows, "repeats": options.repeats, "seed": options.seed, "trace": [asdict(e) for e in table],
        "hutchinson_over_quadrature": advantage(table), "reading": reading(table), "torch": torch.__version__,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    plot(table).savefig(options.out / "likelihood_traces.png", dpi=110)
    (options.out / "likelihood_traces.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    print(f"\n{report['reading']}")
    return report


if __name__ == "__main__":
    main()
