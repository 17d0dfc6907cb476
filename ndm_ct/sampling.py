r"""Sampling: from :math:`z_1 \sim p_1` down to :math:`t_{min}` along one of the model's dynamics.

==============================  ==========================================================================
``"ode"``                       probability flow, adaptive
``"euler", "midpoint",``        probability flow, one step of the method per interval of a uniform time grid
``"heun", "rk4"``
``"sde"``                       reverse SDE on the grid, two evaluations per step (stochastic Heun)
``"ddpm", "ddim"``              frozen-prediction steps on the grid (:mod:`ndm_ct.discrete`)
==============================  ==========================================================================

A sample is a draw of :math:`z_{t_{min}}`, the variable whose density ``loglik`` reports; no last denoising step is
taken.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ndm_ct import _shapes
from ndm_ct.discrete import DDIM, DDPM, walk
from ndm_ct.divergence import resolve
from ndm_ct.likelihood import Trace, along, largest
from ndm_ct.model import NDM
from ndm_ct.solvers import FIXED_METHODS, odeint_grid, sdeint
from ndm_ct.trajectory import Problem

__all__ = ["METHODS", "SampleInfo", "sample"]

SDE_SOLVER = "heun"
METHODS = ("ode", "sde", "ddpm", "ddim", *FIXED_METHODS)
"""Names ``sample`` knows."""

TOLERANCE = 1e-5
"""Default rtol and atol of "ode"."""

Callback = Callable[[float], None]


@dataclass(frozen=True)
class SampleInfo:
    """What sampling cost.

    Args:
        nfe: network evaluations; for "ode", whose rows have steps of their own, of the row that took most.
        accepted: accepted steps, likewise.
        rejected: rejected steps, likewise.
        z: the prior draw :math:`z_1`, ``(n, *E)``.
        logp: log-density of each sample under the probability flow, nats, ``(n,)``, for "ode"; None for the others,
            which do not follow the flow exactly (``loglik`` scores their samples).
        stderr: its standard error, ``(n,)``.
    """

    nfe: int
    accepted: int
    rejected: int
    z: Tensor
    logp: Tensor | None = None
    stderr: Tensor | None = None


def sample(
    model: NDM,
    n: int,
    *,
    method: str = "ode",
    steps: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    trace: Trace | None = None,
    return_info: bool = False,
    **cond: Any,
) -> Any:
    r"""Draw n samples.

    Args:
        model: the model.
        n: number of samples, zero allowed.
        method: see the module's table.
        steps: number of steps of a fixed-grid method, taken exactly; not for "ode".
        rtol: relative tolerance, only for "ode"; None is 1e-5.
        atol: absolute tolerance, only for "ode"; None is 1e-5.
        generator: source of all randomness.
        dtype: dtype of the samples; None is the model's.
        device: None is the model's.
        progress: show a bar.
        trace: for "ode" with ``return_info``, how to estimate ``info.logp``, as in ``loglik``; None is "auto".
        return_info: also return a :class:`SampleInfo`; for "ode" this costs the divergence along the way.
        cond: conditioning, tensors with n rows.

    Returns:
        Shape ``(n, *E)``; with ``return_info`` a pair.

    Raises:
        ValueError: unknown method; steps missing, below one, or without effect; tolerances without effect.

    Example:
        >>> import ndm_ct
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
        >>> ndm_ct.sample(model, 5, method="ddim", steps=10).shape
        torch.Size([5, 2])
    """
    _shapes.choose("method", method, METHODS)
    _validate_options(method, steps, rtol, atol)
    if trace is not None and not (return_info and method == "ode"):
        raise ValueError("trace has no effect without method='ode' and return_info=True; drop it.")
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise ValueError(f"n must be a non-negative int, got {n!r}.")
    dtype = dtype or model.dtype or torch.get_default_dtype()
    device = torch.device(device) if device is not None else model.device or torch.device("cpu")
    with model.evaluating(), torch.no_grad():
        z1 = model.sample_prior(n, generator=generator, dtype=dtype, device=device)
        model.validate(z1, cond, sample, name="z1")
        with _bar(progress, steps, model.t_min) as callback:
            if method == "ode":
                relative, absolute = (TOLERANCE if value is None else value for value in (rtol, atol))
                adaptive = _Adaptive(model, z1, relative, absolute, callback, cond)
                x, info = adaptive.with_density(trace, generator) if return_info else adaptive.draw()
            else:
                assert steps is not None
                grid = torch.linspace(1.0, model.t_min, steps + 1, dtype=torch.float64, device=device)
                x, nfe = _OnGrid(model, z1, grid, method, generator, callback, cond).draw()
                info = SampleInfo(nfe, steps, 0, z1)
    x = x.to(dtype)
    return (x, info) if return_info else x


def _validate_options(method: str, steps: int | None, rtol: float | None, atol: float | None) -> None:
    if method == "ode":
        if steps is not None:
            raise ValueError(
                "method='ode' chooses its own steps, so steps has no effect; set rtol and atol, or take a fixed-grid "
                "method such as 'heun'."
            )
        return
    if steps is None:
        raise ValueError(f"method={method!r} takes a fixed number of steps; pass steps=, for example steps=100.")
    _shapes.validate_count("steps", steps)
    given = [name for name, value in (("rtol", rtol), ("atol", atol)) if value is not None]
    if given:
        raise ValueError(f"{' and '.join(given)} has no effect with method={method!r}, which takes fixed steps.")


@dataclass(frozen=True)
class _Adaptive:
    """A draw along the probability flow with steps of each row's own."""

    model: NDM
    z1: Tensor
    rtol: float
    atol: float
    callback: Callback | None
    cond: dict[str, Any]

    @property
    def _problem(self) -> Problem:
        interval = (1.0, self.model.t_min)
        return Problem(
            self.model, self.z1, interval, self.rtol, self.atol, "rowwise", "raise", False, self.cond, self.callback
        )

    def draw(self) -> tuple[Tensor, SampleInfo]:
        solved = self._problem.transport()
        evaluations, accepted = largest(solved.evaluations), largest(solved.accepted)
        return solved.z, SampleInfo(evaluations, accepted, largest(solved.rejected), self.z1)

    def with_density(self, trace: Trace | None, generator: torch.Generator | None) -> tuple[Tensor, SampleInfo]:
        estimator = resolve("auto" if trace is None else trace, self.model.event_shape)
        info = along(self._problem, estimator, None, generator, budget=False)
        return info.z, SampleInfo(info.nfe, info.accepted, info.rejected, self.z1, info.loglik, info.stderr)


