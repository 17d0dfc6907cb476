r"""Do all published models of ``ndm_ct.presets`` learn one two-dimensional set, under likelihood and sampler?

    python benchmarks/special_cases.py                  # about 15 minutes on one CPU core
    python benchmarks/special_cases.py --steps 300      # a look
    python benchmarks/special_cases.py --only edm,ddpm

``benchmarks/README.md`` says how it is measured. Finished models are kept in ``--cache`` under their settings;
after a change of code delete that folder.
"""

import argparse
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import runs
from bench.metrics import energy_distance
from matplotlib.figure import Figure
from torch import Tensor, nn

import ndm_ct
from ndm_ct.presets import PRESETS, Preset

STEPS_OF_SAMPLER = {"ddpm": 250, "ddim": 50, "sde": 250, "pc": 250, "langevin": 250, "edm": 25, "euler": 50, "map": 2}
"""Steps of the methods that take a grid."""


def mixture() -> ndm_ct.NDM:
    """Eight Gaussians on a circle, unit variance over all."""
    angle = 2.0 * math.pi * torch.arange(8.0) / 8.0
    radius, std = 1.37, 0.25
    means = radius * torch.stack([angle.cos(), angle.sin()], dim=1)
    return ndm_ct.reference.GaussianMixture(torch.full((8,), 1.0 / 8.0), means, std**2 * torch.eye(2).expand(8, 2, 2))


