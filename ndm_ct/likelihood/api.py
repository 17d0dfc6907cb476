r"""The likelihood of the probability flow, by the change of variables along it.

.. math::
    \log p_{t_{min}}(x) = \log p_1(z_1) + \int_{t_{min}}^1 \operatorname{div} v(z_t, t)\, dt, \qquad
    \dot z = v(z, t),\ z_{t_{min}} = x,

.. math::
    \operatorname{div} v = d\,\frac{\sigma'}{\sigma}
    + \operatorname{tr} \frac{\partial}{\partial z}
      \Bigl[\Bigl(\alpha' - \frac{\alpha \sigma'}{\sigma}\Bigr) \hat F + \alpha \hat{\dot F}\Bigr] .

The first term is exact; probes touch only the second. Three ways to its trace: ``"exact"`` and ``"hutchinson"``
integrate it beside the state (:mod:`ndm_ct.likelihood.path`), ``"quadrature"`` solves the path first and samples the
trace along it (:mod:`ndm_ct.likelihood.quadrature`). States and log-determinants are float64 whatever the network's
precision, so accumulated rounding is the network's own.

Warning:
    The number is the exact density of the *deterministic* generator. It equals the marginal density of the SDE sampler
    only where the model's score is the true marginal score; see the README, "What the number means".

References:
    Song et al., Score-Based Generative Modeling through SDEs, appendix D.2, https://arxiv.org/abs/2011.13456
    Stein, A two-sample test for a linear hypothesis whose power is independent of the variance (1945): how many
    further sweeps an accuracy needs
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ndm_ct._core.checks import as_time, event_size, sum_event, take_rows, validate_positive
from ndm_ct._core.noise import Randomness, rows_of, validate_randomness
from ndm_ct.divergence import EXACT_UP_TO, Exact, Hutchinson, Quadrature, TraceEstimator, resolve
from ndm_ct.likelihood.path import Differentiable, Problem, Solved, validate_attached
from ndm_ct.likelihood.quadrature import Sweeps, Totals, linear_logdet
from ndm_ct.model import NDM
from ndm_ct.transforms import Identity

__all__ = ["LikelihoodInfo", "decode", "encode", "loglik"]

TOLERANCE = 2e-6
"""Default rtol and atol where the log-determinant is solved for: below 5e-4 nat on the exact models of the tests."""

PATH_TOLERANCE = 3e-5
r"""The same for ``"quadrature"``, in units of :math:`\sigma_t`: the path's error is then below that of the trace."""

Trace = str | TraceEstimator | Quadrature

_SHARE = 0.7
"""Of the sweeps that seem to be missing, how many to add before looking again: the first guess of a variance is rough,
and what it asks for includes a margin for that."""

_PER_ROUND = 32
"""Further sweeps of one round at most: bounds the memory for their nodes."""


@dataclass(frozen=True)
class LikelihoodInfo:
    r"""What a likelihood, ``encode`` or ``decode`` found out on the way; all tensors on the data's device.

    The log-density misses its target by ``stderr`` (random), ``ode_error``, ``truncation`` and ``prior_mismatch``
    (systematic); together they are the error budget, in nats.

    Args:
        stderr: standard error of the trace estimate, ``(B,)``; 0 for the exact trace, NaN where it is unknown (a single
            probe, fewer than four sweeps).
        ode_error: estimate of the size of the solver's own error, ``(B,)``: local errors weighted with the score (too
            small at tolerances of 1e-4 and more, whose steps are too long for them to tell); for "quadrature" the
            change of log p against ten times the tolerances; NaN for the torchdiffeq methods.
        truncation: estimate of :math:`\log p_{t_{min}} - \log p_0` at the data end, to first order in the noise left
            there, ``(B,)``: small against one nat where the model resolves the data, large where it does not.
        prior_mismatch: :math:`KL(q(z_1 | x) \| p_1)`, what taking :math:`p_1` for the process' end costs, ``(B,)``.
        nfe: network evaluations of the row that took most, nodes of the quadrature and budget included.
        vjps: vector-Jacobian products of the row that took most.
        row_nfe: network evaluations of each row, ``(B,)``.
        row_vjps: vector-Jacobian products of each row, ``(B,)``.
        row_sweeps: sweeps of the quadrature behind each row, ``(B,)``; 0 for the other estimators.
        accepted: accepted solver steps of the row that took most.
        rejected: rejected solver steps of the row that took most.
        failed: rows whose solve failed, ``(B,)``; they are NaN in everything else.
        z: the other end of the trajectory: :math:`z_1`, or x for ``decode``; ``(B, *E)``.
        logdet: :math:`\log|\det \partial z_{end}/\partial z_{start}|`, nats, ``(B,)``.
        log_prior: :math:`\log p_1(z_1)`, nats, ``(B,)``.
        loglik: log-density of the data end of the trajectory, nats, ``(B,)``: log_prior + logdet going up, log_prior -
            logdet coming down.
    """

    stderr: Tensor
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
    failed: Tensor
    z: Tensor
    logdet: Tensor
    log_prior: Tensor
    loglik: Tensor


