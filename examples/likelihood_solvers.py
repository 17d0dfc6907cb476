r"""Which solver for a likelihood, how tight, and which trace: measured where the answer is known.

.. math::
    \text{error} = \log \hat p(x) - \log p_{t_{min}}(x), \qquad \text{work} = \text{network evaluations per row} .

    python examples/likelihood_solvers.py                                  # under a minute on one CPU core
    python examples/likelihood_solvers.py --rows 64 --max-evaluations 5000 --schedules VariancePreserving Cosine

Three questions to the exact models of `ndm_ct.reference`, for which log p is a closed formula:

1. Which method is cheapest at a given accuracy? A mixture of five Gaussians in eight dimensions, exact trace, every
   method at every tolerance. "ode" gives each row steps of its own; the others, torchdiffeq's, one step size for
   the batch.
2. What does one hard row do to its neighbours? The same batch with an outlier appended. Where the step size is shared,
   all rows pay for the outlier, and their log p depends on who else was in the batch; with "ode" it cannot.
3. Which trace, where the exact one is too dear? A Gaussian on an 8x8 grid with covariance exp(-distance/2). One network
   pass is an evaluation or a vector-Jacobian product; the RMSE is that of (estimate - log p) over rows and repeats.

A method is not tightened further once a solve took more than --max-evaluations per row, or more for the outlier.
Writes `likelihood_solvers.png` and `likelihood_solvers.json`.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor

# The repository this file lies in, so that the script runs from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ndm_ct
from ndm_ct import divergence, schedules
from ndm_ct.likelihood import path as trajectory
from ndm_ct.likelihood.budget import measure
from ndm_ct.reference import Gaussian, GaussianMixture

SCHEDULES = ("VariancePreserving", "SubVariancePreserving", "VarianceExploding", "LinearLogSNR", "Cosine", "Rectified")
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
TARGET = 1e-3
"""The rms error, in nats, at which the reading compares costs."""

PROBES = (1, 2, 4, 8, 16)
SWEEPS = ((8, 1, 1), (16, 1, 2), (16, 1, 4), (16, 2, 8), (32, 2, 8))
"""Sizes of ``divergence.Quadrature``: nodes, probes, sweeps."""

EXACT_TOLERANCES = (1e-2, 1e-3, 1e-4)
FLOOR = 1e-16
"""Where the picture shows a change of exactly zero."""

STYLES = {
    "ode": ("black", "o"), "dopri5": ("tab:blue", "s"), "dopri8": ("tab:green", "D"), "bosh3": ("tab:orange", "^"),
    "adaptive_heun": ("tab:red", "v"), "quadrature": ("black", "o"), "hutchinson": ("tab:blue", "s"),
    "exact": ("tab:green", "D"),
}  # fmt: skip


@dataclass(frozen=True)
class Solve:
    """One method at one tolerance: errors in nats over the rows, evaluations per row, seconds for the batch.

    ``reported`` is the rms of ``info.ode_error``, what the method itself says its error is; None where it says nothing.
    """

    schedule: str
    method: str
    tolerance: float
    evaluations: float
    rms_error: float
    max_error: float
    reported: float | None
    seconds: float


@dataclass(frozen=True)
class HardRow:
    """What an outlier in the batch changes for the other rows: log p in nats (the largest change), and their cost."""

    schedule: str
    method: str
    tolerance: float
    change: float
    evaluations_without: float
    evaluations_with: float
    evaluations_outlier: float

    @property
    def factor(self) -> float:
        """How many times dearer the others have become."""
        return self.evaluations_with / self.evaluations_without


@dataclass(frozen=True)
class Estimate:
    """One trace estimator on the grid: passes per row, RMSE in nats, and the spread of error / reported error."""

    trace: str
    setting: str
    passes: float
    rmse: float
    calibration: float | None


def mixture(schedule: str, components: int = 5, d: int = 8) -> GaussianMixture:
    """Five rotated, anisotropic Gaussians some standard deviations apart."""
    generator = torch.Generator().manual_seed(9)
    factors = 0.3 * torch.randn(components, d, d, dtype=torch.float64, generator=generator)
    covs = factors @ factors.mT + 0.05 * torch.eye(d, dtype=torch.float64)
    means = 2.0 * torch.randn(components, d, dtype=torch.float64, generator=generator)
    weights = torch.arange(1.0, components + 1.0, dtype=torch.float64)
    return GaussianMixture(weights / weights.sum(), means, covs, schedule=getattr(schedules, schedule)())


def grid_gaussian(size: int = 8, length: float = 2.0) -> Gaussian:
    """A Gaussian on a square grid with covariance exp(-distance / length): like pixels, neighbours go together."""
    places = torch.cartesian_prod(*2 * [torch.arange(size, dtype=torch.float64)])
    return Gaussian(torch.zeros(size, size), torch.exp(-torch.cdist(places, places) / length))


def work_precision(
    name: str, x: Tensor, methods: Sequence[str], tolerances: Sequence[float], max_evaluations: int
) -> dict[tuple[str, float], tuple[Solve, Tensor]]:
    """Every method at every tolerance, loose to tight, with the log-densities it found."""
    model, table = mixture(name), {}
    truth = model.log_prob(x)
    for method in methods:
        for tolerance in sorted(tolerances, reverse=True):
            start = time.perf_counter()
            try:
                logp, info = _loglik(model, x, method, tolerance)
            except ndm_ct.SolverError as failure:
                print(f"{name:<22}{method:<15}{tolerance:<9.0e}{failure}", flush=True)
                break
            error, seconds = logp - truth, time.perf_counter() - start
            reported = _rms(info.ode_error) if bool(info.ode_error.isfinite().all()) else None
            solve = Solve(
                name, method, tolerance, _mean(info.row_nfe), _rms(error), float(error.abs().max()), reported, seconds
            )
            table[method, tolerance] = solve, logp
            print(_line(solve), flush=True)
            if solve.evaluations > max_evaluations:
                break
    return table


def hard_row(
    name: str, x: Tensor, outlier: float, without: dict[tuple[str, float], tuple[Solve, Tensor]], max_evaluations: int
) -> list[HardRow]:
    """The same solves with a row at distance ``outlier`` from the origin appended to the batch."""
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


def traces(rows: int, repeats: int, seed: int) -> list[Estimate]:
    """Every trace estimator on the grid; repeats of a row are rows of the batch, with random numbers of their own."""
    model = grid_gaussian()
    x = model.sample_data(rows, generator=torch.Generator().manual_seed(seed))
    tolerance = divergence.Quadrature().tolerance
    settings: list[tuple[str, str, Any, float]] = [
        *(("hutchinson", f"{k} probe{'s'[: k > 1]}", divergence.Hutchinson(k), tolerance) for k in PROBES),
        *(("quadrature", "x".join(map(str, s)), divergence.Quadrature(*s), tolerance) for s in SWEEPS),
        *(("exact", f"tol {tol:.0e}", divergence.Exact(), tol) for tol in EXACT_TOLERANCES),
    ]
    table = []
    for trace, setting, estimator, tol in settings:
        batch = x if trace == "exact" else x.repeat_interleave(repeats, 0)
        problem = trajectory.Problem(model, batch, (model.t_min, 1.0), tol, tol, "ode", "raise", False, {})
        # As loglik does, but without the error budget, whose passes would be counted too.
        info = measure(problem, estimator, torch.Generator().manual_seed(seed))
        error = info.loglik - model.log_prob(batch)
        calibration = float((error / info.stderr).std()) if bool((info.stderr > 0.0).all()) else None
        table.append(Estimate(trace, setting, _mean(info.row_nfe + info.row_vjps), _rms(error), calibration))
        print(_trace_line(table[-1]), flush=True)
    return table


def cost_at(target: float, solves: Sequence[Solve]) -> float:
    """Evaluations at which the rms error falls to ``target``, interpolated between logarithms; NaN if it never does.

    Where the loosest solve is better already, its evaluations: no looser one was tried.
    """
    for looser, tighter in itertools.pairwise(solves):
        if tighter.rms_error <= target < looser.rms_error:
            share = math.log(looser.rms_error / target) / math.log(looser.rms_error / tighter.rms_error)
            return looser.evaluations * (tighter.evaluations / looser.evaluations) ** share
    return solves[0].evaluations if solves and solves[0].rms_error <= target else math.nan


def advantage(table: Sequence[Estimate]) -> dict[str, float]:
    """Hutchinson's RMSE over that of the quadrature at the same passes, by the quadrature's setting.

    Hutchinson's is interpolated between logarithms; settings cheaper or dearer than all of its are left out.
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


