"""Columns of every kind: how kinds are found, their changes of variables, and mass that adds up to one."""

import numpy as np
import pytest
import torch
from scipy import stats

from ndm_ct.columns import OBSERVED as O
from ndm_ct.columns import TARGET as T
from ndm_ct.columns import UNKNOWN as U
from ndm_ct.columns import Categories, Coding, Column, TableMap, Values, columns_of, fit_column_map, summary
from ndm_ct.columns.kinds import restored
from ndm_ct.columns.reading import numbers_and_words, values_in

RNG = np.random.default_rng(0)


def table(**columns):
    return values_in_of({name: np.asarray(column) for name, column in columns.items()})


def values_in_of(columns):
    found = [numbers_and_words(name, column) for name, column in columns.items()]
    words = {place: each for place, (_, each) in enumerate(found) if each is not None}
    return Values(np.stack([numbers for numbers, _ in found], 1), tuple(columns), words)


INFERRED = {
    "continuous": (RNG.normal(size=200), ("continuous", None, None)),
    "counts": (RNG.poisson(3.0, 200), ("rounded", 1.0, 0.0)),
    "ages": (RNG.integers(18, 90, 200), ("rounded", 1.0, None)),
    "tenths": (RNG.normal(20, 1, 200).round(1), ("rounded", 0.1, None)),
    "inches": (RNG.integers(3, 40, 200) / 16, ("rounded", 0.0625, None)),
    "halves": (0.25 + RNG.integers(3, 40, 200) / 2, ("rounded", 0.5, None)),
    "flag": (RNG.integers(0, 2, 200), ("categorical", None, None)),
    "words": (np.array(["b", "a", "c"], dtype=object)[RNG.integers(0, 3, 200)], ("categorical", None, None)),
    "logical": (RNG.integers(0, 2, 200).astype(bool), ("categorical", None, None)),
    "constant": (np.full(200, 1 / 3), ("constant", None, None)),
    "one word": (np.full(200, "x", dtype=object), ("constant", None, None)),
    "dates": (np.array(["2024-01-02", "2024-02-03"] * 100, dtype=object), ("left out", None, None)),
    "times": (np.datetime64("2024-01-01") + RNG.integers(0, 90, 200), ("left out", None, None)),
    "identifiers": (np.array([f"id{k}" for k in range(200)], dtype=object), ("left out", None, None)),
    "all whole, all different": (np.arange(200), ("continuous", None, None)),
    "thirds": (RNG.integers(0, 40, 200) / 3, ("continuous", None, None)),
    "nothing": (np.full(200, np.nan), ("left out", None, None)),
}  # fmt: skip


@pytest.mark.parametrize("kind", INFERRED)
def test_kinds_are_inferred_from_the_values(kind):
    values, expected = INFERRED[kind]
    found = columns_of(table(beside=RNG.normal(size=200), it=values))[1]
    assert (found.kind, found.width, found.low) == expected


def test_the_summary_says_every_decision():
    words = np.where(np.arange(200) % 4, "red", None)
    values = table(
        height=RNG.normal(size=200), hue=words, stars=RNG.integers(0, 5, 200), name=[f"n{k}" for k in range(200)]
    )
    values = Values(values.numbers, values.names, values.words)
    said = summary(columns_of(values, {"height": {"kind": "continuous", "low": -9}}), values)
    lines = said.splitlines()
    assert lines[0].split() == ["column", "kind", "range", "missing", "what", "is", "done"]
    assert "above -9 only" in lines[1]
    assert "50" in lines[2].split()
    assert "probability of a bin of width 1, from 0 (5 distinct values, whole numbers)" in lines[3]
    assert "left out (200 distinct words in 200 rows: taken for identifiers)" in lines[4]


@pytest.mark.parametrize(("schema", "message"), [
    ({"c": "continuous"}, "names 'c'"), ({"a": "number"}, "continuous"), ({"a": {"low": 1}}, "'kind'"),
    ({"a": {"kind": "categorical", "low": 0}}, "entry 'low'"), ({"a": {"kind": "circular"}}, "'period'"),
    ({"a": {"kind": "continuous", "low": 1, "high": 0}}, "not below"), ({"b": "integer"}, "words"),
    ({"a": {"kind": "continuous", "low": 0.0}}, "outside of low=0.0"), ({"a": "integer"}, "no whole number of widths"),
    ({"a": {"kind": "rounded", "width": -1}}, "positive"), ({"a": {"kind": "continuous", "low": "0"}}, "a number"),
    ({"a": "constant"}, "no constant"), ("left out", "no column is left"), ([1], "mapping"),
    ({"a": "rounded"}, "width"),
])  # fmt: skip
def test_schemas_are_validated(schema, message):
    values = table(a=RNG.normal(size=50), b=np.array(["p", "q"] * 25, dtype=object))
    with pytest.raises(ValueError, match=message):
        columns_of(values, schema)


