r"""Dynamic optimal transport: a learned forward process that makes the paths of the probability flow straight.

    python benchmarks/optimal_transport.py                   # about 55 minutes on one CPU core; stop and continue
    python benchmarks/optimal_transport.py --preset smoke    # about a minute
    python benchmarks/optimal_transport.py --data mixture --seeds 0,1

A *cell* is a data set, a model and a seed. Cells that are finished are not computed again.

===============  =====================================================================================================
diffusion        F the identity, log-SNR linear in t
rectified        F the identity, :math:`\alpha = 1 - t, \sigma = t` (the schedule of flow matching)
transport        :math:`F = x + \sum_k t^k f_k(x)`, head "moments", the curvature penalty of ``objectives.Straight`` in
                 stages of growing strength, and a schedule with little noise until late,
                 :math:`\gamma = \gamma_0 + at + bt^p`
transport-batch  the same with the curvature of the batch's flow, thirty times as strong from the first step, less
                 noise, twice the terms and twice the rows in a batch; on the line only, where a batch is dense at the
                 scale of the noise
transport-x      the transport with head "x"
late             F the identity under the schedule of the transport
curved           the transport without the penalty
===============  =====================================================================================================

All have predictors of one size. Reported for each, with z followed by Runge-Kutta steps from test data to the prior and
:math:`\tau = (t - t_{min})/(1 - t_{min})`:

* straightness error :math:`E \int \|\dot z - (z_1 - z_0)\|^2 d\tau \,/\, E\|z_1 - z_0\|^2`;
* in one dimension the distance of :math:`z_\tau` from :math:`(1 - \tau) x + \tau T(x)` with the monotone map T: root
  mean square over test rows and its largest over the rows, both the largest over times, in standard deviations of data;
* the flow's negative log-likelihood (in one dimension also above the entropy of the data), with paired differences
  from the rectified diffusion;
* the energy distance of 4 Euler steps from data, less that of 100 Euler steps of the rectified diffusion, with a
  standard error over independent parts of the samples.

The least straightness error in one dimension is computed by descent on the laws of :math:`\alpha F` at every t, each
a set of points: what is reported is reached by one, so it is an upper bound on the minimum over all F. The deviation of
those paths from the line stands beside it: the noise of the schedule keeps every F from it. Writes
``optimal_transport.json``, ``.md`` and ``.png``.

References:
    Bartosh, Vetrov and Naesseth, Neural Diffusion Models, appendix E, https://arxiv.org/abs/2310.08337
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import data
from bench.metrics import energy_distance
from torch import Tensor, nn

import ndm_ct
from ndm_ct import objectives, schedules, transforms
from ndm_ct.nn import Preconditioned
from ndm_ct.objectives import straight as transport
from ndm_ct.schedules.fixed import Schedule
from ndm_ct.schedules.volatility import LearnedVolatility
from ndm_ct.storage import write_atomically

RESULTS = Path(__file__).parent / "results"
MODELS = ("diffusion", "rectified", "transport", "transport-batch", "transport-x", "late", "curved")
GAMMA_MIN = -7.0
WIDTH, TERMS = 128, 3
EULER_STEPS, REFERENCE_STEPS = 4, 100
STRENGTH = 1.0
RAMP = (0.01, 0.03, 0.1, 0.3)
"""Shares of the penalty's strength in the first half of a training: from the start it would forbid all motion."""
BATCH_SHARE, BATCH_TERMS, BATCH_ROWS = 30.0, 6, 2
"""Where the batch's flow is made straight, which does not bend the predictor: share, terms, and batches in one."""


@dataclass(frozen=True)
class Size:
    """How much to compute.

    Args:
        steps: optimiser steps.
        batch_size: rows per step.
        rows: test rows for paths and likelihoods.
        parts: independent parts of the samples.
        part: samples in each.
        path_steps: Runge-Kutta steps of a path.
        points: points and times of the least straightness error.
        iterations: of its descent.
        seeds: of the trainings.
    """

    steps: int
    batch_size: int
    rows: int
    parts: int
    part: int
    path_steps: int
    points: tuple[int, int]
    iterations: int
    seeds: tuple[int, ...]


