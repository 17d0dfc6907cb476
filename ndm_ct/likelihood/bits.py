r"""Bits per dimension of integer data: :math:`-\log_2 P(x)/d`.

With the probability flow the probability of a bin is bounded by dequantisation (:mod:`ndm_ct.quantisation`): for points
:math:`\tilde x_1, \dots, \tilde x_K \sim q` in the bin of x,

.. math::
    \log P(x) \ge E \log \frac1K \sum_{k=1}^K \frac{p(\tilde x_k)}{q(\tilde x_k)},

tighter with every further point and exact as K grows (Burda et al.). With K = 1 and dequantisation
"process" the entropy of q is known in closed form. With the ELBO the decoder over levels bounds :math:`\log P(x)`
directly.

The estimate of :math:`\log p` enters an exponential: noise of variance :math:`s^2` would raise the mean of the weights
by :math:`e^{s^2/2}`, so each log-weight is lowered by :math:`s^2/2` where K > 1. Keep s below one nat there.

References:
    Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, https://arxiv.org/abs/1509.00519
    Zheng et al., Improved Techniques for Maximum Likelihood Estimation for Diffusion ODEs,
    https://arxiv.org/abs/2305.03935
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ndm_ct import objectives
from ndm_ct._core.checks import (
    as_tensor,
    as_time,
    choose,
    event_size,
    validate_count,
    validate_noise,
    validate_positive,
)
from ndm_ct._core.noise import GeneratorLike, Randomness, as_randomness, repeated
from ndm_ct.likelihood.budget import LikelihoodInfo
from ndm_ct.likelihood.options import Options, Trace
from ndm_ct.likelihood.placement import verify_placement
from ndm_ct.model import NDM
from ndm_ct.quantisation import DEQUANTISATIONS, Quantisation, resolve_quantisation

__all__ = ["BitsInfo", "bits_per_dim", "dequantised"]


@dataclass(frozen=True, kw_only=True)
class BitsInfo:
    """Errors and cost of ``bits_per_dim``.

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


@overload
def bits_per_dim(
    model: NDM, x: Tensor, /, *, quantisation: int | Quantisation = ..., bound: str = ..., dequantisation: str = ...,
    samples: int | None = ..., stderr: float | None = ..., trace: Trace | None = ..., rtol: float | None = ...,
    atol: float | None = ..., method: str | None = ..., generator: GeneratorLike = ...,
    return_info: Literal[False] = ..., **cond: Any,
) -> Tensor: ...  # fmt: skip


@overload
def bits_per_dim(
    model: NDM, x: Tensor, /, *, quantisation: int | Quantisation = ..., bound: str = ..., dequantisation: str = ...,
    samples: int | None = ..., stderr: float | None = ..., trace: Trace | None = ..., rtol: float | None = ...,
    atol: float | None = ..., method: str | None = ..., generator: GeneratorLike = ...,
    return_info: Literal[True], **cond: Any,
) -> tuple[Tensor, BitsInfo]: ...  # fmt: skip


