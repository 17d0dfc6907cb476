"""Files from strangers: whatever was done to them, they are refused by name, nothing runs, nothing changes.

Damage is drawn at random (bits flipped, bytes overwritten, cut off, doubled); malice is a list: descriptions with the
right checksum that ask for too much, for other classes, or for a training that cannot be.
"""

import json
import os
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from oracles import setting
from paths import TESTS

import ndm_ct
from ndm_ct import NDM, CheckpointError, nn, schedules, transforms
from ndm_ct.storage import Journal
from ndm_ct.storage import tensors as checkpoint

BILLION = 2_000_000_000
COARSE = {"rtol": 1e-2, "atol": 1e-2, "progress": False}
QUICK, ALL = 30, 500


# ---------------------------------------------------------------------------------------------------------- the files


def vectors():
    """A model whose file describes every kind of part."""
    return NDM(
        nn.Preconditioned(nn.MLP(2, width=4, depth=1)),
        (2,),
        transform=transforms.Separable(nn.MLP(2, width=4, depth=1, outputs=2, time=False)),
        schedule=schedules.LearnedLogSNR(-8.0, 5.0, features=4),
    )


def images():
    return NDM(nn.UNet(1, width=4), (1, 8, 8), transform=transforms.Blur((1, 8, 8)))


def plain(seed=0):
    torch.manual_seed(seed)
    return NDM(nn.Preconditioned(nn.MLP(2, width=4, depth=1)), (2,), schedule=schedules.LinearLogSNR(-5.0, 5.0))


def rows(n=24):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(3))


def train(folder, model, steps=6):
    return ndm_ct.fit(
        model, rows(), steps=steps, batch_size=8, run_dir=folder, checkpoint_every=2, log_every=2, progress=False,
        validation=rows(8), validate_every=2, patience=5,
    )  # fmt: skip


def score(folder):
    return ndm_ct.evaluate(plain(), rows(), batch_size=6, run_dir=folder, **COARSE)


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's file, a training stopped after four of its six steps, an evaluation of three batches of four."""
    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    ndm_ct.save(vectors(), folder / "model.safetensors")

    def stop(steps):
        def objective(model, x, **options):
            objective.calls += 1
            if objective.calls > steps:
                raise Stopped
            return ndm_ct.loss(model, x, **options)

        objective.calls = 0
        return objective

    original = ndm_ct.objectives.loss
    ndm_ct.objectives.loss = stop(4)
    try:
        with pytest.raises(Stopped):
            train(folder / "training", plain())
    finally:
        ndm_ct.objectives.loss = original
    score(folder / "evaluation")
    return folder


# ------------------------------------------------------------------------------------------------------------- damage


def damaged(good, count, seed=0):
    """``count`` ways to damage a file, drawn evenly over what is first and what follows."""
    generator = np.random.default_rng(seed)
    header = min(len(good), 8 + int.from_bytes(good[:8], "little"))

    def position():
        return int(generator.integers([8, header, len(good)][generator.integers(3)]))

    def flipped(bits):
        data = bytearray(good)
        for _ in range(bits):
            data[position()] ^= 1 << int(generator.integers(8))
        return bytes(data)

    def overwritten():
        start, length = position(), int(generator.integers(1, 64))
        return good[:start] + generator.bytes(length) + good[start + length :]

    def spliced():
        start, end = sorted((position(), position()))
        return good[:end] + good[start:]

    def lying():
        """A header that is longer than the file, or than any memory."""
        lengths = [header + 1, len(good), len(good) + 1, 10**8, 10**12, 2**63, 2**64 - 1]
        claimed = lengths[generator.integers(len(lengths))]
        return claimed.to_bytes(8, "little") + good[8:]

    ways = (lambda: flipped(1), lambda: flipped(3), lambda: good[: position()], overwritten, spliced, lying)
    for index in range(count):
        data = ways[index % len(ways)]()
        if data != good:
            yield data


AMOUNTS = pytest.mark.parametrize("count", [QUICK, pytest.param(ALL, marks=pytest.mark.slow)])


@AMOUNTS
def test_damaged_models(folder, tmp_path, count):
    good, path = (folder / "model.safetensors").read_bytes(), tmp_path / "model.safetensors"
    for data in damaged(good, count):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            ndm_ct.load(path)
        assert path.read_bytes() == data


