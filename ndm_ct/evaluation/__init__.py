"""Means over data sets with standard errors: ``evaluate`` a model, ``compare`` two."""

from ndm_ct.evaluation.api import compare, evaluate
from ndm_ct.evaluation.results import Comparison, Evaluation

__all__ = ["Comparison", "Evaluation", "compare", "evaluate"]