def bits_per_dim(
    model: NDM,
    x: Tensor,
    /,
    *,
    quantisation: int | Quantisation = 256,
    bound: str = "ode",
    dequantisation: str = "uniform",
    samples: int | None = None,
    stderr: float | None = None,
    trace: Trace | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    method: str | None = None,
    generator: GeneratorLike = None,
    return_info: bool = False,
    **cond: Any,
) -> Tensor | tuple[Tensor, BitsInfo]:
    r"""Bits per dimension of integer data, an upper bound in expectation.

    Args:
        model: a model whose inputs have the levels where ``quantisation`` says.
        x: integers from 0 to the number of levels less one, shape ``(B, *E)``.
        quantisation: the number of levels L, whose bins fill (-1, 1), as :func:`ndm_ct.fit` places them; or
            ``Quantisation(L, centres=(lo, hi))`` with the values of the first level and the last, (-1, 1) for
            ``x / 127.5 - 1`` and (0, 1) for ``x / 255``; or ``Quantisation(L, edges=(lo, hi))``. A network of
            :mod:`ndm_ct.adapters` needs one of the last two.
        bound: "ode", the probability-flow likelihood of dequantised data, or "elbo".
        dequantisation: noise in the bins, for "ode". "uniform" is for models trained with uniform noise in the bins,
            "process" for models trained on the bin centres, with :math:`\sigma_0/\alpha_0` about a third of a bin's
            half-width.
        samples: for "elbo", pairs (t, eps) per row; for "ode", points K per bin; None is 1. More points tighten the
            bound and cost a solve each.
        stderr: for "ode", the standard error of the trace to reach, bits per dimension, by more sweeps of "quadrature".
        trace: for "ode", "exact", "quadrature", "hutchinson" or an object of :mod:`ndm_ct.divergence`; None is "auto",
            exact up to 32 dimensions, else "quadrature".
        rtol: for "ode", relative tolerance of the solver. A smaller one moves the result closer to the exact solution
            of the flow and takes more network evaluations. None is 2e-6; 3e-5 for "quadrature".
        atol: for "ode", absolute tolerance of the solver, for states near zero, in ``model.unit``; None as for
            ``rtol``.
        method: for "ode", "ode", "exponential" or a torchdiffeq method; None as in :func:`ndm_ct.loglik`.
        generator: source of dequantisation noise, probes and times: a seed, a generator, or a sequence with one
            generator per row, which makes the result of a row independent of its batch. None is torch's global one.
        return_info: also return a :class:`BitsInfo`.
        cond: conditioning of predictor and transform. Tensors with one entry per row go with their rows.

    Returns:
        Shape ``(B,)``, bits per dimension; with ``return_info`` a pair.

    Raises:
        TypeError: data that are not integers.
        ValueError: values outside the levels, unknown or ineffective options.

    Warns:
        UserWarning: a network of :mod:`ndm_ct.adapters` denoises better if the levels lie elsewhere.

    Example:
        >>> import ndm_ct
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
        >>> ndm_ct.bits_per_dim(model, torch.tensor([[3, 4]]), quantisation=8).shape
        torch.Size([1])
    """
    bins = resolve_quantisation(quantisation)
    bins.validate_placed(model.adapted)
    x = as_tensor(x, None, model.device)
    bins.validate(x)
    generator = as_randomness(generator, len(x), x.device, "bits_per_dim")
    choose("bound", bound, ("ode", "elbo"))
    choose("dequantisation", dequantisation, DEQUANTISATIONS)
    count = validate_count("samples", 1 if samples is None else samples)
    if stderr is not None:
        validate_positive("stderr", stderr, "bits per dimension")
    with torch.no_grad():
        if bound == "elbo":
            ode_options = {"stderr": stderr, "trace": trace, "rtol": rtol, "atol": atol, "method": method}
            _validate_no_ode(ode_options, dequantisation)
            info = _by_elbo(model, bins, x, count, generator, cond)
        else:
            nats = None if stderr is None else stderr * _nats_per_bit(model)
            options = Options(trace=trace, stderr=nats, rtol=rtol, atol=atol, method=method)
            info = _by_flow(model, bins, x, dequantisation, count, options, generator, cond)
    result = -info.nats / _nats_per_bit(model)
    return (result, info) if return_info else result


def _nats_per_bit(model: NDM) -> float:
    """Nats per event in one bit per dimension."""
    return event_size(model.data_shape) * math.log(2.0)


def _by_elbo(
    model: NDM, bins: Quantisation, x: Tensor, samples: int, generator: Randomness, cond: dict[str, Any]
) -> BitsInfo:
    centres = bins.centres(x, model.dtype or torch.get_default_dtype())
    verify_placement(model, bins, x, model.validate(centres, cond, bits_per_dim))
    nats, info = objectives.elbo(
        model, centres, samples=samples, quantisation=bins, generator=generator, return_info=True, **cond
    )
    unknown = torch.full_like(nats, math.nan)
    return BitsInfo(stderr=info.stderr / _nats_per_bit(model), dequantisation_stderr=unknown, nfe=info.nfe, nats=nats)


