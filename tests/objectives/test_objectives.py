"""The ELBO against one-dimensional integrals, against simulation, and in its limits."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from oracles import TRANSFORMS, ThreePoints, Wiggle, hermite_points, k, mixture, order, perturbed, rotated_covariance
from scipy.integrate import quad

import ndm_ct
from ndm_ct import NDM, objectives, schedules, transforms
from ndm_ct.objectives.time_samplers import LossHistory
from ndm_ct.prior import IsotropicNormal
from ndm_ct.quantisation import Quantisation
from ndm_ct.reference import Gaussian
from ndm_ct.schedules.volatility import LearnedVolatility

SD = 0.8


def star(t):
    """The best volatility for F = k(t) x, gamma from -6 to 6: |1 - 2 (log k)'/gamma'|."""
    return 1.0 - 2.0 * 1.5 / (k(t) * 12.0)


ETAS = {"1": 1.0, "0.25": 0.25, "star": star}


def case_one(eta=1.0, sd=SD, cov=None):
    cov = torch.tensor([[sd**2]], dtype=torch.float64) if cov is None else cov
    return Gaussian(
        torch.zeros(len(cov)).double(), cov, schedule=schedules.LinearLogSNR(-6, 6),
        transform=TRANSFORMS["moving scale"](), volatility=eta,
    )  # fmt: skip


def scalar_terms(variance, eta):
    """Prior, diffusion and reconstruction terms per eigenvalue, as one-dimensional integrals, data averaged."""
    eta = eta if callable(eta) else (lambda t, value=eta: value)

    def coefficients(t):
        gamma = -6.0 + 12.0 * t
        return 1 / math.sqrt(1 + math.exp(gamma)), 1 / math.sqrt(1 + math.exp(-gamma)), gamma

    def integrand(t):
        alpha, sigma, gamma = coefficients(t)
        posterior = variance * sigma**2 / (alpha**2 * k(t) ** 2 * variance + sigma**2)
        e = eta(t)
        return 0.5 * math.exp(-gamma) * 12.0 / e * ((1 + e) / 2 * k(t) - 1.5 / 12.0) ** 2 * posterior

    diffusion, _ = quad(integrand, 0.0, 1.0, epsabs=1e-12, epsrel=1e-12)
    alpha, sigma, _ = coefficients(1.0)
    marginal = alpha**2 * k(1.0) ** 2 * variance + sigma**2
    prior = 0.5 * math.log(marginal / sigma**2)  # mean over x of KL(N(alpha k x, sigma^2) || N(0, marginal))
    reconstruction = 0.5 * (math.log(2 * math.pi) + 1.0 - 6.0)
    return prior, diffusion, reconstruction


def entropy(variance):
    return 0.5 * math.log(2 * math.pi * math.e * variance)


@pytest.mark.parametrize("eta", ETAS.values(), ids=ETAS)
def test_integrand_is_exact_at_every_time(eta):
    """Its expectation over x and eps, exact by a cubature rule for quadratic forms, integrated over t."""
    model, points = case_one(eta), hermite_points(2)
    nodes, weights = np.polynomial.legendre.leggauss(60)
    total = 0.0
    for node, weight in zip(nodes, weights, strict=True):
        t = torch.full((4,), 0.5 * (1 + node), dtype=torch.float64)
        value = objectives.diffusion_integrand(model, SD * points[:, :1], t, points[:, 1:])
        total += 0.5 * weight * float(value.mean())
    assert total == pytest.approx(scalar_terms(SD**2, eta)[1], rel=1e-9)


@pytest.mark.parametrize("eta", ETAS.values(), ids=ETAS)
@pytest.mark.parametrize("d", [1, 6])
def test_three_terms_are_their_integrals(d, eta, generator):
    """Each term separately, in units of its own standard error; d = 6 is rotated and anisotropic."""
    cov = torch.tensor([[SD**2]], dtype=torch.float64) if d == 1 else rotated_covariance()
    model, n = case_one(eta, cov=cov), 4000
    x = model.sample_data(n, generator=generator)
    _, info = ndm_ct.elbo(model, x, samples=8, generator=generator, return_info=True)
    exact = [
        sum(terms) for terms in zip(*(scalar_terms(float(v), eta) for v in torch.linalg.eigvalsh(cov)), strict=True)
    ]
    for term, expected in zip((info.prior, info.diffusion, info.reconstruction), exact, strict=True):
        stderr = float(term.std()) / math.sqrt(n)
        assert abs(float(term.mean()) - expected) < 4 * stderr + 1e-9
    assert info.nfe == 8
    stratified = info.stderr.square().mean().sqrt() / math.sqrt(n)
    assert 0.2 < float(stratified) / (float(info.diffusion.std()) / math.sqrt(n)) <= 1.2


def test_gap_of_the_bound_closes_at_the_best_volatility():
    """Case 1, with the Gaussian decoder and with the exact posterior p(x|z_0) as decoder."""
    alpha0, sigma0 = 1 / math.sqrt(1 + math.exp(-6)), 1 / math.sqrt(1 + math.exp(6))
    posterior = SD**2 * sigma0**2 / (alpha0**2 * SD**2 + sigma0**2)
    exact_reconstruction = entropy(posterior)
    gaps = {}
    for name, eta in ETAS.items():
        prior, diffusion, reconstruction = scalar_terms(SD**2, eta)
        gaps[name] = (
            prior + diffusion + reconstruction - entropy(SD**2),
            prior + diffusion + exact_reconstruction - entropy(SD**2),
        )
    assert gaps["1"][0] == pytest.approx(0.0298, abs=1e-4)
    assert gaps["1"][1] == pytest.approx(0.0279, abs=1e-4)
    assert gaps["star"][0] == pytest.approx(2.0e-3, abs=2e-4)
    assert abs(gaps["star"][1]) < 1e-5
    assert gaps["0.25"][0] > 1.0


def test_identity_at_volatility_one_is_the_vdm_loss():
    model = mixture(schedules.LinearLogSNR(-6, 6))
    x, eps = torch.randn(4, 8).double(), torch.randn(4, 8).double()
    t = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)
    z = model.process.sample(x, t, eps=eps)
    snr_rate = 12.0 * torch.exp(-(-6.0 + 12.0 * t))
    vdm = 0.5 * snr_rate * (x - model.predict_x(z, t)).square().sum(1)
    torch.testing.assert_close(objectives.diffusion_integrand(model, x, t, eps), vdm)
    eps_hat = (z - model.schedule.alpha(t)[:, None] * model.predict_x(z, t)) / model.schedule.sigma(t)[:, None]
    torch.testing.assert_close(vdm, 0.5 * 12.0 * (eps - eps_hat).square().sum(1))


@pytest.mark.parametrize("eta", ETAS.values(), ids=ETAS)
def test_integrand_is_the_drift_difference_over_twice_g_squared(eta):
    """||f(z, x) - f(z, model)||^2 / (2 g^2) for a nonlinear transform: the definition of the bound."""
    model = NDM(lambda z, t: 0.4 * z, (1,), transform=Wiggle(), schedule=schedules.LinearLogSNR(-6, 6), volatility=eta)
    x, eps = torch.randn(5, 1).double(), torch.randn(5, 1).double()
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    process = model.process
    z = process.sample(x, t, eps=eps)
    difference = process.reverse_drift(z, x, t) - process.reverse_drift(z, model.predict_x(z, t), t)
    expected = (difference / process.diffusion(t)[:, None]).square().sum(1) / 2
    torch.testing.assert_close(objectives.diffusion_integrand(model, x, t, eps), expected)


def test_volatility_per_frequency_is_the_same_definition():
    blur = transforms.Blur((1, 4, 4), blur=2.0)
    eta = 0.5 + torch.rand(1, 4, 4, dtype=torch.float64)
    model = NDM(
        lambda z, t: 0.4 * z, (1, 4, 4), transform=blur, schedule=schedules.LinearLogSNR(-6, 6),
        volatility=lambda t: eta.expand(t.shape[0], 1, 4, 4),
    )  # fmt: skip
    x, eps = torch.randn(3, 1, 4, 4).double(), torch.randn(3, 1, 4, 4).double()
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    process = model.process
    z = process.sample(x, t, eps=eps)
    difference = process.reverse_drift(z, x, t) - process.reverse_drift(z, model.predict_x(z, t), t)
    expected = (blur.to_basis(difference) / process.diffusion(t)).square().flatten(1).sum(1) / 2
    torch.testing.assert_close(objectives.diffusion_integrand(model, x, t, eps), expected)


def discrete_sum(model, steps):
    """The sum over t of E KL_t, exact by cubature."""
    points = hermite_points(2)
    grid, _ = objectives.times(model, torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    s, t = grid[:-1].repeat_interleave(4), grid[1:].repeat_interleave(4)
    x, eps = SD * points[:, :1].repeat(steps, 1), points[:, 1:].repeat(steps, 1)
    return float(objectives.transition_kl(model, x, s, t, eps).sum()) / 4


@pytest.mark.parametrize("eta", ETAS.values(), ids=ETAS)
def test_discrete_bound_tends_to_the_continuous_one_at_order_one(eta):
    model, steps = case_one(eta), (64, 128, 256)
    limit = scalar_terms(SD**2, eta)[1]
    errors = [abs(discrete_sum(model, n) - limit) for n in steps]
    assert order(errors, steps) == pytest.approx(1.0, abs=0.3)
    assert errors[-1] < 0.02 * limit


def test_discrete_bound_is_estimated_without_bias(generator):
    model = case_one()
    x = model.sample_data(4000, generator=generator)
    _, info = objectives.elbo_discrete(model, x, steps=10, samples=4, generator=generator, return_info=True)
    stderr = float(info.diffusion.std()) / math.sqrt(4000)
    assert abs(float(info.diffusion.mean()) - discrete_sum(model, 10)) < 4 * stderr


def test_moments_head_freezes_linearly_and_converges_to_the_same_bound():
    exact = ThreePoints(schedules.LinearLogSNR(-4, 4), Wiggle())
    model = exact.model()
    x = exact.points[:, None].repeat_interleave(4000, 0)
    weights = exact.weights.repeat_interleave(4000)

    def mean(bound):
        return float((weights * bound).sum() / weights.sum())

    values = [
        -mean(objectives.elbo_discrete(model, x, steps=n, samples=8, generator=torch.Generator().manual_seed(1)))
        for n in (8, 256)
    ]
    limit = -mean(ndm_ct.elbo(model, x, samples=8, generator=torch.Generator().manual_seed(2)))
    assert values[1] == pytest.approx(limit, abs=0.05)
    assert values[0] > values[1] + 0.02


def test_simulation_by_torchsde_integrates_the_same_diffusion_term(generator):
    """logqp=True accumulates ||f - h||^2 / (2 g^2) along simulated paths: no formula of this library is used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchsde
    model = NDM(
        lambda z, t: 0.4 * z, (1,), transform=Wiggle(0.5), schedule=schedules.LinearLogSNR(-3, 3), volatility=0.7
    )
    n, x = 4000, 0.9
    data = torch.full((n, 1), x, dtype=torch.float64)

    class Reverse(torch.nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def f(self, s, z):
            return -model.process.reverse_drift(z, data[: len(z)], (1.0 - s).expand(len(z)))

        def h(self, s, z):
            t = (1.0 - s).expand(len(z))
            return -model.process.reverse_drift(z, 0.4 * z, t)

        def g(self, s, z):
            return model.process.diffusion((1.0 - s).expand(1)).expand_as(z)

    one = torch.ones(n, dtype=torch.float64)
    z1 = model.process.sample(data, one, generator=generator)
    ts = torch.tensor([0.0, 1.0], dtype=torch.float64)
    bm = torchsde.BrownianInterval(0.0, 1.0, size=(n, 2), dtype=torch.float64, entropy=7)
    _, log_ratio = torchsde.sdeint(Reverse(), z1, ts, method="euler", dt=1 / 256, bm=bm, logqp=True)
    simulated = log_ratio[-1]
    t = torch.rand(200_000, dtype=torch.float64, generator=generator)
    many = torch.full((200_000, 1), x, dtype=torch.float64)
    eps = torch.randn(200_000, 1, dtype=torch.float64, generator=generator)
    free = objectives.diffusion_integrand(model, many, t, eps)
    stderr = math.sqrt(float(simulated.var()) / n + float(free.var()) / 200_000)
    assert abs(float(simulated.mean() - free.mean())) < 4 * stderr + 0.01 * float(free.mean())


# --- times -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule",
    [schedules.LinearLogSNR(), schedules.VariancePreserving(), schedules.Rectified(), schedules.Cosine()],
)
def test_times_are_a_change_of_variables(schedule):
    """Integrals over t by uniform u and the returned weight: gamma linear in t, finite, and infinite at t = 1."""
    model = NDM(lambda z, t: z, (1,), schedule=schedule)
    nodes, weights = np.polynomial.legendre.leggauss(400)
    t, weight = objectives.times(model, torch.tensor(0.5 * (1 + nodes)))
    assert float(t.min()) >= model.t_min
    assert float(t.max()) <= 1.0
    integral = float((torch.tensor(0.5 * weights) * weight * torch.cos(t)).sum())
    assert integral == pytest.approx(math.sin(1.0) - math.sin(model.t_min), rel=1e-6)


