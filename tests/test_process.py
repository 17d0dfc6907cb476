"""The forward process against finite differences, autograd and the Fokker-Planck equation; the model's dynamics."""

import math

import pytest
import torch
from oracles import ALL_SCHEDULES, TRANSFORMS, ThreePoints, Wiggle, gaussian, mixture

from ndm_ct import NDM, schedules, transforms
from ndm_ct.process import ForwardProcess


def time(value):
    return torch.tensor(value, dtype=torch.float64)


PROCESS = {
    "moving scale": lambda s: ForwardProcess(TRANSFORMS["moving scale"](), s, 1.0),
    "nonlinear": lambda s: ForwardProcess(Wiggle(), s, 0.5),
}


@pytest.mark.parametrize("schedule", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
@pytest.mark.parametrize("make", PROCESS.values(), ids=PROCESS)
def test_velocity_is_the_time_derivative_at_fixed_noise(make, schedule):
    process = make(schedule())
    x, eps = torch.randn(4, 1, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64)
    t, h = torch.full((4,), 0.4, dtype=torch.float64), 1e-5
    with torch.no_grad():
        z = process.sample(x, t, eps=eps)
        finite = (process.sample(x, t + h, eps=eps) - process.sample(x, t - h, eps=eps)) / (2 * h)
        torch.testing.assert_close(process.velocity(z, x, t), finite, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("make", PROCESS.values(), ids=PROCESS)
def test_score_is_the_gradient_of_the_log_density(make):
    process = make(schedules.LinearLogSNR(-5, 5))
    x, t = torch.randn(4, 1, dtype=torch.float64), torch.full((4,), 0.4, dtype=torch.float64)
    z = torch.randn(4, 1, dtype=torch.float64, requires_grad=True)
    sigma = process.schedule.sigma(t)[:, None]
    log_q = -0.5 * ((z - process.mean(x, t)) / sigma) ** 2
    (gradient,) = torch.autograd.grad(log_q.sum(), z)
    torch.testing.assert_close(process.score(z, x, t), gradient)


@pytest.mark.parametrize("make", PROCESS.values(), ids=PROCESS)
def test_reverse_drift_is_velocity_minus_half_g_squared_score(make):
    process = make(schedules.LinearLogSNR(-5, 5))
    x, z = torch.randn(4, 1, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64)
    t = torch.full((4,), 0.4, dtype=torch.float64)
    g = process.diffusion(t)[:, None]
    c = process.schedule(t)
    torch.testing.assert_close(g[:, 0] ** 2, process.volatility * c.sigma**2 * c.dgamma)
    expected = process.velocity(z, x, t) - 0.5 * g**2 * process.score(z, x, t)
    torch.testing.assert_close(process.reverse_drift(z, x, t), expected)


@pytest.mark.parametrize("eta", [1.0, 0.3, 2.5])
def test_transition_is_the_reverse_sde_with_x_frozen(eta):
    """The moments of dz = (v - g^2 s / 2) dt + g dw from t down to s, integrated by many Euler steps."""
    process = ForwardProcess(Wiggle(), schedules.LinearLogSNR(-5, 5), eta)
    x, z = torch.tensor([[0.7]], dtype=torch.float64), torch.tensor([[0.4]], dtype=torch.float64)
    s, t = time(0.3), time(0.6)
    grid = torch.linspace(0.6, 0.3, 501, dtype=torch.float64)
    step = 0.3 / 500
    mean, variance = z, torch.zeros(1, 1, dtype=torch.float64)
    for u in grid[:-1] - 0.5 * step:  # midpoint rule for both; the drift is affine in z
        at_zero = process.reverse_drift(torch.zeros_like(z), x, u)
        slope = process.reverse_drift(torch.ones_like(z), x, u) - at_zero
        middle = mean - 0.5 * step * (slope * mean + at_zero)
        mean = mean - step * (slope * middle + at_zero)
        growth = torch.exp(-slope * step)
        variance = growth**2 * variance + growth * process.diffusion(u) ** 2 * step
    F = process.transform
    exact_mean, std = process.posterior(z, F(x, s.expand(1)), F(x, t.expand(1)), s.expand(1), t.expand(1))
    torch.testing.assert_close(exact_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std[0] ** 2, variance[0, 0], rtol=1e-4, atol=1e-6)


def test_transition_is_ddpm_at_volatility_one_and_ddim_at_zero():
    s, t = time([0.3]), time([0.6])
    schedule = schedules.VariancePreserving()
    at_s, at_t = schedule(s), schedule(t)
    kappa, std = ForwardProcess(transforms.Identity(), schedule, 1.0).transition(s, t)
    step_variance = at_t.sigma**2 - (at_t.alpha / at_s.alpha) ** 2 * at_s.sigma**2
    torch.testing.assert_close(std**2, step_variance * at_s.sigma**2 / at_t.sigma**2)
    torch.testing.assert_close(kappa, torch.sqrt(at_s.sigma**2 - std**2) / at_t.sigma)
    kappa, std = ForwardProcess(transforms.Identity(), schedule, 0.0).transition(s, t)
    assert float(std) == 0.0
    torch.testing.assert_close(kappa, at_s.sigma / at_t.sigma)


def test_transition_of_a_varying_volatility_is_its_integral():
    schedule = schedules.LinearLogSNR(-5, 5)
    s, t = time([0.2, 0.1]), time([0.7, 0.3])
    _, std = ForwardProcess(transforms.Identity(), schedule, lambda t: 1.0 + t**2).transition(s, t)
    exponent = 10.0 * ((t - s) + (t**3 - s**3) / 3.0)
    torch.testing.assert_close(std, schedule.sigma(s) * torch.sqrt(-torch.expm1(-exponent)))


def test_transition_forgets_everything_where_alpha_vanishes():
    for volatility in (1.0, lambda t: 1.0 + t):
        process = ForwardProcess(transforms.Identity(), schedules.Rectified(), volatility)
        kappa, std = process.transition(time([0.5]), time([1.0]))
        assert float(kappa) == 0.0
        assert float(std) == 0.5


@pytest.mark.parametrize("schedule", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_exact_model_satisfies_the_continuity_equation(schedule, transform):
    """d/dt log p_t along a path that moves with v equals minus div v: an identity of v and the density together."""
    with torch.no_grad():
        model = mixture(schedule(), transform(), components=3, d=3)
        z, t, h = torch.randn(5, 3, dtype=torch.float64), 0.45, 1e-5
        v = model.velocity(z, t)
        forward, backward = model.log_prob(z + h * v, t + h), model.log_prob(z - h * v, t - h)
    flow = model.flow(torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: flow(time(t), row[None])[0]))(z)
    divergence = jacobian.diagonal(dim1=1, dim2=2).sum(1).detach()
    torch.testing.assert_close((forward - backward) / (2 * h), -divergence, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_exact_models_score_is_the_gradient_of_its_density(transform):
    model = mixture(schedules.LinearLogSNR(-6, 6), transform())
    z = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.log_prob(z, 0.5).sum(), z)
    torch.testing.assert_close(model.score(z.detach(), 0.5), gradient)


def test_sde_drift_of_the_model_is_flow_minus_half_g_squared_score():
    model = gaussian(schedules.LinearLogSNR(-6, 6), TRANSFORMS["moving scale"](), volatility=0.7)
    z, t = torch.randn(5, 6, dtype=torch.float64), time(0.5)
    drift = model.reverse_sde(torch.float64).drift(t, z)
    g = model.process.diffusion(t)
    torch.testing.assert_close(drift, model.velocity(z, t) - 0.5 * g**2 * model.score(z, t))


def test_flow_parts_add_up():
    model = gaussian(schedules.VariancePreserving(), TRANSFORMS["moving scale"]())
    flow, z, t = model.flow(torch.float64), torch.randn(5, 6, dtype=torch.float64), time(0.5)
    part, F = flow.network_part(t)(z)
    torch.testing.assert_close(flow.assemble(t, z, part), flow(t, z))
    torch.testing.assert_close(F, model.moments(z, t)[0])
    torch.testing.assert_close(flow.prediction(t, z), F)
    torch.testing.assert_close(flow.score(t, z, F), model.score(z, 0.5))


# --- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LinearLogSNR", "SubVariancePreserving", "VarianceExploding", "VariancePreserving"])
@pytest.mark.parametrize("head", ["eps", "v", "moments"])
def test_heads_are_the_same_model(head, name):
    """Each head, fed the exact prediction in its own terms, has the velocity of the exact model."""
    exact = mixture(ALL_SCHEDULES[name]())

    def predictor(z, t):
        c = exact.schedule(t)
        alpha, sigma = c.alpha[:, None], c.sigma[:, None]
        x = exact.predict_x(z, t)
        eps = (z - alpha * x) / sigma
        return {"eps": eps, "v": alpha * eps - sigma * x, "moments": (x, torch.zeros_like(x))}[head]

    model = NDM(predictor, (8,), schedule=exact.schedule, prediction=head)
    z = 2.0 * torch.randn(5, 8, dtype=torch.float64)
    for t in (0.3, 0.8):
        torch.testing.assert_close(model.velocity(z, t), exact.velocity(z, t), rtol=1e-8, atol=1e-8)


def test_nonlinear_transform_flow_of_head_x_is_not_the_marginal_flow_but_moments_is():
    """The caveat in numbers: at the ELBO's optimum head "x" has the right SDE drift and wrong velocity and score."""
    exact = ThreePoints(schedules.LinearLogSNR(-10, 10), Wiggle())
    moments = exact.model()
    z, t = torch.tensor([[-0.4]], dtype=torch.float64), time([0.3])
    h = 1e-5
    right_score = (exact.log_prob(z + h, 0.3) - exact.log_prob(z - h, 0.3)) / (2 * h)
    torch.testing.assert_close(moments.score(z, 0.3)[:, 0], right_score, rtol=1e-6, atol=1e-6)
    c = exact.schedule(t)
    F, dF = moments.moments(z, t)
    weight = -c.alpha * c.dgamma  # the drift depends on (F, dF) through weight * F + alpha * dF at eta = 1
    target = weight * F + c.alpha * dF
    grid = torch.linspace(-3, 3, 2_000_001, dtype=torch.float64)[:, None]
    F_grid, dF_grid = exact.transform.with_derivative(grid, t.expand(len(grid)))
    best = grid[(weight * F_grid + c.alpha * dF_grid - target).abs().argmin()]
    head_x = NDM(lambda z, t: best.expand_as(z), (1,), transform=exact.transform, schedule=exact.schedule)
    sde_gap = head_x.reverse_sde(z.dtype).drift(t, z) - moments.reverse_sde(z.dtype).drift(t, z)
    assert float(sde_gap.abs()) < 1e-3
    assert float((head_x.velocity(z, 0.3) - moments.velocity(z, 0.3)).abs()) > 0.05
    assert float((head_x.score(z, 0.3) - moments.score(z, 0.3)).abs()) > 0.05


def test_straight_paths():
    """Case 3: x ~ N(0, tau^2), alpha = 1 - t, sigma = t, and a transform whose flow is exactly straight."""
    tau = 0.6

    class Straight(transforms.Transform):
        linear = True

        def forward(self, x, t, **cond):
            t = t.reshape(-1, *(1,) * (x.ndim - 1))
            return x * torch.sqrt(((1 - t) * tau + t) ** 2 - t**2) / ((1 - t) * tau)

    from ndm_ct.reference import Gaussian

    model = Gaussian(torch.zeros(1), torch.full((1, 1), tau**2), schedule=schedules.Rectified(), transform=Straight())
    x = torch.tensor([[0.5], [-1.3]], dtype=torch.float64)
    for t in (0.01, 0.3, 0.7, 0.99):
        line = x * ((1 - t) * tau + t) / tau
        torch.testing.assert_close(model.velocity(line, t), x * (1 - tau) / tau, rtol=1e-6, atol=1e-7)


def test_conditioning_reaches_predictor_and_transform():
    def net(x, t, scale=None):
        return scale.reshape(-1, 1) * x

    model = NDM(
        lambda z, t, label: z * label.reshape(-1, 1), (2,), transform=transforms.Neural(net),
        schedule=schedules.LinearLogSNR(-5, 5),
    )  # fmt: skip
    z, t = torch.randn(3, 2), time(0.5)
    label, scale = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.1, 0.2, 0.3])
    F, dF = model.moments(z, t, label=label, scale=scale)
    x = z * label[:, None]
    torch.testing.assert_close(F, x * (1 + 0.5 * scale[:, None]))
    torch.testing.assert_close(dF, x * scale[:, None])


