r"""Networks between data and latents, for :class:`~ndm_ct.transforms.Encoder` and :class:`~ndm_ct.transforms.Flow`.

.. math::
    q(y \mid x) = N(m(x), s(x)^2), \qquad p(x \mid y) = N(\mu(y), r^2 I)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from ndm_ct._core.checks import event_size, validate_count
from ndm_ct._core.config import Configurable

__all__ = ["FromZuko", "GaussianDecoder", "GaussianEncoder"]


def _perceptron(inputs: int, outputs: int, width: int, depth: int) -> nn.Sequential:
    """``depth`` hidden layers of ``width`` units."""
    validate_count("width", width)
    layers: list[nn.Module] = []
    for layer in range(validate_count("depth", depth)):
        layers += [nn.Linear(width if layer else inputs, width), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


class GaussianEncoder(nn.Module, Configurable):
    r"""A perceptron for :math:`q(y \mid x)`.

    Args:
        data_shape: shape of x.
        latent_shape: shape of y.
        width: units of a hidden layer.
        depth: number of hidden layers.

    Example:
        >>> mean, log_std = GaussianEncoder((1, 8, 8), (5,))(torch.zeros(3, 1, 8, 8))
        >>> mean.shape, log_std.shape
        (torch.Size([3, 5]), torch.Size([3, 5]))
    """

    def __init__(
        self, data_shape: Sequence[int], latent_shape: Sequence[int], width: int = 128, depth: int = 2
    ) -> None:
        super().__init__()
        self.data_shape, self.latent_shape = tuple(data_shape), tuple(latent_shape)
        self.width, self.depth = width, depth
        self.net = _perceptron(event_size(data_shape), 2 * event_size(latent_shape), width, depth)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""``(B, *data_shape)`` to :math:`m, \log s`, each ``(B, *latent_shape)``."""
        mean, log_std = self.net(x.flatten(1)).reshape(x.shape[0], 2, *self.latent_shape).unbind(1)
        return mean, log_std


class GaussianDecoder(nn.Module, Configurable):
    r"""A perceptron for :math:`p(x \mid y)`, with one learned standard deviation r.

    Args:
        latent_shape: shape of y.
        data_shape: shape of x.
        width: units of a hidden layer.
        depth: number of hidden layers.

    Example:
        >>> GaussianDecoder((5,), (1, 8, 8))(torch.zeros(3, 5)).log_prob(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3])
    """

    def __init__(
        self, latent_shape: Sequence[int], data_shape: Sequence[int], width: int = 128, depth: int = 2
    ) -> None:
        super().__init__()
        self.latent_shape, self.data_shape = tuple(latent_shape), tuple(data_shape)
        self.width, self.depth = width, depth
        self.net = _perceptron(event_size(latent_shape), event_size(data_shape), width, depth)
        # Small: with r = 1 the first thing learned is to ignore y, from which training does not come back.
        self.log_std = nn.Parameter(torch.tensor(-2.0))

    def forward(self, y: Tensor) -> Distribution:
        """The distribution of x given ``(B, *latent_shape)``."""
        mean = self.net(y.flatten(1)).reshape(y.shape[0], *self.data_shape)
        return Independent(Normal(mean, self.log_std.exp().expand_as(mean)), len(self.data_shape))


class FromZuko(nn.Module):
    """A flow of zuko for :class:`~ndm_ct.transforms.Flow`; the diffusion model takes the place of its base, N(0, I).

    Args:
        flow: for example ``zuko.flows.NSF(features=5)``, over events of shape ``(features,)``.

    Raises:
        ValueError: when it is called and the flow's base is another distribution than N(0, I).
    """

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map data to latents y, and give the log-determinant, ``(B,)``.

        Args:
            x: data, ``(B, features)``.
            context: what the flow is conditioned on, ``(B, ...)``, if it was built with a context.
        """
        y, logdet = self._transform(context).call_and_ladj(x)
        return y, logdet

    def inverse(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Map latents to data.

        Args:
            y: latents, ``(B, features)``.
            context: as the forward call got it.
        """
        return self._transform(context).inv(y)

    def _transform(self, context: Tensor | None) -> Any:
        flow = self.flow(context)
        base = getattr(flow.base, "base_dist", flow.base)
        if not (isinstance(base, Normal) and bool((base.loc == 0.0).all() and (base.scale == 1.0).all())):
            raise ValueError(
                f"the flow's base is {flow.base}, but the diffusion model stands for N(0, I) in its place, so the "
                "density would be another one. Append a transform from this base to N(0, I) to the flow's transforms, "
                "and give it the base zuko.distributions.DiagNormal(zeros, ones)."
            )
        return flow.transform
