r"""One learned factor for every coordinate of a basis: :math:`F(x, t) = V \operatorname{diag}(a_i(t)) V^\top x`.

With the volatility :class:`~ndm_ct.schedules.Matched` this is a diffusion in which every coordinate has a log-SNR of
its own, :math:`\gamma_i = \gamma - 2 \log a_i`. Its end :math:`\gamma_i(1)` moves with :math:`a_i(1)`. Its start
moves by a scaling of the data that comes before, which adds its log-determinant to the density:

.. math::
    y = V \operatorname{diag}(e^{s_i}) V^\top x, \qquad \gamma_i(0) = \gamma(0) - 2 s_i, \qquad
    \log p(x) = \log p(y) + \sum_i s_i .

References:
    Sahoo et al., Diffusion Models With Learned Adaptive Noise (MuLAN; a log-SNR for every coordinate),
    https://arxiv.org/abs/2312.13236
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ndm_ct._core.checks import validate_number
from ndm_ct._core.noise import GeneratorLike
from ndm_ct.transforms.base import Transform
from ndm_ct.transforms.bases import Basis
from ndm_ct.transforms.learned import PolynomialBasis

__all__ = ["LearnedScaling", "PolynomialLogSNR"]


class _Scaling(Transform):
    """A factor for every coordinate of a basis, with a start that may be learned.

    Args:
        event_shape: E.
        basis: V; None is that of the pixels.
        learn_start: whether :math:`s_i` is learned.
    """

    linear = True
    scales = True

    def __init__(self, event_shape: Sequence[int], basis: Basis | None, learn_start: bool) -> None:
        super().__init__()
        self.event_shape, self.basis, self.learn_start = tuple(event_shape), basis, learn_start
        if basis is not None and basis.event_shape != self.event_shape:
            raise ValueError(f"basis is one of events {basis.event_shape}, but event_shape is {self.event_shape}.")
        self.latent = learn_start
        if learn_start:
            self.start = nn.Parameter(torch.zeros(self.event_shape))

    def logs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`\log a_i` and its derivative, float64, of shape ``t.shape + E``."""
        raise NotImplementedError

    def log_rate(self, t: Tensor) -> Tensor:
        return self.logs(t)[1]

    def to_basis(self, y: Tensor) -> Tensor:
        return y if self.basis is None else self.basis(y)

    def from_basis(self, y: Tensor) -> Tensor:
        return y if self.basis is None else self.basis.inverse(y)

    def forward(self, x: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
        return self.from_basis(torch.exp(self.logs(t)[0]).to(x.dtype) * self.to_basis(x))

    def with_derivative(self, x: Tensor, t: Tensor, /, **cond: Any) -> tuple[Tensor, Tensor]:
        log, rate = self.logs(t)
        F = torch.exp(log).to(x.dtype) * self.to_basis(x)
        return self.from_basis(F), self.from_basis(rate.to(x.dtype) * F)

    def to_latent(self, x: Tensor, /, *, generator: GeneratorLike = None, **cond: Any) -> tuple[Tensor, Tensor | None]:
        if not self.learn_start:
            return x, None
        y = self.from_basis(self.start.exp().to(x.dtype) * self.to_basis(x))
        return y, self.start.sum().to(x.dtype).expand(len(x))

    def from_latent(self, y: Tensor, /, **cond: Any) -> Tensor:
        return self.from_basis(torch.exp(-self.start).to(y.dtype) * self.to_basis(y)) if self.learn_start else y


class LearnedScaling(_Scaling):
    r"""One learned factor for every coordinate: :math:`\log a_i = \sum_k c_{ik} t^k`, :math:`a_i(0) = 1`.

    With the volatility :class:`~ndm_ct.schedules.Matched` this is a diffusion with one learned log-SNR per coordinate,
    :math:`\gamma_i = \gamma - 2 \log a_i`.

    Args:
        event_shape: E.
        terms: number of powers of t.
        basis: the orthonormal basis of the coordinates, such as :class:`~ndm_ct.transforms.DCT`; None is that of the
            pixels.
        learn_start: whether :math:`\gamma_i(0)` is learned too, by a scaling of the data. Use it for densities that are
            smooth at the scale of the smallest noise; otherwise the bound improves without limit as it decreases.

    Raises:
        ValueError: a basis of other events.

    Example:
        >>> import ndm_ct
        >>> scaling = LearnedScaling((2,), learn_start=True)
        >>> model = ndm_ct.NDM(lambda z, t: z, (2,), transform=scaling, volatility=ndm_ct.schedules.Matched())
        >>> ndm_ct.elbo(model, torch.randn(3, 2)).shape
        torch.Size([3])
    """

    def __init__(
        self, event_shape: Sequence[int], terms: int = 3, basis: Basis | None = None, learn_start: bool = False
    ) -> None:
        super().__init__(event_shape, basis, learn_start)
        self.terms, self._basis = terms, PolynomialBasis(terms)
        self.coefficients = nn.Parameter(torch.zeros(*self.event_shape, terms))

    def logs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        value, rate = (torch.tensordot(b, self.coefficients.double(), ([-1], [-1])) for b in self._basis(t))
        return value, rate


class PolynomialLogSNR(_Scaling):
    r"""MuLAN's log-SNR for every coordinate, under ``LinearLogSNR(gamma_min, gamma_max)``, with common ends:

    .. math::
        \gamma_i(t) = \gamma_{min} + (\gamma_{max} - \gamma_{min}) \frac{P_i(t)}{P_i(1)}, \qquad
        P_i(t) = \int_0^t (a_i u^2 + b_i u + d_i)^2 du .

    Args:
        event_shape: E.
        gamma_min: :math:`\gamma_i(0)`, that of the model's schedule.
        gamma_max: :math:`\gamma_i(1)`, that of the model's schedule.
        basis: the orthonormal basis of the coordinates; None is that of the pixels.
        learn_start: whether :math:`\gamma_i(0)` moves; see :class:`LearnedScaling`.

    References:
        Sahoo et al., Diffusion Models With Learned Adaptive Noise, https://arxiv.org/abs/2312.13236
    """

    def __init__(
        self, event_shape: Sequence[int], gamma_min: float = -13.3, gamma_max: float = 5.0,
        basis: Basis | None = None, learn_start: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(event_shape, basis, learn_start)
        for name, value in (("gamma_min", gamma_min), ("gamma_max", gamma_max)):
            validate_number(name, value)
        self.gamma_min, self.gamma_max = gamma_min, gamma_max
        initial = torch.tensor([0.0, 0.0, 1.0]).expand(*self.event_shape, 3)
        self.coefficients = nn.Parameter(initial.clone())

    def logs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.reshape(*t.shape, *(1,) * len(self.event_shape))
        a, b, d = self.coefficients.double().unbind(-1)
        slope = (a * t**2 + b * t + d) ** 2
        value, whole = (
            a**2 * u**5 / 5.0 + a * b * u**4 / 2.0 + (b**2 + 2.0 * a * d) * u**3 / 3.0 + b * d * u**2 + d**2 * u
            for u in (t, torch.ones_like(t))
        )
        half = 0.5 * (self.gamma_max - self.gamma_min)
        return half * (t - value / whole), half * (1.0 - slope / whole)
