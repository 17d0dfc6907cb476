"""The two back-ends on problems with known answers: values, orders, counts, guards."""

import math

import pytest
import torch
from oracles import order

from ndm_ct import SolverError, solvers
from ndm_ct.solvers import torchsde as backend


def oscillator(t, state):
    """y'' = -y cos-free rotation with a time-dependent rate: y(t) = R(t + t^2/2) y0."""
    (y,) = state
    rate = 1.0 + t
    return (rate * torch.stack([-y[:, 1], y[:, 0]], 1),)


def rotated(y0, t):
    angle = torch.as_tensor(t + 0.5 * t**2, dtype=torch.float64)
    c, s = torch.cos(angle), torch.sin(angle)
    return torch.stack([c * y0[:, 0] - s * y0[:, 1], s * y0[:, 0] + c * y0[:, 1]], 1)


def start(n=3):
    return torch.randn(n, 2, dtype=torch.float64)


@pytest.mark.parametrize("method", solvers.ADAPTIVE_METHODS)
def test_adaptive_error_is_of_the_order_of_the_tolerance(method):
    y0 = start()
    tol = 1e-4 if solvers.ADAPTIVE_METHODS[method] <= 2 else 1e-7
    solution = solvers.odeint(oscillator, (y0,), 0.0, 1.0, method=method, rtol=tol, atol=tol)
    assert float((solution.state[0] - rotated(y0, 1.0)).abs().max()) < 30 * tol
    back = solvers.odeint(oscillator, solution.state, 1.0, 0.0, method=method, rtol=tol, atol=tol)
    assert float((back.state[0] - y0).abs().max()) < 60 * tol
    assert int(solution.accepted.min()) > 0
    assert int(solution.nfe.max()) < 700


@pytest.mark.parametrize("rate", [10.0, 1e-3])  # a slow field lets the guess of the first step reach far out
@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (1.0, 0.0), (1.0, 1e-3)])
def test_no_evaluation_outside_the_interval(t0, t1, rate):
    seen = []

    def field(t, state):
        seen.append(float(t))
        return (-rate * state[0],)

    solvers.odeint(field, (torch.ones(1, 1, dtype=torch.float64),), t0, t1, rtol=1e-3, atol=1e-3)
    assert min(seen) >= min(t0, t1)
    assert max(seen) <= max(t0, t1)
    assert min(abs(t - t1) for t in seen) < 1e-12


@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (1.0, 0.0)])
def test_the_last_step_ends_at_the_end(t0, t1):
    """Every step integrates a cubic exactly, unless it goes across the end, where the field as seen has a kink."""
    y0 = torch.zeros(2, 1, dtype=torch.float64)
    solution = solvers.odeint(lambda t, state: ((t**3).expand_as(state[0]),), (y0,), t0, t1, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(solution.state[0], torch.full_like(y0, 0.25 * (t1 - t0)), rtol=1e-12, atol=0.0)
    assert solution.rejected.tolist() == [0, 0]


def test_time_is_float64_for_any_state():
    def field(t, state):
        assert t.dtype == torch.float64
        return (-state[0],)

    solution = solvers.odeint(field, (torch.ones(2, 3, 1, 2),), 0.0, 1.0, rtol=1e-4, atol=1e-4)
    assert solution.state[0].shape == (2, 3, 1, 2)
    assert solution.state[0].dtype == torch.float32
    assert float((solution.state[0] - math.exp(-1.0)).abs().max()) < 1e-3


def test_worst_row_sets_the_step_however_large_the_batch():
    """One fast row among many slow ones is solved by the steps it takes alone: an average would lengthen them."""
    rate = torch.ones(1000, 1, dtype=torch.float64)
    rate[0] = 30.0

    def solve(rate):
        y0 = torch.zeros_like(rate)
        return solvers.odeint(lambda t, state: (rate * torch.cos(rate * t),), (y0,), 0.0, 1.0, rtol=1e-6, atol=1e-6)

    together, alone = solve(rate), solve(rate[:1])
    assert abs(float(alone.state[0]) - math.sin(30.0)) < 3e-5
    assert together.accepted.unique().tolist() == alone.accepted.unique().tolist()
    torch.testing.assert_close(together.state[0][:1], alone.state[0], rtol=0.0, atol=1e-12)


def test_parts_of_the_state_have_their_own_norm():
    """A scalar part beside a wide one that is constant is solved by the steps it takes alone."""
    narrow, wide = torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, 4000, dtype=torch.float64)

    def field(t, state):
        return *(torch.zeros_like(part) for part in state[:-1]), 40.0 * torch.cos(40.0 * t).expand_as(state[-1])

    together, alone = (
        solvers.odeint(field, state, 0.0, 1.0, rtol=1e-6, atol=1e-6) for state in ((wide, narrow), (narrow,))
    )
    assert float((alone.state[0] - math.sin(40.0)).abs().max()) < 3e-5
    assert together.accepted.unique().tolist() == alone.accepted.unique().tolist()
    torch.testing.assert_close(together.state[1], alone.state[0], rtol=0.0, atol=1e-12)


