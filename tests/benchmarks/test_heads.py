"""The benchmark of heads: its ways are the formulas it prints, and its table pairs seeds."""

import json

import pytest
import torch

from ndm_ct import schedules
from ndm_ct.nn import Preconditioned

heads = pytest.importorskip("heads")


class Fixed(torch.nn.Module):
    """Outputs that are known functions of the input."""

    def forward(self, z, t):
        return torch.stack([z.sin(), z.cos()], 1)


def pair(way):
    schedule = schedules.LinearLogSNR(-3.0, 2.0)
    z, t = torch.randn(4, 3, dtype=torch.float64), torch.linspace(0.1, 0.9, 4, dtype=torch.float64)
    c = schedule(t)
    head = heads.Head(Fixed(), way, schedule, 0.6)
    return head(z, t), z, t, [each[:, None] for each in (c.alpha, c.sigma)]


def test_raw_and_eps_are_their_formulas():
    (F, dF), z, _, (alpha, sigma) = pair("raw")
    torch.testing.assert_close((F, dF), (z.sin(), z.cos()))
    (F, dF), z, _, (alpha, sigma) = pair("eps + raw")
    torch.testing.assert_close((alpha * F + sigma * z.sin(), dF), (z, z.cos()))


@pytest.mark.parametrize("way", ["edm + raw", "edm + rate", "edm + edm"])
def test_edm_is_preconditioned_up_to_the_second_scale(way):
    (F, dF), z, t, (alpha, sigma) = pair(way)
    library = Preconditioned(Fixed(), prediction="moments", data_std=0.6)
    expected_F, expected_dF = library(z, t, schedules.LinearLogSNR(-3.0, 2.0))
    scale = {"edm + raw": 1.0, "edm + rate": 5.0, "edm + edm": 0.6 * sigma / (0.36 * alpha**2 + sigma**2).sqrt()}
    torch.testing.assert_close((F, dF), (expected_F, scale[way] * expected_dF))


@pytest.mark.parametrize(("name", "way"), [(name, way) for name, ways in heads.WAYS.items() for way in ways])
def test_every_way_can_be_built_and_evaluated(name, way):
    recipe = heads.RECIPES["moons"]
    model = heads.build(name, way, recipe, (2,), 1.0, 0)
    F, dF = model.moments(torch.randn(3, 2), torch.full((3,), 0.5, dtype=torch.float64))
    assert F.shape == dF.shape == (3, 2)
    assert isinstance(model.predictor, Preconditioned) == (way == heads.WAYS[name][0])


def test_smoke(tmp_path):
    arguments = ["--data", "moons", "--models", "diffusion", "--steps", "2", "--out", str(tmp_path)]
    report = heads.main(arguments)
    assert json.loads((tmp_path / "results.json").read_text()) == report
    values = report["results"]["moons"]["diffusion"]
    gaps = [x - edm for x, edm in zip(values["x"], values["edm"], strict=True)]
    row = f"{sum(gaps) / 2:+.4f} ± {abs(gaps[0] - gaps[1]) / 2:.4f} |"
    assert row in (tmp_path / "results.md").read_text()


def test_continues_after_the_last_training_and_refuses_results_of_other_settings(tmp_path, monkeypatch):
    arguments = ["--data", "moons", "--models", "diffusion", "--steps", "2", "--out", str(tmp_path)]
    trained = []

    def third_fails(*_):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(float(len(trained)))
        return trained[-1]

    monkeypatch.setattr(heads, "bound", third_fails)
    with pytest.raises(KeyboardInterrupt):
        heads.main([*arguments, "--seeds", "1"])
    monkeypatch.setattr(heads, "bound", lambda *_: 9.0)
    ways = heads.main([*arguments, "--seeds", "2"])["results"]["moons"]["diffusion"]
    assert ways == {"edm": [0.0, 9.0], "x": [1.0, 9.0], "eps": [9.0, 9.0], "v": [9.0, 9.0]}
    arguments[5] = "3"
    with pytest.raises(ValueError, match=r"--out .* holds work of other settings: steps was 2, now 3.*choose another"):
        heads.main(arguments)
