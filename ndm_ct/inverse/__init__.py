"""Inverse problems: samples of x given an observation y of it, and the evidence p(y); variations of given data.

:func:`posterior` observes by a function or a mask. :func:`vary` noises data in part and denoises them again.
"""

from ndm_ct.inverse.posterior import METHODS, PosteriorInfo, posterior
from ndm_ct.inverse.vary import vary

__all__ = ["METHODS", "PosteriorInfo", "posterior", "vary"]