def reading(solves: Sequence[Solve], hard: Sequence[HardRow], estimates: Sequence[Estimate]) -> str:
    """What the numbers say, in one sentence."""
    parts = [_cheapest(name, [s for s in solves if s.schedule == name]) for name in _unique(s.schedule for s in solves)]
    told = [s.reported / s.rms_error for s in solves if s.reported is not None]
    if told:
        parts.append(f'what "ode" reports as its error is {min(told):.2g} to {max(told):.2g} times the true one')
    own = [h.change for h in hard if h.method == "ode"]
    if own:
        parts.append(f'an outlier in the batch moved the other rows\' log p by at most {max(own):.1g} nat with "ode"')
    shared = [h for h in hard if h.method != "ode"]
    if shared:
        worst, factor = max(shared, key=lambda h: h.change), max(h.factor for h in shared)
        parts.append(
            f"with shared steps it moved them by up to {worst.change:.1g} nat ({worst.method}, {worst.tolerance:.0e}) "
            f"and made them up to {factor:.1f} times as dear"
        )
    ratios = advantage(estimates).values()
    if ratios:
        low, high = min(ratios), max(ratios)
        parts.append(f"at equal passes the RMSE of hutchinson is {low:.1f} to {high:.1f} times that of quadrature")
    sentence = "; ".join(parts) + "."
    return sentence[0].upper() + sentence[1:]


