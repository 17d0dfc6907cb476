"""How one call of ``sample`` draws: its options checked, and a function for each kind of method that draws a batch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ndm_ct._core import checks
from ndm_ct._core.conditioning import Conditioning
from ndm_ct._core.noise import Randomness
from ndm_ct.checking import Purpose
from ndm_ct.divergence import resolve
from ndm_ct.guidance import evaluations_per_call
from ndm_ct.likelihood.budget import largest, measure
from ndm_ct.likelihood.options import Trace
from ndm_ct.likelihood.path import Differentiable, Problem
from ndm_ct.model import NDM
from ndm_ct.prediction import validate_finite
from ndm_ct.samplers import NAMES
from ndm_ct.samplers.adaptive import sample_rows, sample_torchsde
from ndm_ct.samplers.base import Sampler, steps_within, walk
from ndm_ct.samplers.density import jacobian, logabsdet, validate_event
from ndm_ct.samplers.grids import Grid, time_grid
from ndm_ct.samplers.runge_kutta import RungeKutta
from ndm_ct.samplers.stochastic import TorchSDE
from ndm_ct.solvers import ADAPTIVE_METHODS, SDE_METHODS, Solution

__all__ = ["METHODS", "Method", "Plan", "SampleInfo"]

FLOW = ("ode", "exponential", *ADAPTIVE_METHODS)
"""Names of adaptive methods for the probability flow."""

TORCHSDE = {f"torchsde:{name}": name for name in SDE_METHODS}
"""Names of torchsde's methods, here and there."""

ADAPTIVE = (*FLOW, "sde", *TORCHSDE)
"""Names of methods that choose their own steps; "ode", "sde" and torchsde's take fixed ones if told how many."""

METHODS = (*FLOW, *TORCHSDE, *NAMES)
"""All names of methods."""

TOLERANCE, SDE_TOLERANCE = 1e-5, 1e-2
"""Default rtol and atol of the adaptive methods, for flow and SDE."""

Method = str | Callable[[NDM], Sampler]


Tick = Callable[[float], None]


@dataclass(frozen=True)
class SampleInfo:
    """What sampling cost, and on request how it went.

    Args:
        nfe: network evaluations of one sample. For "ode" and "sde", whose rows have their own steps, those of the row
            that took most. A guided prediction is two evaluations.
        accepted: accepted steps, of the same row.
        rejected: rejected steps, of the same row.
        z: the prior draw :math:`z_1`, ``(n, *E)``.
        logp: log-density of each sample, nats, ``(n,)``: under the probability flow for its adaptive methods, without
            ``denoise``; on a grid with ``trace="exact"`` the density of what these very steps draw
            (:mod:`ndm_ct.samplers.density`; a lower bound where few steps fold). None otherwise, and for models
            with an Encoder.
        stderr: its standard error, ``(n,)``.
        ode_error: estimate of the size of the solver's error of ``logp``, nats, ``(n,)``, as in
            :class:`~ndm_ct.LikelihoodInfo`; NaN for the torchdiffeq methods.
        times: the grid, ``(N + 1,)``; None for adaptive methods.
        trajectory: with ``trajectory=True`` the states at these times, ``(N + 1, n, *E)``; the last is the sample, also
            with ``denoise``, or its latents.
    """

    nfe: int
    accepted: int
    rejected: int
    z: Tensor
    logp: Tensor | None = None
    stderr: Tensor | None = None
    ode_error: Tensor | None = None
    times: Tensor | None = None
    trajectory: Tensor | None = None


@dataclass(frozen=True)
class Part:
    """The samples of one batch, and what they cost."""

    x: Tensor
    info: SampleInfo


