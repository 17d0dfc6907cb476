"""The samplers against the schedulers of diffusers: same network, same times, same noise.

There time is the index of a table of cumulative alpha^2; here the table is a schedule, and the k-th of its K entries
sits at t = k / (K - 1). Where the two define a step differently the test says how, and checks the difference.
"""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from oracles import mixture

from ndm_ct import NDM
from ndm_ct.samplers import DEIS, EDM, PNDM, DPMSolverPP, DPMSolverPPSDE, UniPC, exponential, frozen
from ndm_ct.samplers.base import walk
from ndm_ct.samplers.frozen import DDIM, DDPM
from ndm_ct.samplers.grids import time_grid
from ndm_ct.schedules.fixed import Tabulated

diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]

ENTRIES = 1000
CLOSE = {"rtol": 3e-5, "atol": 3e-5}


def scheduler(name, steps, **options):
    made = getattr(diffusers, f"{name}Scheduler")(
        num_train_timesteps=ENTRIES, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", **options
    )
    made.set_timesteps(steps)
    return made


@pytest.fixture(scope="module")
def model():
    """Three clusters in two dimensions, under the schedulers' own table."""
    table = scheduler("DDPM", 10).alphas_cumprod
    return mixture(Tabulated(table.double()), components=3, d=2)


@pytest.fixture
def start():
    return torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def same_noise(monkeypatch):
    """One sequence of noises for both: a function that starts it anew."""
    noises = torch.randn(40, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def begin(theirs):
        queue = iter(noises)
        monkeypatch.setattr(sys.modules[type(theirs).__module__], "randn_tensor", lambda *_, **__: next(queue), False)
        for module in (frozen, exponential):
            monkeypatch.setattr(module, "normal_like", lambda like, generator: next(queue))
        return noises

    return begin


def time_of(index):
    return torch.as_tensor(index, dtype=torch.float64) / (ENTRIES - 1)


def levels_of(model, index):
    """alpha and sigma at an index."""
    c = model.schedule(time_of(index))
    return float(c.alpha), float(c.sigma)


def x_hat(model, z, index):
    return model.predict_x(z.double(), time_of(index))


def drive(theirs, model, start, **options):
    """All states that a scheduler's own loop goes through, and the indices at which it asks for the network.

    Schedulers whose state is z / alpha say so by scaling the network's input.
    """
    kind = theirs.config.prediction_type
    state, states = start, [start]
    for index in theirs.timesteps:
        scaled = theirs.scale_model_input(state, index)
        estimate = x_hat(model, scaled, index)
        if kind == "epsilon":
            alpha, sigma = levels_of(model, index)
            estimate = (scaled - alpha * estimate) / sigma
        state = theirs.step(estimate, index, state, **options).prev_sample
        states.append(state.double())
    return torch.stack(states)


def ours(sampler, start, indices):
    """All states of a walk over the times of these indices."""
    grid, states = time_of(indices), []
    end = walk(sampler, start, grid, callback=lambda t, z: states.append(z))
    return torch.stack([*states, end])


def test_the_schedule_is_the_table(model):
    table = scheduler("DDPM", 10).alphas_cumprod.double()
    c = model.schedule(time_of(torch.arange(ENTRIES)))
    torch.testing.assert_close(c.alpha**2, table, rtol=1e-10, atol=0.0)
    torch.testing.assert_close(c.sigma**2, 1.0 - table, rtol=1e-8, atol=0.0)


# --- ancestral sampling and DDIM --------------------------------------------------------------------------------------


def test_ddpm_with_the_small_variance(model, start, same_noise):
    """Theirs takes one step more, from the table's first entry to alpha = 1, without noise: the prediction there."""
    theirs = scheduler("DDPM", 10, variance_type="fixed_small", clip_sample=False, prediction_type="sample")
    same_noise(theirs)
    expected = drive(theirs, model, start)
    for sampler in (DDPM(model, variance="small"), DDPM(model), DDIM(model, eta=1.0)):
        same_noise(theirs)
        states = ours(sampler, start, theirs.timesteps)
        torch.testing.assert_close(states, expected[:-1], **CLOSE)
    torch.testing.assert_close(x_hat(model, states[-1], 0), expected[-1], **CLOSE)


def test_ddpm_with_the_large_variance(model, start, same_noise):
    """Here the last step of a walk takes the small variance: nothing would remove the surplus. Theirs does so in its
    step to alpha = 1, which is no more than the prediction."""
    theirs = scheduler("DDPM", 10, variance_type="fixed_large", clip_sample=False, prediction_type="sample")
    noises = same_noise(theirs)
    expected = drive(theirs, model, start)
    same_noise(theirs)
    states = ours(DDPM(model, variance="large"), start, theirs.timesteps)
    torch.testing.assert_close(states[:-1], expected[:-2], **CLOSE)
    (at, st), (a, s) = levels_of(model, 100), levels_of(model, 0)
    large = math.sqrt(1.0 - (at / a) ** 2)
    small = s * math.sqrt(1.0 - (s * at / (a * st)) ** 2)
    assert large > 3.0 * small
    torch.testing.assert_close(expected[-2] - states[-1], (large - small) * noises[len(states) - 2], **CLOSE)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(eta, model, start, same_noise):
    """Their last step leaves the table's first entry, either for itself or for alpha = 1."""
    for to_one in (False, True):
        theirs = scheduler("DDIM", 10, clip_sample=False, prediction_type="sample", set_alpha_to_one=to_one)
        same_noise(theirs)
        expected = drive(theirs, model, start, eta=eta)
        same_noise(theirs)
        states = ours(DDIM(model, eta), start, theirs.timesteps)
        torch.testing.assert_close(states, expected[:-1], **CLOSE)
        last = x_hat(model, states[-1], 0) if to_one else states[-1]
        torch.testing.assert_close(expected[-1], last, **CLOSE)


def test_clipping_is_a_matter_of_the_network(model, start):
    """Theirs clips the predicted data by default, here a predictor does that itself; the noise then follows from the
    clipped data, theirs only if it is asked to."""

    def clipped(z, t):
        return model.predictor(z, t).clamp(-1.0, 1.0)

    clipping = NDM(clipped, (2,), schedule=model.schedule)
    theirs = scheduler("DDIM", 10, clip_sample=True, prediction_type="sample", set_alpha_to_one=False)
    expected = drive(theirs, model, start, use_clipped_model_output=True)
    states = ours(DDIM(clipping), start, theirs.timesteps)
    torch.testing.assert_close(states, expected[:-1], **CLOSE)
    assert float((drive(theirs, model, start) - expected).abs().max()) > 0.1
    assert float((ours(DDIM(model), start, theirs.timesteps) - states).abs().max()) > 0.1


def test_euler_ancestral(model, start, same_noise):
    """Their state is z / alpha; the last step goes to sigma = 0."""
    theirs = scheduler("EulerAncestralDiscrete", 10)
    scale = torch.tensor([levels_of(model, index)[0] for index in theirs.timesteps], dtype=torch.float64)
    same_noise(theirs)
    expected = drive(theirs, model, start / scale[0])
    same_noise(theirs)
    states = ours(DDIM(model, eta=1.0), start, theirs.timesteps)
    torch.testing.assert_close(states, expected[:-1] * scale[:, None, None], **CLOSE)
    torch.testing.assert_close(x_hat(model, states[-1], 0), expected[-1], **CLOSE)


# --- Euler and Heun in the noise level --------------------------------------------------------------------------------


def test_euler_is_ddim(model, start):
    theirs = scheduler("EulerDiscrete", 10)
    scale = torch.tensor([levels_of(model, index)[0] for index in theirs.timesteps], dtype=torch.float64)
    expected = drive(theirs, model, start / scale[0])
    states = ours(DDIM(model), start, theirs.timesteps)
    torch.testing.assert_close(states, expected[:-1] * scale[:, None, None], **CLOSE)
    torch.testing.assert_close(x_hat(model, states[-1], 0), expected[-1], **CLOSE)


def test_heun_is_edm(model, start):
    """Two calls of theirs are one step; the last, to sigma = 0, is Euler's in both."""
    theirs = scheduler("HeunDiscrete", 10)
    indices = torch.cat([theirs.timesteps[:1], theirs.timesteps[1::2]])
    scale = torch.tensor([levels_of(model, index)[0] for index in indices], dtype=torch.float64)
    expected = drive(theirs, model, start / scale[0])
    states = ours(EDM(model), start, indices)
    torch.testing.assert_close(states, expected[:-1:2] * scale[:, None, None], **CLOSE)
    torch.testing.assert_close(x_hat(model, states[-1], 0), expected[-1], **CLOSE)
    assert float((states - ours(DDIM(model), start, indices)).abs().max()) > 0.05


def test_between_the_entries_of_the_table(model, start):
    """Theirs interpolates sigma / alpha linearly, here the log-SNR is smooth: at an index of 142.7 nearly the same.

    At the times that have their noise, the steps are the same.
    """
    theirs = scheduler("EulerDiscrete", 8)
    assert float(theirs.timesteps[-2]) == pytest.approx(999.0 / 7.0)
    noise = theirs.sigmas[:-1].double()
    c = model.schedule(time_of(theirs.timesteps))
    apart = (noise.log() - (c.sigma / c.alpha).log()).abs()
    assert 1e-7 < float(apart.max()) < 1e-4
    times = model.schedule.time_at(torch.atan(noise))
    theirs.timesteps = (ENTRIES - 1) * times
    scale = model.schedule(times).alpha
    expected = drive(theirs, model, start / scale[0])
    states = ours(DDIM(model), start, theirs.timesteps)
    torch.testing.assert_close(states, expected[:-1] * scale[:, None, None], **CLOSE)


# --- DPM-Solver++ -----------------------------------------------------------------------------------------------------


def multistep(name, steps, order, **options):
    """To the end of the table, in full order throughout."""
    options = {"final_sigmas_type": "sigma_min"} | options if name != "DEISMultistep" else options
    return scheduler(
        name, steps, solver_order=order, prediction_type="sample", **({"lower_order_final": False} | options)
    )


def indices_of(theirs):
    return [*theirs.timesteps.tolist(), 0]


@pytest.mark.parametrize("order", [1, 2])
def test_dpm_solver(order, model, start):
    theirs = multistep("DPMSolverMultistep", 9, order)
    states = ours(DPMSolverPP(model, order), start, indices_of(theirs))
    torch.testing.assert_close(states, drive(theirs, model, start), **CLOSE)


def along(sampler, states, indices):
    """Where every step of ours ends if it starts from the states of theirs."""
    times = [time_of(index) for index in indices]
    return torch.stack([sampler.step(z, *pair) for z, pair in zip(states, itertools.pairwise(times), strict=False)])


def test_dpm_solver_of_third_order(model, start, monkeypatch):
    """Theirs halves the quadratic term of the integral of the parabola through three predictions."""
    theirs = multistep("DPMSolverMultistep", 9, 3)
    expected, indices = drive(theirs, model, start), indices_of(theirs)
    ends = along(DPMSolverPP(model, 3), expected, indices)
    torch.testing.assert_close(ends[:2], expected[1:3], **CLOSE)
    lam = [math.log(a / s) for a, s in (levels_of(model, index) for index in indices)]
    D = [x_hat(model, state, index) for state, index in zip(expected, indices, strict=True)]
    largest = 0.0
    for j in range(2, len(ends)):
        slopes = [(D[i + 1] - D[i]) / (lam[i + 1] - lam[i]) for i in (j - 2, j - 1)]
        curvature = 2.0 * (slopes[1] - slopes[0]) / (lam[j] - lam[j - 2])
        h = lam[j + 1] - lam[j]
        # alpha_s e^-h int_0^h e^u u^2 / 2 du, for one half of it
        weight = 0.5 * levels_of(model, indices[j + 1])[0] * (0.5 * h**2 - h + 1.0 - math.exp(-h))
        torch.testing.assert_close(ends[j] - expected[j + 1], weight * curvature, rtol=1e-3, atol=1e-5)
        largest = max(largest, float((weight * curvature).abs().max()))
    assert largest > 0.01
    whole = exponential.derivatives

    def public(known, h):
        first, second = whole(known, h)
        return first, 0.5 * second

    monkeypatch.setattr(exponential, "derivatives", public)
    torch.testing.assert_close(ours(DPMSolverPP(model, 3), start, indices), expected, **CLOSE)


@pytest.mark.parametrize("order", [2, 3])
def test_their_last_steps_of_lower_order(order, model, start):
    """Below 15 steps theirs lowers the order towards the end by default, here it stays."""
    theirs = multistep("DPMSolverMultistep", 9, order, lower_order_final=True)
    expected, indices = drive(theirs, model, start), indices_of(theirs)
    plain = drive(multistep("DPMSolverMultistep", 9, order), model, start)
    torch.testing.assert_close(expected[: 11 - order], plain[: 11 - order], rtol=0.0, atol=0.0)
    last = DPMSolverPP(model, 1).step(expected[-2], time_of(indices[-2]), time_of(0))
    torch.testing.assert_close(last, expected[-1], **CLOSE)
    assert float((expected[-1] - plain[-1]).abs().max()) > 1e-3


def test_their_last_step_to_no_noise(model, start):
    """By default theirs ends at sigma = 0: the last step is the prediction, from the last index above zero."""
    theirs = multistep("DPMSolverMultistep", 9, 2, final_sigmas_type="zero")
    expected, indices = drive(theirs, model, start), indices_of(theirs)
    states = ours(DPMSolverPP(model, 2), start, indices)
    torch.testing.assert_close(states[:-1], expected[:-1], **CLOSE)
    torch.testing.assert_close(x_hat(model, states[-2], indices[-2]), expected[-1], **CLOSE)


def test_their_times_are_rounded_to_entries(model, start):
    """So their steps in time are not even; at the same times the steps are the same."""
    theirs = multistep("DPMSolverMultistep", 7, 2)
    indices = indices_of(theirs)
    assert len({a - b for a, b in itertools.pairwise(indices)}) == 2
    states = ours(DPMSolverPP(model, 2), start, indices)
    torch.testing.assert_close(states, drive(theirs, model, start), **CLOSE)


@pytest.mark.parametrize("order", [1, 2])
def test_dpm_solver_of_the_sde(order, model, start, same_noise):
    theirs = multistep("DPMSolverMultistep", 9, order, algorithm_type="sde-dpmsolver++")
    same_noise(theirs)
    expected = drive(theirs, model, start)
    same_noise(theirs)
    states = ours(DPMSolverPPSDE(model, order), start, indices_of(theirs))
    torch.testing.assert_close(states, expected, **CLOSE)


OPTIONS = {"use_karras_sigmas": "karras", "use_lu_lambdas": "logsnr", "use_exponential_sigmas": "logsnr"}


@pytest.mark.parametrize(("option", "grid"), OPTIONS.items())
def test_grids_in_the_noise_level(option, grid, model):
    """N of their noise levels reach the table's end, so that the N-th step stays where it is; here N steps do."""
    noise = multistep("DPMSolverMultistep", 10, 2, **{option: True}).sigmas.double()
    c = model.schedule(time_grid(model.schedule, 0.0, 9, grid))
    torch.testing.assert_close(c.sigma / c.alpha, noise[:-1], rtol=1e-5, atol=0.0)
    assert float(noise[-1]) == pytest.approx(float(noise[-2]))


# --- DEIS, UniPC, PNDM ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order, model, start):
    theirs = multistep("DEISMultistep", 9, order)
    states = ours(DEIS(model, order, variable="log_snr"), start, indices_of(theirs))
    torch.testing.assert_close(states, drive(theirs, model, start), **CLOSE)


def nodes_between(start, end):
    """Nodes and weights of a quadrature."""
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(200))
    return 0.5 * (start + end) + 0.5 * (end - start) * nodes, 0.5 * (end - start) * weights


