r"""When does noise along the way help a sampler, and when does it hurt?
====================================================================

Samples of the equation

.. math::
    dz = \bigl[ v - \tfrac12 g^2\, \mathrm{score} \bigr] dt + g\, d\bar w, \qquad
    g^2 = \eta\, \sigma^2 \gamma', \qquad \eta = 0: \text{the probability flow}

have the same law for every "stochasticity" :math:`\eta` if the score is exact. What differs is what happens to errors.

1. Exact score: only the steps err. A path with noise is rougher than the flow, so at few evaluations noise hurts.
2. Score wrong at high noise: the flow carries the damage to its end, however many steps it takes. Noise makes samples
   forget where they came from, and the score, right by then, leads them to where they belong: noise helps.
3. Score wrong at low noise: nothing that comes later could repair it, and with noise the score counts :math:`1 + \eta`
   times as much as in the flow: noise hurts at any number of steps.

Data are three Gaussians in the plane. Their law is known along every direction, so samples are compared with the law
itself: the sliced Wasserstein distance says how far a sample must be moved on average, along a line. Error bars are
from the jackknife. The grey band shows the distance of as many exact draws. "sde" with two to five steps may be
unstable and leave the picture.

``python examples/sde_against_ode.py`` takes under a minute on one CPU core and writes ``sde_against_ode.png`` and
``sde_against_ode.json``. Smaller error bars:
``python examples/sde_against_ode.py --rows 50000 --evaluations 5 10 20 50 100 200 400``.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import ndm_ct
from ndm_ct import schedules
from ndm_ct.reference import GaussianMixture

SCORES = {"exact": "exact score", "early": "score wrong while σ/α > 2.7", "late": "score wrong while σ/α < 0.37"}
METHODS = ("ddpm", "dpmpp_2m_sde", "sde")
ADAPTIVE = "sde, adaptive"
STOCHASTICITIES = (0.0, 0.5, 1.0, 2.0)
COLOURS = ("black", "tab:blue", "tab:orange", "tab:red")
DIRECTIONS, BLOCKS = 8, 10


@dataclass(frozen=True)
class Draw:
    """Samples of one method at one cost: their distance from the law of the data, and its standard error."""

    score: str
    method: str
    stochasticity: float
    evaluations: float
    distance: float
    stderr: float


MEANS = torch.tensor([[-1.0, -0.6], [1.0, -0.6], [0.0, 1.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
VARIANCE = 0.09


def data() -> GaussianMixture:
    """Three round Gaussians of unequal weights."""
    covs = VARIANCE * torch.eye(2, dtype=torch.float64).repeat(3, 1, 1)
    return GaussianMixture(WEIGHTS, MEANS, covs, schedule=schedules.LinearLogSNR(-8.0, 6.0))


def model_of(score: str) -> ndm_ct.NDM:
    """The model with E[x | z], which is the score in other units, exact or wrong on one side of a noise level.

    The attribute ``rows`` of its predictor counts the rows that it was evaluated on.
    """
    exact = data()

    def predict(z: Tensor, t: Tensor) -> Tensor:
        # This equals data().predictor; written out for round components of equal size it is many times faster.
        predict.rows += len(z)
        c, z = exact.schedule(t), z.T
        total = c.alpha**2 * VARIANCE + c.sigma**2
        logits = c.alpha * (MEANS @ z - 0.5 * c.alpha * MEANS.square().sum(1, keepdim=True)) / total
        share = torch.softmax(WEIGHTS.log()[:, None] + logits, 0)
        x = (c.alpha * VARIANCE * z + c.sigma**2 * (MEANS.T @ share)) / total
        if score == "early":
            x = x + torch.sigmoid(3.0 * (c.gamma - 2.0)) * x.new_tensor([[0.6], [0.3]])
        if score == "late":
            x = x + 0.1 * torch.sigmoid(-3.0 * (c.gamma + 2.0)) * torch.sin(2.0 * z.flip(0))
        return x.T

    predict.rows = 0
    return ndm_ct.NDM(predict, (2,), schedule=exact.schedule, prior=exact.prior, t_min=exact.t_min)


class Law:
    """The law of exact samples, z at t_min, along lines through the origin, as ``rows`` samples would show it."""

    def __init__(self, model: GaussianMixture, rows: int) -> None:
        time = torch.tensor([model.t_min], dtype=torch.float64)
        means, factors, _ = (part[0] for part in model.marginals.components(time))
        angles = torch.arange(DIRECTIONS, dtype=torch.float64) * math.pi / DIRECTIONS
        self.lines = torch.stack([angles.cos(), angles.sin()])
        centres, widths = means @ self.lines, (factors.mT @ self.lines).norm(dim=1)
        places = torch.linspace(-6.0, 6.0, 6001, dtype=torch.float64)
        cdfs = torch.special.ndtr((places[:, None, None] - centres) / widths).mul(WEIGHTS[:, None]).sum(1).T
        self.quantiles = {}
        for n in (rows, rows - rows // BLOCKS):
            ranks = (np.arange(n) + 0.5) / n
            self.quantiles[n] = torch.tensor(np.stack([np.interp(ranks, cdf, places) for cdf in cdfs]))

    def distance(self, x: Tensor) -> tuple[float, float]:
        """The sliced Wasserstein distance and its standard error, from leaving out every tenth sample in turn."""
        along, order = (x @ self.lines).T.sort(dim=1)
        every = torch.ones_like(order, dtype=torch.bool)
        parts = [along[kept].reshape(DIRECTIONS, -1) for kept in (every, *(order % BLOCKS != k for k in range(BLOCKS)))]
        full, *without = [float((part - self.quantiles[part.shape[1]]).abs().mean()) for part in parts]
        return full, math.sqrt((BLOCKS - 1) * float(np.var(without)))


def measure(rows: int, evaluations: Sequence[int], tolerances: Sequence[float], seed: int) -> list[Draw]:
    """Measure every score, method, stochasticity and cost, and the adaptive SDE at its tolerances."""
    law, table = Law(data(), rows), []

    def add(score: str, method: str, eta: float, **options: Any) -> None:
        model, generator = model_of(score), torch.Generator().manual_seed(seed)
        name = "sde" if method == ADAPTIVE else method
        x = ndm_ct.sample(model, rows, method=name, dtype=torch.float64, generator=generator, **options)
        table.append(Draw(score, method, eta, model.predictor.rows / rows, *law.distance(x)))
        print(f"  {table[-1].distance:.3f} ± {table[-1].stderr:.3f}", end="", flush=True)

    for score, title in SCORES.items():
        print(f"\n{title}; stochasticity, then distances at {', '.join(map(str, sorted(evaluations)))} evaluations")
        for method in METHODS:
            for eta in STOCHASTICITIES:
                print(f"{method:<13}{eta:>4g}", end="")
                for nfe in sorted(evaluations):
                    add(score, method, eta, nfe=nfe, stochasticity=eta)
                print()
        print(f"{ADAPTIVE:<13}{1:>4}", end="")
        for tolerance in sorted(tolerances, reverse=True):
            add(score, ADAPTIVE, 1.0, rtol=tolerance, atol=tolerance)
        print(f", with {', '.join(f'{d.evaluations:.0f}' for d in table[-len(tolerances) :])}")
    return table


def line(table: Sequence[Draw], score: str, method: str, eta: float) -> list[Draw]:
    """All draws of one method, from cheap to dear."""
    return [d for d in table if (d.score, d.method, d.stochasticity) == (score, method, eta)]


def exact_draws(rows: int, repeats: int = 8) -> tuple[float, float]:
    """Mean and spread of the distance of exact draws, which is above zero because they are finitely many."""
    model, generator = data(), torch.Generator().manual_seed(1)
    law, end = Law(model, rows), torch.tensor([model.t_min], dtype=torch.float64)
    found = [law.distance(model.marginals.draw(rows, end, generator))[0] for _ in range(repeats)]
    return float(np.mean(found)), float(np.std(found, ddof=1))


def reading(table: Sequence[Draw], exact: tuple[float, float]) -> str:
    """Say how the second-order multistep method does, at the lowest and the highest cost."""
    method, parts = "dpmpp_2m_sde", []
    for score, title in SCORES.items():
        flow, noisy = (line(table, score, method, eta) for eta in (STOCHASTICITIES[0], STOCHASTICITIES[-1]))
        cells = [
            f"{flow[k].distance:.3f} and {noisy[k].distance:.3f} ± {noisy[k].stderr:.3f} "
            f"at {flow[k].evaluations:.0f} evaluations"
            for k in (0, -1)
        ]
        parts.append(f"{title}: {', '.join(cells)}")
    what = f"Distance of samples from the data's law, {method} without and with stochasticity {STOCHASTICITIES[-1]:g}"
    return f"{what}. {'; '.join(parts)}. Exact draws have {exact[0]:.3f} ± {exact[1]:.3f}."


def plot(table: Sequence[Draw], exact: tuple[float, float]) -> Figure:
    """Draw scores from left to right, methods from top to bottom."""
    figure = plt.figure(figsize=(12.0, 10.0), layout="constrained")
    axes = figure.subplots(len(METHODS), len(SCORES), sharex=True, sharey=True)
    for row, method in zip(axes, METHODS, strict=True):
        for axis, (score, title) in zip(row, SCORES.items(), strict=True):
            axis.axhspan(exact[0] - exact[1], exact[0] + exact[1], color="lightgrey", label="exact draws")
            for eta, colour in zip(STOCHASTICITIES, COLOURS, strict=True):
                label = f"stochasticity {eta:g}" if eta else "no noise: the flow"
                _draw(axis, line(table, score, method, eta), color=colour, label=label)
            if method == "sde":
                _draw(axis, line(table, score, ADAPTIVE, 1.0), color="tab:green", label=f"{ADAPTIVE}, 1", fmt="--")
            axis.set_title(f"{method}, {title}", fontsize=11)
            axis.set(xscale="log", yscale="log", ylim=(0.5 * exact[0], 1.5))
            axis.grid(alpha=0.3)
        row[0].set_ylabel("distance from the law of the data")
    ticks = dict.fromkeys(round(d.evaluations) for d in table if d.method == "ddpm")
    for axis in axes[-1]:
        axis.set_xlabel("network evaluations per sample")
        axis.set_xticks(list(ticks), [str(tick) for tick in ticks])
        axis.set_xticks([], minor=True)
    handles = axes[-1][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=6)
    return figure


def _draw(axis: Axes, draws: Sequence[Draw], **style: Any) -> None:
    x, y, bars = zip(*((d.evaluations, d.distance, d.stderr) for d in draws), strict=True)
    axis.errorbar(x, y, yerr=bars, marker="o", markersize=4, linewidth=1.2, capsize=2, **style)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and draw; return what the JSON file holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/examples/sde_against_ode"), help="folder to write to (%(default)s)")
    add("--rows", type=int, default=5000, help="samples of every method, a multiple of ten (%(default)s)")
    add("--evaluations", nargs="+", type=int, default=[5, 10, 20, 50, 200], help="network evaluations per sample")
    add("--tolerances", nargs="+", type=float, default=[0.2, 0.1, 0.03], help=f"rtol = atol of {ADAPTIVE}")
    add("--seed", type=int, default=0, help="of the samples")
    options = parser.parse_args(arguments)
    if options.rows < BLOCKS or options.rows % BLOCKS or len(options.evaluations) < 2:
        parser.error(f"--rows must be a multiple of {BLOCKS}, and there must be two --evaluations.")
    exact = exact_draws(options.rows)
    table = measure(options.rows, options.evaluations, options.tolerances, options.seed)
    report = {
        "rows": options.rows, "seed": options.seed, "exact_draws": exact, "draws": [asdict(one) for one in table],
        "reading": reading(table, exact), "torch": torch.__version__,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    plot(table, exact).savefig(options.out / "sde_against_ode.png", dpi=110)
    (options.out / "sde_against_ode.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    print(f"\n{report['reading']}")
    return report


if __name__ == "__main__":
    main()
