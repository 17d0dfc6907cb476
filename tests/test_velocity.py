"""Networks that are the velocity: the flow is their output, down to sigma = 0."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal

import ndm_ct
from ndm_ct import NDM, adapters, schedules

D = 2


class Field(torch.nn.Module):
    """A small network with weights, ``net(x, t)``."""

    def __init__(self, seed=1, width=32):
        super().__init__()
        torch.manual_seed(seed)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(D + 1, width), torch.nn.SiLU(), torch.nn.Linear(width, width), torch.nn.SiLU(),
            torch.nn.Linear(width, D),
        )  # fmt: skip

    def forward(self, x, t):
        return self.net(torch.cat([x, t[:, None]], 1))


def points(n=4, seed=0):
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_torchdiffeq(net, x, start=0.0):
    """Log-density of N(0, I) at t = 1 brought to ``start``, by torchdiffeq with the full Jacobian."""
    import torchdiffeq

    def field(t, state):
        time = t.expand(1).to(x.dtype)

        def one(z):
            return net(z[None], time)[0]

        return net(state[0], t.expand(len(x)).to(x.dtype)), torch.stack([
            torch.autograd.functional.jacobian(one, z).trace() for z in state[0]
        ])  # fmt: skip

    with torch.no_grad():
        times = torch.tensor([start, 1.0], dtype=torch.float64)
        z, logdet = torchdiffeq.odeint(field, (x, x.new_zeros(len(x))), times, rtol=1e-10, atol=1e-10)
    return Normal(0.0, 1.0).log_prob(z[-1]).sum(1) + logdet[-1]


@pytest.mark.parametrize("t_min", [0.0, 1e-3])
@pytest.mark.parametrize("trace", ["exact", "quadrature"])
def test_densities_are_those_of_an_independent_solve(t_min, trace):
    net, x = Field().double(), points()
    model = NDM(net, (D,), schedule=schedules.Rectified(), prediction="velocity", t_min=t_min)
    if trace == "exact":
        found = ndm_ct.loglik(model, x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found, by_torchdiffeq(net, x, t_min), rtol=0.0, atol=1e-7)
    else:
        found, info = ndm_ct.loglik(model, x, trace=ndm_ct.divergence.Quadrature(64), generator=0, return_info=True)
        gap = (found - by_torchdiffeq(net, x, t_min)).abs()
        assert bool((gap < 5.0 * info.stderr + 1e-3).all())


def test_zuko_has_the_same_numbers():
    zuko = pytest.importorskip("zuko")
    torch.manual_seed(0)
    flow = zuko.flows.CNF(features=D, hidden_features=(16, 16), atol=1e-9, rtol=1e-9).double()
    distribution, x = flow(), points(5)
    transform = distribution.transform

    def net(z, t):
        # zuko calls its network with one time for the whole batch.
        return torch.cat([transform.f(time, row[None]) for time, row in zip(t, z, strict=True)])

    assert (float(transform.t0), float(transform.t1)) == (0.0, 1.0)
    model = NDM(net, (D,), schedule=schedules.Rectified(), prediction="velocity", t_min=0.0, checks=False)
    with torch.no_grad():
        theirs = distribution.log_prob(x)
    torch.testing.assert_close(ndm_ct.loglik(model, x, rtol=1e-8, atol=1e-8), theirs, rtol=0.0, atol=1e-5)


def test_flow_matching_has_the_same_numbers():
    solver = pytest.importorskip("flow_matching.solver")
    net, x = Field().double(), points()

    class Theirs(torch.nn.Module):
        def forward(self, x, t, **extras):
            return net(x, t.expand(len(x)))

    log_p0 = Independent(Normal(torch.zeros(D, dtype=torch.float64), 1.0), 1).log_prob
    _, theirs = solver.ODESolver(Theirs()).compute_likelihood(
        x, log_p0, step_size=None, method="dopri5", atol=1e-8, rtol=1e-8, exact_divergence=True
    )
    model = adapters.from_velocity(net, (D,), t_min=0.0)
    torch.testing.assert_close(ndm_ct.loglik(model, x, rtol=1e-8, atol=1e-8), theirs, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("tolerance", [2e-6, 1e-8])
def test_float32_takes_hardly_more_evaluations_than_float64(tolerance):
    net, x = Field(width=64), points()
    nfe = {}
    for dtype in (torch.float32, torch.float64):
        model = adapters.from_velocity(net.to(dtype), (D,))
        nfe[dtype] = ndm_ct.loglik(model, x.to(dtype), rtol=tolerance, atol=tolerance, return_info=True)[1].nfe
    assert nfe[torch.float32] < 1.2 * nfe[torch.float64]


@pytest.mark.parametrize("schedule", [schedules.Rectified(), schedules.Trigonometric(), schedules.LinearLogSNR()])
def test_the_prediction_of_x_is_the_one_that_the_velocity_means(schedule):
    x, eps, t = points(), points(seed=1), torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
    c = schedule(t)
    alpha, sigma, dalpha, dsigma = (each[:, None] for each in (c.alpha, c.sigma, c.dalpha, c.dsigma))
    velocity = dalpha * x + dsigma * eps
    model = NDM(lambda z, t: velocity, (D,), schedule=schedule, prediction="velocity")
    z = alpha * x + sigma * eps
    torch.testing.assert_close(model.predict_x(z, t), x)
    torch.testing.assert_close(model.score(z, t), -eps / sigma)
    assert torch.equal(model.velocity(z, t), velocity)


def test_nothing_is_left_to_truncate_at_sigma_zero():
    model = adapters.from_velocity(Field().double(), (D,), t_min=0.0)
    _, info = ndm_ct.loglik(model, points(), return_info=True)
    assert info.truncation.tolist() == [0.0] * 4
    assert bool((info.ode_error < 1e-4).all())


def test_there_and_back_at_sigma_zero():
    model = adapters.from_velocity(Field().double(), (D,), t_min=0.0)
    x = points()
    torch.testing.assert_close(ndm_ct.decode(model, ndm_ct.encode(model, x)), x, rtol=0.0, atol=1e-4)
    drawn, info = ndm_ct.sample(model, 5, generator=0, return_info=True)
    torch.testing.assert_close(info.logp, ndm_ct.loglik(model, drawn.double()).to(info.logp), rtol=0.0, atol=1e-3)


@pytest.mark.parametrize("method", ["euler", "heun", "rk4", "ddim", "dpmpp_2m", "unipc", "deis2", "pndm", "edm"])
def test_samplers_reach_sigma_zero(method):
    model = adapters.from_velocity(Field().double(), (D,), t_min=0.0)
    exact = ndm_ct.sample(model, 8, generator=0)
    found = ndm_ct.sample(model, 8, generator=0, method=method, steps=40)
    torch.testing.assert_close(found, exact, rtol=0.0, atol=1e-2)


def test_euler_steps_are_those_of_the_network():
    net = Field().double()
    model = NDM(net, (D,), schedule=schedules.Rectified(), prediction="velocity", t_min=0.0)
    x, info = ndm_ct.sample(model, 3, method="euler", steps=4, generator=0, return_info=True)
    z = info.z
    for k in range(4):
        z = z - 0.25 * net(z, torch.full((3,), 1.0 - 0.25 * k, dtype=z.dtype))
    torch.testing.assert_close(x, z)


def test_what_needs_noise_says_so_at_sigma_zero():
    model = adapters.from_velocity(Field(), (D,), t_min=0.0)
    x = points().float()
    bins = ndm_ct.quantisation.Quantisation(4, centres=(-1.0, 1.0))
    for call in (
        lambda: ndm_ct.elbo(model, x),
        lambda: ndm_ct.loss(model, x),
        lambda: ndm_ct.sample(model, 2, method="sde"),
        lambda: model.score(x, 0.0),
        lambda: ndm_ct.bits_per_dim(model, torch.zeros(2, D).long(), quantisation=bins, dequantisation="process"),
    ):
        with pytest.raises(ValueError, match=r"needs noise at the data end.*t_min=0\.000999"):
            call()
    with pytest.raises(ValueError, match="grid='logsnr' has no last step"):
        ndm_ct.sample(model, 2, method="ddim", steps=3, grid="logsnr")
    assert bool(model.score(x, 0.5).isfinite().all())
    ndm_ct.check(model, x)


def test_other_predictions_still_need_noise():
    with pytest.raises(ValueError, match="prediction='velocity'"):
        NDM(Field(), (D,), schedule=schedules.Rectified(), t_min=0.0)
    with pytest.raises(ValueError, match="F is the identity"):
        NDM(Field(), (D,), transform=ndm_ct.transforms.TimeScaling((1.0, 1.0)), prediction="velocity")


def test_training_regresses_on_the_network_itself():
    """At t = 0 too; the loss is that of flow matching."""
    model = NDM(Field().double(), (D,), schedule=schedules.Rectified(), prediction="velocity", t_min=0.0)
    x, eps, t = points(), points(seed=1), torch.tensor([0.0, 0.3, 0.9, 1.0], dtype=torch.float64)
    z = (1.0 - t[:, None]) * x + t[:, None] * eps
    expected = (eps - x - model.predictor(z, t)).square().sum(1)
    found = ndm_ct.objectives.Regression("velocity").at(model, x, t, eps)
    torch.testing.assert_close(found, expected)


def test_truncation_is_right_within_a_factor_or_unknown():
    """On a network that was trained on N(0, 0.05^2) in its exact form, and on networks that were not trained."""
    x = 0.05 * points(6)

    def exact(z, tau):
        a, s = tau[:, None], 1.0 - tau[:, None]
        variance = (0.05 * a) ** 2 + s**2
        return z * (0.05**2 * a - s) / variance

    for net, data in ((exact, x), (Field(0).double(), points(6)), (Field(3).double(), 2.0 * points(6))):
        found, info = ndm_ct.loglik(adapters.from_velocity(net, (D,)), data, return_info=True)
        at_zero = ndm_ct.loglik(adapters.from_velocity(net, (D,), t_min=0.0), data)
        true, said = found - at_zero, info.truncation
        torch.testing.assert_close(said, true, rtol=0.5, atol=1e-5)
    _, info = ndm_ct.loglik(adapters.from_velocity(net, (D,)), data, trace="quadrature", generator=0, return_info=True)
    torch.testing.assert_close(info.truncation, said, rtol=0.1, atol=1e-4)  # without the noise of the trace


def test_a_saved_model_predicts_the_velocity_again(tmp_path):
    model = adapters.from_velocity(ndm_ct.nn.MLP(D, width=8), (D,), t_min=0.0)
    ndm_ct.save(model, tmp_path / "model.safetensors")
    again = ndm_ct.load(tmp_path / "model.safetensors")
    assert (again.prediction, again.t_min) == ("velocity", 0.0)
    assert math.isclose(again.t_noise, model.t_noise)


def test_quadrature_at_sigma_zero_is_that_of_the_whole_path():
    """A field whose divergence lies in the first thousandth of the path."""

    def net(z, t):
        return 3e3 * z * torch.exp(-3e3 * t)[:, None]

    model = NDM(net, (D,), schedule=schedules.Rectified(), prediction="velocity", t_min=0.0, checks=False)
    x = 0.1 * points(2)
    expected = Normal(0.0, 1.0).log_prob(math.e * x).sum(1) + D
    quadrature = ndm_ct.divergence.Quadrature(64)
    found, info = ndm_ct.loglik(model, x, trace=quadrature, generator=0, return_info=True, rtol=1e-6, atol=1e-6)
    assert bool(((found - expected).abs() < 5.0 * info.stderr + 1e-3).all()), (found, expected, info.stderr)
