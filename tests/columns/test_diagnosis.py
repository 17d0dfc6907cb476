"""Samples beside held-out rows: only differences are found, where they are, and anomalies are as rare as they say."""

import json
import math
import warnings

import numpy as np
import pytest

from ndm_ct.columns import Anomalies, diagnose, hidden_structure

sklearn = pytest.importorskip("sklearn", minversion="1.6")


def compared(held_out, samples, random, names="abcd", truncations=math.nan):
    n = len(held_out)
    scores = Anomalies(np.zeros(n), np.zeros(n))
    return diagnose(list(names[: held_out.shape[1]]), held_out, samples, scores, np.full(n, truncations), random)


def test_equal_laws_are_told_apart_as_rarely_as_the_p_value_says():
    random = np.random.default_rng(0)
    found = [
        compared(random.normal(size=(60, 3)), random.normal(size=(80, 3)), random).differences[0].p_value
        for _ in range(200)
    ]
    for level in (0.05, 0.2, 0.5):  # the smallest of all p-values of a comparison
        assert np.mean(np.array(found) <= level) <= level + 3.0 * math.sqrt(level * (1.0 - level) / 200)
    assert np.mean(found) == pytest.approx(0.5, abs=0.07)


def normal(random):
    return random.normal(size=(500, 4))


def shifted(random):
    return normal(random) + [0.0, 0.4, 0.0, 0.0]


def dependent(random):
    x = normal(random)
    x[:, 3] = 0.7 * x[:, 0] + math.sqrt(0.51) * x[:, 3]
    return x


def ring(random):
    x, angle = normal(random), 2.0 * math.pi * random.random(500)
    x[:, :2] = np.stack([np.cos(angle), np.sin(angle)], 1) + 0.1 * x[:, :2]
    return x


def apart(random):
    x = ring(random)
    x[:, 1] = random.permutation(x[:, 1])
    return x


@pytest.mark.parametrize(
    ("held_out", "samples", "columns"),
    [(normal, shifted, ("b",)), (dependent, normal, ("a", "d")), (ring, apart, ("a", "b"))],
)
def test_a_difference_is_found_where_it_is(held_out, samples, columns):
    random = np.random.default_rng(1)
    found = compared(held_out(random), samples(random), random)
    singles_and_pairs = [each.columns for each in found.found if len(each.columns) < 3]
    assert columns in singles_and_pairs
    assert all(set(columns) & set(each) for each in singles_and_pairs)
    assert not found.trusted
    assert str(found).startswith("Do not trust this density: samples differ from held-out rows in ")
    assert " and ".join(columns) in str(found)


def test_ranks_and_distances_are_those_of_the_distribution_functions():
    random = np.random.default_rng(2)
    from scipy.stats import ks_2samp

    held_out, samples = random.normal(size=(200, 2)), random.normal(size=(300, 2)) + [0.0, 0.3]
    held_out[:50, 1] = np.nan
    found = compared(held_out, samples, random)
    for k in range(2):
        values = held_out[:, k][~np.isnan(held_out[:, k])]
        assert found.distances[k] == pytest.approx(ks_2samp(values, samples[:, k]).statistic)
        shares = (samples[None, :, k] < values[:, None]).mean(1)
        np.testing.assert_allclose(found.ranks[:, k][~np.isnan(held_out[:, k])], shares, atol=1e-12)
    assert np.isnan(found.ranks[:50, 1]).all()
    integers = random.integers(0, 3, size=(2000, 1)).astype(float)
    spread = compared(integers[:1000], integers[1000:], random).ranks
    assert np.histogram(spread, 10, (0.0, 1.0))[0] == pytest.approx(np.full(10, 100), abs=40)


def test_the_energy_is_that_of_the_definition():
    random = np.random.default_rng(3)
    held_out, samples = random.normal(size=(30, 1)), random.normal(size=(40, 1)) + 0.5
    pooled = np.concatenate([held_out, samples])[:, 0]
    ranks = (pooled.argsort().argsort() + 0.5) / 70

    def mean(a, b):
        return np.log1p(20.0 * abs(a[:, None] - b[None])).mean()

    x, y = ranks[:30], ranks[30:]
    square = 2.0 * mean(x, y) - mean(x, x) - mean(y, y)
    (found,) = compared(held_out, samples, random).differences
    assert found.energy == pytest.approx(square / (2.0 * mean(x, y)), rel=1e-4)


def test_p_values_of_rows_are_uniform_with_noisy_scores_too():
    random = np.random.default_rng(4)
    held, rows = random.normal(size=2000), random.normal(size=2000)
    exact = Anomalies(held, np.zeros(2000)).p_values(rows, np.zeros(2000))[0]
    assert exact == pytest.approx((1.0 + (held[None] <= rows[:, None]).sum(1)) / 2001.0)
    for level in (0.01, 0.1, 0.5):
        assert (exact <= level).mean() == pytest.approx(level, abs=4.0 * math.sqrt(2.0 * level * (1.0 - level) / 2000))
    one = Anomalies(np.zeros(1), np.ones(1)).p_values(np.ones(1), np.full(1, math.sqrt(3.0)))[0]
    assert float(one[0]) == pytest.approx(0.5 * (1.0 + 0.5 * (1.0 + math.erf(0.5 / math.sqrt(2.0)))))
    errors = np.full(2000, 0.5)
    noisy = Anomalies(held + 0.5 * random.normal(size=2000), errors).p_values(
        rows + 0.5 * random.normal(size=2000), errors
    )
    true = np.array([(held <= row).mean() for row in rows])
    z = (noisy[0] - true) / noisy[1]
    assert np.sqrt(np.mean(z**2)) < 1.5
    assert (noisy[0] <= 0.05).mean() <= 0.05 + 4.0 * math.sqrt(0.1 / 2000)