PRESETS = {
    "smoke": Size(16, 64, 60, 4, 50, 20, (16, 8), 10, (0,)),
    "full": Size(6000, 512, 2000, 10, 1000, 100, (64, 24), 100, (0,)),
}


def late(start: float, slope: float, rise: float, power: float) -> schedules.Tabulated:
    r"""Variance preserving with little noise until late: :math:`\gamma(t) = \gamma_0 + at + bt^p`, interpolated.

    Args:
        start: :math:`\gamma_0`.
        slope: a; the bound charges motion of F by :math:`1/\gamma'`.
        rise: b.
        power: p.
    """
    t = torch.linspace(0.0, 1.0, 257, dtype=torch.float64)
    return schedules.Tabulated(torch.sigmoid(-(start + slope * t + rise * t**power)))


LATE = {"transport": late(GAMMA_MIN, 4.0, 10.0, 8.0), "transport-batch": late(-13.0, 8.0, 12.0, 16.0)}


class Perceptron(nn.Module):
    """Three hidden layers on a state and some powers of t: cheaper to differentiate than ``nn.MLP``.

    Args:
        size: d of events ``(d,)``.
        outputs: K: the output is ``(B, K, d)``; None: ``(B, d)``.
        time: whether it takes t.
    """

    POWERS = (1, 4, 16, 48)

    def __init__(self, size: int, outputs: int | None = None, time: bool = True) -> None:
        super().__init__()
        self.outputs = outputs
        inputs = size + (len(self.POWERS) if time else 0)
        widths = [inputs, WIDTH, WIDTH, WIDTH]
        hidden: list[nn.Module] = []
        for place, (a, b) in enumerate(pairwise(widths)):
            linear = nn.Linear(a, b)
            nn.init.normal_(linear.weight, std=math.sqrt((2.0 if place else 4.0) / a))  # as nn.MLP, and for its reason
            hidden += [linear, nn.SiLU()]
        last = nn.Linear(WIDTH, size * (outputs or 1))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*hidden, last)

    def forward(self, z: Tensor, t: Tensor | None = None) -> Tensor:
        """``(B, d)`` and ``(B,)`` to ``(B, d)`` or ``(B, K, d)``."""
        if t is not None:
            z = torch.cat([z, torch.stack([t**power for power in self.POWERS], 1)], 1)
        out = self.layers(z)
        return out if self.outputs is None else out.unflatten(1, (self.outputs, -1))


def build(name: str, size: int, seed: int) -> ndm_ct.NDM:
    """An untrained model, one of ``MODELS``, on events ``(size,)``."""
    torch.manual_seed(seed)
    schedule: Schedule = LATE.get(name, LATE["transport"])
    if name in ("diffusion", "rectified"):
        schedule = schedules.Rectified() if name == "rectified" else schedules.LinearLogSNR(GAMMA_MIN, 7.0)
    # Data are followed from the noise of the other diffusion.
    start = torch.atan(torch.exp(torch.tensor(0.5 * GAMMA_MIN, dtype=torch.float64)))
    t_min = float(schedule.time_at(start)) if name == "rectified" else None
    if name in ("diffusion", "rectified", "late"):
        return ndm_ct.NDM(Preconditioned(Perceptron(size)), (size,), schedule=schedule, t_min=t_min)
    head = "x" if name == "transport-x" else "moments"
    net = Perceptron(size, outputs=None if head == "x" else 2)
    terms = BATCH_TERMS if name == "transport-batch" else TERMS
    transform = transforms.Separable(Perceptron(size, terms, time=False), transforms.PolynomialBasis(terms))
    return ndm_ct.NDM(
        Preconditioned(net, head=head), (size,), transform=transform, schedule=schedule, prediction=head,
        volatility=LearnedVolatility(),
    )  # fmt: skip


