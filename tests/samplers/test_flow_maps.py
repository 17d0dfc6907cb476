"""Flow maps: the map of a Gaussian's flow is known, and every loss is zero or stationary there."""

import math
from functools import partial

import pytest
import torch
from oracles import k
from torch import nn

import ndm_ct
from ndm_ct import NDM, presets, schedules, transforms
from ndm_ct._core.seeds import make_generator
from ndm_ct.flow_maps import carry, mean_slope, mean_velocity, mixed, slope
from ndm_ct.nn import MLP, DiT, Preconditioned, UNet
from ndm_ct.objectives import Distillation
from ndm_ct.reference import Gaussian
from ndm_ct.samplers import FixedGrid

MEAN = torch.tensor([1.0, -2.0], dtype=torch.float64)
COV = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)
SCHEDULES = [schedules.LinearLogSNR(-7.0, 5.0), schedules.Cosine(), schedules.Rectified()]


def even(c):
    return torch.ones_like(c.alpha)


class ExactMap(nn.Module):
    """D(z, t, s) of N(MEAN, COV) under F = k(t) x: the flow keeps standardised coordinates."""

    def __init__(self, teacher, shift=None):
        super().__init__()
        self.teacher, self.shift = (teacher,), shift

    def moments(self, t):
        """Mean, and square root of the covariance, of the marginal at t."""
        c, scale = self.teacher[0].schedule(t), self.teacher[0].transform(torch.ones(len(t), 1, dtype=t.dtype), t)
        alpha, sigma = c.alpha[:, None] * scale, c.sigma[:, None]
        values, basis = torch.linalg.eigh(COV)
        return alpha * MEAN, torch.sqrt(alpha**2 * values + sigma**2), basis

    def forward(self, z, t, until=None):
        s = t if until is None else until
        (mean, std, basis), (mean_s, std_s, _) = self.moments(t), self.moments(s)
        c, e = self.teacher[0].schedule(t), self.teacher[0].schedule(s)
        arrived = mean_s + ((z - mean) @ basis * std_s / std) @ basis.T
        A = (e.sigma / c.sigma)[:, None]
        B = e.alpha[:, None] - A * c.alpha[:, None]
        D = torch.where((B != 0.0), (arrived - A * z) / torch.where(B != 0.0, B, 1.0), slope(self.teacher[0], z, t))
        return D if self.shift is None else D + self.shift


def gaussian(schedule=SCHEDULES[0], transform=None):
    return Gaussian(MEAN, COV, schedule=schedule, transform=transform)


def moving():
    return transforms.TimeScaling(k)


def exact(teacher, shift=None):
    return NDM(
        ExactMap(teacher, shift), (2,), schedule=teacher.schedule, t_min=teacher.t_min, checks=False,
        prior=teacher.prior,
    )  # fmt: skip


def rows(n=64, seed=0):
    return torch.randn(n, 2, dtype=torch.float64, generator=make_generator(seed))


def times(*numbers, n=64):
    return [torch.full((n,), number, dtype=torch.float64) for number in numbers]


@pytest.mark.parametrize("transform", [None, moving()])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_step_is_the_whole_flow(schedule, transform):
    teacher = gaussian(schedule, transform)
    options = {"generator": 3, "dtype": torch.float64}
    x = ndm_ct.sample(exact(teacher), 20, method="map", steps=1, **options)
    flow = ndm_ct.sample(teacher, 20, method="ode", rtol=1e-10, atol=1e-10, **options)
    torch.testing.assert_close(x, flow, rtol=0, atol=1e-7)
    few = ndm_ct.sample(exact(teacher), 20, method="map", steps=3, **options)
    torch.testing.assert_close(x, few)