@overload
def loglik(
    model: NDM, x: Tensor, *, trace: Trace = ..., stderr: float | None = ..., rtol: float | None = ...,
    atol: float | None = ..., method: str | None = ..., on_failure: str = ..., differentiable: Differentiable = ...,
    generator: Randomness = ..., return_info: Literal[False] = ..., **cond: Any,
) -> Tensor: ...  # fmt: skip


@overload
def loglik(
    model: NDM, x: Tensor, *, trace: Trace = ..., stderr: float | None = ..., rtol: float | None = ...,
    atol: float | None = ..., method: str | None = ..., on_failure: str = ..., differentiable: Differentiable = ...,
    generator: Randomness = ..., return_info: Literal[True], **cond: Any,
) -> tuple[Tensor, LikelihoodInfo]: ...  # fmt: skip


def loglik(
    model: NDM,
    x: Tensor,
    *,
    trace: Trace = "auto",
    stderr: float | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    method: str | None = None,
    on_failure: str = "raise",
    differentiable: Differentiable = False,
    generator: Randomness = None,
    return_info: bool = False,
    **cond: Any,
) -> Tensor | tuple[Tensor, LikelihoodInfo]:
    r""":math:`\log p_{t_{min}}` of the probability flow at z = x, in nats per event.

    No rescaling by :math:`\alpha` is made, and none of your own preprocessing is undone: if you scaled the data, add
    the log-determinant of that scaling. Behind a Flow, which is part of the model, it is that at z = h(x), plus
    :math:`\log|\det \partial h/\partial x|`; behind an Encoder there is only a bound (:func:`ndm_ct.elbo`).

    Args:
        model: the model.
        x: data, shape ``(B, *E)``, the model's dtype.
        trace: "exact"; "quadrature" (probes at nodes along the path); "hutchinson" (16 Rademacher probes frozen for the
            solve); "auto" (exact up to 32 dimensions, else quadrature); or an object such as
            ``divergence.Quadrature(sweeps=16)``.
        stderr: the standard error to reach, nats per event: rows get sweeps until they are there. Only with
            "quadrature" (the exact trace has none to reduce).
        rtol: relative tolerance of the solver; None is 3e-5, in units of :math:`\sigma_t`, for "quadrature", else 2e-6.
        atol: absolute tolerance, likewise.
        method: "rowwise" (None; each row has steps of its own) or a torchdiffeq method such as "dopri5".
        on_failure: "raise", or "nan": rows that cannot be solved become NaN (only rowwise).
        differentiable: True keeps the graph, for gradients with respect to parameters and x; "adjoint" gets them from
            a backward solve, in memory that does not grow with the number of steps (torchdiffeq methods, no
            quadrature).
        generator: source of nodes and probes; or a sequence of one per row, whose result is then its own in any batch.
        return_info: also return a :class:`LikelihoodInfo`, which costs some percent for its error budget.
        cond: conditioning of predictor and transform; tensors with one entry per row of x go with their rows.

    Returns:
        Shape ``(B,)``, in the dtype of ``x``, -inf below its range; with ``return_info`` a pair.

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
    validate_randomness(generator, len(x))
    options = Options(trace, stderr, rtol, atol, method, on_failure, differentiable)
    info = options.likelihood(model, x, (model.t_min, 1.0), cond, generator, budget=return_info)
    return (info.loglik, info) if return_info else info.loglik


def encode(
    model: NDM,
    x: Tensor,
    *,
    trace: Trace | None = None,
    stderr: float | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    method: str | None = None,
    on_failure: str = "raise",
    differentiable: Differentiable = False,
    generator: Randomness = None,
    return_info: bool = False,
    **cond: Any,
) -> Any:
    r"""Carry data along the probability flow to noise: :math:`x \mapsto z_1`. Inverse of :func:`decode`.

    Args:
        model: the model.
        x: data, shape ``(B, *E)``.
        trace: how to estimate ``info.logdet``; None is "auto". Only with ``return_info``.
        stderr: as in :func:`loglik`. Only with ``return_info``.
        rtol: as in :func:`loglik`.
        atol: as in :func:`loglik`.
        method: as in :func:`loglik`.
        on_failure: as in :func:`loglik`.
        differentiable: as in :func:`loglik`.
        generator: source of nodes and probes, only with ``return_info``; or of an Encoder's noise.
        return_info: also return a :class:`LikelihoodInfo`, which costs the divergence.
        cond: conditioning.

    Returns:
        :math:`z_1`, shape ``(B, *E)``; with ``return_info`` a pair.
    """
    model.validate(x, cond, encode)
    validate_randomness(generator, len(x))
    options = Options(trace, stderr, rtol, atol, method, on_failure, differentiable)
    return options.transport(model, x, (model.t_min, 1.0), cond, generator, return_info)


def decode(
    model: NDM,
    z1: Tensor,
    *,
    trace: Trace | None = None,
    stderr: float | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    method: str | None = None,
    on_failure: str = "raise",
    differentiable: Differentiable = False,
    generator: Randomness = None,
    return_info: bool = False,
    **cond: Any,
) -> Any:
    r"""Carry noise along the probability flow to data: :math:`z_1 \mapsto x`. Inverse of :func:`encode`.

    Args:
        model: the model.
        z1: noise, shape ``(B, *E)``.
        trace: as in :func:`encode`.
        stderr: as in :func:`encode`.
        rtol: as in :func:`loglik`.
        atol: as in :func:`loglik`.
        method: as in :func:`loglik`.
        on_failure: as in :func:`loglik`.
        differentiable: as in :func:`loglik`.
        generator: as in :func:`encode`.
        return_info: as in :func:`encode`; ``info.logdet`` is that of :math:`z_1 \mapsto x`.
        cond: conditioning.

    Returns:
        x, shape ``(B, *E)``; with ``return_info`` a pair.
    """
    model.validate_state(z1, cond, decode, name="z1")
    validate_randomness(generator, len(z1))
    options = Options(trace, stderr, rtol, atol, method, on_failure, differentiable)
    return options.transport(model, z1, (1.0, model.t_min), cond, generator, return_info)


@dataclass(frozen=True)
class Options:
    """The options that the likelihood functions share, as the user gave them; see :func:`loglik`."""

    trace: Trace | None
    stderr: float | None
    rtol: float | None
    atol: float | None
    method: str | None
    on_failure: str
    differentiable: Differentiable

    def transport(
        self, model: NDM, start: Tensor, interval: tuple[float, float], cond: dict[str, Any],
        generator: Randomness, return_info: bool,
    ) -> Any:  # fmt: skip
        """The end of the path, and its log-determinant if asked."""
        if return_info:
            info = self.likelihood(model, start, interval, cond, generator, budget=True)
            return info.z, info
        noise = generator if model.transform.bijective else None
        for name, value in (("trace", self.trace), ("stderr", self.stderr), ("generator", noise)):
            if value is not None:
                raise ValueError(
                    f"{name} has no effect without a log-determinant; pass return_info=True or drop {name}."
                )
        upwards = interval[1] > interval[0]
        with model.evaluating(), torch.set_grad_enabled(bool(self.differentiable)):
            y = model.to_latent(start, generator=generator, **cond)[0] if upwards else start
            end = self._problem(model, y, interval, cond, TOLERANCE).transport().z.to(start.dtype)
            return end if upwards else model.transform.from_latent(end, **cond)

    def likelihood(
        self, model: NDM, start: Tensor, interval: tuple[float, float], cond: dict[str, Any],
        generator: Randomness, *, budget: bool, origin: tuple[Tensor, int] | None = None,
    ) -> LikelihoodInfo:  # fmt: skip
        """Path, log-determinant and density; the systematic errors of the budget only if asked, else NaN.

        ``origin`` says which rows of which batch, if another one, the conditioning of ``start`` belongs to.
        """
        if not model.transform.bijective:
            raise ValueError(
                f"{type(model.transform).__name__} is stochastic, so that log p(x) has only a bound; use ndm_ct.elbo, "
                "or bound='elbo'."
            )
        own = cond if origin is None else take_rows(cond, *origin)
        with model.evaluating(), torch.set_grad_enabled(bool(self.differentiable)):
            if interval[1] > interval[0]:
                y, weight = model.to_latent(start, **own)
                info = self._of_latents(model, y, interval, cond, generator, budget, origin)
                return info if weight is None else _of_data(info, weight, info.z)
            info = self._of_latents(model, start, interval, cond, generator, budget, origin)
            x = model.transform.from_latent(info.z, **own)
            weight = model.transform.to_latent(x, **own)[1]
            return info if weight is None else _of_data(info, weight, x, downwards=True)

    def _of_latents(
        self, model: NDM, start: Tensor, interval: tuple[float, float], cond: dict[str, Any],
        generator: Randomness, budget: bool, origin: tuple[Tensor, int] | None,
    ) -> LikelihoodInfo:  # fmt: skip
        """The same between latents and noise."""
        estimator = resolve("auto" if self.trace is None else self.trace, model.event_shape)
        self._validate_stderr(estimator)
        quadrature = isinstance(estimator, Quadrature)
        problem = self._problem(model, start, interval, cond, PATH_TOLERANCE if quadrature else TOLERANCE, origin)
        if quadrature and problem.method != "rowwise":
            raise ValueError(
                f"trace='quadrature' has nodes of its own in every row, which method={problem.method!r} cannot visit; "
                "use method='rowwise', or trace='hutchinson' or 'exact'."
            )
        return along(problem, estimator, self.stderr, generator, budget=budget)

    def _problem(
        self, model: NDM, start: Tensor, interval: tuple[float, float], cond: dict[str, Any], tolerance: float,
        origin: tuple[Tensor, int] | None = None,
    ) -> Problem:  # fmt: skip
        rtol, atol = (tolerance if value is None else value for value in (self.rtol, self.atol))
        default = "dopri5" if self.differentiable == "adjoint" else "rowwise"
        method = default if self.method is None else self.method
        return Problem(
            model, start, interval, rtol, atol, method, self.on_failure, self.differentiable, cond, origin=origin
        )

    def _validate_stderr(self, estimator: TraceEstimator | Quadrature) -> None:
        if self.stderr is None:
            return
        validate_positive("stderr", self.stderr, "nats")
        if self.differentiable:
            raise ValueError("stderr has no effect on gradients; leave it out with differentiable.")
        if not isinstance(estimator, Quadrature | Exact):
            raise ValueError(
                f"stderr needs sweeps that can be added, which {type(estimator).__name__} has not; use "
                "trace='quadrature'."
            )
        if isinstance(estimator, Quadrature) and estimator.sweeps < 4:
            raise ValueError(
                f"stderr needs at least 4 sweeps to estimate an error from, got Quadrature(sweeps={estimator.sweeps})."
            )


def _of_data(info: LikelihoodInfo, weight: Tensor, z: Tensor, *, downwards: bool = False) -> LikelihoodInfo:
    """Information about latents made one about data, with ``weight`` the log-determinant from data to latents."""
    weight = torch.where(info.failed, torch.nan, weight.to(info.loglik.dtype))
    logdet = info.logdet - weight if downwards else info.logdet + weight
    return replace(info, logdet=logdet, loglik=info.loglik + weight, z=z)


def along(
    problem: Problem,
    estimator: TraceEstimator | Quadrature,
    stderr: float | None,
    generator: Randomness,
    *,
    budget: bool,
) -> LikelihoodInfo:
    """Path, log-determinant and density of a problem that has been checked.

    Args:
        problem: the path.
        estimator: of the trace.
        stderr: the standard error to reach, nats; only for ``Quadrature``.
        generator: source of nodes and probes.
        budget: whether to estimate the systematic errors too; they are NaN otherwise.
    """
    with problem.prepared():
        if isinstance(estimator, Quadrature):
            draft = _by_quadrature(problem, estimator, stderr, generator, budget)
        else:
            draft = _augmented(problem, estimator, generator)
        return _finished(problem, draft, generator, budget)


@dataclass(frozen=True)
class _Draft:
    """A solved path, its log-determinant with what is known of its errors, and the cost so far by rows."""

    solved: Solved
    logdet: Tensor
    stderr: Tensor
    ode_error: Tensor
    evaluations: Tensor
    products: Tensor
    sweeps: Tensor


def _augmented(problem: Problem, estimator: TraceEstimator, generator: Randomness) -> _Draft:
    """State and log-determinants together, probes frozen."""
    bound = estimator.bind(problem.start.double(), generator)
    solved = problem.augmented(bound)
    logdet, stderr = bound.combine(solved.logdets)
    error = torch.full_like(logdet, torch.nan) if solved.error is None else solved.error
    counts = (solved.evaluations, solved.evaluations * bound.products, torch.zeros_like(solved.evaluations))
    return _Draft(solved, logdet, stderr, error, *counts)


def _by_quadrature(
    problem: Problem, estimator: Quadrature, stderr: float | None, generator: Randomness, budget: bool
) -> _Draft:
    """The path first, then the trace at nodes along it."""
    model, start = problem.model, problem.start
    sweeps = Sweeps.draw(model, estimator, torch.full((len(start),), estimator.sweeps, device=start.device), generator)
    solved, values = _sampled(problem, sweeps)
    totals, evaluations = Totals.of(values), solved.evaluations
    if stderr is not None:
        evaluations = evaluations + _refine(problem, estimator, totals, stderr, generator)
    ode_error, nodes = torch.full_like(totals.mean, torch.nan), totals.count * estimator.nodes
    if budget:
        # The same nodes and probes along a coarser path: the difference is the solver's, the noise cancels.
        coarse = replace(problem, rtol=10.0 * problem.rtol, atol=10.0 * problem.atol)
        rough, rough_values = _sampled(coarse, sweeps.first())
        ode_error = _ends(problem, solved)[1] - _ends(problem, rough)[1]
        ode_error = (ode_error + (values - rough_values)[:, 0] * (1.0 if problem.upwards else -1.0)).abs()
        evaluations, nodes = evaluations + rough.evaluations, nodes + estimator.nodes
    logdet = linear_logdet(model, start.device) + totals.mean
    return _Draft(
        solved, logdet if problem.upwards else -logdet, totals.stderr, ode_error, evaluations + nodes,
        nodes * estimator.probes, totals.count,
    )  # fmt: skip


def _sampled(problem: Problem, sweeps: Sweeps) -> tuple[Solved, Tensor]:
    """The path with its nodes, and the sweeps' integrals of the trace along it."""
    solved = problem.transport(sweeps.times, in_noise_units=True)
    assert solved.nodes is not None
    values = replace(sweeps, used=sweeps.used & ~solved.failed).integrals(solved.nodes, problem.flow)
    rows = torch.nonzero(~solved.failed).flatten()
    if len(rows) > 0 and not bool(values.nan_to_num().any()):
        validate_attached(problem.flow(rows), sweeps.times[0, rows], solved.nodes[0, rows])
    return solved, values


