"""Means over data sets with standard errors: ``evaluate`` a model, ``compare`` two."""

from ndm_ct.evaluation.api import Comparison, Evaluation, compare, evaluate

__all__ = ["Comparison", "Evaluation", "compare", "evaluate"]
