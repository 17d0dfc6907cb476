"""torchdiffeq and torchsde as back-ends: lazy imports, fields that go straight into them, samples, gradients."""

import math
import subprocess
import sys

import pytest
import torch
import torchdiffeq
from oracles import SCHEDULES, blurred, gaussian, mixture
from torch import nn

import ndm_ct
from ndm_ct import NDM, SolverError, schedules, solvers

SMOOTH = schedules.LinearLogSNR(-5.0, 4.0)
NAMES = [f"torchsde:{name}" for name in solvers.SDE_METHODS]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def torchsde():
    import torchsde

    return torchsde


def test_back_ends_are_imported_at_first_use():
    code = (
        "import sys, torch, ndm_ct\n"
        "heavy = {'torchdiffeq', 'torchsde', 'scipy'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
        "model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))\n"
        "ndm_ct.sample(model, 2, method='unipc', steps=3)\n"
        "ndm_ct.loglik(model, torch.zeros(1, 2))\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
        "ndm_ct.loglik(model, torch.zeros(1, 2), method='dopri5')\n"
        "assert 'torchdiffeq' in sys.modules and 'torchsde' not in sys.modules\n"
        "ndm_ct.sample(model, 2, method='torchsde:heun', steps=3)\n"
        "assert 'torchsde' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- fields that go straight into the packages -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LinearLogSNR", "Rectified"])
def test_the_flow_goes_straight_into_torchdiffeq(name):
    model = mixture(SCHEDULES[name](), d=3)
    z = torch.randn(4, 3, dtype=torch.float64, generator=seeded())
    for dtype in (torch.float32, torch.float64):  # of torchdiffeq's times
        times = torch.tensor([1.0, model.t_min], dtype=dtype)
        x = torchdiffeq.odeint(model.flow(), z, times, rtol=1e-8, atol=1e-8)[-1]
        exact = ndm_ct.decode(model, z, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(x, exact, rtol=0.0, atol=1e-5 if dtype == torch.float64 else 1e-3)


def test_times_outside_the_interval_are_moved_to_its_ends():
    model = NDM(lambda z, t: z * t[:, None], (2,), schedule=schedules.Rectified())
    flow, z = model.flow(), torch.ones(1, 2)
    assert torch.equal(flow(torch.tensor(-0.5), z), flow(torch.tensor(model.t_min, dtype=torch.float64), z))
    assert torch.equal(flow(torch.tensor(1.5), z), flow(torch.tensor(1.0), z))
    sde, y = model.reverse_sde(), torch.ones(1, 2)
    end = torch.tensor(1.0 - model.t_min, dtype=torch.float64)
    assert torch.equal(sde.f(torch.tensor(1.5), y), sde.f(end, y))


def test_networks_are_evaluated_in_their_own_precision():
    seen = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, z, t):
            seen.append(z.dtype)
            return self.scale * z

    model, z = NDM(Net(), (2,), schedule=SMOOTH), torch.ones(1, 2, dtype=torch.float64)
    assert model.flow()(torch.tensor(0.5), z).dtype == torch.float64
    assert model.reverse_sde().f(torch.tensor(0.5), z).dtype == torch.float64
    assert seen == [torch.float32, torch.float32]


