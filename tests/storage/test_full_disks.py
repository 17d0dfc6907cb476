"""Disks that are full and folders that are read-only: the file is named, what was there stays, and work goes on later.

The disks are real, of a few hundred kilobytes in memory, where this process may mount some; what the library does with
the system's errors is tested everywhere.
"""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_kills import TEMPORARY, furnish, inspect, model, outcome, rows

import ndm_ct
from ndm_ct import objectives
from ndm_ct.cli import commands as cli
from ndm_ct.cli import sampling, score
from ndm_ct.storage import append, write_atomically

FULL = "No space left on device: nothing was changed; free some space or write elsewhere: '{}'"
LOCKED = "Read-only file system: nothing was changed; make the place writable or write elsewhere: '{}'"


# ------------------------------------------------------------------------------------------------- the system's errors


def failing(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"as it was\n")
    return path


WRITERS = pytest.mark.parametrize("write", [write_atomically, append])


@WRITERS
@pytest.mark.parametrize(
    ("number", "kind", "cure"),
    [
        (errno.ENOSPC, OSError, "free some space"),
        (errno.EDQUOT, OSError, "free some space"),
        (errno.EIO, OSError, "make the place writable"),
        (errno.EACCES, PermissionError, "make the place writable"),
    ],
)
def test_what_the_system_refuses_is_told_with_the_file(path, monkeypatch, write, number, kind, cure):
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(kind) as caught:
        write(path, b"more\n")
    assert (caught.value.errno, caught.value.filename) == (number, str(path))
    assert str(caught.value).startswith(f"[Errno {number}] {os.strerror(number)}: nothing was changed; {cure}")
    assert path.read_bytes() == b"as it was\n"
    assert [each.name for each in path.parent.iterdir()] == ["file"]


@WRITERS
def test_a_folder_that_is_missing_is_told_with_the_file(tmp_path, write):
    with pytest.raises(FileNotFoundError, match=r"nothing was changed; make its folder first: '.*/none/file'"):
        write(tmp_path / "none" / "file", b"")


@WRITERS
def test_ctrl_c_leaves_the_file_as_it_was(path, monkeypatch, write):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(path, b"more\n")
    assert path.read_bytes() == b"as it was\n"
    assert [each.name for each in path.parent.iterdir()] == ["file"]


def test_a_file_may_be_limited_in_size(path):
    """The system's own limit: a part of the line is written, and taken back."""
    resource = pytest.importorskip("resource")
    script = (
        "import resource, signal, sys; from ndm_ct.storage import append, write_atomically\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (1000, {resource.RLIM_INFINITY}))\n"
        "for write in (write_atomically, append):\n"
        "    try: write(sys.argv[1], bytes(2000))\n"
        "    except OSError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.count("File too large: nothing was changed; free some space") == 2
    assert path.read_bytes() == b"as it was\n"
    assert [each.name for each in path.parent.iterdir()] == ["file"]


# ---------------------------------------------------------------------------------------------------------- real disks


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("place"))


class Disk:
    """A disk in memory."""

    def __init__(self, folder):
        self.folder, self.filler = folder, folder / "filler"

    def fill(self):
        with self.filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                return

    def free(self):
        self.filler.unlink()

    def mount(self, options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def files(self):
        """What each file holds, but for locks; no temporary ones."""
        files = [path for path in self.folder.rglob("*") if path.is_file() and path.name not in (".lock", "filler")]
        assert not [path for path in files if TEMPORARY.fullmatch(path.name)]
        return {path: path.read_bytes() for path in files}


@pytest.fixture
def disk(tmp_path):
    made = Disk(tmp_path / "disk")
    made.folder.mkdir()
    try:
        mounted = made.mount("size=4m")
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("this process may not mount a disk")
    yield made
    subprocess.run(["umount", str(made.folder)], check=True)


def train(place, out):
    ndm_ct.fit(
        model(), rows(64), steps=24, batch_size=16, run_dir=out, checkpoint_every=4, log_every=4, progress=False,
        validation=rows(16, 1), validate_every=8,
    )  # fmt: skip


def evaluate(place, out):
    ndm_ct.evaluate(model(), rows(48), batch_size=8, bound="elbo", samples=4, run_dir=out, progress=False)


def command(*arguments):
    """Its errors as they are raised."""
    options = cli.build_parser().parse_args([*map(str, arguments)])
    assert cli.run(options) == 0


def sample(place, out):
    command("sample", place / "run", "-n", 48, "--batch-size", 8, "--out", out / "x.npz", "--quiet")


def loglik(place, out):
    command("loglik", place / "run", place / "rows.csv", "--batch-size", 4, "--out", out / "scores.csv", "--quiet")


def benchmark(place, out):
    steps_vs_fid = pytest.importorskip("steps_vs_fid")
    pytest.importorskip("sklearn")
    steps_vs_fid.main([
        "--samples", "40", "--batch", "20", "--steps", "4,8", "--samplers", "ddim", "--classifier-steps", "4",
        "--neighbours", "0", "--models", f"small={place}/images.safetensors", "--quiet", "--out", str(out),
    ])  # fmt: skip


WORK = {
    train: (objectives, "loss", 14),
    evaluate: (objectives, "elbo", 4),
    sample: (sampling, "sample", 4),
    loglik: (score, "loglik", 4),
    benchmark: (ndm_ct, "sample", 5),
}
"""Each with a function that it calls again and again, and a call in the midst of it."""
EVERY = pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)


