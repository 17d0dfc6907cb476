"""The solver "ode": coefficients, orders, independence of rows, nodes, gradients, counts, guards."""

import math
from itertools import combinations_with_replacement

import pytest
import torch
from oracles import order
from scipy.integrate import RK45

from ndm_ct import SolverError
from ndm_ct.solvers import ode
from ndm_ct.solvers.ode import odeint_rows

DIRECTIONS = [(0.0, 1.0), (1.0, 0.0)]


def f64(*shape, value=1.0):
    return torch.full(shape, value, dtype=torch.float64)


def solve(field, y0, t0=0.0, t1=1.0, tol=1e-6, **kwargs):
    return odeint_rows(field, (y0,), t0, t1, rtol=tol, atol=tol, **kwargs)


class Logistic:
    """y' = r a(t) y (1 - y), a(t) = 1 + t, one r per row; nonlinear, with a closed-form solution.

    A row is NaN beyond its wall, in time, and its values are recorded as seen.
    """

    def __init__(self, rate, wall=None):
        self.rate = torch.as_tensor(rate, dtype=torch.float64)
        self.wall = torch.full_like(self.rate, torch.inf) if wall is None else wall
        self.seen = torch.zeros(len(self.rate), dtype=torch.long)
        self.batches, self.times = [], []

    def __call__(self, t, state, rows):
        assert t.dtype == torch.float64
        assert t.shape == rows.shape == state[0].shape[:1]
        assert bool(torch.isfinite(t).all())
        self.seen.index_add_(0, rows, torch.ones_like(rows))
        self.batches.append(len(rows))
        self.times.append(t)
        (y,) = state
        column = (-1,) + (1,) * (y.ndim - 1)
        speed = (self.rate[rows] * (1.0 + t)).to(y.dtype).reshape(column)
        wall = (t > self.wall[rows]).reshape(column)
        return (torch.where(wall, torch.nan, speed * y * (1.0 - y)),), (y,)

    def exact(self, y0, t0, t1):
        """At t1, ``()`` or one per row."""
        t1 = torch.as_tensor(t1, dtype=torch.float64).expand(len(y0))
        grown = (self.rate * ((t1 - t0) + 0.5 * (t1**2 - t0**2))).reshape((-1,) + (1,) * (y0.ndim - 1))
        return 1.0 / (1.0 + (1.0 / y0.double() - 1.0) * torch.exp(-grown))

    def only(self, row):
        return Logistic(self.rate[row : row + 1], self.wall[row : row + 1])


# --- coefficients ----------------------------------------------------------------------------------------------------


