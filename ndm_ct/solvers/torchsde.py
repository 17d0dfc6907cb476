r"""Solves of :math:`dy = f(t, y)\,dt + g(t)\,dw` by torchsde, on a grid or with its adaptive steps.

torchsde is imported at the first solve. What is added to it:

* the state has any shape, and time runs in either direction;
* noise comes from a ``torch.Generator`` (torchsde would seed itself from numpy);
* a grid of N intervals is N steps, uniform or not;
* noise is additive and diagonal, without a d x d matrix, so ``"srk"`` is the two-stage scheme for additive noise;
* every evaluation is counted, and failures name time, step size and batch rows.

References:
    Li et al., torchsde, https://github.com/google-research/torchsde
    Roessler, Runge-Kutta Methods for the Strong Approximation of Solutions of SDEs (2010)
"""

import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ndm_ct._core import checks
from ndm_ct._core.errors import SolverError
from ndm_ct._core.noise import GeneratorLike, Randomness, as_randomness, normal_like
from ndm_ct.solvers.solution import Solution, validate_slope, validate_tolerance

__all__ = ["SDE_METHODS", "sdeint", "sdeint_adaptive"]

SDE_METHODS = {"euler": (1.0, 1), "heun": (1.0, 2), "midpoint": (1.0, 2), "srk": (1.5, 2)}
"""Methods: strong order for additive noise, and evaluations per step. torchsde's other methods are one of these for
additive noise, or need a d x d matrix."""

_STRATONOVICH = ("heun", "midpoint")  # for noise that does not depend on the state, Ito and Stratonovich agree
_MAX_EVALUATIONS = 60_000
_VANISHED = 1e-7
"""Steps, relative to the interval, at which an adaptive solve fails."""

Coefficient = Callable[[Tensor, Tensor], Tensor]


