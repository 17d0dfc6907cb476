"""Conditioning: which tensors go with their rows, values in containers, marks, and names at every public door."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import ndm_ct
from ndm_ct import schedules
from ndm_ct._core.conditioning import Conditioning, map_tensors, tensors_in
from ndm_ct.nn import MLP, Preconditioned

SHORT = schedules.LinearLogSNR(-4.0, 3.0)
SPREAD = torch.tensor([[0.1], [1.0], [3.0], [6.0]])
LOOSE = {"rtol": 1e-3, "atol": 1e-3}


class Tokens(nn.Module):
    """A network of a set of tokens that all rows share, with a mask over the tokens, and of a number per row."""

    def __init__(self):
        super().__init__()
        self.state, self.token = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, z, t, context, mask=None, weight=None):
        tokens = self.token(context)
        tokens = tokens if mask is None else tokens * mask[:, None]
        out = 0.3 * self.state(torch.cat([z, t[:, None]], 1)) + tokens.mean(0)
        return out if weight is None else out * weight[:, None]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ndm_ct.NDM(Tokens(), (2,), schedule=SHORT)


def rows_alone(model, x, cond, by_row=()):
    one = [
        ndm_ct.loglik(model, x[i : i + 1], **LOOSE, **{k: v[i : i + 1] if k in by_row else v for k, v in cond.items()})
        for i in range(len(x))
    ]
    return torch.cat(one)


def test_tokens_as_many_as_rows_are_shared_if_the_network_treats_them_so(model):
    x, context = torch.randn(4, 2) * SPREAD, 3.0 * torch.randn(4, 3)
    cond = {"context": context, "mask": torch.tensor([1.0, 1.0, 0.0, 1.0])}
    torch.testing.assert_close(ndm_ct.loglik(model, x, **LOOSE, **cond), rows_alone(model, x, cond))
    cond["weight"] = torch.tensor([0.2, 0.5, 0.9, 0.1])
    torch.testing.assert_close(ndm_ct.loglik(model, x, **LOOSE, **cond), rows_alone(model, x, cond, by_row=("weight",)))


def test_tokens_are_shared_when_samples_are_drawn_in_batches(model):
    context = torch.randn(4, 3)
    noise = [[torch.Generator().manual_seed(i) for i in range(4)] for _ in range(2)]
    options = {"method": "ddim", "steps": 3, "context": context}
    whole = ndm_ct.sample(model, 4, generator=noise[0], **options)
    torch.testing.assert_close(ndm_ct.sample(model, 4, generator=noise[1], batch_size=2, **options), whole)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_every_reading_is_found_at_every_size(rows):
    def probe(read):
        return lambda cond, places: read(cond["c"], torch.tensor([[0.3, 1.0], [-2.0, 0.5]])[places])

    tokens = torch.arange(2.0 * rows).reshape(rows, 2) + 1.0
    index = torch.arange(rows).repeat_interleave(2)
    own = Conditioning({"c": tokens}, rows, probe(lambda c, z: z * (c + z * 0)))
    assert torch.equal(own.take(index)["c"], tokens[index])
    for read in (lambda c, z: z + c.sum(0), lambda c, z: z + c[-1], lambda c, z: z @ c.mT @ c):
        assert Conditioning({"c": tokens}, rows, probe(read)).take(index)["c"] is tokens or rows == 1
    assert Conditioning({"c": tokens}, rows, probe(lambda c, z: z + c.sum(0))).take(index)["c"] is tokens


def test_what_the_networks_do_not_show_is_asked_for():
    def random(cond, places):
        return torch.rand(len(places), 2)

    given = {"context": torch.randn(4, 3)}
    with pytest.raises(ValueError, match=r"the conditioning context has 4 entries.*ndm_ct\.shared"):
        Conditioning(given, 4, random).take(torch.tensor([0]))
    marked = Conditioning({"context": ndm_ct.shared(given["context"])}, 4, random)
    assert marked.take(torch.tensor([0]))["context"] is given["context"]
    assert Conditioning(given, 4, random).take(torch.arange(4))["context"] is given["context"]


def test_a_random_network_that_fails_with_the_whole_tensor_gets_its_rows():
    def probe(cond, places):
        return torch.rand(len(places), 2) + cond["label"][:, None]

    taken = Conditioning({"label": torch.arange(4)}, 4, probe).take(torch.tensor([2, 0]))
    assert taken["label"].tolist() == [2, 0]
    assert taken.take(torch.tensor([1]))["label"].tolist() == [0]


def test_tensors_in_containers_follow_their_rows():
    pair = torch.arange(3)
    cond = {"a": {"b": [pair, (pair, "word", None)]}, "c": ndm_ct.shared([pair]), "d": 5}
    taken = Conditioning(cond, 3).take(torch.tensor([2]))
    assert taken["a"]["b"][0].tolist() == [2]
    assert taken["a"]["b"][1] == (torch.tensor([2]), "word", None)
    assert taken["c"][0].tolist() == [0, 1, 2]
    assert taken["d"] == 5
    assert len(list(tensors_in(cond))) == 3
    assert map_tensors(len, {"a": [pair]}) == {"a": [3]}


@dataclass(frozen=True)
class Text:
    tokens: torch.Tensor
    name: str = "word"


def test_dataclasses_follow_their_rows():
    given = Text(torch.arange(3))
    taken = Conditioning({"text": given, "kind": Text}, 3).take(torch.tensor([2, 0]))
    assert (taken["text"].tokens.tolist(), taken["text"].name, taken["kind"]) == ([2, 0], "word", Text)
    assert given.tokens.tolist() == [0, 1, 2]
    made = ndm_ct.NDM(lambda z, t, text: 0.1 * text.tokens[:, None] * z, (2,), schedule=SHORT)
    x, together = torch.ones(3, 2), ndm_ct.shared(Text(torch.arange(3)))
    alone = [ndm_ct.loglik(made, x[:1], text=Text(torch.tensor([k]))) for k in range(3)]
    torch.testing.assert_close(ndm_ct.loglik(made, x, text=given, batch_size=2), torch.cat(alone))
    assert Conditioning({"text": together}, 3).take(torch.tensor([2]))["text"].tokens.tolist() == [0, 1, 2]


def everything(**names):
    """A predictor that takes whatever ``names`` are called."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = MLP(2, width=4, depth=1)

        def cond_names(self):
            return frozenset(names), False

        def forward(self, z, t, /, **cond):
            assert cond.keys() == names.keys()
            return self.net(z, t) + sum(each[:, None] for each in cond.values())

    torch.manual_seed(0)
    return ndm_ct.NDM(Named(), (2,), schedule=SHORT)


