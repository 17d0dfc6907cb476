"""Files of earlier versions are read, and work that an earlier version began is finished with the same numbers.

The folder ``files`` was written by ``python tests/storage/test_earlier_files.py`` under version 0.1.0.dev0, before the
package was divided into rooms. It is never written anew: a new kind of file gets a new file.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import ndm_ct
from ndm_ct import NDM, nn, schedules, transforms

FILES = Path(__file__).parent / "files"
STEPS = 6


def rows(n=24):
    """Rows that every machine makes bit by bit."""
    return (torch.arange(2 * n).reshape(n, 2) * 7919 % 97).float() / 32 - 1.5


def network(**options):
    return nn.Preconditioned(nn.MLP(2, width=4, depth=1, **options))


def plain(seed=0):
    torch.manual_seed(seed)
    return NDM(network(dropout=0.25), (2,), schedule=schedules.LinearLogSNR(-5.0, 5.0))


def learned():
    torch.manual_seed(0)
    features = nn.MLP(2, width=4, depth=1, outputs=2, time=False)
    return NDM(
        nn.Preconditioned(nn.MLP(2, width=4, depth=1, outputs=2), prediction="moments"), (2,),
        transform=transforms.Separable(features), schedule=schedules.LearnedLogSNR(-8.0, 5.0, features=4),
        prediction="moments", volatility=0.5,
    )  # fmt: skip


def train(folder, model, objective=None):
    return ndm_ct.fit(
        model, rows(), steps=STEPS, batch_size=8, run_dir=folder, checkpoint_every=2, log_every=1, progress=False,
        validation=rows(8), validate_every=2, patience=5, objective=objective,
    )  # fmt: skip


def evaluate(folder, **limits):
    model = ndm_ct.load(FILES / "model.safetensors")
    return ndm_ct.evaluate(model, rows(), batch_size=6, seed=2, run_dir=folder, progress=False, **limits)


def compare(folder, **limits):
    a, b = (ndm_ct.load(FILES / f"{name}.safetensors") for name in ("model", "residuals"))
    return ndm_ct.compare(
        a, b, rows(), bound="elbo", samples=4, batch_size=6, seed=2, run_dir=folder, progress=False, **limits
    )


def expected():
    return json.loads((FILES / "expected.json").read_text())


def copied(tmp_path, name):
    return Path(shutil.copytree(FILES / name, tmp_path / name))


def near(values, name):
    torch.testing.assert_close(
        torch.as_tensor(values).double(), torch.tensor(expected()[name]).double(), rtol=1e-4, atol=1e-5
    )


def test_a_model():
    model = ndm_ct.load(FILES / "model.safetensors")
    with torch.no_grad():
        near(model.predictor(rows(4), torch.full((4,), 0.5), model.schedule)[0], "prediction")
    near(ndm_ct.loglik(model, rows(4)), "loglik")


def test_a_model_with_residuals():
    model = ndm_ct.load(FILES / "residuals.safetensors")
    near(ndm_ct.loglik(model, rows(4)), "loglik of residuals")
    found = ndm_ct.discrete.load_residuals(FILES / "residuals.safetensors")
    near(torch.cat([found.times[None], found.moments, found.stderr]), "residuals")


def test_a_training_that_was_stopped(tmp_path):
    """After step 5, of which no checkpoint knows."""
    folder, model = copied(tmp_path, "training"), plain(seed=5)
    assert [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()][-1] == 5
    result = train(folder, model)
    assert (result.step, result.finished) == (STEPS, True)
    for name, tensor in safetensors.torch.load_file(FILES / "trained.safetensors").items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    near([row["loss"] for row in result.history], "losses")
    near([row["validation_elbo"] for row in result.validation], "validations")


def test_settings_that_differ_from_those_of_a_training_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds .* other settings: batch_size was 8, now 9"):
        ndm_ct.fit(
            plain(), rows(), steps=6, batch_size=9, run_dir=copied(tmp_path, "training"), checkpoint_every=2,
            validation=rows(8), validate_every=2, patience=5, progress=False, warmup=0,
        )  # fmt: skip


def test_a_run_of_the_command(tmp_path, monkeypatch):
    from ndm_ct.cli import main

    folder = copied(tmp_path, "run")
    shutil.copy(FILES / "rows.csv", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["loglik", str(folder), "rows.csv", "--out", "scores.csv", "--quiet"]) == 0
    lines = (tmp_path / "scores.csv").read_text().splitlines()[1:]
    near([float(line.split(",")[1]) for line in lines], "scores")
    before = (folder / "model.safetensors").read_bytes()
    config = folder / "config.json"  # holds the whole path of the data
    config.write_text(config.read_text().replace('"rows.csv"', json.dumps(str(tmp_path / "rows.csv"))))
    assert main(["train", "--out", str(folder), "--quiet"]) == 0  # finished: nothing is left to do
    assert ndm_ct.load(folder / "model.safetensors").event_shape == (2,)
    assert safetensors.torch.load((folder / "model.safetensors").read_bytes()).keys() == (
        safetensors.torch.load(before).keys()
    )


def test_an_evaluation_that_was_stopped(tmp_path):
    """At half of the rows."""
    result = evaluate(copied(tmp_path, "evaluation"))
    assert (result.rows, result.reason) == (24, "data")
    near(result.values, "evaluation")
    assert result.indices.tolist() == expected()["evaluation order"]


def test_a_comparison_that_was_stopped(tmp_path):
    result = compare(copied(tmp_path, "comparison"))
    assert (result.rows, result.reason) == (24, "data")
    near(result.values_a, "comparison a")
    near(result.values_b, "comparison b")


def test_batches_that_a_command_had_finished(tmp_path):
    from ndm_ct.storage import finished_batches
    from ndm_ct.storage.tensors import read

    folder = copied(tmp_path, ".drawn.csv.parts")
    description, tensors = read(folder / "0-4.safetensors", "part")
    near(tensors["x"], "drawn")

    def make(rows):
        return {"x": torch.zeros(rows.stop - rows.start, 2)}

    with finished_batches(tmp_path / "drawn.csv", description["settings"]) as batches:
        assert torch.equal(batches.batch(slice(0, 4), make)["x"], tensors["x"])
        assert torch.equal(batches.batch(slice(4, 8), make)["x"], torch.zeros(4, 2))
    assert not folder.exists()


class Stopped(Exception):
    pass


def write():
    """Write the folder, by the version whose files these are."""
    import os

    from ndm_ct import cli, discrete
    from ndm_ct.cli import sampling

    shutil.rmtree(FILES, ignore_errors=True)
    FILES.mkdir()
    os.chdir(FILES)
    numbers = {}
    model = learned()
    ndm_ct.fit(model, rows(), steps=20, batch_size=8, lr=1e-2, progress=False)
    ndm_ct.save(model, "model.safetensors")
    with torch.no_grad():
        numbers["prediction"] = model.predictor(rows(4), torch.full((4,), 0.5), model.schedule)[0].tolist()
    numbers["loglik"] = ndm_ct.loglik(model, rows(4)).tolist()
    other = plain()
    ndm_ct.fit(other, rows(), steps=20, batch_size=8, lr=1e-2, progress=False)
    found = discrete.estimate_residuals(other, rows(), times=5, generator=torch.Generator().manual_seed(0))
    ndm_ct.save(other, "residuals.safetensors", residuals=found)
    numbers["residuals"] = torch.cat([found.times[None], found.moments, found.stderr]).tolist()
    numbers["loglik of residuals"] = ndm_ct.loglik(other, rows(4)).tolist()

    whole = plain()
    result = train(FILES / "whole", whole)
    numbers["losses"] = [row["loss"] for row in result.history]
    numbers["validations"] = [row["validation_elbo"] for row in result.validation]
    safetensors.torch.save_file({k: v.clone() for k, v in whole.state_dict().items()}, "trained.safetensors")
    original, calls = ndm_ct.objectives.loss, []

    def stopping(*given, **options):
        calls.append(1)
        if len(calls) > 5:
            raise Stopped
        return original(*given, **options)

    ndm_ct.objectives.loss = stopping
    try:
        train(FILES / "training", plain())
    except Stopped:
        ndm_ct.objectives.loss = original

    evaluate("evaluation", max_rows=12)
    result = evaluate(None)
    numbers["evaluation"], numbers["evaluation order"] = result.values.tolist(), result.indices.tolist()
    compare("comparison", max_rows=12)
    result = compare(None)
    numbers["comparison a"], numbers["comparison b"] = result.values_a.tolist(), result.values_b.tolist()

    Path("rows.csv").write_text("a,b\n" + "".join(f"{a},{b}\n" for a, b in rows(20).tolist()))
    options = ["--width", "4", "--depth", "1", "--steps", "20", "--batch-size", "8", "--quiet"]
    assert cli.main(["train", "rows.csv", "--out", "run", *options]) == 0
    assert cli.main(["loglik", "run", "rows.csv", "--out", "scores.csv", "--quiet"]) == 0
    numbers["scores"] = [float(line.split(",")[1]) for line in Path("scores.csv").read_text().splitlines()[1:]]
    drawing = sampling.sample

    def once(*given, **options):
        sampling.sample = interrupting
        return drawing(*given, **options)

    def interrupting(*given, **options):
        raise KeyboardInterrupt

    sampling.sample = once
    assert cli.main(["sample", "run", "-n", "8", "--batch-size", "4", "--out", "drawn.csv", "--quiet"]) == 130
    numbers["drawn"] = safetensors.torch.load_file(".drawn.csv.parts/0-4.safetensors")["x"].tolist()
    Path("expected.json").write_text(json.dumps(numbers, indent=1) + "\n")
    shutil.rmtree("whole")
    for name in ("scores.csv", "run/training.png"):
        Path(name).unlink(missing_ok=True)
    for lock in FILES.rglob(".lock"):
        lock.unlink()


if __name__ == "__main__":
    sys.exit(write())