def copied(folder, tmp_path, name):
    """The good folder's files, to be damaged one at a time: names and contents."""
    target = tmp_path / name
    target.mkdir()
    for file in (folder / name).iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def refuses_to_train(folder, words=r"checkpoint\.safetensors", error=CheckpointError):
    """The training is refused, and neither a file nor the model has changed."""
    before, model = contents(folder), plain(seed=5)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=words):
        train(folder, model)
    assert contents(folder) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@AMOUNTS
def test_damaged_trainings(folder, tmp_path, count):
    target = copied(folder, tmp_path, "training")
    good = (target / "checkpoint.safetensors").read_bytes()
    for data in damaged(good, count, seed=1):
        (target / "checkpoint.safetensors").write_bytes(data)
        refuses_to_train(target)
    (target / "checkpoint.safetensors").write_bytes(good)
    whole, resumed = plain(), plain(seed=5)
    train(tmp_path / "whole", whole)
    assert train(target, resumed).finished
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@AMOUNTS
def test_damaged_evaluations(folder, tmp_path, count):
    """Refused as it is, or continued to the very same values: a line that was cut off is scored again."""
    target, whole = copied(folder, tmp_path, "evaluation"), score(folder / "evaluation")
    journal = target / "rows.jsonl"
    good, refused = journal.read_bytes(), 0
    for data in damaged(good, count, seed=2):
        journal.write_bytes(data)
        try:
            result = score(target)
        except CheckpointError:
            assert journal.read_bytes() == data
            refused += 1
        else:
            assert torch.equal(result.values, whole.values)
            assert torch.equal(result.indices, whole.indices)
            kept = [json.loads(line)["nll"] for line in data[: data.rfind(b"\n")].split(b"\n")[1:]]
            assert kept == [json.loads(line)["nll"] for line in journal.read_bytes().splitlines()[1:]][: len(kept)]
    assert refused > count / 2


def test_the_result_file_is_never_read(folder, tmp_path):
    target = copied(folder, tmp_path, "evaluation")
    good = (target / "evaluation.json").read_bytes()
    for data in (b"", b"{", pickle.dumps(1), good.replace(b'"nll": ', b'"nll": 9')):
        (target / "evaluation.json").write_bytes(data)
        score(target)
        assert (target / "evaluation.json").read_bytes() == good


# -------------------------------------------------------------------------------------------------------------- malice


