r"""Published models whose forward process is fixed, or learned apart from the diffusion; see :mod:`ndm_ct.presets`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ndm_ct import objectives, schedules
from ndm_ct._core.checks import validate_count
from ndm_ct.model import NDM
from ndm_ct.nn import FromScore, Mixed, Preconditioned
from ndm_ct.objectives.regression import Regression
from ndm_ct.objectives.time_samplers import LearnedBuckets
from ndm_ct.schedules.base import Coefficients, Schedule
from ndm_ct.transforms import Blur, Encoder, Flow

__all__ = [
    "OnLevels", "Preset", "blurring", "ddim", "ddpm", "edm", "flow_matching", "indm", "interpolant", "lsgm",
    "ncsn", "rectified_flow", "score_sde_subvp", "score_sde_ve", "score_sde_vp", "vdm",
]  # fmt: skip

Shape = tuple[int, ...]

_SCORE_SDE_T_MIN = 1e-5


class Preset(NamedTuple):
    """A published model.

    Args:
        model: the model, untrained.
        objective: for ``fit(objective=)``.
        method: for ``sample(method=)``; a method on a grid needs ``steps=`` too.
    """

    model: NDM
    objective: Callable[..., Tensor]
    method: str


@dataclass(frozen=True)
class OnLevels:
    """Times of a model with K noise levels: each as often as the others.

    Args:
        count: K; the k-th level lies at t = k / (K - 1).
    """

    count: int

    def __call__(self, schedule: Schedule, t_min: float, u: Tensor) -> Tensor:
        """The level of numbers u in [0, 1)."""
        return (u * self.count).long().clamp(max=self.count - 1).to(u.dtype) / (self.count - 1)


def ddpm(net: Any, event_shape: Shape, *, steps: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02) -> Preset:
    r"""DDPM: :math:`\alpha_k^2 = \prod_{j \le k} (1 - \beta_j)` and :math:`L_{simple}`.

    Its bound, :math:`L_{vlb}`, is ``objectives.elbo_discrete``, and in continuous time ``elbo``.

    Args:
        net: :math:`\hat\epsilon(z, t)`.
        event_shape: shape of one event.
        steps: number of levels of the table.
        beta_min: :math:`\beta_1`.
        beta_max: :math:`\beta_K`; between them linear in k.

    Example:
        >>> import ndm_ct
        >>> model, objective, method = ddpm(ndm_ct.nn.MLP(2), (2,))
        >>> objective(model, torch.randn(5, 2)).shape
        torch.Size([5])
    """
    beta = torch.linspace(beta_min, beta_max, validate_count("steps", steps), dtype=torch.float64)
    model = NDM(net, event_shape, schedule=schedules.Tabulated((1.0 - beta).cumprod(0)), prediction="eps")
    return Preset(model, Regression("eps", times=OnLevels(steps)), "ddpm")


def ddim(net: Any, event_shape: Shape, **options: Any) -> Preset:
    r"""DDIM: trained like DDPM, sampled without noise.

    Args:
        net: :math:`\hat\epsilon(z, t)`.
        event_shape: shape of one event.
        options: options of :func:`ddpm`.
    """
    return ddpm(net, event_shape, **options)._replace(method="ddim")


def vdm(
    net: Any, event_shape: Shape, *, gamma_min: float = -13.3, gamma_max: float = 5.0, learn_ends: bool = False
) -> Preset:
    r"""Variational diffusion: a learned monotone :math:`\gamma(t)`, trained by the bound.

    The paper shapes :math:`\gamma` between its ends so that the loss varies least over t; here the density of the times
    in :math:`\gamma` is learned to that end (:class:`~ndm_ct.objectives.LearnedBuckets`).

    Args:
        net: :math:`\hat\epsilon(z, t)`.
        event_shape: shape of one event.
        gamma_min: :math:`\gamma(0)`.
        gamma_max: :math:`\gamma(1)`.
        learn_ends: whether the bound moves the ends; see :class:`~ndm_ct.schedules.LearnedLogSNR`.
    """
    schedule = schedules.LearnedLogSNR(gamma_min, gamma_max, learn_ends=learn_ends)
    model = NDM(net, event_shape, schedule=schedule, prediction="eps")
    return Preset(model, objectives.Bound(LearnedBuckets()), "ddpm")


def score_sde_vp(net: Any, event_shape: Shape, *, beta_min: float = 0.1, beta_max: float = 20.0) -> Preset:
    r"""Score SDE, variance preserving: :math:`E\, \sigma^2 \|\hat s + \epsilon/\sigma\|^2`, t uniform in [1e-5, 1].

    Args:
        net: :math:`\hat s(z, t)`.
        event_shape: shape of one event.
        beta_min: :math:`\beta(0)`.
        beta_max: :math:`\beta(1)`.
    """
    return _score_sde(net, event_shape, schedules.VariancePreserving(beta_min, beta_max), "sde")


def score_sde_subvp(net: Any, event_shape: Shape, *, beta_min: float = 0.1, beta_max: float = 20.0) -> Preset:
    r"""Score SDE, sub-variance preserving; the objective is that of :func:`score_sde_vp`.

    Args:
        net: :math:`\hat s(z, t)`.
        event_shape: shape of one event.
        beta_min: :math:`\beta(0)`.
        beta_max: :math:`\beta(1)`.
    """
    return _score_sde(net, event_shape, schedules.SubVariancePreserving(beta_min, beta_max), "sde")


def score_sde_ve(net: Any, event_shape: Shape, *, sigma_min: float = 0.01, sigma_max: float = 50.0) -> Preset:
    r"""Score SDE, variance exploding; the objective is that of :func:`score_sde_vp`.

    Args:
        net: :math:`\hat s(z, t)`.
        event_shape: shape of one event.
        sigma_min: :math:`\sigma_0`.
        sigma_max: :math:`\sigma_1`, about the largest distance between two data.
    """
    return _score_sde(net, event_shape, schedules.VarianceExploding(sigma_min, sigma_max), "pc")


def _score_sde(net: Any, event_shape: Shape, schedule: Schedule, method: str) -> Preset:
    model = NDM(FromScore(net), event_shape, schedule=schedule, t_min=_SCORE_SDE_T_MIN)
    return Preset(model, Regression("eps"), method)


def ncsn(net: Any, event_shape: Shape, *, levels: int = 10, sigma_min: float = 0.01, sigma_max: float = 1.0) -> Preset:
    r"""NCSN: :math:`\frac{1}{2L} \sum_i \sigma_i^2 E \|\hat s + (z - x)/\sigma_i^2\|^2` on geometric levels.

    Args:
        net: :math:`\hat s(z, t)`.
        event_shape: shape of one event.
        levels: L.
        sigma_min: :math:`\sigma_L`.
        sigma_max: :math:`\sigma_1`, well above the spread of the data if samples are to cover it.
    """
    if validate_count("levels", levels) < 2:
        raise ValueError(f"levels must be at least 2, from sigma_min to sigma_max, got {levels}.")
    model = NDM(FromScore(net), event_shape, schedule=schedules.VarianceExploding(sigma_min, sigma_max))
    return Preset(model, Regression("eps", weight=half, times=OnLevels(levels)), "langevin")


def half(c: Coefficients) -> Tensor:
    """One half, at every time."""
    return torch.full_like(c.sigma, 0.5)


def edm(
    net: nn.Module,
    event_shape: Shape,
    *,
    data_std: float = 0.5,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    log_mean: float = -1.2,
    log_std: float = 1.2,
) -> Preset:
    r"""EDM: :math:`E\, \lambda(\sigma) \|D(z; \sigma) - x\|^2`, :math:`\lambda = (\sigma^2 + s^2)/(\sigma s)^2`.

    :math:`\log\sigma` is normal, :math:`N(-1.2, 1.2^2)`, cut off at the ends of the schedule (one time in 10,000).

    Args:
        net: a raw network, scaled by :class:`~ndm_ct.nn.Preconditioned`, which is the paper's preconditioning; it sees
            t, which is linear in :math:`\log\sigma`.
        event_shape: shape of one event.
        data_std: s, the paper's :math:`\sigma_{data}`.
        sigma_min: :math:`\sigma_0`.
        sigma_max: :math:`\sigma_1`.
        log_mean: :math:`P_{mean}`.
        log_std: :math:`P_{std}`.
    """
    schedule = schedules.VarianceExploding(sigma_min, sigma_max)
    model = NDM(Preconditioned(net, data_std=data_std), event_shape, schedule=schedule)
    return Preset(model, Regression("F", EdmWeight(data_std), LogNormalNoise(log_mean, log_std)), "edm")


@dataclass(frozen=True)
class EdmWeight:
    r""":math:`\lambda = (\sigma^2 + s^2)/(\sigma s)^2`, at which the raw network's target has unit variance."""

    data_std: float

    def __call__(self, c: Coefficients) -> Tensor:
        """Shape of the coefficients."""
        return (c.sigma**2 + self.data_std**2) / (c.sigma * self.data_std) ** 2


