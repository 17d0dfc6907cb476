"""A network of integer levels tells where its training had them."""

import warnings

import pytest
import torch

import ndm_ct
from ndm_ct import adapters
from ndm_ct.evaluation import compare, evaluate
from ndm_ct.likelihood.placement import _losses, usual_placements, verify_placement
from ndm_ct.quantisation import Quantisation

L, D = 17, 12
EDGES, CENTRES = Quantisation(L, edges=(-1.0, 1.0)), Quantisation(L, centres=(-1.0, 1.0))


FEW, ALL = torch.tensor([0, 1, 2, 16]), torch.arange(L)


def exact(bins, sigma_min=None, used=FEW):
    """The best denoiser of rows whose levels are those used, with equal odds and placed as ``bins`` says."""
    values = bins.centres(used, torch.float64)

    def denoise(z, sigma):
        odds = torch.softmax(-0.5 * ((z[..., None] - values) / sigma[:, None, None]) ** 2, -1)
        return (odds @ values).to(z.dtype)

    return adapters.from_denoiser(denoise, (D,), sigma_min=sigma_min or 0.3 * bins.half_width, sigma_max=20.0)


def rows(count=32, used=FEW):
    return used[torch.randint(0, len(used), (count, D), generator=torch.Generator().manual_seed(0))]


SCORES = {
    "flow": lambda m, bins: ndm_ct.bits_per_dim(m, rows(), quantisation=bins, rtol=1e-2, atol=1e-2),
    "elbo": lambda m, bins: ndm_ct.bits_per_dim(m, rows(), quantisation=bins, bound="elbo"),
    "evaluate": lambda m, bins: evaluate(m, rows(), quantisation=bins, bound="elbo", progress=False),
    "compare": lambda m, bins: compare(m, exact(bins), rows(), quantisation=bins, bound="elbo", progress=False),
}


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("right", usual_placements(L), ids=str)
def test_a_network_says_where_its_levels_lie(score, right):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(exact(right), right)
    wrong = EDGES if right.edges == CENTRES.edges else CENTRES
    with pytest.warns(UserWarning, match="levels lie elsewhere") as caught:
        score(exact(right), wrong)
    assert f"{right} fits better" in str(caught[0].message)


def test_losses_are_those_of_the_levels_whatever_their_unit():
    """With levels of equal odds noise leaves an error of the size of a level, so the unit would decide."""
    wide, narrow, x = EDGES, Quantisation(L, edges=(0.0, 1.0)), rows(used=ALL)
    at_home = []
    for home, other in ((wide, narrow), (narrow, wide)):
        model = exact(home, used=ALL)
        at_home.append(_losses(model, [other, home], x, model.conditioning({}, x, verify_placement))[1])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            SCORES["elbo"](model, home)
    torch.testing.assert_close(at_home[0], at_home[1], rtol=1e-4, atol=1e-4)
    assert 2.0 < float(at_home[0].mean()) < 4.0  # a level is two half-widths


def test_it_says_so_once_per_model_and_placement_and_not_where_checks_are_off():
    model = exact(CENTRES)
    with pytest.warns(UserWarning, match="levels lie elsewhere"):
        SCORES["elbo"](model, EDGES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SCORES["elbo"](model, EDGES)
        off = exact(CENTRES)
        off.checks = False
        SCORES["elbo"](off, EDGES)
        own = exact(CENTRES)
        own.adapted = False  # trained here, where a number of levels means bins that fill (-1, 1)
        SCORES["elbo"](own, L)


def test_noise_that_hides_the_levels_says_nothing():
    """At t_min the noise is larger than the difference between the placements: they cannot be told apart."""
    model = exact(CENTRES, sigma_min=5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SCORES["elbo"](model, EDGES)