def test_low_discrepancy_has_one_point_in_every_cell(generator):
    u = objectives.low_discrepancy(64, generator, torch.device("cpu"))
    assert sorted((u * 64).long().tolist()) == list(range(64))


def test_low_discrepancy_times_cut_the_variance_and_keep_the_mean(generator):
    """A batch mean of u^2: the variance is 1/64 of that of independent times, expectation 1/3."""
    means = torch.stack(
        [objectives.low_discrepancy(64, generator, torch.device("cpu")).square().mean() for _ in range(2000)]
    )
    independent = (1 / 5 - 1 / 9) / 64
    assert float(means.var()) < 0.02 * independent
    assert abs(float(means.mean()) - 1 / 3) < 4 * float(means.std()) / math.sqrt(2000)


def test_infinite_end_gives_a_finite_unbiased_bound(generator):
    """Rectified has gamma(1) = infinity; its bound equals that of a schedule with the same marginals' likelihood."""
    model = Gaussian(torch.zeros(1), torch.tensor([[SD**2]]), schedule=schedules.Rectified())
    x = model.sample_data(4000, generator=generator)
    _, info = ndm_ct.elbo(model, x, samples=8, generator=generator, return_info=True)
    sigma = model.t_min / (1 - model.t_min)
    # F = identity, eta = 1: the bound is tight but for the decoder, so diffusion is a difference of entropies.
    posterior = SD**2 * sigma**2 / (SD**2 + sigma**2)
    expected = entropy(SD**2) - entropy(posterior)
    stderr = float(info.diffusion.std()) / math.sqrt(4000)
    assert abs(float(info.diffusion.mean()) - expected) < 4 * stderr
    assert float(info.prior.abs().max()) < 1e-12


