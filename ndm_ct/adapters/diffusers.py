r"""Networks of diffusers with the schedulers they were trained by, and with the autoencoder of latent pipelines.

The scheduler's configuration says what the network estimates, and on which table:

==========================================  =========================================================================
schedulers with ``alphas_cumprod``          ``prediction_type`` epsilon, v_prediction or sample;
(DDPM, DDIM, PNDM, DPM-Solver, UniPC, LMS,  :math:`z = \alpha x + \sigma\epsilon` with :math:`\alpha_k^2` from the
Heun, Euler, ancestral Euler, DEIS)         table, whatever coordinates the scheduler itself steps in
the same with ``flow_prediction`` and       as ``FlowMatch...``
``use_flow_sigmas``
Euler with ``timestep_type="continuous"``,  the same :math:`\hat v` at :math:`\tfrac14 \log(\sigma/\alpha)`, from
v_prediction (Stable Video Diffusion)       ``sigma_min`` to ``sigma_max`` where the configuration has them
``FlowMatch...``                            :math:`\epsilon - x` at 1000 t, :math:`z = (1 - t) x + t\epsilon`; with
                                            ``invert_sigmas`` :math:`x - \epsilon` at 1000 (1 - t). A shift moves
                                            steps of sampling and changes nothing here
==========================================  =========================================================================

With flow matching some networks of diffusers count in other units than their scheduler, which their pipelines convert
(:mod:`ndm_ct.adapters.clocks`). Networks of diffusers whose unit is not known there are refused, unless it is given.
Networks of other classes get the scheduler's.

Schedulers of distilled networks (LCM, TCD, consistency models) are refused: such a network maps noise to data, and
does not estimate the denoiser at every time.

Options of sampling (thresholding, clipping, spacing of timesteps) are the scheduler's own and no part of the model.
Pipelines that decode latents with an autoencoder have their model over the latents: so are its likelihoods. With
``vae=`` the model is one of pixels, :math:`p(x) = \int p(x \mid y) p(y) dy`, with samples in pixels and a bound.

References:
    von Platen et al., Diffusers, https://github.com/huggingface/diffusers
    Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed (zero terminal SNR),
    https://arxiv.org/abs/2305.08891
    Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, https://arxiv.org/abs/2112.10752
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ndm_ct._core.parallel import unwrapped
from ndm_ct._core.precision import run_for_tensor
from ndm_ct.adapters.autoencoders import latent_transform
from ndm_ct.adapters.clocks import Clock, clock_of
from ndm_ct.adapters.networks import OnTable, adapted, from_velocity, tabulated, without_variance
from ndm_ct.model import NDM
from ndm_ct.nn.heads import Wrapper
from ndm_ct.schedules.base import Schedule
from ndm_ct.schedules.fixed import LinearLogSNR

__all__ = ["from_diffusers"]

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x"}
"""``prediction_type`` of diffusers, and ``prediction`` of :class:`~ndm_ct.NDM`."""

DISTILLED = ("LCM", "TCD", "CMStochasticIterative", "SCM", "FlowMatchLCM", "FlowMap", "ConsistencyDecoder", "HeliosDMD")
"""Beginnings of the names of schedulers whose networks are no denoisers."""


class LogNoiseTime(Wrapper):
    r"""A network that takes :math:`\tfrac14 \log(\sigma/\alpha)` in place of t.

    Args:
        net: ``net(z, c, **cond)``, c of shape ``(B,)``.
    """

    wants_schedule = True

    def forward(self, z: Tensor, t: Tensor, schedule: Schedule, /, **cond: Any) -> Tensor:
        """The network's output at state z ``(B, *E)`` and time t ``(B,)`` under a schedule."""
        return run_for_tensor(self.net, z, (0.125 * schedule.gamma(t.double())).to(z.dtype), **cond)


