r"""The log-determinant of a path that is solved first, by divergences at nodes along it.

.. math::
    \int_0^1 f(u)\, du \approx \sum_{k=0}^{n} w_k f(u_k), \qquad
    u_k = \tfrac12 \bigl(1 - \cos(\pi k / n)\bigr), \qquad f = \operatorname{tr} J(t(u))\, \frac{dt}{du} ,

is the rule of Clenshaw and Curtis: the integral of the polynomial through the nodes. The nodes of n are among those of
2n, so n doubles in every row until results agree. A smooth trace needs a few dozen nodes; a solver that integrates
it together with the state takes it at every evaluation.

The state and its slope come from one grid for all rows, on which the path is a curve :math:`\tilde z` that does not
quite follow the field. To first order that changes log p by

.. math::
    \int \langle s,\ \dot{\tilde z} - v(\tilde z, t) \rangle\, dt ,

with the score s. The fields at the nodes are evaluated anyway, so this estimate of the path's error is free.

References:
    Clenshaw and Curtis, A method for numerical integration on an automatic computer (1960)
    Trefethen, Is Gauss quadrature better than Clenshaw-Curtis? (2008)
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ndm_ct._core.checks import event_size, sum_event
from ndm_ct.divergence.interface import GridPath, LogDet, Path

if TYPE_CHECKING:
    from ndm_ct.divergence.probes import BoundTrace

__all__ = ["clenshaw_curtis", "logdet_at_nodes", "rows_at_once"]

INTERVALS = (32, 64, 128)
"""n, in turn; the first is compared with 16 and 8. Fewer than 32 miss the time features of this library's networks."""

SHARE = 1.0 / 3.0
"""Error of a rule in units of its difference from the rule before: less for smooth traces, about this where a network's
time features are just resolved."""

_NUMBERS, _SMALLEST_EVENT = 2**18, 16
"""Numbers that rows hold at once at most, products counted; and the size that a smaller event counts as."""


