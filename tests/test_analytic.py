"""The optimal variance: for isotropic Gaussian data residuals are known and a reverse step of any length is exact."""

import copy
import itertools
import math

import pytest
import torch
from oracles import SCHEDULES, TRANSFORMS, gaussian, mixture, rotated_covariance

import ndm_ct
from ndm_ct import NDM, schedules
from ndm_ct.samplers import NAMES
from ndm_ct.samplers.frozen import DDPM, _Interpolant, estimate_residuals
from ndm_ct.samplers.grids import time_grid
from ndm_ct.schedules.base import levels
from ndm_ct.transforms import Blur

SMOOTH = schedules.LinearLogSNR(-5.0, 4.0)
SPREAD = 0.8
"""Variance of the isotropic data."""


def isotropic(schedule=SMOOTH, transform=None, d=3, head="x", **kwargs):
    """Data N(m, SPREAD I), with the exact prediction as either head."""
    mean = torch.linspace(-1.0, 1.5, d, dtype=torch.float64)
    model = ndm_ct.reference.Gaussian(
        mean, SPREAD * torch.eye(d), schedule=schedule, transform=transform, **(kwargs if head == "x" else {})
    )
    if head == "x":
        return model
    other = NDM(
        lambda z, t: model.moments(z, t.double()), (d,), transform=transform, schedule=schedule, prediction="moments",
        prior=model.prior, **kwargs,
    )  # fmt: skip
    other.marginals = model.marginals
    return other


def exact_moments(model, times):
    """A, B, C: the posterior variance of x, times k^2, k k', k'^2."""
    c = model.schedule(times)
    one = torch.ones(len(times), model.event_shape[0], dtype=torch.float64)
    scale, rate = (part[:, 0] for part in model.transform.with_derivative(one, times))
    posterior = SPREAD * c.sigma**2 / (c.alpha**2 * scale**2 * SPREAD + c.sigma**2)
    return torch.stack([scale**2, scale * rate, rate**2]) * posterior


def with_exact_table(model, times):
    times = times.sort().values
    moments = exact_moments(model, times)
    model.residuals = torch.cat([times[None], moments, torch.zeros_like(moments)])
    return model


def marginal(model, t):
    mean, factor, _ = model.marginals.components(torch.tensor([t], dtype=torch.float64))
    return mean[0, 0], factor[0, 0] @ factor[0, 0].mT