class Bomb:
    """Unpickled, it would leave a mark."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def disguises(path, mark):
    """Pickles under the name of a checkpoint: plain, of every protocol, and torch's."""
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(Bomb(mark), protocol))
        yield
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save({"weights": torch.ones(2), "bomb": Bomb(mark)}, path, **options)
        yield
    # A whole header before it, whose only tensor is the pickle.
    data = pickle.dumps(Bomb(mark))
    header = json.dumps({"a": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    yield


def test_pickles_in_disguise_are_not_opened(folder, tmp_path):
    mark = tmp_path / "executed"
    path = tmp_path / "model.safetensors"
    for _ in disguises(path, mark):
        before = path.read_bytes()
        with pytest.raises(CheckpointError):
            ndm_ct.load(path)
        assert path.read_bytes() == before
    target = copied(folder, tmp_path, "training")
    for _ in disguises(target / "checkpoint.safetensors", mark):
        refuses_to_train(target)
    target = copied(folder, tmp_path, "evaluation")
    for _ in disguises(target / "rows.jsonl", mark):
        before = contents(target)
        with pytest.raises(CheckpointError):
            score(target)
        assert contents(target) == before
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()  # a bomb it was


def dropping(*names):
    return lambda description, tensors: [tensors.pop(name) for name in names]


def nested(depth):
    transform = {"type": "Identity"}
    for _ in range(depth):
        transform = {"type": "Composed", "outer": {"type": "Identity"}, "inner": transform}
    return transform


NET = ("model", "predictor", "net")
HOSTILE_NAMES = [
    *("os.system", "builtins.eval", "eval", "exec", "__import__", "open", "Popen", "subprocess.Popen", "torch.load"),
    *("NDM", "Module", "Configurable", "object", "type", "", "../MLP", "mlp", "MLP ", "\x00", "MLP\n"),
    *(None, 3, 1.5, True, [], ["MLP"], {"type": "MLP"}),
]
HUGE = {
    "depth": (vectors, setting(*NET, "depth", to=BILLION)),
    "width": (vectors, setting(*NET, "width", to=BILLION)),
    "classes": (vectors, setting(*NET, "classes", to=BILLION)),
    "event": (vectors, setting(*NET, "event_shape", to=[BILLION, BILLION])),
    "event of many axes": (vectors, setting(*NET, "event_shape", to=[1] * 100_000)),
    "sigmoids": (vectors, setting("model", "schedule", "features", to=BILLION)),
    "outputs": (vectors, setting("model", "transform", "features", "outputs", to=BILLION)),
    "levels": (images, setting("model", "predictor", "levels", to=BILLION)),
    "channels": (images, setting("model", "predictor", "channels", to=BILLION)),
    "blur": (images, setting("model", "transform", "event_shape", to=[1, 100_000, 100_000])),
    "scaling": (
        vectors,
        setting("model", "transform", to={"type": "LearnedScaling", "event_shape": [2], "terms": BILLION}),
    ),
    "volatility": (vectors, setting("model", "volatility", to={"type": "LearnedVolatility", "terms": BILLION})),
    "encoder": (
        vectors,
        setting(
            "model", "predictor",
            to={"type": "GaussianEncoder", "data_shape": [2], "latent_shape": [2], "depth": BILLION},
        ),
    ),
    "projections": (
        vectors,
        setting(
            "model", "transform",
            to={"type": "Subspaces", "event_shape": [60_000, 60_000], "sizes": [2], "times": [0.5]},
        ),
    ),
    "nested": (vectors, setting("model", "transform", to=nested(450))),
    "nested deeper": (vectors, setting("model", "transform", to=nested(900))),
    "many objects": (vectors, setting("model", "transform", to=[{"type": "Identity"}] * 200_000)),
    "residuals": (vectors, lambda _, tensors: tensors.update(residuals=torch.ones(5))),
}  # fmt: skip


def malice():
    """Descriptions with a right checksum: model and change, by name."""
    cases = {}
    for part in ("predictor", "transform", "schedule", "volatility"):
        values = [{"type": name, "cmd": "true"} for name in HOSTILE_NAMES]
        for value in (*values, [], {}, "os.system", "x" * 1000, {"type": "MLP", "__class__": "x"}, [[[]]]):
            cases[f"{part} {value!r}"] = vectors, setting("model", part, to=value)
    for name, values in {
        "t_min": (-1.0, 1.0, "0", []),
        "event_shape": (None, 2, [0], [-2], ["a"]),
        "prediction": (None, "y", "eps", ["x"]),
    }.items():
        cases |= {f"{name} {value!r}": (vectors, setting("model", name, to=value)) for value in values}
    for name in ("gamma_min", "gamma_max"):
        for value in (None, "1", [1.0], {"type": "Identity"}):
            cases[f"{name} {value!r}"] = vectors, setting("model", "schedule", name, to=value)
    for name in ("model", "format", "kind"):
        cases |= {f"{name} {value!r}": (vectors, setting(name, to=value)) for value in (None, [], "other", 3)}
    tensors = {
        "integers": lambda tensor: tensor.int(),
        "complex": lambda tensor: tensor.cfloat(),
        "flat": lambda tensor: tensor.flatten(),
        "an axis more": lambda tensor: tensor[None],
        "no rows": lambda tensor: tensor[:0] if tensor.ndim else tensor,
    }
    for name, way in tensors.items():
        cases[name] = vectors, lambda _, old, way=way: old.update({key: way(tensor) for key, tensor in old.items()})
    cases["no tensors"] = vectors, lambda _, tensors: tensors.clear()
    cases["no format"] = vectors, lambda description, _: description.pop("format")
    return cases


MALICE = malice()


def write(path, model, change, kind="model"):
    """A file of a changed description and changed tensors, with its checksum right."""
    ndm_ct.save(model, path)
    rewrite(path, change, kind)


def rewrite(path, change, kind):
    description, tensors = checkpoint.read(path, kind)
    change(description, tensors)
    copies = {name: tensor.contiguous() for name, tensor in tensors.items()}
    text = json.dumps(description)
    path.write_bytes(checkpoint.safetensors.torch.save(copies, {checkpoint.KEY: checkpoint._signed(text, copies)}))


@pytest.mark.parametrize(("model", "change"), MALICE.values(), ids=map(ascii, MALICE))
def test_malicious_descriptions(tmp_path, model, change):
    path = tmp_path / "model.safetensors"
    write(path, model(), change)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        ndm_ct.load(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 400])
def test_numbers_that_are_none(tmp_path, value):
    """Not even where no constructor would mind: as a blur, or the share of units dropped."""
    path = tmp_path / "model.safetensors"
    for keys in (("model", "transform", "blur"), ("model", "predictor", "dropout"), ("model", "t_min")):
        ndm_ct.save(images(), path)
        description, tensors = checkpoint.read(path, "model")
        setting(*keys, to="here")(description, tensors)
        text = json.dumps(description).replace('"here"', value)
        path.write_bytes(checkpoint.safetensors.torch.save(tensors, {"ndm_ct": checkpoint._signed(text, tensors)}))
        with pytest.raises(CheckpointError, match="not finite"):
            ndm_ct.load(path)


LIMITED = """
import resource, sys, time
sys.path[:0] = {paths!r}
import torch
import ndm_ct
from test_hostile_files import peak
torch.set_num_threads(1)
ndm_ct.load(sys.argv[1])  # what is loaded once: modules, caches
before = peak()
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**29, size + 2**29))
for path in sys.argv[2:]:
    began = time.monotonic()
    try:
        ndm_ct.load(path)
    except ndm_ct.CheckpointError as error:
        print("refused", time.monotonic() - began, str(error)[:300].replace("\\n", " "))
    else:
        print("loaded", path)
print("grown", peak() - before)
"""


def peak():
    """The most memory this process has had, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_a_process(tmp_path, text, *arguments, timeout=300):
    """The lines that a script prints."""
    script = tmp_path / "script.py"
    paths = [os.path.dirname(__file__), str(TESTS), os.path.dirname(os.path.dirname(ndm_ct.__file__))]
    script.write_text(textwrap.dedent(text.format(paths=paths)))
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_small_files_take_little_memory_whatever_they_ask_for(tmp_path):
    """Hundreds of megabytes or gigabytes are asked for; none takes more than a few dozen, or more than seconds."""
    good = tmp_path / "good.safetensors"
    ndm_ct.save(vectors(), good)
    paths = []
    for name, (model, change) in HUGE.items():
        paths.append(tmp_path / f"{name.replace(' ', '_')}.safetensors")
        write(paths[-1], model(), change)
    *lines, grown = in_a_process(tmp_path, LIMITED, good, *paths)
    assert len(lines) == len(paths)
    for path, line in zip(paths, lines, strict=True):
        assert line.startswith("refused"), line
        assert path.name in line
        assert float(line.split()[1]) < 10.0, line
    assert int(grown.split()[1]) < 150e6


def test_honest_models_of_many_parts_are_loaded(tmp_path):
    """What bounds the huge ones does not refuse the deep, the wide, and bases that no file holds."""
    for model in (
        NDM(nn.MLP(2, width=4, depth=400), (2,)),
        NDM(nn.MLP(2, width=1000, depth=2), (2,)),
        NDM(nn.UNet(1, width=4), (1, 512, 512), transform=transforms.Blur((1, 512, 512))),
    ):
        ndm_ct.save(model, tmp_path / "m")
        loaded = ndm_ct.load(tmp_path / "m").state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


TRAINING_MALICE = {
    "step before the first": setting("step", to=-1),
    "step behind the last": setting("step", to=7),
    "step far behind": setting("step", to=10**12),
    "half a step": setting("step", to=2.5),
    "a word for a step": setting("step", to="2"),
    "true": setting("step", to=True),
    "no step": lambda description, _: description.pop("step"),
    "pending of nothing": setting("pending", to=[]),
    "pending counts down": setting("pending", to=[0.0, 0.0, -1]),
    "pending words": setting("pending", to=["a", "b", 1]),
    "pending a number": setting("pending", to=3),
    "seconds a list": setting("seconds", to=[]),
    "waited less than nothing": setting("waited", to=-5),
    "best a word": setting("best", to="very good"),
    "settings a list": setting("settings", to=[]),
    "settings missing": lambda description, _: description.pop("settings"),
    "weights missing": dropping("model.predictor.net.input.weight"),
    "average missing": dropping("average.predictor.net.input.weight"),
    "half of the best": dropping("best.predictor.net.input.weight"),
    "half of the optimiser": dropping("optimizer.0.exp_avg_sq"),
    "optimiser of nothing": lambda _, tensors: tensors.update({"optimizer.99.step": torch.ones(())}),
    "optimiser without a number": lambda _, tensors: tensors.update({"optimizer.step": torch.ones(())}),
    "optimiser with more": lambda _, tensors: tensors.update({"optimizer.0.max": torch.ones(())}),
    "a stranger": lambda _, tensors: tensors.update(stranger=torch.ones(1)),
    "residuals": lambda _, tensors: tensors.update({"model.residuals": torch.ones(7, 2)}),
    "other shape": lambda _, tensors: tensors.update({"optimizer.0.exp_avg": torch.ones(3)}),
    "one axis more": lambda _, tensors: tensors.update({k: v[None] for k, v in tensors.items()}),
    "halves": lambda _, tensors: tensors.update({k: v.half() for k, v in tensors.items()}),
    "doubles": lambda _, tensors: tensors.update({k: v.double() for k, v in tensors.items()}),
    "a model": setting("kind", to="model"),
}


@pytest.mark.parametrize("change", TRAINING_MALICE.values(), ids=TRAINING_MALICE)
def test_malicious_trainings(folder, tmp_path, change):
    target = copied(folder, tmp_path, "training")
    rewrite(target / "checkpoint.safetensors", change, "training")
    refuses_to_train(target)


def test_settings_of_another_training_are_named(folder, tmp_path):
    target = copied(folder, tmp_path, "training")
    rewrite(target / "checkpoint.safetensors", setting("settings", "lr", to="high"), "training")
    refuses_to_train(target, "lr was 'high', now 0.001", ValueError)


@pytest.mark.parametrize("line", [b"{", b"[]", b"3", b'{"loss": 1.0}', b'{"step": "1"}', b"\xff\xfe", b"[" * 100_000])
def test_damaged_logs_lose_nothing(folder, tmp_path, line):
    """In the middle it is damage, and told; at the end, without its end, it is what a kill leaves."""
    target = copied(folder, tmp_path, "training")
    log = target / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    assert len(lines) >= 2
    log.write_bytes(lines[0] + line + b"\n" + b"".join(lines[1:]))
    refuses_to_train(target, r"log\.jsonl: line 2 cannot be read")
    log.write_bytes(b"".join(lines) + line)
    train(target, plain())
    assert log.read_bytes().startswith(b"".join(lines))


def journal(change):
    """A change of the second record of an evaluation, whose digest is made right again."""

    def changed(text):
        lines = text.splitlines(keepends=True)
        record = json.loads(lines[2])
        del record["sha256"]
        change(record)
        lines[2] = Journal(None, signed=True).encoded(record)
        return b"".join(lines)

    return changed


EVALUATION_MALICE = {
    "a value of one digit less": lambda text: text.replace(b'"nll": [[', b'"nll": [[1', 1),
    "a value missing": journal(lambda record: record["nll"][0].pop()),
    "a variance missing": journal(lambda record: record["variance"][0].pop()),
    "two models": journal(lambda record: record["nll"].append(record["nll"][0])),
    "no rows": journal(lambda record: record.update(rows=[], nll=[[]], variance=[[]])),
    "rows of words": journal(lambda record: record.update(rows=["a"])),
    "rows of rows": journal(lambda record: record.update(rows=[record["rows"]])),
    "half rows": journal(lambda record: record.update(rows=[0.5 + row for row in record["rows"]])),
    "far rows": journal(lambda record: record.update(rows=[10**30 for _ in record["rows"]])),
    "ragged": journal(lambda record: record.update(nll=[[1.0], [2.0, 3.0]])),
    "counts missing": journal(lambda record: record.update(nfe=[])),
    "counts of words": journal(lambda record: record.update(nfe=["a"])),
    "time runs backwards": journal(lambda record: record.update(seconds=-1.0)),
    "time is a word": journal(lambda record: record.update(seconds="a")),
    "another entry": journal(lambda record: record.update(more=1)),
    "start": journal(lambda record: record.update(start=0)),
    "deep": lambda text: text + b"[" * 100_000 + b"\n",
    "infinite": lambda text: text.replace(b'"seconds": ', b'"seconds": 1e999, "s": ', 1),
    "not a number": lambda text: text.replace(b'"nll": [[', b'"nll": [[NaN, ', 1),
    "a list": lambda text: b"[]\n" + text,
    "settings a number": lambda text: text.replace(b'"settings": {', b'"settings": 3, "others": {', 1),
}


@pytest.mark.parametrize("change", EVALUATION_MALICE.values(), ids=EVALUATION_MALICE)
def test_malicious_evaluations(folder, tmp_path, change):
    target = copied(folder, tmp_path, "evaluation")
    file = target / "rows.jsonl"
    file.write_bytes(change(file.read_bytes()))
    before = contents(target)
    with pytest.raises(CheckpointError, match=r"rows\.jsonl"):
        score(target)
    assert contents(target) == before


def test_evaluations_without_checksums_are_continued(folder, tmp_path):
    """Those of earlier versions."""
    target, whole = copied(folder, tmp_path, "evaluation"), score(folder / "evaluation")
    file = target / "rows.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(line.pop("sha256") for line in lines)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
    result = score(target)
    assert torch.equal(result.values, whole.values)
    assert file.read_text().startswith(json.dumps(lines[0]))
