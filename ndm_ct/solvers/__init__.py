"""Solvers of ordinary and stochastic differential equations. They work on any callable field."""

from ndm_ct.solvers.backends import (
    ADAPTIVE_METHODS,
    SDE_METHODS,
    Solution,
    odeint,
    sdeint,
    validate_slope,
    validate_tolerance,
)
from ndm_ct.solvers.ode import RowSolution, odeint_rows

__all__ = [
    "ADAPTIVE_METHODS",
    "SDE_METHODS",
    "RowSolution",
    "Solution",
    "odeint",
    "odeint_rows",
    "sdeint",
    "validate_slope",
    "validate_tolerance",
]
