r"""What a sampler costs besides its network evaluations.

    python benchmarks/sampling_cost.py                # about 5 minutes on one CPU core
    python benchmarks/sampling_cost.py --repeats 3    # a look

Every sampler walks the same grid on two models: the trained U-Net of the digits (``benchmarks/networks.py``) and a tiny
perceptron, whose evaluation takes a fraction of a millisecond. Three things are timed, in turn, in seconds of the
processor (one thread): the walk; the predictor alone, called as often on inputs of the same shape; and the walk of the
same model with a predictor that returns its input. The last is all that the sampler itself does, the *overhead*, free
of the scatter of the network's own time, of which it is a few percent. The first minus the second is larger, on the
perceptron about twice: presumably the network finds less of its own in the caches between the operations of a sampler.
torchsde's own ``sdeint`` on the same reverse SDE is measured the same way. Writes
``sampling_cost.json``, ``sampling_cost.md`` and ``sampling_cost.png`` into ``benchmarks/results``.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import networks
from torch import Tensor

import ndm_ct
from ndm_ct import nn, schedules
from ndm_ct.samplers import NAMES
from ndm_ct.samplers.frozen import estimate_residuals

RESULTS = Path(__file__).parent / "results"
TORCHSDE = "torchsde's own loop"


def tiny() -> ndm_ct.NDM:
    """A perceptron of 16 units on 2-D data."""
    torch.manual_seed(0)
    predictor = nn.Preconditioned(nn.MLP(2, width=16, depth=1))
    return ndm_ct.NDM(predictor, (2,), schedule=schedules.LinearLogSNR(-9.0, 5.0))


def bare(model: ndm_ct.NDM, rows: int, evaluations: int) -> Callable[[], None]:
    """As many calls of the predictor alone."""
    z, t = torch.randn(rows, *model.event_shape), torch.full((rows,), 0.5)

    def run() -> None:
        with torch.no_grad():
            for _ in range(evaluations):
                model.predictor(z, t)

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


def timed(
    calls: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, np.ndarray]:
    """Seconds of each in every round, called in turn, after one call each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if turn:
                seconds[name].append(clock() - start)
    return {name: np.array(own) for name, own in seconds.items()}


def fastest(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Least processor seconds of each; what other processes do to a run only ever adds to it."""
    return {name: float(own.min()) for name, own in timed(calls, repeats).items()}


class _Nothing(torch.nn.Module):
    """A predictor that costs nothing."""

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return z


def measure(model: ndm_ct.NDM, rows: int, steps: int, repeats: int) -> list[dict[str, Any]]:
    """One row per sampler, in milliseconds per evaluation: walk, bare network, overhead."""
    idle = ndm_ct.NDM(_Nothing(), model.event_shape, schedule=model.schedule)
    for each in (model, idle):
        estimate_residuals(each, torch.randn(64, *model.event_shape))
    results = []
    for name in [*NAMES, TORCHSDE]:
        evaluations = 2 * steps if name == TORCHSDE else NAMES[name](model).cost(steps)

        def walk(own: ndm_ct.NDM, name: str = name) -> Callable[[], Any]:
            if name == TORCHSDE:
                return torchsde_loop(own, rows, steps)
            return lambda: ndm_ct.sample(own, rows, method=name, steps=steps)

        calls = {"walk": walk(model), "network": bare(model, rows, evaluations), "overhead": walk(idle)}
        times = {what: 1e3 * seconds / evaluations for what, seconds in fastest(calls, repeats).items()}
        results.append({
            "sampler": name, "evaluations": evaluations, **{f"{what}_ms": value for what, value in times.items()},
            "overhead_share": times["overhead"] / times["network"],
            "difference_ms": times["walk"] - times["network"],
        })  # fmt: skip
    return results


def table(name: str, rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    columns = "sampler | evaluations | walk, ms | network, ms | overhead, ms | of the network | walk - network, ms"
    lines = [f"### {name}", "", f"| {columns} |"]
    lines.append("|---|---|---|---|---|---|---|")
    lines += [
        f"| {row['sampler']} | {row['evaluations']} | {row['walk_ms']:.3f} | {row['network_ms']:.3f} | "
        f"{row['overhead_ms']:.3f} | {row['overhead_share']:.1%} | {row['difference_ms']:.3f} |"
        for row in rows
    ]
    return "\n".join([*lines, ""])


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Overheads as bars, beside the network's time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    for axis, (name, rows) in zip(figure.subplots(1, len(results), sharey=True), results.items(), strict=True):
        upwards = rows[::-1]
        axis.barh([row["sampler"] for row in upwards], [row["overhead_ms"] for row in upwards])
        network = statistics.median(row["network_ms"] for row in rows)
        axis.axvline(network, color="black", label=f"the network, {network:.2g} ms")
        axis.set(xscale="log", xlabel="ms per evaluation besides the network", title=name)
        axis.legend(loc="lower right")
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=64, help="batch size on the U-Net; the perceptron takes 16")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        "U-Net, digits": measure(networks.load("digits"), arguments.rows, arguments.steps, arguments.repeats),
        "perceptron": measure(tiny(), 16, 5 * arguments.steps, arguments.repeats),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = {"repeats": arguments.repeats, "steps": arguments.steps, "rows": arguments.rows, "threads": 1}
    (arguments.out / "sampling_cost.json").write_text(
        json.dumps({"settings": settings, "torch": torch.__version__, "results": results}, indent=1) + "\n"
    )
    text = "\n".join(table(name, rows) for name, rows in results.items())
    (arguments.out / "sampling_cost.md").write_text("# What a sampler costs besides its network\n\n" + text)
    plot(results, arguments.out / "sampling_cost.png")
    print(text)


if __name__ == "__main__":
    main()
