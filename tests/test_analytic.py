"""The optimal variance: for isotropic Gaussian data residuals are known and a reverse step of any length is exact."""

import itertools
import math
from functools import partial

import pytest
import torch
from oracles import SCHEDULES, TRANSFORMS, gaussian, mixture, rotated_covariance

import ndm_ct
from ndm_ct import NDM, schedules
from ndm_ct.samplers import NAMES
from ndm_ct.samplers.frozen import DDPM, Residuals, _Interpolant, estimate_residuals
from ndm_ct.samplers.grids import time_grid
from ndm_ct.schedules.base import levels
from ndm_ct.storage.models import describe
from ndm_ct.storage.tensors import write
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


def exact_table(model, times):
    times = times.sort().values
    moments = exact_moments(model, times)
    return Residuals(times, moments, torch.zeros_like(moments))


def analytic(residuals):
    return partial(DDPM, variance="analytic", residuals=residuals)


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
    residuals = exact_table(model, time_grid(model.schedule, model.t_min, 63, "logsnr"))
    table = _Interpolant(model.schedule, residuals)
    inside = model.t_min + (1.0 - model.t_min) * torch.linspace(0.0, 1.0, 301).double()
    own = torch.tensor([table(level) for level in levels(model.schedule, inside)], dtype=torch.float64).mT
    exact = exact_moments(model, inside)
    torch.testing.assert_close(own, exact, rtol=2e-3, atol=1e-12)
    assert bool((own[1] ** 2 <= own[0] * own[2] * (1.0 + 1e-9)).all())
    knots = levels(model.schedule, residuals.times)
    own = torch.tensor([table(level) for level in knots], dtype=torch.float64).mT
    torch.testing.assert_close(own, exact_moments(model, residuals.times), rtol=1e-7, atol=1e-12)


def test_beyond_its_times_the_table_follows_the_share_of_noise():
    """A over sigma^2 / (alpha^2 + sigma^2) stays what it was at the end; two times are a line."""
    model = isotropic()
    table = _Interpolant(model.schedule, exact_table(model, torch.tensor([0.4, 0.6], dtype=torch.float64)))
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
        own_mean, own = propagate(DDPM(model, "analytic", exact_table(model, grid)), grid, monkeypatch)
        torch.testing.assert_close(own_mean, mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(own, cov, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [5, 10])
def test_where_the_fixed_variances_miss(steps, monkeypatch):
    model = isotropic()
    grid = time_grid(SMOOTH, model.t_min, steps)
    _, cov = marginal(model, model.t_min)
    samplers = NAMES | {"ddpm_analytic": partial(NAMES["ddpm_analytic"], residuals=exact_table(model, grid))}

    def variance(name):
        return float((propagate(samplers[name](model), grid, monkeypatch)[1] / cov).diagonal().mean())

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
    sampler = DDPM(model, "analytic", Residuals(times, moments, torch.zeros_like(moments)))
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
    data = isotropic().sample_data(1000, generator=generator)
    method = analytic(estimate_residuals(model, data, generator=generator, times=32))
    mean, cov = marginal(model, model.t_min)
    x = ndm_ct.sample(model, n, method=method, steps=6, generator=generator, dtype=torch.float64)
    allowed = 4.0 * math.sqrt(2.0 / (3 * n)) + 0.01
    assert float((x - mean).square().mean() / cov[0, 0]) == pytest.approx(1.0, abs=allowed)
    x = ndm_ct.sample(model, n, method="ddpm", steps=6, generator=generator, dtype=torch.float64)
    assert float((x - mean).square().mean() / cov[0, 0]) < 0.9


def test_stochasticity_zero_is_analytic_ddim():
    """All the noise that is left is what the uncertain x needs."""
    model = isotropic()
    residuals = exact_table(model, torch.linspace(0.0, 1.0, 9, dtype=torch.float64))
    t, s = levels(SMOOTH, torch.tensor([0.6, 0.4], dtype=torch.float64))
    z = torch.zeros(20000, 3).double()
    step = DDPM(model.with_volatility(scale=0.0), "analytic", residuals).step(z, t.t, s.t)
    (A, _, _), kappa = _Interpolant(model.schedule, residuals)(t), s.sigma / t.sigma
    assert float(step.var(0).mean()) == pytest.approx((s.alpha - kappa * t.alpha) ** 2 * A, rel=0.05)


def test_a_volatility_over_the_event_gets_one_average(generator):
    blur = Blur((2, 2), blur=1.0, floor=0.2)
    model = ndm_ct.reference.Gaussian(
        torch.zeros(2, 2), torch.eye(4), schedule=SMOOTH, transform=blur,
        volatility=lambda t: 1.0 + 0.5 * torch.arange(4.0).reshape(2, 2).expand(*t.shape, 2, 2) * t[..., None, None],
    )  # fmt: skip
    residuals = estimate_residuals(model, model.sample_data(50, generator=generator), times=8, generator=generator)
    x = ndm_ct.sample(model, 500, method=analytic(residuals), steps=40, generator=generator, dtype=torch.float64)
    assert float(x.var()) == pytest.approx(1.0, abs=0.15)


# --- the table beside the model -------------------------------------------------------------------------------------


def network(**kwargs):
    torch.manual_seed(3)
    return NDM(ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2, width=8)), event_shape=(2,), **kwargs)


