r"""Volatilities: a learned one, :math:`\log \eta(t) = \sum_{k < K} c_k T_k(2t - 1)`, with Chebyshev's polynomials, and
the best one for a transform that scales coordinates, :math:`\eta_i(t) = |1 - 2 (\log a_i)'/\gamma'|`.

:math:`\eta` sets how much noise the reverse SDE takes away and puts back, :math:`g^2 = \eta \sigma^2 \gamma'`. With F
the identity the bound is best at :math:`\eta = 1`, where the coefficients start; with a moving F at

.. math::
    \eta^*(t) = \sqrt{E\|\tfrac12 \Delta F - \Delta \dot F/\gamma'\|^2 \big/ E\|\tfrac12 \Delta F\|^2} ,

so a learned transform needs a learned volatility; with a fixed one the bound penalises its motion. For F = a(t) x this
is the second formula, for any data.

References:
    Bartosh, Vetrov and Naesseth, Neural Diffusion Models, https://arxiv.org/abs/2310.08337
"""

import torch
from torch import Tensor, nn

from ndm_ct._core.checks import append_axes, validate_count
from ndm_ct._core.config import Configurable

__all__ = ["LearnedVolatility", "Matched"]


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


class Matched(nn.Module, Configurable):
    r""":math:`\eta_i(t) = |1 - 2 (\log a_i)'/\gamma'|`, :math:`a_i` the factors of the model's transform.

    With it a scaling of single coordinates, :math:`a_i = e^{(\gamma - \gamma_i)/2}`, is a diffusion in which every
    coordinate has its own log-SNR :math:`-\gamma_i`: :math:`\eta_i = \gamma_i'/\gamma'`.

    Example:
        >>> import ndm_ct
        >>> blur = ndm_ct.transforms.Blur((2, 2), blur=1.0, floor=0.2)
        >>> model = ndm_ct.NDM(lambda z, t: z, (2, 2), transform=blur, volatility=Matched())
        >>> model.process.eta(torch.zeros(1, dtype=torch.float64)).shape
        torch.Size([1, 2, 2])
    """

    def forward(self, t: Tensor, log_rate: Tensor, inverse_dgamma: Tensor) -> Tensor:
        r""":math:`\eta_i(t)`, shape of t, or that followed by axes of the event.

        Args:
            t: times; the other two arguments belong to them.
            log_rate: :math:`(\log a_i)'`, from the transform.
            inverse_dgamma: :math:`1/\gamma'`, from the schedule.
        """
        return (1.0 - 2.0 * log_rate * append_axes(inverse_dgamma, log_rate)).abs()
