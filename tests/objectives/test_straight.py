"""The curvature penalty against Gaussian paths, whose acceleration is known."""

import math

import numpy as np
import pytest
import torch

import ndm_ct
from ndm_ct import nn, objectives, schedules, transforms
from ndm_ct.objectives import straight as transport

BASIS = torch.linalg.qr(torch.tensor([[1.0, 0.4], [-0.3, 1.0]], dtype=torch.float64))[0]
VARIANCES = torch.tensor([0.3, 2.0], dtype=torch.float64)


def gaussian(schedule, k=None, variances=VARIANCES, t_min=None):
    transform = None if k is None else transforms.TimeScaling(k)
    covariance = BASIS @ torch.diag(variances) @ BASIS.mT
    return ndm_ct.reference.Gaussian(torch.zeros(2), covariance, schedule=schedule, transform=transform, t_min=t_min)


def spreads(model, t, variances=VARIANCES):
    """Standard deviations of z along the eigenvectors, and their first two time derivatives, each ``(T, 2)``."""

    def spread(time):
        c = model.schedule(time)
        k = model.transform(torch.ones(len(time), 1, dtype=torch.float64), time)
        return torch.sqrt((c.alpha[:, None] * k) ** 2 * variances + c.sigma[:, None] ** 2)

    def rate(time):
        return torch.func.jvp(spread, (time,), (torch.ones_like(time),))[1]

    value, first = torch.func.jvp(spread, (t,), (torch.ones_like(t),))
    return value, first, torch.func.jvp(rate, (t,), (torch.ones_like(t),))[1]


def quadratic_paths(t):
    r"""k under which :math:`z \propto 1 + 0.4 t^2` for data of variance one and the schedule Rectified."""
    return torch.sqrt((1.0 + 0.4 * t**2) ** 2 - t**2) / (1.0 - t)


def straight(tau):
    """k of the straight paths of data with standard deviation tau under Rectified."""
    return lambda t: torch.sqrt(((1.0 - t) * tau + t) ** 2 - t**2) / ((1.0 - t) * tau)


CASES = {
    "linear log-SNR, moving F": (schedules.LinearLogSNR(-6.0, 5.0), lambda t: 1.0 + 1.5 * t),
    "rectified, F the identity": (schedules.Rectified(), None),
    "variance exploding": (schedules.VarianceExploding(0.05, 1.0), lambda t: 1.0 - 0.9 * t**2),
}


@pytest.mark.parametrize("name", CASES)
def test_the_acceleration_of_gaussian_paths(name):
    model = gaussian(*CASES[name])
    z, t = torch.randn(50, 2, dtype=torch.float64), 0.05 + 0.9 * torch.rand(50, dtype=torch.float64)
    value, _, second = spreads(model, t)
    expected = (z @ BASIS * second / value) @ BASIS.mT
    assert float(expected.abs().max()) > 0.1
    torch.testing.assert_close(transport.acceleration(model.flow(z.dtype), z, t), expected, rtol=1e-7, atol=1e-7)


def test_straight_paths_have_no_acceleration():
    tau = 0.5
    model = gaussian(schedules.Rectified(), straight(tau), torch.full((2,), tau**2, dtype=torch.float64))
    z, t = torch.randn(50, 2, dtype=torch.float64), torch.linspace(0.02, 0.98, 50, dtype=torch.float64)
    assert float(transport.acceleration(model.flow(z.dtype), z, t).abs().max()) < 1e-7
    assert float(transport.curvature(model, model.sample_data(64)).max()) < 1e-8


def test_the_estimate_is_unbiased():
    model = gaussian(schedules.Rectified(), lambda t: 1.0 + t, t_min=0.2)
    places, weights = (torch.as_tensor(each) for each in np.polynomial.legendre.leggauss(40))
    tau, length = 0.5 * (1.0 + places), 0.8
    _, _, second = spreads(model, 0.2 + length * tau)
    exact = float((0.5 * weights * 0.5 * tau * (1.0 - tau) * (length**2 * second).square().sum(1)).sum())
    generator = torch.Generator().manual_seed(0)
    batches = torch.stack(
        [
            transport.curvature(model, model.sample_data(4000, generator=generator), generator=generator).mean()
            for _ in range(30)
        ]
    )
    error = float(batches.std()) / math.sqrt(len(batches))
    assert error < 0.01 * exact
    assert abs(float(batches.mean()) - exact) < 4.0 * error


