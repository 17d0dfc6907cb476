"""The estimator of scikit-learn: its checks, the units of its density, early stopping, pipelines and searches."""

import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", minversion="1.6")

from scipy import stats
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import ndm_ct
from ndm_ct.estimator import NDMDensity
from ndm_ct.estimator import density as estimator

SCALES = np.array([1.0, 10.0, 0.01])


def rows(n, seed=0):
    """Correlated normal columns of very different scales, and their exact log-density."""
    generator = np.random.default_rng(seed)
    factor = np.array([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.5, 0.9]])
    white = generator.normal(size=(n, 3))
    x = (white @ factor.T) * SCALES + np.array([5.0, -100.0, 0.3])
    log_p = -0.5 * (white**2).sum(1) - 1.5 * np.log(2.0 * np.pi) - np.log(np.diag(factor)).sum() - np.log(SCALES).sum()
    return x, log_p


@pytest.fixture(scope="module")
def fitted():
    return NDMDensity(width=32, steps=600, batch_size=512, random_state=0).fit(rows(4000)[0])


@pytest.mark.filterwarnings("ignore:values repeat")
@parametrize_with_checks([NDMDensity(width=8, depth=1, steps=3, batch_size=32, random_state=0)])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def test_densities_are_in_the_units_of_the_table(fitted):
    """Normal data: the density is known; off by the log-determinant it would be off by 2.3 nats."""
    x, log_p = rows(500, seed=1)
    gap = fitted.score_samples(x) - log_p
    assert abs(gap.mean()) < 0.08
    assert gap.std() < 0.3
    assert fitted.score(x) == pytest.approx(fitted.score_samples(x).mean())


def test_changing_a_unit_changes_the_density_by_its_logarithm():
    x, _ = rows(300)
    density = NDMDensity(width=8, steps=20, random_state=0).fit(x)
    other = clone(density).fit(x * [1.0, 1.0, 1000.0])
    moved = other.score_samples(x[:50] * [1.0, 1.0, 1000.0])
    np.testing.assert_allclose(moved, density.score_samples(x[:50]) - np.log(1000.0), atol=2e-3)


def test_samples_have_the_moments_of_the_rows(fitted):
    x = fitted.sample(2000, random_state=0)
    mean, spread = rows(100_000)[0].mean(0), rows(100_000)[0].std(0)
    assert (np.abs(x.mean(0) - mean) < 5.0 * spread / 2000**0.5).all()
    np.testing.assert_allclose(x.std(0), spread, rtol=0.15)
    np.testing.assert_array_equal(x, fitted.sample(2000, random_state=0))
    assert not np.array_equal(x, fitted.sample(2000, random_state=1))


def test_the_model_inside_is_one_of_the_library(fitted):
    x, _ = rows(5)
    z = (x - fitted.mean_) / fitted.scale_
    log_p = ndm_ct.loglik(fitted.model_, torch.from_numpy(z), method="exponential").double().numpy()
    np.testing.assert_allclose(log_p - np.log(fitted.scale_).sum(), fitted.score_samples(x), atol=1e-5)


def test_training_stops_early_on_rows_held_out():
    x = np.random.default_rng(0).normal(size=(110, 3))
    stopped = NDMDensity(width=64, steps=1000, lr=1e-2, patience=2, random_state=0).fit(x)
    assert stopped.n_steps_ < 1000
    bounds = [row["validation_elbo"] for row in stopped.validation_]
    assert len(bounds) == int(np.argmax(bounds)) + 3
    whole = NDMDensity(width=8, steps=20, validation_fraction=0.0, random_state=0).fit(x)
    assert whole.n_steps_ == 20
    assert whole.validation_ == ()


LAWS = {
    "student": stats.t(2.0),
    "pareto": stats.pareto(1.5),
    "lognormal": stats.lognorm(2.0),
    "a peak": stats.norm(),
}


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_peaks_and_heavy_tails_are_scored_as_they_are(law):
    """Within 0.05 nat of the exact mean; "a peak" has 1 % of its rows on a scale 10,000 times wider."""
    generator = np.random.default_rng(0)

    def draw(n):
        x = LAWS[law].rvs(n, random_state=generator)
        return x * np.where(generator.random(n) < 0.01, 1e4, 1.0) if law == "a peak" else x

    density = NDMDensity(width=32, depth=2, steps=1200, random_state=0).fit(draw(10_000)[:, None])
    fresh = draw(2000)
    exact = LAWS[law].logpdf(fresh)
    if law == "a peak":
        exact = np.logaddexp(np.log(0.99) + exact, np.log(0.01) + stats.norm.logpdf(fresh, scale=1e4))
    assert abs((density.score_samples(fresh[:, None]) - exact).mean()) < 0.05


