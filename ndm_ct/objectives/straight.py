r"""Straight paths: the curvature of the probability flow as a penalty added to the bound.

.. math::
    L = -\mathrm{ELBO} + \lambda\, C, \qquad
    C = \tfrac12 \int_0^1 \tau (1 - \tau)\, E\|\ddot z\|^2 d\tau, \qquad
    \ddot z = (1 - t_{min})^2 \bigl( \partial_t v + (\nabla_z v)\, v \bigr)

with :math:`\tau = (t - t_{min})/(1 - t_{min})` and the velocity v of a probability flow at
:math:`z_t = \alpha F_\varphi(x, t) + \sigma\epsilon`. The acceleration is one Jacobian-vector product of v with the
tangent (v, 1).

**Which flow.** There are two choices:

- The *model's*: v from the predictor. The gradient reaches the predictor, and the transform through the state z alone:
  the predictor is bent towards straight paths, whether or not its flow still ends in the data, and the transform
  follows it by the bound.
- The *batch's*: v from the posterior means under the empirical law of the batch :math:`x_1 \dots x_B`,

  .. math::
      E[F \mid z] = \sum_j w_j F_\varphi(x_j, t), \qquad
      w = \mathrm{softmax}_j \Bigl(-\frac{\|z - \alpha F_\varphi(x_j, t)\|^2}{2\sigma^2}\Bigr),

  and :math:`\dot F` alike. It needs no predictor, so the predictor is left to the bound and its flow to the law of the
  data, and the transform sees how all of its values bend the flow. For data of few dimensions, whose batches are dense
  at the scale of :math:`\sigma`; where they are not, every z sees its own x alone, and what is made straight is the
  path of a single :math:`(x, \epsilon)`.

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
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ndm_ct._core.checks import sum_event
from ndm_ct._core.noise import GeneratorLike, Randomness, as_randomness, normal_like
from ndm_ct.dynamics import ProbabilityFlow
from ndm_ct.model import NDM
from ndm_ct.objectives import bound as objectives
from ndm_ct.objectives.time_samplers import low_discrepancy
from ndm_ct.prediction import validate_finite
from ndm_ct.process import ForwardProcess

__all__ = ["Straight", "acceleration", "curvature"]

Flow = Literal["model", "batch"]
TIMES = 8
"""Times at which the flow of a batch is evaluated; each evaluates F at all rows."""


def acceleration(flow: ProbabilityFlow, z: Tensor, t: Tensor) -> Tensor:
    r""":math:`\partial_t v + (\nabla_z v)\, v`: the second time derivative along paths of the probability flow.

    Args:
        flow: v, such as ``model.flow(z.dtype)``.
        z: states, shape ``(B, *E)``.
        t: their times, float64, ``(B,)``.

    Returns:
        Shape of ``z``; gradients reach the networks.

    Example:
        >>> import ndm_ct
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2), schedule=ndm_ct.schedules.Rectified())
        >>> t = torch.tensor([0.5], dtype=torch.float64)  # paths are proportional to sqrt(t^2 + (1 - t)^2)
        >>> acceleration(model.flow(torch.float64), torch.ones(1, 2, dtype=torch.float64), t)
        tensor([[4., 4.]], dtype=torch.float64)
    """

    def velocity(state: Tensor, time: Tensor) -> Tensor:
        return flow(time, state)

    return flow.derivatives.jvp(velocity, (z, t), (velocity(z, t), torch.ones_like(t)))[1]


def curvature(
    model: NDM, x: Tensor, /, *, flow: Flow = "model", generator: GeneratorLike = None, **cond: Any
) -> Tensor:
    r"""An unbiased estimate of C per row, of the flow of the model or of the batch, times of low discrepancy.

    Args:
        model: the model, in the mode the caller chose.
        x: data, shape ``(B, *E)``.
        flow: whose flow, ``"model"`` or ``"batch"``. The flow of the batch takes time and memory for
            :math:`B^2` pairs, evaluates F at 8 times for every row, and gives all its gradient to the transform.
        generator: source of times and noise.
        cond: conditioning.

    Returns:
        Shape ``(B,)``, in squared units of z.

    Raises:
        ValueError: ``flow`` is neither; no rows or conditioning for the flow of the batch, whose rows are one law.
        PredictorError: the acceleration is NaN or infinite (with time and rows).

    Example:
        >>> import ndm_ct
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
        >>> curvature(model, model.sample_data(5)).shape
        torch.Size([5])
    """
    generator = as_randomness(generator, len(x), x.device, "curvature")
    return _curvature(model, x, flow, generator, model.validate(x, cond, curvature))


def _curvature(model: NDM, x: Tensor, flow: Flow, generator: Randomness, cond: Mapping[str, Any]) -> Tensor:
    _validate_flow(flow)
    if flow == "batch":
        _validate_batch(x.shape[0], cond)
        if model.noise_scale is not None:
            raise ValueError('flow="batch" takes noise of one size for all data; with a noise_scale take flow="model".')
    length = 1.0 - model.t_min
    count = x.shape[0] if flow == "model" else min(TIMES, x.shape[0])
    times = model.t_min + length * _quantile(low_discrepancy(count, generator, x.device))
    place = torch.arange(x.shape[0], device=x.device) % max(count, 1)
    t = times[place]
    y, _ = model.to_latent(x, generator=generator, **cond)
    z = model.process.along(y, **cond).sample(t, normal_like(y, generator))
    a = acceleration(model.flow(z.dtype, **cond) if flow == "model" else _flow_of(model.process, y, count), z, t)
    validate_finite(a, t)
    return length**4 / 12.0 * sum_event(a**2)  # the weight tau (1 - tau)/2 is 1/12 of the density


def _validate_flow(flow: str) -> None:
    if flow not in ("model", "batch"):
        raise ValueError(f'flow must be "model" or "batch", got {flow!r}.')


def _validate_batch(rows: int, cond: Mapping[str, Any]) -> None:
    if rows == 0:
        raise ValueError('x has no rows, of which flow="batch" needs one at least.')
    if cond:
        names = ", ".join(cond)
        raise ValueError(
            f'flow="batch" takes the rows of a batch for draws of one law, but they are conditioned on {names}; '
            'take flow="model".'
        )


def _flow_of(process: ForwardProcess, y: Tensor, count: int) -> ProbabilityFlow:
    r"""The flow whose data are the rows of y, at states of which number i has the time of number i + ``count``."""
    path = process.transform.along(y)

    def moments(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        curves = [path.with_derivative(time) for time in t[:count]]
        F, dF = (torch.stack(each).flatten(2) for each in zip(*curves, strict=True))
        c = process.schedule(t[:count])
        alpha, sigma = (each.to(z.dtype)[:, None, None] for each in (c.alpha, c.sigma))
        # States of one time together; some stand in for rows that a last round lacks, and are dropped.
        states = torch.cat([z, z[: -z.shape[0] % count]]).flatten(1).unflatten(0, (-1, count)).transpose(0, 1)
        distance = (states / sigma)[:, :, None] - (alpha * F / sigma)[:, None]
        weights = (-0.5 * distance.square().sum(3)).softmax(2)
        means = weights @ torch.cat([F, dF], 2)
        first, second = means.transpose(0, 1).flatten(0, 1)[: z.shape[0]].chunk(2, 1)
        return first.reshape(z.shape), second.reshape(z.shape)

    return ProbabilityFlow(process, moments, y.dtype)


def _quantile(u: Tensor) -> Tensor:
    r"""The quantile function of :math:`6\tau(1 - \tau)`: the root of :math:`3\tau^2 - 2\tau^3 = u` in [0, 1]."""
    return 0.5 - torch.sin(torch.asin(1.0 - 2.0 * u) / 3.0)


class Straight(nn.Module):
    r"""Minus the ELBO and :math:`\lambda C`, for ``fit(objective=Straight(...))``.

    With prediction "moments" the velocity is that of the marginals at the optimum, and the transform is what makes it
    straight. With "x" and a transform nonlinear in x the model's flow is that of the one prediction, which the bound
    says little about (see :mod:`ndm_ct.dynamics`).

    The model's flow wants stages of growing strength (``fit`` continues from the weights it is given): where F is still
    the identity a strong penalty makes the flow stand still before the transform has learned to move. The batch's flow
    can be straightened at full strength from the first step.

    Args:
        strength: :math:`\lambda`, nats per squared unit of z.
        bound: the objective C is added to, such as a :class:`~ndm_ct.objectives.Bound`; None is
            :func:`ndm_ct.loss`.
        flow: whose flow is made straight, ``"model"`` or ``"batch"``.

    Raises:
        ValueError: strength is negative or not finite; ``flow`` is neither.

    Example:
        >>> import ndm_ct
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
        >>> Straight(strength=2.0)(model, model.sample_data(5)).shape
        torch.Size([5])
    """

    def __init__(self, strength: float = 1.0, bound: objectives.Bound | None = None, flow: Flow = "model") -> None:
        super().__init__()
        _validate_flow(flow)
        if not (math.isfinite(strength) and strength >= 0.0):
            raise ValueError(f"strength must be a finite number >= 0, got {strength!r}.")
        self.strength, self.bound, self.flow = strength, bound, flow

    def forward(self, model: NDM, x: Tensor, /, *, generator: GeneratorLike = None, **cond: Any) -> Tensor:
        """One estimate per row.

        Args:
            model: the model, in the mode the caller chose.
            x: data, shape ``(B, *E)``.
            generator: source of times and noise.
            cond: conditioning.

        Returns:
            Shape ``(B,)``; its mean is to be minimised.
        """
        generator = as_randomness(generator, len(x), x.device, "Straight")
        bound = objectives.loss if self.bound is None else self.bound
        nats: Tensor = bound(model, x, generator=generator, **cond)
        given = model.validate(x, cond, type(self).forward)
        return nats + self.strength * _curvature(model, x, self.flow, generator, given)

    def describe(self) -> str:
        """Its settings, the same in every process, for a checkpoint to compare."""
        bound = "" if self.bound is None else f", bound={self.bound.describe()}"
        flow = "" if self.flow == "model" else f", flow={self.flow}"
        return f"Straight(strength={self.strength:g}{bound}{flow})"
