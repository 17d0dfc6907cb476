r"""Solves of :math:`dy = f(t, y)\,dt` and :math:`dy = f(t, y)\,dt + g(t)\,dw` on an interval or a grid.

This module knows no diffusion model, and it alone imports the two back-ends, torchdiffeq (ODE) and torchsde (SDE).
It guards them:

* the field is never evaluated outside the interval (adaptive torchdiffeq overshoots its end);
* the error norm is the worst row's, so a hard row is not averaged away by easy ones;
* the state has any shape; both back-ends see one matrix ``(B, D)``;
* a grid of N intervals is N steps, uniform or not, for SDEs too;
* SDE noise comes from a ``torch.Generator`` (torchsde would seed itself from numpy);
* noise is additive and diagonal, without a d x d matrix, so ``"srk"`` is the two-stage scheme for additive noise;
* every evaluation is counted, and failures name time, step size and batch rows.

References:
    Chen, torchdiffeq, https://github.com/rtqichen/torchdiffeq
    Li et al., torchsde, https://github.com/google-research/torchsde
    Roessler, Runge-Kutta Methods for the Strong Approximation of Solutions of SDEs (2010)
"""

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ndm_ct._core import checks as _shapes
from ndm_ct._core.errors import SolverError
from ndm_ct._core.noise import Randomness, normal_like
from ndm_ct.solvers.packing import Packing, State

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchsde 0.2.6 uses torch.jit.script, which warns at import
    import torchdiffeq
    from torchsde import BaseBrownian
    from torchsde._core import methods as torchsde_methods
    from torchsde._core.base_sde import ForwardSDE

__all__ = [
    "ADAPTIVE_METHODS",
    "SDE_METHODS",
    "Solution",
    "odeint",
    "sdeint",
    "validate_slope",
    "validate_tolerance",
]

ADAPTIVE_METHODS = {"dopri5": 5, "dopri8": 8, "bosh3": 3, "adaptive_heun": 2}
"""Adaptive ODE methods and their orders. torchdiffeq's fehlberg2 misses its tolerance by a factor of 300: left out."""

SDE_METHODS = {"euler": (1.0, 1), "heun": (1.0, 2), "midpoint": (1.0, 2), "srk": (1.5, 2)}
"""SDE methods: strong order for additive noise, and evaluations per step."""

_STRATONOVICH = ("heun", "midpoint")  # for noise that does not depend on the state, Ito and Stratonovich agree
_MAX_STEPS = 10_000

Field = Callable[[Tensor, State], State]


@dataclass(frozen=True)
class Solution:
    """What a solve returns.

    Args:
        state: the tensors of the initial state, at the end.
        evaluations: evaluations of the field.
        accepted: accepted steps.
        rejected: rejected steps.
    """

    state: State
    evaluations: int
    accepted: int
    rejected: int = 0


class _Guarded:
    """The field as a back-end sees it: clamped in time, counted, checked for NaN."""

    def __init__(
        self,
        function: Field,
        packing: Packing,
        interval: tuple[float, float],
        callback: Callable[[float], None] | None,
    ) -> None:
        self.function, self.packing, self.callback = function, packing, callback
        self.low, self.high = min(interval), max(interval)
        self.evaluations = self.accepted = self.rejected = 0
        self.t, self.dt = interval[0], float("nan")
        self.last_norms: Tensor | None = None

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        t = t.to(torch.float64).clamp(self.low, self.high)
        self.evaluations += 1
        derivative = self.packing.pack(self.function(t, self.packing.unpack(y)))
        validate_slope(derivative, t, self.dt)
        return derivative

    def norm(self, y: Tensor) -> Tensor:
        self.last_norms = self.packing.row_norms(y)
        return self.last_norms.amax()

    def callback_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        self.t, self.dt = float(t), float(dt)
        if self.callback is not None:
            self.callback(self.t)

    def callback_accept_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        self.accepted += 1

    def callback_reject_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        self.rejected += 1

    def worst_rows(self) -> tuple[int, ...]:
        if self.last_norms is None:
            return ()
        return tuple(torch.nonzero(self.last_norms > 1.0).flatten().tolist())


def validate_tolerance(name: str, value: float, dtype: torch.dtype) -> float:
    """A positive tolerance; warns where ``dtype`` cannot reach it."""
    _shapes.validate_positive(name, value)
    floor = 4.0 * torch.finfo(dtype).eps
    if value < floor:
        warnings.warn(f"{name}={value:g} is below what {dtype} can resolve ({floor:.1g}).", stacklevel=3)
    return value


