r"""Samples of :math:`p(x \mid y)`, where :math:`y = f(x) + s\,\epsilon`, and the evidence :math:`p(y)`.

The model generates by the ancestral chain :math:`p(z_s \mid z_t) = N(m(z_t), \tilde\sigma^2 I)`. Given y, its mean
moves by a multiple of :math:`\nabla_z \log p(y \mid z_t)` (Doob's transform, which holds for every transform F):

.. math::
    z_s \sim N\bigl(m(z_t) + c\, \nabla_z \log h(z_t, t),\ \tilde\sigma^2 I\bigr), \qquad
    c = \tilde\sigma^2 \frac{\alpha_s \sigma_t^2}{\alpha_t \sigma_s^2} .

For F the identity and volatility one, c is the step whose mean is the exact one if h is.

=================  ====================================================================================================
``"pigdm"``        h of :mod:`ndm_ct.inverse.observation` with an isotropic covariance: one product per step
``"mmps"``         h with Tweedie's covariance: one product per observed value; F the identity or ``TimeScaling``
``"dps"``          minus ``scale`` times the gradient of :math:`\|y - f(\hat x)\|` in place of the shift; no density
``"replacement"``  for masks: after each step the observed part is replaced by y with the noise of that time
``"smc"``          "mmps" or "pigdm" as the proposal of particles, with weights, so that only the chain's error is left
=================  ====================================================================================================

**Twisted sequential Monte Carlo.** A particle's weight is multiplied in each step by

.. math::
    \frac{p(z_s \mid z_t)\, h(z_s, s)}{q(z_s \mid z_t)\, h(z_t, t)}, \qquad h(z_{t_{min}}, t_{min}) = p(y \mid x) .

Particles are resampled when their effective number falls below half. The product of the mean weights is an unbiased
estimate of :math:`p(y)` under the chain, for any h. Independent runs tell its standard error.

References:
    Chung et al., Diffusion Posterior Sampling, https://arxiv.org/abs/2209.14687
    Lugmayr et al., RePaint (replacement and resampling), https://arxiv.org/abs/2201.09865
    Wu et al., Practical and Asymptotically Exact Conditional Sampling (twisted SMC), https://arxiv.org/abs/2306.17775
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ndm_ct._core.checks import choose, sum_event, validate_count, validate_noise, validate_positive
from ndm_ct._core.conditioning import Conditioning
from ndm_ct._core.noise import GeneratorLike, Randomness, as_randomness, normal_like, rows_of, uniform, validate_single
from ndm_ct._core.signals import until_interrupted
from ndm_ct.inverse.observation import Observation, Twist, has_tweedie
from ndm_ct.model import NDM
from ndm_ct.samplers.frozen import DDPM
from ndm_ct.samplers.grids import Grid, time_grid
from ndm_ct.schedules.base import Level

__all__ = ["METHODS", "PosteriorInfo", "posterior"]

METHODS = ("pigdm", "mmps", "dps", "replacement", "smc")
"""Names of methods."""

Observe = Callable[[Tensor], Tensor] | Tensor

_EXACT = ("dps", "replacement")
"""Methods that know no noise of y."""

_MOST_VALUES = 512
"""Observed values for which matrices of their size are solved in every row."""

_FEWEST_RUNS = 8


@dataclass(frozen=True, kw_only=True)
class PosteriorInfo:
    r"""What :func:`posterior` found beside samples.

    Args:
        nfe: network evaluations of one sample.
        log_evidence: :math:`\log p(y)` under the chain, nats; NaN unless ``method="smc"``. Its exponential is unbiased.
        log_evidence_stderr: its standard error, by the scatter of independent runs; NaN for a single run.
        effective_sample_size: the effective number of samples over all runs; n for the other methods.
        runs: independent runs of particles; 0 for the other methods.
    """

    nfe: int
    log_evidence: float
    log_evidence_stderr: float
    effective_sample_size: float
    runs: int


@overload
def posterior(
    model: NDM, y: Tensor, observe: Observe, n: int, /, *, noise: float | Tensor | None = ..., method: str = ...,
    steps: int = ..., grid: Grid = ..., scale: float | None = ..., resamplings: int | None = ...,
    particles: int | None = ..., generator: GeneratorLike = ..., batch_size: int | None = ...,
    return_info: Literal[False] = ..., **cond: Any,
) -> Tensor: ...  # fmt: skip


@overload
def posterior(
    model: NDM, y: Tensor, observe: Observe, n: int, /, *, noise: float | Tensor | None = ..., method: str = ...,
    steps: int = ..., grid: Grid = ..., scale: float | None = ..., resamplings: int | None = ...,
    particles: int | None = ..., generator: GeneratorLike = ..., batch_size: int | None = ...,
    return_info: Literal[True], **cond: Any,
) -> tuple[Tensor, PosteriorInfo]: ...  # fmt: skip


def posterior(
    model: NDM,
    y: Tensor,
    observe: Observe,
    n: int,
    /,
    *,
    noise: float | Tensor | None = None,
    method: str = "pigdm",
    steps: int = 100,
    grid: Grid = "uniform",
    scale: float | None = None,
    resamplings: int | None = None,
    particles: int | None = None,
    generator: GeneratorLike = None,
    batch_size: int | None = None,
    return_info: bool = False,
    **cond: Any,
) -> Tensor | tuple[Tensor, PosteriorInfo]:
    r"""Draw x from :math:`p(x \mid y)` for one observation :math:`y = f(x) + s\,\epsilon`.

    All methods but "smc" replace :math:`p(y \mid z_t)` by an approximation, and their samples keep its error for
    any number of steps. ``benchmarks/posterior.py`` measures it.

    Ctrl-C returns the batches (for "smc" the runs) that are finished, with a warning, if there are any.

    Args:
        model: the prior of x, with a prediction that estimates x (not "moments"), noise of one size, volatility > 0.
        y: the observation, of the shape that ``observe`` gives one row; for a mask ``(m,)``, the values ``x[mask]``.
        observe: f, a differentiable function ``(B, *E)`` to ``(B, ...)``; or a boolean mask of shape E, True where
            x was observed.
        n: number of samples.
        noise: s, the standard deviation of the observation's noise, a positive number or one per value of y. For an
            exact observation take a number that is small against the spread of f(x). "dps" and "replacement" refuse it,
            because they take y as exact.
        method: one of ``METHODS``, see :mod:`ndm_ct.inverse.posterior`.
        steps: steps of the chain.
        grid: where they are, as in :func:`ndm_ct.sample`.
        scale: step size of "dps", in units of the state; None is 1.
        resamplings: for "replacement", how often each step is taken, with noise added in between; None is 1.
        particles: for "smc", particles of one run; None is n/8. More make a run more accurate, more runs make the
            standard error of the evidence more certain.
        generator: source of all randomness: a seed, a generator, or for methods without particles one per sample.
        batch_size: states evaluated at a time; None is all.
        return_info: also return a :class:`PosteriorInfo` with the evidence.
        cond: conditioning, the same for all samples.

    Returns:
        Shape ``(n, *E)``, :math:`z_{t_{min}}` as in :func:`ndm_ct.sample`; with ``return_info`` a pair.

    Raises:
        TypeError: ``observe`` is neither a function nor a boolean mask.
        ValueError: y does not fit ``observe``; an option without effect for the method; more values of y than matrices
            are solved for; a model that the method cannot use.

    Example:
        >>> import torch, ndm_ct
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.tensor([[1.0, 0.9], [0.9, 1.0]]))
        >>> mask = torch.tensor([True, False])
        >>> x = ndm_ct.posterior(model, torch.tensor([2.0]), mask, 200, noise=0.1, steps=50, method="mmps", generator=0)
        >>> bool((x[:, 1].mean() - 1.8).abs() < 0.2)
        True
    """
    n = validate_count("n", n)
    device, dtype = model.device or torch.device("cpu"), model.dtype or torch.get_default_dtype()
    source = as_randomness(generator, n, device, "posterior")
    choose("method", method, METHODS)
    given = model.conditioning(cond, torch.empty(n, 0, dtype=dtype, device=device), posterior)
    if (noise is None) != (method in _EXACT):
        raise ValueError(
            f"noise has no effect with method={method!r}, which takes y as exact; drop it."
            if noise is not None
            else f"method={method!r} needs noise=, the standard deviation of the noise in y."
        )
    seen, mask = _observation(model, y, observe, 1.0 if noise is None else noise, dtype, device)
    _validate(model, seen, method, {"scale": scale, "resamplings": resamplings, "particles": particles}, mask, source)
    size = n if batch_size is None else validate_count("batch_size", batch_size)
    chain = _Chain(
        model, seen, mask, method, time_grid(model.schedule, model.t_min, validate_count("steps", steps), grid),
        1.0 if scale is None else scale, 1 if resamplings is None else resamplings, size, dtype, device,
    )  # fmt: skip
    group = size
    if method == "smc":
        group = max(n // _FEWEST_RUNS, 1) if particles is None else min(particles, n)
    groups = torch.arange(n).split(group)
    runs = ((len(rows), chain(rows_of(source, rows), given.take(rows), len(rows))) for rows in groups)
    with model.evaluating(), torch.no_grad():
        parts = until_interrupted(runs, n)
    x, info = _joined(parts, chain, source)
    return (x, info) if return_info else x


def _observation(
    model: NDM, y: Any, observe: Any, noise: Any, dtype: torch.dtype, device: torch.device
) -> tuple[Observation, Tensor | None]:
    mask = observe if isinstance(observe, Tensor) else None
    if mask is not None:
        if mask.dtype != torch.bool or tuple(mask.shape) != model.event_shape or not bool(mask.any()):
            raise ValueError(
                f"observe is a tensor {tuple(mask.shape)} of {mask.dtype}; a mask must be boolean, of the event shape "
                f"{model.event_shape}, and True somewhere."
            )
        observe = lambda x: x[:, mask]  # noqa: E731
    elif not callable(observe):
        raise TypeError(f"observe must be a function of x or a boolean mask, got {type(observe).__name__}.")
    y = torch.as_tensor(y, dtype=dtype, device=device)
    if not isinstance(noise, Tensor):
        validate_positive("noise", noise)
    std = torch.as_tensor(noise, dtype=torch.float64, device=device)
    if not bool((std > 0.0).all()) or not bool(std.isfinite().all()) or not bool(y.isfinite().all()):
        raise ValueError("noise must be positive and finite, and y finite.")
    try:
        std = std.expand(y.shape).reshape(-1)
    except RuntimeError:
        raise ValueError(f"noise has shape {tuple(std.shape)}, which does not fit y, {tuple(y.shape)}.") from None
    seen = Observation(observe, y.reshape(-1), std)
    seen.values(torch.zeros(1, *model.event_shape, dtype=dtype, device=device))
    return seen, mask


def _validate(
    model: NDM, seen: Observation, method: str, options: dict[str, Any], mask: Tensor | None, source: Randomness
) -> None:
    owner = {"scale": "dps", "resamplings": "replacement", "particles": "smc"}
    for name, value in options.items():
        if value is not None and method != owner[name]:
            raise ValueError(f"{name} has no effect with method={method!r}, it belongs to {owner[name]!r}; drop it.")
        if value is not None and name != "scale":
            validate_count(name, value)
    if options["scale"] is not None:
        validate_positive("scale", options["scale"])
    if model.prediction == "moments" or model.noise_scale is not None or model.transform.latent:
        raise ValueError(
            "posterior needs a model that predicts x in the space of the data, with noise of one size: prediction "
            "'moments', noise_scale= and transforms with latents are not supported."
        )
    validate_noise("posterior", model.t_min, model.t_noise)
    if method == "replacement" and mask is None:
        raise ValueError("method='replacement' needs a mask as observe; take 'pigdm' for other observations.")
    if method == "mmps" and not has_tweedie(model):
        raise ValueError(
            f"method='mmps' needs F the identity or TimeScaling, got {type(model.transform).__name__}; take 'pigdm'."
        )
    if method in ("pigdm", "mmps", "smc") and len(seen.y) > _MOST_VALUES:
        raise ValueError(
            f"method={method!r} solves a matrix of the size of y in every row, and y has {len(seen.y)} values, above "
            f"{_MOST_VALUES}; take 'dps', or 'replacement' for a mask."
        )
    if method == "smc":
        validate_single(source, "with method='smc' particles interact")


@dataclass(frozen=True)
class _Run:
    """The end of one batch, or of one run of particles: states, log-weights ``(K,)`` and the log-evidence."""

    z: Tensor
    log_weights: Tensor
    log_evidence: float


@dataclass(frozen=True)
class _Chain:
    """The chain given y; see :func:`posterior`."""

    model: NDM
    seen: Observation
    mask: Tensor | None
    method: str
    times: Tensor
    scale: float
    resamplings: int
    batch_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def kind(self) -> str:
        if self.method != "smc":
            return self.method
        return "mmps" if has_tweedie(self.model) else "pigdm"

    def __call__(self, source: Randomness, cond: Conditioning, rows: int) -> _Run:
        sampler = DDPM(self.model)
        sampler.prepare(self.times)
        z = self.model.sample_prior(rows, generator=source, dtype=self.dtype, device=self.device)
        if self.method == "replacement":
            return self._replaced(sampler, z, source, cond)
        here = self._twist(z, sampler.level(1.0), cond)
        log_weights, evidence = here.log_h, 0.0
        for t, s in itertools.pairwise(map(sampler.level, self.times.tolist())):
            z, gain = self._step(sampler, z, here, t, s, source, cond)
            last = s.t == float(self.times[-1])
            if last and self.method != "smc":
                break
            after = Twist(z, z, self.seen.log_prob(z)) if last else self._twist(z, s, cond)
            log_weights = log_weights + gain + after.log_h - here.log_h
            here = after
            if self.method == "smc" and not last and _effective(log_weights) < 0.5 * rows:
                evidence += float(log_weights.logsumexp(0)) - math.log(rows)
                kept = _systematic(log_weights, source)
                z, here = z[kept], Twist(here.x[kept], here.gradient[kept], here.log_h[kept])
                log_weights = torch.zeros_like(log_weights)
        return _Run(z, log_weights, evidence + float(log_weights.logsumexp(0)) - math.log(rows))

    def _twist(self, z: Tensor, level: Level, cond: Conditioning) -> Twist:
        parts = [
            Twist.at(self.model, self.seen, self.kind, z[rows], level, dict(cond.take(rows)))
            for rows in torch.arange(len(z), device=z.device).split(self.batch_size)
        ]
        return Twist(*(torch.cat([getattr(part, name) for part in parts]) for name in ("x", "gradient", "log_h")))

    def _step(
        self, sampler: DDPM, z: Tensor, here: Twist, t: Level, s: Level, source: Randomness, cond: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """The next state, and what the weight gains: log p(z_s | z_t) - log q(z_s | z_t)."""
        mean, std = self._unconditional(sampler, z, here.x, t, s, cond)
        if self.method == "dps":
            shift = self.scale * here.gradient
        else:
            ratio = s.alpha * t.sigma**2 / (t.alpha * s.sigma**2) if t.alpha > 0.0 else 1.0
            shift = std**2 * ratio * here.gradient
        noise = std * normal_like(z, source)
        gain = sum_event(noise.double() ** 2 - (noise.double() + shift.double()) ** 2) / (2.0 * std**2)
        return mean + shift + noise, gain

    def _unconditional(
        self, sampler: DDPM, z: Tensor, x: Tensor, t: Level, s: Level, cond: Conditioning
    ) -> tuple[Tensor, float]:
        """Mean and standard deviation of the model's own step, with x in place of the data."""
        kappa, std = sampler.transition(t, s)
        if not isinstance(std, float) or not isinstance(kappa, float) or std == 0.0:
            raise ValueError(
                "posterior needs one volatility above zero for all coordinates; use model.with_volatility, or a "
                "volatility that depends on t alone."
            )
        path = self.model.process.along(x, **cond)
        F_t, F_s = path.F(t.time.expand(len(z))), path.F(s.time.expand(len(z)))
        return s.alpha * F_s + kappa * (z - t.alpha * F_t), std

    def _replaced(self, sampler: DDPM, z: Tensor, source: Randomness, cond: Conditioning) -> _Run:
        """Steps that replace the observed part."""
        assert self.mask is not None
        known = torch.zeros_like(z[0])
        known[self.mask] = self.seen.y
        for t, s in itertools.pairwise(map(sampler.level, self.times.tolist())):
            for again in reversed(range(self.resamplings)):
                x = torch.cat([
                    self.model.predict_x(z[rows], t.time, **cond.take(rows))
                    for rows in torch.arange(len(z), device=z.device).split(self.batch_size)
                ])  # fmt: skip
                mean, std = self._unconditional(sampler, z, x, t, s, cond)
                path = self.model.process.along(torch.where(self.mask, known, x), **cond)
                F_t, F_s = path.F(t.time.expand(len(z))), path.F(s.time.expand(len(z)))
                free = mean + std * normal_like(z, source)
                z = torch.where(self.mask, s.alpha * F_s + s.sigma * normal_like(z, source), free)
                if again:  # back to t: the transition of the forward process given x
                    share = t.alpha / s.alpha
                    fresh = math.sqrt(max(t.sigma**2 - (share * s.sigma) ** 2, 0.0))
                    z = t.alpha * F_t + share * (z - s.alpha * F_s) + fresh * normal_like(z, source)
        return _Run(z, torch.zeros(len(z), dtype=torch.float64, device=z.device), math.nan)


