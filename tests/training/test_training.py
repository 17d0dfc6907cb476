"""Files and trainings: bit-identical, all or nothing, and indifferent to being killed."""

import importlib
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
import uuid

import numpy as np
import pytest
import torch
from oracles import setting
from paths import TESTS
from stopping import StopAt

import ndm_ct
from ndm_ct import schedules, transforms
from ndm_ct._core.seeds import derive_seeds
from ndm_ct.nn import MLP, Preconditioned, UNet
from ndm_ct.quantisation import Quantisation
from ndm_ct.storage import load, save
from ndm_ct.storage import tensors as checkpoint
from ndm_ct.training import fit


class OwnNet(torch.nn.Module):
    """A user's network, which no file can describe."""

    def __init__(self, width=8):
        super().__init__()
        self.layer = torch.nn.Linear(2, width)
        self.out = torch.nn.Linear(width, 2)
        self.tied = self.layer
        self.register_buffer("count", torch.tensor(7))

    def forward(self, z, t):
        return self.out(torch.tanh(self.layer(z)))


def toy(seed=0, **options):
    torch.manual_seed(seed)
    options = {"schedule": schedules.LinearLogSNR(-8.0, 6.0)} | options
    model = ndm_ct.NDM(Preconditioned(MLP(2, width=16, depth=1)), event_shape=(2,), **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def mixture(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sign = 2.0 * torch.randint(0, 2, (n, 1), generator=generator) - 1.0
    return torch.cat([sign, torch.zeros(n, 1)], 1) + 0.3 * torch.randn(n, 2, generator=generator)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def quick(model, data=None, **options):
    return fit(
        model, mixture(64) if data is None else data, **({"steps": 4, "batch_size": 16, "progress": False} | options)
    )


# ---------------------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": schedules.LearnedLogSNR(-8.0, 6.0), "volatility": 0.7, "t_min": 0.01},
        {"schedule": schedules.VarianceExploding(0.01, 10.0)},
        {"transform": transforms.Neural(MLP(2, width=8))},
        {"transform": transforms.Separable(MLP(2, width=8, outputs=2, time=False))},
        {"schedule": schedules.Tabulated((0.99, 0.5, 0.1, 0.01))},
    ],
    ids=["plain", "learned", "exploding", "neural", "separable", "tabulated"],
)
def test_loaded_model_is_the_saved_one_bit_by_bit(tmp_path, options, dtype):
    model = toy(**options).to(dtype)
    save(model, tmp_path / "m.safetensors")
    state = torch.get_rng_state()
    loaded = load(tmp_path / "m.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert same(model, loaded)
    assert (loaded.t_min, loaded.process.volatility) == (model.t_min, model.process.volatility)
    x = mixture(3).to(dtype)
    assert torch.equal(ndm_ct.loglik(model, x, rtol=1e-3, atol=1e-3), ndm_ct.loglik(loaded, x, rtol=1e-3, atol=1e-3))


def test_equal_models_make_equal_files(tmp_path):
    for name in "abcdef":
        save(toy(), tmp_path / name)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_images_and_the_moments_head(tmp_path):
    net = Preconditioned(UNet(1, width=4, outputs=2), prediction="moments", data_std=0.5)
    model = ndm_ct.NDM(net, event_shape=(1, 4, 4), prediction="moments")
    save(model, tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert (loaded.prediction, loaded.predictor.data_std) == ("moments", 0.5)
    assert same(model, loaded)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.complex64, torch.bool, torch.int64, torch.uint8]
)
def test_any_dtype_survives(tmp_path, dtype):
    tensors = {
        "a": torch.arange(6).reshape(2, 3).to(dtype),
        "scalar": torch.ones((), dtype=dtype),
        "none": torch.ones(0).to(dtype),
    }
    tensors["view"] = tensors["a"].T
    checkpoint.write(tmp_path / "f", tensors, {"kind": "training"})
    _, found = checkpoint.read(tmp_path / "f", "training")
    assert all(torch.equal(found[k], tensors[k]) and found[k].dtype == dtype for k in tensors)


def test_a_file_whose_network_takes_other_events_is_refused(tmp_path):
    """Nothing is evaluated for it: a probe would need conditioning, and could move a network's own state."""
    path = tmp_path / "m"
    save(toy(), path)
    description, tensors = checkpoint.read(path, "model")
    description["model"]["event_shape"] = [3]
    checkpoint.write(path, tensors, description)
    with pytest.raises(ndm_ct.CheckpointError, match=r"event_shape=\(3,\) has 3 numbers"):
        load(path)


def test_external_networks_are_passed_in(tmp_path):
    path = tmp_path / "m.safetensors"
    own = OwnNet()
    model = ndm_ct.NDM(own, event_shape=(2,), transform=transforms.Neural(OwnNet()))
    save(model, path)
    with pytest.raises(ValueError, match="predictor="):
        load(path)
    with pytest.raises(ValueError, match="transform="):
        load(path, predictor=OwnNet())
    loaded = load(path, predictor=OwnNet(), transform=transforms.Neural(OwnNet()))
    assert same(model, loaded)
    assert loaded.predictor.tied is loaded.predictor.layer

    untouched = OwnNet().double()
    before = {k: v.clone() for k, v in untouched.state_dict().items()}
    for wrong, cause in ((untouched, "dtype"), (OwnNet(width=9), "shape"), (MLP(2, width=8), "lacks|unexpected")):
        with pytest.raises(ndm_ct.CheckpointError, match=cause):
            load(path, predictor=wrong, transform=transforms.Neural(OwnNet()))
    assert all(torch.equal(v, before[k]) for k, v in untouched.state_dict().items())

    save(toy(), path)
    with pytest.raises(ValueError, match="leave predictor out"):
        load(path, predictor=OwnNet())


