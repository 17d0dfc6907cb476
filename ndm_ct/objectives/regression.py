r"""Weighted regressions: the objectives other models are trained with, in place of the bound.

.. math::
    L = E_{t \sim p}\, E_\epsilon\; w(t)\, \|y - \hat y\|^2, \qquad z = \alpha F + \sigma \epsilon,

where y is one of

==============  ==========================================  ==================================================
``"F"``         :math:`F(x, t)`                             EDM's denoising
``"eps"``       :math:`\epsilon = (z - \alpha F)/\sigma`    DDPM's :math:`L_{simple}`, denoising score matching
``"velocity"``  :math:`\alpha' F + \alpha \dot F`           flow matching, rectified flow, interpolants
                :math:`{}+ (\sigma'/\sigma)(z - \alpha F)`
==============  ==========================================  ==================================================

and :math:`\hat y` is the same with the model's prediction. With the true conditional expectations each is at its
minimum for any w and p. None of them determines F, whose parameters must therefore be fixed. With a scale S of the
noise F and its derivative are the pair of :mod:`ndm_ct.process`, and its parameters must be fixed too.

References:
    Ho, Jain and Abbeel, Denoising Diffusion Probabilistic Models, eq. 14, https://arxiv.org/abs/2006.11239
    Song et al., Score-Based Generative Modeling through SDEs, eq. 7, https://arxiv.org/abs/2011.13456
    Lipman et al., Flow Matching for Generative Modeling, eq. 5, https://arxiv.org/abs/2210.02747
    Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, eq. 108,
    https://arxiv.org/abs/2206.00364
"""

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any

from torch import Tensor

from ndm_ct._core.checks import choose, expand, sum_event
from ndm_ct._core.conditioning import Conditioning
from ndm_ct._core.noise import GeneratorLike, Randomness, as_randomness, normal_like
from ndm_ct.model import NDM
from ndm_ct.objectives.time_samplers import low_discrepancy
from ndm_ct.prediction import validate_finite
from ndm_ct.schedules.base import Coefficients, Schedule

__all__ = ["TARGETS", "Regression", "uniform"]

TARGETS = ("F", "eps", "velocity")
"""What can be regressed on."""


def uniform(schedule: Schedule, t_min: float, u: Tensor) -> Tensor:
    """Times spread evenly over the interval, for numbers u spread evenly in [0, 1)."""
    return t_min + (1.0 - t_min) * u


@dataclass(frozen=True)
class Regression:
    r"""What ``fit(objective=)`` minimises in place of minus the ELBO.

    Args:
        target: y, one of ``TARGETS``.
        weight: w, a function of the schedule's :class:`~ndm_ct.schedules.Coefficients`; None is one.
        times: ``times(schedule, t_min, u)``, the quantile function of p at numbers u in [0, 1).

    Raises:
        ValueError: unknown target.

    Example:
        >>> import torch, ndm_ct
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
        >>> Regression("eps")(model, model.sample_data(5)).shape
        torch.Size([5])
    """

    target: str = "eps"
    weight: Callable[[Coefficients], Tensor] | None = None
    times: Callable[[Schedule, float, Tensor], Tensor] = uniform

    def __post_init__(self) -> None:
        choose("target", self.target, TARGETS)

    def __call__(self, model: NDM, x: Tensor, /, *, generator: GeneratorLike = None, **cond: Any) -> Tensor:
        """One estimate per row, times of low discrepancy over the batch.

        Args:
            model: the model, in the mode the caller chose.
            x: data, shape ``(B, *E)``.
            generator: source of times and noise.
            cond: conditioning.

        Returns:
            Shape ``(B,)``; its mean is to be minimised.

        Raises:
            ValueError: the transform has parameters to train, which the regression does not determine.
            PredictorError: the prediction is NaN or infinite (with time and rows).
        """
        given = model.validate(x, cond, type(self).__call__)
        for part in (model.transform, model.noise_scale):
            if part is not None and any(parameter.requires_grad for parameter in part.parameters()):
                raise ValueError(
                    f"a regression on {self.target!r} does not determine F or S, but {type(part).__name__} has "
                    "parameters to train; train by the bound (objective=None), or freeze them with "
                    "requires_grad_(False)."
                )
        generator = as_randomness(generator, len(x), x.device, "Regression")
        t = self.times(model.schedule, model.t_min, low_discrepancy(x.shape[0], generator, x.device))
        y, _ = model.to_latent(x, generator=generator, **given)
        eps = self._noise(model, y, generator, given)
        return self.at(model, y, t, eps, **given)

    def _noise(self, model: NDM, y: Tensor, generator: Randomness, cond: Conditioning) -> Tensor:
        r"""The noise :math:`\epsilon` of data or latents y, ``(B, *E)``: here standard normal, whatever y is."""
        return normal_like(y, generator)

    def at(self, model: NDM, x: Tensor, t: Tensor, eps: Tensor, /, **cond: Any) -> Tensor:
        r""":math:`w(t)\|y - \hat y\|^2` at given times and noise, shape ``(B,)``.

        Args:
            model: the model.
            x: data or latents, shape ``(B, *E)``.
            t: float64 times, shape ``(B,)``.
            eps: noise, shape ``(B, *E)``.
            cond: conditioning.
        """
        c = model.schedule(t)
        here = model.process.along(x, **cond).at(t)
        (F, dF), z = here.pair(here.residual(eps)), here.state(eps)
        if self.target == model.prediction == "velocity":
            velocity = expand(c.dalpha, x) * x + expand(c.dsigma, x) * eps
            error = velocity - model.output(z, t, **cond)
        else:
            F_hat, dF_hat = model.moments(z, t, **cond)
            error = self._error(c, F - F_hat, dF - dF_hat)
        validate_finite(error, t)
        square = sum_event(error**2)
        return square if self.weight is None else self.weight(c).to(square.dtype) * square

    def _error(self, c: Coefficients, delta: Tensor, ddelta: Tensor) -> Tensor:
        r""":math:`y - \hat y`, at the same z."""
        if self.target == "F":
            return delta
        if self.target == "eps":
            return expand(-c.alpha / c.sigma, delta) * delta
        return expand(c.dalpha - c.alpha * c.dlog_sigma, delta) * delta + expand(c.alpha, delta) * ddelta

    def describe(self) -> str:
        """Its settings, the same in every process, for a checkpoint to compare."""
        return f"Regression({self.target!r}, weight={name_of(self.weight)}, times={name_of(self.times)})"


def name_of(function: Any) -> str | None:
    """How ``describe`` names a weight or the times of an objective."""
    if function is None or is_dataclass(function):
        return None if function is None else repr(function)
    return str(getattr(function, "__qualname__", type(function).__qualname__))
