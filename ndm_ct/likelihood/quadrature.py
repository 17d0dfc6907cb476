r"""Where the nodes of the quadrature lie along a path of the probability flow.

.. math::
    \log\left|\det \frac{\partial z_1}{\partial z_{t_{min}}}\right|
    = d \log \frac{\sigma_1}{\sigma_{t_{min}}} + \int_0^1 \operatorname{tr} J(t(u))\, \frac{dt}{du}\, du, \qquad
    J = \frac{\partial}{\partial z}
    \Bigl[\Bigl(\alpha' - \frac{\alpha \sigma'}{\sigma}\Bigr) \hat F + \alpha \hat{\dot F}\Bigr]_{z_t} .

The first term is exact. In the second u runs evenly through

.. math::
    \log \tan \tfrac12 \theta_t, \qquad \theta_t = \arctan(\sigma_t / \alpha_t),

half the log-SNR where there is little noise, the angle where there is little signal (there log-SNRs may be infinite,
and the trace is small). The nodes and probes are those of :class:`~ndm_ct.divergence.Quadrature`.
"""

import torch
from torch import Tensor

from ndm_ct._core.checks import as_time, event_size
from ndm_ct.model import NDM

__all__ = ["linear_logdet", "path_times"]


def linear_logdet(model: NDM, device: torch.device) -> Tensor:
    r""":math:`d \log(\sigma_1/\sigma_{t_{min}})`: the log-determinant of the part of the flow that is linear in z."""
    sigma = model.schedule(as_time([model.t_min, 1.0], device)).sigma
    return event_size(model.event_shape) * (sigma[1] / sigma[0]).log()


def path_times(model: NDM, u: Tensor) -> tuple[Tensor, Tensor]:
    """t and dt/du of places u in [0, 1] along the path."""
    schedule = model.schedule
    with torch.no_grad():
        start, end = (schedule(as_time([model.t_min, 1.0], u.device)).angle / 2.0).tan().log()
        angle = 2.0 * torch.atan(torch.exp(start + (end - start) * u))
        t = schedule.time_at(angle).clamp(model.t_min, 1.0)
        return t, (end - start) * angle.sin() / schedule(t).dangle
