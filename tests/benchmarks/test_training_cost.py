"""The benchmark of costs: its ratios, its parts, and its output."""

import json

import numpy as np
import pytest
import torch
from torch import nn

training_cost = pytest.importorskip("training_cost")
from bench import derivatives  # noqa: E402

SHAPE = (1, 8, 8)


@pytest.fixture(name="recipe")
def _recipe():
    return training_cost.RECIPES["digits"]


def test_ratio_is_paired_by_round():
    """A slow round slows both; the error is that of the median of what is left."""
    baseline = np.array([1.0, 1.0, 3.0, 1.0, 2.0])
    middle, error = training_cost.ratio(baseline * np.array([2.0, 2.1, 1.9, 2.2, 1.8]), baseline)
    assert middle == pytest.approx(2.0)
    assert error == pytest.approx(1.2533 * 1.4826 * 0.1 / 5**0.5)
    found = training_cost.summary({"one": baseline, "two": 2.0 * baseline}, "one", 4)
    assert found["two"] == pytest.approx({"ms": 500.0, "ratio": 2.0, "stderr": 0.0})


@pytest.mark.parametrize("name", training_cost.MODELS)
def test_models_are_what_their_names_say(name, recipe):
    if name in ("matched", "ndm-flow"):  # the first's size is that of the second
        pytest.importorskip("zuko")
    model = training_cost.build(name, recipe, SHAPE)
    kinds = {"flow": "Flow", "neural": "Neural", "ndm": "Separable"}
    kind = next((kind for part, kind in kinds.items() if part in name), "Identity")
    assert type(model.transform).__name__ == kind
    assert model.prediction == ("moments" if "moments" in name else "x")
    assert callable(model.process.volatility) == name.endswith("eta")


def test_plain_normalisation_is_the_native_one():
    native, plain = nn.GroupNorm(4, 8), derivatives.PlainGroupNorm(4, 8)
    for parameter in native.parameters():
        nn.init.normal_(parameter)
    plain.load_state_dict(native.state_dict())
    h = torch.randn(3, 8, 5, 5)
    torch.testing.assert_close(plain(h), native(h), rtol=1e-5, atol=1e-5)


def test_ways_to_two_gradients_agree_in_scale(recipe):
    """All but the single loss want the same two gradients, in the weights and in the gain of the state."""
    calls = derivatives.gradients(recipe, SHAPE, 4)
    first, *others = (calls[name]() for name in ("two evaluations", "twice the rows", "two backward passes"))
    for other in others:
        for one, two in zip(first, other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-3)


def test_central_difference_is_the_derivative_but_inexact(recipe):
    assert 1e-5 < derivatives.difference_error(recipe, SHAPE) < 1e-2


def test_smoke(tmp_path, capsys):
    results = training_cost.main(
        ["--preset", "smoke", "--data", "casp", "--models", "diffusion,ndm-moments", "--out", str(tmp_path)]
    )
    assert json.loads((tmp_path / "results.json").read_text())["results"] == results
    assert results["casp"]["training"]["diffusion"]["ratio"] == 1.0
    assert results["casp"]["training"]["ndm-moments"]["ratio"] > 0.0
    table = (tmp_path / "results.md").read_text()
    assert "| ndm-moments |" in table
    assert table in capsys.readouterr().out
    assert (tmp_path / "plot.png").stat().st_size > 5_000
    for wrong in (["--models", "ndm-x"], ["--models", "diffusion,ndm-y"]):
        with pytest.raises(SystemExit):
            training_cost.main([*wrong, "--out", str(tmp_path)])