def test_containers_hold_what_they_hold():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({
        "n": pandas.array([1, None, 3], dtype="Int64"), "w": pandas.Categorical(["b", None, "a"]),
        "t": [True, False, True],
    })  # fmt: skip
    values = values_in(frame)
    np.testing.assert_array_equal(values.numbers, [[1.0, 1.0, 1.0], [np.nan, np.nan, 0.0], [3.0, 0.0, 1.0]])
    assert values.words == {1: ("a", "b"), 2: (False, True)}
    assert values_in(np.ones((2, 2))) is None
    assert values_in(np.array([["a", 1.0], ["b", None]], dtype=object)).words == {0: ("a", "b")}
    for wrong in (np.array(["a", 1.0], dtype=object), np.array([1.0, np.inf])):
        with pytest.raises(ValueError, match=r"words and numbers|infinity"):
            numbers_and_words("x", wrong)


REAL = {
    "plain": (Column("x", "continuous"), np.linspace(-9, 9, 40_001)),
    "above": (Column("x", "continuous", low=-1.0), -1.0 + np.geomspace(1e-5, 1e4, 100_001)),
    "below": (Column("x", "continuous", high=2.0), 2.0 - np.geomspace(1e-5, 1e4, 100_001)[::-1]),
    "between": (Column("x", "continuous", low=-1.0, high=4.0), np.linspace(-1.0, 4.0, 200_001)[1:-1]),
}


def log_density(coding, numbers, noise):
    """Of a model that has N(0, 1) in every standardised feature."""
    coded = coding.encode(numbers, noise)
    return stats.norm.logpdf(coded.features).sum(1) + coded.weights.sum(1)


@pytest.mark.parametrize("kind", REAL)
def test_densities_integrate_to_one_within_the_bounds(kind):
    column, x = REAL[kind]
    p = np.exp(log_density(Coding([column], [0.3], [1.5]), x[:, None], np.zeros((len(x), 0))))
    assert np.trapezoid(p, x) == pytest.approx(1.0, abs=2e-4)
    outside = np.array([[-1.0 if column.low is not None else -50.0], [4.0 if column.high == 4.0 else 50.0]])
    possible = Coding([column]).encode(outside, np.zeros((2, 0))).possible[:, 0]
    assert possible.tolist() == [column.low is None, column.high is None]


ROUNDED = {
    "whole": Column("x", "rounded", width=1.0),
    "counts": Column("x", "rounded", width=1.0, low=0.0),
    "tenths": Column("x", "rounded", width=0.1, low=-0.35, high=0.35, origin=0.05),
    "hours": Column("x", "circular", period=24.0, width=1.0, low=0.0),
}


def quadrature(noises, circular):
    """Points and weights of the mean over the noise; wide in the radius, whose weights have heavy tails."""
    u, v = (np.arange(32) + 0.5) / 32, np.linspace(-8.0, 8.0, 801)
    axes = [u] * (noises - circular) + [stats.norm.cdf(v)] * circular
    weights = [np.full(32, 1 / 32)] * (noises - circular) + [stats.norm.pdf(v) * (v[1] - v[0])] * circular
    product = np.prod([each.ravel() for each in np.meshgrid(*weights)], axis=0)
    return np.stack([each.ravel() for each in np.meshgrid(*axes)], 1).clip(1e-15, 1.0 - 1e-15), product


@pytest.mark.parametrize("kind", ROUNDED)
def test_probabilities_of_bins_add_up_to_one(kind):
    """Each bin with a fine midpoint rule over its noise; circles over the radius too."""
    column = ROUNDED[kind]
    k = np.arange(24) if column.kind == "circular" else np.arange(-400, 401)
    x = column.origin + column.width * k
    coding = Coding([column], [0.2] * column.features, [1.3] * column.features)
    inside = coding.encode(x[:, None], np.full((len(x), coding.noises), 0.5)).possible[:, 0]
    assert inside.all() == (column.low is None or column.kind == "circular")
    x = x[inside]
    noise, weights = quadrature(coding.noises, column.kind == "circular")
    total = sum(np.exp(log_density(coding, np.full((len(noise), 1), each), noise)) @ weights for each in x)
    assert total == pytest.approx(1.0, abs=0.01)


def test_a_circle_has_a_density_that_closes():
    """Of features N(0, 1) each the angle is uniform: the density is 1/P everywhere, at the seam too."""
    coding = Coding([Column("x", "circular", period=360.0)])
    noise, weights = quadrature(1, True)
    for x in (0.0, 359.9, 360.1, 77.0):
        p = np.exp(log_density(coding, np.full((len(noise), 1), x), noise)) @ weights
        assert p == pytest.approx(1.0 / 360.0, rel=0.01)
    once, again = (coding.encode(np.array([[x]]), np.array([[0.3]])).features for x in (1.0, 361.0))
    np.testing.assert_allclose(once, again, atol=1e-12)


