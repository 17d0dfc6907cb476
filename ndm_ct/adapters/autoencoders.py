r"""Autoencoders of latent pipelines as the encoder and decoder of a model.

A network was trained on latents that were shifted and scaled, :math:`y = (e - m)\,s`. The autoencoder's normal
gives e, its configuration m and s:

.. math::
    q(y \mid x) = N\bigl((\mu(x) - m)\,s,\ (\sigma(x)\,s)^2\bigr), \qquad
    p(x \mid y) = N\bigl(\mathrm{dec}(y/s + m),\ r^2 I\bigr) .

References:
    Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, https://arxiv.org/abs/2112.10752
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from ndm_ct._core.checks import validate_positive
from ndm_ct.transforms import Encoder

__all__ = ["latent_transform"]


class _OfAutoencoder(nn.Module):
    """An autoencoder with the shift m and the scale s of its latents.

    Args:
        vae: with ``encode``, ``decode`` and a configuration.
    """

    vae: Any

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def _place(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """m and s, to broadcast over latents ``(B, C, *)``."""
        config: Any = self.vae.config
        mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        scale = torch.as_tensor(getattr(config, "scaling_factor", None) or 1.0, dtype=y.dtype, device=y.device)
        shift = torch.as_tensor(getattr(config, "shift_factor", None) or 0.0, dtype=y.dtype, device=y.device)
        if mean is not None and std is not None:
            axes = (-1, *(1,) * (y.ndim - 2))
            shift = torch.as_tensor(mean, dtype=y.dtype, device=y.device).reshape(axes)
            scale = scale / torch.as_tensor(std, dtype=y.dtype, device=y.device).reshape(axes)
        return shift, scale


class AutoencoderEncoder(_OfAutoencoder):
    """An autoencoder's distribution of latents, as the network was trained on them."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images to mean and log standard deviation of the latents, each ``(B, *E)``."""
        found = self.vae.encode(x).latent_dist
        shift, scale = self._place(found.mean)
        return (found.mean - shift) * scale, 0.5 * found.logvar + scale.log()


class AutoencoderDecoder(_OfAutoencoder):
    """An autoencoder's image, with a normal around it.

    Args:
        vae: the autoencoder.
        std: r, standard deviation of a pixel.
    """

    def __init__(self, vae: nn.Module, std: float) -> None:
        super().__init__(vae)
        self.std = std

    def forward(self, y: Tensor) -> Distribution:
        """The distribution of images given latents ``(B, *E)``."""
        shift, scale = self._place(y)
        image = self.vae.decode(y / scale + shift).sample
        return Independent(Normal(image, torch.full_like(image, self.std), validate_args=False), image.ndim - 1)


def latent_transform(vae: nn.Module, event_shape: tuple[int, ...], std: float) -> Encoder:
    """The transform of a latent pipeline.

    Args:
        vae: an autoencoder of diffusers whose encoder returns a normal (``latent_dist``).
        event_shape: E, the shape of the latents.
        std: standard deviation of a pixel around the decoder's image.

    Raises:
        TypeError: it does not encode, decode, or say the scale of its latents.
        ValueError: it does not take latents of this shape, or the standard deviation is not positive.
    """
    validate_positive("decoder_std", std)
    config = getattr(vae, "config", None)
    if not (hasattr(vae, "encode") and hasattr(vae, "decode") and config is not None) or type(vae).__name__ in (
        "AutoencoderTiny", "VQModel",
    ):  # fmt: skip
        raise TypeError(
            f"vae must be an autoencoder with a normal distribution of latents, such as AutoencoderKL, got a "
            f"{type(vae).__name__}."
        )
    decoder = AutoencoderDecoder(vae, float(std))
    parameter = next(vae.parameters())
    was_training = vae.training
    try:
        with torch.no_grad():
            image = decoder(parameter.new_zeros(1, *event_shape)).mean
    except RuntimeError as error:
        raise ValueError(
            f"vae does not decode latents of shape {event_shape} ({error}); pass its event_shape=."
        ) from error
    finally:
        vae.train(was_training)
    return Encoder(AutoencoderEncoder(vae), decoder, image.shape[1:])
