"""Results do not depend on the unit of the data where the schedule is scaled with them."""

import math
from functools import partial

import pytest
import torch
from oracles import ALL_SCHEDULES
from torch import nn

import ndm_ct
from ndm_ct import schedules
from ndm_ct.discrete import DDPM, estimate_residuals
from ndm_ct.likelihood.quadrature import path_times
from ndm_ct.reference import Gaussian
from ndm_ct.samplers import NAMES
from ndm_ct.samplers.adaptive import finite_start
from ndm_ct.samplers.grids import GRIDS, time_grid
from ndm_ct.samplers.plan import METHODS
from ndm_ct.schedules.base import Coefficients, Schedule

UNITS = (1e-5, 1e-3, 1.0, 1e3, 1e4)
ON_GRIDS = [name for name in NAMES if name not in ("ddpm_analytic", "map")]  # they need residuals, a flow map
ADAPTIVE = [name for name in METHODS if name not in NAMES] + ["sde"]


def exploding(unit, low=1e-4, high=100.0):
    return schedules.VarianceExploding(low * unit, high * unit)


def isotropic(unit, d=2):
    """N(0, unit^2 I)."""
    return Gaussian(torch.zeros(d), unit**2 * torch.eye(d, dtype=torch.float64), schedule=exploding(unit))


def rotated(unit, d, **noise):
    """A Gaussian whose standard deviations run from 0.2 to 4 units, in a random basis."""
    basis = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    stds = unit * torch.logspace(math.log10(0.2), math.log10(4.0), d, dtype=torch.float64)
    return Gaussian(torch.zeros(d), basis * stds**2 @ basis.mT, schedule=exploding(unit, **noise))


class Scaled(Schedule):
    """Another schedule with its noise in another unit."""

    def __init__(self, base, unit):
        super().__init__()
        self.base, self.scale = base, unit

    def forward(self, t):
        c = self.base(t)
        return Coefficients(c.alpha, self.scale * c.sigma, c.dalpha, self.scale * c.dsigma)


class Growing(Schedule):
    """Noise that grows from zero, on data that are not scaled down."""

    def __init__(self, last):
        super().__init__()
        self.last = last

    def forward(self, t):
        one = torch.ones_like(t)
        return Coefficients(one, self.last * t, 0.0 * one, self.last * one)


# --- the unit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("make", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
def test_the_unit_of_a_schedule_scales_with_its_noise(make, unit):
    base = make()
    scaled = Scaled(base, unit)
    assert scaled.unit == pytest.approx(unit * base.unit, rel=1e-9)
    assert scaled.largest_noise == pytest.approx(unit * base.largest_noise, rel=1e-9)
    assert scaled.safe_t_min == pytest.approx(base.safe_t_min, rel=1e-9)
    assert ndm_ct.NDM(lambda z, t: z, (2,), schedule=scaled, prior=object()).unit == scaled.unit


def test_units_by_hand():
    preserving = [schedules.LinearLogSNR(), schedules.VariancePreserving(), schedules.Cosine(), schedules.Rectified()]
    assert [each.unit for each in preserving] == [each.preserved_std for each in preserving] == [1.0] * 4
    assert [each.largest_noise for each in preserving] == pytest.approx(
        [math.exp(2.5), math.exp(5.025), 1e3, 1e3], 1e-3
    )
    assert schedules.VarianceExploding(0.002, 80.0).unit == pytest.approx(1.0)
    assert schedules.VarianceExploding(0.05, 20.0).unit == pytest.approx(2.5)
    assert schedules.VarianceExploding(0.05, 2e7).largest_noise == pytest.approx(2e7)
    assert schedules.VarianceExploding().preserved_std == math.inf
    # Where half of the variance of the data is left the data count as scaled down.
    assert schedules.LinearLogSNR(-8.0, 0.01).unit == 1.0
    assert schedules.LinearLogSNR(-8.0, -0.01).unit == pytest.approx(math.exp(-2.0025) / 0.4)
    assert Growing(80.0).unit == pytest.approx(1.0)
    assert Growing(8e5).safe_t_min == pytest.approx(Growing(80.0).safe_t_min) == pytest.approx(1e-3 / 80.0)


# --- sampling --------------------------------------------------------------------------------------------------------


def drawn(unit, method, n=3, **options):
    return ndm_ct.sample(isotropic(unit), n, method=method, generator=0, dtype=torch.float64, **options) / unit