@pytest.mark.parametrize("method", ["euler", "heun", "midpoint"])
@pytest.mark.parametrize("make", [lambda: (gaussian(SMOOTH, d=4, volatility=0.7), 4), lambda: (blurred()[0], None)])
def test_the_reverse_sde_goes_straight_into_torchsde(method, make, torchsde):
    """On one Brownian path, and flat: the steps of this library's sampler on torchsde."""
    model = make()[0]
    d = torch.Size(model.event_shape).numel()
    n, steps, length = 3, 16, 1.0 - model.t_min
    sde = model.reverse_sde()
    sde.sde_type = "ito" if method == "euler" else "stratonovich"
    bm = torchsde.BrownianInterval(t0=0.0, t1=1.0, size=(n, d), dtype=torch.float64, entropy=3)
    y = torch.randn(n, d, dtype=torch.float64, generator=seeded())
    times = torch.linspace(0.0, length, steps + 1, dtype=torch.float64)
    theirs = torchsde.sdeint(sde, y, times, bm=bm, method=method, dt=length / steps)[-1]

    class Shifted:  # the path in the time -t of solvers.sdeint
        levy_area_approximation = "none"

        def __call__(self, ta, tb, return_U=False, return_A=False):
            return bm((ta + 1.0).clamp(0.0, 1.0), (tb + 1.0).clamp(0.0, 1.0))

    grid, start = 1.0 - times, y.reshape(n, *model.event_shape)
    ours = solvers.sdeint(sde.drift, sde.diffusion, start, grid, method=method, noise=Shifted())
    torch.testing.assert_close(ours.state[0].flatten(1), theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_states_of_torchsde_are_flat(shape, torchsde):
    model = NDM(lambda z, t: 0.5 * z, shape, schedule=SMOOTH)
    y = torch.randn(5, math.prod(shape), dtype=torch.float64)
    out = torchsde.sdeint(model.reverse_sde(), y, [0.0, 0.5, 1.0], method="srk", dt=0.1)
    assert out.shape == (3, *y.shape)
    assert bool(out.isfinite().all())


# --- samples by torchsde ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LinearLogSNR", "Rectified"])
@pytest.mark.parametrize("options", [{"steps": 60}, {"rtol": 0.02, "atol": 0.02}], ids=["grid", "adaptive"])
@pytest.mark.parametrize("method", NAMES)
def test_samples_have_the_moments_of_the_data(method, options, name):
    schedule = SMOOTH if name == "LinearLogSNR" else SCHEDULES[name]()
    model, n = gaussian(schedule, d=2, volatility=1.3), 2000
    if name == "Rectified" and "steps" in options:
        options = options | {"grid": "logsnr"}
    x = ndm_ct.sample(model, n, method=method, generator=seeded(), dtype=torch.float64, **options)
    mean, factor, _ = model.marginals.components(torch.tensor([model.t_min], dtype=torch.float64))
    cov = factor[0, 0] @ factor[0, 0].mT
    bias = 0.06 if method == "torchsde:euler" else 0.02
    assert bool(((x.mean(0) - mean[0, 0]).abs() < 4.0 * (cov.diagonal() / n).sqrt() + bias).all())
    white = torch.linalg.solve_triangular(factor[0, 0], (x - mean[0, 0]).mT, upper=False)
    assert float((white @ white.mT / n - torch.eye(2)).abs().max()) < 4.0 * math.sqrt(2.0 / n) + bias


class Counting:
    def __init__(self, predictor):
        self.predictor, self.calls = predictor, 0

    def __call__(self, z, t):
        self.calls += 1
        return self.predictor(z, t)


@pytest.mark.parametrize("name", ["LinearLogSNR", "Rectified"])
@pytest.mark.parametrize("method", NAMES)
def test_evaluations_are_counted(method, name):
    model = mixture(SCHEDULES[name](), d=3)
    model.checks = False
    model.predictor = counting = Counting(model.predictor)
    for options in ({"steps": 5}, {"nfe": 11}, {"rtol": 0.1, "atol": 0.1}):
        counting.calls = 0
        _, info = ndm_ct.sample(model, 4, method=method, generator=seeded(), return_info=True, **options)
        assert info.nfe == counting.calls
        if "steps" in options:
            assert (info.accepted, info.rejected) == (5, 0)
            stages = solvers.SDE_METHODS[method.removeprefix("torchsde:")][1]
            assert info.nfe == (stages * 5 if name == "LinearLogSNR" else 1 + stages * 4)
        elif "nfe" in options:
            assert info.nfe in (10, 11)
        else:
            assert info.accepted > 3
            assert info.rejected >= 0


def test_a_tighter_tolerance_takes_more_steps_and_rejects_some():
    model = mixture(SMOOTH, d=3)
    costs = []
    for tolerance in (0.1, 0.01):
        options = {"rtol": tolerance, "atol": tolerance, "return_info": True}
        _, info = ndm_ct.sample(model, 4, method="torchsde:heun", generator=seeded(), **options)
        costs.append((info.nfe, info.accepted, info.rejected))
    assert costs[1][0] > 2 * costs[0][0]
    assert costs[1][1] > costs[0][1]
    assert costs[1][2] > 0


@pytest.mark.parametrize("options", [{"steps": 6}, {"rtol": 0.1, "atol": 0.1}])
def test_noise_is_the_generators(options):
    model = mixture(SMOOTH, d=2)

    def run(generator):
        return ndm_ct.sample(model, 2, method="torchsde:srk", generator=generator, dtype=torch.float64, **options)

    state = torch.get_rng_state()
    first = run(seeded(1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, run(seeded(1)))
    assert not torch.equal(first, run(seeded(2)))
    one, other = run([seeded(1), seeded(2)]), run([seeded(1), seeded(3)])
    if "steps" in options:  # adaptive steps are those of the batch
        assert torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])


