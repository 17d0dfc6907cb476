r"""Published models whose forward process is learned together with the diffusion; see :mod:`ndm_ct.presets`."""

from typing import Any

from torch import Tensor, nn

from ndm_ct import objectives, schedules
from ndm_ct._core.checks import expand
from ndm_ct.model import NDM
from ndm_ct.nn import Preconditioned
from ndm_ct.nn.heads import Wrapper
from ndm_ct.presets.published import Preset, Shape
from ndm_ct.transforms import DataEncoder, Neural, NeuralScale, PolynomialLogSNR

__all__ = ["DiffEncHead", "diffenc", "mulan", "nfdm"]


class DiffEncHead(Wrapper):
    r"""DiffEnc's reverse process, for ``prediction="moments"``:
    :math:`\hat F = \alpha z - \sigma\hat v` and :math:`\hat{\dot F} = -\gamma' \sigma^2 \hat F`.

    Args:
        net: :math:`\hat v(z, t)`.
    """

    prediction = "moments"
    wants_schedule = True

    def forward(self, z: Tensor, t: Tensor, schedule: schedules.Schedule, /, **cond: Any) -> tuple[Tensor, Tensor]:
        r""":math:`(\hat F, \hat{\dot F})` at state z ``(B, *E)`` and time t ``(B,)`` under a schedule."""
        c = schedule(t.double())
        F = expand(c.alpha, z) * z - expand(c.sigma, z) * self.net(z, t, **cond)
        return F, -expand(c.dgamma * c.sigma**2, z) * F


def diffenc(
    net: Any, event_shape: Shape, *, encoder: nn.Module, gamma_min: float = -13.3, gamma_max: float = 5.0
) -> Preset:
    r"""DiffEnc: a learned encoder in the mean, :math:`F = \alpha^2 x + \sigma^2 y(x, t)`, and the bound
    :math:`\tfrac12 \gamma' \alpha^2 \|v - \hat v + \sigma(\hat F - F + y + dy/d\gamma)\|^2` plus both ends.

    Args:
        net: :math:`\hat v(z, t)`, the prediction of :math:`v = \alpha\epsilon - \sigma F`.
        event_shape: shape of one event.
        encoder: y, ``(x (B, *E), t (B,)) -> (B, *E)``; the paper's ends in a tanh, for data in [-1, 1].
        gamma_min: :math:`\gamma(0)`.
        gamma_max: :math:`\gamma(1)`.

    References:
        Nielsen, Christensen, Dittadi and Winther, DiffEnc, https://arxiv.org/abs/2310.19789
    """
    model = NDM(
        DiffEncHead(net), event_shape, transform=DataEncoder(encoder, gamma_min, gamma_max),
        schedule=schedules.LinearLogSNR(gamma_min, gamma_max), prediction="moments",
    )  # fmt: skip
    return Preset(model, objectives.Bound(regressions=(0.0, 0.0)), "ddpm")


def mulan(
    net: nn.Module, event_shape: Shape, *, data_std: float = 1.0, gamma_min: float = -13.3, gamma_max: float = 5.0
) -> Preset:
    r"""MuLAN without its auxiliary latent: one learned log-SNR for every coordinate,
    :math:`\tfrac12 \sum_i \gamma_i'(t) e^{-\gamma_i(t)} (x_i - \hat x_i)^2` plus both ends.

    :math:`\gamma_i` is the paper's polynomial (:class:`~ndm_ct.transforms.PolynomialLogSNR`). The paper feeds it and
    the network a discrete latent of x as well. Here :math:`\gamma_i` depends on t alone, because a volatility must not
    depend on the data.

    Args:
        net: a raw network, scaled to predict x.
        event_shape: shape of one event.
        data_std: standard deviation of the data.
        gamma_min: :math:`\gamma_i(0)`, for all coordinates.
        gamma_max: :math:`\gamma_i(1)`.

    References:
        Sahoo et al., Diffusion Models With Learned Adaptive Noise, https://arxiv.org/abs/2312.13236
    """
    model = NDM(
        Preconditioned(net, data_std=data_std), event_shape,
        transform=PolynomialLogSNR(event_shape, gamma_min, gamma_max),
        schedule=schedules.LinearLogSNR(gamma_min, gamma_max), volatility=schedules.Matched(),
    )  # fmt: skip
    return Preset(model, objectives.loss, "sde")


def nfdm(
    net: nn.Module, event_shape: Shape, *, mean: nn.Module, scale: nn.Module, data_std: float = 1.0,
    delta: float = 0.01, end: float = 1e-3,
) -> Preset:  # fmt: skip
    r"""NFDM with Gaussian noise: mean and scale of the forward process are learned and pinned at both ends,
    :math:`z = (1 - t)\, x + t (1 - t)\, m(x, t) + \delta^{1 - t} e^{t (1 - t)\, \rho(x, t)} \epsilon`,
    trained by :math:`\|f(z, x) - f(z, \hat x)\|^2 / (2 g^2)` plus both ends, f the drift of the reverse SDE.

    The volatility is learned too. The paper has :math:`\alpha(1) = 0`; here :math:`\alpha(1)` is ``end``
    (:class:`~ndm_ct.schedules.StraightToNoise`).

    Args:
        net: a raw network, scaled to predict x.
        event_shape: shape of one event.
        mean: m, ``(x (B, *E), t (B,)) -> (B, *E)``.
        scale: :math:`\rho`, of the same signature.
        data_std: standard deviation of the data.
        delta: :math:`\delta`, the noise at t = 0.
        end: :math:`\alpha(1)`.

    References:
        Bartosh, Vetrov and Naesseth, Neural Flow Diffusion Models, https://arxiv.org/abs/2404.12940
    """
    model = NDM(
        Preconditioned(net, data_std=data_std), event_shape, transform=Neural(mean),
        schedule=schedules.StraightToNoise(delta, end), volatility=schedules.LearnedVolatility(),
        noise_scale=NeuralScale(scale),
    )  # fmt: skip
    return Preset(model, objectives.loss, "sde")
