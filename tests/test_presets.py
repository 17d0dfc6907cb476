"""Published objectives, written out anew, against the presets; and that each of them learns."""

import math

import numpy as np
import pytest
import torch
from scipy import fft
from scipy.optimize import brentq
from scipy.stats import laplace, norm

import ndm_ct
from ndm_ct import nn, objectives, presets, transforms
from ndm_ct.objectives.regression import Regression

ROWS = 7
EXACT = {"rtol": 1e-9, "atol": 1e-9}


class Net(torch.nn.Module):
    """Something smooth that is not linear; keeps what it was asked."""

    def __init__(self, size=2):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.a, self.b = torch.randn(2, size, size, generator=generator, dtype=torch.float64)
        self.asked = []

    def forward(self, z, t):
        self.asked.append((z, t))
        flat = z.flatten(1)
        return (torch.tanh(flat @ self.a + t[:, None]) @ self.b + 0.3 * flat).reshape(z.shape)


def data(shape=(2,)):
    return torch.randn(ROWS, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def draws(x):
    """The numbers u in [0, 1) and the noise that an objective takes from the generator."""
    generator = seeded()
    shift = torch.rand((), dtype=torch.float64, generator=generator)
    u = (shift + torch.arange(len(x), dtype=torch.float64) / len(x)) % 1.0
    return u, torch.randn(x.shape, dtype=x.dtype, generator=generator)


def square(y):
    return y.flatten(1).square().sum(1)


def column(t):
    return t[:, None]


def published_ddpm(net, x, u, eps):
    bar = torch.as_tensor(np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000)))
    k = (1000 * u).floor().long()
    root = bar[k].sqrt()
    return square(eps - net(column(root) * x + column((1.0 - bar[k]).sqrt()) * eps, k.double() / 999.0))


def published_score_sde(mean, std):
    def loss(net, x, u, eps):
        t = 1e-5 + (1.0 - 1e-5) * u
        z = column(mean(t)) * x + column(std(t)) * eps
        return square(net(z, t) * column(std(t)) + eps)

    return loss


def log_mean(t):
    return -0.25 * t**2 * 19.9 - 0.05 * t


def published_ncsn(net, x, u, eps):
    k = (10 * u).floor()
    sigma = column(torch.as_tensor(np.geomspace(0.01, 1.0, 10))[k.long()])
    z = x + sigma * eps
    return 0.5 * sigma[:, 0] ** 2 * square(net(z, k / 9.0) + (z - x) / sigma**2)


def published_edm(net, x, u, eps):
    sigma = column(torch.as_tensor(np.exp(-1.2 + 1.2 * norm.ppf(u.numpy()))))
    z, total = x + sigma * eps, sigma**2 + 0.25
    raw = -net(z / total.sqrt(), torch.log(sigma[:, 0] / 0.002) / math.log(80.0 / 0.002))
    denoised = 0.25 / total * z + sigma * 0.5 / total.sqrt() * raw
    return (total / (0.5 * sigma) ** 2)[:, 0] * square(denoised - x)


def published_flow_matching(net, x, u, eps):
    t_min = 1e-3 / 1.001  # where t / (1 - t) = 1e-3
    t = t_min + (1.0 - t_min) * u
    return square(net(column(1.0 - t) * x + column(t) * eps, t) - (eps - x))


def published_interpolant(net, x, u, eps):
    t_min = 2.0 / math.pi * math.atan(1e-3)
    t = t_min + (1.0 - t_min) * u
    cosine, sine = column(torch.cos(0.5 * math.pi * t)), column(torch.sin(0.5 * math.pi * t))
    return square(net(cosine * x + sine * eps, t) - 0.5 * math.pi * (cosine * eps - sine * x))


