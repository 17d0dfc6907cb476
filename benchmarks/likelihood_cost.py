r"""What does a log-likelihood cost at a given accuracy, here and in other packages, on the same network?

    python benchmarks/likelihood_cost.py                        # all, about 30 minutes on one CPU core
    python benchmarks/likelihood_cost.py --networks digits --repeats 5 --rows 4   # a look

``benchmarks/README.md`` says how it is measured.
"""

import argparse
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from bench import networks, pullbacks, runs
from bench.estimates import Estimate, methods, plot, reference, solve
from matplotlib.figure import Figure
from torch import Tensor

import ndm_ct
from ndm_ct import divergence

REFERENCE_ROWS = 16


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

    @property
    def cells(self) -> tuple[str, ...]:
        """The line of the table."""
        return (
            self.method, self.setting, f"{self.rmse:.4g}", f"{self.bias:+.3g} ({self.bias_z:+.1f})",
            f"{self.seconds:.4g}", f"{self.forward:.0f}", f"{self.vjps:.0f}", f"{self.work:.3g}",
            "" if self.z_std is None else f"{self.z_std:.2f}",
        )  # fmt: skip


def measure(
    name: str, options: argparse.Namespace, known: list[Measurement]
) -> tuple[list[Measurement], dict[str, float]]:
    """Every estimator on one network whose method contains ``--only``; the others as they are known."""
    model, x = networks.load(name), networks.NETWORKS[name].test_rows(REFERENCE_ROWS)
    truth, x = reference(name, model, x, options.nodes)[: options.rows], x[: options.rows]
    table, kept = [], {(m.method, m.setting): m for m in known}
    for (method, setting), estimate in methods(x[0].numel()).items():
        if options.only not in method:
            table += [kept[method, setting]] if (method, setting) in kept else []
            continue
        # A peer's error is large and needs many repeats to be known; ours is small.
        count = 2 if "exact" in method else options.repeats // 4 if method.startswith("ndm_ct") else options.repeats
        estimates, seconds = [], []
        for repeat in range(max(2, count)):
            generator = torch.Generator().manual_seed(repeat)
            start = time.perf_counter()
            estimates.append(estimate(model, x, generator))
            seconds.append(time.perf_counter() - start)
        table.append(summary(name, method, setting, estimates, truth, float(np.median(seconds))))
        print(name, *table[-1].cells, sep="  ", flush=True)
    return table, {"mean": float(truth.mean()), "std": float(truth.std())}


def summary(
    name: str, method: str, setting: str, estimates: list[Estimate], truth: Tensor, seconds: float
) -> Measurement:
    """Errors of repeated estimates; ``seconds`` is the time of one of them for all rows."""
    error = torch.stack([estimate.logp for estimate in estimates]) - truth
    stderr, scores = estimates[0].stderr, None
    if stderr is not None and bool((stderr > 0.0).all()):
        scores = float((error / torch.stack([estimate.stderr for estimate in estimates])).std())
    spread = float(error.std()) / error.numel() ** 0.5
    return Measurement(
        name, method, setting, method.startswith("ndm_ct"), float(error.square().mean().sqrt()), float(error.mean()),
        float(error.mean()) / spread, seconds / len(truth), estimates[0].forward, estimates[0].vjps, len(estimates),
        scores,
    )  # fmt: skip


def dataset_mean(name: str, rows: int) -> dict[str, float]:
    """The mean over test rows by ``evaluate``, and its time relative to that of the paths of the same rows."""
    model, x = networks.load(name), networks.NETWORKS[name].test_rows(rows)
    start = time.perf_counter()
    for batch in x.split(64):
        solve(model, batch, divergence.Quadrature().tolerance, in_noise_units=True)
    middle = time.perf_counter()
    result = ndm_ct.evaluate(model, x, progress=False)
    paths, whole = middle - start, time.perf_counter() - middle
    return {
        "rows": rows, "nll": result.nll, "stderr": result.stderr, "estimator_stderr": result.estimator_stderr,
        "seconds_paths": paths, "seconds_evaluate": whole, "ratio": whole / paths,
    }  # fmt: skip


def steppers(name: str, rows: int) -> list[dict[str, float | str]]:
    """The path alone by "ode" and by the batch-coupled solver: error of z_1 against seconds."""
    model, x = networks.load(name), networks.NETWORKS[name].test_rows(rows)
    truth = solve(model, x, 1e-9).state[0]
    table: list[dict[str, float | str]] = []
    for method, tol in ((method, tol) for method in ("ode", "dopri5") for tol in (1e-3, 1e-4, 1e-5)):
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            solved = solve(model, x, tol, method)
            seconds.append(time.perf_counter() - start)
        error = float((solved.state[0] - truth).square().mean().sqrt())
        evaluations = float(solved.nfe.double().mean())
        table.append(
            {"method": method, "tol": tol, "error": error, "seconds": min(seconds), "evaluations": evaluations}
        )
        print(f"{name} path {method} tol {tol:g}: error of z_1 {error:.2e}, {min(seconds):.2f} s", flush=True)
    return table


