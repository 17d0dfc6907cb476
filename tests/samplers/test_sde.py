"""The adaptive reverse SDE: its Brownian paths, its steps, convergence on a path and in law, rows on their own."""

import math

import pytest
import torch
from oracles import SCHEDULES, TRANSFORMS, blurred, gaussian, mixture, order

import ndm_ct
from ndm_ct import NDM, SolverError, schedules
from ndm_ct.samplers import adaptive
from ndm_ct.samplers.adaptive import sample_rows
from ndm_ct.samplers.frozen import DDPM
from ndm_ct.solvers import sde
from ndm_ct.solvers.sde import Brownian

SMOOTH = schedules.LinearLogSNR(-5.0, 4.0)


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def start(model, n, generator):
    return model.sample_prior(n, generator=generator, dtype=torch.float64, device=None)


def marginal(model, t):
    mean, factor, _ = model.marginals.components(torch.tensor([t], dtype=torch.float64))
    return mean[0, 0], factor[0, 0] @ factor[0, 0].mT


class Counting:
    """Calls of a predictor and rows in them."""

    def __init__(self, predictor):
        self.predictor, self.calls, self.rows = predictor, 0, 0

    def __call__(self, z, t):
        self.calls, self.rows = self.calls + 1, self.rows + len(z)
        return self.predictor(z, t)


# --- Brownian paths --------------------------------------------------------------------------------------------------


def walk_choosing(brownian, n, memory=True):
    """To length 1, rejecting increments that are large for their step, as no solver should mind; W(1)."""
    at, total, wanted = torch.zeros(n).double(), torch.zeros(n, 2).double(), torch.full((n,), 0.3).double()
    while bool((at < 1.0).any()):
        going = at < 1.0
        remaining = 1.0 - at
        h, increment = brownian.draw(torch.where(wanted >= remaining, remaining, wanted).clamp(min=1e-12), going)
        assert bool((h[going] <= remaining[going] * (1.0 + 1e-9)).all())
        large = going & (increment.square().sum(1) > 1.5 * h) & (h > 0.01)
        if memory:
            brownian.give_back(h, increment, large)
        accepted = going & ~large
        at = torch.where(accepted, torch.where(h > remaining * (1.0 - 1e-9), 1.0, at + h), at)
        total = torch.where(accepted[:, None], total + increment, total)
        wanted = torch.where(large, 0.4 * h, torch.where(accepted, 2.0 * h, wanted))
    return total


def test_paths_are_brownian_whatever_is_rejected():
    """A rejection that looks at the increment leaves W(1) standard normal; drawing anew does not."""
    n = 10000
    total = walk_choosing(Brownian(torch.zeros(n, 2).double(), torch.Generator().manual_seed(3)), n)
    for power, moment, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (4, 3.0, 96.0)):
        assert abs(float((total**power).mean()) - moment) < 4.0 * math.sqrt(variance / (2 * n))
    naive = walk_choosing(Brownian(torch.zeros(n, 2).double(), torch.Generator().manual_seed(3)), n, memory=False)
    assert float(naive.square().mean()) < 0.9


def test_parts_of_a_piece_are_a_bridge():
    n, every = 20000, torch.ones(20000, dtype=torch.bool)
    brownian = Brownian(torch.zeros(n, 1).double(), torch.Generator().manual_seed(4))
    whole, increment = brownian.draw(torch.full((n,), 0.9, dtype=torch.float64), every)
    brownian.give_back(whole, increment, every)
    parts, lengths = [], []
    for wanted in (0.4, 0.298, 5.0):  # a third of 0.9; half of 0.6, nearly as asked; the rest
        h, part = brownian.draw(torch.full((n,), wanted, dtype=torch.float64), every)
        parts.append(part[:, 0])
        lengths.append(float(h[0]))
    assert lengths == pytest.approx([0.3, 0.3, 0.3])
    torch.testing.assert_close(sum(parts), increment[:, 0], rtol=0.0, atol=1e-12)
    assert not bool(brownian.depth.any())
    covariance = torch.stack(parts).cov()
    assert float((covariance - 0.3 * torch.eye(3)).abs().max()) < 4.0 * 0.3 * math.sqrt(2.0 / n)