@dataclass(frozen=True)
class Plan:
    """How one call of :func:`ndm_ct.sample` draws; see its arguments."""

    model: NDM
    method: Method
    steps: int | None
    nfe: int | None
    grid: Grid | None
    rtol: float | None
    atol: float | None
    stochasticity: float | None
    denoise: bool
    differentiable: Differentiable
    callback: Callable[[float, Tensor], None] | None
    trajectory: bool
    trace: Trace | None
    return_info: bool

    @property
    def adaptive(self) -> bool:
        """Whether the method chooses its own steps."""
        told = self.method not in ("exponential", *ADAPTIVE_METHODS) and (
            self.steps is not None or self.nfe is not None or isinstance(self.grid, Tensor)
        )
        return isinstance(self.method, str) and self.method in ADAPTIVE and not told

    @property
    def purpose(self) -> Purpose:
        """What the model has to be fit for."""
        if not self.adaptive:
            return "sample"
        return "likelihood" if self.method in FLOW and self.return_info and not self.denoise else "flow"

    def validate(self) -> None:
        """Check what does not depend on the kind of method."""
        if isinstance(self.method, str):
            checks.choose("method", self.method, METHODS)
        elif not callable(self.method):
            raise TypeError(
                f"method must be a name or a class of ndm_ct.samplers, got {type(self.method).__name__}; "
                "functools.partial(DEIS, order=2) is one with options."
            )
        if self.model.flow_only and self.method not in FLOW:
            raise ValueError(
                f"method={self.method!r} assumes the noise of the schedule, and a {type(self.model).__name__} has "
                "another; take 'ode', with steps= for a grid, or the model's simulate() for its SDE."
            )
        for name in ("denoise", "trajectory", "return_info"):
            flag = getattr(self, name)
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, got {type(flag).__name__} ({flag!r}).")
        if self.callback is not None and not callable(self.callback):
            raise TypeError(f"callback must be callable as callback(t, z), got {type(self.callback).__name__}.")
        if self.denoise and self.model.prediction == "moments":
            raise ValueError("denoise=True needs an estimate of x, prediction='moments' estimates F(x, t); drop it.")
        self._validate_differentiable()

    def _validate_differentiable(self) -> None:
        if not isinstance(self.differentiable, bool):
            checks.choose("differentiable", self.differentiable, ("adjoint",))
        if not self.differentiable:
            return
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "differentiable=True keeps a graph, which torch.inference_mode() forbids; leave that mode."
            )
        if self.method not in TORCHSDE and not (self.adaptive and self.method in FLOW):
            raise ValueError(
                f"differentiable={self.differentiable!r} has no effect with method={self.method!r}; take 'ode' without "
                "steps=, a torchdiffeq method such as 'dopri5', or a torchsde method such as 'torchsde:heun'."
            )

    def drawer(self) -> "Draw":
        """The function that draws a batch, once the options of its kind of method are checked."""
        unused: dict[str, Any] = {"callback": self.callback, "trajectory": self.trajectory or None}
        if not self.adaptive:
            self._raise_if_given({"rtol": self.rtol, "atol": self.atol}, "takes fixed steps")
            self._validate_trace_on_grid()
            if self.trajectory and not self.return_info:
                raise ValueError("trajectory=True needs return_info=True: the states are in info.trajectory.")
            sampler, times = self._on_grid()
            return OnGrid(sampler, times, self.callback, self.trajectory, self.denoise, self.trace is not None)
        unused |= {"steps": self.steps, "nfe": self.nfe, "grid": self.grid}
        if self.method in FLOW:
            unused |= {"stochasticity": self.stochasticity}
            self._raise_if_given(unused, "chooses its own steps along the probability flow")
            if self.trace is not None and (self.denoise or not self.return_info):
                raise ValueError("trace has no effect without return_info=True, or with denoise=True; drop it.")
            return AdaptiveFlow(self, *self._tolerances(TOLERANCE))
        self._raise_if_given(unused | {"trace": self.trace}, "chooses its own steps along the reverse SDE")
        return AdaptiveSDE(self, self._own_model(), *self._tolerances(SDE_TOLERANCE))

    def _validate_trace_on_grid(self) -> None:
        if self.trace is None:
            return
        if self.trace != "exact":
            raise ValueError(
                f"trace of a method on a grid must be 'exact', the determinant of its steps, got {self.trace!r}; drop "
                "it for samples without a density."
            )
        if not self.return_info:
            raise ValueError("trace has no effect without return_info=True: the density is in info.logp.")
        validate_event(self.model.event_shape)

    def _tolerances(self, default: float) -> tuple[float, float]:
        return default if self.rtol is None else self.rtol, default if self.atol is None else self.atol

    def _raise_if_given(self, options: dict[str, Any], reason: str) -> None:
        given = [name for name, value in options.items() if value is not None]
        if given:
            raise ValueError(
                f"{' and '.join(given)} has no effect with method={self.method!r}, which {reason}; drop it."
            )

    def _own_model(self) -> NDM:
        return self.model if self.stochasticity is None else self.model.with_volatility(scale=self.stochasticity)

    def _sampler(self) -> Sampler:
        """The sampler on a grid."""
        model = self._own_model()
        if not isinstance(self.method, str):
            sampler = self.method(model)
        elif self.method in TORCHSDE:
            sampler = TorchSDE(model, TORCHSDE[self.method], self.differentiable)
        else:
            sampler = RungeKutta(model, "heun") if self.method == "ode" else NAMES[self.method](model)
        if not isinstance(sampler, Sampler):
            raise TypeError(f"method(model) must return a Sampler of ndm_ct.samplers, got {type(sampler).__name__}.")
        if self.stochasticity is not None and not sampler.uses_volatility:
            raise ValueError(
                f"stochasticity has no effect with method={self.method!r}, which does not follow the model's reverse "
                "SDE; take 'sde', 'torchsde:srk', 'ddpm' or 'dpmpp_2m_sde', or drop it."
            )
        return sampler

    def _on_grid(self) -> tuple[Sampler, Tensor]:
        """The sampler and its times."""
        sampler, steps, model = self._sampler(), self.steps, self.model
        if isinstance(self.grid, Tensor) and steps is None and self.nfe is None:
            steps = self.grid.numel() - 1
        if (steps is None) == (self.nfe is None):
            came = "neither" if steps is None else "both"
            raise ValueError(
                f"method={self.method!r} takes a fixed number of steps; pass steps= or nfe= (got {came}), for example "
                "steps=100."
            )
        if steps is None:
            per_call = evaluations_per_call(model.predictor)
            steps = steps_within(sampler, checks.validate_count("nfe", self.nfe), per_call, self.denoise)
        checks.validate_count("steps", steps)
        return sampler, time_grid(model.schedule, model.t_min, steps, "uniform" if self.grid is None else self.grid)


