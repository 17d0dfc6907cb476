r"""Straight paths of the flow: models that learn them, measures of straightness, and the straightest ones on the line.

The least straightness error in one dimension is found by descent on the laws of :math:`\alpha F` at every t, each a set
of points. The value is attained by one F, so it is an upper bound on the minimum over all F.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

import ndm_ct
from ndm_ct import objectives, schedules, transforms
from ndm_ct._core.seeds import make_generator
from ndm_ct.nn import Preconditioned
from ndm_ct.objectives import straight
from ndm_ct.schedules.base import Schedule
from ndm_ct.schedules.volatility import LearnedVolatility

from .data import Split
from .metrics import energy_distance

MODELS = ("diffusion", "rectified", "transport", "transport-batch", "transport-x", "late", "curved")
GAMMA_MIN = -7.0
WIDTH, TERMS = 128, 3
BATCH_SHARE, BATCH_TERMS, BATCH_ROWS = 30.0, 6, 2
"""Straightening the batch's flow does not bend the predictor: share of the penalty, terms, and batches in one."""


def late(start: float, slope: float, rise: float, power: float) -> schedules.Tabulated:
    r"""Variance preserving with little noise until late: :math:`\gamma(t) = start + slope\, t + rise\, t^{power}`.

    The bound charges motion of F by :math:`1/\gamma'`, which the slope keeps finite.
    """
    t = torch.linspace(0.0, 1.0, 257, dtype=torch.float64)
    return schedules.Tabulated(torch.sigmoid(-(start + slope * t + rise * t**power)))


LATE = {"transport": late(GAMMA_MIN, 4.0, 10.0, 8.0), "transport-batch": late(-13.0, 8.0, 12.0, 16.0)}


class Perceptron(nn.Module):
    """Three hidden layers on a state and some powers of t: cheaper to differentiate than ``nn.MLP``."""

    POWERS = (1, 4, 16, 48)

    def __init__(self, size: int, outputs: int | None = None, time: bool = True) -> None:
        super().__init__()
        self.outputs = outputs
        widths = [size + (len(self.POWERS) if time else 0), WIDTH, WIDTH, WIDTH]
        hidden: list[nn.Module] = []
        for place, (a, b) in enumerate(pairwise(widths)):
            linear = nn.Linear(a, b)
            nn.init.normal_(linear.weight, std=math.sqrt((2.0 if place else 4.0) / a))  # as in nn.MLP
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
    # The rectified paths begin at the noise of the other diffusion.
    start = torch.atan(torch.exp(torch.tensor(0.5 * GAMMA_MIN, dtype=torch.float64)))
    t_min = float(schedule.time_at(start)) if name == "rectified" else None
    if name in ("diffusion", "rectified", "late"):
        return ndm_ct.NDM(Preconditioned(Perceptron(size)), (size,), schedule=schedule, t_min=t_min)
    head = "x" if name == "transport-x" else "moments"
    net = Perceptron(size, outputs=None if head == "x" else 2)
    terms = BATCH_TERMS if name == "transport-batch" else TERMS
    transform = transforms.Separable(Perceptron(size, terms, time=False), transforms.PolynomialBasis(terms))
    return ndm_ct.NDM(
        Preconditioned(net, prediction=head), (size,), transform=transform, schedule=schedule, prediction=head,
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

    def split(self) -> Split:
        """50,000 training and 10,000 test rows."""
        rows = self.law.sample_data(60_000, generator=torch.Generator().manual_seed(0)).float()
        return Split(*rows.split([50_000, 10_000]))

    def cdf(self, z: Tensor, noise: float = 0.0) -> Tensor:
        """Distribution function of the data with normal noise, any shape."""
        std = math.sqrt(self.std**2 + noise**2)
        return (self.weights * _normal_cdf((z[..., None] - self.means) / std)).sum(-1)

    def monotone_map(self, x: Tensor) -> Tensor:
        """T(x), the standard normal of the same rank."""
        return _normal_quantile(self.cdf(x.double()).clamp(1e-12, 1.0 - 1e-12))

    def quantile(self, u: Tensor, noise: float = 0.0) -> Tensor:
        """Inverse of ``cdf``."""
        return _bisect(lambda z: self.cdf(z, noise) - u, u)


def _normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-z / math.sqrt(2.0))


def _normal_quantile(u: Tensor) -> Tensor:
    return math.sqrt(2.0) * torch.erfinv(2.0 * u - 1.0)


