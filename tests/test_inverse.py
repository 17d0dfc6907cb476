"""Posteriors of normal laws and mixtures, which are known; evidence of the chain itself, which is known too."""

import itertools
import math

import pytest
import torch

import ndm_ct
from ndm_ct import NDM, reference, schedules, transforms
from ndm_ct._core.seeds import make_generator
from ndm_ct.inverse import posterior, vary

SHORT = schedules.LinearLogSNR(-8.0, 6.0)
COV = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
MASK = torch.tensor([True, False])
Y, NOISE = torch.tensor([1.5]), 0.3


def gaussian(**options):
    return reference.Gaussian(torch.zeros(2), COV, schedule=SHORT, **options)


def mixture():
    means = torch.tensor([[-2.0, -2.0], [2.0, 2.0]])
    return reference.GaussianMixture(
        torch.tensor([0.3, 0.7]), means, 0.3 * torch.eye(2).repeat(2, 1, 1), schedule=SHORT
    )


def scaled_time(t):
    return 1.0 + 0.5 * t


def exact(y=1.5, noise=NOISE):
    """Mean and covariance of x given its first coordinate with noise."""
    gain = COV[:, 0] / (COV[0, 0] + noise**2)
    return gain * y, COV - torch.outer(gain, COV[0])


def chain_variance(model, times):
    """Variance of the last state of the ancestral chain of one-dimensional normal data of variance 1."""
    process = model.process
    z = float(process.schedule(torch.ones((), dtype=torch.float64)).sigma) ** 2
    one = torch.ones(1, 1, dtype=torch.float64)
    z += float(process.mean(one, times[:1])) ** 2
    for t, s in itertools.pairwise(times):
        kappa, std = process.transition(s, t)
        x = float(model.predict_x(one, t))
        slope = float(process.mean(one * x, s) + kappa * (1.0 - process.mean(one * x, t)))
        z = slope**2 * z + float(std) ** 2
    return z


@pytest.mark.parametrize("transform", [None, transforms.TimeScaling(scaled_time)], ids=["identity", "scaling"])
def test_moment_matching_is_exact_for_normal_laws(transform):
    found = posterior(gaussian(transform=transform), Y, MASK, 1500, noise=NOISE, method="mmps", steps=120, generator=0)
    mean, cov = exact()
    torch.testing.assert_close(found.mean(0).double(), mean, atol=0.05, rtol=0.0)
    torch.testing.assert_close(torch.cov(found.T).double(), cov, atol=0.035, rtol=0.0)


def test_the_pseudoinverse_is_exact_where_its_covariance_is():
    """For unit normal data its covariance of x given z is the exact one."""
    model = reference.Gaussian(torch.zeros(2), torch.eye(2), schedule=SHORT)
    draws = [
        posterior(model, Y, MASK, 50, noise=NOISE, method=method, steps=20, generator=0) for method in ("pigdm", "mmps")
    ]
    torch.testing.assert_close(*draws, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("transform", [None, transforms.TimeScaling(scaled_time)], ids=["identity", "scaling"])
@pytest.mark.parametrize("volatility", [1.0, 0.6])
def test_the_evidence_is_that_of_the_chain(transform, volatility):
    model = reference.Gaussian(torch.zeros(1), torch.eye(1), schedule=SHORT, transform=transform, volatility=volatility)
    times = torch.linspace(1.0, 0.0, 9, dtype=torch.float64)
    spread = chain_variance(model, times)
    truth = float(torch.distributions.Normal(0.0, math.sqrt(spread + NOISE**2)).log_prob(Y))
    _, info = posterior(
        model, Y, lambda x: x, 2400, noise=NOISE, method="smc", steps=8, generator=1, particles=100, return_info=True
    )
    assert info.runs == 24
    assert info.nfe == 8
    assert abs(info.log_evidence - truth) < 3.0 * info.log_evidence_stderr < 0.3
    continuous = float(torch.distributions.Normal(0.0, math.sqrt(1.0 + NOISE**2)).log_prob(Y))
    assert abs(truth - continuous) > 0.05  # with eight steps the chain is another law than the data


def test_evidence_and_posterior_of_a_mixture_by_a_nonlinear_observation():
    model, radius = mixture(), torch.tensor([8.0])
    observe = lambda x: x.square().sum(1) + x[:, 0]  # noqa: E731
    grid = torch.linspace(-6.0, 6.0, 401, dtype=torch.float64)
    x = torch.cartesian_prod(grid, grid)
    logs = model.log_prob(x, 0.0) + torch.distributions.Normal(observe(x), 0.5).log_prob(radius.double())
    truth = float(logs.logsumexp(0)) + 2.0 * math.log(float(grid[1] - grid[0]))
    right = float(logs.softmax(0)[x[:, 0] > 0.0].sum())
    found, info = posterior(
        model, radius, observe, 800, noise=0.5, method="smc", steps=60, generator=0, return_info=True
    )
    assert abs(info.log_evidence - truth) < 3.0 * info.log_evidence_stderr + 0.1  # and the chain's error at 60 steps
    assert abs(float((found[:, 0] > 0.0).double().mean()) - right) < 0.08
    assert info.effective_sample_size > 100.0


@pytest.mark.parametrize("method", ["dps", "replacement"])
def test_the_observed_mode_is_found(method):
    options = {"resamplings": 3} if method == "replacement" else {"scale": 0.3}
    found = posterior(mixture(), torch.tensor([2.0]), MASK, 300, method=method, steps=60, generator=0, **options)
    assert float((found[:, 1] > 0.0).double().mean()) > 0.97
    torch.testing.assert_close(found.mean(0), torch.tensor([2.0, 2.0]), atol=0.2, rtol=0.0)
    if method == "replacement":
        assert float((found[:, 0] - 2.0).abs().max()) < 0.1


@pytest.mark.parametrize("steps", [7])
def test_an_observation_without_information_leaves_the_chain_alone(steps):
    """For any F: here one that is nonlinear in x."""
    bent = transforms.Neural(lambda x, t: torch.sin(2.0 * x))
    model = NDM(lambda z, t: 0.7 * torch.tanh(z), (2,), transform=bent, schedule=SHORT, checks=False)
    plain = ndm_ct.sample(model, 20, method="ddpm", steps=steps, generator=torch.Generator().manual_seed(3))
    for method in ("pigdm", "dps"):
        options = {"noise": 1e6} if method == "pigdm" else {"scale": 1e-9}
        found = posterior(
            model, Y, MASK, 20, method=method, steps=steps, generator=torch.Generator().manual_seed(3), **options
        )
        torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["mmps", "replacement"])