def trees(n):
    """Rooted trees of n vertices, each as the tuple of its children."""
    if n == 1:
        return [()]

    def forests(size, largest):
        if size == 0:
            yield ()
        for first in range(min(size, largest), 0, -1):
            for count in range(1, size // first + 1):
                for chosen in combinations_with_replacement(trees(first), count):
                    for rest in forests(size - first * count, first - 1):
                        yield chosen + rest

    return list(forests(n - 1, n - 1))


def vertices(tree):
    return 1 + sum(map(vertices, tree))


def density(tree):
    return vertices(tree) * math.prod(map(density, tree))


def elementary_weight(tree, a):
    """Phi_i of Butcher's order conditions sum_i b_i Phi_i(tree) = 1 / density(tree)."""
    weight = torch.ones(len(a), dtype=torch.float64)
    for child in tree:
        weight = weight * (a @ elementary_weight(child, a))
    return weight


def tableau():
    a = torch.tensor([row + (0.0,) * (7 - len(row)) for row in ode.A], dtype=torch.float64)
    b, e = a[6], torch.tensor(ode.ERROR, dtype=torch.float64)
    return a, b, b - e, torch.tensor(ode.C, dtype=torch.float64)


def defect(b, a, n, theta=1.0):
    """Largest violation of the conditions of order n."""
    return max(abs(float(b @ elementary_weight(tree, a)) - theta**n / density(tree)) for tree in trees(n))


def interpolant(theta):
    powers = torch.tensor([theta, theta**2, theta**3, theta**4], dtype=torch.float64)
    return torch.tensor(ode.INTERPOLANT, dtype=torch.float64) @ powers


def test_coefficients_satisfy_the_order_conditions_of_every_tree():
    assert [len(trees(n)) for n in range(1, 7)] == [1, 1, 2, 4, 9, 20]
    a, b, embedded, c = tableau()
    torch.testing.assert_close(a.sum(1), c, rtol=0.0, atol=1e-14)
    assert max(defect(b, a, n) for n in range(1, 6)) < 1e-14
    assert max(defect(embedded, a, n) for n in range(1, 5)) < 1e-14
    assert defect(embedded, a, 5) > 1e-4  # otherwise the difference would say nothing about the step
    assert defect(b, a, 6) > 1e-4


@pytest.mark.parametrize("theta", [0.1, 0.37, 0.5, 0.9])
def test_interpolant_has_order_4(theta):
    a, *_ = tableau()
    assert max(defect(interpolant(theta), a, n, theta) for n in range(1, 5)) < 1e-13


def test_interpolant_meets_value_and_derivative_at_both_ends():
    _, b, *_ = tableau()
    first, last = torch.eye(7, dtype=torch.float64)[[0, 6]]
    slope = torch.tensor(ode.INTERPOLANT, dtype=torch.float64)
    torch.testing.assert_close(interpolant(1.0), b, rtol=0.0, atol=1e-13)
    torch.testing.assert_close(slope[:, 0], first, rtol=0.0, atol=0.0)
    torch.testing.assert_close(slope @ torch.arange(1.0, 5.0, dtype=torch.float64), last, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize(("t0", "t1"), [(0.2, 0.5), (0.5, 0.2)])
def test_one_step_is_scipys(t0, t1):
    """State, interpolant and error of a step forced to be the only one."""
    y0 = torch.tensor([[0.3, 1.2, -0.4], [1.0, 0.5, 0.2]], dtype=torch.float64)
    g = torch.tensor([[0.7, -0.2, 1.3], [0.1, 2.0, -0.6]], dtype=torch.float64)
    nodes = torch.tensor([[0.2, 0.27], [0.31, 0.5], [0.44, 0.36]], dtype=torch.float64)

    def field(t, state, rows):
        (y,) = state
        return (torch.sin(3.0 * y.roll(1, 1)) + t[:, None] * y - y**3,), (g[rows],)

    solution = solve(field, y0, t0, t1, tol=1.0, nodes=nodes)
    assert solution.accepted.tolist() == [1, 1]
    assert solution.nfe.tolist() == [8, 8]
    for row in range(2):

        def alone(t, y, row=row):
            time, state = torch.tensor([t], dtype=torch.float64), (torch.as_tensor(y)[None],)
            return field(time, state, torch.tensor([row]))[0][0][0].numpy()

        scipys = RK45(alone, t0, y0[row].numpy(), t1, first_step=0.3, rtol=1.0, atol=1.0)
        scipys.step()
        assert scipys.t == t1
        torch.testing.assert_close(solution.state[0][row], torch.as_tensor(scipys.y), rtol=1e-14, atol=1e-14)
        dense = torch.as_tensor(scipys.dense_output()(nodes[:, row].numpy())).mT
        torch.testing.assert_close(solution.nodes[:, row], dense, rtol=1e-13, atol=1e-13)
        error = abs(float(g[row] @ torch.as_tensor(scipys.K.T @ RK45.E))) * 0.3
        assert float(solution.error[row]) == pytest.approx(error, rel=1e-10)


# --- orders ----------------------------------------------------------------------------------------------------------


def test_local_orders_of_step_and_interpolant():
    """Solves short enough for one step: the end is wrong by h^6, the inside by h^5."""
    field, y0, steps = Logistic(f64(40)), torch.linspace(0.02, 0.98, 40, dtype=torch.float64)[:, None], (6, 8, 12, 16)
    ends, insides = [], []
    for n in steps:
        nodes = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)[:, None].expand(3, 40) / n
        solution = solve(field, y0, 0.0, 1.0 / n, tol=1.0, nodes=nodes)
        assert bool((solution.accepted == 1).all())
        exact = torch.stack([field.exact(y0, 0.0, t) for t in nodes])
        insides.append((solution.nodes - exact).square().mean().sqrt())
        # The leading error of this pair is so small that only a linear field shows it.
        linear = solve(lambda t, state, rows: (state, None), y0, 0.0, 1.0 / n, tol=1.0)
        ends.append((linear.state[0] - y0 * math.exp(1.0 / n)).abs().amax())
    assert order(ends, steps) == pytest.approx(6.0, abs=0.15)
    assert order(insides, steps) == pytest.approx(5.0, abs=0.15)


@pytest.mark.parametrize(("t0", "t1"), DIRECTIONS)
def test_global_order_is_five(t0, t1):
    field = Logistic(torch.tensor([6.0, 9.0]))
    y0 = f64(2, 3, value=0.01) if t1 > t0 else f64(2, 3, value=0.9)
    nodes = torch.rand(40, 2, dtype=torch.float64)
    errors, at_nodes, steps = [], [], []
    for tol in (1e-6, 1e-7, 1e-8, 1e-9, 1e-10):
        solution = solve(field, y0, t0, t1, tol=tol, nodes=nodes)
        errors.append((solution.state[0] - field.exact(y0, t0, t1)).abs().amax())
        exact = torch.stack([field.exact(y0, t0, node) for node in nodes])
        at_nodes.append((solution.nodes - exact).abs().amax())
        steps.append(float(solution.accepted.double().mean()))
    assert order(errors, steps) == pytest.approx(5.0, abs=0.5)
    assert order(at_nodes, steps) == pytest.approx(5.0, abs=0.7)
    assert max(errors) < 1e-5
    assert errors[-1] < 1e-9


def test_step_sizes_are_as_good_as_scipys():
    """A controller that loses its way shows in the number of steps."""
    field = Logistic(torch.tensor([12.0]))
    for tol in (1e-4, 1e-7, 1e-10):
        solution = solve(field, f64(1, 1, value=1e-3), tol=tol)

        def alone(t, y):
            return 12.0 * (1.0 + t) * y * (1.0 - y)

        scipys, steps = RK45(alone, 0.0, [1e-3], 1.0, rtol=tol, atol=tol), 0
        while scipys.status == "running":
            scipys.step()
            steps += 1
        assert int(solution.accepted) < 1.15 * steps + 2
        assert float(solution.rejected) < 0.15 * float(solution.accepted) + 2


def control(ratio, accept, last_ratio=1.0, barrier=0.0, t0=0.0, t1=1.0):
    """Next size, barrier and remembered error after a step of size 1/4 from the middle of the interval."""
    solve = ode._Solve(None, t0, t1, 1, True, None, 1e-5, 1e-5, None, None, None)
    one = f64(1)
    unused = ("index", "t", "y", "k", "h", "finite", "accepted", "rejected", "error")
    log_ratio = (last_ratio * one).log()
    solve.rows = ode._Rows(barrier=barrier * one, log_ratio=log_ratio, **dict.fromkeys(unused, one))
    solve._control(0.25 * one, 0.5 + 0.25 * (t1 - t0) * one, ratio * one, torch.tensor([accept]))
    return float(solve.rows.h), float(solve.rows.barrier), float(solve.rows.log_ratio.exp())


def test_controller():
    """Hairer and Wanner, Solving Ordinary Differential Equations II, IV.2: PI control with beta = 0.04."""
    assert control(0.3, True, 0.5) == pytest.approx((0.25 * 0.9 * 0.3**-0.17 * 0.5**0.04, 0.0, 0.3))
    assert control(4.0, False, 0.5) == pytest.approx((0.25 * 0.9 * 4.0**-0.2, 0.75, 0.5))
    assert control(0.0, True) == pytest.approx((0.25 * 6.0, 0.0, 1e-4))
    assert control(math.inf, False) == pytest.approx((0.25 * 0.2, 0.75, 1.0))


def test_no_growth_before_the_end_of_a_rejected_step():
    assert control(0.3, True, barrier=0.8) == pytest.approx((0.25, 0.8, 0.3))
    assert control(0.3, True, barrier=0.7)[0] > 0.25
    assert control(0.3, True, barrier=0.2, t0=1.0, t1=0.0) == pytest.approx((0.25, 0.2, 0.3))
    assert control(0.3, True, barrier=0.3, t0=1.0, t1=0.0)[0] > 0.25


@pytest.mark.parametrize("strength", [0.01, 1.0])  # of the first tensor's scale: it decides, or the second tensor does
@pytest.mark.parametrize(("rtol", "atol"), [(1.0, 1e-3), (1e-3, 1.0), (1.0, 1.0)])
def test_a_step_is_accepted_up_to_its_tolerance(rtol, atol, strength, monkeypatch):
    """The largest root mean square of e in units of its tolerance over the parts, from scipy's step."""
    monkeypatch.setattr(ode._Solve, "_first_step", lambda self: f64(1, value=0.3))
    y0 = torch.tensor([0.3, 1.2, -0.4, 1.5, 0.02], dtype=torch.float64)
    rate = torch.tensor([2.0, -2.0, 1.0, -2.0, 1.0], dtype=torch.float64)

    def slope(t, y):
        return torch.sin(3.0 * y.roll(1, -1)) * (1.0 + t) + rate * y

    def field(t, state, rows):
        return slope(t[:, None], torch.cat(state, 1)).split([2, 3], 1), None

    def alone(t, y):
        return slope(t, torch.as_tensor(y)).numpy()

    scipys = RK45(alone, 0.2, y0.numpy(), 0.5, first_step=0.3, rtol=1.0, atol=1.0)
    scipys.step()
    error, end = 0.3 * torch.as_tensor(scipys.K.T @ RK45.E), torch.as_tensor(scipys.y).abs()
    for part in (slice(0, 2), slice(2, 5)):  # the larger end is the first one for some numbers, not for others
        assert 0 < int((y0.abs() > end)[part].sum()) < len(y0[part])
    tolerance = atol + rtol * torch.maximum(y0.abs(), end)
    tolerance[:2] = 0.5 * strength * (atol + rtol)  # s(t) at the end of the step, in place of the state's size
    ratios = (error / tolerance).square().split([2, 3])
    ratios = [float(ratio.mean().sqrt()) for ratio in ratios]
    assert (ratios[0] > ratios[1]) == (strength < 1.0)
    for factor, rejected in ((1.0 + 1e-9, 0), (1.0 - 1e-9, 1)):
        tolerances = {"rtol": rtol * max(ratios) * factor, "atol": atol * max(ratios) * factor}
        state = y0[None].split([2, 3], 1)
        solution = odeint_rows(field, state, 0.2, 0.5, scale=lambda t: strength * t, **tolerances)
        assert min(1, int(solution.rejected)) == rejected


# --- rows are independent --------------------------------------------------------------------------------------------


def crowd():
    """64 rows of very different rates, one of them stiff, one that meets NaN on its way."""
    rate = torch.logspace(-1.0, 1.3, 64, dtype=torch.float64)[torch.randperm(64)]
    rate[17] = 150.0
    wall = torch.full_like(rate, torch.inf)
    wall[40] = 0.43
    return Logistic(rate, wall), 0.02 + 0.9 * torch.rand(64, 5, dtype=torch.float64)


def test_a_row_in_a_batch_is_the_row_alone():
    field, y0 = crowd()
    nodes = torch.rand(7, 64, dtype=torch.float64)
    together = solve(field, y0, tol=1e-7, nodes=nodes, on_failure="nan")
    assert together.failed.nonzero().flatten().tolist() == [40]
    assert together.accepted.max() > 3 * together.accepted.median()
    for row in [*range(0, 64, 5), 17]:
        alone = solve(field.only(row), y0[row : row + 1], tol=1e-7, nodes=nodes[:, row : row + 1], on_failure="nan")
        for name in ("nfe", "accepted", "rejected", "failed"):
            assert int(getattr(together, name)[row]) == int(getattr(alone, name)), name
        same = {"rtol": 1e-12, "atol": 0.0, "equal_nan": True}
        torch.testing.assert_close(together.state[0][row], alone.state[0][0], **same)
        torch.testing.assert_close(together.nodes[:, row], alone.nodes[:, 0], **same)
        torch.testing.assert_close(together.error[row], alone.error[0], rtol=1e-9, atol=0.0, equal_nan=True)


def test_rows_meet_their_tolerance_each():
    field, y0 = crowd()
    field.wall[:] = torch.inf
    solution = solve(field, y0, tol=1e-7)
    assert float((solution.state[0] - field.exact(y0, 0.0, 1.0)).abs().max()) < 3e-6


@pytest.mark.parametrize("at", [-1.0, 0.1, 0.97])
def test_a_failing_row_leaves_the_others_bits_alone(at):
    """Rows meet NaN at the start, early, or late; they fail, and nothing else happens."""
    field, y0 = crowd()
    nodes = torch.rand(7, 64, dtype=torch.float64)
    nodes[0], nodes[1] = 0.0, 1.0
    runs, calls = [], []
    for wall in (torch.inf, at):
        field.wall[40] = field.wall[41] = wall
        field.batches = []
        runs.append(solve(field, y0, tol=1e-6, nodes=nodes, on_failure="nan"))
        calls.append(len(field.batches))
    healthy, broken = runs
    others = torch.ones(64, dtype=torch.bool)
    others[[40, 41]] = False
    assert torch.equal(broken.failed, ~others)
    assert not bool(healthy.failed.any())
    assert torch.equal(healthy.state[0][others], broken.state[0][others])
    assert torch.equal(healthy.nodes[:, others], broken.nodes[:, others])
    for name in ("error", "nfe", "accepted", "rejected"):
        assert torch.equal(getattr(healthy, name)[others], getattr(broken, name)[others]), name
    for part in (broken.state[0], broken.nodes.movedim(1, 0), broken.error):
        assert bool(torch.isnan(part[~others]).all())
    assert calls[1] <= calls[0] + 36


def test_a_wall_of_nan_costs_little_even_alone():
    field = Logistic([3.0], torch.tensor([0.6]))
    solution = solve(field, f64(1, 4, value=0.1), on_failure="nan")
    assert bool(solution.failed)
    assert int(solution.nfe) == len(field.batches) < 200


def test_nan_at_the_start_fails_at_once():
    field = Logistic([1.0, 1.0, 1.0], torch.tensor([-1.0, torch.inf, -1.0]))
    solution = solve(field, f64(3, 2, value=0.5), on_failure="nan")
    assert solution.failed.tolist() == [True, False, True]
    assert solution.nfe.tolist()[::2] == [1, 1]
    assert field.batches[:3] == [3, 1, 1]
    field.wall[:] = -1.0
    field.batches = []
    solve(field, f64(3, 2, value=0.5), on_failure="nan")
    assert field.batches == [3]
    y0 = f64(2, 2, value=0.5)
    y0[1, 0] = torch.nan
    solution = solve(lambda t, state, rows: ((torch.ones_like(state[0]),), None), y0, on_failure="nan")
    assert solution.failed.tolist() == [False, True]
    assert int(solution.nfe[1]) == 1


def test_nan_of_long_trial_steps_only_shortens_them():
    """y' = -sqrt(y) c: trial stages below zero are NaN; also in the probe for the first step."""
    rate = torch.tensor([[1.9], [1.9], [0.1]], dtype=torch.float64)

    def field(t, state, rows):
        return (-rate[rows] * state[0].sqrt(),), None

    solution = solve(field, f64(3, 1), tol=1e-2)
    torch.testing.assert_close(solution.state[0], (1.0 - 0.5 * rate) ** 2, rtol=0.0, atol=0.02)
    assert int(solution.rejected[0]) > 0

    def sheltered(t, state, rows, outside=torch.nan):  # off the solution, cos(9t + 1), there is only NaN
        phase = 9.0 * t[:, None] + 1.0
        off = (state[0] - torch.cos(phase)).abs() > 1e-6
        return (torch.where(off, outside, -9.0 * torch.sin(phase)),), None

    for field in (sheltered, lambda *arguments: sheltered(*arguments, outside=torch.inf)):
        solution = solve(field, f64(1, 1, value=math.cos(1.0)), tol=1.0)
        assert not bool(solution.failed)
        assert float(solution.state[0]) == pytest.approx(math.cos(10.0), abs=1e-6)
        assert int(solution.rejected) > 0


# --- counts and times ------------------------------------------------------------------------------------------------


def test_counts_are_those_of_the_field():
    field, y0 = crowd()
    solution = solve(field, y0, on_failure="nan")
    assert torch.equal(solution.nfe, field.seen)
    assert int(solution.nfe.max()) == len(field.batches)
    assert torch.equal(solution.nfe, 2 + 6 * (solution.accepted + solution.rejected))
    assert bool((solution.rejected > 0).any())
    assert field.batches == sorted(field.batches, reverse=True)  # who has finished is not asked again
    assert (field.batches[0], field.batches[-1]) == (64, 1)


def test_rejected_steps_are_counted_and_retried():
    def field(t, state, rows):
        return (-80.0 * (state[0] - (t > 0.3).double()[:, None]),), None

    solution = solve(field, f64(1, 1, value=0.0))
    assert int(solution.rejected) > 3
    assert float(solution.state[0]) == pytest.approx(1.0, abs=1e-5)


INTERVALS = [(0.0, 1.0), (1.0, 0.0), (1.0, 1e-3), (0.1, 0.7), (0.7, 0.1), (1.0, 1.0 + 1e-12), (-0.3, 1e-9), (0.9, -0.2)]


@pytest.mark.parametrize(("t0", "t1"), INTERVALS)
def test_no_evaluation_outside_the_interval(t0, t1):
    field = Logistic([0.0, 1e-9, 1e-3, 0.7, 11.0])  # slow fields let the guess of the first step reach far out
    solution = solve(field, f64(5, 1, value=0.3), t0, t1, tol=1e-3)
    times = torch.cat(field.times)
    assert float(times.min()) == min(t0, t1)
    assert float(times.max()) == max(t0, t1)
    exact = field.exact(f64(5, 1, value=0.3), t0, t1)
    torch.testing.assert_close(solution.state[0], exact, rtol=0.0, atol=0.02)


def test_the_probe_for_the_first_step_stays_inside_where_rounding_leads_out():
    t0, t1 = 1.0, next(t for t in (torch.rand(99, dtype=torch.float64) ** 3).tolist() if 1.0 - (1.0 - t) < t)
    times, states = [], []

    def field(t, state, rows):  # the probe reaches the end, because the state is large and the field small
        times.append(float(t))
        states.append(float(state[0]))
        return (1e-4 * torch.ones_like(state[0]),), None

    solve(field, f64(1, 1, value=1e3), t0, t1)
    assert times[1] == t1
    assert states[1] == pytest.approx(1e3 + 1e-4 * (t1 - t0), rel=1e-15)
    assert min(times) == t1


def first_times(field, y0, t1=1.0, tol=1e-8):
    times = []
    solution = solve(
        lambda t, s, rows: (times.append(float(t)) or (field(s[0]),), None), f64(1, 1, value=y0), 0.0, t1, tol
    )
    return solution, times[1], times[2] / 0.2


@pytest.mark.parametrize("rate", [0.3, 3.0])
def test_the_guess_of_the_first_step_is_hairers(rate):
    """Hairer, Norsett and Wanner, II.4, by hand for y' = -r y, y = 1, whose tolerance is tol (1 + 1)."""
    expected = (0.01 * 2e-8 / (rate * max(1.0, rate))) ** 0.2
    _, probe, guess = first_times(lambda y: -rate * y, 1.0)
    assert probe == pytest.approx(0.01 / rate)
    assert guess == pytest.approx(expected)
    for t1, steps in ((1.005 * guess, 1), (1.02 * guess, 2)):  # no sliver is left for a last step
        assert int(first_times(lambda y: -rate * y, 1.0, t1)[0].accepted) == steps


def test_the_guess_of_the_first_step_is_a_small_one_where_little_is_known():
    _, probe, guess = first_times(torch.ones_like, 0.01, tol=1.0)  # it trusts the probe a hundredfold
    assert (probe, guess) == pytest.approx((1e-4, 1e-2))
    _, probe, guess = first_times(torch.zeros_like, 1.0, t1=4.0)
    assert (probe, guess) == pytest.approx((4e-6, 4e-6))


@pytest.mark.parametrize(("t0", "t1"), DIRECTIONS)
def test_the_last_step_ends_at_the_end(t0, t1):
    """Polynomials of degree 4 are integrated exactly, unless a step goes across the end or falls short of it."""
    nodes = torch.linspace(0.0, 1.0, 9, dtype=torch.float64)[:, None].expand(9, 2)
    solution = solve(lambda t, state, rows: ((5 * t[:, None] ** 4,), None), f64(2, 1, value=0.0), t0, t1, nodes=nodes)
    torch.testing.assert_close(solution.state[0], f64(2, 1, value=t1 - t0), rtol=1e-13, atol=0.0)
    cubic = solve(lambda t, state, rows: ((4 * t[:, None] ** 3,), None), f64(2, 1, value=0.0), t0, t1, nodes=nodes)
    torch.testing.assert_close(cubic.nodes[..., 0], nodes**4 - t0, rtol=0.0, atol=1e-13)


# --- nodes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t0", "t1"), DIRECTIONS)
def test_every_node_is_filled_wherever_it_is(t0, t1):
    """At the ends, repeated, unsorted, and exactly at the ends of steps, also of tiny ones."""
    rate = torch.tensor([0.5, 6.0, 20.0, 3.0], dtype=torch.float64)
    y0 = f64(4, 3, value=0.02) if t1 > t0 else f64(4, 3, value=0.9)
    times = torch.rand(11, 4, dtype=torch.float64)
    times[0], times[3], times[5], times[6] = t0, t1, t1, times[4]
    ends = [solve(f := Logistic(rate[r : r + 1]), y0[:1], t0, t1) and torch.cat(f.times)[7::6][:8] for r in range(4)]
    nodes = torch.cat([times, *[torch.stack([e[n] for e in ends])[None] for n in range(4)]])
    field = Logistic(rate)
    solution = solve(field, y0, t0, t1, tol=1e-6, nodes=nodes)
    exact = torch.stack([field.exact(y0, t0, node) for node in nodes])
    torch.testing.assert_close(solution.nodes, exact, rtol=0.0, atol=1e-5)
    assert torch.equal(solution.nodes[0], y0)
    torch.testing.assert_close(solution.nodes[3], solution.state[0], rtol=1e-13, atol=1e-15)
    assert torch.equal(solution.nodes[3], solution.nodes[5])
    assert torch.equal(solution.nodes[4], solution.nodes[6])
    none = solve(field, y0, t0, t1, tol=1e-6)
    assert none.nodes is None
    assert torch.equal(none.state[0], solution.state[0])
    assert torch.equal(none.nfe, solution.nfe)


def test_nodes_at_the_ends_of_tiny_steps_are_met_once():
    """A node at t + h as rounded may be beyond t + h: it must not be missed, nor met twice and its gradient doubled."""
    times = []

    def field(t, state, rows):
        times.append(t)
        return (-state[0] * 1e7 * torch.exp(-1e7 * (t[:, None] - 0.7)),), None

    y0 = f64(1, 1).requires_grad_()
    solve(field, y0, 0.7, 1.0)
    ends = torch.cat(times)[7::6][:, None]
    assert float(ends.diff(dim=0).abs().min()) < 1e-6
    solution = solve(field, y0, 0.7, 1.0, nodes=ends)
    exact = torch.exp(-1.0 + torch.exp(-1e7 * (ends - 0.7)))[..., None]
    torch.testing.assert_close(solution.nodes.detach(), exact, rtol=0.0, atol=1e-5)
    (gradient,) = torch.autograd.grad(solution.nodes.sum(), y0)
    torch.testing.assert_close(gradient, exact.sum().reshape(1, 1), rtol=1e-4, atol=0.0)


def test_nodes_are_of_the_first_tensor():
    def field(t, state, rows):
        return (-state[0], 2.0 * state[1]), None

    state = (f64(2, 3, 2), f64(2))
    solution = odeint_rows(field, state, 0.0, 1.0, rtol=1e-8, atol=1e-8, nodes=f64(1, 2, value=0.5))
    assert solution.nodes.shape == (1, 2, 3, 2)
    torch.testing.assert_close(solution.nodes, f64(1, 2, 3, 2, value=math.exp(-0.5)), rtol=1e-6, atol=0.0)
    assert odeint_rows(field, state, 0.0, 1.0, nodes=f64(0, 2)).nodes.shape == (0, 2, 3, 2)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (f64(4), r"nodes has shape \(4,\), expected \(N, 2\)"),
        (f64(4, 3), r"nodes has shape \(4, 3\), expected \(N, 2\)"),
        (f64(1, 2, value=1.5), r"nodes must lie between t0 and t1, in \[0.0, 1.0\], got times in \[1.5, 1.5\]"),
        (f64(1, 2, value=math.nan), "nodes must lie between"),
    ],
)
def test_bad_nodes(nodes, message):
    with pytest.raises(ValueError, match=message):
        solve(Logistic([1.0, 1.0]), f64(2, 1), nodes=nodes)


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t0", "t1"), DIRECTIONS)
@pytest.mark.parametrize("what", ["state", "nodes"])
def test_gradients_are_finite_differences(t0, t1, what):
    nodes = torch.rand(6, 3, dtype=torch.float64)
    weights = {"state": torch.randn(3, 4, dtype=torch.float64), "nodes": torch.randn(6, 3, 4, dtype=torch.float64)}[
        what
    ]
    y0, matrix = torch.randn(3, 4, dtype=torch.float64), 2.0 * torch.randn(4, 4, dtype=torch.float64)

    def value(y0, matrix):
        def field(t, state, rows):
            return (torch.tanh(state[0] @ matrix) * (1.0 + rows[:, None]) + t[:, None] * state[0],), None

        solution = solve(field, y0, t0, t1, tol=1e-10, nodes=nodes)
        return (weights * (solution.state[0] if what == "state" else solution.nodes)).sum()

    leaves = [y0.requires_grad_(), matrix.requires_grad_()]
    gradients = torch.autograd.grad(value(*leaves), leaves)
    with torch.no_grad():
        for n, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
            direction = torch.randn(leaf.shape, dtype=torch.float64)
            near = [[x + sign * 1e-5 * direction if m == n else x for m, x in enumerate(leaves)] for sign in (1, -1)]
            difference = (value(*near[0]) - value(*near[1])) / 2e-5
            assert float((gradient * direction).sum()) == pytest.approx(float(difference), rel=1e-6)


