"""Solvers of ordinary and stochastic differential equations, for any callable field.

================================  ===================  ============================================================
function                          steps                where
================================  ===================  ============================================================
:func:`odeint_rows`               each row its own     :mod:`~ndm_ct.solvers.ode`, method ``"ode"``
:func:`odeint_multistep`          a given grid         :mod:`~ndm_ct.solvers.multistep`
:func:`sdeint_rows`               each row its own     :mod:`~ndm_ct.solvers.sde`, method ``"sde"``
:func:`odeint`                    one for the batch    :mod:`~ndm_ct.solvers.torchdiffeq`, ``"dopri5"`` and others
:func:`sdeint_adaptive`           one for the batch    :mod:`~ndm_ct.solvers.torchsde`, ``"torchsde:srk"`` and others
:func:`sdeint`                    a given grid         the same
================================  ===================  ============================================================
"""

from ndm_ct.solvers.multistep import graded_grid, odeint_multistep
from ndm_ct.solvers.ode import odeint_rows
from ndm_ct.solvers.sde import sdeint_rows
from ndm_ct.solvers.solution import Solution, validate_slope, validate_tolerance
from ndm_ct.solvers.torchdiffeq import ADAPTIVE_METHODS, odeint
from ndm_ct.solvers.torchsde import SDE_METHODS, sdeint, sdeint_adaptive

__all__ = [
    "ADAPTIVE_METHODS",
    "SDE_METHODS",
    "Solution",
    "graded_grid",
    "odeint",
    "odeint_multistep",
    "odeint_rows",
    "sdeint",
    "sdeint_adaptive",
    "sdeint_rows",
    "validate_slope",
    "validate_tolerance",
]