def test_a_learned_schedule_beside_an_external_transform_keeps_its_precision(tmp_path):
    options = {"transform": transforms.Neural(OwnNet()), "schedule": schedules.LearnedLogSNR(-8.0, 6.0)}
    model = toy(**options).double()
    save(model, tmp_path / "m")
    assert same(model, load(tmp_path / "m", transform=transforms.Neural(OwnNet().double())))


def test_a_plain_function_is_external_and_has_no_weights(tmp_path):
    save(ndm_ct.NDM(lambda z, t: 0.5 * z, event_shape=(2,)), tmp_path / "m")
    loaded = load(tmp_path / "m", predictor=lambda z, t: 0.5 * z)
    assert ndm_ct.loglik(loaded, mixture(2)).isfinite().all()


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failing_save_keeps_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "m.safetensors"
    save(toy(0), path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(OSError, match="no space"):
            save(toy(1), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert same(load(path), toy(0))


def test_saving_into_a_missing_folder_fails_cleanly(tmp_path):
    with pytest.raises(FileNotFoundError):
        save(toy(), tmp_path / "missing" / "m")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing")


def _rewritten(path, change):
    """The file with its description changed and its checksum right."""
    description, tensors = checkpoint.read(path, "model")
    description = json.loads(json.dumps(description))
    change(description, tensors)
    checkpoint.write(path, tensors, description)
    return path.read_bytes()


def damages(path):
    good = path.read_bytes()
    header = int.from_bytes(good[:8], "little")
    for cut in (0, 1, 7, 8, 9, header // 2, 8 + header - 1, 8 + header, 8 + header + 5, len(good) - 1):
        yield f"cut at {cut}", good[:cut]
    yield "longer", good + b"\0"
    generator = np.random.default_rng(0)
    for position in [
        0,
        1,
        6,
        7,
        8,
        9,
        *generator.integers(8, 8 + header, 60),
        *generator.integers(8 + header, len(good), 20),
    ]:
        flipped = bytearray(good)
        flipped[position] ^= 1 << int(generator.integers(8))
        yield f"bit flip at {position}", bytes(flipped)
    yield "noise", generator.bytes(4096)
    yield "pickle", pickle.dumps({"weights": [1.0]})
    torch.save({"a": torch.ones(2)}, path)
    yield "torch.save", path.read_bytes()
    import safetensors.torch as st

    yield "without metadata", st.save({"a": torch.ones(2)})
    for name, text in {"no JSON": "{", "no object": "[1]", "no string": '{"sha256": 3}', "deep": "[" * 100_000}.items():
        yield name, st.save({}, {"ndm_ct": text})

    for name, change in {
        "unknown class": setting("model", "predictor", "type", to="Popen"),
        "unknown schedule": setting("model", "schedule", "type", to="os.system"),
        "unknown argument": setting("model", "schedule", "gamma", to=1.0),
        "bad argument": setting("model", "schedule", "gamma_min", to=9.0),
        "schedule is no schedule": setting("model", "schedule", to={"type": "TimeEmbedding", "width": 3}),
        "predictor is a number": setting("model", "predictor", to=3),
        "volatility is a word": setting("model", "volatility", to="high"),
        "huge": setting("model", "predictor", "net", "width", to=2_000_000_000),
        "other width": setting("model", "predictor", "net", "width", to=17),
        "event": setting("model", "event_shape", to=[0]),
        "prediction": setting("model", "prediction", to="y"),
        "t_min": setting("model", "t_min", to="now"),
        "no model": lambda description, _: description.pop("model"),
        "model is a list": setting("model", to=[]),
        "no predictor": lambda description, _: description["model"].pop("predictor"),
        "newer": setting("format", to=99),
        "training": setting("kind", to="training"),
        "missing tensor": lambda _, tensors: tensors.popitem(),
        "unexpected tensor": lambda _, tensors: tensors.update(extra=torch.ones(1)),
        "wrong shape": lambda _, tensors: tensors.update({next(iter(tensors)): torch.ones(3, 3)}),
        "wrong dtype": lambda _, tensors: tensors.update({k: v.long() for k, v in tensors.items()}),
    }.items():
        path.write_bytes(good)
        yield name, _rewritten(path, change)


def test_damaged_and_foreign_files_are_named_and_left_alone(tmp_path):
    source, path = tmp_path / "good", tmp_path / "bad"
    save(toy(), source)
    count = 0
    for name, data in damages(source):
        path.write_bytes(data)
        with pytest.raises(ndm_ct.CheckpointError, match="bad") as caught:
            load(path)
        assert "Traceback" not in str(caught.value), name
        assert path.read_bytes() == data
        count += 1
    assert count > 100


# -------------------------------------------------------------------------------------------------------------- fit


def test_fit_reaches_the_entropy_of_a_mixture():
    """The entropy of the smoothed mixture bounds the loss from below; a short training comes within 0.1 nat."""
    model = ndm_ct.NDM(
        Preconditioned(MLP(2, width=64, depth=2), data_std=0.74),
        event_shape=(2,),
        schedule=schedules.LinearLogSNR(-6.0, 6.0),
    )
    data, held_out = mixture(4096), mixture(4096, seed=1)
    before = -ndm_ct.elbo(model, held_out, samples=8).mean().item()
    result = fit(
        model,
        data,
        steps=800,
        batch_size=256,
        lr=3e-3,
        ema=0.99,
        validation=held_out,
        validate_every=400,
        progress=False,
    )
    after = -ndm_ct.elbo(model, held_out, samples=8).mean().item()
    alpha, sigma = (
        float(model.schedule.alpha(torch.zeros(()).double())),
        float(model.schedule.sigma(torch.zeros(()).double())),
    )
    std = math.sqrt(0.09 + (sigma / alpha) ** 2)
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    noisy = held_out + sigma / alpha * torch.randn_like(held_out)
    square = ((noisy[:, None] - means) ** 2).sum(-1)
    logp = torch.logsumexp(-0.5 * square / std**2, 1) - math.log(2.0) - math.log(2.0 * math.pi * std**2)
    entropy = -logp.mean().item()
    assert entropy - 0.03 < after < entropy + 0.1 < before
    assert result.finished
    assert result.step == 800
    assert [row["step"] for row in result.history] == list(range(100, 801, 100))
    last = result.validation[-1]
    assert [row["step"] for row in result.validation] == [400, 800]
    assert abs(last["validation_elbo"] + after) < 6.0 * last["validation_stderr"]


def test_average_and_learning_rate_follow_their_formulas():
    """A loop written by hand arrives at the same weights, averaged and raw."""
    data, steps, warmup, batch = mixture(70), 12, 3, 16
    model, by_hand = toy(), toy()
    fit(
        model,
        data,
        steps=steps,
        batch_size=batch,
        lr=1e-2,
        ema=0.8,
        warmup=warmup,
        lr_final=0.1,
        seed=5,
        progress=False,
    )

    from ndm_ct.training.step import _EPOCH

    groups = [[p for p in by_hand.parameters() if p.ndim >= 2], [p for p in by_hand.parameters() if p.ndim < 2]]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}], weight_decay=0.01
    )
    average, seen = [p.detach().clone() for p in by_hand.parameters()], []
    for k in range(steps):
        epoch, index = divmod(k, 70 // batch)
        order = torch.randperm(70, generator=torch.Generator().manual_seed(derive_seeds(5, epoch, _EPOCH)[0]))
        rows = order[index * batch : (index + 1) * batch]
        seen.append(rows)
        generator = torch.Generator().manual_seed(derive_seeds(5, k)[0])
        optimizer.zero_grad()
        ndm_ct.loss(by_hand, data[rows], generator=generator).mean().backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        cosine = 0.5 * (1.0 + math.cos(math.pi * max(0.0, (k - warmup) / (steps - warmup))))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (k + 1) / warmup) * (0.1 + 0.9 * cosine)
        optimizer.step()
        decay = min(0.8, (1 + k) / (10 + k)) if k else 0.0
        average = [decay * a + (1.0 - decay) * p.detach() for a, p in zip(average, by_hand.parameters(), strict=True)]
    for trained, expected in zip(model.parameters(), average, strict=True):
        torch.testing.assert_close(trained.detach(), expected, rtol=1e-5, atol=1e-6)
    first_epoch = torch.cat(seen[:4])
    assert len(first_epoch.unique()) == 64


