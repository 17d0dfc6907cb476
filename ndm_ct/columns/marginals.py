r"""Every column of a table through a curve of its own quantiles, then whitening: an invertible map, fitted and fixed.

A diffusion model sees no structure that is finer than its noise at t = 0. A column with a narrow peak and rare large
values has such structure, in whatever unit it is measured. The map takes scales, peaks and heavy tails away before the
model sees the rows, and its log-determinant is part of every density.

.. math::
    y = W\,\bigl(T_1(x_1), \dots, T_d(x_d)\bigr), \qquad
    \log p(x) = \log p_Y(y) + \log|\det W| + \sum_i \log T_i'(x_i)

Each :math:`T_i` takes the quantiles of column i to those of N(0, 1). Between the knots it is a rational-quadratic
spline. Beyond the last knot :math:`x_k`, at :math:`y_k = |T(x_k)|`, in the units :math:`v = |x - x_k|\,T'(x_k)` and
:math:`w = |T(x)| - y_k`,

.. math::
    e^{-(y_k w + w^2/2)} = (1 + h\,y_k v)^{-1/h}, \qquad h \ge 0: \text{ generalised Pareto},
    \qquad\text{or}\qquad w = v: \text{ Gaussian},

whichever gives the rows beyond the knot the larger likelihood. So the tail of the map is a power with the exponent of
the rows, exponential or Gaussian, and no lighter. W is the symmetric inverse root of the correlations of :math:`T(x)`.

References:
    Gregory and Delbourgo, Piecewise rational quadratic interpolation to monotonic data,
    https://doi.org/10.1093/imanum/2.2.123
    Pickands, Statistical inference using extreme order statistics, https://doi.org/10.1214/aos/1176343003
    Durkan et al., Neural Spline Flows, https://arxiv.org/abs/1906.04032
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from ndm_ct._core.config import Configurable

__all__ = ["ColumnMap", "InTurn", "fit_column_map"]

_ROWS_IN_BIN = 20
"""Rows beyond the last knot on either side, and about as many in the outermost bin."""

_SMALLEST_TAIL = 1e-4
_LARGEST_TAIL = 0.25
_FINEST = 0.2
"""Least distance of knots, in units of N(0, 1)."""

_ROUNDING = 1e-6
"""Least distance of knots, of their size, so that they stay apart in float32."""

_WHITENED = 512
"""Most columns that are whitened."""

_ROWS_PER_COLUMN = 10
"""Rows per column below which correlations are uncertain."""

_SMALLEST_H, _LARGEST_H = 1e-6, 10.0

_SIDES = ((0, 0, -1.0), (1, -1, 1.0))
"""The tails: their place in ``tails``, the knot where they begin, and their direction."""


class ColumnMap(nn.Module, Configurable):
    """The map of a table's columns, for :class:`~ndm_ct.transforms.Flow`. :func:`fit_column_map` makes one of rows.

    Args:
        columns: number of columns d.
        knots: number of knots K per column.

    Example:
        >>> column_map = ColumnMap(2, 3)  # the identity, until it is fitted
        >>> y, logdet = column_map(torch.tensor([[0.5, -7.0]]))
        >>> y, logdet, column_map.inverse(y)
        (tensor([[ 0.5000, -7.0000]]), tensor([0.]), tensor([[ 0.5000, -7.0000]]))
    """

    x: Tensor
    y: Tensor
    log_slope: Tensor
    tails: Tensor
    whitening: Tensor
    log_whitening: Tensor

    def __init__(self, columns: int, knots: int) -> None:
        super().__init__()
        self.columns, self.knots = columns, knots
        line = torch.linspace(-1.0, 1.0, knots)
        self.register_buffer("x", line.repeat(columns, 1))
        self.register_buffer("y", line.clone())
        self.register_buffer("log_slope", torch.zeros(columns, knots))
        self.register_buffer("tails", torch.full((columns, 2), -1.0))
        self.register_buffer("whitening", torch.eye(columns))
        self.register_buffer("log_whitening", torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map rows ``(B, d)`` to latents y, with the log-determinant ``(B,)``, nats."""
        scores, logs = self.scores(x.T.contiguous())
        return (self.whitening @ scores).T, logs.sum(0) + self.log_whitening

    def inverse(self, y: Tensor) -> Tensor:
        """Map latents ``(B, d)`` to rows."""
        y = torch.linalg.solve(self.whitening, y.T).contiguous()
        x0, width, y0, height, d0, d1 = self._bins(self.y.expand(self.columns, -1).contiguous(), y)
        s, r = height / width, (y - y0).clamp(min=torch.zeros_like(height), max=height)
        mixed = d1 + d0 - 2.0 * s
        a, b, c = height * (s - d0) + r * mixed, height * d0 - r * mixed, -s * r
        x = x0 + width * 2.0 * c / (-b - (b**2 - 4.0 * a * c).clamp_min(0.0).sqrt())
        for side, end, sign in _SIDES:
            w = (sign * (y - self.y[end])).clamp_min(0.0)
            v = _tail_inverse(w, self.tails[:, side, None], self.y[-1])
            x = torch.where(w > 0.0, self.x[:, end, None] + sign * v / self.log_slope[:, end, None].exp(), x)
        return x.T

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""T(x) and :math:`\log T'(x)`, both ``(d, B)``, of columns ``(d, B)``, before whitening."""
        x0, width, y0, height, d0, d1 = self._bins(self.x, x)
        u = ((x - x0) / width).clamp(0.0, 1.0)
        s = height / width
        below = s + (d1 + d0 - 2.0 * s) * u * (1.0 - u)
        y = y0 + height * (s * u**2 + d0 * u * (1.0 - u)) / below
        log = 2.0 * s.log() + (d1 * u**2 + 2.0 * s * u * (1.0 - u) + d0 * (1.0 - u) ** 2).log() - 2.0 * below.log()
        for side, end, sign in _SIDES:
            slope = self.log_slope[:, end, None]
            v = (sign * (x - self.x[:, end, None])).clamp_min(0.0) * slope.exp()
            w, rate = _tail(v, self.tails[:, side, None], self.y[-1])
            y = torch.where(v > 0.0, self.y[end] + sign * w, y)
            log = torch.where(v > 0.0, slope + rate, log)
        return y, log

    def _bins(self, knots: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """Left end, width, lower end, height and the slopes at both ends of the bins in which values ``(d, B)`` lie."""
        left = torch.searchsorted(knots, values.detach()).clamp(1, self.knots - 1) - 1
        low, high = ([each.gather(1, left + step) for each in self._table()] for step in (0, 1))
        (x0, y0, d0), (x1, y1, d1) = low, high
        return x0, x1 - x0, y0, y1 - y0, d0, d1

    def _table(self) -> tuple[Tensor, ...]:
        return self.x, self.y.expand(self.columns, -1), self.log_slope.exp()


class InTurn(nn.Module):
    """Two invertible maps, one after the other, for :class:`~ndm_ct.transforms.Flow`.

    Args:
        first: the map that takes the rows.
        then: the map that takes what the first returns.
    """

    def __init__(self, first: nn.Module, then: nn.Module) -> None:
        super().__init__()
        self.first, self.then = first, then

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The latents, and the sum of the log-determinants, ``(B,)``."""
        middle, first = self.first(x)
        y, then = self.then(middle)
        return y, first + then

    def inverse(self, y: Tensor) -> Tensor:
        """The rows."""
        return self.first.inverse(self.then.inverse(y))  # type: ignore[operator]


