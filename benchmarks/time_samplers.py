r"""How much the choice of times reduces the scatter of the training objective.

    python benchmarks/time_samplers.py                   # about 5 minutes on one CPU core
    python benchmarks/time_samplers.py --batches 50      # a look

On trained networks the diffusion term of the bound is estimated from batches, one time per row, with times

* uniform in t, independent of each other;
* uniform in gamma, independent;
* uniform in gamma, of low discrepancy over the batch (the default);
* of low discrepancy and the density of ``LossHistory`` or ``LearnedBuckets``, learned from batches before.

The variance of the mean over a batch has two parts: rows differ, which no choice of times changes, and times. The same
rows in the same order are used for all. Reported is the variance over batches relative to independent times uniform in
gamma, with a standard error by bootstrap. Writes ``time_samplers.json``, ``time_samplers.md`` and ``time_samplers.png``
(the learned densities beside the root mean square of the loss).
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import networks
from torch import Tensor

import ndm_ct
from ndm_ct import objectives
from ndm_ct.objectives.time_samplers import LearnedBuckets, LossHistory, TimeSampler
from ndm_ct.storage import write_atomically

RESULTS = Path(__file__).parent / "results"
BUCKETS = 50


def losses(model: ndm_ct.NDM, x: Tensor, v: Tensor, generator: torch.Generator) -> Tensor:
    """The diffusion term per row at the numbers v of the default coordinate, nats, ``(B,)``."""
    t, weight = objectives.times(model, v)
    eps = torch.randn(x.shape, dtype=x.dtype, generator=generator)
    return weight * objectives.diffusion_integrand(model, x, t, eps).double()


def in_time(model: ndm_ct.NDM, x: Tensor, u: Tensor, generator: torch.Generator) -> Tensor:
    """The same with times uniform in t."""
    t = model.t_min + (1.0 - model.t_min) * u
    eps = torch.randn(x.shape, dtype=x.dtype, generator=generator)
    return (1.0 - model.t_min) * objectives.diffusion_integrand(model, x, t, eps).double()


def estimates(model: ndm_ct.NDM, x: Tensor, batch: int, batches: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Batch means by method, and learned densities."""
    rows = torch.stack(
        [torch.randperm(len(x), generator=torch.Generator().manual_seed(k))[:batch] for k in range(batches)]
    )

    def run(draw: Callable[[Tensor, torch.Generator, int], Tensor]) -> Tensor:
        means = []
        for k, own in enumerate(rows):
            means.append(draw(x[own], torch.Generator().manual_seed(1000 + k), k).mean())
        return torch.stack(means)

    def independent(generator: torch.Generator) -> Tensor:
        return torch.rand(batch, dtype=torch.float64, generator=generator)

    def even(generator: torch.Generator) -> Tensor:
        return objectives.low_discrepancy(batch, generator, x.device)

    def learned(sampler: TimeSampler) -> Tensor:
        def draw(own: Tensor, generator: torch.Generator, k: int) -> Tensor:
            v, rarity = sampler(even(generator))
            value = losses(model, own, v, generator)
            sampler.observe(v, value)
            return rarity * value

        run(draw)  # learning
        sampler.observe = lambda v, loss: None  # type: ignore[method-assign]
        return run(draw)

    samplers = {"loss history": LossHistory(BUCKETS, memory=batches), "learned buckets": LearnedBuckets(BUCKETS)}
    found = {
        "uniform in gamma": run(lambda own, generator, k: losses(model, own, independent(generator), generator)),
        "low discrepancy": run(lambda own, generator, k: losses(model, own, even(generator), generator)),
    } | {name: learned(sampler) for name, sampler in samplers.items()}
    return found, {name: sampler.probabilities() * BUCKETS for name, sampler in samplers.items()}


def ratio(values: Tensor, baseline: Tensor, generator: np.random.Generator) -> tuple[float, float]:
    """Ratio of variances, and its standard error over resampled batches."""
    a, b = values.numpy(), baseline.numpy()
    picks = generator.integers(0, len(a), (500, len(a)))
    return float(a.var(ddof=1) / b.var(ddof=1)), float((a[picks].var(1) / b[picks].var(1)).std())


def profile(model: ndm_ct.NDM, x: Tensor) -> Tensor:
    """Root mean square of the loss in every bucket."""
    generator = torch.Generator().manual_seed(7)
    values = []
    for k in range(BUCKETS):
        v = (k + torch.rand(64, dtype=torch.float64, generator=generator)) / BUCKETS
        values.append(losses(model, x[:64], v, generator).square().mean().sqrt())
    return torch.stack(values)


def plot(profiles: dict[str, tuple[Tensor, dict[str, Tensor]]], path: Path) -> None:
    """Densities over the coordinate of time, one panel per network."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * len(profiles), 3.8), layout="constrained")
    middles = (torch.arange(BUCKETS) + 0.5) / BUCKETS
    for axis, (name, (scale, densities)) in zip(
        figure.subplots(1, len(profiles), squeeze=False)[0], profiles.items(), strict=True
    ):
        axis.plot(middles, scale / scale.mean(), color="black", label="root mean square of the loss")
        for label, density in densities.items():
            axis.step(middles, density, where="mid", label=f"density, {label}")
        axis.set(title=name, xlabel="v, even in gamma", ylabel="relative to uniform")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=["digits", "fashion", "casp"], choices=list(networks.NETWORKS))
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = ["| network | times | mean, nats | variance / uniform in gamma |", "|---|---|---|---|"]
    results: dict[str, Any] = {}
    profiles = {}
    for name in arguments.networks:
        model = networks.load(name).requires_grad_(False)
        x = networks.NETWORKS[name].test_rows(2000)
        with torch.no_grad():
            found, densities = estimates(model, x, arguments.batch, arguments.batches)
            profiles[name] = profile(model, x), densities
        results[name] = {}
        for label, values in found.items():
            value, error = ratio(values, found["uniform in gamma"], np.random.default_rng(0))
            mean, mean_se = float(values.mean()), float(values.std()) / len(values) ** 0.5
            results[name][label] = {
                "mean": mean,
                "mean_se": mean_se,
                "variance_ratio": value,
                "variance_ratio_se": error,
            }
            lines.append(f"| {name} | {label} | {mean:.2f} ± {mean_se:.2f} | {value:.3f} ± {error:.3f} |")
            print(lines[-1], flush=True)
    settings = {"batches": arguments.batches, "batch": arguments.batch, "buckets": BUCKETS, "torch": torch.__version__}
    text = json.dumps({"settings": settings, "results": results}, indent=1) + "\n"
    write_atomically(arguments.out / "time_samplers.json", text.encode())
    title = "# Times of the training objective\n\n"
    write_atomically(arguments.out / "time_samplers.md", (title + "\n".join(lines) + "\n").encode())
    plot(profiles, arguments.out / "time_samplers.png")


if __name__ == "__main__":
    main()
