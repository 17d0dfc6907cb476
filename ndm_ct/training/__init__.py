"""Training: ``fit`` and its result."""

from ndm_ct.training.fit import FitResult, fit

__all__ = ["FitResult", "fit"]
