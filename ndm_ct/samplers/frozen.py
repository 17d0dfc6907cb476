r"""DDPM and DDIM: the model on a time grid, each step with the prediction frozen.

.. math::
    z_s = \alpha_s \hat F_s + \kappa (z_t - \alpha_t \hat F_t) + \tilde\sigma \epsilon, \qquad
    \kappa = \frac{\sqrt{\sigma_s^2 - \tilde\sigma^2}}{\sigma_t}, \qquad s < t .

DDPM takes the :math:`\tilde\sigma` of the model's own volatility (:mod:`ndm_ct.process`); DDIM takes
:math:`\eta_{DDIM}` times the DDPM value at volatility one. With :math:`\tilde\sigma = 0` the step is the first-order
exponential integrator of the probability flow.

:math:`\hat F_t, \hat F_s` come from one prediction at t. A predicted x is transformed for both times; a prediction of
"moments" gives :math:`\hat F` and :math:`\hat F + (s - t) \hat{\dot F}`.

**The optimal variance.** Freezing the prediction leaves out that x is uncertain given :math:`z_t`. With the residuals
:math:`\Delta F = F(x, t) - \hat F` and :math:`\Delta \dot F` the law of :math:`z_s` given :math:`z_t`, about the mean
above, has the second moment, averaged over :math:`z_t` and over the d coordinates,

.. math::
    \tilde\sigma^2 + (\alpha_s - \kappa\alpha_t)^2 A + 2 (\alpha_s - \kappa\alpha_t)\,\alpha_s (s - t) B
    + \alpha_s^2 (s - t)^2 C ,

.. math::
    A = \tfrac1d E\|\Delta F\|^2, \qquad B = \tfrac1d E\langle \Delta F, \Delta\dot F \rangle, \qquad
    C = \tfrac1d E\|\Delta\dot F\|^2 ,

to first order in :math:`\Delta F_s = \Delta F + (s - t)\,\Delta\dot F + \ldots`, exactly where F is linear in t.
If F is the identity only the term in A remains. It equals Analytic-DPM's variance when :math:`\hat x` is the posterior
mean, where :math:`A = (\sigma^2/\alpha^2)(1 - \sigma^2 E\|s\|^2/d)`, and otherwise is the optimal variance for the mean
actually used. :func:`estimate_residuals` measures A, B and C once.

References:
    Ho, Jain and Abbeel, Denoising Diffusion Probabilistic Models, https://arxiv.org/abs/2006.11239
    Song, Meng and Ermon, Denoising Diffusion Implicit Models, https://arxiv.org/abs/2010.02502
    Nichol and Dhariwal, Improved Denoising Diffusion (the small variance at the last step), section 3.1,
    https://arxiv.org/abs/2102.09672
    Bao, Li, Zhu and Zhang, Analytic-DPM, https://arxiv.org/abs/2201.06503
"""

import bisect
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ndm_ct._core import checks as _shapes
from ndm_ct._core.checks import choose, sum_event
from ndm_ct._core.noise import GeneratorLike, Randomness, as_randomness, normal_like, rows_of
from ndm_ct.model import NDM
from ndm_ct.prediction import validate_finite
from ndm_ct.samplers.base import Factor, Sampler
from ndm_ct.samplers.grids import time_grid
from ndm_ct.schedules.base import SAFE_NOISE, Level, Schedule, levels

__all__ = ["DDIM", "DDPM", "VARIANCES", "Residuals", "estimate_residuals"]

VARIANCES = ("volatility", "small", "large", "analytic")
"""Variances of DDPM's step."""


@dataclass(frozen=True)
class Residuals:
    r"""Second moments of a model's residuals, per coordinate, at N times.

    Args:
        times: increasing, float64, ``(N,)``.
        moments: A, B and C, ``(3, N)``.
        stderr: their standard errors, ``(3, N)``; NaN if they come from a single data point.

    They belong to the model that they were measured on, with its weights and its guidance. Measure them again after
    further training.
    """

    times: Tensor
    moments: Tensor
    stderr: Tensor