def test_rows_have_stacks_of_their_own():
    """Nested rejections in one row, none in the other, and the pieces come back in order."""
    brownian = Brownian(torch.zeros(2, 1).double(), torch.Generator().manual_seed(5))
    one, both = torch.tensor([True, False]), torch.tensor([True, True])
    wanted = torch.tensor([1.0, 0.2]).double()
    h, whole = brownian.draw(wanted, both)
    brownian.give_back(h, whole, one)
    for _ in range(5):  # deeper than the stack begins
        h, increment = brownian.draw(0.5 * h, one)
        brownian.give_back(h, increment, one)
        assert int(brownian.depth[1]) == 0
    assert brownian.depth.tolist() == [6, 0]
    total, length = torch.zeros(1).double(), 0.0
    while int(brownian.depth[0]):
        h, increment = brownian.draw(torch.tensor([9.0, 9.0]).double(), one)
        total, length = total + increment[0], length + float(h[0])
    assert length == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(total, whole[0], rtol=0.0, atol=1e-12)
    with_generators = Brownian(torch.zeros(3, 1).double(), seeded(1, 2, 3))
    with_generators.keep(torch.tensor([2]))
    _, increment = with_generators.draw(torch.ones(1).double(), torch.tensor([True]))
    assert float(increment) == float(torch.randn(1, generator=seeded(3)[0], dtype=torch.float64))


# --- steps -----------------------------------------------------------------------------------------------------------


def test_accepted_steps_are_stochastic_heun(monkeypatch):
    """The path of every step taken, by hand from velocity, score and g."""
    model = gaussian(SMOOTH, TRANSFORMS["moving scale"](), d=3, volatility=0.7)
    taken, draw = [], Brownian.draw

    def recorded(self, wanted, which):
        h, increment = draw(self, wanted, which)
        taken.append((float(h[0]), increment[0]))
        return h, increment

    monkeypatch.setattr(Brownian, "draw", recorded)
    z = start(model, 1, torch.Generator().manual_seed(1))
    drawn = sample_rows(model, z, rtol=1e9, atol=1e9, generator=torch.Generator().manual_seed(2))
    assert int(drawn.rejected) == 0

    def field(z, t):
        return model.velocity(z, t) - 0.5 * diffusion(t) ** 2 * model.score(z, t)

    def diffusion(t):
        c = SMOOTH(torch.tensor(t, dtype=torch.float64))
        return c.sigma * (0.7 * c.dgamma).sqrt()

    t = 1.0
    for h, increment in taken:
        s = max(t - h, 0.0)
        euler = z - h * field(z, t) + diffusion(t) * increment
        z = z - 0.5 * h * (field(z, t) + field(euler, s)) + 0.5 * (diffusion(t) + diffusion(s)) * increment
        t = s
    assert t == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(drawn.state[0], z, rtol=1e-10, atol=1e-10)
    assert taken[0][0] == pytest.approx(adaptive.FIRST / 9.0)
    assert taken[1][0] / taken[0][0] == pytest.approx(sde.GROW)


def test_the_controller_keeps_the_error_in_its_units(monkeypatch):
    """Accepted steps have error at most 1, rejected ones more, as recomputed from the states they led to."""
    model = gaussian(SMOOTH, d=3)
    errors, judge = [], sde._Solve._judge

    def recorded(self, rows, slope):
        after, rejected = judge(self, rows, slope)
        tried, noise = rows.trying, 0.5 * (rows.g + self.diffusion(rows.end, rows.y, rows.index)) * rows.increment
        heun = rows.y - 0.5 * rows.length[:, None] * (rows.slope + slope) + noise
        scale = 0.02 + 0.05 * torch.maximum(heun.abs(), rows.y.abs())
        error = ((heun - rows.euler) / scale).square().mean(1).sqrt()
        assert bool(((error > 1.0) == rejected)[tried].all())
        factor = (0.9 * error ** (-2.0 / 3.0)).clamp(0.2, 5.0)
        torch.testing.assert_close(after.h[tried], (factor * rows.length)[tried])
        errors.append(error[tried])
        return after, rejected

    monkeypatch.setattr(sde._Solve, "_judge", recorded)
    drawn = sample_rows(model, start(model, 20, None), rtol=0.05, atol=0.02)
    assert sum(len(error) for error in errors) == int((drawn.accepted + drawn.rejected).sum())
    assert int(drawn.rejected.sum()) == sum(int((error > 1.0).sum()) for error in errors) > 0


