r"""A solved path as a likelihood with its error budget.

The trace estimator reports its own random error and the solver's error. This module adds the density and the two
systematic errors of the model: the noise left at the data end (*truncation*), and the prior in place of the process'
own distribution at t = 1 (*prior mismatch*).
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ndm_ct._core.checks import as_time, event_size, expand, some, sum_event
from ndm_ct._core.errors import PredictorError
from ndm_ct._core.noise import Randomness
from ndm_ct._core.precision import resolution
from ndm_ct.divergence import EXACT_UP_TO, Exact, Hutchinson, LogDet, TraceEstimator
from ndm_ct.dynamics import ProbabilityFlow
from ndm_ct.likelihood.path import Problem
from ndm_ct.model import NDM
from ndm_ct.transforms import Identity

__all__ = ["LikelihoodInfo", "largest", "measure"]

_DOUBLINGS = 10
"""How often the noise is doubled in search of a score that is the data's."""


@dataclass(frozen=True, kw_only=True)
class LikelihoodInfo:
    r"""The error budget and the cost of a likelihood, of ``encode`` or of ``decode``; tensors on the data's device.

    The log-density misses its target by ``stderr`` (random), ``ode_error``, ``truncation`` and ``prior_mismatch``
    (systematic); together they are the error budget, in nats.

    Args:
        stderr: standard error of the trace estimate, ``(B,)``; 0 for the exact trace, NaN where it is unknown (a single
            probe, fewer than four sweeps).
        variance: unbiased estimate of the variance of the trace estimate, nats squared, ``(B,)``. ``stderr`` is larger
            than its root where few sweeps are behind it; for averages over rows or in exponents use the variance.
        ode_error: estimate of the size of the solver's own error, ``(B,)``. It adds up the local errors weighted with
            the score, and can be too small at tolerances of 1e-5 and more. For traces at nodes along the path it is the
            defect of the path weighted with the score, and what the rule leaves. For "quadrature" it is the change of
            log p against ten times the tolerances. It is NaN for the torchdiffeq methods. Where the truncation is
            estimated it includes the rounding of the network, of relative size :math:`\varepsilon` in its precision,
            about :math:`\varepsilon\,(\|\nabla \log p \odot \hat F\| + \sqrt d \log(\alpha s/\sigma))` at the data
            end with data of scale s. This dominates in half precision, and in float32 with tight tolerances or a tiny
            ``t_min``.
        truncation: estimate of :math:`\log p_{t_{min}} - \log p_0` at the data end, to first order in the noise left
            there, ``(B,)``. It is small against one nat where t_min is small enough for the data, and large where the
            noise hides them. Where the network's own error dominates its score at t_min, the score of more noise is
            taken (identity, prediction "x"), or it is NaN.
        prior_mismatch: :math:`KL(q(z_1 | x) \| p_1)`, the cost of using the prior :math:`p_1`
            in place of the process' own end, ``(B,)``.
        nfe: network evaluations of the row that took most, with those at nodes and for this budget.
        vjps: vector-Jacobian products of the row that took most.
        row_nfe: network evaluations of each row, ``(B,)``.
        row_vjps: vector-Jacobian products of each row, ``(B,)``.
        row_sweeps: sweeps of the quadrature behind each row, ``(B,)``; 0 for the other estimators.
        accepted: accepted solver steps of the row that took most.
        rejected: rejected solver steps of the row that took most.
        pullback: how vector-Jacobian products were taken: "torch.func" where the network can pass it, else "batched
            autograd", "autograd" (one backward pass per product), or "backward". The values are the same.
        failed: rows whose solve or trace failed, ``(B,)``; all their numbers are NaN.
        z: the other end of the trajectory: :math:`z_1`, or x for ``decode``; ``(B, *E)``.
        logdet: :math:`\log|\det \partial z_{end}/\partial z_{start}|`, nats, ``(B,)``.
        log_prior: :math:`\log p_1(z_1)`, nats, ``(B,)``.
        loglik: log-density of the data end of the trajectory, nats, ``(B,)``: log_prior + logdet going up, log_prior -
            logdet coming down.
    """

    stderr: Tensor
    variance: Tensor
    ode_error: Tensor
    truncation: Tensor
    prior_mismatch: Tensor
    nfe: int
    vjps: int
    row_nfe: Tensor
    row_vjps: Tensor
    row_sweeps: Tensor
    accepted: int
    rejected: int
    pullback: str
    failed: Tensor
    z: Tensor
    logdet: Tensor
    log_prior: Tensor
    loglik: Tensor