def test_counts_are_those_of_the_field():
    calls = []

    def field(t, state):
        calls.append(1)
        return (-50.0 * (state[0] - (t > 0.3).double()),)

    y0 = torch.zeros(2, 1, dtype=torch.float64)
    solution = solvers.odeint(field, (y0,), 0.0, 1.0, rtol=1e-6, atol=1e-6)
    assert solution.nfe.tolist() == [len(calls)] * 2
    # dopri5: two evaluations to start, six per step.
    assert torch.equal(solution.nfe, 2 + 6 * (solution.accepted + solution.rejected))
    assert int(solution.rejected.min()) > 0
    assert not bool(solution.failed.any())


def test_failure_names_time_step_and_rows():
    def field(t, state):
        blow_up = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64)
        return (blow_up * state[0] ** 2,)

    y0 = torch.tensor([[1.0], [2.0], [1.0]], dtype=torch.float64)  # row 1 explodes at t = 1/2
    with pytest.raises(SolverError, match=r"dopri5 gave up at t=0\.5") as caught:
        solvers.odeint(field, (y0,), 0.0, 1.0, rtol=1e-6, atol=1e-6)
    assert caught.value.rows == (1,)
    assert caught.value.t == pytest.approx(0.5, abs=1e-3)
    assert caught.value.dt is not None


def test_a_step_budget_ends_a_hopeless_solve():
    def field(t, state):
        return (1e4 * torch.cos(1e4 * t).expand_as(state[0]),)

    with pytest.raises(SolverError, match="max_num_steps"):
        solvers.odeint(field, (torch.zeros(1, 1).double(),), 0.0, 1.0, rtol=1e-8, atol=1e-8, max_steps=50)


def test_nan_names_time_and_rows():
    def field(t, state):
        out = state[0].clone()
        out[[1, 3]] = math.nan if float(t) > 0.5 else 0.0
        return (out,)

    with pytest.raises(SolverError, match=r"NaN or infinite at t=.* rows \[1, 3\]") as caught:
        solvers.odeint(field, (torch.ones(4, 2, dtype=torch.float64),), 0.0, 1.0)
    assert caught.value.rows == (1, 3)
    assert caught.value.t > 0.5


def test_empty_batch_and_empty_interval_cost_nothing():
    solution = solvers.odeint(oscillator, (start(0),), 0.0, 1.0)
    assert solution.state[0].shape == (0, 2)
    assert solution.nfe.shape == (0,)
    y0 = start()
    solution = solvers.odeint(oscillator, (y0,), 0.5, 0.5)
    assert torch.equal(solution.state[0], y0)
    assert solution.nfe.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, y: solvers.odeint(f, (y,), 0.0, 1.0, method="dopry5"), "did you mean 'dopri5'"),
        (lambda f, y: solvers.odeint(f, (y,), 0.0, 1.0, rtol=0.0), "rtol must be positive"),
        (lambda f, y: solvers.sdeint(f, f, y, torch.tensor([0.0, 0.5, 0.4])), "strictly increas"),
        (lambda f, y: solvers.sdeint(f, f, y, torch.tensor([0.0])), "at least two times"),
        (lambda f, y: solvers.sdeint(f, f, y, torch.linspace(0, 1, 3), method="rsk"), "did you mean 'srk'"),
    ],
)
def test_bad_options(call, message):
    with pytest.raises(ValueError, match=message):
        call(oscillator, start())


def test_unreachable_tolerance_warns():
    with pytest.warns(UserWarning, match="rtol=1e-20 is below"):
        solvers.odeint(lambda t, s: (0.0 * s[0],), (start(),), 0.0, 1.0, rtol=1e-20, atol=1e-3)


# --- SDE -------------------------------------------------------------------------------------------------------------


class SharedPath:
    """One Brownian path on a fine grid of increasing time, answering for any union of its cells."""

    levy_area_approximation = "space-time"

    def __init__(self, shape, low, high, cells, generator):
        self.shape, self.low, self.width = shape, low, (high - low) / cells
        n = (cells, *shape)
        self.w = math.sqrt(self.width) * torch.randn(n, dtype=torch.float64, generator=generator)
        own = torch.randn(n, dtype=torch.float64, generator=generator) * math.sqrt(self.width**3 / 12.0)
        self.u = 0.5 * self.width * self.w + own

    def __call__(self, ta, tb, return_U=False):
        a, b = round((float(ta) - self.low) / self.width), round((float(tb) - self.low) / self.width)
        w = self.w[a:b]
        if not return_U:
            return w.sum(0)
        # integral of W - W_a over the union: each cell's own part plus the path already gained times its width
        gained = w.cumsum(0) - w
        return w.sum(0), (self.u[a:b] + self.width * gained).sum(0)


def linear_drift(t, y):
    return (1.0 + torch.sin(3.0 * t)) * y