def best(table: list[Measurement]) -> dict[str, Measurement]:
    """The setting of least work of each method, among those without a visible bias (2 se, or 2 % of the RMSE)."""
    result: dict[str, Measurement] = {}
    for m in table:
        unbiased = abs(m.bias_z) < 2.0 or abs(m.bias) < 0.02 * m.rmse or "exact" in m.method
        if unbiased and (m.method not in result or m.work < result[m.method].work):
            result[m.method] = m
    return result


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
    head = ["method", "setting", "RMSE (nats)", "bias (in its se)", "seconds", "forward", "vjp", "seconds x RMSE²"]
    for name, table in tables.items():
        truth = extra["reference"][name]
        sizes = f"mean log p {truth['mean']:.1f} nats, standard deviation {truth['std']:.1f}."
        lines += [f"## {name}", "", f"{extra['rows']} test rows, {sizes}", ""]
        lines += runs.table([*head, "z sd"], [m.cells for m in table])
        lines += ["", *(exact_ratios(table) if all("exact" in m.method for m in table) else sampled_ratios(table)), ""]
    for name, mean in extra["dataset_mean"].items():
        lines += [
            f"Mean over {mean['rows']} rows of {name}: {mean['nll']:.2f} ± {mean['stderr']:.2f} nats, of which the "
            f"estimator {mean['estimator_stderr']:.2f}; {mean['ratio']:.2f} times the time of the paths alone.", "",
        ]  # fmt: skip
    rows = [
        (name, row["method"], f"{row['tol']:g}", f"{row['error']:.2e}", f"{row['seconds']:.2f}",
         f"{row['evaluations']:.0f}")
        for name, table in extra["steppers"].items() for row in table
    ]  # fmt: skip
    table = runs.table(["network", "method", "tol", "error of z_1", "seconds", "evaluations"], rows)
    lines += ["## Steppers: the path alone", "", *table]
    if extra["pullbacks"]:
        lines += ["", "## Networks that torch.func cannot pass: one value and divergence by each way", ""]
        lines += pullbacks.markdown(extra["pullbacks"])
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = runs.Parser(__doc__, runs.RESULTS / "likelihood_cost" / "all")
    add = parser.add_argument
    add("--networks", nargs="*", default=["digits", "fashion", "casp"], choices=list(networks.NETWORKS))
    add("--rows", type=int, default=8, choices=range(1, REFERENCE_ROWS + 1), metavar="1..16", help="test rows (8)")
    add("--repeats", type=int, default=40, help="repeats of the peers (40); a quarter for ours")
    add("--nodes", type=int, default=64, help="Gauss-Legendre nodes of the exact values (64)")
    add("--mean-rows", type=int, default=1000, help="test rows of the data-set mean; 0 leaves it out (1000)")
    add("--only", default="", help="measure only methods whose name contains this, keep the others")
    add("--pullbacks", type=int, default=0, help="repeats of the ways to a divergence; 0 keeps their results (0)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, list[Measurement]]:
    """Measure, print and write. Networks that are not measured now keep their results."""
    options = parse(arguments)
    report = runs.read_json(options.out / "results.json", {"tables": {}})
    tables = {name: [Measurement(**row) for row in rows] for name, rows in report["tables"].items()}
    extra = {key: report.get(key, {}) for key in ("reference", "dataset_mean", "steppers")}
    extra |= {"rows": options.rows, "pullbacks": report.get("pullbacks", [])}
    if options.networks:
        extra |= runs.provenance()
    if options.pullbacks:
        extra["pullbacks"] = [row for name in ("digits", "casp") for row in pullbacks.measure(name, options.pullbacks)]
    for name in options.networks:
        tables[name], extra["reference"][name] = measure(name, options, tables.get(name, []))
        if name != "casp" and name not in extra["steppers"]:
            extra["steppers"][name] = steppers(name, 8 * options.rows)
        if options.mean_rows and name == "fashion" and name not in extra["dataset_mean"]:
            extra["dataset_mean"][name] = dataset_mean(name, options.mean_rows)
        write(options, tables, report | extra, {name: plot(tables[name])})
    write(options, tables, report | extra)
    print(markdown(tables, report | extra))
    return tables


def write(
    options: argparse.Namespace, tables: dict[str, list[Measurement]], extra: dict[str, Any],
    figures: dict[str, Figure] | None = None,
) -> None:  # fmt: skip
    """Write what is measured."""
    report = extra | {"tables": {key: [asdict(m) for m in table] for key, table in tables.items()}}
    runs.write_report(options.out, report, markdown(tables, extra), figures)


if __name__ == "__main__":
    main()
