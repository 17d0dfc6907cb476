"""Training: ``fit``, its result, and what may be called on the way."""

from ndm_ct.training.callbacks import CSV, Callback, Samples, TensorBoard, WandB
from ndm_ct.training.fit import FitResult, fit
from ndm_ct.training.settings import PRECISIONS

__all__ = ["CSV", "PRECISIONS", "Callback", "FitResult", "Samples", "TensorBoard", "WandB", "fit"]