@dataclass(frozen=True)
class LogNormalNoise:
    r"""Times at which :math:`\log \sigma/\alpha` is normal, cut off at the ends of the interval."""

    mean: float
    std: float

    def __call__(self, schedule: Schedule, t_min: float, u: Tensor) -> Tensor:
        """The time of numbers u in [0, 1)."""
        normal = math.sqrt(2.0) * torch.erfinv(2.0 * u - 1.0)
        return schedule.time_at(torch.atan(torch.exp(self.mean + self.std * normal))).clamp(t_min, 1.0)


def flow_matching(net: Any, event_shape: Shape) -> Preset:
    r"""Flow matching on straight conditional paths: :math:`E \|(\epsilon - x) - \hat u\|^2`, t uniform.

    Args:
        net: :math:`\hat u(z, t)`, in the direction of time of this library: at t = 0 are the data.
        event_shape: shape of one event.
    """
    model = NDM(net, event_shape, schedule=schedules.Rectified(), prediction="velocity")
    return Preset(model, Regression("velocity"), "ode")


def rectified_flow(net: Any, event_shape: Shape) -> Preset:
    r"""Rectified flow: before its first reflow it is :func:`flow_matching`, sampled by a few Euler steps.

    Args:
        net: :math:`\hat u(z, t)`, in the direction of time of this library: at t = 0 are the data.
        event_shape: shape of one event.
    """
    return flow_matching(net, event_shape)._replace(method="euler")


