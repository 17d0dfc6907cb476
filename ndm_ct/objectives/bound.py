r"""The evidence lower bound, always in full: three terms, no balancing weights.

.. math::
    -\mathrm{ELBO} = KL(q(z_1 \mid x) \,\|\, p(z_1)) + L_{diff} + E[-\log p(x \mid z_0)]

.. math::
    L_{diff} = \int_{t_{min}}^1 E\,\tfrac12 \frac{e^{-\gamma} \gamma'}{\eta}
    \Bigl\| \frac{1 + \eta}{2} \Delta F - \frac{\Delta \dot F}{\gamma'} \Bigr\|^2 dt, \qquad
    \Delta F = F(x, t) - \hat F(z_t, t)

With T discrete steps, :math:`KL_t = \|\alpha_s \Delta F_s - \kappa \alpha_t \Delta F_t\|^2 / (2 \tilde\sigma^2)`; the
sum tends to the integral at order 1/T. For F the identity and :math:`\eta = 1` the integrand is VDM's
:math:`-\tfrac12 \mathrm{SNR}' \|x - \hat x\|^2`.

Real-valued data are decoded by :math:`N(z_0/\alpha_0, e^{\gamma_0} I)`, so the bound is on the density smoothed by that
kernel; integer data by the softmax of the same exponent over the levels.

If the transform has a Flow or Encoder, all of this is about its latents y, and the bound is
:math:`E[\mathrm{ELBO}(y) + w]` (:mod:`ndm_ct.transforms.latent`).

References:
    Bartosh, Vetrov and Naesseth, Neural Diffusion Models, https://arxiv.org/abs/2310.08337
    Kingma et al., Variational Diffusion Models, https://arxiv.org/abs/2107.00630
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from ndm_ct._core.checks import expand, sum_event, validate_count
from ndm_ct._core.conditioning import Conditioning
from ndm_ct._core.noise import GeneratorLike, Randomness, as_randomness, normal_like, uniform
from ndm_ct.model import NDM
from ndm_ct.objectives.terms import diffusion, diffusion_along, predict, reconstruct, times, transition_along
from ndm_ct.objectives.time_samplers import TimeSampler, low_discrepancy
from ndm_ct.prior import NormalKL
from ndm_ct.process import Instant, ProcessPath
from ndm_ct.quantisation import Quantisation, resolve_optional

__all__ = ["Bound", "ElboInfo", "elbo", "elbo_discrete", "loss"]


@dataclass(frozen=True)
class ElboInfo:
    """The terms of minus the ELBO, nats, each ``(B,)``; they add up to minus the bound.

    Args:
        prior: KL(q(z_1|x) || p(z_1)); an estimate, one draw of z_1 per sample, for a prior without that closed form.
        diffusion: estimate of L_diff.
        reconstruction: E[-log p(x|z_0)], minus the latents' log-weight if the transform has a Flow or Encoder.
        stderr: standard error of the bound from everything random in it (times, noise, draws of z_1 and of latents);
            NaN for one sample.
        nfe: network evaluations of each row.
    """

    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor
    stderr: Tensor
    nfe: int


@overload
def elbo(
    model: NDM, x: Tensor, /, *, samples: int = ..., quantisation: int | Quantisation | None = ...,
    generator: GeneratorLike = ..., return_info: Literal[False] = ..., **cond: Any,
) -> Tensor: ...  # fmt: skip


@overload
def elbo(
    model: NDM, x: Tensor, /, *, samples: int = ..., quantisation: int | Quantisation | None = ...,
    generator: GeneratorLike = ..., return_info: Literal[True], **cond: Any,
) -> tuple[Tensor, ElboInfo]: ...  # fmt: skip


def elbo(
    model: NDM,
    x: Tensor,
    /,
    *,
    samples: int = 1,
    quantisation: int | Quantisation | None = None,
    generator: GeneratorLike = None,
    return_info: bool = False,
    **cond: Any,
) -> Tensor | tuple[Tensor, ElboInfo]:
    r"""The evidence lower bound on :math:`\log p(x)` in continuous time, nats, one unbiased estimate per row.

    The network is in eval mode during the call. Gradients flow unless the caller disables them.

    Args:
        model: the model.
        x: data, shape ``(B, *E)``, a tensor or a numpy array.
        samples: pairs (t, eps) per row, stratified in time; two and more give a standard error.
        quantisation: for x at the centres of integer levels, whose log-probability the bound is then on: their number,
            if their bins fill (-1, 1), or a :class:`~ndm_ct.quantisation.Quantisation` that says where they lie.
        generator: source of times and noise: a seed, a generator, or one per row; a row's bound then does not depend on
            its batch.
        return_info: also return an :class:`ElboInfo`.
        cond: conditioning.

    Returns:
        Shape ``(B,)``; with ``return_info`` a pair.

    Example:
        >>> import ndm_ct
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
        >>> x = model.sample_data(4)
        >>> bound, info = ndm_ct.elbo(model, x, samples=8, return_info=True)
        >>> torch.equal(bound, -(info.prior + info.diffusion + info.reconstruction))
        True
    """
    bins = resolve_optional(quantisation)
    x = model.as_data(x)
    given = _validate(model, x, cond, elbo, bins)
    generator = as_randomness(generator, len(x), x.device, "elbo")

    def draw(path: ProcessPath, y: Tensor, u: Tensor) -> Tensor:
        t, weight = times(model, u)
        eps = normal_like(y, generator)
        return weight.to(y.dtype) * diffusion_along(model, path, t, eps, given)

    return _bound(model, x, draw, samples, bins, generator, return_info, given)


def elbo_discrete(
    model: NDM,
    x: Tensor,
    /,
    *,
    steps: int,
    samples: int = 1,
    quantisation: int | Quantisation | None = None,
    generator: GeneratorLike = None,
    return_info: bool = False,
    **cond: Any,
) -> Any:
    r"""The ELBO of the model with T discrete steps, uniform in the coordinate of :func:`times`.

    Args:
        model: the model.
        x: data, shape ``(B, *E)``, a tensor or a numpy array.
        steps: T.
        samples: transitions drawn per row; more of them reduce the random error, two and more give a standard error.
        quantisation: the bins, or their number on (-1, 1), if x are the centres of integer levels.
        generator: source of transitions and noise: a seed, a generator, or one per row.
        return_info: also return an :class:`ElboInfo`.
        cond: conditioning.

    Returns:
        As :func:`elbo`.
    """
    bins = resolve_optional(quantisation)
    x = model.as_data(x)
    given = _validate(model, x, cond, elbo_discrete, bins)
    generator = as_randomness(generator, len(x), x.device, "elbo_discrete")
    even = torch.linspace(0.0, 1.0, validate_count("steps", steps) + 1, dtype=torch.float64, device=x.device)
    grid, _ = times(model, even)

    def draw(path: ProcessPath, y: Tensor, u: Tensor) -> Tensor:
        index = (u * steps).long().clamp(max=steps - 1)
        eps = normal_like(y, generator)
        return steps * transition_along(model, path, grid[index], grid[index + 1], eps, given)

    return _bound(model, x, draw, samples, bins, generator, return_info, given)


def _bound(
    model: NDM, x: Tensor, draw: Callable[[ProcessPath, Tensor, Tensor], Tensor], samples: int,
    quantisation: Quantisation | None, generator: Randomness, return_info: bool, cond: Mapping[str, Any],
) -> Any:  # fmt: skip
    """The three terms; ``draw`` makes an estimate of the diffusion term of a uniform number (stratified)."""
    validate_count("samples", samples)
    strata = max(1, samples // 2)
    points: list[list[Tensor]] = [[] for _ in range(strata)]
    with model.evaluating():
        for sample in range(samples):
            k = sample % strata
            u = uniform((len(x),), generator, torch.float64, x.device)
            fresh = sample == 0 or not model.transform.bijective  # an Encoder's latents differ between samples
            if fresh:
                y, weight = model.to_latent(x, generator=generator, **cond)
                path = model.process.along(y, **cond)
            if fresh or not isinstance(model.prior, NormalKL):  # a prior that is sampled scatters too
                prior = model.prior_divergence(path, y, generator)
            if fresh or quantisation is not None:
                reconstruction = reconstruct(model, path, y, quantisation, generator)
                reconstruction = reconstruction if weight is None else reconstruction - weight
            points[k].append(torch.stack([prior, draw(path, y, (k + u) / strata), reconstruction]))
    (prior, diffusion, reconstruction), variance = _stratified(points)
    bound = -(prior + diffusion + reconstruction)
    if not return_info:
        return bound
    return bound, ElboInfo(prior, diffusion, reconstruction, variance.sqrt(), samples)


def _stratified(points: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Means of terms ``(3, B)`` over equal strata, and the variance of their sum (NaN if a stratum has one)."""
    means, variances = [], []
    for stratum in points:
        values = torch.stack(stratum)
        means.append(values.mean(0))
        total = values.sum(1)
        unknown = len(stratum) == 1 or total.numel() == 0
        variances.append(torch.full_like(total[0], math.nan) if unknown else total.var(0) / len(stratum))
    count = len(points)
    return torch.stack(means).mean(0), torch.stack(variances).detach().sum(0) / count**2