def test_step_sizes_carry_no_graph():
    """For y' = w y the n-th step multiplies by R(w h_n): the gradient is that with every h_n held fixed, exactly."""
    w = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    stretch = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    y0, times, graphs = f64(1, 1).requires_grad_(), [], []

    def field(t, state, rows):
        graphs.append(torch.is_grad_enabled())
        return (w * state[0],), (state[0] * stretch,)

    solution = solve(field, y0, tol=1e-2, callback=times.append, scale=lambda t: stretch + 0.0 * t)
    assert int(solution.rejected) == 0
    steps = torch.tensor([*times, 1.0], dtype=torch.float64).diff()
    frozen = w.detach().clone().requires_grad_()
    z = frozen * steps
    expected = (sum(z**k / math.factorial(k) for k in range(6)) + z**6 / 600.0).prod()
    torch.testing.assert_close(solution.state[0].detach()[0, 0], expected.detach(), rtol=1e-13, atol=0.0)
    gradients = torch.autograd.grad(solution.state[0].sum(), [w, y0, stretch], allow_unused=True)
    torch.testing.assert_close(
        gradients[0], *torch.autograd.grad(expected, frozen, retain_graph=True), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(gradients[1][0, 0], expected.detach(), rtol=1e-12, atol=0.0)
    assert gradients[2] is None
    assert not solution.error.requires_grad
    assert graphs == [True, False] + [True] * (int(solution.nfe.max()) - 2)  # all but the probe for the first step


@pytest.mark.parametrize("wall", [-1.0, 0.4])
def test_nan_of_a_failing_row_does_not_reach_the_gradient(wall):
    """Neither at the start nor on the way: 0 * NaN would."""

    def gradients(walls, rows):
        w, y0 = f64(1).requires_grad_(), torch.linspace(0.5, 1.5, 3, dtype=torch.float64)[:, None].requires_grad_()
        walls = torch.tensor(walls, dtype=torch.float64)

        def field(t, state, rows):
            return (-w * (walls[rows] - t).sqrt()[:, None] * state[0],), None

        nodes = f64(1, 3, value=0.3)
        solution = solve(field, y0, nodes=nodes, on_failure="nan")
        value = solution.state[0][rows].sum() + solution.nodes[0][rows].sum()
        return solution, torch.autograd.grad(value, [w, y0])

    (healthy, expected), (broken, found) = gradients([9.0, 9.0, 9.0], [0, 2]), gradients([9.0, wall, 9.0], [0, 2])
    assert broken.failed.tolist() == [False, True, False]
    assert torch.equal(healthy.state[0][[0, 2]], broken.state[0][[0, 2]])
    assert torch.equal(healthy.nfe[[0, 2]], broken.nfe[[0, 2]])
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0.0)


