"""Noise with a scale S(x, t): the pair against brute force, the model's formulas, training, files, refusals."""

import copy
import math

import numpy as np
import pytest
import torch
from oracles import Breathe, ThreePoints, Wiggle, k, order
from torch import nn

import ndm_ct
from ndm_ct import NDM, discrete, objectives, schedules, transforms
from ndm_ct.process import ForwardProcess

SCHEDULE = schedules.LinearLogSNR(-6.0, 5.0)


def time(value):
    return torch.tensor(value, dtype=torch.float64)


def rising(t):
    return 0.7 + 0.5 * t


class CaseSeven(ThreePoints):
    points = time([-1.2, 0.3, 1.1])
    weights = time([0.3, 0.45, 0.25])


EXACT = CaseSeven(SCHEDULE, Wiggle(), eta=rising, scale=Breathe())


class Coupled(transforms.Transform):
    """F of two coordinates that depend on each other."""

    def forward(self, x, t, **cond):
        return x + t.reshape(-1, 1) * torch.tanh(x.flip(1) + 0.3 * x)


def coupled_scale(x, t):
    return torch.sin(2.0 * t).reshape(-1, 1) * torch.sin(x + 0.7 * x.flip(1))


def process(transform=None, scale=coupled_scale, **options):
    return ForwardProcess(transform or Coupled(), SCHEDULE, options.get("volatility", rising), noise_scale=scale)


# --- given x, against derivatives of the marginal -------------------------------------------------------------------


@pytest.mark.parametrize("events", [1, 2])
def test_velocity_score_and_drift_are_those_of_the_marginal(events):
    """z moves with the velocity at fixed x and noise; the score is the gradient of the log density."""
    own = process() if events == 2 else process(Wiggle(), Breathe())
    x, eps = torch.randn(2, 6, events, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    z, velocity = torch.func.jvp(lambda t: own.sample(x, t, eps=eps), (t,), (torch.ones_like(t),))
    assert (own.velocity(z, x, t) - velocity).abs().max() < 1e-10 * velocity.abs().max()

    def log_density(z):
        r = own.noise_scale(x, t)
        std = own.schedule(t).sigma[:, None] * r.exp()
        return (-0.5 * ((z - own.mean(x, t)) / std) ** 2 - std.log()).sum()

    score = torch.func.grad(log_density)(z)
    assert (own.score(z, x, t) - score).abs().max() < 1e-10 * score.abs().max()
    drift = velocity - 0.5 * own.diffusion(t)[:, None] ** 2 * score
    assert (own.reverse_drift(z, x, t) - drift).abs().max() < 1e-10 * drift.abs().max()


def test_an_analytic_derivative_of_a_users_scale_is_called():
    class Analytic(nn.Module):
        def forward(self, x, t):
            return t[:, None].detach() * x

        def with_derivative(self, x, t):
            return self(x, t), x

    x, t = torch.randn(3, 2, dtype=torch.float64), time([0.1, 0.2, 0.3])
    _, dr = process(scale=Analytic()).noise_scale.with_derivative(x, t)
    torch.testing.assert_close(dr, x)


def test_neural_scale_is_its_formula():
    scale = transforms.NeuralScale(lambda x, t: torch.sin(x) * (1.0 + t**2)[:, None])
    x, t = torch.randn(3, 2, dtype=torch.float64), time([0.0, 0.4, 1.0])
    r, dr = scale.with_derivative(x, t)
    bump, rate, net = t * (1 - t), 1 - 2 * t, 1 + t**2
    torch.testing.assert_close(r, bump[:, None] * net[:, None] * torch.sin(x))
    torch.testing.assert_close(dr, (rate * net + bump * 2 * t)[:, None] * torch.sin(x))
    torch.testing.assert_close(scale(x, t), r)


# --- the exact model ------------------------------------------------------------------------------------------------


def test_exact_case_in_numbers():
    model, z, t = EXACT.model(), time([[-0.4]]), time([0.3])
    F, dF = model.moments(z, t)
    drift = model.reverse_sde(torch.float64).drift(t, z)
    found = torch.stack([F, dF, model.velocity(z, 0.3), model.score(z, 0.3), drift]).flatten()
    expected = time([-0.752351441, -0.236993566, 1.714656011, -5.212954224, 3.249352026])
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-8)