def test_fit_leaves_mode_and_global_generator_alone():
    model = toy()
    model.eval()
    model.predictor.net.blocks[0].train()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    quick(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_data_of_every_kind_train_the_same_weights():
    data = mixture(48)

    class Items(torch.utils.data.Dataset):
        def __len__(self):
            return len(data)

        def __getitem__(self, i):
            return data[i]

    models = [toy() for _ in range(3)]
    for model, source in zip(models, (data, data.double().numpy(), Items()), strict=True):
        quick(model, source)
    assert same(models[0], models[1])
    assert same(models[0], models[2])


def test_a_batch_larger_than_the_data_is_all_of_them():
    assert quick(toy(), mixture(5), batch_size=128).finished


@pytest.mark.parametrize("dequantisation", ["uniform", "process"])
def test_integer_data_report_bits_per_dim(dequantisation):
    """Levels drawn uniformly have log2(levels) bits; an untrained standard normal needs more, and the bound is one."""
    levels = torch.randint(0, 16, (256, 2))
    bins = Quantisation(levels=16)
    model = ndm_ct.NDM(
        Preconditioned(MLP(2, width=16, depth=1), data_std=0.58),
        event_shape=(2,),
        schedule=schedules.LinearLogSNR(-2.0 * math.log(3.02 * 16), 5.0),
    )
    result = fit(
        model, levels.to(torch.uint8), steps=200, lr=3e-3, quantisation=bins, dequantisation=dequantisation,
        validation=levels, validate_every=200, progress=False,
    )  # fmt: skip
    bits = result.validation[-1]["validation_bits_per_dim"]
    assert 3.9 < bits < 6.0
    assert bits == pytest.approx(-result.validation[-1]["validation_elbo"] / 2 / math.log(2.0))
    stderr = result.validation[-1]["validation_stderr"] / 2 / math.log(2.0)
    assert result.history[-1]["bits_per_dim"] == pytest.approx(bits, abs=0.1 + 4.0 * stderr)


def test_conditioning_rows_follow_their_data():
    class Shifted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(1.0))
            self.seen = []

        def forward(self, z, t, *, label):
            self.seen.append(label.clone())
            return self.scale * label[:, None].expand_as(z)

    data = torch.arange(32.0)[:, None].expand(32, 2).contiguous()
    net = Shifted()
    model = ndm_ct.NDM(net, event_shape=(2,), schedule=schedules.LinearLogSNR(-4.0, 4.0), checks=False)
    result = fit(
        model, data, steps=2, batch_size=16, cond={"label": torch.arange(32.0)}, lr=1e-9, ema=0.0, progress=False
    )
    assert torch.equal(torch.cat(net.seen).sort().values, torch.arange(32.0))
    # The prediction is the data itself, so the diffusion term vanishes: only prior and reconstruction are left.
    left = ndm_ct.objectives.prior_term(model, data) + ndm_ct.objectives.reconstruction_term(model, data)
    assert result.history[-1]["loss"] == pytest.approx(left.mean().item(), rel=1e-4)