def sdeint(
    drift: Coefficient,
    diffusion: Coefficient,
    y0: Tensor,
    grid: Tensor,
    *,
    method: str = "heun",
    generator: GeneratorLike = None,
    noise: Any = None,
    adjoint: tuple[Tensor, ...] | None = None,
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
            of a generator (to share one path between solves). Time that decreases is negated.
        adjoint: gradients by torchsde's adjoint equation, solved backwards along the same path, whose memory holds the
            states at the grid and no network: all tensors besides the state that f and g depend on and that need a
            gradient. None: through the steps.
        callback: called with the time before every step.

    Raises:
        SolverError: the drift is not finite.
    """
    checks.choose("method", method, SDE_METHODS)
    generator = as_randomness(generator, len(y0), y0.device, "sdeint")
    grid = _validate_grid(grid, y0.device)
    if y0.shape[0] == 0:
        return Solution.of_batch((y0,), 0, 0)
    torchsde, sde = _imported(), _AdditiveSDE(drift, diffusion, y0, float(grid[0]), float(grid[-1]), method)
    times, y = sde.direction * grid, y0.flatten(1) if y0.ndim > 1 else y0[:, None]
    if adjoint is None:
        path = GeneratorNoise(y, generator) if noise is None else noise
        step = _stepper(torchsde, sde, path, method)
    else:
        path = _Path(torchsde, y, generator, times, len(grid) - 1) if noise is None else noise
        step = partial(_adjoint_step, torchsde, sde, path, method, adjoint)
    for start, end in itertools.pairwise(times):
        if callback is not None:
            callback(sde.direction * float(start))
        sde.dt = float(end - start)
        y = step(start, end, y)
    return sde.solution(y, len(grid) - 1, 0)


def sdeint_adaptive(
    drift: Coefficient,
    diffusion: Coefficient,
    y0: Tensor,
    t0: float,
    t1: float,
    *,
    first_step: float,
    method: str = "heun",
    rtol: float = 1e-2,
    atol: float = 1e-2,
    generator: GeneratorLike = None,
    adjoint: tuple[Tensor, ...] | None = None,
    callback: Callable[[float], None] | None = None,
) -> Solution:
    r"""Solve :math:`dy = f\,dt + g\,d\bar w` from t0 to t1 with torchsde's adaptive steps, one size for the batch.

    A step is accepted if it differs little from two steps of half its size, on the same Brownian path.

    Args:
        drift: f(t, y), as in :func:`sdeint`.
        diffusion: g(t, y), as in :func:`sdeint`.
        y0: initial state ``(B, *E)``.
        t0: start.
        t1: end.
        first_step: length of the first trial step.
        method: one of ``SDE_METHODS``.
        rtol: error allowed in one step, relative to the size of the state, as a root mean square over the batch.
        atol: error allowed in one step where the state is near zero, in its own units.
        generator: source of the noise, one or one per row.
        adjoint: gradients by torchsde's adjoint equation, as in :func:`sdeint`; its backward solve is adaptive too.
        callback: called with the time of every evaluation.

    Raises:
        SolverError: the drift is not finite, the step size vanished, or 60,000 evaluations were not enough.
    """
    checks.choose("method", method, SDE_METHODS)
    generator = as_randomness(generator, len(y0), y0.device, "sdeint_adaptive")
    for name, value in (("rtol", rtol), ("atol", atol)):
        validate_tolerance(name, value, y0.dtype)
    if t0 == t1 or y0.shape[0] == 0:
        return Solution.of_batch((y0,), 0, 0)
    torchsde, sde = _imported(), _AdditiveSDE(drift, diffusion, y0, t0, t1, method)
    sde.callback = callback
    y = y0.flatten(1) if y0.ndim > 1 else y0[:, None]
    times = sde.direction * torch.tensor([t0, t1], dtype=torch.float64, device=y.device)
    path = _Path(torchsde, y, generator, times, None)
    options = {"adaptive": True, "rtol": rtol, "atol": atol, "dt": first_step, "dt_min": _VANISHED * abs(t1 - t0)}
    solve = torchsde.sdeint
    if adjoint is not None:
        backwards = {"adjoint_adaptive": True, "adjoint_rtol": rtol, "adjoint_atol": atol}
        solve = partial(torchsde.sdeint_adjoint, adjoint_params=adjoint, **backwards)
    with _own_randomness(y), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Hitting minimum allowed step size")
        try:
            y = solve(sde, y, times, bm=path, method=method, **options)[-1]
        except UserWarning as warning:
            raise SolverError(
                f"torchsde's {method} gave up at t={sde.t:.6g}: the step size vanished. Loosen rtol/atol, raise t_min, "
                "or look at the network's output there.",
                t=sde.t, dt=_VANISHED * abs(t1 - t0),
            ) from warning  # fmt: skip
    sde.callback = None
    return sde.solution(y, *path.steps())


def _imported() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchsde 0.2.6 uses torch.jit.script, which warns at import
        import torchsde
    return torchsde


def _validate_grid(grid: Tensor, device: torch.device) -> Tensor:
    grid = grid.to(dtype=torch.float64, device=device)
    if grid.ndim != 1 or grid.numel() < 2:
        raise ValueError(f"grid needs at least two times in one dimension, got shape {tuple(grid.shape)}.")
    steps = grid.diff()
    if not bool((steps > 0).all() or (steps < 0).all()):
        raise ValueError("grid must be strictly increasing or strictly decreasing.")
    return grid


Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def _stepper(torchsde: ModuleType, sde: "_AdditiveSDE", path: Any, method: str) -> Step:
    """torchsde's step from s to the end of an interval."""
    solver = torchsde._core.methods.select(method, sde.sde_type)(
        sde=torchsde._core.base_sde.ForwardSDE(sde), bm=path, dt=None, adaptive=False, rtol=0.0, atol=0.0, dt_min=0.0,
        options={},
    )  # fmt: skip
    return lambda start, end, y: solver.step(start, end, y, ())[0]


def _adjoint_step(
    torchsde: ModuleType, sde: "_AdditiveSDE", path: Any, method: str, parameters: tuple[Tensor, ...], start: Tensor,
    end: Tensor, y: Tensor,
) -> Tensor:  # fmt: skip
    """The same step, whose gradient is one step of the adjoint equation."""
    with _own_randomness(y):
        # A step size beyond the end of the interval makes it one step; its own length could leave a sliver by rounding.
        return torchsde.sdeint_adjoint(
            sde, y, torch.stack([start, end]), bm=path, method=method, dt=2.0 * float(end - start),
            adjoint_params=parameters,
        )[-1]  # fmt: skip


@contextmanager
def _own_randomness(y: Tensor) -> Iterator[None]:
    """Leaves torch's global generator as it was: torchsde's check of its arguments draws from it."""
    with torch.random.fork_rng(devices=[y.device] if y.device.type == "cuda" else []):
        yield


class GeneratorNoise:
    """Brownian increments drawn step by step from a ``torch.Generator``; no interval can be asked for twice.

    Args:
        like: a tensor ``(B, D)`` whose shape, dtype and device the increments take.
        generator: source, one or one per row; None is torch's global one.
    """

    levy_area_approximation = "space-time"

    def __init__(self, like: Tensor, generator: Randomness) -> None:
        self.shape, self.dtype, self.device = tuple(like.shape), like.dtype, like.device
        self._like, self._generator = like.detach(), generator

    def __call__(self, ta: Any, tb: Any, return_U: bool = False, return_A: bool = False) -> Any:
        step = tb - ta
        increment = self._normal() * step**0.5
        if not return_U:
            return increment
        # U is the integral of the path over the step: mean step * W / 2, independent part of variance step^3 / 12.
        return increment, step * (0.5 * increment + self._normal() * (step / 12.0) ** 0.5)

    def _normal(self) -> Tensor:
        return normal_like(self._like, self._generator)


class _Path:
    """A Brownian path that answers for any interval, again and again: torchsde's, with seeds from a generator.

    Args:
        like: a tensor ``(B, D)``.
        generator: source of the seeds; one per row gives every row a path of its own.
        times: increasing times; the path goes from the first to the last.
        steps: expected number of steps, None if unknown.
    """

    levy_area_approximation = "space-time"

    def __init__(
        self, torchsde: ModuleType, like: Tensor, generator: Randomness, times: Tensor, steps: int | None
    ) -> None:
        self.shape, self.dtype, self.device = tuple(like.shape), like.dtype, like.device
        if generator is None or isinstance(generator, torch.Generator):
            sources = [(like, generator)]
        else:
            sources = list(zip(like.split(1), generator, strict=True))
        t0, t1 = float(times[0]), float(times[-1])
        self._starts: list[float] = []
        self._paths = [
            torchsde.BrownianInterval(
                t0=t0, t1=t1, size=tuple(rows.shape), dtype=like.dtype, device=like.device, entropy=_seed(each),
                dt=None if steps is None else (t1 - t0) / steps, levy_area_approximation="space-time",
            )
            for rows, each in sources
        ]  # fmt: skip

    def __call__(self, ta: Any, tb: Any, return_U: bool = False, return_A: bool = False) -> Any:
        self._starts.append(float(ta))
        answers = [path(ta, tb, return_U=return_U) for path in self._paths]
        return tuple(map(torch.cat, zip(*answers, strict=True))) if return_U else torch.cat(answers)

    def steps(self) -> tuple[int, int]:
        """Accepted and rejected steps: a trial asks for three intervals, and starts where a rejected one did."""
        trials = self._starts[::3]
        return len(set(trials)), len(trials) - len(set(trials))


def _seed(generator: torch.Generator | None) -> int:
    device = None if generator is None else generator.device
    return int(torch.randint(2**31 - 1, (), generator=generator, device=device))


class _AdditiveSDE:
    """What torchsde asks for, in its increasing time s = direction * t and for flat states."""

    noise_type = "additive"

    def __init__(
        self, drift: Coefficient, diffusion: Coefficient, y0: Tensor, t0: float, t1: float, method: str
    ) -> None:
        self.drift, self.diffusion, self.like = drift, diffusion, y0.detach()
        self.low, self.high, self.direction = min(t0, t1), max(t0, t1), 1.0 if t1 > t0 else -1.0
        self.sde_type = "stratonovich" if method in _STRATONOVICH else "ito"
        self.t, self.dt, self.nfe = t0, float("nan"), 0
        self.callback: Callable[[float], None] | None = None
        self.last: tuple[float, Tensor, Tensor] | None = None

    def time(self, s: Tensor) -> Tensor:
        """The time t, inside the interval."""
        return (self.direction * s).clamp(self.low, self.high)

    def f(self, s: Tensor, y: Tensor) -> Tensor:
        # "srk" asks twice for the drift at the start of a step, and so do torchsde's checks; the answer is remembered.
        if self.last is not None and self.last[0] == float(s) and _same(self.last[1], y):
            return self.last[2]
        if self.nfe >= _MAX_EVALUATIONS:
            raise SolverError(
                f"torchsde gave up at t={self.t:.6g}: {self.nfe} evaluations were not enough; loosen rtol/atol, raise "
                "t_min, or look at the network's output there.",
                t=self.t,
            )  # fmt: skip
        self.nfe, t = self.nfe + 1, self.time(s)
        self.t = float(t)
        if self.callback is not None:
            self.callback(self.t)
        slope = self.drift(t, y.reshape_as(self.like)).reshape_as(y)
        validate_slope(slope, t, self.dt)
        value = self.direction * slope
        self.last = (float(s), y, value)
        return value

    def g_prod(self, s: Tensor, y: Tensor, v: Tensor) -> Tensor:
        g = self.diffusion(self.time(s), self.like).to(self.like.dtype)
        return g.expand_as(self.like).reshape_as(y) * v

    def solution(self, y: Tensor, accepted: int, rejected: int) -> Solution:
        """The solution that ends in the flat state ``y``."""
        self.last = None
        return Solution.of_batch((y.reshape_as(self.like),), self.nfe, accepted, rejected)


def _same(last: Tensor, y: Tensor) -> bool:
    """Whether two states are one tensor, or, where no graph is built, share their memory."""
    return last is y or (not torch.is_grad_enabled() and last.data_ptr() == y.data_ptr())