def test_it_is_the_distance_from_straight_paths_where_the_acceleration_is_constant():
    one = torch.ones(2, dtype=torch.float64)
    model = gaussian(schedules.Rectified(), quadratic_paths, one, t_min=0.1)
    generator = torch.Generator().manual_seed(0)
    x = model.sample_data(50_000, generator=generator)
    value = transport.curvature(model, x, generator=generator)
    # z = (1 + 0.4 t^2) y with y ~ N(0, I_2), so |dz/dtau - (z_1 - z_0)|^2 = (0.8 * 0.9^2 (tau - 1/2))^2 |y|^2.
    expected = (0.8 * 0.9**2) ** 2 / 12.0 * 2.0
    assert abs(float(value.mean()) - expected) < 4.0 * float(value.std()) / math.sqrt(len(value))


def test_it_bounds_the_distance_from_straight_paths():
    model = gaussian(schedules.Rectified())
    t = torch.linspace(model.t_min, 1.0, 4001, dtype=torch.float64)
    value, first, second = spreads(model, t)
    tau, length = (t - model.t_min) / (1.0 - model.t_min), 1.0 - model.t_min
    distance = torch.trapezoid((length * first - (value[-1] - value[0])).square().sum(1), tau)
    bound = torch.trapezoid(0.5 * tau * (1.0 - tau) * (length**2 * second).square().sum(1), tau)
    assert 0.0 < float(distance) < float(bound) < 10.0 * float(distance)


def test_gradients_reach_the_transform_and_the_predictor():
    net = nn.MLP(2, width=8, depth=1)
    predictor = nn.MLP(2, width=8, depth=1, outputs=2)
    for network in (net, predictor):
        torch.nn.init.normal_(network.output.weight, std=0.3)
    model = ndm_ct.NDM(
        nn.Preconditioned(predictor, prediction="moments"), (2,), transform=transforms.Neural(net),
        prediction="moments", schedule=schedules.LinearLogSNR(-5.0, 5.0),
    )  # fmt: skip
    transport.curvature(model, torch.randn(16, 2)).mean().backward()
    for network in (net, predictor):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 0.0, name


def bent(size=2):
    """A model in float64 whose F is a nonlinear function of x and of t, and the network in F."""
    torch.manual_seed(0)
    net = nn.MLP(size, width=8, depth=1, outputs=3, time=False).double()
    torch.nn.init.normal_(net.output.weight, std=0.3)
    transform = transforms.Separable(net, transforms.PolynomialBasis(3))
    predictor = nn.Preconditioned(nn.MLP(size, width=8, depth=1, outputs=2).double(), prediction="moments")
    schedule = schedules.LinearLogSNR(-4.0, 4.0)
    return ndm_ct.NDM(predictor, (size,), transform=transform, schedule=schedule, prediction="moments"), net


def test_the_flow_of_a_batch_is_that_of_its_rows_under_the_law_of_the_batch():
    model, _ = bent()
    x = torch.randn(11, 2, dtype=torch.float64)
    curved = transport.curvature(model, x, flow="batch", generator=torch.Generator().manual_seed(3))

    def velocity(z, t):
        """Of one state: the mean of the conditional velocities over the posterior of the rows, by Bayes' rule."""
        times = t.expand(len(x))
        c, means = model.schedule(t), model.process.mean(x, times)
        rows = z.expand(len(x), -1)
        density = torch.distributions.Normal(means, c.sigma).log_prob(rows).sum(1).exp()
        return density @ model.process.velocity(rows, x, times) / density.sum()

    generator = torch.Generator().manual_seed(3)
    shift = torch.rand((), dtype=torch.float64, generator=generator)
    u = ((shift + torch.arange(8, dtype=torch.float64) / 8) % 1.0)[torch.arange(11) % 8]
    tau = 0.5 - torch.sin(torch.asin(1.0 - 2.0 * u) / 3.0)
    z = model.process.sample(x, tau, generator=generator)
    h = 1e-5
    for row, start, t in zip(curved, z, tau, strict=True):
        v = velocity(start, t)
        along = [velocity(start + sign * h * v, t + sign * h) for sign in (1.0, -1.0)]
        expected = ((along[0] - along[1]) / (2.0 * h)).square().sum() / 12.0
        torch.testing.assert_close(row, expected, rtol=1e-7, atol=1e-9)