def test_deis_of_the_paper_extrapolates_in_time(model, start):
    """tAB has polynomials in t, theirs in log(sigma / alpha): the weight of the older prediction differs."""
    theirs = multistep("DEISMultistep", 9, 2)
    expected, indices = drive(theirs, model, start), indices_of(theirs)
    ends, levels = along(DEIS(model, 2), expected, indices), [levels_of(model, index) for index in indices]
    torch.testing.assert_close(ends[0], expected[1], **CLOSE)
    epsilon = [(z - a * x_hat(model, z, index)) / s for z, index, (a, s) in zip(expected, indices, levels, strict=True)]
    noise, largest = [s / a for a, s in levels], 0.0
    for j in range(1, len(ends)):
        rho, weight = nodes_between(noise[j], noise[j + 1])
        in_time = (ENTRIES - 1) * model.schedule.time_at(torch.atan(rho)) - indices[j]
        in_log_noise = torch.log(rho / noise[j])
        weights = [
            float((weight * in_time).sum()) / (indices[j - 1] - indices[j]),
            float((weight * in_log_noise).sum()) / math.log(noise[j - 1] / noise[j]),
        ]
        difference = levels[j + 1][0] * (weights[0] - weights[1]) * (epsilon[j - 1] - epsilon[j])
        torch.testing.assert_close(ends[j] - expected[j + 1], difference, rtol=1e-2, atol=1e-5)
        largest = max(largest, float(difference.abs().max()))
    assert largest > 0.01


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order, variant, model, start):
    theirs = multistep("UniPCMultistep", 9, order, solver_type=variant)
    states = ours(UniPC(model, order, variant), start, indices_of(theirs))
    torch.testing.assert_close(states, drive(theirs, model, start), **CLOSE)


