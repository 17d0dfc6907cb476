"""What the commands do with files as people have them: settings, rows to hold out, columns, and terminals."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from ndm_ct.cli import commands as cli
from ndm_ct.cli import runs, train
from ndm_ct.cli.runs import Run
from ndm_ct.cli.settings import Settings, settings_from_file
from ndm_ct.files import Rows
from ndm_ct.likelihood import loglik
from ndm_ct.model import NDM

ROWS = np.random.default_rng(0).normal(size=(40, 2)).round(4)
TINY = ["--steps", "2", "--width", "8", "--depth", "1", "--quiet"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savetxt("t.csv", ROWS, delimiter=",", header="a,b", comments="")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "entries"),
    [
        ("lr: 1e-3", {"lr": 1e-3}),
        ("lr: 4E3", {"lr": 4e3}),
        ("gamma_min: -9e0", {"gamma_min": -9.0}),
        ("gamma-min: -.5e+1", {"gamma_min": -5.0}),
        ("steps: 2e3", {"steps": 2000}),
        ("batch-size: 16.0", {"batch_size": 16}),
        ("header: no", {"header": "no"}),
        ('data: "1e3"', {"data": "1e3"}),
        ("data: größe.csv", {"data": "größe.csv"}),
    ],
)
def test_yaml_is_read_as_it_is_meant(here, line, entries):
    pytest.importorskip("yaml")
    (here / "c.yaml").write_text(line + "\n", encoding="utf-8")
    settings = Settings.of(settings_from_file("c.yaml"), "c.yaml")
    assert {name: getattr(settings, name) for name in entries} == entries
    assert all(type(getattr(settings, name)) is type(value) for name, value in entries.items())


def test_fractions_of_steps_are_refused():
    with pytest.raises(ValueError, match=r"steps must be of type int, got 2\.5"):
        Settings.of({"steps": 2.5}, "c.json")


def test_signs_that_a_terminal_lacks_are_written_in_others(here):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "ndm_ct", "info", "größe.csv"]
    os.rename("t.csv", "größe.csv")
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert f"{ROWS[:, 1].mean():.6g} +/- {ROWS[:, 1].std():.6g}" in ended.stdout


def test_other_streams_are_left_alone(here, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert cli.main(["info", "t.csv"]) == 0


@pytest.mark.parametrize("total", [10, 400])
def test_rows_to_hold_out_are_drawn(total):
    chosen, held_out = runs.split(total, 0.1, seed=3)
    assert sorted([*chosen, *held_out]) == list(range(total))
    assert len(held_out) == total // 10
    assert [each.tolist() for each in runs.split(total, 0.1, seed=3)] == [chosen.tolist(), held_out.tolist()]
    if total == 400:
        assert held_out.min() < 40
        assert held_out.max() > 360
        assert held_out.tolist() != runs.split(total, 0.1, seed=4)[1].tolist()


def test_each_part_of_the_data_is_used_once(here, monkeypatch, capsys):
    """In units of the training rows alone; a mapped array is read the same as a table."""
    seen, real = [], train.fit
    monkeypatch.setattr(train, "fit", lambda model, data, **options: (
        seen.append((data[:], options["validation"][:])), real(model, data, **options)
    )[1])  # fmt: skip
    np.save("t.npy", np.loadtxt("t.csv", delimiter=",", skiprows=1))
    for name in ("t.csv", "t.npy"):
        assert cli.main(["train", name, "--out", name + ".run", *TINY]) == 0
        assert "40 rows of shape (2,), of which 4, drawn at random, are held out" in capsys.readouterr().out
    chosen, held_out = runs.split(40, 0.1, 0)
    mean, scale = ROWS[chosen].mean(0), ROWS[chosen].std(0)
    for data, validation in seen:
        np.testing.assert_allclose(data.numpy(), (ROWS[chosen] - mean) / scale, atol=1e-6)
        np.testing.assert_allclose(validation.numpy(), (ROWS[held_out] - mean) / scale, atol=1e-6)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-12, -7.7e6, 1e200])
@pytest.mark.parametrize("n", [3, 1000])
def test_constant_columns_are_found_to_rounding(value, n):
    values = np.stack([np.random.default_rng(0).normal(size=n), np.full(n, value)], 1)
    values[0, 1] *= 1 + 2**-52
    with pytest.raises(ValueError, match="column 'x1' is constant"):
        train._moments(Rows(values), np.arange(n), "t.csv")


@pytest.mark.parametrize("unit", [1e-200, 1.0, 1e200])
def test_scales_of_any_size(unit):
    values = (3.0 + ROWS) * unit
    mean, scale = train._moments(Rows(values), np.arange(40), "t.csv")
    np.testing.assert_allclose(np.array(mean) / unit, 3.0 + ROWS.mean(0))
    np.testing.assert_allclose(np.array(scale) / unit, ROWS.std(0))


def test_the_header_is_asked_for_and_kept(here, capsys):
    np.savetxt("n.csv", ROWS, delimiter=",", header="2001,2002", comments="")
    assert cli.main(["info", "n.csv"]) == 1
    assert "ndm-ct info: --header is needed for n.csv" in capsys.readouterr().err
    assert cli.main(["train", "n.csv", "--header", "yes", "--out", "run", *TINY]) == 0
    run = Run.load("run")
    assert (run.columns, run.settings.header) == (("2001", "2002"), "yes")
    out = ["--out", "s.csv", "--quiet"]
    assert cli.main(["loglik", "run", "n.csv", *out]) == 1
    assert "ndm-ct loglik: --header is needed" in capsys.readouterr().err
    assert cli.main(["loglik", "run", "n.csv", "--header", "yes", *out]) == 0


def test_what_was_left_out_is_said(here, capsys):
    lines = (here / "t.csv").read_text().splitlines()
    (here / "i.csv").write_text(
        "\n".join(f"{label},{line}" for label, line in zip(["", *range(40)], lines, strict=True))
    )
    for command in (
        ["info", "i.csv"],
        ["train", "i.csv", "--out", "run", *TINY],
        ["evaluate", "run", "i.csv", "--quiet"],
    ):
        assert cli.main(command) == 0
        said = capsys.readouterr()
        assert "taken for an index of the rows and left out" in said.out + said.err
    assert Run.load("run").columns == ("a", "b")


def test_grey_pictures_are_scored_by_a_model_of_coloured_ones(here):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
    np.save("x.npy", pixels)
    assert cli.main(["train", "x.npy", "--out", "run", "--steps", "2", "--width", "4", "--quiet"]) == 0
    (here / "grey").mkdir()
    image.fromarray(np.repeat(pixels[0, :, :, :1], 3, 2)).save("grey/0.png")
    np.save("grey.npy", np.repeat(pixels[:1, :, :, :1], 3, 3))
    for name in ("grey", "grey.npy"):
        assert cli.main(["loglik", "run", name, "--out", f"{name}.npz", "--quiet"]) == 0
    assert np.load("grey.npz")["log_p"] == np.load("grey.npy.npz")["log_p"]


def test_runs_of_format_two_go_on_without_a_map(here, monkeypatch):
    """As they were begun, and a model of a newer run maps its columns."""
    monkeypatch.setattr(train, "FORMAT", 2)
    assert cli.main(["train", "t.csv", "--out", "old", *TINY]) == 0
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert cli.main(["train", "--out", "old", "--steps", "4", "--quiet"]) == 0
    assert cli.main(["train", "t.csv", "--out", "new", *TINY]) == 0
    assert cli.main(["train", "--out", "new", "--steps", "4", "--quiet"]) == 0
    assert cli.main(["train", "t.csv", "--out", "linear", "--marginals", "linear", *TINY]) == 0
    names = {name: type(Run.load(name).model.transform).__name__ for name in ("old", "new", "linear")}
    assert names == {"old": "Identity", "new": "Flow", "linear": "Identity"}


@pytest.mark.parametrize("transform", ["separable", "neural", "scaling"])
def test_densities_hold_the_determinant_of_the_map(here, transform):
    """The density of a run against one by hand: its latents', the map's determinant and the scale."""
    np.savetxt("e.csv", np.exp(3.0 * np.loadtxt("t.csv", delimiter=",", skiprows=1)), delimiter=",", fmt="%.17g")
    assert cli.main(["train", "e.csv", "--out", "run", "--transform", transform, *TINY]) == 0
    assert cli.main(["loglik", "run", "e.csv", "--out", "s.npz", "--quiet"]) == 0
    run = Run.load("run")
    x = np.loadtxt("e.csv", delimiter=",")
    z = torch.as_tensor((x - run.mean.numpy()) / run.scale.numpy()).float()
    y, logdet = run.model.transform.to_latent(z)
    assert float(logdet.std()) > 1.0
    latent = NDM(
        run.model.predictor, (2,), transform=run.model.transform.outer, schedule=run.model.schedule, checks=False
    )
    expected = loglik(latent, y).double() + logdet.double() - run.scale.log().sum()
    np.testing.assert_allclose(np.load("s.npz")["log_p"], expected.detach().numpy(), atol=1e-3)
    assert cli.main(["sample", "run", "-n", "5", "--out", "x.npz", "--quiet"]) == 0


@pytest.mark.parametrize("ending", ["csv", "npy"])
def test_a_bad_row_has_no_score_and_changes_no_other(ending, tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(40, 2))
    path, whole = tmp_path / f"new.{ending}", tmp_path / "whole.csv"
    np.savetxt(tmp_path / "t.csv", x, delimiter=",", header="a,b", comments="")
    np.savetxt(whole, x[:6], delimiter=",", header="a,b", comments="")
    if ending == "csv":
        lines = whole.read_text().splitlines()
        lines[2], lines[4], lines[6] = "0.5,", "oops,1.0", "inf,2.0"
        path.write_text("\n".join(lines) + "\n")
    else:
        broken = x[:6].copy()
        broken[1, 1], broken[3, 0], broken[5, 0] = np.nan, np.nan, np.inf
        np.save(path, broken)
    run = str(tmp_path / "run")
    quick = ["--steps", "5", "--width", "8", "--depth", "1", "--quiet"]
    assert cli.main(["train", str(tmp_path / "t.csv"), "--out", run, *quick]) == 0
    found = {}
    for data in (path, whole):
        assert cli.main(["loglik", run, str(data), "--out", str(tmp_path / "s.csv"), "--quiet"]) == 0
        found[data] = np.genfromtxt(tmp_path / "s.csv", delimiter=",", names=True)["log_p"]
    said = capsys.readouterr()
    assert "rows [1, 3, 5] hold values that are missing or no finite numbers" in said.err
    assert "6 rows, mean log p" in said.out
    assert "3 without finite numbers" in said.out
    assert np.isnan(found[path][[1, 3, 5]]).all()
    np.testing.assert_array_equal(found[path][[0, 2, 4]], found[whole][[0, 2, 4]])
    assert cli.main(["evaluate", run, str(path), "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "3 rows, all data" in printed
    assert float(printed.split()[1]) == pytest.approx(-found[path][[0, 2, 4]].mean(), abs=1e-3)
    assert cli.main(["compare", run, run, str(path), "--quiet"]) == 0
    assert "; 3 rows" in capsys.readouterr().out
    assert cli.main(["train", str(path), "--out", str(tmp_path / "other"), "--steps", "5", "--quiet"]) == 1
    path.write_bytes(b"a,b\n,5\n" if ending == "csv" else path.read_bytes())
    if ending == "csv":
        assert cli.main(["loglik", run, str(path), "--out", str(tmp_path / "s.csv"), "--quiet"]) == 1
        assert "line 2, column 'a' is '', expected a number" in capsys.readouterr().err
