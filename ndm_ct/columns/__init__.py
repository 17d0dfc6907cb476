"""Columns of tables: what their values are, and the map that takes their scales, peaks and tails away."""

from ndm_ct.columns.coding import Coding
from ndm_ct.columns.diagnosis import (
    COMPARED,
    LEAST_COMPARED,
    Anomalies,
    Diagnosis,
    Difference,
    diagnose,
    hidden_structure,
)
from ndm_ct.columns.kinds import KINDS, Column, Values, columns_of, summary
from ndm_ct.columns.marginals import ColumnMap, InTurn, fit_column_map
from ndm_ct.columns.noise import gamma_of
from ndm_ct.columns.parts import OBSERVED, TARGET, UNKNOWN, Categories, TableMap, TableNet
from ndm_ct.columns.reading import masked_to_nan, numbers_and_words, values_in
from ndm_ct.columns.repeats import ROWS_LOOKED_AT, is_repeating, repeated_values
from ndm_ct.columns.table import SAMPLES, Scored, Table, draw_noise, fit_table, row_generators

__all__ = [
    "COMPARED", "KINDS", "LEAST_COMPARED", "MARGINALS", "OBSERVED", "ROWS_LOOKED_AT", "SAMPLES", "TARGET",
    "UNKNOWN", "Anomalies", "Categories", "Coding", "Column", "ColumnMap", "Diagnosis", "Difference", "InTurn",
    "Scored", "Table", "TableMap", "TableNet", "Values", "columns_of", "diagnose", "draw_noise", "fit_column_map",
    "fit_table", "gamma_of", "hidden_structure", "is_repeating", "masked_to_nan", "numbers_and_words",
    "repeated_values", "row_generators", "summary", "values_in",
]  # fmt: skip

MARGINALS = ("spline", "linear")
"""What a table's columns go through before the model: a map of their quantiles, or a change of unit alone."""
