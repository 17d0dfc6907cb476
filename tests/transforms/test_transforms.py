"""Laws of every transform: the time derivative, the start at the identity, linearity, the basis."""

import pytest
import torch
from oracles import Wiggle, k, perturbed
from torch import nn

from ndm_ct import transforms
from ndm_ct._core.config import from_config, to_config


class Net(nn.Module):
    """A smooth network of x and t on (B, 2, 4, 4), optionally shifted by a condition."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64)

    def forward(self, x, t, shift=None):
        h = torch.tanh(self.conv(x) * (1.0 + torch.sin(3.0 * t)).reshape(-1, 1, 1, 1))
        return h if shift is None else h + shift.reshape(-1, 1, 1, 1) * t.reshape(-1, 1, 1, 1)


class Features(nn.Module):
    def __init__(self, terms=2):
        super().__init__()
        self.conv = nn.Conv2d(2, 2 * terms, 3, padding=1, dtype=torch.float64)
        self.terms = terms

    def forward(self, x):
        return torch.tanh(self.conv(x)).unflatten(1, (self.terms, 2))


TRANSFORMS = {
    "Identity": transforms.Identity,
    "TimeScaling": lambda: transforms.TimeScaling(k),
    "Neural": lambda: transforms.Neural(Net()),
    "Separable": lambda: transforms.Separable(Features()),
    "Blur": lambda: transforms.Blur((2, 4, 4), blur=3.0),
    "Subspaces": lambda: transforms.Subspaces((2, 4, 4), (3, 1), (0.45, 0.95), width=0.3, floor=0.01),
    "LearnedScaling": lambda: learned_scaling(),
    "LearnedScaling of frequencies": lambda: perturbed(
        transforms.LearnedScaling((2, 4, 4), 2, transforms.DCT((2, 4, 4)))
    ),
    "PolynomialLogSNR": lambda: perturbed(transforms.PolynomialLogSNR((2, 4, 4), -3.0, 2.0)),
    "DataEncoder": lambda: transforms.DataEncoder(Net(), -30.0, 5.0),
    "Composed": lambda: transforms.Composed(transforms.Neural(Net()), transforms.Blur((2, 4, 4), blur=3.0)),
    "Composed after one that is still": lambda: transforms.Composed(learned_scaling(), transforms.Identity()),
    "Composed linear": lambda: transforms.Composed(transforms.Blur((2, 4, 4)), transforms.TimeScaling(k)),
}
each = pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)


def learned_scaling():
    transform = transforms.LearnedScaling((2, 4, 4), 3)
    with torch.no_grad():
        transform.coefficients.copy_(0.5 * torch.randn(2, 4, 4, 3, generator=torch.Generator().manual_seed(0)))
    return transform


def data(n=3):
    return torch.randn(n, 2, 4, 4, dtype=torch.float64)


@each
@pytest.mark.parametrize("scalar", [True, False])
def test_derivative_is_that_of_forward_in_time(make, scalar):
    transform, x = make(), data()
    t = torch.tensor(0.4, dtype=torch.float64) if scalar else torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    F, dF = transform.with_derivative(x, t)
    torch.testing.assert_close(F, transform(x, t))
    h = 1e-5
    finite = (transform(x, t + h) - transform(x, t - h)) / (2 * h)
    torch.testing.assert_close(dF, finite, rtol=1e-7, atol=1e-8)


@each
def test_starts_at_the_identity(make):
    x = data()
    torch.testing.assert_close(make()(x, torch.zeros(3, dtype=torch.float64)), x)


@each
def test_linear_flag_tells_the_truth(make):
    transform, x, y = make(), data(), data()
    t = torch.tensor(0.6, dtype=torch.float64)
    gap = transform(2.0 * x - y, t) - 2.0 * transform(x, t) + transform(y, t)
    assert (float(gap.detach().abs().max()) < 1e-12) == transform.linear


@each
def test_log_rates_are_those_of_the_coordinates(make):
    transform, x = make(), data()
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    if not transform.scales:
        with pytest.raises(NotImplementedError):
            transform.log_rate(t)
        return
    F, dF = (transform.to_basis(each) for each in transform.with_derivative(x, t))
    rate = transform.log_rate(t)
    rate = rate.reshape(3, *(1,) * (4 - rate.ndim), *rate.shape[1:])
    torch.testing.assert_close(dF, rate * F)


@each
def test_basis_is_orthonormal(make):
    transform, x = make(), data()
    torch.testing.assert_close(transform.from_basis(transform.to_basis(x)), x)
    torch.testing.assert_close(transform.to_basis(x).square().sum(), x.square().sum())


@each
def test_gradients_reach_data_and_parameters_through_the_derivative(make):
    transform, x = make(), data().requires_grad_()
    F, dF = transform.with_derivative(x, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    (F.square().sum() + dF.square().sum()).backward()
    assert float(x.grad.abs().min()) > 0.0
    assert all(float(parameter.grad.abs().sum()) > 0.0 for parameter in transform.parameters())


def test_blur_is_diagonal_in_scipys_dct():
    from scipy.fft import dctn

    transform, x = transforms.Blur((2, 4, 4), blur=3.0), data(1)
    t = torch.tensor(0.7, dtype=torch.float64)
    blurred = torch.from_numpy(dctn(transform(x, t).numpy(), axes=(-2, -1), norm="ortho"))
    expected = transform.attenuation(t)[0] * torch.from_numpy(dctn(x.numpy(), axes=(-2, -1), norm="ortho"))
    torch.testing.assert_close(blurred, expected)
    assert float(transform.attenuation(t)[0][0, 0]) == 1.0
    coefficient = torch.rand(4, 4, dtype=torch.float64)[None, None]
    scaled = torch.from_numpy(dctn(transform.diagonal(coefficient, x).numpy(), axes=(-2, -1), norm="ortho"))
    torch.testing.assert_close(scaled, coefficient * torch.from_numpy(dctn(x.numpy(), axes=(-2, -1), norm="ortho")))


def test_subspaces_lose_their_frequencies_in_time():
    """Before, within and after each projection; what is left is one number per frequency."""
    transform = transforms.Subspaces((4, 3), (3, 1), (0.4, 0.9), width=0.2, floor=0.01)
    index = torch.tensor([[0, 1, 2], [1, 1, 2], [2, 2, 2], [3, 3, 3]])
    for t, left in ((0.2, (1.0, 1.0, 1.0)), (0.3, (1.0, 1.0, 0.505)), (0.4, (1.0, 1.0, 0.01)), (0.7, (1.0, 1.0, 0.01)),
                    (0.8, (1.0, 0.505, 0.01)), (0.9, (1.0, 0.01, 0.01)), (1.0, (1.0, 0.01, 0.01))):  # fmt: skip
        expected = torch.tensor(left, dtype=torch.float64)[torch.tensor([0, 1, 1, 2])[index]]
        torch.testing.assert_close(transform.attenuation(torch.tensor(t, dtype=torch.float64))[0], expected)


def test_neural_is_the_papers_interpolation():
    """F = (1 - t) x + t Fbar with Fbar = x + net."""
    net = Net()
    x, t = data(), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    time = t.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(transforms.Neural(net)(x, t), (1 - time) * x + time * (x + net(x, t)))


def test_separable_is_its_sum():
    features = Features()
    x, t = data(), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    f, time = features(x), t.reshape(-1, 1, 1, 1)
    F, dF = transforms.Separable(features).with_derivative(x, t)
    torch.testing.assert_close(F, x + time * f[:, 0] + time**2 * f[:, 1])
    torch.testing.assert_close(dF, f[:, 0] + 2 * time * f[:, 1])
    with pytest.raises(ValueError, match=r"features\(x\) has shape"):
        transforms.Separable(features, transforms.PolynomialBasis(3))(x, t)


def test_transform_takes_the_conditioning_its_network_names():
    transform, x = transforms.Neural(Net()), data()
    t, shift = torch.tensor(0.5, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    difference = transform(x, t, shift=shift, label="the predictor's") - transform(x, t)
    torch.testing.assert_close(difference, torch.full_like(x, 0.25))


def test_generic_derivative_of_a_users_transform():
    transform = Wiggle()
    x, t = torch.randn(5, 1, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    _, dF = transform.with_derivative(x, t)
    torch.testing.assert_close(dF, 0.8 * torch.sin(3 * x))


def test_configuration_round_trip():
    transform = transforms.Composed(transforms.Blur((2, 4, 4), blur=2.0), transforms.Blur((2, 4, 4), floor=0.5))
    copy = from_config(to_config(transform))
    x, t = data(), torch.tensor(0.3, dtype=torch.float64)
    assert torch.equal(copy(x, t), transform(x, t))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: transforms.Blur((4,)), "at least two axes"),
        (lambda: transforms.Blur((4, 4), floor=0.0), "0 < floor <= 1"),
        (lambda: transforms.Subspaces((4,), (2,), (0.5,)), "Subspaces needs an event of at least two axes"),
        (lambda: transforms.Subspaces((4, 4), (2,), (0.5, 0.7)), "times must be increasing, one for each"),
        (lambda: transforms.Subspaces((4, 4), (3, 2), (0.7, 0.5)), "times must be increasing"),
        (lambda: transforms.Subspaces((4, 4), (2, 3), (0.5, 0.7)), "sizes must be positive and decreasing"),
        (lambda: transforms.Subspaces((4, 4), (2,), (0.5,), width=0.6), r"width <= times\[0\]"),
        (lambda: transforms.PolynomialBasis(0), "terms must be at least 1"),
    ],
)
def test_impossible_transforms_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
