"""The demo and the README, run small."""

import json
import re

import matplotlib.image
import pytest
import torch
from paths import ROOT

from ndm_ct import load
from ndm_ct.cli import commands as cli
from ndm_ct.cli import demo

README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    assert cli.main(["demo", "--out", str(out), "--steps", "4", "--test-rows", "3", "--quiet"]) == 0
    return out


def test_report_holds_what_was_measured(small_run, capsys):
    report = json.loads((small_run / "report.json").read_text())
    assert set(report["scores"]) == {"NDM", "diffusion"}
    ndm, diffusion = report["scores"]["NDM"], report["scores"]["diffusion"]
    assert abs(ndm["parameters"] / diffusion["parameters"] - 1) < 0.1
    for score in (ndm, diffusion):
        # four steps are hardly a training, but a 17-level code of log2(17) = 4.09 bits is beaten by the preconditioning
        assert 1.0 < score["ode"] < 6.0
        assert 1.0 < score["elbo"] < 6.0
        assert score["ode_se"] > 0.0
        assert score["elbo_se"] > 0.0
    # a finished demo run again trains nothing and scores the same weights
    again = demo.run(small_run, steps=4, test_rows=3, progress=False)
    assert again["NDM"].ode == pytest.approx(ndm["ode"], abs=1e-4)
    table = capsys.readouterr().out
    assert f"{again['NDM'].ode:.3f} ± {again['NDM'].ode_se:.3f}" in table


def test_pictures_show_what_they_say(small_run):
    for name, rows in (("samples", 5), ("transformation", 6), ("training", 1)):
        picture = matplotlib.image.imread(small_run / f"{name}.png")
        assert picture.shape[0] > 60 * rows
        assert picture[..., :3].std() > 0.02


def test_saved_model_starts_at_the_data(small_run):
    model = load(small_run / "ndm" / "model.safetensors")
    _, test = demo.digits(0)
    x = demo.BINS.centres(test[:5], torch.float32)
    assert torch.equal(model.transform(x, torch.zeros(5, dtype=torch.float64)), x)
    moved = model.transform(x, torch.ones(5, dtype=torch.float64))
    assert float((moved - x).detach().abs().max()) > 1e-4


def test_split_is_fixed_and_disjoint():
    train, test = demo.digits(0)
    assert (len(train), len(test)) == (1437, 360)
    assert torch.equal(demo.digits(0)[1], test)
    assert int(train.max()) == 16
    combined = torch.cat([train, test]).sum()
    assert int(combined) == int(torch.cat(demo.digits(5)).sum())


def test_command_line_explains_itself(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert cli.main(["demo", "--out", str(blocked), "--steps", "2", "--quiet"]) == 1
    assert "ndm-ct demo:" in capsys.readouterr().err
    assert cli.main(["demo", "--out", str(tmp_path / "x"), "--steps", "0", "--quiet"]) == 1
    assert "steps must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        cli.main(["dmeo"])
    assert caught.value.code == 2


def test_code_of_the_readme_runs(tmp_path, monkeypatch):
    """All of it, one part after the other, with less training."""
    monkeypatch.chdir(tmp_path)
    parts = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "steps=2000" in parts[0]
    names = {}
    for place, code in enumerate(parts):
        exec(code.replace("steps=2000", "steps=30, progress=False"), names)
        assert names["logp"].shape == (8,)
        if place == 0:
            assert bool((names["bound"] < 5.0).all())
            assert load(tmp_path / "ring.safetensors").event_shape == (2,)
    assert len(parts) == 4
    assert names["method"] == "ode"
    assert names["p"].event_shape == (2,)


def test_readme_opens_with_the_two_commands():
    lines = [line for line in README.splitlines() if "pip install" in line]
    assert lines[0] == 'pip install -c constraints.txt -e ".[demo]" && python -m ndm_ct demo'
    assert lines[1] == 'pip install -c constraints.txt -e ".[test]" && python -m pytest -n auto'
