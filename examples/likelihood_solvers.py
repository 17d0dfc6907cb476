r"""Which solver for a likelihood, and how tight?
=============================================

The exact models of ``ndm_ct.reference`` have a closed formula for log p, so the error of a likelihood can be measured:

.. math::
    \text{error} = \log \hat p(x) - \log p_{t_{min}}(x), \qquad \text{work} = \text{network evaluations per row} .

1. Which method is cheapest at a given accuracy? The model is a mixture of five Gaussians in eight dimensions, the trace
   is exact, and every method is run at every tolerance. "ode", the solver of this library, gives each row its own
   steps. The others are torchdiffeq's and use one step size for the batch.
2. What does one hard row do to its neighbours? An outlier is appended to the same batch. Where the step size is shared,
   all rows pay for the outlier, and their log p depends on who else is in the batch. With "ode" it does not.

A method is not tightened further once a solve took more than ``--max-evaluations`` per row.
``python examples/likelihood_solvers.py`` takes under a minute on one CPU core and writes ``likelihood_solvers.png`` and
``likelihood_solvers.json``. A larger run:
``python examples/likelihood_solvers.py --rows 64 --max-evaluations 5000 --schedules VariancePreserving Cosine``.
"""

import argparse
import itertools
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
from matplotlib.ticker import NullLocator
from torch import Tensor

import ndm_ct
from ndm_ct import schedules
from ndm_ct.reference import GaussianMixture

SCHEDULES = ("VariancePreserving", "SubVariancePreserving", "VarianceExploding", "LinearLogSNR", "Cosine", "Rectified")
OURS = "ode"
STYLES = {
    OURS: ("black", "o"), "dopri5": ("tab:blue", "s"), "dopri8": ("tab:green", "D"), "bosh3": ("tab:orange", "^"),
    "adaptive_heun": ("tab:red", "v"),
}  # fmt: skip
METHODS = tuple(STYLES)
TARGET = 1e-3
"""The rms error, in nats, at which the reading compares costs."""

FLOOR = 1e-16
"""Where the picture shows a change of exactly zero."""


@dataclass(frozen=True)
class Solve:
    """One method at one tolerance: evaluations per row, and errors in nats over the rows.

    ``reported`` is the rms of ``info.ode_error``, the error that the method itself reports, or None.
    """

    schedule: str
    method: str
    tolerance: float
    evaluations: float
    rms_error: float
    max_error: float
    reported: float | None


@dataclass(frozen=True)
class HardRow:
    """The largest change of another row's log p in nats when an outlier joins the batch, and what the rows cost."""

    schedule: str
    method: str
    tolerance: float
    change: float
    evaluations_without: float
    evaluations_with: float
    evaluations_outlier: float

    @property
    def factor(self) -> float:
        """How many times as many evaluations the other rows take."""
        return self.evaluations_with / self.evaluations_without


def mixture(schedule: str, components: int = 5, d: int = 8) -> GaussianMixture:
    """The model: rotated, anisotropic Gaussians some standard deviations apart."""
    generator = torch.Generator().manual_seed(9)
    factors = 0.3 * torch.randn(components, d, d, dtype=torch.float64, generator=generator)
    covs = factors @ factors.mT + 0.05 * torch.eye(d, dtype=torch.float64)
    means = 2.0 * torch.randn(components, d, dtype=torch.float64, generator=generator)
    weights = torch.arange(1.0, components + 1.0, dtype=torch.float64)
    return GaussianMixture(weights / weights.sum(), means, covs, schedule=getattr(schedules, schedule)())


def work_precision(
    name: str, x: Tensor, methods: Sequence[str], tolerances: Sequence[float], max_evaluations: int
) -> dict[tuple[str, float], tuple[Solve, Tensor]]:
    """Run every method at every tolerance, from loose to tight; the values also hold the log-densities."""
    model, table = mixture(name), {}
    truth = model.log_prob(x)
    for method in methods:
        for tolerance in sorted(tolerances, reverse=True):
            try:
                logp, info = _loglik(model, x, method, tolerance)
            except ndm_ct.SolverError as failure:
                print(f"{name:<22}{method:<15}{tolerance:<9.0e}{failure}", flush=True)
                break
            error = logp - truth
            reported = _rms(info.ode_error) if bool(info.ode_error.isfinite().all()) else None
            cost, largest = _mean(info.row_nfe), float(error.abs().max())
            solve = Solve(name, method, tolerance, cost, _rms(error), largest, reported)
            table[method, tolerance] = solve, logp
            print(_line(solve), flush=True)
            if solve.evaluations > max_evaluations:
                break
    return table


