"""A learned volatility finds the one that is known to be best."""

import pytest
import torch

import ndm_ct
from ndm_ct import nn, objectives, schedules, transforms
from ndm_ct.schedules.volatility import LearnedVolatility, Matched


def scale(t):
    return 1.0 + 1.5 * t


def test_bound_is_best_at_the_known_volatility():
    r"""Data of one dimension, F = k(t) x, exact predictor: :math:`\eta^* = 1 - 2 (\log k)'/\gamma'`."""
    eta = LearnedVolatility(4).double()
    model = ndm_ct.reference.Gaussian(
        torch.zeros(1), 0.64 * torch.eye(1), schedule=schedules.LinearLogSNR(-6.0, 6.0),
        transform=transforms.TimeScaling(scale), volatility=eta,
    )  # fmt: skip
    n = 20_000
    t = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    generator = torch.Generator().manual_seed(0)
    x, eps = model.sample_data(n, generator=generator), torch.randn(n, 1, dtype=torch.float64, generator=generator)

    def bound():
        return objectives.diffusion_integrand(model, x, t, eps).mean()

    before = float(bound().detach())
    optimizer = torch.optim.LBFGS(eta.parameters(), max_iter=40, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = bound()
        value.backward()
        return value

    optimizer.step(closure)
    best = 1.0 - 2.0 * (1.5 / scale(t)) / 12.0
    found = eta(t).detach()
    # The loss is nearly flat in eta; what it costs is second order in the difference.
    assert float(((found - best) / best).abs().max()) < 0.08
    with torch.no_grad():
        reached = float(bound())
        eta.coefficients.zero_()
        fitted = torch.linalg.lstsq(basis(t), best.log()[:, None]).solution[:, 0]
        eta.coefficients.copy_(fitted)
        exact = float(bound())
        eta.coefficients.copy_(-fitted)
        wrong = float(bound())
    assert reached - 1e-9 <= exact < min(before, wrong)
    assert exact - reached < 1e-3
    assert before - exact > 0.01


def basis(t):
    angle = torch.arccos(2.0 * t - 1.0)
    return torch.stack([torch.cos(k * angle) for k in range(4)], dim=1)


class Scaled(torch.nn.Module):
    """Another volatility times a factor for every coordinate."""

    def __init__(self, eta):
        super().__init__()
        self.eta, self.factor = eta, torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))

    def forward(self, t):
        eta = self.eta(t)
        return eta.reshape(*t.shape, *eta.shape[t.ndim :], *(1,) * (2 + t.ndim - eta.ndim)) * self.factor


def learned_scaling():
    transform = transforms.LearnedScaling((2, 2), 2).double()
    with torch.no_grad():
        transform.coefficients.copy_(torch.tensor([[[-0.5, 0.2], [0.4, 0.3]], [[0.0, -2.0], [1.0, 0.5]]]))
    return transform.requires_grad_(False)


@pytest.mark.parametrize("transform", [
    transforms.Blur((2, 2), blur=1.0, floor=0.2), transforms.Subspaces((2, 2), (1,), (0.9,), width=0.8, floor=0.3),
    transforms.TimeScaling(scale), learned_scaling(), transforms.Identity(),
], ids=lambda transform: type(transform).__name__)  # fmt: skip
def test_the_matched_volatility_is_the_best_one(transform):
    """Exact predictor: the slope of the bound in eta vanishes there, for every coordinate, at every time."""
    cov, schedule = torch.diag(torch.tensor([1.5, 0.8, 0.4, 0.2])), schedules.LinearLogSNR(-5.0, 4.0)
    eta = Scaled(lambda t: Matched()(t, transform.log_rate(t), schedule(t).inverse_dgamma))
    options = {"schedule": schedule, "transform": transform}
    model = ndm_ct.reference.Gaussian(torch.zeros(2, 2), cov, volatility=eta, **options)
    generator = torch.Generator().manual_seed(0)
    x = model.sample_data(500, generator=generator)
    eps = torch.randn(500, 2, 2, dtype=torch.float64, generator=generator)
    t = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    bound = objectives.diffusion_integrand(model, x, t, eps).mean()
    (slope,) = torch.autograd.grad(bound, eta.factor)
    bound = float(bound.detach())
    assert float(slope.abs().max()) < 1e-9 * bound
    plain = ndm_ct.reference.Gaussian(torch.zeros(2, 2), cov, **options)
    gain = float(objectives.diffusion_integrand(plain, x, t, eps).mean()) - bound
    assert abs(gain) < 1e-12 if isinstance(transform, transforms.Identity) else gain > 1e-3


