r"""Distances between two sets of features: Frechet, its value for infinitely many samples, KID, precision and recall.

.. math::
    FD = \|\mu_1 - \mu_2\|^2 + \operatorname{tr}\bigl(\Sigma_1 + \Sigma_2 - 2 (R_2 \Sigma_1 R_2^T)^{1/2}\bigr), \qquad
    R_2^T R_2 = \Sigma_2,

in float64, by eigenvalues of a symmetric matrix; R is the triangular factor of the centred rows, which exists for any
number of rows. From finite sets the distance is too large by about a constant times 1/n. Both sets are therefore split
at random into k disjoint parts, k = 1 ... 4; a line through the mean distances against k gives :math:`FD_\infty` at
k = 0. An error of order :math:`1/n^2` remains.

KID is the squared maximum mean discrepancy of the kernel :math:`(x \cdot y / d + 1)^3`, unbiased at any size. Its
standard error is the jackknife's over ten random blocks of both sets. Rows themselves are compared by the energy
distance :math:`2 E|X - Y| - E|X - X'| - E|Y - Y'|`, unbiased, with its scatter over random exchanges of rows.

References:
    Chong and Forsyth, Effectively Unbiased FID and Inception Score, https://arxiv.org/abs/1911.07023
    Bińkowski et al., Demystifying MMD GANs (the KID), https://arxiv.org/abs/1801.01401
    Kynkäänniemi et al., Improved Precision and Recall, https://arxiv.org/abs/1904.06991
    Naeem et al., Reliable Fidelity and Diversity (density, coverage), https://arxiv.org/abs/2002.09797
    Szekely and Rizzo, Energy statistics (2013)
"""

import contextlib
import io
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ndm_ct._core.seeds import make_generator

PARTS = 4
"""Largest number of parts of the extrapolation: 1 + 2 + 3 + 4 = 10 distances."""

BLOCKS = 10
"""Disjoint blocks of the KID's jackknife."""

NEIGHBOUR_ROWS = 5000
"""Most rows of either set whose neighbours are searched: the work is their product."""


@dataclass(frozen=True)
class Distance:
    """A distance and its standard error."""

    value: float
    stderr: float


@dataclass(frozen=True)
class Scores:
    """One set of samples against the reference: Frechet distances, KID, their standard errors, and neighbourhoods.

    ``fd`` is biased by the number of samples, ``fd_inf`` extrapolated to infinitely many. ``precision`` is the share of
    samples within the reference's neighbourhoods, ``recall`` the share of the reference within the samples';
    ``density`` is the mean number of reference neighbourhoods that hold a sample in units of the number expected,
    ``coverage`` the share of the reference's neighbourhoods that hold one. These
    four are None where they were not asked for.
    """

    fd: float
    fd_inf: float
    fd_inf_se: float
    kid: float
    kid_se: float
    precision: float | None = None
    recall: float | None = None
    density: float | None = None
    coverage: float | None = None


class Part:
    """Mean and covariance of features.

    Args:
        features: ``(N, D)``, float64.
        factor: also compute R, which the second one of a distance needs.
    """

    def __init__(self, features: Tensor, factor: bool = False) -> None:
        if len(features) < 2:
            raise ValueError(f"a covariance needs at least 2 rows, got {len(features)}.")
        self.mean = features.mean(0)
        scaled = (features - self.mean) / math.sqrt(len(features) - 1)
        self.cov = scaled.mT @ scaled
        self.factor = torch.linalg.qr(scaled, mode="r").R if factor else None

    def frechet(self, other: "Part") -> float:
        """The distance from ``other``, which has its factor."""
        assert other.factor is not None
        product = other.factor @ self.cov @ other.factor.mT
        fidelity = torch.linalg.eigvalsh(0.5 * (product + product.mT)).clamp(min=0.0).sqrt().sum()
        return float((self.mean - other.mean).square().sum() + self.cov.trace() + other.cov.trace() - 2.0 * fidelity)


class Reference:
    """Real features, prepared once for many comparisons.

    Args:
        features: ``(M, D)``.
        seed: of the random parts and blocks.
    """

    def __init__(self, features: Tensor, seed: int = 0) -> None:
        self.features, self.seed = features.double(), seed

    @cached_property
    def parts(self) -> list[list[Part]]:
        """The set in k disjoint random parts, k = 1 ... 4."""
        return _parts(self.features, make_generator(self.seed, 0), factor=True)

    @cached_property
    def kernel_sums(self) -> tuple[list[Tensor], Tensor]:
        """The set in random blocks, and the kernel's sums over pairs of blocks."""
        blocks = _blocks(self.features, make_generator(self.seed, 4))
        return blocks, _kernel_sums(blocks, blocks)