@pytest.mark.parametrize("name", ["Rectified", "Cosine", "Trigonometric"])
def test_an_infinite_end_is_stepped_over_by_the_frozen_transition(name):
    """Down to sigma/alpha = 1000, whatever the state: the prior is forgotten at once."""
    schedule = getattr(schedules, name)()
    model, seen = gaussian(schedule, d=3), []
    top = float(schedule.time_at(torch.tensor(math.atan(1000.0), dtype=torch.float64)))
    z = start(model, 2, None)
    expected = DDPM(model).step(z, 1.0, top, generator=torch.Generator().manual_seed(1))
    predictor = model.predictor

    def watched(z, t):
        seen.append((float(t[0]), z.clone()))
        return predictor(z, t)

    model.predictor = watched
    drawn = sample_rows(model, z, generator=torch.Generator().manual_seed(1), rtol=0.1, atol=0.1)
    assert [t for t, _ in seen[:2]] == [1.0, top]
    torch.testing.assert_close(seen[1][1], expected)
    assert bool((drawn.nfe == 1 + 2 * (drawn.accepted - 1) + drawn.rejected).all())
    assert bool(torch.isfinite(sample_rows(model.with_volatility(scale=0.0), z).state[0]).all())


# --- convergence -----------------------------------------------------------------------------------------------------


class Given:
    """A path fixed in advance, linear between very many points."""

    points = 2**10

    def __init__(self, like, generator):
        steps = torch.randn(len(like), self.points, *like.shape[1:], dtype=like.dtype, generator=generator)
        zero = torch.zeros_like(steps[:, :1])
        self.path = torch.cat([zero, steps.cumsum(1) / math.sqrt(self.points)], 1)
        self.at = torch.zeros(len(like), dtype=torch.float64)

    def value(self, at):
        k = (at * self.points).floor().clamp(0, self.points - 1).long()
        rows, share = torch.arange(len(at)), (at * self.points - k)[:, None]
        return (1.0 - share) * self.path[rows, k] + share * self.path[rows, k + 1]

    def draw(self, wanted, which):
        increment = self.value(self.at + wanted) - self.value(self.at)
        self.at = torch.where(which, self.at + wanted, self.at)
        return wanted, increment

    def give_back(self, h, increment, which):
        self.at = torch.where(which, self.at - h, self.at)

    def keep(self, rows):
        self.path, self.at = self.path[rows], self.at[rows]


def test_on_one_path_the_error_falls_with_the_tolerance(monkeypatch):
    """Strong convergence of order one in the step, so of order 2/3 in the tolerance."""
    model, n = gaussian(schedules.LinearLogSNR(-3.0, 3.0), d=2), 8
    z = start(model, n, torch.Generator().manual_seed(1))
    given = Given(z, torch.Generator().manual_seed(2))
    reverse, exact = model.reverse_sde(torch.float64), z
    grid = torch.linspace(1.0, 0.0, Given.points + 1, dtype=torch.float64)
    noise = given.path.diff(dim=1)
    for k in range(Given.points):
        t, s = grid[k], grid[k + 1]
        slope, g = (
            reverse.drift(t, exact),
            0.5 * (reverse.diffusion(t, exact) + reverse.diffusion(s, exact)) * noise[:, k],
        )
        exact = exact - 0.5 * (t - s) * (slope + reverse.drift(s, exact - (t - s) * slope + g)) + g
    monkeypatch.setattr(sde, "Brownian", lambda like, generator: Given(like, torch.Generator().manual_seed(2)))
    errors, tolerances = [], (0.3, 0.03, 0.003)
    for tolerance in tolerances:
        errors.append(
            float((sample_rows(model, z, rtol=tolerance, atol=tolerance).state[0] - exact).square().mean().sqrt())
        )
    assert errors[2] < 0.01
    assert order(errors, [1.0 / tolerance for tolerance in tolerances]) == pytest.approx(2.0 / 3.0, abs=0.2)