def derivatives(t, z):
    """p, its time derivative, and its first and second derivatives in z, ``(B,)`` each."""

    def density(t, z):
        return EXACT.log_prob(z[:, None], t).exp()

    def slope(z):
        return torch.func.jvp(lambda z: density(t, z), (z,), (torch.ones_like(z),))[1]

    rate = torch.func.jvp(lambda t: density(t, z), (t,), (torch.ones_like(t),))[1]
    first, second = torch.func.jvp(slope, (z,), (torch.ones_like(z),))
    return density(t, z), rate, first, second


@pytest.mark.parametrize("kind", ["flow", "sde"])
def test_marginals_solve_the_fokker_planck_equation(kind):
    r"""dp/dt = -(f p)' for the flow, and -(f p)' - g^2/2 p'' for the reverse SDE, which runs against time."""
    z = torch.linspace(-3.0, 3.0, 61, dtype=torch.float64)
    model = EXACT.model()
    for at in (0.15, 0.5, 0.85):
        t = torch.full_like(z, at)
        p, rate, first, second = derivatives(t, z)
        flow, sde = model.flow(torch.float64), model.reverse_sde(torch.float64)

        def field(z, at=at, t=t, flow=flow, sde=sde):
            return (flow(time(at), z[:, None]) if kind == "flow" else sde.drift(t, z[:, None]))[:, 0]

        f, df = torch.func.jvp(field, (z,), (torch.ones_like(z),))
        diffusion = 0.0 if kind == "flow" else 0.5 * model.process.diffusion(t) ** 2 * second
        assert (rate + df * p + f * first + diffusion).abs().max() < 1e-9 * rate.abs().max()


def test_likelihood_is_that_of_the_mixture():
    model, x = EXACT.model(checks=False), time([[-1.3], [0.2]])
    found = ndm_ct.loglik(model, x, rtol=1e-7, atol=1e-7)
    assert (found - EXACT.log_prob(x, 0.0)).abs().max() < 1e-6


def predicted(z, t):
    return 0.9 * torch.tanh(1.5 * z)


HERMITE = tuple(torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(96))


def averaged(term, times):
    """The mean over data and noise of ``term(x, t, eps)`` at every time."""
    nodes, weights = HERMITE
    t, eps = times.repeat_interleave(len(nodes)), nodes.repeat(len(times))[:, None]
    total = torch.zeros_like(times)
    for x, share in zip(EXACT.points, EXACT.weights, strict=True):
        values = term(x.expand(len(t), 1), t, eps).reshape(len(times), -1)
        total = total + share * (values @ weights) / weights.sum()
    return total


def guess(**options):
    return NDM(
        predicted, (1,), transform=Wiggle(), schedule=SCHEDULE, volatility=rising, noise_scale=Breathe(), **options
    )


def test_discrete_bound_tends_to_the_integral_at_first_order():
    model = guess()
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(64))
    times = 0.5 * (nodes + 1.0)
    integral = averaged(lambda x, t, e: objectives.diffusion_integrand(model, x, t, e), times) @ weights / 2.0
    assert float(integral) == pytest.approx(16.31435, abs=2e-5)
    gaps = []
    for steps in (40, 80, 160):
        grid = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)
        found = averaged(lambda x, t, e, n=steps: objectives.transition_kl(model, x, t - 1.0 / n, t, e), grid[1:]).sum()
        gaps.append(float(found - integral))
    assert min(gaps) > 0.0
    assert order(gaps, (40, 80, 160)) == pytest.approx(1.0, abs=0.1)


