r"""Bits per dimension of integer data: :math:`-\log_2 P(x)/d`.

With the probability flow the probability of a bin is bounded by dequantisation (:mod:`ndm_ct.quantisation`): for points
:math:`\tilde x_1, \dots, \tilde x_K \sim q` in the bin of x,

.. math::
    \log P(x) \ge E \log \frac1K \sum_{k=1}^K \frac{p(\tilde x_k)}{q(\tilde x_k)},

tighter with every further point and exact as K grows (Burda et al.). With K = 1 and truncated-normal noise the entropy
of q is put in closed form. With the ELBO the decoder over levels makes the bound directly one on :math:`\log P(x)`.

The estimate of :math:`\log p` enters an exponential: noise of variance :math:`s^2` would raise the mean of the weights
by :math:`e^{s^2/2}`, so each log-weight is lowered by :math:`s^2/2` where K > 1. Keep s below one nat there.

References:
    Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, https://arxiv.org/abs/1509.00519
    Zheng et al., Improved Techniques for Maximum Likelihood Estimation for Diffusion ODEs,
    https://arxiv.org/abs/2305.03935
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ndm_ct import objectives
from ndm_ct._core.checks import as_time, choose, event_size, validate_count, validate_positive
from ndm_ct._core.noise import GeneratorLike, as_randomness, repeated
from ndm_ct.likelihood import api as likelihood
from ndm_ct.likelihood.api import Trace
from ndm_ct.model import NDM
from ndm_ct.quantisation import Quantisation

__all__ = ["BitsInfo", "bits_per_dim", "dequantised"]

DEQUANTISATIONS = ("uniform", "truncated-normal")


@dataclass(frozen=True)
class BitsInfo:
    """What ``bits_per_dim`` found out on the way.

    Args:
        stderr: standard error of the estimate, bits per dimension, ``(B,)``: of the trace for "ode" (0 if exact; NaN if
            unknown), of times and noise for "elbo".
        dequantisation_stderr: for "ode", standard error from the K points of the bin, bits per dimension, ``(B,)``; NaN
            for K = 1 and for "elbo".
        nfe: network evaluations of the row that took most.
        nats: the bound on log P(x) in nats per event, ``(B,)``.
    """

    stderr: Tensor
    dequantisation_stderr: Tensor
    nfe: int
    nats: Tensor


def bits_per_dim(
    model: NDM,
    x: Tensor,
    /,
    *,
    levels: int = 256,
    bound: str = "ode",
    dequantisation: str = "uniform",
    range: tuple[float, float] = (-1.0, 1.0),  # noqa: A002 (the field's word for it)
    samples: int | None = None,
    stderr: float | None = None,
    trace: Trace | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    method: str | None = None,
    generator: GeneratorLike = None,
    return_info: bool = False,
    **cond: Any,
) -> Any:
    r"""Bits per dimension of integer data, an upper bound in expectation.

    Args:
        model: a model trained on the levels mapped to ``range``.
        x: integers in [0, levels), shape ``(B, *E)``.
        levels: number of levels L.
        bound: "ode", the probability-flow likelihood of dequantised data, or "elbo".
        dequantisation: for "ode", "uniform" (models trained on uniformly noised data) or "truncated-normal" (models
            trained on bin centres, with :math:`\sigma_0/\alpha_0` about a third of a bin's half-width).
        range: interval (lo, hi) the levels were mapped to.
        samples: for "elbo", pairs (t, eps) per row; for "ode", points K per bin; None is 1.
        stderr: for "ode", the standard error of the trace to reach, bits per dimension; as in :func:`ndm_ct.loglik`.
        trace: for "ode", as in :func:`ndm_ct.loglik`; None is "auto".
        rtol: for "ode".
        atol: for "ode".
        method: for "ode".
        generator: source of dequantisation noise, probes, times; or a sequence of one per row, whose result is then its
            own in any batch.
        return_info: also return a :class:`BitsInfo`.
        cond: conditioning.

    Returns:
        Shape ``(B,)``, bits per dimension; with ``return_info`` a pair.

    Raises:
        TypeError: data that are not integers.
        ValueError: values outside [0, levels), unknown or ineffective options.
    """
    bins = Quantisation(levels, range)
    bins.validate(x)
    generator = as_randomness(generator, len(x), x.device, "bits_per_dim")
    choose("bound", bound, ("ode", "elbo"))
    choose("dequantisation", dequantisation, DEQUANTISATIONS)
    ode_options = {"stderr": stderr, "trace": trace, "rtol": rtol, "atol": atol, "method": method}
    _refuse_ineffective(bound, dequantisation, ode_options)
    count = validate_count("samples", 1 if samples is None else samples)
    if stderr is not None:
        validate_positive("stderr", stderr, "bits per dimension")
    scale = event_size(model.data_shape) * math.log(2.0)
    with torch.no_grad():
        if bound == "elbo":
            centres = bins.centres(x, model.dtype or torch.get_default_dtype())
            nats, elbo_info = objectives.elbo(
                model, centres, samples=count, quantisation=bins, generator=generator, return_info=True, **cond
            )
            info = BitsInfo(elbo_info.stderr / scale, torch.full_like(nats, math.nan), elbo_info.nfe, nats)
        else:
            start, log_q = dequantised(model, bins, x, dequantisation, count, generator)
            rows = torch.arange(x.shape[0], device=x.device).repeat_interleave(count)
            options = likelihood.Options(
                trace=trace, stderr=None if stderr is None else stderr * scale, rtol=rtol, atol=atol, method=method
            )
            given = model.validate(start[::count], cond, bits_per_dim).take(rows)
            path = options.likelihood(model, start, (model.t_min, 1.0), given, repeated(generator, count), budget=False)
            log_weights = path.loglik.double() - log_q
            variance = path.variance.double().nan_to_num(0.0)
            info = _weighted(log_weights, path.stderr.double(), variance, count, path.nfe, scale, start.dtype)
    result = -info.nats / scale
    return (result, info) if return_info else result


def dequantised(
    model: NDM, bins: Quantisation, x: Tensor, dequantisation: str, samples: int, generator: GeneratorLike
) -> tuple[Tensor, Tensor]:
    r"""Points in the bins of x, and the log-density of having drawn them.

    Args:
        model: gives dtype and, for truncated-normal noise, :math:`\alpha, \sigma` at t_min.
        bins: the levels.
        x: integers, shape ``(B, *E)``.
        dequantisation: "uniform" or "truncated-normal".
        samples: K.
        generator: source of the noise.

    Returns:
        The points, ``(B K, *E)``, those of a row together, and :math:`\log q`, nats, ``(B K,)`` (for a single
        truncated-normal point its expectation, minus the entropy).
    """
    dtype, d = model.dtype or torch.get_default_dtype(), event_size(model.data_shape)
    generator = repeated(as_randomness(generator, len(x), x.device, "dequantised"), samples)
    x = x.repeat_interleave(samples, 0)
    constant = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    if dequantisation == "uniform":
        return bins.uniform(x, dtype, generator), constant - d * bins.uniform_offset
    at_start = model.schedule(as_time(model.t_min, x.device))
    alpha, sigma = float(at_start.alpha.detach()), float(at_start.sigma.detach())
    points = bins.truncated_normal(x, alpha, sigma, dtype, generator)
    if samples == 1:
        return points, constant - d * bins.truncated_normal_offset(alpha, sigma)
    return points, bins.truncated_normal_log_prob(points, x, alpha, sigma)


def _weighted(
    log_weights: Tensor, stderr: Tensor, variance: Tensor, samples: int, nfe: int, scale: float, dtype: torch.dtype
) -> BitsInfo:
    """The bound from K log-weights per row, with its two standard errors."""
    log_weights, stderr, variance = (part.unflatten(0, (-1, samples)) for part in (log_weights, stderr, variance))
    if samples == 1:
        nats, error = log_weights[:, 0], stderr[:, 0]
        spread = torch.full_like(nats, math.nan)
    else:
        log_weights = log_weights - 0.5 * variance
        nats = torch.logsumexp(log_weights, 1) - math.log(samples)
        share = torch.softmax(log_weights, 1)
        error = (share * stderr).square().sum(1).sqrt()
        spread = (samples * share).std(1) / math.sqrt(samples)
    return BitsInfo((error / scale).to(dtype), (spread / scale).to(dtype), nfe, nats.to(dtype))


def _refuse_ineffective(bound: str, dequantisation: str, ode_options: dict[str, Any]) -> None:
    if bound != "elbo":
        return
    given = [name for name, value in ode_options.items() if value is not None]
    if dequantisation != "uniform":
        given.append("dequantisation")
    if given:
        raise ValueError(f"{', '.join(given)} has no effect with bound='elbo', which takes no ODE solve.")
