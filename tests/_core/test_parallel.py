"""Two processes do what one does: the same losses and weights, every row scored once, one folder."""

import json
import math
import os
import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from paths import TESTS

import ndm_ct
from ndm_ct.data.sources import Bins, Source
from ndm_ct.nn import MLP, Preconditioned
from ndm_ct.objectives.bound import Bound
from ndm_ct.objectives.straight import Straight
from ndm_ct.objectives.time_samplers import LearnedBuckets, LossHistory

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

# A process that ends with its group still there can abort (exit code -6) in the place of ending with its own code:
# gloo's threads free tensors, for which they need the interpreter, while it shuts down. Hence destroy_process_group.
COMMON = """
import atexit, sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if size > 1:
    torch.distributed.init_process_group("gloo", init_method=f"file://{{store}}", rank=rank, world_size=size)
    atexit.register(torch.distributed.destroy_process_group)
from test_parallel import *
"""


def rows(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, generator=generator) * torch.tensor([1.0, 0.3]) + 0.5


def model(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    net = MLP(2, width=16, depth=1, dropout=dropout)
    return ndm_ct.NDM(Preconditioned(net), (2,), schedule=ndm_ct.schedules.LearnedLogSNR(-8.0, 6.0))


def train(made, steps=12, **options):
    given = {
        "batch_size": 24, "lr": 1e-2, "ema": 0.9, "accumulate": 4, "validation": rows(50, 1), "validate_every": 5,
        "log_every": 3, "progress": False,
    }  # fmt: skip
    if "run_dir" in options:
        given["checkpoint_every"] = 4
    return ndm_ct.fit(made, rows(200), steps=steps, **given | options)


def together(tmp_path, code, size=2):
    """Run the code in so many processes; their standard errors and exit codes."""
    script, store = tmp_path / "script.py", tmp_path / f"store-{len(list(tmp_path.iterdir()))}"
    paths = [os.path.dirname(__file__), str(TESTS), os.path.dirname(os.path.dirname(ndm_ct.__file__))]
    script.write_text(COMMON.format(paths=paths) + textwrap.dedent(code))
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(size), str(store)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(size)
    ]
    return [(process.communicate(timeout=240)[1], process.returncode) for process in started]


def assert_done(results):
    assert all(code == 0 for _, code in results), results


def test_two_processes_train_as_one(tmp_path):
    expected = model(dropout=0.2)
    one = train(expected, run_dir=tmp_path / "one")
    assert_done(
        together(
            tmp_path,
            f"""
            made = model(seed=rank, dropout=0.2)  # the others take the weights of the first
            result = train(made, run_dir={str(tmp_path / "two")!r})
            torch.save([made.state_dict(), result], f"{tmp_path}/{{rank}}.pt")
            """,
        )
    )
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for state, result in saved:
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(state[name], tensor, atol=1e-5, rtol=1e-5)
        assert [row["step"] for row in result.history] == [row["step"] for row in one.history]
        for ours, theirs in zip(one.history + one.validation, result.history + result.validation, strict=True):
            for name in ("loss", "grad_norm", "validation_elbo"):
                if name in ours:
                    assert theirs[name] == pytest.approx(ours[name], rel=1e-5, abs=1e-5)
    assert all(torch.equal(saved[0][0][name], saved[1][0][name]) for name in saved[0][0])
    lines = [(tmp_path / name / "log.jsonl").read_text().count("\n") for name in ("one", "two")]
    assert lines[0] == lines[1] > 0


class Stopped:
    """A callback that sends a signal to its own process after a step, and notes the steps."""

    def __init__(self, number, last):
        self.number, self.last, self.steps = number, last, []

    def step(self, training, row):
        self.steps.append(row["step"])
        if row["step"] == self.last:
            os.kill(os.getpid(), self.number)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