def propagate(sampler, grid, monkeypatch):
    """Mean and covariance at the end of a walk from the exact p_1: every step is affine in state and noise."""
    d = sampler.model.event_shape[0]
    eye, zero = torch.eye(d, dtype=torch.float64), torch.zeros(1, d, dtype=torch.float64)
    start, noise = torch.cat([zero, eye, zero.expand(d, d)]), torch.cat([zero, zero.expand(d, d), eye])
    monkeypatch.setattr("ndm_ct.samplers.frozen.normal_like", lambda z, generator: noise)
    mean, cov = marginal(sampler.model, 1.0)
    sampler.prepare(grid)
    for t, s in itertools.pairwise(grid.tolist()):
        out = sampler.step(start, t, s)
        by_state, by_noise = (out[1 : 1 + d] - out[0]).mT, (out[1 + d :] - out[0]).mT
        mean, cov = out[0] + by_state @ mean, by_state @ cov @ by_state.mT + by_noise @ by_noise.mT
    return mean, cov


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["x", "moments"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("name", ["LinearLogSNR", "Rectified"])
def test_measured_moments_are_the_posterior_variance_within_their_standard_errors(name, transform, head, generator):
    model = isotropic(SCHEDULES[name](), transform(), d=2, head=head)
    data = isotropic(d=2).sample_data(500, generator=generator)
    found = estimate_residuals(model, data, times=48, generator=generator, batch_size=200)
    assert float(found.times[0]) == model.t_min
    assert float(found.times[-1]) == 1.0
    exact = exact_moments(model, found.times)
    score = ((found.moments - exact) / found.stderr)[0]
    assert float(score.abs().max()) < 4.5
    assert 0.7 < float(score.square().mean().sqrt()) < 1.35
    torch.testing.assert_close(found.stderr[0] / exact[0], torch.full((48,), 500**-0.5).double(), rtol=0.4, atol=0.0)
    # The residuals of F and of its slope are proportional here, so the others are exact multiples.
    torch.testing.assert_close(found.moments / found.moments[0], exact / exact[0])
    torch.testing.assert_close(model.residuals, torch.cat([found.times[None], found.moments, found.stderr]))


def test_a_wrong_prediction_adds_its_square(generator):
    """Not the posterior variance but the variance for the mean at hand."""
    exact, bias = isotropic(), 0.3
    model = NDM(lambda z, t: exact.predict_x(z, t.double()) + bias, (3,), schedule=SMOOTH)
    data = exact.sample_data(400, generator=generator)
    found = estimate_residuals(model, data, times=8, generator=generator)
    score = (found.moments[0] - exact_moments(exact, found.times)[0] - bias**2) / found.stderr[0]
    assert float(score.abs().max()) < 4.0


def test_it_is_analytic_dpms_identity(generator):
    """A = (sigma^2 / alpha^2) (1 - sigma^2 E|score|^2 / d) for an exact prediction, here of a mixture."""
    model, n = mixture(SMOOTH, d=4), 1500
    x = model.sample_data(n, generator=generator)
    times = torch.tensor([0.2, 0.5, 0.8, 1.0], dtype=torch.float64)
    found = estimate_residuals(model, x, times=times, generator=generator)
    for j, t in enumerate(times):
        c = SMOOTH(t)
        z = model.process.sample(x, t, generator=generator)
        own = (c.sigma / c.alpha) ** 2 * (1.0 - c.sigma**2 * model.score(z, t).square().mean(1))
        stderr = (own.var() / n + found.stderr[0, j] ** 2).sqrt()
        assert abs(float((found.moments[0, j] - own.mean()) / stderr)) < 4.0


def test_rows_take_their_own_conditioning(generator):
    """The average over a batch does not depend on how it is cut."""
    shift = torch.tensor([-2.0, 1.0, 3.0, 0.5, 0.0], dtype=torch.float64)
    x = shift[:, None].expand(5, 2).contiguous()

    def predictor(z, t, shift):
        return shift[:, None].expand(z.shape)

    model = NDM(predictor, (2,), schedule=SMOOTH)
    for batch_size in (1, 2, 256):
        found = estimate_residuals(model, x, times=3, batch_size=batch_size, generator=generator, shift=shift)
        assert not bool(found.moments.any())
    found = estimate_residuals(model, x, times=3, batch_size=2, generator=generator, shift=shift.flip(0))
    errors = (shift - shift.flip(0)).square()
    torch.testing.assert_close(found.moments[0], errors.mean().expand(3))
    torch.testing.assert_close(found.stderr[0], (errors.var(correction=0) / 4.0).sqrt().expand(3))
    single = estimate_residuals(model, x[:1], times=3, shift=shift[:1])
    assert bool(single.stderr.isnan().all())


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_between_its_times_the_table_is_smooth_and_accurate(name, transform):
    model = isotropic(SCHEDULES[name](), transform())
    with_exact_table(model, time_grid(model.schedule, model.t_min, 63, "logsnr"))
    table = _Interpolant(model)
    inside = model.t_min + (1.0 - model.t_min) * torch.linspace(0.0, 1.0, 301).double()
    own = torch.tensor([table(level) for level in levels(model.schedule, inside)], dtype=torch.float64).mT
    exact = exact_moments(model, inside)
    torch.testing.assert_close(own, exact, rtol=2e-3, atol=1e-12)
    assert bool((own[1] ** 2 <= own[0] * own[2] * (1.0 + 1e-9)).all())
    knots = levels(model.schedule, model.residuals[0])
    own = torch.tensor([table(level) for level in knots], dtype=torch.float64).mT
    torch.testing.assert_close(own, exact_moments(model, model.residuals[0]), rtol=1e-7, atol=1e-12)


def test_beyond_its_times_the_table_follows_the_share_of_noise():
    """A over sigma^2 / (alpha^2 + sigma^2) stays what it was at the end; two times are a line."""
    model = with_exact_table(isotropic(), torch.tensor([0.4, 0.6], dtype=torch.float64))
    table = _Interpolant(model)
    low, end, high, top = levels(SMOOTH, torch.tensor([0.2, 0.4, 0.6, 0.9], dtype=torch.float64))
    assert table(low)[0] == pytest.approx(table(end)[0] * low.sigma**2 / end.sigma**2)
    assert table(top)[0] == pytest.approx(table(high)[0] * top.sigma**2 / high.sigma**2)


# --- the step --------------------------------------------------------------------------------------------------------


def eta(t):
    return 0.5 + t


@pytest.mark.parametrize("volatility", [0.0, 0.7, 1.0, eta])
@pytest.mark.parametrize("head", ["x", "moments"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("name", ["LinearLogSNR", "Rectified", "VarianceExploding"])
def test_few_steps_end_at_the_exact_law_of_isotropic_data(name, transform, head, volatility, monkeypatch):
    schedule = SMOOTH if name == "LinearLogSNR" else SCHEDULES[name]()
    model = isotropic(schedule, transform(), head=head, volatility=volatility)
    mean, cov = marginal(model, model.t_min)
    for steps in (1, 5):
        grid = time_grid(model.schedule, model.t_min, steps, "logsnr")
        with_exact_table(model, grid)
        own_mean, own = propagate(DDPM(model, "analytic"), grid, monkeypatch)
        torch.testing.assert_close(own_mean, mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(own, cov, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [5, 10])
def test_where_the_fixed_variances_miss(steps, monkeypatch):
    model = isotropic()
    grid = time_grid(SMOOTH, model.t_min, steps)
    with_exact_table(model, grid)
    _, cov = marginal(model, model.t_min)

    def variance(name):
        return float((propagate(NAMES[name](model), grid, monkeypatch)[1] / cov).diagonal().mean())

    assert variance("ddpm_analytic") == pytest.approx(1.0, abs=1e-6)
    assert variance("ddpm_small") < 0.85
    assert variance("ddpm_large") > 1.02
    assert variance("ddpm") == pytest.approx(variance("ddpm_small"))


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_of_anisotropic_data_the_mean_variance_is_exact(transform, monkeypatch):
    """One step from the exact p_t: the trace of the covariance, which is what one number can get right."""
    cov, t, s = rotated_covariance(4), 0.7, 0.45
    model = ndm_ct.reference.Gaussian(torch.zeros(4), cov, schedule=SMOOTH, transform=transform())
    times = torch.tensor([s, t], dtype=torch.float64)
    c, one = SMOOTH(times), torch.ones(2, 1).double()
    scale, rate = (part for part in model.transform.with_derivative(one, times))
    spectrum = torch.linalg.eigvalsh(cov)
    signal = (c.alpha[:, None] * scale) ** 2
    posterior = (spectrum * c.sigma[:, None] ** 2 / (signal * spectrum + c.sigma[:, None] ** 2)).mean(1)
    moments = torch.stack([scale**2, scale * rate, rate**2])[:, :, 0] * posterior
    model.residuals = torch.cat([times[None], moments, torch.zeros_like(moments)])
    sampler = DDPM(model, "analytic")
    eye, zero = torch.eye(4, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
    noise = torch.cat([zero, 0.0 * eye, eye])
    monkeypatch.setattr("ndm_ct.samplers.frozen.normal_like", lambda z, generator: noise)
    out = sampler.step(torch.cat([zero, eye, 0.0 * eye]), t, s)
    matrix, by_noise = out[1:5].mT, out[5:].mT
    own = matrix @ marginal(model, t)[1] @ matrix.mT + by_noise @ by_noise.mT
    assert float(own.trace() / marginal(model, s)[1].trace()) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("head", ["x", "moments"])
def test_measured_residuals_make_few_steps_exact_to_their_error(head, generator):
    model, n = isotropic(SMOOTH, TRANSFORMS["moving scale"](), head=head), 4000
    estimate_residuals(model, isotropic().sample_data(1000, generator=generator), generator=generator, times=32)
    mean, cov = marginal(model, model.t_min)
    x = ndm_ct.sample(model, n, method="ddpm_analytic", steps=6, generator=generator, dtype=torch.float64)
    allowed = 4.0 * math.sqrt(2.0 / (3 * n)) + 0.01
    assert float((x - mean).square().mean() / cov[0, 0]) == pytest.approx(1.0, abs=allowed)
    x = ndm_ct.sample(model, n, method="ddpm", steps=6, generator=generator, dtype=torch.float64)
    assert float((x - mean).square().mean() / cov[0, 0]) < 0.9


def test_stochasticity_zero_is_analytic_ddim():
    """All the noise that is left is what the uncertain x needs."""
    model = with_exact_table(isotropic(), torch.linspace(0.0, 1.0, 9, dtype=torch.float64))
    t, s = levels(SMOOTH, torch.tensor([0.6, 0.4], dtype=torch.float64))
    z = torch.zeros(20000, 3).double()
    step = DDPM(model.with_volatility(scale=0.0), "analytic").step(z, t.t, s.t)
    (A, _, _), kappa = _Interpolant(model)(t), s.sigma / t.sigma
    assert float(step.var(0).mean()) == pytest.approx((s.alpha - kappa * t.alpha) ** 2 * A, rel=0.05)


def test_a_volatility_over_the_event_gets_one_average(generator):
    blur = Blur((2, 2), blur=1.0, floor=0.2)
    model = ndm_ct.reference.Gaussian(
        torch.zeros(2, 2), torch.eye(4), schedule=SMOOTH, transform=blur,
        volatility=lambda t: 1.0 + 0.5 * torch.arange(4.0).reshape(2, 2).expand(*t.shape, 2, 2) * t[..., None, None],
    )  # fmt: skip
    estimate_residuals(model, model.sample_data(50, generator=generator), times=8, generator=generator)
    x = ndm_ct.sample(model, 500, method="ddpm_analytic", steps=40, generator=generator, dtype=torch.float64)
    assert float(x.var()) == pytest.approx(1.0, abs=0.15)


# --- the table belongs to the model ----------------------------------------------------------------------------------


def network(**kwargs):
    torch.manual_seed(3)
    return NDM(ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2, width=8)), event_shape=(2,), **kwargs)


def measured(times=5):
    model = network()
    estimate_residuals(model, torch.randn(20, 2), times=times, generator=torch.Generator().manual_seed(0))
    return model


def draw(model):
    generator = torch.Generator().manual_seed(1)
    return ndm_ct.sample(model, 3, method="ddpm_analytic", steps=4, generator=generator)


def test_files_states_and_copies_carry_it(tmp_path):
    model = measured()
    ndm_ct.save(model, tmp_path / "model.safetensors")
    loaded = ndm_ct.load(tmp_path / "model.safetensors")
    assert loaded.residuals.dtype == torch.float64
    stated = network()
    stated.load_state_dict(model.state_dict())
    for other in (loaded, stated, copy.deepcopy(model), model.with_volatility(scale=1.0)):
        assert torch.equal(other.residuals, model.residuals)
        assert torch.equal(draw(other), draw(model))
    longer = measured(times=9)
    longer.load_state_dict(model.state_dict())
    assert torch.equal(longer.residuals, model.residuals)
    torch.testing.assert_close(draw(copy.deepcopy(model).to(torch.float64).to(torch.float32)), draw(model))
    rounded = copy.deepcopy(model).float()
    assert rounded.residuals.dtype == torch.float32
    torch.testing.assert_close(draw(rounded), draw(model), rtol=1e-4, atol=1e-4)


def test_a_model_without_it_is_as_before(tmp_path):
    model = network()
    assert model.residuals is None
    assert "residuals" not in model.state_dict()
    ndm_ct.save(model, tmp_path / "model.safetensors")
    assert ndm_ct.load(tmp_path / "model.safetensors").residuals is None
    other = measured()
    other.load_state_dict(model.state_dict())  # those of other weights would be wrong
    assert other.residuals is None


def test_a_damaged_table_is_refused(tmp_path):
    model = measured()
    model.residuals = model.residuals[:5]
    ndm_ct.save(model, tmp_path / "model.safetensors")
    with pytest.raises(ndm_ct.CheckpointError, match="residuals"):
        ndm_ct.load(tmp_path / "model.safetensors")


# --- errors ----------------------------------------------------------------------------------------------------------


def test_without_a_table_the_error_names_the_cure():
    for model in (gaussian(SMOOTH), network()):
        with pytest.raises(ValueError, match=r"estimate_residuals\(model, data\)"):
            ndm_ct.sample(model, 2, method="ddpm_analytic", steps=4)
    with pytest.raises(ValueError, match="variance='analytical' is unknown; did you mean 'analytic'"):
        DDPM(gaussian(SMOOTH), "analytical")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"times": 1}, ValueError, "times=1 is one time"),
        ({"times": 0}, ValueError, "times must be at least 1"),
        ({"times": torch.tensor([0.5, 0.5])}, ValueError, "times must be two or more, all different"),
        ({"times": torch.tensor([0.5, 1.5])}, ValueError, r"times must lie in \[t_min, 1\]"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"label": torch.zeros(4)}, TypeError, "label"),
        ({"data": torch.zeros(0, 2)}, ValueError, "data has no rows"),
        ({"data": torch.zeros(4, 3)}, ValueError, "data has shape"),
        ({"data": torch.full((4, 2), math.nan)}, ValueError, "data has NaN"),
    ],
)
def test_errors_name_the_argument(options, error, message):
    with pytest.raises(error, match=message):
        estimate_residuals(network(), **({"data": torch.zeros(4, 2)} | options))


def test_a_prediction_that_is_not_finite_is_named():
    model = NDM(lambda z, t: torch.where(t[:, None] > 0.5, math.nan, z), (2,), schedule=SMOOTH)
    with pytest.raises(ndm_ct.PredictorError, match="NaN or inf at t="):
        estimate_residuals(model, torch.zeros(4, 2), times=4)
    assert model.residuals is None