def _parts(features: Tensor, generator: torch.Generator, factor: bool = False) -> list[list[Part]]:
    if len(features) < 2 * PARTS:
        raise ValueError(f"the extrapolation splits the rows in {PARTS} parts of at least 2; got {len(features)} rows.")
    parts = []
    for k in range(1, PARTS + 1):
        order = torch.randperm(len(features), generator=generator)
        parts.append([Part(features[rows], factor) for rows in order.tensor_split(k)])
    return parts


def frechet(x: Tensor, y: Tensor) -> float:
    """Frechet distance of two sets of features ``(N, D)``, ``(M, D)``."""
    return Part(x.double()).frechet(Part(y.double(), factor=True))


def frechet_infinity(x: Tensor, reference: Reference | Tensor, seed: int = 0) -> Distance:
    """The distance extrapolated to infinitely many rows of both sets.

    The standard error is that of the distances of disjoint parts among themselves, which are independent; six degrees
    of freedom.
    """
    reference = reference if isinstance(reference, Reference) else Reference(reference)
    return _extrapolate(_by_parts(x.double(), reference, seed))


def _by_parts(x: Tensor, reference: Reference, seed: int) -> list[Tensor]:
    """For each k the k distances of the parts."""
    pairs = zip(_parts(x, make_generator(seed, 1)), reference.parts, strict=True)
    return [
        torch.tensor([a.frechet(b) for a, b in zip(ours, theirs, strict=True)], dtype=torch.float64)
        for ours, theirs in pairs
    ]


def _extrapolate(distances: list[Tensor]) -> Distance:
    k = torch.arange(1.0, len(distances) + 1, dtype=torch.float64)
    means = torch.stack([values.mean() for values in distances])
    slope = ((k - k.mean()) * means).sum() / (k - k.mean()).square().sum()
    # var(values)/k estimates the same variance for every k, with k - 1 degrees of freedom.
    squares = sum(float((values - values.mean()).square().sum()) / len(values) for values in distances[1:])
    freedom = sum(len(values) - 1 for values in distances[1:])
    return Distance(float(means.mean() - slope * k.mean()), math.sqrt(squares / freedom))


def kid(x: Tensor, reference: Reference | Tensor, seed: int = 0) -> Distance:
    """Unbiased squared maximum mean discrepancy of features ``(N, D)`` from the reference.

    Raises:
        ValueError: a block would have fewer than two rows.
    """
    reference = reference if isinstance(reference, Reference) else Reference(reference)
    theirs, theirs_sums = reference.kernel_sums
    ours = _blocks(x.double(), make_generator(seed, 2))
    counts = torch.tensor([[len(block) for block in blocks] for blocks in (ours, theirs)], dtype=torch.float64)
    sums = _kernel_sums(ours, ours), theirs_sums, _kernel_sums(ours, theirs)
    # A block's kernel with itself holds each row's kernel with itself, which no pair of rows is.
    own = torch.stack(
        [torch.stack([(block.square().mean(1) + 1.0).pow(3).sum() for block in b]) for b in (ours, theirs)]
    )

    def discrepancy(kept: Tensor) -> Tensor:
        n, m = (counts * kept).sum(1)
        xx, yy, xy = (kept @ values @ kept for values in sums)
        diagonal_x, diagonal_y = (own * kept).sum(1)
        return (xx - diagonal_x) / (n * (n - 1.0)) + (yy - diagonal_y) / (m * (m - 1.0)) - 2.0 * xy / (n * m)

    everything = torch.ones(BLOCKS, dtype=torch.float64)
    without = torch.stack([discrepancy(everything - one) for one in torch.eye(BLOCKS, dtype=torch.float64)])
    variance = (BLOCKS - 1.0) / BLOCKS * (without - without.mean()).square().sum()
    return Distance(float(discrepancy(everything)), math.sqrt(float(variance)))


def _blocks(features: Tensor, generator: torch.Generator) -> list[Tensor]:
    if len(features) < 2 * BLOCKS:
        raise ValueError(f"KID takes {BLOCKS} blocks of at least 2 rows, got {len(features)} rows.")
    order = torch.randperm(len(features), generator=generator)
    return [features[rows] for rows in order.tensor_split(BLOCKS)]


