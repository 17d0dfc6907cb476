r"""The likelihood :math:`\log p(x)` of the probability flow and its error, and the paths between data and noise."""

from ndm_ct.likelihood.api import decode, encode, loglik
from ndm_ct.likelihood.bits import BitsInfo, bits_per_dim
from ndm_ct.likelihood.budget import LikelihoodInfo

__all__ = ["BitsInfo", "LikelihoodInfo", "bits_per_dim", "decode", "encode", "loglik"]