def conditional(seed=0, **options):
    """A small model of three classes, and labels for 64 rows."""
    torch.manual_seed(seed)
    net = MLP(2, width=16, depth=1, classes=3, **options)
    model = ndm_ct.NDM(Preconditioned(net), event_shape=(2,), schedule=schedules.LinearLogSNR(-8.0, 6.0))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, torch.arange(64) % 3


def test_dropped_conditioning_is_the_loss_without_it_in_the_drawn_rows():
    """A loop written by hand: the rows are drawn from the generator of the step, before times and noise."""
    from ndm_ct.training.step import _EPOCH

    (model, label), (by_hand, _) = conditional(), conditional()
    data, steps, p = mixture(64), 6, 0.4
    quick(
        model, data, steps=steps, lr=1e-2, warmup=0, lr_final=1.0, ema=0.0, weight_decay=0.0, grad_clip=None,
        optimizer="adam", cond={"label": label}, cond_dropout=p, seed=5,
    )  # fmt: skip
    optimizer, dropped = torch.optim.Adam(by_hand.parameters(), lr=1e-2), 0
    for k in range(steps):
        epoch, index = divmod(k, 4)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(derive_seeds(5, epoch, _EPOCH)[0]))
        rows = order[index * 16 : (index + 1) * 16]
        generator = torch.Generator().manual_seed(derive_seeds(5, k)[0])
        y = label[rows].clone()
        drop = torch.rand(16, generator=generator) < p
        y[drop] = -1
        dropped += int(drop.sum())
        optimizer.zero_grad()
        (ndm_ct.loss(by_hand, data[rows], generator=generator, label=y).mean() / 2).backward()
        optimizer.step()
    assert 0 < dropped < 6 * 16
    for trained, expected in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(trained.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(label, torch.arange(64) % 3)


def test_conditioning_is_dropped_row_by_row_with_its_probability():
    class Recorder(torch.nn.Module):
        """Two conditionings with a null value, one without."""

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(1.0))
            self.null = {"label": -1, "text": torch.tensor([-2.0, -3.0]), "other": 0.0}
            self.seen = []

        def forward(self, z, t, *, label, text, kept):
            if self.training:
                self.seen.append((label, text, kept))
            return self.scale * z

    net, n = Recorder(), 512
    model = ndm_ct.NDM(net, event_shape=(2,), schedule=schedules.LinearLogSNR(-4.0, 4.0))
    label = torch.arange(n) % 256
    cond = {"label": label.byte(), "text": label[:, None] + torch.tensor([0.0, 0.5]), "kept": label}
    quick(
        model, mixture(n), steps=8, batch_size=256, cond=cond, cond_dropout=0.25, validation=mixture(8),
        validation_cond={name: value[:8] for name, value in cond.items()},
    )  # fmt: skip
    seen_label, text, kept = (torch.cat(parts) for parts in zip(*net.seen, strict=True))
    assert len(kept) == 8 * 256
    dropped = seen_label == -1
    assert torch.equal(seen_label[~dropped], kept[~dropped])
    assert torch.equal(text[dropped], torch.tensor([-2.0, -3.0]).expand(int(dropped.sum()), 2))
    assert torch.equal(text[~dropped], kept[~dropped, None] + torch.tensor([0.0, 0.5]))
    # five standard deviations of a binomial, and no step's rows are another's
    assert abs(float(dropped.float().mean()) - 0.25) < 5.0 * math.sqrt(0.25 * 0.75 / len(kept))
    assert len({tuple(step.tolist()) for step in dropped.split(256)}) == 8


def test_validation_drops_no_conditioning():
    model, label = conditional()
    options = {"cond": {"label": label}, "validation": mixture(64, seed=1), "validation_cond": {"label": label}}
    result = quick(model, lr=1e-12, ema=0.0, cond_dropout=0.9, **options)
    again = quick(conditional()[0], lr=1e-12, ema=0.0, **options)
    found, expected = (each.validation[-1]["validation_elbo"] for each in (result, again))
    assert found == pytest.approx(expected, rel=1e-5)
    assert result.history[-1]["loss"] != again.history[-1]["loss"]


