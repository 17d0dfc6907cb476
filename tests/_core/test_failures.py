"""Networks that fail: for some rows, from some time on, or by being too stiff for any number of steps.

The rows and the time are named, the other rows are those of a healthy network, and the number of network evaluations
has a bound.
"""

import json
import math
from functools import partial

import pytest
import torch

import ndm_ct
from ndm_ct import NDM, PredictorError, SolverError, schedules
from ndm_ct.samplers import NAMES, adaptive

SHORT = schedules.LinearLogSNR(-6.0, 5.0)
COARSE = {"rtol": 1e-3, "atol": 1e-3}


class Net(torch.nn.Module):
    """A smooth network that fails for rows it is told to, from a time on, with a value; it counts its evaluations."""

    def __init__(self, value=math.nan, since=0.5, until=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
        self.value, self.since, self.until, self.calls = value, since, until, 0

    def forward(self, z, t, bad=None):
        self.calls += len(z)
        x = self.weight * z * (1.0 - 0.5 * t[:, None])
        if bad is None:
            return x
        return torch.where((bad & (t > self.since) & (t <= self.until))[:, None], self.value, x)


def model(*arguments, **options):
    return NDM(Net(*arguments, **options), (2,), schedule=SHORT)


X = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
BAD = torch.tensor([False, True, False, False, True, False])
GOOD = ~BAD
VALUES = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])


# ----------------------------------------------------------------------------------------------------------- some rows


@VALUES
@pytest.mark.parametrize("since", [-1.0, 0.3, 0.999])
@pytest.mark.parametrize("trace", ["exact", "quadrature", "hutchinson"])
def test_other_rows_keep_their_likelihood(value, since, trace):
    def score(bad):
        return ndm_ct.loglik(
            model(value, since), X, bad=bad, on_failure="nan", trace=trace, return_info=True,
            generator=torch.Generator().manual_seed(1), **COARSE,
        )  # fmt: skip

    (found, info), (whole, _) = score(BAD), score(torch.zeros(6, dtype=torch.bool))
    assert info.failed.tolist() == BAD.tolist()
    assert bool(found[BAD].isnan().all())
    torch.testing.assert_close(found[GOOD], whole[GOOD], rtol=0, atol=1e-9)
    with pytest.raises(SolverError, match=r"rows \[(1|4|1, 4)\]") as caught:
        ndm_ct.loglik(model(value, since), X, bad=BAD, trace=trace, **COARSE)
    assert caught.value.t == pytest.approx(max(0.0, since), abs=1e-3)
    assert set(caught.value.rows) <= {1, 4}


@VALUES
def test_likelihoods_of_rows_that_fail_near_the_data_only(value):
    """Then they fail where they begin; those of the others do not change."""
    found = ndm_ct.loglik(model(value, -1.0, 1e-3), X, bad=BAD, on_failure="nan", **COARSE)
    assert found.isnan().tolist() == BAD.tolist()


@VALUES
@pytest.mark.parametrize(
    ("method", "grid"),
    [
        *((name, {}) for name in ("ode", "dopri5", "sde", "torchsde:srk")),
        *((name, {"steps": 8}) for name in ("ode", "torchsde:heun", *sorted(NAMES.keys() - {"map"}))),
    ],
)
def test_samplers_name_rows_and_time(value, method, grid):
    """Every one of them; and no bad number is in what is returned."""
    broken = model(value, -1.0, 0.6)
    healthy = model(value, 2.0)
    if method == "ddpm_analytic":
        residuals = ndm_ct.discrete.estimate_residuals(healthy, X, times=4)
        method = partial(NAMES[method], residuals=residuals)
    with pytest.raises((PredictorError, SolverError), match=r"t=.* rows \[(1|4|1, 4)\]") as caught:
        ndm_ct.sample(broken, 6, method=method, bad=BAD, dtype=torch.float64, **grid)
    time = float(str(caught.value).split("t=")[1].split()[0].rstrip(",;:"))
    assert 0.3 < time <= 1.0
    x = ndm_ct.sample(healthy, 6, method=method, bad=BAD, dtype=torch.float64, **grid)
    assert bool(x.isfinite().all())


@VALUES
def test_evaluations_leave_out_and_name_failed_rows(value, tmp_path):
    """Also when they are continued; the mean is that of the others."""
    options = {"cond": {"bad": BAD}, "batch_size": 2, "progress": False, **COARSE}
    part = ndm_ct.evaluate(model(value), X, on_failure="nan", run_dir=tmp_path, max_rows=4, **options)
    result = ndm_ct.evaluate(model(value), X, on_failure="nan", run_dir=tmp_path, **options)
    assert set(part.failed_rows) <= {1, 4}
    assert (sorted(result.failed_rows), result.failed, result.rows) == ([1, 4], 2, 4)
    exact = -ndm_ct.loglik(model(), X, **COARSE)
    torch.testing.assert_close(result.values, exact[result.indices], rtol=0, atol=1e-9)
    assert result.nll == pytest.approx(float(exact[GOOD].mean()), abs=1e-9)
    stored = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()[1:]]
    nulls = [r for line in stored for r, value in zip(line["rows"], line["nll"][0], strict=True) if value is None]
    assert sorted(nulls) == [1, 4]
    with pytest.raises(SolverError, match=r"In data these are rows \[(1|4|1, 4|4, 1)\]"):
        ndm_ct.evaluate(model(value), X, **options)


