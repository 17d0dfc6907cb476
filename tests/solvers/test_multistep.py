"""The exponential multistep solver against closed forms."""

import pytest
import torch

from ndm_ct.solvers import graded_grid, odeint_multistep


def solved(steps, nodes=None):
    r"""dw = -w tanh(s) d(e^s) has the solution exp(-∫ tanh(s) e^s ds)."""
    grid = graded_grid(0.0, 1.5, steps, torch.device("cpu"))
    start = torch.ones(1, 1, dtype=torch.float64)
    return odeint_multistep(lambda n, w, rows: -w * torch.tanh(grid[n]), start, grid, torch.exp, nodes=nodes)


def exact(s):
    """∫_0^s tanh(u) e^u du = e^s - 2 arctan e^s + π/2 - 1."""
    return torch.exp(-(s.exp() - 2.0 * s.exp().atan() + torch.pi / 2 - 1.0))


def test_its_order_is_four_with_one_evaluation_per_step():
    errors = []
    for steps in (40, 80, 160):
        solution = solved(steps)
        assert solution.nfe.tolist() == [steps + 3]
        errors.append(float((solution.state - exact(torch.tensor(1.5, dtype=torch.float64))).abs().max()))
    orders = torch.tensor(errors).log2().diff().neg()
    assert 3.5 < float(orders[0]) < 4.7
    assert 3.5 < float(orders[1]) < 4.7


def test_dense_output_is_as_good_as_the_end():
    nodes = torch.linspace(0.0, 1.5, 41, dtype=torch.float64)[:, None]
    solution = solved(40, nodes)
    error = (solution.nodes[..., 0] - exact(nodes)).abs()
    assert float(error.max()) < 1e-5
    torch.testing.assert_close(solution.nodes[-1], solution.state)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_polynomials_are_integrated_exactly_against_the_density(degree):
    """D = s^degree: from the fourth value on a corrector of four places makes no error, whatever the density."""
    grid = torch.tensor([0.0, 0.3, 0.5, 1.2, 2.0], dtype=torch.float64)
    w = torch.zeros(1, 1, dtype=torch.float64)
    values = lambda n, w, rows: (grid[n] ** degree).expand_as(w)  # noqa: E731
    whole, part = (odeint_multistep(values, w, grid[:end], torch.exp).state for end in (5, 4))
    fine = torch.linspace(1.2, 2.0, 20001, dtype=torch.float64)
    torch.testing.assert_close(
        (whole - part)[0, 0], torch.trapezoid(fine**degree * fine.exp(), fine), rtol=1e-7, atol=1e-7
    )


def test_rows_leave_when_predictor_and_corrector_differ_or_the_field_is_not_finite():
    """What they cost and what the others get does not depend on who leaves."""
    grid = graded_grid(0.0, 1.5, 20, torch.device("cpu"))
    rate = torch.tensor([1.0, 60.0, torch.nan, 1.0], dtype=torch.float64)[:, None]

    def field(n, w, rows):
        return -rate[rows] * w

    start = torch.ones(4, 1, dtype=torch.float64)
    nodes = torch.full((1, 4), 1.0, dtype=torch.float64)
    solution = odeint_multistep(field, start, grid, torch.ones_like, nodes=nodes, limit=1e-3)
    assert solution.failed.tolist() == [False, True, True, False]
    assert solution.nfe.tolist() == [23, 4, 1, 23]
    alone = odeint_multistep(lambda n, w, rows: -w, start[:1], grid, torch.ones_like, nodes=nodes[:, :1], limit=1e-3)
    torch.testing.assert_close(solution.state[[0, 3]], alone.state.expand(2, 1), rtol=0.0, atol=1e-14)
    torch.testing.assert_close(solution.nodes[:, [0, 3]], alone.nodes.expand(1, 2, 1), rtol=0.0, atol=1e-14)
