"""Networks wrapped by FSDP2 train to the weights of one process, and leave whole files."""

import json

import pytest
import torch
from stopping import StopAt  # noqa: F401 (for the processes)
from test_parallel import assert_done, model, rows, together, train

import ndm_ct

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

SHARD = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from test_sharded import *

def sharded(made, size=size):
    fully_shard(made.predictor, mesh=init_device_mesh("cpu", (size,)))
    return made
"""


def run(tmp_path, code):
    return together(tmp_path, SHARD + code)


def test_two_processes_train_a_sharded_network_as_one_trains_it_whole(tmp_path):
    """Weights, averages, norms, validations and files; the same call in one process then continues the training."""
    options = {"steps": 12, "ema": (0.9, 0.5), "weight_decay": 0.1, "grad_clip": 0.5}
    expected = model(dropout=0.2)
    one = train(expected, run_dir=tmp_path / "one", **options)
    code = f"""
made = sharded(model(dropout=0.2))
result = train(made, run_dir={str(tmp_path / "two")!r}, **{options!r})
state = {{name: ndm_ct._core.parallel.whole(tensor) for name, tensor in made.state_dict().items()}}
if rank == 0:
    torch.save(state, {str(tmp_path / "state.pt")!r})
assert result.finished
"""
    assert_done(run(tmp_path, code))
    found = torch.load(tmp_path / "state.pt")
    saved = ndm_ct.load(tmp_path / "two" / "model.safetensors").state_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5)
        assert torch.equal(saved[name], found[name])
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for ours, theirs in zip(*logs, strict=True):
        for name in {"step", "loss", "grad_norm", "validation_elbo"} & ours.keys():
            assert theirs[name] == pytest.approx(ours[name], rel=1e-5, abs=1e-5)
    more = model(dropout=0.2)
    result = train(more, run_dir=tmp_path / "two", **options | {"steps": 14})
    straight = model(dropout=0.2)
    train(straight, run_dir=tmp_path / "one", **options | {"steps": 14})
    assert (one.step, result.step) == (12, 14)
    for name, tensor in straight.state_dict().items():
        torch.testing.assert_close(more.state_dict()[name], tensor, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_sharded_training_that_was_stopped_goes_on_with_the_same_bits(tmp_path):
    code = f"""
whole, rest = sharded(model()), sharded(model())
options = {{"patience": 5}}
train(whole, **options)
result = train(rest, run_dir={str(tmp_path / "run")!r}, callbacks=[StopAt(5)], **options)
assert result.step == 5, result.step
assert train(rest, run_dir={str(tmp_path / "run")!r}, **options).finished
for a, b in zip(whole.parameters(), rest.parameters(), strict=True):
    assert torch.equal(ndm_ct._core.parallel.whole(a), ndm_ct._core.parallel.whole(b))
"""
    assert_done(run(tmp_path, code))


def test_a_sharded_model_is_scored_and_drawn_from(tmp_path):
    expected = model()
    scores = ndm_ct.evaluate(expected, rows(40), batch_size=16, progress=False).values
    torch.save(scores, tmp_path / "scores.pt")
    code = f"""
made = sharded(model())
found = ndm_ct.evaluate(made, rows(40), batch_size=16, progress=False, run_dir={str(tmp_path / "run")!r})
torch.testing.assert_close(found.values, torch.load({str(tmp_path / "scores.pt")!r}), atol=1e-5, rtol=1e-5)
torch.testing.assert_close(-ndm_ct.loglik(made, rows(3)), -ndm_ct.loglik(model(), rows(3)), atol=1e-5, rtol=1e-5)
assert ndm_ct.sample(made, 3, generator=0, method="ddim", steps=3).shape == (3, 2)
ndm_ct.save(made, {str(tmp_path / "model.safetensors")!r})
"""
    assert_done(run(tmp_path, code))
    saved = ndm_ct.load(tmp_path / "model.safetensors").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.state_dict().items())
    assert len((tmp_path / "run" / "rows.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
def test_shards_of_other_processes_than_those_of_the_training_are_refused(tmp_path):
    code = """
mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))["b"]
made = model()
fully_shard(made.predictor, mesh=mesh)
import pytest
with pytest.raises(ValueError, match="the model is sharded over 1 processes, and ndm_ct.fit works in 2"):
    train(made)
"""
    assert_done(run(tmp_path, code))