def validate_slope(slope: Tensor, t: Tensor, dt: float) -> None:
    """Refuse a value of the field, shape ``(B, ...)``, with NaN or inf.

    Raises:
        SolverError: naming its time, the step and the rows.
    """
    rows = _shapes.bad_rows(slope)
    if rows:
        raise SolverError(
            f"the field is NaN or infinite at t={float(t):.6g} in batch rows {_shapes.some(rows)}; look at the "
            "network's output there, or use a smaller tolerance if the state itself has run away.",
            t=float(t), dt=dt, rows=rows,
        )  # fmt: skip


def odeint(
    function: Field,
    state: State,
    t0: float,
    t1: float,
    *,
    method: str = "dopri5",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = _MAX_STEPS,
    adjoint: tuple[Tensor, ...] | None = None,
    callback: Callable[[float], None] | None = None,
) -> Solution:
    r"""Solve :math:`dy/dt = f(t, y)` adaptively from t0 to t1, in either direction.

    A step is accepted when the worst row's error, a root mean square in units of atol + rtol |y| over each of the
    state's tensors separately, is at most one.

    Args:
        function: f, called with float64 t of shape ``()`` and the state's tensors; returns tensors of their shapes.
        state: initial tensors, each ``(B, *)``, of one dtype.
        t0: start.
        t1: end.
        method: one of ``ADAPTIVE_METHODS``.
        rtol: relative tolerance.
        atol: absolute tolerance.
        max_steps: bound on the number of steps.
        adjoint: gradients by the adjoint equation, solved backwards, whose memory does not grow with the number of
            steps: all tensors besides the state that f depends on and that need a gradient. None: through the steps.
        callback: called with the time before every step.

    Raises:
        SolverError: the step size vanished, max_steps was reached, or the field is not finite.

    Example:
        >>> y = torch.ones(3, 1, dtype=torch.float64)
        >>> solution = odeint(lambda t, y: (-y[0],), (y,), 0.0, 1.0, rtol=1e-9, atol=1e-9)
        >>> bool((solution.state[0] - torch.exp(torch.tensor(-1.0)).double()).abs().max() < 1e-7)
        True
    """
    _shapes.choose("method", method, ADAPTIVE_METHODS)
    validate_tolerance("rtol", rtol, torch.float64)
    validate_tolerance("atol", atol, torch.float64)
    if t0 == t1 or state[0].shape[0] == 0:
        return Solution(state, 0, 0)
    end = torch.tensor([t1], dtype=torch.float64, device=state[0].device)
    options = {"step_t": end, "max_num_steps": max_steps}
    return _torchdiffeq(function, state, [t0, t1], method, {"rtol": rtol, "atol": atol}, options, callback, adjoint)


def _torchdiffeq(
    function: Field,
    state: State,
    interval: list[float],
    method: str,
    tolerances: dict[str, float],
    options: dict[str, Any],
    callback: Callable[[float], None] | None,
    adjoint: tuple[Tensor, ...] | None = None,
) -> Solution:
    packing = Packing(tuple(part.shape for part in state))
    guarded = _Guarded(function, packing, (interval[0], interval[1]), callback)
    times = torch.tensor(interval, dtype=torch.float64, device=state[0].device)
    options = options | {"norm": guarded.norm}
    solve = torchdiffeq.odeint
    if adjoint is not None:
        # The gradients of shared parameters have no rows, so the backward solve takes the norm of the rest.
        backwards = {"norm": "seminorm", "step_t": times[:1], "max_num_steps": options["max_num_steps"]}
        solve = partial(torchdiffeq.odeint_adjoint, adjoint_params=adjoint, adjoint_options=backwards)
    try:
        y = solve(guarded, packing.pack(state), times, method=method, options=options, **tolerances)
    except AssertionError as error:
        rows = guarded.worst_rows()
        raise SolverError(
            f"{method} gave up at t={guarded.t:.6g} with step {guarded.dt:.3g} ({error}) after {guarded.accepted} "
            f"accepted and {guarded.rejected} rejected steps; worst batch rows {_shapes.some(rows)}. The field is "
            "too stiff or too rough for the tolerance: loosen rtol/atol, or raise t_min.",
            t=guarded.t, dt=guarded.dt, rows=rows,
        ) from error  # fmt: skip
    return Solution(packing.unpack(y[-1]), guarded.evaluations, guarded.accepted, guarded.rejected)


def _validate_grid(grid: Tensor, device: torch.device) -> Tensor:
    grid = grid.to(dtype=torch.float64, device=device)
    if grid.ndim != 1 or grid.numel() < 2:
        raise ValueError(f"grid needs at least two times in one dimension, got shape {tuple(grid.shape)}.")
    steps = grid.diff()
    if not bool((steps > 0).all() or (steps < 0).all()):
        raise ValueError("grid must be strictly increasing or strictly decreasing.")
    return grid


