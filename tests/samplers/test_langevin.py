"""Langevin samplers: Gaussian data make every step affine, so that its mean and covariance are propagated exactly."""

import itertools
import math
from functools import partial

import pytest
import torch
from oracles import SCHEDULES, TRANSFORMS, Wiggle, gaussian, mixture

import ndm_ct
from ndm_ct import NDM, schedules
from ndm_ct.samplers import DEIS, NAMES, AnnealedLangevin, PredictorCorrector, UniPC, frozen, langevin
from ndm_ct.samplers.base import Sampler
from ndm_ct.samplers.frozen import DDIM, DDPM
from ndm_ct.samplers.grids import time_grid

SMOOTH = schedules.LinearLogSNR(-5.0, 4.0)


class Still(Sampler):
    """A predictor that knows nothing: it leaves the state where it is, for no evaluation."""

    stages = 0

    def _step(self, z, t, s, generator, cond):
        return z


class Counting:
    """Calls of a predictor."""

    def __init__(self, predictor):
        self.predictor, self.calls = predictor, 0

    def __call__(self, z, t):
        self.calls += 1
        return self.predictor(z, t)


@pytest.fixture
def affine(monkeypatch):
    """Of a step with a known number of noises: offset, matrix and the noises' matrices, from one batch of states."""

    def read(sampler, t, s, noises):
        d = sampler.model.event_shape[0]
        eye, blocks = torch.eye(d, dtype=torch.float64), []
        start = torch.zeros(1 + d + noises * d, d, dtype=torch.float64)
        start[1 : 1 + d] = eye

        def prescribed(z, generator):
            noise = torch.zeros_like(start)
            k = 1 + d + len(blocks) * d
            noise[k : k + d] = eye
            blocks.append(k)
            return noise

        for module in (langevin, frozen):
            monkeypatch.setattr(module, "normal_like", prescribed)
        out = sampler.step(start, t, s)
        assert len(blocks) == noises
        return out[0], (out[1 : 1 + d] - out[0]).mT, [(out[k : k + d] - out[0]).mT for k in blocks]

    return read


@pytest.fixture
def propagate(affine):
    """Mean and covariance at t_min of a sampler that starts from the exact p_1."""

    def down(sampler, steps, noises):
        model = sampler.model
        mean, cov = marginal(model, 1.0)
        grid = time_grid(model.schedule, model.t_min, steps)
        sampler.prepare(grid)
        for k, (t, s) in enumerate(itertools.pairwise(grid.tolist())):
            offset, matrix, by_noise = affine(sampler, t, s, noises(k) if callable(noises) else noises)
            mean = offset + matrix @ mean
            cov = matrix @ cov @ matrix.mT + sum(each @ each.mT for each in by_noise)
        return mean, cov

    return down


def marginal(model, t):
    mean, factor, _ = model.marginals.components(torch.tensor([t], dtype=torch.float64))
    return mean[0, 0], factor[0, 0] @ factor[0, 0].mT


def as_moments(model):
    """The same model with the head "moments"."""
    return NDM(
        lambda z, t: model.moments(z, t.double()), model.event_shape, transform=model.transform,
        schedule=model.schedule, prediction="moments", prior=model.prior,
    )  # fmt: skip


def with_bias(S, h):
    """The stationary covariance of Langevin steps of size h at N(m, S): eigenvalues S / (1 - h / 2 S)."""
    values, vectors = torch.linalg.eigh(S)
    return vectors @ torch.diag(values / (1.0 - h / (2.0 * values))) @ vectors.mT