class OverSigma(nn.Module):
    r"""A score network as they are built in practice: :math:`\hat s = \mathrm{net}(c_{in} z, t)/\sigma(t)`.

    Args:
        net: a network of unit scale.
        sigma: :math:`\sigma(t)`.
    """

    def __init__(self, net: nn.Module, sigma: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.sigma = net, sigma

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Score, of the shape of z."""
        sigma = self.sigma(t)[:, None]
        return self.net(z / (1.0 + sigma**2).sqrt(), t) / sigma


def build(name: str) -> Preset:
    """A preset with a perceptron of 64 units, on vectors, or on images of one row for blurring."""
    torch.manual_seed(0)
    preset = PRESETS[name]
    if name == "blurring":
        return preset(ndm_ct.nn.MLP((1, 2), width=64), (1, 2), blur=1.0, floor=0.1)
    net = ndm_ct.nn.MLP(2, width=64, until=name == "mean_flow")
    if name == "ncsn":
        return preset(OverSigma(net, lambda t: 0.01 * 1000.0**t), (2,), sigma_max=10.0)
    if name == "edm":
        return preset(net, (2,), data_std=1.0)
    if name == "score_sde_ve":
        return preset(OverSigma(net, lambda t: 0.01 * 5000.0**t), (2,))
    if name == "indm":
        import zuko

        flow = zuko.flows.NSF(2, transforms=2, hidden_features=(64, 64))
        return preset(OverSigma(net, vp_sigma(0.5)), (2,), flow=ndm_ct.nn.FromZuko(flow))
    if name == "lsgm":
        coders = {"encoder": ndm_ct.nn.GaussianEncoder((2,), (2,)), "decoder": ndm_ct.nn.GaussianDecoder((2,), (2,))}
        return preset(net, (2,), **coders, data_shape=(2,))
    if name == "diffenc":
        return preset(net, (2,), encoder=ndm_ct.nn.MLP(2, width=64))
    if name == "nfdm":
        return preset(net, (2,), mean=ndm_ct.nn.MLP(2, width=64), scale=ndm_ct.nn.MLP(2, width=64))
    if name.startswith("score_sde"):
        return preset(OverSigma(net, vp_sigma(1.0 if name.endswith("subvp") else 0.5)), (2,))
    return preset(net, (2,))


def vp_sigma(power: float) -> Callable[[Tensor], Tensor]:
    r""":math:`\sigma(t)` of the variance-preserving SDE (power 0.5) or the sub-VP SDE (1)."""
    return lambda t: (-torch.expm1(-(0.1 * t + 9.95 * t**2))) ** power


def measure(name: str, steps: int, data: ndm_ct.NDM, rows: int) -> tuple[dict[str, Any], Tensor]:
    """Train, score and sample one preset."""
    generator = torch.Generator().manual_seed(1)
    model, objective, method = build(name)
    shape = model.event_shape
    train, test = (data.sample_data(n, generator=generator).float().reshape(n, *shape) for n in (50_000, rows))
    start = time.process_time()
    ndm_ct.fit(model, train, steps=steps, batch_size=256, lr=2e-3, objective=objective, progress=False)
    seconds = time.process_time() - start
    with torch.no_grad():  # without a bijection there is only a bound
        score = ndm_ct.loglik if model.transform.bijective else functools.partial(ndm_ct.elbo, samples=256)
        log_p, info = score(model, test, generator=generator, return_info=True)
    excess, error = runs.mean(data.log_prob(test.flatten(1).double()) - log_p)
    grid = {"steps": STEPS_OF_SAMPLER[method]} if method in STEPS_OF_SAMPLER else {}
    x, drawn = ndm_ct.sample(model, rows, method=method, generator=generator, return_info=True, **grid)
    distances = [energy_distance(*data.sample_data(2 * rows, generator=generator).split(rows)) for _ in range(20)]
    return {
        "preset": name, "schedule": type(model.schedule).__name__, "t_min": model.t_min, "method": method,
        "nfe": drawn.nfe, "excess_nll": excess, "excess_nll_se": error,
        "estimator_se": float(info.stderr.square().sum().sqrt()) / rows,
        "energy_distance": energy_distance(x.flatten(1), test.flatten(1)),
        "energy_unit": float(torch.tensor(distances).std()), "training_seconds": seconds,
    }, x.flatten(1)  # fmt: skip


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of the Markdown table."""
    head = ["preset", "schedule", "NLL - entropy, nats", "sampler", "evaluations", "energy distance / its scatter"]
    return runs.table(head, [
        (row["preset"], row["schedule"], runs.with_error(row["excess_nll"], row["excess_nll_se"]), row["method"],
         row["nfe"], f"{row['energy_distance'] / row['energy_unit']:.1f}")
        for row in rows
    ])  # fmt: skip


def plot(samples: dict[str, Tensor]) -> Figure:
    """Samples of every model and the data."""
    columns = 5
    lines = math.ceil(len(samples) / columns)
    figure = Figure(figsize=(2.4 * columns, 2.5 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, (name, x) in zip(axes, samples.items(), strict=False):
        axis.scatter(*x[:1500].T, s=1.0, linewidths=0.0, color="tab:blue" if name != "data" else "black")
        axis.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal", title=name)
    return figure


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = runs.Parser(__doc__, runs.RESULTS / "special_cases" / "eight_gaussians")
    add = parser.add_argument
    add("--steps", type=int, default=4000, help="optimiser steps per model (4000)")
    add("--rows", type=int, default=2000, help="test data, and samples (2000)")
    add("--only", type=runs.names(PRESETS), default=list(PRESETS), help="names of presets, by commas")
    add("--cache", type=Path, default=Path("runs/special_cases"), help="what is finished")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure what is not finished and write; returns the report."""
    options = parse(arguments)
    torch.set_num_threads(1)
    data, steps, rows = mixture(), options.steps, options.rows
    results, samples = [], {"data": data.sample_data(rows, generator=torch.Generator().manual_seed(2))}
    for name in options.only:

        def make(name: str = name) -> tuple[dict[str, Any], list[list[float]]]:
            row, x = measure(name, steps, data, rows)
            return row, x.tolist()

        row, x = runs.kept(options.cache / f"{name}-{steps}-{rows}.json", {"steps": steps, "rows": rows}, make)
        results.append(row)
        samples[name] = torch.tensor(x)
        print(table([row])[-1], flush=True)
    text = f"# Published models on eight Gaussians\n\n`--steps {steps} --rows {rows}`\n\n"
    report = {"settings": {"steps": steps, "rows": rows}, "results": results}
    return runs.write_report(options.out, report, text + "\n".join(table(results)), {"plot": plot(samples)})


if __name__ == "__main__":
    main()