def test_rows_come_back_as_they_were():
    values = table(
        x=RNG.normal(size=50), up=RNG.exponential(size=50), rate=RNG.uniform(size=50), n=RNG.poisson(2.0, 50),
        hour=RNG.integers(0, 24, 50), hue=np.array(["b", "a", "c"], dtype=object)[RNG.integers(0, 3, 50)],
        seven=np.full(50, 7.0), flag=RNG.integers(0, 2, 50),
    )  # fmt: skip
    columns = columns_of(values, {
        "up": {"kind": "continuous", "low": 0}, "rate": {"kind": "continuous", "low": 0, "high": 1},
        "hour": {"kind": "circular", "period": 24, "width": 1},
    })  # fmt: skip
    coding = Coding(restored([column.to_json() for column in columns]))
    numbers, noise = coding.places_of(values), RNG.random((50, coding.noises))
    coding.fit_scale(numbers, noise)
    coding = Coding.restored(coding.to_json())
    coded = coding.encode(numbers, noise)
    assert abs(coded.features.mean(0)).max() < 1e-12
    assert coded.possible.all()
    back = coding.values_of(coding.decode(coded.features, coded.codes))
    expected = values.numbers.astype(object)
    expected[:, 5] = np.array(values.words[5], dtype=object)[values.numbers[:, 5].astype(int)]
    for place in range(8):
        if place == 5:
            assert back[:, 5].tolist() == expected[:, 5].tolist()
        else:
            np.testing.assert_allclose(back[:, place].astype(float), values.numbers[:, place], rtol=1e-9, atol=1e-9)


def test_values_without_mass_are_known():
    columns = [Column("n", "rounded", width=1.0, low=0.0), Column("k", "categorical", values=("a", "b")),
               Column("c", "constant", values=(3.0,))]  # fmt: skip
    numbers = np.array([[0.0, 0.0, 3.0], [-1.0, 1.0, 3.0], [0.5, 0.0, 3.0], [2.0, 2.0, 4.0], [np.nan] * 3])
    coding = Coding(columns)
    places = coding.places_of(Values(numbers, ("n", "k", "c"), {1: ("a", "b", "z")}))
    coded = coding.encode(places, np.full((5, 1), 0.5))
    np.testing.assert_array_equal(coded.possible, [[1, 1, 1], [0, 1, 1], [0, 1, 1], [1, 0, 0], [1, 1, 1]])
    assert coded.codes[:, 0].tolist() == [0, 1, 0, -1, -1]
    assert np.isnan(coded.features[4]).all()


def shaken(module, seed=0):
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in module.parameters():
            each.copy_(0.7 * torch.randn(each.shape, generator=source))
    return module.double().eval().requires_grad_(False)


@pytest.mark.parametrize("roles", [None, (U, O, T, O, T), (O, O, U, T, T), (U, U, T, T, T)])
def test_probabilities_of_categories_add_up_to_one(roles):
    """Over all values of the targets, whatever is observed."""
    sizes = (2, 3, 4)
    categories = shaken(Categories(sizes, 0 if roles is None else 2, width=8))
    codes = torch.cartesian_prod(*(torch.arange(size) for size in sizes))
    given, known = None, None
    if roles is not None:
        given, known = torch.tensor([roles]).expand(len(codes), -1), torch.randn(1, 2).double().expand(len(codes), -1)
        hidden = torch.tensor([role != T for role in roles[2:]])
        codes = torch.unique(torch.where(hidden, torch.tensor([1, 2, 3]), codes), dim=0)
        given, known = given[: len(codes)], known[: len(codes)]
    p = categories.log_prob(codes, given, known).exp()
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-9)
    assert float(p.max() / p.min()) > 1.5
    n = 20_000
    u = torch.rand(n, 3, generator=torch.Generator().manual_seed(1))
    spread = [None if each is None else each[:1].expand(n, -1) for each in (given, known)]
    drawn = categories.draw(codes[:1].expand(n, -1), u, *spread)
    best = codes[p.argmax()]
    share = float((drawn == best).all(1).double().mean())
    assert share == pytest.approx(float(p.max()), abs=5.0 * (float(p.max()) / n) ** 0.5)


def test_the_map_of_a_table_has_the_determinant_of_its_targets():
    x = torch.from_numpy(RNG.standard_t(3.0, size=(400, 3)))
    mapped = TableMap(fit_column_map(x.numpy(), whiten=False), shaken(Categories((2,), 3, width=8)))
    row, roles = x[:1], torch.tensor([[T, O, T, T]])
    codes, known = torch.tensor([[1]]), torch.zeros(1, 3).double()
    y, weight = mapped(row, codes, roles, known)
    jacobian = torch.func.jacrev(lambda row: mapped(row, codes, roles, known)[0])(row)[0, :, 0]
    p = mapped.categories.log_prob(codes, roles, known)
    assert float(weight - p) == pytest.approx(float(jacobian.slogdet()[1]), abs=1e-9)
    assert float(y[0, 1]) == float(row[0, 1])
    torch.testing.assert_close(mapped.inverse(y, codes, roles, known), row)
