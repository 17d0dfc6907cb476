"""Pictures of the learned forward process: drawn from the cells they are asked of, with numbers that mean something."""

from dataclasses import replace

import pytest
import torch

paper_claims = pytest.importorskip("paper_claims")
pictures = pytest.importorskip("pictures")
from bench import recipes  # noqa: E402


def test_pictures_of_two_cells(tmp_path, monkeypatch, capsys):
    recipe = replace(recipes.RECIPES["digits"], width=8, transform_width=8, steps=40, batch_size=8, samples=2)
    monkeypatch.setattr(recipes, "RECIPES", {"digits": recipe})
    monkeypatch.setitem(paper_claims.PRESETS, "smoke", {"steps": 1.0, "rows": 2, "seeds": [0]})
    arguments = ["--cells", str(tmp_path / "cells"), "--out", str(tmp_path / "pictures")]
    with pytest.raises(SystemExit):
        pictures.main(arguments)
    assert "train them by paper_claims.py --data digits" in capsys.readouterr().err
    paper_claims.main(
        ["--quiet", "--samples", "0", "--models", "diffusion,ndm-x", "--out", str(tmp_path)]
    )  # fmt: skip
    spreads = pictures.main(arguments)
    assert set(spreads) == {"diffusion", "ndm-x"}
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        "transform.png", "first_step.png", "results.json"
    }  # fmt: skip


def test_spread_is_one_for_data_and_zero_for_their_mean():
    x = torch.randn(500, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert pictures.spread(x, 2.0 * x) == pytest.approx(0.5)
    assert pictures.spread(x.mean(0).expand(9, 1, 4, 4), x) == pytest.approx(0.0, abs=1e-6)