def hard_row(
    name: str, x: Tensor, outlier: float, without: dict[tuple[str, float], tuple[Solve, Tensor]], max_evaluations: int
) -> list[HardRow]:
    """Repeat the solves with a row at distance ``outlier`` from the origin appended to the batch."""
    model, table, d = mixture(name), [], x.shape[1]
    batch = torch.cat([x, torch.full((1, d), outlier / math.sqrt(d), dtype=x.dtype)])
    stopped = set()
    for (method, tolerance), (alone, logp) in without.items():
        if method in stopped:
            continue
        try:
            together, info = _loglik(model, batch, method, tolerance)
        except ndm_ct.SolverError as failure:
            print(f"{method:<15}{tolerance:<9.0e}{failure}", flush=True)
            stopped.add(method)
            continue
        change, others = float((together[:-1] - logp).abs().max()), _mean(info.row_nfe[:-1])
        row = HardRow(name, method, tolerance, change, alone.evaluations, others, float(info.row_nfe[-1]))
        table.append(row)
        print(_hard_line(row), flush=True)
        if info.nfe > max_evaluations:
            stopped.add(method)
    return table


def cost_at(target: float, solves: Sequence[Solve]) -> float:
    """Evaluations at which the rms error falls to ``target``, interpolated between logarithms; NaN if it never does.

    If the loosest solve is already better, its evaluations are returned, because no looser one was tried.
    """
    for looser, tighter in itertools.pairwise(solves):
        if tighter.rms_error <= target < looser.rms_error:
            share = math.log(looser.rms_error / target) / math.log(looser.rms_error / tighter.rms_error)
            return looser.evaluations * (tighter.evaluations / looser.evaluations) ** share
    return solves[0].evaluations if solves and solves[0].rms_error <= target else math.nan


def reading(solves: Sequence[Solve], hard: Sequence[HardRow]) -> str:
    """Say in one sentence which method is cheapest and what the outlier does."""
    names = dict.fromkeys(s.schedule for s in solves)
    parts = [_cheapest(name, [s for s in solves if s.schedule == name]) for name in names]
    told = [s.reported / s.rms_error for s in solves if s.reported is not None]
    if told:
        parts.append(f"the error that {OURS} reports is {min(told):.2g} to {max(told):.2g} times the true one")
    own, shared = ([h for h in hard if (h.method == OURS) is same] for same in (True, False))
    if own:
        change = max(h.change for h in own)
        parts.append(f"an outlier in the batch moved the other rows' log p by at most {change:.1g} nat with {OURS}")
    if shared:
        worst, factor = max(shared, key=lambda h: h.change), max(h.factor for h in shared)
        parts.append(
            f"with shared steps it moved them by up to {worst.change:.1g} nat ({worst.method}, {worst.tolerance:.0e}) "
            f"and made them up to {factor:.1f} times as dear"
        )
    sentence = "; ".join(parts) + "."
    return sentence[0].upper() + sentence[1:]


def _cheapest(schedule: str, solves: Sequence[Solve]) -> str:
    methods = dict.fromkeys(s.method for s in solves)
    costs = {method: cost_at(TARGET, [s for s in solves if s.method == method]) for method in methods}
    reached = sorted((cost, method) for method, cost in costs.items() if math.isfinite(cost))
    if not reached:
        return f"under {schedule} no method reached an rms error of {TARGET:g} nat"
    listed = ", ".join(f"{method} {cost:.0f}" for cost, method in reached)
    return f"under {schedule} an rms error of {TARGET:g} nat takes evaluations per row: {listed}"


def plot(solves: Sequence[Solve], hard: Sequence[HardRow]) -> Figure:
    """Draw work against error for each schedule, and the influence of the hard row."""
    names = list(dict.fromkeys(s.schedule for s in solves))
    figure = plt.figure(figsize=(6.4 * (len(names) + 1), 4.6), layout="constrained")
    axes = figure.subplots(1, len(names) + 1)
    for axis, name in zip(axes, names, strict=False):
        _plot_work(axis, name, [s for s in solves if s.schedule == name])
    _plot_hard(axes[-1], hard)
    for axis in axes:
        axis.grid(alpha=0.3, which="major")
    return figure


def _plot_work(axis: Axes, name: str, solves: Sequence[Solve]) -> None:
    for method in dict.fromkeys(s.method for s in solves):
        chosen = [s for s in solves if s.method == method]
        work, (colour, marker) = [s.evaluations for s in chosen], STYLES[method]
        axis.loglog([s.rms_error for s in chosen], work, marker=marker, color=colour, label=method)
        largest = [s.max_error for s in chosen]
        axis.loglog(largest, work, marker=marker, color=colour, fillstyle="none", linestyle=":", alpha=0.7)
    axis.plot([], [], color="grey", linestyle=":", marker="o", fillstyle="none", label="largest of the rows")
    axis.invert_xaxis()
    ticks = [a * 10**b for b in range(1, 5) for a in (1, 2, 3, 5)]
    low, high = axis.get_ylim()
    axis.set_yticks([tick for tick in ticks if low <= tick <= high])
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set(xlabel="error of log p, nats: rms over rows", ylabel="network evaluations per row")
    axis.set_title(f"8-d mixture, {name}: lower and further right is better", fontsize=11)
    axis.legend(fontsize=8, loc="upper left")


