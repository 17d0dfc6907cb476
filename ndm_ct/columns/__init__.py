"""Columns of tables: what their values are."""

from ndm_ct.columns.repeats import repeated_values

__all__ = ["repeated_values"]
