"""SIGKILL at random moments of whatever is meant to go on: training, evaluation, the commands, the benchmark.

After every kill all files are whole, but for what the next process drops: a temporary file, the last line of a log. At
the end the result is that of a process never killed.

Run as a script, this module forks processes that work and kills them: what a kill hits is then work, not the import.
"""

import csv
import importlib
import json
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from paths import ROOT, TESTS

import ndm_ct
from ndm_ct import NDM, nn, schedules
from ndm_ct.cli import commands as cli
from ndm_ct.storage import tensors as checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes that work are forked")
sys.path += [str(ROOT / "benchmarks"), str(TESTS)]

QUICK, ALL = 3, 30
TEMPORARY = re.compile(r"\..*\.[0-9a-f]{32}\.tmp")


# ------------------------------------------------------------------------------------------------------------ the work


def rows(n, seed=0):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))


def model():
    torch.manual_seed(0)
    net = nn.MLP(2, width=16, depth=2, dropout=0.3)
    return NDM(nn.Preconditioned(net), (2,), schedule=schedules.LinearLogSNR(-6.0, 5.0))


def train(folder):
    ndm_ct.fit(
        model(), rows(200), steps=40, batch_size=16, ema=0.9, run_dir=folder, checkpoint_every=3, log_every=2,
        validation=rows(32, 1), validate_every=5, patience=50, progress=False,
    )  # fmt: skip


def evaluate(folder):
    ndm_ct.evaluate(model(), rows(160), batch_size=4, bound="elbo", samples=8, run_dir=folder, progress=False)


def sample(folder):
    run = folder.parent / "run"
    assert not cli.main(
        ["sample", str(run), "-n", "80", "--batch-size", "8", "--out", str(folder / "x.npz"), "--quiet"]
    )


def loglik(folder):
    run, data = folder.parent / "run", folder.parent / "rows.csv"
    out = str(folder / "scores.csv")
    assert not cli.main(["loglik", str(run), str(data), "--batch-size", "4", "--out", out, "--quiet"])


def benchmark(folder):
    import steps_vs_fid

    images = folder.parent / "images.safetensors"
    steps_vs_fid.main([
        "--samples", "40", "--batch", "20", "--steps", "4,8", "--samplers", "ddim,heun", "--seeds", "0,1",
        "--classifier-steps", "4", "--neighbours", "0", "--models", f"small={images}",
        "--quiet", "--out", str(folder),
    ])  # fmt: skip


WORK = {work.__name__: work for work in (train, evaluate, sample, loglik, benchmark)}
HALF_WAY = {
    "train": "checkpoint.safetensors", "evaluate": "rows.jsonl", "sample": ".x.npz.parts/*.safetensors",
    "loglik": ".scores.csv.parts/*.safetensors", "benchmark": "samples/*.npz",
}  # fmt: skip
"""What is there when a part of the work is done."""

IMPORTS = {
    "benchmark": ["sklearn.datasets", "matplotlib.backends.backend_agg", "steps_vs_fid"],
}
"""What else the work would import on its way."""


# ---------------------------------------------------------------------------------------------------------- its killer


def drive():
    """For every line of the standard input, work in a process of its own, killed after so many seconds, if any."""
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # which optimisers and derivatives import on their way
    for line in sys.stdin:
        order = json.loads(line)
        for name in IMPORTS.get(order["work"], ()):
            importlib.import_module(name)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            labour(order, write)
        os.close(write)
        print(json.dumps(watched(child, read, order["seconds"])), flush=True)
        os.close(read)


def labour(order, write):
    """The work, on a disk so slow that many kills fall into a write."""
    code, fsync = 1, os.fsync
    os.fsync = lambda file: (time.sleep(0.04), fsync(file))
    try:
        sys.stdin.close()
        sys.stdout = sys.stderr
        os.write(write, b"!")
        WORK[order["work"]](Path(order["folder"]))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def watched(child, read, seconds):
    select.select([read], [], [])
    began, killed = time.monotonic(), False
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if seconds is not None and time.monotonic() - began >= seconds:
            os.kill(child, signal.SIGKILL)
            killed = os.WIFSIGNALED(status := os.waitpid(child, 0)[1])
            return {"killed": killed, "code": None if killed else os.waitstatus_to_exitcode(status)}
        time.sleep(0.001)
    return {"killed": False, "seconds": time.monotonic() - began}


