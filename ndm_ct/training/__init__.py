"""Training: ``fit`` and its result."""

from ndm_ct.training.fit import FitResult, fit
from ndm_ct.training.settings import PRECISIONS

__all__ = ["PRECISIONS", "FitResult", "fit"]
