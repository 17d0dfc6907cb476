r"""How much does the choice of times reduce the scatter of the training objective?

    python benchmarks/time_samplers.py                   # about 5 minutes on one CPU core
    python benchmarks/time_samplers.py --batches 50      # a look

``benchmarks/README.md`` says how it is measured.
"""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from bench import networks, runs
from matplotlib.figure import Figure
from torch import Tensor

import ndm_ct
from ndm_ct import objectives
from ndm_ct._core.seeds import make_generator
from ndm_ct.objectives.time_samplers import LearnedBuckets, LossHistory, TimeSampler

BUCKETS = 50


def losses(model: ndm_ct.NDM, x: Tensor, v: Tensor, generator: torch.Generator) -> Tensor:
    """The diffusion term per row at the numbers v of the default coordinate, nats, ``(B,)``."""
    t, weight = objectives.times(model, v)
    eps = torch.randn(x.shape, dtype=x.dtype, generator=generator)
    return weight * objectives.diffusion_integrand(model, x, t, eps).double()


def estimates(model: ndm_ct.NDM, x: Tensor, batch: int, batches: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Batch means by method, and learned densities."""

    def run(draw: Callable[[Tensor, torch.Generator], Tensor]) -> Tensor:
        rows = (torch.randperm(len(x), generator=make_generator("rows", k))[:batch] for k in range(batches))
        return torch.stack([draw(x[own], make_generator("times", k)).mean() for k, own in enumerate(rows)])

    def independent(own: Tensor, generator: torch.Generator) -> Tensor:
        return losses(model, own, torch.rand(batch, dtype=torch.float64, generator=generator), generator)

    def even(own: Tensor, generator: torch.Generator) -> Tensor:
        return losses(model, own, objectives.low_discrepancy(batch, generator, x.device), generator)

    def learned(sampler: TimeSampler) -> Tensor:
        def draw(own: Tensor, generator: torch.Generator, learn: bool = False) -> Tensor:
            v, rarity = sampler(objectives.low_discrepancy(batch, generator, x.device))
            value = losses(model, own, v, generator)
            if learn:
                sampler.observe(v, value)
            return rarity * value

        run(lambda own, generator: draw(own, generator, learn=True))
        return run(draw)

    samplers = {"loss history": LossHistory(BUCKETS, memory=batches), "learned buckets": LearnedBuckets(BUCKETS)}
    found = {"uniform in gamma": run(independent), "low discrepancy": run(even)}
    found |= {name: learned(sampler) for name, sampler in samplers.items()}
    return found, {name: sampler.probabilities() * BUCKETS for name, sampler in samplers.items()}


def ratio(values: Tensor, baseline: Tensor) -> tuple[float, float]:
    """Ratio of variances, and its standard error over resampled batches."""
    a, b = values.numpy(), baseline.numpy()
    picks = np.random.default_rng(0).integers(0, len(a), (500, len(a)))
    return float(a.var(ddof=1) / b.var(ddof=1)), float((a[picks].var(1) / b[picks].var(1)).std())


def profile(model: ndm_ct.NDM, x: Tensor) -> Tensor:
    """Root mean square of the loss in every bucket."""
    generator = torch.Generator().manual_seed(7)
    values = []
    for k in range(BUCKETS):
        v = (k + torch.rand(64, dtype=torch.float64, generator=generator)) / BUCKETS
        values.append(losses(model, x[:64], v[: len(x)], generator).square().mean().sqrt())
    return torch.stack(values)


def plot(profiles: dict[str, tuple[Tensor, dict[str, Tensor]]]) -> Figure:
    """Densities over the coordinate of time, one panel per network."""
    figure = Figure(figsize=(5.0 * len(profiles), 3.8), layout="constrained")
    middles = (torch.arange(BUCKETS) + 0.5) / BUCKETS
    panels = figure.subplots(1, len(profiles), squeeze=False)[0]
    for axis, (name, (scale, densities)) in zip(panels, profiles.items(), strict=True):
        axis.plot(middles, scale / scale.mean(), color="black", label="root mean square of the loss")
        for label, density in densities.items():
            axis.step(middles, density, where="mid", label=f"density, {label}")
        axis.set(title=name, xlabel="v, even in gamma", ylabel="relative to uniform")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    return figure


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = runs.Parser(__doc__, runs.RESULTS / "time_samplers" / "all")
    add, known = parser.add_argument, list(networks.NETWORKS)
    add("--networks", nargs="*", default=["digits", "fashion", "casp"], choices=known, help="trained networks")
    add("--batches", type=int, default=300, help="batches of every method (300)")
    add("--batch", type=int, default=64, help="rows in a batch (64)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; returns the report."""
    options = parse(arguments)
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    lines, profiles = [], {}
    for name in options.networks:
        model, x = networks.load(name).requires_grad_(False), networks.NETWORKS[name].test_rows(2000)
        with torch.no_grad():
            found, densities = estimates(model, x, options.batch, options.batches)
            profiles[name] = profile(model, x), densities
        results[name] = {}
        for label, values in found.items():
            (mean, mean_se), (value, error) = runs.mean(values), ratio(values, found["uniform in gamma"])
            results[name][label] = {"mean": mean, "mean_se": mean_se}
            results[name][label] |= {"variance_ratio": value, "variance_ratio_se": error}
            lines.append((name, label, runs.with_error(mean, mean_se, 2), runs.with_error(value, error, 3)))
            print(" | ".join(lines[-1]), flush=True)
    table = runs.table(["network", "times", "mean, nats", "variance / uniform in gamma"], lines)
    settings = {"batches": options.batches, "batch": options.batch, "buckets": BUCKETS}
    text = "\n".join(["# Times of the training objective", "", *table])
    return runs.write_report(
        options.out, {"settings": settings, "results": results}, text, {"plot": plot(profiles)}
    )  # fmt: skip


if __name__ == "__main__":
    main()