def _bisect(increasing: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The root of an increasing function in [-8, 8], to 1e-13."""
    low, high = torch.full_like(like, -8.0), torch.full_like(like, 8.0)
    for _ in range(48):
        middle = 0.5 * (low + high)
        below = increasing(middle) < 0.0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return 0.5 * (low + high)


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

    ``size`` are the points of each law and the intervals of time, ``iterations`` those of L-BFGS. Returns states at
    even times, ``(intervals + 1, points, 1)``; the last are those of the standard normal.
    """
    count, intervals = size
    tau = torch.linspace(0.0, 1.0, intervals + 1, dtype=torch.float64)
    with torch.no_grad():
        c = schedule(t_min + (1.0 - t_min) * tau)
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    first, last = line.quantile(u, float(c.sigma[0])), _normal_quantile(u)
    inner, sigma = tau[1:-1, None], c.sigma[1:-1]
    chords = (1.0 - inner) * first + inner * last
    identity = c.alpha[1:-1, None] * line.quantile(u)

    def states(points: Tensor) -> Tensor:
        return torch.cat([first[None], smoothed_quantiles(points, sigma, u), last[None]])[..., None]

    found = []
    # From the straight line itself, as far as it leaves room for the noise, and from the diffusion.
    for start in (chords * (1.0 - sigma[:, None] ** 2).clamp(min=0.0).sqrt(), identity):
        points = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([points], max_iter=iterations, line_search_fn="strong_wolfe")

        def closure(optimizer: torch.optim.Optimizer = optimizer, points: Tensor = points) -> Tensor:
            optimizer.zero_grad()
            value = straightness(states(points))
            value.backward()
            return value

        optimizer.step(closure)
        found.append(states(points.detach()))
    return min(found, key=lambda path: float(straightness(path)))


def paths(model: ndm_ct.NDM, x: Tensor, steps: int) -> Tensor:
    """States of the flow from x at even times, float64, ``(steps + 1, B, d)``, by Runge-Kutta's fourth-order method."""
    times = torch.linspace(model.t_min, 1.0, 2 * steps + 1, dtype=torch.float64)
    h, flow, states = float(times[2] - times[0]), model.flow(torch.float32), [x.double()]
    with torch.no_grad(), model.evaluating():
        for start, middle, end in zip(times[:-2:2], times[1::2], times[2::2], strict=True):
            z = states[-1]
            a = flow(start, z)
            b = flow(middle, z + 0.5 * h * a)
            c = flow(middle, z + 0.5 * h * b)
            states.append(z + h / 6.0 * (a + 2.0 * b + 2.0 * c + flow(end, z + h * c)))
    return torch.stack(states)


def straightness(states: Tensor) -> Tensor:
    r""":math:`E\int\|\dot z - (z_1 - z_0)\|^2 d\tau / E\|z_1 - z_0\|^2` of states ``(N + 1, B, d)`` at even times."""
    velocity = states.diff(dim=0) * (len(states) - 1)
    chord = states[-1] - states[0]
    return (velocity - chord).square().sum(-1).mean() / chord.square().sum(-1).mean()


def deviation(states: Tensor, end: Tensor) -> tuple[float, float]:
    r"""Distance of states ``(N + 1, B, 1)`` from :math:`(1 - \tau) z_0 + \tau T`, T ``(B, 1)``.

    Returns:
        The root mean square over rows and the largest over rows, both the largest over times.
    """
    tau = torch.linspace(0.0, 1.0, len(states), dtype=states.dtype)[:, None, None]
    distance = states - (1.0 - tau) * states[0] - tau * end
    return float(distance.square().mean((1, 2)).sqrt().max()), float(distance.abs().max())


def energies(model: ndm_ct.NDM, steps: int, test: Tensor, parts: int, part: int) -> list[float]:
    """Energy distances of samples by Euler's method from test rows, in independent parts of ``part`` rows.

    All models are compared on the same test rows and begin at the same draws from the prior.
    """
    found = []
    order = torch.randperm(len(test), generator=make_generator("order of parts"))
    for k in range(parts):
        rows = test[order[torch.arange(k * part, (k + 1) * part) % len(test)]]
        x = ndm_ct.sample(model, part, method="euler", steps=steps, generator=make_generator("part", k))
        found.append(energy_distance(x.double(), rows.double()))
    return found


def weightings(model: ndm_ct.NDM, x: Tensor) -> dict[str, dict[str, float]]:
    r"""Bounds on :math:`E\int\|\dot z - (z_1 - z_0)\|^2 d\tau`, and the scatter of their estimates from one time a row.

    The penalty's bound weights the squared acceleration by :math:`\tau(1 - \tau)/2`, the other (Poincare's inequality)
    by :math:`1/\pi^2`. Each is estimated with times from the density of its own weight, and with times as the ELBO
    draws them.

    Returns:
        By weight and times: the mean, and the standard deviation over rows in units of the mean.
    """
    random = torch.Generator().manual_seed(0)
    length, found = 1.0 - model.t_min, {}
    for times in ("own", "bound"):
        for weight in ("legendre", "even"):
            u = objectives.low_discrepancy(len(x), random, x.device)
            if times == "bound":
                t, rarity = objectives.times(model, u)
            else:
                t, rarity = model.t_min + length * u, torch.full_like(u, length)
            tau = (t - model.t_min) / length
            if times == "own" and weight == "legendre":
                values = straight.curvature(model, x, generator=random)
            else:
                share = 0.5 * tau * (1.0 - tau) if weight == "legendre" else torch.full_like(tau, math.pi**-2)
                z = model.process.sample(x, t, generator=random)
                a = straight.acceleration(model.flow(x.dtype), z, t)
                values = rarity * length**3 * share * a.double().square().sum(1)
            mean = float(values.mean())
            found[f"{weight}, {times}"] = {"mean": mean, "scatter": float(values.std()) / mean}
    return found
