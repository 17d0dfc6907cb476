r"""The scale of the noise: :math:`S_\varphi(x, t) = e^{r(x, t)} > 0`, one factor for every coordinate.

.. math::
    q(z_t \mid x) = N\bigl(\alpha_t F(x, t),\ \sigma_t^2 S(x, t)^2\bigr)

Without a scale S = 1. :mod:`ndm_ct.process` says what S does to velocity, score and drift.

References:
    Bartosh, Vetrov and Naesseth, Neural Flow Diffusion Models (NFDM), https://arxiv.org/abs/2404.12940
    Sahoo et al., Diffusion Models With Learned Adaptive Noise (MuLAN), https://arxiv.org/abs/2312.13236
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ndm_ct._core.autodiff import Derivatives
from ndm_ct._core.checks import expand, expand_time, validate_visible
from ndm_ct._core.config import Configurable, Unconfigurable
from ndm_ct._core.errors import PredictorError
from ndm_ct._core.keywords import accepted_by, keyword_names
from ndm_ct._core.parallel import unwrapped
from ndm_ct._core.precision import run_network
from ndm_ct.transforms.base import Evaluated, Network, NetworkInTime, Path, jvp_in_time

__all__ = ["GivenScale", "NeuralScale", "NoiseScale", "as_noise_scale"]


class NoiseScale(nn.Module, Configurable):
    r"""The logarithm :math:`r(x, t) = \log S(x, t)`. Subclasses implement ``forward``.

    Args of every method:
        x: data, shape ``(B, *E)``, or the latents y of a Flow or Encoder.
        t: time, float64, shape ``()`` or ``(B,)``.
        cond: conditioning; a scale takes the keywords its network names and ignores the predictor's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.derivatives = Derivatives()

    def forward(self, x: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
        r""":math:`r(x, t)`, shape of ``x``."""
        raise NotImplementedError

    def with_derivative(self, x: Tensor, t: Tensor, /, **cond: Any) -> tuple[Tensor, Tensor]:
        r""":math:`(r, \partial r/\partial t)`, both of the shape of ``x``, by one product in t."""
        return jvp_in_time(lambda time: self(x, time, **cond), t, self.derivatives)

    def along(self, x: Tensor, /, **cond: Any) -> Path:
        r"""The curve :math:`t \mapsto r(x, t)` of fixed data."""
        return Evaluated(self, x, cond)

    def cond_names(self) -> tuple[frozenset[str], bool]:
        """Conditioning keywords the scale accepts, and whether it accepts any."""
        return frozenset(), False


class GivenScale(NoiseScale):
    """A user's function or network as the scale; ``NDM(noise_scale=)`` makes one of it.

    Args:
        function: ``r(x, t, **cond) -> (B, *E)`` with t of shape ``(B,)`` in the dtype of x. If it has a method
            ``with_derivative(x, t, **cond)``, that is called for r and its time derivative.
    """

    def __init__(self, function: Network) -> None:
        super().__init__()
        self.function = unwrapped(function)
        self._accepted = keyword_names(self.function, 2)
        self._analytic: Callable[..., Any] | None = getattr(self.function, "with_derivative", None)

    def config(self, own: list[Any] | None = None) -> dict[str, Any]:
        raise Unconfigurable(f"{type(self.function).__name__} is not a class of this package.")

    def cond_names(self) -> tuple[frozenset[str], bool]:
        return self._accepted

    def forward(self, x: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
        return self._called(self.function, x, expand_time(t, x), cond)

    def with_derivative(self, x: Tensor, t: Tensor, /, **cond: Any) -> tuple[Tensor, Tensor]:
        time = expand_time(t, x)
        if self._analytic is None:
            return jvp_in_time(lambda time: self._called(self.function, x, time, cond), time, self.derivatives)
        r, dr = run_network(self._analytic, x, time, **accepted_by(self._accepted, cond))
        return _validated(r, x), _validated(dr, x)

    def _called(self, function: Network, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        return _validated(run_network(function, x, t, **accepted_by(self._accepted, cond)), x)


class NeuralScale(NetworkInTime, NoiseScale):
    r""":math:`r(x, t) = t (1 - t)\,\mathrm{net}(x, t)`: the noise of an ordinary diffusion at both ends.

    A network that returns zero gives S = 1. The derivative is exact, by forward mode.

    Args:
        net: ``net(x, t, **cond) -> (B, *E)`` with t of shape ``(B,)``.

    Example:
        >>> import torch
        >>> scale = NeuralScale(lambda x, t: torch.ones_like(x))
        >>> scale.with_derivative(torch.zeros(1, 2), torch.tensor(0.25))
        (tensor([[0.1875, 0.1875]]), tensor([[0.5000, 0.5000]]))

    References:
        Bartosh, Vetrov and Naesseth, Neural Flow Diffusion Models, https://arxiv.org/abs/2404.12940
    """

    def forward(self, x: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
        return expand(t * (1.0 - t), x) * self._net(x, t, cond)

    def with_derivative(self, x: Tensor, t: Tensor, /, **cond: Any) -> tuple[Tensor, Tensor]:
        net, dnet = self._net_with_derivative(x, t, cond)
        bump = expand(t * (1.0 - t), x)
        return bump * net, expand(1.0 - 2.0 * t, x) * net + bump * dnet

    def _at(self, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        return _validated(super()._at(x, t, cond), x)


def as_noise_scale(scale: Any) -> NoiseScale | None:
    """A user's ``noise_scale`` as a :class:`NoiseScale`; None stays None.

    Raises:
        TypeError: it is not callable, or hides a module whose weights would be lost.
    """
    if scale is None or isinstance(scale, NoiseScale):
        return scale
    if not callable(scale):
        raise TypeError(
            f"noise_scale must be callable as r(x, t), the logarithm of the scale S, got {type(scale).__name__}; for a "
            "constant pass lambda x, t: torch.full_like(x, value)."
        )
    validate_visible("noise_scale", scale)
    return GivenScale(scale)


def _validated(r: Any, x: Tensor) -> Tensor:
    if not isinstance(r, Tensor):
        raise PredictorError(
            f"noise_scale(x, t) returned {type(r).__name__}, expected a tensor of shape {tuple(x.shape)}: log S."
        )
    if r.shape != x.shape or r.dtype != x.dtype:
        raise PredictorError(
            f"noise_scale(x, t) returned shape {tuple(r.shape)}, {r.dtype}, expected {tuple(x.shape)}, {x.dtype}, "
            "those of x: log S for every coordinate. t has shape (B,); reshape it before it meets x: t.reshape(-1, 1)."
        )
    return r