NAMES = ("x", "t", "s", "n", "z", "z1", "eps", "dtype", "network", "model", "u", "y", "name", "like", "cond", "flow_of")
COND = {name: torch.full((4,), 0.01 * place) for place, name in enumerate(NAMES)}
T = torch.full((4,), 0.5, dtype=torch.float64)
DOORS = {
    "loglik": lambda m, x, c: ndm_ct.loglik(m, x, **LOOSE, **c),
    "encode": lambda m, x, c: ndm_ct.encode(m, x, **LOOSE, **c),
    "decode": lambda m, x, c: ndm_ct.decode(m, x, **LOOSE, **c),
    "elbo": lambda m, x, c: ndm_ct.elbo(m, x, **c),
    "elbo_discrete": lambda m, x, c: ndm_ct.discrete.elbo_discrete(m, x, steps=3, **c),
    "loss": lambda m, x, c: ndm_ct.loss(m, x, **c),
    "bits_per_dim": lambda m, x, c: ndm_ct.bits_per_dim(m, (x > 0).long(), quantisation=2, samples=2, **LOOSE, **c),
    "velocity": lambda m, x, c: m.velocity(x, 0.5, **c),
    "score": lambda m, x, c: m.score(x, 0.5, **c),
    "flow": lambda m, x, c: m.flow(torch.float32, **c)(T, x),
    "reverse_sde": lambda m, x, c: m.reverse_sde(torch.float32, **c).drift(T, x),
    "sample": lambda m, x, c: ndm_ct.sample(m, 4, method="ddim", steps=2, batch_size=3, **without("dtype", c)),
    "sample_ode": lambda m, x, c: ndm_ct.sample(m, 4, **LOOSE, **without("dtype", c)),
    "guided": lambda m, x, c: ndm_ct.guided(m, 2.0, null={"x": 0.0}).velocity(x, 0.5, **c),
    "distribution": lambda m, x, c: ndm_ct.distribution(m, **LOOSE, **c).log_prob(x),
    "residuals": lambda m, x, c: ndm_ct.discrete.estimate_residuals(m, x, times=2, batch_size=3, **c),
    "evaluate": lambda m, x, c: ndm_ct.evaluate(m, x, cond=c, progress=False, **LOOSE),
    "fit": lambda m, x, c: ndm_ct.fit(m, x, cond=c, steps=1, batch_size=2, progress=False),
    "regression": lambda m, x, c: ndm_ct.objectives.Regression()(m, x, **c),
    "straight": lambda m, x, c: ndm_ct.objectives.Straight()(m, x, **c),
}