class Killer:
    """The process that forks the working ones."""

    def __init__(self, errors):
        self.errors = errors
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT / "benchmarks"), str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")]
            )
        }
        with errors.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
                env=environment,
            )  # fmt: skip

    def __call__(self, work, folder, seconds=None):
        folder.mkdir(exist_ok=True)
        self.process.stdin.write(json.dumps({"work": work, "folder": str(folder), "seconds": seconds}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert "Traceback" not in self.errors.read_text(), self.errors.read_text()
        return answer


def furnish(folder):
    """Make what the work needs: a run, rows, a model of images."""
    np.savetxt(folder / "rows.csv", rows(24).numpy(), delimiter=",")
    quick = ["--steps", "20", "--width", "8", "--depth", "1", "--batch-size", "32", "--quiet"]
    assert cli.main(["train", str(folder / "rows.csv"), "--out", str(folder / "run"), *quick]) == 0
    torch.manual_seed(0)
    ndm_ct.save(NDM(nn.Preconditioned(nn.UNet(1, width=4, levels=1)), (1, 8, 8)), folder / "images.safetensors")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def killer(place):
    made = Killer(place / "errors.txt")
    yield made
    made.process.stdin.close()
    made.process.wait()
    made.process.stdout.close()


# ----------------------------------------------------------------------------------------------------------- the files


def whole(path):
    """Read a file to its end; one that is cut off or damaged raises."""
    if path.suffix == ".safetensors":
        kinds = {"checkpoint": "training", "model": "model", "images": "model"}
        if "cache" in path.parts:
            safetensors.torch.load(path.read_bytes())
        else:
            checkpoint.read(path, "part" if ".parts" in path.parent.suffix else kinds[path.stem])
    elif path.suffix == ".jsonl":
        lines = path.read_bytes().split(b"\n")
        assert all(isinstance(json.loads(line), dict) for line in lines[:-1])  # the last is empty, or torn
    elif path.suffix == ".json":
        assert json.loads(path.read_text())
    elif path.suffix == ".npz":
        with np.load(path) as file:
            assert all(file[name].size for name in file.files)
    elif path.suffix == ".npy":
        assert np.load(path).size
    elif path.suffix == ".csv":
        text = path.read_text()
        assert text.endswith("\n")
        assert len({len(row) for row in csv.reader(text.splitlines())}) == 1
    elif path.suffix == ".png":
        import matplotlib.image

        assert matplotlib.image.imread(path).size
    else:
        assert path.name == ".lock", path


def inspect(folder):
    """All files; returns how many temporary ones there are."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    temporary = [path for path in files if TEMPORARY.fullmatch(path.name)]
    for path in files:
        if path not in temporary:
            whole(path)
    return len(temporary)


def untimed(value):
    """Without what a clock measured, and without digests of lines that hold it."""
    if isinstance(value, dict):
        return {name: untimed(each) for name, each in value.items() if name not in ("seconds", "sha256", "settings")}
    return [untimed(each) for each in value] if isinstance(value, list) else value


def outcome(folder):
    """All that the work leaves, by the name of the file; timings apart, bit by bit."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".jsonl":
            assert path.read_bytes().endswith(b"\n")
            found[name] = [untimed(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".json" and "scores" not in path.parts:
            found[name] = untimed(json.loads(path.read_text()))
        elif path.name == "results.csv":
            found[name] = [untimed(row) for row in csv.DictReader(path.read_text().splitlines())]
        elif path.parent.name == "samples":
            with np.load(path) as file:
                found[name] = file["images"].tobytes(), untimed(json.loads(str(file["record"])))
        elif path.stem == "checkpoint":
            found[name] = {
                key: tensor.numpy().tobytes() for key, tensor in checkpoint.read(path, "training")[1].items()
            }
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


# ------------------------------------------------------------------------------------------------------------ the test


@pytest.mark.parametrize(
    ("work", "kills"),
    [("sample", QUICK), *(pytest.param(work, ALL, marks=pytest.mark.slow) for work in WORK)],
)
def test_killed_at_any_moment(killer, place, tmp_path, work, kills):
    """A folder is used until its work is finished, then the next one; the last is finished in the end."""
    if work == "benchmark":
        pytest.importorskip("sklearn")
        pytest.importorskip("matplotlib")
    draw = random.Random(kills)
    places = draw.sample(range(kills), kills)
    reference = place / f"{work}-{kills}-whole"
    seconds = killer(work, reference)["seconds"]
    expected = outcome(reference)
    runs = hits = half_way = writing = finished = 0
    folder = place / f"{work}-{kills}-0"
    while hits < kills or half_way < kills // 2:
        runs += 1
        assert runs <= 4 * kills, f"of {runs} processes {hits} were killed, {half_way} of these half-way"
        # Of the time of an uninterrupted process; more of them early, where a process takes up what it finds.
        moment = 0.7 * ((places[hits % kills] + draw.random()) / kills) ** 2
        answer = killer(work, folder, seconds * moment)
        temporary = inspect(folder)
        if answer["killed"]:
            assert temporary <= 1  # of this process: those before have been cleared away
            hits += 1
            writing += temporary
            half_way += begun(work, folder)
            seconds *= 1.0 if begun(work, folder) else 1.1  # the speed of a machine is not constant
            continue
        assert outcome(folder) == expected
        finished += 1
        seconds *= 0.8
        folder = place / f"{work}-{kills}-{finished}"
    killer(work, folder)
    assert inspect(folder) == 0
    assert outcome(folder) == expected
    assert hits >= kills
    assert writing >= (kills // ALL if work != "evaluate" else 0)  # which adds lines to one file
    print(f"{work}: {hits} kills, {half_way} half-way, {writing} in a write, {finished + 1} finished")


def begun(work, folder):
    """Whether a part of the work is done."""
    return any(folder.glob(HALF_WAY[work]))


if __name__ == "__main__":
    drive()