class Draw:
    """Draws a batch from its prior draw."""

    ticks: int
    """How far the progress bar goes for one batch."""

    def __call__(self, z1: Tensor, generator: Randomness, tick: Tick | None, cond: Conditioning) -> Part:
        raise NotImplementedError


@dataclass(frozen=True)
class AdaptiveFlow(Draw):
    """Draws along the probability flow with adaptive steps."""

    plan: Plan
    rtol: float
    atol: float

    ticks = 100

    def __call__(self, z1: Tensor, generator: Randomness, tick: Tick | None, cond: Conditioning) -> Part:
        plan, model = self.plan, self.plan.model
        problem = Problem(
            model, z1, (1.0, model.t_min), self.rtol, self.atol, str(plan.method), "raise", plan.differentiable,
            cond, _percent(tick, self.ticks, model.t_min), error_wanted=True,
        )  # fmt: skip
        if plan.denoise or not plan.return_info:
            return _ended(model, problem.transport(), z1, plan.denoise, cond)
        estimator = resolve("auto" if plan.trace is None else plan.trace, model.event_shape)
        info = measure(problem, estimator, generator)
        nfe = evaluations_per_call(model.predictor) * info.nfe
        return Part(info.z, SampleInfo(nfe, info.accepted, info.rejected, z1, info.loglik, info.stderr, info.ode_error))


