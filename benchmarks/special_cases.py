r"""Every published model of ``ndm_ct.presets`` trained on one two-dimensional set, scored and sampled.

    python benchmarks/special_cases.py                  # about 15 minutes on one CPU core
    python benchmarks/special_cases.py --steps 300      # a look
    python benchmarks/special_cases.py --only edm,ddpm

The data are a mixture of eight Gaussians on a circle, whose entropy is known: no model can have a smaller negative
log-likelihood. All networks are the same perceptron; the models differ in schedule, in what the network estimates, in
the objective and in the sampler, as published. For each: the negative log-likelihood of test data under the
probability flow (with its standard error over the data) above the entropy, the energy distance of samples drawn by the
preset's own method from test data (in units of its standard deviation between two sets of data), and evaluations per
sample. INDM gets a spline flow of zuko, LSGM perceptrons for encoder and decoder, and the bound for the likelihood,
which it does not have; its samples are the decoder's means.

Every model's result is kept in ``--cache`` as soon as it is there, under a name made of the settings, and not computed
twice; after a change of code delete the folder. Writes ``special_cases.json``, ``special_cases.md`` and
``special_cases.png``.
"""

import argparse
import io
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.metrics import energy_distance
from torch import Tensor, nn

import ndm_ct
from ndm_ct.presets import PRESETS, Preset
from ndm_ct.storage import write_atomically

RESULTS = Path(__file__).parent / "results"
STEPS_OF_SAMPLER = {"ddpm": 250, "ddim": 50, "sde": 250, "pc": 250, "langevin": 250, "edm": 25, "euler": 50}
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
        net: of unit scale.
        sigma: :math:`\sigma(t)`.
    """

    def __init__(self, net: nn.Module, sigma: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.sigma = net, sigma

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Shape of z."""
        sigma = self.sigma(t)[:, None]
        return self.net(z / (1.0 + sigma**2).sqrt(), t) / sigma


def build(name: str) -> Preset:
    """A preset with a perceptron of 64 units, on vectors, or on images of one row for blurring."""
    torch.manual_seed(0)
    if name == "blurring":
        return PRESETS[name](ndm_ct.nn.MLP((1, 2), width=64), (1, 2), blur=1.0, floor=0.1)
    net = ndm_ct.nn.MLP(2, width=64)
    if name == "ncsn":
        return PRESETS[name](OverSigma(net, lambda t: 0.01 * 1000.0**t), (2,), sigma_max=10.0)
    if name == "edm":
        return PRESETS[name](net, (2,), data_std=1.0)
    if name == "score_sde_ve":
        return PRESETS[name](OverSigma(net, lambda t: 0.01 * 5000.0**t), (2,))
    if name == "indm":
        import zuko

        flow = zuko.flows.NSF(2, transforms=2, hidden_features=(64, 64))
        return PRESETS[name](OverSigma(net, vp_sigma(0.5)), (2,), flow=ndm_ct.nn.FromZuko(flow))
    if name == "lsgm":
        coders = {"encoder": ndm_ct.nn.GaussianEncoder((2,), (2,)), "decoder": ndm_ct.nn.GaussianDecoder((2,), (2,))}
        return PRESETS[name](net, (2,), **coders, data_shape=(2,))
    if name.startswith("score_sde"):
        power = 1.0 if name.endswith("subvp") else 0.5
        return PRESETS[name](OverSigma(net, vp_sigma(power)), (2,))
    return PRESETS[name](net, (2,))


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
    log_p, stderr = scored(model, test, generator)
    excess = data.log_prob(test.flatten(1).double()) - log_p
    grid = {"steps": STEPS_OF_SAMPLER[method]} if method in STEPS_OF_SAMPLER else {}
    x, drawn = ndm_ct.sample(model, rows, method=method, generator=generator, return_info=True, **grid)
    distances = [energy_distance(*data.sample_data(2 * rows, generator=generator).split(rows)) for _ in range(20)]
    unit = float(torch.tensor(distances).std())
    return {
        "preset": name, "schedule": type(model.schedule).__name__, "t_min": model.t_min, "method": method,
        "nfe": drawn.nfe, "excess_nll": float(excess.mean()), "excess_nll_se": float(excess.std()) / rows**0.5,
        "estimator_se": float(stderr.square().sum().sqrt()) / rows,
        "energy_distance": energy_distance(x.flatten(1), test.flatten(1)), "energy_unit": unit,
        "training_seconds": seconds,
    }, x.flatten(1)  # fmt: skip