def test_a_capped_posterior_has_its_own_variance():
    """Where the noise of z_s is smaller than that of the step, the divergence is that of two unequal variances."""
    x, eps = torch.randn(2, 5, 1, dtype=torch.float64)
    s, t = time([0.2] * 5), time([0.8] * 5)
    model = NDM(predicted, (1,), schedule=SCHEDULE, noise_scale=lambda x, t: torch.full_like(x, -1.5))
    path, std = model.process.along(x), model.process.transition(s, t)[1][:, None]
    z, sigma = path.sample(t, eps), SCHEDULE(s).sigma[:, None] * math.exp(-1.5)
    assert bool((sigma < std).all())
    F_t, F_s = model.frozen(z, t, s, model.process.transition(s, t)[1])
    mean, _ = model.process.posterior(z, F_s, F_t, s, t)
    own, _ = path.posterior(x, eps, s, t)
    torch.testing.assert_close(own, SCHEDULE(s).alpha[:, None] * x, rtol=0.0, atol=1e-3)
    excess = objectives.transition_kl(model, x, s, t, eps) - 0.5 * (((own - mean) / std) ** 2)[:, 0]
    expected = 0.5 * ((sigma / std) ** 2 - 1.0 - 2.0 * (sigma / std).log())[:, 0]
    torch.testing.assert_close(excess, expected, rtol=1e-4, atol=1e-5)


def test_bound_integrand_is_the_distance_of_two_drifts():
    r"""|f(x) - f(x_hat)|^2 / (2 g^2), with the drifts of the process itself."""
    model = guess()
    x, eps = torch.randn(2, 8, 1, dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, 8, dtype=torch.float64)
    z = model.process.sample(x, t, eps=eps)
    difference = model.process.reverse_drift(z, x, t) - model.process.reverse_drift(z, predicted(z, t), t)
    expected = (difference[:, 0] / model.process.diffusion(t)) ** 2 / 2.0
    torch.testing.assert_close(objectives.diffusion_integrand(model, x, t, eps), expected, rtol=1e-10, atol=0.0)


def test_ends_of_the_bound_see_the_scale():
    """A scale that is not one at the ends enters the prior's divergence and the variance that is decoded."""
    r = -0.4
    model = NDM(predicted, (1,), schedule=SCHEDULE, noise_scale=lambda x, t: torch.full_like(x, r))
    x = torch.randn(5, 1, dtype=torch.float64)
    start, end = SCHEDULE(time(0.0)), SCHEDULE(time(1.0))
    variance = end.sigma**2 * math.exp(2 * r)
    divergence = 0.5 * ((end.alpha * x[:, 0]) ** 2 + variance - variance.log() - 1.0)
    torch.testing.assert_close(objectives.prior_term(model, x), divergence)
    decoded = 0.5 * (math.exp(2 * r) + math.log(2 * math.pi) + start.gamma).expand(5)
    torch.testing.assert_close(objectives.reconstruction_term(model, x), decoded)


# --- S = 1 ----------------------------------------------------------------------------------------------------------


def test_a_scale_of_one_changes_nothing():
    x = torch.randn(6, 1, dtype=torch.float64)
    options = {"transform": Wiggle(), "schedule": SCHEDULE, "volatility": rising}
    plain, one = (NDM(predicted, (1,), noise_scale=r, **options) for r in (None, lambda x, t: torch.zeros_like(x)))
    for function in (ndm_ct.elbo, ndm_ct.loss):
        torch.testing.assert_close(function(one, x, generator=1), function(plain, x, generator=1))
    torch.testing.assert_close(ndm_ct.loglik(one, x), ndm_ct.loglik(plain, x))
    torch.testing.assert_close(one.velocity(x, 0.4), plain.velocity(x, 0.4))
    bounds = [discrete.elbo_discrete(each, x, steps=7, generator=1) for each in (one, plain)]
    assert bool((bounds[0] - bounds[1]).isfinite().all())


