"""Continuous-time generative models with a learnable forward process: likelihoods with error bars, and samplers.

Names are imported when they are first used, so that the command line answers ``--help`` without loading torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ndm_ct._core.versions import __version__ as __version__

if TYPE_CHECKING:
    from ndm_ct import (
        adapters,
        bridges,
        codec,
        discrete,
        divergence,
        estimator,
        nn,
        objectives,
        plots,
        presets,
        quantisation,
        reference,
        samplers,
        schedules,
        solvers,
        transforms,
    )  # fmt: skip
    from ndm_ct._core.conditioning import shared
    from ndm_ct._core.config import register
    from ndm_ct._core.errors import CheckpointError, PredictorError, SolverError
    from ndm_ct.auditing import Audit, audit
    from ndm_ct.checking import check
    from ndm_ct.distributions import distribution
    from ndm_ct.evaluation.api import Comparison, Evaluation, compare, evaluate
    from ndm_ct.guidance import guided
    from ndm_ct.inverse.posterior import PosteriorInfo, posterior
    from ndm_ct.inverse.vary import vary
    from ndm_ct.likelihood.api import decode, encode, loglik
    from ndm_ct.likelihood.bits import BitsInfo, bits_per_dim
    from ndm_ct.likelihood.budget import LikelihoodInfo
    from ndm_ct.model import NDM
    from ndm_ct.objectives.bound import ElboInfo, elbo, loss
    from ndm_ct.reweighting import Reweighted, reweight
    from ndm_ct.samplers.sample import SampleInfo, sample
    from ndm_ct.storage.models import load, save
    from ndm_ct.training.fit import FitResult, fit

__all__ = [
    "NDM",
    "Audit",
    "BitsInfo",
    "CheckpointError",
    "Comparison",
    "ElboInfo",
    "Evaluation",
    "FitResult",
    "LikelihoodInfo",
    "PosteriorInfo",
    "PredictorError",
    "Reweighted",
    "SampleInfo",
    "SolverError",
    "adapters",
    "audit",
    "bits_per_dim",
    "bridges",
    "check",
    "codec",
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
    "plots",
    "posterior",
    "presets",
    "quantisation",
    "reference",
    "register",
    "reweight",
    "sample",
    "samplers",
    "save",
    "schedules",
    "shared",
    "solvers",
    "transforms",
    "vary",
]

_HOMES = {
    "_core.conditioning": ("shared",),
    "_core.config": ("register",),
    "_core.errors": ("CheckpointError", "PredictorError", "SolverError"),
    "auditing": ("Audit", "audit"),
    "checking": ("check",),
    "distributions": ("distribution",),
    "evaluation.api": ("Comparison", "Evaluation", "compare", "evaluate"),
    "guidance": ("guided",),
    "inverse": ("PosteriorInfo", "posterior", "vary"),
    "likelihood.api": ("decode", "encode", "loglik"),
    "likelihood.bits": ("BitsInfo", "bits_per_dim"),
    "likelihood.budget": ("LikelihoodInfo",),
    "model": ("NDM",),
    "objectives.bound": ("ElboInfo", "elbo", "loss"),
    "reweighting": ("Reweighted", "reweight"),
    "samplers.sample": ("SampleInfo", "sample"),
    "storage.models": ("load", "save"),
    "training.fit": ("FitResult", "fit"),
}
"""Names by the module that defines them. The other public names are modules."""

_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOME_OF.get(name, name)}")
    value = getattr(module, name) if name in _HOME_OF else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
