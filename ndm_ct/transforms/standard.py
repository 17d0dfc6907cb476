r"""Fixed affine maps of the data, measured on data, before the process: whitening, and standardisation per cluster.

.. math::
    y = W (x - m), \qquad \log p(x) = \log p(y) + \log|\det W|

For clusters m and the diagonal W belong to a label k, which the predictor may be told too. The density of x is then
:math:`\log p(x) = \log \sum_k w_k\, p(x \mid k)`, with the shares :math:`w_k` of the labels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ndm_ct._core.checks import event_size, validate_count, validate_shape
from ndm_ct._core.noise import GeneratorLike, as_randomness, uniform
from ndm_ct.transforms.base import Identity

__all__ = ["Clusters", "Whitening"]


class Whitening(Identity):
    r"""Data with the mean zero and the identity as covariance: :math:`y = C^{-1/2}(x - m)`.

    Mean and covariance are saved with the model's weights. :meth:`of` measures them.

    Args:
        event_shape: E.

    Example:
        >>> x = torch.randn(1000, 2) @ torch.tensor([[2.0, 1.0], [0.0, 0.5]]) + 3.0
        >>> y, log_det = Whitening.of(x).to_latent(x)
        >>> torch.allclose(y.T.cov(), torch.eye(2), atol=1e-4)
        True
    """

    latent = True
    mean: Tensor
    matrix: Tensor
    inverse: Tensor
    log_det: Tensor

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.event_shape = validate_shape("event_shape", event_shape)
        size = event_size(self.event_shape)
        self.register_buffer("mean", torch.zeros(self.event_shape))
        self.register_buffer("matrix", torch.eye(size))
        self.register_buffer("inverse", torch.eye(size))
        self.register_buffer("log_det", torch.zeros(()))

    @classmethod
    def of(cls, x: Tensor) -> "Whitening":
        """The whitening of data.

        Args:
            x: data, shape ``(n, *E)``, with more rows than coordinates.

        Raises:
            ValueError: a direction in which the data do not vary.
        """
        whitening = cls(tuple(x.shape[1:]))
        flat = x.detach().flatten(1).double()
        values, vectors = torch.linalg.eigh(flat.mT.cov().reshape(whitening.matrix.shape))
        if not bool((values > 1e-12 * values.max()).all()):
            raise ValueError(
                f"x has {len(x)} rows and a direction in which they do not vary, where whitening divides by zero; "
                "leave out coordinates that are functions of others, or pass more rows."
            )
        whitening.mean = x.detach().mean(0)
        whitening.matrix = ((vectors * values.rsqrt()) @ vectors.mT).to(x.dtype)
        whitening.inverse = ((vectors * values.sqrt()) @ vectors.mT).to(x.dtype)
        whitening.log_det = -0.5 * values.log().sum().to(x.dtype)
        return whitening

    def to_latent(self, x: Tensor, /, *, generator: GeneratorLike = None, **cond: Any) -> tuple[Tensor, Tensor]:
        y = (x - self.mean.to(x)).flatten(1) @ self.matrix.to(x).mT
        return y.reshape_as(x), self.log_det.to(x).expand(len(x))

    def from_latent(self, y: Tensor, /, **cond: Any) -> Tensor:
        return (y.flatten(1) @ self.inverse.to(y).mT).reshape_as(y) + self.mean.to(y)


class Clusters(Identity):
    r"""Data standardised within their cluster, :math:`y = (x - m_k)/s_k`; the cluster k is the condition ``label``.

    Means, standard deviations and shares are saved with the model's weights. :meth:`of` measures them. Every function
    of the model takes ``label=``, integers of shape ``(B,)``. :meth:`marginal` leaves the label out of a density, and
    :meth:`sample_label` draws labels for samples.

    Args:
        event_shape: E.
        count: number of clusters K.

    Example:
        >>> import ndm_ct
        >>> x, label = torch.randn(100, 2), torch.arange(100) % 3
        >>> clusters = Clusters.of(x + 5.0 * label[:, None], label)
        >>> model = ndm_ct.NDM(lambda z, t: 0.5 * z, (2,), transform=clusters)
        >>> ndm_ct.sample(model, 4, method="ddim", steps=5, label=clusters.sample_label(4)).shape
        torch.Size([4, 2])
        >>> clusters.marginal(lambda label: ndm_ct.elbo(model, x, label=label), len(x)).shape
        torch.Size([100])
    """

    latent = True
    means: Tensor
    stds: Tensor
    log_weights: Tensor

    def __init__(self, event_shape: Sequence[int], count: int) -> None:
        super().__init__()
        self.event_shape, self.count = validate_shape("event_shape", event_shape), validate_count("count", count)
        self.register_buffer("means", torch.zeros(count, *self.event_shape))
        self.register_buffer("stds", torch.ones(count, *self.event_shape))
        self.register_buffer("log_weights", torch.full((count,), 1.0 / count).log())

    @classmethod
    def of(cls, x: Tensor, label: Tensor) -> "Clusters":
        """The clusters of labelled data.

        Args:
            x: data, shape ``(n, *E)``.
            label: integers from 0, shape ``(n,)``; each occurs at least twice.

        Raises:
            ValueError: a cluster in which a coordinate does not vary.
        """
        rows = [x.detach()[label == k] for k in range(int(label.max()) + 1)]
        stds = torch.stack([each.std(0) if len(each) > 1 else torch.zeros_like(x[0]) for each in rows])
        if not bool((stds > 0.0).all()):
            raise ValueError(
                "a cluster has fewer than two rows, or a coordinate that does not vary in it; merge it with another."
            )
        clusters = cls(tuple(x.shape[1:]), len(rows))
        clusters.means, clusters.stds = torch.stack([each.mean(0) for each in rows]), stds
        clusters.log_weights = stds.new_tensor([len(each) / len(x) for each in rows]).log()
        return clusters

    def cond_names(self) -> tuple[frozenset[str], bool]:
        return frozenset({"label"}), False

    def to_latent(self, x: Tensor, /, *, generator: GeneratorLike = None, **cond: Any) -> tuple[Tensor, Tensor]:
        mean, std = self._of_rows(x, cond)
        return (x - mean) / std, -std.log().flatten(1).sum(1)

    def from_latent(self, y: Tensor, /, **cond: Any) -> Tensor:
        mean, std = self._of_rows(y, cond)
        return mean + std * y

    def marginal(self, score: Callable[[Tensor], Tensor], rows: int) -> Tensor:
        r""":math:`\log \sum_k w_k e^{\mathrm{score}(k)}`, nats, ``(B,)``: the density without the label.

        Args:
            score: labels, ``(B,)``, to :math:`\log p(x \mid k)`, nats, such as ``lambda label: loglik(model, x,
                label=label)``. A lower bound makes the result one.
            rows: B.
        """
        labels = torch.arange(self.count, device=self.means.device)
        parts = [weight + score(k.expand(rows)) for k, weight in zip(labels, self.log_weights, strict=True)]
        return torch.stack(parts).logsumexp(0)

    def sample_label(self, n: int, *, generator: GeneratorLike = None) -> Tensor:
        """Draw n labels by their shares, shape ``(n,)``.

        Args:
            n: number of labels.
            generator: a seed, a generator, or one per label.
        """
        device = self.means.device
        u = uniform((n,), as_randomness(generator, n, device, "label"), torch.float64, device)
        shares = self.log_weights.double().softmax(0).cumsum(0)
        return torch.searchsorted(shares, u).clamp(max=self.count - 1)

    def _of_rows(self, x: Tensor, cond: dict[str, Any]) -> tuple[Tensor, Tensor]:
        label = cond.get("label")
        if not isinstance(label, Tensor) or label.shape != (len(x),) or label.is_floating_point():
            came = f"shape {tuple(label.shape)}, {label.dtype}" if isinstance(label, Tensor) else type(label).__name__
            raise ValueError(f"label must be integers of shape ({len(x)},), the cluster of every row; got {came}.")
        if len(label) and not 0 <= int(label.min()) <= int(label.max()) < self.count:
            raise ValueError(
                f"label must lie in 0 ... {self.count - 1}, got {int(label.min())} ... {int(label.max())}."
            )
        return self.means.to(x)[label], self.stds.to(x)[label]
