"""Samplers on a grid: measured orders, steps by hand, exact propagation of moments, costs, randomness, bad input."""

import functools
import itertools
import math
import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from oracles import Breathe, Prescribed, ThreePoints, Wiggle, exact_flow, gaussian, k, mixture
from oracles import order as slope
from scipy.interpolate import CubicSpline, RectBivariateSpline

import ndm_ct
from ndm_ct import NDM, discrete, reference, samplers, schedules, solvers, transforms
from ndm_ct._core.errors import PredictorError
from ndm_ct.samplers import (
    DDIM,
    DDPM,
    DEIS,
    EDM,
    NAMES,
    PNDM,
    SDE,
    DPMSolverPP,
    DPMSolverPPSDE,
    DPMSolverPPSingle,
    RungeKutta,
    Sampler,
    UniPC,
    exponential,
    frozen,
    runge_kutta,
    stochastic,
)
from ndm_ct.samplers.base import steps_within, walk
from ndm_ct.samplers.grids import GRIDS, time_grid
from ndm_ct.schedules.base import levels

SMOOTH = schedules.LinearLogSNR(-5.0, 4.0)


class MovingScale(transforms.TimeScaling):
    """The oracles' moving scale, with its derivative by hand: many times faster."""

    def __init__(self):
        super().__init__(k)

    def with_derivative(self, x, t, **cond):
        return self(x, t), 1.5 * x


class FastWiggle(Wiggle):
    """The oracles' nonlinear transform, with its derivative by hand."""

    def with_derivative(self, x, t, **cond):
        return self(x, t), self.a * torch.sin(3.0 * x)


class FastPoints(ThreePoints):
    """The three points, whose transform is evaluated once for a batch at one time."""

    def at(self, t):
        if bool((t != t[0]).any()):
            return super().at(t)
        F, dF = super().at(t[:1])
        return F.expand(len(t), 3), dF.expand(len(t), 3)

    def noise_at(self, t):
        if bool((t != t[0]).any()):
            return super().noise_at(t)
        r, dr = super().noise_at(t[:1])
        return r.expand(len(t), 3), dr.expand(len(t), 3)


TRANSFORMS = {"identity": transforms.Identity, "moving scale": MovingScale}
DATA = {"gaussian": partial(gaussian, d=4), "mixture": partial(mixture, components=3, d=2)}


def test_derivatives_by_hand_are_those_of_the_oracles():
    x, t = torch.randn(5, 1).double(), torch.rand(5).double()
    for fast, slow in ((MovingScale(), transforms.TimeScaling(k)), (FastWiggle(), Wiggle())):
        for own, other in zip(fast.with_derivative(x, t), slow.with_derivative(x, t), strict=True):
            torch.testing.assert_close(own, other)


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


# --- orders of the probability flow ----------------------------------------------------------------------------------

# Order in the interior, and with the plain start, whose first steps are of first order (UniPC's of second).
ORDERS = {
    "euler": (1, 1), "midpoint": (2, 2), "heun": (2, 2), "rk4": (4, 4), "edm": (2, 2), "ddim": (1, 1),
    "deis1": (2, 2), "deis2": (3, 2), "deis3": (4, 2), "dpmpp_2s": (2, 2), "dpmpp_2m": (2, 2), "dpmpp_3m": (3, 2),
    "unipc": (3, 3), "unipc3": (4, 3), "pndm": (2, 2), "ipndm": (2, 2),
}  # fmt: skip
VARIANTS = {
    "deis1 in log-SNR": (partial(DEIS, order=2, variable="log_snr"), 2),
    "deis3 in log-SNR": (partial(DEIS, order=4, variable="log_snr"), 4),
    "first order of DEIS": (partial(DEIS, order=1), 1),
    "first order of DPM-Solver++": (partial(DPMSolverPP, order=1), 1),
    "first order of UniPC, corrected": (partial(UniPC, order=1), 2),
    "UniPC with B = -h": (partial(UniPC, order=2, variant="bh1"), 3),
    "PNDM of two predictions": (partial(PNDM, order=2), 2),
}


def plain(model, n):
    return torch.linspace(1.0, model.t_min, n + 1, dtype=torch.float64)


def graded(model, n):
    """Uniform but for the first interval, halved 2 log2 n times towards t = 1: the first steps are of the size n^-3."""
    grid = plain(model, n)
    halvings = 2.0 ** -torch.arange(round(2.0 * math.log2(n)), 0, -1, dtype=torch.float64)
    return torch.cat([grid[:1], 1.0 - halvings * (grid[0] - grid[1]), grid[1:]])


@functools.cache
def problem(data, transform):
    """A model, draws of its prior, and where the exact flow takes them."""
    model = DATA[data](SMOOTH, TRANSFORMS[transform]())
    z1 = model.sample_prior(8, generator=seeded(), dtype=torch.float64, device=None)
    exact = exact_flow(model, z1) if data == "gaussian" else ndm_ct.decode(model, z1, rtol=1e-11, atol=1e-11)
    return model, z1, exact


def measured_order(make, model, z1, exact, steps, grid):
    errors = [(walk(make(model), z1, grid(model, n)) - exact).square().mean().sqrt() for n in steps]
    return slope(errors, steps)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", ORDERS)
def test_order(name, data, transform):
    """With first steps so small that their low order does not count."""
    theory = ORDERS[name][0]
    steps = {"rk4": (32, 64), "unipc3": (128, 256)}.get(name, (64, 128) if theory > 2 else (32, 64))
    measured = measured_order(NAMES[name], *problem(data, transform), steps, graded)
    assert measured == pytest.approx(theory, abs=0.3)


@pytest.mark.parametrize("name", [name for name, orders in ORDERS.items() if orders[0] != orders[1]])
def test_first_steps_limit_the_order_of_multistep_methods(name):
    """Second order, for whatever is left behind by one Euler step; UniPC corrects it to third."""
    measured = measured_order(NAMES[name], *problem("gaussian", "identity"), (128, 256), plain)
    assert measured == pytest.approx(ORDERS[name][1], abs=0.3)


@pytest.mark.parametrize("name", VARIANTS)
def test_order_of_variants(name):
    make, theory = VARIANTS[name]
    measured = measured_order(make, *problem("gaussian", "moving scale"), (64, 128), graded)
    assert measured == pytest.approx(theory, abs=0.3)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_third_order_needs_the_whole_quadratic_term(transform, monkeypatch):
    """The public form of the third-order multistep update halves it and has second order."""
    setting = *problem("gaussian", transform), (64, 128), graded
    assert measured_order(NAMES["dpmpp_3m"], *setting) == pytest.approx(3.0, abs=0.3)
    whole = exponential.derivatives

    def halved(known, h):
        first, second = whole(known, h)
        return first, 0.5 * second

    monkeypatch.setattr(exponential, "derivatives", halved)
    assert measured_order(NAMES["dpmpp_3m"], *setting) == pytest.approx(2.0, abs=0.3)


SCALES = {"S = 1": lambda: None, "S(x, t)": Breathe}
scales = pytest.mark.parametrize("scale", SCALES)


@functools.cache
def nonlinear(scale):
    """Three points under a nonlinear transform with the exact moments, draws, and where the exact flow takes them."""
    model = FastPoints(schedules.LinearLogSNR(-2.0, 4.0), FastWiggle(), scale=SCALES[scale]()).model()
    z1 = torch.linspace(-2.5, 2.5, 11, dtype=torch.float64)[:, None]
    return model, z1, ndm_ct.decode(model, z1, rtol=1e-11, atol=1e-11)


@scales
@pytest.mark.parametrize("name", ORDERS)
def test_order_for_a_nonlinear_transform_with_the_plain_start(name, scale):
    """Between the order that the first steps allow, whose share of the error is small here, and that of the rest."""
    steps = (64, 128) if max(ORDERS[name]) > 2 or scale != "S = 1" else (32, 64)
    measured = measured_order(NAMES[name], *nonlinear(scale), steps, plain)
    low, high = sorted(ORDERS[name])
    assert low - 0.3 < measured < high + 0.3


# --- single steps by hand --------------------------------------------------------------------------------------------

VP = schedules.VariancePreserving(0.1, 8.0)  # t is not affine in the log-SNR
NOISY = (frozen, exponential, runge_kutta, stochastic)
NOISES = torch.randn(2, 5, 3, dtype=torch.float64, generator=seeded(4))


def tell_noise(monkeypatch, noises):
    """Every call for noise gets the next of these."""
    queue = iter(noises)
    for module in NOISY:
        monkeypatch.setattr(module, "normal_like", lambda like, generator: next(queue))


