r"""Reweighting: samples of a model as weighted samples of another law, with the errors of log p propagated.

The model draws :math:`x_i \sim q`. The target is :math:`p(x) = \tilde p(x) / Z` with :math:`\log\tilde p` known. With
:math:`w_i = \tilde p(x_i)/q(x_i)`,

.. math::
    \hat Z = \frac1n \sum_i w_i, \qquad
    \hat f = \frac{\sum_i w_i f(x_i)}{\sum_i w_i}, \qquad
    \mathrm{ESS} = \frac{(\sum_i w_i)^2}{\sum_i w_i^2} .

In more than a few dimensions :math:`\log q` is estimated, with a normal error of variance :math:`v_i`. The mean of
:math:`e^{-\log q}` is then too large by :math:`e^{v_i/2}`. An unbiased estimate :math:`\hat v_i` of :math:`v_i` with
:math:`\nu` degrees of freedom gives the weight

.. math::
    \log \hat w_i = \log\tilde p(x_i) - \widehat{\log q}(x_i) - \frac{\hat v_i}{2} - \frac{\hat v_i^2}{4 (\nu + 2)} ,

whose mean is :math:`w_i` up to terms of third order in :math:`v_i`. The last two terms begin the logarithm of the
unbiased factor :math:`{}_0F_1(; \nu/2; -\nu \hat v_i/4)`, which may be negative.

References:
    Finney, On the distribution of a variate whose logarithm is normally distributed (1941): the unbiased factor.
    Vehtari et al., Pareto Smoothed Importance Sampling, https://arxiv.org/abs/1507.02646: the weights' tail.
    Zhang and Stephens, A new and efficient estimation method for the generalized Pareto distribution (2009).
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ndm_ct._core.checks import some, validate_count
from ndm_ct._core.conditioning import Conditioning
from ndm_ct._core.noise import GeneratorLike, Randomness, as_randomness, rows_of, validate_single
from ndm_ct._core.signals import until_interrupted
from ndm_ct.divergence import Hutchinson, resolve
from ndm_ct.likelihood.api import decode
from ndm_ct.likelihood.options import Trace
from ndm_ct.model import NDM

__all__ = ["Reweighted", "reweight"]

LogDensity = Callable[[Tensor], Tensor]

_LARGEST_SHAPE = 0.7
"""Shape of the weights' tail beyond which their mean and its standard error cannot be trusted."""

_EVEN = 0.8
"""Effective share of the samples above which weights are so even that the shape of their tail does not matter."""