def test_no_graph_without_gradients():
    with torch.inference_mode():
        solution = solve(Logistic([1.0, 5.0]), f64(2, 3, value=0.1), nodes=f64(1, 2, value=0.5))
    assert not solution.state[0].requires_grad
    assert not solution.nodes.requires_grad


# --- scale, error, parts ---------------------------------------------------------------------------------------------


def oscillation(t, state, rows):
    return (*(0.0 * part for part in state[1:]), (40.0 * torch.cos(40.0 * t))[:, None].expand_as(state[0])), None


def steps_inside(low, high, **kwargs):
    """Steps of a row that start in and out of a window of time."""
    times = []
    solution = solve(oscillation, f64(1, 1, value=0.0), 0.0, 3.0, tol=1e-5, callback=times.append, **kwargs)
    times = torch.tensor(times).unique()
    assert len(times) == int(solution.accepted)
    inside = int(((times > low) & (times < high)).sum())
    return inside, len(times) - inside


def test_scale_tightens_where_it_is_small():
    """A thousandth of the tolerance takes 1000^(1/5) = 4.0 times the steps of a method of order 5."""
    inside, outside = steps_inside(1.0, 2.0)
    tight, loose = steps_inside(1.0, 2.0, scale=lambda t: torch.where((t > 1.0) & (t < 2.0), 1e-3, 1.0))
    assert tight / inside == pytest.approx(1000**0.2, rel=0.15)
    assert loose / outside == pytest.approx(1.0, abs=0.1)


