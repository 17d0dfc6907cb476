"""Numbers, arrays and datasets of numpy and torch are taken alike in every public function."""

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import ndm_ct
from ndm_ct import NDM, divergence, nn
from ndm_ct.quantisation import Quantisation

GAUSSIAN = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
ROWS = np.random.default_rng(0).normal(size=(5, 2))


def network(width=8):
    torch.manual_seed(0)
    return NDM(nn.Preconditioned(nn.MLP(2, width=width, depth=np.int32(1))), (2,))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ">f8"])
@pytest.mark.parametrize("function", [ndm_ct.loglik, ndm_ct.encode, ndm_ct.decode, ndm_ct.elbo, ndm_ct.loss])
def test_arrays_are_taken_as_tensors(function, dtype):
    model = network()
    array, options = ROWS.astype(dtype), {} if function in (ndm_ct.encode, ndm_ct.decode) else {"generator": 0}
    with torch.no_grad():
        found = function(model, array, **options)
        expected = function(model, torch.tensor(ROWS, dtype=torch.float32), **options)
    assert torch.equal(found, expected)


def test_arrays_of_levels_are_taken_as_tensors():
    for dtype in (np.uint8, np.uint16, np.int64):
        levels = np.array([[0, 3], [2, 1]], dtype=dtype)
        found = ndm_ct.bits_per_dim(GAUSSIAN, levels, quantisation=np.int64(4), generator=0)
        assert torch.equal(
            found, ndm_ct.bits_per_dim(GAUSSIAN, torch.tensor(levels.tolist()), quantisation=4, generator=0)
        )


@pytest.mark.parametrize(
    "work", [lambda x: ndm_ct.loglik(GAUSSIAN, x), lambda x: ndm_ct.fit(network(), x, steps=1, progress=False)]
)
def test_masked_values_are_not_taken_for_numbers(work):
    with pytest.raises(ValueError, match="1 values are masked"):
        work(np.ma.masked_array(ROWS, np.eye(5, 2) * np.arange(5)[:, None] == 1))
    work(np.ma.masked_array(ROWS))


def test_integers_of_numpy_are_integers(tmp_path):
    a, b = network(), network()
    counts = {"steps": 3, "batch_size": 4, "seed": 2, "log_every": 1, "warmup": 1}
    options = {name: np.int64(value) for name, value in counts.items()}
    found = ndm_ct.fit(a, ROWS, run_dir=tmp_path, checkpoint_every=np.int64(2), progress=False, **options)
    ndm_ct.fit(b, ROWS, progress=False, **counts)
    assert found.finished
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    saved = tmp_path / "again.safetensors"
    ndm_ct.save(network(np.int64(8)), saved)
    ndm_ct.load(saved)
    x, cold = torch.zeros(2, 2), {"method": "unipc", "generator": np.int64(1)}
    drawn = ndm_ct.sample(a, np.int64(3), steps=np.int64(2), batch_size=np.int64(2), **cold)
    assert torch.equal(drawn, ndm_ct.sample(a, 3, steps=2, batch_size=2, **cold))
    assert torch.equal(
        ndm_ct.elbo(GAUSSIAN, x, samples=np.int64(2), generator=0), ndm_ct.elbo(GAUSSIAN, x, samples=2, generator=0)
    )
    options = {"bound": "elbo", "samples": np.int64(2), "batch_size": np.int64(2), "max_rows": np.int64(2)}
    ndm_ct.evaluate(a, ROWS, run_dir=tmp_path / "e", seed=np.int64(1), progress=False, **options)
    assert type(Quantisation(np.int64(4)).levels) is int
    assert type(divergence.Hutchinson(np.int64(2)).probes) is int


@pytest.mark.parametrize("value", [True, np.True_, 2.0, np.float64(2.0), "2"])
def test_what_is_not_an_integer_is_refused(value):
    with pytest.raises(TypeError, match="steps must be an int"):
        ndm_ct.fit(network(), ROWS, steps=value, progress=False)
    with pytest.raises(ValueError, match="n must be a non-negative int"):
        ndm_ct.sample(GAUSSIAN, value)


def test_datasets(tmp_path):
    x, models = torch.tensor(ROWS, dtype=torch.float32), [network() for _ in range(3)]
    attached = torch.nn.Identity()(x.clone().requires_grad_() * 1.0)
    for model, data in zip(models, (x, TensorDataset(x), attached), strict=True):
        ndm_ct.fit(model, data, steps=3, batch_size=4, progress=False)
    for other in models[1:]:
        assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), other.parameters(), strict=True))
