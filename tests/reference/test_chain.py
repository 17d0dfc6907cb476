"""Chains of levels against sums over all of their paths."""

import itertools
import math

import pytest
import torch
from torch.distributions import Normal

import ndm_ct
from ndm_ct.quantisation import Quantisation
from ndm_ct.reference import Chain

BINS = Quantisation(3, edges=(-1.0, 1.2))
START = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)
MOVES = torch.tensor(
    [[0.7, 0.1, 0.1, 0.1], [0.0, 0.5, 0.5, 0.0], [0.3, 0.3, 0.3, 0.1], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64
)
SHOWN = torch.tensor([0, 2, 1, 0])  # two hidden states show level 0
D = 3


def chain(filled=True, length=D):
    return Chain(START, MOVES, length, BINS, levels=SHOWN, filled=filled)


def paths():
    """Every path of hidden states, and its probability."""
    for states in itertools.product(range(4), repeat=D):
        p = float(START[states[0]])
        for a, b in itertools.pairwise(states):
            p *= float(MOVES[a, b])
        yield states, p


def density(model, z, t):
    """p_t(z) as a sum over paths, in float64."""
    c = model.schedule(torch.tensor([t], dtype=torch.float64))
    centres, h = BINS.centres(torch.arange(3), torch.float64), BINS.half_width
    total = torch.zeros(len(z), dtype=torch.float64)
    for states, p in paths():
        centre = centres[SHOWN[list(states)]]
        if model.filled:
            normal = Normal(torch.zeros(1).double(), c.sigma / c.alpha)
            factors = (normal.cdf(centre + h - z / c.alpha) - normal.cdf(centre - h - z / c.alpha)) / (2 * h * c.alpha)
        else:
            factors = Normal(c.alpha * centre, c.sigma).log_prob(z).exp()
        total += p * factors.prod(1)
    return total


@pytest.mark.parametrize("filled", [True, False])
@pytest.mark.parametrize("t", [0.3, 0.6, 1.0])
def test_marginals_are_sums_over_paths(filled, t, generator):
    model = chain(filled)
    z = torch.randn(20, D, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(model.log_prob(z, t).exp(), density(model, z, t), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("filled", [True, False])
@pytest.mark.parametrize("t", [0.05, 0.3, 0.9])
def test_the_posterior_mean_follows_from_the_score(filled, t, generator):
    """Tweedie: E[x | z] = (z + sigma^2 grad log p) / alpha."""
    model = chain(filled)
    c = model.schedule(torch.tensor(t, dtype=torch.float64))
    x = BINS.centres(model.sample_levels(20, generator=generator), torch.float64)
    z = (c.alpha * x + c.sigma * torch.randn(20, D, generator=generator, dtype=torch.float64)).requires_grad_()
    (score,) = torch.autograd.grad(model.log_prob(z, t).sum(), z)
    expected = (z + c.sigma**2 * score) / c.alpha
    torch.testing.assert_close(model.predict_x(z, torch.tensor(t).double()), expected.detach(), rtol=1e-6, atol=1e-7)


def test_probabilities_are_sums_over_paths_and_sum_to_one():
    model = chain()
    k = torch.cartesian_prod(*[torch.arange(3)] * D)
    expected = torch.zeros(len(k), dtype=torch.float64)
    for states, p in paths():
        expected += p * (k == SHOWN[list(states)]).all(1).double()
    torch.testing.assert_close(model.log_probability(k).exp(), expected, rtol=1e-12, atol=1e-15)
    assert float(model.log_probability(k).exp().sum()) == pytest.approx(1.0, abs=1e-12)


def test_an_impossible_row_has_no_probability():
    fixed = Chain(torch.tensor([1.0, 0.0]), torch.eye(2), 2, Quantisation(2))
    assert fixed.log_probability(torch.tensor([[0, 0], [0, 1], [1, 1]])).tolist() == [0.0, -math.inf, -math.inf]


def test_draws_have_their_probabilities():
    model = chain()
    k = model.sample_levels(20_000, generator=0)
    for row in ([0, 0, 0], [2, 1, 1], [1, 0, 2]):
        share, p = (
            float((k == torch.tensor(row)).all(1).double().mean()),
            float(model.log_probability(torch.tensor([row])).exp()),
        )
        assert abs(share - p) < 4.0 * math.sqrt(p / 20_000)


@pytest.mark.parametrize("filled", [True, False])
def test_the_flow_has_the_density_of_the_chain(filled, generator):
    model = chain(filled, 8)
    x = BINS.centres(model.sample_levels(6, generator=generator), torch.float64)
    c = model.schedule(torch.tensor(model.t_min, dtype=torch.float64))
    z = c.alpha * x + c.sigma * torch.randn(6, 8, generator=generator, dtype=torch.float64)
    logp = ndm_ct.loglik(model, z, trace="exact", rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(logp, model.log_prob(z), rtol=0.0, atol=1e-4)


def test_the_prior_is_the_last_marginal():
    model = chain(length=1)
    z = model.prior.sample(20_000, generator=0, dtype=torch.float64)
    grid = torch.linspace(-6.0, 6.0, 4001, dtype=torch.float64)[:, None]
    p = model.log_prob(grid, 1.0).exp()
    mean, square = ((p * grid[:, 0] ** power).sum() / p.sum() for power in (1, 2))
    assert abs(float(z.mean() - mean)) < 4.0 * float(z.std()) / math.sqrt(20_000)
    assert float(z.square().mean()) == pytest.approx(float(square), rel=0.04)


@pytest.mark.parametrize(("options", "message"), [
    ({"start": torch.tensor([0.5, 0.6])}, "start must hold probabilities"),
    ({"transition": torch.tensor([[0.5, 0.5], [0.5, 0.6]])}, "transition must hold probabilities"),
    ({"transition": torch.eye(3)}, "do not fit"),
    ({"levels": torch.tensor([0, 5])}, "levels must be 2 integers from 0 to 1"),
])  # fmt: skip
def test_wrong_parameters_are_named(options, message):
    right = {"start": torch.tensor([0.5, 0.5]), "transition": torch.eye(2), "levels": None} | options
    with pytest.raises(ValueError, match=message):
        Chain(right["start"], right["transition"], 2, Quantisation(2), levels=right["levels"])
