r"""Learned transforms: :math:`F(x, t) = x + t\,\mathrm{net}(x, t)`, :math:`x + \sum_k b_k(t) f_k(x)`, or DiffEnc's
:math:`\alpha^2 x + \sigma^2 y(x, t)`.

References:
    Bartosh, Vetrov and Naesseth, Neural Diffusion Models, https://arxiv.org/abs/2310.08337
    Nielsen, Christensen, Dittadi and Winther, DiffEnc, https://arxiv.org/abs/2310.19789
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ndm_ct._core.checks import expand, validate_count
from ndm_ct._core.config import Configurable
from ndm_ct._core.keywords import accepted_by, keyword_names
from ndm_ct._core.parallel import unwrapped
from ndm_ct._core.precision import run_network
from ndm_ct.transforms.base import Network, NetworkInTime, Path, Transform

__all__ = ["DataEncoder", "Neural", "PolynomialBasis", "Separable"]


class Neural(NetworkInTime, Transform):
    r""":math:`F(x, t) = (1 - t) x + t \bar F(x, t)` with :math:`\bar F = x + \mathrm{net}(x, t)`.

    That is :math:`F = x + t\,\mathrm{net}(x, t)` and
    :math:`\dot F = \mathrm{net} + t\,\partial_t \mathrm{net}`. A network that returns zero gives the identity.

    The derivative is exact, by forward mode; a network that has none (LSTM, GRU, batch statistics) is differentiated
    twice backwards. In training it costs about four times the forward and backward pass of the
    network, and a :class:`Separable` transform of the same network about once (``benchmarks/training_cost.py``), so
    prefer that one where cost matters. A central difference in time would be cheaper, but its rounding error would bias
    the bound.

    Args:
        net: ``net(x, t, **cond) -> (B, *E)`` with t of shape ``(B,)``.
    """

    starts_at_data = True

    def forward(self, x: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
        return x + expand(t, x) * self._net(x, t, cond)

    def with_derivative(self, x: Tensor, t: Tensor, /, **cond: Any) -> tuple[Tensor, Tensor]:
        net, dnet = self._net_with_derivative(x, t, cond)
        time = expand(t, x)
        return x + time * net, net + time * dnet


class PolynomialBasis(Configurable):
    r""":math:`b_k(t) = t^k`, k = 1 ... terms; zero at t = 0.

    Args:
        terms: number of functions K.
    """

    def __init__(self, terms: int = 2) -> None:
        self.terms = validate_count("terms", terms)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Values and derivatives, each of shape ``t.shape + (terms,)``."""
        k = torch.arange(1, self.terms + 1, dtype=t.dtype, device=t.device)
        return t[..., None] ** k, k * t[..., None] ** (k - 1)


class Separable(Transform):
    r""":math:`F(x, t) = x + \sum_k b_k(t) f_k(x)`, so :math:`\dot F = \sum_k b_k'(t) f_k(x)` costs no derivative.

    Args:
        features: ``features(x, **cond) -> (B, K, *E)``, all :math:`f_k` at once; zero features give the identity.
        basis: the :math:`b_k`, returning values and derivatives; K terms, :math:`b_k(0) = 0`.
    """

    def __init__(self, features: Callable[..., Tensor], basis: PolynomialBasis | None = None) -> None:
        super().__init__()
        self.features = unwrapped(features)
        self.basis = PolynomialBasis() if basis is None else basis
        self._accepted = keyword_names(self.features, 1)

    def cond_names(self) -> tuple[frozenset[str], bool]:
        return self._accepted

    def forward(self, x: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
        return self.along(x, **cond)(t)

    def with_derivative(self, x: Tensor, t: Tensor, /, **cond: Any) -> tuple[Tensor, Tensor]:
        return self.along(x, **cond).with_derivative(t)

    def along(self, x: Tensor, /, **cond: Any) -> Path:
        return _SeparablePath(x, self._features(x, cond), self.basis)

    def _features(self, x: Tensor, cond: dict[str, Any]) -> Tensor:
        features = run_network(self.features, x, **accepted_by(self._accepted, cond))
        expected = (x.shape[0], self.basis.terms, *x.shape[1:])
        came = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else f"type {type(features).__name__}"
        if came != f"shape {expected}":
            raise ValueError(
                f"features(x) has {came}, expected a tensor of shape {expected}: (B, K, *event) with "
                f"K = {self.basis.terms} terms of the basis; torch.stack(features, 1) makes one of a list."
            )
        return features


@dataclass(frozen=True)
class _SeparablePath:
    r""":math:`t \mapsto x + \sum_k b_k(t) f_k`, the features evaluated once."""

    x: Tensor
    features: Tensor
    basis: PolynomialBasis

    def __call__(self, t: Tensor, /) -> Tensor:
        return self.x + _mix(self.basis(t)[0], self.features)

    def with_derivative(self, t: Tensor, /) -> tuple[Tensor, Tensor]:
        value, rate = self.basis(t)
        return self.x + _mix(value, self.features), _mix(rate, self.features)


def _mix(weights: Tensor, features: Tensor) -> Tensor:
    r""":math:`\sum_k b_k f_k` for b of shape ``(K,)`` or ``(B, K)`` and f of shape ``(B, K, *E)``."""
    weights = weights.to(dtype=features.dtype, device=features.device).expand(features.shape[0], -1)
    return torch.einsum("bk,bk...->b...", weights, features)


class DataEncoder(NetworkInTime, Transform):
    r"""DiffEnc's encoder, :math:`F(x, t) = \alpha_t^2 x + \sigma_t^2 y(x, t)`.

    The schedule of the model has to be ``LinearLogSNR(gamma_min, gamma_max)``. At t = 0 F differs from x by
    :math:`\sigma_0^2 (y - x)`, where :math:`\sigma_0^2 = 1.7 \cdot 10^{-6}` unless ``gamma_min`` is given.

    Args:
        net: y, ``net(x, t, **cond) -> (B, *E)`` with t of shape ``(B,)``.
        gamma_min: :math:`\gamma(0)`, that of the model's schedule.
        gamma_max: :math:`\gamma(1)`, that of the model's schedule.

    References:
        Nielsen, Christensen, Dittadi and Winther, DiffEnc, https://arxiv.org/abs/2310.19789
    """

    def __init__(self, net: Network, gamma_min: float = -13.3, gamma_max: float = 5.0) -> None:
        super().__init__(net)
        self.gamma_min, self.gamma_max = gamma_min, gamma_max

    def forward(self, x: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
        share = expand(self._shares(t)[0], x)
        return x + share * (self._net(x, t, cond) - x)

    def with_derivative(self, x: Tensor, t: Tensor, /, **cond: Any) -> tuple[Tensor, Tensor]:
        net, dnet = self._net_with_derivative(x, t, cond)
        share, rate = (expand(each, x) for each in self._shares(t))
        return x + share * (net - x), rate * (net - x) + share * dnet

    def _shares(self, t: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`\sigma^2` and its derivative :math:`\gamma' \alpha^2 \sigma^2`."""
        span = self.gamma_max - self.gamma_min
        share = torch.sigmoid(self.gamma_min + span * t)
        return share, span * share * (1.0 - share)