class GeneratorNoise(BaseBrownian):  # type: ignore[misc]
    """Brownian increments drawn step by step from a ``torch.Generator``.

    Args:
        like: a tensor ``(B, D)`` whose shape, dtype and device the increments take.
        generator: source, one or one per row; None is torch's global one.
    """

    __slots__ = ("_device", "_dtype", "_generator", "_like", "_shape")

    def __init__(self, like: Tensor, generator: Randomness) -> None:
        self._shape, self._dtype, self._device = tuple(like.shape), like.dtype, like.device
        self._like, self._generator = like, generator

    def __call__(self, ta: Any, tb: Any = None, return_U: bool = False, return_A: bool = False) -> Any:
        step = tb - ta
        increment = self._normal() * step**0.5
        if not return_U:
            return increment
        # U is the integral of the path over the step: mean step * W / 2, independent part of variance step^3 / 12.
        return increment, step * (0.5 * increment + self._normal() * (step / 12.0) ** 0.5)

    def _normal(self) -> Tensor:
        return normal_like(self._like, self._generator)

    def __repr__(self) -> str:
        return f"GeneratorNoise(shape={self._shape})"

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def levy_area_approximation(self) -> str:
        return "space-time"


class _AdditiveSDE:
    """What torchsde's steppers ask for, in their increasing time s = direction * t."""

    noise_type = "additive"

    def __init__(self, drift: _Guarded, diffusion: Callable[[Tensor], Tensor], sde_type: str, direction: float) -> None:
        self.drift, self.diffusion, self.sde_type, self.direction = drift, diffusion, sde_type, direction
        self.last: tuple[float, Tensor, Tensor] | None = None

    def f(self, s: Tensor, y: Tensor) -> Tensor:
        # "srk" asks twice for the drift at the start of a step; the second answer is remembered.
        if self.last is not None and self.last[1] is y and self.last[0] == float(s):
            return self.last[2]
        value = self.direction * self.drift(self.direction * s, y)
        self.last = (float(s), y, value)
        return value

    def g_prod(self, s: Tensor, y: Tensor, v: Tensor) -> Tensor:
        t = (self.direction * s).clamp(self.drift.low, self.drift.high)
        return self.diffusion(t) * v


def sdeint(
    drift: Callable[[Tensor, Tensor], Tensor],
    diffusion: Callable[[Tensor, Tensor], Tensor],
    y0: Tensor,
    grid: Tensor,
    *,
    method: str = "heun",
    generator: Randomness = None,
    noise: Any = None,
    callback: Callable[[float], None] | None = None,
) -> Solution:
    r"""Solve :math:`dy = f\,dt + g\,d\bar w` with one torchsde step per interval of ``grid``, in either direction.

    The noise is additive (g does not depend on y) and diagonal, so the Ito and Stratonovich readings agree.

    Args:
        drift: f(t, y), t float64 of shape ``()``, y ``(B, *E)``; returns ``(B, *E)``.
        diffusion: g(t, y), broadcastable to ``(B, *E)``; must not depend on the value of y.
        y0: initial state ``(B, *E)``.
        grid: N + 1 strictly monotone times; N steps are taken.
        method: one of ``SDE_METHODS``.
        generator: source of the noise, one or one per row.
        noise: a Brownian path over increasing time ``(ta, tb, return_U)`` with ``levy_area_approximation``, instead
            of a generator (to share one path between solves).
        callback: called with the time before every step.

    Raises:
        SolverError: the drift is not finite.
    """
    _shapes.choose("method", method, SDE_METHODS)
    grid = _validate_grid(grid, y0.device)
    if y0.shape[0] == 0:
        return Solution((y0,), 0, 0)
    packing = Packing((y0.shape,))
    guarded = _Guarded(lambda t, state: (drift(t, state[0]),), packing, (float(grid[0]), float(grid[-1])), None)
    flat = packing.pack((y0,))
    sde_type = "stratonovich" if method in _STRATONOVICH else "ito"
    direction = 1.0 if grid[-1] > grid[0] else -1.0

    def diagonal(t: Tensor) -> Tensor:
        return diffusion(t, y0).to(y0.dtype).expand_as(y0).reshape_as(flat)

    sde = _AdditiveSDE(guarded, diagonal, sde_type, direction)
    path = GeneratorNoise(flat, generator) if noise is None else noise
    stepper = torchsde_methods.select(method, sde_type)(
        sde=ForwardSDE(sde), bm=path, dt=None, adaptive=False, rtol=0.0, atol=0.0, dt_min=0.0, options={}
    )
    y = flat
    for start, end in itertools.pairwise(direction * grid):
        if callback is not None:
            callback(direction * float(start))
        guarded.dt = float(end - start)
        y, _ = stepper.step(start, end, y, ())
    return Solution(packing.unpack(y), guarded.evaluations, len(grid) - 1)
