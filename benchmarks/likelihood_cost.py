r"""What a log-likelihood costs at a given accuracy: ndm_ct beside its peers, on the same networks, in one run.

    python benchmarks/likelihood_cost.py                        # all, about 30 minutes on one CPU core
    python benchmarks/likelihood_cost.py --networks digits --repeats 5 --rows 4   # a look

For each trained network (``benchmarks/networks.py``) the exact per-row log-density is computed once: a path solved to
1e-9 in float64 and the exact trace at Gauss-Legendre nodes along it (``--nodes``; halving them is part of the report).
Every estimator is then repeated and compared with it:

* ``RMSE``: root mean square of (estimate - exact) over rows and repeats, nats per row;
* ``bias``: its mean, and that mean in units of its own standard error over rows and repeats;
* ``work``: wall seconds per row x RMSE^2. For an unbiased estimator it does not depend on how often one repeats it, so
  its ratio is how many times faster one method reaches the accuracy of another. With an exact trace nothing is left to
  average: there a peer's seconds are compared with ours at the same RMSE, between two of our tolerances.

Three more measurements: the mean over many test rows (time against that of the paths alone), the solver "ode" beside
the batch-coupled one, and the calibration of the reported standard errors. Writes ``likelihood_cost.json``,
``likelihood_cost.md`` and ``likelihood_cost_NETWORK.png`` into ``benchmarks/results``.
"""

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import networks
from bench.peers import PEERS
from torch import Tensor

import ndm_ct
from ndm_ct import divergence
from ndm_ct.likelihood import budget, quadrature
from ndm_ct.likelihood import path as trajectory

RESULTS = Path(__file__).parent / "results"
REFERENCE_ROWS = 16


@dataclass(frozen=True)
class Estimate:
    """log p of the rows, its cost in passes per row, and its own standard error if it has one."""

    logp: Tensor
    forward: float
    vjps: float
    stderr: Tensor | None


Estimator = Callable[[ndm_ct.NDM, Tensor, torch.Generator], Estimate]


@dataclass(frozen=True)
class Measurement:
    """One estimator on one network; RMSE and bias in nats per row, seconds and passes per row."""

    network: str
    method: str
    setting: str
    ours: bool
    rmse: float
    bias: float
    bias_z: float
    seconds: float
    forward: float
    vjps: float
    repeats: int
    z_std: float | None = None

    @property
    def work(self) -> float:
        """Seconds x RMSE^2 per row."""
        return self.seconds * self.rmse**2


def exact(model: ndm_ct.NDM, x: Tensor, nodes: int) -> Tensor:
    """log p in float64: a path to 1e-9, the exact trace at Gauss-Legendre nodes of the quadrature's own coordinate."""
    double, x = double_copy(model), x.double()
    if x[0].numel() <= divergence.EXACT_UP_TO:
        return ndm_ct.loglik(double, x, trace="exact", rtol=1e-9, atol=1e-9)
    places, weights = np.polynomial.legendre.leggauss(nodes)
    times, slope = quadrature.path_times(double, torch.tensor(0.5 * (1.0 + places)))
    problem = trajectory.Problem(double, x, (double.t_min, 1.0), 1e-9, 1e-9, "ode", "raise", False, {})
    with problem.prepared():
        solved = problem.transport(times[:, None].expand(-1, len(x)))
        flow, bound = problem.flow(), divergence.Exact(chunk=32).bind(x, None)
        traces = [
            bound.with_byproduct(flow.network_part(t), z)[1][:, 0] for t, z in zip(times, solved.nodes, strict=True)
        ]
        integral = (torch.tensor(0.5 * weights)[:, None] * slope[:, None] * torch.stack(traces)).sum(0)
        return double.log_prior(solved.state[0]) + quadrature.linear_logdet(double, x.device) + integral


def double_copy(model: ndm_ct.NDM) -> ndm_ct.NDM:
    """The same model in float64."""
    return copy.deepcopy(model).double()


def ours(trace: Any, tolerance: float | None = None, method: str = "ode") -> Estimator:
    """Our likelihood with these options, without its error budget."""

    def estimate(model: ndm_ct.NDM, x: Tensor, generator: torch.Generator) -> Estimate:
        estimator = divergence.resolve(trace, model.event_shape)
        tol = tolerance or estimator.tolerance
        problem = trajectory.Problem(model, x, (model.t_min, 1.0), tol, tol, method, "raise", False, {})
        info = budget.measure(problem, estimator, generator)
        passes = info.row_nfe.double().mean(), info.row_vjps.double().mean()
        return Estimate(info.loglik.double(), *map(float, passes), info.stderr.double())

    return estimate


