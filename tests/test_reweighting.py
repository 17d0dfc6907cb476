"""Weighted samples: log Z, means and their errors where they are known, and weights of a noisy log p without bias."""

import math

import pytest
import torch

import ndm_ct
from ndm_ct import reference, schedules
from ndm_ct._core.seeds import make_generator
from ndm_ct.divergence import Hutchinson, Quadrature
from ndm_ct.reweighting import _tail_shape

SHORT = schedules.LinearLogSNR(-8.0, 5.0)


def gaussian(d, std=1.0):
    """A model with correlated coordinates, so that random probes are not exact."""
    place = torch.arange(float(d))
    cov = std**2 * torch.exp(-(place[:, None] - place).abs() / 2.0)
    return reference.Gaussian(torch.zeros(d), cov, schedule=SHORT)


def double_well(x):
    """The density of x^4/4 - x^2 in the first coordinate and a unit Gaussian in the second."""
    return 2.0 * (x[:, 0] ** 2 - x[:, 0] ** 4 / 4.0) - x[:, 1] ** 2 / 2.0


def wells():
    """A model with both wells, broad."""
    means = torch.tensor([[-1.4, 0.0], [1.4, 0.0]])
    return reference.GaussianMixture(
        torch.tensor([0.6, 0.4]), means, torch.diag(torch.tensor([0.4, 1.3])).repeat(2, 1, 1), schedule=SHORT
    )


def banana(x):
    return -(x[:, 0] ** 2) / 2.0 - (x[:, 1] - 0.5 * x[:, 0] ** 2) ** 2


def wide():
    return reference.Gaussian(torch.tensor([0.0, 0.6]), torch.tensor([[1.5, 0.0], [0.0, 1.8]]), schedule=SHORT)


def integral(log_density):
    """log Z of a density in the plane, on a grid."""
    x = torch.linspace(-9.0, 9.0, 1801, dtype=torch.float64)
    values = torch.stack([log_density(torch.stack([torch.full_like(x, float(a)), x], 1)) for a in x])
    return float(values.flatten().logsumexp(0)) + 2.0 * math.log(float(x[1] - x[0]))


def scaled(model):
    """The model's own density times e^3, which is exact: only the estimate of log q scatters."""
    return lambda x: model.log_prob(x) + 3.0


def test_log_z_and_means_of_a_double_well():
    found = ndm_ct.reweight(wells(), double_well, 500, generator=0, batch_size=300, rtol=1e-3, atol=1e-3)
    assert abs(found.log_z - integral(double_well)) < 3.0 * found.log_z_stderr < 0.2
    assert 100.0 < found.effective_sample_size < 500.0
    assert found.tail_shape < 0.7
    mean, stderr = found.expectation(lambda x: torch.stack([x[:, 0], x[:, 1] ** 2], 1))
    assert mean.shape == stderr.shape == (2,)
    assert bool(((mean - torch.tensor([0.0, 1.0])).abs() < 3.5 * stderr).all())  # the wells are equal, the model's not
    assert abs(float(found.x[:, 0].mean())) > 0.1
    assert found.log_z_ode_error < 1e-2
    drawn = found.resample(4000, generator=0)
    assert abs(float((drawn[:, 0] > 0).double().mean()) - 0.5) < 0.1


@pytest.mark.parametrize("trace", [Hutchinson(12), Quadrature(nodes=4, sweeps=8)], ids=["hutchinson", "quadrature"])
def test_weights_of_a_noisy_density_have_no_bias(trace):
    model = gaussian(12)
    found = ndm_ct.reweight(model, scaled(model), 600, trace=trace, generator=0, rtol=1e-3, atol=1e-3)
    assert 0.2 < float(found.variance.mean()) < 2.0
    assert abs(found.log_z - 3.0) < 3.0 * found.log_z_stderr
    # Without the correction the same weights would be too large by more than their error.
    plain = float((found.log_weights + found.variance / 2.0).logsumexp(0)) - math.log(600)
    assert plain - 3.0 > 3.0 * found.log_z_stderr