def _plot_hard(axis: Axes, hard: Sequence[HardRow]) -> None:
    for method in dict.fromkeys(h.method for h in hard):
        chosen, (colour, marker) = [h for h in hard if h.method == method], STYLES[method]
        cost = math.exp(sum(math.log(h.factor) for h in chosen) / len(chosen))
        changes = [max(h.change, FLOOR) for h in chosen]
        label = f"{method}: the others cost {cost:.2g} times as much"
        axis.loglog([h.tolerance for h in chosen], changes, marker=marker, color=colour, label=label)
    axis.set_ylim(bottom=0.2 * FLOOR)
    axis.axhline(FLOOR, color="grey", linewidth=0.6, linestyle=":")
    axis.text(
        0.99, FLOOR, "exactly 0 is drawn here", transform=axis.get_yaxis_transform(), ha="right", va="bottom",
        fontsize=8, color="grey",
    )  # fmt: skip
    axis.invert_xaxis()
    axis.set(xlabel="rtol = atol", ylabel="largest change of another row's log p, nats")
    axis.set_title(f"an outlier joins the batch{f', {hard[0].schedule}' if hard else ''}", fontsize=11)
    axis.legend(fontsize=8, loc="center")


def _loglik(model: GaussianMixture, x: Tensor, method: str, tolerance: float) -> tuple[Tensor, ndm_ct.LikelihoodInfo]:
    return ndm_ct.loglik(model, x, trace="exact", method=method, rtol=tolerance, atol=tolerance, return_info=True)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _mean(counts: Tensor) -> float:
    return float(counts.double().mean())


def _line(s: Solve) -> str:
    reported = "-" if s.reported is None else f"{s.reported:.1e}"
    return (
        f"{s.schedule:<22}{s.method:<15}{s.tolerance:<9.0e}{s.evaluations:>11.0f}{s.rms_error:>11.1e}"
        f"{s.max_error:>11.1e}{reported:>11}"
    )


def _hard_line(h: HardRow) -> str:
    cost = f"{h.evaluations_without:.0f} -> {h.evaluations_with:.0f}, outlier {h.evaluations_outlier:.0f}"
    return f"{h.method:<15}{h.tolerance:<9.0e}{h.change:>15.1e}   {cost}"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and draw; return what the JSON file holds. The first schedule also gets the outlier."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, first = parser.add_argument, ("Rectified", "VariancePreserving")
    add("--out", type=Path, default=Path("runs/examples/likelihood_solvers"), help="folder to write to (%(default)s)")
    add("--schedules", nargs="+", default=first, choices=SCHEDULES, help="the first one also gets the outlier")
    add("--methods", nargs="+", default=METHODS, choices=METHODS, help="values of method= of ndm_ct.loglik")
    tolerances = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
    add("--tolerances", nargs="+", type=float, default=tolerances, help="values of rtol = atol")
    add("--rows", type=int, default=16, help="rows of the mixture (%(default)s)")
    add("--outlier", type=float, default=6.0, help="distance of the hard row from the origin (%(default)s)")
    add("--max-evaluations", type=int, default=150, help="where a method is tightened no further (%(default)s)")
    add("--seed", type=int, default=0, help="of the rows")
    options = parser.parse_args(arguments)
    headings = f"{'evaluations':>11}{'rms error':>11}{'max error':>11}{'reported':>11}"
    print(f"{'schedule':<22}{'method':<15}{'tol':<9}{headings}")
    rows, found, limit = {}, {}, options.max_evaluations
    for name in options.schedules:
        rows[name] = mixture(name).sample_data(options.rows, generator=torch.Generator().manual_seed(options.seed))
        found[name] = work_precision(name, rows[name], options.methods, options.tolerances, limit)
    solves = [solve for table in found.values() for solve, _ in table.values()]
    name = options.schedules[0]
    print(f"\none row at distance {options.outlier:g} joins the batch, {name}:")
    print(f"{'method':<15}{'tol':<9}{'change of log p':>15}   evaluations of the others, and of the outlier")
    hard = hard_row(name, rows[name], options.outlier, found[name], limit)
    report = {
        "rows": options.rows, "outlier": options.outlier, "seed": options.seed,
        "work_precision": [asdict(solve) for solve in solves], "hard_row": [asdict(row) for row in hard],
        "reading": reading(solves, hard), "torch": torch.__version__,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    plot(solves, hard).savefig(options.out / "likelihood_solvers.png", dpi=110)
    (options.out / "likelihood_solvers.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    print(f"\n{report['reading']}")
    return report


if __name__ == "__main__":
    main()