def peer(name: str, tolerance: float) -> Estimator:
    """A peer at its tolerance."""

    def estimate(model: ndm_ct.NDM, x: Tensor, generator: torch.Generator) -> Estimate:
        result = PEERS[name](model, x, tolerance, generator)
        return Estimate(result.logp, result.forward, result.vjps, None)

    return estimate


def methods(exact_peers: bool) -> dict[tuple[str, str], Estimator]:
    """What is measured, by method and setting; the exact traces only where peers use them too (tables)."""
    Q = divergence.Quadrature
    table: dict[tuple[str, str], Estimator] = {}
    if exact_peers:
        for tolerance in (1e-3, 1e-4, 1e-5, 2e-6, 1e-7):
            table["ndm_ct exact", f"tol {tolerance:g}"] = ours("exact", tolerance)
        for tolerance in (1e-5, 2e-6, 1e-7):
            table["ndm_ct exact, dopri5", f"tol {tolerance:g}"] = ours("exact", tolerance, "dopri5")
        for name in ("flow_matching_exact", "zuko_exact", "torchdyn_exact", "torchdiffeq_exact"):
            # At 1e-7 zuko did not end within ten minutes: its steps are smaller than its network's rounding.
            for tolerance in (1e-3, 1e-5, 1e-6, 1e-7)[: 3 if name == "zuko_exact" else 4]:
                table[name, f"tol {tolerance:g}"] = peer(name, tolerance)
        return table
    for sizes in ((6, 1, 1), (16, 1, 4), (16, 2, 8), (32, 2, 8), (32, 4, 8)):
        table["ndm_ct quadrature", "x".join(map(str, sizes))] = ours(Q(*sizes))
    table["ndm_ct hutchinson", "1 probe"] = ours(divergence.Hutchinson(1), 1e-5)
    for name in ("score_sde", "flow_matching", "zuko", "torchdyn"):
        # Their error is the probe's, whatever the tolerance: 1e-5 only where it is the usual protocol.
        for tolerance in (1e-2, 1e-3, 1e-5) if name == "score_sde" else (1e-2, 1e-3):
            table[name, f"tol {tolerance:g}"] = peer(name, tolerance)
    return table


def measure(
    name: str, rows: int, repeats: int, nodes: int, only: str, known: list[Measurement]
) -> tuple[list[Measurement], dict[str, float]]:
    """Every estimator on one network whose method contains ``only``; the others as they are known."""
    model, x = networks.load(name), networks.NETWORKS[name].test_rows(REFERENCE_ROWS)
    truth, x = reference(name, model, x, nodes)[:rows], x[:rows]
    table, kept = [], {(m.method, m.setting): m for m in known}
    for (method, setting), estimate in methods(exact_peers=x[0].numel() <= divergence.EXACT_UP_TO).items():
        if only not in method:
            table += [kept[method, setting]] if (method, setting) in kept else []
            continue
        # A peer's error is large and needs many repeats to be known; ours is small.
        count = 2 if "exact" in method else repeats // 4 if method.startswith("ndm_ct") else repeats
        estimates, seconds = [], []
        for repeat in range(max(2, count)):
            generator = torch.Generator().manual_seed(repeat)
            start = time.perf_counter()
            estimates.append(estimate(model, x, generator))
            seconds.append(time.perf_counter() - start)
        table.append(_summary(name, method, setting, estimates, truth, float(np.median(seconds))))
        print(_line(table[-1]), flush=True)
    return table, {"mean": float(truth.mean()), "std": float(truth.std())}


def _summary(
    name: str, method: str, setting: str, estimates: list[Estimate], truth: Tensor, seconds: float
) -> Measurement:
    error = torch.stack([estimate.logp for estimate in estimates]) - truth
    stderr, repeats = estimates[0].stderr, len(estimates)
    scores = None
    if stderr is not None and bool((stderr > 0.0).all()):
        scores = float((error / torch.stack([estimate.stderr for estimate in estimates])).std())
    spread = float(error.std()) / error.numel() ** 0.5
    return Measurement(
        name, method, setting, method.startswith("ndm_ct"), float(error.square().mean().sqrt()), float(error.mean()),
        float(error.mean()) / spread, seconds / len(truth), estimates[0].forward, estimates[0].vjps, repeats, scores,
    )  # fmt: skip


def reference(name: str, model: ndm_ct.NDM, x: Tensor, nodes: int) -> Tensor:
    """The exact log-densities, kept beside the results because they take minutes."""
    path = RESULTS / "likelihood_cost" / "all" / f"reference_{name}_{len(x)}_{nodes}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, exact(model, x, nodes).numpy())
    return torch.as_tensor(np.load(path))


