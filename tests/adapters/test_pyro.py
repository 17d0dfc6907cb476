"""A model in programs of Pyro: the same density, observed, drawn, in plates, masked, and inferred through."""

import math

import pytest
import torch

import ndm_ct
from ndm_ct.adapters import for_pyro

pyro = pytest.importorskip("pyro")

from pyro import poutine  # noqa: E402
from pyro.distributions import Delta, Normal  # noqa: E402
from pyro.infer import SVI, Trace_ELBO  # noqa: E402
from test_distributions import Shifted, exact, shifted  # noqa: E402, F401 (fixtures)

X = torch.tensor([[0.3, -1.2], [1.5, 0.4], [0.0, 0.0]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def validated():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(True):
        yield


def rows(p, x=None, n=3):
    with pyro.plate("rows", n):
        return pyro.sample("x", p, obs=x)


def test_the_observed_density_is_the_likelihood(exact):  # noqa: F811
    p, expected = for_pyro(ndm_ct.distribution(exact)), ndm_ct.loglik(exact, X)
    trace = poutine.trace(rows).get_trace(p, X)
    torch.testing.assert_close(trace.log_prob_sum(), expected.sum(), rtol=0.0, atol=1e-9)
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], expected, rtol=0.0, atol=1e-9)
    torch.testing.assert_close(expected, exact.log_prob(X), rtol=0.0, atol=1e-3)
    loss = Trace_ELBO().loss(rows, lambda p, x: None, p, X)
    assert loss == pytest.approx(-float(expected.sum()), abs=1e-9)


def test_subsamples_and_masks_weigh_it(exact):  # noqa: F811
    p, expected = for_pyro(ndm_ct.distribution(exact)), ndm_ct.loglik(exact, X)

    def subsampled():
        with pyro.plate("rows", 30, subsample=torch.arange(3)):
            pyro.sample("x", p, obs=X)

    trace = poutine.trace(subsampled).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), 10.0 * expected.sum(), rtol=0.0, atol=1e-8)
    kept = torch.tensor([True, False, True])
    trace = poutine.trace(rows).get_trace(p.expand((3,)).mask(kept), X)
    torch.testing.assert_close(trace.log_prob_sum(), expected[kept].sum(), rtol=0.0, atol=1e-9)
    one = poutine.trace(lambda: pyro.sample("x", p.expand((3,)).to_event(1), obs=X)).get_trace()
    assert one.nodes["x"]["fn"].event_shape == (3, 2)
    torch.testing.assert_close(one.log_prob_sum(), expected.sum(), rtol=0.0, atol=1e-9)


def test_draws_in_a_plate_are_the_models(exact):  # noqa: F811
    p = for_pyro(ndm_ct.distribution(exact))
    x = rows(p, n=2000).double()
    assert x.shape == (2000, 2)
    mean, cov = exact.marginals.means[0], exact.marginals.covs[0]
    assert float(((x.mean(0) - mean) / (cov.diagonal() / 2000).sqrt()).abs().max()) < 4.0
    torch.testing.assert_close(x.T.cov(), cov, rtol=0.0, atol=4.0 * 2.0 * math.sqrt(2.0 / 2000))
    trace = poutine.trace(rows).get_trace(p)
    trace.compute_log_prob()
    torch.testing.assert_close(
        trace.nodes["x"]["log_prob"].double(), exact.log_prob(trace.nodes["x"]["value"]).double(), rtol=0.0, atol=1e-2
    )


def test_conditioning_is_expanded_with_the_plate(shifted):  # noqa: F811
    shift = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = for_pyro(ndm_ct.distribution(shifted.double(), shift=shift))
    with torch.no_grad():
        log_prob = poutine.trace(rows).get_trace(p, X).log_prob_sum()
        expected = ndm_ct.loglik(shifted, X, shift=shift)
    torch.testing.assert_close(log_prob, expected.sum(), rtol=0.0, atol=1e-9)
    assert type(p.expand((5, 3))) is type(p)


def test_gradients_reach_the_parameters(shifted):  # noqa: F811
    p = for_pyro(ndm_ct.distribution(shifted.double()))
    loss = Trace_ELBO().differentiable_loss(rows, lambda p, x: None, p, X)
    loss.backward()
    expected = (shifted.predictor.m.detach() - X).sum(0)  # of N(m, I)
    torch.testing.assert_close(shifted.predictor.m.grad, expected, rtol=0.0, atol=1e-2)


def test_a_shift_is_inferred(exact):  # noqa: F811
    """The program of docs/migrating.md, against the maximum of its posterior in closed form."""
    p = for_pyro(ndm_ct.distribution(exact, rtol=1e-4, atol=1e-4))

    def program(x):
        prior = Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
        shift = pyro.sample("shift", prior)
        with pyro.plate("rows", len(x)):
            pyro.sample("noise", p, obs=x - shift)

    def guide(x):
        at = pyro.param("at", torch.zeros(2, dtype=torch.float64))
        pyro.sample("shift", Delta(at, event_dim=1))

    svi = SVI(program, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(60):
        svi.step(X)
    mean, precision = exact.marginals.means[0], torch.linalg.inv(exact.marginals.covs[0])
    eye = torch.eye(2, dtype=torch.float64)
    expected = torch.linalg.solve(eye + 3.0 * precision, precision @ (X - mean).sum(0))
    torch.testing.assert_close(pyro.param("at").detach(), expected, rtol=0.0, atol=0.03)


def test_a_model_itself_is_refused(exact):  # noqa: F811
    with pytest.raises(TypeError, match=r"must come from ndm_ct\.distribution"):
        for_pyro(exact)
