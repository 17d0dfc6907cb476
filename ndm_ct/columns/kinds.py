"""What the columns of a table are: a kind for each, inferred from its values or given in a schema.

===============  =====================================  ==============================================================
kind             entries beside ``kind``                what is done
===============  =====================================  ==============================================================
``continuous``   ``low``, ``high``: bounds              density; bounds by a logarithm, without mass outside
``rounded``      ``width`` of a bin, ``low``, ``high``  log-probability of the bin; noise fills it in training
``integer``      ``low``, ``high``                      ``rounded`` with width 1
``categorical``  ``values``                             exact log-probability of the category
``circular``     ``period``, ``low`` where it begins,   density on the circle; with a width, probability of the bin
                 ``width``
``constant``                                            left out of the model; another value has probability 0
``left out``                                            left out
===============  =====================================  ==============================================================
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ndm_ct._core.checks import choose
from ndm_ct.columns.repeats import grid_of, is_repeating, looked_at

__all__ = ["KINDS", "Column", "Values", "columns_of", "restored", "summary"]

KINDS = ("continuous", "rounded", "integer", "categorical", "circular", "constant", "left out")
"""Names of kinds in schemas."""

_ENTRIES = {
    "continuous": ("low", "high"), "rounded": ("width", "low", "high"), "integer": ("low", "high"),
    "categorical": ("values",), "circular": ("period", "low", "width"),
}  # fmt: skip

_DATE = re.compile(r"\d{4}-\d{1,2}-\d{1,2}.*|\d{1,2}[./]\d{1,2}[./]\d{2,4}.*")
_OF_ITS_OWN = 0.5
"""Share of distinct words above which a column is taken for identifiers."""

_LEAST_IDENTIFIERS = 20


@dataclass(frozen=True)
class Values:
    """The values of a table.

    Args:
        numbers: ``(N, D)``, float64; NaN is missing. Columns of words hold the places of their words.
        names: of the columns, D of them.
        words: the words of the columns that hold words, by place.
    """

    numbers: np.ndarray
    names: tuple[str, ...]
    words: Mapping[int, tuple[Any, ...]]


@dataclass(frozen=True)
class Column:
    """A column, and what is done with it.

    Args:
        name: its name.
        kind: "continuous", "rounded", "categorical", "circular", "constant" or "left out".
        width: of a bin; None for a density.
        low: lower bound; of "circular" where the period begins. None: none.
        high: upper bound; None: none.
        period: of "circular".
        origin: the middle of one of the bins.
        values: of "categorical" and "constant": words, or numbers.
        note: why, in words, where it was inferred.
    """

    name: str
    kind: str
    width: float | None = None
    low: float | None = None
    high: float | None = None
    period: float | None = None
    origin: float = 0.0
    values: tuple[Any, ...] = ()
    note: str = ""

    @property
    def features(self) -> int:
        """Real coordinates of the model that stand for it."""
        return {"continuous": 1, "rounded": 1, "circular": 2}.get(self.kind, 0)

    @property
    def is_modelled(self) -> bool:
        """Whether the model gives its values; else it is constant or left out."""
        return self.kind not in ("constant", "left out")

    @property
    def noises(self) -> int:
        """Random numbers that a row takes: a place in the bin, a radius of the circle."""
        return int(self.width is not None) + int(self.kind == "circular")

    @property
    def is_plain(self) -> bool:
        """Whether it goes to the model as it is."""
        return self.kind == "continuous" and self.low is None and self.high is None

    @property
    def is_probability(self) -> bool:
        """Whether its part of a score is a probability; else it is a density, or it has no part."""
        return self.kind != "left out" and (self.features == 0 or self.width is not None)

    def to_json(self) -> dict[str, Any]:
        """The entries that are not at their defaults."""
        return {name: value for name, value in asdict(self).items() if value not in (None, (), "")}

    def validate_inside(self, x: np.ndarray) -> None:
        """Raises ValueError if training rows, NaN aside, lie outside the bounds."""
        reach = 0.0 if self.width is None else 0.5 * self.width
        low = -np.inf if self.low is None or self.kind == "circular" else self.low - reach
        high = np.inf if self.high is None else self.high + reach
        outside = (x <= low) | (x >= high)
        if outside.any():
            raise ValueError(
                f"columns: {self.name!r} has the value {x[outside][0]:g}, outside of low={self.low}, high={self.high}, "
                "between which all values have to lie (not on them, unless they are rounded); widen the bounds."
            )


def columns_of(values: Values, schema: Any = None) -> tuple[Column, ...]:
    """The kind of every column.

    Args:
        values: the training rows.
        schema: a kind, or a dict of ``kind`` and entries, by the name of a column; columns that it does not name are
            inferred. A single kind holds for all columns. None infers all.

    Raises:
        ValueError: a name that is not a column, an unknown kind or entry, or values that do not fit.

    Example:
        >>> numbers = np.stack([np.arange(100) % 5, np.sqrt(np.arange(100.0))], 1)
        >>> found = columns_of(Values(numbers, ("stars", "height"), {}), {"height": {"kind": "continuous", "low": -1}})
        >>> [(column.kind, column.width, column.low) for column in found]
        [('rounded', 1.0, 0.0), ('continuous', None, -1.0)]
    """
    if isinstance(schema, str):
        schema = dict.fromkeys(values.names, schema)
    if not isinstance(schema, Mapping | None):
        raise ValueError(f"columns must be a mapping of names to kinds, got {type(schema).__name__}.")
    given = {f"x{name}" if isinstance(name, int) else str(name): entry for name, entry in (schema or {}).items()}
    unknown = [name for name in given if name not in values.names]
    if unknown:
        raise ValueError(f"columns names {unknown[0]!r}; the table has {', '.join(values.names)}.")
    found = []
    for place, name in enumerate(values.names):
        x, words = values.numbers[:, place], values.words.get(place)
        found.append(_given(name, given[name], x, words) if name in given else _inferred(name, x, words))
    if not any(column.is_modelled for column in found):
        raise ValueError("columns: no column is left to be modelled; all are constant or left out.")
    return tuple(found)


def _given(name: str, entry: Any, x: np.ndarray, words: tuple[Any, ...] | None) -> Column:
    """A column by an entry of a schema, with what the entry leaves open from the values."""
    entry = {"kind": entry} if isinstance(entry, str) else entry
    if not (isinstance(entry, Mapping) and isinstance(entry.get("kind"), str)):
        raise ValueError(f"columns: {name!r} must be a kind, or a mapping with the entry 'kind', got {entry!r}.")
    kind = choose(f"columns: the kind of {name!r}", entry["kind"].replace("_", " "), KINDS)
    wrong = [each for each in entry if each != "kind" and each not in _ENTRIES.get(kind, ())]
    if wrong:
        raise ValueError(
            f"columns: {name!r} has the entry {wrong[0]!r}; {kind!r} takes "
            f"{', '.join(_ENTRIES.get(kind, ())) or 'none'}."
        )
    if words is not None and kind not in ("categorical", "left out"):
        raise ValueError(f"columns: {name!r} holds words such as {words[0]!r}; it can be 'categorical' or 'left out'.")
    x = x[np.isfinite(x)]
    if kind in ("categorical", "constant"):
        column = Column(name, kind, values=tuple(entry.get("values", ())) or _categories(x, words))
        if kind == "constant" and len(column.values) != 1:
            raise ValueError(f"columns: {name!r} is no constant, it has {len(column.values)} distinct values.")
        return column
    numbers = {key: _number(name, key, value) for key, value in entry.items() if key != "kind"}
    if kind == "integer":
        kind, numbers = "rounded", numbers | {"width": 1.0}
    if kind == "rounded" and numbers.get("width") is None:
        numbers["width"] = grid_of(np.unique(x))
    if kind in ("rounded", "circular") and numbers.get({"rounded": "width", "circular": "period"}[kind]) is None:
        raise ValueError(f"columns: {name!r} is {kind!r} and needs the entry {_ENTRIES[kind][0]!r}.")
    return _validated(replace(Column(name, kind), **numbers), x)  # type: ignore[arg-type]


def _number(name: str, key: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not np.isfinite(value):
        raise ValueError(f"columns: {key} of {name!r} must be a number, got {value!r}.")
    return float(value)


def _validated(column: Column, x: np.ndarray) -> Column:
    for key in ("width", "period"):
        value = getattr(column, key)
        if value is not None and value <= 0.0:
            raise ValueError(f"columns: {key} of {column.name!r} must be positive, got {value:g}.")
    if column.low is not None and column.high is not None and column.low >= column.high:
        raise ValueError(f"columns: {column.name!r} has low={column.low:g}, not below high={column.high:g}.")
    if column.width is not None and len(x):
        steps = (x - x[0]) / column.width
        off = abs(steps - np.round(steps)) > 1e-3
        if off.any():
            raise ValueError(
                f"columns: {column.name!r} has the values {x[0]:g} and {x[off][0]:g}, which are no whole number of "
                f"widths {column.width:g} apart; give the width of its bins, or take 'continuous'."
            )
        column = replace(column, origin=float(x[0]))
    column.validate_inside(x)
    return column


def _inferred(name: str, x: np.ndarray, words: tuple[Any, ...] | None) -> Column:
    x = x[np.isfinite(x)]
    if words is not None:
        return _of_words(name, x, words)
    looked = np.unique(looked_at(x))
    if not len(x):
        return Column(name, "left out", note="has no values")
    if np.ptp(x) <= 10.0 * np.finfo(np.float64).eps * abs(x).max():
        return Column(name, "constant", values=(float(x[0]),), note="1 distinct value")
    width = grid_of(looked)
    if not is_repeating(x[:, None])[0] or width is None:
        return Column(name, "continuous")
    distinct = np.unique(x)
    if len(distinct) == 2:
        return Column(name, "categorical", values=_categories(x, None), note="two distinct values")
    low = 0.0 if distinct[0] == 0.0 else None
    what = "whole numbers" if float(width).is_integer() else f"multiples of {width:g}"
    column = Column(
        name, "rounded", width=width, low=low, origin=float(x[0]), note=f"{len(distinct)} distinct values, {what}"
    )
    steps = (distinct - distinct[0]) / width  # rows that were not looked at may lie elsewhere
    return column if np.all(abs(steps - np.round(steps)) < 1e-3) else Column(name, "continuous")


def _of_words(name: str, x: np.ndarray, words: tuple[Any, ...]) -> Column:
    if len(words) and all(_DATE.fullmatch(str(word)) for word in words):
        return Column(name, "left out", note="holds dates; write them as numbers, such as days, to have them modelled")
    if len(x) >= _LEAST_IDENTIFIERS and len(words) > _OF_ITS_OWN * len(x):
        return Column(name, "left out", note=f"{len(words)} distinct words in {len(x)} rows: taken for identifiers")
    if len(words) == 1:
        return Column(name, "constant", values=words, note="1 distinct word")
    return Column(name, "categorical", values=words, note=f"{len(words)} distinct words")


def _categories(x: np.ndarray, words: tuple[Any, ...] | None) -> tuple[Any, ...]:
    return words if words is not None else tuple(float(value) for value in np.unique(x))


def summary(columns: Sequence[Column], values: Values) -> str:
    """One line for every column: name, kind, range, missing values, and what is done.

    Args:
        columns: of :func:`columns_of`.
        values: the rows.
    """
    lines = [("column", "kind", "range", "missing", "what is done")]
    for place, column in enumerate(columns):
        x = values.numbers[:, place]
        missing = int(np.isnan(x).sum())
        lines.append((column.name, column.kind, _range(column, x), str(missing or "none"), _done(column)))
    widths = [max(len(line[k]) for line in lines) for k in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[4]]) for line in lines
    )


def _range(column: Column, x: np.ndarray) -> str:
    if column.values:
        shown = ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in column.values[:3])
        return shown + ", ..." * (len(column.values) > 3)
    return f"{np.nanmin(x):.4g} to {np.nanmax(x):.4g}" if column.features else "-"


def _done(column: Column) -> str:
    done = {
        "continuous": "density", "circular": f"density on a circle of {column.period or 0:g}",
        "rounded": f"probability of a bin of width {column.width or 0:g}", "categorical": "probability of the category",
        "constant": "left out", "left out": "left out",
    }[column.kind]  # fmt: skip
    if column.kind == "circular" and column.width is not None:
        done = f"probability of a bin of width {column.width:g} on a circle of {column.period:g}"
    bounds = [
        f"{word} {value:g}" for word, value in (("above", column.low), ("below", column.high)) if value is not None
    ]
    if bounds and column.kind in ("continuous", "rounded"):
        done += (
            f", {' and '.join(bounds)} only"
            if column.width is None
            else f", from {column.low or 0:g}" * (column.low is not None)
        )
    return done + f" ({column.note})" * bool(column.note)


def restored(entries: Sequence[Mapping[str, Any]]) -> tuple[Column, ...]:
    """Columns from what :meth:`Column.to_json` wrote."""
    return tuple(replace(Column(**entry), values=tuple(entry.get("values", ()))) for entry in entries)
