"""Networks: small ones to begin with (:mod:`~ndm_ct.nn.networks`), heads for any (:mod:`~ndm_ct.nn.heads`), and those
between data and latents (:mod:`~ndm_ct.nn.latent`)."""

from ndm_ct.nn.heads import FromDenoiser, FromScore, FromVelocity, Mixed, Preconditioned, null_of
from ndm_ct.nn.latent import FromZuko, GaussianDecoder, GaussianEncoder
from ndm_ct.nn.networks import MLP, TimeEmbedding, UNet

__all__ = [
    "MLP", "FromDenoiser", "FromScore", "FromVelocity", "FromZuko", "GaussianDecoder", "GaussianEncoder", "Mixed",
    "Preconditioned", "TimeEmbedding", "UNet", "null_of",
]  # fmt: skip