def published_blurring(net, x, u, eps):
    """On images of 3 x 2 pixels; the network's prediction of x passes through the same blur."""
    s = 0.008

    def angle(t):
        return 0.5 * math.pi * (t + s) / (1.0 + s)

    def alpha_of(t):
        return torch.cos(angle(t)) / math.cos(angle(0.0))

    low, high = 0.0, 0.1  # t_min: sigma / alpha = 1e-3
    for _ in range(80):
        middle = 0.5 * (low + high)
        a = float(alpha_of(torch.tensor(middle, dtype=torch.float64)))
        low, high = (middle, high) if math.sqrt(1.0 - a**2) / a < 1e-3 else (low, middle)
    t = low + (1.0 - low) * u
    alpha = alpha_of(t)[:, None, None, None]
    sigma = (1.0 - alpha**2).sqrt()
    tau = 200.0 * torch.sin(0.5 * math.pi * t)[:, None, None] ** 4
    rate = math.pi**2 * ((torch.arange(3.0) / 3.0)[:, None] ** 2 + (torch.arange(2.0) / 2.0)[None, :] ** 2).double()
    keep = ((1.0 - 1e-3) * torch.exp(-rate * tau) + 1e-3)[:, None]

    def blur(y):
        frequencies = fft.dctn(y.numpy(), axes=(-2, -1), norm="ortho")
        return torch.as_tensor(fft.idctn(keep.numpy() * frequencies, axes=(-2, -1), norm="ortho"))

    z = alpha * blur(x) + sigma * eps
    total = alpha**2 + sigma**2
    x_hat = alpha / total * z - sigma / total.sqrt() * net(z / total.sqrt(), t)
    return square(eps - (z - alpha * blur(x_hat)) / sigma)


def vp_std(t):
    return (1.0 - torch.exp(2.0 * log_mean(t))).sqrt()


PUBLISHED = {
    "ddpm": published_ddpm,
    "ddim": published_ddpm,
    "score_sde_vp": published_score_sde(lambda t: torch.exp(log_mean(t)), vp_std),
    "score_sde_subvp": published_score_sde(lambda t: torch.exp(log_mean(t)), lambda t: vp_std(t) ** 2),
    "score_sde_ve": published_score_sde(torch.ones_like, lambda t: 0.01 * 5000.0**t),
    "ncsn": published_ncsn,
    "edm": published_edm,
    "flow_matching": published_flow_matching,
    "rectified_flow": published_flow_matching,
    "interpolant": published_interpolant,
    "blurring": published_blurring,
}


def shape_of(name):
    return (1, 3, 2) if name == "blurring" else (2,)


@pytest.mark.parametrize("name", PUBLISHED)
def test_objective_is_the_published_one(name):
    """Weights, times, the meaning of the network and what it is asked."""
    shape = shape_of(name)
    net, x = Net(math.prod(shape)), data(shape)
    model, objective, _ = presets.PRESETS[name](net, shape)
    ours = objective(model, x, generator=seeded())
    (z, t) = net.asked.pop()
    theirs = PUBLISHED[name](net, x, *draws(x))
    # The formulas lose digits in 1 - alpha^2 at small t, and blurring divides by sigma there.
    close = {"rtol": 1e-6 if name == "blurring" else 1e-8, "atol": 1e-8}
    torch.testing.assert_close(ours, theirs, **close)
    torch.testing.assert_close(z, net.asked[-1][0], **close)
    torch.testing.assert_close(t, net.asked[-1][1], **EXACT)


def test_every_preset_has_its_formula():
    assert {*PUBLISHED, "vdm", "indm", "lsgm", "diffenc", "mulan", "nfdm", "mean_flow"} == set(presets.PRESETS)


def test_vdm_is_the_published_bound():
    """Prior, diffusion and reconstruction with gamma(t) and its derivative by autograd."""
    net, x = Net(), data()
    model, objective, _ = presets.vdm(net, (2,), gamma_min=-8.0, gamma_max=4.0)
    model.double()
    with torch.no_grad():
        for parameter in model.schedule.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=seeded(), dtype=torch.float64))
    _, eps = draws(x)
    t = torch.linspace(0.1, 0.9, ROWS, dtype=torch.float64, requires_grad=True)
    gamma = model.schedule.gamma(t)
    (slope,) = torch.autograd.grad(gamma.sum(), t, retain_graph=True)
    alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
    predicted = net(column(alpha) * x + column(sigma) * eps, t)
    diffusion = 0.5 * slope * square(eps - predicted)
    ours = objectives.diffusion_integrand(model, x, t.detach(), eps)
    torch.testing.assert_close(ours, diffusion.detach(), rtol=1e-7, atol=1e-7)
    g0, g1 = -8.0, 4.0
    a1, s1 = 1.0 / (1.0 + math.exp(g1)), 1.0 / (1.0 + math.exp(-g1))
    prior = 0.5 * square(x) * a1 + 0.5 * 2 * (s1 - 1.0 - math.log(s1))
    torch.testing.assert_close(objectives.prior_term(model, x), prior, **EXACT)
    reconstruction = torch.full((ROWS,), 0.5 * 2 * (1.0 + math.log(2.0 * math.pi) + g0), dtype=torch.float64)
    torch.testing.assert_close(objectives.reconstruction_term(model, x), reconstruction, **EXACT)
    assert objective.describe() == f"Bound(LearnedBuckets({objective.sampler.describe()}), regressions=(0.1, 0.1))"


