r"""How close do the methods of ``ndm_ct.posterior`` come to the exact posterior of Gaussian mixtures?

    python benchmarks/posterior.py                             # about 3 minutes on one CPU core
    python benchmarks/posterior.py --problems 2 --samples 100  # a look

``benchmarks/README.md`` says how it is measured. Finished cells are kept in ``--cache``; after a change of code delete
that folder.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from bench import runs
from matplotlib.figure import Figure
from torch import Tensor

import ndm_ct
from ndm_ct.reference import GaussianMixture
from ndm_ct.schedules import LinearLogSNR

METHODS = ("dps", "replacement", "pigdm", "mmps", "smc")
NOISE = 0.3
DIRECTIONS = 64
LEVELS = (0.5, 0.9)


def mixture(d: int) -> GaussianMixture:
    """Five components of correlated coordinates, unit variance over all."""
    source = torch.Generator().manual_seed(d)
    means = 0.8 * torch.randn(5, d, dtype=torch.float64, generator=source)
    factor = torch.randn(5, d, d, dtype=torch.float64, generator=source) / math.sqrt(d)
    covs = 0.25 * factor @ factor.mT + 0.1 * torch.eye(d, dtype=torch.float64)
    return GaussianMixture(torch.tensor([0.1, 0.15, 0.2, 0.25, 0.3]), means, covs, schedule=LinearLogSNR(-10.0, 7.0))


def exact(model: GaussianMixture, mask: Tensor, y: Tensor) -> tuple[GaussianMixture, float]:
    """The posterior given the coordinates under the mask with noise, a mixture again, and log p(y)."""
    known = model.marginals
    inside = known.covs[:, mask][:, :, mask] + NOISE**2 * torch.eye(int(mask.sum()), dtype=torch.float64)
    gain = torch.linalg.solve(inside, known.covs[:, mask]).mT
    residual = y - known.means[:, mask]
    means = known.means + torch.einsum("kij,kj->ki", gain, residual)
    covs = known.covs - gain @ known.covs[:, mask]
    logs = known.log_weights + torch.distributions.MultivariateNormal(known.means[:, mask], inside).log_prob(y)
    weights = logs.softmax(0).clamp(min=1e-12)
    return GaussianMixture(weights / weights.sum(), means, 0.5 * (covs + covs.mT)), float(logs.logsumexp(0))


def sliced(x: Tensor, y: Tensor, directions: Tensor) -> float:
    """The sliced Wasserstein-2 distance of two samples of one size."""
    a, b = ((each @ directions).sort(0).values for each in (x, y))
    return float((a - b).square().mean().sqrt())


def measure(d: int, method: str, problems: int, samples: int, steps: int) -> dict[str, Any]:
    """All problems of one dimension by one method."""
    model, source = mixture(d), torch.Generator().manual_seed(1)
    mask = torch.arange(d) < max(d // 8, 1)
    directions = torch.nn.functional.normalize(torch.randn(d, DIRECTIONS, dtype=torch.float64, generator=source), dim=0)
    truths = model.sample_data(problems, generator=source)
    distances, floors, ranks, evidence = [], [], [], []
    start = time.process_time()
    for k, truth in enumerate(truths):
        y = truth[mask] + NOISE * torch.randn(int(mask.sum()), dtype=torch.float64, generator=source)
        law, log_evidence = exact(model, mask, y)
        first, second = (law.sample_data(samples, generator=source) for _ in range(2))
        options: dict[str, Any] = {} if method in ("dps", "replacement") else {"noise": NOISE}
        x, info = ndm_ct.posterior(
            model, y.float(), mask, samples, method=method, steps=steps, generator=k, return_info=True, **options
        )
        x = x.double()
        distances.append(sliced(x, first, directions))
        floors.append(sliced(second, first, directions))
        ranks.append(((x @ directions) < (truth @ directions)).double().mean(0))
        evidence.append(((info.log_evidence - log_evidence), info.log_evidence_stderr))
    rank = torch.stack(ranks)
    covered = {f"coverage_{level}": float(((rank - 0.5).abs() < level / 2).double().mean()) for level in LEVELS}
    off, error = torch.tensor(evidence).T.tolist()
    return {
        "dimension": d, "observed": int(mask.sum()), "method": method, "distance": runs.mean(distances),
        "floor": runs.mean(floors), **covered, "ranks": rank.mean(1).tolist(), "evidence_error": off,
        "evidence_stderr": error, "seconds": (time.process_time() - start) / problems,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of the Markdown table."""
    head = ["dimension", "method", "sliced Wasserstein", "of exact samples", "inside 50 %", "inside 90 %"]
    head += ["log p(y) minus exact, nats", "its reported error", "seconds"]

    def line(row: dict[str, Any]) -> tuple[Any, ...]:
        found = ["", ""]
        if row["method"] == "smc":
            found = [
                runs.with_error(*runs.mean(row["evidence_error"]), 2),
                f"{runs.mean(row['evidence_stderr'])[0]:.2f}",
            ]
        return (
            row["dimension"], row["method"], runs.with_error(*row["distance"], 3), f"{row['floor'][0]:.3f}",
            f"{100 * row['coverage_0.5']:.0f} %", f"{100 * row['coverage_0.9']:.0f} %", *found, f"{row['seconds']:.1f}",
        )  # fmt: skip

    return runs.table(head, map(line, rows))