def test_without_noise_the_error_falls_with_the_tolerance():
    model = gaussian(SMOOTH, TRANSFORMS["moving scale"](), d=3)
    z = start(model, 8, torch.Generator().manual_seed(1))
    exact, still = ndm_ct.decode(model, z, rtol=1e-9, atol=1e-9), model.with_volatility(scale=0.0)
    errors, tolerances = [], (1e-1, 1e-2, 1e-3)
    for tolerance in tolerances:
        errors.append((sample_rows(still, z, rtol=tolerance, atol=tolerance).state[0] - exact).abs().max())
    assert float(errors[2]) < 0.01
    assert order(errors, [1.0 / tolerance for tolerance in tolerances]) > 0.7


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("name", ["LinearLogSNR", "Rectified"])
def test_at_a_tight_tolerance_mean_and_covariance_are_the_datas(name, transform, generator):
    schedule = SMOOTH if name == "LinearLogSNR" else SCHEDULES[name]()
    model, n = gaussian(schedule, transform(), d=2, volatility=1.3), 1500
    x = ndm_ct.sample(model, n, method="sde", generator=generator, dtype=torch.float64)
    mean, cov = marginal(model, model.t_min)
    assert bool(((x.mean(0) - mean).abs() < 4.0 * (cov.diagonal() / n).sqrt() + 0.005).all())
    factor = torch.linalg.cholesky(cov)
    white = torch.linalg.solve_triangular(factor, (x - mean).mT, upper=False)
    assert float((white @ white.mT / n - torch.eye(2)).abs().max()) < 4.0 * math.sqrt(2.0 / n) + 0.02


def test_rejected_increments_must_not_be_drawn_again(monkeypatch):
    """The variance of one coordinate of Gaussian data, with memory and without."""
    model, n = gaussian(SMOOTH, d=1), 1000
    _, cov = marginal(model, model.t_min)

    def ratio():
        generator = torch.Generator().manual_seed(3)
        drawn = sample_rows(model, start(model, n, generator), rtol=0.03, atol=0.03, generator=generator)
        assert float(drawn.rejected.double().mean()) > 5.0
        return float(drawn.state[0].var() / cov)

    assert ratio() == pytest.approx(1.0, abs=4.0 * math.sqrt(2.0 / n) + 0.02)
    monkeypatch.setattr(Brownian, "give_back", lambda *arguments: None)
    assert ratio() > 1.4


def test_a_mixture_is_sampled_with_the_weights_of_its_modes(generator):
    means = 3.0 * torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, -1.5]], dtype=torch.float64)
    covs = torch.eye(2, dtype=torch.float64).repeat(3, 1, 1) * torch.tensor([0.3, 0.2, 0.1]).reshape(3, 1, 1)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    model, n = ndm_ct.reference.GaussianMixture(weights, means, covs, schedule=SCHEDULES["Rectified"]()), 1000
    x = ndm_ct.sample(model, n, method="sde", rtol=0.03, atol=0.03, generator=generator, dtype=torch.float64)
    nearest = torch.cdist(x, means).argmin(1)
    share = torch.stack([(nearest == k).double().mean() for k in range(3)])
    assert bool(((share - weights).abs() < 4.0 * (weights * (1.0 - weights) / n).sqrt()).all())
    spread = torch.stack([x[nearest == k].var(0).mean() for k in range(3)])
    assert bool(((spread / covs[:, 0, 0] - 1.0).abs() < 4.0 * (1.0 / (weights * n)).sqrt() + 0.05).all())


def test_a_volatility_per_frequency_is_followed_in_its_basis(generator):
    model, spectrum = blurred()
    x = ndm_ct.sample(model, 1500, method="sde", rtol=0.03, atol=0.03, generator=generator, dtype=torch.float64)
    measured = model.transform.to_basis(x).flatten(1).square().mean(0)
    assert bool(((measured / spectrum - 1.0).abs() < 4.0 * math.sqrt(2.0 / 1500) + 0.03).all())