# --- the sum ---------------------------------------------------------------------------------------------------------


def drawn_by_loss(model, x, seed):
    """Times, weights and noise that ``loss`` takes from a generator with this seed."""
    generator = torch.Generator().manual_seed(seed)
    t, weight = objectives.times(model, objectives.low_discrepancy(len(x), generator, x.device))
    return t, weight, torch.randn(x.shape, dtype=x.dtype, generator=generator)


def test_bound_and_loss_are_the_sums_of_their_terms():
    """The process ends at signal-to-noise ratio one, so that the prior term is large and cannot go missing unseen."""
    model = NDM(lambda z, t: 0.4 * z, (3,), schedule=schedules.LinearLogSNR(-4.0, 0.0))
    x = 2.0 * torch.randn(5, 3, dtype=torch.float64)
    end = torch.distributions.Normal(math.sqrt(0.5) * x, math.sqrt(0.5))
    prior = torch.distributions.kl_divergence(end, torch.distributions.Normal(0.0, 1.0)).sum(1)
    reconstruction = 1.5 * (math.log(2 * math.pi) + 1.0 - 4.0)
    assert float(prior.mean()) > 1.0
    bound, info = ndm_ct.elbo(model, x, samples=2, return_info=True)
    torch.testing.assert_close(info.prior, prior)
    torch.testing.assert_close(bound, -(prior + info.diffusion + reconstruction))
    t, weight, eps = drawn_by_loss(model, x, 1)
    losses = ndm_ct.loss(model, x, generator=torch.Generator().manual_seed(1))
    diffusion = weight * objectives.diffusion_integrand(model, x, t, eps)
    torch.testing.assert_close(losses, prior + diffusion + reconstruction)


