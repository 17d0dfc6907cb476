"""The options that the likelihood functions share, and the parts in which a large batch is solved.

A path and the traces along it hold many numbers per row: d products for the exact trace, or the states at all nodes of
the quadrature. So a large batch is cut into parts of bounded size. Rows do not see each other and random traces draw
their noise row by row: the parts do not change the results.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ndm_ct._core.checks import choose, event_size, validate_count, validate_positive
from ndm_ct._core.conditioning import Conditioning
from ndm_ct._core.errors import PredictorError, SolverError
from ndm_ct._core.noise import Randomness, by_row, rows_of
from ndm_ct.checking import Purpose, verify
from ndm_ct.divergence import Exact, Hutchinson, Quadrature, TraceEstimator, resolve
from ndm_ct.divergence.nodes import rows_at_once
from ndm_ct.likelihood.budget import LikelihoodInfo, measure
from ndm_ct.likelihood.path import METHODS, TOLERANCE, Differentiable, Problem
from ndm_ct.model import NDM

__all__ = ["Trace"]

Trace = str | TraceEstimator

GRID_TOLERANCE = 3e-5
"""Default rtol and atol of "exponential"."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options that the likelihood functions share, as the user gave them; see :func:`ndm_ct.loglik`."""

    trace: Trace | None
    stderr: float | None = None
    rtol: float | None
    atol: float | None
    method: str | None
    on_failure: str = "raise"
    differentiable: Differentiable = False
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            validate_count("batch_size", self.batch_size)

    def transport(
        self, model: NDM, start: Tensor, interval: tuple[float, float], cond: Conditioning,
        generator: Randomness, return_info: bool,
    ) -> Tensor | tuple[Tensor, LikelihoodInfo]:  # fmt: skip
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
        self._verify(model, start, interval, cond, "flow")
        size = self._size(model, len(start), products=1)
        # An Encoder draws noise: a single generator then has to be told apart by row, once the batch is split.
        split = len(start) > size and not model.transform.bijective
        source = by_row(generator, start.device) if split else partial(rows_of, generator)
        ends = self._by_parts(lambda *part: self._transport_part(model, interval, *part), start, cond, source, size)
        return torch.cat(ends) if len(ends) > 1 else ends[0]

    def _transport_part(
        self, model: NDM, interval: tuple[float, float], start: Tensor, cond: Conditioning, generator: Randomness
    ) -> Tensor:
        upwards = interval[1] > interval[0]
        with model.evaluating(), torch.set_grad_enabled(bool(self.differentiable)):
            y = model.to_latent(start, generator=generator, **cond)[0] if upwards else start
            end = self._path(model, y, interval, cond, None).transport().state[0].to(start.dtype)
            return end if upwards else model.transform.from_latent(end, **cond)

    def likelihood(
        self, model: NDM, start: Tensor, interval: tuple[float, float], cond: Conditioning,
        generator: Randomness, *, budget: bool,
    ) -> LikelihoodInfo:  # fmt: skip
        """Path, log-determinant and density.

        Args:
            model: the model.
            start: data or noise.
            interval: times of start and end.
            cond: conditioning.
            generator: source of nodes and probes.
            budget: whether to estimate the systematic errors; they are NaN otherwise.
        """
        if not model.transform.bijective:
            raise ValueError(
                f"{type(model.transform).__name__} is stochastic, so that log p(x) has only a bound; use ndm_ct.elbo, "
                "or bound='elbo'."
            )
        estimator = self._estimator(model.event_shape)
        self._verify(model, start, interval, cond, "likelihood")
        size = self._size(model, len(start), _products(estimator, model.event_shape))
        # A single generator gives the first draws of a batch row by row; later ones have to be told apart by row.
        more = self.stderr is not None or budget or start.device.type != "cpu"
        split = len(start) > size and more and isinstance(estimator, Quadrature | Hutchinson)
        source = by_row(generator, start.device) if split else partial(rows_of, generator)
        infos = self._by_parts(
            lambda *part: self._likelihood_part(model, interval, estimator, budget, *part),
            start, cond, source, size,
        )  # fmt: skip
        return _joined(infos) if len(infos) > 1 else infos[0]

    def _likelihood_part(
        self, model: NDM, interval: tuple[float, float], estimator: TraceEstimator, budget: bool,
        start: Tensor, cond: Conditioning, generator: Randomness,
    ) -> LikelihoodInfo:  # fmt: skip
        with model.evaluating(), torch.set_grad_enabled(bool(self.differentiable)):
            upwards = interval[1] > interval[0]
            y, weight = model.to_latent(start, **cond) if upwards else (start, None)
            path = self._path(model, y, interval, cond, estimator)
            info = measure(replace(path, stderr=self.stderr, error_wanted=budget), estimator, generator)
            if upwards:
                return info if weight is None else _of_data(info, weight, info.z)
            x = model.transform.from_latent(info.z, **cond)
            weight = model.transform.to_latent(x, **cond)[1]
            return info if weight is None else _of_data(info, weight, x, downwards=True)

    def _size(self, model: NDM, rows: int, products: int) -> int:
        """Rows of a part.

        Rows that share their steps stay together unless the user says otherwise, and so do those of a graph, which
        holds all parts at once anyway.
        """
        if self.batch_size is not None:
            return self.batch_size
        if self.differentiable or self.method not in (None, "ode", "exponential"):
            return rows
        return rows_at_once(products, model.event_shape)

    @staticmethod
    def _by_parts(
        solve: Callable[[Tensor, Conditioning, Randomness], T], start: Tensor, cond: Conditioning,
        source: Callable[[Tensor], Randomness], size: int,
    ) -> list[T]:  # fmt: skip
        """Results part by part."""
        every = torch.arange(len(start), device=start.device)
        if len(every) <= size:
            return [solve(start, cond, source(every))]
        results = []
        for rows in every.split(size):
            try:
                results.append(solve(start[rows], cond.take(rows), source(rows)))
            except (PredictorError, SolverError) as error:
                raise _of_batch(error, int(rows[0])) from error
        return results

    @staticmethod
    def _verify(model: NDM, start: Tensor, interval: tuple[float, float], cond: Conditioning, purpose: Purpose) -> None:
        """Check the model; from noise downwards, at latents that are zero."""
        upwards = interval[1] > interval[0]
        verify(model, start if upwards else torch.zeros_like(start), cond, purpose, latent=not upwards)

    def _estimator(self, event_shape: tuple[int, ...]) -> TraceEstimator:
        estimator = resolve("auto" if self.trace is None else self.trace, event_shape)
        if self.stderr is not None:
            validate_positive("stderr", self.stderr, "nats")
            if self.differentiable:
                raise ValueError("stderr has no effect on gradients; leave it out with differentiable.")
            estimator.validate_stderr()
        return estimator

    def _path(
        self, model: NDM, start: Tensor, interval: tuple[float, float], cond: Conditioning,
        estimator: TraceEstimator | None,
    ) -> Problem:  # fmt: skip
        """The path, with its log-determinant by an estimator or without."""
        method = self._default_method(estimator) if self.method is None else choose("method", self.method, METHODS)
        tolerance = TOLERANCE
        if estimator is not None:
            tolerance = max(estimator.tolerance, GRID_TOLERANCE if method == "exponential" else 0.0)
        rtol, atol = (tolerance if value is None else value for value in (self.rtol, self.atol))
        return Problem(model, start, interval, rtol, atol, method, self.on_failure, self.differentiable, cond)

    def _default_method(self, estimator: TraceEstimator | None) -> str:
        if self.differentiable == "adjoint":
            return "dopri5"
        if self.differentiable or estimator is None:
            return "ode"
        return "exponential" if estimator.needs_nodes else "ode"