def growing_noise(t, y):
    return (0.5 + t).expand_as(y)


@pytest.mark.parametrize("method", solvers.SDE_METHODS)
@pytest.mark.parametrize("backwards", [False, True])
def test_strong_order_on_a_shared_path(method, backwards, generator):
    """Root-mean-square distance to the same path solved with 128 steps of the method of order 1.5."""
    ends = (1.0, 0.0) if backwards else (0.0, 1.0)
    path = SharedPath((256, 1), -1.0 if backwards else 0.0, 0.0 if backwards else 1.0, 128, generator)
    y0 = torch.ones(256, 1, dtype=torch.float64)

    def solve(n, name):
        grid = torch.linspace(*ends, n + 1, dtype=torch.float64)
        return solvers.sdeint(linear_drift, growing_noise, y0, grid, method=name, noise=path)

    reference, steps = solve(128, "srk").state[0], (4, 8, 16)
    errors = []
    for n in steps:
        solution = solve(n, method)
        assert solution.nfe.unique().tolist() == [solvers.SDE_METHODS[method][1] * n]
        errors.append((solution.state[0] - reference).square().mean().sqrt())
    assert order(errors, steps) > solvers.SDE_METHODS[method][0] - 0.3


@pytest.mark.parametrize("method", solvers.SDE_METHODS)
def test_moments_of_an_ornstein_uhlenbeck_process_on_an_uneven_grid(method, generator):
    """dy = -y dt + dw run backwards in time is dy = +y; mean and variance within four standard errors."""
    n, grid = 20_000, 1.0 - torch.linspace(0, 1, 101, dtype=torch.float64) ** 1.3
    y0 = torch.full((n, 1), 2.0, dtype=torch.float64)
    solution = solvers.sdeint(
        lambda t, y: y, lambda t, y: torch.ones_like(y), y0, grid, method=method, generator=generator
    )
    assert solution.accepted.unique().tolist() == [100]
    y = solution.state[0]
    variance = 0.5 * (1.0 - math.exp(-2.0))
    assert abs(float(y.mean()) - 2.0 * math.exp(-1.0)) < 4 * math.sqrt(variance / n) + 0.01
    assert abs(float(y.var()) / variance - 1.0) < 4 * math.sqrt(2.0 / n) + 0.02


def test_noise_of_a_generator_has_the_moments_of_a_path(generator):
    """Var W = h, Cov(W, U) = h^2 / 2, Var U = h^3 / 3 for the increment W and the integral U of the path."""
    n, h = 40_000, 0.3
    noise = backend.GeneratorNoise(torch.zeros(n, 1, dtype=torch.float64), generator)
    ends = torch.tensor([0.2, 0.2 + h], dtype=torch.float64)
    cov = torch.cov(torch.stack(noise(*ends, return_U=True))[..., 0])
    for measured, exact, scale in (
        (cov[0, 0], h, h),
        (cov[0, 1], h**2 / 2, h**2 / math.sqrt(3.0)),
        (cov[1, 1], h**3 / 3, h**3 / 3),
    ):
        assert abs(float(measured) - exact) < 4 * math.sqrt(2.0 / n) * scale


def test_sde_is_reproducible_from_its_generator_alone():
    grid, y0 = torch.linspace(1, 0, 11, dtype=torch.float64), torch.zeros(3, 2, 2, dtype=torch.float64)

    def run(seed):
        noise = torch.Generator().manual_seed(seed)
        return solvers.sdeint(linear_drift, growing_noise, y0, grid, method="srk", generator=noise).state[0]

    first = run(1)
    torch.manual_seed(99)
    assert torch.equal(first, run(1))
    assert not torch.equal(first, run(2))


def test_sde_memory_is_linear_in_the_event():
    """A 10^5-dimensional event: a d x d noise matrix would need 80 GB."""
    y0 = torch.zeros(2, 100_000)
    grid = torch.linspace(1, 0, 3, dtype=torch.float64)
    solution = solvers.sdeint(lambda t, y: -y, lambda t, y: torch.ones_like(y), y0, grid, method="srk")
    assert float(solution.state[0].std()) == pytest.approx(math.sqrt(0.5 * (math.exp(2.0) - 1.0)), rel=0.2)


def test_sde_nan_is_reported():
    grid = torch.linspace(1, 0, 11, dtype=torch.float64)
    with pytest.raises(SolverError, match=r"rows \[0, 1\]"):
        solvers.sdeint(lambda t, y: y * math.nan, growing_noise, torch.ones(2, 1, dtype=torch.float64), grid)


def test_callback_sees_every_step():
    seen = []
    grid = torch.linspace(1, 0, 6, dtype=torch.float64)
    y0 = torch.ones(2, 1, dtype=torch.float64)
    solvers.sdeint(linear_drift, growing_noise, y0, grid, method="srk", callback=seen.append)
    torch.testing.assert_close(torch.tensor(seen, dtype=torch.float64), grid[:-1])