def _by_flow(
    model: NDM, bins: Quantisation, x: Tensor, dequantisation: str, samples: int, options: Options,
    generator: Randomness, cond: dict[str, Any],
) -> BitsInfo:  # fmt: skip
    start, log_q = dequantised(model, bins, x, dequantisation, samples, generator)
    rows = torch.arange(x.shape[0], device=x.device).repeat_interleave(samples)
    single = model.validate(start[::samples], cond, bits_per_dim)
    verify_placement(model, bins, x, single)
    given = single.take(rows)
    path = options.likelihood(model, start, (model.t_min, 1.0), given, repeated(generator, samples), budget=False)
    return _weighted(path, log_q, samples, _nats_per_bit(model))


def dequantised(
    model: NDM, bins: Quantisation, x: Tensor, dequantisation: str, samples: int, generator: GeneratorLike
) -> tuple[Tensor, Tensor]:
    r"""Points in the bins of x, and the log-density of having drawn them.

    Args:
        model: gives dtype and, for "process", :math:`\alpha, \sigma` at t_min.
        bins: the levels.
        x: integers, shape ``(B, *E)``.
        dequantisation: "uniform" or "process".
        samples: K.
        generator: source of the noise.

    Returns:
        The points, ``(B K, *E)``, those of a row together, and :math:`\log q`, nats, ``(B K,)`` (for a single
        point of "process" its expectation, minus the entropy).
    """
    dtype, d = model.dtype or torch.get_default_dtype(), event_size(model.data_shape)
    generator = repeated(as_randomness(generator, len(x), x.device, "dequantised"), samples)
    x = x.repeat_interleave(samples, 0)
    constant = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    if dequantisation == "uniform":
        return bins.uniform(x, dtype, generator), constant - d * bins.uniform_offset
    validate_noise("dequantisation='process'", model.t_min, model.t_noise)
    at_start = model.schedule(as_time(model.t_min, x.device))
    alpha, sigma = float(at_start.alpha.detach()), float(at_start.sigma.detach())
    points = bins.truncated_normal(x, alpha, sigma, dtype, generator)
    if samples == 1:
        return points, constant - d * bins.truncated_normal_offset(alpha, sigma)
    return points, bins.truncated_normal_log_prob(points, x, alpha, sigma)


def _weighted(path: LikelihoodInfo, log_q: Tensor, samples: int, scale: float) -> BitsInfo:
    """The bound from K points per row, with its two standard errors."""
    values = (path.loglik.double() - log_q, path.stderr.double(), path.variance.double().nan_to_num(0.0))
    log_weights, stderr, variance = (part.unflatten(0, (-1, samples)) for part in values)
    if samples == 1:
        nats, error = log_weights[:, 0], stderr[:, 0]
        spread = torch.full_like(nats, math.nan)
    else:
        log_weights = log_weights - 0.5 * variance
        nats = torch.logsumexp(log_weights, 1) - math.log(samples)
        share = torch.softmax(log_weights, 1)
        error = (share * stderr).square().sum(1).sqrt()
        spread = (samples * share).std(1) / math.sqrt(samples)
    dtype = path.loglik.dtype
    return BitsInfo(
        stderr=(error / scale).to(dtype), dequantisation_stderr=(spread / scale).to(dtype), nfe=path.nfe,
        nats=nats.to(dtype),
    )  # fmt: skip


def _validate_no_ode(ode_options: dict[str, Any], dequantisation: str) -> None:
    """Raises ValueError for options that have no effect with bound="elbo"."""
    given = [name for name, value in ode_options.items() if value is not None]
    if dequantisation != "uniform":
        given.append("dequantisation")
    if given:
        raise ValueError(f"{', '.join(given)} has no effect with bound='elbo', which takes no ODE solve.")
