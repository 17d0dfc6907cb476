"""Exact models, whose density is known: to check a solver, a protocol, a device or a precision.

:class:`Gaussian` and :class:`GaussianMixture` are models of real-valued data, :class:`Chain` of integers.
"""

from ndm_ct.reference.chain import Chain
from ndm_ct.reference.mixtures import Gaussian, GaussianMixture

__all__ = ["Chain", "Gaussian", "GaussianMixture"]
