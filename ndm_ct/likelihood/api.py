r"""The likelihood of the probability flow, by the change of variables along it.

.. math::
    \log p_{t_{min}}(x) = \log p_1(z_1) + \int_{t_{min}}^1 \operatorname{div} v(z_t, t)\, dt, \qquad
    \dot z = v(z, t),\ z_{t_{min}} = x,

.. math::
    \operatorname{div} v = d\,\frac{\sigma'}{\sigma}
    + \operatorname{tr} \frac{\partial}{\partial z}
      \Bigl[\Bigl(\alpha' - \frac{\alpha \sigma'}{\sigma}\Bigr) \hat F + \alpha \hat{\dot F}\Bigr] .

The first term is exact. The trace in the second is that of an estimator of :mod:`ndm_ct.divergence`: ``"exact"`` and
``"hutchinson"`` integrate it together with the state, or at nodes along a path of method "exponential";
``"quadrature"`` solves the path first and samples the trace along it. States and log-determinants are float64 whatever
the network's precision, so the only accumulated rounding is the network's own.

Warning:
    The number is the exact density of the *deterministic* generator. It equals the marginal density of the SDE sampler
    only if the model's score is the true marginal score; see the README, "What the number means".

References:
    Song et al., Score-Based Generative Modeling through SDEs, appendix D.2, https://arxiv.org/abs/2011.13456
"""

from typing import Any, Literal, overload

from torch import Tensor

from ndm_ct._core.noise import GeneratorLike, as_randomness
from ndm_ct.likelihood.budget import LikelihoodInfo
from ndm_ct.likelihood.options import Options, Trace
from ndm_ct.likelihood.path import Differentiable
from ndm_ct.model import NDM

__all__ = ["LikelihoodInfo", "decode", "encode", "loglik"]


@overload
def loglik(
    model: NDM, x: Tensor, /, *, trace: Trace = ..., stderr: float | None = ..., rtol: float | None = ...,
    atol: float | None = ..., method: str | None = ..., on_failure: str = ..., differentiable: Differentiable = ...,
    batch_size: int | None = ..., generator: GeneratorLike = ..., return_info: Literal[False] = ..., **cond: Any,
) -> Tensor: ...  # fmt: skip


@overload
def loglik(
    model: NDM, x: Tensor, /, *, trace: Trace = ..., stderr: float | None = ..., rtol: float | None = ...,
    atol: float | None = ..., method: str | None = ..., on_failure: str = ..., differentiable: Differentiable = ...,
    batch_size: int | None = ..., generator: GeneratorLike = ..., return_info: Literal[True], **cond: Any,
) -> tuple[Tensor, LikelihoodInfo]: ...  # fmt: skip