def estimate_residuals(
    model: NDM,
    data: Tensor,
    /,
    *,
    times: int | Tensor = 64,
    batch_size: int = 256,
    generator: GeneratorLike = None,
    **cond: Any,
) -> Residuals:
    r"""Measure the second moments of the residuals of the model's predictions.

    They are the ``residuals`` that :class:`DDPM` with ``variance="analytic"`` needs. ``ndm_ct.save(model, path,
    residuals=...)`` keeps them beside the model and ``ndm_ct.discrete.load_residuals(path)`` reads them.

    Args:
        model: the model.
        data: x, shape ``(n, *E)``. A thousand rows are plenty, because every row counts at every time.
        times: the number N of times, evenly spaced in the log-SNR, or the times themselves in [t_min, 1], in any order.
            More times cost more calls of the network and follow the moments more closely.
        batch_size: rows per call of the network. Every batch takes N calls.
        generator: source of the noise: a seed, a generator, or one per row; None is torch's global generator.
        cond: conditioning, tensors with n rows.

    Returns:
        The moments, with standard errors.

    Raises:
        ValueError: no data; times that repeat or lie outside [t_min, 1].
        PredictorError: a prediction is NaN or infinite (with time and rows).

    Example:
        >>> import ndm_ct
        >>> from functools import partial
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
        >>> residuals = estimate_residuals(model, model.sample_data(100), times=8)
        >>> analytic = partial(DDPM, variance="analytic", residuals=residuals)
        >>> ndm_ct.sample(model, 3, method=analytic, steps=5).shape
        torch.Size([3, 2])
    """
    given = model.validate(data, cond, estimate_residuals, name="data")
    if model.noise_scale is not None:
        raise ValueError("residuals belong to noise of one size, and the model has a noise_scale; use method='ddpm'.")
    _shapes.validate_count("batch_size", batch_size)
    n = data.shape[0]
    if n == 0:
        raise ValueError("data has no rows; the residuals are averages over data, pass some of the training set.")
    generator = as_randomness(generator, n, data.device, "estimate_residuals")
    points = levels(model.schedule, _validated_times(model, times))
    size = _shapes.event_size(model.event_shape)
    total = torch.zeros(2, 3, len(points), dtype=torch.float64, device=data.device)
    with model.evaluating(), torch.no_grad():
        for start in range(0, n, batch_size):
            rows = torch.arange(start, min(n, start + batch_size), device=data.device)
            own = given.take(rows)
            source = rows_of(generator, rows)
            y, _ = model.to_latent(data[rows], generator=source, **own)
            path = model.transform.along(y, **own)
            for k, level in enumerate(points):
                F, dF = path.with_derivative(level.time)
                noise = normal_like(y, source)
                predicted, slope = model.moments(level.alpha * F + level.sigma * noise, level.time, **own)
                validate_finite(predicted + slope, level.time)
                a, b = (F - predicted).double(), (dF - slope).double()
                products = torch.stack([sum_event(each) for each in (a * a, a * b, b * b)]) / size
                total[:, :, k] += torch.stack([products.sum(1), products.square().sum(1)])
    mean, square = total / n
    stderr = ((square - mean**2).clamp(min=0.0) / (n - 1)).sqrt() if n > 1 else torch.full_like(mean, math.nan)
    return Residuals(torch.stack([level.time for level in points]).to(mean.device), mean, stderr)


def _validated_times(model: NDM, times: int | Tensor) -> Tensor:
    if not isinstance(times, Tensor):
        if _shapes.validate_count("times", times) == 1:
            raise ValueError("times=1 is one time, but the moments change over many orders of magnitude; take 64.")
        return time_grid(model.schedule, model.t_min, times - 1, "logsnr").flip(0)
    ordered = times.detach().to(dtype=torch.float64, device=model.schedule.device).flatten().sort().values
    if len(ordered) < 2 or not bool((ordered.diff() > 0.0).all()):
        raise ValueError(f"times must be two or more, all different; got {times.tolist()}.")
    if not model.t_min <= float(ordered[0]) <= float(ordered[-1]) <= 1.0:
        raise ValueError(f"times must lie in [t_min, 1] = [{model.t_min:g}, 1], got {times.tolist()}.")
    return ordered


