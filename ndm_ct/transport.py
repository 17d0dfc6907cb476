r"""Straight paths: the curvature of the probability flow as a penalty beside the bound.

.. math::
    L = -\mathrm{ELBO} + \lambda\, C, \qquad
    C = \tfrac12 \int_0^1 \tau (1 - \tau)\, E\|\ddot z\|^2 d\tau, \qquad
    \ddot z = (1 - t_{min})^2 \bigl( \partial_t v + (\nabla_z v)\, v \bigr)

with :math:`\tau = (t - t_{min})/(1 - t_{min})` and the velocity v of the probability flow at
:math:`z_t = \alpha F_\varphi(x, t) + \sigma\epsilon`. The acceleration is one Jacobian-vector product of v with the
tangent (v, 1).

**Why this weight.** C bounds how far a path is from the straight line between its ends, passed at constant speed,

.. math::
    \int_0^1 \|\dot z - (z_1 - z_0)\|^2 d\tau \ \le\ \tfrac12 \int_0^1 \tau (1 - \tau) \|\ddot z\|^2 d\tau ,

with equality for constant acceleration: the operator :math:`-\frac{d}{d\tau} \tau (1 - \tau) \frac{d}{d\tau}` has
Legendre's polynomials for eigenfunctions and the eigenvalues n(n + 1). The weight vanishes at the two ends, where
velocities of diffusions turn fastest, and :math:`6\tau(1 - \tau)` is a density: times drawn from it need no weights.

**What can be attained.** In one dimension a flow keeps the order of points, so its paths follow from its marginals
:math:`p_t` alone, and they are straight if and only if :math:`p_t` is the law of :math:`(1 - t) x + t\,T(x)`, T the
monotone map from data to prior. Because :math:`p_t` is the law of :math:`\alpha F` smoothed by
:math:`N(0, \sigma^2)`, that law must contain such a Gaussian. For :math:`x \sim N(0, s^2)` it does where
:math:`\sigma_t \le (1 - t) s + t`: with :math:`\alpha = 1 - t, \sigma = t` and
:math:`F = x \sqrt{((1 - t) s + t)^2 - t^2}/((1 - t) s)` paths are exactly straight; under a variance-preserving
schedule with much noise at early t no F makes them so. Where T is not linear the law of :math:`(1 - t) x + t\,T(x)` has
a density that is not entire, so it contains no Gaussian at all, and the least error is positive but falls with
:math:`\sigma_t`: a schedule that allows transport keeps :math:`\sigma_t` small until late, and gains the noise at the
end, where the marginal is the prior's already.

References:
    Bartosh, Vetrov and Naesseth, Neural Diffusion Models, appendix E, https://arxiv.org/abs/2310.08337
    Bartosh, Vetrov and Naesseth, Neural Flow Diffusion Models, https://arxiv.org/abs/2404.12940
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ndm_ct import objectives
from ndm_ct._autodiff import jvp
from ndm_ct._shapes import sum_event
from ndm_ct.model import NDM, validate_prediction

__all__ = ["Straight", "acceleration", "curvature"]


def acceleration(model: NDM, z: Tensor, t: Tensor, **cond: Any) -> Tensor:
    r""":math:`\partial_t v + (\nabla_z v)\, v`: the second time derivative along paths of the probability flow.

    Args:
        model: the model.
        z: states, shape ``(B, *E)``.
        t: their times, float64, ``(B,)``.
        cond: conditioning.

    Returns:
        Shape of ``z``; gradients reach the networks.

    Example:
        >>> import ndm_ct
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2), schedule=ndm_ct.schedules.Rectified())
        >>> t = torch.tensor([0.5], dtype=torch.float64)  # paths are proportional to sqrt(t^2 + (1 - t)^2)
        >>> acceleration(model, torch.ones(1, 2, dtype=torch.float64), t)
        tensor([[4., 4.]], dtype=torch.float64)
    """
    flow = model.flow(z.dtype, **cond)

    def velocity(state: Tensor, time: Tensor) -> Tensor:
        return flow(time, state)

    return jvp(velocity, (z, t), (velocity(z, t), torch.ones_like(t)))[1]


def curvature(model: NDM, x: Tensor, *, generator: torch.Generator | None = None, **cond: Any) -> Tensor:
    r"""An unbiased estimate of C per row, times of low discrepancy over the batch.

    The random z is :math:`\alpha F_\varphi(x, t) + \sigma\epsilon`, so gradients reach the transform.

    Args:
        model: the model, in the mode the caller chose.
        x: data, shape ``(B, *E)``.
        generator: source of times and noise.
        cond: conditioning.

    Returns:
        Shape ``(B,)``, in squared units of z.

    Raises:
        PredictorError: the acceleration is NaN or infinite (with time and rows).

    Example:
        >>> import ndm_ct
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
        >>> curvature(model, model.sample_data(5)).shape
        torch.Size([5])
    """
    model.validate(x, cond, curvature)
    length = 1.0 - model.t_min
    t = model.t_min + length * _quantile(objectives.low_discrepancy(x.shape[0], generator, x.device))
    y, _ = model.to_latent(x, generator=generator, **cond)
    a = acceleration(model, model.process.sample(y, t, generator=generator, **cond), t, **cond)
    validate_prediction(a, t)
    return length**4 / 12.0 * sum_event(a**2)  # the weight tau (1 - tau)/2 is 1/12 of the density


def _quantile(u: Tensor) -> Tensor:
    r"""The quantile function of :math:`6\tau(1 - \tau)`: the root of :math:`3\tau^2 - 2\tau^3 = u` in [0, 1]."""
    return 0.5 - torch.sin(torch.asin(1.0 - 2.0 * u) / 3.0)


class Straight(nn.Module):
    r"""Minus the ELBO and :math:`\lambda C`, for ``fit(objective=Straight(...))``.

    With prediction "moments" the velocity is that of the marginals at the optimum, and the transform is what makes it
    straight. With "x" and a transform nonlinear in x the penalty straightens the flow of the one prediction, which the
    bound says little about (see :mod:`ndm_ct.dynamics`).

    Train in stages of growing strength (``fit`` continues from the weights it is given): where F is still the identity
    a strong penalty makes the flow stand still before the transform has learned to move.

    Args:
        strength: :math:`\lambda`, nats per squared unit of z.
        bound: the objective C is added to, such as a :class:`~ndm_ct.objectives.Bound`; None is
            :func:`ndm_ct.loss`.

    Raises:
        ValueError: strength is negative or not finite.

    Example:
        >>> import ndm_ct
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
        >>> Straight(strength=2.0)(model, model.sample_data(5)).shape
        torch.Size([5])
    """

    def __init__(self, strength: float = 1.0, bound: objectives.Bound | None = None) -> None:
        super().__init__()
        if not (math.isfinite(strength) and strength >= 0.0):
            raise ValueError(f"strength must be a finite number >= 0, got {strength!r}.")
        self.strength, self.bound = strength, bound

    def forward(self, model: NDM, x: Tensor, *, generator: torch.Generator | None = None, **cond: Any) -> Tensor:
        """One estimate per row.

        Args:
            model: the model, in the mode the caller chose.
            x: data, shape ``(B, *E)``.
            generator: source of times and noise.
            cond: conditioning.

        Returns:
            Shape ``(B,)``; its mean is to be minimised.
        """
        bound = objectives.loss if self.bound is None else self.bound
        nats: Tensor = bound(model, x, generator=generator, **cond)
        return nats + self.strength * curvature(model, x, generator=generator, **cond)

    def describe(self) -> str:
        """Its settings, the same in every process, for a checkpoint to compare."""
        bound = "" if self.bound is None else f", bound={self.bound.describe()}"
        return f"Straight(strength={self.strength:g}{bound})"
