r"""Whether a density of a table can be trusted: its samples are compared with rows that were held out.

Two laws X and Y are equal exactly if their energy distance is zero,

.. math::
    D^2 = 2\,E\ell(X, Y) - E\ell(X, X') - E\ell(Y, Y'), \qquad H = D^2 / (2\,E\ell(X, Y)) \in [0, 1],

of single columns, of pairs of columns and of all columns together. Every column is replaced by its ranks in [0, 1], so
that tails and units play no part. The distance is :math:`\ell(x, y) = \log(1 + 20\,|x - y|)`, which sees structure of
a twentieth of the range as well as of the whole. The labels "held out" and "sample" are permuted, the same way for all
comparisons. A p-value is the share of permutations in which any comparison stands out more than this one, so that one
p-value below 0.01 among hundreds of comparisons is as rare as a single one (Westfall and Young).

The anomaly of a row is the rank of its score among those of held-out rows,

.. math::
    p(x) = \frac{1}{n + 1} \Bigl(1 + \sum_{i=1}^n \Phi\Bigl(\frac{s(x) - s_i}{\sqrt{e(x)^2 + e_i^2}}\Bigr)\Bigr)

with scores s and their standard errors e: of rows like the training rows, a share p has a p-value of p or less.

References:
    Székely and Rizzo, Energy statistics: a class of statistics based on distances,
        https://doi.org/10.1016/j.jspi.2013.03.018
    Westfall and Young, Resampling-Based Multiple Testing, ISBN 978-0-471-55761-6
    Bates, Candès, Lei, Romano and Sesia, Testing for Outliers with Conformal p-values, https://arxiv.org/abs/2104.08279
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch

__all__ = ["COMPARED", "LEAST_COMPARED", "Anomalies", "Diagnosis", "Difference", "diagnose", "hidden_structure"]

COMPARED = 500
"""Rows of each kind that are compared at most."""
LEAST_COMPARED = 50
"""Fewer rows show no difference that matters."""

_PERMUTATIONS = 199
_MOST_PAIRS = 100
_LEVEL = 0.01
_SCALE = 0.05
_TRUNCATION = 0.1


def hidden_structure(truncations: np.ndarray) -> str:
    """What to say of the noise left at t = 0, empty where it changes log p of most rows by less than a tenth of a nat.

    A single row that the model has not seen the like of says nothing, so fewer than 50 rows are not looked at.

    Args:
        truncations: changes of log p, nats, ``(B,)``; NaN where unknown.
    """
    known = truncations[np.isfinite(truncations)]
    change = float(np.median(known)) if len(known) >= LEAST_COMPARED else 0.0
    if abs(change) <= _TRUNCATION:
        return ""
    return (
        f"the noise left at t = 0 changes log p by {change:.2g} nats in the median row and hides structure of the "
        "data; train with a lower gamma_min"
    )


@dataclass(frozen=True)
class Anomalies:
    """Scores of rows that were held out, which the scores of other rows are ranked among.

    Args:
        scores: log-densities of the held-out rows, nats, ``(n,)``.
        errors: their standard errors, nats, ``(n,)``.
    """

    scores: np.ndarray
    errors: np.ndarray

    def p_values(self, scores: np.ndarray, errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The p-values of rows, ``(B,)``, and their standard errors: few held-out rows, and the errors of the scores.

        Args:
            scores: log-densities of the rows, nats, ``(B,)``; NaN gives NaN.
            errors: their standard errors, nats, ``(B,)``.
        """
        p, low, high = (self._ranks(scores + shift * errors, errors) for shift in (0.0, -1.0, 1.0))
        few = np.sqrt(p * (1.0 - p) / (len(self.scores) + 2.0))
        return p, np.hypot(few, 0.5 * (high - low))

    def _ranks(self, scores: np.ndarray, errors: np.ndarray) -> np.ndarray:
        found = np.full(len(scores), np.nan)
        for place, (score, error) in enumerate(zip(scores, errors, strict=True)):
            if np.isnan(score):
                continue
            spread = np.hypot(error, self.errors)
            below = (self.scores <= score).astype(np.float64)
            noisy = (spread > 0.0) & np.isfinite(self.scores) & np.isfinite(score)
            z = (score - self.scores[noisy]) / spread[noisy]
            below[noisy] = torch.special.ndtr(torch.from_numpy(z)).numpy()
            found[place] = (1.0 + below.sum()) / (len(self.scores) + 1.0)
        return found