def _joined(parts: list[_Run], chain: _Chain, source: Randomness) -> tuple[Tensor, PosteriorInfo]:
    z, steps = torch.cat([part.z for part in parts]), len(chain.times) - 1
    if chain.method != "smc":
        nfe = steps * chain.resamplings
        none = math.nan
        return z, PosteriorInfo(
            nfe=nfe, log_evidence=none, log_evidence_stderr=none, effective_sample_size=float(len(z)), runs=0
        )
    logs = torch.tensor([part.log_evidence for part in parts], dtype=torch.float64)
    sizes = torch.tensor([float(len(part.z)) for part in parts], dtype=torch.float64)
    total = float((logs + sizes.log()).logsumexp(0) - sizes.sum().log())
    relative = (logs - total).exp()
    stderr = float(relative.std()) / math.sqrt(len(parts)) if len(parts) > 1 else math.nan
    weights = torch.cat([
        log + math.log(len(part.z)) + part.log_weights.log_softmax(0) for log, part in zip(logs, parts, strict=True)
    ])  # fmt: skip
    info = PosteriorInfo(
        nfe=steps, log_evidence=total, log_evidence_stderr=stderr, effective_sample_size=_effective(weights),
        runs=len(parts),
    )  # fmt: skip
    return z[_systematic(weights, source)], info


def _effective(log_weights: Tensor) -> float:
    return 1.0 / float(log_weights.softmax(0).square().sum())


def _systematic(log_weights: Tensor, source: Randomness) -> Tensor:
    """Numbers of the particles that stay, ``(K,)``: systematic resampling, whose expected counts are the weights."""
    count = len(log_weights)
    start = uniform((1,), source, torch.float64, log_weights.device)
    places = (torch.arange(count, device=log_weights.device) + start) / count
    return torch.searchsorted(log_weights.softmax(0).cumsum(0), places).clamp(max=count - 1)
