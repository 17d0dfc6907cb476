"""Columns that have no density are named, with a cure, wherever a table is trained on."""

import numpy as np
import pytest
import torch

import ndm_ct
from ndm_ct.cli import commands as cli
from ndm_ct.columns import repeated_values

RNG = np.random.default_rng(0)
SMOOTH = RNG.normal(size=200)
REPEATED = {
    "whole": (RNG.integers(0, 5, 200), "5 distinct values, whole numbers"),
    "large": (RNG.integers(0, 50, 200) * 1e12, "distinct values, whole numbers"),
    "negative": (RNG.poisson(9.0, 200) - 9.0, "whole numbers"),
    "rounded": (RNG.normal(20, 1, 200).round(1), "1 decimal)"),
    "hundredths": (RNG.normal(20, 1, 200).round(2), "2 decimals"),
    "inches": (RNG.integers(0, 40, 200) / 16, "4 decimals"),
    "thirds": (RNG.integers(0, 40, 200) / 3, "40 distinct values)"),
    "copied": (np.repeat(RNG.normal(size=50), 4), "50 distinct values)"),
    "clipped": (SMOOTH.clip(-1.0), "distinct values)"),
}


@pytest.mark.parametrize("kind", REPEATED)
def test_values_that_repeat_are_named(kind):
    values, what = REPEATED[kind]
    said = repeated_values(np.stack([SMOOTH, values], 1), None, "mend it")
    assert said.startswith("values repeat in column 'x1' (")
    assert what in said
    assert said.endswith("; mend it.")
    assert "x0" not in said


@pytest.mark.parametrize("values", [SMOOTH, SMOOTH.astype(np.float32), SMOOTH.round(5), np.arange(200.0), SMOOTH[:0]])
def test_values_of_their_own_pass(values):
    assert repeated_values(values[:, None], ("a",), "") is None


def test_a_few_repeats_are_rounding_of_a_density():
    values = SMOOTH.copy()
    values[:10] = values[10:20]
    assert "'a' (190" in repeated_values(np.concatenate([values, values[:1]])[:, None], ("a",), "")
    values[:5] = RNG.normal(size=5)
    assert repeated_values(values[:, None], ("a",), "") is None


def test_many_columns_are_counted():
    said = repeated_values(np.repeat(RNG.normal(size=(9, 8)), 3, 0), None, "")
    assert "'x4'" in said
    assert "and 3 more" in said
    assert "'x5'" not in said


def test_large_tables_are_looked_at_from_end_to_end():
    values = np.concatenate([RNG.normal(size=30_000), np.ones(30_000)])
    assert repeated_values(values[:, None], None, "") is not None


def test_trainings_of_tables_say_so(tmp_path, capsys):
    rows = np.stack([SMOOTH, REPEATED["whole"][0]], 1)
    np.savetxt(tmp_path / "t.csv", rows, delimiter=",", header="a,b", comments="")
    train = ["train", str(tmp_path / "t.csv"), "--steps", "2", "--width", "8", "--depth", "1", "--quiet"]
    assert cli.main([*train, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert "warning: values repeat in column 'b'" in said
    assert "--levels N" in said


def test_the_estimator_says_so():
    pytest.importorskip("sklearn", minversion="1.6")
    from ndm_ct.estimator import NDMDensity

    density = NDMDensity(width=8, depth=1, steps=2)
    with pytest.warns(UserWarning, match="values repeat in column 'x0'.*add noise"):
        density.fit(np.stack([REPEATED["copied"][0], SMOOTH], 1))
    with pytest.warns(
        UserWarning, match=r"kinds were inferred: 'x0' \(rounded: .* distinct values, multiples of 0.1\)"
    ):
        density.fit(np.stack([REPEATED["rounded"][0], SMOOTH], 1))
    density.fit(SMOOTH[:, None])


def test_fit_says_so_of_data_frames():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"a": SMOOTH, "b": REPEATED["copied"][0], "level": REPEATED["whole"][0]})
    net = ndm_ct.nn.MLP(2, width=8, depth=1)
    model = ndm_ct.NDM(ndm_ct.nn.Preconditioned(net), (2,))
    options = {"steps": 1, "batch_size": 8, "progress": False}
    with pytest.warns(UserWarning, match=r"values repeat in column 'b' \(50"):
        ndm_ct.fit(model, table[["a", "b"]], **options)
    ndm_ct.fit(model, pandas.DataFrame({"a": SMOOTH, "b": RNG.normal(size=200)}), **options)
    bins = ndm_ct.quantisation.Quantisation(5)
    ndm_ct.fit(model, table[["level", "level"]].to_numpy(), quantisation=bins, **options)
    assert isinstance(ndm_ct.loglik(model, torch.zeros(1, 2)), torch.Tensor)
