"""A learned volatility finds the one that is known to be best."""

import torch

import ndm_ct
from ndm_ct import nn, objectives, schedules, transforms
from ndm_ct.volatility import LearnedVolatility


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