def test_vdm_learns_the_ends_of_its_schedule():
    """The slope of the bound in both, against a difference with the same random numbers; and ends that move it."""
    x, reached = data(), {}
    for gamma_min, gamma_max in ((-8, 4), (-3.0, 1.0)):
        model, _, _ = presets.vdm(Net(), (2,), gamma_min=gamma_min, gamma_max=gamma_max, learn_ends=True)
        model.double()
        ends = (model.schedule.first, model.schedule.log_range)
        value = objectives.loss(model, x, generator=seeded()).sum()
        for end, slope in zip(ends, torch.autograd.grad(value, ends), strict=True):
            sides = []
            for h in (1e-5, -1e-5):
                end.data += h
                sides.append(float(objectives.loss(model, x, generator=seeded()).sum().detach()))
                end.data -= h
            assert float(slope) == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-5)
        t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        reached[gamma_min] = model.schedule.gamma(t).detach().tolist()
    assert reached == {-8.0: pytest.approx([-8.0, 4.0]), -3.0: pytest.approx([-3.0, 1.0])}


class Shear(torch.nn.Module):
    """y = (a, e^b + a^3), of x = (a, b)."""

    def forward(self, x):
        a, b = x.unbind(1)
        return torch.stack([a, b.exp() + a**3], 1), b

    def inverse(self, y):
        a, b = y.unbind(1)
        return torch.stack([a, (b - a**3).log()], 1)


class Halves(torch.nn.Module):
    """An encoder of four numbers by two, and the decoder back."""

    def __init__(self, back=False):
        super().__init__()
        self.back = back

    def forward(self, x):
        if self.back:
            mean = torch.cat([x, x.sin()], 1)
            return torch.distributions.Independent(torch.distributions.Laplace(mean, 0.5), 1)
        return 0.5 * (x[:, :2] + x[:, 2:]), -1.0 + 0.1 * x[:, :2]


def noise_level(u):
    """Times of the VP process uniform in gamma over [1e-5, 1]; alpha, sigma, and (g / sigma)^2 over their density."""

    def gamma(t):
        return math.log(-math.expm1(2.0 * log_mean(t))) - 2.0 * log_mean(t)

    low, high = gamma(1e-5), gamma(1.0)
    found = [brentq(lambda t, v=v: gamma(t) - low - (high - low) * v, 1e-5, 1.0) for v in u.tolist()]
    t = torch.tensor(found, dtype=torch.float64)
    alpha = torch.exp(log_mean(t))
    # (g / sigma)^2 is the slope of gamma, and the density of the times that slope over the span.
    return t, column(alpha), column((1.0 - alpha**2).sqrt()), high - low


def ends(y):
    """KL of the end from the standard normal, and the entropy of the noise at the start in units of y."""
    a1, s1 = math.exp(2.0 * log_mean(1.0)), 1.0 - math.exp(2.0 * log_mean(1.0))
    prior = 0.5 * square(y) * a1 + s1 - 1.0 - math.log(s1)
    s0 = -math.expm1(2.0 * log_mean(1e-5)) / math.exp(2.0 * log_mean(1e-5))
    return prior + math.log(2.0 * math.pi * math.e * s0)


def test_indm_is_the_published_objective():
    """Likelihood-weighted score matching of h(x), less the log-determinant of h; the flow in the score's place."""
    net, x = Net(), data()
    model, objective, _ = presets.indm(net, (2,), flow=Shear())
    ours = objective(model, x, generator=seeded())
    u, eps = draws(x)
    t, alpha, sigma, span = noise_level(u)
    y = torch.stack([x[:, 0], x[:, 1].exp() + x[:, 0] ** 3], 1)
    matching = 0.5 * span * square(sigma * net(alpha * y + sigma * eps, t) + eps)
    torch.testing.assert_close(ours, matching + ends(y) - x[:, 1], rtol=1e-6, atol=1e-6)