def interpolant(net: Any, event_shape: Shape) -> Preset:
    r"""The trigonometric stochastic interpolant: :math:`E \|\alpha' x + \sigma' \epsilon - \hat u\|^2`, t uniform.

    Args:
        net: :math:`\hat u(z, t)`.
        event_shape: shape of one event.
    """
    model = NDM(net, event_shape, schedule=schedules.Trigonometric(), prediction="velocity")
    return Preset(model, Regression("velocity"), "ode")


def blurring(
    net: nn.Module, event_shape: Shape, *, data_std: float = 1.0, blur: float = 20.0, floor: float = 1e-3
) -> Preset:
    r"""Blurring diffusion: F takes away high frequencies first; :math:`E \|\epsilon - \hat\epsilon\|^2`, t uniform.

    Args:
        net: a raw network, scaled to predict x.
        event_shape: shape of one image, ``(..., H, W)``.
        data_std: standard deviation of the data.
        blur: largest blur, in pixels.
        floor: what is left of the highest frequency.
    """
    model = NDM(
        Preconditioned(net, data_std=data_std), event_shape, schedule=schedules.Cosine(),
        transform=Blur(event_shape, blur, floor),
    )  # fmt: skip
    return Preset(model, Regression("eps"), "ddpm")


def indm(net: Any, event_shape: Shape, *, flow: nn.Module, beta_min: float = 0.1, beta_max: float = 20.0) -> Preset:
    r"""INDM: a flow y = h(x) before a score SDE, trained together:
    :math:`E[-\log|\det \partial h/\partial x| + \tfrac12 \int g^2 \|s - \hat s\|^2 dt]` plus the terms of both ends.

    Args:
        net: :math:`\hat s(z, t)`.
        event_shape: shape of one event.
        flow: h, see :class:`~ndm_ct.transforms.Flow`.
        beta_min: :math:`\beta(0)`.
        beta_max: :math:`\beta(1)`.
    """
    schedule = schedules.VariancePreserving(beta_min, beta_max)
    model = NDM(FromScore(net), event_shape, schedule=schedule, transform=Flow(flow), t_min=_SCORE_SDE_T_MIN)
    return Preset(model, objectives.loss, "ode")


def lsgm(
    net: Any,
    event_shape: Shape,
    *,
    encoder: nn.Module,
    decoder: nn.Module,
    data_shape: Shape,
    beta_min: float = 0.1,
    beta_max: float = 20.0,
) -> Preset:
    r"""LSGM: a variational autoencoder whose prior is a score SDE, trained together:
    :math:`E[-\log p(x \mid y) + \log q(y \mid x) + \tfrac12 \int (g/\sigma)^2 \|\epsilon - \hat\epsilon\|^2 dt]`
    plus the terms of both ends.

    Args:
        net: mixed with the normal's noise by :class:`~ndm_ct.nn.Mixed`.
        event_shape: shape of the latents.
        encoder: see :class:`~ndm_ct.transforms.Encoder`.
        decoder: from latents to data; see :class:`~ndm_ct.transforms.Encoder`.
        data_shape: shape of one data point.
        beta_min: :math:`\beta(0)`.
        beta_max: :math:`\beta(1)`.
    """
    model = NDM(
        Mixed(net, event_shape), event_shape, schedule=schedules.VariancePreserving(beta_min, beta_max),
        transform=Encoder(encoder, decoder, data_shape), prediction="eps", t_min=_SCORE_SDE_T_MIN,
    )  # fmt: skip
    return Preset(model, objectives.loss, "ode")
