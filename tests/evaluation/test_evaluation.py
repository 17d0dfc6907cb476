"""Data-set likelihoods: exact means, calibrated errors, and the same bits however often they are interrupted."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from oracles import SCHEDULES, gaussian, rotated_covariance
from paths import TESTS

import ndm_ct
from ndm_ct import schedules
from ndm_ct.divergence import Exact, Hutchinson, Quadrature, TraceEstimator
from ndm_ct.evaluation import run as runs
from ndm_ct.evaluation import scores
from ndm_ct.evaluation.run import MINIMUM_ROWS
from ndm_ct.evaluation.scores import LARGEST_PILOT, PILOT_ROWS
from ndm_ct.nn import MLP, Preconditioned
from ndm_ct.quantisation import Quantisation
from ndm_ct.reference import Gaussian

D = 40
"""Dimensions above which the trace is sampled."""


def wide(schedule=None, d=D, **options):
    return gaussian(schedule or schedules.LinearLogSNR(-8.0, 5.0), d=d, **options)


COARSE = {"rtol": 1e-2, "atol": 1e-2}
"""Where only the book-keeping is tested."""


def evaluate(model, data, **options):
    return ndm_ct.evaluate(model, data, **({"progress": False} | options))


def compare(a, b, data, **options):
    return ndm_ct.compare(a, b, data, **({"progress": False} | options))


def residuals(model, x, result):
    """Errors of the single rows."""
    return result.values + model.log_prob(x[result.indices])


def journal(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def rms(values):
    return float(values.square().mean().sqrt())


def marginal(model, mean, cov):
    """The exact density at t_min."""
    c = model.schedule(torch.tensor(model.t_min, dtype=torch.float64))
    smoothed = c.alpha**2 * cov + c.sigma**2 * torch.eye(len(cov))
    return torch.distributions.MultivariateNormal(c.alpha * mean, smoothed)


def entropy(model):
    return float(marginal(model, torch.zeros(D, dtype=torch.float64), rotated_covariance(D)).entropy())


class Net(torch.nn.Module):
    """The exact predictor of a Gaussian, counting its calls, that breaks where it is told to."""

    def __init__(self, d=D, fuse=None, delay=0.0):
        super().__init__()
        self.exact, self.calls, self.fuse, self.delay = wide(d=d).predictor, 0, fuse, delay
        self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, z, t):
        self.calls += 1
        time.sleep(self.delay)
        if self.calls == self.fuse:
            raise KeyboardInterrupt
        return self.scale * self.exact(z, t)


def net(**options):
    return ndm_ct.NDM(Net(**options), (D,), schedule=schedules.LinearLogSNR(-8.0, 5.0), checks=False)


def interrupted(fuse, x, **options):
    """Ctrl-C at a call of the network."""
    try:
        return evaluate(net(fuse=fuse), x, **COARSE, **options)
    except KeyboardInterrupt:
        pytest.fail("the interrupt came through")


def rows(n, d=D, seed=1):
    return wide(d=d).sample_data(n, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    """Two evaluations, to the last bit; only what they cost may differ."""
    numbers = (
        [a.nll, a.stderr, a.estimator_stderr, a.nfe, a.reason, a.finished],
        [b.nll, b.stderr, b.estimator_stderr, b.nfe, b.reason, b.finished],
    )
    return numbers[0] == numbers[1] and torch.equal(a.values, b.values) and torch.equal(a.indices, b.indices)


# --------------------------------------------------------------------------------------------------- mean and errors


@pytest.mark.parametrize("name", ["LinearLogSNR", "VarianceExploding", "Cosine"])
def test_mean_and_both_errors_of_a_gaussian(name, generator):
    """Var(-log p) = d/2 for a Gaussian, and the single errors are known against the exact density."""
    model = wide(SCHEDULES[name]())
    x = model.sample_data(500, generator=generator)
    result = evaluate(model, x)
    exact = -model.log_prob(x)
    assert result.rows == 500
    assert result.reason == "data"
    assert result.finished
    assert abs(result.nll - float(exact.mean())) < 4.0 * result.estimator_stderr
    # The data are x, the density is that of z at t_min: the entropy of x to first order in the noise left.
    assert abs(result.nll - entropy(model)) < 4.0 * result.stderr + 0.05
    error = residuals(model, x, result)
    assert rms(error) > 0.1
    assert result.estimator_stderr == pytest.approx(rms(error) / math.sqrt(500), rel=0.25)
    assert result.stderr == pytest.approx(math.sqrt((D / 2 + rms(error) ** 2) / 500), rel=0.12)
    assert result.values.mean().item() == pytest.approx(result.nll, rel=1e-12)
    assert result.values.dtype == torch.float64
    assert (result.bits_per_dim, result.bits_stderr) == (None, None)


def test_both_errors_are_calibrated():
    """Over fresh data and seeds the misses in units of their standard errors are standard normal."""
    model = wide()
    truth, scores = entropy(model), []
    for seed in range(30):
        x = rows(40, seed=100 + seed)
        result = evaluate(model, x, seed=seed, rtol=1e-3, atol=1e-3)
        exact = float(-model.log_prob(x).mean())
        scores.append([(result.nll - truth) / result.stderr, (result.nll - exact) / result.estimator_stderr])
    spread = torch.tensor(scores).square().mean(0).sqrt()
    assert 0.7 < float(spread[0]) < 1.35
    assert 0.7 < float(spread[1]) < 1.35


@pytest.mark.parametrize(
    ("trace", "tolerance"),
    [
        (Quadrature(nodes=4, probes=1, sweeps=2), 0.25),
        (Quadrature(nodes=4, probes=1, sweeps=4), 0.2),
        (Hutchinson(2), 0.2),
        (Hutchinson(1), 0.3),
    ],
    ids=["few sweeps", "sweeps", "probes", "one probe"],
)
def test_the_estimators_part_is_measured_whatever_the_trace(trace, tolerance):
    """By more sweeps, by the rows' own errors, or by scoring the pilot twice; the widening of few sweeps is undone."""
    model, x = wide(), rows(192)
    result = evaluate(model, x, trace=trace, rtol=1e-4, atol=1e-4)
    rest = residuals(model, x, result)
    assert result.estimator_stderr == pytest.approx(rms(rest) / math.sqrt(192), rel=tolerance)
    assert abs(float(rest.mean())) < 4.0 * result.estimator_stderr