def test_impossible_and_unknown_scores_have_their_ranks():
    held = Anomalies(np.array([-math.inf, 0.0, 1.0]), np.zeros(3))
    p, _ = held.p_values(np.array([-math.inf, 0.5, 2.0, math.nan]), np.array([0.0, 0.0, 0.0, 0.0]))
    np.testing.assert_allclose(p, [0.5, 0.75, 1.0, math.nan])


def test_noise_that_hides_structure_is_said():
    assert hidden_structure(np.full(60, 0.05)) == ""
    assert hidden_structure(np.full(40, 400.0)) == ""  # few rows may be unlike all others
    assert hidden_structure(np.append(np.zeros(60), np.full(20, 400.0))) == ""
    assert "changes log p by -0.3 nats in the median row" in hidden_structure(np.append(np.full(60, -0.3), math.nan))
    random = np.random.default_rng(5)
    found = compared(random.normal(size=(100, 2)), random.normal(size=(100, 2)), random, truncations=0.5)
    assert not found.trusted
    assert "lower gamma_min" in str(found)
    assert json.loads(json.dumps(found.to_json()))["truncation"] == pytest.approx(0.5)


# ------------------------------------------------------------------------------------------------------ the estimator


@pytest.fixture(scope="module")
def density():
    from ndm_ct.estimator import NDMDensity

    random = np.random.default_rng(6)
    rows = random.normal(size=(1200, 2)) @ np.array([[1.0, 0.6], [0.0, 0.8]])
    return NDMDensity(width=32, depth=1, steps=200, random_state=0).fit(rows), rows


def test_the_estimator_diagnoses_itself(density):
    trained, rows = density
    assert len(trained.held_out_) == 120
    good = trained.diagnose(random_state=0)
    assert good.trusted, str(good)
    assert good.anomalies.scores == pytest.approx(
        trained.score_samples(trained.held_out_)[np.random.RandomState(0).permutation(120)]
    )
    other = trained.diagnose(rows[:, ::-1] * [1.0, 3.0], random_state=0)
    assert not other.trusted
    with pytest.raises(ValueError, match="50 rows or more"):
        trained.diagnose(rows[:20])


def test_p_values_of_the_estimator(density):
    trained, rows = density
    p, error = trained.p_values(np.array([[0.0, 0.0], [9.0, -9.0]]), return_std=True)
    assert p[0] > 0.8
    assert p[1] == pytest.approx(1.0 / 121.0)
    assert (error < 0.05).all()
    assert trained.p_values(rows[:3]) == pytest.approx(trained.p_values(rows[:3]))


def test_frames_go_in_and_come_out():
    pd = pytest.importorskip("pandas")
    from ndm_ct.estimator import NDMDensity

    random = np.random.default_rng(7)
    frame = pd.DataFrame({"a": random.normal(size=90), "kind": random.choice(["x", "y"], 90)}, index=np.arange(90) + 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = NDMDensity(width=8, depth=1, steps=5, conditionals=True, random_state=0).fit(frame)
    assert isinstance(fitted.score_samples(frame[:3]), np.ndarray)
    sklearn.base.clone(fitted.set_output(transform="pandas"))
    scores, drawn = fitted.score_samples(frame[:3]), fitted.sample(4, random_state=0)
    assert scores.index.tolist() == [5, 6, 7]
    assert drawn.columns.tolist() == ["a", "kind"]
    assert drawn.dtypes["a"] == np.float64
    missing = frame.copy()
    missing.loc[6, "a"] = np.nan
    filled = fitted.impute(missing[:3], random_state=0)
    assert filled.index.tolist() == [5, 6, 7]
    assert filled.loc[5, "a"] == frame.loc[5, "a"]
    assert np.isfinite(filled.loc[6, "a"])
    with pytest.raises(ValueError, match="transform='arrow' is unknown"):
        fitted.set_output(transform="arrow")


def test_a_warm_start_goes_on():
    from ndm_ct.estimator import NDMDensity

    rows = np.random.default_rng(8).normal(size=(400, 1)) ** 3
    once = NDMDensity(width=16, depth=1, steps=150, random_state=0, warm_start=True).fit(rows)
    first, table = once.validation_[-1]["validation_elbo"], once.table_
    weights = {name: value.clone() for name, value in once.model_.state_dict().items()}
    once.set_params(steps=1, lr=1e-9).fit(rows)
    assert once.table_ is table
    assert all(np.allclose(value, once.model_.state_dict()[name], atol=1e-6) for name, value in weights.items())
    once.set_params(steps=150, lr=2e-3).fit(rows)
    assert once.validation_[-1]["validation_elbo"] > first - 0.05
    with pytest.raises(ValueError, match="features"):
        once.fit(np.hstack([rows, rows]))