def test_scale_is_of_the_first_tensor():
    state = (f64(1, 3, value=0.0), f64(1, 3, value=0.0))
    plain, scaled = (
        odeint_rows(lambda t, s, rows: oscillation(t, s, rows), state, 0.0, 1.0, scale=scale)
        for scale in (None, lambda t: 0.0 * t + 1e-3)
    )
    assert int(plain.accepted) == int(scaled.accepted) > 10


def test_parts_of_the_state_have_their_own_norm():
    """A scalar part beside a wide one that is constant is solved by the steps it takes alone."""
    wide, narrow = f64(2, 4000, value=0.0), f64(2, 1, value=0.0)

    def both(t, state, rows):
        return (0.0 * state[0], oscillation(t, state[1:], rows)[0][0]), None

    together = odeint_rows(both, (wide, narrow), 0.0, 1.0, rtol=1e-6, atol=1e-6)
    alone = odeint_rows(oscillation, (narrow,), 0.0, 1.0, rtol=1e-6, atol=1e-6)
    assert torch.equal(together.accepted, alone.accepted)
    torch.testing.assert_close(together.state[1], alone.state[0], rtol=0.0, atol=1e-12)
    assert float((alone.state[0] - math.sin(40.0)).abs().max()) < 3e-5


@pytest.mark.parametrize("tol", [1e-3, 1e-5, 1e-7])
def test_estimated_error_of_a_functional_bounds_it(tol):
    """y' = -r y, L = y(1): dL/dy = exp(-r (1 - t))."""
    rate = torch.tensor([0.5, 1.0, 2.0, 5.0], dtype=torch.float64)[:, None]

    def field(t, state, rows):
        gradient = torch.exp(-rate[rows] * (1.0 - t[:, None]))
        return (-rate[rows] * state[0],), (gradient,)

    solution = solve(field, f64(4, 1), tol=tol)
    true = (solution.state[0] - torch.exp(-rate)).abs()[:, 0]
    assert bool((solution.error >= true).all())
    assert bool((solution.error <= 60.0 * true).all())
    assert bool((solution.error <= 3.0 * tol * solution.accepted).all())