class _Interpolant:
    r"""A, B and C at any time, from those at the times of the table.

    The matrix :math:`((A, B), (B, C))` divided by :math:`\sigma^2/(\alpha^2 s^2 + \sigma^2)`, which takes away most of
    its change, is a product :math:`L L^\top`. The scale s is the schedule's unit. The entries of L are interpolated by
    cubics with the slopes of parabolas through three neighbours, in :math:`-\log(\alpha s/\sigma + 10^{-3})`, the
    log-SNR with a finite end at alpha = 0. So the matrix stays positive semidefinite, and beyond the table's ends the
    quotient is constant.

    Args:
        schedule: the model's.
        residuals: A, B and C.
    """

    def __init__(self, schedule: Schedule, residuals: Residuals) -> None:
        at = levels(schedule, residuals.times.double().to(schedule.device))
        moments = residuals.moments.detach().cpu().double()
        # Numbers: on so few of them numpy would take longer than the rest of a step.
        self.unit = schedule.unit
        self.knots = [self._coordinate(level) for level in at]
        A, B, C = (row.numpy() / [self._share(level) for level in at] for row in moments)
        first = np.sqrt(A)
        below = np.divide(B, first, out=np.zeros_like(B), where=first > 0.0)
        values = np.stack([first, below, np.sqrt(np.maximum(C - below**2, 0.0))])
        slopes = np.gradient(values, self.knots, axis=1, edge_order=2 if len(self.knots) > 2 else 1)
        self.entries = list(zip(values.tolist(), slopes.tolist(), strict=True))

    def __call__(self, level: Level) -> tuple[float, float, float]:
        """A, B and C at one time."""
        knots = self.knots
        x = min(max(self._coordinate(level), knots[0]), knots[-1])
        k = min(bisect.bisect_right(knots, x) - 1, len(knots) - 2)
        h = knots[k + 1] - knots[k]
        u, share = (x - knots[k]) / h, self._share(level)
        first, below, last = (_cubic(u, y[k], y[k + 1], h * d[k], h * d[k + 1]) for y, d in self.entries)
        return share * first**2, share * first * below, share * (below**2 + last**2)

    def _coordinate(self, level: Level) -> float:
        return -math.log(level.alpha * self.unit / level.sigma + SAFE_NOISE)

    def _share(self, level: Level) -> float:
        return level.sigma**2 / ((level.alpha * self.unit) ** 2 + level.sigma**2)


def _cubic(u: float, y0: float, y1: float, d0: float, d1: float) -> float:
    """At u, with values y0, y1 and slopes d0, d1 at 0 and 1."""
    return y0 + u * (d0 + u * (3.0 * (y1 - y0) - 2.0 * d0 - d1 + u * (d0 + d1 - 2.0 * (y1 - y0))))


class _Frozen(Sampler):
    """A step with the prediction frozen."""

    def frozen(self, z: Tensor, t: Level, s: Level, std: Factor, cond: dict[str, Any]) -> tuple[Tensor, Tensor]:
        r"""The model's F at t and s, for one evaluation; ``std`` is :math:`\tilde\sigma` of the step."""
        self.evaluations += 1
        return self.model.frozen(z, t.time, s.time, std, **cond)