@pytest.mark.parametrize("weights", [(0.1, 0.1), (0.3, 2.0), (0.0, 0.5)])
def test_moments_loss_adds_both_regressions(weights):
    """The formula of ``loss``, term by term: the derivative counts, though the bound alone could find it."""
    model = NDM(
        lambda z, t: (0.5 * z, 0.3 * z), (1,), transform=Wiggle(), schedule=schedules.LinearLogSNR(-4, 4),
        prediction="moments",
    )  # fmt: skip
    x = torch.randn(6, 1, dtype=torch.float64)
    t, weight, eps = drawn_by_loss(model, x, 1)
    objective = objectives.Bound(regressions=weights)
    losses = objective(model, x, generator=torch.Generator().manual_seed(1))
    bound = weight * objectives.diffusion_integrand(model, x, t, eps)
    bound = bound + objectives.prior_term(model, x) + objectives.reconstruction_term(model, x)
    F, dF = model.transform.with_derivative(x, t)
    z = model.process.sample(x, t, eps=eps)
    c = model.schedule(t)
    error = (weights[0] * (F - 0.5 * z) ** 2 + weights[1] * (dF - 0.3 * z) ** 2 / 8.0**2)[:, 0]
    torch.testing.assert_close(losses - bound, weight * 0.5 * (-c.gamma).exp() * 8.0 * error)
    assert objective.describe() == f"Bound(regressions={weights})"
    if weights == (0.1, 0.1):
        torch.testing.assert_close(ndm_ct.loss(model, x, generator=torch.Generator().manual_seed(1)), losses)