def test_error_of_a_functional_is_of_accepted_steps_and_all_parts():
    """Every accepted step is within its tolerance, rejected ones are far off it."""

    def jump(t, state, rows):
        slope = (t > 0.37).double()[:, None]
        return (slope,) * len(state), tuple(float(n + 1) * torch.ones_like(part) for n, part in enumerate(state))

    one, two = (odeint_rows(jump, (f64(1, 1, value=0.0),) * n, 0.0, 1.0, rtol=1e-6, atol=1e-6) for n in (1, 2))
    assert int(one.rejected) > 3
    assert 0.0 < float(one.error) <= 1.7e-6 * float(one.accepted)
    assert float(two.error) == pytest.approx(3.0 * float(one.error), rel=1e-12)  # 1 e + 2 e
    assert solve(jump, torch.zeros(1, 1), tol=1e-3).error.dtype == torch.float64
    assert solve(lambda t, state, rows: (state, None), f64(1, 1)).error is None


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t0", "t1", "sign"), [(0.0, 1.0, 1.0), (1.0, 0.0, -1.0)])
def test_failure_names_time_step_rows_and_cause(t0, t1, sign):
    y0 = sign * torch.tensor([[1.0], [2.0], [1.0]], dtype=torch.float64)

    def field(t, state, rows):
        return ((rows == 1).double()[:, None] * state[0] ** 2,), None

    message = r"gave up at t=0\.5 with step .*: the step size vanished in batch rows \[1\]"
    with pytest.raises(SolverError, match=message) as caught:
        solve(field, y0, t0, t1)
    assert caught.value.rows == (1,)
    assert caught.value.t == pytest.approx(0.5, abs=1e-5)
    assert 0.0 < caught.value.dt < 1e-13
    solution = solve(field, y0, t0, t1, on_failure="nan")
    assert solution.failed.tolist() == [False, True, False]