def test_rows_do_not_depend_on_their_batch(method):
    def seeds():
        return [make_generator(k) for k in range(5)]

    options = {"method": method, "steps": 5} | ({} if method == "replacement" else {"noise": NOISE})
    whole = posterior(gaussian(), Y, MASK, 5, generator=seeds(), **options)
    parts = posterior(gaussian(), Y, MASK, 5, generator=seeds(), batch_size=2, **options)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


def test_particles_do_not_depend_on_the_batch_size():
    options = {"noise": NOISE, "method": "smc", "steps": 5, "particles": 16, "generator": 0, "return_info": True}
    (whole, info), (parts, other) = (posterior(gaussian(), Y, MASK, 32, batch_size=b, **options) for b in (None, 7))
    torch.testing.assert_close(parts, whole)
    assert other.log_evidence == pytest.approx(info.log_evidence, abs=1e-4)


def test_what_is_finished_is_returned():
    model, calls = gaussian(), []

    def observe(x):
        calls.append(len(x))
        if len(calls) > 14:
            raise KeyboardInterrupt
        return x[:, 0]

    with pytest.warns(UserWarning, match="interrupted: 2 of 6 samples are finished"):
        found = posterior(model, 1.5, observe, 6, noise=NOISE, method="pigdm", steps=10, batch_size=2)
    assert found.shape == (2, 2)


MOMENTS = NDM(lambda z, t: (z, z), (2,), prediction="moments", schedule=SHORT, checks=False)


@pytest.mark.parametrize(("change", "message"), [
    ({"method": "pigmd"}, "did you mean 'pigdm'"), ({"noise": None}, "needs noise="), ({"noise": 0.0}, "noise must be"),
    ({"observe": MASK.float()}, "a mask must be boolean"), ({"observe": 3}, "observe must be a function"),
    ({"y": torch.zeros(3)}, "y has 3 values"), ({"y": torch.tensor([math.nan])}, "y finite"),
    ({"noise": torch.ones(2)}, "does not fit y"), ({"scale": 1.0}, "scale has no effect"),
    ({"particles": 3}, "particles has no effect"), ({"resamplings": 3}, "resamplings has no effect"),
    ({"method": "dps"}, "noise has no effect"), ({"method": "replacement"}, "noise has no effect"),
    ({"method": "replacement", "noise": None, "observe": lambda x: x[:, 0]}, "needs a mask"),
    ({"model": MOMENTS}, "predicts x"), ({"model": gaussian(volatility=0.0)}, "volatility above zero"),
    ({"method": "smc", "generator": [make_generator(0), make_generator(1)]}, "particles interact"),
    ({"method": "mmps", "model": gaussian(transform=transforms.LearnedScaling((2,)))}, "got LearnedScaling"),
    ({"n": 0}, "n must be at least 1"), ({"steps": 0}, "steps must be at least 1"), ({"colour": 1}, "colour"),
])  # fmt: skip
def test_unusable_arguments(change, message):
    options = {
        "model": gaussian(), "y": Y, "observe": MASK, "n": 2, "noise": NOISE, "steps": 2, "generator": 0,
    } | change  # fmt: skip
    first = [options.pop(name) for name in ("model", "y", "observe", "n")]
    with pytest.raises((ValueError, TypeError), match=message):
        posterior(*first, **options)


def test_variations_have_the_law_of_their_data():
    model = mixture()
    x = model.sample_data(1500, generator=0)
    for t in (0.3, 0.8):
        found = vary(model, x, t, steps=40, generator=1, batch_size=800)
        assert abs(float((found[:, 0] > 0.0).double().mean()) - 0.7) < 0.05
        torch.testing.assert_close(found.mean(0), x.mean(0), atol=0.15, rtol=0.0)
        torch.testing.assert_close(torch.cov(found.T), torch.cov(x.T), atol=0.35, rtol=0.0)
    near = vary(model, x[:50], 0.05, steps=5, generator=0)
    assert float((near - x[:50]).abs().max()) < 0.5
    assert float((vary(model, x[:50], 1.0, steps=5, generator=0) - x[:50]).abs().max()) > 2.0


@pytest.mark.parametrize(("t", "options", "message"), [
    (0.0, {}, r"t must lie in \(t_min, 1\]"), (1.5, {}, "t must lie"), (0.5, {"method": "ddmp"}, "did you mean 'ddpm'"),
    (0.5, {"steps": 0}, "steps must be"), (0.5, {"batch_size": 0}, "batch_size must be"), ("a", {}, "t must be a"),
])  # fmt: skip
def test_unusable_variations(t, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        vary(mixture(), torch.zeros(2, 2), t, **options)
