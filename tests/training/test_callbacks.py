"""What is called during a training, what it is told, and what a training without callbacks does not pay."""

import csv

import numpy as np
import pytest
import torch
from test_training import mixture, quick, same, toy

import ndm_ct
from ndm_ct.training.callbacks import CSV, Callback, Samples, TensorBoard, WandB

HELD_OUT = {"validation": mixture(16, seed=9), "validate_every": 2}


class Recorder:
    """Any object will do."""

    def __init__(self):
        self.seen = []

    def start(self, training):
        self.seen.append(("start", training.step))

    def step(self, training, row):
        self.seen.append(("step", row["step"], row))

    def validation(self, training, row):
        self.seen.append(("validation", row["step"], row))

    def checkpoint(self, training, path):
        self.seen.append(("checkpoint", training.step, path))

    def end(self, training, result):
        self.seen.append(("end", result.step, result))


def test_events_come_in_order_with_their_rows(tmp_path):
    recorder = Recorder()
    result = quick(toy(), run_dir=tmp_path, checkpoint_every=2, log_every=1, callbacks=[recorder], **HELD_OUT)
    assert [entry[:2] for entry in recorder.seen] == [
        ("start", 0), ("step", 1), ("step", 2), ("validation", 2), ("checkpoint", 2), ("step", 3), ("step", 4),
        ("validation", 4), ("checkpoint", 4), ("end", 4),
    ]  # fmt: skip
    rows = [entry[2] for entry in recorder.seen if entry[0] == "step"]
    assert tuple(rows) == result.history
    assert tuple(entry[2] for entry in recorder.seen if entry[0] == "validation") == result.validation
    assert recorder.seen[-1][2] is result
    assert {entry[2] for entry in recorder.seen if entry[0] == "checkpoint"} == {tmp_path / "checkpoint.safetensors"}


def test_callbacks_change_no_bit_and_may_stop_the_training(tmp_path):
    class Noisy(Callback):
        def step(self, training, row):
            torch.rand(7)
            with training.averaged():
                ndm_ct.sample(training.model, 2, method="ddim", steps=2)
            if row["step"] == self.last:
                training.stop()

    plain, watched, noisy = toy(), toy(), Noisy()
    quick(plain)
    noisy.last = 3
    result = quick(watched, run_dir=tmp_path, callbacks=[noisy])
    assert (result.step, result.finished) == (3, False)
    noisy.last = None
    recorder = Recorder()
    assert quick(watched, run_dir=tmp_path, callbacks=[noisy, recorder]).finished
    assert recorder.seen[0] == ("start", 3)
    assert same(plain, watched)


def test_an_object_without_methods_is_refused():
    for wrong in (print, object(), Callback, "csv"):
        with pytest.raises(TypeError, match=r"callbacks\[1\] is .*expected an object with methods among start, step"):
            quick(toy(), callbacks=[Recorder(), wrong])


def test_without_callbacks_no_row_is_made(monkeypatch):
    """An empty :class:`Callback` counts as none."""
    made = []
    loop = __import__("ndm_ct.training.loop", fromlist=["Training"])
    row = loop.Training._row
    monkeypatch.setattr(loop.Training, "_row", lambda *arguments: made.append(1) or row(*arguments))
    quick(toy(), callbacks=[Callback()])
    assert len(made) == 1  # of the log
    quick(toy(), callbacks=[Recorder()])
    assert len(made) == 1 + 4 + 1


