"""The density of what a deterministic sampler draws in a few steps."""

import itertools
import math

import pytest
import torch

import ndm_ct
from ndm_ct.reference import Gaussian, GaussianMixture
from ndm_ct.samplers import DDIM, FixedGrid

MEANS = torch.tensor([[-1.0, 0.5], [1.0, -0.3]])
COVS = torch.stack([0.2 * torch.eye(2), torch.tensor([[0.3, 0.1], [0.1, 0.15]])])


def mixture():
    return GaussianMixture([0.4, 0.6], MEANS, COVS)


def drawn(model, method, steps, n=300, **options):
    options |= {"trace": "exact", "return_info": True, "generator": 1, "dtype": torch.float64}
    return ndm_ct.sample(model, n, method=method, steps=steps, **options)


@pytest.mark.parametrize("steps", [1, 3])
def test_euler_of_a_gaussian_is_a_product_of_factors(steps):
    model = Gaussian(torch.zeros(3), torch.diag(torch.tensor([0.2, 0.5, 2.0])))
    x, info = drawn(model, "euler", steps)
    times, factor = torch.linspace(1.0, model.t_min, steps + 1, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for t, s in itertools.pairwise(times):
        slope = model.velocity(torch.eye(3, dtype=torch.float64), t).diagonal()
        factor = factor * (1.0 + (s - t) * slope)
    torch.testing.assert_close(x, factor * info.z)
    torch.testing.assert_close(info.logp, model.log_prior(info.z) - factor.abs().log().sum())


@pytest.mark.parametrize("method", ["euler", "unipc"])
def test_integrates_to_one(method):
    steps, side = FixedGrid(mixture(), method, steps=5), torch.linspace(-4.0, 4.0, 81, dtype=torch.float64)
    x = torch.cartesian_prod(side, side)
    mass = steps.loglik(x, on_failure="nan").exp().nan_to_num().sum() * (side[1] - side[0]) ** 2
    assert abs(float(mass) - 1.0) < 2e-3


def test_agrees_with_a_histogram_of_samples():
    model, n = mixture(), 40_000
    x = ndm_ct.sample(model, n, method="ddim", steps=3, generator=2, dtype=torch.float64)
    edges = torch.linspace(-3.0, 3.0, 13, dtype=torch.float64)
    counts = torch.histogramdd(x, bins=[edges, edges]).hist.flatten()
    fine = torch.linspace(-3.0, 3.0, 97, dtype=torch.float64)
    middle = 0.5 * (fine[1:] + fine[:-1])
    density = FixedGrid(model, "ddim", steps=3).loglik(torch.cartesian_prod(middle, middle), on_failure="nan").exp()
    expected = n * density.nan_to_num().reshape(12, 8, 12, 8).sum((1, 3)).flatten() * (fine[1] - fine[0]) ** 2
    seen = expected > 10.0
    z = (counts - expected)[seen] / expected[seen].sqrt()
    assert seen.sum() > 20
    assert 0.4 < float(z.square().mean()) < 1.8
    flow = n * model.log_prob(torch.cartesian_prod(middle, middle)).exp()
    flow = flow.reshape(12, 8, 12, 8).sum((1, 3)).flatten() * (fine[1] - fine[0]) ** 2
    assert float(((counts - flow)[seen].square() / flow[seen]).mean()) > 10.0  # three steps do not draw from the flow


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 3), ("rk4", 4)])
def test_tends_to_the_likelihood_of_the_flow(method, order):
    model, errors = mixture(), []
    for steps in (12, 24):
        x, info = drawn(model, method, steps, 100)
        errors.append(float((info.logp - model.log_prob(x)).square().mean().sqrt()))
    assert errors[1] < 0.1
    assert math.log2(errors[0] / errors[1]) > order - 0.5


@pytest.mark.parametrize("method", ["ddim", "unipc", "pndm", "edm"])
@pytest.mark.parametrize("denoise", [False, True])
def test_the_inverse_finds_the_noise_of_samples(method, denoise):
    model = mixture()
    x, info = drawn(model, method, 6, 50, denoise=denoise)
    found = FixedGrid(model, method, steps=6, denoise=denoise).loglik(x, batch_size=20)
    torch.testing.assert_close(found, info.logp, rtol=0.0, atol=1e-6)


def test_rows_keep_their_conditions():
    torch.manual_seed(0)
    net = ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2, width=16, context=1))
    model, context = ndm_ct.NDM(net, (2,)).double(), torch.linspace(-2.0, 2.0, 6, dtype=torch.float64)[:, None]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, info = drawn(model, "ddim", 8, 6, context=context)
    steps = FixedGrid(model, "ddim", steps=8)
    torch.testing.assert_close(steps.loglik(x, context=context, batch_size=4), info.logp, rtol=0.0, atol=1e-6)
    assert float((steps.loglik(x, context=context.flip(0)) - info.logp).abs().max()) > 1e-3


