r"""Where the nodes of the quadrature lie along a path of the probability flow.

.. math::
    \log\left|\det \frac{\partial z_1}{\partial z_{t_{min}}}\right|
    = d \log \frac{\sigma_1}{\sigma_{t_{min}}} + \int_0^1 \operatorname{tr} J(t(u))\, \frac{dt}{du}\, du, \qquad
    J = \frac{\partial}{\partial z}
    \Bigl[\Bigl(\alpha' - \frac{\alpha \sigma'}{\sigma}\Bigr) \hat F + \alpha \hat{\dot F}\Bigr]_{z_t} .

The first term is exact. Where :math:`\sigma(t_{min}) = 0`, which only a network that is the velocity allows, it is that
of :class:`~ndm_ct.dynamics.NetworkFlow`, and u runs as if the path began at ``t_noise``, with times stretched to
``t_min``. In the second u runs evenly through

.. math::
    -\operatorname{arsinh}(\rho^* / \rho_t), \qquad \rho_t = \sigma_t / \alpha_t,

which is the logarithm of the noise below :math:`\rho^*`. Above it, where the trace is small and :math:`\rho_1` may be
infinite, it is :math:`-\rho^*/\rho`. The turn :math:`\rho^*` is the schedule's ``preserved_std``. For
variance-preserving schedules u is then :math:`\log\tan(\theta/2)`, with :math:`\theta = \arctan\rho`. Where
``preserved_std`` is infinite, :math:`\rho^* = 10 \rho_1`, and u is the log-SNR all the way. The nodes and probes are
those of :class:`~ndm_ct.divergence.Quadrature`.
"""

import math

import torch
from torch import Tensor

from ndm_ct._core.checks import as_time, event_size
from ndm_ct.model import NDM

__all__ = ["linear_logdet", "noise_scale", "path_times"]


def linear_logdet(model: NDM, device: torch.device) -> Tensor:
    r""":math:`d \log(\sigma_1/\sigma_{t_{min}})`: the log-determinant of the part of the flow that is linear in z."""
    first, last = noise_scale(model, as_time([model.t_min, 1.0], device))
    return event_size(model.event_shape) * (last / first).log()


def noise_scale(model: NDM, t: Tensor) -> Tensor:
    r""":math:`\sigma_t`, or :math:`\sqrt{\sigma_t^2 + \sigma_f^2}` where :math:`\sigma(t_{min}) = 0`."""
    sigma = model.schedule(t).sigma
    if model.t_noise == model.t_min:
        return sigma
    return torch.hypot(sigma, model.schedule(torch.full_like(t, model.t_noise)).sigma)


def path_times(model: NDM, u: Tensor) -> tuple[Tensor, Tensor]:
    """t and dt/du of places u in [0, 1] along the path."""
    schedule = model.schedule
    with torch.no_grad():
        first, stretch = model.t_noise, (1.0 - model.t_min) / (1.0 - model.t_noise)
        ends = schedule(as_time([first, 1.0], u.device))
        preserved = schedule.preserved_std
        turn = (
            torch.full_like(ends.sigma[1], preserved) if preserved < math.inf else 10.0 * ends.sigma[1] / ends.alpha[1]
        )
        start, end = torch.asinh(turn * ends.alpha / ends.sigma)
        # By exp: torch's sinh and hypot round a number by its place in the tensor, and so by the rows beside it.
        factor = torch.exp(start + (end - start) * u)
        t = schedule.time_at(torch.atan(2.0 * turn / (factor - 1.0 / factor))).clamp(first, 1.0)
        c = schedule(t)
        slope = turn * c.wronskian / (c.sigma * torch.sqrt(c.sigma**2 + (turn * c.alpha) ** 2))
        slope = (start - end) / slope
        return (t, slope) if first == model.t_min else (model.t_min + stretch * (t - first), stretch * slope)