# --- rows on their own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LinearLogSNR", "Rectified"])
def test_a_row_does_not_depend_on_its_batch(name):
    model = mixture(SCHEDULES[name](), TRANSFORMS["moving scale"](), d=4)

    def run(seeds, batch_size=None):
        return ndm_ct.sample(
            model, len(seeds), method="sde", rtol=0.1, atol=0.1, generator=seeded(*seeds),
            dtype=torch.float64, return_info=True, batch_size=batch_size,
        )  # fmt: skip

    batch, info = run(range(4))
    singles = [run([row]) for row in range(4)]
    for row, (x, own) in enumerate(singles):
        torch.testing.assert_close(batch[row : row + 1], x, rtol=1e-8, atol=1e-8)
        assert own.nfe <= info.nfe
    for count in ("nfe", "accepted", "rejected"):
        assert getattr(info, count) == max(getattr(own, count) for _, own in singles)
    assert len({own.nfe for _, own in singles}) > 1
    parts, halves = run(range(4), batch_size=3)
    torch.testing.assert_close(batch, parts, rtol=1e-8, atol=1e-8)
    assert halves.nfe == info.nfe


def test_a_stiff_row_takes_steps_of_its_own():
    """The easy row goes as it would go alone, and leaves the batch when it is done; the others find their way home."""
    model = NDM(lambda z, t, rate: torch.sin(rate[:, None] * z), (2,), schedule=SMOOTH)
    rate, z = torch.tensor([60.0, 0.1, 40.0]).double(), torch.randn(3, 2).double()
    options = {"rtol": 0.05, "atol": 0.05}
    together = sample_rows(model, z, generator=seeded(0, 1, 2), rate=rate, **options)
    alone = [sample_rows(model, z[k : k + 1], generator=seeded(k), rate=rate[k : k + 1], **options) for k in range(3)]
    torch.testing.assert_close(together.state[0], torch.cat([each.state[0] for each in alone]), rtol=1e-8, atol=1e-8)
    for count in ("nfe", "accepted", "rejected"):
        assert getattr(together, count).tolist() == [int(getattr(each, count)) for each in alone]
    stiff, easy, other = together.nfe.tolist()
    assert min(stiff, other) > 2 * easy


@pytest.mark.parametrize("name", ["LinearLogSNR", "Rectified"])
def test_evaluations_are_counted_exactly(name):
    model = mixture(SCHEDULES[name](), d=3)
    model.checks, model.predictor = False, Counting(model.predictor)
    counting = model.predictor
    z = start(model, 5, None)
    drawn = sample_rows(model, z, rtol=0.05, atol=0.05)
    assert counting.rows == int(drawn.nfe.sum())
    assert counting.calls == int(drawn.nfe.max())
    frozen = 1 if name == "Rectified" else 0
    assert torch.equal(drawn.nfe, frozen + 2 * (drawn.accepted - frozen) + drawn.rejected)
    counting.calls = 0
    _, info = ndm_ct.sample(model, 5, method="sde", rtol=0.05, atol=0.05, return_info=True)
    assert info.nfe == counting.calls
    assert info.logp is None
    assert info.times is None


def test_a_guided_prediction_counts_twice():
    model = NDM(lambda z, t, label: 0.3 * z + label[:, None], (2,), schedule=SMOOTH)
    model.predictor.null = {"label": 0.0}
    options = {"method": "sde", "label": torch.tensor([1.0, 2.0]), "return_info": True}
    _, plain = ndm_ct.sample(model, 2, generator=seeded(1, 2), **options)
    _, guided = ndm_ct.sample(model, 2, generator=seeded(1, 2), guidance=1.5, **options)
    assert guided.nfe % 2 == 0
    assert guided.nfe >= 2 * plain.accepted


def test_conditioning_follows_its_rows():
    model = NDM(lambda z, t, shift: 0.1 * torch.tanh(z) + shift[:, None], (2,), schedule=schedules.LinearLogSNR(-6, 5))
    shift = torch.linspace(-3.0, 3.0, 7)
    x = ndm_ct.sample(model, 7, method="sde", rtol=0.05, atol=0.05, shift=shift)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.mean(1), shift, rtol=0.0, atol=0.5)


