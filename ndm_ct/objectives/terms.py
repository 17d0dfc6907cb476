r"""The terms of the bound, each a function of the model and its data.

See :mod:`ndm_ct.objectives.bound` for the formulas. Functions of a single term take latents y for x if the transform
has a Flow or Encoder.

Times are drawn uniformly in :math:`\gamma`, or, where the schedule has :math:`\gamma(1) = \infty`, uniformly in
:math:`\arctan(\sigma/\alpha)`.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ndm_ct._core.checks import as_time, expand, sum_event, validate_noise
from ndm_ct._core.noise import GeneratorLike, Randomness, as_randomness, normal_like
from ndm_ct.model import NDM
from ndm_ct.prediction import validate_finite
from ndm_ct.process import ProcessPath
from ndm_ct.quantisation import Quantisation, resolve_optional

__all__ = ["diffusion_integrand", "prior_term", "reconstruction_term", "times", "transition_kl"]


def times(model: NDM, u: Tensor) -> tuple[Tensor, Tensor]:
    r"""Map uniform numbers to times, uniformly in :math:`\gamma` (or in the angle where :math:`\gamma(1) = \infty`).

    Args:
        model: gives schedule and interval.
        u: float64 in [0, 1], any shape.

    Returns:
        t and the weight :math:`1/p(t)` of an integral over t, both of the shape of ``u``, without gradient.
    """
    validate_noise("the bound", model.t_min, model.t_noise)
    schedule = model.schedule
    with torch.no_grad():
        low, high = schedule(as_time(model.t_min, u.device)), schedule(as_time(1.0, u.device))
        if bool(torch.isfinite(high.gamma)):
            start, span = low.gamma, high.gamma - low.gamma
            t = schedule.time_at(torch.atan(torch.exp(0.5 * (start + span * u))))
            t = t.clamp(model.t_min, 1.0)
            return t, span / schedule(t).dgamma
        start, span = low.angle, high.angle - low.angle
        t = schedule.time_at(start + span * u).clamp(model.t_min, 1.0)
        return t, span / schedule(t).dangle


def diffusion_integrand(model: NDM, x: Tensor, t: Tensor, eps: Tensor, /, **cond: Any) -> Tensor:
    r"""The integrand of :math:`L_{diff}` at time t for one noise, nats per unit time.

    Args:
        model: the model; its volatility must be positive.
        x: data, shape ``(B, *E)``.
        t: float64 times, shape ``(B,)``.
        eps: noise :math:`\epsilon`, shape ``(B, *E)``.
        cond: conditioning.

    Returns:
        Shape ``(B,)``.
    """
    return diffusion_along(model, model.process.along(x, **cond), t, eps, cond)


def diffusion_along(model: NDM, path: ProcessPath, t: Tensor, eps: Tensor, cond: Mapping[str, Any]) -> Tensor:
    """:func:`diffusion_integrand` along a path that has been conditioned."""
    here = path.at(t)
    return diffusion(model, *here.pair(here.residual(eps)), *predict(model, here.state(eps), t, cond), t)


def predict(model: NDM, z: Tensor, t: Tensor, cond: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The model's moments, checked for NaN and infinity."""
    F_hat, dF_hat = model.moments(z, t, **cond)
    validate_finite(F_hat, t)
    validate_finite(dF_hat, t)
    return F_hat, dF_hat


def diffusion(model: NDM, F: Tensor, dF: Tensor, F_hat: Tensor, dF_hat: Tensor, t: Tensor) -> Tensor:
    """:func:`diffusion_integrand` from the pair (F and its time derivative where S = 1), true and predicted."""
    c, eta = model.schedule(t), model.process.eta(t)
    if not bool((eta > 0.0).all()):
        raise ValueError("volatility(t) is zero at some t, where the bound is minus infinity; keep it positive.")
    delta, ddelta = F - F_hat, dF - dF_hat
    if eta.ndim > 1:  # the volatility varies over the event, in the transform's basis
        delta, ddelta = model.transform.to_basis(delta), model.transform.to_basis(ddelta)
    eta = expand(eta, F)
    residual = 0.5 * (1.0 + eta) * delta - expand(c.inverse_dgamma, F) * ddelta
    return (0.5 * c.snr_rate).to(F.dtype) * sum_event(residual**2 / eta)