class Hand:
    """What formulas on paper are made of, for one model and one step from t to s."""

    def __init__(self, model, t, s, eta=1.0):
        self.model, self.t, self.s, self.eta = model, t, s, eta
        (self.at, self.st), (self.as_, self.ss) = self.coefficients(t), self.coefficients(s)

    def coefficients(self, t):
        c = self.model.schedule(times(t))
        return float(c.alpha), float(c.sigma)

    def moments(self, z, t):
        return self.model.moments(z, times(t).expand(len(z)))

    def D(self, z, t):
        F, dF = self.moments(z, t)
        return F - 2.0 * float(self.model.schedule(times(t)).inverse_dgamma) * dF

    def epsilon(self, z, t):
        alpha, sigma = self.coefficients(t)
        return (z - alpha * self.D(z, t)) / sigma

    def move(self, z, D, t, s):
        """D frozen."""
        (at, st), (a, b) = self.coefficients(t), self.coefficients(s)
        return a * D + b / st * (z - at * D)

    def transfer(self, z, epsilon, t, s):
        """Epsilon frozen."""
        (at, st), (a, b) = self.coefficients(t), self.coefficients(s)
        return a * (z / at + (b / a - st / at) * epsilon)

    def v(self, z, t):
        return self.model.velocity(z, t)

    def g(self, t):
        c = self.model.schedule(times(t))
        return float(c.sigma * (self.eta * c.dgamma).sqrt())

    def f(self, z, t):
        """The drift of the reverse SDE."""
        return self.v(z, t) - 0.5 * self.g(t) ** 2 * self.model.score(z, t)

    def kept(self, eta):
        """The share of the noise of s that is not new, exp of minus the integrated volatility."""
        return (self.ss * self.at / (self.as_ * self.st)) ** (2.0 * eta)

    # the probability flow

    def euler(self, z):
        return z + (self.s - self.t) * self.v(z, self.t)

    def midpoint(self, z):
        h, middle = self.s - self.t, 0.5 * (self.s + self.t)
        return z + h * self.v(z + 0.5 * h * self.v(z, self.t), middle)

    def heun(self, z):
        return z + 0.5 * (self.s - self.t) * (self.v(z, self.t) + self.v(self.euler(z), self.s))

    def rk4(self, z):
        h, middle = self.s - self.t, 0.5 * (self.s + self.t)
        one = self.v(z, self.t)
        two = self.v(z + 0.5 * h * one, middle)
        three = self.v(z + 0.5 * h * two, middle)
        four = self.v(z + h * three, self.s)
        return z + h / 6.0 * (one + 2.0 * two + 2.0 * three + four)

    def frozen(self, z):
        return self.move(z, self.D(z, self.t), self.t, self.s)

    def ddim(self, z):
        x = self.model.predict_x(z, times(self.t))
        F_t, F_s = self.model.transform(x, times(self.t)), self.model.transform(x, times(self.s))
        return self.as_ * F_s + self.ss / self.st * (z - self.at * F_t)

    def edm(self, z):
        if self.at == 0.0:
            return self.frozen(z)
        mean = 0.5 * (self.epsilon(z, self.t) + self.epsilon(self.frozen(z), self.s))
        return self.transfer(z, mean, self.t, self.s)

    def dpmpp_2s(self, z):
        if self.at == 0.0:
            return self.frozen(z)
        noise = math.sqrt(self.st / self.at * self.ss / self.as_)
        middle = float(self.model.schedule.time_at(torch.atan(times(noise))))
        return self.move(z, self.D(self.move(z, self.D(z, self.t), self.t, middle), middle), self.t, self.s)

    def pndm(self, z):
        if self.at == 0.0:
            return self.frozen(z)
        middle = 0.5 * (self.t + self.s)
        one = self.epsilon(z, self.t)
        two = self.epsilon(self.transfer(z, one, self.t, middle), middle)
        three = self.epsilon(self.transfer(z, two, self.t, middle), middle)
        four = self.epsilon(self.transfer(z, three, self.t, self.s), self.s)
        return self.transfer(z, (one + 2.0 * two + 2.0 * three + four) / 6.0, self.t, self.s)

    deis1 = deis2 = deis3 = dpmpp_2m = dpmpp_3m = unipc = unipc3 = ipndm = frozen

    # with noise

    def ancestral(self, z, noise, eta):
        x = self.model.predict_x(z, times(self.t))
        F_t, F_s = self.model.transform(x, times(self.t)), self.model.transform(x, times(self.s))
        kept = self.kept(eta)
        mean = self.as_ * F_s + math.sqrt(kept) * self.ss / self.st * (z - self.at * F_t)
        return mean + self.ss * math.sqrt(1.0 - kept) * noise

    def ddpm(self, z, noise, _):
        return self.ancestral(z, noise, self.eta)

    def ddpm_small(self, z, noise, _):
        return self.ancestral(z, noise, 1.0)

    euler_ancestral = ddpm_small

    def ddpm_large(self, z, noise, _):
        surplus = math.sqrt(self.st**2 - (self.at * self.ss / self.as_) ** 2)
        return self.ancestral(z, 0.0 * noise, 1.0) + surplus * noise

    def dpmpp_2m_sde(self, z, noise, _):
        kept = self.kept(self.eta)
        F, _ = self.moments(z, self.t)
        D = (self.D(z, self.t) + self.eta * F) / (1.0 + self.eta)
        pull = self.as_ * (1.0 - math.sqrt(kept) * self.at * self.ss / (self.as_ * self.st)) * D
        return math.sqrt(kept) * self.ss / self.st * z + pull + self.ss * math.sqrt(1.0 - kept) * noise

    def euler_maruyama(self, z, noise, _):
        h = self.t - self.s
        return z - h * self.f(z, self.t) + math.sqrt(h) * self.g(self.t) * noise

    def sde(self, z, noise, _):
        h = self.t - self.s
        f, w = self.f(z, self.t), math.sqrt(h) * noise
        other = self.f(z - h * f + self.g(self.t) * w, self.s)
        return z - 0.5 * h * (f + other) + 0.5 * (self.g(self.t) + self.g(self.s)) * w

    def srk(self, z, noise, other):
        """Roessler's SRA1; U is the integral of the path over the step, divided by its length."""
        h = self.t - self.s
        w = math.sqrt(h) * noise
        u = 0.5 * w + math.sqrt(h / 12.0) * other
        f = self.f(z, self.t)
        inner = z - 0.75 * h * f + 1.5 * self.g(self.s) * u
        late = self.f(inner, self.t - 0.75 * h)
        return z - h * (f + 2.0 * late) / 3.0 + self.g(self.s) * (w - u) + self.g(self.t) * u