def test_unipc_with_their_last_steps_of_lower_order(model, start):
    """Theirs lowers it by default, whatever the number of steps; before that the steps are the same."""
    expected = drive(multistep("UniPCMultistep", 9, 3, lower_order_final=True), model, start)
    theirs = multistep("UniPCMultistep", 9, 3)
    states = ours(UniPC(model, 3), start, indices_of(theirs))
    torch.testing.assert_close(states[:8], expected[:8], **CLOSE)
    assert float((states[8:] - expected[8:]).abs().amax((1, 2)).min()) > 1e-4


def test_pndm(model, start):
    """Runge-Kutta steps of four calls, then the linear multistep; their last step leaves the first entry for itself."""
    theirs = scheduler("PNDM", 10)
    expected = drive(theirs, model, start)
    at_steps = torch.cat([expected[:1], expected[4:13:4], expected[13:]])
    states = ours(PNDM(model), start, range(900, -1, -100))
    torch.testing.assert_close(states, at_steps[:-1], **CLOSE)
    torch.testing.assert_close(at_steps[-1], at_steps[-2], **CLOSE)


def test_pndm_without_runge_kutta(model, start):
    """Theirs repeats its first step with the mean of the predictions at both ends, for one evaluation more, and keeps
    only the first of them; here the first step is DDIM's."""
    theirs = scheduler("PNDM", 10, skip_prk_steps=True)
    expected = drive(theirs, model, start)
    sampler, times = PNDM(model, warmup=False), [float(time_of(index)) for index in range(900, -1, -100)]
    first = sampler.step(start, times[0], times[1])
    torch.testing.assert_close(first, expected[1], **CLOSE)
    (a0, s0), (a1, s1) = levels_of(model, 900), levels_of(model, 800)
    ends = [(z - a * x_hat(model, z, k)) / s for z, k, a, s in ((start, 900, a0, s0), (first, 800, a1, s1))]
    state = a1 / a0 * start + a1 * (s1 / a1 - s0 / a0) * 0.5 * (ends[0] + ends[1])
    torch.testing.assert_close(state, expected[2], **CLOSE)
    assert float((state - first).abs().max()) > 1e-3
    for k, (t, s) in enumerate(itertools.pairwise(times[1:])):
        state = sampler.step(state, t, s)
        torch.testing.assert_close(state, expected[3 + k], **CLOSE)