def loss(
    model: NDM,
    x: Tensor,
    /,
    *,
    sampler: TimeSampler | None = None,
    regressions: tuple[float, float] = (0.1, 0.1),
    quantisation: int | Quantisation | None = None,
    generator: GeneratorLike = None,
    **cond: Any,
) -> Tensor:
    r"""The training objective: minus the ELBO, one time per row, times of low discrepancy over the batch.

    With prediction "moments" the regressions of :math:`\hat F` and :math:`\hat{\dot F}` are added, in the units of the
    bound and with the transform held fixed,

    .. math::
        \tfrac12 e^{-\gamma} \gamma' \bigl( \omega_1 \|F - \hat F\|^2
        + \omega_2 \|\dot F - \hat{\dot F}\|^2 / \gamma'^2 \bigr) ,

    so that at the optimum both are conditional means, and the probability flow is the true one. While a transform is
    trained, the loss then takes a gradient of its own on the way: ``backward`` goes through it, ``torch.func.grad`` and
    second derivatives do not, and weights of rows are exact only for a predictor that does not mix rows.

    Args:
        model: the model, in the mode the caller chose.
        x: data, shape ``(B, *E)``, a tensor or a numpy array.
        sampler: density of the times in the coordinate of :func:`times`, which learns from this batch; None: uniform.
        regressions: weights :math:`\omega_1, \omega_2` of the two regressions, for prediction "moments" only. With
            weight 0 nothing ties the probability flow to the model whose bound is optimised. With weight 1 the
            regressions compete with the bound.
        quantisation: for x at the centres of integer levels, as in :func:`elbo`; the last term is then that of the
            levels, from one sample of z_0.
        generator: source of times and noise.
        cond: conditioning.

    Returns:
        Shape ``(B,)``, nats; its mean is to be minimised.

    Raises:
        ValueError: a weight is negative or not finite.
    """
    bins = resolve_optional(quantisation)
    x = model.as_data(x)
    given = _validate(model, x, cond, loss, bins)
    weights = _pair(regressions)
    generator = as_randomness(generator, len(x), x.device, "loss")
    u = low_discrepancy(x.shape[0], generator, x.device)
    v, rarity = (u, torch.ones_like(u)) if sampler is None else sampler(u)
    t, weight = times(model, v)
    y, log_weight = model.to_latent(x, generator=generator, **given)
    eps = normal_like(y, generator)
    path = model.process.along(y, **given)
    here = path.at(t)
    regress = model.prediction == "moments" and not model.process.ordinary
    split = regress and here.requires_grad  # one evaluation, but two gradients in its state
    z = (here.detach() if split else here).state(eps)
    if split:
        z.requires_grad_()
    F_hat, dF_hat = predict(model, z, t, given)
    weight, rarity = weight.to(y.dtype), rarity.to(y.dtype)
    F, dF = here.pair(here.residual(eps))
    bound = weight * diffusion(model, F, dF, F_hat, dF_hat, t)
    held = (F.detach(), dF.detach()) if split else (F, dF)
    integrand = bound + weight * _regressions(model, *held, F_hat, dF_hat, t, weights) if regress else bound
    if sampler is not None:
        sampler.observe(v, integrand)
    nats = rarity * integrand + model.prior_divergence(path, y, generator)
    nats = nats + reconstruct(model, path, y, bins, generator)
    if split:
        nats = nats + _through_state(rarity * bound, z, here, eps)
    return nats if log_weight is None else nats - log_weight


