r"""Flow maps: where the probability flow takes a state in one long step.

.. math::
    X_{t,s}(z) = A z + B\, D(z, t, s), \qquad A = \frac{\sigma_s}{\sigma_t}, \quad B = \alpha_s - A \alpha_t .

If D were constant along the path, this would be the exact solution of the flow (:mod:`ndm_ct.samplers.base`). So
D(z, t, s) is the mean of the model's D over the path from (z, t) to time s,

.. math::
    D(z, t, s) = \frac{1}{\kappa_s - \kappa_t} \int_{\kappa_t}^{\kappa_s} D(z_u, u)\, d\kappa_u, \qquad
    \kappa = \frac{\alpha}{\sigma}, \qquad D(z, t, t) = D(z, t),

and every D(z, t, s) is finite, at both ends of time. A flow map is a model whose network takes the condition ``until``,
the time s; without it s is t, so that ``loglik`` and all other methods take the model for what it is at s = t.

Two steps are one step with a mean of their D, which needs no division by a small difference:

.. math::
    X_{u,s}(X_{t,u}(z)) = A z + B\,[w D_1 + (1 - w) D_2], \qquad
    w = \frac{\kappa_u - \kappa_t}{\kappa_s - \kappa_t}, \quad
    D_1 = D(z, t, u), \quad D_2 = D(X_{t,u}(z), u, s) .

The mean velocity is another way to say the same, :math:`X_{t,s}(z) = z + (s - t)\, U(z, t, s)`. It satisfies

.. math::
    U = v - (t - s) \bigl(\partial_t U + (\nabla_z U)\, v\bigr) .

References:
    Boffi, Albergo and Vanden-Eijnden, Flow Map Matching, https://arxiv.org/abs/2406.07507
    Kim et al., Consistency Trajectory Models, https://arxiv.org/abs/2310.02279
    Geng et al., Mean Flows for One-step Generative Modeling, https://arxiv.org/abs/2505.13447
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ndm_ct._core.checks import expand
from ndm_ct.model import NDM
from ndm_ct.schedules.base import Coefficients

__all__ = ["carry", "mean_slope", "mean_velocity", "mixed", "slope", "validate_map"]


def validate_map(model: NDM) -> None:
    """Raise unless a model is a flow map.

    Raises:
        ValueError: its network takes no ``until``; its transform moves with time; it predicts "moments".
    """
    if not model.is_map:
        raise ValueError(
            "the model is no flow map: its network does not take the condition 'until', the time at which a step ends. "
            "Build the network with until=True, or take one of presets.progressive_distillation, "
            "presets.consistency_trajectory and presets.mean_flow."
        )
    if model.prediction == "moments" or not model.process.ordinary:
        raise ValueError(
            "a flow map predicts D itself, so its transform must not move with time and its prediction must not be "
            f"'moments'; got {type(model.transform).__name__} and prediction={model.prediction!r}. The transform that "
            "was learned stays in the teacher."
        )


def slope(model: NDM, z: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
    r"""D(z, t) of the model's flow, :math:`\hat F + \hat{\dot F}/\lambda'` with :math:`\lambda = \log\alpha/\sigma`.

    Args:
        model: any model, a flow map or not.
        z: states, ``(B, *E)``.
        t: their times, float64, ``(B,)``.
        cond: conditioning.
    """
    F, dF = model.moments(z, t, **cond)
    return F if model.process.ordinary else F - expand(2.0 * model.schedule(t).inverse_dgamma, z) * dF


def mean_slope(model: NDM, z: Tensor, t: Tensor, s: Tensor, /, **cond: Any) -> Tensor:
    """D(z, t, s) of a flow map; of any other model D(z, t), which is the step of DDIM.

    Args:
        model: the model.
        z: states, ``(B, *E)``.
        t: their times, float64, ``(B,)``.
        s: the times stepped to, ``(B,)``.
        cond: conditioning.
    """
    if not model.is_map:
        return slope(model, z, t, **cond)
    return model.predict_x(z, t, until=s.to(z.dtype), **cond)


def carry(z: Tensor, D: Tensor, t: Coefficients, s: Coefficients) -> Tensor:
    """:math:`A z + B D`, where each row has its own times.

    Args:
        z: states, ``(B, *E)``.
        D: the mean of D, ``(B, *E)``.
        t: the schedule where they are.
        s: the schedule where they go.
    """
    A = s.sigma / t.sigma
    return expand(A, z) * z + expand(s.alpha - A * t.alpha, z) * D


def mixed(first: Tensor, second: Tensor, t: Coefficients, u: Coefficients, s: Coefficients) -> Tensor:
    """:math:`w D_1 + (1 - w) D_2`, the D of two steps, from t to u and from u to s; :math:`D_1` where t = s.

    Args:
        first: :math:`D_1`, ``(B, *E)``.
        second: :math:`D_2`, ``(B, *E)``.
        t: the schedule at the start.
        u: the schedule between.
        s: the schedule at the end.
    """
    behind = s.alpha - s.sigma / u.sigma * u.alpha
    ahead = s.sigma / u.sigma * (u.alpha - u.sigma / t.sigma * t.alpha)
    whole = ahead + behind
    share = torch.where(whole > 0.0, behind / whole, 0.0)
    return first + expand(share, first) * (second - first)


def mean_velocity(model: NDM, s: Tensor, /, **cond: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """U(z, t, s) as a function of z and t < 1, at fixed ends.

    Args:
        model: a flow map.
        s: the ends, float64, ``(B,)``; where s is t the velocity is that of the model's flow.
        cond: conditioning.
    """
    end = model.schedule(s)

    def mean(z: Tensor, t: Tensor) -> Tensor:
        D = mean_slope(model, z, t, s, **cond)
        here, length = model.schedule(t), s - t
        moved = length != 0.0
        over = torch.where(moved, length, 1.0)
        A = end.sigma / here.sigma
        first = torch.where(moved, (A - 1.0) / over, here.dlog_sigma)
        second = torch.where(moved, (end.alpha - A * here.alpha) / over, here.dalpha - here.alpha * here.dlog_sigma)
        return expand(first, z) * z + expand(second, z) * D

    return mean