def test_noise_and_marginals_are_chosen_from_the_rows():
    angle = np.random.default_rng(0).uniform(0.0, 6.28, 400)
    curve = np.stack([np.cos(angle), np.sin(angle)], 1)
    density = NDMDensity(width=8, steps=2, random_state=0).fit(curve)
    assert density.gamma_min_ < -11.0
    assert float(density.model_.schedule.gamma_min) == density.gamma_min_
    assert NDMDensity(width=8, steps=2, gamma_min=-7.0).fit(curve).gamma_min_ == -7.0
    linear = NDMDensity(width=8, steps=2, marginals="linear").fit(curve)
    assert type(linear.model_.transform).__name__ == "Identity"
    with pytest.raises(ValueError, match="marginals"):
        NDMDensity(marginals="none").fit(curve)


def test_the_same_seed_gives_the_same_density():
    x, _ = rows(200)
    one, two, other = (NDMDensity(width=8, steps=20, random_state=seed).fit(x) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.score_samples(x), two.score_samples(x))
    assert not np.array_equal(one.score_samples(x), other.score_samples(x))


def test_constant_columns_do_not_break_it():
    """They are left out; another value has probability 0."""
    x = np.random.default_rng(0).normal(size=(60, 2))
    x[:, 1] = 3.0
    with pytest.warns(UserWarning, match="1 distinct value"):
        density = NDMDensity(width=8, steps=20, random_state=0).fit(x)
    alone = NDMDensity(width=8, steps=20, random_state=0).fit(x[:, :1])
    np.testing.assert_array_equal(density.score_samples(x), alone.score_samples(x[:, :1]))
    assert density.score_samples([[0.0, 3.5]]) == [-np.inf]
    assert (density.sample(3)[:, 1] == 3.0).all()


def test_pipelines_searches_and_pickles_take_it():
    x, _ = rows(200)
    pipeline = make_pipeline(StandardScaler(), NDMDensity(width=8, steps=20, marginals="linear", random_state=0))
    search = GridSearchCV(pipeline, {"ndmdensity__lr": [1e-4, 1e-2]}, cv=2).fit(x)
    assert search.best_params_["ndmdensity__lr"] == 1e-2
    again = pickle.loads(pickle.dumps(search.best_estimator_))
    np.testing.assert_array_equal(again.score_samples(x), search.best_estimator_.score_samples(x))


def test_tables_of_pandas_keep_their_names():
    pandas = pytest.importorskip("pandas")
    x, _ = rows(60)
    table = pandas.DataFrame(x, columns=["a", "b", "c"])
    density = NDMDensity(width=8, steps=5, random_state=0).fit(table)
    assert density.feature_names_in_.tolist() == ["a", "b", "c"]
    with pytest.raises(ValueError, match="feature names"):
        density.score_samples(table[["b", "a", "c"]])


def test_weights_count_as_repetitions():
    """Rows at 3 with weight 3 against rows at 0: a quarter of the samples are near 0, and zero weights are no rows."""
    x = np.concatenate([np.zeros(400), np.full(400, 3.0), np.full(100, 50.0)]) + 0.3 * np.random.default_rng(0).normal(
        size=900
    )
    weights = np.repeat([1.0, 3.0, 0.0], [400, 400, 100])
    density = NDMDensity(width=32, depth=2, steps=300, random_state=0).fit(x[:, None], sample_weight=weights)
    drawn = density.sample(1000, random_state=0)
    assert abs((drawn < 1.5).mean() - 0.25) < 0.06
    assert drawn.max() < 10.0
    for wrong in (-weights, np.eye(900)[0]):
        with pytest.raises(ValueError, match="sample_weight must be"):
            density.fit(x[:, None], sample_weight=wrong)


def test_held_out_rows_are_drawn_by_their_weights():
    weights = np.where(np.arange(200) < 100, 0.0, 1.0) + 1e-9
    density = NDMDensity(validation_fraction=0.5)
    kept, others, _ = estimator._hold_out(density, 200, weights, np.random.RandomState(0))
    assert others.min() >= 100
    assert len(set(kept) | set(others)) <= 200
    assert not set(kept) & set(others)


def test_estimates_come_with_their_errors(fitted):
    x = rows(4, seed=2)[0]
    scores, errors = fitted.score_samples(x, return_std=True)
    np.testing.assert_allclose(scores, fitted.score_samples(x), atol=1e-6)
    np.testing.assert_array_equal(errors, 0.0)
    wide = np.random.default_rng(0).normal(size=(60, 40))
    density = NDMDensity(width=16, depth=1, steps=5, random_state=0).fit(wide)
    assert (density.score_samples(wide[:3], return_std=True)[1] > 0.0).all()