class Line:
    """A mixture of two normals on the line, of mean zero and variance one."""

    def __init__(self) -> None:
        weights, means, std = torch.tensor([0.4, 0.6]).double(), torch.tensor([-1.2, 0.8]).double(), 0.25
        scale = float((weights * (means**2 + std**2)).sum().sqrt())
        self.weights, self.means, self.std = weights, means / scale, std / scale
        covariances = torch.full((2, 1, 1), self.std**2, dtype=torch.float64)
        self.law = ndm_ct.reference.GaussianMixture(weights, self.means[:, None], covariances)

    def split(self) -> data.Split:
        """50,000 training and 10,000 test rows."""
        generator = torch.Generator().manual_seed(0)
        train, test = self.law.sample_data(60_000, generator=generator).float().split([50_000, 10_000])
        return data.Split(train, test)

    def cdf(self, z: Tensor, noise: float = 0.0) -> Tensor:
        """Of the data with normal noise, any shape."""
        std = math.sqrt(self.std**2 + noise**2)
        return (self.weights * _normal_cdf((z[..., None] - self.means) / std)).sum(-1)

    def monotone_map(self, x: Tensor) -> Tensor:
        """T(x), the standard normal of the same rank."""
        return math.sqrt(2.0) * torch.erfinv((2.0 * self.cdf(x.double()) - 1.0).clamp(-1.0 + 1e-12, 1.0 - 1e-12))

    def quantile(self, u: Tensor, noise: float = 0.0) -> Tensor:
        """Inverse of ``cdf``."""
        return _bisect(lambda z: self.cdf(z, noise) - u, u)


def _normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-z / math.sqrt(2.0))


def _bisect(increasing: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The root of an increasing function in [-8, 8], to 1e-13."""
    low, high = torch.full_like(like, -8.0), torch.full_like(like, 8.0)
    for _ in range(48):
        middle = 0.5 * (low + high)
        below = increasing(middle) < 0.0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return 0.5 * (low + high)


SETS: dict[str, tuple[Callable[[], data.Split], Line | None]] = {
    "mixture": (Line().split, Line()),
    "moons": (lambda: data.moons(60_000), None),
}
"""Training and test rows, and the law where it is known."""


def smoothed_quantiles(points: Tensor, sigma: Tensor, u: Tensor) -> Tensor:
    r"""Quantiles at u ``(M,)`` of points ``(T, N)`` of equal weight with normal noise :math:`\sigma` ``(T,)``.

    Differentiable in the points: one Newton step from the solution.
    """
    sigma = sigma[:, None, None]

    def rank(q: Tensor) -> Tensor:
        return _normal_cdf((q[:, :, None] - points[:, None, :]) / sigma).mean(-1)

    with torch.no_grad():
        q = _bisect(lambda z: rank(z) - u, u.expand(len(points), -1))
        standard = (q[:, :, None] - points[:, None, :]) / sigma
        density = (torch.exp(-0.5 * standard**2) / sigma).mean(-1) / math.sqrt(2.0 * math.pi)
    return q - (rank(q) - u) / density.clamp(min=1e-6)


def straightest(line: Line, schedule: Schedule, t_min: float, size: tuple[int, int], iterations: int) -> Tensor:
    r"""The straightest paths that descent on the laws of :math:`\alpha F` finds on the line, of points of even ranks.

    Args:
        line: the data.
        schedule: gives :math:`\sigma_t`.
        t_min: start of the interval.
        size: points of each law, and intervals of time.
        iterations: of L-BFGS.

    Returns:
        States at even times, ``(intervals + 1, points, 1)``; the last are those of the standard normal.
    """
    count, intervals = size
    tau = torch.linspace(0.0, 1.0, intervals + 1, dtype=torch.float64)
    with torch.no_grad():
        c = schedule(t_min + (1.0 - t_min) * tau)
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    first, last = line.quantile(u, float(c.sigma[0])), math.sqrt(2.0) * torch.erfinv(2.0 * u - 1.0)
    inner, sigma = tau[1:-1, None], c.sigma[1:-1]
    straight = (1.0 - inner) * first + inner * last
    identity = c.alpha[1:-1, None] * line.quantile(u)

    def states(points: Tensor) -> Tensor:
        return torch.cat([first[None], smoothed_quantiles(points, sigma, u), last[None]])[..., None]

    found = []
    # From the straight line itself, as far as it leaves room for the noise, and from the diffusion.
    for start in (straight * (1.0 - sigma[:, None] ** 2).clamp(min=0.0).sqrt(), identity):
        points = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([points], max_iter=iterations, line_search_fn="strong_wolfe")

        def closure(optimizer: torch.optim.Optimizer = optimizer, points: Tensor = points) -> Tensor:
            optimizer.zero_grad()
            value = straightness(states(points))
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        found.append(states(points.detach()))
    return min(found, key=lambda path: float(straightness(path)))


def paths(model: ndm_ct.NDM, x: Tensor, steps: int) -> Tensor:
    """States of the flow from x at even times, float64, ``(steps + 1, B, d)``, by Runge-Kutta's fourth-order method."""
    times = torch.linspace(model.t_min, 1.0, 2 * steps + 1, dtype=torch.float64)
    h = float(times[2] - times[0])
    flow = model.flow(torch.float32)
    z = x.double()
    states = [z]
    with torch.no_grad(), model.evaluating():
        for start, middle, end in zip(times[:-2:2], times[1::2], times[2::2], strict=True):
            a = flow(start, z)
            b = flow(middle, z + 0.5 * h * a)
            c = flow(middle, z + 0.5 * h * b)
            z = z + h / 6.0 * (a + 2.0 * b + 2.0 * c + flow(end, z + h * c))
            states.append(z)
    return torch.stack(states)


def straightness(states: Tensor) -> Tensor:
    r""":math:`E\int\|\dot z - (z_1 - z_0)\|^2 d\tau / E\|z_1 - z_0\|^2` of states ``(N + 1, B, d)`` at even times."""
    velocity = states.diff(dim=0) * (len(states) - 1)
    chord = states[-1] - states[0]
    return (velocity - chord).square().sum(-1).mean() / chord.square().sum(-1).mean()


def deviation(states: Tensor, end: Tensor) -> tuple[float, float]:
    r"""Distance of states ``(N + 1, B, 1)`` from :math:`(1 - \tau) z_0 + \tau T`, T ``(B, 1)``: the largest over times
    of its root mean square and of its maximum over rows."""
    tau = torch.linspace(0.0, 1.0, len(states), dtype=states.dtype)[:, None, None]
    distance = states - (1.0 - tau) * states[0] - tau * end
    return float(distance.square().mean((1, 2)).sqrt().max()), float(distance.abs().max())


def energies(model: ndm_ct.NDM, steps: int, test: Tensor, size: Size) -> list[float]:
    """Energy distances of samples by Euler's method from test rows, in independent parts.

    Parts are the same for all models: the same test rows, and the same draws from the prior.
    """
    found = []
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(7))
    for k in range(size.parts):
        rows = test[order[torch.arange(k * size.part, (k + 1) * size.part) % len(test)]]
        generator = torch.Generator().manual_seed(100 + k)
        x = ndm_ct.sample(model, size.part, method="euler", steps=steps, generator=generator)
        found.append(energy_distance(x.double(), rows.double()))
    return found


