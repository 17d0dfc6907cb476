"""Networks: small ones to begin with (:mod:`~ndm_ct.nn.networks`), and heads for any (:mod:`~ndm_ct.nn.heads`)."""

from ndm_ct.nn.heads import FromScore, FromVelocity, Preconditioned, null_of
from ndm_ct.nn.networks import MLP, TimeEmbedding, UNet

__all__ = ["MLP", "FromScore", "FromVelocity", "Preconditioned", "TimeEmbedding", "UNet", "null_of"]