def rows_at_once(products: int, event_shape: tuple[int, ...]) -> int:
    """Rows whose products with the Jacobian, so many of each, are held at once; bounds the memory."""
    return max(1, _NUMBERS // (products * max(event_size(event_shape), _SMALLEST_EVENT)))


def clenshaw_curtis(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes and weights of n intervals, n even, on [0, 1], each ``(n + 1,)``, float64.

    Example:
        >>> u, w = clenshaw_curtis(4, torch.device("cpu"))
        >>> bool((w.sum() - 1.0).abs() < 1e-12), bool(((w * u**4).sum() - 0.2).abs() < 1e-12)
        (True, True)
    """
    k = torch.arange(n + 1, dtype=torch.float64, device=device)
    j = k[1 : n // 2 + 1]
    factors = torch.where(2 * j == n, 1.0, 2.0) / (4.0 * j * j - 1.0)
    weights = (1.0 - torch.cos(2.0 * math.pi / n * k[:, None] * j) @ factors) / n
    weights[[0, -1]] *= 0.5
    return 0.5 * (1.0 - torch.cos(math.pi / n * k)), weights


@dataclass
class _Nodes:
    """Divergences and defects at the nodes of the finest rule, NaN where they are not taken.

    Args:
        path: the path.
        bound: the probes.
        solved: the path on its grid, with the finest rule's nodes.
        times: t of the nodes, ``(N,)``.
        rate: dt/du there.
        forms: ``(N, B, columns)``.
        defects: ``(N, B)``.
    """

    path: Path
    bound: "BoundTrace"
    solved: GridPath
    times: Tensor
    rate: Tensor
    forms: Tensor
    defects: Tensor

    @classmethod
    def of(cls, path: Path, bound: "BoundTrace") -> "_Nodes":
        """Solve the path."""
        start = path.start
        u, _ = clenshaw_curtis(INTERVALS[-1], start.device)
        times, rate = path.coordinate(u)
        solved = path.on_grid(times[:, None].expand(-1, len(start)))
        unknown = rate.new_full((len(u), len(start), 1 + bound.columns), torch.nan)
        return cls(path, bound, solved, times, rate, unknown[..., 1:], unknown[..., 0])

    def take(self, n: int, rows: Tensor) -> None:
        """Evaluate some rows at the nodes that the rule of n intervals has and the one before has not."""
        stride = INTERVALS[-1] // n
        first = torch.arange(0, len(self.times), stride, device=rows.device)
        new = first if n == INTERVALS[0] else first[1::2]
        size = rows_at_once(self.bound.chunk or self.bound.vjps, self.path.start.shape[1:])
        node, row = new.repeat_interleave(len(rows)), rows.repeat(len(new))
        for nodes, some in zip(node.split(size), row.split(size), strict=True):
            self._evaluate(nodes, some)

    def _evaluate(self, node: Tensor, row: Tensor) -> None:
        path, t = self.path, self.times[node]
        assert self.solved.nodes is not None
        assert self.solved.slopes is not None
        z = self.solved.nodes[node, row]
        field, forms, F = self.bound.rows(row).with_byproduct(path.network_part(t, row), z, path.derivatives)
        residual = self.solved.slopes[node, row] - field
        self.forms[node, row] = self.rate[node, None] * forms
        self.defects[node, row] = self.rate[node] * sum_event(path.score(t, z, F, row) * residual)

    def integrals(self, n: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The rule of n intervals for some rows: divergences ``(b, columns)``, and the defects' ``(b,)``."""
        stride = INTERVALS[-1] // n
        _, weights = clenshaw_curtis(n, rows.device)
        forms, defects = self.forms[::stride][:, rows], self.defects[::stride][:, rows]
        return torch.einsum("n,nbk->bk", weights, forms), weights @ defects

    def change(self, n: int, rows: Tensor) -> Tensor:
        """Change of the estimate from the rule before, or a quarter of the one before that if it is larger, ``(b,)``.

        Two rules that are both too coarse agree by chance, three do so rarely.
        """
        fine, middle, coarse = (self.bound.combine(self.integrals(n // k, rows)[0])[0] for k in (1, 2, 4))
        return torch.maximum((fine - middle).abs(), 0.25 * (middle - coarse).abs())


def logdet_at_nodes(path: Path, bound: "BoundTrace") -> LogDet:
    """Solve a path on its grid, and integrate the divergences at nodes along it.

    Rows that the grid does not suit, or whose rules do not agree, are solved together with their divergences.

    Args:
        path: the path; it has a grid.
        bound: the probes.
    """
    nodes = _Nodes.of(path, bound)
    solved = nodes.solved
    integrated = nodes.forms.new_full((len(path.start), bound.columns), torch.nan)
    error, taken = torch.full_like(integrated[:, 0], torch.inf), torch.zeros_like(solved.nfe)
    rows = torch.nonzero(~solved.failed).flatten()
    for n in INTERVALS:
        nodes.take(n, rows)
        taken[rows] = n + 1
        integrated[rows], defect = nodes.integrals(n, rows)
        left = SHARE * nodes.change(n, rows)
        error[rows] = defect.abs() + left
        rows = rows[left > path.allowed]
        if len(rows) == 0:
            break
    rows = torch.cat([rows, torch.nonzero(solved.failed).flatten()])
    vjps = bound.vjps * taken
    value, stderr = bound.combine(integrated)
    value = path.linear_logdet() + value
    found = LogDet(
        value=value if path.upwards else -value, stderr=stderr, variance=stderr.square(), ode_error=error,
        nfe=solved.nfe + taken, vjps=vjps, sweeps=torch.zeros_like(vjps), solved=solved,
    )  # fmt: skip
    return found if len(rows) == 0 else _with_rows(found, rows, nodes)


def _with_rows(found: LogDet, rows: Tensor, nodes: _Nodes) -> LogDet:
    """The log-determinant with some rows solved together with their divergences; costs are added up."""
    rest = nodes.bound.rows(rows).of_augmented(nodes.path.augmented(nodes.bound, rows))
    numbers = {
        name: getattr(found, name).index_copy(0, rows, getattr(rest, name))
        for name in ("value", "stderr", "variance", "ode_error")
    }
    costs = {name: getattr(found, name).index_add(0, rows, getattr(rest, name)) for name in ("nfe", "vjps")}
    return replace(found, solved=nodes.solved.with_rows(rows, rest.solved), **numbers, **costs)
