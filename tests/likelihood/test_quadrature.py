"""The trace by quadrature along the path: probes that cooperate, nodes, values without bias, sweeps on demand."""

import itertools
import math

import pytest
import torch
from oracles import ALL_SCHEDULES, SCHEDULES, TRANSFORMS, ThreePoints, Wiggle, gaussian, mixture
from scipy.stats import kstest

import ndm_ct
from ndm_ct import NDM, schedules
from ndm_ct._core.conditioning import Conditioning
from ndm_ct.divergence import Quadrature, quadrature
from ndm_ct.divergence.quadrature import Sweeps, Totals, grid_bits, hadamard
from ndm_ct.likelihood.path import Problem
from ndm_ct.likelihood.quadrature import linear_logdet, path_times
from ndm_ct.reference import Gaussian

SHAPES = [(5,), (8, 8), (3, 5), (1, 8, 6), (3, 4, 4), (7,), ()]


def empty_model(event_shape, schedule=None):
    return NDM(lambda z, t: torch.zeros_like(z), event_shape, schedule=schedule or schedules.LinearLogSNR(-6, 6))


def path_of(model, x, tolerance=1e-6):
    return Problem(model, x, (model.t_min, 1.0), tolerance, tolerance, "ode", "raise", False, Conditioning({}, len(x)))


def draw(model, estimator, rows=1, seed=0):
    sweeps = rows if isinstance(rows, torch.Tensor) else torch.full((rows,), estimator.sweeps)
    path = path_of(model, torch.zeros(len(sweeps), *model.event_shape, dtype=torch.float64))
    return Sweeps.draw(path, estimator, sweeps, torch.Generator().manual_seed(seed))


def probes(sweeps):
    """All probes of every row's sweeps, float64, ``(B, S, M K, d)``, in the order of their numbers."""
    M, K, (B, S) = sweeps.estimator.nodes, sweeps.estimator.probes, sweeps.shifts.shape
    node, row = torch.meshgrid(torch.arange(S * M), torch.arange(B), indexing="ij")
    signs = sweeps._probes(node.reshape(-1), row.reshape(-1))  # (K, S M B, d)
    return signs.double().reshape(K, S, M, B, -1).permute(3, 1, 2, 0, 4).reshape(B, S, M * K, -1)


# --- probes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_place_has_its_own_code_with_the_finest_bits_first(shape):
    code = grid_bits(shape)
    assert code.shape == (math.prod(shape),)
    assert len(set(code.tolist())) == len(code)
    places = list(itertools.product(*map(range, shape)))
    finest, taken = 0, [axis for axis in reversed(range(len(shape))) if shape[axis] > 1]
    for position, axis in enumerate(taken):
        finest = finest | 1 << position
        assert [(int(c) >> position) & 1 for c in code] == [place[axis] & 1 for place in places]
    assert all((int(c) & finest == 0) == all(i % 2 == 0 for i in place) for c, place in zip(code, places, strict=True))


def test_hadamard_is_the_parity_of_the_common_bits():
    n, code = torch.arange(70)[:, None], torch.tensor([0, 1, 5, 2**40 + 3, 2**62])
    expected = [[bin(int(a) & int(c)).count("1") % 2 == 1 for c in code] for a in n]
    assert hadamard(n, code).tolist() == expected
    matrix = 1.0 - 2.0 * hadamard(torch.arange(16)[:, None], torch.arange(16)).double()
    torch.testing.assert_close(matrix @ matrix.mT, 16.0 * torch.eye(16, dtype=torch.float64))