def test_the_exact_trace_leaves_only_the_data():
    model, x = wide(d=3), rows(60, d=3)
    for trace in (None, "auto", "exact"):
        result = evaluate(model, x, trace=trace, max_rows=40)
        assert result.estimator_stderr == 0.0
        assert rms(residuals(model, x, result)) < 1e-3
        assert result.stderr == pytest.approx(float(result.values.std()) / math.sqrt(40))


def test_the_pilot_stands_for_the_other_rows(tmp_path):
    """Five sweeps have a fifth of the variance of one."""
    result = evaluate(wide(), rows(50), run_dir=tmp_path, **COARSE)
    pilot, others = (np.array(line["variance"][0], dtype=float) for line in journal(tmp_path)[1:])
    assert len(pilot) == PILOT_ROWS
    assert np.isnan(others).all()
    expected = pilot.sum() + 18 * 5.0 * pilot.mean()
    assert result.estimator_stderr == pytest.approx(math.sqrt(expected) / 50.0)


@dataclass(frozen=True)
class HeavyTailed(TraceEstimator):
    """Sweeps that scatter by 0.1 nats around the exact trace, and by 30 times as much in rows beyond 10."""

    sweeps: int = 1

    def with_sweeps(self, sweeps):
        return HeavyTailed(sweeps)

    def logdet(self, path, generator):
        exact = Exact().logdet(path, generator)
        noise = torch.stack([torch.randn(self.sweeps, generator=each, dtype=torch.float64) for each in generator])
        noise = noise * torch.where(path.start[:, :1] > 10.0, 3.0, 0.1)
        variance = noise.var(1) / self.sweeps if self.sweeps > 1 else torch.full_like(exact.value, math.nan)
        return replace(exact, value=exact.value + noise.mean(1), variance=variance)


def with_heavy_row(n):
    """Rows of which the first is estimated badly."""
    x = rows(n, d=2)
    x[0, 0] = 11.0
    return x


def test_a_row_of_large_variance_is_not_taken_for_others(tmp_path):
    """The pilot grows to all 48 rows, and every row has its own variance. Five sweeps have a fifth of that of one."""
    x, ratios = with_heavy_row(48), []
    truth = math.sqrt((3.0**2 + 47 * 0.1**2) / 5.0) / 48
    for seed in range(8):
        result = evaluate(wide(d=2), x, trace=HeavyTailed(), seed=seed, run_dir=tmp_path / str(seed), **COARSE)
        known = [v for line in journal(tmp_path / str(seed))[1:] for v in line["variance"][0] if v is not None]
        if 0 not in result.indices[:PILOT_ROWS]:
            assert len(known) == PILOT_ROWS
            continue
        variance = torch.tensor(known, dtype=torch.float64)
        assert result.estimator_stderr == pytest.approx(float(variance.sum().sqrt()) / 48)
        error = float(variance.std() / variance.mean()) / math.sqrt(48)
        assert result.estimator_uncertainty == pytest.approx(0.5 * error * result.estimator_stderr)
        assert abs(result.estimator_stderr - truth) < 3.0 * result.estimator_uncertainty
        assert f", itself uncertain by ± {result.estimator_uncertainty:.2g} because few rows make it up" in str(result)
        ratios.append(result.estimator_stderr / truth)
    assert len(ratios) >= 4
    assert 0.6 < rms(torch.tensor(ratios)) < 1.4


