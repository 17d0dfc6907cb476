"""The benchmark of density estimators: choices by held-out rows, finished tables kept."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

density_estimators = pytest.importorskip("density_estimators")


@pytest.fixture
def table(monkeypatch):
    """A Gaussian table of two columns, and estimators of known scores."""
    rows = torch.randn(240, 2, generator=torch.Generator().manual_seed(0))
    split = SimpleNamespace(train=rows[:200], test=rows[200:])
    monkeypatch.setattr(density_estimators, "DATA", {"table": lambda: split})

    class Known:
        """An estimator whose held-out bound is better with a flow, and worse after its best."""

        def __init__(self, steps, flow, random_state):
            self.flow = flow

        def fit(self, rows):
            assert len(rows) == 200
            self.validation_ = tuple({"validation_elbo": bound + self.flow} for bound in (-9.0, -3.0, -4.0))
            return self

        def score_samples(self, x):
            return np.arange(len(x)) * 0.01 - self.flow

    monkeypatch.setattr(density_estimators, "NDMDensity", Known)
    monkeypatch.setattr(
        density_estimators, "nsf", lambda train, held_out, options, seconds: (lambda x: np.full(len(x), -9.0), "known")
    )


def test_held_out_rows_choose_and_gaps_are_paired(table, tmp_path):
    arguments = ["--data", "table", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    models = density_estimators.main(arguments)["table"]["models"]
    assert models["ndm"]["choice"] == "flow=2 (held out -3.000 with 0, -1.000 with 2)"
    assert models["ndm"]["mean"] == pytest.approx(0.195 - 2.0)
    assert max(models, key=lambda kind: models[kind]["gap"]) == "ndm"
    assert models["ndm"]["gap"] == 0.0
    assert models["nsf"]["gap"] == pytest.approx(-9.0 - (0.195 - 2.0))
    assert models["nsf"]["gap_stderr"] == pytest.approx(np.std(np.arange(40) * 0.01, ddof=1) / 40**0.5)
    for name in ("results.json", "results.md", "plot.png"):
        assert (tmp_path / "out" / name).stat().st_size > 200


def test_finished_tables_are_kept_for_the_same_settings(table, tmp_path, monkeypatch):
    arguments = ["--data", "table", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    first = density_estimators.main(arguments)
    calls, compare = [], density_estimators.compare
    monkeypatch.setattr(density_estimators, "compare", lambda *a: calls.append(a) or compare(*a))
    assert density_estimators.main(arguments) == json.loads(json.dumps(first))
    assert not calls
    density_estimators.main([*arguments, "--seed", "1"])
    assert len(calls) == 1
