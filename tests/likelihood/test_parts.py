"""Large batches in parts: the same results, bounded memory, failures that name the rows of the batch."""

from dataclasses import fields

import pytest
import torch
from oracles import gaussian

import ndm_ct
from ndm_ct import NDM, PredictorError, SolverError
from ndm_ct.divergence import Exact, Hutchinson, Quadrature, nodes
from ndm_ct.likelihood import options

TRACES = {"exact": Exact(), "hutchinson": Hutchinson(4), "quadrature": Quadrature(nodes=4, sweeps=4)}

LOOSE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.mark.parametrize("trace", TRACES.values(), ids=TRACES)
@pytest.mark.parametrize("seed", [3, None, "rows"])
def test_parts_do_not_change_the_numbers(trace, seed, generator):
    model = gaussian()
    x = model.sample_data(7, generator=generator)

    def told(batch_size):
        torch.manual_seed(5)
        source = [torch.Generator().manual_seed(row) for row in range(7)] if seed == "rows" else seed
        options = LOOSE | {"return_info": True} if seed == "rows" else LOOSE
        found = ndm_ct.loglik(model, x, trace=trace, batch_size=batch_size, generator=source, **options)
        return found if seed == "rows" else (found, None)

    (whole, info), (value, parts) = told(None), told(3)
    torch.testing.assert_close(value, whole, rtol=1e-12, atol=1e-12)
    for field in fields(info) if seed == "rows" else ():
        mine, theirs = getattr(parts, field.name), getattr(info, field.name)
        if isinstance(mine, torch.Tensor):
            torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9, equal_nan=True)
        else:
            assert mine == theirs


def test_further_draws_do_not_change_them_either(generator):
    """Sweeps added for a standard error come after the first draws of all rows."""
    model = gaussian()
    x = model.sample_data(5, generator=generator)
    whole, parts = (
        ndm_ct.loglik(model, x, trace=TRACES["quadrature"], **LOOSE, stderr=0.3, batch_size=size, generator=source)
        for size in (None, 2)
        for source in ([torch.Generator().manual_seed(row) for row in range(5)],)
    )
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    in_parts = ndm_ct.loglik(model, x, trace=TRACES["quadrature"], **LOOSE, stderr=0.3, batch_size=2, generator=0)
    assert float((in_parts - whole).abs().max()) < 3.0


def test_the_exact_trace_leaves_the_global_generator_alone(generator):
    model = gaussian()
    x = model.sample_data(2, generator=generator)
    before = torch.random.get_rng_state()
    ndm_ct.loglik(model, x, trace="exact")
    assert torch.equal(before, torch.random.get_rng_state())


def test_paths_and_distributions_come_in_parts_too(generator):
    model = gaussian()
    x = model.sample_data(5, generator=generator)
    z = ndm_ct.encode(model, x)
    torch.testing.assert_close(ndm_ct.encode(model, x, batch_size=2), z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ndm_ct.decode(model, z, batch_size=2), ndm_ct.decode(model, z), rtol=1e-12, atol=1e-12)
    whole, parts = (ndm_ct.distribution(model, batch_size=size).log_prob(x) for size in (None, 2))
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_memory_is_bounded_by_default(monkeypatch, generator):
    """Rows times products stay below the bound; a batch of its own choice is taken as it is."""
    largest = []
    exact = gaussian()

    def predictor(z, t):
        largest[0] = max(largest[0], len(z))
        return exact.predictor(z, t)

    model = NDM(predictor, exact.event_shape, schedule=exact.schedule, checks=False)
    x = exact.sample_data(100, generator=generator)
    monkeypatch.setattr(nodes, "_NUMBERS", 16 * nodes._SMALLEST_EVENT * x[0].numel())
    for size, most in ((None, 16), (40, 40)):
        largest[:] = [0]
        ndm_ct.loglik(model, x, trace="exact", **LOOSE, batch_size=size)
        assert largest == [most]


def test_conditioning_goes_with_its_part(generator):
    """Each row's shift is its own, in every part."""
    exact = gaussian()
    model = NDM(lambda z, t, shift: exact.predictor(z - shift, t) + shift, exact.event_shape, schedule=exact.schedule)
    x = exact.sample_data(5, generator=generator)
    shift = torch.arange(5.0, dtype=torch.float64)[:, None].expand_as(x)
    whole = ndm_ct.loglik(model, x, shift=shift)
    torch.testing.assert_close(ndm_ct.loglik(model, x, shift=shift, batch_size=2), whole, rtol=1e-10, atol=1e-10)


def far_is_nan(z, t):
    return torch.where(z.abs().amax(1, keepdim=True) > 50.0, torch.nan, 0.5 * z)


def test_failures_name_the_rows_of_the_batch():
    model, x = NDM(far_is_nan, (2,), checks=False), torch.zeros(5, 2)
    x[4] = 100.0
    with pytest.raises(SolverError, match="row 3 of the batch") as caught:
        ndm_ct.loglik(model, x, batch_size=3)
    assert caught.value.rows == (4,)
    assert "row 3 of the batch" in str(options._of_batch(PredictorError("NaN in batch rows [1]."), 3))


def test_a_size_that_is_no_count_is_refused(generator):
    model = gaussian()
    with pytest.raises(ValueError, match="batch_size"):
        ndm_ct.loglik(model, model.sample_data(2, generator=generator), batch_size=0)