def test_volatility_over_the_event_lives_in_the_transforms_basis():
    """A blurred model with one volatility per DCT frequency: drift and g agree with the hand-rotated formulas."""
    blur = transforms.Blur((1, 4, 4), blur=2.0)
    eta = 0.5 + torch.rand(1, 4, 4, dtype=torch.float64)
    model = NDM(
        lambda z, t: 0.3 * z, (1, 4, 4), transform=blur, schedule=schedules.LinearLogSNR(-5, 5),
        volatility=lambda t: eta.expand(t.shape[0], 1, 4, 4),
    )  # fmt: skip
    z, t = torch.randn(2, 1, 4, 4, dtype=torch.float64), time(0.5)
    sde, c = model.reverse_sde(torch.float64), model.schedule(t)
    g = sde.diffusion(t, z)
    torch.testing.assert_close(g**2, (c.sigma**2 * c.dgamma * eta).expand_as(z))
    expected = blur.to_basis(model.velocity(z, t)) - 0.5 * g**2 * blur.to_basis(model.score(z, t))
    torch.testing.assert_close(sde.drift(t, blur.to_basis(z)), expected)


def test_default_prior_is_matched_to_the_schedule(generator):
    assert NDM(lambda z, t: z, (2,)).prior.scale == 1.0
    assert NDM(lambda z, t: z, (2,), schedule=schedules.VarianceExploding(0.01, 30.0)).prior.scale == 30.0
    model = NDM(lambda z, t: z, (2,), schedule=schedules.VarianceExploding(0.01, 30.0))
    z = torch.randn(4, 2, dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 30.0)
    torch.testing.assert_close(model.prior.log_prob(z), normal.log_prob(z).sum(1))
    mean, std = torch.randn(4, 2, dtype=torch.float64), torch.rand(4, 2, dtype=torch.float64) + 0.5
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, std), normal).sum(1)
    torch.testing.assert_close(model.prior.kl_from_normal(mean, std), kl)
    assert math.isclose(model.t_min, 0.0)
    draws = model.prior.sample(4000, generator=generator, dtype=torch.float64)
    assert abs(float(draws.std()) / 30.0 - 1.0) < 4 / math.sqrt(2 * 8000)


def test_exact_priors_divergence_is_torchs():
    model = gaussian(schedules.LinearLogSNR(-6, 1.0))
    mean, std = torch.randn(3, 6, dtype=torch.float64), torch.rand(3, 6, dtype=torch.float64) + 0.5
    own_mean, factor, _ = model.marginals.components(time([1.0]))
    prior = torch.distributions.MultivariateNormal(own_mean[0, 0], scale_tril=factor[0, 0])
    for row in range(3):
        q = torch.distributions.MultivariateNormal(mean[row], torch.diag(std[row] ** 2))
        expected = torch.distributions.kl_divergence(q, prior)
        torch.testing.assert_close(model.prior.kl_from_normal(mean, std)[row], expected)
