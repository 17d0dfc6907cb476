r"""Volatilities: a learned one, :math:`\log \eta(t) = \sum_{k < K} c_k T_k(2t - 1)`, with Chebyshev's polynomials, and
the best one for a transform that scales coordinates, :math:`\eta_i(t) = |1 - 2 (\log a_i)'/\gamma'|`.

:math:`\eta` sets how much noise the reverse SDE takes away and puts back, :math:`g^2 = \eta \sigma^2 \gamma'`. With F
the identity the bound is best at :math:`\eta = 1`, where the coefficients start; with a moving F at

.. math::
    \eta^*(t) = \sqrt{E\|\tfrac12 \Delta F - \Delta \dot F/\gamma'\|^2 \big/ E\|\tfrac12 \Delta F\|^2} ,

so that a learned transform wants a learned volatility, and a fixed one makes it pay for moving. For F = a(t) x that is
the second formula, whatever the data.

References:
    Bartosh, Vetrov and Naesseth, Neural Diffusion Models, https://arxiv.org/abs/2310.08337
"""

import torch
from torch import Tensor, nn

from ndm_ct._config import Configurable
from ndm_ct._shapes import append_axes, validate_count
from ndm_ct.schedules import Schedule
from ndm_ct.transforms import Transform

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
    coordinate has a log-SNR :math:`-\gamma_i` of its own: :math:`\eta_i = \gamma_i'/\gamma'`.

    Example:
        >>> import ndm_ct
        >>> blur = ndm_ct.transforms.Blur((2, 2), blur=1.0, floor=0.2)
        >>> model = ndm_ct.NDM(lambda z, t: z, (2, 2), transform=blur, volatility=Matched())
        >>> model.process.eta(torch.zeros(1, dtype=torch.float64)).shape
        torch.Size([1, 2, 2])
    """

    def __init__(self) -> None:
        super().__init__()
        # Kept out of the submodules: their parameters belong to the model's process.
        self.__dict__["_of"] = None

    def bind(self, transform: Transform, schedule: Schedule) -> None:
        """Take transform and schedule of a model, which its constructor does.

        Raises:
            ValueError: the transform does not scale coordinates of its basis, or this volatility belongs to a model
                with other ones.
        """
        bound = self.__dict__["_of"]
        if bound is not None and (bound[0] is not transform or bound[1] is not schedule):
            raise ValueError("this Matched volatility belongs to another model; make one for each.")
        if not transform.scales:
            raise ValueError(
                f"a Matched volatility needs a transform that scales the coordinates of its basis, which "
                f"{type(transform).__name__} does not; use LearnedVolatility."
            )
        self.__dict__["_of"] = transform, schedule

    def forward(self, t: Tensor) -> Tensor:
        r""":math:`\eta_i(t)`, shape of t, or that followed by axes of the event."""
        bound = self.__dict__["_of"]
        if bound is None:
            raise RuntimeError("this Matched volatility has no model yet; pass it as the volatility of an NDM.")
        transform, schedule = bound
        rate = transform.log_rate(t)
        return (1.0 - 2.0 * rate * append_axes(schedule(t).inverse_dgamma, rate)).abs()