@pytest.mark.parametrize("method", ON_GRIDS)
def test_samples_on_grids_do_not_depend_on_the_unit(method):
    for grid in GRIDS:
        expected = drawn(1.0, method, steps=6, grid=grid)
        for unit in (1e-5, 1e4):
            torch.testing.assert_close(drawn(unit, method, steps=6, grid=grid), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_samples_do_not_depend_on_the_unit(method):
    """In units of powers of two, which change no rounding: torchsde's path depends on every bit of its times."""
    expected = drawn(1.0, method, n=2, rtol=0.1, atol=0.1)
    for unit in (2.0**-17, 2.0**13):
        torch.testing.assert_close(drawn(unit, method, n=2, rtol=0.1, atol=0.1), expected, rtol=1e-12, atol=1e-12)


def test_measured_residuals_do_not_depend_on_the_unit():
    def samples(unit):
        model = isotropic(unit)
        data = model.sample_data(50, generator=torch.Generator().manual_seed(0))
        residuals = estimate_residuals(model, data, times=8, generator=0)
        return drawn(unit, partial(DDPM, variance="analytic", residuals=residuals), steps=6)

    for unit in (1e-5, 1e4):
        torch.testing.assert_close(samples(unit), samples(1.0), rtol=1e-5, atol=1e-7)


def test_no_step_jumps_over_noise_that_still_shows_the_data():
    """However the range of noise lies around the data."""
    for low, high in ((1e-4, 1e2), (1e-8, 10.0), (1.0, 1e6)):
        schedule = exploding(1.0, low, high)
        model = Gaussian(torch.zeros(2), torch.eye(2), schedule=schedule)
        assert finite_start(model, torch.zeros(1, 2), None, {})[1:] == (1.0, 0)
        for grid in ("logsnr", "karras", "edm"):
            times = time_grid(schedule, 0.0, 1000, grid)
            assert float(schedule(times[:2]).sigma.log().diff().abs()) < 0.1


def exact(unit, z1):
    """The flow from t = 1 to t = 0, a factor."""
    return math.sqrt((1.0 + 1e-8) / (1.0 + 1e4)) * z1 / unit


STOCHASTIC = {"ddpm", "ddpm_small", "ddpm_large", "dpmpp_2m_sde", "euler_ancestral", "euler_maruyama", "sde", "srk"}
STOCHASTIC |= {"edm_churn", "langevin", "pc"}
STEPS = {"euler": 3000}
BIAS = {"langevin": 0.1}
"""Its steps at each level are too few to forget the level before."""


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", ON_GRIDS)
def test_standard_deviations_in_every_unit(method, grid, unit):
    options = {"steps": STEPS.get(method, 500), "grid": grid, "return_info": True}
    n = 2000 if method in STOCHASTIC else 4
    x, info = ndm_ct.sample(isotropic(unit), n, method=method, generator=0, dtype=torch.float64, **options)
    truth = 1.0 if method in STOCHASTIC else float(exact(unit, info.z).std())
    assert float(x.std()) / unit == pytest.approx(truth, rel=BIAS.get(method, 0.03))


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_standard_deviations_of_adaptive_methods_in_every_unit(method, unit):
    stochastic = method == "sde" or method.startswith("torchsde")
    x, info = ndm_ct.sample(
        isotropic(unit), 1000 if stochastic else 4, method=method, generator=0, dtype=torch.float64, return_info=True
    )
    truth = 1.0 if stochastic else float(exact(unit, info.z).std())
    assert float(x.std()) / unit == pytest.approx(truth, rel=0.05 if stochastic else 1e-3)


# --- likelihood ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1.0, 100.0, 5000.0])
@pytest.mark.parametrize("noise", [{}, {"low": 0.01, "high": 50.0}], ids=["wide", "default"])
def test_the_quadrature_is_calibrated_in_every_unit(unit, noise):
    model = rotated(unit, 40, **noise)
    x = model.sample_data(200, generator=torch.Generator().manual_seed(1))
    value, info = ndm_ct.loglik(model, x, trace="quadrature", generator=0, return_info=True)
    z = (value - model.log_prob(x, 0.0)) / info.stderr
    assert 0.85 < float(z.std()) < 1.15
    assert float(z.abs().max()) < 4.5
    stderr = float(info.stderr.square().mean().sqrt())
    assert stderr < (0.8 if noise else 1.2)
    assert float(info.ode_error.max()) < 0.25 * stderr


@pytest.mark.parametrize("unit", UNITS)
def test_nodes_are_evenly_spread_over_noise_on_data_that_are_not_scaled_down(unit):
    u = torch.linspace(0.0, 1.0, 9, dtype=torch.float64)
    t, _ = path_times(isotropic(unit), u)
    torch.testing.assert_close(t, u, rtol=0.0, atol=2e-3)


@pytest.mark.parametrize("method", ["ode", "dopri5"])
@pytest.mark.parametrize("unit", [1e-5, 1e4])
def test_exact_traces_do_not_depend_on_the_unit(unit, method):
    def scored(unit):
        model = rotated(unit, 3)
        x = unit * torch.tensor([[0.3, -2.0, 1.0], [0.0, 0.1, 4.0]], dtype=torch.float64)
        value, info = ndm_ct.loglik(model, x, trace="exact", method=method, return_info=True)
        return value - model.log_prob(x, 0.0), info

    error, info = scored(unit)
    expected, usual = scored(1.0)
    assert float(error.abs().max()) < 1e-3
    torch.testing.assert_close(error, expected, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(info.ode_error, usual.ode_error, rtol=1e-3, atol=1e-9, equal_nan=True)
    assert torch.equal(info.row_nfe, usual.row_nfe)


@pytest.mark.parametrize("unit", UNITS)
def test_round_trips_in_every_unit(unit):
    model = rotated(unit, 3)
    x = model.sample_data(5, generator=torch.Generator().manual_seed(0))
    back = ndm_ct.decode(model, ndm_ct.encode(model, x))
    assert float((back - x).abs().max()) / unit < 2e-4


@pytest.mark.parametrize("unit", [1e-5, 1e4])
def test_gradients_scale_with_the_unit(unit):
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, z, t):
            return self.weight * z / (1.0 + (100.0**t * 0.1)[:, None])

    def gradients(unit, differentiable):
        model = ndm_ct.NDM(Linear(), (2,), schedule=exploding(unit, 0.1, 10.0))
        x = unit * torch.tensor([[0.3, -1.0]], dtype=torch.float64)
        x.requires_grad_()
        value = ndm_ct.loglik(model, x, method="dopri5", differentiable=differentiable)
        return torch.autograd.grad(value.sum(), [x, *model.parameters()])

    for differentiable in (True, "adjoint"):
        (of_x, of_weight), (x, weight) = gradients(unit, differentiable), gradients(1.0, differentiable)
        torch.testing.assert_close(unit * of_x, x, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(of_weight, weight, rtol=1e-6, atol=0.0)