def test_without_a_scale_the_pair_is_f_bit_for_bit():
    own, x = ForwardProcess(transforms.TimeScaling(k), SCHEDULE, 1.0), torch.randn(6, 1)
    t, eps = torch.rand(6, dtype=torch.float64), torch.randn(6, 1)
    here = own.along(x).at(t)
    F, dF = own.transform.with_derivative(x, t)
    c = own.schedule(t)
    z = c.alpha.float()[:, None] * F + c.sigma.float()[:, None] * eps
    assert torch.equal(here.state(eps), z)
    assert torch.equal(own.sample(x, t, eps=eps), z)
    assert here.pair_at(z) == (here.F, here.dF)
    assert torch.equal(here.F, F)
    assert torch.equal(here.dF, dF)
    assert torch.equal(own.score(z, x, t), (c.alpha.float()[:, None] * F - z) / (c.sigma**2).float()[:, None])


# --- training, files, conditioning ----------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, out=1, first=2):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(first, 8), nn.Tanh(), nn.Linear(8, out)).double()
        self.out = out

    def forward(self, x, t):
        return self.layers(torch.cat([x, t[:, None]], 1))


class Moments(Net):
    def __init__(self):
        super().__init__(out=2)

    def forward(self, z, t):
        return super().forward(z, t).split(1, 1)


def learned(prediction="x"):
    torch.manual_seed(3)
    predictor = Net() if prediction == "x" else Moments()
    return NDM(
        predictor, (1,), transform=transforms.Neural(Net()), schedule=SCHEDULE, prediction=prediction,
        noise_scale=transforms.NeuralScale(Net()), volatility=0.8,
    )  # fmt: skip


@pytest.mark.parametrize("prediction", ["x", "moments"])
def test_gradients_of_the_loss_are_those_of_finite_differences(prediction):
    """Through the state, F, S, and for moments past the targets that are held fixed."""
    model, x = learned(prediction), torch.randn(16, 1, dtype=torch.float64)

    def total():
        weights = (0.0, 0.0)
        return objectives.loss(model, x, regressions=weights, generator=5).sum()

    total().backward()
    for part in (model.transform.net, model.noise_scale.net, model.predictor):
        weight = part.layers[0].weight
        direction, step = torch.randn_like(weight), 1e-6
        with torch.no_grad():
            weight += step * direction
            up = total().detach()
            weight -= 2 * step * direction
            down = total().detach()
            weight += step * direction
        assert float((weight.grad * direction).sum()) == pytest.approx(float((up - down) / (2 * step)), rel=1e-4)


def test_regressions_hold_the_scale_fixed():
    model, x = learned("moments"), torch.randn(16, 1, dtype=torch.float64)
    gradients = []
    for weights in ((0.0, 0.0), (0.7, 0.3)):
        model.zero_grad()
        objectives.loss(model, x, regressions=weights, generator=5).sum().backward()
        gradients.append([p.grad.clone() for part in (model.transform, model.noise_scale) for p in part.parameters()])
    for without, given in zip(*gradients, strict=True):
        torch.testing.assert_close(given, without)


def test_training_moves_the_scale_and_lowers_the_bound():
    model, x = learned(), torch.randn(256, 1, dtype=torch.float64)
    before, first = copy.deepcopy(model.noise_scale.state_dict()), objectives.loss(model, x, generator=1).mean()
    ndm_ct.fit(model, x, steps=40, lr=3e-3, batch_size=64, seed=0, progress=False)
    assert objectives.loss(model, x, generator=1).mean() < first
    assert any(not torch.equal(before[name], value) for name, value in model.noise_scale.state_dict().items())


def test_files_keep_the_scale(tmp_path):
    predictor = ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2))
    model = NDM(predictor, (2,), noise_scale=transforms.NeuralScale(ndm_ct.nn.MLP(2)))
    ndm_ct.save(model, tmp_path / "model.safetensors")
    again = ndm_ct.load(tmp_path / "model.safetensors")
    z = torch.randn(4, 2)
    assert torch.equal(again.velocity(z, 0.3), model.eval().velocity(z, 0.3))


