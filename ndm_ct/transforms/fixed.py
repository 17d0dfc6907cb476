r"""Transforms without networks: :math:`F(x, t) = k(t)\,x`, and one factor for every frequency of an image,

.. math::
    F(x, t) = V \operatorname{diag}(a_i(t)) V^\top x, \qquad a_i(0) = 1,

with V the orthonormal DCT-II.

References:
    Hoogeboom and Salimans, Blurring Diffusion Models, https://arxiv.org/abs/2209.05557
    Jing et al., Subspace Diffusion Generative Models, https://arxiv.org/abs/2205.01490
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ndm_ct._core.checks import expand, of_time, validate_number, validate_shape
from ndm_ct.transforms.base import Transform, jvp_in_time
from ndm_ct.transforms.bases import DCT

__all__ = ["Blur", "Subspaces", "TimeScaling"]


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
    scales = True

    def __init__(self, k: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
        return expand(of_time(self.k, t), x) * x

    def with_derivative(self, x: Tensor, t: Tensor, /, **cond: Any) -> tuple[Tensor, Tensor]:
        k, dk = self._rates(t)
        return expand(k, x) * x, expand(dk, x) * x

    def log_rate(self, t: Tensor) -> Tensor:
        k, dk = self._rates(t)
        return dk / k

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return jvp_in_time(lambda time: of_time(self.k, time), t)


class _Spectral(Transform):
    r"""One factor :math:`a_i(t)` for every frequency. Volatilities that vary over the event are diagonal there, too.

    Args:
        event_shape: ``(..., H, W)``; the frequencies are those of the last two axes.
    """

    linear = True
    scales = True

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        event_shape = validate_shape("event_shape", event_shape)
        if len(event_shape) < 2:
            raise ValueError(
                f"{type(self).__name__} needs an event of at least two axes (H, W), got event_shape={event_shape}."
            )
        self.event_shape = event_shape
        self._frequencies = DCT(event_shape)

    def attenuation(self, t: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`a_i(t)` and :math:`a_i'(t)`, each of shape ``t.shape + (H, W)``."""
        raise NotImplementedError

    def log_rate(self, t: Tensor) -> Tensor:
        value, rate = self.attenuation(t)
        return rate / value

    def to_basis(self, y: Tensor) -> Tensor:
        return self._frequencies(y)

    def from_basis(self, y: Tensor) -> Tensor:
        return self._frequencies.inverse(y)

    def forward(self, x: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
        return self.from_basis(_per_frequency(self.attenuation(t)[0], x) * self.to_basis(x))

    def with_derivative(self, x: Tensor, t: Tensor, /, **cond: Any) -> tuple[Tensor, Tensor]:
        frequencies = self.to_basis(x)
        value, rate = self.attenuation(t)
        return (
            self.from_basis(_per_frequency(value, x) * frequencies),
            self.from_basis(_per_frequency(rate, x) * frequencies),
        )


class Blur(_Spectral):
    r"""Heat dissipation: :math:`F(x, t) = V \operatorname{diag}(a_i(t)) V^\top x`, V the orthonormal DCT-II.

    .. math::
        a_i(t) = (1 - d) e^{-\lambda_i \tau(t)} + d, \qquad \tau = \tfrac12 \beta^2 \sin^4(\pi t/2), \qquad
        \lambda_i = \pi^2 (i_1^2/H^2 + i_2^2/W^2)

    Args:
        event_shape: ``(..., H, W)``; the last two axes are blurred.
        blur: :math:`\beta`, the largest blur in pixels.
        floor: d, what is left of the highest frequency.

    References:
        Hoogeboom and Salimans, Blurring Diffusion Models, section 4, https://arxiv.org/abs/2209.05557
    """

    def __init__(self, event_shape: tuple[int, ...], blur: float = 20.0, floor: float = 1e-3) -> None:
        super().__init__(event_shape)
        for name, value in (("blur", blur), ("floor", floor)):
            validate_number(name, value)
        if not (blur >= 0.0 and 0.0 < floor <= 1.0):
            raise ValueError(f"blur >= 0 and 0 < floor <= 1 must hold, got {blur!r} and {floor!r}.")
        self.blur, self.floor = blur, floor
        height, width = self.event_shape[-2:]
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


class Subspaces(_Spectral):
    r"""Fewer and fewer frequencies: from time :math:`t_k` on, only the lowest :math:`n_k` along each axis are left.

    .. math::
        a_i(t) = d + (1 - d)\, s\Bigl(\frac{t_{k(i)} - t}{w}\Bigr), \qquad
        s(u) = u^3 (10 - 15 u + 6 u^2) \text{ on } [0, 1],

    where k(i) is the first projection that takes away frequency i, one of whose indices is :math:`n_k` or more; those
    that stay keep :math:`a_i = 1`. A projection is made smoothly within a time w; as w goes to 0 it becomes the sudden
    one of subspace diffusion.

    Args:
        event_shape: ``(..., H, W)``; the last two axes are projected.
        sizes: :math:`n_k`, decreasing.
        times: :math:`t_k`, increasing, in (0, 1].
        width: w, at most the first :math:`t_k`.
        floor: d, what is left of a frequency that is gone.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        sizes: Sequence[int],
        times: Sequence[float],
        width: float = 0.1,
        floor: float = 1e-3,
    ) -> None:
        super().__init__(event_shape)
        self.sizes, self.times, self.width, self.floor = tuple(sizes), tuple(times), width, floor
        if not (len(sizes) == len(times) > 0 and sorted(set(times)) == list(times)):
            raise ValueError(f"times must be increasing, one for each of sizes={sizes}; got {times}.")
        if not (sorted(set(sizes), reverse=True) == list(sizes) and sizes[-1] >= 1):
            raise ValueError(f"sizes must be positive and decreasing, got {sizes}.")
        if not (0.0 < width <= times[0] and times[-1] <= 1.0 and 0.0 < floor <= 1.0):
            raise ValueError(
                f"0 < width <= times[0], times[-1] <= 1 and 0 < floor <= 1 must hold, got width={width!r}, "
                f"times={times}, floor={floor!r}."
            )
        height, columns = self.event_shape[-2:]
        index = torch.maximum(torch.arange(height)[:, None], torch.arange(columns)[None, :])
        # How many projections leave a frequency alone: it goes with the next, or, after the last, never.
        self._stays = torch.stack([index < size for size in self.sizes]).sum(0)

    def attenuation(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Blur`."""
        gone = torch.tensor([*self.times, math.inf], dtype=t.dtype, device=t.device)[self._stays.to(t.device)]
        u = ((gone - t[..., None, None]) / self.width).clamp(0.0, 1.0)
        left = u**3 * (10.0 - 15.0 * u + 6.0 * u**2)
        rate = -30.0 / self.width * (u * (1.0 - u)) ** 2
        return self.floor + (1.0 - self.floor) * left, (1.0 - self.floor) * rate


def _per_frequency(a: Tensor, x: Tensor) -> Tensor:
    """``(H, W)`` or ``(B, H, W)`` factors, ready to multiply ``x`` of shape ``(B, ..., H, W)``."""
    if a.ndim == 3:
        a = a.reshape(a.shape[0], *(1,) * (x.ndim - 3), *a.shape[1:])
    return a.to(dtype=x.dtype, device=x.device)