def test_bounds_and_trainings_name_rows_and_time(tmp_path):
    for value in (math.nan, math.inf):
        with pytest.raises(PredictorError, match=r"t=.* rows \[1, 4\]"):
            ndm_ct.elbo(model(value, -1.0), X, bad=BAD)
        broken = model(value, -1.0)
        before = broken.predictor.weight.clone()
        with pytest.raises(PredictorError, match=r"at step 0: .*t=.* rows"):
            ndm_ct.fit(broken, X, cond={"bad": BAD}, steps=3, batch_size=6, progress=False)
        assert torch.equal(broken.predictor.weight, before)


def test_values_beyond_their_dtype_are_no_mean():
    """float32 ends at 3e38: a row whose density lies below is told, or left out and counted, never averaged in."""
    exact = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2), schedule=SHORT)
    x = torch.randn(5, 2)
    x[3] = 1e25
    for options in ({}, {"bound": "elbo"}):
        with pytest.raises(SolverError, match=r"not finite in rows \[3\] of data") as caught:
            ndm_ct.evaluate(exact, x, progress=False, **options)
        assert caught.value.rows == (3,)
    result = ndm_ct.evaluate(exact, x, progress=False, on_failure="nan")
    assert result.failed_rows == (3,)
    rest = torch.tensor([0, 1, 2, 4])
    assert result.nll == pytest.approx(-float(exact.log_prob(x[rest]).mean()), abs=1e-2)


def test_velocity_and_score_are_finite_or_refused():
    for function in ("velocity", "score"):
        assert bool(getattr(model(), function)(X, 0.7).isfinite().all())
        with pytest.raises(PredictorError, match=r"NaN or inf at t=0.7 in batch rows \[1, 4\]"):
            getattr(model(), function)(X, 0.7, bad=BAD)
        huge = torch.full((2, 2), 1e308, dtype=torch.float64)
        with pytest.raises(PredictorError, match=r"in batch rows \[0, 1\]"):
            getattr(NDM(lambda z, t: 10.0 * z, (2,), schedule=SHORT), function)(huge, 0.1)


# --------------------------------------------------------------------------------------------------------------- stiff


class Stiff(Net):
    """A field that no step can follow for the rows it is told to: a ripple of z far finer than its rounding."""

    def forward(self, z, t, bad=None):
        x = super().forward(z, t)
        ripple = torch.sin(1e14 * z) + torch.sin(1e15 * t[:, None])
        return x if bad is None else x + torch.where(bad[:, None], 1e4 * ripple, 0.0)


MOST = 10_000 * 6 + 2
"""Evaluations of a row that gives up: six a step, after two for the first one."""


@pytest.mark.parametrize("tolerance", [1e-12, pytest.param(1e-6, marks=pytest.mark.slow)])
def test_a_stiff_field_gives_up_in_bounded_time(tolerance):
    options = {"rtol": tolerance, "atol": tolerance, "trace": "hutchinson"}
    stiff = NDM(Stiff(), (2,), schedule=SHORT, checks=False)  # no difference resolves it
    found = ndm_ct.encode(stiff, X[:3], bad=BAD[:3], on_failure="nan", rtol=tolerance, atol=tolerance)
    assert stiff.predictor.calls <= MOST + 2 * 3000
    assert found.isnan().any(1).tolist() == [False, True, False]
    whole = ndm_ct.encode(NDM(Net(), (2,), schedule=SHORT), X[:3], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[[0, 2]], whole[[0, 2]], rtol=0, atol=1e-9)
    stiff.predictor.calls = 0
    with pytest.raises(SolverError, match=r"batch rows \[0\]") as caught:
        ndm_ct.loglik(stiff, X[:1], bad=BAD[1:2], **options)
    assert stiff.predictor.calls <= 2 * MOST
    assert caught.value.rows == (0,)
    assert 0.0 <= caught.value.t <= 1.0


def test_a_stiff_reverse_sde_gives_up_in_bounded_time():
    stiff = NDM(Stiff(), (2,), schedule=SHORT)
    with pytest.raises(SolverError, match=r"batch rows \[0\]"):
        adaptive.sample_rows(stiff, 0.0 * X[:1], rtol=1e-9, atol=1e-9, max_evaluations=500, bad=BAD[1:2])
    assert stiff.predictor.calls <= 502


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_a_stiff_field_ends_torchdiffeqs_solvers_too(method):
    stiff = NDM(Stiff(), (2,), schedule=SHORT)
    with pytest.raises(SolverError):
        ndm_ct.encode(stiff, X[:1], bad=BAD[1:2], method=method, rtol=1e-8, atol=1e-8)
    assert stiff.predictor.calls <= 2 * MOST