@pytest.mark.parametrize("weights", [0.1, None, (1.0,), (-0.1, 1.0), (1.0, math.inf), (math.nan, 1.0)])
def test_weights_of_regressions_are_two_and_finite(weights):
    """Said by ``Bound`` before a training and by ``loss``."""
    model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
    with pytest.raises(ValueError, match=r"two finite weights, none negative"):
        objectives.Bound(regressions=weights)
    with pytest.raises(ValueError, match=r"two finite weights, none negative"):
        ndm_ct.loss(model, torch.zeros(3, 2), regressions=weights)
    assert objectives.Bound(regressions=[1, 0]).describe() == objectives.Bound(regressions=(1.0, 0.0)).describe()


def test_conditioning_reaches_every_term():
    """Conditioning and the same numbers built into predictor and transform give the same bounds and the same loss."""
    numbers = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)

    def build(predictor, net):
        return NDM(
            predictor, (2,), transform=transforms.Neural(net), schedule=schedules.LinearLogSNR(-4, 1),
            t_min=0.1, prior=torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), 1.0), 1),
        )  # fmt: skip

    def by_keyword(x, t, shift=None):
        return 0.4 * x if shift is None else 0.4 * x + shift[:, None] * x.cos()

    def built_in(x, t):
        return 0.4 * x + numbers[:, None] * x.cos()

    conditioned, plain = build(by_keyword, by_keyword), build(built_in, built_in)
    bins = Quantisation(8)
    x = bins.centres(torch.tensor([[0, 7], [3, 4], [6, 1]]), torch.float64)
    for bound in (
        ndm_ct.loss,
        ndm_ct.elbo,
        lambda *args, **kwargs: ndm_ct.elbo(*args, quantisation=bins, **kwargs),
        lambda *args, **kwargs: objectives.elbo_discrete(*args, steps=3, **kwargs),
    ):
        one, other = (torch.Generator().manual_seed(1) for _ in range(2))
        given = bound(conditioned, x, generator=one, shift=numbers)
        torch.testing.assert_close(given, bound(plain, x, generator=other))


def test_the_standard_error_covers_a_prior_that_is_sampled():
    """Scatter of the bound of one point over many generators, in units of its own standard error."""
    normal = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(3), torch.full((3,), 2.0)), 1)
    model = NDM(lambda z, t: 0.3 * z, (3,), schedule=schedules.LinearLogSNR(-4.0, 0.0), prior=normal)
    x = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64).expand(2000, 3)
    bound, info = ndm_ct.elbo(model, x, samples=16, generator=torch.Generator().manual_seed(0), return_info=True)
    assert float(bound.std() / info.stderr.square().mean().sqrt()) == pytest.approx(1.0, abs=0.06)
    assert float(info.prior.std()) == pytest.approx(0.25 * float(objectives.prior_term(model, x).std()), rel=0.1)


