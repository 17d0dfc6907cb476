"""Models that commands take: runs, files of ``save``, functions; and the comparison of two of them."""

import json
import math

import numpy as np
import pytest
import torch

import ndm_ct
from ndm_ct.cli.commands import main

MODULE = """
import torch, ndm_ct

def exact(scale=1.0):
    covariance = scale**2 * torch.eye(2, dtype=torch.float32)
    return ndm_ct.reference.Gaussian(torch.zeros(2), covariance)

def wide():
    return exact(2.0)

def adapted():
    # D(z; sigma) of pixels N(0, 0.2^2) about the middle of five levels on [-1, 1]
    def net(z, sigma):
        return z * (0.04 / (0.04 + sigma**2))[:, None, None, None]
    return ndm_ct.adapters.from_denoiser(net, (1, 2, 2), sigma_min=0.02)

def labelled():
    torch.manual_seed(0)
    return ndm_ct.NDM(ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2, width=8, classes=3)), (2,))

number = 3

def nothing():
    return 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_of_tests.py").write_text(MODULE)
    np.savetxt("rows.csv", np.random.default_rng(0).standard_normal((12, 2)), delimiter=",")
    return tmp_path


def rows_of(name):
    return torch.as_tensor(np.loadtxt(name, delimiter=","))


def column(path, place):
    return torch.as_tensor(np.loadtxt(path, delimiter=",", skiprows=1)[:, place])


@pytest.mark.parametrize("name", ["mine_of_tests:exact", "./mine_of_tests.py:exact", "m.safetensors"])
def test_loglik_of_a_function_and_of_a_file_is_that_of_the_model(here, capsys, name):
    torch.manual_seed(0)
    model = ndm_ct.NDM(ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2, width=8)), (2,))
    ndm_ct.save(model, "m.safetensors")
    if name != "m.safetensors":
        model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
    assert main(["loglik", name, "rows.csv", "--out", "scores.csv", "--quiet"]) == 0
    x = rows_of("rows.csv").to(model.dtype or torch.float32)
    torch.testing.assert_close(column("scores.csv", 1), ndm_ct.loglik(model, x).double(), rtol=1e-4, atol=1e-4)


def test_sample_evaluate_and_info_of_a_function(here, capsys):
    name = "mine_of_tests:wide"
    assert main(["sample", name, "-n", "400", "--method", "unipc", "--nfe", "12", "--out", "s.csv", "--quiet"]) == 0
    assert abs(float(column("s.csv", 0).std()) - 2.0) < 4 * 2.0 / math.sqrt(800)
    assert main(["evaluate", name, "rows.csv", "--quiet"]) == 0
    model = ndm_ct.reference.Gaussian(torch.zeros(2), 4.0 * torch.eye(2))
    nll = -float(model.log_prob(rows_of("rows.csv")).mean())
    assert f"NLL {nll:.4g}" in capsys.readouterr().out
    assert main(["info", name]) == 0
    assert "F Identity" in capsys.readouterr().out


def test_integers_lie_where_the_options_say(here, capsys):
    pixels = 0.2 * torch.randn(60, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    levels = (2.0 * pixels).round().long() + 2
    np.save("levels.npy", levels.numpy())
    places = ["--levels", "5", "--centres=-1,1"]
    assert main(["loglik", "mine_of_tests:adapted", "levels.npy", "--out", "a.csv", "--quiet", *places]) == 0
    bins = ndm_ct.quantisation.Quantisation(5, centres=(-1.0, 1.0))
    noise = torch.rand(4000, 60, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = bins.centres(levels, torch.float64) + bins.half_width * (2.0 * noise - 1.0)
    density = torch.distributions.Normal(0.0, math.hypot(0.2, 0.02)).log_prob(x) + math.log(2.0 * bins.half_width)
    gap = column("a.csv", 1) - density.sum((2, 3, 4)).mean(0)  # of one draw of the noise from its mean, row by row
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(60)
    assert main(["loglik", "mine_of_tests:adapted", "levels.npy", "--out", "b.csv", "--quiet", "--levels", "5"]) == 1
    assert "where its 5 levels lie" in capsys.readouterr().err
    assert main(["evaluate", "mine_of_tests:adapted", "levels.npy", "--edges=-1,1", "--quiet"]) == 2
    assert "--levels" in capsys.readouterr().err


def test_conditions_and_guidance(here, capsys):
    name = "mine_of_tests:labelled"
    assert main(["loglik", name, "rows.csv", "--cond", "label=2", "--out", "a.csv", "--quiet"]) == 0
    torch.manual_seed(0)
    model = ndm_ct.NDM(ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2, width=8, classes=3)), (2,))
    expected = ndm_ct.loglik(model, rows_of("rows.csv").float(), label=torch.full((12,), 2))
    torch.testing.assert_close(column("a.csv", 1), expected.double(), rtol=1e-4, atol=1e-4)
    for extra in (["--cond", "label=2"], ["--cond", "label=2", "--guidance", "3"], ["--cond", "label=1", "--denoise"]):
        words = ["sample", name, "-n", "3", "--steps", "3", "--method", "ddim", "--out", "s.npz", "--quiet", *extra]
        assert main(words) == 0
    assert main(["loglik", name, "rows.csv", "--cond", "label", "--out", "b.csv", "--quiet"]) == 2
    assert "expected NAME=NUMBER" in capsys.readouterr().err


def test_compare_pairs_the_rows(here, capsys):
    words = ["compare", "mine_of_tests:exact", "mine_of_tests:wide", "rows.csv", "--out", "c", "--quiet"]
    assert main(words) == 0
    assert "mine_of_tests:exact is better" in capsys.readouterr().out
    x = rows_of("rows.csv")
    models = [ndm_ct.reference.Gaussian(torch.zeros(2), scale * torch.eye(2)) for scale in (1.0, 4.0)]
    d = models[1].log_prob(x) - models[0].log_prob(x)
    found = json.loads((here / "c/comparison.json").read_text())
    assert found["difference"] == pytest.approx(float(d.mean()), abs=1e-4)
    assert found["stderr"] == pytest.approx(float(d.std()) / math.sqrt(12), rel=1e-3)
    assert (here / "c/comparison.png").stat().st_size > 1000
    assert main(words) == 0  # the scores are there already


def test_two_runs_with_units_of_their_own_are_compared_in_those_of_the_data(here, capsys):
    table = np.random.default_rng(1).standard_normal((80, 2)) * [1.0, 50.0]
    np.savetxt("wide.csv", table, delimiter=",")
    for seed in "01":
        words = ["train", "wide.csv", "--out", seed, "--steps", "3", "--width", "8", "--seed", seed, "--quiet"]
        assert main(words) == 0
    capsys.readouterr()
    assert main(["compare", "0", "1", "wide.csv", "--max-rows", "20", "--out", "c", "--quiet"]) == 0
    found = json.loads((here / "c/comparison.json").read_text())
    for run, name in (("0", "nll_a"), ("1", "nll_b")):
        assert main(["evaluate", run, "wide.csv", "--max-rows", "20", "--quiet"]) == 0
        assert f"NLL {found[name]:.6g}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info", "mine_of_tests:absent"], "has no function 'absent'"),
        (["info", "mine_of_tests:number"], "has no function 'number'"),
        (["info", "mine_of_tests:nothing"], "returned a int, expected an ndm_ct.NDM"),
        (["info", "absent.py:exact"], "there is no file 'absent.py'"),
        (["info", "absent_module:exact"], "No module named 'absent_module'"),
        (["evaluate", "absent", "rows.csv"], "holds no run"),
    ],
)
def test_models_that_are_not_there_are_named(here, capsys, words, message):
    assert main(words) in (1, 2)
    assert message in capsys.readouterr().err


def test_a_run_knows_where_its_levels_lie(here, capsys):
    assert main(["train", "rows.csv", "--out", "run", "--steps", "2", "--width", "8", "--quiet"]) == 0
    assert main(["evaluate", "run", "rows.csv", "--levels", "4", "--quiet"]) == 2
    assert "--levels: a run of 'ndm-ct train' knows this itself" in capsys.readouterr().err


def test_columns_are_found_by_their_names(here, capsys):
    table = np.random.default_rng(1).standard_normal((60, 2)) + [0.0, 9.0]
    np.savetxt("t.csv", table, delimiter=",", header="a,b", comments="")
    more = np.column_stack([table[:, 1], np.full(60, 7.0), table[:, 0]])
    np.savetxt("more.csv", more, delimiter=",", header="b,c,a", comments="")
    np.savetxt("less.csv", table[:, :1], delimiter=",", header="a", comments="")
    assert main(["train", "t.csv", "--out", "run", "--steps", "3", "--width", "8", "--quiet"]) == 0
    for name in ("t", "more"):
        assert main(["loglik", "run", f"{name}.csv", "--out", f"{name}.scores.csv", "--quiet"]) == 0
    assert "left out: ['c']" in capsys.readouterr().err
    assert torch.equal(column("t.scores.csv", 1), column("more.scores.csv", 1))
    assert main(["loglik", "run", "less.csv", "--out", "less.scores.csv", "--quiet"]) == 1
    assert "['b'] is missing" in capsys.readouterr().err