def without(name, cond):
    """``dtype`` is an option of ``sample``: no condition of that function."""
    return {**cond, name: torch.float32}


@pytest.mark.parametrize("door", DOORS)
def test_a_condition_may_have_any_name_that_is_no_option_of_the_function(door):
    cond = dict(COND)
    if door.startswith("sample"):
        del cond["dtype"]
    model = everything(**cond)
    DOORS[door](model, torch.randn(4, 2), {**cond})


@pytest.mark.parametrize(
    ("call", "option"),
    [
        (lambda m, x: ndm_ct.sample(m, 2, seed=0), "seed"),
        (lambda m, x: ndm_ct.loglik(m, x, quantisation=3), "quantisation"),
        (lambda m, x: ndm_ct.elbo(m, x, edges=(0, 1)), "edges"),
        (lambda m, x: ndm_ct.loss(m, x, dequantisation="process"), "dequantisation"),
        (lambda m, x: ndm_ct.encode(m, x, steps=3), "steps"),
        (lambda m, x: m.velocity(x, 0.5, method="ode"), "method"),
        (lambda m, x: ndm_ct.distribution(m, stderr=0.1), "stderr"),
    ],
)
def test_options_of_other_functions_are_refused_by_name(call, option):
    model = ndm_ct.NDM(lambda z, t, **others: 0.5 * z, (2,), schedule=SHORT)
    with pytest.raises(TypeError, match=rf"has no option '{option}'"):
        call(model, torch.randn(4, 2))


def test_a_predictor_that_names_an_option_of_another_function_gets_it():
    model = ndm_ct.NDM(lambda z, t, steps: steps[:, None] * z, (2,), schedule=SHORT)
    assert ndm_ct.loglik(model, torch.randn(4, 2), steps=torch.full((4,), 0.1), **LOOSE).shape == (4,)


def test_data_that_all_rows_share_can_be_trained_on_and_scored(model):
    x, context = torch.randn(5, 2), torch.randn(4, 3)
    ndm_ct.fit(model, x, cond={"context": ndm_ct.shared(context)}, steps=2, batch_size=2, progress=False)
    ndm_ct.evaluate(model, x, cond={"context": ndm_ct.shared(context)}, progress=False, **LOOSE)
    with pytest.raises(ValueError, match=r"one row for each of the 5 rows of data.*shared"):
        ndm_ct.fit(model, x, cond={"context": context}, steps=2, progress=False)


def test_labels_go_with_their_rows():
    torch.manual_seed(0)
    model = ndm_ct.NDM(Preconditioned(MLP(2, width=8, depth=1, classes=3)), (2,), schedule=SHORT)
    x, label = torch.randn(4, 2) * SPREAD, torch.arange(4) % 3
    alone = [ndm_ct.loglik(model, x[i : i + 1], label=label[i : i + 1], **LOOSE) for i in range(4)]
    torch.testing.assert_close(ndm_ct.loglik(model, x, label=label, **LOOSE), torch.cat(alone))


def test_arrays_of_numbers_are_conditioning_as_tensors_are():
    """Alone, in dicts, and of other precisions; each follows its rows."""
    model = ndm_ct.NDM(lambda z, t, c, d: 0.3 * z + c[:, None] + 0.1 * d["k"][:, None].to(z.dtype), (2,))
    x, c, k = torch.randn(4, 2), np.linspace(-1.0, 1.0, 4), np.arange(4, dtype=np.uint16)
    options = {"rtol": 1e-2, "atol": 1e-2}
    found = ndm_ct.loglik(model, x, c=c, d={"k": k}, **options)
    expected = ndm_ct.loglik(model, x, c=torch.as_tensor(c).float(), d={"k": torch.arange(4)}, **options)
    assert torch.equal(found, expected)
    torch.testing.assert_close(found[1:2], ndm_ct.loglik(model, x[1:2], c=c[1:2], d={"k": k[1:2]}, **options))
