r"""Bits per dimension of integer data: :math:`-\log_2 P(x)/d`.

With the probability flow the probability of a bin is bounded by dequantisation (:mod:`ndm_ct.quantisation`),
:math:`\log P(x) \ge E[\log p(\tilde x)] + d\,c`; with the ELBO the decoder over levels makes the bound directly one on
:math:`\log P(x)`.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ndm_ct import likelihood, objectives
from ndm_ct._shapes import as_time, choose, event_size
from ndm_ct.likelihood import Trace
from ndm_ct.model import NDM
from ndm_ct.quantisation import Quantisation

__all__ = ["BitsInfo", "bits_per_dim"]

DEQUANTISATIONS = ("uniform", "truncated-normal")


@dataclass(frozen=True)
class BitsInfo:
    """What ``bits_per_dim`` found out on the way.

    Args:
        stderr: standard error of the estimate, bits per dimension, ``(B,)``: of the trace for "ode" (0 if exact; the
            dequantisation noise is not in it), of times and noise for "elbo".
        nfe: network evaluations of the whole batch.
        nats: the bound on log P(x) in nats per event, ``(B,)``.
    """

    stderr: Tensor
    nfe: int
    nats: Tensor


def bits_per_dim(
    model: NDM,
    x: Tensor,
    *,
    levels: int = 256,
    bound: str = "ode",
    dequantisation: str = "uniform",
    range: tuple[float, float] = (-1.0, 1.0),  # noqa: A002 (the field's word for it)
    samples: int | None = None,
    trace: Trace | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    method: str | None = None,
    generator: torch.Generator | None = None,
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
        samples: for "elbo", pairs (t, eps) per row; None is 1.
        trace: for "ode", as in :func:`ndm_ct.loglik`; None is "auto".
        rtol: for "ode".
        atol: for "ode".
        method: for "ode".
        generator: source of dequantisation noise, probes, times.
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
    choose("bound", bound, ("ode", "elbo"))
    choose("dequantisation", dequantisation, DEQUANTISATIONS)
    _refuse_ineffective(bound, dequantisation, samples, {"trace": trace, "rtol": rtol, "atol": atol, "method": method})
    dtype = model.dtype or torch.get_default_dtype()
    d = event_size(model.event_shape)
    with torch.no_grad():
        if bound == "elbo":
            nats, info = objectives.elbo(
                model, bins.centres(x, dtype), samples=1 if samples is None else samples, quantisation=bins,
                generator=generator, return_info=True, **cond,
            )  # fmt: skip
            stderr, nfe = info.stderr, info.nfe
        else:
            start, offset = _dequantised(model, bins, x, dequantisation, dtype, generator)
            value, path = likelihood.loglik(
                model, start, trace="auto" if trace is None else trace, rtol=rtol, atol=atol, method=method,
                generator=generator, return_info=True, **cond,
            )  # fmt: skip
            nats, stderr, nfe = value + d * offset, path.stderr, path.nfe
    scale = d * math.log(2.0)
    result = -nats / scale
    return (result, BitsInfo(stderr / scale, nfe, nats)) if return_info else result


def _dequantised(
    model: NDM,
    bins: Quantisation,
    x: Tensor,
    dequantisation: str,
    dtype: torch.dtype,
    generator: torch.Generator | None,
) -> tuple[Tensor, float]:
    """Real data in the bins of x, and the offset per dimension of its log-density."""
    if dequantisation == "uniform":
        return bins.uniform(x, dtype, generator), bins.uniform_offset
    at_start = model.schedule(as_time(model.t_min, x.device))
    alpha, sigma = float(at_start.alpha), float(at_start.sigma)
    return bins.truncated_normal(x, alpha, sigma, dtype, generator), bins.truncated_normal_offset(alpha, sigma)


def _refuse_ineffective(bound: str, dequantisation: str, samples: int | None, ode_options: dict[str, Any]) -> None:
    if bound == "ode" and samples is not None:
        raise ValueError("samples has no effect with bound='ode'; it belongs to bound='elbo'.")
    if bound == "elbo":
        given = [name for name, value in ode_options.items() if value is not None]
        if dequantisation != "uniform":
            given.append("dequantisation")
        if given:
            raise ValueError(f"{', '.join(given)} has no effect with bound='elbo', which takes no ODE solve.")