def test_the_size_of_a_growing_pilot_depends_on_the_rows_alone(tmp_path):
    x, options = with_heavy_row(400), {"trace": HeavyTailed()} | COARSE
    seed = next(k for k in range(100) if 0 in evaluate(wide(d=2), x, max_rows=20, seed=k, **options).indices)
    whole = evaluate(wide(d=2), x, seed=seed, run_dir=tmp_path / "whole", **options)
    lines = journal(tmp_path / "whole")[1:]
    assert sum(v is not None for line in lines for v in line["variance"][0]) == LARGEST_PILOT
    folder = tmp_path / "parts"
    for limit in (20, 45, 100, 270, None):
        parts = evaluate(wide(d=2), x, seed=seed, run_dir=folder, max_rows=limit, batch_size=24, **options)
    torch.testing.assert_close(parts.values, whole.values, atol=1e-9, rtol=0.0)
    assert parts.estimator_stderr == pytest.approx(whole.estimator_stderr)


def test_a_part_above_the_total_is_said_to_be():
    result = evaluate(wide(d=2), rows(40, d=2), trace=HeavyTailed(), **COARSE)
    assert result.estimator_uncertainty < 0.25 * result.estimator_stderr
    assert str(result).endswith(f"estimator's part ± {result.estimator_stderr:.2g}; 40 rows, all data")
    above = replace(result, estimator_stderr=2.0 * result.stderr)
    assert f"part ± {2.0 * result.stderr:.2g}, above the total: few rows determine both; 40 rows" in str(above)


def test_no_randomness_is_used_twice(monkeypatch, generator):
    seeds, derive = [], scores.derive_seeds
    for module in (runs, scores):
        monkeypatch.setattr(module, "derive_seeds", lambda *words: seeds.extend(derive(*words)) or seeds[-1:])
    evaluate(quantised("uniform"), levels(90, generator), quantisation=BINS, **COARSE)
    # Order, then noise and probes of every row: of the pilot, of its second score and of the other batch.
    assert len(set(seeds)) == len(seeds) == 1 + 2 * (32 + 32 + 58)


def test_the_pilot_costs_are_counted(generator):
    model, k, options = quantised("uniform"), levels(20, generator), {"quantisation": BINS} | COARSE
    once, twice = (compare(model, model, k, **options), evaluate(model, k, **options))
    assert once.nfe_a == once.nfe_b > 20.0
    assert twice.nfe == pytest.approx(2.0 * once.nfe_a, rel=0.1)


def test_equal_rows_get_independent_errors():
    """Batches have randomness of their own: no value occurs twice, and none is that of another seed."""
    x = rows(1).expand(150, D)
    one, other = (evaluate(wide(), x, seed=seed, **COARSE).values for seed in (0, 1))
    assert len(torch.cat([one, other]).unique()) == 300
    assert torch.equal(one, evaluate(wide(), x, seed=0, **COARSE).values)


def test_one_row_and_no_error():
    result = evaluate(wide(), rows(1))
    assert result.rows == 1
    assert math.isfinite(result.nll)
    assert math.isnan(result.stderr)
    assert result.estimator_stderr > 0.0


def test_the_bound_of_the_elbo():
    """Above the negative log-likelihood, with the errors of two draws per row, against many draws."""
    model, x = wide(d=6), rows(400, d=6)
    result = evaluate(model, x, bound="elbo")
    many, info = ndm_ct.elbo(model, x, samples=512, return_info=True)
    exact = float(-many.mean())
    error = math.hypot(result.estimator_stderr, float(info.stderr.square().mean().sqrt()) / 20.0)
    assert abs(result.nll - exact) < 4.0 * error
    rest = result.values + many[result.indices]
    assert result.estimator_stderr == pytest.approx(rms(rest) / 20.0, rel=0.25)
    assert result.nfe == 2.0


def test_more_samples_of_the_elbo():
    """The estimator's part falls with their number; the bound is the same."""
    model, x = wide(d=6), rows(200, d=6)
    few, many = (evaluate(model, x, bound="elbo", samples=samples) for samples in (4, 256))
    assert many.nfe == 256
    assert 4.0 < few.estimator_stderr / many.estimator_stderr < 16.0
    assert abs(few.nll - many.nll) < 4.0 * math.hypot(few.estimator_stderr, many.estimator_stderr)


# ------------------------------------------------------------------------------------------------------ integer data

LEVELS, STD = 17, torch.tensor([0.5, 0.3, 0.4, 0.2], dtype=torch.float64)
BINS = Quantisation(LEVELS)


def levels(n, generator):
    x = STD * torch.randn(n, 4, dtype=torch.float64, generator=generator)
    return ((x + 1.0) * LEVELS / 2.0).floor().clamp(0, LEVELS - 1).to(torch.uint8)


def discretised(k, dequantisation, model, scale=1.0):
    """The bound of each row in closed form: both noises are symmetric, so only their variances enter."""
    centre, h = BINS.centres(k, torch.float64), BINS.half_width
    at_start = model.schedule(torch.tensor(model.t_min, dtype=torch.float64))
    alpha, sigma = float(at_start.alpha), float(at_start.sigma)
    variance = scale * (alpha * STD) ** 2 + sigma**2
    if dequantisation == "uniform":
        mean, noise, entropy = centre, h**2 / 3.0, math.log(2.0 * h)
    else:
        tau = h * alpha / sigma
        mass, density = math.erf(tau / math.sqrt(2.0)), math.exp(-0.5 * tau**2) / math.sqrt(2.0 * math.pi)
        mean, noise = alpha * centre, sigma**2 * (1.0 - 2.0 * tau * density / mass)
        entropy = 0.5 * math.log(2.0 * math.pi * math.e * sigma**2) + math.log(mass) - tau * density / mass
    cross = 0.5 * (2.0 * math.pi * variance).log() + 0.5 * (mean**2 + noise) / variance
    return (cross - entropy).sum(1)