def test_without_dropout_the_bits_are_those_without_conditioning():
    """A model told "no label" in every row, and one told nothing, draw the same numbers."""
    (model, label), (untold, _) = conditional(), conditional()
    quick(model, cond={"label": torch.full_like(label, -1)}, cond_dropout=0.0)
    quick(untold)
    assert same(model, untold)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cond_dropout": 0.1}, "cond_dropout has no effect without cond"),
        ({"cond_dropout": 0.1, "cond": {}}, "cond_dropout has no effect without cond"),
        (
            {"cond_dropout": 1.0, "cond": {"label": torch.zeros(64).long()}},
            r"cond_dropout must be a probability in \[0",
        ),
        ({"cond_dropout": -0.1, "cond": {"label": torch.zeros(64).long()}}, "cond_dropout must be a probability"),
        ({"cond_dropout": math.nan, "cond": {"label": torch.zeros(64).long()}}, "cond_dropout must be a probability"),
    ],
)
def test_dropout_of_conditioning_that_cannot_be_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        quick(conditional()[0], **options)


def test_dropout_needs_null_values():
    class Unaware(torch.nn.Module):
        def __init__(self, null=None):
            super().__init__()
            self.net = MLP(2, width=8)
            if null is not None:
                self.null = null

        def forward(self, z, t, *, label):
            return self.net(z, t) + label[:, None]

    for null, words in ((None, r"no dict null.*classes=K"), ({"text": 0.0}, r"no effect on cond=\['label'\].*'text'")):
        model = ndm_ct.NDM(Unaware(null), event_shape=(2,))
        with pytest.raises(ValueError, match=words):
            quick(model, cond={"label": torch.zeros(64)}, cond_dropout=0.1)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"data": torch.zeros(8, 2, dtype=torch.uint8)}, TypeError, "quantisation="),
        ({"data": np.zeros((8, 2), dtype=np.int64)}, TypeError, "quantisation="),
        ({"data": torch.zeros(8, 3)}, ValueError, "shape"),
        ({"data": torch.zeros(8, 2).double()}, ValueError, "dtype"),
        ({"data": torch.full((8, 2), math.nan)}, ValueError, "NaN"),
        ({"data": [1, 2]}, TypeError, "Dataset"),
        ({"data": torch.zeros(0, 2)}, ValueError, "no rows"),
        ({"data": torch.full((8, 2), 9), "quantisation": Quantisation(4)}, ValueError, "outside"),
        ({"data": torch.zeros(8, 3).long(), "quantisation": Quantisation(4)}, ValueError, "shape"),
        ({"steps": 0}, ValueError, "steps"),
        ({"optimizer": "sgd"}, ValueError, "adamw"),
        ({"lr": 0.0}, ValueError, "lr must be"),
        ({"ema": 1.0}, ValueError, "ema must be"),
        ({"warmup": 9}, ValueError, "warmup must be"),
        ({"dequantisation": "process"}, ValueError, "no effect without quantisation"),
        ({"validate_every": 5}, ValueError, "no effect without validation"),
        ({"checkpoint_every": 5}, ValueError, "no effect without run_dir"),
        ({"cond": {"label": torch.zeros(64)}}, TypeError, "label"),
        ({"time_limit": 0.0}, ValueError, "time_limit"),
        ({"validation": torch.zeros(8, 3)}, ValueError, "validation has shape"),
    ],
)
def test_wrong_arguments_are_named(options, error, words):
    with pytest.raises(error, match=words):
        quick(toy(), **options)


def test_nothing_to_train():
    with pytest.raises(ValueError, match="nothing to train"):
        quick(ndm_ct.NDM(lambda z, t: z, event_shape=(2,)))


# ----------------------------------------------------------------------------------------------------------- resuming


