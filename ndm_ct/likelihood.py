r"""The likelihood of the probability flow, by the change of variables along it.

.. math::
    \log p_{t_{min}}(x) = \log p_1(z_1) + \int_{t_{min}}^1 \operatorname{div} v(z_t, t)\, dt, \qquad
    \dot z = v(z, t),\ z_{t_{min}} = x,

.. math::
    \operatorname{div} v = d\,\frac{\sigma'}{\sigma}
    + \operatorname{tr} \frac{\partial}{\partial z}
      \Bigl[\Bigl(\alpha' - \frac{\alpha \sigma'}{\sigma}\Bigr) \hat F + \alpha \hat{\dot F}\Bigr] .

The first term is exact; probes touch only the second. States and log-determinants are float64 whatever the network's
precision, so accumulated rounding is the network's own.

Warning:
    The number is the exact density of the *deterministic* generator. It equals the marginal density of the SDE sampler
    only where the model's score is the true marginal score; see the README, "What the number means".

References:
    Song et al., Score-Based Generative Modeling through SDEs, appendix D.2, https://arxiv.org/abs/2011.13456
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ndm_ct._shapes import choose
from ndm_ct.divergence import BoundTrace, TraceEstimator, resolve
from ndm_ct.dynamics import ProbabilityFlow
from ndm_ct.model import NDM
from ndm_ct.solvers import ADAPTIVE_METHODS, Solution, odeint

__all__ = ["LikelihoodInfo", "decode", "encode", "loglik"]

RTOL = ATOL = 2e-6
"""Default tolerances: below 5e-4 nat on the exact models of the tests (1e-5 gives up to 2e-3)."""

Trace = str | TraceEstimator


@dataclass(frozen=True)
class LikelihoodInfo:
    r"""What a likelihood, ``encode`` or ``decode`` found out on the way; all tensors on the data's device.

    Args:
        stderr: standard error of the trace estimate, nats, ``(B,)``; 0 for the exact trace, NaN for one probe.
        nfe: network evaluations (of the whole batch).
        vjps: vector-Jacobian products (of the whole batch).
        accepted: accepted solver steps.
        rejected: rejected solver steps.
        z: the other end of the trajectory: :math:`z_1`, or x for ``decode``; ``(B, *E)``.
        logdet: :math:`\log|\det \partial z_{end}/\partial z_{start}|`, nats, ``(B,)``.
        log_prior: :math:`\log p_1(z_1)`, nats, ``(B,)``.
    """

    stderr: Tensor
    nfe: int
    vjps: int
    accepted: int
    rejected: int
    z: Tensor
    logdet: Tensor
    log_prior: Tensor

    @property
    def loglik(self) -> Tensor:
        """Log-density in nats of the data end of the trajectory: log_prior + logdet going up, - logdet coming down."""
        return self._loglik

    _loglik: Tensor


@overload
def loglik(
    model: NDM, x: Tensor, *, trace: Trace = ..., rtol: float | None = ..., atol: float | None = ...,
    method: str | None = ..., differentiable: bool = ..., generator: torch.Generator | None = ...,
    return_info: Literal[False] = ..., **cond: Any,
) -> Tensor: ...  # fmt: skip


@overload
def loglik(
    model: NDM, x: Tensor, *, trace: Trace = ..., rtol: float | None = ..., atol: float | None = ...,
    method: str | None = ..., differentiable: bool = ..., generator: torch.Generator | None = ...,
    return_info: Literal[True], **cond: Any,
) -> tuple[Tensor, LikelihoodInfo]: ...  # fmt: skip


def loglik(
    model: NDM,
    x: Tensor,
    *,
    trace: Trace = "auto",
    rtol: float | None = None,
    atol: float | None = None,
    method: str | None = None,
    differentiable: bool = False,
    generator: torch.Generator | None = None,
    return_info: bool = False,
    **cond: Any,
) -> Tensor | tuple[Tensor, LikelihoodInfo]:
    r""":math:`\log p_{t_{min}}` of the probability flow at z = x, in nats per event.

    No rescaling by :math:`\alpha` is made, and none of your own preprocessing is undone: if you scaled the data, add
    the log-determinant of that scaling.

    Args:
        model: the model.
        x: data, shape ``(B, *E)``, the model's dtype.
        trace: "exact", "hutchinson" (16 Rademacher probes), "auto" (exact up to 32 dimensions), or an object such as
            ``divergence.Hutchinson(probes=4)``.
        rtol: relative tolerance of the solver; None is 2e-6.
        atol: absolute tolerance of the solver; None is 2e-6.
        method: adaptive ODE method; None is "dopri5".
        differentiable: keep the graph, for gradients with respect to parameters and x.
        generator: source of the probes.
        return_info: also return a :class:`LikelihoodInfo`.
        cond: conditioning of predictor and transform.

    Returns:
        Shape ``(B,)``, in the dtype of ``x``; with ``return_info`` a pair.

    Raises:
        ValueError, TypeError: unusable data, options or conditioning, named in the message.
        PredictorError: the network returned something that is not a prediction.
        SolverError: the solve failed; carries t, dt and batch rows.

    Example:
        >>> import ndm_ct
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
        >>> x = torch.zeros(1, 2, dtype=torch.float64)
        >>> float((ndm_ct.loglik(model, x) - model.log_prob(x)).abs()) < 1e-3
        True
    """
    model.validate(x, cond, loglik)
    info = _solve(
        model, x, (model.t_min, 1.0), resolve(trace, model.event_shape), rtol, atol, method, differentiable, generator,
        cond,
    )  # fmt: skip
    return (info.loglik, info) if return_info else info.loglik


def encode(
    model: NDM,
    x: Tensor,
    *,
    trace: Trace | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    method: str | None = None,
    differentiable: bool = False,
    generator: torch.Generator | None = None,
    return_info: bool = False,
    **cond: Any,
) -> Any:
    r"""Carry data along the probability flow to noise: :math:`x \mapsto z_1`. Inverse of :func:`decode`.

    Args:
        model: the model.
        x: data, shape ``(B, *E)``.
        trace: how to estimate ``info.logdet``; None is "auto". Only with ``return_info``.
        rtol: as in :func:`loglik`.
        atol: as in :func:`loglik`.
        method: as in :func:`loglik`.
        differentiable: as in :func:`loglik`.
        generator: source of the probes. Only with ``return_info``.
        return_info: also return a :class:`LikelihoodInfo`, which costs the divergence.
        cond: conditioning.

    Returns:
        :math:`z_1`, shape ``(B, *E)``; with ``return_info`` a pair.
    """
    model.validate(x, cond, encode)
    return _transport(
        model, x, (model.t_min, 1.0), trace, rtol, atol, method, differentiable, generator, return_info, cond
    )


def decode(
    model: NDM,
    z1: Tensor,
    *,
    trace: Trace | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    method: str | None = None,
    differentiable: bool = False,
    generator: torch.Generator | None = None,
    return_info: bool = False,
    **cond: Any,
) -> Any:
    r"""Carry noise along the probability flow to data: :math:`z_1 \mapsto x`. Inverse of :func:`encode`.

    Args:
        model: the model.
        z1: noise, shape ``(B, *E)``.
        trace: as in :func:`encode`.
        rtol: as in :func:`loglik`.
        atol: as in :func:`loglik`.
        method: as in :func:`loglik`.
        differentiable: as in :func:`loglik`.
        generator: as in :func:`encode`.
        return_info: as in :func:`encode`; ``info.logdet`` is that of :math:`z_1 \mapsto x`.
        cond: conditioning.

    Returns:
        x, shape ``(B, *E)``; with ``return_info`` a pair.
    """
    model.validate(z1, cond, decode, name="z1")
    return _transport(
        model, z1, (1.0, model.t_min), trace, rtol, atol, method, differentiable, generator, return_info, cond
    )


def _transport(
    model: NDM,
    start: Tensor,
    interval: tuple[float, float],
    trace: Trace | None,
    rtol: float | None,
    atol: float | None,
    method: str | None,
    differentiable: bool,
    generator: torch.Generator | None,
    return_info: bool,
    cond: dict[str, Any],
) -> Any:
    """``encode`` and ``decode``: the end of the trajectory, and its log-determinant if asked."""
    if return_info:
        estimator = resolve("auto" if trace is None else trace, model.event_shape)
        info = _solve(model, start, interval, estimator, rtol, atol, method, differentiable, generator, cond)
        return info.z, info
    for name, value in (("trace", trace), ("generator", generator)):
        if value is not None:
            raise ValueError(f"{name} has no effect without a log-determinant; pass return_info=True or drop {name}.")
    with _solving(model, differentiable):
        flow = model.flow(start.dtype, **cond)
        solution = _integrate(lambda t, state: (flow(t, state[0]),), (start.double(),), interval, rtol, atol, method)
    return solution.state[0].to(start.dtype)


def _solve(
    model: NDM,
    start: Tensor,
    interval: tuple[float, float],
    estimator: TraceEstimator,
    rtol: float | None,
    atol: float | None,
    method: str | None,
    differentiable: bool,
    generator: torch.Generator | None,
    cond: dict[str, Any],
) -> LikelihoodInfo:
    """The augmented solve: state and log-determinants together, probes frozen."""
    with _solving(model, differentiable):
        z = start.double()
        bound = estimator.bind(z, generator)
        logdets = z.new_zeros(z.shape[0], bound.columns)
        field = _augmented(model.flow(start.dtype, **cond), bound, model.event_shape)
        solution = _integrate(field, (z, logdets), interval, rtol, atol, method)
        end, logdets = solution.state
        logdet, stderr = bound.combine(logdets)
        upwards = interval[1] > interval[0]
        log_prior = model.prior.log_prob(end if upwards else z)
        value = log_prior + logdet if upwards else log_prior - logdet
    dtype = start.dtype
    return LikelihoodInfo(
        stderr=stderr.to(dtype), nfe=solution.evaluations, vjps=solution.evaluations * bound.products,
        accepted=solution.accepted, rejected=solution.rejected, z=end.to(dtype), logdet=logdet.to(dtype),
        log_prior=log_prior.to(dtype), _loglik=value.to(dtype),
    )  # fmt: skip


def _augmented(
    flow: ProbabilityFlow, bound: BoundTrace, event_shape: tuple[int, ...]
) -> Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def field(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        part, trace = bound(flow.network_part(t), state[0])
        return flow.assemble(t, state[0], part), flow.linear_divergence(t, event_shape) + trace

    return field


def _integrate(
    field: Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]],
    state: tuple[Tensor, ...],
    interval: tuple[float, float],
    rtol: float | None,
    atol: float | None,
    method: str | None,
) -> Solution:
    method = choose("method", "dopri5" if method is None else method, ADAPTIVE_METHODS)
    return odeint(
        field, state, *interval, method=method, rtol=RTOL if rtol is None else rtol, atol=ATOL if atol is None else atol
    )


@contextlib.contextmanager
def _solving(model: NDM, differentiable: bool) -> Any:
    """Eval mode, and no graph unless it is asked for."""
    with model.evaluating(), torch.set_grad_enabled(differentiable):
        yield