def test_of_a_network_in_float32():
    torch.manual_seed(0)
    model = ndm_ct.NDM(ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2, width=16)), (2,))
    x, info = ndm_ct.sample(model, 30, method="unipc", steps=8, trace="exact", return_info=True, generator=3)
    found = FixedGrid(model, "unipc", steps=8).loglik(x)
    assert found.dtype == torch.float32
    assert model.training
    torch.testing.assert_close(found.double(), info.logp, rtol=0.0, atol=5e-3)
    many = FixedGrid(model, "unipc", steps=64).loglik(x)
    torch.testing.assert_close(many, ndm_ct.loglik(model, x), rtol=0.0, atol=2e-2)


def test_a_map_before_the_process_adds_its_log_determinant():
    torch.manual_seed(0)
    net = ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2, width=16)).double()
    before = ndm_ct.transforms.Whitening.of(3.0 * torch.randn(200, 2, dtype=torch.float64))
    whole, inner = ndm_ct.NDM(net, (2,), transform=before), ndm_ct.NDM(net, (2,))
    x, info = drawn(whole, "unipc", 6, 5)
    y, logdet = before.to_latent(x)
    expected = FixedGrid(inner, "unipc", steps=6).loglik(y) + logdet
    torch.testing.assert_close(FixedGrid(whole, "unipc", steps=6).loglik(x), expected, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(info.logp, expected, rtol=0.0, atol=1e-6)


@pytest.mark.slow
def test_of_a_learned_transform():
    torch.manual_seed(0)
    net, F = ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2, width=16)), ndm_ct.transforms.Neural(ndm_ct.nn.MLP(2, width=16))
    model = ndm_ct.NDM(net, (2,), transform=F).double()
    x, info = drawn(model, "unipc", 16, 5)
    torch.testing.assert_close(FixedGrid(model, "unipc", steps=16).loglik(x), info.logp, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(info.logp, ndm_ct.loglik(model, x, rtol=1e-4, atol=1e-4), rtol=0.0, atol=0.1)


def test_a_row_that_no_noise_leads_to():
    """One step of "euler" with a bounded field cannot leave a ball."""
    steps = FixedGrid(mixture(), lambda model: _Squashed(model), steps=1)
    x = torch.tensor([[0.5, 0.2], [3.0, 0.0]], dtype=torch.float64)
    with pytest.raises(ndm_ct.SolverError, match=r"batch rows \[1\].*on_failure='nan'") as raised:
        steps.loglik(x)
    assert raised.value.rows == (1,)
    found = steps.loglik(x, on_failure="nan")
    z = torch.atanh(x[0])
    exact = steps.model.log_prior(z[None])[0] - (1.0 - x[0].square()).log().sum()
    torch.testing.assert_close(found[0], exact, rtol=0.0, atol=1e-6)
    assert bool(found[1].isnan())


def test_a_fold_gives_a_lower_bound():
    """z + 2 sin z leads to 0 from three places; the value is the term of one of them."""
    model = Gaussian(torch.zeros(1), torch.eye(1))
    x = torch.zeros(1, 1, dtype=torch.float64)
    found = FixedGrid(model, lambda model: _Folded(model), steps=1).loglik(x)
    z = torch.tensor([[-1.89549427], [0.0], [1.89549427]], dtype=torch.float64)
    terms = model.log_prior(z) - (1.0 + 2.0 * z.cos()).abs().log()[:, 0]
    assert float((found - terms).abs().min()) < 1e-6
    assert float(found) < float(terms.logsumexp(0))


class _Folded(DDIM):
    def _step(self, z, t, s, generator, cond):
        return z + 2.0 * z.sin()


class _Squashed(DDIM):
    def _step(self, z, t, s, generator, cond):
        return z.tanh()


def test_refusals():
    model, x = mixture(), torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"draws noise.*'ddim'"):
        FixedGrid(model, "ddpm", steps=4).loglik(x)
    with pytest.raises(ValueError, match=r"draws noise"):
        drawn(model, "euler_ancestral", 4)
    with pytest.raises(ValueError, match=r"must be 'exact'.*'hutchinson'"):
        ndm_ct.sample(model, 2, method="ddim", steps=4, trace="hutchinson", return_info=True)
    with pytest.raises(ValueError, match=r"return_info=True"):
        ndm_ct.sample(model, 2, method="ddim", steps=4, trace="exact")
    with pytest.raises(ValueError, match="batch_size"):
        FixedGrid(model, "ddim", steps=4).loglik(x, batch_size=0)
    with pytest.raises(ValueError, match="on_failure"):
        FixedGrid(model, "ddim", steps=4).loglik(x, on_failure="skip")
    large = Gaussian(torch.zeros(65), torch.eye(65))
    for call in (
        lambda: FixedGrid(large, "ddim", steps=2).loglik(torch.zeros(1, 65)),
        lambda: drawn(large, "ddim", 2),
    ):
        with pytest.raises(ValueError, match=r"at most 64 dimensions.*has 65.*ndm_ct\.loglik"):
            call()
    assert drawn(model, "ddim", 2, 0)[1].logp.shape == (0,)
    assert FixedGrid(model, "ddim", steps=2).loglik(x[:0]).shape == (0,)