def folder_name(name: str, kind: str, seed: int) -> str:
    """Of a cell."""
    return f"{name}-{kind}-{seed}"


def fitted(name: str, kind: str, seed: int, size: Size, strength: float, folder: Path, quiet: bool) -> ndm_ct.NDM:
    """The trained model of a cell; what is trained already is only read."""
    split = SETS[name][0]()
    model = build(kind, split.train.shape[1], seed)
    stages: list[tuple[int, transport.Straight | None]] = [(size.steps, None)]
    bound, rows = objectives.Bound(), size.batch_size
    if kind == "transport-batch":
        rows *= BATCH_ROWS
        objective = transport.Straight(BATCH_SHARE * strength, bound, "batch")
        stages = [(size.steps // 2, objective), (size.steps - size.steps // 2, objective)]  # a warm restart
    elif kind.startswith("transport"):
        early = size.steps // (2 * len(RAMP))
        stages = [(early, transport.Straight(strength * share, bound)) for share in RAMP]
        stages += [(size.steps - early * len(RAMP), transport.Straight(strength, bound))]
    for k, (steps, penalised) in enumerate(stages):
        trained = ndm_ct.fit(
            model, split.train, steps=steps, batch_size=rows, lr=3e-3, warmup=min(50, steps), ema=0.99,
            weight_decay=0.0, seed=100 * seed + k, lr_final=0.01 if k == len(stages) - 1 else 0.5,
            objective=penalised, run_dir=folder / f"stage-{k}", progress=not quiet,
        )  # fmt: skip
        if not trained.finished:  # Ctrl-C, which a training turns into a checkpoint
            raise KeyboardInterrupt
    return model.requires_grad_(False)


def run(name: str, kind: str, seed: int, size: Size, strength: float, folder: Path, quiet: bool) -> dict[str, Any]:
    """Train and measure one cell, or continue."""
    done = folder / "result.json"
    if done.exists():
        return json.loads(done.read_text())
    load, line = SETS[name]
    split = load()
    model = fitted(name, kind, seed, size, strength, folder, quiet)
    x = split.test[: size.rows]
    states = paths(model, x, size.path_steps)
    entry: dict[str, Any] = {
        "data": name, "model": kind, "seed": seed, "parameters": sum(p.numel() for p in model.parameters()),
        "straightness": float(straightness(states)),
        "nll": (-ndm_ct.loglik(model, x).double()).tolist(),
        "nelbo": float(-ndm_ct.elbo(model, x, samples=16).mean()),
    }  # fmt: skip
    if line is not None:
        entry["entropy"] = (-line.law.log_prob(x.double())).tolist()
        entry["deviation_rms"], entry["deviation_max"] = deviation(states, line.monotone_map(x))
    chord = (states[-1] - states[0]).square().sum(1).mean()
    entry |= {"distance": entry["straightness"] * float(chord), "bounds": weightings(model, x)}
    for steps in (EULER_STEPS, REFERENCE_STEPS):
        entry[f"energy_{steps}"] = energies(model, steps, split.test, size)
    np.save(folder / "paths.npy", states[:: size.path_steps // 20].float().numpy())
    write_atomically(done, json.dumps(entry).encode())
    return entry


def weightings(model: ndm_ct.NDM, x: Tensor) -> dict[str, dict[str, float]]:
    r"""Bounds on :math:`E\int\|\dot z - (z_1 - z_0)\|^2 d\tau`, and how much one time per row makes them scatter.

    The penalty's bound weights the squared acceleration by :math:`\tau(1 - \tau)/2`, the other (Poincare's inequality)
    by :math:`1/\pi^2`. Each is estimated with times from the density of its own weight, and with times as the ELBO
    draws them.

    Args:
        model: the model.
        x: data, ``(B, d)``.

    Returns:
        By weight and times: the mean, and the standard deviation over rows in units of the mean.
    """
    generator = torch.Generator().manual_seed(0)
    length, found = 1.0 - model.t_min, {}
    for times in ("own", "bound"):
        for weight in ("legendre", "even"):
            u = objectives.low_discrepancy(len(x), generator, x.device)
            if times == "bound":
                t, rarity = objectives.times(model, u)
            else:
                t, rarity = model.t_min + length * u, torch.full_like(u, length)
            tau = (t - model.t_min) / length
            if times == "own" and weight == "legendre":
                values = transport.curvature(model, x, generator=generator)
            else:
                share = 0.5 * tau * (1.0 - tau) if weight == "legendre" else torch.full_like(tau, math.pi**-2)
                a = transport.acceleration(model.flow(x.dtype), model.process.sample(x, t, generator=generator), t)
                values = rarity * length**3 * share * a.double().square().sum(1)
            mean = float(values.mean())
            found[f"{weight}, {times}"] = {"mean": mean, "scatter": float(values.std()) / mean}
    return found


def summary(entry: dict[str, Any], entries: list[dict[str, Any]]) -> dict[str, Any]:
    """A cell's numbers, beside the rectified diffusion of its data and seed where there is one."""
    lists = ("nll", "entropy", f"energy_{EULER_STEPS}", f"energy_{REFERENCE_STEPS}")
    row = {key: value for key, value in entry.items() if key not in lists}
    nll, few = np.array(entry["nll"]), np.array(entry[f"energy_{EULER_STEPS}"])
    row["nll"], row["nll_se"] = _mean(nll)
    if "entropy" in entry:
        row["excess"], row["excess_se"] = _mean(nll - np.array(entry["entropy"]))
    row["energy_few"], row["energy_few_se"] = _mean(few)
    row["energy_many"], row["energy_many_se"] = _mean(np.array(entry[f"energy_{REFERENCE_STEPS}"]))
    same = [e for e in entries if (e["data"], e["seed"]) == (entry["data"], entry["seed"])]
    for reference in (e for e in same if e["model"] == "rectified"):
        row["nll_gap"], row["nll_gap_se"] = _mean(nll - np.array(reference["nll"]))
        row["energy_gap"], row["energy_gap_se"] = _mean(few - np.array(reference[f"energy_{REFERENCE_STEPS}"]))
        row["straightness_ratio"] = reference["straightness"] / entry["straightness"]
    return row


def _mean(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))


def markdown(rows: list[dict[str, Any]], least: dict[str, dict[str, float]], words: str) -> str:
    """The tables."""
    lines = ["# Dynamic optimal transport", "", f"`{words}`", ""]
    lines += ["Least straightness error found in one dimension, over all F, by schedule (its deviation, rms): "]
    each = (f"{name} {value['straightness']:.4f} ({value['deviation']:.3f})" for name, value in least.items())
    lines += [", ".join(each) + ".", ""]
    head = ["data", "model", "seed", "straightness error", "rectified / this", "deviation, rms", "deviation, max"]
    head += ["NLL", "NLL - rectified", "NLL - entropy", "NELBO", "energy, 4 steps", "4 steps - rectified's 100"]
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["data"], row["model"], str(row["seed"]), f"{row['straightness']:.4f}"]
        cells += [f"{row[key]:.3f}" if key in row else "" for key in ("straightness_ratio", "deviation_rms")]
        cells += [f"{row['deviation_max']:.3f}" if "deviation_max" in row else "", f"{row['nll']:.4f}"]
        cells += [_with_error(row, key, 4) for key in ("nll_gap", "excess")]
        cells += [f"{row['nelbo']:.4f}", _with_error(row, "energy_few", 5), _with_error(row, "energy_gap", 5)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "The squared distance from straight paths beside bounds on it from the acceleration, by weight over",
        "",
    ]
    lines[-2] += " time; in brackets the standard deviation over rows with one time each, relative to the mean:"
    lines += ["| data | model | seed | distance | τ(1-τ)/2, times of that density | τ(1-τ)/2, the ELBO's times |"]
    lines[-1] += " 1/π², even times | 1/π², the ELBO's times |"
    lines.append("|" + "---|" * 8)
    for row in rows:
        cells = [row["data"], row["model"], str(row["seed"]), f"{row['distance']:.4f}"]
        for key in ("legendre, own", "legendre, bound", "even, own", "even, bound"):
            bound = row["bounds"][key]
            cells.append(f"{bound['mean']:.4f} ({bound['scatter']:.1f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _with_error(row: dict[str, Any], key: str, digits: int) -> str:
    return f"{row[key]:.{digits}f} ± {row[f'{key}_se']:.{digits}f}" if key in row else ""


def plot(entries: list[dict[str, Any]], work: Path, path: Path) -> None:
    """Densities and paths over time on the line, paths in the plane: diffusions beside transport."""
    from matplotlib.figure import Figure

    kinds = [kind for kind in ("diffusion", "rectified", *LATE) if any(e["model"] == kind for e in entries)]
    names = [name for name in SETS if any(e["data"] == name for e in entries)]
    figure = Figure(figsize=(4.2 * max(1, len(kinds)), 3.6 * len(names)), layout="constrained")
    for name, axes in zip(names, figure.subplots(len(names), max(1, len(kinds)), squeeze=False), strict=True):
        for kind, axis in zip(kinds, axes, strict=False):
            cells = [e for e in entries if (e["data"], e["model"]) == (name, kind)]
            if not cells:
                axis.set_axis_off()
                continue
            states = np.load(work / folder_name(name, kind, cells[0]["seed"]) / "paths.npy")
            draw = _on_the_line if states.shape[2] == 1 else _in_the_plane
            draw(axis, states)
            axis.set_title(f"{name}, {kind}: straightness error {cells[0]['straightness']:.3g}", fontsize=9)
    figure.savefig(path, dpi=90)


def _on_the_line(axis: Any, states: np.ndarray) -> None:
    """Histograms over time in the background, paths of even ranks in front."""
    edges = np.linspace(-3.0, 3.0, 81)
    density = np.stack([np.histogram(z, edges, density=True)[0] for z in states[..., 0]], 1)
    axis.imshow(density, origin="lower", extent=(0, 1, -3, 3), aspect="auto", cmap="Blues", vmax=0.8)
    order = states[0, :, 0].argsort()
    chosen = order[(np.linspace(0.01, 0.99, 25) * (len(order) - 1)).astype(int)]
    axis.plot(np.linspace(0.0, 1.0, len(states)), states[:, chosen, 0], color="black", linewidth=0.6)
    axis.set(xlabel="time, from data to prior", ylabel="z", ylim=(-3, 3))


def _in_the_plane(axis: Any, states: np.ndarray) -> None:
    """Ends and paths."""
    axis.scatter(*states[-1, :1000].T, s=1.5, color="lightgrey")
    axis.scatter(*states[0, :1000].T, s=1.5, color="tab:blue")
    axis.plot(states[:, :60, 0], states[:, :60, 1], color="black", linewidth=0.6)
    axis.set(aspect="equal", xlim=(-3, 3), ylim=(-3, 3))


def _names(known: Any) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} unknown; there are {', '.join(known)}.")
        return chosen

    return parse


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="full")
    add("--data", type=_names(SETS), default=list(SETS), help=f"of {', '.join(SETS)}; several by commas")
    add(
        "--models",
        type=_names(MODELS),
        default=list(MODELS[:4]),
        help=f"of {', '.join(MODELS)}; default: the first four",
    )
    add("--seeds", type=lambda text: [int(part) for part in text.split(",")], help="default: those of the preset")
    add("--strength", type=float, default=STRENGTH, help=f"of the penalty ({STRENGTH:g})")
    add("--out", type=Path, default=RESULTS, help="where tables and picture go")
    add("--work", type=Path, help="trainings; default: runs/optimal_transport/PRESET")
    add("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    size = PRESETS[options.preset]
    work = options.work or Path("runs/optimal_transport") / options.preset
    options.out.mkdir(parents=True, exist_ok=True)
    entries = []
    for seed in options.seeds or size.seeds:
        for name in options.data:
            for kind in options.models:
                if kind == "transport-batch" and SETS[name][1] is None:
                    print(f"{name}, {kind}: left out, {kind} is for the line only", flush=True)
                    continue
                folder = work / folder_name(name, kind, seed)
                entries.append(run(name, kind, seed, size, options.strength, folder, options.quiet))
                print(f"{name}, {kind}, seed {seed}: straightness error {entries[-1]['straightness']:.4f}", flush=True)
    if not entries:
        parser.error("transport-batch is for --data mixture; add it, or another of --models.")
    least = least_errors(size, work) if "mixture" in options.data else {}
    choices = {"preset": options.preset, "data": ",".join(options.data), "models": ",".join(options.models)}
    choices |= {"seeds": ",".join(map(str, options.seeds or size.seeds)), "strength": f"{options.strength:g}"}
    words = " ".join(f"--{name} {value}" for name, value in choices.items())
    return write(entries, least, asdict(size), words, work, options.out)


def least_errors(size: Size, work: Path) -> dict[str, dict[str, float]]:
    """The least straightness error by model, and the deviation it comes with, computed once."""
    file = work / "least.json"
    if not file.exists():
        found = {}
        for kind in ("diffusion", "rectified", *LATE):
            model = build(kind, 1, 0)
            states = straightest(Line(), model.schedule, model.t_min, size.points, size.iterations)
            found[kind] = {"straightness": float(straightness(states)), "deviation": deviation(states, states[-1])[0]}
        work.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(found).encode())
    return json.loads(file.read_text())


def write(
    entries: list[dict[str, Any]],
    least: dict[str, dict[str, float]],
    size: dict[str, Any],
    words: str,
    work: Path,
    out: Path,
) -> dict[str, Any]:
    """JSON, Markdown and picture."""
    order = {name: place for place, name in enumerate([*SETS, *MODELS])}
    entries = sorted(entries, key=lambda e: (order[e["data"]], order[e["model"]], e["seed"]))
    rows = [summary(entry, entries) for entry in entries]
    report = {"torch": torch.__version__, "size": size, "command": words, "least": least, "cells": rows}
    write_atomically(out / "optimal_transport.json", (json.dumps(report, indent=1) + "\n").encode())
    write_atomically(out / "optimal_transport.md", markdown(rows, least, words).encode())
    plot(entries, work, out / "optimal_transport.png")
    return report


if __name__ == "__main__":
    main()
