"""Continuous-time generative models with a learnable forward process: likelihoods with error bars, and samplers."""

from ndm_ct import (
    adapters,
    discrete,
    divergence,
    estimator,
    nn,
    objectives,
    presets,
    quantisation,
    reference,
    samplers,
    schedules,
    solvers,
    transforms,
)  # fmt: skip
from ndm_ct._core.conditioning import shared
from ndm_ct._core.errors import CheckpointError, PredictorError, SolverError
from ndm_ct._core.versions import __version__ as __version__
from ndm_ct.distributions import distribution
from ndm_ct.evaluation.api import Comparison, Evaluation, compare, evaluate
from ndm_ct.guidance import guided
from ndm_ct.likelihood.api import decode, encode, loglik
from ndm_ct.likelihood.bits import BitsInfo, bits_per_dim
from ndm_ct.likelihood.budget import LikelihoodInfo
from ndm_ct.model import NDM
from ndm_ct.objectives.bound import ElboInfo, elbo, loss
from ndm_ct.samplers.sample import SampleInfo, sample
from ndm_ct.storage.models import load, save
from ndm_ct.training.fit import FitResult, fit

__all__ = [
    "NDM",
    "BitsInfo",
    "CheckpointError",
    "Comparison",
    "ElboInfo",
    "Evaluation",
    "FitResult",
    "LikelihoodInfo",
    "PredictorError",
    "SampleInfo",
    "SolverError",
    "adapters",
    "bits_per_dim",
    "compare",
    "decode",
    "discrete",
    "distribution",
    "divergence",
    "elbo",
    "encode",
    "estimator",
    "evaluate",
    "fit",
    "guided",
    "load",
    "loglik",
    "loss",
    "nn",
    "objectives",
    "presets",
    "quantisation",
    "reference",
    "sample",
    "samplers",
    "save",
    "schedules",
    "shared",
    "solvers",
    "transforms",
]
