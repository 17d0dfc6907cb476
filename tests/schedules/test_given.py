"""Schedules of a user's functions, against the same schedules in closed form."""

import math

import numpy as np
import pytest
import torch

import ndm_ct
from ndm_ct import schedules
from ndm_ct.schedules import FromFunctions, FromLogSNR

VP = schedules.VariancePreserving(0.1, 20.0)


def integral(t):
    return 0.1 * t + 9.95 * t**2


PAIRS = {
    "straight": (lambda: FromFunctions(lambda t: 1 - t, lambda t: t), schedules.Rectified()),
    "variance preserving": (
        lambda: FromFunctions(lambda t: torch.exp(-0.5 * integral(t)), lambda t: (-torch.expm1(-integral(t))).sqrt()),
        VP,
    ),
    "variance exploding": (
        lambda: FromFunctions(lambda t: 1.0, lambda t: 0.01 * 5000.0**t),
        schedules.VarianceExploding(0.01, 50.0),
    ),
    "linear log-SNR": (lambda: FromLogSNR(lambda t: 13.3 - 18.3 * t), schedules.LinearLogSNR()),
    "variance preserving by its log-SNR": (lambda: FromLogSNR(lambda t: -torch.log(torch.expm1(integral(t)))), VP),
}


@pytest.mark.parametrize("name", PAIRS)
def test_coefficients_are_those_of_the_closed_form(name):
    make, exact = PAIRS[name]
    schedule = make()
    assert schedule.safe_t_min == pytest.approx(exact.safe_t_min, rel=1e-9)
    assert schedule.unit == pytest.approx(exact.unit, rel=1e-3)
    for shape in ((), (5,), (2, 3)):
        t = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05
        ours, theirs = schedule(t), exact(t)
        for part in ("alpha", "sigma", "dalpha", "dsigma", "gamma", "dgamma", "angle"):
            torch.testing.assert_close(getattr(ours, part), getattr(theirs, part), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["straight", "variance preserving"])
def test_densities_are_those_of_the_closed_form(name):
    make, exact = PAIRS[name]
    cov = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=torch.float64)
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, expected = (
        ndm_ct.loglik(ndm_ct.reference.Gaussian(torch.zeros(2), cov, schedule=schedule), x)
        for schedule in (make(), exact)
    )
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_derivatives_are_there_in_every_mode(context):
    schedule = PAIRS["straight"][0]()
    with context():
        c = schedule(torch.tensor([0.25, 0.5], dtype=torch.float64))
    assert c.dalpha.tolist() == [-1.0, -1.0]
    assert c.dsigma.tolist() == [1.0, 1.0]


class Learned(torch.nn.Module):
    """A log-SNR with a slope to train, float32."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(10.0))

    def forward(self, t):
        return 8.0 - self.slope * t


def test_a_module_is_trained_with_the_model():
    schedule = FromLogSNR(Learned())
    model = ndm_ct.NDM(lambda z, t: 0.5 * z, (2,), schedule=schedule)
    assert [name for name, _ in model.named_parameters()] == ["process.schedule._log_snr.slope"]
    loss = ndm_ct.loss(model, torch.ones(4, 2), generator=0).sum()
    loss.backward()
    slope = schedule._log_snr.slope
    with torch.no_grad():
        step, values = 1e-2, []
        for sign in (1.0, -1.0):
            slope.copy_(10.0 + sign * step)
            values.append(float(ndm_ct.loss(model, torch.ones(4, 2), generator=0).sum()))
    assert float(slope.grad) == pytest.approx((values[0] - values[1]) / (2.0 * step), rel=2e-2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FromFunctions(lambda t: t, lambda t: 1 - t), ValueError, "runs from noise to data"),
        (lambda: FromFunctions(1.0, lambda t: t), TypeError, "alpha must be callable"),
        (lambda: FromFunctions(lambda t: 1 - t, lambda t: torch.stack([t, t])), ValueError, "sigma returned shape"),
        (
            lambda: FromFunctions(lambda t: math.cos(t), lambda t: t),
            TypeError,
            "alpha must take a tensor.*torch's func",
        ),
        (
            lambda: FromLogSNR(lambda t: torch.from_numpy(-np.asarray(t.detach()))),
            TypeError,
            "torch's functions, not numpy",
        ),
        (lambda: FromLogSNR(lambda t: t), ValueError, "must increase with t"),
        (lambda: FromFunctions(lambda t: 1 - 2 * t, lambda t: t), ValueError, "alpha must be positive"),
        (lambda: FromLogSNR(lambda t: torch.log(t - 0.5)), ValueError, "positive and finite"),
    ],
)
def test_functions_that_are_no_schedule_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
