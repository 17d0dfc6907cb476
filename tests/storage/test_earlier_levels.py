"""Folders of work on integer data, written when ``dequantisation`` had two earlier names, still go on.

The files were written by training on ``"centres"`` and evaluating with ``"truncated-normal"``; both are ``"process"``.
"""

import shutil

import pytest
import torch
from paths import TESTS

import ndm_ct
from ndm_ct import NDM, nn, schedules

FILES = TESTS / "storage" / "files" / "levels"
LEVELS = torch.tensor([[0, 1], [2, 3], [1, 1], [3, 0], [2, 2], [0, 3]])


def net():
    torch.manual_seed(0)
    return NDM(nn.Preconditioned(nn.MLP(2, width=4, depth=1)), (2,), schedule=schedules.LinearLogSNR(-6.0, 4.0))


def copied(kind, tmp_path):
    return shutil.copytree(FILES / kind, tmp_path / kind)


def train(folder, **options):
    settings = {"steps": 2, "batch_size": 4, "warmup": 0, "quantisation": 4, "progress": False}
    return ndm_ct.fit(net(), LEVELS, run_dir=folder, **(settings | options))


def test_a_training_on_centres_goes_on_as_one_of_the_process(tmp_path):
    result = train(copied("training", tmp_path), dequantisation="process")
    assert result.step == 2
    with pytest.raises(ValueError, match="dequantisation was 'process', now 'uniform'"):
        train(tmp_path / "training")


def test_an_evaluation_with_truncated_normal_noise_goes_on(tmp_path):
    folder = copied("evaluation", tmp_path)
    model = ndm_ct.load(FILES / "model.safetensors")
    rows = (folder / "rows.jsonl").read_bytes()
    result = ndm_ct.evaluate(
        model, LEVELS, quantisation=4, dequantisation="process", rtol=1e-3, atol=1e-3, run_dir=folder, progress=False
    )
    assert result.nll == pytest.approx(5.327450365081908, abs=1e-12)
    assert (folder / "rows.jsonl").read_bytes() == rows
