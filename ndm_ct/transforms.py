r"""Forward transforms: :math:`F_\varphi(x, t)` and :math:`\dot F = \partial F/\partial t` at fixed x.

.. math::
    q(z_t \mid x) = N(\alpha_t F_\varphi(x, t),\ \sigma_t^2 I)

F need not be invertible. All transforms here have :math:`F(x, 0) = x`, so the reconstruction term of the ELBO and the
bins of integer data do not depend on :math:`\varphi`.

References:
    Bartosh, Vetrov and Naesseth, Neural Diffusion Models, https://arxiv.org/abs/2310.08337
    Hoogeboom and Salimans, Blurring Diffusion Models, https://arxiv.org/abs/2209.05557
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ndm_ct._autodiff import jvp
from ndm_ct._config import Configurable
from ndm_ct._shapes import expand, expand_time, keyword_names, of_time, validate_count

__all__ = ["Blur", "Composed", "Identity", "Neural", "Path", "PolynomialBasis", "Separable", "TimeScaling", "Transform"]


class Network(Protocol):
    """A network of data and time, ``(x (B, *E), t (B,), **cond) -> (B, *E)``."""

    def __call__(self, x: Tensor, t: Tensor, /, **cond: Any) -> Tensor: ...


class Path(Protocol):
    r"""The curve :math:`t \mapsto F(x, t)` of fixed data."""

    def __call__(self, t: Tensor, /) -> Tensor:
        """F(x, t)."""
        ...

    def with_derivative(self, t: Tensor, /) -> tuple[Tensor, Tensor]:
        """F(x, t) and its time derivative."""
        ...


@dataclass(frozen=True)
class _Evaluated:
    """The path of a transform that evaluates everything anew at every t."""

    transform: "Transform"
    x: Tensor
    cond: dict[str, Any]

    def __call__(self, t: Tensor, /) -> Tensor:
        return self.transform(self.x, t, **self.cond)

    def with_derivative(self, t: Tensor, /) -> tuple[Tensor, Tensor]:
        return self.transform.with_derivative(self.x, t, **self.cond)


class Transform(nn.Module, Configurable):
    r"""A map :math:`F(x, t)`. Subclasses implement ``forward`` and, where they know it, the time derivative.

    Args of every method:
        x: data, shape ``(B, *E)``.
        t: time, float64, shape ``()`` or ``(B,)``.
        cond: conditioning; a transform takes the keywords its network names and ignores the predictor's.
    """

    linear: bool = False
    """Whether F is linear in x; then the probability flow and the reverse SDE share their marginals."""

    starts_at_data: bool = False
    """Whether F(x, 0) = x; then a bound that starts at t_min = 0 need not evaluate F there."""

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        r""":math:`F(x, t)`, shape of ``x``."""
        raise NotImplementedError

    def with_derivative(self, x: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        r""":math:`(F, \partial F/\partial t)`, both of the shape of ``x``, by one forward-mode product in t."""
        return _jvp_in_time(lambda time: self(x, time, **cond), t)

    def along(self, x: Tensor, **cond: Any) -> Path:
        """The curve of fixed data, for callers that need several times; may share work between them."""
        return _Evaluated(self, x, cond)

    def cond_names(self) -> tuple[frozenset[str], bool]:
        """Conditioning keywords the transform accepts, and whether it accepts any."""
        return frozenset(), False

    def diagonal(self, c: Tensor, y: Tensor) -> Tensor:
        """Multiply ``y`` by a coefficient that is diagonal in the transform's own basis (pixels unless it says so).

        Args:
            c: shape ``()``, ``(B,)`` or broadcastable to ``(B, *E)``.
            y: shape ``(B, *E)``.
        """
        c = expand(c, y)
        if math.prod(c.shape[1:]) == 1:
            return c * y
        return self.from_basis(c * self.to_basis(y))

    def to_basis(self, y: Tensor) -> Tensor:
        """Coordinates of ``y`` in the orthonormal basis in which volatilities are diagonal."""
        return y

    def from_basis(self, y: Tensor) -> Tensor:
        """The inverse of ``to_basis``."""
        return y


def _jvp_in_time(function: Callable[[Tensor], Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
    return jvp(function, (t,), (torch.ones_like(t),))


class Identity(Transform):
    r""":math:`F(x, t) = x`: an ordinary diffusion.

    Example:
        >>> x = torch.ones(1, 2)
        >>> Identity().with_derivative(x, torch.tensor(0.5))
        (tensor([[1., 1.]]), tensor([[0., 0.]]))
    """

    linear = True

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return x

    def with_derivative(self, x: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        return x, torch.zeros_like(x)


class TimeScaling(Transform):
    r""":math:`F(x, t) = k(t)\, x` with :math:`k(0) = 1`.

    Args:
        k: callable of float64 time, shape ``()`` or ``(B,)`` to the same shape; may be an ``nn.Module``.

    Example:
        >>> F = TimeScaling(lambda t: 1 + 1.5 * t)
        >>> F.with_derivative(torch.ones(1, 2), torch.tensor(1.0, dtype=torch.float64))
        (tensor([[2.5000, 2.5000]]), tensor([[1.5000, 1.5000]]))
    """

    linear = True

    def __init__(self, k: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return expand(of_time(self.k, t), x) * x

    def with_derivative(self, x: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        k, dk = _jvp_in_time(lambda time: of_time(self.k, time), t)
        return expand(k, x) * x, expand(dk, x) * x


class Neural(Transform):
    r""":math:`F(x, t) = (1 - t) x + t \bar F(x, t)` with :math:`\bar F = x + \mathrm{net}(x, t)`.

    That is :math:`F = x + t\,\mathrm{net}(x, t)` and
    :math:`\dot F = \mathrm{net} + t\,\partial_t \mathrm{net}`. A network that returns zero gives the identity.

    The derivative is exact, by forward mode. With the backward pass of a training it costs 3.9 times the forward and
    backward pass of a U-Net, 4.8 times that of a perceptron (medians of ``benchmarks/training_cost.py`` on one CPU
    core); a :class:`Separable` transform of the same network costs 0.7 to 1.1 times, so prefer it where cost matters.
    What else was measured: without its GroupNorms the U-Net would cost 2.7 to 3.1 times, which bounds what a
    faster normalisation could save; GroupNorm in plain operations saves nothing here and makes ordinary training of
    the network slower by 40 %. A central difference in time costs 1.5 to 2.0 times, but its error is 5e-4 at best in
    float32 and grows with the rounding of lower precisions, a bias of the bound: it is not offered.

    Args:
        net: ``net(x, t, **cond) -> (B, *E)`` with t of shape ``(B,)``.
    """

    starts_at_data = True

    def __init__(self, net: Network) -> None:
        super().__init__()
        self.net = net
        self._names, self._anything = keyword_names(net, 2)

    def cond_names(self) -> tuple[frozenset[str], bool]:
        return self._names, self._anything

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return x + expand(t, x) * self._net(x, expand_time(t, x), cond)

    def with_derivative(self, x: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        net, dnet = _jvp_in_time(lambda time: self._net(x, time, cond), expand_time(t, x))
        time = expand(t, x)
        return x + time * net, net + time * dnet

    def _net(self, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        named = cond if self._anything else {key: value for key, value in cond.items() if key in self._names}
        return self.net(x, t, **named)


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
        self.features = features
        self.basis = PolynomialBasis() if basis is None else basis
        self._names, self._anything = keyword_names(features, 1)

    def cond_names(self) -> tuple[frozenset[str], bool]:
        return self._names, self._anything

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return self.along(x, **cond)(t)

    def with_derivative(self, x: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        return self.along(x, **cond).with_derivative(t)

    def along(self, x: Tensor, **cond: Any) -> Path:
        return _SeparablePath(x, self._features(x, cond), self.basis)

    def _features(self, x: Tensor, cond: dict[str, Any]) -> Tensor:
        named = cond if self._anything else {key: value for key, value in cond.items() if key in self._names}
        features = self.features(x, **named)
        expected = (x.shape[0], self.basis.terms, *x.shape[1:])
        if tuple(features.shape) != expected:
            raise ValueError(
                f"features(x) has shape {tuple(features.shape)}, expected {expected}: (B, K, *event) with "
                f"K = {self.basis.terms} terms of the basis."
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


class Blur(Transform):
    r"""Heat dissipation: :math:`F(x, t) = V \operatorname{diag}(a_i(t)) V^\top x`, V the orthonormal DCT-II.

    .. math::
        a_i(t) = (1 - d) e^{-\lambda_i \tau(t)} + d, \qquad \tau = \tfrac12 \beta^2 \sin^4(\pi t/2), \qquad
        \lambda_i = \pi^2 (i_1^2/H^2 + i_2^2/W^2)

    Volatilities that vary over the event are diagonal in the DCT coordinates, not in pixels.

    Args:
        event_shape: ``(..., H, W)``; the last two axes are blurred.
        blur: :math:`\beta`, the largest blur in pixels.
        floor: d, what is left of the highest frequency.

    References:
        Hoogeboom and Salimans, Blurring Diffusion Models, section 4, https://arxiv.org/abs/2209.05557
    """

    linear = True

    def __init__(self, event_shape: tuple[int, ...], blur: float = 20.0, floor: float = 1e-3) -> None:
        super().__init__()
        if len(event_shape) < 2:
            raise ValueError(f"Blur needs an event of at least two axes (H, W), got event_shape={event_shape}.")
        if not (blur >= 0.0 and 0.0 < floor <= 1.0):
            raise ValueError(f"blur >= 0 and 0 < floor <= 1 must hold, got {blur!r} and {floor!r}.")
        self.event_shape, self.blur, self.floor = tuple(event_shape), blur, floor
        height, width = self.event_shape[-2:]
        # Plain float64 attributes: a change of the model's dtype must not round the basis.
        self._rows, self._columns = _dct(height), _dct(width)
        i = torch.arange(height, dtype=torch.float64)[:, None] / height
        j = torch.arange(width, dtype=torch.float64)[None, :] / width
        self._eigenvalues = math.pi**2 * (i**2 + j**2)

    def attenuation(self, t: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`a_i(t)` and :math:`a_i'(t)`, each of shape ``t.shape + (H, W)``."""
        sine, cosine = torch.sin(0.5 * math.pi * t), torch.cos(0.5 * math.pi * t)
        tau = 0.5 * self.blur**2 * sine**4
        dtau = math.pi * self.blur**2 * sine**3 * cosine
        eigenvalues = self._eigenvalues.to(t.device)
        decay = (1.0 - self.floor) * torch.exp(-eigenvalues * tau[..., None, None])
        return decay + self.floor, -eigenvalues * dtau[..., None, None] * decay

    def to_basis(self, y: Tensor) -> Tensor:
        rows, columns = self._rows.to(y), self._columns.to(y)
        return rows @ y @ columns.mT

    def from_basis(self, y: Tensor) -> Tensor:
        rows, columns = self._rows.to(y), self._columns.to(y)
        return rows.mT @ y @ columns

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return self.from_basis(_per_frequency(self.attenuation(t)[0], x) * self.to_basis(x))

    def with_derivative(self, x: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        frequencies = self.to_basis(x)
        value, rate = self.attenuation(t)
        return (
            self.from_basis(_per_frequency(value, x) * frequencies),
            self.from_basis(_per_frequency(rate, x) * frequencies),
        )


def _per_frequency(a: Tensor, x: Tensor) -> Tensor:
    """``(H, W)`` or ``(B, H, W)`` factors, ready to multiply ``x`` of shape ``(B, ..., H, W)``."""
    if a.ndim == 3:
        a = a.reshape(a.shape[0], *(1,) * (x.ndim - 3), *a.shape[1:])
    return a.to(dtype=x.dtype, device=x.device)


def _dct(n: int) -> Tensor:
    """Orthonormal DCT-II matrix, rows are frequencies."""
    k = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi / n * (k[None, :] + 0.5) * k[:, None]) * math.sqrt(2.0 / n)
    matrix[0] /= math.sqrt(2.0)
    return matrix


class Composed(Transform):
    r""":math:`F(x, t) = F_2(F_1(x, t), t)`, :math:`\dot F = \dot F_2 + \partial_y F_2\, \dot F_1`.

    Args:
        outer: :math:`F_2`, applied last; its basis is the basis of the composition.
        inner: :math:`F_1`, applied to the data.
    """

    def __init__(self, outer: Transform, inner: Transform) -> None:
        super().__init__()
        self.outer, self.inner = outer, inner
        self.linear = outer.linear and inner.linear

    def cond_names(self) -> tuple[frozenset[str], bool]:
        outer, inner = self.outer.cond_names(), self.inner.cond_names()
        return outer[0] | inner[0], outer[1] or inner[1]

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return self.outer(self.inner(x, t, **cond), t, **cond)

    def with_derivative(self, x: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        y, dy = self.inner.with_derivative(x, t, **cond)
        return jvp(lambda state, time: self.outer(state, time, **cond), (y, t), (dy, torch.ones_like(t)))

    def to_basis(self, y: Tensor) -> Tensor:
        return self.outer.to_basis(y)

    def from_basis(self, y: Tensor) -> Tensor:
        return self.outer.from_basis(y)