def test_sigterm_to_some_processes_loses_at_most_one_step(tmp_path, ranks):
    """All stop after the same step with a checkpoint, and go on from there to the weights of the whole training."""
    code = f"""
    import signal
    whole, made = model(seed=0), model(seed=0)
    train(whole)
    options = dict(run_dir={str(tmp_path / "run")!r}, checkpoint_every=100)
    stopped = Stopped(signal.SIGTERM, 5 if rank in {ranks} else None)
    result = train(made, callbacks=[stopped], **options)
    assert not result.finished and result.step in (5, 6), result.step
    assert len(stopped.steps) - result.step in (0, 1), stopped.steps
    again = Stopped(None, None)
    result = train(model(seed=1) if rank else made, callbacks=[again], **options)
    assert result.finished and again.steps[0] == stopped.steps[-1] + 1, again.steps
    torch.save([result.step, made.state_dict(), whole.state_dict()], f"{tmp_path}/{{rank}}.pt")
    """
    assert_done(together(tmp_path, code))
    step, state, expected = torch.load(tmp_path / "0.pt", weights_only=False)
    assert step == 12
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_two_processes_train_as_one_in_mixed_precision(tmp_path):
    expected = model()
    train(expected, precision="bf16-mixed")
    code = f"""
    made = model(seed=rank)
    train(made, precision="bf16-mixed")
    torch.save(made.state_dict(), f"{tmp_path}/{{rank}}.pt")
    """
    assert_done(together(tmp_path, code))
    for rank in range(2):
        for name, tensor in torch.load(tmp_path / f"{rank}.pt").items():
            torch.testing.assert_close(tensor, expected.state_dict()[name], atol=1e-4, rtol=1e-4)