def measured(model, times=5):
    return estimate_residuals(model, torch.randn(20, 2), times=times, generator=torch.Generator().manual_seed(0))


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("times", "moments", "stderr"))


def draw(model, residuals):
    return ndm_ct.sample(model, 3, method=analytic(residuals), steps=4, generator=1)


def test_measuring_leaves_the_model_as_it_was():
    model = network()
    measured(model)
    assert model.state_dict().keys() == network().state_dict().keys()
    assert not hasattr(model, "residuals")


def test_a_file_carries_it_beside_the_model(tmp_path):
    model, path = network(), tmp_path / "model.safetensors"
    residuals = measured(model)
    ndm_ct.save(model, path, residuals=residuals)
    loaded, found = ndm_ct.load(path), ndm_ct.discrete.load_residuals(path)
    assert same(found, residuals)
    assert found.moments.dtype == torch.float64
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(draw(loaded, found), draw(model, residuals))
    ndm_ct.save(loaded, path)
    with pytest.raises(ndm_ct.CheckpointError, match=r"holds no residuals; measure them with .*estimate_residuals"):
        ndm_ct.discrete.load_residuals(path)


@pytest.mark.parametrize("read", [ndm_ct.load, ndm_ct.discrete.load_residuals])
@pytest.mark.parametrize("broken", [torch.zeros(5, 4), torch.zeros(7), torch.zeros(7, 1), torch.zeros(7, 4).long()])
def test_a_damaged_table_is_refused(tmp_path, read, broken):
    model, path = network(), tmp_path / "model.safetensors"
    write(path, {**model.state_dict(), "residuals": broken}, {"kind": "model", "model": describe(model)})
    with pytest.raises(ndm_ct.CheckpointError, match="residuals"):
        read(path)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_without_a_table_the_error_names_the_cure():
    for model in (gaussian(SMOOTH), network()):
        with pytest.raises(ValueError, match=r"estimate_residuals\(model, data\).*partial\(.*residuals=residuals\)"):
            ndm_ct.sample(model, 2, method="ddpm_analytic", steps=4)
    residuals = measured(network())
    with pytest.raises(ValueError, match="residuals= go together"):
        DDPM(network(), "small", residuals)
    with pytest.raises(TypeError, match="residuals must come from estimate_residuals, got Tensor"):
        DDPM(network(), "analytic", residuals.moments)
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
    data, more = options.get("data", torch.zeros(4, 2)), {key: options[key] for key in options.keys() - {"data"}}
    with pytest.raises(error, match=message):
        estimate_residuals(network(), data, **more)


def test_a_prediction_that_is_not_finite_is_named():
    model = NDM(lambda z, t: torch.where(t[:, None] > 0.5, math.nan, z), (2,), schedule=SMOOTH)
    with pytest.raises(ndm_ct.PredictorError, match="NaN or inf at t="):
        estimate_residuals(model, torch.zeros(4, 2), times=4)