def loglik(
    model: NDM,
    x: Tensor,
    /,
    *,
    trace: Trace = "auto",
    stderr: float | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    method: str | None = None,
    on_failure: str = "raise",
    differentiable: Differentiable = False,
    batch_size: int | None = None,
    generator: GeneratorLike = None,
    return_info: bool = False,
    **cond: Any,
) -> Tensor | tuple[Tensor, LikelihoodInfo]:
    r""":math:`\log p_{t_{min}}` of the probability flow at z = x, in nats per event.

    The data are taken as they are: nothing is rescaled by :math:`\alpha`. If you scaled the data yourself, add the
    log-determinant of that scaling. If the transform contains a ``Flow``, its log-determinant is included. With an
    ``Encoder`` only a lower bound exists; use :func:`ndm_ct.elbo`. What a sampler draws in a few fixed steps has a
    density of its own, ``samplers.FixedGrid(model, "unipc", steps=8).loglik(x)``.

    Args:
        model: the model.
        x: data, shape ``(B, *E)``: a tensor of the model's dtype and device, or a numpy array, which is converted.
        trace: "exact" adds up all d derivatives: no random error, d products per evaluation. "quadrature" takes random
            probes at random nodes along the path, and "hutchinson" 16 random probes that stay the same along it. Both
            are unbiased, with a standard error. "auto" is "exact" up to 32 dimensions, else "quadrature". Sizes are set
            by an object such as ``divergence.Quadrature(sweeps=16)``.
        stderr: the standard error to reach, nats per event. Rows get more sweeps until they reach it. Only with
            "quadrature"; the exact trace has no random error.
        rtol: relative tolerance of the solver. A smaller one moves the result closer to the exact solution of the flow
            and takes more network evaluations. None is 2e-6. For "quadrature" it is 3e-5, and the error allowed in
            one step is :math:`(\mathrm{rtol} + \mathrm{atol})\,\sigma_t`. With prediction "velocity" tolerances below
            four units of rounding of the network, 5e-7 in float32, are raised to them.
        atol: absolute tolerance of the solver, for states near zero, in ``model.unit``; None as for ``rtol``.
        method: "ode", where each row has steps of its own; "exponential", which takes one grid for all rows with one
            evaluation per step, and "ode" for rows that the grid does not suit; or a torchdiffeq method such as
            "dopri5", with one step size for the batch, so that a row depends on the others. With "exponential" the
            traces "exact" and "hutchinson" are taken at 33 to 129 nodes along the path, until what they leave is at
            most 200 (rtol + atol) nats; tolerances that are None are 3e-5. None is "exponential" for "quadrature"
            without ``differentiable``, else "ode".
        on_failure: "raise" a SolverError if a row cannot be solved, or "nan": such rows become NaN and the others go on
            (with "ode" and "exponential").
        differentiable: True keeps the graph, for gradients with respect to parameters and the input. "adjoint" gets
            them from a second solve backwards, in memory that does not grow with the number of steps (torchdiffeq
            methods only, not with "quadrature"). At the default tolerance either is accurate to about 1e-3 of its own
            size, the random error of a trace apart; steps are kept short enough for that, also where longer ones would
            suit the value (at most 1/20 of the interval).
        batch_size: rows solved at a time; more are solved in parts. The result does not depend on it, memory and speed
            do. (With ``stderr`` or ``return_info`` a single generator gives random traces other noise in parts; one
            generator per row gives the same.) None bounds the memory: some 1600 rows for the exact trace of ten
            dimensions, 16,000 for "quadrature" of up to 16, fewer of larger events; with ``differentiable`` and with
            the torchdiffeq methods None is all.
        generator: source of nodes and probes: a seed, a generator, or a sequence with one generator per row, which
            makes the result of a row independent of its batch. None is torch's global generator.
        return_info: also return a :class:`LikelihoodInfo`. Its error budget costs some percent.
        cond: conditioning of predictor and transform. A tensor with as many entries as x has rows, also in a dict, list
            or tuple, goes with its rows unless the networks treat it as one value for all of them: they are asked by
            a few evaluations of two rows. :func:`ndm_ct.shared` settles it beforehand.

    Returns:
        Shape ``(B,)``, in the dtype of ``x``, -inf below its range; with ``return_info`` a pair.

    Raises:
        ValueError, TypeError: unusable data, options or conditioning, named in the message.
        PredictorError: the network returned something that is not a prediction.
        SolverError: the solve failed; the error carries t, dt and batch rows.

    Example:
        >>> import torch, ndm_ct
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
        >>> x = torch.zeros(1, 2, dtype=torch.float64)
        >>> float((ndm_ct.loglik(model, x) - model.log_prob(x)).abs()) < 1e-3
        True
    """
    x = model.as_data(x)
    given = model.validate(x, cond, loglik)
    generator = as_randomness(generator, len(x), x.device, "loglik")
    options = Options(
        trace=trace, stderr=stderr, rtol=rtol, atol=atol, method=method, on_failure=on_failure,
        differentiable=differentiable, batch_size=batch_size,
    )  # fmt: skip
    info = options.likelihood(model, x, (model.t_min, 1.0), given, generator, budget=return_info)
    return (info.loglik, info) if return_info else info.loglik


@overload
def encode(
    model: NDM, x: Tensor, /, *, trace: Trace | None = ..., stderr: float | None = ..., rtol: float | None = ...,
    atol: float | None = ..., method: str | None = ..., on_failure: str = ..., differentiable: Differentiable = ...,
    batch_size: int | None = ..., generator: GeneratorLike = ..., return_info: Literal[False] = ..., **cond: Any,
) -> Tensor: ...  # fmt: skip


