r"""Networks of diffusers with the schedulers they were trained by.

The scheduler's configuration says what the network estimates, and on which table:

==========================================  =========================================================================
schedulers with ``alphas_cumprod``          ``prediction_type`` epsilon, v_prediction or sample;
(DDPM, DDIM, PNDM, DPM-Solver, UniPC, LMS,  :math:`z = \alpha x + \sigma\epsilon` with :math:`\alpha_k^2` from the
Heun, Euler, ancestral Euler, DEIS)         table, whatever coordinates the scheduler itself steps in
Euler with ``timestep_type="continuous"``,  the same :math:`\hat v` at :math:`\tfrac14 \log(\sigma/\alpha)`, from
v_prediction (Stable Video Diffusion)       ``sigma_min`` to ``sigma_max`` where the configuration has them
``FlowMatch...``                            :math:`\epsilon - x` at 1000 t, :math:`z = (1 - t) x + t\epsilon`; with
                                            ``invert_sigmas`` :math:`x - \epsilon` at 1000 (1 - t). A shift moves
                                            steps of sampling and changes nothing here
==========================================  =========================================================================

With flow matching some networks of diffusers count in other units than their scheduler, which their pipelines convert:
those of Flux, Chroma, AuraFlow, Qwen, LongCat and Ovis take t, those of Lumina and Z-Image :math:`1 - t` with the other
sign. Networks of diffusers whose unit is not known here are refused. Networks of other classes get the scheduler's.

Options of sampling (thresholding, clipping, spacing of timesteps) are the scheduler's own and no part of the model.
Pipelines that decode latents with an autoencoder have their model over the latents: so are its likelihoods.

References:
    von Platen et al., Diffusers, https://github.com/huggingface/diffusers
    Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed (zero terminal SNR),
    https://arxiv.org/abs/2305.08891
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ndm_ct.adapters.networks import OnTable, adapted, from_velocity, tabulated
from ndm_ct.model import NDM
from ndm_ct.nn.heads import Wrapper
from ndm_ct.schedules.base import Schedule
from ndm_ct.schedules.fixed import LinearLogSNR

__all__ = ["from_diffusers"]

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x"}
"""``prediction_type`` of diffusers, and ``prediction`` of :class:`~ndm_ct.NDM`."""

_THOUSAND, _ONE, _REVERSED = (0, None), (0, 1.0), (1, 1.0)
_FLOW_CLOCKS = {
    "UNet1D": _THOUSAND, "UNet2D": _THOUSAND, "UNet2DCondition": _THOUSAND, "UNet3DCondition": _THOUSAND,
    "DiTTransformer2D": _THOUSAND, "Transformer2D": _THOUSAND, "PixArtTransformer2D": _THOUSAND,
    "SD3Transformer2D": _THOUSAND, "CogView4Transformer2D": _THOUSAND, "LTXVideoTransformer3D": _THOUSAND,
    "WanTransformer3D": _THOUSAND, "HunyuanVideoTransformer3D": _THOUSAND, "MochiTransformer3D": _THOUSAND,
    "FluxTransformer2D": _ONE, "Flux2Transformer2D": _ONE, "ChromaTransformer2D": _ONE, "AuraFlowTransformer2D": _ONE,
    "QwenImageTransformer2D": _ONE, "QwenImage21Transformer2D": _ONE, "LongCatImageTransformer2D": _ONE,
    "OvisImageTransformer2D": _ONE, "LuminaNextDiT2D": _REVERSED, "Lumina2Transformer2D": _REVERSED,
    "ZImageTransformer2D": _REVERSED,
}  # fmt: skip
"""Classes of diffusers, without "Model": a network's time at data, 0 or 1 in units of its largest time (with 1 its
velocity has the other sign), and its largest time; None is that of the scheduler."""


class LogNoiseTime(Wrapper):
    r"""A network that takes :math:`\tfrac14 \log(\sigma/\alpha)` in place of t.

    Args:
        net: ``net(z, c, **cond)``, c of shape ``(B,)``.
    """

    wants_schedule = True

    def forward(self, z: Tensor, t: Tensor, schedule: Schedule, /, **cond: Any) -> Tensor:
        """The network's output at state z ``(B, *E)`` and time t ``(B,)`` under a schedule."""
        return self.net(z, (0.125 * schedule.gamma(t.double())).to(z.dtype), **cond)


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
        ValueError: a ``prediction_type`` that is not in the table above; the network does not say its size; or its unit
            of time is unknown.

    Example:
        >>> from diffusers import DDPMScheduler, UNet2DModel  # doctest: +SKIP
        >>> model = from_diffusers(UNet2DModel.from_pretrained(folder), DDPMScheduler())  # doctest: +SKIP
        >>> bins = ndm_ct.quantisation.Quantisation(256, centres=(-1.0, 1.0))  # doctest: +SKIP
        >>> ndm_ct.bits_per_dim(model, images, quantisation=bins)  # doctest: +SKIP
    """
    event = _event_shape(net) if event_shape is None else tuple(event_shape)
    name = type(scheduler).__name__
    if name.startswith("FlowMatch"):
        data_at, scale = _flow_clock(net, scheduler)
        return from_velocity(Called(net), event, data_at=data_at, time_scale=scale)
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise TypeError(
            f"scheduler {name} has neither alphas_cumprod nor a name that begins with FlowMatch; for networks of EDM "
            "wrap network and preconditioning in one function of (z, sigma) and use from_denoiser."
        )
    kind = scheduler.config.prediction_type
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction_type of {name} is {kind!r}, expected one of {', '.join(PREDICTIONS)}.")
    schedule: Schedule = tabulated(table)
    predictor: nn.Module = OnTable(Called(net), len(table), nearest)
    if kind == "v_prediction" and getattr(scheduler.config, "timestep_type", "discrete") == "continuous":
        schedule, predictor = _continuous(schedule, scheduler.config), LogNoiseTime(Called(net))
    return adapted(predictor, event, schedule=schedule, prediction=PREDICTIONS[kind])


def _continuous(schedule: Schedule, config: Any) -> LinearLogSNR:
    """From the scheduler's least noise to its most, or the table's where it does not say."""
    table = schedule.gamma(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    given = (getattr(config, name, None) for name in ("sigma_min", "sigma_max"))
    low, high = (gamma if sigma is None else 2.0 * math.log(sigma) for sigma, gamma in zip(given, table, strict=True))
    return LinearLogSNR(low, high)


def _flow_clock(net: nn.Module, scheduler: Any) -> tuple[int, float]:
    """The network's time at data, 0 or 1, in units of its time at the other end, and those units."""
    clock = _FLOW_CLOCKS.get(type(net).__name__.removesuffix("Model"))
    if clock is None:
        if type(net).__module__.partition(".")[0] == "diffusers":
            raise ValueError(
                f"the unit of time of a {type(net).__name__} is not known here. Look into its pipeline for what the "
                "network gets as timestep, and pass it as from_velocity(lambda z, t, **cond: net(z, timestep=t, "
                "**cond).sample, event_shape, data_at=0, time_scale=1000), or with the values that fit."
            )
        clock = _THOUSAND
    data_at, scale = clock
    if getattr(scheduler.config, "invert_sigmas", False):
        data_at = 1 - data_at
    return data_at, float(scheduler.config.num_train_timesteps) if scale is None else scale


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