def test_sampled_prior_term_is_the_divergence(generator):
    """A prior that knows no divergence in closed form, against one that does."""
    schedule = schedules.LinearLogSNR(-4.0, 0.0)
    normal = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(3), torch.full((3,), 2.0)), 1)
    x = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64).expand(20_000, 3)
    sampled = objectives.prior_term(NDM(lambda z, t: z, (3,), schedule=schedule, prior=normal), x, generator=generator)
    known = NDM(lambda z, t: z, (3,), schedule=schedule, prior=IsotropicNormal((3,), 2.0))
    exact = float(objectives.prior_term(known, x[:1]))
    assert abs(float(sampled.mean()) - exact) < 4 * float(sampled.std()) / math.sqrt(20_000)


# --- loss ------------------------------------------------------------------------------------------------------------


def test_loss_is_minus_the_bound_in_expectation(generator):
    model = mixture(schedules.LinearLogSNR(-6, 6))
    x = model.sample_data(1, generator=generator).expand(4000, 8).contiguous()
    losses = ndm_ct.loss(model, x, generator=generator)
    bound = ndm_ct.elbo(model, x, samples=4, generator=generator)
    stderr = math.sqrt(float(losses.var()) / 4000 + float(bound.var()) / 4000)
    assert abs(float(losses.mean() + bound.mean())) < 4 * stderr


def test_moments_loss_is_least_at_the_conditional_means():
    """Perturbing either exact moment, alone or so that the ELBO stays the same, raises the loss."""
    exact = ThreePoints(schedules.LinearLogSNR(-4, 4), Wiggle())

    def loss(shift_F, shift_dF):
        def predictor(z, t):
            F, dF = exact.moments(z, t)
            return F + shift_F, dF + shift_dF

        model = NDM(predictor, (1,), transform=exact.transform, schedule=exact.schedule, prediction="moments")
        x = exact.points[torch.multinomial(exact.weights, 4000, True, generator=torch.Generator().manual_seed(1))]
        return float(ndm_ct.loss(model, x[:, None], generator=torch.Generator().manual_seed(2)).mean())

    best = loss(0.0, 0.0)
    assert loss(0.05, 0.0) > best
    assert loss(-0.05, 0.0) > best
    assert loss(0.0, 0.5) > best
    assert loss(0.0, -0.5) > best
    # at eta = 1 the ELBO sees only F - dF/gamma', so this direction is caught by the regressions alone
    assert loss(0.05, 0.05 * 8.0) > best + 1e-3
    assert loss(-0.05, -0.05 * 8.0) > best + 1e-3


def test_moments_regressions_do_not_reach_the_transform(generator):
    """The transform's gradient is that of the bound alone."""
    net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    transform = transforms.Neural(lambda x, t: net(x) * t[:, None])
    transform.parameters_of_net = net  # registered, so that it is part of the model
    model = NDM(
        lambda z, t: (0.5 * z, 0.1 * z), (1,), transform=transform, schedule=schedules.LinearLogSNR(-4, 4),
        prediction="moments",
    )  # fmt: skip
    x = torch.randn(32, 1, dtype=torch.float64)
    ndm_ct.loss(model, x, generator=torch.Generator().manual_seed(1)).sum().backward()
    full = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    g = torch.Generator().manual_seed(1)
    t, weight = objectives.times(model, objectives.low_discrepancy(32, g, x.device))
    eps = torch.randn(x.shape, dtype=x.dtype, generator=g)
    bound = weight * objectives.diffusion_integrand(model, x, t, eps) + objectives.prior_term(model, x)
    (bound + objectives.reconstruction_term(model, x)).sum().backward()
    for ours, expected in zip(full, net.parameters(), strict=True):
        torch.testing.assert_close(ours, expected.grad)


class Coupled(torch.nn.Module):
    """A pair of networks; ``coupled`` rows see the mean of their batch."""

    def __init__(self, coupled):
        super().__init__()
        self.net, self.coupled = torch.nn.Linear(4, 6), coupled
        self.evaluations = 0

    def forward(self, z, t):
        self.evaluations += 1
        z = z - z.mean(0) if self.coupled else z
        F, dF = self.net(torch.cat([z, t[:, None]], 1)).tanh().chunk(2, 1)
        return z * F, dF


