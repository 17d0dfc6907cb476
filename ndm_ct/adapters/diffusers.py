r"""Networks of diffusers with the schedulers they were trained by.

The scheduler's configuration says what the network estimates, and on which table:

==========================================  =========================================================================
schedulers with ``alphas_cumprod``          ``prediction_type`` epsilon, v_prediction or sample;
(DDPM, DDIM, PNDM, DPM-Solver, UniPC, LMS,  :math:`z = \alpha x + \sigma\epsilon` with :math:`\alpha_k^2` from the
Heun, Euler, ancestral Euler, DEIS)         table, whatever coordinates the scheduler itself steps in
``FlowMatch...``                            :math:`\epsilon - x` at 1000 t, :math:`z = (1 - t) x + t\epsilon`; a shift
                                            moves steps of sampling and changes nothing here
==========================================  =========================================================================

Options of sampling (thresholding, clipping, spacing of timesteps) are the scheduler's own and no part of the model.
Pipelines that decode latents with an autoencoder have their model over the latents: so are its likelihoods.

References:
    von Platen et al., Diffusers, https://github.com/huggingface/diffusers
    Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed (zero terminal SNR),
    https://arxiv.org/abs/2305.08891
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ndm_ct.adapters.networks import OnTable, from_velocity
from ndm_ct.model import NDM
from ndm_ct.schedules.fixed import Tabulated

__all__ = ["from_diffusers"]

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x"}
"""``prediction_type`` of diffusers, and ``prediction`` of :class:`~ndm_ct.NDM`."""

LEAST_ALPHA_SQUARED = 2.0**-24
"""In place of the zero at the end of a table rescaled to zero terminal SNR, as diffusers' own Euler scheduler does it;
or half of the entry before, where that is less."""


class Called(nn.Module):
    """A network of diffusers as a function ``(z, timestep, **cond)``: its output's ``sample``, without variances.

    Args:
        net: with ``timestep=`` among its arguments; returns an object with ``sample``, ``(B, C, H, W)``, or with 2C
            channels, of which the second half is a learned variance.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, z: Tensor, timestep: Tensor, /, **cond: Any) -> Tensor:
        """Shape of z."""
        output = self.net(z, timestep=timestep, **cond).sample
        return output[:, : z.shape[1]] if output.shape[1] == 2 * z.shape[1] else output


def from_diffusers(
    net: nn.Module, scheduler: Any, event_shape: Sequence[int] | None = None, *, nearest: bool = False
) -> NDM:
    r"""A network of diffusers.

    Args:
        net: a ``UNet2DModel``, ``UNet2DConditionModel``, ``DiTTransformer2DModel`` or any other that is called with
            ``timestep=`` and returns ``sample``. What else it takes (``encoder_hidden_states``, ``class_labels``) are
            the keywords of ``loglik(model, x, ...)`` and of the other functions, one row per event.
        scheduler: the scheduler it was trained with, or any made from that one's configuration.
        event_shape: (C, H, W); None is what the network's configuration says.
        nearest: round timesteps to integers, see :class:`~ndm_ct.adapters.networks.OnTable`.

    Returns:
        A model in the units of the network: images from -1 to 1 in most pipelines of pixels.

    Raises:
        TypeError: no table and no flow matching: the scheduler is not one of those above.
        ValueError: a ``prediction_type`` that is not in the table above, or the network does not say its size.

    Example:
        >>> from diffusers import DDPMScheduler, UNet2DModel  # doctest: +SKIP
        >>> model = from_diffusers(UNet2DModel.from_pretrained(folder), DDPMScheduler())  # doctest: +SKIP
        >>> ndm_ct.bits_per_dim(model, images)  # doctest: +SKIP
    """
    event = _event_shape(net) if event_shape is None else tuple(event_shape)
    name = type(scheduler).__name__
    if name.startswith("FlowMatch"):
        scale = float(scheduler.config.num_train_timesteps)
        return from_velocity(Called(net), event, data_at=0, time_scale=scale)
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise TypeError(
            f"scheduler {name} has neither alphas_cumprod nor a name that begins with FlowMatch; for networks of EDM "
            "wrap network and preconditioning in one function of (z, sigma) and use from_denoiser."
        )
    kind = scheduler.config.prediction_type
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction_type of {name} is {kind!r}, expected one of {', '.join(PREDICTIONS)}.")
    schedule = Tabulated(_positive(torch.as_tensor(table)))
    predictor = OnTable(Called(net), len(schedule.alphas_cumprod), nearest)
    return NDM(predictor, event, schedule=schedule, prediction=PREDICTIONS[kind])


def _positive(table: Tensor) -> Tensor:
    table = table.detach().double().cpu().clone()
    table[-1] = table[-1].clamp_min(min(LEAST_ALPHA_SQUARED, 0.5 * float(table[-2])))
    return table


def _event_shape(net: nn.Module) -> tuple[int, ...]:
    config = getattr(net, "config", None)
    size, channels = getattr(config, "sample_size", None), getattr(config, "in_channels", None)
    if size is None or channels is None:
        raise ValueError(
            f"the configuration of {type(net).__name__} has no in_channels or no sample_size; pass "
            "event_shape=(C, H, W)."
        )
    height, width = (size, size) if isinstance(size, int) else size
    return channels, height, width