def measure(path: Problem, estimator: TraceEstimator, generator: Randomness) -> LikelihoodInfo:
    """Solve a path and report density, errors and cost.

    Args:
        path: the path. Its ``error_wanted`` says whether the systematic errors are estimated; else they are NaN.
        estimator: estimator of the log-determinant.
        generator: source of nodes and probes.

    Raises:
        ValueError: the estimator needs nodes that the path's method cannot visit.
        SolverError: the solve failed.
        PredictorError: the network's derivative is NaN or infinite.
    """
    if estimator.needs_nodes and path.method not in ("ode", "exponential"):
        raise ValueError(
            f"trace='{type(estimator).__name__.lower()}' needs states at times of its own in every row, which "
            f"method={path.method!r} cannot visit; use method='ode', or trace='hutchinson' or 'exact'."
        )
    with path.prepared():
        found = estimator.logdet(path, generator)
        failed = _failed(path, found)
        x, end = path.ends(found.solved)
        log_prior = path.model.log_prior(end)
        value = log_prior + found.value if path.upwards else log_prior - found.value
        truncation = mismatch = torch.full_like(value, torch.nan)
        nfe, vjps, ode_error = found.nfe, found.vjps, found.ode_error
        if path.error_wanted:
            with torch.no_grad():
                truncation, rounding, calls, used = _truncation(path, x.detach(), found.stderr, value, generator)
                mismatch = _prior_mismatch(path, x.detach(), generator)
            nfe, vjps, ode_error = nfe + calls, vjps + used, ode_error.detach() + rounding

        def known(number: Tensor) -> Tensor:
            return torch.where(failed, torch.nan, number).to(path.start.dtype)

        return LikelihoodInfo(
            stderr=known(found.stderr).detach(),
            variance=known(found.variance).detach(),
            ode_error=known(ode_error).detach(),
            truncation=known(truncation),
            prior_mismatch=known(mismatch),
            nfe=largest(nfe),
            vjps=largest(vjps),
            row_nfe=nfe,
            row_vjps=vjps,
            row_sweeps=found.sweeps,
            accepted=largest(found.solved.accepted),
            rejected=largest(found.solved.rejected),
            pullback=path.derivatives.way,
            failed=failed,
            z=found.solved.state[0].to(path.start.dtype),
            logdet=known(found.value),
            log_prior=known(log_prior),
            loglik=known(value),
        )


def _failed(path: Problem, found: LogDet) -> Tensor:
    """Rows without a result: their solve failed, or their log-determinant is NaN though their path is finite."""
    broken = found.value.isnan() & ~found.solved.failed
    if path.on_failure == "raise" and bool(broken.any()):
        raise PredictorError(
            f"the derivative of the network's output is NaN or infinite in batch rows "
            f"{some(torch.nonzero(broken).flatten().tolist())}, though its output is finite; look for a square root, "
            "norm or division at zero, or pass on_failure='nan'."
        )
    return found.solved.failed | broken


def _prior_mismatch(path: Problem, x: Tensor, generator: Randomness) -> Tensor:
    data = x.to(path.start.dtype)
    return path.model.prior_divergence(path.model.process.along(data, **path.cond), data, generator)