def plot(rows: list[dict[str, Any]]) -> Figure:
    """Distances over dimensions."""
    figure = Figure(figsize=(6.5, 4.0), layout="constrained")
    axis = figure.subplots()
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [row for row in rows if row["method"] == method]
        values, errors = zip(*(row["distance"] for row in cells), strict=True)
        axis.errorbar([row["dimension"] for row in cells], values, errors, marker="o", capsize=2, label=method)
    last = [row for row in rows if row["method"] == rows[-1]["method"]]
    axis.plot([row["dimension"] for row in last], [row["floor"][0] for row in last], "k--", label="exact samples")
    axis.set(xscale="log", ylim=(0.0, None), xlabel="dimensions", ylabel="sliced Wasserstein distance to the posterior")
    axis.set_xticks([row["dimension"] for row in last], [str(row["dimension"]) for row in last])
    axis.minorticks_off()
    axis.legend(fontsize=8)
    return figure


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = runs.Parser(__doc__, runs.RESULTS / "posterior" / "mixtures")
    add = parser.add_argument
    add("--dimensions", type=runs.numbers, default=[2, 8, 32, 64], help="by commas (2,8,32,64)")
    add("--problems", type=int, default=6, help="observations per dimension (6)")
    add("--samples", type=int, default=128, help="samples per observation (128)")
    add("--steps", type=int, default=60, help="steps of the chain (60)")
    add("--cache", type=Path, default=Path("runs/posterior"), help="what is finished")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure what is not finished and write; returns the report."""
    options = parse(arguments)
    torch.set_num_threads(1)
    settings = {"problems": options.problems, "samples": options.samples, "steps": options.steps}
    rows = []
    for d in options.dimensions:
        for method in METHODS:
            name = "-".join(map(str, (d, method, *settings.values())))

            def make(d: int = d, method: str = method) -> dict[str, Any]:
                return measure(d, method, **settings)

            rows.append(runs.kept(options.cache / f"{name}.json", settings, make))
            print(table(rows[-1:])[-1], flush=True)
    written = " ".join(f"--{key} {value}" for key, value in settings.items())
    text = f"# Posteriors of Gaussian mixtures\n\n`{written}`\n\n" + "\n".join(table(rows))
    return runs.write_report(options.out, {"settings": settings, "results": rows}, text, {"plot": plot(rows)})


if __name__ == "__main__":
    main()