class Bound(nn.Module):
    """:func:`loss` as an object with its settings, for ``fit(objective=Bound(LossHistory()))``.

    Args:
        sampler: a :class:`TimeSampler`; its state is saved in the checkpoints of a training. None:
            times uniform in the coordinate of :func:`times`.
        regressions: weights of the two regressions for prediction "moments"; see :func:`loss`.

    Raises:
        ValueError: a weight of a regression is negative or not finite.

    Example:
        >>> import ndm_ct
        >>> from ndm_ct.objectives import LossHistory
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
        >>> Bound(LossHistory())(model, model.sample_data(5)).shape
        torch.Size([5])
    """

    def __init__(self, sampler: TimeSampler | None = None, *, regressions: tuple[float, float] = (0.1, 0.1)) -> None:
        super().__init__()
        self.sampler, self.regressions = sampler, _pair(regressions)

    def forward(self, model: NDM, x: Tensor, /, *, generator: GeneratorLike = None, **cond: Any) -> Tensor:
        """See :func:`loss`."""
        return loss(model, x, sampler=self.sampler, regressions=self.regressions, generator=generator, **cond)

    def describe(self) -> str:
        """Its settings, the same in every process, for a checkpoint to compare."""
        parts = [] if self.sampler is None else [f"{type(self.sampler).__name__}({self.sampler.describe()})"]
        return f"Bound({', '.join([*parts, f'regressions={self.regressions}'])})"