class Counting(torch.nn.Module):
    """An objective that counts its calls, and remembers the largest value it saw."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("largest", torch.zeros(1))

    def forward(self, made, x, generator, **cond):
        self.calls += 1
        self.largest.copy_(x.max().expand(1))
        return ndm_ct.loss(made, x, generator=generator)


OBJECTIVES = {
    "history": lambda: Bound(LossHistory(6)),
    "buckets": lambda: Straight(0.1, Bound(LearnedBuckets(6))),
    "foreign": Counting,
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_objectives_with_a_state_train_as_in_one_process(tmp_path, kind):
    expected, objective = model(), OBJECTIVES[kind]()
    start = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    train(expected, objective=objective)
    code = f"""
    made, objective = model(), OBJECTIVES[{kind!r}]()
    if rank == 1:  # the others take the state of the first
        [tensor.add_(1) for tensor in objective.state_dict().values()]
    train(made, objective=objective)
    torch.save([made.state_dict(), objective.state_dict()], f"{tmp_path}/{{rank}}.pt")
    """
    assert_done(together(tmp_path, code))
    saved = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for found in saved:
        for state, wanted in zip(found, (expected.state_dict(), objective.state_dict()), strict=True):
            for name, tensor in wanted.items():
                torch.testing.assert_close(state[name], tensor, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(saved[0][1][name], saved[1][1][name]) for name in start)
    assert all(not torch.equal(objective.state_dict()[name], start[name]) for name in start)


def test_parts_begin_at_the_state_of_the_step_and_leave_their_mean():
    """A history of four parts is that of the whole batch, in units of a part; a counter counts steps."""
    seen = []

    class Watched(LossHistory):
        def observe(self, v, loss):
            seen.append((self.count.clone(), torch.bincount((v * 6).long(), minlength=6)))
            super().observe(v, loss)

    objective, counter = Bound(Watched(6)), Counting()
    train(model(), steps=3, objective=objective)
    assert len(seen) == 12
    keep, expected = math.exp(-1.0 / 200), torch.zeros(6, dtype=torch.float64)
    for step in range(3):
        parts = seen[4 * step : 4 * step + 4]
        for state, _ in parts:
            torch.testing.assert_close(state, expected)
        expected = keep * expected + sum(counts for _, counts in parts) / 4.0
    torch.testing.assert_close(objective.sampler.count, expected)
    train(model(), steps=3, objective=counter)
    assert int(counter.calls) == 3


def test_an_interrupted_step_leaves_the_state_of_the_step_before():
    class Stop(Exception):
        pass

    objective = Counting()

    calls, forward = [], objective.forward

    def interrupted(*arguments, **keywords):
        calls.append(forward(*arguments, **keywords))
        if len(calls) == 7:  # in the second step
            raise Stop
        return calls[-1]

    objective.forward = interrupted
    with pytest.raises(Stop):
        train(model(), objective=objective)
    assert int(objective.calls) == 1


@pytest.mark.parametrize(("batch_size", "n"), [(3, 50), (24, 3)])
def test_no_part_of_a_batch_is_empty(batch_size, n):
    with pytest.raises(ValueError, match="accumulate=4 parts of a batch of 3 rows would leave some empty"):
        ndm_ct.fit(model(), rows(n, 0), steps=1, batch_size=batch_size, accumulate=4, progress=False)
    ndm_ct.fit(model(), rows(n, 0), steps=1, batch_size=batch_size, accumulate=3, progress=False)


@pytest.mark.slow
def test_a_training_goes_on_with_another_number_of_processes(tmp_path):
    expected = model()
    train(expected)
    folder = str(tmp_path / "run")
    assert_done(together(tmp_path, f"train(model(), run_dir={folder!r}, time_limit=1e-9)"))
    first = model()
    stopped = train(first, run_dir=folder, time_limit=1e-9)
    assert not stopped.finished
    assert_done(together(tmp_path, f"train(model(), run_dir={folder!r})"))
    for name, tensor in ndm_ct.load(f"{folder}/model.safetensors").state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], atol=1e-5, rtol=1e-5)


def test_parts_add_up_to_the_batch():
    """With an objective that draws nothing, the gradient of the parts is that of the whole."""

    def objective(made, x, generator, **cond):
        t = torch.full((len(x),), 0.5, dtype=torch.float64)
        return (made.predict_x(x, t) - x).square().sum(1)

    whole, parts = model(), model()
    for made, accumulate in ((whole, 1), (parts, 3)):
        train(made, objective=objective, accumulate=accumulate, batch_size=25)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], tensor, atol=1e-5, rtol=1e-5)


def test_parts_have_noise_of_their_own():
    noises = []

    def objective(made, x, generator, **cond):
        noises.append(torch.rand(2, generator=generator))
        return made.predict_x(x, torch.full((len(x),), 0.5, dtype=torch.float64)).square().sum(1)

    train(model(), steps=3, objective=objective)
    assert len({tuple(noise.tolist()) for noise in noises}) == 12


def test_every_row_is_scored_once(tmp_path):
    made, options = model(), {"batch_size": 16, "progress": False, "rtol": 1e-3, "atol": 1e-3, "seed": 3}
    expected = ndm_ct.evaluate(made, rows(100), **options)
    code = f"""
    options = {options!r} | {{"run_dir": "{tmp_path}/evaluation"}}
    part = ndm_ct.evaluate(model(), rows(100), max_rows=40, **options)
    assert part.rows == 40, part.rows
    result = ndm_ct.evaluate(model(), rows(100), **options)
    torch.save(result, f"{tmp_path}/{{rank}}.pt")
    """
    assert_done(together(tmp_path, code))
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert sorted(result.indices.tolist()) == list(range(100))
        by_row = dict(zip(result.indices.tolist(), result.values.tolist(), strict=True))
        wanted = dict(zip(expected.indices.tolist(), expected.values.tolist(), strict=True))
        assert max(abs(by_row[row] - wanted[row]) for row in wanted) < 1e-3
        assert result.nll == pytest.approx(expected.nll, abs=1e-3)
    lines = (tmp_path / "evaluation" / "rows.jsonl").read_text().splitlines()[1:]
    assert sorted(row for line in lines for row in json.loads(line)["rows"]) == list(range(100))
    # and one process reads what two wrote
    again = ndm_ct.evaluate(made, rows(100), **options, run_dir=tmp_path / "evaluation")
    assert again.values.tolist() == result.values.tolist()


class Buffered(torch.nn.Module):
    """A network with a buffer, which DistributedDataParallel sends to all at every call."""

    def __init__(self):
        super().__init__()
        self.net = MLP(2, width=8, depth=1)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, z, t):
        return self.scale * self.net(z, t)


def buffered(wrapped=lambda net: net):
    """A model of three such networks, in a head and in two transforms."""
    torch.manual_seed(0)
    transform = ndm_ct.transforms.Neural(wrapped(Buffered()))
    return ndm_ct.NDM(Preconditioned(wrapped(Buffered())), (2,), transform=transform)


def test_wrapped_networks_do_not_wait_for_each_other(tmp_path):
    """Each process solves other rows in another number of evaluations; the keys in files are those of the networks."""
    expected = ndm_ct.loglik(buffered().double(), rows(30).double())
    code = f"""
    made = buffered(torch.nn.parallel.DistributedDataParallel)
    bare = ndm_ct.NDM(torch.nn.parallel.DistributedDataParallel(Buffered()), (2,))
    assert type(bare.predictor) is Buffered
    own = slice(0, 3) if rank else slice(3, 30)
    tolerance = 1e-3 if rank else 1e-8
    x = rows(30)[own].double()
    value, info = ndm_ct.loglik(made.double(), x, rtol=tolerance, atol=tolerance, return_info=True)
    torch.save([value, info.nfe, list(made.state_dict())], f"{tmp_path}/{{rank}}.pt")
    """
    assert_done(together(tmp_path, code))
    few, many = (torch.load(tmp_path / f"{rank}.pt") for rank in (1, 0))
    assert few[1] != many[1]
    torch.testing.assert_close(torch.cat([few[0], many[0]]), expected, atol=2e-2, rtol=0.0)
    assert few[2] == list(buffered().state_dict())


@pytest.mark.slow
def test_a_failure_in_one_process_ends_all(tmp_path):
    results = together(
        tmp_path,
        """
        made = model()
        own = made.predictor.forward
        def forward(z, t, schedule, **cond):
            return own(z, t, schedule, **cond) * (float("nan") if rank == 1 else 1.0)
        made.predictor.forward = forward
        train(made)
        """,
    )
    assert [code for _, code in results] == [1, 1], results
    assert "another process failed at step 0" in results[0][0]
    assert "at step 0: " in results[1][0]


def test_a_folder_in_use_is_refused_in_all(tmp_path):
    folder = tmp_path / "run"
    with ndm_ct.storage.RunFolder(folder).locked():
        results = together(tmp_path, f"train(model(), run_dir={str(folder)!r})")
    assert [code for _, code in results] == [1, 1], results
    assert all("is in use by another process" in text for text, _ in results)


def test_parts_have_to_be_shared_equally(tmp_path):
    results = together(tmp_path, "train(model(), accumulate=3)")
    assert all("accumulate=3 parts of a batch cannot be shared equally by 2 processes" in text for text, _ in results)


legacy = np.random.mtrand._rand  # the global generator behind np.random.random


class Items(torch.utils.data.Dataset):
    """Rows, each at a random place when it is read if there is a spread."""

    def __init__(self, x, spread=0.0):
        self.x, self.spread = x, spread

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        return self.x[row] + self.spread * (torch.randn(2) + random.random() + legacy.random())


def refusal(call):
    """The message of a call that is refused."""
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def test_processes_of_different_rows_or_arguments_are_refused(tmp_path):
    """Shards of the data are the habit with distributed samplers; all processes say what differs, and the cure."""
    code = f"""
    made, x, options = model(), rows(100), {{"bound": "elbo", "progress": False}}
    own = x[50 * rank : 50 * rank + 50]
    def score(data=x, **others):
        return ndm_ct.evaluate(made, data, **options | others)
    found = [refusal(call) for call in (
        lambda: score(own),
        lambda: ndm_ct.compare(made, made, own, **options),
        lambda: train(made, validation=own),
        lambda: ndm_ct.fit(made, own, steps=1, progress=False),
        lambda: score(Items(own)),
        lambda: score(x[: 50 + rank]),
        lambda: score(seed=rank),
        lambda: score(max_rows=50 + rank),
        lambda: score(run_dir="{tmp_path}/main" if rank == 0 else None),
    )]
    result = score(Items(x, spread=0.1), time_limit=100.0 + rank)
    torch.save([found, result.rows], f"{tmp_path}/{{rank}}.pt")
    """
    assert_done(together(tmp_path, code))
    (found, scored), other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert [found, scored] == other
    assert scored == 100
    calls = ["evaluate", "compare", "fit", "fit"] + 5 * ["evaluate"]
    differing = [
        "data.sha256", "data.sha256", "validation.sha256", "data.sha256", "data.items",
        "data.rows is 50 in process 0, 51 in process 1; data.sha256", "seed is 0 in process 0, 1 in process 1",
        "max_rows is 50 in process 0, 51 in process 1", "run_dir is True in process 0, False in process 1",
    ]  # fmt: skip
    for message, call, words in zip(found, calls, differing, strict=True):
        assert message.startswith(
            f"ndm_ct.{call} got other arguments in process 1 than in process 0: {words}. Pass the same"
        )
        assert f"all rows in every process, because {call} itself shares them out. Leave out Distr" in message


def test_reading_items_leaves_random_states_as_they_were():
    source = Source(Items(rows(20), spread=1.0), {}, Bins(model(), None, "uniform"), "data", ndm_ct.fit)
    states = torch.get_rng_state(), legacy.get_state()[1].tolist(), random.getstate()
    first = source.fingerprint_with_items()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (legacy.get_state()[1].tolist(), random.getstate()) == states[1:]
    torch.rand(3), legacy.random(3), random.random()
    assert source.fingerprint_with_items() == first
    assert set(first) == {"rows", "sha256", "items"}
    assert "items" not in source.fingerprint()


LAUNCHED = """
import atexit, sys
sys.path[:0] = {paths!r}
from test_parallel import *
torch.set_num_threads(1)
if sys.argv[1] == "accelerate":
    from accelerate import Accelerator
    assert Accelerator(cpu=True).num_processes == 2
else:
    torch.distributed.init_process_group("gloo")
atexit.register(torch.distributed.destroy_process_group)
rank = torch.distributed.get_rank()
made = model(seed=rank)
train(made)
result = ndm_ct.evaluate(made, rows(60), batch_size=16, progress=False, bound="elbo", samples=4)
torch.save([made.state_dict(), result.indices, result.values], f"{folder}/{{rank}}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("by", ["torch", "accelerate"])
def test_torchrun_starts_them(tmp_path, by):
    """As the guide says, the group made by torch or by Accelerate; the result is that of one process."""
    pytest.importorskip(by)
    expected = model()
    train(expected)
    scores = ndm_ct.evaluate(expected, rows(60), batch_size=16, progress=False, bound="elbo", samples=4)
    paths = [os.path.dirname(__file__), str(TESTS), os.path.dirname(os.path.dirname(ndm_ct.__file__))]
    script = tmp_path / "script.py"
    script.write_text(LAUNCHED.format(paths=paths, folder=tmp_path))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), by]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        state, indices, values = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(state[name], tensor, atol=1e-5, rtol=1e-5)
        assert torch.equal(indices, scores.indices)
        torch.testing.assert_close(values, scores.values, atol=1e-3, rtol=1e-4)