@overload
def encode(
    model: NDM, x: Tensor, /, *, trace: Trace | None = ..., stderr: float | None = ..., rtol: float | None = ...,
    atol: float | None = ..., method: str | None = ..., on_failure: str = ..., differentiable: Differentiable = ...,
    batch_size: int | None = ..., generator: GeneratorLike = ..., return_info: Literal[True], **cond: Any,
) -> tuple[Tensor, LikelihoodInfo]: ...  # fmt: skip


def encode(
    model: NDM,
    x: Tensor,
    /,
    *,
    trace: Trace | None = None,
    stderr: float | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    method: str | None = None,
    on_failure: str = "raise",
    differentiable: Differentiable = False,
    batch_size: int | None = None,
    generator: GeneratorLike = None,
    return_info: bool = False,
    **cond: Any,
) -> Tensor | tuple[Tensor, LikelihoodInfo]:
    r"""Map data along the probability flow to noise: :math:`x \mapsto z_1`. Inverse of :func:`decode`.

    Args:
        model: the model.
        x: data, shape ``(B, *E)``, the model's dtype.
        trace: estimator of ``info.logdet``, that of :math:`x \mapsto z_1`: "exact", "quadrature", "hutchinson" or an
            object of :mod:`ndm_ct.divergence`; None is "auto". Only with ``return_info``.
        stderr: the standard error of ``info.logdet`` to reach, nats, by more sweeps of "quadrature". Only with
            ``return_info``.
        rtol: relative tolerance of the solver. A smaller one moves the result closer to the exact solution of the flow
            and takes more network evaluations. None is 2e-6. For "quadrature" it is 3e-5, and the error allowed in
            one step is :math:`(\mathrm{rtol} + \mathrm{atol})\,\sigma_t`.
        atol: absolute tolerance of the solver, for states near zero, in ``model.unit``; None as for ``rtol``.
        method: "ode", where each row has steps of its own; "exponential", as in :func:`loglik`; or a torchdiffeq method
            such as "dopri5", with one step size for the batch. None is "ode", and with ``return_info`` as in
            :func:`loglik`.
        on_failure: "raise" a SolverError if a row cannot be solved, or "nan": such rows become NaN and the others go on
            (with "ode" and "exponential").
        differentiable: True keeps the graph, for gradients with respect to parameters and the input. "adjoint" gets
            them from a second solve backwards, in memory that does not grow with the number of steps (torchdiffeq
            methods only, not with "quadrature").
        batch_size: rows solved at a time; more are solved in parts. The result does not depend on it, memory and speed
            do. (With ``stderr`` or ``return_info`` a single generator gives random traces other noise in parts; one
            generator per row gives the same.) None bounds the memory: some 1600 rows for the exact trace of ten
            dimensions, 16,000 for "quadrature" of up to 16, fewer of larger events; with ``differentiable`` and with
            the torchdiffeq methods None is all.
        generator: source of nodes and probes with ``return_info``, and of an Encoder's noise: a seed, a generator, or a
            sequence with one generator per row, which makes the result of a row independent of its batch.
        return_info: also return a :class:`LikelihoodInfo`. This costs the divergence along the path.
        cond: conditioning of predictor and transform, as in :func:`loglik`.

    Returns:
        :math:`z_1`, shape ``(B, *E)``; with ``return_info`` a pair.

    Raises:
        ValueError, TypeError: unusable data, options or conditioning, named in the message.
        PredictorError: the network returned something that is not a prediction.
        SolverError: the solve failed; the error carries t, dt and batch rows.
    """
    x = model.as_data(x)
    given = model.validate(x, cond, encode)
    generator = as_randomness(generator, len(x), x.device, "encode")
    options = Options(
        trace=trace, stderr=stderr, rtol=rtol, atol=atol, method=method, on_failure=on_failure,
        differentiable=differentiable, batch_size=batch_size,
    )  # fmt: skip
    return options.transport(model, x, (model.t_min, 1.0), given, generator, return_info)


@overload
def decode(
    model: NDM, z1: Tensor, /, *, trace: Trace | None = ..., stderr: float | None = ..., rtol: float | None = ...,
    atol: float | None = ..., method: str | None = ..., on_failure: str = ..., differentiable: Differentiable = ...,
    batch_size: int | None = ..., generator: GeneratorLike = ..., return_info: Literal[False] = ..., **cond: Any,
) -> Tensor: ...  # fmt: skip


