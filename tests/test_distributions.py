"""A model as a torch distribution: densities, draws, gradients and shapes against exact ones."""

import math

import pytest
import torch
from torch.distributions import AffineTransform, MultivariateNormal, TransformedDistribution, constraints

import ndm_ct
from ndm_ct import schedules
from ndm_ct.transforms import Encoder

MEAN = torch.tensor([0.5, -1.0], dtype=torch.float64)
COV = torch.tensor([[1.0, 0.6], [0.6, 2.0]], dtype=torch.float64)


SCHEDULE = schedules.LinearLogSNR(-13.3, 20.0)  # ends at alpha = 5e-5: the prior is that of every mean


class Shifted(torch.nn.Module):
    """The exact denoiser of N(m, I) under variance preservation, m learned or given."""

    def __init__(self):
        super().__init__()
        self.m = torch.nn.Parameter(MEAN.clone())

    def forward(self, z, t, shift=None):
        c = SCHEDULE(t.double())
        m = self.m if shift is None else shift
        alpha = c.alpha[:, None].to(z.dtype)
        return m + alpha * (z - alpha * m)


@pytest.fixture
def exact():
    return ndm_ct.reference.Gaussian(MEAN, COV)


@pytest.fixture
def shifted():
    return ndm_ct.NDM(Shifted(), (2,), schedule=SCHEDULE)


def seeded():
    return torch.Generator().manual_seed(0)


def test_densities_and_shapes_are_those_of_the_data(exact):
    p, normal = ndm_ct.distribution(exact), MultivariateNormal(MEAN, COV)
    assert (p.batch_shape, p.event_shape) == (torch.Size(), torch.Size([2]))
    assert p.support.event_dim == 1
    assert isinstance(p.support, type(constraints.real_vector))
    for shape in ((), (5,), (2, 3)):
        x = torch.randn(*shape, 2, dtype=torch.float64, generator=seeded())
        torch.testing.assert_close(p.log_prob(x), normal.log_prob(x), rtol=0.0, atol=1e-3)
    assert p.log_prob(torch.zeros(0, 2, dtype=torch.float64)).shape == (0,)


def test_draws_are_decoded_noise(exact):
    p = ndm_ct.distribution(exact, generator=seeded())
    x = p.sample((3, 4))
    z1 = exact.sample_prior(12, generator=seeded(), dtype=torch.float64, device=torch.device("cpu"))
    torch.testing.assert_close(x, ndm_ct.decode(exact, z1).reshape(3, 4, 2).to(x.dtype), rtol=1e-4, atol=1e-4)
    x = ndm_ct.distribution(exact, generator=seeded()).sample((4000,))
    assert ((x.mean(0) - MEAN) / (COV.diagonal() / 4000).sqrt()).abs().max() < 4.0
    assert float((x.T.cov() - COV).abs().max()) < 4.0 * 2.0 * math.sqrt(2.0 / 4000)


def test_draws_come_with_their_density(exact):
    x, log_p = ndm_ct.distribution(exact).rsample_and_log_prob((5,))
    torch.testing.assert_close(log_p.double(), exact.log_prob(x.double()), rtol=0.0, atol=2e-3)


def test_gradients_reach_parameters_and_values(shifted):
    """x = z_1 + m, and d log p / dm = x - m = -d log p / dx."""
    p = ndm_ct.distribution(shifted)
    (gradient,) = torch.autograd.grad(p.rsample((3,)).sum(), shifted.predictor.m)
    torch.testing.assert_close(gradient, torch.full((2,), 3.0, dtype=torch.float64), rtol=0.0, atol=1e-3)
    x = torch.tensor([[1.5, 0.0]], dtype=torch.float64, requires_grad=True)
    by_m, by_x = torch.autograd.grad(p.log_prob(x).sum(), (shifted.predictor.m, x))
    torch.testing.assert_close(by_m, x.detach()[0] - MEAN, rtol=0.0, atol=1e-3)
    torch.testing.assert_close(by_x[0], MEAN - x.detach()[0], rtol=0.0, atol=1e-3)
    assert not p.sample((2,)).requires_grad
    with torch.no_grad():
        assert not p.log_prob(x).requires_grad
    shifted.requires_grad_(False)
    assert not p.log_prob(x.detach()).requires_grad


def test_conditioning_is_the_batch(shifted):
    shift = torch.tensor([[0.0, 0.0], [3.0, -3.0]], dtype=torch.float64)
    p = ndm_ct.distribution(shifted.requires_grad_(False), shift=shift)
    assert p.batch_shape == (2,)
    x = torch.randn(5, 1, 2, dtype=torch.float64, generator=seeded())
    expected = MultivariateNormal(shift, torch.eye(2, dtype=torch.float64)).log_prob(x)
    torch.testing.assert_close(p.log_prob(x), expected, rtol=0.0, atol=3e-3)
    torch.testing.assert_close(p.expand((5, 2)).log_prob(x), expected, rtol=0.0, atol=3e-3)
    draws = p.sample((1000,))
    assert draws.shape == (1000, 2, 2)
    assert (draws.mean(0) - shift).abs().max() < 4.0 / math.sqrt(1000)
    assert "batch_shape=(2,), given shift" in repr(p)