def dataset_mean(name: str, rows: int) -> dict[str, float]:
    """The mean over test rows by ``evaluate``, beside the time of the forward-only paths of the same rows."""
    model, x = networks.load(name), networks.NETWORKS[name].test_rows(rows)

    def paths() -> None:
        for batch in x.split(64):
            tol = divergence.Quadrature().tolerance
            problem = trajectory.Problem(model, batch, (model.t_min, 1.0), tol, tol, "ode", "raise", False, {})
            with problem.prepared():
                problem.transport(in_noise_units=True)

    start = time.perf_counter()
    paths()
    middle = time.perf_counter()
    result = ndm_ct.evaluate(model, x, progress=False)
    seconds = {"seconds_paths": middle - start, "seconds_evaluate": time.perf_counter() - middle}
    return {
        "rows": rows,
        "nll": result.nll,
        "stderr": result.stderr,
        "estimator_stderr": result.estimator_stderr,
        **seconds,
        "ratio": seconds["seconds_evaluate"] / seconds["seconds_paths"],
    }


def steppers(name: str, rows: int) -> list[dict[str, float | str]]:
    """The path alone by "ode" and by the batch-coupled solver: error of z_1 against seconds."""
    model, x = networks.load(name), networks.NETWORKS[name].test_rows(rows)

    def solve(method: str, tol: float) -> tuple[ndm_ct.solvers.Solution, float]:
        problem = trajectory.Problem(model, x, (model.t_min, 1.0), tol, tol, method, "raise", False, {})
        with problem.prepared():
            start = time.perf_counter()
            solved = problem.transport()
            return solved, time.perf_counter() - start

    truth = solve("ode", 1e-9)[0].state[0]
    table: list[dict[str, float | str]] = []
    for method in ("ode", "dopri5"):
        for tol in (1e-3, 1e-4, 1e-5):
            runs = [solve(method, tol) for _ in range(2)]
            error = float((runs[0][0].state[0] - truth).square().mean().sqrt())
            table.append({
                "method": method, "tol": tol, "error": error, "seconds": min(seconds for _, seconds in runs),
                "evaluations": float(runs[0][0].nfe.double().mean()),
            })  # fmt: skip
            print(
                f"{name} path {method} tol {tol:g}: error of z_1 {error:.2e}, {table[-1]['seconds']:.2f} s", flush=True
            )
    return table


def _line(m: Measurement) -> str:
    return (
        f"{m.network:8} {m.method:22} {m.setting:10} RMSE {m.rmse:9.4g}  bias {m.bias:+9.3g} ({m.bias_z:+5.1f} se)  "
        f"{m.seconds:7.4f} s  {m.forward:6.0f} forward {m.vjps:6.0f} vjp  work {m.work:9.3g}"
        + (f"  z sd {m.z_std:.2f}" if m.z_std is not None else "")
    )


def best(table: list[Measurement]) -> dict[str, Measurement]:
    """The setting of least work of each method, among those without a visible bias (2 se, or 2 % of the RMSE)."""
    result: dict[str, Measurement] = {}
    for m in table:
        unbiased = abs(m.bias_z) < 2.0 or abs(m.bias) < 0.02 * m.rmse or "exact" in m.method
        if unbiased and (m.method not in result or m.work < result[m.method].work):
            result[m.method] = m
    return result


