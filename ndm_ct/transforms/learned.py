r"""Learned transforms: :math:`F(x, t) = x + t\,\mathrm{net}(x, t)`, :math:`x + \sum_k b_k(t) f_k(x)`, or one learned
factor for every coordinate.

References:
    Bartosh, Vetrov and Naesseth, Neural Diffusion Models, https://arxiv.org/abs/2310.08337
    Sahoo et al., Diffusion Models With Learned Adaptive Noise (MuLAN; a log-SNR for every coordinate),
    https://arxiv.org/abs/2312.13236
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ndm_ct._core.checks import expand, expand_time, validate_count
from ndm_ct._core.config import Configurable
from ndm_ct._core.keywords import accepted_by, keyword_names
from ndm_ct._core.parallel import unwrapped
from ndm_ct._core.precision import run_network
from ndm_ct.transforms.base import Network, Path, Transform, jvp_in_time

__all__ = ["LearnedScaling", "Neural", "PolynomialBasis", "Separable"]


class Neural(Transform):
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

    def __init__(self, net: Network) -> None:
        super().__init__()
        self.net = unwrapped(net)
        self._accepted = keyword_names(self.net, 2)

    def cond_names(self) -> tuple[frozenset[str], bool]:
        return self._accepted

    def forward(self, x: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
        return x + expand(t, x) * self._net(x, expand_time(t, x), cond)

    def with_derivative(self, x: Tensor, t: Tensor, /, **cond: Any) -> tuple[Tensor, Tensor]:
        net, dnet = jvp_in_time(lambda time: self._net(x, time, cond), expand_time(t, x), self.derivatives)
        time = expand(t, x)
        return x + time * net, net + time * dnet

    def _net(self, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        return run_network(self.net, x, t, **accepted_by(self._accepted, cond))


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


class LearnedScaling(Transform):
    r"""One learned factor for every coordinate: :math:`F_i(x, t) = a_i(t)\, x_i`, :math:`\log a_i = \sum_k c_{ik} t^k`.

    With the volatility :class:`~ndm_ct.schedules.Matched` this is a diffusion with one learned log-SNR per coordinate,
    :math:`\gamma_i = \gamma - 2 \log a_i`.

    Args:
        event_shape: E.
        terms: number of powers of t.
    """

    linear = True
    scales = True

    def __init__(self, event_shape: Sequence[int], terms: int = 3) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.terms, self._basis = terms, PolynomialBasis(terms)
        self.coefficients = nn.Parameter(torch.zeros(*self.event_shape, terms))

    def forward(self, x: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
        return torch.exp(self._logs(t)[0]).to(x.dtype) * x

    def with_derivative(self, x: Tensor, t: Tensor, /, **cond: Any) -> tuple[Tensor, Tensor]:
        log, rate = self._logs(t)
        F = torch.exp(log).to(x.dtype) * x
        return F, rate.to(x.dtype) * F

    def log_rate(self, t: Tensor) -> Tensor:
        return self._logs(t)[1]

    def _logs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`\log a_i` and its derivative, float64, ``t.shape + E``."""
        value, rate = (torch.tensordot(b, self.coefficients.double(), ([-1], [-1])) for b in self._basis(t))
        return value, rate
