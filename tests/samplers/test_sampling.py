"""Samplers: measured orders against the exact flow, exact propagation of moments, statistics of exact models."""

import itertools
import math

import pytest
import torch
from oracles import (
    SCHEDULES,
    TRANSFORMS,
    Prescribed,
    ThreePoints,
    Wiggle,
    blurred,
    exact_flow,
    gaussian,
    mixture,
    order,
)

import ndm_ct
from ndm_ct import NDM, schedules, solvers
from ndm_ct.divergence import Hutchinson, Quadrature
from ndm_ct.samplers.base import walk
from ndm_ct.samplers.frozen import DDIM, DDPM

SMOOTH = schedules.LinearLogSNR(-5.0, 4.0)


def test_adaptive_flow_reaches_its_tolerance_and_counts():
    model = gaussian(SMOOTH, TRANSFORMS["moving scale"]())
    x, info = ndm_ct.sample(model, 8, rtol=1e-8, atol=1e-8, dtype=torch.float64, return_info=True)
    assert float((x - exact_flow(model, info.z)).abs().max()) < 1e-6
    budget = info.nfe - 2 - 6 * (info.accepted + info.rejected)
    assert 1 <= budget <= 10  # evaluations of the error budget


def test_ddim_of_a_moments_head_has_order_one_for_a_nonlinear_transform():
    """F at the end of a step is F + (s - t) dF; frozen without the slope it would not converge."""
    model = ThreePoints(schedules.LinearLogSNR(-4, 4), Wiggle()).model()
    z1 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    exact, steps = ndm_ct.decode(model, z1, rtol=1e-10, atol=1e-10), (64, 128, 256)
    errors = []
    for n in steps:
        grid = torch.linspace(1, model.t_min, n + 1, dtype=torch.float64)
        errors.append((walk(DDIM(model), z1, grid) - exact).abs().max())
    assert order(errors, steps) == pytest.approx(1.0, abs=0.3)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_ddim_is_the_exponential_integrator(transform):
    """d(z / sigma) = d(alpha F / sigma) with the prediction frozen."""
    model = gaussian(SMOOTH, transform())
    z, t, s = torch.randn(4, 6).double(), torch.tensor(0.6).double(), torch.tensor(0.5).double()
    x = model.predict_x(z, t)
    at_t, at_s = model.schedule(t), model.schedule(s)
    F_t, F_s = model.transform(x, t), model.transform(x, s)
    expected = at_s.sigma * (z / at_t.sigma + at_s.alpha / at_s.sigma * F_s - at_t.alpha / at_t.sigma * F_t)
    torch.testing.assert_close(DDIM(model).step(z, t, s), expected)
    zero = gaussian(SMOOTH, transform(), volatility=0.0)
    torch.testing.assert_close(DDPM(zero).step(z, t, s), expected)


def test_ddim_with_eta_one_is_ddpm():
    model = mixture(SMOOTH)
    z, t, s = torch.randn(4, 8).double(), torch.tensor(0.6).double(), torch.tensor(0.5).double()
    one, other = (torch.Generator().manual_seed(1) for _ in range(2))
    torch.testing.assert_close(
        DDIM(model, 1.0).step(z, t, s, generator=one), DDPM(model).step(z, t, s, generator=other)
    )
    with pytest.raises(ValueError, match="eta of DDIM must lie in"):
        DDIM(model, 1.5)