def test_csv_holds_every_row_once(tmp_path):
    def lines():
        with (tmp_path / "log.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    options = {"run_dir": tmp_path / "run", "checkpoint_every": 2, **HELD_OUT}

    class Failing(Callback):
        def step(self, training, row):
            if row["step"] == 3:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        quick(toy(), callbacks=[CSV(tmp_path / "log.csv"), Failing()], **options)
    assert [row["step"] for row in lines()] == ["1", "2", "2", "3"]
    quick(toy(), callbacks=[CSV(tmp_path / "log.csv")], **options)
    found = lines()
    assert [row["step"] for row in found] == ["1", "2", "2", "3", "4", "4"]
    assert [bool(row["validation_elbo"]) for row in found] == [False, False, True, False, False, True]
    assert float(found[0]["loss"]) > 0.0
    quick(toy(), callbacks=[CSV(tmp_path / "log.csv", every=2)])
    assert [row["step"] for row in lines()] == ["2", "4"]


def test_samples_are_drawn_from_the_averages(tmp_path):
    drawn, model = {}, toy()
    result = quick(
        model, steps=5, ema=0.9, run_dir=tmp_path, callbacks=[
            Samples(2, 3, to=drawn.__setitem__, method="ddim", steps=2), Samples(5, 3, method="ddim", steps=2),
        ],
    )  # fmt: skip
    assert sorted(drawn) == [2, 4, 5]
    expected = ndm_ct.sample(model, 3, generator=0, method="ddim", steps=2)
    assert torch.equal(drawn[5], expected)
    np.testing.assert_array_equal(np.load(tmp_path / "samples" / "samples-5.npy"), expected.numpy())
    model.load_state_dict(result.raw)
    assert not torch.equal(drawn[5], ndm_ct.sample(model, 3, generator=0, method="ddim", steps=2))
    with pytest.raises(ValueError, match="folder is missing"):
        quick(toy(), callbacks=[Samples(2, 3)])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = quick(toy(), run_dir=tmp_path, log_every=1, callbacks=[TensorBoard()], **HELD_OUT)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("training/loss")]
    assert found == [(row["step"], pytest.approx(row["loss"])) for row in result.history]
    assert [event.step for event in events.Scalars("validation/elbo")] == [2, 4]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_weights_and_biases_without_a_network(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    logged, callback = [], WandB(project="test", mode="offline", dir=str(tmp_path))

    class Spy(Callback):
        def start(self, training):
            assert callback.run.config["lr"] == 1e-3
            log = callback.run.log
            monkeypatch.setattr(
                callback.run, "log", lambda row, step: logged.append((step, row)) or log(row, step=step)
            )

    result = quick(toy(), log_every=1, callbacks=[callback, Spy()], **HELD_OUT)
    assert [step for step, _ in logged] == [1, 2, 2, 3, 4, 4]
    assert logged[0][1]["training/loss"] == result.history[0]["loss"]
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert wandb.run is None


@pytest.mark.parametrize(("callback", "module"), [(TensorBoard("x"), "tensorboard"), (WandB(), "wandb")])
def test_a_missing_package_is_named(monkeypatch, callback, module):
    monkeypatch.setitem(__import__("sys").modules, {"wandb": "wandb"}.get(module, "torch.utils.tensorboard"), None)
    with pytest.raises(ImportError, match=rf'package {module}: pip install "ndm-ct\[logging\]"'):
        quick(toy(), callbacks=[callback])


def test_earlier_checkpoints_are_kept_and_can_be_gone_back_to(tmp_path):
    expected = toy()
    quick(expected, steps=8)
    quick(toy(), steps=8, run_dir=tmp_path, checkpoint_every=2, keep_checkpoints=3)
    earlier = sorted(path.name for path in tmp_path.glob("checkpoint*"))
    assert earlier == ["checkpoint-4.safetensors", "checkpoint-6.safetensors", "checkpoint.safetensors"]
    (tmp_path / "checkpoint-4.safetensors").replace(tmp_path / "checkpoint.safetensors")
    back, recorder = toy(), Recorder()
    assert quick(back, steps=8, run_dir=tmp_path, callbacks=[recorder]).finished
    assert recorder.seen[0] == ("start", 4)
    assert same(back, expected)
    with pytest.raises(ValueError, match="keep_checkpoints has no effect without run_dir"):
        quick(toy(), keep_checkpoints=2)
    with pytest.raises(ValueError, match="keep_checkpoints"):
        quick(toy(), keep_checkpoints=0, run_dir=tmp_path)