def test_numbers_of_numpy_are_numbers():
    x = np.random.default_rng(0).normal(size=(120, 2))
    options = {"width": 8, "depth": 1, "steps": 4, "batch_size": 32, "patience": 3, "random_state": 0}
    density = NDMDensity(**{key: np.int64(value) for key, value in options.items()}, lr=np.float32(1e-3))
    assert density.fit(x, sample_weight=[1] * 120).sample(np.int64(3)).shape == (3, 2)
    search = GridSearchCV(density, {"width": np.array([4, 8]), "flow": np.arange(1)}, cv=2).fit(x)
    assert pickle.loads(pickle.dumps(search)).best_estimator_.n_features_in_ == 2


@pytest.mark.parametrize(("wrong", "message"), [
    ({"validation_fraction": 1.0}, "validation_fraction"), ({"steps": 0}, "steps"), ({"lr": -1.0}, "lr"),
    ({"width": 0}, "width"), ({"gamma_min": 6.0}, "gamma_m"), ({"device": "cuda:99"}, "device='cuda:99'"),
])  # fmt: skip
def test_parameters_are_validated(wrong, message):
    with pytest.raises(ValueError, match=message):
        NDMDensity(**({"width": 8, "steps": 5} | wrong)).fit(np.random.default_rng(0).normal(size=(60, 2)))


def test_estimates_of_a_row_do_not_know_the_others():
    """Beyond 32 columns a trace is sampled."""
    x = np.random.default_rng(0).normal(size=(60, 40))
    density = NDMDensity(width=16, depth=1, steps=20, random_state=0).fit(x)
    scores = density.score_samples(x[:6])
    np.testing.assert_allclose(density.score_samples(x[:6][::-1])[::-1], scores, rtol=0, atol=1e-6)
    np.testing.assert_allclose([density.score(row[None]) for row in x[:6]], scores, rtol=0, atol=1e-6)


def test_a_flow_inside_keeps_units_and_density():
    pytest.importorskip("zuko")
    x, _ = rows(4000)
    density = NDMDensity(width=32, flow=1, steps=400, batch_size=512, random_state=0).fit(x)
    fresh, exact = rows(500, seed=1)
    gap = density.score_samples(fresh) - exact
    assert abs(gap.mean()) < 0.1
    latent, logdet = density.model_.transform.to_latent(torch.from_numpy((fresh - density.mean_) / density.scale_))
    assert float(logdet.abs().max()) > 0.05  # it has been learned, and its determinant counts
    assert float((latent - torch.from_numpy((fresh - density.mean_) / density.scale_)).abs().max()) > 0.05
    again = pickle.loads(pickle.dumps(density))
    np.testing.assert_array_equal(again.score_samples(fresh[:20]), density.score_samples(fresh[:20]))
    drawn = density.sample(2000, random_state=0)
    np.testing.assert_allclose(drawn.mean(0) / SCALES, x.mean(0) / SCALES, atol=0.15)
    np.testing.assert_allclose(np.cov((drawn / SCALES).T), np.cov((x / SCALES).T), atol=0.15)


def mixed(n, seed=0):
    """Words, counts that grow with a real value, an hour, and a copy of all with missing values."""
    generator = np.random.default_rng(seed)
    k = generator.integers(0, 3, n)
    x = generator.normal(size=n) + 2.0 * k
    count = generator.poisson(np.exp(0.3 * x)).clip(max=5)
    return np.array([["red", "green", "blue"][each] for each in k], dtype=object), x, count


@pytest.fixture(scope="module", params=[False, True])
def of_kinds(request):
    word, x, count = mixed(600)
    rows = np.stack([word, x, count], 1)
    kinds = {
        "x0": "categorical",
        "x1": {"kind": "continuous", "low": -9.0},
        2: {"kind": "integer", "low": 0, "high": 5},
    }
    options = {"width": 16, "depth": 1, "batch_size": 128, "steps": 200, "lr": 5e-3, "random_state": 0}
    return NDMDensity(columns=kinds, conditionals=request.param, **options).fit(rows), rows


