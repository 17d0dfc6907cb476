r"""Sampling: from :math:`z_1 \sim p_1` down to :math:`t_{min}` along one of the model's dynamics.

A sample is a draw of :math:`z_{t_{min}}`, the variable whose density ``loglik`` reports, or with ``denoise`` the
model's last estimate of x. Methods are

=====================================  ================================================================================
``"ode"``                              probability flow, each row with its own adaptive steps
``"exponential"``                      the same on one grid, at a tolerance in units of the noise
                                       (:mod:`ndm_ct.solvers.ode`); with ``steps=`` Heun's method on a grid
``"dopri5", "dopri8", "bosh3", ...``   probability flow, torchdiffeq's adaptive steps, one size for the batch
``"sde"``                              reverse SDE, each row with its own adaptive steps
                                       (:mod:`ndm_ct.solvers.sde`); with ``steps=`` stochastic Heun on a grid
``"torchsde:srk"`` and others          reverse SDE by torchsde, with adaptive steps or, with ``steps=``, on a grid
other names                            :mod:`ndm_ct.samplers` on a time grid (:mod:`ndm_ct.samplers.grids`)
=====================================  ================================================================================
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ndm_ct._core import checks
from ndm_ct._core.conditioning import Conditioning
from ndm_ct._core.noise import GeneratorLike, Randomness, as_randomness, rows_of
from ndm_ct._core.signals import until_interrupted
from ndm_ct.checking import verify
from ndm_ct.guidance import guided
from ndm_ct.likelihood.options import Trace
from ndm_ct.likelihood.path import Differentiable
from ndm_ct.model import NDM
from ndm_ct.samplers.grids import Grid
from ndm_ct.samplers.plan import METHODS, Draw, Method, Part, Plan, SampleInfo, Tick

__all__ = ["METHODS", "SampleInfo", "sample"]


@overload
def sample(
    model: NDM, n: int, /, *, method: Method = ..., steps: int | None = ..., nfe: int | None = ...,
    grid: Grid | None = ..., rtol: float | None = ..., atol: float | None = ..., stochasticity: float | None = ...,
    guidance: float | None = ..., denoise: bool = ..., differentiable: Differentiable = ...,
    generator: GeneratorLike = ..., dtype: torch.dtype | None = ..., device: torch.device | str | None = ...,
    batch_size: int | None = ..., progress: bool = ..., callback: Callable[[float, Tensor], None] | None = ...,
    trajectory: bool = ..., trace: Trace | None = ..., return_info: Literal[False] = ..., **cond: Any,
) -> Tensor: ...  # fmt: skip


@overload
def sample(
    model: NDM, n: int, /, *, method: Method = ..., steps: int | None = ..., nfe: int | None = ...,
    grid: Grid | None = ..., rtol: float | None = ..., atol: float | None = ..., stochasticity: float | None = ...,
    guidance: float | None = ..., denoise: bool = ..., differentiable: Differentiable = ...,
    generator: GeneratorLike = ..., dtype: torch.dtype | None = ..., device: torch.device | str | None = ...,
    batch_size: int | None = ..., progress: bool = ..., callback: Callable[[float, Tensor], None] | None = ...,
    trajectory: bool = ..., trace: Trace | None = ..., return_info: Literal[True], **cond: Any,
) -> tuple[Tensor, SampleInfo]: ...  # fmt: skip


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
    differentiable: Differentiable = False,
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
) -> Tensor | tuple[Tensor, SampleInfo]:
    r"""Draw n samples.

    Ctrl-C returns the batches that are finished, with a warning, if there are any.

    Args:
        model: the model.
        n: number of samples, zero allowed.
        method: a name of ``METHODS``, or a class of :mod:`ndm_ct.samplers` (or a partial of one) called with the
            model.
        steps: number of steps on a grid, taken exactly. "ode", "sde" and torchsde's methods choose their own if None.
        nfe: instead of steps, network evaluations per sample: the most steps that need no more than these are taken.
        grid: where the steps are: a name of ``grids.GRIDS``, or the times themselves, from 1 down to ``t_min``; None is
            "uniform".
        rtol: error allowed in one adaptive step, relative to the size of the state. A smaller one brings samples closer
            to the exact solution and takes more network evaluations. None is 1e-5 for the flow, 1e-2 for the SDE.
        atol: error allowed in one adaptive step where the state is near zero, in ``model.unit``; None as for ``rtol``.
        stochasticity: factor on the volatility :math:`\eta`, for methods that follow the reverse SDE; 0 is the
            probability flow, None is 1. The marginals do not depend on it where velocity and score are those of one
            process: for F linear in x and for prediction "moments" trained on its regressions. For prediction "x" with
            a nonlinear F every value is a different model (:mod:`ndm_ct.dynamics`).
        guidance: scale w of classifier-free guidance; needs a conditional model, see :func:`ndm_ct.guided`.
        denoise: return an estimate of x instead of :math:`z_{t_{min}}`, which still holds noise of standard deviation
            :math:`\sigma(t_{min})`. On a grid the last step is replaced by :math:`\hat x(z_t, t)` at its start, for
            one evaluation. After adaptive steps it is :math:`\hat x` at :math:`t_{min}`, for one evaluation more, and
            such samples have no density that the model could report.
        differentiable: True keeps the graph, for gradients with respect to parameters and conditioning, for adaptive
            methods of the flow and for torchsde's methods. "adjoint" gets them from a second solve backwards, in
            memory that does not grow with the number of network evaluations, for torchdiffeq's and torchsde's.
        generator: source of all randomness; or a sequence of n, one per sample, which then does not depend on the
            batch it is drawn in.
        dtype: dtype of the samples; None is that of the model's states. States have the model's dtype, or float32 for
            a model in half precision, and samples are cast at the end.
        device: None is the model's.
        batch_size: rows sampled at a time; None is all.
        progress: show a bar.
        callback: called as ``callback(t, z)`` before every step on a grid.
        trajectory: keep the states on the grid in ``info.trajectory``.
        trace: how to estimate ``info.logp``, as in :func:`ndm_ct.loglik`, for adaptive methods of the flow with
            ``return_info``; None is "auto". On a grid of a deterministic method "exact" gives the density of what its
            steps draw, up to 64 dimensions, for one walk more and d products; None gives none.
        return_info: also return a :class:`SampleInfo`; for adaptive methods of the flow this costs the divergence along
            the way.
        cond: conditioning, tensors with n rows or shared by all, as in :func:`ndm_ct.loglik`.

    Returns:
        Shape ``(n, *E)``, or that of the data of a model with an Encoder; with ``return_info`` a pair.

    Raises:
        TypeError: method is neither a name nor a sampler; generator is neither a generator nor a sequence of them.
        ValueError: unknown method or grid; steps missing or below one; an option without effect for the method;
            ``denoise`` with prediction "moments", which does not estimate x.

    Example:
        >>> import ndm_ct
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
        >>> x, info = ndm_ct.sample(model, 5, method="dpmpp_2m", steps=10, return_info=True)
        >>> x.shape, info.nfe
        (torch.Size([5, 2]), 10)
    """
    if not checks.is_whole(n) or not 0 <= n <= sys.maxsize:
        raise ValueError(f"n must be a non-negative int, got {n!r}.")
    n = int(n)  # torch takes no integers of numpy
    if batch_size is not None:
        batch_size = checks.validate_count("batch_size", batch_size)
    states = _states(model, dtype)
    dtype = states if dtype is None else dtype
    device = checks.usable_device(device) if device is not None else model.device or torch.device("cpu")
    source = as_randomness(generator, n, device, "sample")
    plan = Plan(
        model if guidance is None else guided(model, guidance), method, steps, nfe, grid, rtol, atol, stochasticity,
        denoise, differentiable, callback, trajectory, trace, return_info,
    )  # fmt: skip
    plan.validate()
    batches = torch.arange(n).split(batch_size or max(n, 1))
    given = plan.model.conditioning(cond, torch.empty(n, 0, dtype=states, device=device), sample)
    draw = plan.drawer()
    start = torch.zeros((), dtype=states, device=device).expand(n, *model.event_shape)
    verify(model, start, given, plan.purpose, latent=True)
    parts = _drawn(plan, draw, batches, source, states, device, progress, given)
    x = torch.cat([part.x for part in parts]).to(dtype)
    return (x, _joined([part.info for part in parts])) if return_info else x


def _drawn(
    plan: Plan, draw: Draw, batches: Sequence[Tensor], generator: Randomness, dtype: torch.dtype, device: torch.device,
    progress: bool, cond: Conditioning,
) -> list[Part]:  # fmt: skip
    """Draw batch after batch."""
    model = plan.model
    graph = torch.set_grad_enabled(bool(plan.differentiable))
    with model.evaluating(), graph, _bar(progress, draw.ticks * len(batches)) as tick:

        def drawn(rows: Tensor) -> Part:
            source, own = rows_of(generator, rows), cond.take(rows)
            z1 = model.sample_prior(len(rows), generator=source, dtype=dtype, device=device)
            model.validate_state(z1, own, sample, name="z1")
            return _as_data(model, draw(z1, source, tick, own), own)

        return until_interrupted(((len(rows), drawn(rows)) for rows in batches), sum(map(len, batches)), stacklevel=4)


def _states(model: NDM, dtype: torch.dtype | None) -> torch.dtype:
    """The precision of states for samples of some dtype: that of the model, or where it has none of its own, theirs."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating dtype of torch such as torch.float32, got {dtype!r}.")
    if model.data_dtype is None and dtype in (torch.float32, torch.float64):
        return dtype
    return model.dtype or (torch.get_default_dtype() if dtype is None else torch.float32)


def _as_data(model: NDM, part: Part, cond: Conditioning) -> Part:
    """Data and their density, from latents and theirs."""
    if not model.transform.latent:
        return part
    x, logp = model.transform.from_latent(part.x.to(part.info.z.dtype), **cond), part.info.logp
    if logp is None:
        return Part(x, part.info)
    weight = model.transform.to_latent(x, **cond)[1] if model.transform.bijective else None
    if weight is None:
        return Part(x, replace(part.info, logp=None, stderr=None, ode_error=None))
    return Part(x, replace(part.info, logp=logp + weight))


def _joined(parts: list[SampleInfo]) -> SampleInfo:
    """The information of all batches: counts of the most expensive one, everything else row by row."""
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


@contextmanager
def _bar(progress: bool, total: int) -> Iterator[Tick | None]:
    """A function that moves a bar on; None without a bar."""
    if not progress:
        yield None
        return
    with tqdm(total=total, desc="sampling", unit="step", bar_format="{l_bar}{bar}| {elapsed}<{remaining}") as bar:
        yield lambda amount: cast(None, bar.update(amount))
        bar.update(max(0.0, bar.total - bar.n))