def _refine(problem: Problem, estimator: Quadrature, totals: Totals, stderr: float, generator: Randomness) -> Tensor:
    """Add sweeps to the rows that need them; returns the evaluations of the paths solved again for their nodes."""
    spent = torch.zeros_like(totals.count)
    while True:
        missing = totals.wanted(stderr) - totals.count
        rows = torch.nonzero((missing > 0) & totals.stderr.isfinite()).flatten()
        if rows.numel() == 0:
            return spent
        _validate_affordable(estimator, totals, rows, missing[rows], stderr, problem.model)
        more = problem.only(rows)
        count = torch.ceil(_SHARE * missing[rows]).long().clamp(max=_PER_ROUND)
        sweeps = Sweeps.draw(problem.model, estimator, count, rows_of(generator, rows))
        solved, values = _sampled(more, sweeps)
        totals.add(rows, values)
        spent = spent.index_add(0, rows, solved.evaluations)


def _validate_affordable(
    estimator: Quadrature, totals: Totals, rows: Tensor, missing: Tensor, stderr: float, model: NDM
) -> None:
    """Refuse an accuracy that costs far more than the exact trace at 64 nodes of the same path.

    Far, because the first estimates of what a row needs come from a few sweeps, and scatter.
    """
    products = int((totals.count[rows] + missing).max()) * estimator.nodes * estimator.probes
    exact = 64 * event_size(model.event_shape)
    if products > 16 * exact:
        worst = rows[int(torch.argmax(totals.stderr[rows]))]
        raise ValueError(
            f"stderr={stderr:g} needs about {products:,} vector-Jacobian products for row {int(worst)}, whose standard "
            f"error is {float(totals.stderr[worst]):.3g} after {int(totals.count[worst])} sweeps; the exact trace "
            f"costs about {exact:,}. Pass trace='exact', or a larger stderr."
        )


