"""The discrete-time view: DDPM, DDIM and the bound over discrete steps."""

from ndm_ct.objectives.bound import elbo_discrete
from ndm_ct.samplers.frozen import DDIM, DDPM, VARIANCES, Residuals, estimate_residuals
from ndm_ct.storage.models import load_residuals

__all__ = ["DDIM", "DDPM", "VARIANCES", "Residuals", "elbo_discrete", "estimate_residuals", "load_residuals"]
