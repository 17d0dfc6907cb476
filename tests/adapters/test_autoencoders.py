"""Latent pipelines: the autoencoder's part of bound and samples."""

import math

import pytest
import torch

import ndm_ct
from ndm_ct import adapters

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]


def autoencoder(**config):
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=2, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"), **config,
    ).eval()  # fmt: skip


def unet():
    torch.manual_seed(1)
    return diffusers.UNet2DModel(
        sample_size=4, in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


SCHEDULERS = {
    "epsilon": lambda: diffusers.DDPMScheduler(),
    "v": lambda: diffusers.DDPMScheduler(prediction_type="v_prediction"),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_samples_are_pixels_of_the_decoder(name):
    vae, net, scheduler = autoencoder(scaling_factor=0.5, shift_factor=0.2), unet(), SCHEDULERS[name]()
    model = adapters.from_diffusers(net, scheduler, vae=vae)
    assert (model.event_shape, model.data_shape) == ((2, 4, 4), (1, 8, 8))
    x = ndm_ct.sample(model, 2, method="ddim", steps=3, generator=0)
    latents = ndm_ct.sample(adapters.from_diffusers(net, scheduler), 2, method="ddim", steps=3, generator=0)
    with torch.no_grad():
        expected = vae.decode(latents / 0.5 + 0.2).sample
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_the_bound_has_the_decoders_term():
    """The latents' own bound, the decoder's log-density and the encoder's entropy, at the same noise."""
    vae, net = autoencoder(scaling_factor=0.5, shift_factor=0.2), unet()
    model = adapters.from_diffusers(net, diffusers.DDPMScheduler(), vae=vae, decoder_std=0.3)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1.0, 1.0)
    with torch.no_grad():
        y, weight = model.to_latent(x, generator=5)
        found = vae.encode(x).latent_dist
        mean, std = (found.mean - 0.2) * 0.5, 0.5 * found.std
        log_q = torch.distributions.Normal(mean, std).log_prob(y).sum((1, 2, 3))
        image = vae.decode(y / 0.5 + 0.2).sample
        error = (x - image).square().sum((1, 2, 3)) / (2.0 * 0.09)
        log_p = -error - 64.0 * (math.log(0.3) + 0.5 * math.log(2.0 * math.pi))
    torch.testing.assert_close(weight, log_p - log_q, rtol=1e-4, atol=1e-2)
    bound = ndm_ct.elbo(model, x, samples=4, generator=0)
    assert bound.shape == (3,)
    assert bool(bound.isfinite().all())
    with pytest.raises(ValueError, match="elbo"):
        ndm_ct.loglik(model, x)


def test_latents_with_statistics_of_every_channel():
    vae = autoencoder(scaling_factor=0.5, latents_mean=[0.1, -0.2], latents_std=[2.0, 4.0])
    model = adapters.from_diffusers(unet(), diffusers.DDPMScheduler(), vae=vae)
    x = torch.zeros(1, 1, 8, 8)
    with torch.no_grad():
        mean, log_std = model.transform.encoder(x)
        found = vae.encode(x).latent_dist
    shift, spread = (torch.tensor(each).reshape(1, 2, 1, 1) for each in ([0.1, -0.2], [2.0, 4.0]))
    torch.testing.assert_close(mean, (found.mean - shift) * 0.5 / spread)
    torch.testing.assert_close(log_std.exp(), found.std * 0.5 / spread)
    decoded = model.transform.decoder(mean).mean
    torch.testing.assert_close(decoded, vae.decode(found.mean).sample, rtol=1e-4, atol=1e-4)


def test_what_is_no_such_autoencoder_is_refused():
    net, scheduler = unet(), diffusers.DDPMScheduler()
    with pytest.raises(TypeError, match=r"autoencoder with a normal distribution of latents.*Linear"):
        adapters.from_diffusers(net, scheduler, vae=torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="AutoencoderTiny"):
        adapters.from_diffusers(net, scheduler, vae=diffusers.AutoencoderTiny(in_channels=1, out_channels=1))
    with pytest.raises(ValueError, match=r"does not decode latents of shape \(3, 4, 4\)"):
        adapters.from_diffusers(net, scheduler, (3, 4, 4), vae=autoencoder())
    with pytest.raises(ValueError, match="vae is None; drop it"):
        adapters.from_diffusers(net, scheduler, decoder_std=0.1)
    with pytest.raises(ValueError, match="decoder_std"):
        adapters.from_diffusers(net, scheduler, vae=autoencoder(), decoder_std=0.0)