def strip(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
sys.path[:0] = {paths!r}
from test_training import regular
regular(sys.argv[1])
"""


def regular(run_dir, steps=60, seed=3, *, whole=True):
    """The training that is killed: dropout, averaged weights, a learned schedule, validation."""
    torch.manual_seed(0)
    model = ndm_ct.NDM(
        Preconditioned(MLP(2, width=16, depth=2, dropout=0.3)),
        event_shape=(2,),
        schedule=schedules.LearnedLogSNR(-8.0, 6.0),
    )
    result = fit(
        model, mixture(200), steps=steps, batch_size=16, lr=1e-2, seed=seed, ema=0.9, run_dir=run_dir,
        checkpoint_every=4, log_every=6, validation=mixture(32, seed=9), validate_every=10, progress=False,
    )  # fmt: skip
    # A signal to this process, such as SIGTERM from timeout(1), ends a training early, and its weights are others then.
    assert result.finished or not whole, f"a signal stopped the training after {result.step} of {steps} steps"
    return model, result


def test_a_folder_belongs_to_one_training(tmp_path):
    """The second is refused, changes nothing, and may have the folder when the first has ended, however it did."""
    refused = []

    def objective(model, x, generator, **cond):
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(BlockingIOError, match="is in use by another process; wait until"):
            regular(tmp_path)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
        refused.append(True)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        quick(toy(), objective=objective, run_dir=tmp_path)
    assert refused == [True]
    expected, _ = regular(tmp_path / "other")
    assert same(regular(tmp_path)[0], expected)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_ends_a_training_after_the_step(tmp_path, name):
    """And the same call continues it, with the weights of a training that was not stopped."""
    steps = []

    class Signalled(torch.nn.Module):
        def forward(self, model, x, generator, **cond):
            steps.append(len(steps))
            if len(steps) == 3:
                signal.raise_signal(getattr(signal, name))
            return ndm_ct.loss(model, x, generator=generator)

    model, whole = toy(), toy()
    result = quick(model, objective=Signalled(), run_dir=tmp_path)
    assert (result.step, result.finished) == (3, False)
    result = quick(model, objective=Signalled(), run_dir=tmp_path)
    assert (result.step, result.finished, len(steps)) == (4, True, 4)
    quick(whole)
    assert same(model, whole)


def test_killed_and_resumed_is_bit_identical(tmp_path):
    expected, uninterrupted = regular(tmp_path / "whole")
    script = tmp_path / "run.py"
    folder = tmp_path / "killed"
    paths = [os.path.dirname(__file__), str(TESTS), os.path.dirname(os.path.dirname(ndm_ct.__file__))]
    script.write_text(textwrap.dedent(SCRIPT.format(paths=paths)))
    generator = np.random.default_rng(os.getpid())
    log = folder / "log.jsonl"
    kills = 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, str(script), str(folder)])
        deadline = time.monotonic() + 60.0
        start = log.stat().st_size if log.exists() else 0
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.stat().st_size > start:  # the steps have begun
                time.sleep(generator.uniform(0.0, 0.05))
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                break
            time.sleep(0.002)
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"step": 59, "lo')
    for name in ("checkpoint.safetensors", "log.jsonl"):
        (folder / f".{name}.{uuid.uuid4().hex}.tmp").write_bytes(b"half")
    model, result = regular(folder)
    assert kills > 0
    assert same(model, expected)
    assert result.finished
    assert result.step == 60
    assert strip(result.history) == strip(uninterrupted.history)
    assert strip(result.validation) == strip(uninterrupted.validation)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(strip(lines), key=str) == sorted(strip([*result.history, *result.validation]), key=str)
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock",
        "checkpoint.safetensors",
        "log.jsonl",
        "model.safetensors",
    ]
    assert same(load(folder / "model.safetensors"), model)
    raw = checkpoint.read(folder / "checkpoint.safetensors", "training")[1]
    whole = checkpoint.read(tmp_path / "whole" / "checkpoint.safetensors", "training")[1]
    assert raw.keys() == whole.keys()
    assert all(torch.equal(raw[name], whole[name]) for name in raw)
    with pytest.raises(ndm_ct.CheckpointError, match=r"model\.safetensors"):
        load(folder / "checkpoint.safetensors")


def test_every_step_is_a_good_one_to_stop_at(tmp_path, monkeypatch):
    """Interrupted at any step by an error, the training continues with the same bits and the same log."""
    expected, uninterrupted = regular(tmp_path / "whole", steps=7)
    module = importlib.import_module("ndm_ct.training.fit")  # the attribute of that name is the function

    original = module.objectives.loss
    for stop in range(1, 8):
        calls = iter(range(100))

        def failing(*args, calls=calls, stop=stop, **kwargs):
            if next(calls) == stop - 1:
                raise KeyboardInterrupt if stop % 2 else MemoryError
            return original(*args, **kwargs)

        folder = tmp_path / str(stop)
        with monkeypatch.context() as patch:
            patch.setattr(module.objectives, "loss", failing)
            if stop % 2:
                assert regular(folder, steps=7, whole=False)[1].step == stop - 1
            else:
                with pytest.raises(MemoryError):
                    regular(folder, steps=7)
        model, result = regular(folder, steps=7)
        assert same(model, expected)
        assert strip(result.history) == strip(uninterrupted.history)
        assert strip(result.validation) == strip(uninterrupted.validation)


def test_dropped_conditioning_resumes_with_the_same_bits(tmp_path):
    (whole, label), (rest, _) = conditional(dropout=0.2), conditional(dropout=0.2)
    options = {"steps": 30, "cond": {"label": label}, "cond_dropout": 0.3}
    quick(whole, **options)
    for _ in range(3):
        result = quick(rest, run_dir=tmp_path, time_limit=1e-3, **options)
    assert 0 < result.step < 30
    for other in (0.0, 0.2):
        with pytest.raises(ValueError, match=f"cond_dropout was 0.3, now {other}"):
            quick(conditional(dropout=0.2)[0], run_dir=tmp_path, **options | {"cond_dropout": other})
    quick(rest, run_dir=tmp_path, **options)
    assert same(whole, rest)
    loaded = load(tmp_path / "model.safetensors")
    assert loaded.predictor.null == {"label": -1}
    assert same(whole, loaded)
    without = conditional(dropout=0.2)[0]
    quick(without, **options | {"cond_dropout": 0.0})
    assert not same(whole, without)


def test_checkpoints_from_before_conditioning_could_be_dropped(tmp_path):
    quick(toy(), run_dir=tmp_path, steps=8, time_limit=1e-9)
    path = tmp_path / "checkpoint.safetensors"
    description, tensors = checkpoint.read(path, "training")
    del description["settings"]["cond_dropout"]
    assert "classes" not in description["settings"]["model"]["predictor"]["net"]
    checkpoint.write(path, tensors, description)
    assert quick(toy(), run_dir=tmp_path, steps=8).finished


def test_a_finished_training_is_not_repeated(tmp_path):
    first, _ = regular(tmp_path, steps=8)
    before = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()  # as if killed between the last two files
    again, result = regular(tmp_path, steps=8)
    assert same(first, again)
    assert result.finished
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.fixture
def interruptible():
    """Python's own handler, also in a process that was started to ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_finishes_the_step_and_returns(tmp_path, interruptible):
    pressed = []

    def press(*_):
        if not pressed:
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)

    model = ndm_ct.NDM(MLP(2, width=8), event_shape=(2,), checks=False)  # the first call is the first step
    hook = model.predictor.register_forward_hook(press)
    result = quick(model, steps=9, run_dir=tmp_path / "pressed")
    hook.remove()
    assert (result.step, result.finished) == (1, False)
    assert signal.getsignal(signal.SIGINT) is interruptible
    assert not (tmp_path / "pressed" / "model.safetensors").exists()
    assert quick(model, steps=9, run_dir=tmp_path / "pressed").finished


