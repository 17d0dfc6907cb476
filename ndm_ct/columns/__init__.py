"""Columns of tables: what their values are, and the map that takes their scales, peaks and tails away."""

from ndm_ct.columns.marginals import Chain, ColumnMap, fit_column_map
from ndm_ct.columns.noise import gamma_of
from ndm_ct.columns.repeats import is_repeating, repeated_values

__all__ = ["MARGINALS", "Chain", "ColumnMap", "fit_column_map", "gamma_of", "is_repeating", "repeated_values"]

MARGINALS = ("spline", "linear")
"""What a table's columns go through before the model: a map of their quantiles, or a change of unit alone."""
