"""The codec: bit for bit what it was given, at the length of the bound, and no foreign or damaged file."""

import math

import pytest
import torch

import ndm_ct
from ndm_ct import NDM, nn, reference, schedules, transforms
from ndm_ct.codec import CodecError, _whiten, compress, decompress
from ndm_ct.quantisation import Quantisation

pytest.importorskip("constriction")
SCHEDULE = schedules.LinearLogSNR(-7.0, 5.0)
BINS = Quantisation(4)


def chain(d=12):
    """Levels that tend to stay the same, with the exact prediction."""
    stay = 0.82 * torch.eye(4) + 0.06 * (1.0 - torch.eye(4))
    return reference.Chain(torch.full((4,), 0.25), stay, d, BINS, filled=False, schedule=SCHEDULE)


def exact(d=12):
    known = chain(d)
    return known, NDM(known.predictor, (d,), schedule=SCHEDULE, checks=False)


def network(**options):
    torch.manual_seed(0)
    return NDM(nn.MLP((1, 2, 3), width=8, depth=1), (1, 2, 3), schedule=SCHEDULE, checks=False, **options)


def bound(model, x, steps):
    """Minus the discrete bound of all rows, bits."""
    values = BINS.centres(x, torch.float64)
    found = ndm_ct.discrete.elbo_discrete(model, values, steps=steps, samples=64, quantisation=BINS, generator=0)
    return -float(found.sum()) / math.log(2.0)


def bits_behind(content, rows, d, steps):
    """Bits of a file without its header and its first bits."""
    header = int.from_bytes(content[8:12], "little") + 12 + 32
    first = math.ceil(rows * d * (steps + 1) * 6.5 / 16) // 2 + 16
    return 8 * (len(content) - header) - 32 * first


def test_the_length_is_that_of_the_bound():
    known, model = exact()
    x = known.sample_levels(200, generator=0)
    content = compress(model, x, quantisation=BINS, steps=24, rows=20)
    expected = bound(model, x, 24)
    assert bits_behind(content, 20, 12, 24) == pytest.approx(expected, rel=0.08)  # chance: one draw of the latents
    assert 8 * len(content) > expected  # the first bits are in the file


@pytest.mark.slow
def test_the_length_of_many_events_is_that_of_the_bound():
    known, model = exact()
    x = known.sample_levels(8000, generator=0)
    content = compress(model, x, quantisation=BINS, steps=20, rows=50)
    assert torch.equal(decompress(model, content), x)
    assert bits_behind(content, 50, 12, 20) == pytest.approx(bound(model, x, 20), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize(
    "transform", [None, transforms.Neural(lambda x, t: torch.sin(2.0 * x))], ids=["identity", "bent"]
)
@pytest.mark.parametrize("rows", [1, 3])
def test_what_comes_back_is_what_went_in(dtype, transform, rows):
    model = network(transform=transform)
    x = torch.randint(0, 16, (7, 1, 2, 3), generator=torch.Generator().manual_seed(1)).to(dtype)
    back = decompress(model, compress(model, x, quantisation=16, steps=5, rows=rows))
    assert back.dtype == dtype
    assert torch.equal(back, x)


def test_levels_that_the_model_does_not_expect_are_coded_too():
    _, model = exact(3)
    x = torch.tensor([[0, 3, 0], [3, 0, 3]])
    assert torch.equal(decompress(model, compress(model, x, quantisation=BINS, steps=3)), x)
    none = x[:0]
    assert torch.equal(decompress(model, compress(model, none, quantisation=BINS, steps=3)), none)


def test_damaged_and_foreign_files_are_refused():
    model, x = network(), torch.zeros(2, 1, 2, 3, dtype=torch.uint8)
    content = compress(model, x, quantisation=16, steps=2)
    for place in (9, 40, len(content) // 2, len(content) - 1):
        broken = bytearray(content)
        broken[place] ^= 1
        with pytest.raises(CodecError, match="damaged"):
            decompress(model, bytes(broken))
    for broken in (content[:-1], content[:10], content[:8]):
        with pytest.raises(CodecError, match="damaged"):
            decompress(model, broken)
    for foreign in (b"", b"PK\x03\x04 something else altogether"):
        with pytest.raises(CodecError, match="no file of"):
            decompress(model, foreign)
    with pytest.raises(TypeError, match=r"content must be bytes, got str"):
        decompress(model, "file")


def test_another_model_is_refused():
    model, x = network(), torch.zeros(2, 1, 2, 3, dtype=torch.uint8)
    content = compress(model, x, quantisation=16, steps=2)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-6
    with pytest.raises(CodecError, match="another model"):
        decompress(model, content)


def test_dirty_bits_are_whitened():
    """Bits at the top of the stack that are far from random are random afterwards, and come back."""
    import constriction
    import numpy as np

    stack = constriction.stream.stack.AnsCoder(np.ones(600, np.uint32), seal=True)
    _whiten(stack, 1000, 3)
    family = constriction.stream.model.Uniform(2**16)
    top = stack.decode(family, 1000)
    assert abs(float(top.mean()) / 2**16 - 0.5) < 0.04
    stack.encode_reverse(top, family)
    _whiten(stack, 1000, 3)
    assert (stack.get_compressed(unseal=True) == 1).all()


def test_numbers_of_another_machine_are_noticed():
    """The same weights, but a prediction that differs: wrong data are an error."""
    off = [0.0]
    model = NDM(lambda z, t: 0.5 * z + off[0], (4,), schedule=SCHEDULE, checks=False)
    content = compress(model, torch.randint(0, 4, (4, 4)), quantisation=4, steps=4)
    off[0] = 0.3
    with pytest.raises(CodecError, match="does not return the numbers"):
        decompress(model, content)


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"x": torch.zeros(2, 1, 2, 3)}, TypeError, "integer levels"),
    ({"x": torch.full((2, 1, 2, 3), 16)}, ValueError, "values outside"),
    ({"x": torch.zeros(2, 6).long()}, ValueError, "expected"), ({"steps": 0}, ValueError, "steps must be"),
    ({"rows": 0}, ValueError, "rows must be"), ({"quantisation": 1}, ValueError, "quantisation=1"),
    ({"model": network(volatility=0.0)}, ValueError, "volatility above zero"),
    ({"model": chain(2), "x": torch.zeros(1, 2).long()}, ValueError, "default prior"),
])  # fmt: skip
def test_unusable_arguments(change, error, message):
    options = {"model": network(), "x": torch.zeros(2, 1, 2, 3).long(), "quantisation": 16, "steps": 2} | change
    with pytest.raises(error, match=message):
        compress(options.pop("model"), options.pop("x"), **options)
