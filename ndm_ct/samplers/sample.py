r"""Sampling: from :math:`z_1 \sim p_1` down to :math:`t_{min}` along one of the model's dynamics.

A sample is a draw of :math:`z_{t_{min}}`, the variable whose density ``loglik`` reports, or with ``denoise`` the
model's last estimate of x. Methods are the adaptive solves of the probability flow,

=======================================  ============================================================================
``"ode"``                                every row with steps of its own (:mod:`ndm_ct.solvers.ode`)
``"dopri5", "dopri8", "bosh3", ...``     torchdiffeq's, one step size for the batch
=======================================  ============================================================================

the adaptive solve of the reverse SDE, ``"sde_adaptive"``, every row with steps of its own
(:mod:`ndm_ct.samplers.adaptive`), and those of :mod:`ndm_ct.samplers` on a time grid (:mod:`ndm_ct.samplers.grids`).
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ndm_ct._core import checks as _shapes
from ndm_ct._core.conditioning import Conditioning
from ndm_ct._core.noise import GeneratorLike, Randomness, as_randomness, rows_of
from ndm_ct.divergence import resolve
from ndm_ct.guidance import evaluations_per_call, guided
from ndm_ct.likelihood.api import Trace
from ndm_ct.likelihood.budget import largest, measure
from ndm_ct.likelihood.path import Problem
from ndm_ct.model import NDM, validate_prediction
from ndm_ct.samplers import NAMES
from ndm_ct.samplers.adaptive import sample_rows
from ndm_ct.samplers.base import Sampler, steps_within, walk
from ndm_ct.samplers.grids import Grid, time_grid
from ndm_ct.solvers import ADAPTIVE_METHODS, Solution

__all__ = ["ADAPTIVE", "METHODS", "SampleInfo", "sample"]

ADAPTIVE = ("ode", *ADAPTIVE_METHODS)
"""Names of adaptive methods for the probability flow."""

ADAPTIVE_SDE = "sde_adaptive"
"""Name of the adaptive method for the reverse SDE."""

METHODS = (*ADAPTIVE, ADAPTIVE_SDE, *NAMES)
"""Names ``sample`` knows."""

TOLERANCE, SDE_TOLERANCE = 1e-5, 1e-2
"""Default rtol and atol of the adaptive methods, for flow and SDE."""

Method = str | Callable[[NDM], Sampler]


@dataclass(frozen=True)
class SampleInfo:
    """What sampling cost, and on request how it went.

    Args:
        nfe: network evaluations of one sample; for "ode" and "sde_adaptive", whose rows have steps of their own, of
            the row that took most. A guided prediction is two.
        accepted: accepted steps, likewise.
        rejected: rejected steps, likewise.
        z: the prior draw :math:`z_1`, ``(n, *E)``.
        logp: log-density of each sample under the probability flow, nats, ``(n,)``, for its adaptive methods; None for
            the others, which do not follow the flow exactly (``loglik`` scores their samples), with ``denoise`` and
            behind an Encoder.
        stderr: its standard error, ``(n,)``.
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
    times: Tensor | None = None
    trajectory: Tensor | None = None