@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 2)])
def test_any_event_shape_and_no_rows(shape):
    model = NDM(lambda z, t: 0.5 * z, shape, schedule=SMOOTH)
    for n in (0, 1, 3):
        x, info = ndm_ct.sample(model, n, method="sde", rtol=0.1, atol=0.1, return_info=True)
        assert x.shape == (n, *shape)
        assert (info.nfe > 0) == (n > 0)


def test_reproducible_and_stochasticity():
    model = mixture(SMOOTH, d=2)

    def run(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return ndm_ct.sample(
            model, 3, method="sde", rtol=0.05, atol=0.05, generator=generator, dtype=torch.float64, **options
        )

    assert torch.equal(run(1), run(1))
    assert torch.equal(run(1), run(1, stochasticity=1.0))
    assert not torch.equal(run(1), run(2))
    assert not torch.equal(run(1), run(1, stochasticity=0.5))


def test_progress(capsys):
    times = []
    model = mixture(SMOOTH, d=2)
    sample_rows(model, start(model, 4, None), rtol=0.1, atol=0.1, callback=times.append)
    assert times[0] == 1.0
    assert times == sorted(times, reverse=True)
    ndm_ct.sample(model, 2, method="sde", progress=True)
    assert "sampling" in capsys.readouterr().err


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_nan_is_named_with_row_and_time():
    def predictor(z, t, broken):
        return torch.where(broken[:, None] & (t[:, None] < 0.5), math.nan, 0.5 * z)

    model = NDM(predictor, (2,), schedule=SMOOTH)
    broken = torch.tensor([False, True, False, True])
    with pytest.raises(SolverError, match=r"NaN or infinite in batch rows \[.*Loosen rtol/atol") as caught:
        sample_rows(model, torch.randn(4, 2), broken=broken)
    assert set(caught.value.rows) <= {1, 3}
    assert caught.value.t == pytest.approx(0.5, abs=1e-2)
    with pytest.raises(SolverError, match=r"at t=1 .*NaN or infinite in batch rows \[0, 1\]"):
        sample_rows(NDM(lambda z, t: math.nan * z, (2,), schedule=SMOOTH), torch.randn(2, 2))


def test_a_nan_within_reach_of_one_large_trial_costs_a_rejection_only():
    """The prediction is bad far out, where only a careless step would go."""
    model = NDM(lambda z, t: torch.where(z.abs() > 6.0, math.nan, 0.5 * z), (2,), schedule=SMOOTH)
    z = torch.full((8, 2), 5.7).double()
    assert bool(torch.isfinite(sample_rows(model, z, rtol=1.0, atol=1.0, generator=seeded(*range(8))).state[0]).all())


def test_too_many_evaluations_are_refused():
    model = mixture(SMOOTH, d=2)
    with pytest.raises(SolverError, match=r"25 evaluations were not enough in batch rows \[0, 1, 2\]") as caught:
        sample_rows(model, start(model, 3, None), max_evaluations=25)
    assert caught.value.rows == (0, 1, 2)
    assert 0.0 < caught.value.t < 1.0


def test_a_vanishing_step_is_refused(monkeypatch):
    monkeypatch.setattr(sde._Solve, "vanished", 1e-3)
    model = NDM(lambda z, t: 1e3 * torch.sin(1e3 * z), (2,), schedule=SMOOTH)
    with pytest.raises(SolverError, match=r"the step size vanished in batch rows \[0\]") as caught:
        sample_rows(model, torch.randn(1, 2).double(), rtol=1e-4, atol=1e-4)
    assert caught.value.dt < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 5, "rtol": 0.1}, "rtol has no effect with method='sde', which takes fixed steps"),
        ({"nfe": 5, "atol": 0.1}, "atol has no effect"),
        ({"grid": "logsnr"}, "grid has no effect with method='sde', which chooses its own steps along the reverse"),
        ({"trace": "exact"}, "trace has no effect"),
        ({"trajectory": True}, "trajectory has no effect"),
        ({"callback": print}, "callback has no effect"),
        ({"rtol": 0.0}, "rtol must be positive and finite"),
        ({"atol": math.inf}, "atol must be positive and finite"),
        ({"stochasticity": -1.0}, "stochasticity must be a finite number >= 0"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ndm_ct.sample(mixture(SMOOTH, d=2), 2, method="sde", **options)
