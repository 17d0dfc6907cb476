r"""Orthonormal bases of events: coordinates :math:`y = V^\top x` in which a factor or a volatility is diagonal.

Orthonormal means that lengths stay as they are and the log-determinant is zero.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ndm_ct._core.checks import event_size, validate_count, validate_shape
from ndm_ct._core.config import Configurable

__all__ = ["DCT", "Basis", "Haar", "Rotation", "dct_matrix"]


class Basis(nn.Module, Configurable):
    """An orthonormal basis. Subclasses implement ``forward`` and ``inverse``.

    Args:
        event_shape: E.
    """

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.event_shape = validate_shape("event_shape", event_shape)

    def forward(self, x: Tensor) -> Tensor:
        """Coordinates of ``x``, shape ``(B, *E)``."""
        raise NotImplementedError

    def inverse(self, y: Tensor) -> Tensor:
        """The event with coordinates ``y``, shape ``(B, *E)``."""
        raise NotImplementedError


class DCT(Basis):
    """Frequencies: the orthonormal DCT-II over the last two axes, or over the only one.

    Args:
        event_shape: E, ``(..., H, W)`` or ``(N,)``.

    Example:
        >>> x = torch.randn(2, 3, 4, 4)
        >>> basis = DCT((3, 4, 4))
        >>> torch.allclose(basis.inverse(basis(x)), x, atol=1e-5)
        True
    """

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__(event_shape)
        # Plain float64 attributes: a change of the model's dtype must not round the basis.
        self._matrices = [dct_matrix(size) for size in self.event_shape[-2:]]

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self._matrices[-1].to(x).mT
        return y if len(self._matrices) == 1 else self._matrices[0].to(x) @ y

    def inverse(self, y: Tensor) -> Tensor:
        x = y @ self._matrices[-1].to(y)
        return x if len(self._matrices) == 1 else self._matrices[0].to(y).mT @ x


class Haar(Basis):
    r"""Haar's wavelets over the last two axes, or over the only one: means and differences of neighbours, over
    :math:`\sqrt 2`, again and again of the means.

    The first coordinates of every axis are the coarsest means.

    Args:
        event_shape: E, ``(..., H, W)`` or ``(N,)``; each of these sizes is a multiple of :math:`2^L`.
        levels: L.

    Raises:
        ValueError: a size is not a multiple of :math:`2^L`.

    Example:
        >>> Haar((4,), levels=2)(torch.tensor([[1.0, 1.0, 3.0, 3.0]]))
        tensor([[ 4.0000, -2.0000,  0.0000,  0.0000]])
    """

    def __init__(self, event_shape: Sequence[int], levels: int = 1) -> None:
        super().__init__(event_shape)
        self.levels = validate_count("levels", levels)
        if any(size % 2**levels for size in self.event_shape[-2:]):
            raise ValueError(
                f"levels={levels} halves the last axes of event_shape={self.event_shape} {levels} times; their sizes "
                f"must be multiples of {2**levels}."
            )
        self._axes = (-2, -1)[-len(self.event_shape[-2:]) :]

    def forward(self, x: Tensor) -> Tensor:
        return self._split(x, self.levels)

    def inverse(self, y: Tensor) -> Tensor:
        return self._joined(y, self.levels)

    def _split(self, x: Tensor, levels: int) -> Tensor:
        for axis in self._axes:
            even, odd = x.unflatten(axis, (-1, 2)).unbind(axis)
            x = torch.cat([even + odd, even - odd], axis) / math.sqrt(2.0)
        return x if levels == 1 else self._with_means(x, self._split(self._means(x), levels - 1))

    def _joined(self, y: Tensor, levels: int) -> Tensor:
        if levels > 1:
            y = self._with_means(y, self._joined(self._means(y), levels - 1))
        for axis in self._axes:
            mean, difference = y.chunk(2, axis)
            pairs = torch.stack([mean + difference, mean - difference], axis) / math.sqrt(2.0)
            y = pairs.flatten(axis - 1, axis)
        return y

    def _means(self, y: Tensor) -> Tensor:
        for axis in self._axes:
            y = y.chunk(2, axis)[0]
        return y

    def _with_means(self, y: Tensor, means: Tensor) -> Tensor:
        """``y`` with its quarter (half, for one axis) of means replaced."""
        width = means.shape[-1]
        if len(self._axes) == 1:
            return torch.cat([means, y[..., width:]], -1)
        height = means.shape[-2]
        top = torch.cat([means, y[..., :height, width:]], -1)
        return torch.cat([top, y[..., height:, :]], -2)


class Rotation(Basis):
    """Any orthonormal basis, such as the principal components of data.

    The matrix is saved with the model's weights.

    Args:
        event_shape: E.

    Example:
        >>> x = torch.randn(100, 2) @ torch.tensor([[2.0, 1.0], [0.0, 0.5]])
        >>> y = Rotation.principal(x)(x)
        >>> bool(y.T.cov()[0, 1].abs() < 1e-4)
        True
    """

    matrix: Tensor

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__(event_shape)
        self.register_buffer("matrix", torch.eye(event_size(self.event_shape)))

    @classmethod
    def principal(cls, x: Tensor) -> "Rotation":
        """The principal components of data ``x``, shape ``(n, *E)``, the largest variance first."""
        basis = cls(tuple(x.shape[1:]))
        _, vectors = torch.linalg.eigh(x.detach().flatten(1).double().mT.cov().reshape(basis.matrix.shape))
        basis.matrix = vectors.flip(1).mT.to(x.dtype)
        return basis

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.matrix.to(x).mT).reshape_as(x)

    def inverse(self, y: Tensor) -> Tensor:
        return (y.flatten(1) @ self.matrix.to(y)).reshape_as(y)


def dct_matrix(n: int) -> Tensor:
    """Orthonormal DCT-II matrix, rows are frequencies."""
    k = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi / n * (k[None, :] + 0.5) * k[:, None]) * math.sqrt(2.0 / n)
    matrix[0] /= math.sqrt(2.0)
    return matrix