def test_a_log_snr_for_every_coordinate():
    r"""A learned scaling is :math:`\tfrac12 \sum_i \int \gamma_i' e^{-\gamma_i} (x_i - \hat x_i)^2 dt`."""
    transform, schedule = learned_scaling(), schedules.LinearLogSNR(-5.0, 4.0)
    model = ndm_ct.NDM(
        lambda z, t: torch.tanh(z), (2, 2), schedule=schedule, transform=transform, volatility=Matched()
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 6, 2, 2, dtype=torch.float64, generator=generator)
    t = torch.linspace(0.05, 0.95, 6, dtype=torch.float64, requires_grad=True)
    powers = torch.stack([t, t**2], 1)
    gamma = (-5.0 + 9.0 * t)[:, None, None] - 2.0 * torch.einsum("bk,ijk->bij", powers, transform.coefficients)
    slope = torch.stack([
        torch.autograd.grad(gamma[:, i, j].sum(), t, retain_graph=True)[0] for i in range(2) for j in range(2)
    ], 1).reshape(6, 2, 2)  # fmt: skip
    assert float(slope.min()) > 0.0
    c = schedule(t.detach())
    alpha, sigma = c.alpha[:, None, None], c.sigma[:, None, None]
    z = sigma * (torch.exp(-0.5 * gamma) * x + eps)  # the signal of coordinate i, in units of its noise
    torch.testing.assert_close(z, alpha * transform(x, t.detach()) + sigma * eps)
    expected = 0.5 * (slope * torch.exp(-gamma) * (x - torch.tanh(z)) ** 2).sum((1, 2))
    found = objectives.diffusion_integrand(model, x, t.detach(), eps)
    torch.testing.assert_close(found, expected.detach())


def test_a_matched_volatility_follows_the_model_it_is_in(tmp_path):
    torch.manual_seed(0)
    transform, eta = transforms.LearnedScaling((2, 2)), Matched()
    with torch.no_grad():
        transform.coefficients.copy_(0.3 * torch.randn(2, 2, 3))
    model = ndm_ct.NDM(
        nn.Preconditioned(nn.MLP((2, 2), width=8)), (2, 2), schedule=schedules.LearnedLogSNR(), transform=transform,
        volatility=eta,
    )  # fmt: skip
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    ndm_ct.save(model, tmp_path / "model.safetensors")
    loaded = ndm_ct.load(tmp_path / "model.safetensors")
    assert loaded.process.eta(t).shape == (2, 2, 2)
    assert torch.equal(loaded.process.eta(t), model.process.eta(t))
    loss = ndm_ct.loss(model, torch.randn(3, 2, 2)).sum()
    assert float(torch.autograd.grad(loss, transform.coefficients)[0].abs().min()) > 0.0
    other = ndm_ct.NDM(nn.MLP((2, 2), width=8), (2, 2), transform=transforms.Identity(), volatility=eta)
    assert torch.equal(other.process.eta(t), torch.ones_like(t))  # one volatility serves any number of models
    assert torch.equal(loaded.process.eta(t), model.process.eta(t))
    with pytest.raises(ValueError, match="which Neural does not; use LearnedVolatility"):
        ndm_ct.NDM(
            nn.MLP(2, width=8), (2,), transform=transforms.Neural(nn.MLP(2, width=8)), volatility=Matched()
        )  # fmt: skip


def test_it_is_the_chebyshev_series_and_survives_a_file(tmp_path):
    eta = LearnedVolatility(3)
    with torch.no_grad():
        eta.coefficients.copy_(torch.tensor([0.1, -0.2, 0.3]))
    t = torch.linspace(0.0, 1.0, 7)
    u = 2.0 * t - 1.0
    torch.testing.assert_close(eta(t), torch.exp(0.1 - 0.2 * u + 0.3 * (2.0 * u**2 - 1.0)))
    model = ndm_ct.NDM(nn.Preconditioned(nn.MLP(2, width=8)), (2,), volatility=eta)
    ndm_ct.save(model, tmp_path / "model.safetensors")
    loaded = ndm_ct.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded.process.volatility(t), eta(t))


def test_training_reaches_it():
    """``fit`` trains the coefficients with everything else."""
    torch.manual_seed(0)
    model = ndm_ct.NDM(
        nn.Preconditioned(nn.MLP(1, width=16, depth=1)), (1,), schedule=schedules.LinearLogSNR(-6.0, 6.0),
        transform=transforms.TimeScaling(lambda t: 1.0 + 3.0 * t), volatility=LearnedVolatility(2),
    )  # fmt: skip
    ndm_ct.fit(model, 0.8 * torch.randn(512, 1), steps=60, batch_size=128, progress=False, ema=0.0)
    assert float(model.process.volatility(torch.tensor([0.5])).detach()) < 0.98