@pytest.mark.parametrize("coupled", [False, True], ids=["rows apart", "rows coupled"])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed schedule", "learned schedule"])
def test_gradients_of_moments_are_those_of_the_bound_and_the_regressions_apart(learned, coupled):
    """One evaluation gives the gradients of two: bound everywhere, regressions everywhere but in the transform."""
    torch.manual_seed(0)
    schedule = perturbed(schedules.LearnedLogSNR(-4, 4, features=4)) if learned else schedules.VariancePreserving()
    model = NDM(
        Coupled(coupled), (3,), transform=transforms.Neural(_WithTime()), schedule=schedule,
        volatility=LearnedVolatility(3), prediction="moments", t_min=0.05,
    ).double()  # fmt: skip
    x = torch.randn(16, 3, dtype=torch.float64)
    parameters = list(model.parameters())
    share = torch.full((16,), 0.7) if coupled else torch.rand(16)
    sampler = LossHistory(buckets=4)
    sampler.observe(torch.rand(50), torch.rand(50))
    before = copy.deepcopy(sampler)
    losses = ndm_ct.loss(model, x, sampler=sampler, generator=torch.Generator().manual_seed(1))
    assert model.predictor.evaluations == 1
    ours = torch.autograd.grad((share * losses).sum(), parameters, allow_unused=True)

    generator = torch.Generator().manual_seed(1)
    v, rarity = before(objectives.low_discrepancy(16, generator, x.device))
    t, weight = objectives.times(model, v)
    eps = torch.randn(x.shape, dtype=x.dtype, generator=generator)
    F, dF = (each.detach() for each in model.transform.with_derivative(x, t))
    c = model.schedule(t)
    F_hat, dF_hat = model.predictor(c.alpha[:, None] * F + c.sigma[:, None] * eps, t)
    error = (F - F_hat).square().sum(1) + (dF - dF_hat).square().sum(1) / c.dgamma**2
    integrand = objectives.diffusion_integrand(model, x, t, eps) + 0.05 * (-c.gamma).exp() * c.dgamma * error
    expected = rarity * weight * integrand + objectives.prior_term(model, x) + objectives.reconstruction_term(model, x)
    torch.testing.assert_close(losses, expected)
    theirs = torch.autograd.grad((share * expected).sum(), parameters, allow_unused=True)
    names = [name for name, _ in model.named_parameters()]
    for name, one, other in zip(names, ours, theirs, strict=True):
        assert other.abs().max() > 0.0, name
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")


