"""Paths by exponential multistep: exact flows, the adaptive solver's states, and the rows that fall back to it."""

import math

import pytest
import torch
from oracles import SCHEDULES, exact_flow, gaussian, mixture

import ndm_ct
from ndm_ct import NDM, SolverError, schedules
from ndm_ct.divergence import Exact, Hutchinson, Quadrature
from ndm_ct.likelihood.path import Problem


def problem(model, x, tolerance=3e-5, method="exponential", on_failure="raise"):
    cond = model.validate(x, {}, ndm_ct.loglik)
    return Problem(model, x, (model.t_min, 1.0), tolerance, tolerance, method, on_failure, False, cond)


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_becomes_the_data_of_the_exact_flow_and_comes_back(name, generator):
    """Also where alpha or sigma is zero at an end, or alpha is constant."""
    model = gaussian(SCHEDULES[name]())
    z1 = model.sample_prior(4, generator=generator, dtype=torch.float64, device=None)
    options = {"method": "exponential", "rtol": 1e-7, "atol": 1e-7}
    x = ndm_ct.decode(model, z1, **options)
    torch.testing.assert_close(x, exact_flow(model, z1), rtol=1e-4, atol=1e-4)
    scale = model.schedule.sigma(torch.ones((), dtype=torch.float64)).item()
    torch.testing.assert_close(ndm_ct.encode(model, x, **options) / scale, z1 / scale, rtol=1e-4, atol=1e-4)


def test_the_error_falls_with_the_tolerance(generator):
    """Sixteen times the tolerance are half the steps, at order 4."""
    model = gaussian(schedules.Cosine())
    x = model.sample_data(8, generator=generator)
    with model.evaluating(), torch.no_grad():
        truth = problem(model, x, 1e-11, "ode").transport().state[0]
        solved = [problem(model, x, tolerance).transport() for tolerance in (1e-6, 1e-6 / 16)]
    assert [int(each.nfe.max()) for each in solved] == [97, 191]
    errors = [float((each.state[0] - truth).abs().max()) for each in solved]
    assert errors[0] < 1e-4
    assert errors[1] < errors[0] / 8


@pytest.mark.parametrize("schedule", [schedules.LinearLogSNR(), schedules.Cosine(), schedules.VarianceExploding()])
def test_states_at_nodes_are_those_of_the_adaptive_solver(schedule, generator):
    model = gaussian(schedule)
    x = model.sample_data(4, generator=generator)
    times = model.t_min + (1.0 - model.t_min) * torch.rand(32, 4, dtype=torch.float64, generator=generator)
    times[0], times[1] = model.t_min, 1.0
    with model.evaluating(), torch.no_grad():
        nodes = problem(model, x, 1e-7).transport(times).nodes
        truth = problem(model, x, 1e-11, "ode").transport(times).nodes
    sigma = model.schedule.sigma(times)[..., None]
    assert float(((nodes - truth) / sigma).abs().max()) < 2e-4


def jump(z, t):
    """A denoiser that oscillates in rows of large values: no grid suits it."""
    return torch.where(z[:, 1:] > 0.0, torch.sin(40.0 * z), 0.5 * z)