def _through_state(bound: Tensor, z: Tensor, here: Instant, eps: Tensor) -> Tensor:
    r"""Zero, ``(B,)``, with the gradient that the bound sends through :math:`z` into F and S.

    Bound and regressions share one evaluation of the predictor, at a state in which F and S are held fixed. The bound's
    gradient in that state costs a backward pass without weights; a second evaluation would cost a forward and a full
    backward pass (``benchmarks/training_cost.py``).
    """
    (gradient,) = torch.autograd.grad(bound.sum(), z, retain_graph=True, materialize_grads=True)
    along = sum_event(expand(here.c.alpha, z).detach() * gradient * here.F)
    if here.r is not None:
        along = along + sum_event(expand(here.c.sigma, z).detach() * gradient * eps * here.r.exp())
    return along - along.detach()


def _pair(weights: Any) -> tuple[float, float]:
    """Two finite weights, none negative."""
    pair = tuple(weights) if isinstance(weights, tuple | list) else ()
    if len(pair) != 2 or not all(math.isfinite(weight) and weight >= 0.0 for weight in pair):
        raise ValueError(
            f"regressions={weights} has to be two finite weights, none negative, such as (0.1, 0.1): that of F_hat and "
            "that of its time derivative."
        )
    return float(pair[0]), float(pair[1])


def _regressions(
    model: NDM, F: Tensor, dF: Tensor, F_hat: Tensor, dF_hat: Tensor, t: Tensor, weights: tuple[float, float]
) -> Tensor:
    c = model.schedule(t)
    error = weights[0] * (F - F_hat) ** 2 + weights[1] * (expand(c.inverse_dgamma, F) * (dF - dF_hat)) ** 2
    return (0.5 * c.snr_rate).to(F.dtype) * sum_event(error)


def _validate(
    model: NDM, x: Tensor, cond: Mapping[str, Any], caller: Callable[..., Any], quantisation: Quantisation | None
) -> Conditioning:
    given = model.validate(x, cond, caller)
    if quantisation is not None:
        quantisation.validate_placed(model.adapted)
        quantisation.validate_centres(x)
        if model.transform.latent:
            raise ValueError(
                f"quantisation decodes levels from z_0, which holds latents of {type(model.transform).__name__}; noise "
                "the levels uniformly and take the bound on their density, or give an Encoder a decoder over levels."
            )
    if model.process.volatility == 0.0:
        raise ValueError(
            "volatility=0.0 is a deterministic process, whose ELBO is minus infinity for every x; use a positive "
            "volatility to train, and method='ode' or 'ddim' to sample deterministically."
        )
    return given