def test_events_of_any_shape_and_no_rows():
    for shape in ((), (2, 1, 2)):
        model = NDM(lambda z, t: 0.5 * z, shape, schedule=SMOOTH)
        for n in (0, 3):
            for options in ({"steps": 3}, {"rtol": 0.1, "atol": 0.1}):
                assert ndm_ct.sample(model, n, method="torchsde:heun", **options).shape == (n, *shape)


def test_a_vanishing_step_is_an_error():
    model = NDM(lambda z, t: torch.where(z.sin() > 0.0, 1e7, -1e7).to(z.dtype), (2,), schedule=SMOOTH)
    with pytest.raises(SolverError, match=r"the step size vanished|evaluations were not enough"):
        ndm_ct.sample(model, 2, method="torchsde:heun", rtol=1e-5, atol=1e-9, dtype=torch.float64)


@pytest.mark.parametrize("method", ["ode", "sde"])
def test_own_solvers_take_fixed_steps_if_told_how_many(method):
    """Heun's method on a grid, with the noise of the SDE or without."""
    model = gaussian(SMOOTH, d=2)
    x, info = ndm_ct.sample(model, 3, method=method, steps=7, generator=seeded(), return_info=True)
    name = {"ode": "heun", "sde": ndm_ct.samplers.SDE}[method]
    assert torch.equal(x, ndm_ct.sample(model, 3, method=name, steps=7, generator=seeded()))
    assert (info.nfe, info.accepted, len(info.times)) == (14, 7, 8)
    _, info = ndm_ct.sample(model, 3, method=method, generator=seeded(), return_info=True)
    assert info.times is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "torchsde:rsk"}, "did you mean 'torchsde:srk'"),
        ({"method": "torchsde:heun", "steps": 3, "rtol": 0.1}, "rtol has no effect with method='torchsde:heun'"),
        ({"method": "torchsde:heun", "callback": print}, "callback has no effect with method='torchsde:heun'"),
        ({"method": "torchsde:heun", "trace": "exact"}, "trace has no effect"),
        ({"method": "dopri5", "steps": 3}, "steps has no effect with method='dopri5'"),
        ({"method": "ode", "steps": 3, "rtol": 0.1}, "rtol has no effect with method='ode', which takes fixed steps"),
        ({"method": "unipc", "steps": 3, "differentiable": True}, "differentiable=True has no effect with method='uni"),
        ({"method": "sde", "differentiable": True}, "differentiable=True has no effect with method='sde'"),
        ({"method": "ode", "steps": 3, "differentiable": True}, "differentiable=True has no effect with method='ode'"),
        ({"method": "ode", "differentiable": "adjoint"}, "needs a torchdiffeq method"),
        ({"method": "torchsde:srk", "differentiable": "adjiont"}, "did you mean 'adjoint'"),
    ],
)
def test_options_without_effect_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ndm_ct.sample(mixture(SMOOTH, d=2), 2, **options)


# --- gradients of samples --------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(2, 2, dtype=torch.float64, generator=seeded(5)))

    def forward(self, z, t, shift):
        return torch.tanh(z @ self.weight + shift) * (1.0 + t[:, None])


def learned():
    """A model in which everything is learned: predictor, transform, schedule, volatility."""
    model = NDM(
        Small(), (2,), schedule=schedules.LearnedLogSNR(-3.0, 3.0).double(),
        volatility=schedules.LearnedVolatility(3).double(),
        transform=ndm_ct.transforms.LearnedScaling((2,)).double(),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, dtype=parameter.dtype, generator=seeded(6))
    return model