def scored(model: ndm_ct.NDM, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """log p(x), or its bound where that is all there is, and the estimate's standard error."""
    with torch.no_grad():
        if model.transform.bijective:
            log_p, info = ndm_ct.loglik(model, x, generator=generator, return_info=True)
        else:
            log_p, info = ndm_ct.elbo(model, x, samples=256, generator=generator, return_info=True)
    return log_p, info.stderr


def kept(name: str, steps: int, data: ndm_ct.NDM, rows: int, cache: Path) -> tuple[dict[str, Any], Tensor]:
    """:func:`measure`, unless that has been done."""
    path = cache / f"{name}-{steps}-{rows}.npz"
    if not path.exists():
        row, x = measure(name, steps, data, rows)
        buffer = io.BytesIO()
        np.savez(buffer, row=json.dumps(row), x=x.numpy())
        write_atomically(path, buffer.getvalue())
    with np.load(path) as found:
        return json.loads(str(found["row"])), torch.from_numpy(found["x"])


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = ["| preset | schedule | NLL - entropy, nats | sampler | evaluations | energy distance / its scatter |"]
    lines.append("|---|---|---|---|---|---|")
    lines += [
        f"| {row['preset']} | {row['schedule']} | {row['excess_nll']:.4f} ± {row['excess_nll_se']:.4f} | "
        f"{row['method']} | {row['nfe']} | {row['energy_distance'] / row['energy_unit']:.1f} |"
        for row in rows
    ]
    return "\n".join([*lines, ""])


def plot(samples: dict[str, Tensor], path: Path) -> None:
    """Samples of every model beside the data."""
    from matplotlib.figure import Figure

    columns = 5
    figure = Figure(figsize=(2.4 * columns, 2.5 * math.ceil(len(samples) / columns)), layout="constrained")
    axes = figure.subplots(math.ceil(len(samples) / columns), columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, (name, x) in zip(axes, samples.items(), strict=False):
        axis.scatter(*x[:1500].T, s=1.0, linewidths=0.0, color="tab:blue" if name != "data" else "black")
        axis.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal", title=name)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000, help="optimiser steps per model (4000)")
    parser.add_argument("--rows", type=int, default=2000, help="test data, and samples (2000)")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PRESETS), help="names, by commas")
    parser.add_argument("--cache", type=Path, default=Path("runs/special_cases"), help="what is finished")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    unknown = set(arguments.only) - set(PRESETS)
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))} unknown; there are {', '.join(PRESETS)}.")
    torch.set_num_threads(1)
    for folder in (arguments.out, arguments.cache):
        folder.mkdir(parents=True, exist_ok=True)
    data = mixture()
    rows, samples = [], {"data": data.sample_data(arguments.rows, generator=torch.Generator().manual_seed(2))}
    for name in arguments.only:
        row, samples[name] = kept(name, arguments.steps, data, arguments.rows, arguments.cache)
        rows.append(row)
        print(table(rows).splitlines()[-1], flush=True)
    settings = {"steps": arguments.steps, "rows": arguments.rows, "torch": torch.__version__}
    result = json.dumps({"settings": settings, "results": rows}, indent=1)
    write_atomically(arguments.out / "special_cases.json", (result + "\n").encode())
    text = f"# Published models on eight Gaussians\n\n`--steps {arguments.steps} --rows {arguments.rows}`\n\n"
    write_atomically(arguments.out / "special_cases.md", (text + table(rows)).encode())
    plot(samples, arguments.out / "special_cases.png")


if __name__ == "__main__":
    main()