def _truncation(
    path: Problem, x: Tensor, stderr: Tensor, value: Tensor, generator: Randomness
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""First-order change of the log-density at x from the noise and the scaling left at t_min.

    .. math::
        \log p_{t_{min}}(x) - \log p_0(x) \approx
        \tfrac12 \sigma^2 \bigl(\operatorname{tr} \nabla s + \|s\|^2\bigr)
        - \log \alpha\, (d + \langle x, s \rangle)

    Smoothing with variance h changes a density by :math:`\tfrac h2 \Delta p`, and :math:`\Delta p / p =
    \operatorname{tr} \nabla s + \|s\|^2`. A transform that is not the identity at t_min changes it further, by minus
    :math:`\operatorname{tr} \nabla (F - x) + \langle F - x, s \rangle`.

    The score s is the network's, divided by :math:`\sigma` or its square, and so is its error. Where that dominates, s
    is not that of the data, and no narrow data that the noise hides explain it (:math:`\operatorname{tr} \nabla s` is
    too small). There the change is :math:`-t_{min} (\operatorname{div} v + \langle v, s \rangle)`, by the continuity
    equation, with the score at the least noise that resolves it; for other transforms and predictions it is unknown. A
    network that is the velocity has a density at :math:`\sigma = 0`, and in few dimensions a second solve says it.

    Args:
        path: the path that was solved.
        x: its data end, float64, ``(B, *E)``.
        stderr: standard error of the value, ``(B,)``.
        value: :math:`\log p_{t_{min}}(x)`, float64, ``(B,)``.
        generator: source of probes.

    Returns:
        The change, nats, ``(B,)``, NaN where it is unknown; the error of the value by the network's rounding, nats,
        ``(B,)``; evaluations and vector-Jacobian products, ``(B,)``.
    """
    model, flow = path.model, path.flow()
    t = as_time(model.t_min, x.device).expand(len(x))
    c, d, none = model.schedule(t), event_size(model.event_shape), torch.zeros_like(t, dtype=torch.long)
    if model.t_noise > model.t_min:  # no noise is left
        return torch.where(c.alpha == 1.0, 0.0, torch.nan), torch.zeros_like(t), none, none
    estimator = Exact() if d <= EXACT_UP_TO else Hutchinson(chunk=1)
    bound = estimator.bind(x, generator)
    _, forms, F = bound.with_byproduct(lambda z: (flow.prediction(t, z),) * 2, x, flow.derivatives)
    s = flow.score(t, x, F)
    trace_of_F, _ = bound.combine(forms)
    hidden = 0.5 * (c.alpha * trace_of_F - d)
    rest = 0.5 * c.sigma**2 * sum_event(s * s) - c.alpha.log() * (d + sum_event(x * s))
    resolved, score, spent = _resolved_score(flow, t, x, s)
    rounding = _rounding(path, t, score * F)
    known = (resolved | (hidden.abs() >= 0.1 * rest.abs())) & _of_one_size(path, x, t)
    used = none + bound.vjps
    if model.prediction == "velocity":
        exactly = value if bool((stderr == 0.0).all()) else None
        change, calls, more = _change_from_zero(path, x, exactly, torch.where(known, hidden + rest, torch.nan))
        return change, rounding, 1 + spent + calls, used + more
    still = model.process.ordinary and model.prediction == "x" and model.t_min > 0.0
    factor = c.dalpha - c.alpha * c.dlog_sigma
    velocity = expand(factor, x) * F + expand(c.dlog_sigma, x) * x
    flux = factor * trace_of_F + d * c.dlog_sigma + sum_event(velocity * score)
    change = torch.where(known, hidden + rest, -t * flux if still else torch.nan)
    if isinstance(model.transform, Identity) or model.t_min == 0.0:
        return change, rounding, 1 + spent, used
    transform = model.transform.along

    def moved(z: Tensor) -> Tensor:
        return transform(z.to(dtype=flow.dtype), **path.cond)(t).to(z.dtype) - z

    shift, forms = bound(moved, x)
    return change - bound.combine(forms)[0] - sum_event(shift * s), rounding, 1 + spent, used


def _rounding(path: Problem, t: Tensor, slope: Tensor) -> Tensor:
    r"""The error of log p at t by the rounding of the network's output, nats, ``(B,)``.

    A relative rounding :math:`\varepsilon` of outputs moves the data end by about :math:`\varepsilon\hat F`, and the
    trace by about :math:`\varepsilon\sqrt d` for every unit of :math:`\log(\alpha/\sigma)` in which the data show.

    Args:
        path: the path.
        t: its data end, ``(B,)``.
        slope: :math:`\nabla \log p \odot \hat F` there, ``(B, *E)``.
    """
    model, c = path.model, path.model.schedule(t)
    decades = (model.unit * c.alpha / c.sigma).log().clamp(min=1.0)
    size = sum_event(slope.double().square()).sqrt() + event_size(model.event_shape) ** 0.5 * decades
    return resolution(model, path.start.dtype) * size


def _of_one_size(path: Problem, x: Tensor, t: Tensor) -> Tensor:
    """Rows whose noise at t has the scale 1, ``(B,)``."""
    r = path.model.process.along(x.to(path.flow().dtype), **path.cond).r
    return torch.ones_like(t, dtype=torch.bool) if r is None else r(t).abs().flatten(1).amax(1) < 1e-3


def _change_from_zero(path: Problem, x: Tensor, value: Tensor | None, change: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""The change of a velocity where it is NaN: :math:`\log p_{t_{min}}(x) - \log p_0(x)`, by a second solve.

    By a third one too if ``value``, the exact :math:`\log p_{t_{min}}`, is None.

    It stays unknown in more dimensions than have their exact trace, and where z at t = 0 is not x.

    Returns:
        The change, nats, ``(B,)``; evaluations and vector-Jacobian products of these solves, ``(B,)``.
    """
    model, none = _at_sigma_zero(path.model), torch.zeros_like(change, dtype=torch.long)
    rows = torch.nonzero(change.isnan() & x.isfinite().flatten(1).all(1)).flatten()
    if model is None or event_size(model.event_shape) > EXACT_UP_TO or len(rows) == 0:
        return change, none, none
    problems = [
        replace(
            path, model=each, start=x[rows].to(path.start.dtype), interval=(each.t_min, 1.0), cond=path.cond.take(rows),
            method="ode" if path.method == "exponential" else path.method, differentiable=False, callback=None,
        )
        for each in (model, path.model)[: 1 if value is not None else 2]
    ]  # fmt: skip
    found = [Exact().logdet(problem, None) for problem in problems]
    densities = [problem.log_prior(one.solved) + one.value for problem, one in zip(problems, found, strict=True)]
    at_t_min = densities[1] if value is None else value[rows]
    calls, used = torch.stack([one.nfe for one in found]).sum(0), torch.stack([one.vjps for one in found]).sum(0)
    spent = [none.index_put((rows,), each.to(none)) for each in (calls, used)]
    return change.index_put((rows,), at_t_min - densities[0]), spent[0], spent[1]


def _at_sigma_zero(model: NDM) -> NDM | None:
    """The model with its data at t = 0, everything else shared; None unless z is x there, without noise."""
    with torch.no_grad():
        first = model.schedule(as_time(0.0, model.schedule.device))
    if float(first.sigma) != 0.0 or float(first.alpha) != 1.0:
        return None
    other = copy.copy(model)
    other.t_min, other.t_noise = 0.0, model.schedule.safe_t_min
    return other


def _resolved_score(flow: ProbabilityFlow, t: Tensor, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether the score at t is that of the data; else that of the least noise where it is; evaluations by rows.

    The score divides the error of the network's noise or velocity by sigma, so that error halves with twice the noise.
    A score that changes by at most a third is taken to be the data's.
    """
    schedule = flow.process.schedule
    c, found, rounds = schedule(t), torch.zeros_like(t, dtype=torch.bool), 0
    at_once, spent = found, torch.zeros_like(t, dtype=torch.long)
    while rounds == 0 or (rounds < _DOUBLINGS and not bool(found.all())):
        rounds, spent = rounds + 1, spent + (~found).long()
        later = schedule.time_at(torch.atan2(2.0**rounds * c.sigma, c.alpha)).clamp(max=1.0)
        new = flow.score(later, x, flow.prediction(later, x))
        found = found | (sum_event((new - score).square()) <= sum_event(score.square()) / 9.0)
        at_once = found if rounds == 1 else at_once
        score = torch.where(expand(found, x).bool(), score, new)
    return at_once, score, spent


def largest(counts: Tensor) -> int:
    """The count of the row that took most; 0 for an empty batch."""
    return int(counts.max()) if counts.numel() else 0
