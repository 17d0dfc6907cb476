"""The benchmark of the claims: cells are resumed, differences are paired."""

import json
import math
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ndm_ct

paper_claims = pytest.importorskip("paper_claims")
from bench import claims, data, models, recipes, timing  # noqa: E402


@pytest.fixture
def small(monkeypatch):
    recipes.truth.cache_clear()
    recipe = replace(
        recipes.RECIPES["moons"], load=lambda: data.moons(400), width=8, transform_width=8, steps=400,
        batch_size=32, flow=None,
    )  # fmt: skip
    monkeypatch.setattr(recipes, "RECIPES", {"moons": recipe})
    monkeypatch.setitem(paper_claims.PRESETS, "smoke", {"steps": 0.05, "rows": 16, "seeds": [0]})


def options(tmp_path, **others):
    given = {
        "preset": "smoke",
        "data": "moons",
        "models": "matched,ndm-x",
        "seeds": "0,1",
        "out": tmp_path,
        "samples": 50,
    } | others
    return [word for name, value in given.items() for word in (f"--{name}", str(value))] + ["--quiet"]


@pytest.mark.slow
def test_a_variant_trains(tmp_path, small):
    (entry,) = paper_claims.main(options(tmp_path, models="ndm-x+vp+neural+buckets", seeds="0"))
    assert entry["model"] == "ndm-x+vp+neural+buckets"
    assert math.isfinite(entry["nelbo"][0])
    (path,) = (tmp_path / "cells").glob("*/model.safetensors")
    assert type(ndm_ct.load(path).transform).__name__ == "Neural"
    assert "ndm-x+vp+neural+buckets" in (tmp_path / "results.md").read_text()