@overload
def decode(
    model: NDM, z1: Tensor, /, *, trace: Trace | None = ..., stderr: float | None = ..., rtol: float | None = ...,
    atol: float | None = ..., method: str | None = ..., on_failure: str = ..., differentiable: Differentiable = ...,
    batch_size: int | None = ..., generator: GeneratorLike = ..., return_info: Literal[True], **cond: Any,
) -> tuple[Tensor, LikelihoodInfo]: ...  # fmt: skip


def decode(
    model: NDM,
    z1: Tensor,
    /,
    *,
    trace: Trace | None = None,
    stderr: float | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    method: str | None = None,
    on_failure: str = "raise",
    differentiable: Differentiable = False,
    batch_size: int | None = None,
    generator: GeneratorLike = None,
    return_info: bool = False,
    **cond: Any,
) -> Tensor | tuple[Tensor, LikelihoodInfo]:
    r"""Map noise along the probability flow to data: :math:`z_1 \mapsto x`. Inverse of :func:`encode`.

    Args:
        model: the model.
        z1: noise, shape ``(B, *E)``, the model's dtype.
        trace: estimator of ``info.logdet``, that of :math:`z_1 \mapsto x`: "exact", "quadrature", "hutchinson" or an
            object of :mod:`ndm_ct.divergence`; None is "auto". Only with ``return_info``.
        stderr: the standard error of ``info.logdet`` to reach, nats, by more sweeps of "quadrature". Only with
            ``return_info``.
        rtol: relative tolerance of the solver. A smaller one moves the result closer to the exact solution of the flow
            and takes more network evaluations. None is 2e-6. For "quadrature" it is 3e-5, and the error allowed in
            one step is :math:`(\mathrm{rtol} + \mathrm{atol})\,\sigma_t`.
        atol: absolute tolerance of the solver, for states near zero, in ``model.unit``; None as for ``rtol``.
        method: "ode", where each row has steps of its own; "exponential", as in :func:`loglik`; or a torchdiffeq method
            such as "dopri5", with one step size for the batch. None is "ode", and with ``return_info`` as in
            :func:`loglik`.
        on_failure: "raise" a SolverError if a row cannot be solved, or "nan": such rows become NaN and the others go on
            (with "ode" and "exponential").
        differentiable: True keeps the graph, for gradients with respect to parameters and the input. "adjoint" gets
            them from a second solve backwards, in memory that does not grow with the number of steps (torchdiffeq
            methods only, not with "quadrature").
        batch_size: rows solved at a time; more are solved in parts. The result does not depend on it, memory and speed
            do. (With ``stderr`` or ``return_info`` a single generator gives random traces other noise in parts; one
            generator per row gives the same.) None bounds the memory: some 1600 rows for the exact trace of ten
            dimensions, 16,000 for "quadrature" of up to 16, fewer of larger events; with ``differentiable`` and with
            the torchdiffeq methods None is all.
        generator: source of nodes and probes with ``return_info``, and of an Encoder's noise: a seed, a generator, or a
            sequence with one generator per row, which makes the result of a row independent of its batch.
        return_info: also return a :class:`LikelihoodInfo`. This costs the divergence along the path.
        cond: conditioning of predictor and transform, as in :func:`loglik`.

    Returns:
        x, shape ``(B, *E)``; with ``return_info`` a pair.

    Raises:
        ValueError, TypeError: unusable data, options or conditioning, named in the message.
        PredictorError: the network returned something that is not a prediction.
        SolverError: the solve failed; the error carries t, dt and batch rows.
    """
    z1 = model.as_data(z1)
    given = model.validate_state(z1, cond, decode, name="z1")
    generator = as_randomness(generator, len(z1), z1.device, "decode")
    options = Options(
        trace=trace, stderr=stderr, rtol=rtol, atol=atol, method=method, on_failure=on_failure,
        differentiable=differentiable, batch_size=batch_size,
    )  # fmt: skip
    return options.transport(model, z1, (1.0, model.t_min), given, generator, return_info)