STOCHASTIC = ("ddpm", "ddpm_small", "ddpm_large", "euler_ancestral", "dpmpp_2m_sde", "euler_maruyama", "sde", "srk")


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ORDERS)
def test_first_step_of_the_flow_by_hand(name, transform):
    """A step in the middle, a walk of one step, and one step from alpha = 0, each from its formula."""
    z = torch.randn(5, 3, dtype=torch.float64, generator=seeded())
    for schedule, t, s in ((VP, 0.6, 0.45), (VP, 1.0, None), (schedules.Rectified(), 1.0, None)):
        model = gaussian(schedule, TRANSFORMS[transform](), d=3)
        s = model.t_min if s is None else s
        expected = getattr(Hand(model, t, s), name)(z)
        torch.testing.assert_close(NAMES[name](model).step(z, t, s), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(walk(NAMES[name](model), z, times(t, s)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_first_step_with_noise_by_hand(name, transform, monkeypatch):
    z = torch.randn(5, 3, dtype=torch.float64, generator=seeded())
    for schedule, t, s in ((VP, 0.6, 0.45), (VP, 1.0, None), (schedules.Rectified(), 1.0, None)):
        model = gaussian(schedule, TRANSFORMS[transform](), d=3, volatility=0.8)
        last = model.t_min if s is None else s
        hand = Hand(model, t, last, eta=0.8)
        formula = {"ddpm_large": "ddpm_small"}.get(name, name) if s is None else name
        if hand.at == 0.0 and name in ("euler_maruyama", "sde", "srk"):
            formula = "ddpm"
        tell_noise(monkeypatch, NOISES)
        moved = NAMES[name](model).step(z, t, last)
        torch.testing.assert_close(moved, getattr(hand, formula)(z, *NOISES), rtol=1e-9, atol=1e-9)


def per_frequency(t):
    """A volatility for every frequency of a 2 x 2 image, that moves in time."""
    return (0.3 + t)[:, None, None] * times(0.2, 0.5, 0.9, 1.4).reshape(2, 2)


OF_TORCHSDE = {
    "identity": (transforms.Identity, lambda t: 0.3 + 1.2 * t), "moving scale": (MovingScale, lambda t: 0.3 + 1.2 * t),
    "blur": (partial(transforms.Blur, (2, 2), blur=1.0, floor=0.2), per_frequency),
}  # fmt: skip


@pytest.mark.parametrize("setting", OF_TORCHSDE)
@pytest.mark.parametrize("method", stochastic.SCHEMES)
def test_steps_of_the_sde_are_those_of_torchsde(method, setting, monkeypatch):
    """On the same Brownian path: its gain W over a step and U, the integral over the step of what it has gained."""
    transform, eta = OF_TORCHSDE[setting]

    def bounded(z, t):
        return torch.tanh(0.7 * z.flip(1)) * (1.0 - 0.3 * t[:, None, None])

    model = NDM(bounded, (2, 2), schedule=VP, transform=transform(), volatility=eta)
    sde, to_basis = model.reverse_sde(torch.float64), model.transform.to_basis
    grid, sampler = times(1.0, 0.83, 0.5, 0.46), SDE(model, method)
    z = torch.randn(5, 2, 2, dtype=torch.float64, generator=seeded())
    noises = torch.randn(3, 2, 5, 2, 2, dtype=torch.float64, generator=seeded(2))
    y, used = to_basis(z), 0
    for pair, (one, two) in zip(itertools.pairwise(grid), noises, strict=True):
        h = float(pair[0] - pair[1])
        W = math.sqrt(h) * one
        U = 0.5 * h * W + math.sqrt(h**3 / 12.0) * two
        path = Prescribed(z.shape, to_basis(W).flatten(1), to_basis(U).flatten(1))
        solution = solvers.sdeint(sde.drift, sde.diffusion, y, torch.stack(pair), method=method, noise=path)
        y, used = solution.state[0], used + int(solution.nfe.max())
    tell_noise(monkeypatch, noises.flatten(0, 1) if method == "srk" else noises[:, 0])
    torch.testing.assert_close(to_basis(walk(sampler, z, grid)), y, rtol=0.0, atol=1e-10)
    assert sampler.evaluations == used == sampler.cost(3)
    assert stochastic.SCHEMES.keys() == solvers.SDE_METHODS.keys()


def test_ddim_between_its_ends(monkeypatch):
    z = torch.randn(5, 3, dtype=torch.float64, generator=seeded())
    model = gaussian(VP, MovingScale(), d=3)
    hand = Hand(model, 0.6, 0.45)
    x = model.predict_x(z, times(0.6))
    std = 0.3 * hand.ss * math.sqrt(1.0 - hand.kept(1.0))
    residual = z - hand.at * model.transform(x, times(0.6))
    mean = hand.as_ * model.transform(x, times(0.45)) + math.sqrt(hand.ss**2 - std**2) / hand.st * residual
    tell_noise(monkeypatch, NOISES)
    torch.testing.assert_close(DDIM(model, 0.3).step(z, 0.6, 0.45), mean + std * NOISES[0])


@pytest.mark.parametrize(("churn", "steps"), [(0.9, 6), (40.0, 6)], ids=["small", "capped"])
def test_churn_by_hand(churn, steps, monkeypatch):
    """The noise is raised by gamma = min(churn / N, sqrt 2 - 1), scaled, and only between the bounds."""
    model, grid = gaussian(VP, d=3), time_grid(VP, VP.safe_t_min, steps)
    z = torch.randn(5, 3, dtype=torch.float64, generator=seeded())
    t, s = (float(value) for value in grid[3:5])
    alpha, sigma = Hand(model, t, s).coefficients(t)
    noise = sigma / alpha
    raised = noise * (1.0 + min(churn / steps, math.sqrt(2.0) - 1.0))
    later = float(VP.time_at(torch.atan(times(raised))))
    lifted = z / alpha + math.sqrt(raised**2 - noise**2) * 1.007 * NOISES[0]
    expected = Hand(model, later, s).edm(Hand(model, later, s).coefficients(later)[0] * lifted)
    plainly = Hand(model, t, s).edm(z)
    for low, high, answer in ((0.0, math.inf, expected), (0.0, 0.9 * noise, plainly), (1.1 * noise, 9.0, plainly)):
        tell_noise(monkeypatch, NOISES)
        sampler = EDM(model, churn=churn, noise_range=(low, high), noise_scale=1.007)
        sampler.prepare(grid)
        torch.testing.assert_close(sampler.step(z, t, s), answer, rtol=1e-9, atol=1e-9)


def interpolated(at, known, values):
    """The polynomial through values at known numbers, at numbers ``at``: shape (len(at), *values)."""
    powers = np.linalg.solve(np.vander(known, increasing=True), np.stack([v.numpy().ravel() for v in values]))
    return (np.vander(at, len(known), increasing=True) @ powers).reshape(len(at), *values[0].shape)


def integral(function, start, end):
    """Of a vector-valued function, by Gauss-Legendre."""
    x, w = np.polynomial.legendre.leggauss(60)
    at = 0.5 * (start + end) + 0.5 * (end - start) * x
    return torch.from_numpy(0.5 * (end - start) * np.tensordot(w, function(at), 1))


class Polynomials(Hand):
    """A multistep method's step from the polynomial that it integrates, given all past states, oldest first."""

    def __init__(self, model, grid, states, order):
        super().__init__(model, grid[len(states) - 1], grid[len(states)])
        self.grid, self.states, self.z = grid, states, states[-1]
        self.lam = [math.log(a / b) for a, b in map(self.coefficients, grid)]
        self.past = range(max(0, len(states) - order), len(states))

    def linear(self, start, j, extra=()):
        """sigma_s/sigma_t z + sigma_s int e^lambda P: D a polynomial in lambda through the past and ``extra``."""
        _, st = self.coefficients(self.grid[j])
        _, ss = self.coefficients(self.grid[j + 1])
        nodes = [*self.past, *extra]
        values = [self.D(self.states[i], self.grid[i]) for i in nodes]
        lam = [self.lam[i] for i in nodes]
        pull = integral(
            lambda at: np.exp(at)[:, None, None] * interpolated(at, lam, values), self.lam[j], self.lam[j + 1]
        )
        return ss / st * start + ss * pull

    def deis(self, variable):
        values = [self.epsilon(self.states[i], self.grid[i]) for i in self.past]
        known = [self.grid[i] if variable == "t" else self.lam[i] for i in self.past]

        def polynomial(noise):
            if variable == "t":
                return interpolated(self.model.schedule.time_at(torch.from_numpy(np.arctan(noise))), known, values)
            return interpolated(-np.log(noise), known, values)

        ends = self.st / self.at, self.ss / self.as_
        return self.as_ * (self.z / self.at + integral(polynomial, *ends))

    def pndm(self):
        values = [self.epsilon(self.states[i], self.grid[i]) for i in self.past]
        known = [self.grid[i] for i in self.past]
        mean = integral(lambda at: interpolated(at, known, values), self.t, self.s) / (self.s - self.t)
        return self.transfer(self.z, mean, self.t, self.s)


UNEVEN = (0.9, 0.78, 0.7, 0.55, 0.47, 0.3)


def states_of(sampler, z, grid=UNEVEN, **kwargs):
    states = [z]
    for t, s in itertools.pairwise(grid):
        states.append(sampler.step(states[-1], t, s, **kwargs))
    return states


@pytest.mark.parametrize("variable", ["t", "log_snr"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_deis_integrates_its_polynomial(order, variable):
    model, z = mixture(VP, MovingScale(), components=3, d=2), torch.randn(4, 2, generator=seeded()).double()
    states = states_of(DEIS(model, order, variable), z)
    for j in range(1, len(states)):
        expected = Polynomials(model, UNEVEN, states[:j], order).deis(variable)
        torch.testing.assert_close(states[j], expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_pndm_takes_the_mean_of_its_polynomial(order):
    """On any grid; on a uniform one that is Adams-Bashforth's combination. The warm-up takes order - 1 steps."""
    model, z = mixture(VP, MovingScale(), components=3, d=2), torch.randn(4, 2, generator=seeded()).double()
    for warmup in (False, True):
        states = states_of(PNDM(model, order, warmup=warmup), z)
        for j in range(1, len(states)):
            if warmup and j < order:
                expected = Hand(model, UNEVEN[j - 1], UNEVEN[j]).pndm(states[j - 1])
            else:
                expected = Polynomials(model, UNEVEN, states[:j], order).pndm()
            torch.testing.assert_close(states[j], expected, rtol=1e-7, atol=1e-7)
    even = tuple(0.9 - 0.1 * i for i in range(6))
    states = states_of(PNDM(model, warmup=False), z, even)
    e = [Hand(model, 0.9, 0.8).epsilon(state, t) for state, t in zip(states[:5], even, strict=False)]
    mean = (55.0 * e[4] - 59.0 * e[3] + 37.0 * e[2] - 9.0 * e[1]) / 24.0
    torch.testing.assert_close(states[5], Hand(model, even[4], even[5]).transfer(states[4], mean, even[4], even[5]))


def test_multistep_dpm_solver_by_hand():
    """2M: D_t + (h / 2 h_before)(D_t - D_before), frozen. 3M: the parabola, integrated exactly."""
    model, z = mixture(VP, MovingScale(), components=3, d=2), torch.randn(4, 2, generator=seeded()).double()
    for order in (2, 3):
        states = states_of(DPMSolverPP(model, order), z)
        for j in range(2, len(states)):
            poly = Polynomials(model, UNEVEN, states[:j], order)
            if order == 3 and j > 2:
                expected = poly.linear(states[j - 1], j - 1)
            else:
                now, before = poly.D(states[j - 1], UNEVEN[j - 1]), poly.D(states[j - 2], UNEVEN[j - 2])
                ratio = (poly.lam[j] - poly.lam[j - 1]) / (poly.lam[j - 1] - poly.lam[j - 2])
                expected = poly.move(states[j - 1], now + 0.5 * ratio * (now - before), UNEVEN[j - 1], UNEVEN[j])
            torch.testing.assert_close(states[j], expected, rtol=1e-7, atol=1e-7)


def test_multistep_sde_by_hand(monkeypatch):
    model, z = mixture(VP, MovingScale(), components=3, d=2, volatility=0.8), torch.randn(4, 2).double()
    noises = torch.randn(2, 4, 2).double()
    tell_noise(monkeypatch, noises)
    states = states_of(DPMSolverPPSDE(model), z, UNEVEN[:3])
    hand = Hand(model, UNEVEN[1], UNEVEN[2], eta=0.8)

    def mixed(z, t):
        return (hand.D(z, t) + 0.8 * hand.moments(z, t)[0]) / 1.8

    lam = [math.log(a / b) for a, b in map(hand.coefficients, UNEVEN[:3])]
    now, before, h = mixed(states[1], UNEVEN[1]), mixed(states[0], UNEVEN[0]), lam[2] - lam[1]
    D = now + 0.5 * h / (lam[1] - lam[0]) * (now - before)
    mean = hand.ss / hand.st * math.exp(-0.8 * h) * states[1] + hand.as_ * (1.0 - math.exp(-1.8 * h)) * D
    torch.testing.assert_close(states[2], mean + hand.ss * math.sqrt(1.0 - math.exp(-1.6 * h)) * noises[1])


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_by_hand(order, variant):
    """A predictor through the last k predictions, a corrector through the new one too; 1/2 in place of either's one
    weight where there is one slope."""
    model, z = mixture(VP, MovingScale(), components=3, d=2), torch.randn(4, 2, generator=seeded()).double()
    states, corrected = states_of(UniPC(model, order, variant), z), z
    for j in range(1, len(states)):
        poly = Polynomials(model, UNEVEN, states[:j], order)
        poly.states = states
        lam, D = poly.lam, [poly.D(state, t) for state, t in zip(states, UNEVEN, strict=True)]
        h = lam[j] - lam[j - 1]
        B = math.expm1(-h) if variant == "bh2" else -h
        alpha, _ = poly.coefficients(UNEVEN[j])
        euler = poly.move(corrected, D[j - 1], UNEVEN[j - 1], UNEVEN[j])
        if len(poly.past) == 2:
            slope = (D[j - 2] - D[j - 1]) * h / (lam[j - 2] - lam[j - 1])
            predicted = euler - alpha * 0.5 * B * slope
        else:
            predicted = poly.linear(corrected, j - 1)
        torch.testing.assert_close(states[j], predicted, rtol=1e-7, atol=1e-7)
        if len(poly.past) == 1:
            corrected = euler - alpha * 0.5 * B * (D[j] - D[j - 1])
        else:
            corrected = poly.linear(corrected, j - 1, extra=[j])


# --- weak orders ------------------------------------------------------------------------------------------------------

WEAK_ORDERS = {
    "ddpm": 1, "ddpm_small": 1, "ddpm_large": 1, "euler_ancestral": 1, "dpmpp_2m_sde": 2, "euler_maruyama": 1,
    "sde": 2, "srk": 2,
}  # fmt: skip
OF_THE_SDE = ("ddpm", "dpmpp_2m_sde", "euler_maruyama", "sde", "srk")


def moments_of_walk(make, model, steps, monkeypatch):
    """Mean and covariance at the end, exactly: a walk is affine in z_1 and in every noise that it draws.

    One batch holds the origin, the unit vectors as z_1, and for every draw the unit vectors as its noise.
    """
    d, draws = model.event_shape[0], 0
    start = torch.zeros(1 + d + 2 * steps * d, d, dtype=torch.float64)
    start[1 : 1 + d] = torch.eye(d)

    def prescribed(like, generator):
        nonlocal draws
        draws += 1
        noise = torch.zeros_like(like)
        noise[1 + draws * d : 1 + (draws + 1) * d] = torch.eye(d)
        return noise

    for module in NOISY:
        monkeypatch.setattr(module, "normal_like", prescribed)
    end = walk(make(model), start, plain(model, steps))
    matrices = (end[1:] - end[:1]).reshape(-1, d, d).mT
    mean, factor = (part[0, 0] for part in model.marginals.components(times(1.0))[:2])
    parts = torch.cat([(matrices[0] @ factor)[None], matrices[1:]])
    return end[0] + matrices[0] @ mean, (parts @ parts.mT).sum(0)


def weak_errors(make, model, steps, monkeypatch):
    mean, factor = (part[0, 0] for part in model.marginals.components(times(model.t_min))[:2])
    errors = []
    for n in steps:
        own_mean, own_cov = moments_of_walk(make, model, n, monkeypatch)
        errors.append(torch.maximum((own_mean - mean).abs().max(), (own_cov - factor @ factor.mT).abs().max()))
    return errors


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", WEAK_ORDERS)
def test_weak_order(name, transform, monkeypatch):
    model = gaussian(SMOOTH, TRANSFORMS[transform](), d=3, volatility=0.8)
    errors = weak_errors(NAMES[name], model, (32, 64), monkeypatch)
    assert slope(errors, (32, 64)) == pytest.approx(WEAK_ORDERS[name], abs=0.3)


def test_weak_order_of_churn(monkeypatch):
    """Once churn / N is below the cap; the capped noise is raised by the same factor whatever the step."""
    model, steps = gaussian(SMOOTH, d=2), (112, 224)
    assert slope(weak_errors(NAMES["edm_churn"], model, steps, monkeypatch), steps) == pytest.approx(2.0, abs=0.3)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("stochasticity", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("name", OF_THE_SDE)
def test_marginals_do_not_depend_on_stochasticity(name, stochasticity, transform, monkeypatch):
    """Every factor on the volatility converges to the same exact mean and covariance, with the method's order."""
    model = gaussian(SMOOTH, TRANSFORMS[transform](), d=3, volatility=0.8).with_volatility(scale=stochasticity)
    errors = weak_errors(NAMES[name], model, (16, 32), monkeypatch)
    assert slope(errors, (16, 32)) == pytest.approx(WEAK_ORDERS[name], abs=0.3)
    assert errors[-1] < (0.5 if WEAK_ORDERS[name] == 1 else 0.1)


@pytest.mark.parametrize("name", OF_THE_SDE)
def test_weak_order_for_a_volatility_that_varies_in_time(name, monkeypatch):
    model = gaussian(SMOOTH, MovingScale(), d=3, volatility=lambda t: 0.3 + 1.2 * t)
    errors = weak_errors(NAMES[name], model, (32, 64), monkeypatch)
    assert slope(errors, (32, 64)) == pytest.approx(WEAK_ORDERS[name], abs=0.3)


HERMITE, HERMITE_WEIGHTS = np.polynomial.hermite_e.hermegauss(7)
LINE = torch.linspace(-6.0, 6.0, 301, dtype=torch.float64)
MEMORY = torch.linspace(-2.2, 2.2, 13, dtype=torch.float64)


def observed(z):
    """Functions whose expectation is followed, (n,) to (n, 3)."""
    return torch.stack([z, z**2, torch.cos(3.0 * z)], 1)


def expectation(exact, t, function):
    """Of a function under the exact marginal at t."""
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(60))
    c, (F, _), (r, _) = exact.schedule(times(t)), exact.at(times(t)), exact.noise_at(times(t))
    z = (c.alpha * F[0])[:, None] + (c.sigma * r[0].exp())[:, None] * nodes
    values = function(z.flatten()).reshape(3, len(nodes), -1)
    return torch.einsum("k,n,knf->f", exact.weights, weights / weights.sum(), values)


def on_the_line(u):
    """A smooth function from its values on ``LINE``."""
    spline = CubicSpline(LINE.numpy(), u.numpy())
    return lambda z: torch.from_numpy(spline(z.clamp(-6.0, 6.0).numpy()))


def weak_expectation(make, exact, steps, draws, monkeypatch):
    """E of the observed functions at the end of a walk in one dimension, backwards: u_t(z) = E[u_s(step(z))].

    The noise is integrated by Gauss-Hermite, the functions are splines: no randomness.
    """
    model = exact.model()
    grid, sampler = plain(model, steps), make(model)
    sampler.prepare(grid)
    mesh = [torch.from_numpy(part.ravel()) for part in np.meshgrid(*[HERMITE] * draws)]
    weights = torch.from_numpy(functools.reduce(np.multiply.outer, [HERMITE_WEIGHTS] * draws).ravel())
    start = LINE.repeat_interleave(len(weights))[:, None]
    u = observed(LINE)
    for t, s in reversed(list(itertools.pairwise(grid.tolist()))):
        tell_noise(monkeypatch, [part.repeat(len(LINE))[:, None] for part in mesh])
        values = on_the_line(u)(sampler.step(start, t, s)[:, 0]).reshape(len(LINE), len(weights), -1)
        u = torch.einsum("q,zqf->zf", weights / weights.sum(), values)
    return expectation(exact, 1.0, on_the_line(u))


@scales
@pytest.mark.parametrize("name", [name for name in WEAK_ORDERS if name != "dpmpp_2m_sde"])
def test_weak_order_for_a_nonlinear_transform(name, scale, monkeypatch):
    exact = FastPoints(schedules.LinearLogSNR(-2.0, 4.0), FastWiggle(), eta=0.8, scale=SCALES[scale]())
    truth, draws = expectation(exact, 0.0, observed), 2 if name == "srk" else 1
    errors = [(weak_expectation(NAMES[name], exact, n, draws, monkeypatch) - truth).abs().max() for n in (16, 32)]
    assert slope(errors, (16, 32)) == pytest.approx(WEAK_ORDERS[name], abs=0.3)


def test_weak_order_of_churn_for_three_points(monkeypatch):
    exact = FastPoints(schedules.LinearLogSNR(-2.0, 4.0), transforms.Identity())
    truth, make = expectation(exact, 0.0, observed), partial(EDM, churn=2.0)
    errors = [(weak_expectation(make, exact, n, 1, monkeypatch) - truth).abs().max() for n in (16, 32)]
    assert slope(errors, (16, 32)) == pytest.approx(2.0, abs=0.3)


@scales
def test_weak_order_of_the_multistep_sde_for_a_nonlinear_transform(scale, monkeypatch):
    """As above, with the last prediction as a second coordinate."""
    exact = FastPoints(schedules.LinearLogSNR(-2.0, 4.0), FastWiggle(), eta=0.8, scale=SCALES[scale]())
    model, truth = exact.model(), expectation(exact, 0.0, observed)
    z, memory = (part.reshape(-1, 1) for part in torch.meshgrid(LINE, MEMORY, indexing="ij"))
    start, before = (part.repeat_interleave(len(HERMITE), 0) for part in (z, memory))
    noise = torch.from_numpy(HERMITE).repeat(len(z))[:, None]
    weights = torch.from_numpy(HERMITE_WEIGHTS / HERMITE_WEIGHTS.sum())
    errors = []
    for n in (32, 64):
        sampler, grid, u = DPMSolverPPSDE(model), plain(model, n), observed(z[:, 0])
        sampler.prepare(grid)
        for j in reversed(range(n)):
            tell_noise(monkeypatch, [noise])
            sampler._end = (float(grid[j]), start.shape)
            sampler._history = [(sampler.level(grid[j - 1]), before)] if j > 0 else []
            end, (_, newest) = sampler.step(start, grid[j], grid[j + 1])[:, 0], sampler._history[0]
            surfaces = u.reshape(len(LINE), len(MEMORY), -1).unbind(-1)
            splines = [RectBivariateSpline(LINE.numpy(), MEMORY.numpy(), surface.numpy()) for surface in surfaces]
            values = [s.ev(end.clamp(-6.0, 6.0).numpy(), newest[:, 0].numpy()) for s in splines]
            u = torch.from_numpy(np.stack(values, 1)).reshape(len(z), len(weights), -1)
            u = torch.einsum("q,zqf->zf", weights, u)
        u = u.reshape(len(LINE), len(MEMORY), -1)[:, 0]
        errors.append((expectation(exact, 1.0, on_the_line(u)) - truth).abs().max())
    assert slope(errors, (32, 64)) == pytest.approx(2.0, abs=0.3)


IN_THE_TABLE = {
    '"deis1", ... 3': ("deis1", "deis2", "deis3"), '"dpmpp_2m", "_3m"': ("dpmpp_2m", "dpmpp_3m"),
    '"unipc", "unipc3"': ("unipc", "unipc3"),
}  # fmt: skip


def test_orders_in_the_table_are_those_measured_here():
    rows = [line for line in samplers.__doc__.splitlines() if line.startswith("``")]
    starts = [match.start() for match in re.finditer("=+", samplers.__doc__.splitlines()[5])]
    table = {row[: starts[1]].strip().strip("`"): row[starts[2] : starts[3]].strip() for row in rows}
    known = {name: both[0] for name, both in ORDERS.items()} | WEAK_ORDERS | {"edm_churn": 2}
    for cell, orders in table.items():
        names = IN_THE_TABLE.get(cell, (cell.strip('"'),))
        if set(names) <= known.keys():
            assert orders.removesuffix(" (weak)") == ", ".join(str(known.pop(name)) for name in names)
    assert not known


# --- every sampler by name: costs, rows, one step, ends --------------------------------------------------------------

BRIDGES = {"alpha > 0": SMOOTH, "alpha(1) = 0": schedules.Rectified()}


class Bounded:
    """A prediction of x, counted."""

    def __init__(self):
        self.calls = 0

    def __call__(self, z, t, until=None):
        self.calls += 1
        return torch.tanh(0.7 * z.flip(1)) * (1.0 - 0.3 * t[:, None])


def small_model(schedule=SMOOTH, **kwargs):
    """A cheap model for any sampler, that of flow maps included."""
    return NDM(Bounded(), (2,), schedule=schedule, **kwargs)


RESIDUALS = discrete.estimate_residuals(
    small_model(), torch.randn(32, 2, generator=seeded()), times=times(0.05, 0.3, 0.5, 0.8, 1.0), generator=seeded()
)
SAMPLERS = NAMES | {"ddpm_analytic": partial(NAMES["ddpm_analytic"], residuals=RESIDUALS)}


def method_of(name):
    """What ``sample`` takes as its method: the name, or the sampler with its residuals where it needs them."""
    return SAMPLERS[name] if name == "ddpm_analytic" else name


@pytest.mark.parametrize("schedule", BRIDGES.values(), ids=BRIDGES)
@pytest.mark.parametrize("name", NAMES)
def test_evaluations_are_those_of_the_formula(name, schedule):
    model = small_model(schedule)
    model.checks = False
    for steps in (1, 2, 3, 7):
        model.predictor.calls = 0
        _, info = ndm_ct.sample(model, 3, method=method_of(name), steps=steps, return_info=True)
        assert model.predictor.calls == info.nfe == SAMPLERS[name](model).cost(steps)
        assert (info.accepted, info.rejected) == (steps, 0)
        assert len(info.times) == steps + 1
    batched = ndm_ct.sample(model, 5, method=method_of(name), steps=3, batch_size=2, return_info=True)[1]
    assert batched.nfe == SAMPLERS[name](model).cost(3)


@pytest.mark.parametrize("schedule", BRIDGES.values(), ids=BRIDGES)
@pytest.mark.parametrize("name", ORDERS)
def test_costs_in_numbers(name, schedule):
    """What the table of the package says; where alpha(1) = 0 the first step of some methods is cheaper."""
    stages = {"midpoint": 2, "heun": 2, "rk4": 4, "edm": 2, "dpmpp_2s": 2}.get(name, 1)
    saved = 1 if schedule is BRIDGES["alpha(1) = 0"] and name in ("edm", "dpmpp_2s") else 0
    cost = SAMPLERS[name](small_model(schedule)).cost
    if name == "pndm":
        first = 1 if schedule is BRIDGES["alpha(1) = 0"] else 0
        assert [cost(n) for n in (1, 2, 3, 4, 9)] == [n + 3 * min(n - first, 3) for n in (1, 2, 3, 4, 9)]
    else:
        assert [cost(n) for n in (1, 2, 9)] == [stages * n - saved for n in (1, 2, 9)]


@pytest.mark.parametrize("schedule", BRIDGES.values(), ids=BRIDGES)
@pytest.mark.parametrize("name", NAMES)
def test_nfe_buys_the_most_steps_that_fit(name, schedule):
    sampler = SAMPLERS[name](small_model(schedule))
    first = sampler.cost(1)
    for nfe in range(first, first + 15):
        steps = steps_within(sampler, nfe)
        assert sampler.cost(steps) <= nfe < sampler.cost(steps + 1)
    _, info = ndm_ct.sample(sampler.model, 2, method=method_of(name), nfe=first + 14, return_info=True)
    assert info.accepted == steps
    if first > 1:
        with pytest.raises(ValueError, match=f"nfe={first - 1} is less than one step of .*takes {first} evaluations"):
            ndm_ct.sample(sampler.model, 2, method=method_of(name), nfe=first - 1)


def test_one_evaluation_buys_no_guided_estimate():
    """One step that ends at the estimate of x is one prediction, two evaluations with guidance."""
    sampler = SAMPLERS["ddim"](small_model())
    assert steps_within(sampler, 2, per_call=2, denoise=True) == 1
    with pytest.raises(ValueError, match=r"nfe=1 is less than one step of DDIM, which takes 2 evaluations"):
        steps_within(sampler, 1, per_call=2, denoise=True)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(3, 16), torch.nn.Linear(16, 2)

    def forward(self, z, t, until=None):
        return self.last(torch.tanh(self.first(torch.cat([z, t[:, None]], 1))))


@pytest.mark.parametrize("name", NAMES)
def test_a_row_with_its_own_generator_does_not_depend_on_its_batch(name):
    model = NDM(Net().double(), (2,), schedule=SMOOTH, volatility=0.8)

    def draw(seeds, **kwargs):
        sources = [seeded(seed) for seed in seeds]
        return ndm_ct.sample(model, len(seeds), method=method_of(name), steps=3, generator=sources, **kwargs)

    together = draw(range(64))
    singly = torch.cat([draw([seed]) for seed in range(64)])
    close = {"rtol": 0.0, "atol": 1e-12}
    torch.testing.assert_close(together, singly, **close)
    torch.testing.assert_close(draw(range(64), batch_size=10), together, **close)
    torch.testing.assert_close(draw(range(63, -1, -1)), together.flip(0), **close)
    assert len(together.unique(dim=0)) == 64
    assert draw([]).shape == (0, 2)
    with_one = ndm_ct.sample(model, 3, method=method_of(name), steps=3, generator=seeded(0))
    torch.testing.assert_close(with_one, ndm_ct.sample(model, 3, method=method_of(name), steps=3, generator=seeded(0)))


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_steps_is_finite(name):
    """From alpha = 0 and with the large steps of a single one too."""
    for schedule in BRIDGES.values():
        for steps in (1, 2, 3, 4, 5):
            x = ndm_ct.sample(small_model(schedule), 16, method=method_of(name), steps=steps, generator=seeded())
            assert bool(torch.isfinite(x).all())


@pytest.mark.parametrize("name", NAMES)
def test_steps_that_end_without_noise(name):
    """At sigma = 0 the state is alpha F of the prediction; of "midpoint", churn and residuals whatever is finite."""
    model = small_model(schedules.Rectified())
    sampler = SAMPLERS[name](model)
    sampler.prepare(times(1.0, 0.3, 0.0))
    z = torch.randn(4, 2, generator=seeded())
    x = sampler.step(z, 0.3, 0.0)
    assert bool(torch.isfinite(x).all())
    if name not in ("midpoint", "edm_churn", "ddpm_analytic"):
        torch.testing.assert_close(x, model.predict_x(z, times(0.3)))
    walked = walk(SAMPLERS[name](model), z, times(1.0, 0.8, 0.5, 0.3, 0.1, 0.0))
    assert bool(torch.isfinite(walked).all())


def test_steps_that_end_without_noise_follow_the_transform():
    """The last step of a method in the noise level is D's, of a frozen one that of F at its end."""
    model = NDM(Bounded(), (2,), schedule=schedules.Rectified(), transform=MovingScale())
    z = torch.randn(4, 2, generator=seeded())
    hand, x = Hand(model, 0.3, 0.0), model.predict_x(z, times(0.3))
    for name in ORDERS.keys() - {"euler", "midpoint", "ddim"}:
        torch.testing.assert_close(SAMPLERS[name](model).step(z, 0.3, 0.0), hand.D(z, 0.3))
    for name in ("ddim", "ddpm", "ddpm_small", "euler_ancestral", "sde", "srk"):
        torch.testing.assert_close(SAMPLERS[name](model).step(z, 0.3, 0.0), x)


# --- walks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_trajectory_is_what_single_steps_give(name):
    """States, times and the sequence of callbacks; steps need no preparation, but for churn."""
    model, seen = small_model(volatility=0.8), []
    x, info = ndm_ct.sample(
        model, 3, method=method_of(name), steps=6, generator=seeded(), dtype=torch.float64, return_info=True,
        trajectory=True, callback=lambda t, z: seen.append((t, z)),
    )  # fmt: skip
    assert info.trajectory.shape == (7, 3, 2)
    assert torch.equal(info.trajectory[0], info.z)
    assert torch.equal(info.trajectory[-1], x)
    assert torch.equal(info.times, time_grid(SMOOTH, model.t_min, 6))
    assert [t for t, _ in seen] == info.times[:-1].tolist()
    assert all(torch.equal(z, state) for (_, z), state in zip(seen, info.trajectory[:-1], strict=True))
    source = seeded()
    z, sampler = model.sample_prior(3, generator=source, dtype=torch.float64, device=None), SAMPLERS[name](model)
    if name == "edm_churn":
        with pytest.raises(ValueError, match="call prepare"):
            sampler.step(z, 1.0, 0.9)
        sampler.prepare(info.times)
    assert torch.equal(z, info.z)
    for t, s, state in zip(info.times[:-1], info.times[1:], info.trajectory[1:], strict=True):
        z = sampler.step(z, t, s, generator=source)
        torch.testing.assert_close(z, state, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("schedule", BRIDGES.values(), ids=BRIDGES)
@pytest.mark.parametrize("name", NAMES)
def test_denoise_ends_at_the_estimate_of_x(name, schedule):
    """The walk is the same but for its last step, which costs one evaluation, of any method."""
    model = small_model(schedule)
    model.checks = False
    for steps in (1, 2, 3, 6):
        model.predictor.calls = 0
        options = {
            "method": method_of(name),
            "steps": steps,
            "dtype": torch.float64,
            "trajectory": True,
            "return_info": True,
        }
        x, info = ndm_ct.sample(model, 3, generator=seeded(), denoise=True, **options)
        assert model.predictor.calls == info.nfe == 1 + (SAMPLERS[name](model).cost(steps - 1) if steps > 1 else 0)
        _, plain = ndm_ct.sample(model, 3, generator=seeded(), **options)
        assert torch.equal(info.trajectory[:-1], plain.trajectory[:-1])
        assert torch.equal(x, info.trajectory[-1])
        assert torch.equal(x, model.predict_x(info.trajectory[-2], info.times[-2]))
        assert not torch.equal(x, plain.trajectory[-1])
    for nfe in range(info.nfe, info.nfe + 6):
        bought = ndm_ct.sample(model, 3, method=method_of(name), nfe=nfe, denoise=True, return_info=True)[1]
        assert bought.nfe <= nfe < 1 + SAMPLERS[name](model).cost(bought.accepted)


def test_denoise_leaves_no_noise_of_the_last_state():
    """Exact for data at a point; the draw at t_min keeps sigma(t_min)."""
    model = reference.Gaussian(torch.tensor([1.0, -2.0]), 1e-12 * torch.eye(2), schedule=SMOOTH)
    for method in ("ddpm", "unipc", "heun"):
        x = ndm_ct.sample(model, 50, method=method, steps=8, denoise=True, dtype=torch.float64)
        torch.testing.assert_close(x, torch.tensor([1.0, -2.0], dtype=torch.float64).expand(50, 2), atol=1e-5, rtol=0.0)


def test_denoise_needs_an_estimate_of_x():
    model = NDM(Bounded(), (2,), prediction="moments")
    with pytest.raises(ValueError, match="denoise=True needs an estimate of x, prediction='moments'"):
        ndm_ct.sample(model, 3, method="ddim", steps=4, denoise=True)


def test_trajectories_of_batches_are_joined():
    x, info = ndm_ct.sample(
        small_model(), 5, method="ddpm", steps=4, batch_size=2, generator=seeded(), return_info=True, trajectory=True
    )
    assert info.trajectory.shape == (5, 5, 2)
    assert torch.equal(info.trajectory[-1], x)
    assert torch.equal(info.trajectory[0], info.z)


@pytest.mark.parametrize("name", NAMES)
def test_a_sampler_starts_every_draw_anew(name):
    """One object for two calls, on two grids, and for batches of one call."""
    model = small_model()
    sampler = SAMPLERS[name](model)

    def draw(method, steps, seed, **kwargs):
        return ndm_ct.sample(model, 4, method=method, steps=steps, generator=seeded(seed), return_info=True, **kwargs)

    draw(lambda model: sampler, 5, 0)
    for steps, seed in ((5, 1), (3, 2), (5, 3)):
        x, info = draw(lambda model: sampler, steps, seed)
        fresh, fresh_info = draw(method_of(name), steps, seed)
        torch.testing.assert_close(x, fresh, rtol=0.0, atol=1e-7)
        assert info.nfe == fresh_info.nfe
    sources = [seeded(seed) for seed in range(4)]
    batched = ndm_ct.sample(model, 4, method=method_of(name), steps=5, generator=sources, batch_size=2)
    singly = [ndm_ct.sample(model, 1, method=method_of(name), steps=5, generator=[seeded(seed)]) for seed in range(4)]
    torch.testing.assert_close(batched, torch.cat(singly))


def test_history_belongs_to_the_time_at_which_the_last_step_ended():
    """A step from elsewhere, or of another batch, starts anew; a state may be changed between two steps."""
    model = gaussian(VP, d=3)
    z = torch.randn(4, 3, generator=seeded()).double()
    for name in ("deis3", "dpmpp_2m", "dpmpp_3m", "unipc", "unipc3", "ipndm"):
        sampler = SAMPLERS[name](model)
        first = sampler.step(z, 0.9, 0.8)
        assert not torch.allclose(sampler.step(first, 0.8, 0.7), SAMPLERS[name](model).step(first, 0.8, 0.7))
        for jump, state in (((0.6, 0.5), z), ((0.5, 0.4), z[:2])):
            torch.testing.assert_close(sampler.step(state, *jump), SAMPLERS[name](model).step(state, *jump))


def test_unipc_corrects_only_the_state_that_it_returned():
    """A state that was changed, in place too, is taken as it is, with the history of predictions."""
    model = gaussian(VP, d=3)
    z = torch.randn(4, 3, generator=seeded()).double()
    changed, kept = UniPC(model), UniPC(model)
    end = changed.step(z, 0.9, 0.8)
    other = end + 1.0
    expected = Polynomials(model, (0.9, 0.8, 0.7), [z, other], 2)
    slope = (expected.D(z, 0.9) - expected.D(other, 0.8)) / (expected.lam[0] - expected.lam[1])
    h = expected.lam[2] - expected.lam[1]
    alpha, _ = expected.coefficients(0.7)
    answer = expected.frozen(other) - 0.5 * alpha * math.expm1(-h) * h * slope
    torch.testing.assert_close(changed.step(other, 0.8, 0.7), answer)
    same = kept.step(z, 0.9, 0.8)
    same += 1.0
    torch.testing.assert_close(kept.step(same, 0.8, 0.7), answer)
    copied = UniPC(model)
    copied.step(z, 0.9, 0.8)
    assert not torch.allclose(copied.step(end.clone(), 0.8, 0.7), Hand(model, 0.8, 0.7).frozen(end))


@pytest.mark.parametrize("name", OF_THE_SDE)
def test_stochasticity_multiplies_the_volatility(name):
    def draw(volatility, **kwargs):
        model = NDM(Bounded(), (2,), schedule=SMOOTH, volatility=volatility)
        return ndm_ct.sample(
            model, 4, method=method_of(name), steps=5, generator=seeded(), dtype=torch.float64, **kwargs
        )

    torch.testing.assert_close(draw(0.8, stochasticity=0.5), draw(0.4))
    varying = draw(lambda t: 0.2 + t, stochasticity=2.0)
    torch.testing.assert_close(varying, draw(lambda t: 0.4 + 2.0 * t))
    torch.testing.assert_close(draw(0.8, stochasticity=1.0), draw(0.8))
    assert not torch.allclose(draw(0.8), draw(0.4))


def test_interrupted_sampling_returns_the_batches_that_are_finished():
    """In the first batch there is nothing to return."""
    model, calls = small_model(), []

    def interrupt_after(calls_allowed):
        calls.clear()

        def callback(t, z):
            calls.append(t)
            if len(calls) > calls_allowed:
                raise KeyboardInterrupt

        return callback

    options = {"method": "dpmpp_2m", "steps": 4, "batch_size": 3, "return_info": True, "trajectory": True}
    whole, _ = ndm_ct.sample(model, 8, generator=seeded(), **options)
    with pytest.warns(UserWarning, match="interrupted: 3 of 8 samples are finished"):
        x, info = ndm_ct.sample(model, 8, generator=seeded(), callback=interrupt_after(5), **options)
    torch.testing.assert_close(x, whole[:3])
    assert info.trajectory.shape == (5, 3, 2)
    with pytest.raises(KeyboardInterrupt):
        ndm_ct.sample(model, 8, callback=interrupt_after(2), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ndm_ct.sample(model, 8, callback=interrupt_after(99), **options)


def test_the_model_is_left_as_it_was():
    """Training mode and gradients."""
    model = NDM(Net(), (2,), schedule=SMOOTH)
    model.train()
    x = ndm_ct.sample(model, 2, method="unipc", steps=3)
    assert model.training
    assert not x.requires_grad


# --- grids ------------------------------------------------------------------------------------------------------------

ON_GRIDS = {
    "LinearLogSNR": SMOOTH, "VariancePreserving": VP, "VarianceExploding": schedules.VarianceExploding(0.001, 100.0),
    "Cosine": schedules.Cosine(), "Rectified": schedules.Rectified(),
}  # fmt: skip


def karras(high, low, u):
    return (high ** (1 / 7) * (1 - u) + low ** (1 / 7) * u) ** 7


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("schedule", ON_GRIDS.values(), ids=ON_GRIDS)
@pytest.mark.parametrize("name", GRIDS)
def test_grids_are_their_formulas(name, schedule, steps):
    """In t, or in the noise-to-signal ratio, at every time but the two ends, which are exact."""
    t_min = schedule.safe_t_min
    grid = time_grid(schedule, t_min, steps, name)
    assert grid.dtype == torch.float64
    assert grid.shape == (steps + 1,)
    assert (float(grid[0]), float(grid[-1])) == (1.0, t_min)
    assert bool((grid.diff() < 0.0).all())
    c = schedule(grid)
    noise, u = (c.sigma / c.alpha).tolist(), [i / steps for i in range(steps + 1)]
    high, low = min(noise[0], 1000.0), noise[-1]
    if name == "edm" and not isinstance(schedule, schedules.VarianceExploding):
        high, low = min(high, 80.0), max(low, 0.002)
    for i in range(1, steps):
        if name == "uniform":
            assert float(grid[i]) == pytest.approx(1.0 - u[i] * (1.0 - t_min), rel=1e-12)
        elif name == "quadratic":
            assert math.sqrt(float(grid[i])) == pytest.approx(1.0 - u[i] * (1.0 - math.sqrt(t_min)), rel=1e-12)
        elif name == "logsnr":
            assert noise[i] == pytest.approx(high * (low / high) ** u[i], rel=1e-9)
        else:
            assert noise[i] == pytest.approx(karras(high, low, u[i]), rel=1e-9)


def test_edm_grid_has_the_published_ends():
    """Where the model reaches further, between 80 and 0.002; else the model's own, in the unit of its data."""
    wide, narrow = schedules.LinearLogSNR(-14.0, 10.0), schedules.LinearLogSNR(-12.0, 8.0)
    inner = wide(time_grid(wide, 0.0, 4, "edm"))
    noise = (inner.sigma / inner.alpha)[1:-1].tolist()
    assert noise == pytest.approx([karras(80.0, 0.002, u) for u in (0.25, 0.5, 0.75)])
    for own in (narrow, schedules.VarianceExploding(0.01, 50.0), schedules.VarianceExploding(0.001, 100.0)):
        assert torch.equal(time_grid(own, 0.0, 4, "edm"), time_grid(own, 0.0, 4, "karras"))


def test_a_grid_of_ones_own_is_taken_as_it_is():
    own = times(1.0, 0.93, 0.5, 0.1, 0.0)
    assert torch.equal(time_grid(SMOOTH, 0.0, 4, own), own)
    assert time_grid(SMOOTH, 0.0, 1, torch.tensor([1.0, 0.0])).dtype == torch.float64
    _, info = ndm_ct.sample(small_model(), 2, method="deis2", grid=own, return_info=True)
    assert torch.equal(info.times, own)
    assert info.accepted == 4
    _, info = ndm_ct.sample(small_model(), 2, method="edm", grid="karras", steps=4, return_info=True)
    assert torch.equal(info.times, time_grid(SMOOTH, 0.0, 4, "karras"))


def test_levels_are_the_schedule():
    level = levels(VP, times(0.4))[0]
    c = VP(times(0.4))
    ratio = float(c.alpha / c.sigma)
    assert (level.alpha, level.sigma, level.t) == (float(c.alpha), float(c.sigma), 0.4)
    assert level.log_snr == pytest.approx(math.log(ratio))
    assert level.noise == pytest.approx(1.0 / ratio)
    h = 1e-6
    later, sooner = levels(VP, times(0.4 + h, 0.4 - h))
    assert level.slope == pytest.approx(2.0 * h / (later.log_snr - sooner.log_snr), rel=1e-6)
    start = levels(schedules.Rectified(), times(1.0))[0]
    assert (start.noise, start.log_snr, start.slope) == (math.inf, -math.inf, 0.0)


# --- bad input --------------------------------------------------------------------------------------------------------


def generators(n):
    return [seeded(seed) for seed in range(n)]


TWICE = [*generators(1) * 2]

REFUSED = {
    "a method that nearly exists": ({"method": "dpmpp_2n", "steps": 4}, ValueError, "did you mean 'dpmpp_2"),
    "a method unlike any": ({"method": "xyzzy", "steps": 4}, ValueError, "unknown.*Valid: 'ode'"),
    "a method that is no sampler": ({"method": 3, "steps": 4}, TypeError, "name or a class .* got int"),
    "a function that makes none": ({"method": lambda model: 3, "steps": 4}, TypeError, "must return a Sampler"),
    "no steps": ({"method": "deis2"}, ValueError, "pass steps= or nfe= .got neither"),
    "steps and nfe": ({"method": "deis2", "steps": 4, "nfe": 4}, ValueError, "pass steps= or nfe= .got both"),
    "no step at all": ({"method": "deis2", "steps": 0}, ValueError, "steps must be at least 1"),
    "part of a step": ({"method": "deis2", "steps": 1.5}, TypeError, "steps must be an int"),
    "part of an evaluation": ({"method": "deis2", "nfe": 1.5}, TypeError, "nfe must be an int"),
    "no evaluation at all": ({"method": "deis2", "nfe": 0}, ValueError, "nfe must be at least 1"),
    "less than a step": ({"method": "rk4", "nfe": 3}, ValueError, "nfe=3 is less than one step of RungeKutta.*takes 4"),
    "an unknown grid": ({"method": "deis2", "steps": 4, "grid": "karas"}, ValueError, "did you mean 'karras'"),
    "times that rise": (
        {"method": "deis2", "grid": times(0.0, 0.5, 1.0)}, ValueError, "decrease strictly, from 1 .noise. to t_min",
    ),
    "times that stand still": ({"method": "deis2", "grid": times(1.0, 0.5, 0.5, 0.0)}, ValueError, "decrease strictly"),
    "a time that is none": ({"method": "deis2", "grid": times(1.0, math.nan, 0.0)}, ValueError, "decrease strictly"),
    "another start": ({"method": "deis2", "grid": times(0.9, 0.5, 0.0)}, ValueError, "grid runs from 0.9.*t = 1"),
    "another end": ({"method": "deis2", "grid": times(1.0, 0.5, 0.1)}, ValueError, "to 0.1.*another t_min="),
    "times of two dimensions": ({"method": "deis2", "grid": times(1.0, 0.0)[None]}, ValueError, "grid has shape"),
    "too few times": ({"method": "deis2", "grid": times(1.0, 0.5, 0.0), "steps": 3}, ValueError, "expected .4,.*leave"),
    "times and nfe that differ": ({"method": "deis2", "grid": times(1.0, 0.5, 0.0), "nfe": 4}, ValueError, "shape .3,"),
    "tolerances on a grid": ({"method": "deis2", "steps": 4, "atol": 1e-3}, ValueError, "atol has no effect.*drop it"),
    "two options without effect": (
        {"method": "deis2", "steps": 4, "rtol": 1e-3, "atol": 1e-3}, ValueError, "rtol and atol has no effect",
    ),
    "stochasticity of a flow": (
        {"method": "dpmpp_2m", "steps": 4, "stochasticity": 0.5}, ValueError, "stochasticity has no effect.*take 'sde'",
    ),
    "stochasticity below zero": ({"method": "sde", "steps": 4, "stochasticity": -1.0}, ValueError, "finite number >="),
    "stochasticity without end": ({"method": "sde", "steps": 4, "stochasticity": math.inf}, ValueError, "a finite num"),
    "a grid for adaptive steps": ({"grid": "karras"}, ValueError, "grid has no effect with method='ode'"),
    "nfe for adaptive steps": ({"method": "dopri5", "nfe": 10}, ValueError, "nfe has no effect"),
    "callbacks for adaptive steps": ({"callback": print}, ValueError, "callback has no effect"),
    "a trajectory of adaptive steps": ({"trajectory": True, "return_info": True}, ValueError, "trajectory has no eff"),
    "stochasticity of adaptive steps": ({"stochasticity": 0.5}, ValueError, "stochasticity has no effect"),
    "a trajectory without info": (
        {"method": "deis2", "steps": 4, "trajectory": True}, ValueError, "needs return_info=True",
    ),
    "a generator too few": (
        {"method": "ddpm", "steps": 4, "generator": generators(3)}, ValueError, "3 generators for 4 rows; pass one",
    ),
    "a generator twice": (
        {"method": "ddpm", "steps": 4, "generator": [*generators(2), *TWICE]}, ValueError, "same generator twice",
    ),
    "a number for a generator": ({"method": "ddpm", "steps": 4, "generator": 0.5}, TypeError, "must be an int"),
    "seeds for generators": ({"method": "ddpm", "steps": 4, "generator": [0, 1, 2, 3]}, TypeError, "sequence of one"),
    "batches of nothing": ({"method": "ddpm", "steps": 4, "batch_size": 0}, ValueError, "batch_size must be at least"),
    "a keyword that nearly exists": ({"method": "ddpm", "steps": 4, "trajectry": True}, TypeError, "'trajectory'"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_sample_refuses(options, kind, message):
    with pytest.raises(kind, match=message):
        ndm_ct.sample(small_model(), 4, **options)


MODEL = small_model()
MOVING = NDM(Bounded(), (2,), transform=MovingScale())
PER_PIXEL = NDM(Bounded(), (2,), volatility=lambda t: t[:, None] * torch.tensor([1.0, 2.0]))

UNBUILT = {
    "RungeKutta": (lambda: RungeKutta(MODEL, "huen"), "method='huen' is unknown; did you mean 'heun'"),
    "churn": (lambda: EDM(MODEL, churn=-1.0), "churn >= 0"),
    "noise_scale": (lambda: EDM(MODEL, noise_scale=0.0), "noise_scale > 0"),
    "noise_range": (lambda: EDM(MODEL, noise_range=(2.0, 1.0)), "ordered noise_range"),
    "noise_range below zero": (lambda: EDM(MODEL, noise_range=(-1.0, 1.0)), "ordered noise_range"),
    "churn of a moving F": (lambda: EDM(MOVING, churn=1.0), "do not move.*MovingScale; use churn=0, or method='sde'"),
    "DPMSolverPP": (lambda: DPMSolverPP(MODEL, 4), "order of DPMSolverPP must be 1 to 3, got 4"),
    "a first order of True": (lambda: DPMSolverPP(MODEL, True), "must be 1 to 3"),
    "an order between two": (lambda: DPMSolverPP(MODEL, 2.0), "must be 1 to 3"),
    "DPMSolverPPSDE": (lambda: DPMSolverPPSDE(MODEL, 3), "order of DPMSolverPPSDE must be 1 to 2"),
    "a volatility per pixel": (lambda: DPMSolverPPSDE(PER_PIXEL), "one number per time.*use method='sde' or 'ddpm'"),
    "DEIS": (lambda: DEIS(MODEL, 5), "order of DEIS must be 1 to 4"),
    "DEIS's variable": (lambda: DEIS(MODEL, 2, "logsnr"), "variable='logsnr' is unknown; did you mean 'log_snr'"),
    "PNDM": (lambda: PNDM(MODEL, 0), "order of PNDM must be 1 to 4"),
    "UniPC": (lambda: UniPC(MODEL, 4), "order of UniPC must be 1 to 3"),
    "UniPC's variant": (lambda: UniPC(MODEL, 2, "bh3"), "variant='bh3' is unknown; did you mean 'bh"),
    "SDE": (lambda: SDE(MODEL, "huen"), "method='huen' is unknown; did you mean 'heun'"),
    "DDPM": (lambda: DDPM(MODEL, "smal"), "variance='smal' is unknown; did you mean 'small'"),
    "DDIM": (lambda: DDIM(MODEL, 1.5), "eta of DDIM must lie in"),
    "steps_within": (lambda: steps_within(DPMSolverPPSingle(MODEL), 1), "DPMSolverPPSingle, which takes 2 evaluations"),
    "time_grid": (lambda: time_grid(SMOOTH, 0.0, 0), "steps must be at least 1"),
    "times at one place": (
        lambda: time_grid(schedules.Rectified(), 1.0 - 1e-15, 9, "karras"), "same place for this schedule; take fewer",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("build", "message"), UNBUILT.values(), ids=UNBUILT)
def test_samplers_are_not_built_from(build, message):
    with pytest.raises(ValueError, match=message):
        build()


NOWHERE = [(0.5, 0.5), (0.4, 0.5), (1.1, 0.5), (0.5, -0.1), (math.nan, 0.5), (0.5, math.nan)]


@pytest.mark.parametrize(("t", "s"), NOWHERE)
def test_steps_go_down_inside_the_interval(t, s):
    for name in ("euler", "ddpm", "deis2", "sde"):
        with pytest.raises(ValueError, match="0 <= s < t <= 1; got t="):
            SAMPLERS[name](MODEL).step(torch.zeros(1, 2), t, s)


@pytest.mark.parametrize("name", NAMES)
def test_a_prediction_that_is_not_finite_is_named(name):
    """With its time and rows, by every sampler."""

    def broken(z, t, until=None):
        return torch.where((t[:, None] < 0.8) & (torch.arange(len(z)) == 2)[:, None], math.nan, 0.5 * z)

    model = NDM(broken, (2,), schedule=SMOOTH)
    with pytest.raises((PredictorError, ndm_ct.SolverError), match=r"at t=0\.[0-7]\d* in batch rows \[2\]"):
        ndm_ct.sample(model, 4, method=method_of(name), steps=4)


@pytest.mark.parametrize("method", stochastic.SCHEMES)
def test_a_slope_that_is_not_finite_is_named(method):
    """Of a finite prediction, too large to be multiplied; with time, step and rows."""

    def large(z, t):
        return torch.where((t[:, None] < 0.8) & (torch.arange(len(z)) == 2)[:, None], 3e38, 0.5 * z)

    with pytest.raises(
        ndm_ct.SolverError, match=r"the field is NaN or infinite at t=0\.\d* in batch rows \[2\]"
    ) as caught:
        walk(SDE(NDM(large, (2,), schedule=SMOOTH), method), torch.zeros(4, 2), times(1.0, 0.9, 0.7, 0.5))
    assert caught.value.rows == (2,)
    assert 0.5 <= caught.value.t < 0.8
    assert caught.value.dt == pytest.approx(0.2)


def test_the_base_class_takes_no_step():
    with pytest.raises(NotImplementedError):
        Sampler(MODEL).step(torch.zeros(1, 2), 0.5, 0.4)