def test_cells_are_computed_once_and_differences_paired(tmp_path, small, monkeypatch):
    entries = paper_claims.main(options(tmp_path))
    assert [(e["model"], e["seed"]) for e in entries] == [("matched", 0), ("matched", 1), ("ndm-x", 0), ("ndm-x", 1)]
    monkeypatch.setattr(ndm_ct, "fit", None)
    assert paper_claims.main(options(tmp_path)) == entries
    assert json.loads((tmp_path / "results.json").read_text())["cells"] == entries
    gap, error = claims.paired(entries, "nelbo")["moons", "ndm-x"]
    first, second = (entries[2 + k]["nelbo"][0] - entries[k]["nelbo"][0] for k in range(2))
    assert gap == pytest.approx(0.5 * (first + second))
    assert error == pytest.approx(0.5 * abs(first - second))
    table = (tmp_path / "results.md").read_text()
    assert f"| moons | ndm-x | {gap:+.4f} ± {error:.4f} |" in table
    for name in ("curves", "differences"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000, name
    recipe = recipes.RECIPES["moons"]
    monkeypatch.setattr(recipes, "RECIPES", {"moons": replace(recipe, lr=1e-4)})
    with pytest.raises(RuntimeError, match="made by another recipe"):
        paper_claims.main(options(tmp_path))


def test_recipes_can_be_chosen_without_the_test_rows(tmp_path, small, monkeypatch):
    scored, evaluate = [], ndm_ct.evaluate
    monkeypatch.setattr(ndm_ct, "evaluate", lambda model, x, **k: scored.append(x) or evaluate(model, x, **k))
    recipe = recipes.RECIPES["moons"]
    paper_claims.main(options(tmp_path, models="diffusion", seeds="0", on="validation"))
    assert all(torch.equal(x, recipes.rows_of(recipe).validation) for x in scored)
    weights = (tmp_path / "cells" / "moons-diffusion-0" / "model.safetensors").read_bytes()
    (entry,) = paper_claims.main(options(tmp_path, models="diffusion", seeds="0"))
    assert torch.equal(scored[-1], recipe.load().test)
    assert (tmp_path / "cells" / "moons-diffusion-0" / "model.safetensors").read_bytes() == weights
    kept = json.loads((tmp_path / "validation.json").read_text())["cells"]
    assert kept[0]["curve"] == entry["curve"]
    assert kept[0]["nelbo"] != entry["nelbo"]
    assert json.loads((tmp_path / "results.json").read_text())["cells"] == [entry]


def test_equal_time_is_read_off_the_curve(tmp_path, small):
    def entry(model, curve):
        return {"data": "moons", "model": model, "seed": 0, "recipe": {"steps": 20}, "curve": curve}

    base, slow = entry("matched", [[10, 5.0], [20, 4.0]]), entry("ndm-x", [[0, 6.0], [10, 4.5], [20, 3.0]])
    timed = claims.at_equal_time([base, slow], {"moons": {"matched": 1.0, "ndm-x": 1.6}})
    assert [e["at_time"][0] for e in timed] == pytest.approx([4.0, 4.5 - 1.5 * 0.25])
    gap, error = claims.paired(timed, "at_time")["moons", "ndm-x"]
    assert gap == pytest.approx(0.125)
    assert math.isnan(error)
    assert claims.at_equal_time([base, slow], {}) == []


def test_steps_are_timed_apart_from_the_trainings(tmp_path, small, monkeypatch):
    monkeypatch.setattr(paper_claims, "ROUNDS", 1)
    paper_claims.main([*options(tmp_path), "--timing"])
    seconds = json.loads((tmp_path / "timing.json").read_text())["moons"]
    assert seconds.keys() == {"matched", "ndm-x"}
    assert all(value > 0.0 for value in seconds.values())
    paper_claims.main(options(tmp_path))
    table = (tmp_path / "results.md").read_text()
    assert f" {1e3 * seconds['ndm-x']:.1f} |" in table
    assert "at equal training time" in table


@pytest.mark.parametrize("name", ["digits", "casp"])
def test_models_have_the_sizes_they_claim(name):
    """The matched diffusion has at least as many parameters as every NDM, and not many more."""
    recipe = recipes.RECIPES[name]
    if recipe.flow is not None:
        pytest.importorskip("zuko")
    shape = (1, 8, 8) if recipe.levels else (10,)
    sizes = {model: models.parameters(models.build(model, recipe, shape, 1.0, 0)) for model in models.models_of(recipe)}
    largest = max(size for model, size in sizes.items() if model.startswith("ndm"))
    assert largest <= sizes["matched"] < 1.05 * largest
    assert sizes["diffusion"] < sizes["ndm-x"]


def test_unknown_names_are_refused(tmp_path, small, capsys):
    for names, message in (
        ("ndm-y", "--models: ndm-y: 'ndm-y' is none of diffusion, matched"),
        ("ndm-x+wide", "--models: ndm-x+wide: 'wide' changes nothing in 'ndm-x'"),
        ("matched+neural", "'neural' changes nothing in 'matched'"),
        ("ndm-flow+F8", "'F8' changes nothing in 'ndm-flow'"),
    ):
        with pytest.raises(SystemExit):
            paper_claims.main(options(tmp_path, models=names))
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        paper_claims.main(options(tmp_path, data="moon"))
    assert "--data: moon unknown" in capsys.readouterr().err


def test_ablations_change_what_they_name():
    """One part of the model each; all begin at the same noise."""
    recipe = replace(recipes.RECIPES["casp"], flow=None)

    def built(name):
        return models.build(name, recipe, (10,), 1.0, 0)

    parts = {"cosine": "Cosine", "vp": "VariancePreserving", "rectified": "Rectified", "learned": "LearnedLogSNR"}
    for name, kind in parts.items():
        model = built(f"diffusion+{name}")
        assert type(model.schedule).__name__ == kind
        start = model.schedule.gamma(torch.tensor(model.t_min, dtype=torch.float64))
        assert float(start.detach()) == pytest.approx(recipe.gamma[0], abs=1e-5)
    assert type(built("ndm-x+neural").transform).__name__ == "Neural"
    scaling = built("ndm-x+scaling")
    assert [type(part).__name__ for part in (scaling.transform, scaling.process.volatility)] == [
        "LearnedScaling", "Matched"
    ]  # fmt: skip
    assert built("ndm-x+F16").transform.features.width == 16
    assert type(built("ndm-moments-eta").process.volatility).__name__ == "LearnedVolatility"
    assert models.Variant.parse("ndm-x+vp+neural+F8+buckets") == models.Variant("ndm-x", "vp", "neural", 8, "buckets")
    assert type(models.Variant.parse("diffusion+history").objective.sampler).__name__ == "LossHistory"
    assert models.Variant.parse("ndm-moments").objective.describe() == "Bound(regressions=(0.1, 0.1))"
    both = models.Variant.parse("ndm-moments+history+R3").objective
    assert both.regressions == (3.0, 3.0)
    assert type(both.sampler).__name__ == "LossHistory"
    with pytest.raises(ValueError, match=r"changes nothing"):
        models.Variant.parse("ndm-x+R0.1")
    assert models.Variant.parse("diffusion").objective is None
    for name in (*models.models_of(recipe), *models.ABLATIONS):
        built(name)


def test_the_claims_are_about_seven_sets():
    """Whole MNIST images are computed only when they are asked for."""
    assert recipes.LONG == ("mnist-28",)
    assert len([name for name in recipes.RECIPES if name not in recipes.LONG]) == 7


def test_bits_of_dequantised_integers():
    """A density that is uniform over the interval of the bins costs log2 of their number."""
    rows = recipes.rows_of(recipes.RECIPES["digits"])
    flat = SimpleNamespace(nll=64 * math.log(2.0), stderr=64 * math.log(2.0))
    bits, error = recipes.unit(flat, rows)
    assert bits == pytest.approx(math.log2(17))
    assert error == pytest.approx(1.0)


def test_images_are_scored_as_their_quantisation_scores_them(tmp_path, monkeypatch):
    """The flow's bits are those of ndm_ct.evaluate on the integers, up to its own dequantisation noise."""
    recipe = replace(recipes.RECIPES["digits"], width=4, transform_width=2, steps=600, test_rows=64, flow=None)
    monkeypatch.setattr(recipes, "RECIPES", {"digits": recipe})
    (entry,) = paper_claims.main(options(tmp_path, data="digits", models="diffusion", seeds="0", samples=0))
    (path,) = (tmp_path / "cells").glob("*/model.safetensors")
    rows = recipes.rows_of(recipe)
    direct = ndm_ct.evaluate(
        ndm_ct.load(path), rows.split.test, quantisation=rows.bins, max_rows=16, progress=False, seed=0
    )
    assert entry["nll"][0] == pytest.approx(direct.bits_per_dim, abs=5 * (entry["nll"][1] + direct.bits_stderr))


def test_images_are_given_by_path(tmp_path, monkeypatch, capsys):
    """Colour images of a file, without classes: likelihoods, samples, no Frechet distance."""
    pixels = np.random.default_rng(0).integers(0, 256, (90, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "colour.npz", images=pixels)
    assert recipes.recipe_of("mnist", "full").width > recipes.recipe_of("mnist", "small").width
    assert recipes.recipe_of("casp", "full") == recipes.RECIPES["casp"]
    large = recipes.large_images
    monkeypatch.setattr(recipes, "large_images",
        lambda source: replace(large(source), width=4, levels=2, steps=3, batch_size=8, test_rows=4, flow=None),
    )  # fmt: skip
    (entry,) = paper_claims.main(
        options(tmp_path / "out", preset="full", data=tmp_path / "colour.npz", models="diffusion", seeds="0", samples=8)
    )
    assert (entry["data"], entry["fd"]) == ("colour", {})
    assert entry["nelbo"][0] > 7.9  # noise has 8 bits, and the model hardly any training
    assert "| colour | diffusion | 1 |" in (tmp_path / "out" / "results.md").read_text()
    with pytest.raises(SystemExit):
        paper_claims.main(options(tmp_path, preset="full", data="colours.npz"))
    assert "--data: colours.npz unknown" in capsys.readouterr().err


def test_a_gpu_is_timed_by_the_wall_after_its_work(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    device = torch.device("cuda", 1)
    clock = timing.clock_of(device)
    assert clock() <= clock()
    assert waited == [device, device]
    assert timing.clock_of(torch.device("cpu")) is time.process_time


@pytest.mark.parametrize("name", ["moons", "digits"])
def test_a_model_with_a_flow_has_an_invertible_transform(tmp_path, monkeypatch, name):
    recipe = replace(recipes.RECIPES[name], width=8, steps=400, batch_size=32, flow=None)
    assert "ndm-flow" not in models.models_of(recipe)
    with pytest.raises(ValueError, match="ndm-flow needs a recipe with a flow"):
        models.build("ndm-flow", recipe, (2,), 1.0, 0)
    pytest.importorskip("zuko")
    recipe = replace(recipe, flow=(1, 8, 4))
    assert recipe.flow_scale == (2.5 if name == "moons" else 4.0)
    monkeypatch.setattr(recipes, "RECIPES", {name: recipe})
    assert "ndm-flow" in models.models_of(recipe)
    paper_claims.main(options(tmp_path, data=name, models="ndm-flow", seeds="0", samples=0))
    (path,) = (tmp_path / "cells").glob("*/model.safetensors")
    shape = (2,) if name == "moons" else (1, 8, 8)
    model = ndm_ct.load(path, transform=models.build("ndm-flow", recipe, shape, 1.0, 1).transform)
    x = torch.randn(3, *shape)
    y, logdet = model.transform.to_latent(x)
    torch.testing.assert_close(model.transform.from_latent(y), x, atol=1e-4, rtol=0.0)
    assert not torch.allclose(y, x)
    jacobian = torch.func.vmap(torch.func.jacfwd(lambda v: model.transform.to_latent(v[None])[0][0]))(x)
    size = x[0].numel()
    expected = jacobian.reshape(3, size, size).slogdet().logabsdet
    torch.testing.assert_close(logdet, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["moons", "checkers"])
def test_drawn_sets_know_their_density(name):
    """It is one in all, and in every quarter of the plane as much as the share of the rows there."""
    split = getattr(data, name)()
    axis = torch.linspace(-2.5, 2.5, 200, dtype=torch.float64)
    axis = axis[:-1] + 0.5 * (axis[1] - axis[0])
    grid = torch.cartesian_prod(axis, axis)
    mass = split.log_density(grid).exp() * (axis[1] - axis[0]) ** 2
    assert float(mass.sum()) == pytest.approx(1.0, abs=0.01)
    for cut in (-0.9, 0.4):
        for side in range(2):
            share, n = float((split.train[:, side] > cut).double().mean()), len(split.train)
            expected = float(mass[grid[:, side] > cut].sum())
            assert share == pytest.approx(expected, abs=0.01 + 4 * math.sqrt(expected * (1 - expected) / n))


def test_the_true_density_stands_in_the_table(tmp_path, small):
    """As the mean over the rows scored; no model is better but by chance."""
    (entry,) = paper_claims.main(options(tmp_path, models="diffusion", seeds="0", samples=0))
    value, error = recipes.truth("moons", "test")
    rows = recipes.RECIPES["moons"].load()
    assert value == pytest.approx(-float(rows.log_density(rows.test).mean()))
    assert entry["nll"][0] > value - 4 * (error + entry["nll"][1])
    assert f"The true density of moons has {value:.4f} ± {error:.4f}" in (tmp_path / "results.md").read_text()
    assert recipes.truth("digits", "test") is None
