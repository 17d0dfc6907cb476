"""Containers of tables as numbers: DataFrames, arrays of objects, masked arrays."""

from typing import Any

import numpy as np

from ndm_ct.columns.kinds import Values

__all__ = ["masked_to_nan", "numbers_and_words", "values_in"]


def values_in(X: Any) -> Values | None:
    """The values of a DataFrame, or of an array of objects that holds words; None for other containers.

    Args:
        X: the container.

    Raises:
        ValueError: a column mixes words and numbers, or a number is infinite.
    """
    if hasattr(X, "columns") and hasattr(X, "dtypes"):
        parts, names = [X[name].to_numpy() for name in X.columns], tuple(map(str, X.columns))
    elif isinstance(X, np.ndarray) and X.ndim == 2 and X.dtype.kind in "OU" and _has_words(X):
        parts, names = list(X.astype(object).T), tuple(f"x{place}" for place in range(X.shape[1]))
    else:
        return None
    found = [numbers_and_words(name, part) for name, part in zip(names, parts, strict=True)]
    words = {place: each for place, (_, each) in enumerate(found) if each is not None}
    return Values(np.stack([numbers for numbers, _ in found], 1) if found else np.zeros((len(X), 0)), names, words)


def masked_to_nan(X: Any) -> Any:
    """A masked array with NaN for what is masked; anything else as it is."""
    return np.ma.filled(X.astype(np.float64), np.nan) if np.ma.isMaskedArray(X) else X


def _has_words(objects: np.ndarray) -> bool:
    kinds = {type(value) for value in objects.flat}
    return str in kinds and all(issubclass(kind, str | int | float | np.generic | type(None)) for kind in kinds)


def numbers_and_words(name: str, column: np.ndarray) -> tuple[np.ndarray, tuple[Any, ...] | None]:
    """A column as numbers ``(N,)`` with NaN for missing values, and its words, whose places are the numbers; or None.

    Args:
        name: of the column, for messages.
        column: values ``(N,)`` of any dtype; None, NaN and what is not equal to itself are missing.

    Raises:
        ValueError: words and numbers are mixed, or a number is infinite.

    Example:
        >>> numbers_and_words("hue", np.array(["red", None, "blue"], dtype=object))
        (array([ 1., nan,  0.]), ('blue', 'red'))
    """
    if column.dtype.kind in "mM":
        gaps = np.isnat(column)
        column = column.astype(str).astype(object)
        column[gaps] = None
    if column.dtype.kind in "fiu":
        found = column.astype(np.float64)
        if np.isinf(found).any():
            raise ValueError(f"X contains infinity in column {name!r}; a density needs finite numbers.")
        return found, None
    missing = np.array([value is None or str(value) == "<NA>" or value != value for value in column], dtype=bool)
    kept = column[~missing]
    numeric = [isinstance(value, int | float | np.number) and not isinstance(value, bool | np.bool_) for value in kept]
    found = np.full(len(column), np.nan)
    if all(numeric):
        found[~missing] = kept.astype(np.float64)
        return numbers_and_words(name, found)
    if any(numeric):
        raise ValueError(f"column {name!r} holds words and numbers; write one kind of value, or leave it out.")
    kept = np.array([value.item() if isinstance(value, np.generic) else value for value in kept], dtype=object)
    words = tuple(sorted(set(kept), key=str))
    places = {word: place for place, word in enumerate(words)}
    found[~missing] = [places[word] for word in kept]
    return found, words
