"""The map of a table's columns: a density of its own, invertible, smooth, and no finer than the rows can show."""

import math

import numpy as np
import pytest
import torch

import ndm_ct
from ndm_ct.columns import ColumnMap, InTurn, fit_column_map, gamma_of

RNG = np.random.default_rng(0)


def wide(n, generator=RNG):
    """99 % in a peak ten thousand times narrower than the rest."""
    return np.where(generator.random(n) < 0.01, 1e4, 1.0) * generator.normal(size=n)


LAWS = {
    "normal": lambda n: RNG.normal(size=n),
    "student": lambda n: RNG.standard_t(2.0, size=n),
    "cauchy": lambda n: RNG.standard_t(1.0, size=n),
    "pareto": lambda n: RNG.pareto(1.5, size=n),
    "lognormal": lambda n: np.exp(2.0 * RNG.normal(size=n)),
    "wide": wide,
    "uniform": lambda n: RNG.random(n),
    "two peaks": lambda n: np.where(RNG.random(n) < 0.5, -3.0, 3.0) + 1e-3 * RNG.normal(size=n),
}


def standardised(*columns):
    rows = np.stack(columns, 1)
    return (rows - rows.mean(0)) / rows.std(0)


@pytest.mark.parametrize("n", [40, 400, 10_000])
@pytest.mark.parametrize("law", LAWS)
def test_the_density_of_the_map_integrates_to_one(law, n):
    r"""N(T(x); 0, 1) T'(x) over all x, and the derivative against differences."""
    column_map = fit_column_map(standardised(LAWS[law](n)))
    y = torch.linspace(-9.0, 9.0, 100_001, dtype=torch.float64)[:, None]
    x = column_map.inverse(y)
    again, logdet = column_map(x)
    assert bool((x.diff(dim=0) > 0.0).all())
    torch.testing.assert_close(again, y, rtol=0, atol=1e-9)
    density = (-0.5 * again[:, 0] ** 2 + logdet).exp() / math.sqrt(2.0 * math.pi)
    assert float(torch.trapezoid(density, x[:, 0])) == pytest.approx(1.0, abs=2e-4)
    inside = x[200:-200:97].requires_grad_()
    (slope,) = torch.autograd.grad(column_map(inside)[0].sum(), inside)
    torch.testing.assert_close(slope[:, 0].log(), column_map(inside)[1].detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("law", LAWS)
def test_columns_become_normal_and_keep_their_precision(law):
    rows = standardised(LAWS[law](5000))
    column_map = fit_column_map(rows)
    y, logdet = column_map(torch.from_numpy(rows))
    assert abs(float(y.mean())) < 0.02
    assert float(y.std()) == pytest.approx(1.0, abs=0.02)
    assert float(y.abs().max()) < 5.0
    rounded, again = column_map.float()(torch.from_numpy(rows).float())
    torch.testing.assert_close(rounded.double(), y, rtol=0, atol=5e-3)
    torch.testing.assert_close(again.double(), logdet, rtol=0, atol=0.1)
    assert float((again.double() - logdet).abs().mean()) < 1e-3


@pytest.mark.parametrize(("law", "power"), [("student", 2.0), ("cauchy", 1.0)])
def test_tails_are_no_lighter_than_those_of_the_rows(law, power):
    """Far beyond the rows, N(0, 1) of the map falls by about the law's power and not by more; 20 rows give it."""
    rows = LAWS[law](200_000)
    far = np.sort(np.abs(rows))[-1] * 3.0
    column_map = fit_column_map(standardised(rows))
    y, _ = column_map(torch.tensor([[(far - rows.mean()) / rows.std()]]))
    beyond = float(torch.special.ndtr(-y))
    law_beyond = 0.5 * np.mean(np.abs(rows) > far / 100.0) * 100.0**-power
    assert law_beyond / 100.0 < beyond < 100.0 * law_beyond


def test_slopes_agree_at_the_knots():
    column_map = fit_column_map(standardised(LAWS["lognormal"](2000)))
    knots = column_map.x[0][:, None]
    below, above = (column_map(knots + step * (1e-9 + knots.abs() * 1e-9))[1] for step in (-1.0, 1.0))
    torch.testing.assert_close(below, above, rtol=0, atol=1e-4)


def test_columns_are_made_independent():
    first = RNG.normal(size=4000)
    rows = standardised(np.exp(first), first + 1e-2 * RNG.normal(size=4000), RNG.normal(size=4000))
    column_map = fit_column_map(rows)
    y, logdet = column_map(torch.from_numpy(rows))
    np.testing.assert_allclose(np.cov(y.numpy().T), np.eye(3), atol=0.02)
    one = torch.from_numpy(rows[:1])
    jacobian = torch.autograd.functional.jacobian(lambda x: column_map(x)[0][0], one)[:, 0]
    assert float(torch.linalg.slogdet(jacobian)[1]) == pytest.approx(float(logdet[0]), abs=1e-9)
    torch.testing.assert_close(column_map.inverse(y), torch.from_numpy(rows), rtol=1e-6, atol=1e-8)


def test_columns_that_repeat_keep_their_values():
    rows = standardised(RNG.integers(0, 5, 500).astype(float))
    y, logdet = fit_column_map(rows, np.array([True]))(torch.from_numpy(rows))
    torch.testing.assert_close(y, torch.from_numpy(rows))
    assert float(logdet.abs().max()) < 1e-12


@pytest.mark.parametrize("n", [2, 3, 10])
def test_few_rows_make_a_map(n):
    rows = standardised(RNG.normal(size=n), RNG.normal(size=n))
    y, logdet = fit_column_map(rows)(torch.from_numpy(rows))
    assert bool(y.isfinite().all())
    assert bool(logdet.isfinite().all())


def test_a_model_of_mapped_rows_has_their_density(tmp_path):
    """With N(0, 1) as its latents' density, the model's density is the map's own, in files too."""
    rows = standardised(LAWS["student"](3000), LAWS["lognormal"](3000))
    column_map = fit_column_map(rows).double()
    net = ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2, width=8, depth=1))
    model = ndm_ct.NDM(net, (2,), transform=ndm_ct.transforms.Flow(column_map), checks=False).double()
    ndm_ct.save(model, tmp_path / "m.safetensors")
    loaded = ndm_ct.load(tmp_path / "m.safetensors")
    x = torch.from_numpy(rows[:5])
    y, logdet = column_map(x)
    latent = ndm_ct.NDM(net, (2,), checks=False).double()
    torch.testing.assert_close(ndm_ct.loglik(loaded, x), ndm_ct.loglik(latent, y) + logdet)


