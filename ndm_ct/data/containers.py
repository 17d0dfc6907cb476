"""Containers in which rows come: DataFrames, datasets of items, and streams that are read in their order.

An item is a row x alone, a tuple (x, c_1, ...), or a dict. :class:`Layout` says which of its parts are the
conditioning of the row.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from ndm_ct._core.checks import as_tensor
from ndm_ct._core.conditioning import map_tensors

__all__ = ["CondFrom", "Items", "Layout", "Stream", "as_rows", "batched", "dtype_of", "fixed_seeds", "open_container"]

CondFrom = str | Sequence[str] | Mapping[str, Any] | Callable[[Any], tuple[Any, Mapping[str, Any]]] | None
"""What users say of the parts of an item."""

_END = object()


class Layout:
    """Which part of an item is the row, and which parts are its conditioning.

    Args:
        cond_from: names of the conditions, in the order of the parts of a tuple after x, or as keys of a dict; or a
            mapping of names to places or keys; or a function of an item that returns x and a dict. None goes by the
            names that the model takes: the second part of a pair if there is one name, and equal keys of a dict.
        names: names of conditions that the model takes, and whether it takes any other.
        name: what messages call the data.
    """

    def __init__(self, cond_from: CondFrom, names: tuple[frozenset[str], bool], name: str) -> None:
        if not (cond_from is None or isinstance(cond_from, str | Sequence | Mapping) or callable(cond_from)):
            raise TypeError(
                "cond_from must name the conditions (a str, a sequence of them, a mapping of names to places or keys) "
                f"or be a function of an item, got {type(cond_from).__name__}."
            )
        self.given = (cond_from,) if isinstance(cond_from, str) else cond_from
        (self.names, self.anything), self.name = names, name

    def split(self, item: Any) -> tuple[Any, Mapping[str, Any]]:
        """The row of an item, and its conditioning by name.

        Raises:
            TypeError: the item and ``cond_from`` do not say which part is which.
            ValueError: a part is missing.
        """
        if callable(self.given):
            found: Any = self.given(item)
            if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping)):
                raise TypeError(f"cond_from must return (x, {{name: value}}) for an item, got {type(found).__name__}.")
            return found
        if isinstance(item, Mapping):
            places = self._by_key(list(item), "an item of " + self.name)
            return item[self._key_of_x(list(item), places)], {name: item[key] for name, key in places.items()}
        if isinstance(item, tuple | list) and not _is_numeric(item):
            return item[0], {name: item[place] for name, place in self._by_place(len(item)).items()}
        if self.given:
            raise ValueError(
                f"cond_from={self.given!r} names conditions, but an item of {self.name} is a {type(item).__name__}, "
                "a row alone; leave cond_from out, or pass cond={name: tensor}."
            )
        return item, {}

    def columns(self, keys: list[Any]) -> tuple[list[Any], Mapping[str, Any]]:
        """The columns of a table that make up x, and those of the conditions by name.

        Args:
            keys: names of all columns.
        """
        if callable(self.given):
            raise TypeError(f"cond_from must name columns of the table {self.name}, got a function.")
        places = self._by_key(keys, self.name, ask=False)
        return [key for key in keys if key not in places.values()], places

    def _by_place(self, parts: int) -> Mapping[str, int]:
        """Places of the conditions in a tuple."""
        if isinstance(self.given, Mapping):
            found = dict(self.given)
        elif self.given is not None:
            found = {name: place for place, name in enumerate(cast(Sequence[str], self.given), 1)}
        elif parts == 1 or not (self.names or self.anything):
            found = {}
        elif parts == 2 and len(self.names) == 1 and not self.anything:
            found = dict.fromkeys(self.names, 1)
        else:
            raise TypeError(self._question(f"an item of {self.name} is a tuple of {parts}"))
        if not all(isinstance(place, int) and 0 < place < parts for place in found.values()):
            raise ValueError(f"an item of {self.name} has {parts} parts, and cond_from asks for {found}.")
        return found

    def _by_key(self, keys: list[Any], holder: str, ask: bool = True) -> Mapping[str, Any]:
        """Keys of the conditions in a dict or a table; ``ask`` if there are others and none has a known name."""
        if self.given is None:
            found = {key: key for key in keys if key in self.names}
            if ask and not found and len(keys) > 1 and (self.names or self.anything):
                raise TypeError(self._question(f"{holder} has the keys {keys}"))
            return found
        given = cast(Sequence[str] | Mapping[str, Any], self.given)
        found = dict(given) if isinstance(given, Mapping) else {name: name for name in given}
        missing = [key for key in found.values() if key not in keys]
        if missing:
            raise ValueError(f"{holder} has the keys {keys}, and cond_from asks for {missing}.")
        return found

    def _question(self, what: str) -> str:
        taken = ", ".join(map(repr, sorted(self.names))) or "conditions of any name"
        return (
            f"{what}, and the predictor takes {taken}; say which part is which condition, as in cond_from='label' or "
            "cond_from={'label': key or place}, or take x alone by cond_from=()."
        )

    def _key_of_x(self, keys: list[Any], places: Mapping[str, Any]) -> Any:
        left = [key for key in keys if key not in places.values()]
        if "x" in left or len(left) == 1:
            return "x" if "x" in left else left[0]
        raise TypeError(
            f"an item of {self.name} has the keys {keys}; say which one is x and which are conditions, as in "
            'cond_from=lambda item: (item["image"], {"label": item["label"]}).'
        )


class Items:
    """Items of a map-style dataset: anything with a length whose items are read by number.

    Args:
        data: the dataset.
    """

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def read(self, rows: Tensor) -> list[Any]:
        """Items by number."""
        if hasattr(self.data, "__getitems__"):  # as DataLoader does; a dataset of files then reads them together
            return list(self.data.__getitems__(rows.tolist()))
        return [self.data[row] for row in rows.tolist()]


class Stream:
    """Items of an iterable, in its order; when it ends it is read again from the start.

    Item number n is the n-th that is read, over all passes. The global generators of torch, numpy and Python have a
    seed that is the number of the pass when a pass begins, so that a loader shuffles in the same order again.

    Args:
        data: an iterable that can be read more than once; batches of a DataLoader are cut into rows.
        name: what messages call the data.
    """

    def __init__(self, data: Iterable[Any], name: str) -> None:
        self.data, self.name = data, name
        self._rewind()

    def _rewind(self) -> None:
        self.passes, self.start = 0, 0
        self.kept: deque[Any] = deque()
        self.iterator: Iterator[Any] | None = None

    def read(self, rows: Tensor) -> list[Any]:
        """Items by number. Smaller numbers than before begin the first pass again."""
        first, last = int(rows.min()), int(rows.max())
        if first < self.start:
            self._rewind()
        while self.kept and self.start < first:
            self.kept.popleft()
            self.start += 1
        while self.start + len(self.kept) <= last:
            item = self._next()
            if self.start < first:
                self.start += 1
            else:
                self.kept.append(item)
        return [self.kept[row - self.start] for row in rows.tolist()]

    def one_pass(self) -> list[Any]:
        """All items of one pass."""
        with fixed_seeds(0):
            return list(_unbatched(self.data))

    def _next(self) -> Any:
        item = _END if self.iterator is None else next(self.iterator, _END)
        if item is _END:
            with fixed_seeds(self.passes):
                self.iterator = _unbatched(self.data)
                item = next(self.iterator, _END)
            self.passes += 1
        if item is _END:
            raise ValueError(f"{self.name} has no rows in pass {self.passes}.")
        return item


def _unbatched(data: Iterable[Any]) -> Iterator[Any]:
    """Rows of an iterable; those of a DataLoader are cut out of its batches."""
    if not isinstance(data, DataLoader) or data.batch_sampler is None:
        yield from data
        return
    for batch in data:
        yield from _cut(batch)


def _cut(batch: Any) -> Iterable[Any]:
    if isinstance(batch, Mapping):
        return (dict(zip(batch, row, strict=True)) for row in zip(*map(_cut, batch.values()), strict=True))
    if isinstance(batch, tuple | list) and not _is_numeric(batch):
        return zip(*map(_cut, batch), strict=True)
    return batch


def _is_numeric(values: Sequence[Any]) -> bool:
    """Whether a sequence is one of numbers, nested or not."""
    if all(isinstance(value, bool | int | float | complex) for value in values):
        return True
    return all(isinstance(value, list) and _is_numeric(value) for value in values)


def open_container(data: Any, layout: Layout, whole: bool) -> tuple[Any, Mapping[str, Any]]:
    """Rows of a container as a tensor, an array, :class:`Items` or :class:`Stream`, and the conditioning of a table.

    Args:
        data: what a user passed as data.
        layout: which part of an item is which.
        whole: read a stream to its end and keep its items.

    Raises:
        TypeError: the data cannot be read as rows; the message has the lines that convert.
    """
    name = layout.name
    if isinstance(data, Tensor | np.ndarray):
        if layout.given is not None:
            raise ValueError(f"cond_from has no effect on {name}, rows alone; pass cond={{name: tensor}}.")
        return data, {}
    if hasattr(data, "to_numpy"):
        return _columns(data, layout) if hasattr(data, "columns") else (data.to_numpy(), {})
    if isinstance(data, list | tuple | Mapping | str | bytes) or type(data).__module__.split(".")[0] == "pyarrow":
        raise TypeError(_refusal(data, name))
    if isinstance(data, Iterator):
        raise TypeError(
            f"{name} is a {type(data).__name__}, which can be read once only, and training reads rows again. Keep the "
            f"rows by torch.stack(list({name})), or pass a torch.utils.data.IterableDataset whose __iter__ makes it."
        )
    if _is_by_number(data):
        return Items(data), {}
    if hasattr(data, "__iter__"):
        stream = Stream(data, name)
        return (Items(stream.one_pass()) if whole else stream), {}
    raise TypeError(_refusal(data, name))


def _is_by_number(data: Any) -> bool:
    """Whether items are read by number; IterableDataset inherits ``__getitem__``, and has none."""
    return not isinstance(data, IterableDataset) and hasattr(data, "__getitem__") and hasattr(data, "__len__")


def _refusal(data: Any, name: str) -> str:
    cures = {
        list: f"torch.tensor({name}), or torch.stack({name}) of tensors",
        tuple: f"{name}[0] as the rows and cond={{name: {name}[1]}}, or torch.utils.data.TensorDataset(*{name})",
        dict: f"one entry, as in {name}['train'] or {name}['x'], and the others by cond={{name: values}}",
    }
    cure = next((cure for kind, cure in cures.items() if isinstance(data, kind)), None)
    if cure is None:
        cure = f"{name}.to_pandas()" if hasattr(data, "to_pandas") else "a torch.utils.data.Dataset"
    return (
        f"{name} must be a tensor, an array, a DataFrame, a Dataset or another object with __len__ and __getitem__, "
        f"an IterableDataset or a DataLoader, got {type(data).__name__}; pass {cure}."
    )


def _columns(frame: Any, layout: Layout) -> tuple[np.ndarray, Mapping[str, Any]]:
    """Rows and conditions of a DataFrame of pandas or polars. Its index is left out."""
    own, places = layout.columns(list(frame.columns))
    kinds = {key: frame[key].to_numpy().dtype.kind for key in (*own, *places.values())}
    words = [key for key, kind in kinds.items() if kind not in "fiub"]
    if words:
        raise TypeError(
            f"{layout.name} has columns that hold no numbers, or gaps: {words}. Leave them out, fill the gaps, or turn "
            "categories into integers by .cat.codes and name them in cond_from."
        )
    whole = [key for key in own if kinds[key] != "f"]
    if 0 < len(whole) < len(own):
        raise TypeError(
            f"{layout.name} has integers in the columns {whole} beside real values; integers have no density. Name "
            f"them in cond_from, leave them out, or, if they count as real, convert them by .astype(float)."
        )
    return frame[own].to_numpy(), {name: frame[key].to_numpy() for name, key in places.items()}


def as_rows(items: Sequence[Any], name: str, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Rows of items as one tensor: tensors keep their dtype, arrays and lists of floats take ``dtype``.

    Args:
        items: the rows.
        name: what messages call the data.
        dtype: of rows that are no tensors.
        device: of the result; None leaves it.

    Raises:
        TypeError: a row is neither a tensor, nor an array, nor numbers.
        ValueError: rows have different shapes.
    """
    rows = [_as_row(item, name, dtype, device) for item in items]
    shapes = sorted({tuple(row.shape) for row in rows})
    if len(shapes) > 1:
        raise ValueError(f"items of {name} have the shapes {', '.join(map(str, shapes))}, expected one; crop or pad.")
    return torch.stack(rows).detach().to(device)


