r"""The clocks of diffusers' networks for flow matching: in what unit and from which end they count time.

With :math:`z = (1 - t) x + t\epsilon` a scheduler of flow matching counts :math:`k = 1000 t`, and steps along
:math:`dz/dt = \epsilon - x`. The networks differ, and their pipelines convert. A network is called with :math:`s\tau`,
:math:`\tau = t` or :math:`1 - t`, a few with an offset o, and its answer is taken with a sign:

.. math::
    \frac{dz}{dt} = \pm\,\mathrm{net}(z, s\tau + o) .

A scheduler with ``invert_sigmas`` counts from noise to data, which exchanges both ends and the sign.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

__all__ = ["Clock", "clock_of"]


@dataclass(frozen=True)
class Clock:
    r"""How a network counts time.

    Args:
        data_at: :math:`\tau` at data, 0 or 1.
        scale: s; None is the largest timestep of the scheduler.
        sign: of :math:`dz/dt`.
        offset: o.
    """

    data_at: int = 0
    scale: float | None = None
    sign: int = 1
    offset: float = 0.0


_SCHEDULER, _ONE = Clock(), Clock(scale=1.0)
_NEGATIVE, _NEGATIVE_ONE, _REVERSED = Clock(sign=-1), Clock(scale=1.0, sign=-1), Clock(1, 1.0, -1)
_FROM_ZERO = Clock(offset=-1.0)

_CLOCKS = {
    _SCHEDULER: """UNet1D UNet2D UNet2DCondition UNet3DCondition DiTTransformer2D Transformer2D PixArtTransformer2D
        SD3Transformer2D CogView4Transformer2D BriaTransformer2D BriaFiboTransformer2D ErnieImageTransformer2D
        HunyuanImageTransformer2D JoyImageEditTransformer3D JoyImageEditPlusTransformer3D OmniGenTransformer2D
        SanaTransformer2D SanaVideoTransformer3D LTXVideoTransformer3D WanTransformer3D WanVACETransformer3D
        WanAnimateTransformer3D SkyReelsV2Transformer3D ChronoEditTransformer3D HunyuanVideoTransformer3D
        HunyuanVideo15Transformer3D HunyuanVideoFramepackTransformer3D MochiTransformer3D EasyAnimateTransformer3D
        Kandinsky5Transformer3D Kandinsky6Transformer3D Kandinsky6SRTransformer3D MotifVideoTransformer3D
        StableAudio3DiT HeliosTransformer3D MiniMaxMusic3Transformer1D""",
    _ONE: """FluxTransformer2D Flux2Transformer2D ChromaTransformer2D AuraFlowTransformer2D BriaFibo2Transformer2D
        Krea2Transformer2D QwenImageTransformer2D QwenImage21Transformer2D LongCatImageTransformer2D
        LongCatAudioDiTTransformer OvisImageTransformer2D PRXTransformer2D AceStepTransformer1D
        Flux3Transformer2D""",
    _NEGATIVE: "HiDreamImageTransformer2D",
    _NEGATIVE_ONE: "NucleusMoEImageTransformer2D",
    _FROM_ZERO: "GlmImageTransformer2D",
    _REVERSED: "LuminaNextDiT2D Lumina2Transformer2D ZImageTransformer2D Ideogram4Transformer2D",
}
CLOCKS = {name: clock for clock, names in _CLOCKS.items() for name in names.split()}
"""Classes of diffusers, without "Model" at their end. The tests read each one's pipeline."""


def clock_of(net: nn.Module, scheduler: Any, given: Clock | None) -> Clock:
    """The clock of a network, with the scheduler's unit and direction.

    Args:
        net: the network.
        scheduler: the scheduler it was trained with.
        given: what the caller says, which goes before the table and the scheduler.

    Raises:
        ValueError: a network of diffusers whose clock is not known.
    """
    config = scheduler.config
    largest = float(config.num_train_timesteps)
    if given is not None:
        return given if given.scale is not None else replace(given, scale=largest)
    names = [cls.__name__.removesuffix("Model") for cls in type(net).__mro__]
    clock = next((CLOCKS[name] for name in names if name in CLOCKS), None)
    if clock is None:
        if type(net).__module__.partition(".")[0] == "diffusers":
            raise ValueError(
                f"the unit of time of a {type(net).__name__} is not known here. Look into its pipeline for what the "
                "network gets as timestep and for the sign of its output, and pass time_scale=, data_at= and sign=; or "
                "pass a function of your own to from_velocity(lambda z, t, **cond: ..., event_shape)."
            )
        clock = _SCHEDULER
    # Sana's pipeline multiplies the timestep by this number of the network.
    scale = largest * (getattr(getattr(net, "config", None), "timestep_scale", None) or 1.0)
    clock = clock if clock.scale is not None else replace(clock, scale=scale)
    if getattr(config, "invert_sigmas", False):
        clock = replace(clock, data_at=1 - clock.data_at, sign=-clock.sign)
    return clock