def test_every_probe_alone_is_a_rademacher_vector():
    """By enumeration of all shifts and signs: every one of the 2^6 vectors equally often, for every node and probe."""
    model, estimator = empty_model((2, 3)), Quadrature(nodes=4, probes=2, sweeps=1)
    patterns = 8
    every = [(s, r) for s in range(patterns) for r in itertools.product([False, True], repeat=6)]
    drawn = draw(model, estimator, len(every))
    assert 0 <= int(drawn.shifts.min()) <= int(drawn.shifts.max()) == patterns - 1
    assert abs(float(drawn.shifts.double().mean()) - 3.5) < 4 * 2.3 / math.sqrt(len(every))
    assert abs(float(drawn.signs.double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(6 * len(every))
    shifts, signs = torch.tensor([s for s, _ in every])[:, None], torch.tensor([r for _, r in every])[:, None]
    values = probes(quadrature.replace(drawn, shifts=shifts, signs=signs))[:, 0]
    for number in range(8):
        vectors, counts = values[:, number].unique(dim=0, return_counts=True)
        assert len(vectors) == 64
        assert counts.tolist() == [patterns] * 64


def cancelled(event_shape, count):
    """Offsets between places whose products add up to zero over any ``count`` aligned, consecutive probes."""
    estimator = Quadrature(nodes=64, probes=1, sweeps=8)
    blocks = probes(draw(empty_model(event_shape), estimator)).unflatten(2, (-1, count))
    products = torch.einsum("bsgni,bsgnj->ijbsg", blocks, blocks)
    zero = (products == 0.0).flatten(2).all(2)
    places = torch.tensor(list(itertools.product(*map(range, event_shape))))
    return zero, (places[:, None] - places).abs()


@pytest.mark.parametrize("event_shape", [(8, 8), (1, 6, 5), (9,)], ids=str)
@pytest.mark.parametrize(("per_axis", "reach"), [(1, 1), (2, 3)])
def test_consecutive_probes_cancel_close_pairs_of_pixels(event_shape, per_axis, reach):
    """4 probes every pair at distance 1, 16 every pair closer than 4, diagonals too (2 and 4 on a line)."""
    axes = sum(size > 1 for size in event_shape)
    zero, distance = cancelled(event_shape, 2 ** (per_axis * axes))
    close = (distance.amax(2) > 0) & (distance.amax(2) <= reach)
    assert bool(zero[close].all())
    if max(event_shape) > 2 ** (per_axis + 1):
        assert not bool(zero[distance.amax(2) == 2 ** (per_axis + 1)].all())


def test_channels_have_bits_between_those_of_the_pixels():
    """With three channels, 8 probes cancel neighbours in space and in colour, 64 everything closer than 4."""
    zero, distance = cancelled((3, 8, 8), 8)
    assert bool(zero[(distance.amax(2) == 1)].all())
    zero, distance = cancelled((3, 8, 8), 64)
    assert bool(zero[(distance.amax(2) > 0) & (distance.amax(2) < 4)].all())


def test_cooperating_probes_at_least_halve_the_variance_of_independent_ones(monkeypatch):
    """On data with cov exp(-|i - j| / 3) on an 8 x 8 grid; the same nodes either way."""
    model = grid_model()
    x = model.sample_data(1, generator=torch.Generator().manual_seed(1))

    def variance():
        _, info = ndm_ct.loglik(
            model, x, trace=Quadrature(sweeps=200), generator=torch.Generator().manual_seed(1), return_info=True
        )
        return float(info.stderr) ** 2

    cooperating = variance()
    monkeypatch.setattr(
        quadrature, "hadamard", lambda n, code: torch.rand(torch.broadcast_shapes(n.shape, code.shape)) < 0.5
    )
    assert variance() > 2.0 * cooperating


def grid_model(size=8):
    places = torch.tensor(list(itertools.product(range(size), repeat=2)), dtype=torch.float64)
    cov = torch.exp(-torch.cdist(places, places) / 3.0)
    return Gaussian(torch.zeros(size, size), cov, schedule=schedules.LinearLogSNR(-6.0, 5.0))


# --- nodes -----------------------------------------------------------------------------------------------------------


def places(model, sweeps):
    """u of the nodes, ``(B, S, M)``, by inverting the path's coordinate independently of the code."""
    c = model.schedule(torch.cat([sweeps.times.reshape(-1), torch.tensor([model.t_min, 1.0]).double()]))
    noise = c.sigma / c.alpha
    # Every other schedule is made for data of unit variance.
    turn = 10.0 * float(noise[-1]) if isinstance(model.schedule, schedules.VarianceExploding) else 1.0
    coordinate = -torch.asinh(turn / noise)
    u = (coordinate[:-2] - coordinate[-2]) / (coordinate[-1] - coordinate[-2])
    return u.reshape(sweeps.times.shape).mT.unflatten(1, (-1, sweeps.estimator.nodes))


@pytest.mark.parametrize("schedule", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
def test_nodes_are_antithetic_pairs_in_equal_strata(schedule):
    M = 8
    model = empty_model((2,), schedule()).requires_grad_(False)
    u = places(model, draw(model, Quadrature(nodes=M, sweeps=50), rows=20))
    pairs = u.unflatten(2, (M // 2, 2))
    centre = (torch.arange(M // 2, dtype=torch.float64) + 0.5) / (M // 2)
    torch.testing.assert_close(pairs.sum(3), (2 * centre).expand(20, 50, -1), rtol=0.0, atol=1e-6)
    assert float((pairs - centre[:, None]).abs().max()) <= 0.5 / (M // 2) + 1e-6
    # Linear integrands are exact in every sweep, whatever u is drawn.
    torch.testing.assert_close((3.0 * u - 1.0).mean(2), torch.full((20, 50), 0.5).double(), rtol=0.0, atol=1e-6)


def test_nodes_are_uniform_and_integrate_without_bias():
    M = 4
    model = empty_model((2,))
    u = places(model, draw(model, Quadrature(nodes=M, sweeps=50), rows=200)).reshape(-1, M)
    for stratum in range(2):
        inside = (2.0 * u - stratum)[:, 2 * stratum : 2 * stratum + 2]
        assert kstest(inside[:, 0], "uniform", (0.0, 0.5)).pvalue > 1e-3
        assert kstest(inside[:, 1], "uniform", (0.5, 0.5)).pvalue > 1e-3
    for f, integral in ((torch.square, 1 / 3), (torch.exp, math.e - 1), (torch.sqrt, 2 / 3), (lambda u: u < 0.3, 0.3)):
        sums = f(u).double().mean(1)
        assert abs(float(sums.mean()) - integral) < 4 * float(sums.std()) / 100


@pytest.mark.parametrize("schedule", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
def test_weights_are_the_rate_of_time_along_the_path(schedule):
    model = empty_model((2,), schedule()).requires_grad_(False)
    u, h = torch.linspace(0.01, 0.99, 21, dtype=torch.float64), 1e-6
    t, slope = path_times(model, u)
    torch.testing.assert_close(
        slope, (path_times(model, u + h)[0] - path_times(model, u - h)[0]) / (2 * h), rtol=1e-4, atol=1e-9
    )
    ends, _ = path_times(model, torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([model.t_min, 1.0], dtype=torch.float64), rtol=0.0, atol=1e-9)
    assert bool((t.diff() > 0).all())
    lengths = draw(model, Quadrature(nodes=128, sweeps=1), rows=100).weights.sum(0)
    assert abs(float(lengths.mean()) - (1.0 - model.t_min)) < 4 * float(lengths.std()) / 10 + 1e-9
    assert float(lengths.std()) < 0.3


def test_rows_keep_their_nodes_and_probes_in_a_larger_batch():
    model, estimator = empty_model((4, 4)), Quadrature(nodes=4, sweeps=5)
    small, large = draw(model, estimator, 3), draw(model, estimator, 7)
    assert torch.equal(small.times, large.times[:, :3])
    assert torch.equal(probes(small), probes(large)[:3])
    assert not torch.equal(draw(model, estimator, 3, seed=1).times, small.times)
    assert len(large.times[0].unique()) == 7  # and every row has its own
    assert len(large.times[:, 0].unique()) == 20  # and every sweep, and every node


def test_rows_may_have_different_numbers_of_sweeps():
    """Their integrals are those of the full draw, NaN where a sweep is not there, and nothing is evaluated for it."""
    seen = []

    def predictor(z, t):
        seen.append(len(z))
        return torch.tanh(z).flip(1) + 0.3 * z

    model = NDM(predictor, (4,), schedule=schedules.LinearLogSNR(-4, 4))
    estimator = Quadrature(nodes=4, probes=3, sweeps=5, max_batch=7)
    ragged, whole = draw(model, estimator, torch.tensor([2, 5, 1])), draw(model, estimator, 3)
    states = torch.randn(20, 3, 4, dtype=torch.float64)
    path = path_of(model, states[0])
    whole.first().integrals(states[:4], path)  # the way to a derivative is found once per model
    seen.clear()
    some = ragged.integrals(states, path)
    assert sum(seen) == 4 * (2 + 5 + 1)
    assert max(seen) == 7
    every = whole.integrals(states, path)
    present = torch.arange(5) < torch.tensor([2, 5, 1])[:, None]
    assert torch.equal(some.isnan(), ~present)
    torch.testing.assert_close(some[present], every[present])
    assert torch.equal(whole.first().integrals(states[:4], path), every[:, :1])


def test_one_sweep_is_its_definition():
    """1/(M K) sum of dt/du eps J eps with the Jacobian of the network part, by autograd."""
    exact = mixture(schedules.LinearLogSNR(-4, 4), TRANSFORMS["moving scale"](), d=6)
    estimator = Quadrature(nodes=2, probes=3, sweeps=2)
    sweeps, states = draw(exact, estimator, 2), torch.randn(4, 2, 6, dtype=torch.float64)
    flow, signs = exact.flow(torch.float64), probes(draw(exact, estimator, 2))
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for row, sweep, place in itertools.product(range(2), range(2), range(2)):
        node = 2 * sweep + place
        part = flow.network_part(sweeps.times[node, row])
        jacobian = torch.autograd.functional.jacobian(lambda z, part=part: part(z[None])[0][0], states[node, row])
        for probe in signs[row, sweep, 3 * place : 3 * place + 3]:
            expected[row, sweep] += sweeps.weights[node, row] * (probe @ jacobian @ probe) / 3
    torch.testing.assert_close(sweeps.integrals(states, path_of(exact, states[0])), expected)


def test_running_totals_are_mean_variance_and_a_widened_standard_error(generator):
    values = torch.randn(3, 20, dtype=torch.float64, generator=generator) + 5.0
    totals = Totals.of(values[:, :6])
    ragged = torch.where(torch.arange(14) < torch.tensor([14, 3])[:, None], values[[0, 2], 6:], torch.nan)
    totals.add(torch.tensor([0, 2]), ragged, torch.tensor([14, 3]))
    for row, n in ((0, 20), (1, 6), (2, 9)):
        own = values[row, :n]
        assert int(totals.count[row]) == n
        assert float(totals.mean[row]) == pytest.approx(float(own.mean()), abs=1e-12)
        expected = float(own.std()) / math.sqrt(n) * math.sqrt((n - 1) / (n - 3))
        assert float(totals.stderr[row]) == pytest.approx(expected, rel=1e-9)
        assert int(totals.wanted(0.1)[row]) == math.ceil(float(own.var()) * (n - 1) / (n - 3) / 0.01)
    assert bool(Totals.of(values[:, :3]).stderr.isnan().all())


def test_widened_standard_error_makes_the_score_have_variance_one(generator):
    """The t-statistic of 8 numbers has variance 7/5; without the widening it would be reported as 1."""
    for n in (4, 5, 8, 32):
        totals = Totals.of(torch.randn(400_000, n, dtype=torch.float64, generator=generator))
        scores = totals.mean / totals.stderr
        if n > 5:  # below, the variance of a variance is infinite
            assert float(scores.var()) == pytest.approx(1.0, abs=0.03)
        inside = float((scores.abs() < 1.0).double().mean())
        assert inside > 0.683  # short tails of the sum are never promised


# --- values ----------------------------------------------------------------------------------------------------------


def scores(model, x, repeats, truth, generator, **options):
    """(estimate - truth) / stderr and the errors themselves, ``(repeats, rows)``."""
    options = {"trace": Quadrature(), "rtol": 1e-5, "atol": 1e-5} | options
    rows = x.repeat(repeats, *(1,) * (x.ndim - 1))
    value, info = ndm_ct.loglik(model, rows, generator=generator, return_info=True, **options)
    error = (value - truth.repeat(repeats)).reshape(repeats, len(x))
    return error / info.stderr.reshape(error.shape), error


def scores_of_one_path(model, x, repeats, truth, generator, estimator=Quadrature()):  # noqa: B008 (frozen)
    """The same from ``repeats`` groups of sweeps along a path that is solved only once for each row."""
    count = repeats * estimator.sweeps
    problem = path_of(model, x)
    sweeps = Sweeps.draw(problem, estimator, torch.full((len(x),), count), generator)
    with problem.prepared():
        solved = problem.transport(sweeps.times, in_noise_units=True)
        groups = Totals.of(sweeps.integrals(solved.nodes, problem).reshape(-1, estimator.sweeps))
        value = model.log_prior(solved.state[0]) + linear_logdet(model, x.device)
    error = (value - truth)[:, None] + groups.mean.reshape(len(x), repeats)
    return (error / groups.stderr.reshape(error.shape)).mT, error.mT


def check(z, error, sd=(0.85, 1.15), mean=0.15):
    assert bool((error.mean(0).abs() < 4 * error.std(0) / math.sqrt(len(error))).all())
    assert sd[0] < float(z.std()) < sd[1]
    assert abs(float(z.mean())) < mean


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_quadrature_is_unbiased_with_a_calibrated_error(schedule, transform, generator):
    model = mixture(schedule(), transform(), d=16)
    x = model.sample_data(4, generator=generator)
    check(*scores_of_one_path(model, x, 100, model.log_prob(x), generator))


@pytest.mark.parametrize("shape", [(3, 4, 2), (2, 8)], ids=str)
def test_image_shaped_events(shape, generator):
    d = math.prod(shape)
    flat = gaussian(schedules.LinearLogSNR(-8.0, 5.0), d=d)
    model = Gaussian(flat.marginals.means.reshape(shape), flat.marginals.covs[0], schedule=flat.schedule)
    x = model.sample_data(1, generator=generator)
    check(*scores(model, x, 200, model.log_prob(x), generator))


def test_moments_head_with_a_nonlinear_transform(generator):
    """One dimension: probes are exact, and what scatters are the nodes, far from normally; their variance is right."""
    exact = ThreePoints(schedules.LinearLogSNR(-6, 6), Wiggle())
    model = exact.model()
    x = torch.tensor([[-0.7], [0.9]], dtype=torch.float64)
    truth = exact.log_prob(x, model.t_min)
    z, error = scores_of_one_path(model, x, 400, truth, generator, Quadrature(probes=1))
    check(z, error, sd=(0.0, 3.0), mean=1.0)
    reported = (error / z).square().mean(0) * 5 / 7
    torch.testing.assert_close(reported, error.var(0), rtol=0.2, atol=0.0)
    value = ndm_ct.loglik(model, x, trace=Quadrature(sweeps=200), generator=generator, rtol=1e-6, atol=1e-6)
    assert bool(((value - truth).abs() < 4 * error.std(0) / 5).all())


def test_going_down_the_log_determinant_has_the_other_sign(generator):
    model = mixture(schedules.LinearLogSNR(-8.0, 5.0), d=16)
    z1 = model.sample_prior(2, generator=generator, dtype=torch.float64, device=None).repeat(200, 1)
    options = {"rtol": 1e-6, "atol": 1e-6, "return_info": True}
    x, down = ndm_ct.decode(model, z1, trace=Quadrature(), generator=generator, **options)
    check((down.loglik - model.log_prob(x)) / down.stderr, (down.loglik - model.log_prob(x)).reshape(200, 2))
    _, up = ndm_ct.encode(model, x[:2], trace="exact", **options)
    assert bool(((down.logdet[:2] + up.logdet).abs() < 5 * down.stderr[:2]).all())


def test_auto_takes_quadrature_above_32_dimensions():
    x = torch.randn(2, 33, dtype=torch.float64)
    options = {"rtol": 1e-3, "atol": 1e-3, "return_info": True}
    _, small = ndm_ct.loglik(gaussian(d=32), x[:, :32], **options)
    assert small.row_sweeps.tolist() == [0, 0]
    assert small.vjps == 32 * (small.nfe - 1)  # one evaluation, at twice the noise, tells the truncation
    _, large = ndm_ct.loglik(gaussian(d=33), x, **options)
    assert large.row_sweeps.tolist() == [8, 8]
    # 8 sweeps and one on the coarse path for the error budget, 16 nodes with 2 probes each; 16 probes for truncation.
    assert large.row_vjps.tolist() == [9 * 32 + 16] * 2
    assert float(large.stderr.min()) > 0.0


def test_few_sweeps_have_no_standard_error():
    model, x = gaussian(), torch.randn(2, 6, dtype=torch.float64)
    for sweeps, known in ((1, False), (3, False), (4, True)):
        _, info = ndm_ct.loglik(model, x, trace=Quadrature(nodes=2, sweeps=sweeps), return_info=True)
        assert info.stderr.isfinite().tolist() == [known] * 2


def test_same_generator_same_bits_and_the_first_rows_keep_them():
    model, x = gaussian(d=40), torch.randn(5, 40, dtype=torch.float64)

    def run(x, seed=3):
        return ndm_ct.loglik(model, x, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(run(x), run(x))
    assert not torch.equal(run(x), run(x, seed=4))
    torch.testing.assert_close(run(x)[:3], run(x[:3]), rtol=0.0, atol=1e-9)


# --- a standard error on demand --------------------------------------------------------------------------------------


class Linear:
    """x-hat = s A z with a dense A and s of every row's own: sweeps with a known mean, as noisy as s says."""

    def __init__(self, d=40):
        generator = torch.Generator().manual_seed(3)
        root = torch.randn(d, d, dtype=torch.float64, generator=generator)
        self.matrix = 0.02 * (root + root.mT)

    def __call__(self, z, t, scale, table=None):
        return scale[:, None] * (z @ self.matrix)


def linear_problem(repeats, scales=(0.1, 1.0, 1.5, 2.0)):
    model = NDM(Linear(), (40,), schedule=schedules.LinearLogSNR(-4.0, 4.0))
    scale = torch.tensor(scales, dtype=torch.float64)
    x = torch.randn(len(scales), 40, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    exact = ndm_ct.loglik(model, x, trace="exact", rtol=1e-9, atol=1e-9, scale=scale)
    return model, x.repeat(repeats, 1), {"scale": scale.repeat(repeats)}, exact


FEW = Quadrature(nodes=2, probes=4, sweeps=8)


def test_rows_get_the_sweeps_that_their_standard_error_needs():
    """RMS error at most 1.1 of the target, no bias from stopping, at most 1.5 of the ideal cost from 12 sweeps on."""
    repeats, target = 200, 0.3
    model, x, cond, exact = linear_problem(repeats)
    rows, seed = len(exact), torch.Generator().manual_seed
    _, known = ndm_ct.loglik(
        model, x[:rows], trace=Quadrature(2, 4, 4000), generator=seed(4), return_info=True, scale=cond["scale"][:rows]
    )
    ideal = known.stderr.square() * 4000 / target**2
    assert (ideal > 12.0).tolist() == [False, True, True, True]
    value, info = ndm_ct.loglik(
        model, x, trace=FEW, stderr=target, rtol=1e-5, atol=1e-5, generator=seed(5), return_info=True, **cond
    )
    error, sweeps = (value - exact.repeat(repeats)).reshape(repeats, rows), info.row_sweeps.reshape(repeats, rows)
    assert float(info.stderr.max()) <= target
    assert bool((error.square().mean(0).sqrt() < 1.1 * target).all())
    assert bool((error.mean(0).abs() < 3.0 * error.std(0) / math.sqrt(repeats)).all())
    cost = sweeps[:, 1:].double().mean(0) / ideal[1:]
    assert 0.7 < float(cost.min()) < float(cost.max()) < 1.5
    assert bool((sweeps[:, 0] == 8).all())  # rows that are there already get none
    nodes = 2 * (info.row_sweeps + 1)  # one sweep more for the budget
    assert torch.equal(info.row_vjps, 4 * nodes + 16)
    assert bool((info.row_nfe > nodes).all())


def test_shared_conditioning_is_not_taken_for_the_rows_that_need_sweeps():
    """Three of four rows go on, and a shared table happens to have three entries: it still belongs to nobody."""
    model, x, cond, _ = linear_problem(1)
    seen = set()

    class Recording(Linear):
        def __call__(self, z, t, scale, table):
            seen.add(tuple(table.shape))
            return super().__call__(z, t, scale) + 0.0 * table.sum()

    recording = NDM(Recording(), (40,), schedule=model.schedule)
    _, info = ndm_ct.loglik(
        recording, x, trace=FEW, stderr=0.3, generator=torch.Generator().manual_seed(1), return_info=True,
        table=torch.ones(3, 2), **cond,
    )  # fmt: skip
    assert int((info.row_sweeps > 8).sum()) == 3
    assert seen == {(3, 2)}


def test_stderr_is_met_by_the_exact_trace_and_refused_elsewhere():
    model, x = gaussian(), torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(ndm_ct.loglik(model, x, stderr=1e-9), ndm_ct.loglik(model, x))
    large, y = gaussian(d=40), torch.randn(3, 40, dtype=torch.float64)
    for options, message in (
        ({"stderr": 1e-3}, r"needs about [\d,]+ vector-Jacobian products for row \d.*exact trace costs.*trace='exact'"),
        ({"stderr": 1.0, "trace": "hutchinson"}, "an estimator that can add sweeps; Hutchinson cannot.*'quadrature'"),
        ({"stderr": 1.0, "trace": Quadrature(sweeps=3)}, r"at least 4 sweeps.*Quadrature\(sweeps=3\)"),
        ({"stderr": 1.0, "differentiable": True}, "no effect on gradients"),
        ({"stderr": 0.0}, "stderr must be a positive number"),
        ({"stderr": math.nan}, "stderr must be a positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            ndm_ct.loglik(large, y, **options)


# --- the same with more statistics -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("make", [gaussian, mixture])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_calibration_everywhere(make, name, transform, generator):
    """The sweeps' tails are longer than a normal's (kurtosis 4 to 6), so scores spread by up to 1.1; a band for 200
    repeats. A rotated Gaussian with a moving scale has few strong directions, which make its sweeps skewed (scores of
    mean -0.22 and spread 1.18 where alpha(1) = 0), because then mean and standard error go together. The estimate
    itself has no bias."""
    model = make(SCHEDULES[name](), transform(), d=40 if make is gaussian else 16)
    x = model.sample_data(5, generator=generator)
    z, error = scores(model, x, 200, model.log_prob(x), generator, rtol=1e-6, atol=1e-6)
    skewed = make is gaussian and transform is TRANSFORMS["moving scale"]
    check(z, error, (0.85, 1.3 if skewed else 1.2), 0.25 if skewed else 0.15)


@pytest.mark.slow
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("make", [gaussian, mixture])
def test_calibration_with_many_repeats(make, transform, generator):
    model = make(SCHEDULES["LinearLogSNR"](), transform(), d=16)
    x = model.sample_data(8, generator=generator)
    check(*scores_of_one_path(model, x, 600, model.log_prob(x), generator))


@pytest.mark.slow
def test_stderr_on_demand_of_a_mixture(generator):
    """At most 1.1 of the target on 95 % of rows, though their sweeps are far from normal.

    Where sweeps are skewed, mean and variance go together, so that deciding by the variance when to stop leaves a bias:
    up to a third of the target here, which the root mean square includes."""
    model, repeats, rows = mixture(schedules.LinearLogSNR(-8.0, 5.0), d=36), 200, 8
    x = model.sample_data(rows, generator=generator)
    options = {"rtol": 1e-5, "atol": 1e-5, "generator": generator, "return_info": True}
    _, known = ndm_ct.loglik(model, x, trace=Quadrature(sweeps=600), **options)
    variance = known.stderr.square() * 600
    target = float((variance.median() / 14.0).sqrt())
    value, info = ndm_ct.loglik(model, x.repeat(repeats, 1), stderr=target, **options)
    error = (value - model.log_prob(x).repeat(repeats)).reshape(repeats, rows)
    cost = info.row_sweeps.reshape(repeats, rows).double().mean(0) / (variance / target**2)
    print("RMS / target", error.square().mean(0).sqrt() / target, "cost / ideal", cost)
    assert float((error.square().mean(0).sqrt() < 1.1 * target).double().mean()) >= 0.95
    assert bool((error.mean(0).abs() < 0.4 * target).all())
    assert float(error.mean(0).abs().median()) < 0.15 * target
    assert float(cost[variance > 12.0 * target**2].max()) < 1.5


@pytest.mark.slow
def test_trained_network_agrees_with_its_exact_trace(generator):
    """On digits, the rows of a real network: scores of 25 repeats of 8 rows."""
    networks = pytest.importorskip("bench.networks", reason="needs ndm-ct[bench]")
    model = networks.load("digits").double()
    x = networks.NETWORKS["digits"].test_rows(8).double()
    exact = ndm_ct.loglik(model, x, trace="exact", rtol=1e-7, atol=1e-7)
    z, error = scores(model, x, 25, exact, generator, rtol=1e-6, atol=1e-6)
    print("stderr", float(error.std()), "sd of scores", float(z.std()), "mean", float(z.mean()))
    check(z, error)


@pytest.mark.parametrize(("shape", "most"), [((4,), 64), ((1, 8, 8), 64), ((1, 16, 16), 16), ((3, 16, 16), 5)], ids=str)
def test_large_events_go_in_smaller_batches(shape, most):
    """A call at the nodes takes 64 rows of up to 64 numbers, and of more as many as hold no more numbers."""
    calls = []

    def net(z, t):
        calls.append(len(z))
        return 0.5 * z

    model = NDM(net, shape, schedule=schedules.LinearLogSNR(-4.0, 4.0), checks=False)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    options = {"generator": 0, "rtol": 1e-3, "atol": 1e-3}
    found = ndm_ct.loglik(model, x, trace=Quadrature(sweeps=4, max_batch=64), **options)
    assert max(calls) == most
    torch.testing.assert_close(found, ndm_ct.loglik(model, x, trace=Quadrature(sweeps=4), **options))
