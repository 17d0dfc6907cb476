"""Whatever holds the rows, the same rows train the same weights; what is not clear is asked about."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import ndm_ct
from ndm_ct.data.containers import Layout, Stream

X = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 3


class Labelled(Dataset):
    """Pairs, as torchvision's datasets have them."""

    def __len__(self):
        return len(X)

    def __getitem__(self, row):
        return X[row], int(LABELS[row])


class Dicts:
    """The interface of ``datasets.Dataset``, which is no Dataset of torch."""

    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(X)

    def __getitem__(self, row):
        return {name: column[row] for name, column in self.columns.items()}


class Rows(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def model(classes=None, seed=0, extra=None):
    torch.manual_seed(seed)
    net = ndm_ct.nn.MLP(2, width=8, depth=1, classes=classes)
    return ndm_ct.NDM(ndm_ct.nn.Preconditioned(net), (2,), checks=False)


def trained(data, classes=None, **options):
    made = model(classes)
    ndm_ct.fit(made, data, **{"steps": 4, "batch_size": 8, "progress": False} | options)
    return made.state_dict()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def frame(**columns):
    return pytest.importorskip("pandas").DataFrame(columns)


CONDITIONAL = {
    "pairs": lambda: (Labelled(), {}),
    "pairs, named": lambda: (Labelled(), {"cond_from": "label"}),
    "tensors": lambda: (TensorDataset(X, LABELS), {"cond_from": ("label",)}),
    "three parts": lambda: (TensorDataset(X, X, LABELS), {"cond_from": {"label": 2}}),
    "dicts": lambda: (Dicts(x=X, label=LABELS), {}),
    "dicts of other names": lambda: (Dicts(image=X, digit=LABELS), {"cond_from": {"label": "digit"}}),
    "dicts of numpy": lambda: (Dicts(image=X.numpy(), label=LABELS.numpy()), {}),
    "dicts of lists": lambda: (Dicts(image=X.tolist(), label=LABELS.tolist()), {}),
    "a function": lambda: (
        Dicts(image=X, digit=LABELS, name=["a"] * 24),
        {"cond_from": lambda item: (item["image"], {"label": item["digit"]})},
    ),
    "a table": lambda: (frame(a=X[:, 0].numpy(), b=X[:, 1].numpy(), label=LABELS.numpy()), {}),
    "a table of other names": lambda: (
        frame(digit=LABELS.numpy(), a=X[:, 0].numpy(), b=X[:, 1].numpy()),
        {"cond_from": {"label": "digit"}},
    ),
}


@pytest.mark.parametrize("kind", CONDITIONAL)
def test_conditions_come_with_their_rows(kind):
    data, options = CONDITIONAL[kind]()
    expected = trained(X, 3, cond={"label": LABELS})
    assert same(trained(data, 3, **options), expected)
    assert not same(trained(X, 3), expected)


def test_rows_alone():
    """An unconditional model takes x of pairs and of dicts."""
    expected = trained(X)
    for data in (
        Labelled(),
        TensorDataset(X),
        Dicts(x=X, label=LABELS),
        Dicts(pixels=X),
        TensorDataset(X, LABELS, LABELS),
    ):
        assert same(trained(data), expected)
    for data in (frame(a=X[:, 0].numpy(), b=X[:, 1].numpy()), X.numpy(), X.double().numpy()):
        assert same(trained(data), expected)


def test_scores_of_items_are_those_of_rows():
    made, options = model(3), {"rtol": 1e-2, "atol": 1e-2, "progress": False, "trace": "exact"}
    expected = ndm_ct.evaluate(made, X, cond={"label": LABELS}, **options).values
    loader = DataLoader(Labelled(), batch_size=5)
    for data in (Labelled(), loader, Rows([Labelled()[row] for row in range(24)])):
        torch.testing.assert_close(ndm_ct.evaluate(made, data, **options).values, expected)
    both = ndm_ct.compare(made, model(3, seed=1), loader, **options)
    torch.testing.assert_close(both.values_a, expected)
    gaussian = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
    wanted = ndm_ct.evaluate(gaussian, X, progress=False).values
    for data in (Rows(list(X)), Labelled(), Dicts(x=X, label=LABELS)):
        assert torch.equal(ndm_ct.evaluate(gaussian, data, progress=False).values, wanted)


def test_a_stream_is_read_in_its_order_again_and_again():
    read = []

    def objective(made, x, generator, **cond):
        read.append(x)
        return ndm_ct.loss(made, x, generator=generator)

    trained(Rows(list(X)), batch_size=10, steps=6, objective=objective, accumulate=2)
    assert torch.equal(torch.cat(read), torch.cat([X, X, X])[:60])
    read.clear()
    trained(DataLoader(X, batch_size=7), batch_size=10, steps=3, objective=objective)
    assert torch.equal(torch.cat(read), torch.cat([X, X])[:30])


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_goes_on_where_the_training_stopped(tmp_path, shuffle):
    """With its own order, which depends on the pass alone, and with its conditions."""
    loader = DataLoader(Labelled(), batch_size=5, shuffle=shuffle)
    expected = trained(loader, 3, steps=12)
    part = model(3)
    with pytest.raises(ZeroDivisionError):
        _stop(part, loader, tmp_path)
    assert same(trained(loader, 3, steps=12, run_dir=tmp_path, checkpoint_every=3), expected)
    in_order = trained(Rows([Labelled()[row] for row in range(24)]), 3, steps=12)
    assert same(expected, in_order) is not shuffle


def _stop(made, loader, folder):
    made.predictor.register_forward_hook(Countdown(8))
    torch.manual_seed(99)  # the order does not hang on the global generator
    ndm_ct.fit(made, loader, steps=12, batch_size=8, run_dir=folder, checkpoint_every=3, progress=False)


class Countdown:
    """A hook that raises at a call."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self, *_):
        self.calls -= 1
        if not self.calls:
            raise ZeroDivisionError


def test_items_of_a_stream_by_number():
    stream = Stream(Rows(list(range(5))), "data")
    assert stream.read(torch.tensor([0, 1])) == [0, 1]
    assert stream.read(torch.tensor([3, 4, 5, 6])) == [3, 4, 0, 1]
    assert stream.read(torch.tensor([6, 5])) == [1, 0]
    assert stream.read(torch.tensor([1])) == [1]
    with pytest.raises(ValueError, match="data has no rows in pass 1"):
        Stream(Rows([]), "data").read(torch.tensor([0]))


def test_validation_by_a_loader():
    wanted = ndm_ct.fit(model(3), X, cond={"label": LABELS}, validation=X, validation_cond={"label": LABELS}, steps=4,
                        batch_size=8, progress=False).validation  # fmt: skip
    found = ndm_ct.fit(
        model(3), Labelled(), validation=DataLoader(Labelled(), 7), steps=4, batch_size=8, progress=False
    )
    assert [row["validation_elbo"] for row in found.validation] == [row["validation_elbo"] for row in wanted]


def test_dropped_conditioning_of_items():
    expected = trained(X, 3, cond={"label": LABELS}, cond_dropout=0.5)
    assert same(trained(Labelled(), 3, cond_dropout=0.5), expected)
    with pytest.raises(ValueError, match="cond_dropout has no effect without cond"):
        trained(TensorDataset(X), 3, cond_dropout=0.5)


def test_integers_in_items():
    levels = torch.arange(48).reshape(24, 2) % 5
    expected = trained(levels, quantisation=5)
    for data in (TensorDataset(levels, LABELS), frame(a=levels[:, 0].numpy(), b=levels[:, 1].numpy())):
        assert same(trained(data, quantisation=5), expected)


def test_hugging_face_datasets():
    datasets = pytest.importorskip("datasets")
    held = datasets.Dataset.from_dict({"x": X.tolist(), "label": LABELS.tolist()})
    expected = trained(X, 3, cond={"label": LABELS})
    for data in (held, held.with_format("torch"), held.with_format("numpy")):
        assert same(trained(data, 3), expected)
    stream = held.to_iterable_dataset()
    assert same(trained(stream, 3), trained(Rows([Labelled()[row] for row in range(24)]), 3))
    with pytest.raises(TypeError, match=r"pass one entry, as in data\['train'\]"):
        trained(datasets.DatasetDict(train=held))


class Any(torch.nn.Module):
    """A predictor that takes any condition."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, z, t, **cond):
        return self.layer(z)


@pytest.mark.parametrize(
    ("data", "options", "error", "words"),
    [
        (TensorDataset(X, LABELS, LABELS), {}, TypeError, r"tuple of 3, and the predictor takes 'label'.*cond_from="),
        (Dicts(x=X, digit=LABELS), {}, TypeError, r"keys \['x', 'digit'\].*takes 'label'.*cond_from="),
        (Dicts(a=X, b=X, label=LABELS), {}, TypeError, r"which one is x.*cond_from=lambda"),
        (Dicts(x=X), {"cond_from": "label"}, ValueError, r"asks for \['label'\]"),
        (TensorDataset(X, LABELS), {"cond_from": {"label": 2}}, ValueError, "has 2 parts, and cond_from asks for"),
        (TensorDataset(X, LABELS), {"cond_from": "digit"}, TypeError, "'digit'"),
        (
            TensorDataset(X, LABELS),
            {"cond": {"label": LABELS}},
            ValueError,
            r"\['label'\] are in cond and in the items",
        ),
        (TensorDataset(X, LABELS), {"cond_from": lambda item: item[0]}, TypeError, r"return \(x, \{name: value\}\)"),
        (TensorDataset(X, LABELS), {"cond_from": 3}, TypeError, "cond_from must name"),
        (X, {"cond_from": "label"}, ValueError, r"no effect on data, rows alone; pass cond="),
        (Rows(list(X)), {"cond": {"label": LABELS}}, ValueError, "stream of unknown length"),
        (Rows(list(X)), {"cond_from": "label"}, ValueError, "a row alone"),
        (iter(X), {}, TypeError, r"read once only.*torch\.stack\(list\(data\)\)"),
        ([X[0], X[1]], {}, TypeError, r"got list; pass torch\.tensor\(data\)"),
        ((X, LABELS), {}, TypeError, r"got tuple; pass data\[0\]"),
        ({"x": X}, {}, TypeError, "got dict; pass one entry"),
        (3, {}, TypeError, "got int; pass a torch.utils.data.Dataset"),
        (Dicts(x=["a"] * 24), {}, TypeError, r"x of an item of data is a str.*with_format"),
        (Rows([X[0], X[0, :1]] * 8), {}, ValueError, r"shapes \(1,\), \(2,\)"),
    ],
)
def test_what_is_not_clear_is_asked_about(data, options, error, words):
    with pytest.raises(error, match=words):
        trained(data, 3, **options)


def test_any_condition_is_asked_about():
    made = ndm_ct.NDM(Any(), (2,), checks=False)
    with pytest.raises(TypeError, match="conditions of any name"):
        ndm_ct.fit(made, Labelled(), steps=1, progress=False)
    ndm_ct.fit(made, Labelled(), steps=1, cond_from="label", progress=False)


def test_tables_of_other_things():
    pandas = pytest.importorskip("pandas")
    words, whole = (
        pandas.DataFrame({"a": [0.1, 0.2], "b": ["x", "y"]}),
        pandas.DataFrame({"a": [0.1, 0.2], "b": [1, 2]}),
    )
    with pytest.raises(TypeError, match=r"no numbers, or gaps: \['b'\].*cat\.codes"):
        trained(words)
    with pytest.raises(TypeError, match=r"integers in the columns \['b'\].*cond_from.*astype"):
        trained(whole)
    with pytest.raises(ValueError, match="NaN"):
        trained(pandas.DataFrame({"a": [0.1, None], "b": [0.1, 0.2]}))
    with pytest.raises(TypeError, match="must name columns"):
        trained(words, cond_from=lambda item: item)
    with pytest.raises(ValueError, match=r"asks for \['c'\]"):
        trained(words, 3, cond_from={"label": "c"})
    with pytest.raises(TypeError, match=r"quantisation="):
        trained(pandas.DataFrame({"a": [1, 2], "b": [1, 2]}))


def test_the_layout_of_a_list_of_numbers():
    assert Layout(None, (frozenset(), False), "data").split([1.0, 2.0]) == ([1.0, 2.0], {})
    assert Layout(None, (frozenset({"label"}), False), "data").split([np.ones(2), 1])[1] == {"label": 1}
