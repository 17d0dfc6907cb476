"""Tables with kinds of columns on the command line: words, missing values, schemas, conditionals."""

import csv
import json
import re

import numpy as np
import pytest

from ndm_ct.cli import commands as cli
from ndm_ct.cli.runs import Run
from ndm_ct.files import read

QUICK = ["--steps", "40", "--width", "8", "--depth", "1", "--batch-size", "64", "--quiet"]


def ok(*words):
    assert cli.main([str(word) for word in words]) == 0


def rows(n, seed=0):
    random = np.random.default_rng(seed)
    k = random.integers(0, 3, n)
    x = random.normal(size=n) + 2.0 * k
    return [
        [["red", "green", "blue"][a], "" if place % 7 == 3 else f"{b:.6f}", c, f"id{place}"]
        for place, (a, b, c) in enumerate(zip(k, x, random.poisson(2.0, n), strict=True))
    ]


def write(path, table, names=("hue", "x", "n", "name")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *table])
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    write(folder / "train.csv", rows(300))
    write(folder / "test.csv", rows(30, seed=1))
    (folder / "schema.json").write_text(json.dumps({"x": {"kind": "continuous", "low": -20}, "n": "integer"}))
    ok("train", folder / "train.csv", "--columns", folder / "schema.json", "--out", folder / "run", *QUICK)
    return folder


def scores(path):
    with path.open(newline="") as file:
        return np.array([float(row["log_p"]) for row in csv.DictReader(file)])


def test_kinds_are_said_and_kept(trained, capsys):
    ok("train", trained / "train.csv", "--columns", "infer", "--out", trained / "other", *QUICK)
    out = capsys.readouterr().out
    assert re.search(r"hue +categorical +blue, green, red +none +probability of the category \(3 distinct words\)", out)
    assert re.search(r"x +continuous .* 43 +density", out)
    assert re.search(r"name +left out .*identifiers", out)
    table = Run.load(trained / "run").table
    assert [column.kind for column in table.coding.columns] == ["categorical", "continuous", "rounded", "left out"]
    assert table.conditionals
    ok("train", "--out", trained / "run", "--quiet")  # nothing is left to do, and the table is measured the same


def test_rows_are_scored_with_their_gaps_and_given_others(trained, capsys):
    run, test = trained / "run", trained / "test.csv"
    ok("loglik", run, test, "--out", trained / "all.csv", "--quiet")
    ok("loglik", run, test, "--out", trained / "hue.csv", "--given", "x,n", "--quiet")
    whole, hue = scores(trained / "all.csv"), scores(trained / "hue.csv")
    assert np.isfinite(whole).all()
    assert ((hue < 0.0) & (hue > -6.0)).all()
    ok("loglik", run, test, "--out", trained / "parts.csv", "--batch-size", 7, "--quiet")
    np.testing.assert_allclose(scores(trained / "parts.csv"), whole, atol=1e-4)
    write(trained / "short.csv", [["red", 1], ["mauve", 2]], ("hue", "n"))
    capsys.readouterr()
    ok("loglik", run, trained / "short.csv", "--out", trained / "short.out.csv", "--quiet")
    assert "1 with values that have no mass" in capsys.readouterr().out
    assert np.isfinite(scores(trained / "short.out.csv")).tolist() == [True, False]
    ok("evaluate", run, test, "--quiet")
    line = capsys.readouterr().out
    assert float(line.split()[1]) == pytest.approx(-whole.mean(), abs=0.3)
    assert "30 rows" in line


def test_values_are_drawn_of_their_kinds(trained):
    ok(
        "sample",
        trained / "run",
        "-n",
        40,
        "--out",
        trained / "drawn.csv",
        "--quiet",
        "--steps",
        10,
        "--method",
        "unipc",
    )
    drawn = read(trained / "drawn.csv", words=True)
    assert drawn.columns == ("hue", "x", "n")
    assert drawn.words == {0: ("blue", "green", "red")}
    assert (drawn.values[:, 2] == drawn.values[:, 2].round()).all()
    ok("sample", trained / "run", "-n", 5, "--out", trained / "given.npz", "--given", "hue=red,x=1.5", "--quiet")
    given = np.load(trained / "given.npz")
    assert given["hue"].tolist() == ["red"] * 5
    assert given["x"].tolist() == [1.5] * 5


@pytest.mark.parametrize(("words", "message"), [
    (["train", "{}/train.csv", "--out", "{}/a", "--columns", "infer", "--head", "moments", "--transform", "neural"],
     "columns goes with"),
    (["train", "{}/train.csv", "--out", "{}/a", "--columns", "infer", "--conditionals", "no"], "values are missing"),
    (["train", "{}/train.csv", "--out", "{}/a", "--conditionals", "yes"], "no effect without"),
    (["train", "{}/train.csv", "--out", "{}/a"], "expected a number"),
    (["train", "{}/bad.csv", "--out", "{}/a", "--columns", "infer"], "column 'x' holds numbers and 'oops'"),
    (["loglik", "{}/run", "{}/test.csv", "--out", "{}/a.csv", "--given", "z"], "--given z"),
    (["sample", "{}/run", "--out", "{}/a.csv", "--given", "hue"], "expected COLUMN=VALUE"),
    (["sample", "{}/run", "--out", "{}/a.csv", "--given", "hue=mauve"], "no mass"),
    (["evaluate", "{}/run", "{}/test.csv", "--bound", "elbo"], "--bound"),
    (["compare", "{}/run", "{}/run", "{}/test.csv", "--bound", "elbo"], "--bound"),
])  # fmt: skip
def test_what_does_not_go_is_explained(trained, capsys, words, message):
    write(trained / "bad.csv", [*rows(9), ["red", "oops", 1, "a"]])
    assert cli.main([word.format(trained) for word in words]) in (1, 2)
    assert message in capsys.readouterr().err


