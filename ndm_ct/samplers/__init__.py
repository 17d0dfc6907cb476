"""Samplers: from the prior down a time grid, one step at a time.

Each is a class with ``.step(z, t, s)``, built as ``Sampler(model, ...)``; ``sample(method=...)`` takes one of these
names, or such a class (with ``functools.partial`` for options).

======================  =======================================================  ============  =======================
name                    class                                                    order         evaluations of N steps
======================  =======================================================  ============  =======================
``"euler"``             ``RungeKutta``, probability flow in t                    1             N
``"midpoint"``                                                                   2             2N
``"heun"``                                                                       2             2N
``"rk4"``                                                                        4             4N
``"edm"``               ``EDM``, Heun in sigma/alpha                             2             2N
``"ddim"``              ``DDIM``                                                 1             N
``"deis1", ... 3``      ``DEIS``, tAB-1 to 3                                     2, 3, 4       N
``"dpmpp_2s"``          ``DPMSolverPPSingle``                                    2             2N
``"dpmpp_2m", "_3m"``   ``DPMSolverPP``                                          2, 3          N
``"unipc", "unipc3"``   ``UniPC`` of order 2 and 3                               3, 4          N
``"pndm"``              ``PNDM``, pseudo Runge-Kutta at the start                2             N + 9
``"ipndm"``             ``PNDM`` without                                         2             N
``"ddpm"``              ``DDPM`` at the model's volatility                       1 (weak)      N
``"ddpm_small"``        ``DDPM`` at volatility one                               1             N
``"ddpm_large"``        ``DDPM``, large variance                                 1             N
``"ddpm_analytic"``     ``DDPM``, optimal variance from measured residuals       1             N
``"euler_ancestral"``   ``DDIM`` with eta = 1                                    1             N
``"dpmpp_2m_sde"``      ``DPMSolverPPSDE``                                       2             N
``"edm_churn"``         ``EDM`` with churn 40, for F the identity                2             2N
``"euler_maruyama"``    ``SDE``                                                  1             N
``"sde"``               ``SDE``, stochastic Heun                                 2             2N
``"srk"``               ``SDE``, stochastic Runge-Kutta for additive noise       2             2N
``"langevin"``          ``AnnealedLangevin``, five steps at every level          bias left     5N
``"pc"``                ``PredictorCorrector``, "ddpm" and one Langevin step     bias left     2N
``"map"``               ``FlowMap``, steps of a flow map alone                   the map's     N
======================  =======================================================  ============  =======================

``"sde"`` without a grid is :mod:`ndm_ct.samplers.adaptive`. Orders are measured by the tests on exactly solvable
models. Where alpha(1) = 0 the first step of a method in the noise level is of first order and takes one
evaluation ("langevin" takes one more there). Langevin steps keep a bias of the order of their size however many steps
the grid has.
"""

from collections.abc import Callable
from functools import partial

from ndm_ct._core.noise import normal_like
from ndm_ct.model import NDM
from ndm_ct.samplers.base import Sampler
from ndm_ct.samplers.deployed import FixedGrid
from ndm_ct.samplers.exponential import DPMSolverPP, DPMSolverPPSDE, DPMSolverPPSingle
from ndm_ct.samplers.frozen import DDIM, DDPM
from ndm_ct.samplers.langevin import AnnealedLangevin, PredictorCorrector
from ndm_ct.samplers.maps import FlowMap
from ndm_ct.samplers.multistep import DEIS, PNDM, UniPC
from ndm_ct.samplers.runge_kutta import EDM, RungeKutta
from ndm_ct.samplers.stochastic import SDE

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "EDM",
    "NAMES",
    "PNDM",
    "SDE",
    "AnnealedLangevin",
    "DPMSolverPP",
    "DPMSolverPPSDE",
    "DPMSolverPPSingle",
    "FixedGrid",
    "FlowMap",
    "PredictorCorrector",
    "RungeKutta",
    "Sampler",
    "UniPC",
    "normal_like",
]

NAMES: dict[str, Callable[[NDM], Sampler]] = {
    "euler": partial(RungeKutta, method="euler"),
    "midpoint": partial(RungeKutta, method="midpoint"),
    "heun": partial(RungeKutta, method="heun"),
    "rk4": partial(RungeKutta, method="rk4"),
    "edm": EDM,
    "ddim": DDIM,
    "deis1": partial(DEIS, order=2),
    "deis2": partial(DEIS, order=3),
    "deis3": partial(DEIS, order=4),
    "dpmpp_2s": DPMSolverPPSingle,
    "dpmpp_2m": partial(DPMSolverPP, order=2),
    "dpmpp_3m": partial(DPMSolverPP, order=3),
    "unipc": partial(UniPC, order=2),
    "unipc3": partial(UniPC, order=3),
    "pndm": PNDM,
    "ipndm": partial(PNDM, warmup=False),
    "ddpm": DDPM,
    "ddpm_small": partial(DDPM, variance="small"),
    "ddpm_large": partial(DDPM, variance="large"),
    "ddpm_analytic": partial(DDPM, variance="analytic"),
    "euler_ancestral": partial(DDIM, eta=1.0),
    "dpmpp_2m_sde": DPMSolverPPSDE,
    "edm_churn": partial(EDM, churn=40.0),
    "euler_maruyama": partial(SDE, method="euler"),
    "sde": partial(SDE, method="heun"),
    "srk": partial(SDE, method="srk"),
    "langevin": AnnealedLangevin,
    "pc": PredictorCorrector,
    "map": FlowMap,
}
"""Samplers by name."""