def test_the_flow_of_a_large_batch_is_that_of_its_law():
    model = gaussian(schedules.Rectified(), lambda t: 1.0 + t, t_min=0.4)
    generator = torch.Generator().manual_seed(0)
    batches = [model.sample_data(600, generator=generator) for _ in range(30)]
    batch, exact = (
        torch.stack([transport.curvature(model, x, flow=flow, generator=generator).mean() for x in batches])
        for flow in ("batch", "model")
    )
    error = float(torch.sqrt(batch.var() / len(batch) + exact.var() / len(exact)))
    assert error < 0.06 * float(exact.mean())
    assert abs(float(batch.mean() - exact.mean())) < 4.0 * error


def test_the_flow_of_a_batch_leaves_the_predictor_alone():
    model, net = bent()
    transport.curvature(model, torch.randn(16, 2, dtype=torch.float64), flow="batch").mean().backward()
    assert all(parameter.grad is None for parameter in model.predictor.parameters())
    assert all(float(parameter.grad.abs().max()) > 0.0 for parameter in net.parameters())


def test_the_flow_of_a_batch_is_of_one_law():
    model, _ = bent()
    x = torch.randn(4, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r'flow must be "model" or "batch", got \'data\''):
        transport.curvature(model, x, flow="data")
    with pytest.raises(ValueError, match=r'flow must be "model" or "batch", got 3'):
        transport.Straight(flow=3)
    with pytest.raises(ValueError, match=r'x has no rows, of which flow="batch" needs one'):
        transport.curvature(model, x[:0], flow="batch")
    assert transport.curvature(model, x[:0]).shape == (0,)
    conditioned = ndm_ct.NDM(lambda z, t, *, label: z, (2,))
    with pytest.raises(ValueError, match=r'conditioned on label; take flow="model"'):
        transport.curvature(conditioned, x, flow="batch", label=torch.zeros(4))


@pytest.mark.parametrize("flow", ["model", "batch"])
def test_the_objective_is_the_bound_and_the_penalty(flow):
    model = gaussian(schedules.LinearLogSNR(-5.0, 5.0))
    x = model.sample_data(8)
    generator = torch.Generator().manual_seed(3)
    expected = objectives.loss(model, x, generator=generator)
    expected = expected + 2.5 * transport.curvature(model, x, flow=flow, generator=generator)
    objective = transport.Straight(2.5, flow=flow)
    torch.testing.assert_close(objective(model, x, generator=torch.Generator().manual_seed(3)), expected)


def test_the_objective_describes_itself():
    bound = objectives.Bound(objectives.LossHistory(10))
    assert transport.Straight(0.5).describe() == "Straight(strength=0.5)"
    assert transport.Straight(0.5, bound).describe() == f"Straight(strength=0.5, bound={bound.describe()})"
    assert transport.Straight(0.5, flow="batch").describe() == "Straight(strength=0.5, flow=batch)"
    assert "bound.sampler.count" in transport.Straight(0.5, bound).state_dict()


@pytest.mark.parametrize("strength", [-1.0, math.nan, math.inf])
def test_a_strength_that_is_none_is_refused(strength):
    with pytest.raises(ValueError, match=r"strength must be a finite number >= 0"):
        transport.Straight(strength)


@pytest.mark.parametrize("flow", ["model", "batch"])
def test_training_makes_paths_straighter(flow):
    def trained(strength):
        torch.manual_seed(0)
        k = transforms.Separable(nn.MLP(1, width=8, depth=1, outputs=2, time=False))
        model = ndm_ct.NDM(
            nn.Preconditioned(nn.MLP(1, width=16, depth=1, outputs=2), prediction="moments", data_std=0.5), (1,),
            transform=k, prediction="moments", schedule=schedules.VarianceExploding(0.05, 1.0),
        )  # fmt: skip
        x = 0.5 * torch.randn(4000, 1, generator=torch.Generator().manual_seed(1))
        ndm_ct.fit(
            model, x, steps=60, batch_size=128, lr=5e-3, ema=0.9, progress=False,
            objective=transport.Straight(strength, flow=flow),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(2)
        return float(transport.curvature(model, x[:1000], flow=flow, generator=generator).mean().detach())

    assert trained(3.0) < 0.6 * trained(0.0)