class Called(nn.Module):
    """A network of diffusers as a function ``(z, timestep, **cond)``: its output's ``sample``, without variances.

    Args:
        net: with ``timestep=``, ``timesteps=`` or ``t=`` among its arguments; returns an object with ``sample``,
            ``(B, C, *)``, or with 2C channels, of which the second half is a learned variance. A network that takes
            lists of images and of captions (Z-Image) gets them row by row. One that embeds the end of a step too,
            ``timestep_r=``, gets the same time: the velocity of an instant.
        offset: added to the time.
    """

    def __init__(self, net: nn.Module, offset: float = 0.0) -> None:
        super().__init__()
        self.net, self.offset = net, offset
        names = inspect.signature(net.forward).parameters
        self.time = next((name for name in ("timestep", "timesteps", "t") if name in names), "timestep")
        self.lists, self.embeds_guidance = "cap_feats" in names, "guidance" in names
        self.times = (self.time, *(("timestep_r",) if "timestep_r" in names else ()))
        self.others = frozenset(list(names)[1:]) - {*self.times, "return_dict", "kwargs"}

    def cond_names(self) -> tuple[frozenset[str], bool]:
        """What the network takes besides state and time, and whether it takes anything else."""
        added = {"extra_channels", *(("guidance_scale",) if self.embeds_guidance else ())}
        return self.others | added, not self.others

    def forward(self, z: Tensor, timestep: Tensor, /, extra_channels: Tensor | None = None, **cond: Any) -> Tensor:
        """Shape of z ``(B, C, *)``; ``extra_channels`` ``(B, K, *)`` are put behind those of z.

        The guidance that a network takes as an embedding is called ``guidance_scale``, as by its pipeline.
        """
        if self.embeds_guidance and "guidance_scale" in cond:
            cond["guidance"] = cond.pop("guidance_scale")
        inputs: Any = z if extra_channels is None else torch.cat([z, extra_channels], 1)
        if self.lists:
            inputs = list(inputs.unsqueeze(2).unbind())
            cond = {name: list(each.unbind()) if isinstance(each, Tensor) else each for name, each in cond.items()}
        timestep = timestep + self.offset if self.offset else timestep
        output = self.net(inputs, **dict.fromkeys(self.times, timestep), **cond)
        sample = output[0] if isinstance(output, tuple) else output.sample
        if self.lists:
            sample = torch.stack(list(sample)).squeeze(2)
        return without_variance(sample, z)