def test_weights_of_an_exact_density_are_equal():
    model = gaussian(3)
    found = ndm_ct.reweight(model, scaled(model), 40, generator=0)
    assert found.log_z == pytest.approx(3.0, abs=1e-4)
    assert found.effective_sample_size == pytest.approx(40.0, rel=1e-6)
    assert found.log_z_stderr < 1e-4


def test_tails_have_their_shape():
    u = torch.rand(4000, dtype=torch.float64, generator=make_generator(0))
    for k in (0.3, 0.9):
        assert _tail_shape(-k * u.log()) == pytest.approx(k, abs=0.15)
    assert math.isnan(_tail_shape(torch.zeros(20)))
    assert _tail_shape(torch.zeros(200)) == -math.inf


def test_a_model_too_narrow_warns():
    narrow = gaussian(2, std=0.5)
    with pytest.warns(UserWarning, match="tail of shape .* above 0.7: log Z, means"):
        ndm_ct.reweight(narrow, lambda x: -x.square().sum(1) / 8.0, 1000, generator=0)


def test_no_density_is_a_weight_of_zero():
    model = gaussian(2)
    inside = lambda x: torch.where(x[:, 0] > 0.0, model.log_prob(x), -math.inf)  # noqa: E731
    found = ndm_ct.reweight(model, inside, 400, generator=0)
    assert abs(found.log_z - math.log(0.5)) < 3.5 * found.log_z_stderr
    assert found.expectation(lambda x: x[:, 0])[0] > 0.5


@pytest.mark.parametrize(("change", "message"), [
    ({"trace": Hutchinson(1)}, "does not know its variance"), ({"n": 0}, "n must be at least 1"),
    ({"log_density": lambda x: x}, "log_density returned .* expected a tensor"),
    ({"log_density": lambda x: x[:, 0] * math.nan}, "NaN or inf for samples"),
    ({"log_density": lambda x: torch.full_like(x[:, 0], -math.inf)}, "do not overlap"),
    ({"log_density": 3.0}, "log_density must be a function"), ({"stderr": -0.1}, "stderr must be"),
    ({"batch_size": 0}, "batch_size must be at least 1"), ({"colour": 1}, "colour"),
])  # fmt: skip
def test_unusable_arguments(change, message):
    options = {"log_density": lambda x: x[:, 0], "n": 4, "generator": 0} | change
    with pytest.raises((ValueError, TypeError), match=message):
        ndm_ct.reweight(gaussian(2), options.pop("log_density"), options.pop("n"), **options)


def test_observables_are_checked():
    found = ndm_ct.reweight(gaussian(2), lambda x: x[:, 0], 4, generator=0)
    with pytest.raises(ValueError, match="function must return finite values, 4 rows"):
        found.expectation(lambda x: x[:2])
    with pytest.raises(TypeError, match="one torch"):
        found.resample(2, generator=[torch.Generator(), torch.Generator()])


def test_what_is_finished_is_returned():
    calls = []

    def stops(x):
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return x[:, 0]

    with pytest.warns(UserWarning, match="interrupted: 4 of 8 samples are finished"):
        assert len(ndm_ct.reweight(gaussian(2), stops, 8, generator=0, batch_size=2).x) == 4
    assert calls == [2, 2, 2]


LAWS = {
    "double well": (wells, double_well, 300, {}),
    "banana": (wide, banana, 300, {}),
    "noisy, 12 dimensions": (lambda: gaussian(12), None, 100, {"trace": Hutchinson(16)}),
    "noisy, 40 dimensions": (lambda: gaussian(40), None, 60, {"trace": Quadrature(nodes=8, sweeps=8)}),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the largest weights")  # of a dozen of them the shape is a guess
@pytest.mark.parametrize("name", LAWS)
def test_standard_errors_of_log_z_are_right(name):
    make, log_density, n, options = LAWS[name]
    model, truth = make(), 3.0
    if log_density is None:
        log_density = scaled(model)
    else:
        truth = integral(log_density)
    repeats = 240
    found = [
        ndm_ct.reweight(model, log_density, n, generator=make_generator(seed, name), rtol=1e-3, atol=1e-3, **options)
        for seed in range(repeats)
    ]
    z = torch.tensor([(each.log_z - truth) / each.log_z_stderr for each in found])
    assert 0.85 < float(z.std()) < 1.15
    assert abs(float(z.mean())) < 0.3