class DDPM(_Frozen):
    r"""The ancestral step :math:`q(z_s \mid z_t, \hat x)`; DDPM at volatility one.

    Args:
        model: the model.
        variance: "volatility": :math:`\tilde\sigma^2 = \sigma_s^2 (1 - \exp(-\int_s^t \eta\gamma' du))`, that of the
            model's reverse SDE, in mean and noise; "small": the same at volatility one for any model; "large":
            the mean of "small" with noise of variance :math:`\sigma_t^2 - \alpha_t^2 \sigma_s^2 / \alpha_s^2` (in the
            last step of a walk that of "small": nothing would remove the surplus); "analytic": the mean of
            "volatility" with the optimal variance for it, from ``residuals`` (a volatility or a transform that is
            diagonal over the event gets one average A, B and C for all of it).
        residuals: for "analytic" only, what :func:`estimate_residuals` returned for this model. A guided model has
            residuals of its own.

    Raises:
        ValueError: unknown variance; "analytic" without residuals, or residuals with another variance.
        TypeError: residuals that are not :class:`Residuals`.
    """

    def __init__(self, model: NDM, variance: str = "volatility", residuals: Residuals | None = None) -> None:
        super().__init__(model)
        self.variance = choose("variance", variance, VARIANCES)
        self.uses_volatility = variance in ("volatility", "analytic")
        if residuals is not None and not isinstance(residuals, Residuals):
            raise TypeError(f"residuals must come from estimate_residuals, got {type(residuals).__name__}.")
        if (variance == "analytic") != (residuals is not None):
            raise ValueError(
                "variance='analytic' (method='ddpm_analytic') and residuals= go together. Measure once: residuals = "
                "ndm_ct.discrete.estimate_residuals(model, data). Then pass method=functools.partial("
                "ndm_ct.discrete.DDPM, variance='analytic', residuals=residuals), or take method='ddpm'."
            )
        self._optimum = None if residuals is None else _Interpolant(model.schedule, residuals)

    def _step(self, z: Tensor, t: Level, s: Level, generator: Randomness, cond: dict[str, Any]) -> Tensor:
        small = ancestral_std(t, s)
        kappa, std = self.transition(t, s) if self.uses_volatility else (0.0, small)
        F_t, F_s = self.frozen(z, t, s, std, cond)
        residual, noise = torch.add(z, F_t, alpha=-t.alpha), normal_like(z, generator)
        if self.uses_volatility:
            if self._optimum is not None:
                std = _optimal(self._optimum(t), kappa, std, t, s)
            return self.plus(self.plus(s.alpha * F_s, kappa, residual), std, noise)
        mean = s.alpha * F_s + math.sqrt(s.sigma**2 - small**2) / t.sigma * residual
        if self.variance == "small" or s.t <= self._last_time:
            return mean + small * noise
        return mean + math.sqrt(t.sigma**2 - (t.alpha * s.sigma / s.alpha) ** 2) * noise


def _optimal(moments: tuple[float, float, float], kappa: Factor, std: Factor, t: Level, s: Level) -> Factor:
    """The standard deviation about the frozen mean, from A, B and C at t."""
    A, B, C = moments
    gain, drift = s.alpha - kappa * t.alpha, s.alpha * (s.t - t.t)
    variance = std**2 + gain**2 * A + 2.0 * gain * drift * B + drift**2 * C
    # Rounding may take a variance of zero below it.
    return math.sqrt(abs(variance)) if isinstance(variance, float) else variance.abs().sqrt()


class DDIM(_Frozen):
    r"""The step with :math:`\tilde\sigma = \eta_{DDIM}\, \sigma_s \sqrt{1 - e^{\gamma_s - \gamma_t}}`.

    Args:
        model: the model.
        eta: :math:`\eta_{DDIM}` in [0, 1]; 0 is deterministic, 1 is DDPM at volatility one, which in terms of
            :math:`z/\alpha` and :math:`\sigma/\alpha` is known as ancestral Euler.
    """

    def __init__(self, model: NDM, eta: float = 0.0) -> None:
        super().__init__(model)
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta of DDIM must lie in [0, 1], got {eta!r}.")
        self.eta = eta

    def _step(self, z: Tensor, t: Level, s: Level, generator: Randomness, cond: dict[str, Any]) -> Tensor:
        std = self.eta * ancestral_std(t, s)
        F_t, F_s = self.frozen(z, t, s, std, cond)
        mean = s.alpha * F_s + math.sqrt(s.sigma**2 - std**2) / t.sigma * (z - t.alpha * F_t)
        return mean if std == 0.0 else mean + std * normal_like(z, generator)


def ancestral_std(t: Level, s: Level) -> float:
    r""":math:`\sigma_s \sqrt{1 - e^{\gamma_s - \gamma_t}}`, the standard deviation of DDPM's posterior."""
    return s.sigma * math.sqrt(-math.expm1(2.0 * (t.log_snr - s.log_snr)))
