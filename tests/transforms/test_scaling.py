"""A log-SNR for every coordinate of a basis: the bases, the ends, behind a flow, and the published polynomial."""

import math

import pytest
import torch
from oracles import perturbed

import ndm_ct
from ndm_ct import NDM, objectives, schedules, transforms
from ndm_ct.schedules import Matched

SCHEDULE = schedules.LinearLogSNR(-6.0, 4.0)
BASES = {
    "DCT of a vector": lambda: transforms.DCT((6,)),
    "DCT of an image": lambda: transforms.DCT((2, 4, 6)),
    "Haar of a vector": lambda: transforms.Haar((8,), 3),
    "Haar of an image": lambda: transforms.Haar((2, 4, 8), 2),
    "Rotation": lambda: transforms.Rotation.principal(torch.randn(50, 2, 3, dtype=torch.float64)),
}


def time(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_bases_are_orthonormal(make):
    basis = make()
    x = torch.randn(5, *basis.event_shape, dtype=torch.float64)
    y = basis(x)
    torch.testing.assert_close(basis.inverse(y), x)
    torch.testing.assert_close(y.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    torch.testing.assert_close(basis(basis.inverse(x)), x)


def test_haar_by_hand():
    """One level of an image: means and three differences of every square of four."""
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    y = transforms.Haar((1, 4, 4))(x)
    square = x[0, 0, 2:, :2]
    signs = {
        (1, 0): [[1, 1], [1, 1]],
        (1, 2): [[1, -1], [1, -1]],
        (3, 0): [[1, 1], [-1, -1]],
        (3, 2): [[1, -1], [-1, 1]],
    }
    for (row, column), sign in signs.items():
        assert float(y[0, 0, row, column]) == pytest.approx(float((square * time(sign)).sum()) / 2.0)


def test_haar_of_odd_sizes_is_refused():
    with pytest.raises(ValueError, match="must be multiples of 4"):
        transforms.Haar((6,), 2)


def test_principal_components_have_no_correlation():
    x = torch.randn(200, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64)
    covariance = transforms.Rotation.principal(x)(x).mT.cov()
    torch.testing.assert_close(covariance, covariance.diagonal().diag())
    assert bool((covariance.diagonal().diff() < 0.0).all())


def predicted(z, t):
    return torch.tanh(z)


def moved(scaling):
    with torch.no_grad():
        if scaling.learn_start:
            scaling.start.copy_(0.5 * torch.randn(scaling.start.shape))
    return scaling


KINDS = {
    "LearnedScaling": lambda **options: perturbed(transforms.LearnedScaling((3,), 2, **options)),
    "PolynomialLogSNR": lambda **options: perturbed(transforms.PolynomialLogSNR((3,), -6.0, 4.0, **options)),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_the_bound_is_that_of_one_log_snr_per_coordinate(kind):
    r"""1/2 sum of gamma_i' exp(-gamma_i) (x_i - x_hat_i)^2, with gamma_i(0) moved by the learned start."""
    scaling = moved(KINDS[kind](learn_start=True))
    model = NDM(predicted, (3,), transform=scaling, schedule=SCHEDULE, volatility=Matched())
    x, eps = torch.randn(2, 5, 3, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    y, weight = model.to_latent(x)
    start = scaling.start.double()
    torch.testing.assert_close(y, start.exp() * x)
    torch.testing.assert_close(weight, start.sum().expand(5))

    def gamma(t):
        return SCHEDULE.gamma(t)[:, None] - 2.0 * scaling.logs(t)[0] - 2.0 * start

    value, rate = torch.func.jvp(gamma, (t,), (torch.ones_like(t),))
    c = SCHEDULE(t)
    z = c.alpha[:, None] * scaling.logs(t)[0].exp() * y + c.sigma[:, None] * eps
    estimate = torch.exp(-start) * predicted(z, t)
    expected = 0.5 * (rate.abs() * torch.exp(-value) * (x - estimate) ** 2).sum(1)
    increasing = bool((rate > 0.0).all())
    assert increasing or kind == "LearnedScaling"
    found = objectives.diffusion_integrand(model, y, t, eps)
    keep = (rate > 0.0).all(1)
    torch.testing.assert_close(found[keep], expected[keep])
    assert bool(keep.any())


def test_the_polynomial_is_the_published_one():
    """The integral of a square, between the ends of the schedule."""
    scaling = perturbed(transforms.PolynomialLogSNR((2,), -6.0, 4.0), 0.7)
    a, b, d = scaling.coefficients.detach().double().unbind(1)
    nodes = torch.linspace(0.0, 1.0, 20001, dtype=torch.float64)[:, None]
    whole = torch.trapezoid((a * nodes**2 + b * nodes + d) ** 2, nodes, dim=0)
    part = torch.trapezoid((a * (0.3 * nodes) ** 2 + b * 0.3 * nodes + d) ** 2, 0.3 * nodes, dim=0)
    gamma = SCHEDULE.gamma(time(0.3)) - 2.0 * scaling.logs(time(0.3))[0]
    torch.testing.assert_close(gamma.detach(), -6.0 + 10.0 * part / whole, rtol=1e-7, atol=1e-7)
    for end, value in ((0.0, -6.0), (1.0, 4.0)):
        found = SCHEDULE.gamma(time(end)) - 2.0 * scaling.logs(time(end))[0]
        torch.testing.assert_close(found.detach(), torch.full_like(found, value))


@pytest.mark.parametrize("basis", [None, "rotation"])
def test_a_learned_start_adds_its_log_determinant(basis):
    """Bound and likelihood are those of the scaled data plus the sum of the logarithms."""
    rotation = transforms.Rotation.principal(torch.randn(50, 3, dtype=torch.float64)) if basis else None
    scaling = moved(perturbed(transforms.LearnedScaling((3,), 2, rotation, learn_start=True)))
    still = transforms.LearnedScaling((3,), 2, rotation)
    still.coefficients = scaling.coefficients
    options = {"schedule": SCHEDULE, "volatility": Matched(), "checks": False}
    model = NDM(predicted, (3,), transform=scaling, **options)
    plain = NDM(predicted, (3,), transform=still, **options)
    x = torch.randn(4, 3)
    y, weight = model.to_latent(x)
    torch.testing.assert_close(model.transform.from_latent(y), x)
    jacobian = torch.func.jacrev(lambda row: scaling.to_latent(row[None])[0][0])(x[0])
    assert float(jacobian.detach().det().log()) == pytest.approx(float(weight.detach()[0]), rel=1e-5)
    for score in (ndm_ct.elbo, ndm_ct.loglik):
        torch.testing.assert_close(
            score(model, x, generator=1), score(plain, y, generator=1) + weight, rtol=1e-4, atol=1e-4
        )


class Stretch(torch.nn.Module):
    """y = x + x^3/3 per coordinate, inverted by Newton's method."""

    def forward(self, x):
        return x + x**3 / 3.0, torch.log1p(x**2).sum(1)

    def inverse(self, y):
        x = torch.zeros_like(y)
        for _ in range(60):
            x = x - (x + x**3 / 3.0 - y) / (1.0 + x**2)
        return x


def test_a_log_snr_per_coordinate_behind_a_flow():
    scaling = moved(perturbed(transforms.LearnedScaling((3,), 2, learn_start=True)))
    flow = transforms.Flow(Stretch())
    both = transforms.Composed(scaling, flow)
    options = {"schedule": SCHEDULE, "volatility": Matched(), "checks": False}
    model, rest = (NDM(predicted, (3,), transform=each, **options) for each in (both, scaling))
    x = torch.randn(4, 3)
    y, weight = flow.to_latent(x)
    torch.testing.assert_close(model.transform.from_latent(model.to_latent(x)[0]), x, rtol=1e-4, atol=1e-4)
    for score in (ndm_ct.elbo, ndm_ct.loglik):
        torch.testing.assert_close(
            score(model, x, generator=1), score(rest, y, generator=1) + weight, rtol=1e-4, atol=1e-4
        )
    assert ndm_ct.sample(model, 3, method="ddpm", steps=4).shape == (3, 3)


def test_a_moving_inner_transform_is_refused():
    scaling = transforms.LearnedScaling((3,), learn_start=True)
    with pytest.raises(ValueError, match="which moves with t"):
        transforms.Composed(scaling, transforms.TimeScaling(lambda t: 1.0 + t))
    with pytest.raises(ValueError, match="basis is one of events"):
        transforms.LearnedScaling((3,), basis=transforms.DCT((4,)))


def test_files_keep_basis_and_start(tmp_path):
    x = torch.randn(50, 4)
    scaling = moved(perturbed(transforms.LearnedScaling((4,), 2, transforms.Rotation.principal(x), learn_start=True)))
    model = NDM(ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(4)), (4,), transform=scaling, volatility=Matched())
    ndm_ct.save(model, tmp_path / "model.safetensors")
    again = ndm_ct.load(tmp_path / "model.safetensors")
    assert torch.equal(ndm_ct.elbo(again, x, generator=1), ndm_ct.elbo(model, x, generator=1))


def test_training_finds_the_noise_floor_of_every_coordinate():
    """Where the density is smooth, more noise costs and less does not pay: both ends find their place."""
    x = torch.randn(512, 2) * torch.tensor([1.0, 0.1])
    scaling = transforms.LearnedScaling((2,), learn_start=True)
    model = NDM(ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2, width=16)), (2,), transform=scaling, volatility=Matched(),
                schedule=schedules.LinearLogSNR(-4.0, 4.0))  # fmt: skip
    ndm_ct.fit(model, x, steps=120, lr=2e-2, batch_size=128, seed=0, progress=False)
    start = scaling.start.detach()
    assert float(start[1]) > float(start[0]) + 0.5
    assert math.isfinite(float(start.sum()))
