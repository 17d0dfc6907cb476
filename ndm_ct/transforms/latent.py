r"""Maps between data x and latents y that do not move with time; the process runs over the latents, G = id.

.. math::
    q(z_t \mid x) = E_{q(y \mid x)} N(z_t;\ \alpha_t y,\ \sigma_t^2 I), \qquad
    \log p(x) \ge E_{q(y \mid x)} [\log p(y) + w]

================  =====================================  ==========================================================
:class:`Flow`     y = h(x), invertible                   :math:`w = \log|\det \partial h/\partial x|`; equality
:class:`Encoder`  :math:`y \sim N(m(x), s(x)^2)`         :math:`w = \log p(x \mid y) - \log q(y \mid x)`
================  =====================================  ==========================================================

With p(y) the bound of a diffusion over y these are the objectives of INDM and of LSGM.

References:
    Kim et al., Maximum Likelihood Training of Implicit Nonlinear Diffusion Models (INDM),
    https://arxiv.org/abs/2205.13699
    Vahdat, Kreis and Kautz, Score-based Generative Modeling in Latent Space (LSGM), https://arxiv.org/abs/2106.05931
    Nielsen et al., SurVAE Flows (bijections and encoders in one), https://arxiv.org/abs/2007.02731
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ndm_ct._core.checks import sum_event
from ndm_ct._core.keywords import accepted_by, keyword_names
from ndm_ct._core.noise import GeneratorLike, as_randomness, normal_like
from ndm_ct._core.parallel import unwrapped
from ndm_ct.transforms.base import Identity

__all__ = ["Encoder", "Flow"]


class Flow(Identity):
    r"""Data through an invertible network, :math:`y = h(x)`: INDM.

    Args:
        flow: a module with ``flow(x, **cond) -> (y, log|det dy/dx|)``, of shapes ``(B, *E)`` and ``(B,)``, and
            ``flow.inverse(y, **cond) -> x``; :class:`ndm_ct.nn.FromZuko` makes one of a flow of zuko.

    Raises:
        TypeError: the flow has no ``inverse``, or, when asked, returns no pair.
    """

    latent = True

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        flow = unwrapped(flow)
        if not callable(getattr(flow, "inverse", None)):
            raise TypeError(
                f"flow must have a method inverse(y), got a {type(flow).__name__} without it; wrap a flow of zuko in "
                "ndm_ct.nn.FromZuko."
            )
        self.flow = flow
        self._accepted = keyword_names(flow, 1)

    def cond_names(self) -> tuple[frozenset[str], bool]:
        return self._accepted

    def to_latent(self, x: Tensor, /, *, generator: GeneratorLike = None, **cond: Any) -> tuple[Tensor, Tensor | None]:
        found = self.flow(x, **accepted_by(self._accepted, cond))
        if not (isinstance(found, tuple) and len(found) == 2):
            raise TypeError(
                f"flow(x) returned {type(found).__name__}, expected a pair (y, log|det dy/dx|); wrap a flow of zuko in "
                "ndm_ct.nn.FromZuko."
            )
        return found

    def from_latent(self, y: Tensor, /, **cond: Any) -> Tensor:
        return self.flow.inverse(y, **accepted_by(self._accepted, cond))  # type: ignore[operator]


class Encoder(Identity):
    r"""Data through a stochastic encoder and a decoder: latent diffusion, LSGM.

    Args:
        encoder: ``encoder(x, **cond) -> (m, log s)``, both ``(B, *E)``, E the latents' shape.
        decoder: ``decoder(y, **cond)``, a ``torch.distributions`` object over data with ``batch_shape`` ``(B,)``; its
            mean is what a sample shows.
        data_shape: shape of a data point.
    """

    latent = True
    bijective = False

    def __init__(self, encoder: nn.Module, decoder: nn.Module, data_shape: Sequence[int]) -> None:
        super().__init__()
        self.encoder, self.decoder = unwrapped(encoder), unwrapped(decoder)
        self.data_shape = tuple(int(size) for size in data_shape)
        self._encodes, self._decodes = keyword_names(self.encoder, 1), keyword_names(self.decoder, 1)

    def cond_names(self) -> tuple[frozenset[str], bool]:
        return self._encodes[0] | self._decodes[0], self._encodes[1] or self._decodes[1]

    def to_latent(self, x: Tensor, /, *, generator: GeneratorLike = None, **cond: Any) -> tuple[Tensor, Tensor | None]:
        mean, log_std = self.encoder(x, **accepted_by(self._encodes, cond))
        eps = normal_like(mean, as_randomness(generator, len(x), x.device, "to_latent"))
        y = mean + log_std.exp() * eps
        log_q = -sum_event(0.5 * eps**2 + log_std + 0.5 * math.log(2.0 * math.pi))
        return y, self._decoded(y, cond).log_prob(x) - log_q

    def from_latent(self, y: Tensor, /, **cond: Any) -> Tensor:
        return self._decoded(y, cond).mean

    def _decoded(self, y: Tensor, cond: dict[str, Any]) -> torch.distributions.Distribution:
        return self.decoder(y, **accepted_by(self._decodes, cond))
