r"""Forward transforms: :math:`F_\varphi(x, t)` and :math:`\dot F = \partial F/\partial t` at fixed x.

.. math::
    q(z_t \mid x) = N(\alpha_t F_\varphi(x, t),\ \sigma_t^2 I), \qquad F(x, t) = G(y, t), \quad y = h(x)

F need not be invertible. :math:`G(y, 0) = y` for all transforms here, so the reconstruction term of the ELBO and the
bins of integer data do not depend on :math:`\varphi`. The map h from data to latents is the identity
except in :class:`~ndm_ct.transforms.Flow` and :class:`~ndm_ct.transforms.Encoder`. It does not depend on t, and
everything else is about G.

References:
    Bartosh, Vetrov and Naesseth, Neural Diffusion Models, https://arxiv.org/abs/2310.08337
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ndm_ct._core.autodiff import Derivatives
from ndm_ct._core.checks import expand, expand_time
from ndm_ct._core.config import Configurable
from ndm_ct._core.errors import PredictorError
from ndm_ct._core.keywords import accepted_by, keyword_names
from ndm_ct._core.noise import GeneratorLike
from ndm_ct._core.parallel import unwrapped
from ndm_ct._core.precision import run_network

__all__ = ["Composed", "Evaluated", "Identity", "Network", "NetworkInTime", "Path", "Transform", "jvp_in_time"]


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


class _Curved(Protocol):
    """A function of data and time with its time derivative: a transform, or the scale of the noise."""

    def __call__(self, x: Tensor, t: Tensor, /, **cond: Any) -> Tensor: ...

    def with_derivative(self, x: Tensor, t: Tensor, /, **cond: Any) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Evaluated:
    """The path of a function that evaluates everything anew at every t.

    Args:
        function: a transform, or the scale of the noise.
        x: data, shape ``(B, *E)``.
        cond: conditioning.
    """

    function: _Curved
    x: Tensor
    cond: dict[str, Any]

    def __call__(self, t: Tensor, /) -> Tensor:
        return self.function(self.x, t, **self.cond)

    def with_derivative(self, t: Tensor, /) -> tuple[Tensor, Tensor]:
        return self.function.with_derivative(self.x, t, **self.cond)


class Transform(nn.Module, Configurable):
    r"""A map :math:`F(x, t)`. Subclasses implement ``forward`` and, where they know it, the time derivative.

    Args of every method:
        x: data, shape ``(B, *E)``, or the latents y of a Flow or Encoder.
        t: time, float64, shape ``()`` or ``(B,)``.
        cond: conditioning; a transform takes the keywords its network names and ignores the predictor's.
    """

    linear: bool = False
    """Whether F is linear in x; then the probability flow and the reverse SDE share their marginals."""

    starts_at_data: bool = False
    """Whether a bound that starts at t_min = 0 may leave out an evaluation of F there, which is x."""

    scales: bool = False
    r"""Whether F multiplies the coordinates of the transform's basis by :math:`a_i(t)`; then ``log_rate`` is known."""

    latent: bool = False
    """Whether y is not x itself."""

    bijective: bool = True
    """Whether y is a one-to-one function of x, so that the density of x is known if that of y is."""

    data_shape: tuple[int, ...] | None = None
    """Shape of a data point; None: that of the latents."""

    def __init__(self) -> None:
        super().__init__()
        self.derivatives = Derivatives()

    def to_latent(self, x: Tensor, /, *, generator: GeneratorLike = None, **cond: Any) -> tuple[Tensor, Tensor | None]:
        r"""The latents y and their log-weight w, ``(B,)`` in nats, with :math:`\log p(x) \ge E[\log p(y) + w]`.

        This is an equality where ``bijective``. A weight of None stands for zero; y is then x.

        Args:
            x: data, shape ``(B, *data_shape)``.
            generator: source of an Encoder's noise: a seed, a generator, or one per row.
            cond: conditioning.
        """
        return x, None

    def from_latent(self, y: Tensor, /, **cond: Any) -> Tensor:
        """Data from latents: the inverse where ``bijective``."""
        return y

    def forward(self, x: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
        r""":math:`F(x, t)`, shape of ``x``."""
        raise NotImplementedError

    def with_derivative(self, x: Tensor, t: Tensor, /, **cond: Any) -> tuple[Tensor, Tensor]:
        r""":math:`(F, \partial F/\partial t)`, both of the shape of ``x``, by one product in t."""
        return jvp_in_time(lambda time: self(x, time, **cond), t, self.derivatives)

    def log_rate(self, t: Tensor) -> Tensor:
        r""":math:`(\log a_i)'`, of the shape of t, or that followed by axes broadcastable to the event.

        Raises:
            NotImplementedError: not ``scales``.
        """
        raise NotImplementedError

    def along(self, x: Tensor, /, **cond: Any) -> Path:
        """The curve of fixed data, for callers that need several times; may share work between them."""
        return Evaluated(self, x, cond)

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


class NetworkInTime(nn.Module):
    """A network of data and time as a part of a transform, or of the scale of the noise.

    Args:
        net: ``net(x, t, **cond) -> (B, *E)`` with t of shape ``(B,)``.
    """

    derivatives: Derivatives

    def __init__(self, net: Network) -> None:
        super().__init__()
        self.net = unwrapped(net)
        self._accepted = keyword_names(self.net, 2)

    def cond_names(self) -> tuple[frozenset[str], bool]:
        """Names of the conditions that the network takes, and whether it takes any other."""
        return self._accepted

    def _net(self, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        return self._at(x, expand_time(t, x), cond)

    def _net_with_derivative(self, x: Tensor, t: Tensor, cond: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return jvp_in_time(lambda time: self._at(x, time, cond), expand_time(t, x), self.derivatives)

    def _at(self, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        return run_network(self.net, x, t, **accepted_by(self._accepted, cond))


def jvp_in_time(
    function: Callable[[Tensor], Tensor], t: Tensor, derivatives: Derivatives | None = None
) -> tuple[Tensor, Tensor]:
    """Value and time derivative of a function, in one product: forwards, or where a layer forbids it twice backwards.

    Args:
        function: of a time of the shape of ``t``.
        t: where it is evaluated, ``()`` or ``(B,)``.
        derivatives: remembers what the function can pass; None finds it anew.

    Raises:
        PredictorError: a layer of the function has neither derivative.
    """
    try:
        return (derivatives or Derivatives()).jvp(function, (t,), (torch.ones_like(t),))
    except (NotImplementedError, RuntimeError) as error:
        words = ("forward AD", "forward mode", "in-place operation", "setup_context", "second derivative")
        if not any(word in str(error) for word in words):
            raise
        raise PredictorError(
            f"the time derivative of the transform F needs forward-mode differentiation or a second derivative, and a "
            f"layer of its network has neither ({str(error).splitlines()[0][:160]}); write it in differentiable "
            "operations of torch, or take transforms.Separable, which needs no derivative of its network."
        ) from error


class Identity(Transform):
    r""":math:`F(x, t) = x`: an ordinary diffusion.

    Example:
        >>> x = torch.ones(1, 2)
        >>> Identity().with_derivative(x, torch.tensor(0.5))
        (tensor([[1., 1.]]), tensor([[0., 0.]]))
    """

    linear = True
    scales = True

    def log_rate(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def forward(self, x: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
        return x

    def with_derivative(self, x: Tensor, t: Tensor, /, **cond: Any) -> tuple[Tensor, Tensor]:
        return x, torch.zeros_like(x)


class Composed(Transform):
    r""":math:`F(x, t) = F_2(F_1(x, t), t)`, :math:`\dot F = \dot F_2 + \partial_y F_2\, \dot F_1`.

    Args:
        outer: :math:`F_2`, applied last; its basis is the basis of the composition.
        inner: :math:`F_1`, applied to the data.

    The outer transform may map data to latents, or scale the coordinates of its basis for a volatility
    :class:`~ndm_ct.schedules.Matched`, if the inner one does not move with t (``Flow``, ``Encoder``, ``Identity``).

    Raises:
        ValueError: the outer transform maps data to latents, and the inner one moves with t.
    """

    def __init__(self, outer: Transform, inner: Transform) -> None:
        super().__init__()
        still = isinstance(inner, Identity)
        if outer.latent and not still:
            raise ValueError(
                f"{type(outer).__name__} maps data to latents and cannot be the outer transform of "
                f"{type(inner).__name__}, which moves with t; swap the two."
            )
        self.outer, self.inner = outer, inner
        self.linear = outer.linear and inner.linear
        self.scales = outer.scales and still
        self.latent, self.bijective = inner.latent or outer.latent, inner.bijective and outer.bijective
        self.data_shape = outer.data_shape if inner.data_shape is None else inner.data_shape

    def to_latent(self, x: Tensor, /, *, generator: GeneratorLike = None, **cond: Any) -> tuple[Tensor, Tensor | None]:
        y, first = self.inner.to_latent(x, generator=generator, **cond)
        y, second = self.outer.to_latent(y, generator=generator, **cond)
        return y, second if first is None else first if second is None else first + second

    def from_latent(self, y: Tensor, /, **cond: Any) -> Tensor:
        return self.inner.from_latent(self.outer.from_latent(y, **cond), **cond)

    def log_rate(self, t: Tensor) -> Tensor:
        return self.outer.log_rate(t) if self.scales else super().log_rate(t)

    def cond_names(self) -> tuple[frozenset[str], bool]:
        outer, inner = self.outer.cond_names(), self.inner.cond_names()
        return outer[0] | inner[0], outer[1] or inner[1]

    def forward(self, x: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
        return self.outer(self.inner(x, t, **cond), t, **cond)

    def with_derivative(self, x: Tensor, t: Tensor, /, **cond: Any) -> tuple[Tensor, Tensor]:
        y, dy = self.inner.with_derivative(x, t, **cond)

        def outer(y: Tensor, t: Tensor) -> Tensor:
            return self.outer(y, t, **cond)

        return self.derivatives.jvp(outer, (y, t), (dy, torch.ones_like(t)))

    def to_basis(self, y: Tensor) -> Tensor:
        return self.outer.to_basis(y)

    def from_basis(self, y: Tensor) -> Tensor:
        return self.outer.from_basis(y)