def propagate_sde(model, method, steps):
    """Mean and covariance after N steps of a linear SDE, exactly: every step is affine in state and noise."""
    sde, d = model.reverse_sde(torch.float64), model.event_shape[0]
    mean, factor, _ = model.marginals.components(torch.ones(1).double())
    mean, cov = mean[0], factor[0, 0] @ factor[0, 0].mT
    eye, zero = torch.eye(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    grid = torch.linspace(1, model.t_min, steps + 1, dtype=torch.float64)

    def step(pair, y, w, u):
        return solvers.sdeint(sde.drift, sde.diffusion, y, pair, method=method, noise=Prescribed(y.shape, w, u)).state[
            0
        ]

    for k in range(steps):
        pair, h = grid[k : k + 2], float(grid[k] - grid[k + 1])
        base = step(pair, zero[:1], zero[:1], zero[:1])
        by_y = (step(pair, eye, zero, zero) - base).mT
        by_w = (step(pair, zero, eye, zero) - base).mT
        by_u = (step(pair, zero, zero, eye) - base).mT
        mean = mean @ by_y.mT + base
        # Var W = h, Cov(W, U) = h^2 / 2, Var U = h^3 / 3
        noise = h * by_w @ by_w.mT + h**2 / 2 * (by_w @ by_u.mT + by_u @ by_w.mT) + h**3 / 3 * by_u @ by_u.mT
        cov = by_y @ cov @ by_y.mT + noise
    return mean[0], cov


def propagate_ddpm(model, steps):
    d = model.event_shape[0]
    mean, factor, _ = model.marginals.components(torch.ones(1).double())
    mean, cov = mean[0], factor[0, 0] @ factor[0, 0].mT
    eye = torch.eye(d, dtype=torch.float64)
    grid = torch.linspace(1, model.t_min, steps + 1, dtype=torch.float64)
    for t, s in itertools.pairwise(grid):

        def step_mean(z, t=t, s=s):
            F_t, F_s = model.frozen(z, t, s)
            return model.process.posterior(z, F_s, F_t, s, t)

        (base, std), (moved, _) = step_mean(torch.zeros(1, d).double()), step_mean(eye)
        matrix = (moved - base).mT
        mean, cov = mean @ matrix.mT + base, matrix @ cov @ matrix.mT + std**2 * eye
    return mean[0], cov


WEAK_ORDERS = {"euler": 1, "heun": 2, "midpoint": 2, "srk": 2, "ddpm": 1}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("method", WEAK_ORDERS)
def test_weak_order_by_exact_propagation_of_moments(method, transform):
    model = gaussian(SMOOTH, transform(), d=3, volatility=0.8)
    mean, factor, _ = model.marginals.components(torch.tensor([model.t_min]).double())
    exact, steps, errors = factor[0, 0] @ factor[0, 0].mT, (64, 128, 256), []
    for n in steps:
        own_mean, cov = propagate_ddpm(model, n) if method == "ddpm" else propagate_sde(model, method, n)
        errors.append(torch.maximum((cov - exact).abs().max(), (own_mean - mean[0, 0]).abs().max()))
    assert order(errors, steps) > WEAK_ORDERS[method] - 0.3


METHODS = {
    "ode": {},
    "sde": {"steps": 150},
    "ddpm": {"steps": 400},
    "ddim": {"steps": 400},
    "heun": {"steps": 100},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["LinearLogSNR", "Rectified"])
def test_samples_of_the_exact_mixture_match_its_moments_and_mode_weights(method, name, generator):
    """Mean, covariance and the share of each well-separated mode, within four standard errors."""
    n, d = 4000, 2
    means = 3.0 * torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, -1.5]], dtype=torch.float64)
    covs = torch.stack([torch.diag(torch.tensor(v, dtype=torch.float64)) for v in ([0.3, 0.1], [0.1, 0.2], [0.2, 0.2])])
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    model = ndm_ct.reference.GaussianMixture(weights, means, covs, schedule=SCHEDULES[name]())
    x = ndm_ct.sample(model, n, method=method, generator=generator, dtype=torch.float64, **METHODS[method])
    exact_mean = weights @ means
    centred = means - exact_mean
    exact_cov = torch.einsum("k,kij->ij", weights, covs + centred[:, :, None] * centred[:, None, :])
    stderr = (exact_cov.diagonal() / n).sqrt()
    assert bool(((x.mean(0) - exact_mean).abs() < 4 * stderr).all())
    products = (x - exact_mean)[:, :, None] * (x - exact_mean)[:, None, :]
    assert bool(((products.mean(0) - exact_cov).abs() < 4 * products.std(0) / math.sqrt(n) + 0.01).all())
    nearest = torch.cdist(x, means).argmin(1)
    share = torch.stack([(nearest == k).double().mean() for k in range(3)])
    assert bool(((share - weights).abs() < 4 * (weights * (1 - weights) / n).sqrt()).all())
    spread = torch.stack([x[nearest == k].var(0) for k in range(3)])
    inside = torch.stack([cov.diagonal() for cov in covs])
    counts = (weights * n)[:, None].expand(3, d)
    assert bool(((spread / inside - 1).abs() < 4 * (2 / counts).sqrt() + 0.05).all())


@pytest.mark.parametrize("method", METHODS)
def test_reproducible_from_the_generator(method):
    model = mixture(schedules.Rectified())
    options = {"steps": 5} if METHODS[method] else {}

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return ndm_ct.sample(model, 3, method=method, generator=generator, dtype=torch.float64, **options)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_steps_are_exact_where_g_is_infinite():
    model = mixture(schedules.Rectified())
    for steps in (1, 2, 7):
        _, info = ndm_ct.sample(model, 2, method="sde", steps=steps, return_info=True)
        assert info.accepted == steps
        assert info.nfe == 1 + 2 * (steps - 1)


def test_volatility_per_frequency_samples_in_its_basis(generator):
    """Blurred Gaussian data with the optimal volatility of every frequency: SDE samples have the exact covariance."""
    model, spectrum = blurred()
    for method, steps in (("sde", 60), ("ddpm", 200)):
        x = ndm_ct.sample(model, 4000, method=method, steps=steps, generator=generator, dtype=torch.float64)
        measured = model.transform.to_basis(x).flatten(1).square().mean(0)
        assert bool(((measured / spectrum - 1).abs() < 4 * math.sqrt(2 / 4000) + 0.03).all())


def test_samples_have_the_models_dtype_and_conditioning_reaches_every_method():
    net = torch.nn.Linear(2, 2)
    model = NDM(lambda z, t, shift: net(z) * 0.1 + shift[:, None], (2,), schedule=schedules.LinearLogSNR(-5, 5))
    model.net = net
    shift = torch.tensor([-3.0, 3.0])
    for method in METHODS:
        x = ndm_ct.sample(model, 2, method=method, shift=shift, **({"steps": 20} if METHODS[method] else {}))
        assert x.dtype == torch.float32
        assert float(x[0].mean()) < -1.0
        assert float(x[1].mean()) > 1.0


