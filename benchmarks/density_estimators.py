r"""Density estimators for tables: ``NDMDensity`` beside kernels, Gaussian mixtures and a neural spline flow.

    python benchmarks/density_estimators.py --cache runs/density    # about an hour on one CPU core; goes on if stopped
    python benchmarks/density_estimators.py --data ccpp --steps 200 --out runs/look     # a look

Rows are those of ``benchmarks/data.py``: without duplicates, integer columns dequantised, nine tenths to train. Of the
training rows a tenth is held out, the same for all, to choose by:

====  =================================================================================================================
ndm   ``NDMDensity``, its defaults; ``flow=0`` or ``flow=2`` (F a spline flow, INDM) by the bound of the held-out rows
kde   scikit-learn's ``KernelDensity``, Gaussian, the best of 20 bandwidths
gmm   scikit-learn's ``GaussianMixture``, full covariances, the best of 1 to 256 components
nsf   zuko's neural spline flow (``--flow``: transforms, width), Adam with a cosine, for the seconds that both trainings
      of ndm took, the weights of the best of 20 validations
====  =================================================================================================================

Reported: mean test log-likelihood in nats per row of standardised data, its standard error over rows, the paired
difference from the best of the table with its standard error, and seconds of training (choices included). Writes
``density_estimators.json``, ``.md`` and ``.png``; tables that are finished are kept in ``--cache``.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import data
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity

from ndm_ct.estimator import NDMDensity
from ndm_ct.storage import write_atomically

RESULTS = Path(__file__).parent / "results"
DATA = {"casp": data.casp, "ccpp": data.ccpp, "magic": data.magic, "breast-cancer": data.breast_cancer}
COMPONENTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BANDWIDTHS = np.geomspace(0.02, 2.0, 20)
VALIDATIONS = 20
FLOWS = (0, 2)

Fitted = tuple[Callable[[np.ndarray], np.ndarray], str]
"""A log-density of rows, and what was chosen."""


def ndm(train: np.ndarray, held_out: np.ndarray, options: argparse.Namespace) -> Fitted:
    """Ours; each holds rows out by itself, of one seed the same."""
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
    return KernelDensity(bandwidth=best, rtol=1e-4).fit(
        np.concatenate([train, held_out])
    ).score_samples, f"h {best:.3f}"


def gmm(train: np.ndarray, held_out: np.ndarray, options: argparse.Namespace) -> Fitted:
    """Number of components by held-out rows; stops after two that are worse."""
    best, fitted, waited = -math.inf, None, 0
    for k in COMPONENTS:
        if k > len(train) // 4:
            break
        mixture = GaussianMixture(k, reg_covar=1e-5, max_iter=500, random_state=options.seed).fit(train)
        score = mixture.score(held_out)
        best, fitted, waited = (score, mixture, 0) if score > best else (best, fitted, waited + 1)
        if waited == 2:
            break
    assert fitted is not None
    return fitted.score_samples, f"{fitted.n_components} components"


def nsf(train: np.ndarray, held_out: np.ndarray, options: argparse.Namespace, seconds: float) -> Fitted:
    """A spline flow for as many seconds as ours was trained, in blocks between validations."""
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
    estimators: dict[str, Callable[[], Fitted]] = {
        "ndm": lambda: ndm(train, held_out, options),
        "kde": lambda: kde(train, held_out, options),
        "gmm": lambda: gmm(train, held_out, options),
        "nsf": lambda: nsf(train, held_out, options, entry["models"]["ndm"]["seconds"]),
    }
    for kind, make in estimators.items():
        start = time.process_time()
        score_samples, choice = make()
        seconds = time.process_time() - start
        values[kind] = score_samples(test)
        mean, error = values[kind].mean(), values[kind].std(ddof=1) / math.sqrt(len(test))
        entry["models"][kind] = {"mean": mean, "stderr": error, "seconds": seconds, "choice": choice}
        print(f"{name}, {kind} ({choice}): {mean:.4f} ± {error:.4f} nats, {seconds:.0f} s", flush=True)
    best = max(values, key=lambda kind: values[kind].mean())
    for kind, own in values.items():
        gap = own - values[best]
        entry["models"][kind] |= {"gap": gap.mean(), "gap_stderr": gap.std(ddof=1) / math.sqrt(len(test))}
    return entry


def markdown(results: dict[str, Any]) -> str:
    """A table per data set."""
    lines = ["# Density estimators on tables", "", "Mean test log-likelihood, nats per row of standardised data.", ""]
    for name, entry in results.items():
        sizes = f"{entry['rows']} training rows, {entry['columns']} columns, {entry['test_rows']} test rows."
        lines += [f"## {name}", "", sizes, "", "| model | log-likelihood | from the best | chosen | seconds |"]
        lines.append("|" + "---|" * 5)
        for kind, m in sorted(entry["models"].items(), key=lambda item: -item[1]["mean"]):
            own, gap = f"{m['mean']:.3f} ± {m['stderr']:.3f}", f"{m['gap']:+.3f} ± {m['gap_stderr']:.3f}"
            lines.append(f"| {kind} | {own} | {gap} | {m['choice']} | {m['seconds']:.0f} |")
        lines.append("")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Differences from the best, with errors, a panel per data set; what is far off is written at the edge."""
    from matplotlib.figure import Figure

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
    figure.savefig(path, dpi=110)


def kept(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The entry of a table, from the cache if it was made by the same settings."""
    if options.cache is None:
        return compare(name, options)
    file = options.cache / f"{name}.json"
    settings = {"steps": options.steps, "flow": list(options.flow), "rows": options.rows, "seed": options.seed}
    if file.exists() and (known := json.loads(file.read_text()))["settings"] == settings:
        return known["entry"]
    entry = compare(name, options)
    options.cache.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps({"settings": settings, "entry": entry}).encode())
    return entry


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=lambda text: text.split(","), default=list(DATA), help=f"of {', '.join(DATA)}, by commas")
    add("--steps", type=int, default=4000, help="most optimiser steps of ours (4000)")
    add("--flow", type=int, nargs=2, default=(4, 128), metavar=("K", "W"), help="transforms and width of nsf (4 128)")
    add("--rows", type=int, default=2000, help="test rows at most (2000)")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=RESULTS)
    add("--cache", type=Path, help="folder that keeps finished tables")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.data if name not in DATA]
    if unknown:
        parser.error(f"--data: {', '.join(unknown)} unknown; there are {', '.join(DATA)}.")
    results = {name: kept(name, options) for name in options.data}
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out / "density_estimators.json", (json.dumps(results, indent=1) + "\n").encode())
    write_atomically(options.out / "density_estimators.md", markdown(results).encode())
    plot(results, options.out / "density_estimators.png")
    return results


if __name__ == "__main__":
    main()