OF_OTHERS = ("differentiable", "stderr", "on_failure", "return_info", "x", "z1", "budget")


class Named(Shifted):
    """The same, the mean given under the names of options of other functions."""

    def forward(self, z, t, *, x, z1, budget, differentiable, stderr, on_failure, return_info):
        return super().forward(z, t, shift=differentiable + stderr + on_failure + return_info + x + z1 + budget)


def test_conditions_may_have_the_names_of_other_functions_options():
    model = ndm_ct.NDM(Named(), (2,), schedule=SCHEDULE)
    cond = {name: torch.full((3, 2), float(place), dtype=torch.float64) for place, name in enumerate(OF_OTHERS)}
    given = {"shift": sum(cond.values())}
    shifted = ndm_ct.NDM(Shifted(), (2,), schedule=SCHEDULE)
    named, plain = (ndm_ct.distribution(m, generator=0, **c) for m, c in ((model, cond), (shifted, given)))
    x = torch.randn(3, 2, dtype=torch.float64, generator=seeded()) + 21.0
    torch.testing.assert_close(named.log_prob(x), plain.log_prob(x))
    torch.testing.assert_close(named.sample(), plain.sample())
    torch.testing.assert_close(named.rsample_and_log_prob(), plain.rsample_and_log_prob())
    with pytest.raises(TypeError, match="distribution"):
        ndm_ct.distribution(shifted, stderr=torch.ones(3, 2))


def test_units_are_undone_by_torch_itself(exact):
    """Behind an affine map its log-determinant is added once per coordinate."""
    p = TransformedDistribution(ndm_ct.distribution(exact), [AffineTransform(1.0, 2.0, event_dim=1)])
    x = torch.tensor([[0.3, 0.4]], dtype=torch.float64)
    expected = exact.log_prob((x - 1.0) / 2.0) - 2.0 * math.log(2.0)
    torch.testing.assert_close(p.log_prob(x), expected, rtol=0.0, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_zuko_takes_it_as_a_base(exact):
    zuko = pytest.importorskip("zuko")
    flow = zuko.distributions.NormalizingFlow(zuko.transforms.SoftclipTransform(10.0), ndm_ct.distribution(exact))
    x = torch.tensor([[0.3, 0.4]], dtype=torch.float64)
    y, ladj = flow.transform.call_and_ladj(x)
    torch.testing.assert_close(flow.log_prob(x), exact.log_prob(y) + ladj.reshape(1, -1).sum(1), rtol=0.0, atol=1e-3)


def test_mistakes_are_named(exact, shifted):
    p = ndm_ct.distribution(exact)
    with pytest.raises(ValueError, match=r"value must end in the event shape \(2,\), got shape \(3,\)"):
        p.log_prob(torch.zeros(3, dtype=torch.float64))
    shift = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"leading dimensions \(3,\), which do not broadcast"):
        ndm_ct.distribution(shifted, shift=shift).log_prob(torch.zeros(3, 2, dtype=torch.float64))
    with pytest.raises(TypeError, match="shfit"):
        ndm_ct.distribution(shifted, shfit=shift)
    with pytest.raises(ValueError, match=r"one leading size, .* shift \(2,\), other \(3,\)"):
        ndm_ct.distribution(shifted, shift=shift, other=torch.zeros(3))
    encoder = Encoder(ndm_ct.nn.GaussianEncoder((3,), (2,)), ndm_ct.nn.GaussianDecoder((2,), (3,)), (3,))
    with pytest.raises(ValueError, match="Encoder is stochastic"):
        ndm_ct.distribution(ndm_ct.NDM(ndm_ct.nn.MLP(2), (2,), transform=encoder))


def test_conditioning_without_axes_is_shared_by_all():
    model = ndm_ct.NDM(lambda z, t, scale: 0.5 * scale * z, (2,), schedule=schedules.LinearLogSNR(-4.0, 4.0))
    shared = ndm_ct.distribution(model, scale=torch.tensor(0.5))
    assert shared.batch_shape == ()
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    expected = ndm_ct.loglik(model, x, scale=torch.tensor(0.5))
    for each in (shared, shared.expand((5,))):
        torch.testing.assert_close(each.log_prob(x), expected)
    torch.testing.assert_close(shared.expand((3, 1)).log_prob(x), expected.expand(3, 5))
    assert shared.sample((4,)).shape == (4, 2)
    assert shared.expand((3,)).rsample_and_log_prob((2,))[1].shape == (2, 3)