def test_failure_by_nan_says_so():
    walls = torch.tensor([torch.inf, 0.5, torch.inf, 0.5])
    message = r"gave up at t=0\.5 with step .*: the field is NaN or infinite in batch rows \[1, 3\]"
    with pytest.raises(SolverError, match=message) as caught:
        solve(Logistic([1.0] * 4, walls), f64(4, 1, value=0.3))
    assert caught.value.rows == (1, 3)
    with pytest.raises(SolverError, match=r"at t=0 with step 0: the field is NaN or infinite in batch rows \[1, 3\]"):
        solve(Logistic([1.0] * 4, walls - 1.0), f64(4, 1, value=0.3))


def test_a_step_that_rounding_swallows_has_vanished():
    """The numbers near 1e6 are 1e-10 apart; a jump is resolved by no step that changes t."""
    with pytest.raises(SolverError, match="the step size vanished"):
        solve(lambda t, s, rows: ((1e9 * (t > 1e6 + 0.5).double()[:, None],), None), f64(1, 1), 1e6, 1e6 + 1.0)


def test_failure_by_max_steps_says_so():
    rate = torch.tensor([1e-3, 300.0, 1e-3, 500.0])
    message = r"30 steps were not enough in batch rows \[1, 3\]"
    with pytest.raises(SolverError, match=message) as caught:
        solve(Logistic(rate), f64(4, 1, value=0.3), max_steps=30)
    assert caught.value.rows == (1, 3)
    solution = solve(Logistic(rate), f64(4, 1, value=0.3), max_steps=30, on_failure="nan")
    assert solution.failed.tolist() == [False, True, False, True]
    assert (solution.accepted + solution.rejected)[1::2].tolist() == [30, 30]
    needed = int((solution.accepted + solution.rejected)[0])
    assert not bool(solve(Logistic(rate[:1]), f64(1, 1, value=0.3), max_steps=needed).failed)


