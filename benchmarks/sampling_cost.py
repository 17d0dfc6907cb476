r"""What does a sampler cost besides its network evaluations?

    python benchmarks/sampling_cost.py                # about 5 minutes on one CPU core
    python benchmarks/sampling_cost.py --repeats 3    # a look

``benchmarks/README.md`` says how it is measured.
"""

import argparse
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench import networks, runs
from bench.timing import fastest
from matplotlib.figure import Figure
from torch import Tensor

import ndm_ct
from ndm_ct import nn, samplers, schedules
from ndm_ct.samplers.frozen import estimate_residuals

NAMES = {name: made for name, made in samplers.NAMES.items() if name != "map"}  # a map is a model of its own
TORCHSDE = "torchsde's own loop"


def tiny() -> ndm_ct.NDM:
    """A perceptron of 16 units on 2-D data."""
    torch.manual_seed(0)
    predictor = nn.Preconditioned(nn.MLP(2, width=16, depth=1))
    return ndm_ct.NDM(predictor, (2,), schedule=schedules.LinearLogSNR(-9.0, 5.0))


def bare(model: ndm_ct.NDM, rows: int, evaluations: int) -> Callable[[], None]:
    """As many predictions alone."""
    z, t = torch.randn(rows, *model.event_shape), torch.full((rows,), 0.5, dtype=torch.float64)

    def run() -> None:
        with torch.no_grad():
            for _ in range(evaluations):
                model.predict_x(z, t)

    return run


class _TorchSDE(torch.nn.Module):
    """The reverse SDE as torchsde wants it: flat states, time s = 1 - t."""

    noise_type, sde_type = "diagonal", "stratonovich"

    def __init__(self, model: ndm_ct.NDM) -> None:
        super().__init__()
        self.sde, self.shape = model.reverse_sde(torch.float32), model.event_shape

    def f(self, s: Tensor, y: Tensor) -> Tensor:
        return -self.sde.drift(1.0 - s.double(), y.reshape(-1, *self.shape)).flatten(1)

    def g(self, s: Tensor, y: Tensor) -> Tensor:
        z = y.reshape(-1, *self.shape)
        return self.sde.diffusion(1.0 - s.double(), z).expand_as(z).flatten(1)


def torchsde_loop(model: ndm_ct.NDM, rows: int, steps: int) -> Callable[[], None]:
    """torchsde's own loop with its stochastic Heun; two evaluations per step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchsde
    sde, size = _TorchSDE(model), torch.Size(model.event_shape).numel()
    ts = torch.linspace(0.0, 1.0 - model.t_min, 2)

    def run() -> None:
        with torch.no_grad():
            torchsde.sdeint(sde, torch.randn(rows, size), ts, dt=float(ts[-1]) / steps, method="heun")

    return run


class _Nothing(torch.nn.Module):
    """A predictor that costs nothing."""

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return z


def measure(model: ndm_ct.NDM, rows: int, steps: int, repeats: int) -> list[dict[str, Any]]:
    """One row per sampler, in milliseconds per evaluation: walk, bare network, overhead."""
    idle = ndm_ct.NDM(_Nothing(), model.event_shape, schedule=model.schedule)
    residuals = estimate_residuals(model, torch.randn(64, *model.event_shape))
    analytic = partial(NAMES["ddpm_analytic"], residuals=residuals)
    made = NAMES | {"ddpm_analytic": analytic}
    results = []
    for name in [*NAMES, TORCHSDE]:
        evaluations = 2 * steps if name == TORCHSDE else made[name](model).cost(steps)

        def walk(own: ndm_ct.NDM, name: str = name) -> Callable[[], Any]:
            if name == TORCHSDE:
                return torchsde_loop(own, rows, steps)
            return lambda: ndm_ct.sample(own, rows, method=analytic if name == "ddpm_analytic" else name, steps=steps)

        calls = {"walk": walk(model), "network": bare(model, rows, evaluations), "overhead": walk(idle)}
        times = {what: 1e3 * seconds / evaluations for what, seconds in fastest(calls, repeats).items()}
        results.append({
            "sampler": name, "evaluations": evaluations, **{f"{what}_ms": value for what, value in times.items()},
            "overhead_share": times["overhead"] / times["network"],
            "difference_ms": times["walk"] - times["network"],
        })  # fmt: skip
    return results


def markdown(results: dict[str, list[dict[str, Any]]]) -> str:
    """A table per model."""
    head = ["sampler", "evaluations", "walk, ms", "network, ms", "overhead, ms", "of the network", "walk - network, ms"]
    lines = ["# What a sampler costs besides its network", ""]
    for name, rows in results.items():
        cells = [
            (row["sampler"], row["evaluations"], *(f"{row[key]:.3f}" for key in ("walk_ms", "network_ms")),
             f"{row['overhead_ms']:.3f}", f"{row['overhead_share']:.1%}", f"{row['difference_ms']:.3f}")
            for row in rows
        ]  # fmt: skip
        lines += [f"### {name}", "", *runs.table(head, cells), ""]
    return "\n".join(lines)


def plot(results: dict[str, list[dict[str, Any]]]) -> Figure:
    """Overheads as bars, and the network's time as a line."""
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    for axis, (name, rows) in zip(figure.subplots(1, len(results), sharey=True), results.items(), strict=True):
        axis.barh([row["sampler"] for row in rows[::-1]], [row["overhead_ms"] for row in rows[::-1]])
        network = statistics.median(row["network_ms"] for row in rows)
        axis.axvline(network, color="black", label=f"the network, {network:.2g} ms")
        axis.set(xscale="log", xlabel="ms per evaluation besides the network", title=name)
        axis.legend(loc="lower right")
        axis.grid(axis="x", alpha=0.3)
    return figure


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = runs.Parser(__doc__, runs.RESULTS / "sampling_cost" / "all")
    parser.add_argument("--repeats", type=int, default=7, help="rounds, of which the fastest counts (7)")
    parser.add_argument("--steps", type=int, default=20, help="steps on the U-Net (20); the perceptron takes 5 times")
    parser.add_argument("--rows", type=int, default=64, help="batch size on the U-Net (64); the perceptron takes 16")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; returns the report."""
    options = parse(arguments)
    torch.set_num_threads(1)
    results = {
        "U-Net, digits": measure(networks.load("digits"), options.rows, options.steps, options.repeats),
        "perceptron": measure(tiny(), 16, 5 * options.steps, options.repeats),
    }
    settings = {"repeats": options.repeats, "steps": options.steps, "rows": options.rows, "threads": 1}
    print(markdown(results))
    report = {"settings": settings, "results": results}
    return runs.write_report(options.out, report, markdown(results), {"plot": plot(results)})


if __name__ == "__main__":
    main()