def test_time_limit_stops_with_a_checkpoint(tmp_path):
    whole, rest = toy(), toy()
    quick(whole, steps=50)
    result = quick(rest, steps=50, run_dir=tmp_path, time_limit=1e-3)
    assert not result.finished
    assert result.step < 50
    assert quick(rest, steps=50, run_dir=tmp_path).finished
    assert same(whole, rest)


def test_other_settings_do_not_continue(tmp_path):
    quick(toy(), run_dir=tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    for options, words in (
        ({"lr": 1e-2}, "lr was 0.001, now 0.01"),
        ({"steps": 5, "seed": 1}, "steps was 4, now 5.*seed was 0, now 1"),
        ({"data": mixture(64, seed=2)}, "data"),
        ({"resume": False}, "resume=False"),
    ):
        with pytest.raises(ValueError, match=words):
            quick(toy(), run_dir=tmp_path, **options)
    for model in (toy(schedule=schedules.LinearLogSNR(-7.0, 6.0)), toy().double()):
        with pytest.raises(ValueError, match=r"model|tensors"):
            quick(model, mixture(64).to(model.dtype), run_dir=tmp_path)
    (tmp_path / "checkpoint.safetensors").write_bytes(before[:-1])
    with pytest.raises(ndm_ct.CheckpointError, match=r"checkpoint\.safetensors"):
        quick(toy(), run_dir=tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before[:-1]


@pytest.mark.parametrize("where", ["prediction", "loss", "gradient"])
def test_what_is_not_finite_stops_the_training(tmp_path, where, monkeypatch):
    class Bomb(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = MLP(2, width=8), 0

        def forward(self, z, t):
            self.calls += 1
            out = self.net(z, t)
            if self.calls > 6 and where == "gradient":
                out.register_hook(lambda gradient: gradient * math.inf)
            return out * (math.nan if self.calls > 6 and where == "prediction" else 1.0)

    model = ndm_ct.NDM(Bomb(), event_shape=(2,), checks=False)  # calls are counted
    original = ndm_ct.objectives.loss

    def loss(*args, **kwargs):
        return original(*args, **kwargs) * (math.inf if where == "loss" and model.predictor.calls > 6 else 1.0)

    monkeypatch.setattr(ndm_ct.objectives, "loss", loss)
    with pytest.raises(RuntimeError, match=r"at step 6.*intact"):
        quick(model, steps=20, run_dir=tmp_path, checkpoint_every=4)
    description, _ = checkpoint.read(tmp_path / "checkpoint.safetensors", "training")
    assert description["step"] == 4
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_user_network_with_buffers_trains_and_resumes(tmp_path):
    whole, rest = (ndm_ct.NDM(OwnNet(), event_shape=(2,)) for _ in range(2))
    rest.load_state_dict(whole.state_dict())
    quick(whole, steps=6)
    quick(rest, steps=6, run_dir=tmp_path, time_limit=1e-4)
    quick(rest, steps=6, run_dir=tmp_path)
    assert same(whole, rest)
    assert same(load(tmp_path / "model.safetensors", predictor=OwnNet()), whole)


@pytest.mark.filterwarnings("ignore")  # torch's own, of the compiler
def test_networks_compiled_in_place_train_to_the_same_weights(tmp_path):
    """Bound and regressions take two backward passes through one compiled graph; files and averages know nothing."""

    def trained(prepare, run_dir):
        torch.manual_seed(0)
        transform = transforms.Separable(MLP(2, width=8, depth=1, outputs=2, time=False))
        predictor = Preconditioned(MLP(2, width=16, depth=1, outputs=2), prediction="moments")
        model = ndm_ct.NDM(
            predictor, (2,), transform=transform, schedule=schedules.LinearLogSNR(-8.0, 6.0), prediction="moments"
        )
        prepare(model.predictor)
        prepare(model.transform.features)
        fit(model, mixture(64), steps=6, batch_size=16, validation=mixture(32, 1), run_dir=run_dir, progress=False)
        return model

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = trained(lambda module: module.compile(backend="aot_eager"), tmp_path / "compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    plain = trained(lambda module: module, tmp_path / "plain")
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    assert same(load(tmp_path / "compiled" / "model.safetensors"), compiled)


def overfitted(run_dir=None, patience=2, **others):
    """Twelve rows, learned by heart: the validation bound has a maximum on the way."""
    torch.manual_seed(0)
    model = ndm_ct.NDM(Preconditioned(MLP(2, width=32)), event_shape=(2,), schedule=schedules.LinearLogSNR(-8.0, 6.0))
    result = fit(
        model, mixture(12), batch_size=12, lr=1e-2, ema=0.9, validation=mixture(64, seed=9), validate_every=10,
        patience=patience, run_dir=run_dir, progress=False, **{"steps": 400} | others,
    )  # fmt: skip
    return model, result


def test_patience_keeps_the_weights_of_the_best_validation(tmp_path):
    model, result = overfitted(tmp_path / "run")
    bounds = [row["validation_elbo"] for row in result.validation]
    best = int(np.argmax(bounds))
    assert result.finished
    assert result.step == 10 * len(bounds) < 400
    assert len(bounds) == best + 1 + 2  # two without a better one
    last, _ = overfitted(patience=None, time_limit=None)
    x = mixture(64, seed=9)
    with torch.no_grad():
        found = torch.cat([
            ndm_ct.elbo(model, rows, generator=torch.Generator().manual_seed(derive_seeds(0, place, 2)[0]))
            for place, rows in enumerate(x.split(12))
        ])  # fmt: skip
    assert found.mean().item() == pytest.approx(bounds[best], rel=1e-6)
    assert not same(last, model)
    assert same(load(tmp_path / "run" / "model.safetensors"), model)
    again, repeated = overfitted(tmp_path / "run")
    assert same(again, model)
    assert repeated.step == result.step


def test_patience_resumes_with_the_same_bits(tmp_path, monkeypatch):
    expected, uninterrupted = overfitted()
    module = importlib.import_module("ndm_ct.training.fit")  # the attribute of that name is the function

    original, calls = module.objectives.loss, []

    def failing(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 10 * (len(uninterrupted.validation) - 1) + 5:  # after the best, before the end
            raise KeyboardInterrupt
        return original(*arguments, **keywords)

    monkeypatch.setattr(module.objectives, "loss", failing)
    _, stopped = overfitted(tmp_path)
    assert not stopped.finished
    monkeypatch.setattr(module.objectives, "loss", original)
    model, result = overfitted(tmp_path)
    assert same(model, expected)
    assert result.step == uninterrupted.step


@pytest.mark.parametrize(("others", "message"), [
    ({"patience": 0}, "patience"), ({"patience": 3, "validation": None}, "patience has no effect without validation"),
])  # fmt: skip
def test_patience_is_validated(others, message):
    torch.manual_seed(0)
    with pytest.raises((ValueError, TypeError), match=message):
        fit(ndm_ct.NDM(Preconditioned(MLP(2, width=8)), (2,)), mixture(12), steps=3,
            **({"validation": mixture(8)} | others))  # fmt: skip


def test_a_finished_training_goes_on_with_more_steps(tmp_path):
    """With a constant learning rate the bits are those of one training; patience begins anew."""
    constant = {"lr_final": 1.0, "warmup": 0, "log_every": 2, "validation": mixture(32, seed=9), "validate_every": 2}
    whole, rest, again = toy(), toy(), toy()
    expected = quick(whole, steps=10, **constant)
    assert quick(toy(), steps=4, run_dir=tmp_path, **constant).finished
    result = quick(rest, steps=10, run_dir=tmp_path, **constant)
    assert result.finished
    assert same(rest, whole)
    assert strip(result.history) == strip(expected.history)
    assert strip(result.validation) == strip(expected.validation)
    assert same(load(tmp_path / "model.safetensors"), whole)
    assert quick(again, steps=10, run_dir=tmp_path, **constant).step == 10
    assert same(again, whole)
    with pytest.raises(ValueError, match="steps was 10, now 8"):
        quick(toy(), steps=8, run_dir=tmp_path, **constant)
    with pytest.raises(ValueError, match=r"steps was 10, now 12; .*lr_final was 1\.0, now 0\.5"):
        quick(toy(), steps=12, run_dir=tmp_path, **constant | {"lr_final": 0.5})


def test_more_steps_follow_the_learning_rate_of_the_longer_training(tmp_path):
    quick(toy(), steps=20, run_dir=tmp_path)
    rows = quick(toy(), steps=60, run_dir=tmp_path, log_every=1).history
    longer = quick(toy(), steps=60, log_every=1).history
    assert [row["lr"] for row in rows[1:]] == [row["lr"] for row in longer[20:]]


def test_more_steps_after_patience_has_ended(tmp_path):
    _, first = overfitted(tmp_path)
    _, more = overfitted(tmp_path, steps=401)
    assert first.step < more.step


def test_several_averages_and_the_raw_weights(tmp_path):
    """Each decay gives what a training with this one alone gives; the first one is the model's."""
    raw = toy()
    quick(raw, steps=9, ema=0.0)
    alone = {}
    for decay in (0.5, 0.9):
        model = alone[decay] = toy()
        result = quick(model, steps=9, ema=decay)
        assert all(torch.equal(result.raw[name], tensor) for name, tensor in raw.state_dict().items())
    rest = toy()
    assert quick(toy(), steps=9, ema=(0.9, 0.5), run_dir=tmp_path, callbacks=[StopAt(4)]).step == 4
    result = quick(rest, steps=9, ema=(0.9, 0.5), run_dir=tmp_path)
    assert same(rest, alone[0.9])
    assert list(result.averages) == [0.9, 0.5]
    for decay, weights in result.averages.items():
        assert all(torch.equal(weights[name], tensor) for name, tensor in alone[decay].state_dict().items())
    rest.load_state_dict(result.raw)
    assert same(rest, raw)
    for wrong in ((), (0.5, 0.5), (0.5, 0.0), (0.5, 1.0), 1.0, -0.1):
        with pytest.raises(ValueError, match="ema must be in"):
            quick(toy(), ema=wrong)


def test_validation_leaves_the_training_alone():
    a, b = toy(), toy()
    quick(a, steps=9)
    quick(b, steps=9, validation=mixture(16), validate_every=1)
    assert same(a, b)
