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

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ndm_ct._autodiff import vjp
from ndm_ct._errors import PredictorError
from ndm_ct.divergence import BoundTrace, TraceEstimator, resolve
from ndm_ct.dynamics import ProbabilityFlow
from ndm_ct.model import NDM
from ndm_ct.solvers import Field, Solution, State, odeint

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
        loglik: log-density of the data end of the trajectory, nats, ``(B,)``: log_prior + logdet going up, log_prior -
            logdet coming down.
    """

    stderr: Tensor
    nfe: int
    vjps: int
    accepted: int
    rejected: int
    z: Tensor
    logdet: Tensor
    log_prior: Tensor
    loglik: Tensor


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
    solve = _Solve(model, x, (model.t_min, 1.0), rtol, atol, method, differentiable, cond)
    info = solve.augmented(resolve(trace, model.event_shape), generator)
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
    solve = _Solve(model, x, (model.t_min, 1.0), rtol, atol, method, differentiable, cond)
    return solve.transport(trace, generator, return_info)


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
    solve = _Solve(model, z1, (1.0, model.t_min), rtol, atol, method, differentiable, cond)
    return solve.transport(trace, generator, return_info)


@dataclass(frozen=True)
class _Solve:
    """One trajectory of the probability flow: from where to where, how accurately, with or without a graph."""

    model: NDM
    start: Tensor
    interval: tuple[float, float]
    rtol: float | None
    atol: float | None
    method: str | None
    differentiable: bool
    cond: dict[str, Any]

    def transport(self, trace: Trace | None, generator: torch.Generator | None, return_info: bool) -> Any:
        """The end of the trajectory, and its log-determinant if asked."""
        if return_info:
            info = self.augmented(resolve("auto" if trace is None else trace, self.model.event_shape), generator)
            return info.z, info
        for name, value in (("trace", trace), ("generator", generator)):
            if value is not None:
                raise ValueError(
                    f"{name} has no effect without a log-determinant; pass return_info=True or drop {name}."
                )
        with self._prepared() as flow:
            solution = self._integrate(lambda t, state: (flow(t, state[0]),), (self.start.double(),))
        return solution.state[0].to(self.start.dtype)

    def augmented(self, estimator: TraceEstimator, generator: torch.Generator | None) -> LikelihoodInfo:
        """State and log-determinants together, probes frozen."""
        model, z, dtype = self.model, self.start.double(), self.start.dtype
        bound = estimator.bind(z, generator)
        with self._prepared() as flow:
            solution = self._integrate(
                _augmented(flow, bound, model.event_shape), (z, z.new_zeros(z.shape[0], bound.columns))
            )
            end, logdets = solution.state
            logdet, stderr = bound.combine(logdets)
            upwards = self.interval[1] > self.interval[0]
            log_prior = model.log_prior(end if upwards else z)
            value = log_prior + logdet if upwards else log_prior - logdet
        return LikelihoodInfo(
            stderr=stderr.to(dtype),
            nfe=solution.evaluations,
            vjps=solution.evaluations * bound.products,
            accepted=solution.accepted,
            rejected=solution.rejected,
            z=end.to(dtype),
            logdet=logdet.to(dtype),
            log_prior=log_prior.to(dtype),
            loglik=value.to(dtype),
        )

    def _integrate(self, field: Field, state: State) -> Solution:
        method = "dopri5" if self.method is None else self.method
        rtol, atol = RTOL if self.rtol is None else self.rtol, ATOL if self.atol is None else self.atol
        return odeint(field, state, *self.interval, method=method, rtol=rtol, atol=atol)

    @contextmanager
    def _prepared(self) -> Iterator[ProbabilityFlow]:
        """The field, in eval mode, and with a graph only if it is asked for."""
        if self.differentiable and torch.is_inference_mode_enabled():
            raise RuntimeError(
                "differentiable=True keeps a graph, which torch.inference_mode() forbids; leave that mode."
            )
        with self.model.evaluating(), torch.set_grad_enabled(self.differentiable):
            yield self.model.flow(self.start.dtype, **self.cond)


def _augmented(flow: ProbabilityFlow, bound: BoundTrace, event_shape: tuple[int, ...]) -> Field:
    first = True

    def field(t: Tensor, state: State) -> State:
        nonlocal first
        part, trace = bound(flow.network_part(t), state[0])
        if first and not bool(trace.any()):
            _validate_attached(flow, t, state[0].detach())
        first = False
        return flow.assemble(t, state[0], part), flow.linear_divergence(t, event_shape) + trace

    return field


def _validate_attached(flow: ProbabilityFlow, t: Tensor, z: Tensor) -> None:
    """Refuse a predictor that autograd cannot see through: its divergence would silently be zero."""
    part = flow.network_part(t)
    value, pullback = vjp(part, z)
    (product,) = pullback(torch.ones_like(value))
    if bool((product != 0.0).any()) or torch.equal(value, part(z + 0.1)):
        return
    raise PredictorError(
        "the predictor's output depends on z, but autograd sees no dependence, so its divergence would be taken as "
        "zero; remove torch.no_grad(), .detach() or a conversion to numpy from the predictor."
    )
