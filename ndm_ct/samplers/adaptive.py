r"""The reverse SDE from t = 1 down to t_min by adaptive steps.

With :func:`sample_rows` each row has its own steps and its own Brownian path (:mod:`ndm_ct.solvers.sde`); with
:func:`sample_torchsde` the batch shares torchsde's (:mod:`ndm_ct.solvers.torchsde`). Where
:math:`\sigma/\alpha` exceeds the schedule's ``largest_noise`` at t = 1, and g may be infinite, the first step is the
transition with frozen prediction down to it.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ndm_ct._core.checks import as_time
from ndm_ct._core.conditioning import Conditioning
from ndm_ct._core.noise import GeneratorLike, Randomness, as_randomness
from ndm_ct.dynamics import ReverseSDE
from ndm_ct.model import NDM
from ndm_ct.samplers.frozen import DDPM
from ndm_ct.samplers.stochastic import torchsde_fields
from ndm_ct.solvers import Solution, sdeint_adaptive, sdeint_rows
from ndm_ct.solvers.sde import MAX_EVALUATIONS

__all__ = ["finite_start", "sample_rows", "sample_torchsde"]

FIRST = 0.1
"""The first step in units of the log-SNR."""


def sample_rows(
    model: NDM,
    z: Tensor,
    /,
    *,
    rtol: float = 1e-2,
    atol: float = 1e-2,
    generator: GeneratorLike = None,
    max_evaluations: int = MAX_EVALUATIONS,
    callback: Callable[[float], None] | None = None,
    **cond: Any,
) -> Solution:
    r"""Solve the model's reverse SDE from t = 1 down to t_min, each row with its own steps.

    Args:
        model: the model, in eval mode.
        z: state at t = 1, shape ``(B, *E)``.
        rtol: error allowed in one step, relative to the size of the state.
        atol: error allowed in one step where the state is near zero, in the model's ``unit``.
        generator: source of the noise, one or one per row (:func:`ndm_ct.solvers.sdeint_rows`).
        max_evaluations: bound on the evaluations of a row after the first step with frozen prediction.
        callback: called with the time of the row that is furthest behind, before every evaluation.
        cond: conditioning, tensors with B rows.

    Returns:
        The solution at t_min. Its counts include the first step with frozen prediction.

    Raises:
        SolverError: a row's prediction is NaN or infinite, its step vanished, or it needs more evaluations.

    Example:
        >>> import ndm_ct
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
        >>> sample_rows(model, torch.zeros(3, 2)).state[0].shape
        torch.Size([3, 2])
    """
    generator = as_randomness(generator, len(z), z.device, "sample_rows")
    with torch.no_grad():
        given = model.conditioning(cond, z, sample_rows)
        z, start, frozen = finite_start(model, z, generator, given)
        transform, fields = model.transform, _Fields(model, given, z.dtype)
        solution = sdeint_rows(
            _in_units(model, lambda t, y, rows: fields(rows).drift(t, y)),
            _in_units(model, lambda t, y, rows: fields(rows).diffusion(t, y)),
            transform.to_basis(z) / model.unit, start, model.t_min, first_step=_first_step(model, start), rtol=rtol,
            atol=atol, generator=generator, max_evaluations=max_evaluations, callback=callback,
        )  # fmt: skip
        return _from_basis(model, solution, frozen)


def sample_torchsde(
    model: NDM,
    z: Tensor,
    /,
    *,
    method: str = "heun",
    rtol: float = 1e-2,
    atol: float = 1e-2,
    generator: GeneratorLike = None,
    differentiable: bool | Literal["adjoint"] = False,
    callback: Callable[[float], None] | None = None,
    **cond: Any,
) -> Solution:
    r"""Solve the model's reverse SDE from t = 1 down to t_min with torchsde's adaptive steps, one size for the batch.

    Args:
        model: the model, in eval mode.
        z: state at t = 1, shape ``(B, *E)``.
        method: one of ``solvers.SDE_METHODS``.
        rtol: error allowed in one step, relative to the size of the state.
        atol: error allowed in one step where the state is near zero, in the model's ``unit``.
        generator: source of the noise, one or one per row.
        differentiable: "adjoint" gets gradients from torchsde's adjoint equation. Otherwise they go through the steps,
            where the caller has gradients enabled.
        callback: called with the time of every evaluation.
        cond: conditioning, tensors with B rows.

    Returns:
        The solution at t_min. Its counts include the first step with frozen prediction.

    Raises:
        SolverError: a prediction is NaN or infinite, the step vanished, or too many evaluations are needed.
    """
    generator = as_randomness(generator, len(z), z.device, "sample_torchsde")
    given = model.conditioning(cond, z, sample_torchsde)
    z, start, frozen = finite_start(model, z, generator, given)
    drift, diffusion, adjoint = torchsde_fields(model, z, start, differentiable, given)
    solution = sdeint_adaptive(
        _in_units(model, drift), _in_units(model, diffusion), model.transform.to_basis(z) / model.unit, start,
        model.t_min, first_step=_first_step(model, start), method=method, rtol=rtol, atol=atol, generator=generator,
        adjoint=adjoint, callback=callback,
    )  # fmt: skip
    return _from_basis(model, solution, frozen)


def _in_units(model: NDM, field: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Drift or diffusion for states in the model's unit, so that tolerances do not depend on the unit of the data."""
    unit = model.unit
    return lambda t, y, *rows: field(t, unit * y, *rows) / unit


def _first_step(model: NDM, t: float) -> float:
    with torch.no_grad():
        return FIRST * float(model.schedule(as_time(t, model.schedule.device)).inverse_dgamma)


def _from_basis(model: NDM, solution: Solution, frozen: int) -> Solution:
    """The solution of the model in the data's own unit, with the frozen step counted."""
    state = (model.transform.from_basis(model.unit * solution.state[0]),)
    return replace(solution, state=state, nfe=solution.nfe + frozen, accepted=solution.accepted + frozen)


def finite_start(model: NDM, z: Tensor, generator: Randomness, cond: Conditioning) -> tuple[Tensor, float, int]:
    r"""Step over the end where g may be infinite.

    Args:
        model: the model.
        z: state at t = 1, shape ``(B, *E)``.
        generator: source of the noise, one or one per row.
        cond: conditioning.

    Returns:
        The state where :math:`\sigma/\alpha` is at most the schedule's ``largest_noise``, its time, and the number of
        steps taken to get there: 0 or 1.
    """
    schedule = model.schedule
    with torch.no_grad():
        at_one, most = schedule(as_time(1.0, schedule.device)), schedule.largest_noise
        if float(at_one.sigma) <= most * float(at_one.alpha):
            return z, 1.0, 0
        top = max(model.t_min, float(schedule.time_at(as_time(math.atan(most), schedule.device))))
    return DDPM(model).step(z, 1.0, top, generator=generator, **cond), top, 1


class _Fields:
    """The reverse SDE of the rows still in the batch, made anew only when some have left."""

    def __init__(self, model: NDM, cond: Conditioning, dtype: torch.dtype) -> None:
        self.model, self.cond, self.dtype = model, cond, dtype
        self.rows: Tensor | None = None
        self.sde: ReverseSDE

    def __call__(self, rows: Tensor) -> ReverseSDE:
        if self.rows is not rows:
            self.rows = rows
            self.sde = self.model.reverse_sde(self.dtype, **self.cond.take(rows))
        return self.sde
