"""Scores of a batch of rows: estimates of the negative log-likelihood under one model, and their variance."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ndm_ct import objectives
from ndm_ct._core.checks import choose, is_whole, unpack_numpy, validate_count
from ndm_ct._core.conditioning import Conditioning
from ndm_ct._core.noise import Randomness
from ndm_ct._core.seeds import derive_seeds
from ndm_ct.divergence import Quadrature, TraceEstimator, resolve
from ndm_ct.likelihood import bits
from ndm_ct.likelihood.options import Options, Trace
from ndm_ct.likelihood.placement import verify_placement
from ndm_ct.model import NDM
from ndm_ct.quantisation import DEQUANTISATIONS, Quantisation

__all__ = ["LARGEST_PILOT", "ORDER", "PILOT_ROWS", "PILOT_SWEEPS", "SWEEP", "Scorer", "Scores", "Settings"]

SWEEP = Quadrature(nodes=4, probes=1, sweeps=1)
"""The default trace above ``EXACT_UP_TO`` dimensions."""

PILOT_ROWS, PILOT_SWEEPS = 32, 4
"""Rows on which the estimator's variance is measured at least, and how many sweeps are added to theirs."""

LARGEST_PILOT = 256
"""Rows on which it is measured at most."""

# Last words of the seeds, one per use of randomness.
_NOISE, _TRACE, ORDER = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of ``evaluate`` that determine the values, as the user gave them."""

    bound: str
    quantisation: Quantisation | None
    dequantisation: str
    trace: Trace | None
    rtol: float | None
    atol: float | None
    method: str | None
    on_failure: str
    batch_size: int
    seed: int
    samples: int | None

    def __post_init__(self) -> None:
        unpack_numpy(self)
        choose("bound", self.bound, ("ode", "elbo"))
        choose("dequantisation", self.dequantisation, DEQUANTISATIONS)
        choose("on_failure", self.on_failure, ("raise", "nan"))
        if not is_whole(self.seed) or self.seed < 0:
            raise ValueError(f"seed must be an int of at least 0, got {self.seed!r}.")
        validate_count("batch_size", self.batch_size)
        if self.dequantisation != "uniform" and self.quantisation is None:
            raise ValueError("dequantisation has no effect without quantisation; leave it out, or pass quantisation=.")
        if self.bound == "elbo":
            self._refuse_ineffective()
        elif self.samples is not None:
            raise ValueError(
                f"samples={self.samples!r} has no effect with bound='ode'; pass bound='elbo', or leave it out."
            )
        if self.samples is not None and validate_count("samples", self.samples) < 2:
            raise ValueError("samples=1 gives no standard error; take 2 or more.")

    def _refuse_ineffective(self) -> None:
        given = [name for name in ("trace", "rtol", "atol", "method") if getattr(self, name) is not None]
        defaults = {"on_failure": "raise", "dequantisation": "uniform"}
        given += [name for name, default in defaults.items() if getattr(self, name) != default]
        if given:
            raise ValueError(f"{', '.join(given)} has no effect with bound='elbo'; leave it out, or pass bound='ode'.")

    def estimator(self, event_shape: tuple[int, ...]) -> TraceEstimator:
        """Trace estimator that ``trace`` names."""
        return resolve("auto" if self.trace is None else self.trace, event_shape, large=SWEEP)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of a batch under one model.

    Args:
        nll: estimates of the negative log-likelihood, nats, float64, ``(b,)``; NaN in failed rows.
        variance: their variance given the rows, ``(b,)``; NaN where it is unknown.
        nfe: network evaluations, summed over the rows.
    """

    nll: Tensor
    variance: Tensor
    nfe: int


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Estimates the negative log-likelihood of rows under one model."""

    model: NDM
    settings: Settings
    device: torch.device

    @property
    def estimator(self) -> TraceEstimator:
        return self.settings.estimator(self.model.event_shape)

    @property
    def pilot(self) -> str | None:
        """How the pilot measures the variance: "sweeps", "repeats", or None if every row has a variance of its own."""
        if self.settings.bound == "elbo":
            return None
        if self.settings.quantisation is not None:
            return "repeats"
        if self.estimator.knows_variance:
            return None
        return "sweeps" if self.estimator.sweeps else "repeats"

    @property
    def pilot_gain(self) -> float:
        """Ratio of the variance of an ordinary row to that of a row of the pilot."""
        sweeps = self.estimator.sweeps
        return (sweeps + PILOT_SWEEPS) / sweeps if self.pilot == "sweeps" else 2.0

    def score(self, x: Tensor, cond: Conditioning, start: int, pilot: bool) -> Scores:
        """Score rows.

        Args:
            x: the rows.
            cond: their conditioning.
            start: position of the first row in the random order.
            pilot: whether to measure the variance of these rows.
        """
        estimator, way = self.estimator, self.pilot if pilot else None
        if way == "sweeps":
            estimator = estimator.with_sweeps(estimator.sweeps + PILOT_SWEEPS)
        first = self._once(x, cond, start, 0, estimator)
        if way != "repeats":
            return first
        second = self._once(x, cond, start, 1, estimator)
        half = 0.5 * (first.nll - second.nll)
        return Scores(nll=first.nll - half, variance=half.square(), nfe=first.nfe + second.nfe)

    @torch.no_grad()
    def _once(self, x: Tensor, cond: Conditioning, start: int, repeat: int, estimator: TraceEstimator) -> Scores:
        settings = self.settings
        noise, probes = (self._generators(start, len(x), repeat, use) for use in (_NOISE, _TRACE))
        if settings.quantisation is not None:
            verify_placement(self.model, settings.quantisation, x, cond)
        if settings.bound == "elbo":
            return self._by_elbo(x, cond, noise)
        log_q: Tensor | float = 0.0
        if settings.quantisation is not None:
            x, log_q = bits.dequantised(self.model, settings.quantisation, x, settings.dequantisation, 1, noise)
        options = Options(
            trace=estimator, rtol=settings.rtol, atol=settings.atol, method=settings.method,
            on_failure=settings.on_failure,
        )  # fmt: skip
        info = options.likelihood(self.model, x, (self.model.t_min, 1.0), cond, probes, budget=False)
        variance = info.variance.double()
        if settings.quantisation is not None:  # the noise in the bins is not included
            variance = torch.full_like(variance, math.nan)
        return Scores(nll=log_q - info.loglik.double(), variance=variance, nfe=int(info.row_nfe.sum()))

    def _by_elbo(self, x: Tensor, cond: Conditioning, noise: Randomness) -> Scores:
        bins = self.settings.quantisation
        if bins is not None:
            x = bins.centres(x, self.model.dtype or torch.get_default_dtype())
        samples = self.settings.samples or 2
        bound, info = objectives.elbo(
            self.model, x, samples=samples, quantisation=bins, generator=noise, return_info=True, **cond
        )
        return Scores(nll=-bound.double(), variance=info.stderr.double().square(), nfe=samples * len(x))

    def _generators(self, start: int, n: int, repeat: int, use: int) -> list[torch.Generator]:
        """One generator per row, seeded by its position, so that its noise does not depend on its batch."""
        seeds = (derive_seeds(self.settings.seed, place, repeat, use)[0] for place in range(start, start + n))
        return [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
