r"""How good is ``NDMDensity`` on tables, against kernels, Gaussian mixtures and a neural spline flow?

    python benchmarks/density_estimators.py --cache runs/density    # about an hour on one CPU core; goes on if stopped
    python benchmarks/density_estimators.py --data ccpp --steps 200 --out runs/look     # a look

``benchmarks/README.md`` says how it is measured.
"""

import argparse
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import data, runs
from matplotlib.figure import Figure
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity

from ndm_ct._core.seeds import derive_seeds
from ndm_ct.estimator import NDMDensity

DATA = {"casp": data.casp, "ccpp": data.ccpp, "magic": data.magic, "breast-cancer": data.breast_cancer}
COMPONENTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BANDWIDTHS = np.geomspace(0.02, 2.0, 20)
VALIDATIONS = 20
FLOWS = (0, 2)

Fitted = tuple[Callable[[np.ndarray], np.ndarray], str]
"""A log-density of rows, and what was chosen."""


def ndm(train: np.ndarray, held_out: np.ndarray, options: argparse.Namespace) -> Fitted:
    """Ours. Each estimator holds rows out by itself; the same seed gives the same rows."""
    rows = np.concatenate([train, held_out])
    fitted = {k: NDMDensity(steps=options.steps, flow=k, random_state=options.seed).fit(rows) for k in FLOWS}
    bounds = {k: max(row["validation_elbo"] for row in each.validation_) for k, each in fitted.items()}
    best = max(bounds, key=bounds.__getitem__)
    held = ", ".join(f"{bound:.3f} with {k}" for k, bound in bounds.items())
    return fitted[best].score_samples, f"flow={best} (held out {held})"


def kde(train: np.ndarray, held_out: np.ndarray, options: argparse.Namespace) -> Fitted:
    """Bandwidth by held-out rows."""
    scores = {h: KernelDensity(bandwidth=h, rtol=1e-4).fit(train).score(held_out[:1000]) for h in BANDWIDTHS}
    best = max(scores, key=scores.__getitem__)
    fitted = KernelDensity(bandwidth=best, rtol=1e-4).fit(np.concatenate([train, held_out]))
    return fitted.score_samples, f"h {best:.3f}"