def _kernel_sums(x: list[Tensor], y: list[Tensor]) -> Tensor:
    """Sum of the kernel over all pairs of rows of two blocks, for all pairs of blocks."""
    sums = torch.zeros(len(x), len(y), dtype=torch.float64)
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            # The blocks of one set among themselves: symmetric.
            sums[i, j] = sums[j, i] if x is y and j < i else (a @ b.mT / a.shape[1] + 1.0).pow(3).sum()
    return sums


def neighbourhoods(x: Tensor, reference: Tensor, k: int = 5, seed: int = 0) -> dict[str, float]:
    """Precision, recall, density and coverage by the k nearest neighbours, through the package prdc.

    Both sets are thinned at random to equally many rows, at most ``NEIGHBOUR_ROWS``.
    """
    try:
        import joblib
        from prdc import compute_prdc
    except ImportError as error:
        raise ImportError(
            "precision and recall need prdc: pip install prdc, or leave them out by --neighbours 0."
        ) from error
    rows = min(len(x), len(reference), NEIGHBOUR_ROWS)
    if rows <= k + 1:
        raise ValueError(f"the neighbourhoods of {k} neighbours need more than {k + 1} rows, got {rows}.")
    random = make_generator(seed, 3)
    theirs, ours = (
        values[torch.randperm(len(values), generator=random)[:rows]].float().numpy() for values in (reference, x)
    )
    # It prints the sizes, and starts eight threads, which are slower than one on a small machine.
    with contextlib.redirect_stdout(io.StringIO()), joblib.parallel_config(backend="sequential"):
        result = compute_prdc(real_features=theirs, fake_features=ours, nearest_k=k)
    return {name: float(value) for name, value in result.items()}


def score(x: Tensor, reference: Reference, *, neighbours: int = 5, seed: int = 0) -> Scores:
    """All distances of features ``(N, D)`` from the reference; ``neighbours=0`` leaves precision and recall out."""
    distances = _by_parts(x.double(), reference, seed)
    extrapolated, discrepancy = _extrapolate(distances), kid(x, reference, seed)
    nearest = neighbourhoods(x, reference.features, neighbours, seed) if neighbours else {}
    return Scores(
        fd=float(distances[0][0]),
        fd_inf=extrapolated.value,
        fd_inf_se=extrapolated.stderr,
        kid=discrepancy.value,
        kid_se=discrepancy.stderr,
        **nearest,
    )


def too_small(samples: int, reference: int, dimension: int) -> str | None:
    """A warning if a covariance of so many features cannot be estimated from so many rows."""
    if min(samples, reference) > dimension:
        return None
    return (
        f"{samples} samples and {reference} reference images for {dimension} features: a covariance is singular, and "
        "the Frechet distance and its extrapolation mean little; go by the KID."
    )


def energy_distance(x: Tensor, y: Tensor) -> float:
    """The energy distance of rows ``(n, d)`` and ``(m, d)``, unbiased."""
    first = torch.arange(len(x) + len(y)) < len(x)
    return _energy(_pairs(torch.cat([x, y])), first)


def energy_score(x: Tensor, y: Tensor, *, exchanges: int = 100, seed: int = 0) -> Distance:
    """The energy distance, and its standard deviation if both sets had one law, over random exchanges of rows."""
    pairs, generator = _pairs(torch.cat([x, y])), torch.Generator().manual_seed(seed)
    first = torch.arange(len(x) + len(y)) < len(x)
    null = [_energy(pairs, first[torch.randperm(len(first), generator=generator)]) for _ in range(exchanges)]
    return Distance(_energy(pairs, first), float(np.std(null, ddof=1)))


def _pairs(rows: Tensor) -> Tensor:
    """Distances of all rows, ``(N, N)``, float64."""
    return torch.cdist(rows.double(), rows.double())


def _energy(pairs: Tensor, first: Tensor) -> float:
    """The energy distance of the rows of ``first`` from the others, from the distances of all."""
    a, b = first.double(), (~first).double()
    n, m, to_a = float(a.sum()), float(b.sum()), pairs @ a
    within = float(a @ to_a) / (n * (n - 1.0)) + float(b @ (pairs @ b)) / (m * (m - 1.0))
    return 2.0 * float(b @ to_a) / (n * m) - within