def _ends(problem: Problem, solved: Solved) -> tuple[Tensor, Tensor]:
    """The data end of the path, and the log-density of its noise end; float64."""
    start = problem.start.double()
    # Rows that failed are zero here: a prior may refuse NaN, and NaN would reach the gradients of its parameters.
    end = torch.where(solved.failed.reshape(-1, *(1,) * (start.ndim - 1)), 0.0, solved.z)
    data, noise = (start, end) if problem.upwards else (end, start)
    return data, problem.model.log_prior(noise)


def _finished(problem: Problem, draft: _Draft, generator: Randomness, budget: bool) -> LikelihoodInfo:
    solved, dtype = draft.solved, problem.start.dtype
    x, log_prior = _ends(problem, solved)
    value = log_prior + draft.logdet if problem.upwards else log_prior - draft.logdet
    unknown = torch.full_like(value, torch.nan)
    truncation = mismatch = unknown
    evaluations, products = draft.evaluations, draft.products
    if budget:
        with torch.no_grad():
            truncation, used = _truncation(problem, x.detach(), generator)
            data = x.detach().to(dtype)
            path = problem.model.transform.along(data, **problem.conditioning())
            mismatch = problem.model.prior_divergence(path, data, generator)
        evaluations, products = evaluations + 1, products + used
    failed = solved.failed
    stderr, ode_error, truncation, mismatch, logdet, log_prior, value = (
        torch.where(failed, torch.nan, number).to(dtype)
        for number in (draft.stderr, draft.ode_error, truncation, mismatch, draft.logdet, log_prior, value)
    )
    return LikelihoodInfo(
        stderr=stderr.detach(),
        ode_error=ode_error.detach(),
        truncation=truncation,
        prior_mismatch=mismatch,
        nfe=largest(evaluations),
        vjps=largest(products),
        row_nfe=evaluations,
        row_vjps=products,
        row_sweeps=draft.sweeps,
        accepted=largest(solved.accepted),
        rejected=largest(solved.rejected),
        failed=failed,
        z=solved.z.to(dtype),
        logdet=logdet,
        log_prior=log_prior,
        loglik=value,
    )


