r"""What an observation says of a noisy state: :math:`h(z, t) \approx p(y \mid z_t = z)` and its gradient.

With :math:`y = f(x) + s\,\epsilon`, the prediction :math:`\hat x` and :math:`J = \partial f/\partial x` at it,

.. math::
    h(z, t) = N\bigl(y;\ f(\hat x),\ M\bigr), \qquad M = s^2 I + J C J^\top, \qquad
    \nabla_z \log h \approx \Bigl(\frac{\partial \hat x}{\partial z}\Bigr)^\top J^\top M^{-1} (y - f(\hat x)) ,

where C stands for the covariance of x given z: :math:`\frac{\sigma^2 u^2}{\sigma^2 + \alpha^2 u^2} I` for "pigdm", with
the unit u of the data, and :math:`\frac{\sigma^2}{\alpha} \frac{\partial \hat x}{\partial z}` (Tweedie's formula) for
"mmps". For linear f and normal x the second is exact.

References:
    Song et al., Pseudoinverse-Guided Diffusion Models, https://openreview.net/forum?id=9_gsMA8MRKQ
    Rozet et al., Learning Diffusion Priors from Observations by Expectation Maximization (moment matching),
    https://arxiv.org/abs/2405.13712
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ndm_ct.model import NDM
from ndm_ct.prediction import validate_finite
from ndm_ct.schedules.base import Level
from ndm_ct.transforms import Identity, TimeScaling

__all__ = ["Observation", "Twist", "has_tweedie"]


@dataclass(frozen=True)
class Observation:
    """y = f(x) + std · noise.

    Args:
        function: f, ``(B, *E)`` to ``(B, ...)``.
        y: what was observed, flat, ``(m,)``.
        std: standard deviation of the noise, ``(m,)``.
    """

    function: Callable[[Tensor], Tensor]
    y: Tensor
    std: Tensor

    def values(self, x: Tensor) -> Tensor:
        """f(x), flat, ``(B, m)``. Raises ValueError if it does not fit y."""
        values = self.function(x)
        if not isinstance(values, Tensor) or len(values) != len(x) or values[0].numel() != self.y.numel():
            came = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"observe returned {came} for {len(x)} rows and y has {self.y.numel()} values; expected a tensor with "
                "that many values per row."
            )
        return values.reshape(len(x), -1)

    def log_prob(self, x: Tensor) -> Tensor:
        r""":math:`\log p(y \mid x)`, nats, float64, ``(B,)``."""
        scaled = (self.y - self.values(x)).double() / self.std
        return -0.5 * scaled.square().sum(1) - self.std.log().sum() - 0.5 * len(self.std) * math.log(2.0 * math.pi)


@dataclass(frozen=True)
class Twist:
    r"""The prediction at a state and what the observation says of it.

    Args:
        x: :math:`\hat x`, ``(B, *E)``.
        gradient: :math:`\nabla_z \log h`, ``(B, *E)``; for "dps" of minus the distance from y to f(x̂).
        log_h: :math:`\log h`, nats, float64, ``(B,)``; NaN for "dps".
    """

    x: Tensor
    gradient: Tensor
    log_h: Tensor

    @classmethod
    def at(cls, model: NDM, seen: Observation, kind: str, z: Tensor, level: Level, cond: dict[str, Any]) -> "Twist":
        """Evaluate it at states z ``(B, *E)``."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            x = model.predict_x(z, level.time, **cond)
            validate_finite(x.detach(), level.time)
            if kind == "dps":
                distance = torch.linalg.vector_norm(seen.y - seen.values(x), dim=1)
                return cls(x.detach(), _pulled(-distance.sum(), z, z), torch.full_like(distance, math.nan).detach())
            at = x.detach().requires_grad_()
            values = seen.values(at)
            rows = [_pulled(values[:, i].sum(), at, at) for i in range(values.shape[1])]
            jacobian = torch.stack(rows, 1).flatten(2).double()
            residual = (seen.y - values.detach()).double()
            if kind == "pigdm":
                solved, log_h = _normal(residual, _isotropic(model, level) * jacobian @ jacobian.mT, seen.std)
                back = torch.einsum("bi,bid->bd", solved, jacobian).reshape(x.shape).to(x.dtype)
                return cls(x.detach(), _pulled((x * back).sum(), z, z), log_h)
            through = torch.stack([_pulled((x * row).sum(), z, z) for row in rows], 1).flatten(2).double()
            solved, log_h = _normal(residual, _gain(model, z, level) * through @ jacobian.mT, seen.std)
            gradient = torch.einsum("bi,bid->bd", solved, through).reshape(z.shape).to(z.dtype)
            return cls(x.detach(), gradient, log_h)


def has_tweedie(model: NDM) -> bool:
    """Whether the covariance of x given z follows from the derivative of the prediction."""
    return isinstance(model.transform, Identity | TimeScaling) and model.noise_scale is None


def _pulled(output: Tensor, state: Tensor, like: Tensor) -> Tensor:
    """The derivative of a sum over rows; zero where it does not depend on the state."""
    if not output.requires_grad:
        return torch.zeros_like(like)
    (gradient,) = torch.autograd.grad(output, state, retain_graph=True, allow_unused=True)
    return torch.zeros_like(like) if gradient is None else gradient


def _isotropic(model: NDM, level: Level) -> float:
    unit = model.unit**2
    return level.sigma**2 * unit / (level.sigma**2 + level.alpha**2 * unit)


def _gain(model: NDM, z: Tensor, level: Level) -> Tensor:
    r""":math:`\sigma^2/(\alpha a)`, where F = a(t) x; 0 where alpha = 0, where the prediction does not depend on z."""
    factor = model.transform(torch.ones_like(z[:1]), level.time.expand(1)).flatten()[0].double() * level.alpha
    return torch.where(factor == 0.0, 0.0, level.sigma**2 / factor)


def _normal(residual: Tensor, spread: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`M^{-1} r` and :math:`\log N(r; 0, M)` for :math:`M = s^2 + ` ``spread``, of which the symmetric,
    positive part is taken."""
    scaled = 0.5 * (spread + spread.mT) / std[:, None] / std
    values, basis = torch.linalg.eigh(scaled)
    values = values.clamp(min=0.0) + 1.0
    inside = torch.einsum("bij,bi->bj", basis, residual / std)
    solved = torch.einsum("bij,bj->bi", basis, inside / values) / std
    log_det = values.log().sum(1) + 2.0 * std.log().sum()
    return solved, -0.5 * ((inside.square() / values).sum(1) + log_det + len(std) * math.log(2.0 * math.pi))