def sample(
    model: NDM,
    n: int,
    /,
    *,
    method: Method = "ode",
    steps: int | None = None,
    nfe: int | None = None,
    grid: Grid | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    stochasticity: float | None = None,
    guidance: float | None = None,
    denoise: bool = False,
    generator: GeneratorLike = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    callback: Callable[[float, Tensor], None] | None = None,
    trajectory: bool = False,
    trace: Trace | None = None,
    return_info: bool = False,
    **cond: Any,
) -> Any:
    r"""Draw n samples.

    Ctrl-C returns the batches that are finished, with a warning, if there are any.

    Args:
        model: the model.
        n: number of samples, zero allowed.
        method: a name of ``METHODS``, or a class of :mod:`ndm_ct.samplers` (or a partial of one) called with the
            model.
        steps: number of steps of a method on a grid, taken exactly.
        nfe: instead of steps, network evaluations per sample: the most steps that need no more than these.
        grid: a name of ``grids.GRIDS``, or the times themselves, from 1 down to ``t_min``; None is "uniform".
        rtol: relative tolerance, only for adaptive methods; None is 1e-5, or 1e-2 for "sde_adaptive".
        atol: absolute tolerance, only for adaptive methods; None is 1e-5, or 1e-2 for "sde_adaptive".
        stochasticity: factor on the volatility :math:`\eta`, for methods that follow the reverse SDE; 0 is the
            probability flow, None is 1. The marginals do not depend on it where velocity and score are those of one
            process: for F linear in x and for prediction "moments" trained on its regressions. For prediction "x" with
            a nonlinear F every value is a different model (:mod:`ndm_ct.dynamics`).
        guidance: scale w of classifier-free guidance; needs a conditional model, see :func:`ndm_ct.guided`.
        denoise: return an estimate of x in place of :math:`z_{t_{min}}`, which still holds noise of standard deviation
            :math:`\sigma(t_{min})`. On a grid the last step goes to sigma = 0: it is :math:`\hat x(z_t, t)` at its
            start, for one evaluation. After adaptive steps it is :math:`\hat x` at :math:`t_{min}`, for one evaluation
            more. Such samples have no density that the model could report.
        generator: source of all randomness; or a sequence of n, one per sample, which then does not depend on the
            batch it is drawn in.
        dtype: dtype of the samples; None is the model's.
        device: None is the model's.
        batch_size: rows sampled at a time; None is all.
        progress: show a bar.
        callback: called as ``callback(t, z)`` before every step on a grid.
        trajectory: keep the states on the grid in ``info.trajectory``.
        trace: for adaptive methods of the flow with ``return_info``, how to estimate ``info.logp``, as in ``loglik``;
            None is "auto".
        return_info: also return a :class:`SampleInfo`; for adaptive methods of the flow this costs the divergence along
            the way.
        cond: conditioning, tensors with n rows or shared by all, as in :func:`ndm_ct.loglik`.

    Returns:
        Shape ``(n, *E)``, or that of the data behind an Encoder; with ``return_info`` a pair.

    Raises:
        TypeError: method is no sampler; generator is none.
        ValueError: unknown method or grid; steps missing or below one; an option without effect for the method;
            ``denoise`` with prediction "moments", which does not estimate x.

    Example:
        >>> import ndm_ct
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
        >>> x, info = ndm_ct.sample(model, 5, method="dpmpp_2m", steps=10, return_info=True)
        >>> x.shape, info.nfe
        (torch.Size([5, 2]), 10)
    """
    if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= sys.maxsize:
        raise ValueError(f"n must be a non-negative int, got {n!r}.")
    if batch_size is not None:
        _shapes.validate_count("batch_size", batch_size)
    if isinstance(method, str):
        _shapes.choose("method", method, METHODS)
    elif not callable(method):
        raise TypeError(
            f"method must be a name or a class of ndm_ct.samplers, got {type(method).__name__}; "
            "functools.partial(DEIS, order=2) is one with options."
        )
    for name, flag in (("denoise", denoise), ("trajectory", trajectory), ("return_info", return_info)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {type(flag).__name__} ({flag!r}).")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable as callback(t, z), got {type(callback).__name__}.")
    dtype = _floating(model.dtype or torch.get_default_dtype() if dtype is None else dtype)
    device = _shapes.usable_device(device) if device is not None else model.device or torch.device("cpu")
    source = as_randomness(generator, n, device, "sample")
    if guidance is not None:
        model = guided(model, guidance)
    if denoise and model.prediction == "moments":
        raise ValueError("denoise=True needs an estimate of x, prediction='moments' estimates F(x, t); drop it.")
    draw: _Adaptive | _AdaptiveSDE | _OnGrid
    if isinstance(method, str) and method in ADAPTIVE:
        unused = {"steps": steps, "nfe": nfe, "grid": grid, "stochasticity": stochasticity, "callback": callback}
        _refuse(method, unused | {"trajectory": trajectory or None}, "chooses its own steps along the probability flow")
        with_density = return_info and not denoise
        if trace is not None and not with_density:
            raise ValueError("trace has no effect without return_info=True, or with denoise=True; drop it.")
        tolerances = [TOLERANCE if value is None else value for value in (rtol, atol)]
        draw = _Adaptive(model, method, tolerances[0], tolerances[1], trace, with_density, denoise)
    elif method == ADAPTIVE_SDE:
        unused = {"steps": steps, "nfe": nfe, "grid": grid, "callback": callback, "trajectory": trajectory or None}
        _refuse(method, unused | {"trace": trace}, "chooses its own steps along the reverse SDE")
        tolerances = [SDE_TOLERANCE if value is None else value for value in (rtol, atol)]
        own_model = model if stochasticity is None else model.with_volatility(scale=stochasticity)
        draw = _AdaptiveSDE(own_model, tolerances[0], tolerances[1], denoise)
    else:
        _refuse(method, {"rtol": rtol, "atol": atol, "trace": trace}, "takes fixed steps")
        if trajectory and not return_info:
            raise ValueError("trajectory=True needs return_info=True: the states are in info.trajectory.")
        sampler, times = _sampler_on_grid(model, method, steps, nfe, grid, stochasticity, denoise)
        draw = _OnGrid(sampler, times, callback, trajectory, denoise)
    batches = torch.arange(n).split(batch_size or max(n, 1))
    given = model.conditioning(cond, torch.empty(n, 0, dtype=dtype, device=device), sample)
    parts = []
    with model.evaluating(), torch.no_grad(), _bar(progress, draw.ticks * len(batches)) as tick:
        try:
            for rows in batches:
                noise, own = rows_of(source, rows), given.take(rows)
                z1 = model.sample_prior(len(rows), generator=noise, dtype=dtype, device=device)
                model.validate_state(z1, own, sample, name="z1")
                parts.append(_as_data(model, draw(z1, noise, tick, own), own))
        except KeyboardInterrupt:
            if not parts:
                raise
            done = sum(len(part.x) for part in parts)
            warnings.warn(f"interrupted: {done} of {n} samples are finished and returned.", stacklevel=2)
    x = torch.cat([part.x for part in parts]).to(dtype)
    return (x, _joined([part.info for part in parts])) if return_info else x