def test_a_table_of_all_kinds_has_mass_one(of_kinds):
    """Summed over categories and counts, integrated over the real column; in the units that are said."""
    density, _ = of_kinds
    x = np.linspace(-4.5, 9.0, 46)
    grid = [(word, each, count) for word in ("red", "green", "blue") for count in range(6) for each in x]
    scores, errors = density.score_samples(np.array(grid, dtype=object), samples=4, return_std=True)
    error = (x[1] - x[0]) * np.linalg.norm(np.exp(scores) * errors)
    assert error < 0.03
    assert np.exp(scores).sum() * (x[1] - x[0]) == pytest.approx(1.0, abs=4.0 * error)
    assert density.unit_ == "density of x1, probability of x0, x2; nats"
    outside = np.array([["red", -9.5, 1], ["mauve", 0.0, 1], ["red", 0.0, 6], ["red", 0.0, 1.5]], dtype=object)
    assert (density.score_samples(outside) == -np.inf).all()


def test_values_are_drawn_as_they_came(of_kinds):
    density, rows = of_kinds
    drawn = density.sample(300, random_state=0)
    assert set(drawn[:, 0]) == {"red", "green", "blue"}
    assert set(drawn[:, 2]) <= set(range(6))
    assert (drawn[:, 1] > -9.0).all()
    red = (rows[:, 0] == "red").mean()
    assert abs((drawn[:, 0] == "red").mean() - red) < 5.0 * (red * (1.0 - red) / 300) ** 0.5


def test_conditionals_are_one_model(of_kinds):
    """log p(a, b) = log p(a) + log p(b | a) holds where both sides are of one model, to what its training reached."""
    density, rows = of_kinds
    hidden = rows[:50].copy()
    hidden[:, 1:] = None
    if not density.conditionals:
        for wrong in (
            lambda: density.score_samples(hidden), lambda: density.sample(2, given={"x1": 0.0}),
            lambda: density.score_samples(rows[:2], given=["x1"]), lambda: density.impute(hidden),
        ):  # fmt: skip
            with pytest.raises(ValueError, match="conditionals=True"):
                wrong()
        return
    marginal = density.score_samples(hidden)
    np.testing.assert_allclose(np.exp(marginal), 1.0 / 3.0, atol=0.1)
    rest = density.score_samples(rows[:50], given=["x0"])
    whole = density.score_samples(rows[:50])
    assert abs((marginal + rest - whole).mean()) < 0.05
    everything = density.score_samples(rows[:5], given=["x0", 1, 2])
    np.testing.assert_allclose(everything, 0.0, atol=1e-12)
    blue = density.sample(200, random_state=0, given={"x0": "blue"})
    assert (blue[:, 0] == "blue").all()
    assert blue[:, 1].mean() > density.sample(200, random_state=0, given={0: "red"})[:, 1].mean() + 1.0
    full = density.impute(hidden, draws=2, random_state=0)
    assert full.shape == (2, 50, 3)
    assert (full[:, :, 0] == hidden[:, 0]).all()
    assert not (full[0, :, 1] == full[1, :, 1]).any()
    with pytest.raises(ValueError, match="no mass"):
        density.sample(1, given={"x0": "mauve"})
    with pytest.raises(ValueError, match="names the column"):
        density.sample(1, given={"colour": "red"})


def test_missing_values_make_a_model_of_conditionals():
    pandas = pytest.importorskip("pandas")
    word, x, count = mixed(300)
    frame = pandas.DataFrame({"hue": word, "x": x, "n": pandas.array(count, dtype="Int64")})
    frame.loc[::3, "x"] = np.nan
    frame.loc[1::5, "hue"] = None
    frame.loc[2::7, "n"] = pandas.NA
    with pytest.warns(UserWarning, match=r"'hue' \(categorical: 3 distinct words\), 'n' \(rounded"):
        density = NDMDensity(width=16, depth=1, steps=20, random_state=0).fit(frame)
    assert density.table_.conditionals
    scores, errors = density.score_samples(frame, return_std=True)
    assert np.isfinite(scores).all()
    assert (errors[2::7] < errors.max()).all()
    full = density.impute(frame, random_state=0)
    assert not pandas.isna(full).any()
    again = pickle.loads(pickle.dumps(density))
    np.testing.assert_array_equal(again.score_samples(frame[:20]), scores[:20])
    assert "missing" in density.summary_
    with pytest.raises(ValueError, match="missing values"):
        NDMDensity(steps=5, conditionals=False).fit(np.where(np.eye(20, 2) > 0, np.nan, x[:40].reshape(20, 2)))
    masked = np.ma.masked_array(np.stack([x, count + x], 1), mask=np.arange(600).reshape(300, 2) % 7 == 0)
    assert NDMDensity(width=8, depth=1, steps=5, random_state=0).fit(masked).table_.conditionals
