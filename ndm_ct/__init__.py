"""Continuous-time generative models with a learnable forward process: likelihoods with error bars, and samplers."""

from ndm_ct import divergence, reference, schedules, solvers, transforms
from ndm_ct._errors import CheckpointError, PredictorError, SolverError
from ndm_ct.likelihood import LikelihoodInfo, decode, encode, loglik
from ndm_ct.model import NDM

__all__ = [
    "NDM",
    "CheckpointError",
    "LikelihoodInfo",
    "PredictorError",
    "SolverError",
    "decode",
    "divergence",
    "encode",
    "loglik",
    "reference",
    "schedules",
    "solvers",
    "transforms",
]
