r"""Noise schedules :math:`\alpha_t, \sigma_t, \gamma(t)`, fixed and learned, and volatilities :math:`\eta(t)`."""

from ndm_ct.schedules.fixed import (
    Coefficients,
    Cosine,
    LearnedLogSNR,
    Level,
    LinearLogSNR,
    Rectified,
    Schedule,
    SubVariancePreserving,
    Tabulated,
    Trigonometric,
    VarianceExploding,
    VariancePreserving,
)
from ndm_ct.schedules.volatility import LearnedVolatility, Matched

__all__ = [
    "Coefficients",
    "Cosine",
    "LearnedLogSNR",
    "LearnedVolatility",
    "Level",
    "LinearLogSNR",
    "Matched",
    "Rectified",
    "Schedule",
    "SubVariancePreserving",
    "Tabulated",
    "Trigonometric",
    "VarianceExploding",
    "VariancePreserving",
]
