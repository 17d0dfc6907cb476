"""Columns whose values repeat: whole numbers, rounded readings, codes, one value that many rows share.

A continuous distribution gives no value twice. Where values repeat, the data have no density: the likelihood of a model
grows without bound as its noise at t = 0 gets smaller, so its height is set by ``gamma_min`` and not by the data.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["ROWS_LOOKED_AT", "grid_of", "is_repeating", "looked_at", "repeated_values"]

ROWS_LOOKED_AT = 10_000
"""Most rows of a table that are looked at."""

_SHARE = 0.05
"""Share of the rows that have to have the value of another row for a column to be named."""

_DECIMALS = 6
"""Largest number of decimals that counts as rounding."""

_NAMED = 5
"""Columns that a sentence names; the others are counted."""


@dataclass(frozen=True)
class _Repeats:
    """What repeats in a column."""

    distinct: int
    decimals: int | None

    def __str__(self) -> str:
        values = f"{self.distinct} distinct value{'s' * (self.distinct != 1)}"
        if self.decimals is None:
            return values
        return (
            f"{values}, {f'{self.decimals} decimal' + 's' * (self.decimals > 1) if self.decimals else 'whole numbers'}"
        )


def repeated_values(values: np.ndarray, names: Sequence[str] | None, cure: str) -> str | None:
    """One sentence on the columns whose values repeat so often that a density of them means little; None without them.

    Args:
        values: the table ``(N, columns)``, NaN aside; at most 10,000 rows, evenly spaced, are looked at.
        names: of the columns; None calls them x0, x1, ...
        cure: what to do about it, the end of the sentence.

    Example:
        >>> rows = np.stack([np.arange(100) % 5, np.sqrt(np.arange(100.0))], 1)
        >>> print(repeated_values(rows, ["stars", "height"], "leave it out")[:66])
        values repeat in column 'stars' (5 distinct values, whole numbers)
    """
    looked = looked_at(values)
    found = [(place, _repeats(looked[:, place])) for place in range(looked.shape[1])]
    named = [f"{names[place] if names else f'x{place}'!r} ({what})" for place, what in found if what]
    if not named:
        return None
    others = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    return (
        f"values repeat in column{'s' * (len(named) > 1)} {', '.join(named[:_NAMED])}{others}, and repeated values "
        f"have no density: the likelihood of these depends on gamma_min more than on the data; {cure}."
    )


def is_repeating(values: np.ndarray) -> np.ndarray:
    """Which columns of ``(N, columns)`` :func:`repeated_values` names, a bool for each."""
    looked = looked_at(values)
    return np.array([_repeats(column) is not None for column in looked.T], dtype=bool)


def grid_of(distinct: np.ndarray) -> float | None:
    """The largest width w whose whole multiples separate all values. It has at most six decimals.

    None means that no such width exists.

    Args:
        distinct: different values, increasing.

    Example:
        >>> grid_of(np.array([-0.5, 1.0, 2.5])), grid_of(np.array([1.0, 4.0, 10.0])), grid_of(np.sqrt([2.0, 3.0]))
        (1.5, 3.0, None)
    """
    decimals = _decimals(distinct)
    if decimals is None or len(distinct) < 2 or np.ptp(distinct) * 10.0**decimals > 2.0**53:
        return None
    steps = np.round(np.diff(distinct) * 10.0**decimals).astype(np.int64)
    return float(np.gcd.reduce(steps)) / 10.0**decimals


def looked_at(values: np.ndarray) -> np.ndarray:
    """At most 10,000 of the rows, evenly spaced."""
    return np.asarray(values[:: -(-len(values) // ROWS_LOOKED_AT)] if len(values) else values)


def _repeats(column: np.ndarray) -> _Repeats | None:
    column = column[~np.isnan(column)]
    distinct, counts = np.unique(column, return_counts=True)
    if counts[counts > 1].sum() <= _SHARE * len(column):
        return None
    return _Repeats(len(distinct), _decimals(distinct))


def _decimals(distinct: np.ndarray) -> int | None:
    return next((k for k in range(_DECIMALS + 1) if np.array_equal(np.round(distinct, k), distinct)), None)
