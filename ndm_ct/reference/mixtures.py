r"""Exact models: for Gaussian-mixture data and a linear transform everything is known in closed form.

With :math:`x \sim \sum_k w_k N(m_k, C_k)` and :math:`F(x, t) = A(t) x`,

.. math::
    p_t(z) = \sum_k w_k N(z;\ \alpha A m_k,\ S_k), \qquad S_k = \alpha^2 A C_k A^\top + \sigma^2 I,

    \hat x(z, t) = \sum_k r_k(z, t) \bigl[ m_k + \alpha C_k A^\top S_k^{-1} (z - \alpha A m_k) \bigr],

with responsibilities :math:`r_k \propto w_k N(z; \cdot, S_k)`. The prior is the exact :math:`p_1`, so ``loglik``
equals ``log_prob(x, t_min)`` to the accuracy of the solver. Use these models to check a solver, a device or a
precision before trusting a network.
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from ndm_ct._core.checks import as_time, event_size, validate_data, validate_time
from ndm_ct._core.noise import GeneratorLike, as_randomness
from ndm_ct.model import NDM
from ndm_ct.process import Volatility
from ndm_ct.schedules.base import Schedule
from ndm_ct.schedules.fixed import LinearLogSNR
from ndm_ct.transforms import Identity, TimeScaling, Transform

__all__ = ["Gaussian", "GaussianMixture"]


class _Marginals:
    r"""The marginals :math:`p_t` and the posterior mean; float64 inside."""

    def __init__(
        self, weights: Tensor, means: Tensor, covs: Tensor, event_shape: tuple[int, ...], schedule: Schedule,
        transform: Transform,
    ) -> None:  # fmt: skip
        self.log_weights, self.means, self.covs = weights.log(), means, covs
        self.event_shape, self.schedule, self.transform = event_shape, schedule, transform
        self.spectrum, self.basis = torch.linalg.eigh(covs)

    def components(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means ``(T, K, d)``, Cholesky factors of S ``(T, K, d, d)`` and gains ``(T, K, d, d)`` at times ``(T,)``."""
        c, d = self.schedule(t), self.means.shape[1]
        eye = torch.eye(d, dtype=torch.float64, device=self.means.device)
        # A(t) column by column: the transform applied to the unit vectors.
        columns = self.transform(
            eye.reshape(d, *self.event_shape).repeat(len(t), *self._ones()), t.repeat_interleave(d)
        )
        mapped = (c.alpha[:, None, None] * columns.reshape(len(t), d, d).mT)[:, None]
        cross = self.covs @ mapped.mT
        factor = torch.linalg.cholesky(mapped @ cross + (c.sigma**2)[:, None, None, None] * eye)
        gain = torch.cholesky_solve(cross.mT, factor).mT
        return torch.einsum("tij,kj->tki", mapped[:, 0], self.means), factor, gain

    def _ones(self) -> tuple[int, ...]:
        return (1,) * len(self.event_shape)

    def _components_at(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """log w_k N(z; mean_k, S_k) ``(B, K)`` and E[x | z, k] ``(B, K, d)``, for z ``(B, d)``."""
        if isinstance(self.transform, Identity | TimeScaling):
            return self._in_eigenbasis(z, t)
        mean, factor, gain = self.components(_distinct(t))
        residual = z[:, None, :] - mean
        inverse = torch.linalg.solve_triangular(factor, torch.eye(z.shape[1]).to(factor).expand_as(factor), upper=False)
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_density = self._log_density(log_det, _apply(inverse, residual).square().sum(-1))
        return log_density, self.means + _apply(gain, residual)

    def _in_eigenbasis(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The same if A = a(t) I: S_k and C_k then share their eigenvectors, and no factorisation is needed."""
        t = as_time(t).reshape(-1)
        c, ones = self.schedule(t), torch.ones(len(t), *self.event_shape, dtype=torch.float64, device=t.device)
        scale = (c.alpha * self.transform(ones, t).reshape(len(t), len(self.basis[0]))[:, 0])[:, None, None]
        variance = scale**2 * self.spectrum + (c.sigma**2)[:, None, None]
        residual = torch.einsum("bki,kij->bkj", z[:, None, :] - scale * self.means, self.basis)
        log_density = self._log_density(0.5 * variance.log().sum(-1), (residual.square() / variance).sum(-1))
        shift = torch.einsum("bkj,kij->bki", scale * self.spectrum / variance * residual, self.basis)
        return log_density, self.means + shift

    def _log_density(self, log_det: Tensor, squares: Tensor) -> Tensor:
        constant = self.log_weights - 0.5 * self.means.shape[1] * math.log(2.0 * math.pi)
        return constant - log_det - 0.5 * squares

    def log_prob(self, z: Tensor, t: Tensor) -> Tensor:
        """log p_t(z), ``(B, *E)`` to ``(B,)``."""
        log_densities, _ = self._components_at(self._flat(z), t)
        return torch.logsumexp(log_densities, 1).to(z.dtype)

    def posterior_mean(self, z: Tensor, t: Tensor) -> Tensor:
        """E[x | z_t = z], shape of ``z``."""
        log_densities, estimate = self._components_at(self._flat(z), t)
        share = torch.softmax(log_densities, 1)
        return (share[:, :, None] * estimate).sum(1).reshape(z.shape).to(z.dtype)

    def draw(self, n: int, t: Tensor | None, generator: GeneratorLike) -> Tensor:
        """n draws of z_t (t of shape ``(1,)``), or of x where t is None; float64."""
        if t is None:
            mean, factor = self.means, torch.linalg.cholesky(self.covs)
        else:
            mean, factor = (part[0] for part in self.components(t)[:2])
        if n == 0:
            return mean.new_empty(0, *self.event_shape)
        source = as_randomness(generator, n, mean.device, "draw")
        if not (source is None or isinstance(source, torch.Generator)):
            return torch.cat([self.draw(1, t, each) for each in source])
        device = mean.device if source is None else source.device
        k = torch.multinomial(self.log_weights.exp().to(device), n, replacement=True, generator=source)
        noise = torch.randn(n, mean.shape[1], dtype=torch.float64, device=device, generator=source)
        k, noise = k.to(mean.device), noise.to(mean.device)
        return (mean[k] + (factor[k] @ noise[..., None])[..., 0]).reshape(n, *self.event_shape)

    def _flat(self, z: Tensor) -> Tensor:
        return z.reshape(z.shape[0], self.means.shape[1]).to(torch.float64)


def _distinct(t: Tensor) -> Tensor:
    """One time where all are the same (every solve), else all of them; ``()`` or ``(B,)`` to ``(1,)`` or ``(B,)``."""
    t = as_time(t).reshape(-1)
    return t[:1] if t.numel() > 1 and bool((t == t[0]).all()) else t


def _apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    """``(1 or B, K, d, d)`` times ``(B, K, d)``."""
    if len(matrices) == 1:
        return torch.einsum("kij,bkj->bki", matrices[0], vectors)
    return torch.einsum("bkij,bkj->bki", matrices, vectors)


class Marginals(Protocol):
    """What an exact model knows of its marginals: see :class:`_Marginals`."""

    def log_prob(self, z: Tensor, t: Tensor) -> Tensor: ...

    def posterior_mean(self, z: Tensor, t: Tensor) -> Tensor: ...

    def draw(self, n: int, t: Tensor | None, generator: GeneratorLike) -> Tensor: ...


class ExactPredictor:
    r""":math:`\hat x = E[x \mid z_t]`, an object so that copies of a model copy it."""

    def __init__(self, marginals: Marginals) -> None:
        self.marginals = marginals

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        return self.marginals.posterior_mean(z, t)


class MarginalPrior:
    r"""The exact :math:`p_1` as a prior."""

    def __init__(self, marginals: Marginals) -> None:
        self.marginals = marginals

    def log_prob(self, z: Tensor) -> Tensor:
        return self.marginals.log_prob(z, as_time([1.0], z.device))

    def sample(
        self,
        n: int,
        *,
        generator: GeneratorLike = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        return self.marginals.draw(n, as_time([1.0]), generator).to(dtype=dtype, device=device)


class _GaussianPrior(MarginalPrior):
    r"""The exact :math:`p_1` of a single Gaussian, which knows its divergence from another."""

    marginals: _Marginals

    def kl_from_normal(self, mean: Tensor, std: Tensor) -> Tensor:
        (own_mean,), (factor,) = (part[0] for part in self.marginals.components(as_time([1.0], mean.device))[:2])
        flat = (mean.shape[0], own_mean.numel())
        residual, variance = mean.reshape(flat).double() - own_mean, std.reshape(flat).double() ** 2
        precision = torch.cholesky_inverse(factor)
        log_det = 2.0 * factor.diagonal().log().sum()
        quadratic = ((residual @ precision) * residual).sum(1)
        trace = (variance * precision.diagonal() - 1.0 - variance.log()).sum(1)
        return (0.5 * (quadratic + trace + log_det)).to(mean.dtype)


def numbers(argument: str, value: Any) -> Tensor:
    """Finite numbers in float64."""
    try:
        tensor = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(
            f"{argument} must be a tensor or nested lists of numbers, got {type(value).__name__} ({error})."
        ) from error
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{argument} must be finite, got {tensor.tolist()}.")
    return tensor


class Exact(NDM):
    """An NDM whose predictor is the exact posterior mean, so that its marginals are known."""

    marginals: Any

    def log_prob(self, z: Tensor, t: float | Tensor | None = None) -> Tensor:
        r""":math:`\log p_t(z)` in nats.

        Args:
            z: shape ``(B, *E)``.
            t: time in [t_min, 1], ``()`` or ``(B,)``; None is t_min.

        Returns:
            Shape ``(B,)``.
        """
        validate_data(z, self.event_shape, name="z", dtype=None, device=None)
        return self.marginals.log_prob(z, validate_time(self.t_min if t is None else t, self.t_min, z))


class GaussianMixture(Exact):
    r"""An NDM whose predictor is the exact posterior mean of Gaussian-mixture data.

    Args:
        weights: :math:`w_k`, shape ``(K,)``, positive, sum 1.
        means: :math:`m_k`, shape ``(K, *E)``.
        covs: :math:`C_k`, shape ``(K, d, d)`` over flattened events, positive definite.
        schedule: None is the default of :class:`~ndm_ct.model.NDM`.
        transform: a transform that is linear in x; None is the identity.
        volatility: :math:`\eta`.
        t_min: None is the schedule's safe value.

    Raises:
        ValueError: a transform that is not linear, or parameters that do not describe a mixture.
        TypeError: parameters that are not numbers.

    Example:
        >>> import ndm_ct
        >>> _ = torch.manual_seed(0)
        >>> covs = torch.eye(2).repeat(2, 1, 1)
        >>> model = GaussianMixture(torch.tensor([0.5, 0.5]), torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), covs)
        >>> x = torch.randn(4, 2, dtype=torch.float64)
        >>> torch.allclose(ndm_ct.loglik(model, x), model.log_prob(x), atol=1e-3)
        True
    """

    def __init__(
        self,
        weights: Tensor,
        means: Tensor,
        covs: Tensor,
        *,
        schedule: Schedule | None = None,
        transform: Transform | None = None,
        volatility: Volatility = 1.0,
        t_min: float | None = None,
    ) -> None:
        weights, means, covs = numbers("weights", weights), numbers("means", means), numbers("covs", covs)
        if means.ndim == 0:
            raise ValueError(f"means has shape {tuple(means.shape)}, expected (K, *event), one row per component.")
        event_shape = tuple(means.shape[1:])
        k, d = means.shape[0], event_size(event_shape)
        if weights.shape != (k,) or covs.shape != (k, d, d):
            raise ValueError(
                f"weights {tuple(weights.shape)}, means {tuple(means.shape)} and covs {tuple(covs.shape)} do not fit; "
                f"expected (K,), (K, *event) and (K, d, d) with d = {d}."
            )
        if not (bool((weights > 0).all()) and abs(float(weights.sum()) - 1.0) < 1e-6):
            raise ValueError(f"weights must be positive and sum to 1, got {weights.tolist()}.")
        if not torch.allclose(covs, covs.mT) or not bool((torch.linalg.eigvalsh(covs) > 0).all()):
            raise ValueError("covs must be symmetric and positive definite.")
        transform = Identity() if transform is None else transform
        if not isinstance(transform, Transform):
            raise TypeError(f"transform must be a Transform of ndm_ct, got {type(transform).__name__}.")
        if transform.latent or not transform.linear:
            raise ValueError(f"the exact model needs a transform linear in x, got {type(transform).__name__}.")
        schedule = LinearLogSNR() if schedule is None else schedule
        marginals = _Marginals(weights, means.reshape(k, d), covs, event_shape, schedule, transform)
        super().__init__(
            ExactPredictor(marginals),
            event_shape,
            transform=transform,
            schedule=schedule,
            volatility=volatility,
            prior=_GaussianPrior(marginals) if k == 1 else MarginalPrior(marginals),
            t_min=t_min,
        )
        self.marginals = marginals

    def sample_data(self, n: int, *, generator: GeneratorLike = None) -> Tensor:
        """Draw x from the mixture itself, float64, shape ``(n, *E)``.

        Args:
            n: number of draws.
            generator: a seed, a generator, or one per draw; None is torch's global generator.
        """
        return self.marginals.draw(n, None, generator)


class Gaussian(GaussianMixture):
    r"""An NDM with the exact predictor of data :math:`x \sim N(m, C)`.

    Args:
        mean: m, shape ``E``.
        cov: C, shape ``(d, d)`` over the flattened event.
        schedule: :math:`\alpha, \sigma`; None is that of :class:`ndm_ct.NDM`.
        transform: F, linear in x; None is the identity.
        volatility: :math:`\eta`.
        t_min: None is the schedule's safe value.
    """

    def __init__(
        self,
        mean: Tensor,
        cov: Tensor,
        *,
        schedule: Schedule | None = None,
        transform: Transform | None = None,
        volatility: Volatility = 1.0,
        t_min: float | None = None,
    ) -> None:
        mean, cov = numbers("mean", mean), numbers("cov", cov)
        super().__init__(
            torch.ones(1), mean[None], cov[None], schedule=schedule, transform=transform, volatility=volatility,
            t_min=t_min,
        )  # fmt: skip