def _products(estimator: TraceEstimator, event_shape: tuple[int, ...]) -> int:
    """Products of a row that are held at once."""
    if isinstance(estimator, Exact):
        return min(event_size(event_shape), estimator.chunk or sys.maxsize)
    return min(estimator.probes, estimator.chunk or sys.maxsize) if isinstance(estimator, Hutchinson) else 1


def _joined(parts: list[LikelihoodInfo]) -> LikelihoodInfo:
    """The information of all parts: counts of the most expensive row, everything else row by row."""
    columns: dict[str, Any] = {}
    for field in fields(LikelihoodInfo):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], Tensor):
            columns[field.name] = torch.cat(values)
        else:
            columns[field.name] = max(values) if isinstance(values[0], int) else values[0]
    return LikelihoodInfo(**columns)


def _of_batch(error: PredictorError | SolverError, first: int) -> PredictorError | SolverError:
    """Restate a failure of a part whose first row is number ``first`` of the batch."""
    told = f"{error} Rows are counted from row {first} of the batch, where this part of it begins."
    if isinstance(error, PredictorError):
        return PredictorError(told)
    return SolverError(told, t=error.t, dt=error.dt, rows=tuple(first + row for row in error.rows))


def _of_data(info: LikelihoodInfo, weight: Tensor, z: Tensor, *, downwards: bool = False) -> LikelihoodInfo:
    """Turn information about latents into that about data; ``weight`` is the log-determinant from data to latents."""
    weight = torch.where(info.failed, torch.nan, weight.to(info.loglik.dtype))
    logdet = info.logdet - weight if downwards else info.logdet + weight
    return replace(info, logdet=logdet, loglik=info.loglik + weight, z=z)
