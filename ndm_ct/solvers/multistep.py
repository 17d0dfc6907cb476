r"""Solves of :math:`dw = D(w, s)\, d\varphi(s)` on one grid for all rows, with one evaluation of D per step.

D is interpolated by a polynomial in s and integrated against :math:`d\varphi` exactly, so that a fast
:math:`\varphi`, such as :math:`e^s`, costs nothing. A step predicts from the last three values of D, evaluates D there,
and corrects with the new value,

.. math::
    w^P_{n+1} = w_n + \sum_{j=0}^{2} b_j D_{n-j}, \qquad
    D_{n+1} = D(w^P_{n+1}, s_{n+1}), \qquad
    w_{n+1} = w_n + \sum_{j=-1}^{2} b^*_j D_{n-j}, \qquad
    b_j = \int_{s_n}^{s_{n+1}} \ell_j(s)\, \varphi'(s)\, ds,

with the Lagrange polynomials :math:`\ell_j` of the places used: the pair of Adams in the mode PEC, of order 4. The
first steps use the values that there are. Between two places w is the integral of the same polynomial.

References:
    Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section III.1, the pairs of Adams
    Zhang and Chen, Fast Sampling of Diffusion Models with Exponential Integrator, https://arxiv.org/abs/2204.13902
    Zhao et al., UniPC, https://arxiv.org/abs/2302.04867, a corrector whose evaluation serves the next predictor
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ndm_ct._core.checks import append_axes, event_size

__all__ = ["MultistepSolution", "graded_grid", "odeint_multistep"]

_GAUSS = np.polynomial.legendre.leggauss(8)
_FIRST = (1 / 7, 3 / 7)
"""Where the first step is split, because a single value of D is known there."""
_KNOWN = 3
"""Values of D that a predictor uses."""

Density = Callable[[Tensor], Tensor]
r""":math:`\varphi'(s)`, of the shape of s."""


@dataclass(frozen=True)
class MultistepSolution:
    r"""The result of a solve.

    Args:
        state: w at the end, ``(B, *)``; zero in failed rows.
        failed: rows that left early, ``(B,)``.
        nodes: w at the places asked for, ``(N, B, *)``, or None.
        slopes: the polynomial that was integrated in place of D, there, or None.
        nfe: evaluations of D, ``(B,)``.
    """

    state: Tensor
    failed: Tensor
    nodes: Tensor | None
    slopes: Tensor | None
    nfe: Tensor


def graded_grid(start: float, end: float, steps: int, device: torch.device) -> Tensor:
    """The places of a solve, ``(steps + 3,)``: even steps, the first of them split in three, each twice the last.

    Args:
        start: first place.
        end: last place.
        steps: even steps.
        device: of the result.
    """
    u = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64, device=device)
    first = u[1] * torch.tensor(_FIRST, dtype=torch.float64, device=device)
    return start + (end - start) * torch.cat([u[:1], first, u[1:]])


def odeint_multistep(
    function: Callable[[int, Tensor, Tensor], Tensor],
    state: Tensor,
    grid: Tensor,
    density: Density,
    *,
    nodes: Tensor | None = None,
    with_slopes: bool = False,
    limit: float = math.inf,
    callback: Callable[[int], None] | None = None,
) -> MultistepSolution:
    r"""Solve :math:`dw = D(w, s)\,\varphi'(s)\,ds` along a grid of places; no row sees another.

    Args:
        function: D, called with the number of a place of the grid, the state there ``(b, *)``, and the numbers ``(b,)``
            of the rows that are left; once per place.
        state: w at the first place, ``(B, *)``, float64.
        grid: the places, ``(n,)``, float64, strictly increasing or decreasing.
        density: :math:`\varphi'`.
        nodes: places ``(N, B)`` inside the grid's range at which w is wanted too.
        with_slopes: whether to return ``slopes``.
        limit: a row leaves as failed once :math:`\operatorname{rms}(w_n - w^P_n)` exceeds it, from the first predictor
            of order 3 on, or its D is not finite. The error of a step is a small part of that difference.
        callback: called with the number of the place before every step.

    Returns:
        The solution.

    Example:
        >>> grid = graded_grid(0.0, 1.0, 20, torch.device("cpu"))
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> solved = odeint_multistep(lambda n, w, rows: -w, one, grid, torch.ones_like)
        >>> bool((solved.state - torch.exp(-one)).abs() < 1e-6), solved.nfe.tolist()
        (True, [23])
    """
    rows = torch.arange(len(state), device=state.device)
    dense, nfe = _Dense(nodes, state, with_slopes), torch.zeros_like(rows)
    w, values = state, [function(0, state, rows)]
    good = _finite(values[0])
    for n in range(len(grid) - 1):
        nfe[rows] = n + 1
        if not bool(good.all()):
            keep = torch.nonzero(good).flatten()
            rows, w, values, good = rows[keep], w[keep], [value[keep] for value in values], good[keep]
        if len(rows) == 0:
            break
        if callback is not None:
            callback(n)
        first = n + 1 - len(values)
        predicted = w + _combine(_weights(grid[first : n + 1], grid[n], grid[n + 1], density), values)
        values.append(function(n + 1, predicted, rows))
        used = grid[first : n + 2]
        dense.visit(rows, w, values, used, grid[n : n + 2], density)
        w = w + _combine(_weights(used, grid[n], grid[n + 1], density), values)
        change = _by_row(w - predicted).square().mean(1).sqrt()
        good = _finite(values[-1]) & ((change <= limit) | (len(values) <= _KNOWN))
        values = values[-_KNOWN:]
    nfe[rows] = len(grid)
    rows, w = rows[good], w[good]
    failed = torch.ones(len(state), dtype=torch.bool, device=state.device).index_fill(0, rows, False)
    return MultistepSolution(torch.zeros_like(state).index_copy(0, rows, w), failed, dense.states, dense.slopes, nfe)


def _finite(value: Tensor) -> Tensor:
    """Rows that are finite, ``(b,)``."""
    return _by_row(value).isfinite().all(1)


def _by_row(value: Tensor) -> Tensor:
    """``(b, *)`` as a matrix; b may be zero."""
    return value.reshape(len(value), event_size(value.shape[1:]))


class _Dense:
    """Collects w, and the polynomial in place of D, at nodes, step by step."""

    def __init__(self, nodes: Tensor | None, state: Tensor, with_slopes: bool) -> None:
        self.nodes = nodes
        self.states = None if nodes is None else state.new_zeros(*nodes.shape, *state.shape[1:])
        self.slopes = torch.zeros_like(self.states) if self.states is not None and with_slopes else None

    def visit(
        self, rows: Tensor, w: Tensor, values: list[Tensor], used: Tensor, step: Tensor, density: Density
    ) -> None:
        """Take both at the nodes of a step of some rows, from its start and its polynomial."""
        if self.nodes is None or self.states is None:
            return
        places = self.nodes[:, rows]
        node, row = torch.nonzero((places >= step.min()) & (places <= step.max()), as_tuple=True)
        place, value = places[node, row], torch.stack(values, 1)[row]

        def combined(weights: Tensor) -> Tensor:
            return (append_axes(weights, value) * value).sum(1)

        self.states[node, rows[row]] = w[row] + combined(_weights(used, step[0], place, density))
        if self.slopes is not None:
            self.slopes[node, rows[row]] = combined(_lagrange(used, place))


def _weights(places: Tensor, start: Tensor, end: Tensor, density: Density) -> Tensor:
    r"""Integrals of :math:`\ell_j \varphi'` from ``start`` to ``end``, ``(*end, j)``, by Gauss-Legendre quadrature."""
    x, weights = (torch.as_tensor(each, dtype=torch.float64, device=places.device) for each in _GAUSS)
    half = 0.5 * (end - start)[..., None]
    s = start + half * (1.0 + x)
    mass = half * weights * density(s)
    return (mass[..., None] * _lagrange(places, s)).sum(-2)


def _lagrange(places: Tensor, s: Tensor) -> Tensor:
    r"""The polynomials :math:`\ell_j` of some places at s, ``(*s, j)``."""
    columns = []
    for j, place in enumerate(places):
        others = torch.cat([places[:j], places[j + 1 :]])
        columns.append(((s[..., None] - others) / (place - others)).prod(-1))
    return torch.stack(columns, -1)


def _combine(weights: Tensor, values: list[Tensor]) -> Tensor:
    """Sum of the values with their weights."""
    total = torch.zeros_like(values[0])
    for weight, value in zip(weights.tolist(), values, strict=True):
        total.add_(value, alpha=weight)
    return total