def quantised(dequantisation, scale=1.0):
    """A Gaussian at the noise its dequantisation is meant for."""
    gamma = -2.0 * math.log(3.02 * LEVELS) if dequantisation == "process" else -12.0
    cov = torch.diag(scale * STD**2)
    return Gaussian(torch.zeros(4), cov, schedule=schedules.LinearLogSNR(gamma - math.log(scale), 5.0))


@pytest.mark.parametrize(
    ("dequantisation", "trace"),
    [("uniform", {"rtol": 3e-3, "atol": 3e-3}), ("process", {"trace": Quadrature(8, probes=1, sweeps=1)})],
)
def test_integer_data_have_the_bound_of_their_bins(dequantisation, trace, generator):
    """And their pilot, scored twice, measures noise and trace together."""
    model, k = quantised(dequantisation), levels(64, generator)
    exact = discretised(k, dequantisation, model)
    options = {"dequantisation": dequantisation} | trace
    results = [evaluate(model, k, quantisation=BINS, seed=seed, **options) for seed in range(6)]
    errors = torch.stack([result.values - exact[result.indices] for result in results])
    pilot, others = (rms(errors[:, part]) for part in (slice(PILOT_ROWS), slice(PILOT_ROWS, None)))
    assert 0.05 < pilot == pytest.approx(others / math.sqrt(2.0), rel=0.2)
    assert abs(float(errors.mean())) < 4.0 * others / math.sqrt(errors.numel()) + 1e-3
    predicted = torch.tensor([result.estimator_stderr for result in results])
    assert rms(predicted) == pytest.approx(math.sqrt((pilot**2 + others**2) / 2.0 / 64.0), rel=0.15)
    result = results[0]
    assert result.stderr == pytest.approx(float(result.values.std()) / 8.0)
    assert result.bits_per_dim == pytest.approx(result.nll / 4.0 / math.log(2.0))
    assert result.bits_stderr == pytest.approx(result.stderr / 4.0 / math.log(2.0))
    bits = ndm_ct.bits_per_dim(model, k, quantisation=LEVELS, **options)
    error = math.sqrt(3.0) * result.estimator_stderr / 4.0 / math.log(2.0)
    assert abs(result.bits_per_dim - float(bits.mean())) < 4.0 * error


def test_integer_data_under_the_elbo(generator):
    model = Gaussian(torch.zeros(4), torch.diag(STD**2), schedule=schedules.LinearLogSNR(-8.0, 5.0))
    k = levels(300, generator)
    result = evaluate(model, k, quantisation=BINS, bound="elbo")
    bits = ndm_ct.bits_per_dim(model, k, quantisation=LEVELS, bound="elbo", samples=128)
    error = result.estimator_stderr / 4.0 / math.log(2.0)
    assert abs(result.bits_per_dim - float(bits.mean())) < 4.0 * error


# --------------------------------------------------------------------------------------------------- order and limits


def test_rows_come_in_random_order_and_once():
    x = rows(300)
    result = evaluate(wide(), x, **COARSE)
    assert torch.equal(result.indices.sort().values, torch.arange(300))
    # A random order of 0 ... 299: the first half's mean is 149.5 with a standard deviation of 5.
    assert abs(float(result.indices[:150].double().mean()) - 149.5) < 20.0
    assert not torch.equal(result.indices, evaluate(wide(), x, seed=1, **COARSE).indices)
    assert torch.equal(result.indices[:90], evaluate(wide(), x, max_rows=90, batch_size=50, **COARSE).indices)


def test_stops_at_the_target_and_not_before():
    x = rows(1000)
    result = evaluate(wide(), x, stderr=0.25, **COARSE)
    assert result.reason == "target"
    assert result.finished
    assert result.stderr <= 0.25
    assert MINIMUM_ROWS < result.rows < 1000
    assert float(result.values[:-64].std()) / math.sqrt(result.rows - 64) > 0.25


def test_a_lucky_first_batch_does_not_stop():
    """The first 32 + 4 x 64 rows are the first at or beyond the minimum."""
    result = evaluate(wide(), rows(1000), stderr=100.0, **COARSE)
    assert result.rows == PILOT_ROWS + 256
    assert result.reason == "target"
    few = evaluate(wide(), rows(100), stderr=100.0, **COARSE)
    assert (few.rows, few.reason) == (100, "data")


def test_max_rows_cuts_a_batch():
    result = evaluate(wide(), rows(200), max_rows=45, **COARSE)
    assert (result.rows, result.reason, result.finished) == (45, "max_rows", True)
    assert evaluate(wide(), rows(45), max_rows=45, **COARSE).reason == "data"
    small = evaluate(wide(), rows(50), batch_size=7, rtol=1e-3, atol=1e-3)
    assert small.rows == 50
    assert small.estimator_stderr == pytest.approx(rms(residuals(wide(), rows(50), small)) / math.sqrt(50), rel=0.4)


