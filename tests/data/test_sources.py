"""Data larger than memory: a mapped array is checked, hashed, scored and trained on without being held."""

import math
import sys

import numpy as np
import pytest
import torch
from test_hostile_files import in_a_process

import ndm_ct
from ndm_ct import NDM, nn, schedules
from ndm_ct.data import sources as rows
from ndm_ct.quantisation import Quantisation

COARSE = {"rtol": 1e-2, "atol": 1e-2, "progress": False}


def model(d=3):
    torch.manual_seed(0)
    return NDM(nn.Preconditioned(nn.MLP(d, width=4, depth=1)), (d,), schedule=schedules.LinearLogSNR(-5.0, 5.0))


@pytest.fixture(autouse=True)
def _few_at_once(monkeypatch):
    monkeypatch.setattr(rows, "_AT_ONCE", 100)


def mapped(path, values, mode="r"):
    np.save(path, values)
    return np.load(path, mmap_mode=mode)


def values(n=60, seed=1):
    return np.random.default_rng(seed).normal(size=(n, 3)).astype(np.float32)


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ">f4", np.float16])
def test_a_mapped_array_is_the_array(tmp_path, mode, dtype):
    """The same values, the same fingerprint: an evaluation of one is continued with the other."""
    whole = values().astype(dtype)
    data = mapped(tmp_path / "x.npy", whole, mode)
    native = whole.astype(np.dtype(dtype).newbyteorder("="))
    expected = ndm_ct.evaluate(model(), native, batch_size=20, run_dir=tmp_path / "run", max_rows=20, **COARSE)
    rest = ndm_ct.evaluate(model(), data, batch_size=20, run_dir=tmp_path / "run", **COARSE)
    assert torch.equal(rest.values[:20], expected.values)
    assert torch.equal(rest.values, ndm_ct.evaluate(model(), native, batch_size=20, **COARSE).values)
    a, b = model(), model()
    for each, x in ((a, native), (b, data)):
        ndm_ct.fit(each, x, steps=5, batch_size=8, progress=False)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_slices_orders_and_integers(tmp_path):
    whole = values(90)
    data = mapped(tmp_path / "x.npy", whole)
    for part in (slice(10, 70), slice(None, None, 2), slice(None, None, -1)):
        found = ndm_ct.evaluate(model(), data[part], max_rows=20, **COARSE)
        assert torch.equal(found.values, ndm_ct.evaluate(model(), whole[part].copy(), max_rows=20, **COARSE).values)
    np.save(tmp_path / "f.npy", np.asfortranarray(whole))
    found = ndm_ct.evaluate(model(), np.load(tmp_path / "f.npy", mmap_mode="r"), max_rows=20, **COARSE)
    assert torch.equal(found.values, ndm_ct.evaluate(model(), whole, max_rows=20, **COARSE).values)
    for dtype in (np.uint8, np.uint16, np.int64):
        levels = np.random.default_rng(0).integers(0, 8, (60, 3)).astype(dtype)
        options = {"quantisation": Quantisation(8), "max_rows": 20} | COARSE
        found = ndm_ct.evaluate(model(), mapped(tmp_path / "i.npy", levels), **options)
        assert torch.equal(found.values, ndm_ct.evaluate(model(), levels, **options).values)


def test_changes_that_are_in_memory_alone_are_kept(tmp_path):
    data = mapped(tmp_path / "x.npy", values(), "c")
    data[:] = values(seed=2)
    found = ndm_ct.evaluate(model(), data, max_rows=20, **COARSE)
    assert torch.equal(found.values, ndm_ct.evaluate(model(), values(seed=2), max_rows=20, **COARSE).values)
    assert np.array_equal(data, values(seed=2))


@pytest.mark.parametrize("row", [0, 31, 59])
def test_every_row_is_checked_and_counts(tmp_path, row):
    """One that is not finite is named; one that differs makes other data of it."""
    ndm_ct.evaluate(model(), values(), run_dir=tmp_path / "run", max_rows=10, **COARSE)
    other = values()
    other[row, 1] += 1e-3
    with pytest.raises(ValueError, match="other settings: data"):
        ndm_ct.evaluate(model(), mapped(tmp_path / "x.npy", other), run_dir=tmp_path / "run", **COARSE)
    other[row, 1] = math.nan
    start = row // 8 * 8  # 12 bytes a row, 100 at once
    with pytest.raises(ValueError, match=rf"data\[{start}:{start + 8}\] has NaN or inf in rows \[{row - start}\]"):
        ndm_ct.fit(model(), mapped(tmp_path / "x.npy", other), steps=2, progress=False)