def test_different_causes_are_told_apart():
    """Three steps after the start one row is out of steps, while the other one's size vanishes on NaN."""
    solve = ode._Solve(None, 0.0, 1.0, 30, False, None, 1e-5, 1e-5, None, None, None)
    values = {name: f64(3) for name in ("t", "y", "k", "barrier", "log_ratio", "accepted", "rejected", "error")}
    h, finite = torch.tensor([1e-9, 1e-15, 1e-2], dtype=torch.float64), torch.tensor([False, True, True])
    told = str(solve._failure(ode._Rows(index=torch.tensor([4, 5, 7]), h=h, finite=finite, **values)))
    assert "NaN or infinite in batch rows [4]; the step size vanished in batch rows [5]; 30 steps were" in told
    assert "not enough in batch rows [7]." in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_failure": "nans"}, "did you mean 'nan'"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"rtol": 0.0}, "rtol must be positive and finite"),
        ({"atol": math.nan}, "atol must be positive and finite"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        odeint_rows(Logistic([1.0]), (f64(1, 1),), 0.0, 1.0, **options)


# --- shapes and edges ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,)])
def test_any_event_shape_and_dtype(shape, dtype):
    y0 = (0.1 + 0.5 * torch.rand(3, *shape)).to(dtype)
    field = Logistic([1.0, 4.0, 0.0])
    nodes = torch.rand(2, 3, dtype=torch.float64)

    def checked(t, state, rows):
        assert state[0].dtype == dtype
        assert state[0].shape == (len(rows), *shape)
        return field(t, state, rows)

    solution = solve(checked, y0, tol=1e-5, nodes=nodes)
    assert solution.state[0].dtype == solution.nodes.dtype == dtype
    assert solution.state[0].shape == y0.shape
    assert solution.nodes.shape == (2, *y0.shape)
    torch.testing.assert_close(solution.state[0].double(), field.exact(y0, 0.0, 1.0), rtol=0.0, atol=1e-4)
    assert solution.error.dtype == torch.float64
    assert solution.error.shape == (3,)


def test_a_float64_field_does_not_widen_a_float32_state():
    solution = solve(lambda t, s, rows: ((t[:, None] * s[0],), None), torch.ones(2, 2), tol=1e-4, nodes=f64(1, 2))
    assert solution.state[0].dtype == solution.nodes.dtype == torch.float32
    assert float((solution.state[0] - math.exp(0.5)).abs().max()) < 1e-3


def test_several_tensors_and_an_empty_one():
    def field(t, state, rows):
        a, b, empty, c = state
        assert a.shape == (len(rows),)
        assert b.shape == (len(rows), 2, 3)
        assert empty.shape == (len(rows), 0)
        return (-a, c * b, empty, 0.0 * c), None

    state = (f64(4), f64(4, 2, 3), f64(4, 0), torch.linspace(-1.0, 1.0, 4, dtype=torch.float64)[:, None, None])
    solution = odeint_rows(field, state, 0.0, 1.0, rtol=1e-8, atol=1e-8)
    expected = (f64(4, value=math.exp(-1.0)), torch.exp(state[3]).expand(4, 2, 3), f64(4, 0), state[3])
    for part, right in zip(solution.state, expected, strict=True):
        torch.testing.assert_close(part, right, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("given", [True, False])
def test_empty_batch_and_empty_interval_cost_nothing(given):
    for batch, t1 in ((0, 1.0), (3, 0.5)):
        y0, field = torch.rand(batch, 2, 3, dtype=torch.float64), Logistic(f64(batch))
        nodes = f64(4, batch, value=0.5) if given else None
        solution = solve(field, y0, 0.5, t1, nodes=nodes)
        assert len(field.batches) == 0
        assert torch.equal(solution.state[0], y0)
        assert torch.equal(solution.nodes, y0.expand(4, *y0.shape)) if given else solution.nodes is None
        assert torch.equal(solution.error, f64(batch, value=0.0))
        for name in ("nfe", "accepted", "rejected", "failed"):
            assert torch.equal(getattr(solution, name).long(), torch.zeros(batch, dtype=torch.long))


@pytest.mark.parametrize(("t0", "t1"), DIRECTIONS)
def test_callback_follows_the_row_furthest_behind(t0, t1):
    times, field = [], Logistic([0.1, 30.0])
    solution = solve(field, f64(2, 1, value=0.5), t0, t1, callback=times.append)
    assert times[0] == t0
    assert times == sorted(times, reverse=t1 < t0)
    assert len(times) == int((solution.accepted + solution.rejected).max())
    alone = []
    solve(Logistic([30.0]), f64(1, 1, value=0.5), t0, t1, callback=alone.append)
    assert times == alone