@dataclass(frozen=True)
class Difference:
    """A comparison of samples with held-out rows.

    Args:
        columns: names of the columns compared; all of them together is one comparison.
        energy: the energy coefficient H of the ranks, 0 (equal) to 1.
        p_value: share of permutations in which any comparison stands out more.
    """

    columns: tuple[str, ...]
    energy: float
    p_value: float


@dataclass(frozen=True)
class Diagnosis:
    """Samples of a density beside rows that it has not seen; ``str`` says whether to trust it.

    Args:
        names: of the columns.
        held_out: rows that were held out, ``(n, D)``; categories by their number, NaN where a value is missing.
        samples: rows of the model, ``(m, D)``.
        ranks: probability integral transforms of the held-out values: the share of samples below, ``(n, D)``. They are
            uniform for a perfect model.
        distances: the largest distance between the distribution functions of a column, ``(D,)`` (Kolmogorov, Smirnov).
        differences: comparisons of single columns, pairs, and all columns, the smallest p-value first.
        anomalies: scores of the held-out rows.
        truncations: changes of log p of the held-out rows by the noise left at t = 0, nats, ``(n,)``.
    """

    names: tuple[str, ...]
    held_out: np.ndarray
    samples: np.ndarray
    ranks: np.ndarray
    distances: np.ndarray
    differences: tuple[Difference, ...]
    anomalies: Anomalies
    truncations: np.ndarray

    @property
    def found(self) -> tuple[Difference, ...]:
        """Differences that chance does not explain."""
        return tuple(each for each in self.differences if each.p_value <= _LEVEL)

    @property
    def trusted(self) -> bool:
        """Whether nothing was found that speaks against the density."""
        return not self._reasons()

    def _reasons(self) -> list[str]:
        said = []
        if self.found:
            shown = [" and ".join(each.columns) if len(each.columns) < 3 else "all columns" for each in self.found]
            named = ", ".join(shown[:5]) + f" and {len(shown) - 5} more" * (len(shown) > 5)
            said.append(f"samples differ from held-out rows in {named}; train longer, on more rows, or wider")
        hidden = hidden_structure(self.truncations)
        said += [hidden] if hidden else []
        without = int((self.anomalies.scores == -math.inf).sum())
        if without:
            said.append(f"{without} held-out rows have no mass: values out of bounds, or new categories")
        return said

    def __str__(self) -> str:
        said = self._reasons()
        if said:
            return "Do not trust this density: " + ". And ".join(said) + "."
        return (
            f"{len(self.samples)} samples differ from {len(self.held_out)} held-out rows by no more than chance, in "
            f"{len(self.differences)} comparisons of columns, of pairs and of all columns."
        )

    def to_json(self) -> dict[str, Any]:
        """The numbers, without the rows."""
        known = self.truncations[np.isfinite(self.truncations)]
        return {
            "trusted": self.trusted,
            "verdict": str(self),
            "held_out": len(self.held_out),
            "samples": len(self.samples),
            "truncation": float(np.median(known)) if len(known) else None,
            "distances": dict(zip(self.names, self.distances.tolist(), strict=True)),
            "differences": [
                {"columns": list(each.columns), "energy": each.energy, "p_value": each.p_value}
                for each in self.differences
            ],
            "scores": self.anomalies.scores.tolist(),
            "errors": self.anomalies.errors.tolist(),
        }


def diagnose(
    names: Sequence[str], held_out: np.ndarray, samples: np.ndarray, anomalies: Anomalies,
    truncations: np.ndarray, random: np.random.Generator,
) -> Diagnosis:  # fmt: skip
    """Compare samples with rows that were held out.

    Args:
        names: of the columns.
        held_out: rows ``(n, D)``; categories by their number, NaN where a value is missing. Missing values are left
            out of the comparisons.
        samples: rows of the model, ``(m, D)``.
        anomalies: scores of the held-out rows.
        truncations: changes of log p of the held-out rows by the noise left at t = 0, nats, ``(n,)``.
        random: source of the permutations.
    """
    empty = np.isnan(held_out).all(0) | np.isnan(samples).all(0)
    there = np.flatnonzero(~empty).tolist()
    names, held_out, samples = tuple(names[k] for k in there), held_out[:, there], samples[:, there]
    ties = random.random(held_out.shape)
    pairs = zip(held_out.T, samples.T, ties.T, strict=True)
    ranks = np.stack([_shares(data, drawn, tie) for data, drawn, tie in pairs], 1)
    return Diagnosis(
        names=names, held_out=held_out, samples=samples, ranks=ranks,
        distances=np.array([_distance(data, drawn) for data, drawn in zip(held_out.T, samples.T, strict=True)]),
        differences=_differences(names, held_out, samples, random), anomalies=anomalies, truncations=truncations,
    )  # fmt: skip