@dataclass(frozen=True, kw_only=True)
class Reweighted:
    r"""Weighted samples; see :func:`reweight`.

    Args:
        x: samples of the model, ``(n, *E)``.
        log_weights: :math:`\log \hat w_i`, unnormalised, nats, float64, ``(n,)``; -inf where the target has no density.
        variance: :math:`\hat v_i`, the variance of the estimate of log q, nats squared, ``(n,)``; 0 if it is exact.
        ode_error: estimate of the size of the solver's error of log q, nats, ``(n,)``.
    """

    x: Tensor
    log_weights: Tensor
    variance: Tensor
    ode_error: Tensor

    @property
    def weights(self) -> Tensor:
        """The weights with sum one, float64, ``(n,)``."""
        return torch.softmax(self.log_weights, 0)

    @property
    def effective_sample_size(self) -> float:
        """The number of independent samples of the target that would give averages as accurate."""
        return 1.0 / float(self.weights.square().sum())

    @property
    def log_z(self) -> float:
        r""":math:`\log \hat Z`, nats."""
        return float(self.log_weights.logsumexp(0)) - math.log(len(self.x))

    @property
    def log_z_stderr(self) -> float:
        """Standard error of ``log_z``, nats: the scatter of the weights, with that of the trace estimates in it."""
        n = len(self.x)
        return float(self.weights.mul(n).std()) / math.sqrt(n) if n > 1 else math.nan

    @property
    def log_z_ode_error(self) -> float:
        """Size of the systematic error of ``log_z`` by the solver, nats, if it has one sign in all samples."""
        return float((self.weights * self.ode_error.double()).sum())

    @property
    def tail_shape(self) -> float:
        r"""Shape k of a generalised Pareto law fitted to the largest weights. Averages are reliable below 0.7.

        Weights have a finite variance for k < 1/2. It is NaN for fewer than 25 weights above zero, and -inf where the
        largest are equal.
        """
        return _tail_shape(self.log_weights)

    def expectation(self, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        r"""The mean of a function under the target, :math:`\hat f`, and its standard error.

        Args:
            function: ``f(x)``, from ``(n, *E)`` to ``(n, ...)``.

        Returns:
            Mean and standard error, each of the shape of one value, float64.

        Raises:
            ValueError: the function does not return one finite value per sample.
        """
        values = torch.as_tensor(function(self.x)).double()
        n = len(self.x)
        if values.ndim == 0 or len(values) != n or not bool(values.isfinite().all()):
            raise ValueError(f"function must return finite values, {n} rows of them, got shape {tuple(values.shape)}.")
        w = self.weights.reshape(n, *(1,) * (values.ndim - 1))
        mean = (w * values).sum(0)
        return mean, ((w * (values - mean)).square().sum(0) * (n / max(n - 1, 1))).sqrt()

    def resample(self, n: int, *, generator: GeneratorLike = None) -> Tensor:
        """Draw samples of the target from the weighted ones, with repetitions.

        Args:
            n: number of draws.
            generator: a seed or a generator.

        Returns:
            Shape ``(n, *E)``.
        """
        source = as_randomness(generator, None, self.x.device, "resample")
        source = validate_single(source, "draws are made together")
        return self.x[torch.multinomial(self.weights, validate_count("n", n), replacement=True, generator=source)]


def reweight(
    model: NDM,
    log_density: LogDensity,
    n: int,
    /,
    *,
    trace: Trace = "auto",
    stderr: float | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    generator: GeneratorLike = None,
    batch_size: int | None = None,
    **cond: Any,
) -> Reweighted:
    r"""Draw n samples of the model's probability flow and weight them as samples of another law.

    The weights :math:`w_i = \tilde p(x_i)/q(x_i)` are unbiased also where log q is estimated, up to third order in the
    variance of the estimate (:mod:`ndm_ct.reweighting`). The exponential of a plain estimate is not: with a variance of
    4 nats squared its mean is seven times too large.

    Ctrl-C returns the batches that are finished, with a warning, if there are any.

    Args:
        model: the model q. It should cover the target: mass of the target where q has none is not seen.
        log_density: :math:`\log\tilde p`, nats, ``(B, *E)`` to ``(B,)``, with an unknown constant; -inf where there is
            no density.
        n: number of samples.
        trace: estimator of log q, as in :func:`ndm_ct.loglik`. It must know its variance: one frozen probe is refused.
        stderr: the standard error of log q to reach in each sample, nats, by more sweeps of "quadrature". Errors above
            one nat spoil the weights.
        rtol: relative tolerance of the solver; None as in :func:`ndm_ct.decode`.
        atol: absolute tolerance of the solver; None as in :func:`ndm_ct.decode`.
        generator: source of all randomness: a seed, a generator, or one per sample.
        batch_size: samples drawn and scored at a time; None is all.
        cond: conditioning, tensors with n rows or shared by all.

    Returns:
        A :class:`Reweighted`: log Z with its standard error, the effective sample size, and means of functions.

    Raises:
        TypeError: ``log_density`` is not callable, or ``n`` not an int.
        ValueError: an estimator without a variance; ``log_density`` returned NaN, inf, another shape, or -inf for all.

    Warns:
        UserWarning: the weights' tail is too heavy for their mean (``tail_shape`` above 0.7, and an effective sample
            size below 0.8 n).

    Example:
        >>> import math, torch, ndm_ct
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(1), torch.eye(1))
        >>> found = ndm_ct.reweight(model, lambda x: -x[:, 0] ** 2, 500, generator=0)
        >>> abs(found.log_z - 0.5 * math.log(math.pi)) < 4 * found.log_z_stderr
        True
    """
    if not callable(log_density):
        raise TypeError(f"log_density must be a function of x, got {type(log_density).__name__}.")
    n = validate_count("n", n)
    estimator = resolve(trace, model.event_shape)
    if not estimator.knows_variance:
        raise ValueError(
            f"trace={trace!r} does not know its variance, so that the bias of its weights cannot be removed; take "
            "'quadrature', 'exact', or Hutchinson with two probes or more."
        )
    device, dtype = model.device or torch.device("cpu"), model.dtype or torch.get_default_dtype()
    source = as_randomness(generator, n, device, "reweight")
    given = model.conditioning(cond, torch.empty(n, 0, dtype=dtype, device=device), reweight)
    draw = _Draw(model, log_density, estimator, {"stderr": stderr, "rtol": rtol, "atol": atol}, dtype, device)
    size = n if batch_size is None else validate_count("batch_size", batch_size)
    batches = torch.arange(n).split(size)
    drawn = ((len(rows), draw(rows, rows_of(source, rows), given.take(rows))) for rows in batches)
    parts = until_interrupted(drawn, n)
    found = Reweighted(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})
    _validate_tail(found)
    return found