def test_rows_that_the_grid_does_not_suit_are_solved_by_adaptive_steps():
    model = NDM(jump, (2,), schedule=schedules.LinearLogSNR(-6.0, 5.0), checks=False)
    x = torch.full((3, 2), -0.5, dtype=torch.float64)
    x[1] = 0.7
    times = torch.full((1, 3), 0.5, dtype=torch.float64)
    with model.evaluating(), torch.no_grad():
        both = problem(model, x).transport(times, in_noise_units=True)
        adaptive = problem(model, x, method="ode").transport(times, in_noise_units=True)
        alone = problem(model, x[[0, 2]]).transport(times[:, [0, 2]], in_noise_units=True)
    assert not bool(both.failed.any())
    assert both.nfe[[0, 2]].tolist() == [43, 43]
    assert int(both.nfe[1]) > int(adaptive.nfe[1])
    torch.testing.assert_close(both.state[0][1], adaptive.state[0][1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(both.nodes[:, 1], adaptive.nodes[:, 1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(both.state[0][[0, 2]], alone.state[0], rtol=1e-10, atol=1e-10)


def far_is_nan(z, t):
    return torch.where(z.abs().amax(1, keepdim=True) > 50.0, torch.full_like(z, math.nan), 0.5 * z)


def test_a_row_that_nothing_solves_is_named_or_nan():
    model = NDM(far_is_nan, (2,), checks=False)
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[2] = 60.0
    with pytest.raises(SolverError, match=r"rows \[2\]") as caught:
        ndm_ct.loglik(model, x, trace="quadrature")
    assert caught.value.rows == (2,)
    value, info = ndm_ct.loglik(model, x, trace="quadrature", on_failure="nan", return_info=True)
    assert info.failed.tolist() == [False, False, True, False]
    assert value.isnan().tolist() == [False, False, True, False]


def test_it_is_the_default_for_the_quadrature_alone(generator):
    model = gaussian(schedules.Cosine())
    x = model.sample_data(2, generator=generator)
    trace = Quadrature(nodes=2, probes=1, sweeps=4)

    def cost(**options):
        return ndm_ct.loglik(model, x, generator=0, return_info=True, **options)[1].accepted

    assert cost(trace=trace) == cost(trace=trace, method="exponential") == 42
    assert cost(trace=trace, method="ode") != 42
    assert cost(trace=Exact()) == cost(trace=Exact(), method="ode") != 42


def test_the_quadratures_errors_stay_calibrated(generator):
    model = mixture(schedules.VariancePreserving())
    x = model.sample_data(200, generator=generator)
    trace = Quadrature(nodes=4, probes=1, sweeps=8)
    value, info = ndm_ct.loglik(model, x, trace=trace, generator=1, return_info=True)
    scores = (value - model.log_prob(x)) / info.stderr
    assert 0.8 < float(scores.std()) < 1.25
    assert abs(float(scores.mean())) < 0.3


def test_a_flow_without_noise_at_its_start_takes_adaptive_steps(generator):
    """There w = z/sigma does not exist."""
    model = NDM(lambda z, t: -z, (2,), schedule=schedules.Rectified(), prediction="velocity", t_min=0.0, checks=False)
    x = torch.randn(3, 2, dtype=torch.float64, generator=generator)
    by_grid, adaptive = (ndm_ct.encode(model, x, method=method) for method in ("exponential", "ode"))
    torch.testing.assert_close(by_grid, adaptive, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("downwards", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_exact_traces_at_nodes_give_the_exact_density(name, downwards, generator):
    """Also where alpha or sigma is zero at an end; fewer products than evaluations of the adaptive solver."""
    model = gaussian(SCHEDULES[name]())
    options = {"trace": "exact", "method": "exponential", "return_info": True}
    if downwards:
        z1 = model.sample_prior(8, generator=generator, dtype=torch.float64, device=None)
        x, info = ndm_ct.decode(model, z1, rtol=1e-6, atol=1e-6, **options)
        truth = model.log_prob(x)
    else:
        x = model.sample_data(8, generator=generator)
        _, info = ndm_ct.loglik(model, x, rtol=1e-6, atol=1e-6, **options)
        truth = model.log_prob(x)
    torch.testing.assert_close(info.loglik, truth, rtol=0.0, atol=1e-3)
    assert info.row_vjps.tolist() == [34 * 6] * 8  # one exact trace is the budget's
    torch.testing.assert_close(
        info.logdet + (-1.0 if downwards else 1.0) * info.log_prior, (-1.0 if downwards else 1.0) * info.loglik
    )


def test_the_error_at_nodes_is_that_of_the_path_where_rules_agree(generator):
    """The defect of the curve, weighted with the exact score, is the error to first order."""
    model = gaussian(schedules.Cosine())
    x = model.sample_data(64, generator=generator)
    value, info = ndm_ct.loglik(model, x, method="exponential", rtol=3e-4, atol=3e-4, return_info=True)
    ratio = info.ode_error / (value - model.log_prob(x)).abs()
    assert float(ratio.quantile(0.05)) > 1.0 / 1.5
    assert float(ratio.quantile(0.95)) < 1.5


def test_the_error_at_nodes_covers_that_of_the_rules(generator):
    """A mixture's trace changes suddenly, and rows double their nodes until two rules agree."""
    model = mixture(schedules.VariancePreserving())
    x = model.sample_data(64, generator=generator)
    value, info = ndm_ct.loglik(model, x, method="exponential", return_info=True)
    error = (value - model.log_prob(x)).abs()
    assert float(error.square().mean().sqrt()) < 0.02
    assert float((error <= 3.0 * info.ode_error).double().mean()) > 0.9
    assert set(info.row_vjps.tolist()) > {34 * 8, 66 * 8}
    alone = ndm_ct.loglik(model, x[5:9], method="exponential")
    torch.testing.assert_close(alone, value[5:9], rtol=0.0, atol=1e-9)


def test_random_probes_stay_the_same_at_all_nodes(generator):
    model = gaussian(schedules.Cosine())
    x = model.sample_data(4, generator=generator)
    options = {"trace": Hutchinson(probes=4), "generator": 3, "return_info": True}
    (value, by_grid), (truth, _) = (
        ndm_ct.loglik(model, x, method=method, **options) for method in ("exponential", "ode")
    )
    torch.testing.assert_close(value, truth, rtol=0.0, atol=5e-3)
    assert by_grid.row_vjps.tolist() == [33 * 4 + 6] * 4  # the budget takes an exact trace


def test_traces_of_rows_that_the_grid_does_not_suit_are_integrated_with_the_state():
    model = NDM(jump, (2,), schedule=schedules.LinearLogSNR(-6.0, 5.0), checks=False)
    x = torch.full((3, 2), -0.5, dtype=torch.float64)
    x[1] = 0.7
    options = {"rtol": 3e-5, "atol": 3e-5, "return_info": True}
    value, info = ndm_ct.loglik(model, x, method="exponential", **options)
    adaptive, its = ndm_ct.loglik(model, x[1:2], method="ode", return_info=True)
    torch.testing.assert_close(value[1:2], adaptive, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(info.ode_error[1:2], its.ode_error, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(info.z[1:2], its.z, rtol=1e-9, atol=1e-9)
    assert int(info.row_vjps[1]) >= int(its.row_vjps[0])
    assert info.row_vjps[[0, 2]].tolist() == [34 * 2] * 2


def test_what_it_cannot_do_is_refused(generator):
    model = gaussian()
    x = model.sample_data(2, generator=generator)
    with pytest.raises(ValueError, match="keeps no graph"):
        ndm_ct.loglik(model, x, trace="quadrature", method="exponential", differentiable=True)


def test_samples_take_it_too(generator):
    model = gaussian(schedules.Cosine())
    drawn = [ndm_ct.sample(model, 3, method=method, generator=4) for method in ("exponential", "ode")]
    torch.testing.assert_close(*drawn, rtol=0.0, atol=2e-3)
    with pytest.raises(ValueError, match="steps has no effect"):
        ndm_ct.sample(model, 3, method="exponential", steps=10)
