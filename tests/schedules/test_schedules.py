"""Laws that hold for every schedule, and the identities that relate them to published ones."""

import math

import pytest
import torch
from oracles import ALL_SCHEDULES, ddpm_table

from ndm_ct import NDM, schedules
from ndm_ct._core.config import from_config, to_config


def interior(schedule, n=101):
    return torch.linspace(schedule.safe_t_min, 1.0, n, dtype=torch.float64)[1:-1]


@pytest.mark.parametrize("make", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
def test_derivatives_are_those_of_alpha_and_sigma(make):
    schedule = make()
    t = interior(schedule).requires_grad_()
    c = schedule(t)
    for value, derivative in ((c.alpha, c.dalpha), (c.sigma, c.dsigma), (c.gamma, c.dgamma), (c.angle, c.dangle)):
        if value.requires_grad:
            (exact,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        else:
            exact = torch.zeros_like(t)  # alpha = 1 of the variance-exploding schedule
        torch.testing.assert_close(derivative, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
def test_noise_grows_and_derived_quantities_agree(make):
    schedule = make()
    c = schedule(interior(schedule))
    assert bool((c.gamma.diff() > 0).all())
    torch.testing.assert_close(c.gamma, (c.sigma**2 / c.alpha**2).log(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(c.inverse_dgamma, 1.0 / c.dgamma)
    torch.testing.assert_close(c.snr_rate, torch.exp(-c.gamma) * c.dgamma, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(c.dlog_sigma, c.dsigma / c.sigma)


@pytest.mark.parametrize("make", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
def test_time_at_inverts_the_angle(make):
    schedule = make()
    t = interior(schedule)
    torch.testing.assert_close(schedule.time_at(schedule(t).angle.detach()), t, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
def test_ends_are_finite_where_they_can_be(make):
    schedule = make()
    with torch.no_grad():
        c = schedule(torch.tensor([schedule.safe_t_min, 1.0], dtype=torch.float64))
    for value in (c.alpha, c.sigma, c.dalpha, c.dsigma, c.dlog_sigma, c.snr_rate, c.angle, c.dangle, c.inverse_dgamma):
        assert bool(torch.isfinite(value).all())
    assert float(c.sigma[0]) > 0.0
    if schedule.safe_t_min > 0.0:
        assert float(c.sigma[0] / c.alpha[0]) == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize("name", ["VariancePreserving", "LinearLogSNR", "Cosine", "Trigonometric", "LearnedLogSNR"])
def test_variance_preserving_schedules_preserve_variance(name):
    schedule = ALL_SCHEDULES[name]()
    c = schedule(torch.linspace(0.0, 1.0, 51, dtype=torch.float64))
    torch.testing.assert_close(c.alpha**2 + c.sigma**2, torch.ones_like(c.alpha), rtol=1e-13, atol=0.0)


@pytest.mark.parametrize(
    "name", ["VariancePreserving", "SubVariancePreserving", "Cosine", "Rectified", "Trigonometric"]
)
def test_no_cancellation_near_the_ends(name):
    """Against 60-digit arithmetic: the relative error stays at rounding where 1 - alpha^2 would have lost all."""
    import mpmath

    mpmath.mp.dps = 60

    def exact(t):
        t = mpmath.mpf(float(t))
        if name in ("VariancePreserving", "SubVariancePreserving"):
            integral = t * mpmath.mpf("0.1") + t**2 / 2 * (20 - mpmath.mpf("0.1"))
            noise = 1 - mpmath.exp(-integral)
            return mpmath.exp(-integral / 2), mpmath.sqrt(noise) if name == "VariancePreserving" else noise
        if name == "Cosine":
            s = mpmath.mpf("0.008")
            alpha = mpmath.cos(mpmath.pi / 2 * (t + s) / (1 + s)) / mpmath.cos(mpmath.pi / 2 * s / (1 + s))
            return alpha, mpmath.sqrt(1 - alpha**2)
        if name == "Rectified":
            return 1 - t, t
        return mpmath.cos(mpmath.pi * t / 2), mpmath.sin(mpmath.pi * t / 2)

    times = torch.tensor([1e-12, 1e-8, 1e-4, 0.5, 1 - 1e-4, 1 - 1e-8], dtype=torch.float64)
    c = ALL_SCHEDULES[name]()(times)
    for t, alpha, sigma in zip(times, c.alpha, c.sigma, strict=True):
        exact_alpha, exact_sigma = exact(t)
        assert abs(float(alpha) / float(exact_alpha) - 1.0) < 1e-12
        assert abs(float(sigma) / float(exact_sigma) - 1.0) < 1e-12


def test_sub_variance_preserving_volatility_is_that_of_the_sub_vp_sde():
    """g^2 = beta (1 - exp(-2B)) of score SDE equals sigma^2 gamma'."""
    schedule = schedules.SubVariancePreserving()
    t = interior(schedule)
    c = schedule(t)
    integral, beta = 0.1 * t + 0.5 * 19.9 * t**2, 0.1 + 19.9 * t
    torch.testing.assert_close(c.sigma**2 * c.dgamma, beta * -torch.expm1(-2.0 * integral), rtol=1e-9, atol=0.0)


def test_variance_preserving_volatility_is_beta():
    schedule = schedules.VariancePreserving()
    t = interior(schedule)
    c = schedule(t)
    torch.testing.assert_close(c.sigma**2 * c.dgamma, 0.1 + 19.9 * t, rtol=1e-9, atol=0.0)


def test_tabulated_passes_through_its_table_in_any_model_dtype():
    table = ddpm_table()
    model = NDM(lambda z, t: z, (1,), schedule=schedules.Tabulated(table)).half()
    t = torch.arange(1000, dtype=torch.float64) / 999
    c = model.schedule(t)
    torch.testing.assert_close(c.alpha**2, table, rtol=1e-11, atol=0.0)
    between = model.schedule(torch.linspace(0, 1, 20011, dtype=torch.float64))
    assert bool((between.gamma.diff() > 0).all())
    assert bool((between.dgamma > 0).all())


def test_learned_schedule_starts_near_linear_keeps_its_ends_and_learns():
    schedule = schedules.LearnedLogSNR(-13.3, 5.0)
    t = torch.linspace(0.0, 1.0, 21, dtype=torch.float64)
    linear = -13.3 + 18.3 * t
    assert float((schedule.gamma(t) - linear).detach().abs().max()) < 0.5
    moved = ALL_SCHEDULES["LearnedLogSNR"]()
    ends = moved.gamma(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([-13.3, 5.0], dtype=torch.float64))
    moved.gamma(t).square().sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.abs().sum() > 0) for parameter in moved.parameters())


@pytest.mark.parametrize("make", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
def test_configuration_round_trip(make):
    schedule = make()
    copy = from_config(to_config(schedule))
    copy.load_state_dict(schedule.state_dict())
    t = interior(schedule)
    assert torch.equal(copy.gamma(t), schedule.gamma(t))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: schedules.LinearLogSNR(5.0, -5.0), "gamma_min must be below gamma_max"),
        (lambda: schedules.VarianceExploding(0.0, 1.0), "sigma_min must be positive"),
        (lambda: schedules.VariancePreserving(2.0, 1.0), "beta_min <= beta_max"),
        (lambda: schedules.Cosine(-1.0), "offset must lie in"),
        (lambda: schedules.Tabulated([0.5]), "at least 2 entries"),
        (lambda: schedules.Tabulated([0.5, 0.6]), "decrease strictly"),
        (lambda: schedules.LearnedLogSNR(features=0), "features must be at least 1"),
        (lambda: schedules.LinearLogSNR(-math.inf, 0.0), "both finite"),
    ],
)
def test_impossible_schedules_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