def test_progress_bar_and_empty_request(capsys):
    model = mixture(SMOOTH)
    for method, options in METHODS.items():
        steps = {"steps": 3} if options else {}
        assert ndm_ct.sample(model, 2, method=method, progress=True, **steps).shape == (2, 8)
        assert ndm_ct.sample(model, 0, method=method, **steps).shape == (0, 8)
    assert capsys.readouterr().err.count("sampling") >= len(METHODS)


# --- the log-density along the way -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LinearLogSNR", "Rectified", "VarianceExploding"])
@pytest.mark.parametrize("make", [gaussian, mixture])
def test_samples_of_the_flow_come_with_their_log_density(make, name, generator):
    """The same number as loglik of the samples, and as the closed form."""
    model = make(SCHEDULES[name](), TRANSFORMS["moving scale"]())
    options = {"dtype": torch.float64, "rtol": 1e-7, "atol": 1e-7, "generator": generator}
    x, info = ndm_ct.sample(model, 6, return_info=True, **options)
    assert float(info.stderr.abs().max()) == 0.0
    assert 0.0 < float(info.ode_error.max()) < 1e-4
    torch.testing.assert_close(info.logp, model.log_prob(x), rtol=0.0, atol=1e-4)
    torch.testing.assert_close(info.logp, ndm_ct.loglik(model, x), rtol=0.0, atol=5e-4)
    plain = ndm_ct.sample(model, 6, **(options | {"generator": torch.Generator().manual_seed(1234)}))
    torch.testing.assert_close(plain, x, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("trace", [Quadrature(sweeps=16), Hutchinson(64)], ids=["quadrature", "hutchinson"])
def test_their_log_density_has_a_standard_error(trace, generator):
    model = mixture(SMOOTH, d=16)
    x, info = ndm_ct.sample(model, 64, trace=trace, dtype=torch.float64, generator=generator, return_info=True)
    value, other = ndm_ct.loglik(model, x, trace=trace, generator=generator, return_info=True)
    score = (info.logp - model.log_prob(x)) / info.stderr
    assert float(score.abs().max()) < 5.0
    assert 0.7 < float(score.std()) < 1.4
    assert info.ode_error.shape == (64,)
    assert 0.0 < float(info.ode_error.max()) < 0.5
    assert float(((info.logp - value) / (info.stderr**2 + other.stderr**2).sqrt()).abs().max()) < 4.0


def test_the_log_density_of_a_nonlinear_transform_and_of_large_events(generator):
    exact = ThreePoints(schedules.LinearLogSNR(-4, 4), Wiggle())
    model = exact.model()
    x, info = ndm_ct.sample(model, 8, rtol=1e-7, atol=1e-7, dtype=torch.float64, generator=generator, return_info=True)
    torch.testing.assert_close(info.logp, exact.log_prob(x, model.t_min), rtol=0.0, atol=1e-4)
    large = gaussian(SMOOTH, d=40)
    x, info = ndm_ct.sample(large, 8, dtype=torch.float64, generator=generator, return_info=True)
    assert float(info.stderr.min()) > 0.0  # "auto" is quadrature here
    assert float(((info.logp - large.log_prob(x)) / info.stderr).abs().max()) < 5.0


@pytest.mark.parametrize("method", METHODS)
def test_only_the_flow_knows_the_density_of_its_samples(method):
    _, info = ndm_ct.sample(
        mixture(SMOOTH), 2, method=method, return_info=True, **({"steps": 3} if METHODS[method] else {})
    )
    assert (info.logp is None) == (info.stderr is None) == (info.ode_error is None) == (method != "ode")


@pytest.mark.parametrize("method", ["ode", "dopri5", "sde"])
def test_denoise_after_adaptive_steps(method):
    """One evaluation more, of the estimate of x at the state without it; no density."""
    model = blurred()[0]
    generator = torch.Generator().manual_seed(0)
    z, plain = ndm_ct.sample(model, 4, method=method, dtype=torch.float64, generator=generator, return_info=True)
    generator.manual_seed(0)
    x, info = ndm_ct.sample(
        model, 4, method=method, dtype=torch.float64, generator=generator, return_info=True, denoise=True
    )
    t_min = torch.tensor(model.t_min, dtype=torch.float64)
    if method == "sde":
        assert info.nfe == plain.nfe + 1
    torch.testing.assert_close(x, model.predict_x(z, t_min), rtol=1e-4, atol=1e-4)
    assert float((x - z).abs().max()) > 1e-3
    assert info.logp is info.stderr is info.ode_error is None
    if method != "sde":
        with pytest.raises(ValueError, match=r"trace has no effect.*denoise=True"):
            ndm_ct.sample(model, 4, method=method, trace="exact", denoise=True, return_info=True)
