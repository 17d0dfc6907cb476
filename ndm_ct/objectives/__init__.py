"""What is minimised: bound, regressions, straight paths, couplings, distillation; and where times are drawn."""

from ndm_ct.objectives.bound import (
    Bound,
    ElboInfo,
    elbo,
    elbo_discrete,
    loss,
)
from ndm_ct.objectives.coupled import COUPLINGS, Coupled, couple
from ndm_ct.objectives.distillation import Distillation
from ndm_ct.objectives.regression import Regression
from ndm_ct.objectives.straight import Straight, acceleration, curvature
from ndm_ct.objectives.terms import diffusion_integrand, prior_term, reconstruction_term, times, transition_kl
from ndm_ct.objectives.time_samplers import LearnedBuckets, LossHistory, TimeSampler, low_discrepancy

__all__ = [
    "COUPLINGS",
    "Bound",
    "Coupled",
    "Distillation",
    "ElboInfo",
    "LearnedBuckets",
    "LossHistory",
    "Regression",
    "Straight",
    "TimeSampler",
    "acceleration",
    "couple",
    "curvature",
    "diffusion_integrand",
    "elbo",
    "elbo_discrete",
    "loss",
    "low_discrepancy",
    "prior_term",
    "reconstruction_term",
    "times",
    "transition_kl",
]