def test_files_of_a_users_scale_want_it_again(tmp_path):
    model = NDM(ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(1)).double(), (1,), noise_scale=Net())
    path = tmp_path / "model.safetensors"
    ndm_ct.save(model, path)
    with pytest.raises(ValueError, match=r"pass load\(path, noise_scale=\.\.\.\)"):
        ndm_ct.load(path)
    again = ndm_ct.load(path, noise_scale=Net())
    z = torch.randn(4, 1, dtype=torch.float64)
    assert torch.equal(again.velocity(z, 0.3), model.eval().velocity(z, 0.3))


def test_a_compiled_scale_runs_compiled():
    net, x, t = Net(), torch.randn(4, 1, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    compiled = transforms.NeuralScale(torch.compile(net, backend="eager"))
    torch.testing.assert_close(compiled(x, t), transforms.NeuralScale(net)(x, t))
    assert set(compiled.state_dict()) == set(transforms.NeuralScale(net).state_dict())


def test_conditioning_reaches_the_scale():
    model = NDM(predicted, (1,), schedule=SCHEDULE, noise_scale=lambda x, t, width: width[:, None] * t[:, None] * x)
    z = torch.randn(4, 1, dtype=torch.float64)
    none, some = (model.velocity(z, 0.5, width=torch.full((4,), w, dtype=torch.float64)) for w in (0.0, 0.5))
    torch.testing.assert_close(none, NDM(predicted, (1,), schedule=SCHEDULE).velocity(z, 0.5))
    assert not torch.allclose(none, some)
    with pytest.raises(TypeError, match="got the keyword 'breadth'"):
        model.velocity(z, 0.5, breadth=torch.zeros(4))


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_frozen_steps_are_those_of_the_posterior(method):
    """With the data as the prediction, one long step ends at the marginal of the earlier time."""
    x, noise = time([[0.3]]), torch.randn(4000, 1, dtype=torch.float64)
    model = NDM(lambda z, t: x.expand_as(z), (1,), transform=Wiggle(), schedule=SCHEDULE, noise_scale=Breathe())
    path = model.process.along(x)
    z, end = path.sample(time(0.8), noise), path.sample(time(0.3), noise)
    found = ndm_ct.samplers.NAMES[method](model).step(z, 0.8, 0.3, generator=1)
    if method == "ddim":
        torch.testing.assert_close(found, end)
    else:
        assert float(found.mean()) == pytest.approx(float(end.mean()), abs=4 * float(end.std()) / math.sqrt(4000))
        assert float(found.std()) == pytest.approx(float(end.std()), rel=0.05)


def test_a_volatility_in_another_basis_than_the_scale_is_stepped_right():
    """Where S = 1 the steps tend to those of the model without a scale."""
    scaling = transforms.LearnedScaling((3,), 2, transforms.DCT((3,)))
    with torch.no_grad():
        scaling.coefficients.add_(0.4 * torch.randn(3, 2))
    options = {"transform": scaling, "schedule": SCHEDULE, "volatility": schedules.Matched(), "checks": False}
    plain, one = (NDM(torch_tanh, (3,), noise_scale=r, **options) for r in (None, lambda x, t: torch.zeros_like(x)))
    gaps = []
    for steps in (40, 80):
        drawn = [ndm_ct.sample(model, 50, method="ddpm", steps=steps, generator=1) for model in (plain, one)]
        gaps.append(float((drawn[0] - drawn[1]).abs().mean()))
    assert gaps[1] < 0.7 * gaps[0]


def torch_tanh(z, t):
    return torch.tanh(z)


@pytest.mark.parametrize("method", ["ode", "sde", "ddim", "ddpm", "dpmpp_2m", "heun"])
def test_samples_have_the_law_of_the_data(method):
    """Mean and variance of the exact model's samples."""
    model = EXACT.model()
    options = {} if method in ("ode", "sde") else {"steps": 40}
    drawn = ndm_ct.sample(model, 400, method=method, generator=2, dtype=torch.float64, **options)
    mean = (EXACT.weights * EXACT.points).sum()
    std = (EXACT.weights * (EXACT.points - mean) ** 2).sum().sqrt()
    assert float(drawn.mean()) == pytest.approx(float(mean), abs=float(5 * std / 20))
    assert float(drawn.std()) == pytest.approx(float(std), abs=0.12)


def test_guidance_keeps_the_scale():
    class Labelled(nn.Module):
        null = {"label": -1}  # noqa: RUF012

        def forward(self, z, t, label):
            return z * label.to(z)[:, None] * 0.1

    model = NDM(Labelled(), (1,), schedule=SCHEDULE, noise_scale=Breathe())
    assert ndm_ct.guided(model, 2.0).noise_scale is model.noise_scale


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["eps", "v", "velocity"])
def test_predictions_that_need_noise_of_one_size_are_refused(prediction):
    with pytest.raises(ValueError, match="recovers x only where the noise has one size"):
        NDM(predicted, (1,), schedule=SCHEDULE, noise_scale=Breathe(), prediction=prediction)