def test_time_limit_scores_one_batch_at_least():
    result = evaluate(wide(), rows(200), time_limit=1e-6, **COARSE)
    assert (result.rows, result.reason, result.finished) == (32, "time", False)


def test_ctrl_c_returns_what_is_finished():
    model = net()
    whole = evaluate(model, rows(200), **COARSE)
    result = interrupted(model.predictor.calls // 2, rows(200))
    assert (result.reason, result.finished) == ("interrupted", False)
    assert 0 < result.rows < 200
    assert torch.equal(result.values, whole.values[: result.rows])
    with pytest.raises(KeyboardInterrupt):
        evaluate(net(fuse=5), rows(200))


# ------------------------------------------------------------------------------------------------------------- inputs


def test_data_of_every_kind_have_the_same_values():
    torch.manual_seed(0)
    model = ndm_ct.NDM(Preconditioned(MLP(2, width=8, depth=1)), event_shape=(2,))
    data = rows(20, d=2).float()

    class Items(torch.utils.data.Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, i):
            return data[i]

    model.train()
    state = torch.get_rng_state()
    results = [evaluate(model, each, rtol=1e-3, atol=1e-3) for each in (data, data.double().numpy(), Items())]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(same(results[0], other) for other in results[1:])
    value = ndm_ct.loglik(model, data[results[0].indices], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(results[0].values, -value.double())


def test_a_model_without_weights_takes_the_precision_of_the_data():
    model, x = wide(d=2), rows(8, d=2)
    for data in (x, x.numpy(), x.float(), x.float().numpy()):
        result = evaluate(model, data)
        exact = -model.log_prob(torch.as_tensor(data)[result.indices])
        torch.testing.assert_close(result.values, exact.double(), rtol=0.0, atol=1e-3)


def test_conditioning_rows_follow_their_data(generator):
    def predictor(z, t, *, label):
        return torch.tanh(z) * label[:, None]

    model = ndm_ct.NDM(predictor, (2,), schedule=schedules.LinearLogSNR(-4.0, 5.0))
    label = torch.linspace(0.1, 1.0, 50, dtype=torch.float64)
    x = torch.randn(50, 2, dtype=torch.float64, generator=generator)
    options = {"rtol": 1e-4, "atol": 1e-4}
    result = evaluate(model, x, cond={"label": label}, max_rows=30, batch_size=20, **options)
    value = ndm_ct.loglik(model, x[result.indices], label=label[result.indices], **options)
    torch.testing.assert_close(result.values, -value)
    assert float((ndm_ct.loglik(model, x, label=label.flip(0), **options)[result.indices] - value).abs().max()) > 0.1


class Bad(Net):
    """NaN for rows that start far away."""

    def forward(self, z, t):
        return torch.where(z[:, :1] > 500.0, torch.nan, 1.0) * super().forward(z, t)


def bad():
    return ndm_ct.NDM(Bad(), (D,), schedule=schedules.LinearLogSNR(-8.0, 5.0))


def test_failed_rows_are_left_out_and_named():
    x = rows(90)
    whole = evaluate(net(), x)
    x[[5, 60]] = 1000.0
    result = evaluate(bad(), x, on_failure="nan")
    assert (result.rows, result.failed, sorted(result.failed_rows)) == (88, 2, [5, 60])
    assert not {5, 60} & set(result.indices.tolist())
    kept = torch.tensor([i not in (5, 60) for i in whole.indices.tolist()])
    torch.testing.assert_close(result.values, whole.values[kept])
    assert result.nll == pytest.approx(float(result.values.mean()))
    assert result.stderr == pytest.approx(float(result.values.std()) / math.sqrt(88))
    assert result.estimator_stderr > 0.0
    assert "88 rows, 2 failed" in str(result)
    with pytest.raises(ndm_ct.SolverError, match=r"In data these are rows \[(5|60)\]") as caught:
        evaluate(bad(), x)
    assert set(caught.value.rows) <= {5, 60}
    paired = compare(net(), bad(), x, on_failure="nan")
    assert (paired.rows, paired.failed, sorted(paired.failed_rows)) == (88, 2, [5, 60])
    assert abs(paired.difference) < 1e-9


def test_all_rows_failed():
    x = torch.full((3, D), 1000.0, dtype=torch.float64)
    result = evaluate(bad(), x, on_failure="nan", trace="hutchinson")
    assert (result.rows, result.failed) == (0, 3)
    assert math.isnan(result.nll)
    assert math.isnan(result.stderr)
    assert math.isnan(result.estimator_stderr)


# ------------------------------------------------------------------------------------------------------------ compare


def pair(shift=0.05, scale=1.1):
    """Two Gaussians and KL(a || b)."""
    generator = torch.Generator().manual_seed(8)
    mean, cov = torch.randn(D, dtype=torch.float64, generator=generator), rotated_covariance(D)
    parameters = (mean, cov), (mean + shift, scale * cov)
    a, b = (Gaussian(*each, schedule=schedules.LinearLogSNR(-8.0, 5.0)) for each in parameters)
    exact = [marginal(model, *each) for model, each in zip((a, b), parameters, strict=True)]
    return a, b, float(torch.distributions.kl_divergence(*exact))


def test_the_difference_of_two_gaussians_is_their_divergence():
    """And its sign says which is worse; common random numbers save most of the variance."""
    a, b, divergence = pair()
    x = rows(600)
    result = compare(a, b, x, max_rows=400)
    assert -result.difference > 4.0 * result.stderr
    assert abs(-result.difference - divergence) < 4.0 * result.stderr + 0.01
    difference = result.values_a - result.values_b
    exact = (b.log_prob(x) - a.log_prob(x))[result.indices]
    assert result.difference == pytest.approx(float(difference.mean()))
    assert result.stderr == pytest.approx(float(difference.std()) / 20.0)
    for values, nll, stderr, model in (
        (result.values_a, result.nll_a, result.stderr_a, a),
        (result.values_b, result.nll_b, result.stderr_b, b),
    ):
        assert nll == pytest.approx(float(values.mean()))
        assert stderr == pytest.approx(float(values.std()) / 20.0)
        assert abs(nll + float(model.log_prob(x).mean())) < 4.0 * stderr
    assert result.correlation == pytest.approx(np.corrcoef(result.values_a, result.values_b)[0, 1])
    variances = [float(v.var()) for v in (difference, result.values_a, result.values_b)]
    assert result.variance_reduction == pytest.approx(1.0 - variances[0] / (variances[1] + variances[2]))
    assert result.variance_reduction > 0.9
    # Nodes and probes are shared: the errors of the estimates cancel, too.
    own = evaluate(b, x, seed=1, max_rows=400)
    alone = rms(residuals(b, x, own))
    assert rms(difference - exact) < 0.3 * alone
    swapped = compare(b, a, x, max_rows=400)
    assert swapped.difference == -result.difference
    assert swapped.stderr == result.stderr


@pytest.mark.parametrize("dequantisation", ["uniform", "process"])
def test_dequantisation_noise_is_shared(dequantisation, generator):
    """Two models of different widths, and of different noise at t_min, see the same places in the bins."""
    a, b = quantised(dequantisation), quantised(dequantisation, scale=1.2)
    k = levels(200, generator)
    options = {"quantisation": BINS, "dequantisation": dequantisation, "rtol": 1e-4, "atol": 1e-4, "batch_size": 200}
    paired = compare(a, b, k, **options)
    exact_a, exact_b = discretised(k, dequantisation, a), discretised(k, dequantisation, b, scale=1.2)
    error_a, error_b = paired.values_a - exact_a[paired.indices], paired.values_b - exact_b[paired.indices]
    assert abs(float(error_a.mean())) < 4.0 * rms(error_a) / math.sqrt(200) + 1e-3
    assert abs(float(error_b.mean())) < 4.0 * rms(error_b) / math.sqrt(200) + 1e-3
    assert rms(error_a - error_b) < 0.4 * rms(error_b)
    assert paired.bits_per_dim == pytest.approx(paired.difference / 4.0 / math.log(2.0))
    assert paired.bits_stderr == pytest.approx(paired.stderr / 4.0 / math.log(2.0))


@pytest.mark.slow
def test_errors_of_differences_are_calibrated_on_few_rows():
    """250 rows, a sweep of four nodes each: the difference in units of its error, over 200 data sets (a minute)."""
    d = 48
    basis = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]
    a, b = (
        Gaussian(torch.full((d,), mean), (basis * torch.linspace(0.2, top, d).double()) @ basis.T)
        for mean, top in ((0.0, 2.0), (0.1, 2.4))
    )
    every = a.sample_data(200_000, generator=torch.Generator().manual_seed(1))
    truth = float((b.log_prob(every) - a.log_prob(every)).mean())
    z = []
    for repeat in range(200):
        x = a.sample_data(250, generator=torch.Generator().manual_seed(100 + repeat)).float()
        found = compare(a, b, x, seed=repeat, progress=False, batch_size=250)
        z.append((found.difference - truth) / found.stderr)
    assert 0.85 < float(torch.tensor(z).std()) < 1.15
    assert abs(float(torch.tensor(z).mean())) < 0.25


def test_compare_stops_at_the_target_of_the_difference(tmp_path):
    a, b, _ = pair()
    x = rows(1000)
    result = compare(a, b, x, stderr=0.05, run_dir=tmp_path, **COARSE)
    assert result.reason == "target"
    assert result.stderr <= 0.05 < result.stderr_a
    assert MINIMUM_ROWS <= result.rows < 1000
    again = compare(a, b, x, stderr=0.05, run_dir=tmp_path, **COARSE)
    assert torch.equal(again.values_b, result.values_b)
    assert torch.equal(again.values_a, result.values_a)
    assert {len(line["rows"]) for line in journal(tmp_path)[1:]} == {64}
    assert json.loads((tmp_path / "comparison.json").read_text())["difference"] == result.difference
    with pytest.raises(ValueError, match="other settings: kind was 'comparison', now 'evaluation'"):
        evaluate(a, x, run_dir=tmp_path)


def test_compare_needs_models_that_can_share_random_numbers():
    x = rows(10)
    with pytest.raises(ValueError, match="model_a and model_b differ in data_shape"):
        compare(wide(), wide(d=3), x)
    single = net()
    single.predictor.float()
    with pytest.raises(ValueError, match=r"differ in dtype: torch.float64 and torch.float32"):
        compare(net(), single, x)
    with pytest.raises(TypeError, match="model_b must be an"):
        compare(wide(), 3, x)


# ----------------------------------------------------------------------------------------------------------- resuming


def test_interrupted_and_resumed_is_bit_identical(tmp_path):
    x, model = rows(250), net()
    whole = evaluate(model, x, **COARSE, run_dir=tmp_path / "whole")
    folder, calls = tmp_path / "parts", model.predictor.calls
    first = interrupted(calls // 2, x, run_dir=folder)
    assert first.reason == "interrupted"
    assert json.loads((folder / "evaluation.json").read_text())["finished"] is False
    second = evaluate(net(), x, **COARSE, run_dir=folder, max_rows=first.rows + 64)
    assert (second.rows, second.reason) == (first.rows + 64, "max_rows")
    third = evaluate(net(), x, **COARSE, run_dir=folder, time_limit=1e-6)
    assert third.rows == second.rows + 64 or third.rows == 250
    model = net()
    assert same(evaluate(model, x, **COARSE, run_dir=folder), whole)
    assert model.predictor.calls < calls / 2
    assert sorted(i for line in journal(folder)[1:] for i in line["rows"]) == list(range(250))
    assert [line["nll"] for line in journal(folder)[1:]] == [line["nll"] for line in journal(tmp_path / "whole")[1:]]


def test_a_finished_evaluation_costs_nothing_and_can_be_continued(tmp_path):
    x, model = rows(400), net()
    result = evaluate(model, x, **COARSE, run_dir=tmp_path, stderr=10.0)
    again = net()
    assert same(evaluate(again, x, **COARSE, run_dir=tmp_path, stderr=10.0), result)
    assert again.predictor.calls == 0
    more = evaluate(net(), x, **COARSE, run_dir=tmp_path)
    assert (more.rows, more.reason) == (400, "data")
    assert torch.equal(more.values[: result.rows], result.values)
    assert torch.equal(more.values, evaluate(net(), x, **COARSE).values)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "evaluation.json", "rows.jsonl"]
    summary = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail)
    for name in ("nll", "stderr", "estimator_stderr", "rows", "reason", "nfe", "bits_per_dim"):
        assert summary[name] == getattr(more, name)


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
sys.path[:0] = {paths!r}
from test_evaluation import COARSE, evaluate, net, rows
evaluate(net(delay=0.002), rows(96), **COARSE, run_dir=sys.argv[1], batch_size=16)
"""


def test_killed_and_resumed_is_bit_identical(tmp_path):
    folder, script = tmp_path / "killed", tmp_path / "run.py"
    paths = [os.path.dirname(__file__), str(TESTS), os.path.dirname(os.path.dirname(ndm_ct.__file__))]
    script.write_text(textwrap.dedent(SCRIPT.format(paths=paths)))
    log, generator = folder / "rows.jsonl", np.random.default_rng(os.getpid())
    process = subprocess.Popen([sys.executable, str(script), str(folder)])
    deadline = time.monotonic() + 40.0
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_bytes().count(b"\n") > 2:
            with pytest.raises(BlockingIOError, match=r"killed' is in use by another process"):
                evaluate(net(), rows(96), **COARSE, run_dir=folder, batch_size=16)
            time.sleep(generator.uniform(0.0, 0.2))
            break
        time.sleep(0.002)
    killed = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert killed
    with log.open("a") as file:
        file.write('{"start": 32, "rows": [1, 2')
    (folder / f".rows.jsonl.{uuid.uuid4().hex}.tmp").write_bytes(b"half")
    done = log.read_bytes().count(b"\n") - 1
    assert 0 < done < 6
    result = evaluate(net(), rows(96), **COARSE, run_dir=folder, batch_size=16)
    assert same(result, evaluate(net(), rows(96), **COARSE, batch_size=16))
    assert sorted(i for line in journal(folder)[1:] for i in line["rows"]) == list(range(96))
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "evaluation.json", "rows.jsonl"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace('"start"', '"strat"'), "cannot be read"),
        (lambda text: text.replace('"nll": [[', '"nll": [', 1), "cannot be read"),
        (lambda text: "\n" + text, "cannot be read"),
        (lambda text: text + text.splitlines()[1] + "\n", "does not follow"),
        (lambda text: text.replace('"rows": [', '"rows": [1, ', 1), "do not describe 1 values of each row"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "reads format 1"),
    ],
    ids=["key", "shape", "empty line", "twice", "other rows", "newer"],
)
def test_damaged_rows_are_refused(tmp_path, change, words):
    evaluate(wide(d=2), rows(6, d=2), run_dir=tmp_path, batch_size=3, **COARSE)
    log = tmp_path / "rows.jsonl"
    text = change(log.read_text())
    log.write_text(text)
    with pytest.raises(ndm_ct.CheckpointError, match=words):
        evaluate(wide(d=2), rows(6, d=2), run_dir=tmp_path, batch_size=3, **COARSE)
    assert log.read_text() == text


def test_other_settings_data_or_weights_are_refused(tmp_path):
    options = COARSE | {"run_dir": tmp_path, "max_rows": 4}
    x, y = rows(6), rows(6, seed=2)
    evaluate(net(), x, **options)
    other = net()
    other.predictor.scale.data.mul_(1.01)
    before = (tmp_path / "rows.jsonl").read_bytes()
    for model, data, changed, words in (
        (net(), x, {"batch_size": 5}, "batch_size was 64, now 5"),
        (net(), x, {"seed": 3}, "seed was 0, now 3"),
        (net(), x, {"trace": "quadrature"}, "trace was 'Quadrature"),
        (net(), x, {"rtol": 1e-3}, "rtol was 0.01, now 0.001"),
        (net(), x, {"bound": "elbo", "rtol": None, "atol": None}, "bound was 'ode', now 'elbo'"),
        (net(), y, {}, "other settings: data"),
        (net(), x[:5], {}, "other settings: data"),
        (other, x, {}, "other settings: model"),
        (net(), x, {"resume": False}, "resume=False"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate(model, data, **(options | changed))
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    assert evaluate(net(), x, **(options | {"max_rows": None})).rows == 6


# ------------------------------------------------------------------------------------------------------ what it says


def test_what_it_prints(capsys, generator):
    model = Gaussian(torch.zeros(4), torch.diag(STD**2), schedule=schedules.LinearLogSNR(-8.0, 5.0))
    result = evaluate(model, levels(20, generator), quantisation=BINS, max_rows=10, **COARSE, progress=True)
    text = str(result)
    assert text.startswith(f"NLL {result.nll:.2f} ± {result.stderr:.2f} nats per event (")
    assert "bits/dim); estimator's part ± " in text
    assert text.endswith("10 rows, max_rows was reached")
    shown = capsys.readouterr().err
    assert "10/10" in shown
    assert f"{result.nll:.2f} ± {result.stderr:.2f}" in shown
    a, b, _ = pair()
    assert str(compare(a, b, rows(5), **COARSE)).startswith("NLL a - b = ")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"model": 3}, TypeError, "model must be an ndm_ct.NDM, got int"),
        ({"data": torch.zeros(8, 2, dtype=torch.uint8)}, TypeError, "quantisation="),
        ({"data": torch.zeros(8, 3)}, ValueError, "data has shape"),
        ({"data": torch.full((8, 2), math.nan)}, ValueError, "NaN"),
        ({"data": [1, 2]}, TypeError, "Dataset"),
        ({"data": torch.zeros(0, 2)}, ValueError, "no rows"),
        ({"data": torch.full((8, 2), 9), "quantisation": Quantisation(4)}, ValueError, "outside"),
        ({"quantisation": 2.5}, TypeError, r"quantisation must be .* got float; pass quantisation=256"),
        ({"quantisation": Quantisation(4)}, TypeError, "integer levels"),
        ({"dequantisation": "process"}, ValueError, "no effect without quantisation"),
        ({"dequantisation": "centres"}, ValueError, "dequantisation='centres' is unknown"),
        ({"bound": "elob"}, ValueError, "did you mean 'elbo'"),
        ({"samples": 8}, ValueError, "samples=8 has no effect with bound='ode'"),
        ({"bound": "elbo", "samples": 1}, ValueError, "samples=1 gives no standard error"),
        ({"bound": "elbo", "trace": "exact", "on_failure": "nan"}, ValueError, "trace, on_failure has no effect"),
        ({"bound": "elbo", "rtol": 1e-3}, ValueError, "rtol has no effect with bound='elbo'"),
        ({"stderr": 0.0}, ValueError, "stderr must be a positive number of nats, got 0.0"),
        ({"time_limit": -1.0}, ValueError, "time_limit must be a positive number of seconds"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"max_rows": 2.5}, TypeError, "max_rows must be an int"),
        ({"seed": -1}, ValueError, "seed must be an int of at least 0"),
        ({"on_failure": "skip"}, ValueError, "on_failure='skip' is unknown"),
        ({"trace": "exat"}, ValueError, "did you mean 'exact'"),
        ({"trace": 3}, TypeError, "trace must be one of"),
        ({"method": "rk"}, ValueError, "method='rk' is unknown"),
        ({"cond": {"label": torch.zeros(8)}}, TypeError, "label"),
        ({"cond": {"label": torch.zeros(7)}}, ValueError, "one row for each of the 8 rows"),
    ],
)
def test_wrong_arguments_are_named(options, error, words):
    arguments = {"model": wide(d=2), "data": torch.zeros(8, 2)} | options
    with pytest.raises(error, match=words):
        evaluate(**arguments)