def plot(table: list[Measurement], path: Path) -> None:
    """RMSE against seconds and against network passes, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for method in dict.fromkeys(m.method for m in table):
        points = sorted((m for m in table if m.method == method), key=lambda m: m.seconds)
        style = {"marker": "o", "linewidth": 2.2} if points[0].ours else {"marker": "s", "linestyle": "--"}
        for axis, work in ((axes[0], [m.seconds for m in points]), (axes[1], [m.forward + m.vjps for m in points])):
            axis.plot(work, [m.rmse for m in points], label=method, **style)
    axes[0].set(xscale="log", yscale="log", xlabel="seconds per row", ylabel="RMSE of log p, nats")
    axes[1].set(xscale="log", yscale="log", xlabel="forward passes + products per row")
    for axis in axes:
        axis.grid(True, which="both", alpha=0.25)
    axes[1].legend(fontsize=8)
    figure.suptitle(f"log-likelihood on {table[0].network}: error against work")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def sampled_ratios(table: list[Measurement]) -> list[str]:
    """How many times faster our best setting reaches an accuracy, by work."""
    winners = best(table)
    mine = min((m for m in winners.values() if m.ours), key=lambda m: m.work)
    lines = [f"Equal accuracy: {mine.method} {mine.setting} is faster than the best setting of"]
    lines += [f"- {m.method} ({m.setting}): {m.work / mine.work:,.1f} times" for m in winners.values() if not m.ours]
    usual = [m for m in table if m.method == "score_sde" and m.setting == "tol 1e-05"]
    return lines + [f"- the usual protocol ({m.method}, {m.setting}): {m.work / mine.work:,.1f} times" for m in usual]


def exact_ratios(table: list[Measurement]) -> list[str]:
    """Seconds of the peers over ours at the same RMSE, one line per peer, its settings from coarse to fine.

    Ours are interpolated in logarithms between the settings that no other of ours beats in both.
    """
    ours: list[Measurement] = []
    for m in sorted((m for m in table if m.ours), key=lambda m: m.seconds):
        if not ours or m.rmse < ours[-1].rmse:
            ours.append(m)
    errors, seconds = (np.log([getattr(m, name) for m in reversed(ours)]) for name in ("rmse", "seconds"))
    lines = ["Seconds over those of ndm_ct exact at the same RMSE:"]
    for method in dict.fromkeys(m.method for m in table if not m.ours):
        peers = [m for m in table if m.method == method]
        ratios = [m.seconds / float(np.exp(np.interp(np.log(m.rmse), errors, seconds))) for m in peers]
        lines.append(f"- {method}: " + ", ".join(f"{r:.1f} ({m.setting})" for r, m in zip(ratios, peers, strict=True)))
    return lines


def markdown(tables: dict[str, list[Measurement]], extra: dict[str, Any]) -> str:
    """The report a person reads."""
    lines = ["# What a log-likelihood costs", "", f"Machine: {extra['machine']}. Times are per row, in batches.", ""]
    for name, table in tables.items():
        truth = extra["reference"][name]
        lines += [
            f"## {name}", "",
            f"{extra['rows']} test rows, mean log p {truth['mean']:.1f} nats, standard deviation {truth['std']:.1f}.",
            "",
            "| method | setting | RMSE (nats) | bias (in its se) | seconds | forward | vjp | seconds x RMSE² | z sd |",
            "|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        lines += [
            f"| {m.method} | {m.setting} | {m.rmse:.4g} | {m.bias:+.3g} ({m.bias_z:+.1f}) | {m.seconds:.4g} | "
            f"{m.forward:.0f} | {m.vjps:.0f} | {m.work:.3g} | {'' if m.z_std is None else f'{m.z_std:.2f}'} |"
            for m in table
        ]
        lines += ["", *(exact_ratios(table) if all("exact" in m.method for m in table) else sampled_ratios(table)), ""]
    for name, mean in extra["dataset_mean"].items():
        lines += [
            f"Mean over {mean['rows']} rows of {name}: {mean['nll']:.2f} ± {mean['stderr']:.2f} nats, of which the "
            f"estimator {mean['estimator_stderr']:.2f}; {mean['ratio']:.2f} times the time of the paths alone.", "",
        ]  # fmt: skip
    lines += ["## Steppers: the path alone", "", "| network | method | tol | error of z_1 | seconds | evaluations |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += [
        f"| {name} | {row['method']} | {row['tol']:g} | {row['error']:.2e} | {row['seconds']:.2f} | "
        f"{row['evaluations']:.0f} |"
        for name, rows in extra["steppers"].items()
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> dict[str, list[Measurement]]:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=["digits", "fashion", "casp"], choices=list(networks.NETWORKS))
    parser.add_argument("--rows", type=int, default=8, choices=range(1, REFERENCE_ROWS + 1), metavar="1..16")
    parser.add_argument("--repeats", type=int, default=40, help="repeats of the peers; a quarter for ours")
    parser.add_argument("--nodes", type=int, default=64, help="Gauss-Legendre nodes of the exact values")
    parser.add_argument("--mean-rows", type=int, default=1000, help="test rows of the data-set mean; 0 leaves it out")
    parser.add_argument("--only", default="", help="measure only methods whose name contains this, keep the others")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    tables: dict[str, list[Measurement]] = {}
    known = options.out / "likelihood_cost.json"
    extra: dict[str, Any] = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "rows": options.rows, "reference": {}, "dataset_mean": {}, "steppers": {},
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    if known.exists():  # networks that are not measured now keep their results
        report = json.loads(known.read_text())
        tables = {name: [Measurement(**row) for row in rows] for name, rows in report["tables"].items()}
        extra |= {key: report[key] for key in ("reference", "dataset_mean", "steppers")}
    for name in options.networks:
        tables[name], extra["reference"][name] = measure(
            name, options.rows, options.repeats, options.nodes, options.only, tables.get(name, [])
        )
        plot(tables[name], options.out / f"likelihood_cost_{name}.png")
        if name != "casp" and name not in extra["steppers"]:
            extra["steppers"][name] = steppers(name, 64)
        if options.mean_rows and name == "fashion" and name not in extra["dataset_mean"]:
            extra["dataset_mean"][name] = dataset_mean(name, options.mean_rows)
        report = {"tables": {key: [asdict(m) for m in table] for key, table in tables.items()}, **extra}
        known.write_text(json.dumps(report, indent=1))
        (options.out / "likelihood_cost.md").write_text(markdown(tables, extra))
    print(markdown(tables, extra))
    return tables


if __name__ == "__main__":
    main()