def _tail(v: Tensor, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    r"""w and :math:`\log dw/dv`. A negative h stands for the Gaussian tail, 0 for the exponential one."""
    size = h.clamp_min(_SMALLEST_H)
    log = (size * y * v).log1p()
    w = (y**2 + 2.0 * log / size).sqrt() - y
    gaussian = h < 0.0
    return torch.where(gaussian, v, w), torch.where(gaussian, 0.0, -log - (w / y).log1p())


def _tail_inverse(w: Tensor, h: Tensor, y: Tensor) -> Tensor:
    size = h.clamp_min(_SMALLEST_H)
    return torch.where(h < 0.0, w, (size * (y * w + 0.5 * w**2)).expm1() / (size * y))


def fit_column_map(rows: np.ndarray, plain: np.ndarray | None = None, whiten: bool = True) -> ColumnMap:
    """Fit the map of standardised rows. It is made in float64, and ``float()`` rounds it.

    Args:
        rows: ``(N, d)``, finite, two or more; every column with mean near 0 and deviation near 1.
        plain: columns ``(d,)`` that keep their values, such as those whose values repeat; None: none.
        whiten: whether to take the correlations out. Without it every column is mapped alone.

    Example:
        >>> rows = np.random.default_rng(0).standard_t(2.0, size=(5000, 1))
        >>> y, logdet = fit_column_map(rows)(torch.from_numpy(rows))
        >>> bool(y.abs().max() < 5.0), abs(float(y.std()) - 1.0) < 0.05
        (True, True)
    """
    n, d = rows.shape
    y = _knots(n)
    found = ColumnMap(d, len(y)).double()
    found.y.copy_(y)
    for i in range(d):
        if plain is not None and plain[i]:
            found.x[i] = y
        else:
            _fit_column(found, i, torch.from_numpy(np.sort(rows[:, i].astype(np.float64))))
    if whiten and 1 < d <= _WHITENED:
        found.whitening.copy_(_whitening(found(torch.from_numpy(rows.astype(np.float64)))[0]))
        found.log_whitening.copy_(torch.linalg.slogdet(found.whitening)[1])
    return found


def _knots(n: int) -> Tensor:
    """Knots in the units of N(0, 1), equally spaced, with about twenty of n rows beyond each end."""
    tail = min(max(_ROWS_IN_BIN / n, _SMALLEST_TAIL), _LARGEST_TAIL)
    end = -float(torch.special.ndtri(torch.tensor(tail, dtype=torch.float64)))
    density = np.exp(-0.5 * end**2) / np.sqrt(2.0 * np.pi)
    spacing = max(_ROWS_IN_BIN / (n * density), _FINEST)
    return torch.linspace(-end, end, 2 * max(1, round(end / spacing)) + 1, dtype=torch.float64)


def _fit_column(found: ColumnMap, i: int, ordered: Tensor) -> None:
    """Put the knots of column i at its quantiles, and fit the two tails to what lies beyond."""
    levels = torch.special.ndtr(found.y)
    x = torch.quantile(ordered, levels) if len(ordered) < 2**24 else ordered[(levels * len(ordered)).long()]
    gaps = x.diff()
    rounding = _ROUNDING * torch.maximum(x[1:].abs(), x[:-1].abs()).clamp_min(gaps.median())
    gaps = torch.maximum(gaps, rounding)
    x = torch.cat([x[:1], x[:1] + gaps.cumsum(0)])
    secants = (found.y.diff() / gaps).log()
    steps = secants.diff()
    ends = [secants[:1] - 0.5 * steps[:1].clamp(-2.0, 2.0), secants[-1:] + 0.5 * steps[-1:].clamp(-2.0, 2.0)]
    found.x[i], found.log_slope[i] = x, torch.cat([ends[0], 0.5 * (secants[1:] + secants[:-1]), ends[1]])
    for side, end, sign in _SIDES:
        v = sign * (ordered - x[end]) * found.log_slope[i, end].exp()
        found.tails[i, side] = _fit_tail(v[v > 0.0], float(found.y[-1]))


def _fit_tail(v: Tensor, y: float) -> float:
    """The h under which v, what lies beyond a knot, is likeliest; -1 if a Gaussian tail is likelier than all."""
    h = torch.linspace(0.0, _LARGEST_H, 201, dtype=torch.float64).clamp_min(_SMALLEST_H)
    powers = math.log(y) - ((1.0 / h + 1.0)[:, None] * (h[:, None] * y * v).log1p()).mean(1)
    beyond = float(torch.special.log_ndtr(torch.tensor(-y, dtype=torch.float64)))
    gaussian = -0.5 * float((y + v).square().mean()) - 0.5 * math.log(2.0 * math.pi) - beyond
    best = int(powers.argmax())
    return -1.0 if not len(v) or gaussian >= float(powers[best]) else float(h[best])


def _whitening(scores: Tensor) -> Tensor:
    """The symmetric inverse root of the correlations, drawn towards the identity where there are few rows."""
    n, d = scores.shape
    spread = scores.std(0).clamp_min(1e-6)
    correlations = torch.corrcoef(scores.T).nan_to_num(0.0).fill_diagonal_(1.0)
    share = d / (n + d) if n < _ROWS_PER_COLUMN * d else 0.0
    values, vectors = torch.linalg.eigh((1.0 - share) * correlations + share * torch.eye(d, dtype=torch.float64))
    return vectors @ torch.diag(values.clamp_min(1e-8).rsqrt()) @ vectors.T @ torch.diag(1.0 / spread)