def test_its_density_is_that_of_what_it_draws():
    teacher = gaussian()
    x = teacher.sample_data(10, generator=1)
    flow = ndm_ct.loglik(teacher, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(FixedGrid(exact(teacher), "map", steps=1).loglik(x), flow, rtol=0, atol=1e-6)
    torch.testing.assert_close(ndm_ct.loglik(exact(teacher), x, rtol=1e-9, atol=1e-9), flow, rtol=0, atol=1e-6)


def test_two_steps_are_one_with_the_mean_of_their_slopes():
    model, z = exact(gaussian()), rows()
    t, u, s = times(0.8, 0.5, 0.1)
    c, b, e = (model.schedule(each) for each in (t, u, s))
    first = mean_slope(model, z, t, u)
    second = mean_slope(model, carry(z, first, c, b), u, s)
    torch.testing.assert_close(mixed(first, second, c, b, e), mean_slope(model, z, t, s))
    torch.testing.assert_close(mixed(first, second, c, e, e), first)
    torch.testing.assert_close(mixed(first, second, c, c, c), first)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_mean_velocity(schedule):
    model, z = exact(gaussian(schedule)), rows()
    t, s = times(0.7, 0.2)
    moved = z + (s - t)[:, None] * mean_velocity(model, s)(z, t)
    torch.testing.assert_close(moved, carry(z, mean_slope(model, z, t, s), schedule(t), schedule(s)))
    torch.testing.assert_close(mean_velocity(model, t)(z, t), model.flow(torch.float64)(t, z))


@pytest.mark.parametrize("transform", [None, moving()])
def test_losses_vanish_at_the_map_of_the_teacher(transform):
    teacher, x = gaussian(transform=transform), gaussian().sample_data(300, generator=0)
    model = exact(teacher)

    def loss(name, steps):
        return float(Distillation(name, teacher, steps, weight=even)(model, x, generator=1).mean())

    assert loss("mean_flow", 1) < 1e-20
    assert math.log2(loss("progressive", 64) / loss("progressive", 128)) == pytest.approx(2.0, abs=0.3)  # DDIM: order 1
    assert math.log2(loss("consistency", 32) / loss("consistency", 64)) > 3.5  # the midpoint rule: order 2
    assert loss("consistency", 64) < 1e-6 < loss("progressive", 64) < 1e-3


def test_progressive_distillation_is_the_published_loss():
    r""":math:`\max(\alpha^2/\sigma^2, 1) \|\tilde x - \hat x\|^2`, with the target of algorithm 2."""
    teacher, z = gaussian(), rows(8)
    shift = 0.3 * rows(8, seed=1)
    model = exact(teacher, shift)
    t, s = times(0.75, 0.5, n=8)
    objective = Distillation("progressive", teacher, 4)
    c, m, e = (teacher.schedule(each) for each in (t, 0.5 * (t + s), s))
    halfway = m.alpha[:, None] * (x_1 := slope(teacher, z, t)) + (m.sigma / c.sigma)[:, None] * (
        z - c.alpha[:, None] * x_1
    )
    x_2 = slope(teacher, halfway, 0.5 * (t + s))
    end = e.alpha[:, None] * x_2 + (e.sigma / m.sigma)[:, None] * (halfway - m.alpha[:, None] * x_2)
    ratio = e.sigma / c.sigma
    target = (end - ratio[:, None] * z) / (e.alpha - ratio * c.alpha)[:, None]
    ours = objective.at(model, z, z, t, s, z, model.validate(z, {}, ndm_ct.loglik))
    theirs = (c.alpha / c.sigma).square().clamp(min=1.0) * (target - mean_slope(model, z, t, s)).square().sum(1)
    torch.testing.assert_close(ours, theirs)


def test_consistency_trajectories_meet_the_teacher():
    """The distance of the two ends, over B^2: the map at once, and the teacher's flow first."""
    teacher, z = gaussian(), rows(8)
    model = exact(teacher, 0.3 * rows(8, seed=1))
    t, u, s = times(0.75, 0.5, 0.2, n=8)
    ours = Distillation("consistency", teacher, 4, weight=even).at(
        model, z, z, t, s, z, model.validate(z, {}, ndm_ct.loglik)
    )
    c, b, e = (model.schedule(each) for each in (t, u, s))
    middle = carry(z, slope(teacher, z, t), c, model.schedule(0.5 * (t + u)))
    arrived = carry(z, slope(teacher, middle, 0.5 * (t + u)), c, b)
    other = carry(arrived, mean_slope(model, arrived, u, s), b, e)
    B = e.alpha - e.sigma / c.sigma * c.alpha
    direct = carry(z, mean_slope(model, z, t, s), c, e)
    torch.testing.assert_close(ours, (direct - other).square().sum(1) / B**2)


class FromMean(nn.Module):
    """D of a mean velocity under alpha = 1 - t, sigma = t: D = z - t U."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, z, t, until=None):
        return z - t[:, None] * self.net(z, t if until is None else until, t)


def test_mean_flow_is_the_published_loss():
    """Algorithm 1 of the paper: u_tgt = v - (t - r) (v d_z u + d_t u), weight 1/(|error|^2 + c)."""
    mix = 0.3 * torch.randn(2, 2, dtype=torch.float64, generator=make_generator(5))

    def u(z, r, t):
        return torch.tanh(z @ mix + (r * t**2)[:, None])

    model = NDM(FromMean(u), (2,), schedule=schedules.Rectified(), checks=False)
    x, e = rows(8), rows(8, seed=1)
    t, r = times(0.75, 0.2, n=8)
    z, v = (1.0 - t)[:, None] * x + t[:, None] * e, e - x
    value, change = torch.func.jvp(u, (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))
    square = (value - (v - (t - r)[:, None] * change)).square().sum(1)
    ours = Distillation("mean_flow", power=1.0).at(model, x, z, t, r, e, model.validate(x, {}, ndm_ct.loglik))
    torch.testing.assert_close(ours, square / (square + 1e-3))


def test_mean_flow_without_a_teacher_is_stationary_at_the_map():
    """The gradient of the loss has mean zero in units of its standard error, whatever it is weighed by."""
    n = 4000
    teacher = gaussian(schedules.Rectified())
    shift = torch.zeros(n, 2, dtype=torch.float64, requires_grad=True)
    x, eps = teacher.sample_data(n, generator=2), rows(n, seed=3)
    t = torch.rand(n, dtype=torch.float64, generator=make_generator(4)).clamp(min=0.1)
    s = t * torch.rand(n, dtype=torch.float64, generator=make_generator(5))
    z = (1.0 - t)[:, None] * x + t[:, None] * eps
    objective = Distillation("mean_flow", weight=lambda c: c.sigma**2)

    def worst(offset):
        """The largest mean in units of its error, of gradients times functions of z."""
        model = exact(teacher, shift + offset)
        losses = objective.at(model, x, z, t, s, eps, model.validate(x, {}, ndm_ct.loglik))
        (each,) = torch.autograd.grad(losses.sum(), shift)
        means = [each * feature for feature in (1.0, z, z.flip(1), s[:, None])]
        return max(float((every.mean(0) / every.std(0) * math.sqrt(n)).abs().max()) for every in means)

    assert worst(0.0) < 3.5
    assert worst(0.3) > 10.0


@pytest.mark.parametrize(
    "net", [MLP((1, 8, 8), 8, until=True), UNet(1, 8, until=True), DiT((1, 8, 8), width=16, depth=1, until=True)]
)
def test_networks_take_both_ends(net, tmp_path):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=make_generator(0)))
    z, t, s = torch.randn(3, 1, 8, 8, generator=make_generator(1)), torch.full((3,), 0.6), torch.full((3,), 0.2)
    assert torch.equal(net(z, t), net(z, t, until=t))
    assert not torch.allclose(net(z, t), net(z, t, until=s))
    model = NDM(Preconditioned(net), (1, 8, 8))
    ndm_ct.save(model, tmp_path / "map.safetensors")
    x = [
        ndm_ct.sample(each, 2, method="map", steps=2, generator=4)
        for each in (model, ndm_ct.load(tmp_path / "map.safetensors"))
    ]
    assert torch.equal(*x)


@pytest.mark.parametrize("prediction", ["x", "eps", "v", "velocity"])
def test_a_map_starts_as_its_teacher(prediction):
    net = MLP(2, 16)
    with torch.no_grad():
        net.output.weight.normal_(generator=make_generator(0))
    teacher = NDM(Preconditioned(net) if prediction == "x" else net, (2,), prediction=prediction)
    model, objective, method = presets.consistency_trajectory(teacher)
    x = ndm_ct.sample(model, 20, method=method, steps=4, generator=1)
    torch.testing.assert_close(x, ndm_ct.sample(teacher, 20, method="ddim", steps=4, generator=1))
    again = presets.progressive_distillation(model, steps=2).model
    assert torch.equal(ndm_ct.sample(again, 20, method=method, steps=4, generator=1), x)
    objective(model, x, generator=0).mean().backward()
    assert net.output.weight.grad is None
    before = [each.clone() for each in teacher.parameters()]
    ndm_ct.fit(model, x, steps=2, objective=objective, progress=False)
    assert all(map(torch.equal, before, teacher.parameters()))


def test_a_learned_forward_process_teaches_a_map():
    teacher = NDM(
        Preconditioned(MLP(2, 8)),
        (2,),
        transform=transforms.Neural(MLP(2, 8)),
        schedule=schedules.LinearLogSNR(-7.0, 5.0),
    )
    with pytest.raises(ValueError, match="pass net="):
        presets.consistency_trajectory(teacher)
    model, objective, method = presets.consistency_trajectory(teacher, Preconditioned(MLP(2, 8, until=True)))
    ndm_ct.fit(model, rows().float(), steps=3, objective=objective, progress=False)
    assert ndm_ct.sample(model, 5, method=method, steps=2).shape == (5, 2)
    assert ndm_ct.loglik(model, rows(3).float(), rtol=1e-2).isfinite().all()


def test_a_learned_schedule_stays_as_it_is():
    teacher = NDM(Preconditioned(MLP(2, 8)), (2,), schedule=schedules.LearnedLogSNR(-7.0, 5.0))
    before = [each.clone() for each in teacher.schedule.parameters()]
    for make in (presets.consistency_trajectory, partial(presets.progressive_distillation, steps=4)):
        model, objective, _ = make(teacher)
        ndm_ct.fit(model, rows().float(), steps=3, lr=0.1, objective=objective, progress=False)
        for part in (teacher, model):
            assert all(map(torch.equal, before, part.schedule.parameters()))
    assert all(each.requires_grad for each in teacher.schedule.parameters())


def test_latents_are_kept_and_not_trained():
    teacher = NDM(Preconditioned(MLP(2, 8)), (2,), transform=transforms.Whitening.of(rows().float()))
    model, objective, method = presets.consistency_trajectory(teacher)
    ndm_ct.fit(model, rows().float(), steps=2, lr=1e-6, objective=objective, progress=False)
    assert all(map(torch.equal, teacher.transform.state_dict().values(), model.transform.state_dict().values()))
    x = ndm_ct.sample(model, 50, method=method, steps=2, generator=0)
    torch.testing.assert_close(x, ndm_ct.sample(teacher, 50, method="ddim", steps=2, generator=0), rtol=0, atol=1e-3)


def test_what_is_refused():
    plain = NDM(Preconditioned(MLP(2, 8)), (2,))
    with pytest.raises(ValueError, match=r"no flow map.*until=True"):
        ndm_ct.sample(plain, 2, method="map", steps=1)
    model = NDM(Preconditioned(MLP(2, 8, until=True)), (2,))
    for call in (ndm_ct.loglik, ndm_ct.elbo):
        with pytest.raises(TypeError, match="until"):
            call(model, torch.zeros(2, 2), until=torch.zeros(2))
    with pytest.raises(TypeError, match="until"):
        ndm_ct.sample(model, 2, method="ddim", steps=1, until=torch.zeros(2))
    with pytest.raises(TypeError, match="until=True"):
        MLP(2, 8)(torch.zeros(2, 2), torch.zeros(2), until=torch.zeros(2))
    with pytest.raises(ValueError, match="time=True"):
        MLP(2, 8, time=False, until=True)
    with pytest.raises(ValueError, match="needs a teacher"):
        Distillation("consistency")
    other = NDM(Preconditioned(MLP(2, 8)), (2,), schedule=schedules.LinearLogSNR(-9.0, 5.0))
    with pytest.raises(ValueError, match="different schedules"):
        Distillation("consistency", other)(model, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="event_shape"):
        Distillation("consistency", NDM(Preconditioned(MLP(3, 8)), (3,)))(model, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="start from the teacher"):
        presets.consistency_trajectory(NDM(lambda z, t: z, (2,)))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["progressive", "consistency", "mean_flow"])
def test_maps_of_eight_gaussians(loss):
    """Two steps of a trained map are nearer to the data than those of any sampler of the teacher."""
    special_cases = pytest.importorskip("special_cases")
    data = special_cases.mixture()
    x = data.sample_data(50_000, generator=0).float()
    fit = {"batch_size": 256, "lr": 2e-3, "progress": False}
    if loss == "mean_flow":
        model, objective, _ = presets.mean_flow(MLP(2, 64, until=True), (2,))
        ndm_ct.fit(model, x, steps=6000, objective=objective, **fit)
    else:
        teacher = NDM(Preconditioned(MLP(2, 64)), (2,), schedule=schedules.LinearLogSNR(-9.0, 5.0))
        ndm_ct.fit(teacher, x, steps=3000, **fit)
        for steps in (16, 8, 4, 2) if loss == "progressive" else (16,):
            make = presets.progressive_distillation if loss == "progressive" else presets.consistency_trajectory
            model, objective, _ = make(teacher, steps=steps)
            ndm_ct.fit(model, x, steps=1500, objective=objective, **fit)
            teacher = model if loss == "progressive" else teacher
    real = data.sample_data(4000, generator=5).float()
    drawn = ndm_ct.sample(model, 2000, method="map", steps=2, generator=6)
    two = ndm_ct.sample(model, 2000, method="unipc", steps=2, generator=6)
    assert special_cases.energy_distance(drawn, real[:2000]) < 0.3 * special_cases.energy_distance(two, real[:2000])
