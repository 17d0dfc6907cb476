"""What the estimator reads and gives back: tables of numbers, words and names, as arrays or DataFrames."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.utils._set_output import _get_output_config
from sklearn.utils.validation import check_is_fitted, validate_data

from ndm_ct.columns import Column, Table, Values, masked_to_nan, numbers_and_words, repeated_values, values_in

__all__ = ["framed", "given_rows", "index_of", "place_of", "read_numbers", "read_rows", "say_kinds", "unit_of"]

_CURE = "add noise uniform over the width of a bin, or leave them out"


def read_rows(density: Any, X: Any, *, reset: bool) -> Values:
    """The values of a table, with names and number of columns checked against those of the training."""
    X, least = masked_to_nan(X), 1 + reset
    values = values_in(X)
    if values is None:
        rows = validate_data(
            density, X, dtype=np.float64, reset=reset, ensure_all_finite="allow-nan", ensure_min_samples=least
        )
        return Values(rows, tuple(f"x{place}" for place in range(rows.shape[1])), {})
    validate_data(density, X, reset=reset, skip_check_array=True)
    for what, count, minimum in (("sample", len(values.numbers), least), ("feature", len(values.names), 1)):
        if count < minimum:
            raise ValueError(
                f"Found array with {count} {what}(s) (shape={values.numbers.shape}) while a minimum of {minimum} is "
                "required."
            )
    return values


def read_numbers(density: Any, X: Any) -> np.ndarray:
    """Rows ``(n, D)`` to score, with categories by their numbers."""
    check_is_fitted(density)
    numbers: np.ndarray = density.table_.coding.places_of(read_rows(density, X, reset=False))
    return numbers


def say_kinds(density: Any, values: Values) -> None:
    """Print the summary; warn of kinds that were inferred, and of values that repeat without being rounded."""
    columns = density.columns_
    if density.verbose:
        print(density.summary_)
    plain = [place for place, column in enumerate(columns) if column.is_plain]
    said = repeated_values(values.numbers[:, plain], [values.names[place] for place in plain], _CURE)
    if said:
        warnings.warn(said, stacklevel=3)
    found = [f"{each.name!r} ({each.kind}: {each.note})" for each in columns if each.note]
    if found:
        shown = ", ".join(found[:5]) + f" and {len(found) - 5} more" * (len(found) > 5)
        warnings.warn(
            f"values repeat or are words in columns whose kinds were inferred: {shown}. columns= sets kinds.",
            stacklevel=3,
        )


def place_of(table: Table, name: Any) -> int:
    """The number of a column that ``given`` names."""
    names = [column.name for column in table.coding.columns]
    known = f"x{name}" if isinstance(name, int | np.integer) else str(name)
    if known not in names:
        raise ValueError(f"given names the column {name!r}; there are {', '.join(names)}.")
    return names.index(known)


def given_rows(table: Table, n: int, given: Mapping[Any, Any]) -> np.ndarray:
    """Rows ``(n, D)`` with the given values, one or n of each, and NaN elsewhere."""
    columns = table.coding.columns
    numbers, words = np.full((n, len(columns)), np.nan), dict[int, tuple[Any, ...]]()
    for name, value in given.items():
        place, each = place_of(table, name), np.empty(n, dtype=object)
        each[:] = value if np.ndim(value) else [value] * n
        numbers[:, place], found = numbers_and_words(str(name), each)
        words |= {} if found is None else {place: found}
    return table.coding.places_of(Values(numbers, tuple(column.name for column in columns), words))


def framed(density: Any, values: np.ndarray, index: Any = None) -> Any:
    """The values as they are, or as a DataFrame (rows) or Series (scores) of pandas after ``set_output``.

    Args:
        density: the estimator.
        values: rows ``(n, D)``, or scores ``(n,)``.
        index: of the rows.
    """
    chosen = _get_output_config("transform", density)["dense"]
    if chosen == "default":
        return values
    if chosen != "pandas":
        raise ValueError(f"set_output(transform={chosen!r}): rows are given as arrays ('default') or by 'pandas'.")
    import pandas as pd  # type: ignore[import-untyped]

    if values.ndim == 1:
        return pd.Series(values, index=index, name="log_p")
    names = getattr(density, "feature_names_in_", [column.name for column in density.columns_])
    return pd.DataFrame(values, index=index, columns=names).infer_objects()


def index_of(X: Any) -> Any:
    """The index of a DataFrame of pandas; None of anything else."""
    return getattr(X, "index", None) if hasattr(X, "iloc") else None


def unit_of(columns: Sequence[Column]) -> str:
    """What a score is, in words."""
    kinds = {
        "density": [column.name for column in columns if column.features and column.width is None],
        "probability": [column.name for column in columns if column.is_probability],
    }
    return ", ".join(f"{word} of {', '.join(names)}" for word, names in kinds.items() if names) + "; nats"
