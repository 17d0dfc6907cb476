r"""The sampler of flow maps: each step is one evaluation, however long it is.

.. math::
    z_s = X_{t,s}(z_t) = \frac{\sigma_s}{\sigma_t} z_t + \alpha_s (1 - e^{-h}) D(z_t, t, s), \qquad
    h = \lambda_s - \lambda_t

with the mean D of :mod:`ndm_ct.flow_maps`.
"""

from typing import Any

import torch
from torch import Tensor

from ndm_ct._core.noise import Randomness
from ndm_ct.flow_maps import mean_slope, validate_map
from ndm_ct.model import NDM
from ndm_ct.prediction import validate_finite
from ndm_ct.samplers.base import Sampler, exponential_euler
from ndm_ct.schedules.base import Level

__all__ = ["FlowMap"]


class FlowMap(Sampler):
    r"""Steps of a flow map, which are as good as the map is, and not better for more of them.

    Args:
        model: a flow map; see :func:`ndm_ct.presets.progressive_distillation`.

    Raises:
        ValueError: the model is no flow map.

    Example:
        >>> import ndm_ct
        >>> net = ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2, width=8, until=True))
        >>> ndm_ct.sample(ndm_ct.NDM(net, (2,)), 5, method="map", steps=1, generator=0).shape
        torch.Size([5, 2])
    """

    def __init__(self, model: NDM) -> None:
        super().__init__(model)
        validate_map(model)

    def _step(self, z: Tensor, t: Level, s: Level, generator: Randomness, cond: dict[str, Any]) -> Tensor:
        return exponential_euler(z, self._mean(z, t, s.time, cond), t, s)

    def estimate(self, z: Tensor, t: float | Tensor, /, **cond: Any) -> Tensor:
        r"""The end of the map with no noise left on it, :math:`D(z, t, t_{min})`: at :math:`\sigma_s = 0` A is zero."""
        end = torch.tensor(self.model.t_min, dtype=torch.float64, device=z.device)
        return self._mean(z, self.level(t), end, cond)

    def _mean(self, z: Tensor, t: Level, s: Tensor, cond: dict[str, Any]) -> Tensor:
        self.evaluations += 1
        D = mean_slope(self.model, z, t.time.expand(len(z)), s.expand(len(z)), **cond)
        validate_finite(D, t.time)
        return D
