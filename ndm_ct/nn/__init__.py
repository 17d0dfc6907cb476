"""Networks: small ones to begin with (:mod:`~ndm_ct.nn.networks`, :mod:`~ndm_ct.nn.transformer`), what they are
conditioned on (:mod:`~ndm_ct.nn.embeddings`), heads for any network (:mod:`~ndm_ct.nn.heads`), and networks between
data and latents (:mod:`~ndm_ct.nn.latent`)."""

from ndm_ct.nn.embeddings import TimeEmbedding
from ndm_ct.nn.heads import FromDenoiser, FromScore, FromVelocity, Mixed, Preconditioned, null_of
from ndm_ct.nn.latent import FromZuko, GaussianDecoder, GaussianEncoder
from ndm_ct.nn.networks import MLP, UNet
from ndm_ct.nn.transformer import DiT

__all__ = [
    "MLP", "DiT", "FromDenoiser", "FromScore", "FromVelocity", "FromZuko", "GaussianDecoder", "GaussianEncoder",
    "Mixed", "Preconditioned", "TimeEmbedding", "UNet", "null_of",
]  # fmt: skip