def test_lsgm_is_the_published_objective():
    """Reconstruction, minus the encoder's entropy, cross entropy by the noise; mixed prediction."""
    net, x = Net(), data((4,))
    model, objective, _ = presets.lsgm(net, (2,), encoder=Halves(), decoder=Halves(back=True), data_shape=(4,))
    model.double()
    with torch.no_grad():
        model.predictor.share.copy_(torch.tensor([0.5, -1.0]))
    ours = objective(model, x, generator=seeded()).detach()
    generator = seeded()
    shift = torch.rand((), dtype=torch.float64, generator=generator)
    u = (shift + torch.arange(ROWS, dtype=torch.float64) / ROWS) % 1.0
    of_encoder, eps = (torch.randn(ROWS, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    std = torch.exp(-1.0 + 0.1 * x[:, :2])
    y = 0.5 * (x[:, :2] + x[:, 2:]) + std * of_encoder
    log_q = torch.as_tensor(norm.logpdf(y, 0.5 * (x[:, :2] + x[:, 2:]), std)).sum(1)
    log_p = torch.as_tensor(laplace.logpdf(x, torch.cat([y, y.sin()], 1), 0.5)).sum(1)
    t, alpha, sigma, span = noise_level(u)
    z = alpha * y + sigma * eps
    share = torch.sigmoid(torch.tensor([0.5, -1.0], dtype=torch.float64))
    predicted = (1.0 - share) * sigma * z + share * net(z, t)
    cross_entropy = 0.5 * span * square(eps - predicted) + ends(y)
    torch.testing.assert_close(ours, -log_p + log_q + cross_entropy, rtol=1e-6, atol=1e-6)


class DataNet(Net):
    """Another smooth network, of data and time."""

    def forward(self, x, t):
        return torch.sin(super().forward(x, t) + t[:, None] ** 2)


def bound_draws(x, schedule):
    """Times uniform in the log-SNR, their weights, and the noise."""
    u, eps = draws(x)
    low, high = schedule.gamma(torch.tensor([0.0, 1.0], dtype=torch.float64))
    t = schedule.time_at(torch.atan(torch.exp(0.5 * (low + (high - low) * u))))
    return t, (high - low) / schedule(t).dgamma, eps


def test_diffenc_is_the_published_objective():
    r"""1/2 gamma' alpha^2 ||v - v_hat + sigma (x_hat - x_t + y + dy/dgamma)||^2."""
    net, encoder, x = Net(), DataNet(), data()
    model, objective, _ = presets.diffenc(net, (2,), encoder=encoder, gamma_min=-8.0)
    t, weight, eps = bound_draws(x, model.schedule)
    gamma = -8.0 + 13.0 * t
    alpha, sigma = torch.sigmoid(-gamma).sqrt()[:, None], torch.sigmoid(gamma).sqrt()[:, None]
    y, dy = torch.func.jvp(lambda gamma: encoder(x, (gamma + 8.0) / 13.0), (gamma,), (torch.ones_like(gamma),))
    x_t = alpha**2 * x + sigma**2 * y
    z = alpha * x_t + sigma * eps
    v, v_hat = alpha * eps - sigma * x_t, net(z, t)
    estimate = alpha * z - sigma * v_hat
    inside = v - v_hat + sigma * (estimate - x_t + y + dy)
    diffusion = weight * 0.5 * 13.0 * alpha[:, 0] ** 2 * square(inside)
    rest = objectives.prior_term(model, x) + objectives.reconstruction_term(model, x)
    ours = objective(model, x, generator=seeded())
    torch.testing.assert_close(ours - rest, diffusion, rtol=1e-6, atol=1e-6)


def test_mulan_is_the_published_objective():
    r"""1/2 sum of gamma_i' exp(-gamma_i) (x_i - x_hat_i)^2, the network at a state of common noise."""
    net, x = Net(), data()
    model, objective, _ = presets.mulan(net, (2,), gamma_min=-8.0)
    model.double()
    with torch.no_grad():
        model.transform.coefficients.add_(0.4 * torch.randn(2, 3, generator=seeded()))
    a, b, d = model.transform.coefficients.detach().unbind(1)

    def polynomial(t):
        return a**2 * t**5 / 5 + a * b * t**4 / 2 + (b**2 + 2 * a * d) * t**3 / 3 + b * d * t**2 + d**2 * t

    t, weight, eps = bound_draws(x, model.schedule)
    gamma_of = lambda t: -8.0 + 13.0 * polynomial(t[:, None]) / polynomial(torch.ones(1, dtype=torch.float64))  # noqa: E731
    gamma, rate = torch.func.jvp(gamma_of, (t,), (torch.ones_like(t),))
    alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
    z = alpha * x + sigma * eps
    # The library's state has one noise for all coordinates; the network sees that.
    z_own = model.schedule.sigma(t)[:, None] * z / sigma
    estimate = model.predict_x(z_own, t)
    diffusion = weight * 0.5 * (rate * torch.exp(-gamma) * (x - estimate) ** 2).sum(1)
    rest = objectives.prior_term(model, x) + objectives.reconstruction_term(model, x)
    ours = objective(model, x, generator=seeded())
    torch.testing.assert_close(ours - rest, diffusion, rtol=1e-6, atol=1e-6)


def test_nfdm_is_the_published_objective():
    r"""||f(z, x) - f(z, x_hat)||^2 / (2 g^2), f = dz/dt - g^2/2 score, at the noise that maps the data to z."""
    net, mean, scale, x = Net(), DataNet(), Net(), data()
    model, objective, _ = presets.nfdm(net, (2,), mean=mean, scale=scale, end=0.05)
    model.double()
    with torch.no_grad():
        model.process.volatility.coefficients.add_(0.3)
    t, weight, eps = bound_draws(x, model.schedule)

    def affine(x, t):
        time = t[:, None]
        loc = (1.0 - 0.95 * time) * (x + time * mean(x, t))
        return loc, 0.01 ** (1.0 - time) * torch.exp(time * (1.0 - time) * scale(x, t))

    def drift(z, x):
        loc, std = affine(x, t)
        eps = (z - loc) / std

        def path(t):
            loc, std = affine(x, t)
            return loc + std * eps

        _, dz = torch.func.jvp(path, (t,), (torch.ones_like(t),))
        return dz - 0.5 * g**2 * (loc - z) / std**2

    g = model.process.diffusion(t)[:, None]
    loc, std = affine(x, t)
    z = loc + std * eps
    estimate = model.predict_x(z, t)
    diffusion = weight * 0.5 * square((drift(z, x) - drift(z, estimate)) / g)
    rest = objectives.prior_term(model, x) + objectives.reconstruction_term(model, x)
    ours = objective(model, x, generator=seeded())
    torch.testing.assert_close(ours - rest, diffusion, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 400, 999])
def test_discrete_bound_of_ddpm(k):
    r""":math:`L_{k-1} = \frac{\beta^2}{2 \tilde\beta \alpha (1 - \bar\alpha)} \|\epsilon - \hat\epsilon\|^2`."""
    net, x = Net(), data()
    model, _, _ = presets.ddpm(net, (2,))
    beta = np.linspace(1e-4, 0.02, 1000)
    bar = np.cumprod(1.0 - beta)
    _, eps = draws(x)
    times = [torch.full((ROWS,), j / 999.0, dtype=torch.float64) for j in (k - 1, k)]
    ours = objectives.transition_kl(model, x, *times, eps)
    posterior = beta[k] * (1.0 - bar[k - 1]) / (1.0 - bar[k])
    weight = beta[k] ** 2 / (2.0 * posterior * (1.0 - beta[k]) * (1.0 - bar[k]))
    error = square(eps - net(math.sqrt(bar[k]) * x + math.sqrt(1.0 - bar[k]) * eps, times[1]))
    torch.testing.assert_close(ours, weight * error, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["F", "eps", "velocity"])
def test_regressions_vanish_at_the_truth_and_nowhere_else(name):
    """With a moving F; the velocity is the derivative of the state along the path."""

    class Truth(torch.nn.Module):
        def forward(self, z, t):
            return x + off

    x, off = data(), 0.0
    scale = transforms.TimeScaling(lambda t: 1.0 + t**2)
    model = ndm_ct.NDM(Truth(), (2,), transform=scale, schedule=ndm_ct.schedules.LinearLogSNR(-5.0, 4.0))
    regression = Regression(name)
    assert float(regression(model, x, generator=seeded()).abs().max()) < 1e-18
    off = torch.tensor([0.3, -0.1], dtype=torch.float64)
    t = torch.linspace(0.1, 1.0, ROWS, dtype=torch.float64)
    _, eps = draws(x)
    found = regression.at(model, x, t, eps)
    c, k = model.schedule(t), 1.0 + t**2
    rate = {
        "F": k,
        "eps": c.alpha / c.sigma * k,
        "velocity": (c.dalpha - c.alpha * c.dsigma / c.sigma) * k + c.alpha * 2.0 * t,
    }[name]
    torch.testing.assert_close(found, rate**2 * 0.1, **EXACT)


def test_velocity_is_that_of_the_state():
    """By a difference of two states with the same noise."""
    model, _, _ = presets.interpolant(Net(), (2,))
    x, h = data(), 1e-6
    t = torch.linspace(0.1, 0.9, ROWS, dtype=torch.float64)
    _, eps = draws(x)

    def state(t):
        c = model.schedule(t)
        return column(c.alpha) * x + column(c.sigma) * eps

    u = (state(t + h) - state(t - h)) / (2.0 * h)
    exact = nn.FromVelocity(lambda z, t: u)
    torch.testing.assert_close(exact(state(t), t, model.schedule), x, rtol=1e-7, atol=1e-7)


def test_score_is_that_of_the_kernel():
    model, _, _ = presets.score_sde_subvp(Net(), (2,))
    x, t = data(), torch.linspace(0.1, 0.9, ROWS, dtype=torch.float64)
    c = model.schedule(t)
    exact = nn.FromScore(lambda z, t: (column(c.alpha) * x - z) / column(c.sigma**2))
    z = data() + 0.5
    torch.testing.assert_close(exact(z, t, model.schedule), x, **EXACT)


def test_a_regression_leaves_no_transform_to_train():
    learned = transforms.Neural(nn.MLP(2, width=8))
    model = ndm_ct.NDM(nn.Preconditioned(nn.MLP(2, width=8)), (2,), transform=learned)
    x = data().float()
    with pytest.raises(ValueError, match=r"does not determine F, but Neural has parameters.*objective=None|bound"):
        Regression("eps")(model, x)
    learned.requires_grad_(False)
    assert Regression("eps")(model, x, generator=seeded()).shape == (ROWS,)


def test_bad_regressions_and_presets():
    with pytest.raises(ValueError, match="target='epsilon' is unknown; did you mean 'eps'"):
        Regression("epsilon")
    with pytest.raises(ValueError, match="levels must be at least 2"):
        presets.ncsn(Net(), (2,), levels=1)
    with pytest.raises(ValueError, match=r"FromScore finds x.*Cosine has alpha\(1\) = 0; use FromVelocity"):
        ndm_ct.NDM(nn.FromScore(Net()), (2,), schedule=ndm_ct.schedules.Cosine())
    with pytest.raises(ValueError, match="event of at least two axes"):
        presets.blurring(nn.MLP(2), (2,))


def test_fit_takes_objectives(tmp_path):
    """Its loss is the objective's, without bits per dimension; a resumed training must have the same."""
    x = torch.randn(64, 2, generator=seeded())
    options = {"steps": 4, "batch_size": 16, "progress": False, "log_every": 1, "warmup": 0}
    model, objective, _ = presets.edm(nn.MLP(2, width=8), (2,))
    seen = []

    def watched(model, x, **kwargs):
        seen.append(objective(model, x, **kwargs))
        return seen[-1]

    result = ndm_ct.fit(model, x, objective=watched, **options)
    assert [row["loss"] for row in result.history] == [float(loss.detach().mean()) for loss in seen]
    model, objective, _ = presets.edm(nn.MLP(2, width=8), (2,))
    result = ndm_ct.fit(model, x, objective=objective, run_dir=tmp_path, **options)
    assert "bits_per_dim" not in result.history[0]
    again = ndm_ct.fit(model, x, objective=presets.edm(nn.MLP(2), (2,)).objective, run_dir=tmp_path, **options)
    assert again.finished
    for other in (objectives.loss, presets.edm(nn.MLP(2), (2,), data_std=0.6).objective, watched):
        with pytest.raises(ValueError, match="objective was"):
            ndm_ct.fit(model, x, objective=other, run_dir=tmp_path, **options)


def test_heads_survive_a_file(tmp_path):
    for constructor in (presets.flow_matching, presets.score_sde_vp):
        model = constructor(nn.MLP(2, width=8), (2,)).model
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=seeded()))
        ndm_ct.save(model, tmp_path / "model.safetensors")
        loaded = ndm_ct.load(tmp_path / "model.safetensors")
        z, t = torch.randn(3, 2, generator=seeded()), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
        assert torch.equal(loaded.predict_x(z, t), model.predict_x(z, t))


@pytest.mark.slow
@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_learns_eight_gaussians(name):
    """A tenth of the steps of ``benchmarks/special_cases.py``; samples by the preset's own method."""
    special_cases = pytest.importorskip("special_cases")
    if name == "indm":
        pytest.importorskip("zuko")
    row, _ = special_cases.measure(name, 1000, special_cases.mixture(), 1000)
    assert -3.0 * row["excess_nll_se"] < row["excess_nll"] < 0.3
    assert row["energy_distance"] < 6.0 * row["energy_unit"]