@dataclass(frozen=True)
class _Draw:
    """Draws and weights one batch; see :func:`reweight`."""

    model: NDM
    log_density: LogDensity
    trace: Any
    options: dict[str, Any]
    dtype: torch.dtype
    device: torch.device

    def __call__(self, rows: Tensor, source: Randomness, cond: Conditioning) -> Reweighted:
        z1 = self.model.sample_prior(len(rows), generator=source, dtype=self.dtype, device=self.device)
        x, info = decode(
            self.model, z1, trace=self.trace, generator=source, return_info=True, **self.options, **cond
        )  # fmt: skip
        value = self._target(x, int(rows[0]))
        freedom = info.row_sweeps.double() - 1.0
        if isinstance(self.trace, Hutchinson):
            freedom = torch.full_like(freedom, self.trace.probes - 1.0)
        v = info.variance.double()
        correction = v / 2.0 + torch.where(v > 0.0, v**2 / (4.0 * (freedom + 2.0)), 0.0)
        weights = value - info.loglik.double() - correction
        return Reweighted(x=x, log_weights=weights, variance=info.variance, ode_error=info.ode_error)

    def _target(self, x: Tensor, first: int) -> Tensor:
        with torch.no_grad():
            value = self.log_density(x)
        if not isinstance(value, Tensor) or value.shape != (len(x),):
            came = getattr(value, "shape", type(value).__name__)
            raise ValueError(
                f"log_density returned {came} for {len(x)} samples, expected a tensor ({len(x)},) of nats."
            )
        bad = value.isnan() | value.isposinf()
        if bool(bad.any()):
            rows = (torch.nonzero(bad).flatten() + first).tolist()
            raise ValueError(f"log_density returned NaN or inf for samples {some(rows)}; -inf means no density there.")
        return value.double()


def _validate_tail(found: Reweighted) -> None:
    if bool(found.log_weights.isneginf().all()):
        raise ValueError(
            f"log_density is -inf for all {len(found.x)} samples: the model and the target do not overlap; look at "
            "samples of both, or draw more."
        )
    shape = found.tail_shape
    if shape > _LARGEST_SHAPE and found.effective_sample_size < _EVEN * len(found.x):
        warnings.warn(
            f"the largest weights have a tail of shape {shape:.2f}, above {_LARGEST_SHAPE}: log Z, means and their "
            f"standard errors are not reliable (effective sample size {found.effective_sample_size:.1f} of "
            f"{len(found.x)}); use a model that covers the target, or stderr= for a better log q.",
            stacklevel=3,
        )


def _tail_shape(log_weights: Tensor) -> float:
    """The generalised Pareto shape of the largest weights, by Zhang and Stephens' quasi-Bayesian estimate."""
    logs = log_weights[log_weights > -math.inf].sort().values
    count = int(min(0.2 * len(logs), 3.0 * math.sqrt(len(logs))))
    if count < 5:
        return math.nan
    logs = (logs[-count - 1 :] - logs[-1]).exp()
    excess = logs[1:] - logs[0]
    if float(excess[-1]) <= 0.0 or float(excess[(count + 2) // 4 - 1]) <= 0.0:
        return -math.inf
    grid = 30 + int(math.sqrt(count))
    j = torch.arange(1, grid + 1, dtype=excess.dtype)
    theta = 1.0 / excess[-1] + (1.0 - (grid / (j - 0.5)).sqrt()) / (3.0 * excess[(count + 2) // 4 - 1])
    k = torch.log1p(-theta[:, None] * excess).mean(1)
    profile = count * ((-theta / k).log() - k - 1.0)
    best = (torch.softmax(profile, 0) * theta).sum()
    k_best = float(torch.log1p(-best * excess).mean())
    return (count * k_best + 5.0) / (count + 10.0)  # a weak prior at 1/2, as in Pareto smoothing