def _cheapest(schedule: str, solves: Sequence[Solve]) -> str:
    methods = _unique(s.method for s in solves)
    costs = {method: cost_at(TARGET, [s for s in solves if s.method == method]) for method in methods}
    reached = sorted((cost, method) for method, cost in costs.items() if math.isfinite(cost))
    if not reached:
        return f"under {schedule} no method reached an rms error of {TARGET:g} nat"
    listed = ", ".join(f"{method} {cost:.0f}" for cost, method in reached)
    return f"under {schedule} an rms error of {TARGET:g} nat takes evaluations per row: {listed}"


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def run(
    out: Path,
    *,
    schedule_names: Sequence[str] = ("Rectified", "VariancePreserving"),
    methods: Sequence[str] = trajectory.METHODS,
    tolerances: Sequence[float] = TOLERANCES,
    rows: int = 16,
    outlier: float = 6.0,
    max_evaluations: int = 150,
    trace_rows: int = 4,
    repeats: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure, print, draw; the first schedule also gets the outlier.

    Args:
        out: folder to write to, made if missing.
        schedule_names: names in `ndm_ct.schedules`.
        methods: values of ``method=`` of `ndm_ct.loglik`.
        tolerances: rtol and atol.
        rows: rows of the mixture.
        outlier: distance of the hard row from the origin, whose log p is not compared.
        max_evaluations: a method is not tightened further once a solve took more.
        trace_rows: rows of the Gaussian on the grid.
        repeats: repeats of every random estimator on each of them.
        seed: of rows, probes and nodes.

    Returns:
        What the JSON file holds.
    """
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    headings = f"{'evaluations':>11}{'rms error':>11}{'max error':>11}{'reported':>11}"
    print(f"{'schedule':<22}{'method':<15}{'tol':<9}{headings}")
    rows_of, found = {}, {}
    for name in schedule_names:
        rows_of[name] = mixture(name).sample_data(rows, generator=torch.Generator().manual_seed(seed))
        found[name] = work_precision(name, rows_of[name], methods, tolerances, max_evaluations)
    solves = [solve for table in found.values() for solve, _ in table.values()]

    first = schedule_names[0]
    print(f"\none row at distance {outlier:g} joins the batch, {first}:")
    print(f"{'method':<15}{'tol':<9}{'change of log p':>15}   evaluations of the others, and of the outlier")
    hard = hard_row(first, rows_of[first], outlier, found[first], max_evaluations)

    print("\n64-d Gaussian on a grid; quadrature's settings are nodes x probes x sweeps:")
    print(f"{'trace':<12}{'setting':<11}{'passes':>8}{'RMSE':>11}{'error/reported':>16}")
    estimates = traces(trace_rows, repeats, seed)

    plot(out / "likelihood_solvers.png", solves, hard, estimates)
    report = {
        "rows": rows, "outlier": outlier, "trace_rows": trace_rows, "repeats": repeats, "seed": seed,
        "work_precision": [asdict(solve) for solve in solves],
        "hard_row": [asdict(row) for row in hard],
        "trace": [asdict(estimate) for estimate in estimates],
        "hutchinson_over_quadrature": advantage(estimates),
        "reading": reading(solves, hard, estimates),
        "versions": {"torch": torch.__version__},
        "seconds": time.perf_counter() - start,
    }  # fmt: skip
    (out / "likelihood_solvers.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    print(f"\n{report['reading']}\n")
    print(f"{report['seconds']:.0f} s; picture and numbers: {out}/likelihood_solvers.png, .json")
    return report


def plot(path: Path, solves: Sequence[Solve], hard: Sequence[HardRow], estimates: Sequence[Estimate]) -> None:
    """Work against error for each schedule, the influence of the hard row, and the traces."""
    names = _unique(s.schedule for s in solves)
    panels = len(names) + 2
    columns = 2 if panels > 3 else panels
    lines = math.ceil(panels / columns)
    figure = Figure(figsize=(6.4 * columns, 4.6 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis, name in zip(axes, names, strict=False):
        _plot_work(axis, name, [s for s in solves if s.schedule == name])
    _plot_hard(axes[len(names)], hard)
    _plot_traces(axes[len(names) + 1], estimates)
    for axis in axes[:panels]:
        axis.grid(alpha=0.3, which="major")
    for axis in axes[panels:]:
        axis.set_axis_off()
    figure.savefig(path, dpi=110)


def _plot_work(axis: Axes, name: str, solves: Sequence[Solve]) -> None:
    for method in _unique(s.method for s in solves):
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
    for method in _unique(h.method for h in hard):
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


def _plot_traces(axis: Axes, estimates: Sequence[Estimate]) -> None:
    meaning = {"hutchinson": "frozen probes", "quadrature": "nodes x probes x sweeps", "exact": "tolerance"}
    for trace in _unique(e.trace for e in estimates):
        chosen = sorted((e for e in estimates if e.trace == trace), key=lambda e: e.passes)
        (colour, marker), label = STYLES[trace], f"{trace} ({meaning[trace]})"
        axis.loglog([e.passes for e in chosen], [e.rmse for e in chosen], marker=marker, color=colour, label=label)
        place = {"xytext": (-5, -11), "ha": "right"} if trace == "quadrature" else {"xytext": (5, 4), "ha": "left"}
        for e in chosen:
            text = e.setting.replace(" probes", "").replace(" probe", "").replace("tol ", "")
            axis.annotate(text, (e.passes, e.rmse), textcoords="offset points", fontsize=8, color=colour, **place)
    axis.margins(x=0.12, y=0.08)
    axis.set(xlabel="network passes per row (evaluations + vector-Jacobian products)", ylabel="RMSE of log p, nats")
    axis.set_title("64-d Gaussian with local correlations: lower left is better", fontsize=11)
    axis.legend(fontsize=8, loc="lower left")


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


def _trace_line(e: Estimate) -> str:
    calibration = "-" if e.calibration is None else f"{e.calibration:.2f}"
    return f"{e.trace:<12}{e.setting:<11}{e.passes:>8.0f}{e.rmse:>11.3g}{calibration:>16}"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/examples/likelihood_solvers"), help="folder to write to (%(default)s)")
    add(
        "--schedules", nargs="+", default=["Rectified", "VariancePreserving"], choices=SCHEDULES,
        help="noise schedules; the first also gets the outlier",
    )  # fmt: skip
    add("--methods", nargs="+", default=list(trajectory.METHODS), choices=trajectory.METHODS, help="solvers")
    add("--tolerances", nargs="+", type=float, default=list(TOLERANCES), help="values of rtol = atol")
    add("--rows", type=int, default=16, help="rows of the mixture (%(default)s)")
    add("--outlier", type=float, default=6.0, help="distance of the hard row from the origin (%(default)s)")
    add("--max-evaluations", type=int, default=150, help="where a method is tightened no further (%(default)s)")
    add("--trace-rows", type=int, default=4, help="rows of the 64-d Gaussian (%(default)s)")
    add("--repeats", type=int, default=16, help="repeats of every random trace on each of them (%(default)s)")
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    return run(
        options.out, schedule_names=options.schedules, methods=options.methods, tolerances=options.tolerances,
        rows=options.rows, outlier=options.outlier, max_evaluations=options.max_evaluations,
        trace_rows=options.trace_rows, repeats=options.repeats, seed=options.seed,
    )  # fmt: skip


if __name__ == "__main__":
    main()
