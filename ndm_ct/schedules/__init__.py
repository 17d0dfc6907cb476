r"""Noise schedules :math:`\alpha_t, \sigma_t, \gamma(t)`, fixed and learned, and volatilities :math:`\eta(t)`."""

from ndm_ct.schedules.base import Coefficients, Level, Schedule
from ndm_ct.schedules.fixed import (
    Cosine,
    LearnedLogSNR,
    LinearLogSNR,
    Rectified,
    StraightToNoise,
    SubVariancePreserving,
    Tabulated,
    Trigonometric,
    VarianceExploding,
    VariancePreserving,
)
from ndm_ct.schedules.given import FromFunctions, FromLogSNR
from ndm_ct.schedules.volatility import LearnedVolatility, Matched

__all__ = [
    "Coefficients",
    "Cosine",
    "FromFunctions",
    "FromLogSNR",
    "LearnedLogSNR",
    "LearnedVolatility",
    "Level",
    "LinearLogSNR",
    "Matched",
    "Rectified",
    "Schedule",
    "StraightToNoise",
    "SubVariancePreserving",
    "Tabulated",
    "Trigonometric",
    "VarianceExploding",
    "VariancePreserving",
]
