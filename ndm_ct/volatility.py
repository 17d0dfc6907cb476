r"""A learned volatility, :math:`\log \eta(t) = \sum_{k < K} c_k T_k(2t - 1)`, with Chebyshev's polynomials.

:math:`\eta` sets how much noise the reverse SDE takes away and puts back, :math:`g^2 = \eta \sigma^2 \gamma'`. With F
the identity the bound is best at :math:`\eta = 1`, where the coefficients start; with a moving F at

.. math::
    \eta^*(t) = \sqrt{E\|\tfrac12 \Delta F - \Delta \dot F/\gamma'\|^2 \big/ E\|\tfrac12 \Delta F\|^2} ,

so that a learned transform wants a learned volatility, and a fixed one makes it pay for moving.

References:
    Bartosh, Vetrov and Naesseth, Neural Diffusion Models, https://arxiv.org/abs/2310.08337
"""

import torch
from torch import Tensor, nn

from ndm_ct._config import Configurable
from ndm_ct._shapes import validate_count

__all__ = ["LearnedVolatility"]


class LearnedVolatility(nn.Module, Configurable):
    r"""A positive smooth function of time with K parameters, for ``NDM(volatility=)``.

    Args:
        terms: K.

    Example:
        >>> eta = LearnedVolatility(4)
        >>> eta(torch.linspace(0, 1, 3))
        tensor([1., 1., 1.], grad_fn=<ExpBackward0>)
    """

    def __init__(self, terms: int = 6) -> None:
        super().__init__()
        self.terms = validate_count("terms", terms)
        self.coefficients = nn.Parameter(torch.zeros(terms))

    def forward(self, t: Tensor) -> Tensor:
        r""":math:`\eta(t)`, shape of t."""
        k = torch.arange(self.terms, dtype=t.dtype, device=t.device)
        angle = torch.arccos((2.0 * t - 1.0).clamp(-1.0, 1.0))
        return torch.exp((torch.cos(k * angle[..., None]) * self.coefficients).sum(-1))
