"""The audit's verdicts on estimators whose faults are known, and its laws against independent sums."""

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import ndm_ct
from ndm_ct.auditing import LAWS, Verdict, audit
from ndm_ct.quantisation import Quantisation

FAST = {"rows": 3, "repeats": 60, "progress": False}
SMALL = [
    "twonorm",
    "checkers",
    *(pytest.param(each, marks=pytest.mark.slow) for each in ("levels", "ar64", "ar64-wrong")),
]


def truth(model, x, bins):
    """What every law says of its own rows."""
    return model.log_probability(x) if bins is not None else model.log_prob(x)


def exact(offset=0.0, scatter=0.0, reported=None):
    """The truth with an error that is known."""

    def estimate(model, x, bins, generator):
        value = truth(model, x, bins) + offset + scatter * torch.randn(len(x), generator=generator, dtype=torch.float64)
        return value if reported is None else (value, torch.full((len(x),), reported))

    return estimate


def verdict(estimate, law="twonorm", **options):
    return audit(estimate, [law], **FAST | options).verdicts[0]


@pytest.mark.parametrize(("estimate", "bound", "words"), [
    (exact(), False, "No bias found. Repeats agree."),
    (exact(scatter=0.01), False, "No bias found. One value scatters by 0.0"),
    (exact(scatter=5.0), False, "No bias found within 0."),
    (exact(offset=1.0), False, "log p is too high by 1 "),
    (exact(offset=1.0), True, "this is no lower bound. Repeats agree."),
    (exact(offset=-1.0), False, "log p is too low by 1 "),
    (exact(offset=-1.0), True, "as a bound may be."),
    (exact(scatter=1.0, reported=1.0), False, "The reported error (1 nats) is right."),
    (exact(scatter=1.0, reported=0.1), False, "times too small."),
    (exact(scatter=1.0, reported=5.0), False, "times too large."),
    (exact(offset=math.nan), False, "Some values are not finite."),
])  # fmt: skip
def test_verdicts(estimate, bound, words):
    assert words in verdict(estimate, bound=bound).words()


def test_the_numbers_are_those_of_the_formulas():
    found = verdict(exact(offset=0.5, scatter=2.0, reported=1.5), rows=4, repeats=400, batch_size=90)
    assert found.bias == pytest.approx(0.5, abs=4.0 * 2.0 / math.sqrt(1600))
    assert found.stderr == pytest.approx(2.0 / math.sqrt(1600), rel=0.1)
    assert found.scatter == pytest.approx(2.0, rel=0.1)
    assert found.reported == pytest.approx(1.5)
    assert found.bits == pytest.approx(-found.bias / (20.0 * math.log(2.0)))
    assert found.evaluations == 0.0


def test_evaluations_are_those_of_the_rows():
    def three(model, x, bins, generator):
        for _ in range(3):
            model.predict_x(x, torch.tensor(0.5, dtype=torch.float64))
        return truth(model, x, bins)

    assert verdict(three, batch_size=7).evaluations == 3.0


def test_runs_repeat_and_leave_the_global_generator_alone():
    def noisy(model, x, bins, generator):
        return torch.randn(len(x))

    before = torch.get_rng_state()
    first, again = (verdict(noisy) for _ in range(2))
    assert first.bias == again.bias != verdict(noisy, seed=1).bias
    assert torch.equal(before, torch.get_rng_state())
    assert first.scatter == pytest.approx(1.0, rel=0.2)  # every batch has noise of its own


@pytest.mark.parametrize("law", SMALL)
def test_the_library_is_right_on_every_law(law):
    """Within 0.005 bits per dimension, and with right errors."""

    def ours(model, x, bins, generator):
        if bins is None:
            value, info = ndm_ct.loglik(model, x, generator=generator, return_info=True)
            return value, info.stderr
        noise = "uniform" if model.filled else "process"
        options = {"quantisation": bins, "dequantisation": noise, "samples": 4, "generator": generator}
        _, info = ndm_ct.bits_per_dim(model, x, return_info=True, rtol=1e-4, atol=1e-4, **options)
        return info.nats, torch.hypot(info.stderr, info.dequantisation_stderr) * x.shape[1] * math.log(2.0)

    found = verdict(ours, law, rows=2, repeats=10, tolerance=0.005)
    assert not found.is_biased, found.words()
    if found.scatter > 0.01:
        assert 0.5 < found.scatter / found.reported < 2.0


def test_laws_are_what_their_names_say(generator):
    twonorm = LAWS["twonorm"]()
    x = twonorm.draw(50, generator)
    a = 2.0 / math.sqrt(20.0)
    means = torch.stack([torch.full((20,), a), torch.full((20,), -a)]).double()
    own = MixtureSameFamily(
        Categorical(torch.ones(2).double()), MultivariateNormal(means, torch.eye(20).double().expand(2, 20, 20))
    )
    torch.testing.assert_close(twonorm.truth(x), own.log_prob(x), rtol=1e-6, atol=1e-6)
    checkers = LAWS["checkers"]()
    x = checkers.draw(400, generator)
    square = ((x + 1.0) * 2.0).long()
    assert set(square.sum(1).remainder(2).tolist()) == {0}
    assert len(square.unique(dim=0)) == 8
    torch.testing.assert_close(checkers.truth(x).exp(), torch.full((400,), 0.5).double())  # the area is 2
    for name, moved in (("ar64", 0.9), ("ar64-wrong", 0.9)):
        law = LAWS[name]()
        k = law.draw(400, generator)
        x = law.bins.centres(k, torch.float64)
        assert float(x.std()) == pytest.approx(1.0 / 3.0, rel=0.05)
        assert float((x[:, 1:] * x[:, :-1]).mean() / x.square().mean()) == pytest.approx(moved, abs=0.03)
    right, wrong = (LAWS[name]().truth(k).mean() for name in ("ar64", "ar64-wrong"))
    assert float(right - wrong) > 5.0
    levels = LAWS["levels"]()
    assert levels.draw(5, generator).shape == (5, 16)
    assert levels.bins.edges == Quantisation(8).edges


@pytest.mark.parametrize(("options", "message"), [
    ({"laws": ["nothing"]}, "laws"), ({"repeats": 1}, "repeats=1 gives no scatter"), ({"rows": 0}, "rows"),
])  # fmt: skip
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        audit(exact(), **{"laws": ["twonorm"]} | FAST | options)


def test_an_estimate_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"log p as torch.Size\(\[\]\), expected a tensor of shape \(100,\)"):
        audit(lambda model, x, bins, generator: x.mean(), ["twonorm"], progress=False)


def test_records_have_the_words():
    found = audit(exact(offset=1.0), ["twonorm", "checkers"], **FAST)
    assert [each["words"] for each in found.to_json()] == [each.words() for each in found.verdicts]
    assert str(found).count("\n") == 1
    assert isinstance(found.verdicts[0], Verdict)