REFUSED = {
    "alpha = 0": (lambda: NDM(predicted, (1,), schedule=schedules.Rectified(), noise_scale=Breathe()), "alpha"),
    "no function": (lambda: NDM(predicted, (1,), noise_scale=0.3), "must be callable"),
    "hidden module": (lambda: NDM(predicted, (1,), noise_scale=Net().forward), "hides an nn.Module"),
    "churn": (lambda: ndm_ct.sample(guess(), 2, method="edm_churn", steps=4), "S do not move"),
    "langevin": (lambda: ndm_ct.sample(guess(), 2, method="langevin", steps=4), "a noise_scale"),
    "residuals": (lambda: discrete.estimate_residuals(guess(), torch.zeros(2, 1).double()), "noise_scale"),
    "batch": (lambda: objectives.curvature(guess(), torch.zeros(2, 1).double(), flow="batch"), 'flow="model"'),
    "regression": (lambda: objectives.Regression("F")(learned(), torch.zeros(2, 1).double()), "parameters to train"),
}


@pytest.mark.parametrize(("action", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_scale_cannot_do_is_refused_by_name(action, message):
    with pytest.raises((ValueError, TypeError), match=message):
        action()


def test_a_discrete_bound_with_a_volatility_for_every_coordinate_is_refused():
    scaling = transforms.LearnedScaling((2,))
    model = NDM(
        lambda z, t: z, (2,), transform=scaling, volatility=schedules.Matched(), noise_scale=coupled_scale,
        schedule=SCHEDULE,
    )  # fmt: skip
    with pytest.raises(ValueError, match="one volatility for all coordinates"):
        discrete.elbo_discrete(model, torch.randn(2, 2), steps=4)


def test_a_scale_of_another_shape_is_refused():
    model = NDM(predicted, (1,), schedule=SCHEDULE, noise_scale=lambda x, t: t * x, checks=False)
    with pytest.raises(ndm_ct.PredictorError, match=r"reshape it before it meets x"):
        ndm_ct.loss(model, torch.randn(3, 1, dtype=torch.float64))


def test_a_wrong_derivative_of_the_scale_is_found():
    class Wrong(Breathe):
        def with_derivative(self, x, t, **cond):
            return self(x, t), torch.ones_like(x)

    model = NDM(predicted, (1,), schedule=SCHEDULE, noise_scale=Wrong())
    with pytest.raises(ValueError, match="another time derivative of log S"):
        ndm_ct.loglik(model, torch.randn(3, 1, dtype=torch.float64))
    ndm_ct.loglik(NDM(predicted, (1,), schedule=SCHEDULE, noise_scale=Breathe()), torch.randn(3, 1).double())