def prior_term(model: NDM, x: Tensor, /, *, generator: GeneratorLike = None, **cond: Any) -> Tensor:
    r""":math:`KL(q(z_1 \mid x) \,\|\, p(z_1))`, nats, ``(B,)``.

    Args:
        model: the model. The term is exact if its prior has a method ``kl_from_normal`` (that of
            :class:`ndm_ct.prior.NormalKL`), as the default prior has; otherwise it is an estimate from one sample.
        x: data, shape ``(B, *E)``.
        generator: source of the one sample: a seed, a generator, or one per row; None is torch's global generator.
        cond: conditioning.
    """
    return model.prior_divergence(model.process.along(x, **cond), x, generator)


def reconstruction_term(
    model: NDM,
    x: Tensor,
    /,
    *,
    quantisation: int | Quantisation | None = None,
    generator: GeneratorLike = None,
    **cond: Any,
) -> Tensor:
    r""":math:`E[-\log p(x \mid z_0)]`, nats, ``(B,)``.

    Args:
        model: the model.
        x: data, shape ``(B, *E)``. For integer data these are the centres of the bins.
        quantisation: the bins of integer data, or their number on (-1, 1); the term is then an estimate from one sample
            of z_0. None: the data are real-valued, and the term is exact.
        generator: source of the sample: a seed, a generator, or one per row; None is torch's global generator.
        cond: conditioning.
    """
    generator = as_randomness(generator, len(x), x.device, "reconstruction_term")
    return reconstruct(model, model.process.along(x, **cond), x, resolve_optional(quantisation), generator)


def reconstruct(
    model: NDM, path: ProcessPath, x: Tensor, quantisation: Quantisation | None, generator: Randomness
) -> Tensor:
    """:func:`reconstruction_term` along a path that has been conditioned."""
    validate_noise("the reconstruction term of the bound", model.t_min, model.t_noise)
    t = as_time(model.t_min, x.device).expand(x.shape[0])
    F = x if model.t_min == 0.0 and model.transform.starts_at_data else path.F(t)
    gamma = expand(model.schedule(t).gamma, x)
    if quantisation is None:
        # z_0/alpha_0 = F + e^{gamma_0/2} S eps, so the expectation of the square is known.
        variance = 1.0 if path.r is None else torch.exp(2.0 * path.r(t))
        return 0.5 * sum_event((F - x) ** 2 * torch.exp(-gamma) + variance + math.log(2.0 * math.pi) + gamma)
    eps = normal_like(x, generator) if path.r is None else normal_like(x, generator) * path.r(t).exp()
    return -quantisation.decoder_log_prob(F + torch.exp(0.5 * gamma) * eps, x, gamma)


def transition_kl(model: NDM, x: Tensor, s: Tensor, t: Tensor, eps: Tensor, /, **cond: Any) -> Tensor:
    r""":math:`KL(q(z_s \mid z_t, x) \,\|\, p(z_s \mid z_t))` at :math:`z_t = \alpha_t F + \sigma_t \epsilon`, ``(B,)``.

    Args:
        model: the model.
        x: data, shape ``(B, *E)``.
        s: the earlier times, shape ``(B,)``.
        t: the later times, shape ``(B,)``.
        eps: noise, shape ``(B, *E)``.
        cond: conditioning.
    """
    return transition_along(model, model.process.along(x, **cond), s, t, eps, cond)


def transition_along(
    model: NDM, path: ProcessPath, s: Tensor, t: Tensor, eps: Tensor, cond: Mapping[str, Any]
) -> Tensor:
    """:func:`transition_kl` along a path that has been conditioned."""
    process, transform = model.process, model.transform
    F_t, F_s = path.F(t), path.F(s)
    z = path.sample(t, eps)
    if path.r is None:
        F_hat_t, F_hat_s = model.frozen(z, t, s, **cond)
        mean, std = process.posterior(z, F_s, F_t, s, t)
        model_mean, _ = process.posterior(z, F_hat_s, F_hat_t, s, t)
        return 0.5 * sum_event(transform.diagonal(1.0 / std, mean - model_mean) ** 2)
    mean, ratio = path.posterior(F_s, eps, s, t)
    F_hat_t, F_hat_s = model.frozen(z, t, s, process.transition(s, t)[1], **cond)
    model_mean, std = process.posterior(z, F_hat_s, F_hat_t, s, t)
    return 0.5 * sum_event(((mean - model_mean) / expand(std, z)) ** 2 + ratio - 1.0 - ratio.log())