def _as_row(item: Any, name: str, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    if isinstance(item, Tensor):
        return item
    numbers = isinstance(item, int | float) or (isinstance(item, list) and _is_numeric(item))
    if isinstance(item, np.ndarray | np.generic) or numbers:
        return cast(Tensor, as_tensor(np.asarray(item), dtype, device))
    raise TypeError(
        f"x of an item of {name} is a {type(item).__name__}, expected a tensor or an array. For pictures give the "
        "dataset of torchvision transform=torchvision.transforms.PILToTensor(); for Hugging Face datasets pass "
        f'{name}.with_format("torch").'
    )


def batched(cond: Sequence[Mapping[str, Any]], dtype: torch.dtype, device: torch.device | None) -> dict[str, Any]:
    """Conditions of rows as tensors with one entry per row; floats take ``dtype``.

    Raises:
        TypeError, ValueError: they do not fit together.
    """
    try:
        found: dict[str, Any] = default_collate([dict(each) for each in cond])
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"the conditions of rows do not fit together: {error}") from error
    return cast(
        dict[str, Any],
        map_tensors(lambda value: value.to(device, dtype if value.is_floating_point() else value.dtype), found),
    )


def dtype_of(data: Any) -> torch.dtype:
    """Dtype for a model without parameters: the dtype of real data, else torch's default."""
    if hasattr(data, "to_numpy"):
        data = data.to_numpy()
    elif not isinstance(data, Tensor | np.ndarray | Sequence | Mapping) and (
        _is_by_number(data) or hasattr(data, "__iter__")
    ):
        with fixed_seeds(0):
            data = next((data[0] for _ in range(len(data))), None) if _is_by_number(data) else next(iter(data), None)
    if isinstance(data, Mapping):
        data = data.get("x", next(iter(data.values()), None))
    if isinstance(data, tuple | list) and data:
        data = data[0]
    if isinstance(data, np.ndarray) and data.dtype.kind == "f":
        return torch.float64 if data.dtype.itemsize > 4 else torch.float32
    if isinstance(data, Tensor) and data.is_floating_point():
        return data.dtype
    return torch.get_default_dtype()


@contextmanager
def fixed_seeds(seed: int) -> Iterator[None]:
    """Seed the global generators of torch (on the CPU), numpy and Python, and restore them afterwards."""
    state, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 (what others draw from)
    try:
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
            yield
    finally:
        np.random.set_state(legacy)  # noqa: NPY002
        random.setstate(state)