def _truncation(problem: Problem, x: Tensor, generator: Randomness) -> tuple[Tensor, int]:
    r"""First-order change of the log-density at x from the noise and the scaling left at t_min.

    .. math::
        \log p_{t_{min}}(x) - \log p_0(x) \approx
        \tfrac12 \sigma^2 \bigl(\operatorname{tr} \nabla s + \|s\|^2\bigr)
        - \log \alpha\, (d + \langle x, s \rangle)

    Smoothing with variance h moves a density by :math:`\tfrac h2 \Delta p`, and :math:`\Delta p / p =
    \operatorname{tr} \nabla s + \|s\|^2`. A transform that is not the identity there moves it further, by minus
    :math:`\operatorname{tr} \nabla (F - x) + \langle F - x, s \rangle`.
    """
    model, flow = problem.model, problem.flow()
    t = as_time(model.t_min, x.device).expand(len(x))
    c, d = model.schedule(t), event_size(model.event_shape)
    estimator = Exact() if d <= EXACT_UP_TO else Hutchinson(chunk=1)
    bound = estimator.bind(x, generator)
    _, forms, F = bound.with_byproduct(lambda z: (flow.prediction(t, z),) * 2, x)
    s = flow.score(t, x, F)
    trace_of_F, _ = bound.combine(forms)
    smoothing = 0.5 * (c.alpha * trace_of_F - d + c.sigma**2 * sum_event(s * s))
    change = smoothing - c.alpha.log() * (d + sum_event(x * s))
    if isinstance(model.transform, Identity) or model.t_min == 0.0:
        return change, bound.products
    transform = model.transform.along

    def moved(z: Tensor) -> Tensor:
        return transform(z.to(flow.dtype), **problem.conditioning())(t).to(z.dtype) - z

    shift, forms = bound(moved, x)
    return change - bound.combine(forms)[0] - sum_event(shift * s), bound.products


def largest(counts: Tensor) -> int:
    """The count of the row that took most."""
    return int(counts.max()) if counts.numel() else 0