SLOW = [("torchsde:srk", "adjoint"), ("torchsde:midpoint", "adjoint"), ("torchsde:midpoint", True)]
"""Of each calculus another method is tried at once."""
METHODS = {
    "ode": ({}, [True]), "dopri5": ({}, [True, "adjoint"]),
    **{name: ({"steps": 20}, [True, "adjoint"]) for name in NAMES},
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "differentiable"),
    [
        pytest.param(name, how, marks=[pytest.mark.slow] * ((name, how) in SLOW))
        for name, (_, hows) in METHODS.items() for how in hows
    ],
)  # fmt: skip
def test_gradients_are_finite_differences(method, differentiable):
    """With respect to every parameter and condition, along one Brownian path."""
    options, model = METHODS[method][0], learned()
    if differentiable == "adjoint" and options:
        options = {"steps": 100}  # its error is that of discretising the equation backwards, and falls with the steps
    shift = torch.tensor([[0.2, -0.1], [0.5, 0.3], [-0.4, 0.1]], dtype=torch.float64, requires_grad=True)
    tensors = {"shift": shift} | dict(model.named_parameters())

    def value():
        x = ndm_ct.sample(
            model, 3, method=method, differentiable=differentiable, generator=seeded(),
            shift=1.0 * shift, dtype=torch.float64, **options,
        )  # fmt: skip
        return (x * torch.tensor([1.0, -0.5], dtype=torch.float64)).sum()

    value().backward()
    # The graph's gradient is exact, but for step sizes, which it takes as fixed. The adjoint equation is discretised on
    # its own: by midpoints, or, for torchsde's Ito methods, by Euler steps, whose error at 100 of them is up to 0.05.
    tolerance = 1e-4 if differentiable is True else 0.06 if method in ("torchsde:euler", "torchsde:srk") else 0.03
    for name, tensor in tensors.items():
        if name == "process.volatility.coefficients" and "torchsde" not in method:  # which the flow does not have
            assert tensor.grad is None
            continue
        assert tensor.grad is not None, name
        direction = torch.randn(tensor.shape, dtype=tensor.dtype, generator=seeded(7))
        with torch.no_grad():
            values = []
            for step in (1e-4, -1e-4):
                tensor += step * direction
                values.append(float(value()))
                tensor -= step * direction
        expected, found = (values[0] - values[1]) / 2e-4, float((tensor.grad * direction).sum())
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance), name


def test_samples_have_no_graph_unless_asked():
    model, shift = learned(), torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    for options in ({"steps": 3}, {"rtol": 0.1, "atol": 0.1}):
        assert not ndm_ct.sample(model, 2, method="torchsde:heun", shift=shift, **options).requires_grad
        x = ndm_ct.sample(model, 2, method="torchsde:heun", shift=shift, differentiable="adjoint", **options)
        assert x.requires_grad
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch.inference_mode\(\) forbids"):
        ndm_ct.sample(model, 2, method="torchsde:heun", steps=3, differentiable=True, shift=shift.detach())


# --- adaptive SDE steps without a model ------------------------------------------------------------------------------


@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("solve", ["rows", "torchsde"])
def test_moments_of_an_ornstein_uhlenbeck_process(solve, t0, t1):
    """dy = -y dt + dw from 2; backwards in time dy = +y dt + dw."""
    n, sign = 5000, 1.0 if t1 > t0 else -1.0
    y0 = torch.full((n, 1), 2.0, dtype=torch.float64)
    options = {"rtol": 0.02, "atol": 0.02, "first_step": 0.1, "generator": seeded()}
    if solve == "rows":
        solution = solvers.sdeint_rows(
            lambda t, y, rows: -sign * y, lambda t, y, rows: torch.ones_like(y), y0, t0, t1, **options
        )
        assert torch.equal(solution.nfe, 2 * solution.accepted + solution.rejected)
    else:
        solution = solvers.sdeint_adaptive(
            lambda t, y: -sign * y, lambda t, y: torch.ones_like(y), y0, t0, t1, **options
        )
    variance = 0.5 * (1.0 - math.exp(-2.0))
    y = solution.state[0]
    assert abs(float(y.mean()) - 2.0 * math.exp(-1.0)) < 4.0 * math.sqrt(variance / n) + 0.01
    assert abs(float(y.var()) / variance - 1.0) < 4.0 * math.sqrt(2.0 / n) + 0.02