def _floating(dtype: Any) -> torch.dtype:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating dtype of torch such as torch.float32, got {dtype!r}.")
    return dtype


def _refuse(method: Method, options: dict[str, Any], reason: str) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{' and '.join(given)} has no effect with method={method!r}, which {reason}; drop it.")


def _sampler_on_grid(
    model: NDM,
    method: Method,
    steps: int | None,
    nfe: int | None,
    grid: Grid | None,
    stochasticity: float | None,
    denoise: bool,
) -> tuple[Sampler, Tensor]:
    if stochasticity is not None:
        model = model.with_volatility(scale=stochasticity)
    sampler = (NAMES[method] if isinstance(method, str) else method)(model)
    if not isinstance(sampler, Sampler):
        raise TypeError(f"method(model) must return a Sampler of ndm_ct.samplers, got {type(sampler).__name__}.")
    if stochasticity is not None and not sampler.uses_volatility:
        raise ValueError(
            f"stochasticity has no effect with method={method!r}, which does not follow the model's reverse SDE; "
            "take 'sde', 'sde_adaptive', 'ddpm' or 'dpmpp_2m_sde', or drop it."
        )
    if isinstance(grid, Tensor) and steps is None and nfe is None:
        steps = grid.numel() - 1
    if (steps is None) == (nfe is None):
        came = "neither" if steps is None else "both"
        raise ValueError(
            f"method={method!r} takes a fixed number of steps; pass steps= or nfe= (got {came}), for example steps=100."
        )
    if steps is None:
        per_call = evaluations_per_call(model.predictor)
        steps = steps_within(sampler, _shapes.validate_count("nfe", nfe), per_call, denoise)
    _shapes.validate_count("steps", steps)
    return sampler, time_grid(model.schedule, model.t_min, steps, "uniform" if grid is None else grid)


@dataclass(frozen=True)
class _Part:
    x: Tensor
    info: SampleInfo


def _as_data(model: NDM, part: _Part, cond: Conditioning) -> _Part:
    """Data from the latents that were drawn, and the density of data."""
    if not model.transform.latent:
        return part
    x, logp = model.transform.from_latent(part.x.to(part.info.z.dtype), **cond), part.info.logp
    if logp is not None:
        weight = model.transform.to_latent(x, **cond)[1] if model.transform.bijective else None
        logp = None if weight is None else logp + weight
    return _Part(x, replace(part.info, logp=logp, stderr=None if logp is None else part.info.stderr))