def test_maps_follow_each_other():
    first, then = (fit_column_map(standardised(LAWS[law](500))) for law in ("student", "two peaks"))
    x = torch.linspace(-2.0, 2.0, 7, dtype=torch.float64)[:, None]
    y, logdet = InTurn(first, then)(x)
    torch.testing.assert_close(logdet, first(x)[1] + then(first(x)[0])[1])
    torch.testing.assert_close(InTurn(first, then).inverse(y), x)


def test_an_unfitted_map_is_the_identity():
    x = torch.linspace(-50.0, 50.0, 11)[:, None].repeat(1, 3)
    y, logdet = ColumnMap(3, 5)(x)
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(logdet, torch.zeros(11))


@pytest.mark.parametrize(("width", "least", "most"), [(1.0, -9.0, -9.0), (1e-2, -14.0, -11.5), (1e-5, -14.0, -14.0)])
def test_noise_is_below_what_the_rows_show(width, least, most):
    """A curve in the plane, ``width`` wide, which no map of single columns takes away."""
    angle = RNG.uniform(0.0, 2.0 * math.pi, 3000)
    rows = np.stack([np.cos(angle), np.sin(angle)], 1) + width * RNG.normal(size=(3000, 2))
    gamma = gamma_of(torch.from_numpy(standardised(*rows.T)))
    assert least <= gamma <= most


def test_equal_rows_are_no_neighbours():
    y = torch.from_numpy(RNG.normal(size=(300, 2)))
    assert gamma_of(y.repeat(4, 1)) == -9.0
