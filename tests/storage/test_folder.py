"""Folders of work: their identity, their journal, and the versions of their results."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import ndm_ct
from ndm_ct._core import versions
from ndm_ct.storage import Journal, RunFolder, tensors


@pytest.mark.parametrize(
    ("saved", "now", "words"),
    [
        ({"lr": 1e-3}, {"lr": 2e-3}, "run_dir='x' holds work of other settings: lr was 0.001, now 0.002. Repeat"),
        ({"lr": 1, "steps": 5}, {"lr": 2, "steps": 6}, "settings: lr was 1, now 2; steps was 5, now 6. "),
        ({}, {"lr": 2}, "settings: lr was None, now 2. "),
        ({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"c": 1, "d": 3}}}, "settings: a.b.d was 2, now 3. "),
        ({"data": {"": "0" * 64}}, {"data": {"": "1" * 64}}, "settings: data. "),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}}, "settings: a. "),
    ],
)
def test_settings_that_differ_are_named(saved, now, words):
    folder = RunFolder("x")
    folder.compare(saved, saved)
    folder.compare(now, now)
    with pytest.raises(ValueError, match=r"^run_dir='x' holds") as caught:
        folder.compare(saved, now)
    assert words in str(caught.value)


def test_settings_are_compared_as_json_keeps_them():
    RunFolder("x").compare({"range": [0, 1]}, {"range": (0, 1)})


@pytest.mark.parametrize("signed", [False, True])
def test_a_journal_drops_a_line_that_was_cut_off(tmp_path, signed):
    journal = Journal(tmp_path / "rows.jsonl", signed=signed)
    assert journal.read(lambda *record: record) == []
    journal.add({"step": 1}, header={"kind": "test"})
    journal.add({"step": 2}, header={"kind": "test"})
    with journal.path.open("ab") as file:
        file.write(b'{"step": 3')
    records = [(1, {"kind": "test"}), (2, {"step": 1}), (3, {"step": 2})]
    assert journal.read(lambda *record: record) == records
    journal.keep(2)
    assert journal.read(lambda *record: record) == records[:2]
    assert journal.path.read_bytes().endswith(b"\n")


def test_only_one_works_in_a_folder(tmp_path):
    with RunFolder(tmp_path).locked(), pytest.raises(BlockingIOError, match="in use by another process"):
        RunFolder(tmp_path).locked().__enter__()
    with RunFolder(tmp_path).locked():
        (tmp_path / "rows").touch()
    with (
        pytest.raises(ValueError, match="holds rows and resume=False"),
        RunFolder(tmp_path).locked("rows", "rows", False),
    ):
        pass
    with RunFolder(tmp_path).locked("rows", "rows"):
        pass


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(None)
    with folder.locked("rows", "rows", False):
        folder.write_result("result.json", {"a": 1})
    assert list(tmp_path.iterdir()) == []


def test_results_carry_the_versions(tmp_path):
    model = ndm_ct.NDM(ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2, width=4, depth=1)), (2,))
    x = torch.randn(8, 2)
    ndm_ct.fit(model, x, steps=1, batch_size=4, run_dir=tmp_path / "fit", progress=False)
    ndm_ct.evaluate(model, x, bound="elbo", run_dir=tmp_path / "evaluate", progress=False)
    description, _ = tensors.read(tmp_path / "fit" / "checkpoint.safetensors", "training")
    result = json.loads((tmp_path / "evaluate" / "evaluation.json").read_text())
    for found in (description["versions"], result["versions"]):
        assert (found["ndm_ct"], found["torch"]) == (ndm_ct.__version__, torch.__version__)
        assert found.keys() >= {"python", "numpy"}


@pytest.mark.skipif(shutil.which("git") is None, reason="makes a checkout")
def test_the_commit_is_that_of_the_package(tmp_path):
    """Not that of a checkout in which the package is merely installed; and none is fine too."""
    environment = os.environ | {
        f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }

    def git(*arguments):
        done = subprocess.run(["git", "-C", tmp_path, *arguments], env=environment, capture_output=True, check=True)
        return done.stdout.decode().strip()

    file = tmp_path / "package" / "file.py"
    file.parent.mkdir()
    file.write_text("")
    assert versions._commit(file) is None
    git("init")
    (tmp_path / "other").write_text("")
    git("add", "other")
    git("commit", "-m", "one")
    assert versions._commit(file) is None
    git("add", ".")
    git("commit", "-m", "two")
    assert versions._commit(file) == git("rev-parse", "HEAD")
    file.write_text("changed")
    assert versions._commit(file) == git("rev-parse", "HEAD") + "-dirty"


def test_versions_are_known_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert versions._commit(Path(versions.__file__)) is None
    assert versions.versions.__wrapped__()["ndm_ct"] == ndm_ct.__version__
