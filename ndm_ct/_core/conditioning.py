"""Conditioning: what networks are given besides state and time, and which rows of which batch it belongs to.

A value is a tensor or an array of numbers, anything else that all rows share (a number, a string, None), or a dict,
list, tuple or dataclass of values. A tensor whose first axis has as many entries as the batch has rows is a candidate
for one entry per row. Any other tensor is shared by all rows. Where rows are taken from a batch, the candidates are
decided by what the networks do with them; ``shared(value)`` settles it beforehand.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

__all__ = ["Conditioning", "Probe", "Shared", "map_leaves", "map_tensors", "shared", "tensors_in"]

Probe = Callable[[Mapping[str, Any], Tensor], Tensor]
"""The networks' outputs under some conditioning at the probe states of these numbers, 0 or 1; one row for each."""

_ALL_WAYS = 4
"""Candidates up to which every combination is tried; beyond, one at a time and all together."""

_TOLERANCE = 1e-2
"""Relative difference between outputs that rounding can explain, in any precision."""


@dataclass(frozen=True)
class Shared:
    """A conditioning value that all rows share; see :func:`shared`."""

    value: Any


def shared(value: Any) -> Any:
    """Mark a conditioning value as one that all rows share.

    It is needed only for a tensor whose first axis has as many entries as the batch has rows although the entries do
    not belong to the rows, and only where the network's output does not show it.

    Args:
        value: a tensor, or a dict, list, tuple or dataclass of tensors. The network gets exactly this value.

    Example:
        >>> import ndm_ct
        >>> model = ndm_ct.NDM(lambda z, t, context: context.mean(0) * z, event_shape=(2,))
        >>> ndm_ct.sample(model, 4, method="ddim", steps=2, context=ndm_ct.shared(torch.ones(4, 2))).shape
        torch.Size([4, 2])
    """
    return Shared(value)


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to what is no dict, list, tuple or dataclass, and to the values in those."""
    if isinstance(value, Mapping):
        return {key: map_leaves(function, each) for key, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_leaves(function, each) for each in value))
    if isinstance(value, list | tuple):
        return type(value)(map_leaves(function, each) for each in value)
    if is_dataclass(value) and not isinstance(value, type | Shared):
        made = copy.copy(value)
        for field in fields(value):
            object.__setattr__(made, field.name, map_leaves(function, getattr(value, field.name)))
        return made
    return function(value)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply a function to the tensors of a value, in dicts, lists and tuples too; what is shared stays as it is."""
    return map_leaves(lambda each: function(each) if isinstance(each, Tensor) else each, value)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of a value, shared ones included, always in the same order."""
    found: list[Tensor] = []
    map_tensors(found.append, _unmarked(value))
    return iter(found)


def _unmarked(value: Any) -> Any:
    return map_leaves(lambda each: each.value if isinstance(each, Shared) else each, value)


class _Batch:
    """The conditioning of a whole batch, and which of its tensors have one entry per row.

    Args:
        given: values by name, shared ones marked.
        rows: rows of the batch.
        probe: evaluates the networks, to decide; None: every candidate has one entry per row.
    """

    def __init__(self, given: Mapping[str, Any], rows: int, probe: Probe | None) -> None:
        self.given, self.rows, self.probe = dict(given), rows, probe

    @cached_property
    def values(self) -> dict[str, Any]:
        """The values as the networks get them, of all rows."""
        return {name: _unmarked(value) for name, value in self.given.items()}

    @cached_property
    def candidates(self) -> list[Tensor]:
        """The tensors that could have one entry per row, in order, each as often as it occurs."""
        found: list[Tensor] = []
        map_tensors(lambda each: found.append(each) if self._fits(each) else None, self.given)
        return found

    def _fits(self, tensor: Tensor) -> bool:
        return tensor.ndim > 0 and tensor.shape[0] == self.rows

    @cached_property
    def by_row(self) -> tuple[bool, ...]:
        """Of every candidate, whether it has one entry per row."""
        every = (True,) * len(self.candidates)
        return every if self.probe is None or not every else self._decided(self.probe, every)

    def taken(self, index: Tensor, by_row: Sequence[bool]) -> dict[str, Any]:
        """The values of some rows."""
        cut = iter(by_row)

        def take(tensor: Tensor) -> Tensor:
            return tensor[index.to(tensor.device)] if self._fits(tensor) and next(cut) else tensor

        return {name: _unmarked(map_tensors(take, value)) for name, value in self.given.items()}

    def _decided(self, probe: Probe, every: tuple[bool, ...]) -> tuple[bool, ...]:
        ways = [every, *_fewer(len(every))]
        errors = [self._disagreement(probe, way) for way in ways]
        best = min(range(len(ways)), key=errors.__getitem__)  # the first of equals: most tensors by row
        runs = [way for way, error in zip(ways, errors, strict=True) if error < torch.inf]
        if len(runs) > 1 and errors[best] > _TOLERANCE:
            names = ", ".join(name for name, value in self.given.items() if any(map(self._fits, tensors_in(value))))
            raise ValueError(
                f"the conditioning {names} has {self.rows} entries, as many as there are rows, and the networks' "
                "output does not show whether they belong to the rows: the networks accept it either way, and rows "
                "change each other's output or are random. Pass ndm_ct.shared(...) if all rows share it, or let the "
                "networks treat every row alone."
            )
        return ways[best] if runs else every

    def _disagreement(self, probe: Probe, way: Sequence[bool]) -> float:
        """How much the outputs of two rows change if each is evaluated alone; infinite if that cannot be evaluated."""
        index = torch.tensor([0, self._other_row()], device=self.candidates[0].device)
        place = torch.arange(2)
        try:
            both = probe(self.taken(index, way), place)
            alone = [probe(self.taken(index[k : k + 1], way), place[k : k + 1]) for k in (0, 1)]
        except Exception:  # networks raise anything for shapes that they do not take
            return torch.inf
        if len(both) != 2 or any(len(each) != 1 for each in alone):
            return torch.inf
        error = float((both - torch.cat(alone)).abs().max() / both.abs().max().clamp(min=1e-30))
        return error if error == error else torch.inf

    def _other_row(self) -> int:
        """A row whose entries differ from those of the first row, in as many tensors as possible."""
        differ = torch.zeros(self.rows)
        for tensor in self.candidates:
            differ += (tensor != tensor[:1]).reshape(self.rows, -1).any(1).cpu()
        return int(differ.argmax()) if bool(differ.any()) else self.rows - 1


def _fewer(count: int) -> Iterator[tuple[bool, ...]]:
    """Ways in which not all of ``count`` tensors have one entry per row."""
    if count <= _ALL_WAYS:
        yield from itertools.islice(itertools.product((True, False), repeat=count), 1, None)
        return
    for k in range(count):
        yield tuple(place != k for place in range(count))
    yield (False,) * count


class Conditioning(Mapping[str, Any]):
    """The conditioning of some rows of a batch: a mapping of names to what the networks get.

    Tensors with as many entries as the batch has rows are decided at the first :meth:`take` of some of the rows. The
    networks are called for two rows together and for each alone, at fixed states, once with the tensor cut into rows
    and once with the whole tensor. The reading under which rows do not change each other's output holds; a network
    that fails with the whole tensor takes one entry per row. A network whose output depends on neither reading gets
    one entry per row.

    Args:
        given: values by name; :func:`shared` ones are never cut.
        rows: rows of the batch that the values belong to.
        probe: evaluates the networks, to decide; None: every tensor with ``rows`` entries has one per row.
    """

    def __init__(self, given: Mapping[str, Any], rows: int, probe: Probe | None = None) -> None:
        self._batch = _Batch(given, rows, probe)
        self._index: Tensor | None = None
        self._values = self._batch.values

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def take(self, rows: Tensor) -> "Conditioning":
        """The conditioning of some rows, in this order.

        Args:
            rows: their numbers among the present rows, shape ``(N,)``; a row may occur several times.

        Raises:
            ValueError: the networks' output does not show which tensors have one entry per row.
        """
        if not self._batch.candidates:
            return self
        index = rows if self._index is None else self._index[rows]
        taken = object.__new__(Conditioning)
        taken._batch, taken._index = self._batch, index
        whole = torch.equal(index, torch.arange(self._batch.rows, device=index.device))
        taken._values = self._batch.values if whole else self._batch.taken(index, self._batch.by_row)
        return taken

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the present rows."""
        return list(tensors_in(self._values))