def _joined(parts: list[SampleInfo]) -> SampleInfo:
    """One batch's information from several: counts of the most expensive, everything else row by row."""
    if len(parts) == 1:
        return parts[0]
    columns: dict[str, Any] = {}
    for field in fields(SampleInfo):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], int):
            columns[field.name] = max(values)
        elif values[0] is None or field.name == "times":
            columns[field.name] = values[0]
        else:
            columns[field.name] = torch.cat(values, dim=1 if field.name == "trajectory" else 0)
    return SampleInfo(**columns)


Tick = Callable[[float], None]


@dataclass(frozen=True)
class _Adaptive:
    """Draws along the probability flow with steps of the solver's choice."""

    model: NDM
    method: str
    rtol: float
    atol: float
    trace: Trace | None
    with_density: bool
    denoise: bool

    ticks = 100

    def __call__(self, z1: Tensor, generator: Randomness, tick: Tick | None, cond: Conditioning) -> _Part:
        problem = Problem(
            self.model, z1, (1.0, self.model.t_min), self.rtol, self.atol,
            self.method, "raise", False, cond,
            _percent(tick, self.ticks, self.model.t_min),
        )  # fmt: skip
        if not self.with_density:
            solved = problem.transport()
            return _ended(self.model, solved, z1, self.denoise, cond)
        estimator = resolve("auto" if self.trace is None else self.trace, self.model.event_shape)
        info = measure(problem, estimator, generator)
        nfe = evaluations_per_call(self.model.predictor) * info.nfe
        own = SampleInfo(nfe, info.accepted, info.rejected, z1, info.loglik, info.stderr)
        return _Part(info.z, own)


@dataclass(frozen=True)
class _AdaptiveSDE:
    """Draws along the reverse SDE with steps of each row's choice."""

    model: NDM
    rtol: float
    atol: float
    denoise: bool

    ticks = 100

    def __call__(self, z1: Tensor, generator: Randomness, tick: Tick | None, cond: Conditioning) -> _Part:
        drawn = sample_rows(
            self.model, z1, rtol=self.rtol, atol=self.atol, generator=generator,
            callback=_percent(tick, self.ticks, self.model.t_min), **cond,
        )  # fmt: skip
        return _ended(self.model, drawn, z1, self.denoise, cond)


def _ended(model: NDM, solved: Solution, z1: Tensor, denoise: bool, cond: Conditioning) -> _Part:
    """What adaptive steps led to, or the estimate of x there; counts of predictions become those of evaluations."""
    z, (nfe, accepted, rejected) = solved.state[0], map(largest, (solved.nfe, solved.accepted, solved.rejected))
    if denoise:
        t = torch.tensor(model.t_min, dtype=torch.float64, device=z.device)
        z = model.predict_x(z, t, **cond)
        validate_prediction(z, t)
    per_call = evaluations_per_call(model.predictor)
    return _Part(z, SampleInfo(per_call * (nfe + denoise), accepted, rejected, z1))


def _percent(tick: Tick | None, ticks: int, t_min: float) -> Tick | None:
    """Moves a bar of so many ticks on, by the time reached."""
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
class _OnGrid:
    """Draws on a time grid."""

    sampler: Sampler
    grid: Tensor
    callback: Callable[[float, Tensor], None] | None
    keep: bool
    denoise: bool

    @property
    def ticks(self) -> int:
        return len(self.grid) - 1

    def __call__(self, z1: Tensor, generator: Randomness, tick: Tick | None, cond: Conditioning) -> _Part:
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
        per_call = evaluations_per_call(self.sampler.model.predictor)
        spent = per_call * (self.sampler.evaluations - before)
        trajectory = torch.stack([*states, x]) if self.keep else None
        return _Part(x, SampleInfo(spent, steps, 0, z1, times=self.grid, trajectory=trajectory))


@contextmanager
def _bar(progress: bool, total: int) -> Iterator[Tick | None]:
    """A function that moves a bar on; None without a bar."""
    if not progress:
        yield None
        return
    with tqdm(total=total, desc="sampling", unit="step", bar_format="{l_bar}{bar}| {elapsed}<{remaining}") as bar:
        yield lambda amount: cast(None, bar.update(amount))
        bar.update(max(0.0, bar.total - bar.n))