def gmm(train: np.ndarray, held_out: np.ndarray, options: argparse.Namespace) -> Fitted:
    """Number of components by held-out rows; stops after two that are worse."""
    best, fitted, waited = -math.inf, None, 0
    for k in (k for k in COMPONENTS if k <= len(train) // 4):
        mixture = GaussianMixture(k, reg_covar=1e-5, max_iter=500, random_state=options.seed).fit(train)
        score = mixture.score(held_out)
        best, fitted, waited = (score, mixture, 0) if score > best else (best, fitted, waited + 1)
        if waited == 2:
            break
    assert fitted is not None
    return fitted.score_samples, f"{fitted.n_components} components"


def nsf(train: np.ndarray, held_out: np.ndarray, options: argparse.Namespace, seconds: float) -> Fitted:
    """A spline flow trained for as many seconds as ours, in blocks between validations."""
    import zuko

    torch.manual_seed(options.seed)
    transforms, width = options.flow
    flow = zuko.flows.NSF(train.shape[1], transforms=transforms, hidden_features=(width, width))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    rows, held = torch.tensor(train, dtype=torch.float32), torch.tensor(held_out, dtype=torch.float32)
    generator = torch.Generator().manual_seed(options.seed)
    best, weights, began, steps = -math.inf, flow.state_dict(), time.process_time(), 0
    for block in range(VALIDATIONS):
        while (spent := time.process_time() - began) < seconds * (block + 1) / VALIDATIONS:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, spent / seconds))))
            batch = rows[torch.randint(len(rows), (min(1024, len(rows)),), generator=generator)]
            loss = -flow().log_prob(batch).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
            optimizer.step()
            steps += 1
        with torch.no_grad():
            score = float(flow().log_prob(held).mean())
        if score > best:
            best, weights = score, {name: tensor.clone() for name, tensor in flow.state_dict().items()}
    flow.load_state_dict(weights)

    def score_samples(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return flow().log_prob(torch.tensor(x, dtype=torch.float32)).double().numpy()

    return score_samples, f"{steps} steps"


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All estimators on one table."""
    split = DATA[name]()
    train, test = split.train.double().numpy(), split.test.double().numpy()[: options.rows]
    cut = len(train) - len(train) // 10
    train, held_out = train[:cut], train[cut:]
    entry: dict[str, Any] = {"rows": len(split.train), "columns": train.shape[1], "test_rows": len(test), "models": {}}
    values: dict[str, np.ndarray] = {}
    for kind in ("ndm", "kde", "gmm", "nsf"):
        start, ways = time.process_time(), {"ndm": ndm, "kde": kde, "gmm": gmm}
        as_long = {"seconds": entry["models"]["ndm"]["seconds"]} if kind == "nsf" else {}
        score_samples, choice = ways.get(kind, nsf)(train, held_out, options, **as_long)
        seconds = time.process_time() - start
        values[kind] = score_samples(test)
        mean, error = runs.mean(values[kind])
        entry["models"][kind] = {"mean": mean, "stderr": error, "seconds": seconds, "choice": choice}
        print(f"{name}, {kind} ({choice}): {mean:.4f} ± {error:.4f} nats, {seconds:.0f} s", flush=True)
    best = max(values.values(), key=np.mean)
    for kind, own in values.items():
        gap, error = runs.mean(own - best)
        entry["models"][kind] |= {"gap": gap, "gap_stderr": error}
    return entry


def markdown(results: dict[str, Any]) -> str:
    """A table per data set."""
    lines = ["# Density estimators on tables", "", "Mean test log-likelihood, nats per row of standardised data.", ""]
    for name, entry in results.items():
        sizes = f"{entry['rows']} training rows, {entry['columns']} columns, {entry['test_rows']} test rows."
        rows = [
            (kind, runs.with_error(m["mean"], m["stderr"], 3), runs.with_error(m["gap"], m["gap_stderr"], 3, "+"),
             m["choice"], f"{m['seconds']:.0f}")
            for kind, m in sorted(entry["models"].items(), key=lambda item: -item[1]["mean"])
        ]  # fmt: skip
        head = ["model", "log-likelihood", "from the best", "chosen", "seconds"]
        lines += [f"## {name}", "", sizes, "", *runs.table(head, rows), ""]
    return "\n".join(lines)


def plot(results: dict[str, Any]) -> Figure:
    """Differences from the best with errors, a panel per data set; a value far off is written at the edge."""
    figure = Figure(figsize=(3.6 * len(results), 2.8), layout="constrained")
    for axis, (name, entry) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        models = entry["models"]
        edge = 1.25 * sorted(m["gap_stderr"] - m["gap"] for m in models.values())[-2]  # the worst may lie outside
        for place, (kind, m) in enumerate(models.items()):
            colour = "C1" if kind == "ndm" else "C0"
            if -m["gap"] < edge:
                axis.errorbar(m["gap"], place, xerr=m["gap_stderr"], fmt="o", color=colour)
            else:
                axis.text(-edge, place, f" \u25c0 {m['gap']:.1f}", color=colour, va="center")
        axis.set(title=name, yticks=range(len(models)), yticklabels=list(models), xlabel="nats from the best",
                 xlim=(-edge, 0.15 * edge), ylim=(-0.5, len(models) - 0.5))  # fmt: skip
        axis.grid(alpha=0.3)
    return figure


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = runs.Parser(__doc__, runs.RESULTS / "density_estimators" / "all")
    add = parser.add_argument
    add("--data", type=runs.names(DATA), default=list(DATA), help=f"of {', '.join(DATA)}, by commas")
    add("--steps", type=int, default=4000, help="most optimiser steps of ours (4000)")
    add("--flow", type=int, nargs=2, default=(4, 128), metavar=("K", "W"), help="transforms and width of nsf (4 128)")
    add("--rows", type=int, default=2000, help="test rows at most (2000)")
    add("--seed", type=int, default=0)
    add("--cache", type=Path, help="folder that keeps finished tables, one per settings")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Compare and write; returns the results by table."""
    options = parse(arguments)
    settings = {"steps": options.steps, "flow": list(options.flow), "rows": options.rows, "seed": options.seed}
    results = {}
    for name in options.data:
        make = functools.partial(compare, name, options)
        file = (
            None
            if options.cache is None
            else options.cache / f"{name}-{derive_seeds(*map(str, settings.values()))[0]:016x}.json"
        )
        results[name] = make() if file is None else runs.kept(file, settings, make)
    report = {"settings": settings, "results": results}
    runs.write_report(options.out, report, markdown(results), {"plot": plot(results)})
    return results


if __name__ == "__main__":
    main()
