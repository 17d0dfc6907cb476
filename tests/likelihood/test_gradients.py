"""Gradients of the likelihood against 80 fixed Runge-Kutta steps: their steps are as short as gradients need them."""

import functools
from itertools import pairwise

import pytest
import torch

import ndm_ct
from ndm_ct import nn, schedules
from ndm_ct.divergence import Exact, Quadrature
from ndm_ct.solvers import odeint, odeint_rows

ROWS, STEPS = 3, 80


@functools.cache
def example(trained, schedule=None):
    """Model and data. A new network is the exact model of N(0, I), with velocity zero whatever z and t."""
    torch.manual_seed(0)
    model = ndm_ct.NDM(nn.Preconditioned(nn.MLP(2, width=16)), (2,), schedule=schedule).double()
    generator = torch.Generator().manual_seed(1)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(trained):
        optimiser.zero_grad()
        ndm_ct.loss(model, rows(64, generator), generator=generator).mean().backward()
        optimiser.step()
    return model, rows(ROWS, torch.Generator().manual_seed(2))


def rows(count, generator):
    sign = torch.randint(0, 2, (count, 1), generator=generator, dtype=torch.float64) * 2.0 - 1.0
    return sign + 0.3 * torch.randn(count, 2, generator=generator, dtype=torch.float64)


def gradient(model, value):
    found = torch.autograd.grad(value.sum(), list(model.parameters()), allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, model.parameters(), strict=True)]
    )


@functools.cache
def reference(trained):
    model, x = example(trained)
    flow, bound = model.flow(x.dtype), Exact().bind(x, None)

    def field(t, z):
        part, divergence, _ = bound.with_byproduct(flow.network_part(t), z)
        return flow.assemble(t, z, part), flow.linear_divergence(t, (2,)) + divergence[:, 0]

    times = torch.linspace(model.t_min, 1.0, STEPS + 1, dtype=torch.float64)
    z, logdet = x, torch.zeros(ROWS, dtype=torch.float64)
    with model.evaluating():
        for t, end in pairwise(times):
            h = end - t
            k1 = field(t, z)
            k2 = field(t + h / 2, z + h / 2 * k1[0])
            k3 = field(t + h / 2, z + h / 2 * k2[0])
            k4 = field(end, z + h * k3[0])
            dz, change = (a + 2 * b + 2 * c + d for a, b, c, d in zip(k1, k2, k3, k4, strict=True))
            z, logdet = z + h / 6 * dz, logdet + h / 6 * change
    return gradient(model, model.log_prior(z) + logdet)


def relative_error(model, value, truth):
    return float((gradient(model, value) - truth).norm() / truth.norm())


@pytest.mark.parametrize("trained", [0, 150])
@pytest.mark.parametrize(
    "options",
    [{"method": "ode"}, {"method": "dopri5"}, {"differentiable": "adjoint"}, {"method": "dopri8"}],
    ids=["ode", "dopri5", "adjoint", "dopri8"],
)
def test_gradients_are_accurate_to_a_thousandth(options, trained):
    model, x = example(trained)
    value = ndm_ct.loglik(model, x, **({"differentiable": True} | options))
    assert relative_error(model, value, reference(trained)) < 1e-3


@pytest.mark.parametrize("method", ["bosh3", pytest.param("adaptive_heun", marks=pytest.mark.slow)])
def test_methods_of_low_order_take_more_steps(method):
    model, x = example(0)
    value = ndm_ct.loglik(model, x, differentiable=True, method=method)
    assert relative_error(model, value, reference(0)) < 2e-3


def test_the_adjoint_equation_is_resolved_where_the_noise_ends():
    """Near t_min of this schedule, gradients change with log t: one step from 1/20 to it would err by 15 %."""
    model, x = example(0, schedules.VariancePreserving())
    through = gradient(model, ndm_ct.loglik(model, x, differentiable=True))
    assert relative_error(model, ndm_ct.loglik(model, x, differentiable="adjoint"), through) < 1e-3


def test_gradients_of_samples_resolve_the_end_of_the_noise():
    model, z1 = example(0, schedules.VariancePreserving())
    coarse, fine = (
        gradient(model, ndm_ct.decode(model, z1, differentiable=True, rtol=tolerance, atol=tolerance).square())
        for tolerance in (2e-6, 1e-9)
    )
    assert float((coarse - fine).norm() / fine.norm()) < 1e-3


def test_steps_cost_little_where_gradients_were_accurate():
    model, x = example(150)
    with_graph, without = (
        ndm_ct.loglik(model, x, differentiable=graph, return_info=True)[1] for graph in (True, False)
    )
    assert with_graph.nfe <= 1.3 * without.nfe


def test_gradients_by_quadrature_have_no_error_beyond_their_scatter():
    model, x = example(0)
    found = torch.stack(
        [
            gradient(model, ndm_ct.loglik(
                model, x, trace=Quadrature(nodes=32, probes=2, sweeps=2), differentiable=True, generator=seed,
            ))
            for seed in range(8)
        ]
    )  # fmt: skip
    truth = reference(0)
    along = found @ truth / truth.square().sum()
    stderr = float(along.std()) / 8**0.5
    assert stderr < 0.03
    assert abs(float(along.mean()) - 1.0) < 3.5 * stderr


@pytest.mark.parametrize("interval", [(0.0, 1.0), (1.0, 0.0)], ids=["up", "down"])
def test_no_step_spans_more_than_two_cells(interval):
    """The field is constant, so one step would do."""
    grid = torch.cat([torch.linspace(0.0, 0.1, 11), torch.linspace(0.2, 1.0, 9)]).double()
    state, seen = (torch.ones(2, 1, dtype=torch.float64),), []

    def constant(t, state, *rows):
        seen.append(t.detach().flatten()[0])
        return (torch.ones_like(state[0]),) if not rows else ((torch.ones_like(state[0]),), None)

    for solve in (odeint_rows, odeint):
        seen.clear()
        solved = solve(constant, state, *interval, grid=grid)
        assert int(solved.accepted.min()) >= 9
        assert solve(constant, state, *interval).accepted.max() < 9
        ends = torch.stack(seen).unique()
        assert float(ends.diff().max()) < 0.2
