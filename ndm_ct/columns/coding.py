r"""Rows of a table as coordinates of the model and back, with what the change of variables adds to the log-density.

A rounded value x with bins of width w becomes :math:`x + w (u - \frac12)`, u uniform, and

.. math::
    P(x) = E_u\,[w\, p(x + w (u - \tfrac12))] .

Values above a bound become :math:`\log(x - lo)`, below one :math:`-\log(hi - x)`, between two
:math:`\operatorname{logit} \frac{x - lo}{hi - lo}`, each with the logarithm of its derivative. A value on a circle of
period P becomes the point :math:`(r \cos\theta, r \sin\theta)`, :math:`\theta = 2\pi (x - lo)/P`, with a random radius
:math:`r \sim q`,

.. math::
    p(x) = E_{r \sim q}\Bigl[\frac{2\pi}{P}\, \frac{r\, p(r \cos\theta, r \sin\theta)}{q(r)}\Bigr], \qquad
    \log r \sim N(0, s^2),

which is the integral of the density along the ray of x: the model knows that the circle closes.

References:
    Hoogeboom, Cohen and Tomczak, Learning Discrete Distributions by Dequantization, https://arxiv.org/abs/2001.11235
    Huang, Dinh and Courville, Augmented Normalizing Flows, https://arxiv.org/abs/2002.07101
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ndm_ct.columns.kinds import Column, Values, restored

__all__ = ["Coded", "Coding"]

_RADIUS = 0.25
"""s, deviation of the logarithm of the radius."""

_ON_GRID = 1e-3
"""Distance from the grid of a rounded column, in bins, that rounding explains."""


@dataclass(frozen=True)
class Coded:
    """Rows as the model takes them.

    Args:
        features: ``(N, m)``, standardised; NaN where the value is missing.
        codes: ``(N, C)``, categories by their places, int64; -1 where the value is missing.
        weights: ``(N, D)``, what every column adds to the log-density of its features, nats.
        possible: ``(N, D)``, whether the model gives the value any mass at all.
    """

    features: np.ndarray
    codes: np.ndarray
    weights: np.ndarray
    possible: np.ndarray


class Coding:
    """The change of variables of a table.

    Args:
        columns: of the table.
        mean: of the features, ``(m,)``; None is 0.
        scale: of the features, ``(m,)``; None is 1.
    """

    def __init__(self, columns: Sequence[Column], mean: Any = None, scale: Any = None) -> None:
        self.columns = tuple(columns)
        owners = [place for place, column in enumerate(self.columns) for _ in range(column.features)]
        self.owners = np.array(owners, dtype=np.int64)
        """The column of every feature."""
        self.categorical = [place for place, column in enumerate(self.columns) if column.kind == "categorical"]
        self.sizes = tuple(len(self.columns[place].values) for place in self.categorical)
        modelled = [place for place, column in enumerate(self.columns) if column.is_modelled]
        self.modelled = np.array(modelled, dtype=np.int64)
        self.noises = sum(column.noises for column in self.columns)
        self.mean = np.zeros(len(owners)) if mean is None else np.asarray(mean, dtype=np.float64)
        self.scale = np.ones(len(owners)) if scale is None else np.asarray(scale, dtype=np.float64)

    def has_gaps(self, numbers: np.ndarray) -> bool:
        """Whether a value that the model gives is missing in some row of ``(N, D)``."""
        return bool(np.isnan(numbers[:, self.modelled]).any())

    @property
    def is_plain(self) -> bool:
        """Whether all columns go to the model as they are."""
        return all(column.is_plain for column in self.columns)

    def fit_scale(self, numbers: np.ndarray, noise: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Set mean and scale from training rows, NaN aside; arguments as of :meth:`encode`, and weights of the rows."""
        features = self.encode(numbers, noise).features * self.scale + self.mean
        for k, x in enumerate(features.T):
            known = ~np.isnan(x)
            own = None if weights is None else weights[known]
            x = x[known]
            self.mean[k] = np.average(x, weights=own)
            spread = np.sqrt(np.average((x - self.mean[k]) ** 2, weights=own))
            self.scale[k] = spread if spread > 10.0 * np.finfo(np.float64).eps * abs(x).max() else 1.0

    def encode(self, numbers: np.ndarray, noise: np.ndarray) -> Coded:
        """Code rows.

        Args:
            numbers: ``(N, D)``; NaN is missing, categories are places among the column's values (:meth:`places_of`).
            noise: uniform in (0, 1), ``(N, noises)``.
        """
        n, d = numbers.shape
        features, codes = np.zeros((n, len(self.owners))), np.full((n, len(self.sizes)), -1, dtype=np.int64)
        weights, possible = np.zeros((n, d)), np.ones((n, d), dtype=bool)
        column_noise = iter(noise.T)
        for place, column in enumerate(self.columns):
            x = numbers[:, place]
            missing = np.isnan(x)
            if column.kind in ("categorical", "constant"):
                possible[:, place] = missing | (x >= 0.0)
                if column.kind == "categorical":
                    codes[:, self.categorical.index(place)] = np.where(missing, -1.0, x)
            elif column.features:
                own = self.owners == place
                u = [next(column_noise) for _ in range(column.noises)]
                found, weight, inside = _lift(column, x, u)
                features[:, own] = (found - self.mean[own]) / self.scale[own]
                features[missing[:, None] & own] = np.nan
                weights[:, place] = np.where(missing, 0.0, weight - np.log(self.scale[own]).sum())
                possible[:, place] = missing | inside
        return Coded(features, codes, weights, possible)

    def decode(self, features: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Rows ``(N, D)`` from features ``(N, m)`` and codes ``(N, C)``; columns that were left out are NaN."""
        values = np.full((len(features), len(self.columns)), np.nan)
        for place, column in enumerate(self.columns):
            if column.kind == "constant":
                values[:, place] = 0.0
            elif column.kind == "categorical":
                values[:, place] = codes[:, self.categorical.index(place)]
            elif column.features:
                own = self.owners == place
                values[:, place] = _drop(column, features[:, own] * self.scale[own] + self.mean[own])
        return values

    def places_of(self, values: Values) -> np.ndarray:
        """The numbers of a table ``(N, D)``, with categories and constants by their places among the column's values.

        A value that the column does not have is -1; NaN stays.
        """
        numbers = values.numbers.copy()
        for place, column in enumerate(self.columns):
            if not column.values:
                continue
            words = values.words.get(place)
            known = {value: k for k, value in enumerate(column.values)}
            distinct, index = np.unique(numbers[:, place], return_inverse=True)
            if words is not None:
                keys = [words[int(each)] if each == each else None for each in distinct]
            else:
                keys = distinct.tolist()
            found = [np.nan if each != each else known.get(key, -1.0) for each, key in zip(distinct, keys, strict=True)]
            numbers[:, place] = np.array(found)[index]
        return numbers

    def values_of(self, numbers: np.ndarray) -> np.ndarray:
        """Rows from :meth:`decode` with categories as they came: numbers, or objects if some are words."""
        found = [
            np.array(column.values, dtype=object)[x.astype(np.int64)] if column.values else x
            for column, x in zip(self.columns, numbers.T, strict=True)
        ]
        numeric = all(isinstance(value, float) for column in self.columns for value in column.values)
        return np.stack([each.astype(np.float64 if numeric else object) for each in found], 1)

    def to_json(self) -> dict[str, Any]:
        """For :meth:`restored`."""
        columns = [column.to_json() for column in self.columns]
        return {"columns": columns, "mean": self.mean.tolist(), "scale": self.scale.tolist()}

    @staticmethod
    def restored(entries: dict[str, Any]) -> "Coding":
        """From what :meth:`to_json` wrote."""
        return Coding(restored(entries["columns"]), entries["mean"], entries["scale"])


def _lift(column: Column, x: np.ndarray, noise: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features ``(N, 1 or 2)`` of values, the log-weight ``(N,)``, and whether a value is possible."""
    weight, inside = np.zeros(len(x)), np.ones(len(x), dtype=bool)
    if column.width is not None:
        weight += np.log(column.width)
        steps = (x - column.origin) / column.width
        inside &= abs(steps - np.round(steps)) < _ON_GRID
        x = column.origin + column.width * (np.round(steps) + noise.pop(0) - 0.5)
    if column.kind == "circular":
        turn = 2.0 * np.pi / (column.period or 1.0)
        angle = turn * (x - (column.low or 0.0))
        log_r = _RADIUS * torch.special.ndtri(torch.from_numpy(noise.pop(0))).numpy()
        log_q = -0.5 * (log_r / _RADIUS) ** 2 - np.log(_RADIUS * np.sqrt(2.0 * np.pi)) - log_r
        r = np.exp(log_r)
        circle = np.stack([r * np.cos(angle), r * np.sin(angle)], 1)
        return circle, weight + np.log(turn) + log_r - log_q, inside
    low, high = _bounds(column)
    inside &= (x > low) & (x < high)
    x = np.where(inside, x, np.clip(low + 1.0, None, 0.5 * (low + high)) if np.isfinite(low) else high - 1.0)
    below = np.log(x - low) if np.isfinite(low) else np.zeros(len(x))
    above = np.log(high - x) if np.isfinite(high) else np.zeros(len(x))
    if not (np.isfinite(low) or np.isfinite(high)):
        return x[:, None], weight, inside
    span = np.log(high - low) if np.isfinite(high - low) else 0.0
    return (below - above)[:, None], weight + span - below - above, inside


def _drop(column: Column, features: np.ndarray) -> np.ndarray:
    """Values from features in their own units."""
    if column.kind == "circular":
        angle = np.arctan2(features[:, 1], features[:, 0]) % (2.0 * np.pi)
        start, period = column.low or 0.0, column.period or 1.0
        return start + (_rounded(column, start + period * angle / (2.0 * np.pi)) - start) % period
    x, (low, high) = features[:, 0], _bounds(column)
    if np.isfinite(high - low):
        x = low + (high - low) * torch.from_numpy(x).sigmoid().numpy()
    elif np.isfinite(low):
        x = low + np.exp(x)
    elif np.isfinite(high):
        x = high - np.exp(-x)
    # Rounding puts values onto the bounds.
    return _rounded(column, np.clip(x, np.nextafter(low, np.inf), np.nextafter(high, -np.inf)))


def _bounds(column: Column) -> tuple[float, float]:
    """The ends of the interval in which values lie, bins included; infinite where there is no bound."""
    reach = 0.0 if column.width is None else 0.5 * column.width
    low, high = (-np.inf if column.low is None else column.low), (np.inf if column.high is None else column.high)
    return low - reach, high + reach


def _rounded(column: Column, x: np.ndarray) -> np.ndarray:
    """The middles of the bins in which values lie."""
    return x if column.width is None else column.origin + column.width * np.round((x - column.origin) / column.width)