def test_a_mapped_array_of_another_shape_or_of_nothing(tmp_path):
    for shape, words in (((4, 2), "shape"), ((3,), "shape"), ((), "shape"), ((2, 3, 1), "shape")):
        with pytest.raises(ValueError, match=words):
            ndm_ct.evaluate(model(), mapped(tmp_path / "x.npy", np.zeros(shape, np.float32)), **COARSE)
    with pytest.raises(ValueError, match="no rows"):
        ndm_ct.evaluate(model(), mapped(tmp_path / "x.npy", values())[:0], **COARSE)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_mapped_array_is_standardised_as_it_is_read(tmp_path, dtype):
    """The same rows, the same fingerprint as of all at once, whatever is asked for; a row that differs is seen."""
    whole = (1000.0 + 0.1 * values()).astype(dtype)
    mean, scale = torch.as_tensor(whole, dtype=torch.float64).mean(0), torch.full((), 0.1, dtype=torch.float64)
    expected = ((torch.as_tensor(whole).double() - mean) / scale).float()
    lazy = rows.Standardised(mapped(tmp_path / "x.npy", whole), mean, scale, torch.float32, None)
    for chosen in (slice(None), slice(10, 30), slice(None, None, -1), [3, 1, 3], 7, np.array([5])):
        of_tensor = list(range(60))[chosen] if isinstance(chosen, slice) else chosen
        assert torch.equal(lazy[chosen], expected[of_tensor])
    options = {"batch_size": 20, "run_dir": tmp_path / "run"} | COARSE
    first = ndm_ct.evaluate(model(), expected, max_rows=20, **options)
    rest = ndm_ct.evaluate(model(), lazy, **options)
    assert torch.equal(rest.values[:20], first.values)
    assert torch.equal(rest.values, ndm_ct.evaluate(model(), expected, batch_size=20, **COARSE).values)
    a, b = model(), model()
    for each, x in ((a, expected), (b, lazy)):
        ndm_ct.fit(each, x, steps=5, batch_size=8, progress=False)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    whole[31, 1] += 1e-3 if dtype == np.float64 else 1.0
    other = rows.Standardised(mapped(tmp_path / "y.npy", whole), mean, scale, torch.float32, None)
    with pytest.raises(ValueError, match="other settings: data"):
        ndm_ct.evaluate(model(), other, **options)


PREAMBLE = """
import sys
sys.path[:0] = {paths!r}
import numpy as np
import torch
import ndm_ct
from ndm_ct import NDM, nn, schedules
from test_hostile_files import peak
torch.set_num_threads(1)
folder, size = sys.argv[1], int(sys.argv[2])
D = 256
shape = (size // (4 * D), D)
"""

LIBRARY = """
model = NDM(nn.Preconditioned(nn.MLP(D, width=8, depth=1)), (D,), schedule=schedules.LinearLogSNR(-5.0, 5.0))


def work(data, name):
    result = ndm_ct.evaluate(
        model, data, max_rows=512, rtol=1e-2, atol=1e-2, progress=False, run_dir=folder + "/" + name
    )
    assert result.rows == 512 and abs(result.nll) < 1e6
    ndm_ct.fit(model, data, steps=8, batch_size=32, progress=False, run_dir=folder + "/fit" + name)


work(np.zeros((600, D), np.float32), "small")  # what every such call takes
before = peak()
data = np.lib.format.open_memmap(folder + "/big.npy", mode="w+", dtype=np.float32, shape=shape)
work(data, "big")
print(peak() - before)
"""

COMMANDS = """
from ndm_ct.cli import commands as cli


def made(name, shape):
    data = np.lib.format.open_memmap(folder + "/" + name, mode="w+", dtype=np.float32, shape=shape)
    data[:600] = np.random.default_rng(0).normal(size=(600, D))  # the others are holes
    return folder + "/" + name


def work(data, name):
    out = folder + "/" + name
    for command in (
        ["train", data, "--out", out, "--steps", "8", "--batch-size", "32", "--width", "8", "--depth", "1",
         "--validation-fraction", "0.001"],
        ["evaluate", out, data, "--out", out + "/e", "--max-rows", "64", "--bound", "elbo", "--samples", "2"],
    ):
        assert cli.main([*command, "--quiet"]) == 0
    return out


work(made("small.npy", (2000, D)), "small")
before = peak()
work(made("big.npy", shape), "big")
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures resident memory by Linux' rules")
@pytest.mark.parametrize(
    ("size", "most"), [(400e6, 200e6), pytest.param(2e9, 300e6, marks=pytest.mark.slow)], ids=["0.4 GB", "2 GB"]
)
@pytest.mark.parametrize("script", [LIBRARY, COMMANDS], ids=["library", "commands"])
def test_a_file_larger_than_memory_is_not_held(tmp_path, script, size, most):
    """Checked, hashed, scored and trained on. The file is sparse, and takes no disk; rows that are read at random bring
    their neighbours with them, up to a megabyte or two each, as long as their batch is made."""
    *_, grown = in_a_process(tmp_path, PREAMBLE + script, tmp_path, int(size))
    assert int(grown) < most
