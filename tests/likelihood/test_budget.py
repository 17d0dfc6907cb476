"""The error budget of a likelihood: every entry against the error it stands for, on models where that is known."""

import math
from itertools import pairwise

import pytest
import torch
from oracles import SCHEDULES, TRANSFORMS, gaussian, mixture, perturbed, rotated_covariance

import ndm_ct
from ndm_ct import NDM, schedules, transforms
from ndm_ct.divergence import Hutchinson, Quadrature
from ndm_ct.reference import Gaussian

ODE_LIKE = {"exact": "exact", "quadrature": Quadrature(nodes=8, sweeps=4)}


def smooth_gaussian(schedule, d=6, transform=None, t_min=None):
    """Broad enough that the noise at t_min is small against every direction of the data."""
    mean = torch.randn(d, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    return Gaussian(mean, rotated_covariance(d, low=0.5), schedule=schedule, transform=transform, t_min=t_min)


def data_log_prob(model, x):
    """log p_0: the density of the data themselves, no noise and no scaling."""
    marginals = model.marginals
    normal = torch.distributions.MultivariateNormal(marginals.means[0], marginals.covs[0])
    return normal.log_prob(x.flatten(1))


# --- truncation ------------------------------------------------------------------------------------------------------

NOISY = {
    "LinearLogSNR": (schedules.LinearLogSNR(-7.0, 5.0), None),
    "LearnedLogSNR": (perturbed(schedules.LearnedLogSNR(-7.0, 5.0)).double().requires_grad_(False), None),
    "VarianceExploding": (schedules.VarianceExploding(0.03, 30.0), None),
    "VariancePreserving": (schedules.VariancePreserving(), 0.005),
    "SubVariancePreserving": (schedules.SubVariancePreserving(), 0.02),
    "Cosine": (schedules.Cosine(), 0.02),
    "Rectified": (schedules.Rectified(), 0.02),
    "Trigonometric": (schedules.Trigonometric(), 0.02),
}


@pytest.mark.parametrize(("schedule", "t_min"), NOISY.values(), ids=NOISY)
def test_truncation_is_the_change_of_the_density_by_what_is_left_at_t_min(schedule, t_min, generator):
    """To first order, on rows of the data and on rows far outside, where it is large."""
    model = smooth_gaussian(schedule, t_min=t_min)
    x = model.marginals.means[0] + (model.sample_data(24, generator=generator) - model.marginals.means[0]) * 1.5
    _, info = ndm_ct.loglik(model, x, rtol=1e-4, atol=1e-4, return_info=True)
    change = model.log_prob(x) - data_log_prob(model, x)
    assert float(change.abs().max()) > 1e-3
    torch.testing.assert_close(info.truncation, change, rtol=0.05, atol=0.05 * float(change.abs().max()))


class Shear(transforms.Transform):
    """F = x + t A x with a dense A."""

    linear = True

    def forward(self, x, t, **cond):
        matrix = torch.linspace(-1.0, 1.0, 36, dtype=x.dtype).sin().reshape(6, 6)
        return x + t.reshape(-1, 1, 1).to(x.dtype) * (x.reshape(-1, 6) @ matrix).reshape(x.shape)


@pytest.mark.parametrize("transform", [TRANSFORMS["moving scale"](), Shear()], ids=["scale", "shear"])
def test_truncation_counts_what_the_transform_has_done_by_t_min(transform, generator):
    flat = smooth_gaussian(schedules.Rectified())
    mean, cov = flat.marginals.means[0].reshape(2, 3), flat.marginals.covs[0]
    model = Gaussian(mean, cov, schedule=flat.schedule, transform=transform, t_min=0.01)
    x = mean + 2.0 * (model.sample_data(24, generator=generator) - mean)
    _, info = ndm_ct.loglik(model, x, rtol=1e-4, atol=1e-4, return_info=True)
    change = model.log_prob(x) - data_log_prob(model, x)
    without = change - (flat_change(flat, x.flatten(1)))
    assert float(without.abs().max()) > 0.05
    torch.testing.assert_close(info.truncation, change, rtol=0.05, atol=0.05 * float(without.abs().max()))


def flat_change(flat, x):
    """The same change without the transform."""
    return Gaussian(
        flat.marginals.means[0], flat.marginals.covs[0], schedule=flat.schedule, t_min=0.01
    ).log_prob(x) - data_log_prob(flat, x)  # fmt: skip


def test_truncation_by_probes_is_unbiased_above_32_dimensions(generator):
    model = smooth_gaussian(schedules.LinearLogSNR(-5.0, 5.0), d=40)
    mean = model.marginals.means[0]
    x = mean + 2.0 * (model.sample_data(1, generator=generator) - mean)
    _, info = ndm_ct.loglik(
        model, x.expand(400, -1), trace=Quadrature(nodes=2, sweeps=1), rtol=1e-3, atol=1e-3, generator=generator,
        return_info=True,
    )  # fmt: skip
    change = float(model.log_prob(x) - data_log_prob(model, x))
    assert abs(change) > 0.03
    assert float(info.truncation.mean()) == pytest.approx(change, rel=0.05)
    assert 0.0 < float(info.truncation.std()) < 0.2 * abs(change)


def test_truncation_says_when_the_noise_hides_the_data():
    """sigma_0 ten times the data's spread: the estimate is far beyond the one nat up to which it can be believed."""
    model = Gaussian(torch.zeros(4), 1e-4 * torch.eye(4), schedule=schedules.VarianceExploding(0.1, 10.0))
    _, info = ndm_ct.loglik(model, torch.zeros(1, 4), return_info=True)
    assert abs(float(info.truncation)) > 1.0
    sharp = Gaussian(torch.zeros(4), torch.eye(4), schedule=schedules.VarianceExploding(0.01, 10.0))
    _, info = ndm_ct.loglik(sharp, torch.zeros(1, 4), return_info=True)
    assert abs(float(info.truncation)) < 1e-3


def test_truncation_of_a_network_that_does_not_resolve_the_data_is_that_of_its_flow():
    """A velocity of any kind: divided by sigma, its score at t_min is 1,000 times too large."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.SiLU(), torch.nn.Linear(32, 2)).double()
    coarse, fine = (
        ndm_ct.adapters.from_velocity(lambda z, t: layers(torch.cat([z, t[:, None]], 1)), (2,), t_min=t_min)
        for t_min in (1e-3, 1e-5)
    )
    x = torch.randn(6, 2, dtype=torch.float64)
    value, info = ndm_ct.loglik(coarse, x, return_info=True)
    change = value - ndm_ct.loglik(fine, x)
    assert bool(((info.truncation - change).abs() < 3.0 * change.abs() + 1e-3).all())


# --- prior mismatch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_prior_mismatch_is_the_divergence_from_the_prior(name, transform, generator):
    """KL(N(alpha F, sigma^2) || N(0, s^2)) by hand, and against the exact marginal by torch."""
    exact = gaussian(SCHEDULES[name](), transform())
    default = NDM(exact.predictor, exact.event_shape, schedule=exact.schedule, transform=exact.transform)
    x = exact.sample_data(5, generator=generator)
    one = torch.ones(1, dtype=torch.float64)
    c, F = exact.schedule(one), exact.transform(x, one.expand(5))
    s = 50.0 if name == "VarianceExploding" else 1.0
    variance = c.sigma**2 / s**2
    expected = 0.5 * ((c.alpha * F / s) ** 2 + variance - 1.0 - variance.log()).sum(1)
    _, info = ndm_ct.loglik(default, x, rtol=1e-2, atol=1e-2, return_info=True)
    torch.testing.assert_close(info.prior_mismatch, expected, rtol=1e-6, atol=1e-9)
    mean, factor, _ = exact.marginals.components(one)
    own = torch.distributions.MultivariateNormal(c.alpha * F, (c.sigma**2)[:, None] * torch.eye(6).double())
    marginal = torch.distributions.MultivariateNormal(mean[0, 0], scale_tril=factor[0, 0])
    _, info = ndm_ct.loglik(exact, x, rtol=1e-2, atol=1e-2, return_info=True)
    torch.testing.assert_close(
        info.prior_mismatch, torch.distributions.kl_divergence(own, marginal), rtol=1e-6, atol=1e-9
    )


def test_prior_mismatch_of_other_priors_is_one_sample_of_it(generator):
    exact = gaussian(schedules.LinearLogSNR(-6.0, 1.0))
    normal = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(6).double(), 1.3), 1)
    model = NDM(exact.predictor, (6,), schedule=exact.schedule, prior=normal)
    x = exact.sample_data(1, generator=generator)
    _, info = ndm_ct.loglik(
        model, x.expand(2000, -1), trace=Quadrature(2, 1, 1), rtol=1e-2, atol=1e-2, generator=generator,
        return_info=True,
    )  # fmt: skip
    c = exact.schedule(torch.ones(1, dtype=torch.float64))
    q = torch.distributions.Independent(torch.distributions.Normal(c.alpha * x, c.sigma.expand(6)), 1)
    expected = float(torch.distributions.kl_divergence(q, normal))
    mismatch = info.prior_mismatch
    assert abs(float(mismatch.mean()) - expected) < 4 * float(mismatch.std()) / math.sqrt(2000)


# --- the solver's error ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trace", ODE_LIKE.values(), ids=ODE_LIKE)
def test_ode_error_is_that_of_the_solver(trace):
    """At most a third too small on 95 % of rows, not 1,000 times too large; the same probes for the truth."""
    ratios = []
    for make, name in ((gaussian, "LinearLogSNR"), (mixture, "Rectified"), (mixture, "VarianceExploding")):
        model = make(SCHEDULES[name](), TRANSFORMS["moving scale"]())
        x = model.sample_data(20, generator=torch.Generator().manual_seed(1))

        def run(tolerance, model=model, x=x, **options):
            generator = torch.Generator().manual_seed(2)
            return ndm_ct.loglik(model, x, trace=trace, rtol=tolerance, atol=tolerance, generator=generator, **options)

        truth = model.log_prob(x) if trace == "exact" else run(1e-8)
        for tolerance in (1e-5, 1e-6):
            value, info = run(tolerance, return_info=True)
            ratios.append(info.ode_error / ((value - truth).abs() + 1e-10))
    ratio = torch.cat(ratios)
    assert float((ratio > 1.0 / 3.0).double().mean()) >= 0.95
    assert float((ratio < 1000.0).double().mean()) >= 0.95
    assert 1.0 < float(ratio.median()) < 50.0


@pytest.mark.slow
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("make", [gaussian, mixture])
@pytest.mark.parametrize("trace", ODE_LIKE.values(), ids=ODE_LIKE)
def test_ode_error_everywhere(trace, make, transform):
    """The local errors of the exact trace are too small at 1e-4 and above, so they start at 1e-5."""
    ratios = []
    for name in SCHEDULES:
        model = make(SCHEDULES[name](), transform())
        x = model.sample_data(32, generator=torch.Generator().manual_seed(1))

        def run(tolerance, model=model, x=x, **options):
            generator = torch.Generator().manual_seed(2)
            return ndm_ct.loglik(model, x, trace=trace, rtol=tolerance, atol=tolerance, generator=generator, **options)

        truth = model.log_prob(x) if trace == "exact" else run(1e-9)
        for tolerance in (1e-5, 2e-6, 1e-7) if trace == "exact" else (1e-3, 1e-4, 1e-5, 1e-6):
            value, info = run(tolerance, return_info=True)
            ratios.append(info.ode_error / ((value - truth).abs() + 1e-10))
    ratio = torch.cat(ratios)
    covered, small = float((ratio > 1 / 3).double().mean()), float((ratio < 1000.0).double().mean())
    print("covered", covered, "below 1000", small, "median", float(ratio.median()))
    assert covered >= 0.93
    assert small >= 0.95


def test_ode_error_grows_with_the_tolerance_and_weighs_with_the_score(generator):
    """Rows far out have a large score: there the same local error costs more nats."""
    model = gaussian(schedules.LinearLogSNR(-8.0, 5.0))
    x = model.sample_data(16, generator=generator)
    errors = [
        float(ndm_ct.loglik(model, x, rtol=tol, atol=tol, return_info=True)[1].ode_error.mean())
        for tol in (1e-4, 1e-5, 1e-6, 1e-7)
    ]
    assert all(coarse > 2.0 * fine for coarse, fine in pairwise(errors))
    far = model.marginals.means[0] + 8.0 * (x - model.marginals.means[0])
    for trace in ODE_LIKE.values():
        near_error, far_error = (
            ndm_ct.loglik(model, y, trace=trace, rtol=1e-9, atol=1e-5, generator=torch.Generator().manual_seed(1),
                          return_info=True)[1].ode_error.mean() for y in (x, far)
        )  # fmt: skip
        assert float(far_error) > 2.0 * float(near_error)


def test_ode_error_of_many_probes_is_that_of_their_mean():
    """Frozen probes are one integrand: more of them do not add up."""
    model, x = gaussian(), torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    one, many = (
        ndm_ct.loglik(model, x, trace=Hutchinson(n), generator=torch.Generator().manual_seed(1), return_info=True)[1]
        for n in (1, 64)
    )
    assert float(many.ode_error.median()) < 2.0 * float(one.ode_error.median())


@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun", "bosh3", "dopri8"])
def test_torchdiffeq_methods_do_not_know_their_error(method):
    model, x = gaussian(), torch.randn(2, 6, dtype=torch.float64)
    value, info = ndm_ct.loglik(model, x, method=method, rtol=1e-4, atol=1e-4, return_info=True)
    assert bool(info.ode_error.isnan().all())
    assert bool(info.truncation.isfinite().all())
    assert info.row_nfe.tolist() == [info.nfe] * 2
    torch.testing.assert_close(value, model.log_prob(x), rtol=0.0, atol=2e-2)


@pytest.mark.parametrize("trace", ["exact", "hutchinson", "quadrature"])
def test_the_budget_is_counted_and_goes_both_ways(trace, generator):
    model, x = gaussian(schedules.LinearLogSNR(-8.0, 5.0)), torch.randn(3, 6, dtype=torch.float64)
    calls = []

    class Counting:
        def __call__(self, z, t):
            calls.append(len(z))
            return model.predictor(z, t)

    counted = NDM(Counting(), (6,), schedule=model.schedule, prior=model.prior, checks=False)
    z, up = ndm_ct.encode(counted, x, trace=trace, generator=generator, return_info=True)
    assert sum(calls) == int(up.row_nfe.sum())
    assert int(up.row_nfe.max()) == up.nfe
    assert int(up.row_vjps.max()) == up.vjps
    calls.clear()
    _, down = ndm_ct.decode(counted, z, trace=trace, generator=generator, return_info=True)
    assert sum(calls) == int(down.row_nfe.sum())
    # Both report of the same data and nearly the same path.
    torch.testing.assert_close(down.truncation, up.truncation, rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(down.prior_mismatch, up.prior_mismatch, rtol=1e-2, atol=1e-5)
    for info in (up, down):
        assert bool((info.ode_error >= 0.0).all())
        assert float(info.ode_error.max()) < 0.1
        assert not bool(info.failed.any())