@pytest.fixture
def midway(monkeypatch):
    """Calls something in the midst of the work."""

    def prepare(work, act):
        owner, name, number = WORK[work]
        calls, original = [], getattr(owner, name)

        def counting(*given, **options):
            calls.append(name)
            if len(calls) == number:
                act()
            return original(*given, **options)

        monkeypatch.setattr(owner, name, counting)

    return prepare


@EVERY
def test_a_disk_that_fills_midway(disk, place, tmp_path, midway, work):
    """The error names the file; checkpoints, rows and outputs are as they were; with room, the work goes on."""
    work(place, tmp_path / "whole")
    before = {}

    def fill():
        disk.fill()
        before.update(disk.files())

    midway(work, fill)
    with pytest.raises(OSError, match=FULL.format(rf"{disk.folder}/.*")) as caught:
        work(place, disk.folder / "out")
    assert not TEMPORARY.fullmatch(Path(caught.value.filename).name)
    assert before
    assert_kept(disk.files(), before)
    with pytest.raises(OSError, match=FULL.format(rf"{disk.folder}/.*")):
        work(place, disk.folder / "out")
    assert_kept(disk.files(), before)
    disk.free()
    work(place, disk.folder / "out")
    assert inspect(disk.folder / "out") == 0
    assert outcome(disk.folder / "out") == outcome(tmp_path / "whole")


def assert_kept(now, before):
    """To journals whole lines may have been added, where their last pages had room for them."""
    assert now.keys() == before.keys()
    for path, data in before.items():
        if path.suffix == ".jsonl":
            assert now[path].startswith(data)
            assert now[path].endswith(b"\n")
        else:
            assert now[path] == data


@EVERY
def test_a_folder_that_became_read_only(disk, place, midway, work):
    """Also one whose lock is there: nothing changes, and the folder or the file is named."""

    class Stopped(Exception):
        pass

    def stop():
        raise Stopped

    midway(work, stop)
    with pytest.raises(Stopped):
        work(place, disk.folder / "out")
    before = disk.files()
    assert before
    assert disk.mount("remount,ro")
    for out in ("out", "new"):
        with pytest.raises(OSError, match=LOCKED.format(rf"{disk.folder}/{out}.*")):
            work(place, disk.folder / out)
        assert disk.files() == before
    assert disk.mount("remount,rw")
    work(place, disk.folder / "out")
    assert inspect(disk.folder / "out") == 0


def test_saving_where_there_is_no_room(disk):
    path, first = disk.folder / "model.safetensors", model()
    ndm_ct.save(first, path)
    before = disk.files()
    disk.fill()
    with pytest.raises(OSError, match=FULL.format(re.escape(str(path)))):
        ndm_ct.save(model(), path)
    assert disk.files() == before
    disk.free()
    assert disk.mount("remount,ro")
    for target in (path, disk.folder / "other.safetensors"):
        with pytest.raises(OSError, match=LOCKED.format(re.escape(str(target)))):
            ndm_ct.save(model(), target)
    assert disk.files() == before
    assert torch.equal(next(ndm_ct.load(path).parameters()), next(first.parameters()))


def test_a_run_in_a_read_only_folder_is_used_as_any(disk, place):
    """Nothing is written beside the model or the rows."""
    for path in (place / "run").iterdir():
        (disk.folder / path.name).write_bytes(path.read_bytes())
    assert disk.mount("remount,ro")
    command("evaluate", disk.folder, place / "rows.csv", "--quiet")
    command("info", disk.folder)


def test_commands_explain_it(disk, place, capsys):
    disk.fill()
    arguments = ["sample", place / "run", "-n", 8, "--out", disk.folder / "x.csv"]
    assert cli.main([*map(str, arguments), "--quiet"]) == 1
    assert re.match(rf"ndm-ct sample: \[Errno 28\] {FULL.format(rf'{disk.folder}/.*')}", capsys.readouterr().err)