def test_parquet_files_hold_words(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"a": ["p", None, "q"], "b": [1, 2, None]}), tmp_path / "t.parquet")
    found = read(tmp_path / "t.parquet", words=True)
    np.testing.assert_array_equal(found.values, [[0.0, 1.0], [np.nan, 2.0], [1.0, np.nan]])
    assert found.words == {0: ("p", "q")}


@pytest.mark.parametrize("columns", [[], ["--columns", "infer"]])
def test_a_training_says_whether_to_trust_its_density(columns, tmp_path, capsys):
    random = np.random.default_rng(0)
    x = random.normal(size=(800, 2))
    np.savetxt(tmp_path / "t.csv", x, delimiter=",", header="a,b", comments="")
    code = ["--validation-fraction", "0.2", "--steps", "150", "--width", "16", "--depth", "1", "--quiet"]
    ok("train", tmp_path / "t.csv", "--out", tmp_path / "run", *columns, *code)
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "run" / "diagnosis.json").read_text())
    assert report["verdict"] in printed
    assert report["trusted"]
    assert (report["held_out"], report["samples"], len(report["rows"])) == (160, 160, 160)
    assert [each["columns"] for each in report["differences"]] != []
    assert (tmp_path / "run" / "diagnosis.png").stat().st_size > 10_000
    np.savetxt(tmp_path / "new.csv", np.array([[0.0, 0.0], [7.0, -7.0]]), delimiter=",", header="a,b", comments="")
    ok("loglik", tmp_path / "run", tmp_path / "new.csv", "--out", tmp_path / "scores.csv", "--quiet")
    scores = np.genfromtxt(tmp_path / "scores.csv", delimiter=",", names=True)
    assert scores.dtype.names == ("row", "log_p", "stderr", "p_value")
    assert scores["p_value"][0] > 0.8
    assert scores["p_value"][1] == pytest.approx(1.0 / 161.0)
    seen = x[report["rows"]]
    np.savetxt(tmp_path / "seen.csv", seen, delimiter=",", header="a,b", comments="")
    ok("loglik", tmp_path / "run", tmp_path / "seen.csv", "--out", tmp_path / "seen_scores.csv", "--quiet")
    found = np.genfromtxt(tmp_path / "seen_scores.csv", delimiter=",", names=True)
    np.testing.assert_allclose(found["log_p"], report["scores"], atol=1e-4)


def test_noise_that_hides_structure_is_said(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(300, 1)) * 0.01 + np.repeat([[0.0], [1.0]], 150, 0)
    np.savetxt(tmp_path / "t.csv", x, delimiter=",", header="a", comments="")
    code = ["--gamma-min", "-4", "--marginals", "linear", "--steps", "200", "--width", "32", "--depth", "1", "--quiet"]
    ok("train", tmp_path / "t.csv", "--out", tmp_path / "run", *code)
    capsys.readouterr()
    ok("loglik", tmp_path / "run", tmp_path / "t.csv", "--out", tmp_path / "s.csv", "--quiet")
    assert "hides structure of the data; train with a lower gamma_min" in capsys.readouterr().err


def test_tables_with_kinds_are_compared(trained, tmp_path, capsys):
    faster = [*QUICK, "--lr", "1e-2"]
    ok("train", trained / "train.csv", "--columns", trained / "schema.json", "--out", tmp_path / "b", *faster)
    capsys.readouterr()
    ok("compare", trained / "run", tmp_path / "b", trained / "test.csv", "--out", tmp_path / "compared", "--quiet")
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "compared" / "comparison.json").read_text())
    nll = []
    for run in (trained / "run", tmp_path / "b"):
        ok("evaluate", run, trained / "test.csv", "--quiet")
        nll.append(float(capsys.readouterr().out.split()[1]))
    assert report["rows"] == 30
    assert report["difference"] == pytest.approx(nll[0] - nll[1], abs=1e-3)
    assert printed.startswith("NLL a - b = ")
    ok("train", trained / "train.csv", "--columns", "infer", "--out", tmp_path / "c", *QUICK)
    schema = {"x": {"kind": "continuous", "low": -20}, "n": "continuous"}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    ok("train", trained / "train.csv", "--columns", tmp_path / "schema.json", "--out", tmp_path / "d", *QUICK)
    assert cli.main(["compare", str(tmp_path / "c"), str(tmp_path / "d"), str(trained / "test.csv"), "--quiet"]) == 1
    assert "which do not compare: ['hue', 'n'] and ['hue']" in capsys.readouterr().err


def test_a_bad_cell_costs_the_score_of_its_row_alone(trained, tmp_path, capsys):
    good = rows(12, seed=2)
    bad = [list(row) for row in good]
    bad[3][1], bad[7] = "oops", ["red"]
    found = {}
    for name, table in (("good", good), ("bad", bad)):
        write(tmp_path / f"{name}.csv", table)
        ok("loglik", trained / "run", tmp_path / f"{name}.csv", "--out", tmp_path / "s.csv", "--quiet")
        found[name] = scores(tmp_path / "s.csv")
    assert "rows [3, 7] hold cells that do not fit their columns" in capsys.readouterr().err
    assert np.isnan(found["bad"][[3, 7]]).all()
    kept = [k for k in range(12) if k not in (3, 7)]
    np.testing.assert_array_equal(found["bad"][kept], found["good"][kept])
    ok("evaluate", trained / "run", tmp_path / "bad.csv", "--quiet")
    assert "10 rows" in capsys.readouterr().out
