r"""What a sampler costs besides its network evaluations.

    python benchmarks/sampling_cost.py                # about 5 minutes on one CPU core
    python benchmarks/sampling_cost.py --repeats 3    # a look

Every sampler walks the same grid on two models: the trained U-Net of the digits (``benchmarks/networks.py``) and a tiny
perceptron, whose evaluation takes a fraction of a millisecond. Beside it, in the same run and alternating with it, the
predictor alone is called as often on inputs of the same shape. The overhead is the difference, per evaluation, in
seconds of the processor (one thread), which other processes do not lengthen;
torchsde's own ``sdeint`` on the same reverse SDE is measured the same way. Writes ``sampling_cost.json`` and
``sampling_cost.md`` into ``benchmarks/results``.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ndm_ct
from ndm_ct import nn, schedules
from ndm_ct.discrete import estimate_residuals
from ndm_ct.samplers import NAMES

try:
    from benchmarks import networks
except ImportError:  # run as a script
    import networks

RESULTS = Path(__file__).parent / "results"


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


def paired(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[list[float], list[float]]:
    """Processor seconds of both, alternating, after one call each that does not count."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for call, own in zip((first, second), seconds, strict=True):
            start = time.process_time()
            call()
            if repeat:
                own.append(time.process_time() - start)
    return seconds


def measure(model: ndm_ct.NDM, rows: int, steps: int, repeats: int) -> list[dict[str, Any]]:
    """One row per sampler: milliseconds per evaluation of the loop and of the bare network, and their difference."""
    results = []
    estimate_residuals(model, torch.randn(64, *model.event_shape))
    for name in [*NAMES, "torchsde's own loop"]:
        if name in NAMES:
            evaluations = NAMES[name](model).cost(steps)

            def run(name: str = name) -> None:
                ndm_ct.sample(model, rows, method=name, steps=steps)

        else:
            evaluations, run = 2 * steps, torchsde_loop(model, rows, steps)
        loop, alone = paired(run, bare(model, rows, evaluations), repeats)
        # The fastest of each: what other processes do to a run only ever adds to it.
        per_loop, per_bare = min(loop) / evaluations, min(alone) / evaluations
        results.append(
            {
                "sampler": name,
                "evaluations": evaluations,
                "loop_ms": 1e3 * per_loop,
                "bare_ms": 1e3 * per_bare,
                "overhead_ms": 1e3 * (per_loop - per_bare),
                "overhead_share": per_loop / per_bare - 1.0,
                "median_share": statistics.median(loop) / statistics.median(alone) - 1.0,
            }
        )
    return results


def table(name: str, rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = [f"### {name}", "", "| sampler | evaluations | loop, ms | network, ms | overhead, ms | overhead |"]
    lines.append("|---|---|---|---|---|---|")
    lines += [
        f"| {row['sampler']} | {row['evaluations']} | {row['loop_ms']:.3f} | {row['bare_ms']:.3f} | "
        f"{row['overhead_ms']:.3f} | {row['overhead_share']:.1%} |"
        for row in rows
    ]
    return "\n".join([*lines, ""])


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
    print(text)


if __name__ == "__main__":
    main()