class _WithTime(torch.nn.Module):
    """A network of x and t."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 3)

    def forward(self, x, t):
        return self.net(torch.cat([x, t[:, None]], 1)).tanh()


def test_learned_schedule_and_volatility_receive_unbiased_gradients(generator):
    """Finite differences of the expected bound in a schedule's and a volatility's parameter."""

    class Volatility(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.log_eta = torch.nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

        def forward(self, t):
            return self.log_eta.exp() * torch.ones_like(t)

    schedule, volatility = schedules.LearnedLogSNR(-4, 4, features=4).double(), Volatility()
    model = NDM(
        lambda z, t: 0.4 * z, (1,), transform=TRANSFORMS["moving scale"](), schedule=schedule, volatility=volatility
    )
    x = torch.full((4000, 1), 0.7, dtype=torch.float64)

    def mean():
        return sum(ndm_ct.loss(model, x, generator=torch.Generator().manual_seed(seed)).mean() for seed in range(5)) / 5

    mean().backward()
    for parameter, index in ((volatility.log_eta, ()), (schedule.weight, (1,))):
        h, gradient = 1e-2, float(parameter.grad[index])
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[index] += sign * h
                values.append(float(mean()))
                parameter[index] -= sign * h
        assert gradient == pytest.approx((values[0] - values[1]) / (2 * h), rel=0.15, abs=2e-3)


# --- decoders --------------------------------------------------------------------------------------------------------


def test_gaussian_reconstruction_is_its_expectation(generator):
    model = NDM(lambda z, t: z, (3,), transform=TRANSFORMS["moving scale"](), schedule=schedules.Rectified(), t_min=0.1)
    x = torch.randn(1, 3).double().expand(20_000, 3)
    c = model.schedule(torch.tensor(0.1, dtype=torch.float64))
    z0 = model.process.sample(x, torch.full((20_000,), 0.1).double(), generator=generator)
    decoder = torch.distributions.Normal(z0 / c.alpha, c.sigma / c.alpha)
    sampled = -decoder.log_prob(x).sum(1)
    exact = objectives.reconstruction_term(model, x)[0]
    assert abs(float(sampled.mean() - exact)) < 4 * float(sampled.std()) / math.sqrt(20_000)


@pytest.mark.parametrize(("t_min", "evaluations"), [(0.0, 0), (0.1, 1)])
def test_reconstruction_evaluates_a_transform_where_it_has_moved(t_min, evaluations):
    calls = []

    def net(x, t):
        calls.append(t)
        return x.cos()

    model = NDM(
        lambda z, t: z, (3,), transform=transforms.Neural(net), schedule=schedules.LinearLogSNR(-4, 4), t_min=t_min
    )
    x, gamma = torch.randn(5, 3, dtype=torch.float64), -4.0 + 8.0 * t_min
    expected = (t_min * x.cos()).square() * math.exp(-gamma) + 1.0 + math.log(2.0 * math.pi) + gamma
    torch.testing.assert_close(objectives.reconstruction_term(model, x), 0.5 * expected.sum(1))
    assert len(calls) == evaluations


def test_level_decoder_is_a_softmax_over_levels(generator):
    bins = Quantisation(8)
    model = NDM(lambda z, t: z, (2,), schedule=schedules.LinearLogSNR(-4.0, 5.0))
    k_level = torch.tensor([[1, 6]])
    x = bins.centres(k_level, torch.float64).expand(40_000, 2)
    nats = objectives.reconstruction_term(model, x, quantisation=bins, generator=generator)
    std = math.exp(-2.0)
    noise = torch.randn(200_000, dtype=torch.float64, generator=generator) * std
    expected = 0.0
    for level in (1, 6):
        own = bins.centres(torch.tensor(level), torch.float64)
        logits = -0.5 * ((own + noise)[:, None] - bins.centres(torch.arange(8), own.dtype)) ** 2 / std**2
        expected -= float(torch.log_softmax(logits, 1)[:, level].mean())
    assert abs(float(nats.mean()) - expected) < 4 * float(nats.std()) / math.sqrt(40_000) * 1.2


class Counting(torch.nn.Module):
    """Counts the rows it is evaluated for."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def forward(self, z, t):
        self.rows += len(z)
        return 0.5 * z


@pytest.mark.parametrize("samples", [1, 3, 8])
def test_nfe_counts_the_evaluations_of_each_row(samples):
    net = Counting()
    _, info = ndm_ct.elbo(NDM(net, (2,)), torch.randn(5, 2), samples=samples, return_info=True)
    assert net.rows == 5 * info.nfe
    assert "network evaluations of each row" in ndm_ct.ElboInfo.__doc__


def test_the_loss_of_levels_is_minus_their_bound(generator):
    """Both are estimates of the same number; an int means that many levels on (-1, 1)."""
    exact, bins = case_one(sd=0.3), Quantisation(9)
    x = bins.nearest(exact.sample_data(1, generator=generator)).expand(20_000, -1)
    x = bins.centres(x, torch.float64)
    loss = ndm_ct.loss(exact, x, quantisation=bins, generator=generator)
    bound = ndm_ct.elbo(exact, x, quantisation=bins, generator=generator)
    noise = math.sqrt(float(loss.var() + bound.var()) / len(x))
    assert abs(float((loss + bound).mean())) < 4 * noise
    density = ndm_ct.loss(exact, x, generator=generator)
    assert abs(float((density + bound).mean())) > 10 * noise
    seed = torch.Generator().manual_seed
    for function in (ndm_ct.loss, ndm_ct.elbo, objectives.reconstruction_term):
        by_number, by_bins = (function(exact, x[:4], quantisation=q, generator=seed(0)) for q in (9, bins))
        assert torch.equal(by_number, by_bins)