@dataclass(frozen=True)
class AdaptiveSDE(Draw):
    """Draws along the reverse SDE with adaptive steps."""

    plan: Plan
    model: NDM
    rtol: float
    atol: float

    ticks = 100

    def __call__(self, z1: Tensor, generator: Randomness, tick: Tick | None, cond: Conditioning) -> Part:
        solve: Callable[..., Solution] = sample_rows
        if self.plan.method in TORCHSDE:
            method = TORCHSDE[str(self.plan.method)]
            solve = partial(sample_torchsde, method=method, differentiable=self.plan.differentiable)
        solution = solve(
            self.model, z1, rtol=self.rtol, atol=self.atol, generator=generator,
            callback=_percent(tick, self.ticks, self.model.t_min), **cond,
        )  # fmt: skip
        return _ended(self.model, solution, z1, self.plan.denoise, cond)


def _ended(model: NDM, solution: Solution, z1: Tensor, denoise: bool, cond: Conditioning) -> Part:
    """The end of adaptive steps, or the estimate of x there."""
    z, nfe = solution.state[0], largest(solution.nfe) + denoise
    if denoise:
        t = torch.tensor(model.t_min, dtype=torch.float64, device=z.device)
        z = model.predict_x(z, t, **cond)
        validate_finite(z, t)
    per_call = evaluations_per_call(model.predictor)
    return Part(z, SampleInfo(per_call * nfe, largest(solution.accepted), largest(solution.rejected), z1))


def _percent(tick: Tick | None, ticks: int, t_min: float) -> Tick | None:
    """Moves a progress bar of that many ticks according to the time that was reached."""
    if tick is None:
        return None
    done = 0.0

    def by_time(t: float) -> None:
        nonlocal done
        now = ticks * (1.0 - t) / (1.0 - t_min)
        tick(max(0.0, now - done))
        done = max(done, now)

    return by_time


@dataclass(frozen=True)
class OnGrid(Draw):
    """Draws on a time grid."""

    sampler: Sampler
    grid: Tensor
    callback: Callable[[float, Tensor], None] | None
    keep: bool
    denoise: bool
    density: bool

    @property
    def ticks(self) -> int:  # type: ignore[override]
        return len(self.grid) - 1

    def __call__(self, z1: Tensor, generator: Randomness, tick: Tick | None, cond: Conditioning) -> Part:
        states: list[Tensor] = []

        def seen(t: float, z: Tensor) -> None:
            if self.keep:
                states.append(z)
            if self.callback is not None:
                self.callback(t, z)
            if tick is not None:
                tick(1.0)

        before, steps = self.sampler.evaluations, self.ticks
        x = walk(
            self.sampler, z1, self.grid.to(z1.device), generator=generator, callback=seen, denoise=self.denoise, **cond
        )  # fmt: skip
        logp = self._log_density(z1.double(), cond) if self.density else None
        per_call = evaluations_per_call(self.sampler.model.predictor)
        spent = per_call * (self.sampler.evaluations - before)
        trajectory = torch.stack([*states, x]) if self.keep else None
        return Part(x, SampleInfo(spent, steps, 0, z1, logp, times=self.grid, trajectory=trajectory))

    def _log_density(self, z1: Tensor, cond: Conditioning) -> Tensor:
        """Log-density of the ends of these steps, nats, float64."""
        model, grid = self.sampler.model, self.grid.to(z1.device)

        def draw(z: Tensor, generator: torch.Generator) -> Tensor:
            return walk(self.sampler, z, grid, generator=generator, denoise=self.denoise, **cond)

        return model.log_prior(z1) - logabsdet(jacobian(draw, z1, model.derivatives)[1])
