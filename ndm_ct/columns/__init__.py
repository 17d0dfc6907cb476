"""Columns of tables: what their values are, and the map that takes their scales, peaks and tails away."""

import numpy as np
import torch

from ndm_ct.columns.coding import Coding
from ndm_ct.columns.kinds import KINDS, Column, Values, columns_of, summary
from ndm_ct.columns.marginals import ColumnMap, InTurn, fit_column_map
from ndm_ct.columns.noise import compared, gamma_of
from ndm_ct.columns.parts import OBSERVED, TARGET, UNKNOWN, Categories, TableMap, TableNet
from ndm_ct.columns.reading import masked_to_nan, numbers_and_words, values_in
from ndm_ct.columns.repeats import ROWS_LOOKED_AT, is_repeating, repeated_values
from ndm_ct.columns.table import SAMPLES, Table, draw_noise

__all__ = [
    "KINDS", "MARGINALS", "OBSERVED", "ROWS_LOOKED_AT", "SAMPLES", "TARGET", "UNKNOWN", "Categories", "Coding",
    "Column", "ColumnMap", "InTurn", "Table", "TableMap", "TableNet", "Values", "columns_of", "draw_noise",
    "fit_column_map", "fit_table", "gamma_of", "is_repeating", "masked_to_nan", "numbers_and_words", "repeated_values",
    "summary", "values_in",
]  # fmt: skip

MARGINALS = ("spline", "linear")
"""What a table's columns go through before the model: a map of their quantiles, or a change of unit alone."""


def fit_table(rows: np.ndarray, marginals: str, gamma_min: float | None) -> tuple[ColumnMap | None, float]:
    """The map of a table's columns, and the noise at t = 0 of the mapped rows.

    Args:
        rows: standardised rows ``(N, d)``.
        marginals: a name of ``MARGINALS``; there is no map for "linear".
        gamma_min: the noise, if it is given; None chooses it from the rows.
    """
    column_map = fit_column_map(rows, is_repeating(rows)) if marginals == "spline" else None
    if gamma_min is not None:
        return column_map, gamma_min
    y = compared(torch.from_numpy(rows)).double()
    return column_map, gamma_of(y if column_map is None else column_map(y)[0])