def from_diffusers(
    net: nn.Module,
    scheduler: Any,
    event_shape: Sequence[int] | None = None,
    *,
    nearest: bool = False,
    time_scale: float | None = None,
    data_at: int | None = None,
    sign: int | None = None,
    vae: nn.Module | None = None,
    decoder_std: float | None = None,
) -> NDM:
    r"""A network of diffusers.

    Args:
        net: a ``UNet2DModel``, ``UNet2DConditionModel``, ``DiTTransformer2DModel`` or any other that is called with
            ``timestep=`` and returns ``sample``. What else it takes (``encoder_hidden_states``, ``class_labels``) are
            the keywords of ``loglik(model, x, ...)`` and of the other functions, one row per event. A network with more
            input than output channels (inpainting) gets the others as ``extra_channels=``. One that embeds a guidance
            gets it as ``guidance_scale=``.
        scheduler: the scheduler it was trained with, or any made from that one's configuration.
        event_shape: shape of one state, (C, H, W) for images; None is what the network's configuration says.
        nearest: round timesteps to integers, see :class:`~ndm_ct.adapters.networks.OnTable`.
        time_scale: for flow matching, the network's time at its end that is not zero; None is what is known of its
            class. A network of a class that is not known needs it.
        data_at: for flow matching, whether the network's time at data is 0 or 1 times ``time_scale``.
        sign: for flow matching, 1 or -1: the network estimates this times :math:`\epsilon - x`; None is 1 for data at 0
            and -1 for data at 1.
        vae: an ``AutoencoderKL`` of a latent pipeline: the model is then one of its images, in their units (-1 to 1).
        decoder_std: with ``vae``, the standard deviation r of a pixel around the decoder's image,
            :math:`p(x \mid y) = N(\mathrm{dec}(y), r^2 I)`. The autoencoder does not say it; None is 0.1. The bound is
            best where r is the root mean square error of its reconstructions.

    Returns:
        A model in the units of the network: images from -1 to 1 in most pipelines of pixels.

    Raises:
        TypeError: no table and no flow matching: the scheduler is not one of those above; or it is one of distilled
            networks.
        ValueError: a ``prediction_type`` that is not in the table above; a table of zero terminal SNR with epsilon; the
            network does not say its size; its unit of time is unknown; or an option is given that has no effect: a unit
            with a table, ``nearest`` with flow matching, ``decoder_std`` without ``vae``.

    Example:
        >>> from diffusers import DDPMScheduler, UNet2DModel  # doctest: +SKIP
        >>> model = from_diffusers(UNet2DModel.from_pretrained(folder), DDPMScheduler())  # doctest: +SKIP
        >>> bins = ndm_ct.quantisation.Quantisation(256, centres=(-1.0, 1.0))  # doctest: +SKIP
        >>> ndm_ct.bits_per_dim(model, images, quantisation=bins)  # doctest: +SKIP
    """
    net = unwrapped(net)
    event = _event_shape(net) if event_shape is None else tuple(event_shape)
    name, kind = type(scheduler).__name__, getattr(scheduler.config, "prediction_type", None)
    if name.startswith(DISTILLED):
        raise TypeError(
            f"{name} belongs to a distilled network, which is no denoiser at every time and has no density of its own; "
            "use the network that it was distilled from, with that one's scheduler."
        )
    if vae is None and decoder_std is not None:
        raise ValueError(
            "decoder_std is the spread of pixels around an autoencoder's images, but vae is None; drop it."
        )
    transform = None if vae is None else latent_transform(vae, event, 0.1 if decoder_std is None else decoder_std)
    flow = name.startswith("FlowMatch") or (kind == "flow_prediction" and bool(scheduler.config.use_flow_sigmas))
    clock = _given_clock(time_scale, data_at, sign)
    if flow:
        if nearest:
            raise ValueError(f"nearest=True rounds indices of a table, but {name} is of flow matching; drop it.")
        clock = clock_of(net, scheduler, clock)
        return from_velocity(
            Called(net, clock.offset), event, data_at=clock.data_at, time_scale=clock.scale or 1.0, sign=clock.sign,
            transform=transform,
        )  # fmt: skip
    if clock is not None:
        raise ValueError(
            f"time_scale, data_at and sign are for flow matching, but {name} has a table of timesteps; drop them, or "
            "pass the scheduler of flow matching that the network was trained with."
        )
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise TypeError(
            f"scheduler {name} has neither alphas_cumprod nor a name that begins with FlowMatch; for networks of EDM "
            "wrap network and preconditioning in one function of (z, sigma) and use from_denoiser."
        )
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction_type of {name} is {kind!r}, expected one of {', '.join(PREDICTIONS)}.")
    schedule: Schedule = tabulated(table, PREDICTIONS[kind])
    predictor: nn.Module = OnTable(Called(net), len(table), nearest)
    if kind == "v_prediction" and getattr(scheduler.config, "timestep_type", "discrete") == "continuous":
        schedule, predictor = _continuous(schedule, scheduler.config), LogNoiseTime(Called(net))
    return adapted(predictor, event, schedule=schedule, prediction=PREDICTIONS[kind], transform=transform)


def _given_clock(time_scale: float | None, data_at: int | None, sign: int | None) -> Clock | None:
    """What the caller says of the network's time; None if nothing."""
    if time_scale is None and data_at is None and sign is None:
        return None
    at = 0 if data_at is None else data_at
    return Clock(at, time_scale, (-1 if at == 1 else 1) if sign is None else sign)


def _continuous(schedule: Schedule, config: Any) -> LinearLogSNR:
    """From the scheduler's least noise to its most, or the table's where it does not say."""
    table = schedule.gamma(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    given = (getattr(config, name, None) for name in ("sigma_min", "sigma_max"))
    low, high = (gamma if sigma is None else 2.0 * math.log(sigma) for sigma, gamma in zip(given, table, strict=True))
    return LinearLogSNR(low, high)


def _event_shape(net: nn.Module) -> tuple[int, ...]:
    """Channels that come out and the sides that the configuration says, for images and for sequences (1D)."""
    name, config = type(net).__name__, getattr(net, "config", None)
    size, channels = getattr(config, "sample_size", None), getattr(config, "in_channels", None)
    if size is None or channels is None or any(word in name for word in ("3D", "Temporal", "Motion", "Video")):
        raise ValueError(
            f"the configuration of {name} has no in_channels or no sample_size of single images; pass "
            "event_shape=(C, H, W), for videos (C, frames, H, W)."
        )
    out = getattr(config, "out_channels", None) or channels
    sides = size if isinstance(size, list | tuple) else (size,) if "1D" in name else (size, size)
    return min(channels, out), *sides