def _shares(data: np.ndarray, drawn: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """Share of the samples below each value, and a random part of those equal to it."""
    below, most = (np.searchsorted(np.sort(drawn), data, side) for side in ("left", "right"))
    shares = (below + ties * (most - below)) / len(drawn)
    return np.where(np.isnan(data), np.nan, shares)


def _distance(data: np.ndarray, drawn: np.ndarray) -> float:
    """The largest distance between two empirical distribution functions."""
    a, b = (np.sort(each[~np.isnan(each)]) for each in (data, drawn))
    at = np.concatenate([a, b])
    return float(abs(np.searchsorted(a, at, "right") / len(a) - np.searchsorted(b, at, "right") / len(b)).max())


def _differences(
    names: tuple[str, ...], held_out: np.ndarray, samples: np.ndarray, random: np.random.Generator
) -> tuple[Difference, ...]:
    """Comparisons of single columns, the most dependent pairs, and all columns, the smallest p-value first."""
    n, pooled = len(held_out), np.concatenate([held_out, samples])
    ranks = np.stack([_ranks_of(column) for column in pooled.T], 1)
    d = ranks.shape[1]
    subsets: list[tuple[int, ...]] = [(k,) for k in range(d)] + (_pairs(ranks[:n]) if d > 1 else [])
    subsets += [tuple(range(d))] if d > 2 else []
    labels = np.zeros((len(pooled), 1 + _PERMUTATIONS), dtype=bool)
    labels[:n, 0] = True
    for place in range(1, labels.shape[1]):
        labels[random.permutation(len(pooled))[:n], place] = True
    squares, energies = zip(*(_compare(ranks[:, subset], labels) for subset in subsets), strict=True)
    values = np.cbrt(np.maximum(squares, 0.0))  # nearly normal under permutations, as squares are for many terms
    chance = values[:, 1:]
    z = (values - chance.mean(1, keepdims=True)) / np.maximum(chance.std(1, keepdims=True), 1e-12)
    largest = z[:, 1:].max(0)
    p_values = [(1.0 + (largest >= value).sum()) / labels.shape[1] for value in z[:, 0]]
    found = [
        Difference(tuple(names[k] for k in subset), float(energy), float(p))
        for subset, energy, p in zip(subsets, energies, p_values, strict=True)
    ]
    return tuple(sorted(found, key=lambda each: (each.p_value, -each.energy)))


def _ranks_of(column: np.ndarray) -> np.ndarray:
    """Ranks in [0, 1], equal values sharing theirs; NaN stays."""
    there = ~np.isnan(column)
    _, inverse, counts = np.unique(column[there], return_inverse=True, return_counts=True)
    middle = counts.cumsum() - 0.5 * counts
    found = np.full(len(column), np.nan)
    found[there] = middle[inverse] / there.sum()
    return found


def _pairs(ranks: np.ndarray) -> list[tuple[int, ...]]:
    """All pairs of columns, or so many of them that depend most on each other."""
    filled = np.where(np.isnan(ranks), 0.5, ranks)
    filled = filled - filled.mean(0)
    products = abs(filled.T @ filled) / np.maximum(np.linalg.norm(filled, axis=0), 1e-12)
    strength = products / np.maximum(np.linalg.norm(filled, axis=0), 1e-12)[:, None]
    pairs = list(combinations(range(ranks.shape[1]), 2))
    return sorted(sorted(pairs, key=lambda pair: -strength[pair])[:_MOST_PAIRS])


def _compare(ranks: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float]:
    """The squared energy distance for every labelling, and the energy coefficient of the first."""
    there = torch.from_numpy(~np.isnan(ranks).any(1))
    x, own = torch.from_numpy(ranks)[there], torch.from_numpy(labels)[there]
    if not bool((own.any(0) & (~own).any(0)).all()):
        return np.zeros(labels.shape[1]), 0.0
    distances = torch.log1p(torch.cdist(x, x) / _SCALE).float()
    held, drawn = (each.float() / each.sum(0) for each in (own, ~own))
    difference = held - drawn
    squares = -(difference * (distances @ difference)).sum(0)
    across = 2.0 * float(held[:, 0] @ distances @ drawn[:, 0])
    return squares.double().numpy(), float(squares[0]) / across if across > 0.0 else 0.0