# --- the inner loop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("kind", ["annealed", "corrector"])
@pytest.mark.parametrize("head", ["x", "moments"])
def test_the_inner_loop_has_its_exact_stationary_law(kind, head, transform, affine):
    """Mean exact, covariance with the bias of the step size, from any start."""
    exact, inner = gaussian(SMOOTH, transform(), d=3), 60
    model = exact if head == "x" else as_moments(exact)
    if kind == "annealed":
        ratio, sampler = 0.5, AnnealedLangevin(model, inner=inner, step_ratio=0.5)
    else:
        ratio, sampler = 2.0 * 0.5**2, PredictorCorrector(model, Still, corrector_steps=inner, snr=0.5)
    t, s = 0.9, 0.85
    offset, matrix, noises = affine(sampler, t, s, inner)
    mean, S = marginal(exact, s)
    torch.testing.assert_close(matrix, torch.zeros_like(matrix), rtol=0.0, atol=1e-6)
    torch.testing.assert_close(offset, mean, rtol=0.0, atol=1e-6)
    step = ratio * float(SMOOTH.sigma(torch.tensor(s).double())) ** 2
    expected = with_bias(S, step)
    torch.testing.assert_close(sum(each @ each.mT for each in noises), expected, rtol=1e-6, atol=1e-9)
    assert float((expected - S).abs().max()) > 0.05  # the bias is not a rounding error


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_steps_carry_the_signal_to_the_next_level(transform, affine):
    """z / alpha is unchanged, or moves with F: one tiny Langevin step is that and nothing else."""
    model = gaussian(SMOOTH, transform(), d=3)
    offset, matrix, _ = affine(AnnealedLangevin(model, inner=1, step_ratio=1e-9), 0.6, 0.5, 1)
    (alpha_t, alpha_s), z = SMOOTH.alpha(torch.tensor([0.6, 0.5], dtype=torch.float64)), torch.randn(5, 3).double()
    F_t, F_s = model.frozen(z, *torch.tensor([0.6, 0.5], dtype=torch.float64))
    expected = alpha_s * (z / alpha_t + F_s - F_t)
    torch.testing.assert_close(offset + z @ matrix.mT, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["LinearLogSNR", "Rectified"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_annealed_langevin_tends_to_the_data_as_inner_steps_grow(name, transform, propagate):
    schedule = SMOOTH if name == "LinearLogSNR" else SCHEDULES[name]()
    model = gaussian(schedule, transform(), d=2, **({} if name == "LinearLogSNR" else {"t_min": 0.05}))
    mean, cov = marginal(model, model.t_min)
    errors = []
    for inner in (2, 8, 32):
        sampler = AnnealedLangevin(model, inner=inner, step_ratio=0.3)
        first = 1 if name == "Rectified" else 0  # the transition from alpha = 0 draws noise too
        own_mean, own = propagate(sampler, 16, lambda k, inner=inner, first=first: inner + (first if k == 0 else 0))
        errors.append(max(float((own - cov).norm() / cov.norm()), float((own_mean - mean).norm())))
    assert all(later < 0.5 * earlier for earlier, later in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.06, errors


@pytest.mark.parametrize(("growth", "inner"), [(1.3, 5), (1.05, 1), (4.0, 10), (1e4, 5)])
def test_the_matched_ratio_is_the_best_by_simulation_of_the_variance(growth, inner):
    def after(ratio):
        variance = growth
        for _ in range(inner):
            variance = (1.0 - ratio) ** 2 * variance + 2.0 * ratio
        return variance

    chosen = langevin.matched_ratio(growth, inner)
    best = min(after(ratio) for ratio in torch.logspace(-4, -1e-3, 2000).tolist())
    assert 1.0 < after(chosen) < best + 1e-4
    assert after(chosen) < min(after(1.3 * chosen), after(chosen / 1.3))


def test_the_matched_ratio_follows_the_grid():
    model = gaussian(SMOOTH)
    sampler = AnnealedLangevin(model, inner=3)
    t, s = sampler.level(0.6), sampler.level(0.5)
    assert sampler.ratio(t, s) == langevin.matched_ratio(math.exp(0.1 * 9.0), 3)
    assert AnnealedLangevin(model, step_ratio=0.3).ratio(t, s) == 0.3


# --- the corrector ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("name", ["LinearLogSNR", "Rectified"])
@pytest.mark.parametrize("steps", [8, 24])
def test_corrections_improve_on_the_predictor(name, transform, steps, propagate):
    """At equal steps, and the more corrections the better; all by exact propagation."""
    model = gaussian(SMOOTH if name == "LinearLogSNR" else SCHEDULES[name](), transform(), d=2)
    _, cov = marginal(model, model.t_min)
    for predictor, noises in ((DDPM, 1), (DDIM, 0)):

        def error(sampler, n):
            _, own = propagate(sampler, steps, n)
            return float((own - cov).norm() / cov.norm())

        errors = [error(predictor(model), noises)]
        for corrections in (1, 4):
            sampler = PredictorCorrector(model, predictor, corrector_steps=corrections)
            errors.append(error(sampler, noises + corrections))
        if predictor is DDPM:
            assert errors[1] < 0.97 * errors[0], errors
        assert errors[2] < errors[1], errors


def test_a_step_by_the_rows_own_norms(monkeypatch):
    """h = 2 (snr |noise| / |score|)^2 row by row; a vanishing score is held at h = sigma^2."""
    model = gaussian(SMOOTH, d=4)
    z, noise = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    z[2] = marginal(model, 0.5)[0]  # the score is zero here
    monkeypatch.setattr(langevin, "normal_like", lambda z, generator: noise)
    out = PredictorCorrector(model, Still, snr=0.2, norms="row").step(z, 0.6, 0.5)
    score = model.score(z, 0.5)
    for row in range(3):
        h = 2.0 * (0.2 * noise[row].norm() / score[row].norm()) ** 2
        h = torch.minimum(h, SMOOTH.sigma(torch.tensor(0.5).double()) ** 2)
        torch.testing.assert_close(out[row], z[row] + h * score[row] + (2.0 * h).sqrt() * noise[row])
    expected = PredictorCorrector(model, Still, snr=0.2).step(z, 0.6, 0.5)
    h = 2.0 * 0.2**2 * SMOOTH.sigma(torch.tensor(0.5).double()) ** 2
    torch.testing.assert_close(expected, z + h * score + (2.0 * h).sqrt() * noise)


def test_why_the_norms_are_the_expected_ones():
    """Steps that follow the row's score spoil the law of a few coordinates, and not that of many."""

    def variance(d, norms, n):
        model = NDM(lambda z, t: SMOOTH.alpha(t.double())[:, None] * z, (d,), schedule=SMOOTH)  # data N(0, I)
        method = partial(PredictorCorrector, norms=norms)
        x = ndm_ct.sample(
            model, n, method=method, steps=40, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
        return float(x.square().mean())

    assert variance(1, "row", 4000) > 1.8
    assert variance(1, "expected", 4000) == pytest.approx(1.0, abs=0.15)
    assert 0.9 < variance(1000, "expected", 40) < variance(1000, "row", 40) < 1.02


# --- what sample() does with them ------------------------------------------------------------------------------------

MAKES = {
    "langevin": AnnealedLangevin,
    "langevin, fixed ratio": partial(AnnealedLangevin, inner=2, step_ratio=0.2),
    "pc": PredictorCorrector,
    "pc, row norms": partial(PredictorCorrector, norms="row", corrector_steps=2),
    "pc, ddim": partial(PredictorCorrector, predictor="ddim"),
    "pc, sde": partial(PredictorCorrector, predictor="sde", corrector_steps=3),
    "pc, deis": partial(PredictorCorrector, predictor=DEIS),
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("name", ["LinearLogSNR", "Rectified"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_evaluations_are_counted_exactly(make, name, transform):
    model = mixture(SCHEDULES[name](), transform())
    model.predictor, model.checks = (counting := Counting(model.predictor)), False
    for steps in (1, 2, 5):
        counting.calls = 0
        _, info = ndm_ct.sample(model, 2, method=make, steps=steps, return_info=True)
        assert info.nfe == counting.calls == make(model).cost(steps)
        assert info.accepted == steps
    _, info = ndm_ct.sample(model, 2, method=make, nfe=33, return_info=True)
    assert info.nfe <= 33 < make(model).cost(info.accepted + 1)


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("name", ["LinearLogSNR", "Rectified"])
def test_a_row_does_not_depend_on_its_batch(make, name):
    model = mixture(SCHEDULES[name](), TRANSFORMS["moving scale"]())

    def run(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return ndm_ct.sample(model, len(seeds), method=make, steps=6, generator=generators, dtype=torch.float64)

    batch = run(range(4))
    for row in range(4):
        torch.testing.assert_close(batch[row : row + 1], run([row]), rtol=1e-9, atol=1e-9)
    assert float((batch[0] - batch[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("method", ["langevin", "pc"])
@pytest.mark.parametrize("name", ["LinearLogSNR", "Rectified", "VarianceExploding"])
def test_they_sample_a_mixture(method, name, generator):
    """Shares of well-separated modes and the variance inside them."""
    means = 3.0 * torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, -1.5]], dtype=torch.float64)
    covs = torch.eye(2, dtype=torch.float64).repeat(3, 1, 1) * torch.tensor([0.3, 0.2, 0.1]).reshape(3, 1, 1)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    model = ndm_ct.reference.GaussianMixture(weights, means, covs, schedule=SCHEDULES[name]())
    n = 1000
    x = ndm_ct.sample(model, n, method=method, steps=100, generator=generator, dtype=torch.float64, grid="logsnr")
    nearest = torch.cdist(x, means).argmin(1)
    share = torch.stack([(nearest == k).double().mean() for k in range(3)])
    assert bool(((share - weights).abs() < 4 * (weights * (1 - weights) / n).sqrt() + 0.02).all())
    spread = torch.stack([x[nearest == k].var(0).mean() for k in range(3)])
    assert bool(((spread / covs[:, 0, 0] - 1).abs() < 4 * (1 / (weights * n)).sqrt() + 0.1).all())


def test_names():
    assert NAMES["langevin"] is AnnealedLangevin
    assert NAMES["pc"] is PredictorCorrector
    assert {"langevin", "pc"} < set(ndm_ct.samplers.sample.METHODS)


def test_stochasticity_reaches_the_predictor_and_only_it():
    model = mixture(SMOOTH)
    options = {"steps": 4, "dtype": torch.float64}

    def run(method, **more):
        return ndm_ct.sample(model, 2, method=method, generator=torch.Generator().manual_seed(1), **options, **more)

    assert torch.equal(run("pc"), run("pc", stochasticity=1.0))
    assert not torch.equal(run("pc"), run("pc", stochasticity=0.5))
    for method in ("langevin", partial(PredictorCorrector, predictor="ddim")):
        with pytest.raises(ValueError, match="stochasticity has no effect"):
            run(method, stochasticity=0.5)


@pytest.mark.parametrize("make", [AnnealedLangevin, PredictorCorrector])
def test_a_score_needs_a_linear_transform_or_the_head_moments(make):
    nonlinear = NDM(lambda z, t: 0.5 * z, (1,), transform=Wiggle())
    with pytest.raises(ValueError, match=r"needs the score.*Wiggle.*Train the head 'moments'"):
        make(nonlinear)
    make(NDM(lambda z, t: (0.5 * z, 0.0 * z), (1,), transform=Wiggle(), prediction="moments"))


ERRORS = [
    (partial(AnnealedLangevin, inner=0), ValueError, "inner must be at least 1"),
    (partial(AnnealedLangevin, inner=1.5), TypeError, "inner must be an int"),
    (partial(AnnealedLangevin, step_ratio=2.0), ValueError, r"step_ratio must lie in \(0, 2\), got 2.0"),
    (partial(AnnealedLangevin, step_ratio=0.0), ValueError, r"step_ratio must lie in \(0, 2\)"),
    (partial(PredictorCorrector, predictor="ddmp"), ValueError, "predictor='ddmp' is unknown; did you mean 'ddpm'"),
    (partial(PredictorCorrector, predictor=UniPC), ValueError, "UniPC corrects its last step itself.*DPMSolverPP"),
    (partial(PredictorCorrector, predictor=lambda model: 3), TypeError, "must return a Sampler.*got int"),
    (partial(PredictorCorrector, corrector_steps=0), ValueError, "corrector_steps must be at least 1"),
    (partial(PredictorCorrector, snr=0.0), ValueError, r"snr must lie in \(0, 1\), got 0.0"),
    (partial(PredictorCorrector, snr=1.0), ValueError, r"snr must lie in \(0, 1\), got 1.0"),
    (partial(PredictorCorrector, norms="batch"), ValueError, "norms='batch' is unknown"),
]


@pytest.mark.parametrize(("make", "error", "message"), ERRORS)
def test_errors_name_the_cure(make, error, message):
    with pytest.raises(error, match=message):
        make(mixture(SMOOTH))