@dataclass(frozen=True)
class _OnGrid:
    """A draw on a time grid: where it starts, and what every method needs. Methods return the end and the cost."""

    model: NDM
    z1: Tensor
    grid: Tensor
    method: str
    generator: torch.Generator | None
    callback: Callback | None
    cond: dict[str, Any]

    def draw(self) -> tuple[Tensor, int]:
        if self.method == "sde":
            return self._stochastic()
        if self.method in ("ddpm", "ddim"):
            return self._walk(self.grid), len(self.grid) - 1
        return self._deterministic()

    def _deterministic(self) -> tuple[Tensor, int]:
        flow = self.model.flow(self.z1.dtype, **self.cond)
        state = (self.z1.double(),)
        solution = odeint_grid(
            lambda t, state: (flow(t, state[0]),), state, self.grid, method=self.method, callback=self.callback
        )
        return solution.state[0], solution.evaluations

    def _walk(self, grid: Tensor) -> Tensor:
        sampler = DDIM(self.model) if self.method == "ddim" else DDPM(self.model)
        return walk(sampler, self.z1, grid, generator=self.generator, callback=self.callback, **self.cond)

    def _stochastic(self) -> tuple[Tensor, int]:
        model, z, first = self.model, self.z1.double(), 0
        if not bool(torch.isfinite(model.process.diffusion(self.grid[:1])).all()):
            # g(1) is infinite: the first step is the frozen-prediction transition, which forgets z_1 as the SDE would.
            z, first = self._walk(self.grid[:2]).double(), 1
        if len(self.grid) - first < 2:
            return z, first
        sde, transform = model.reverse_sde(self.z1.dtype, **self.cond), model.transform
        solution = sdeint(
            sde.drift, sde.diffusion, transform.to_basis(z), self.grid[first:], method=SDE_SOLVER,
            generator=self.generator, callback=self.callback,
        )  # fmt: skip
        return transform.from_basis(solution.state[0]), first + solution.evaluations


@contextmanager
def _bar(progress: bool, steps: int | None, t_min: float) -> Iterator[Callback | None]:
    """A callback that moves a bar: by steps on a grid, by time for adaptive solves."""
    if not progress:
        yield None
        return
    with tqdm(total=steps or 100, desc="sampling", unit="step" if steps else "%") as bar:

        def by_time(t: float) -> None:
            bar.update(int(100 * (1.0 - t) / (1.0 - t_min)) - bar.n)

        yield by_time if steps is None else lambda t: bar.update(1) and None
        bar.update(bar.total - bar.n)
