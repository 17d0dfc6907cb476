r"""The divergence of a field: :math:`\operatorname{tr} \partial f/\partial z`, exactly or by random probes.

.. math::
    \operatorname{tr} J = \sum_i e_i^\top J e_i = E_\epsilon[\epsilon^\top J \epsilon], \qquad
    E[\epsilon \epsilon^\top] = I .

This module knows no diffusion model. An estimator is bound to a batch, which fixes its probes; the bound object
returns the field's value and one divergence per probe. With K independent Rademacher probes the mean over probes is
unbiased, and its standard error is that of K independent numbers, also after integration along a path on which the
probes are frozen (adaptive solvers need a deterministic field, so probes never change inside a solve).

:class:`Quadrature` evaluates the divergence at nodes *along* a path that is known already. Its probes may then differ
from node to node, and they are made to cooperate: with one random sign vector r per sweep, probe number n is

.. math::
    \epsilon_n = H_{n \oplus s} \odot r, \qquad H_n(i) = (-1)^{\langle n,\, c(i) \rangle},

rows of a Hadamard matrix addressed by the bits c(i) of the coordinate's place on its grid, the finest bit of every axis
first. Each probe alone is a Rademacher vector. In an image of one channel, four consecutive ones cancel every pair of
neighbouring pixels, sixteen every pair closer than four pixels, because :math:`\sum_n H_n(i) H_n(j) = 0` for places
that differ in the bits covered: what remains is the change of the Jacobian between nodes and its entries far from the
diagonal. Jacobians of denoisers are concentrated near the diagonal and vary slowly in time, so the variance drops
several times at no cost.

References:
    Hutchinson, A Stochastic Estimator of the Trace of the Influence Matrix (1990)
    Grathwohl et al., FFJORD, https://arxiv.org/abs/1810.01367
    Tang and Saad, A probing method for computing the diagonal of a matrix inverse (2012), probes that know a locality
    Haber, Stochastic quadrature formulas (1969), the antithetic pairs of nodes
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ndm_ct._core.autodiff import vjp
from ndm_ct._core.checks import choose, event_size, sum_event, validate_count
from ndm_ct._core.noise import Randomness, coins

__all__ = ["BoundTrace", "Exact", "Hutchinson", "Quadrature", "TraceEstimator", "grid_bits", "hadamard", "resolve"]

EXACT_UP_TO = 32
"""Largest event for which "auto" takes the exact trace."""

TRACES = ("auto", "exact", "hutchinson", "quadrature")


@dataclass(frozen=True)
class BoundTrace:
    """Cotangents for a batch of states; fixed for the length of a solve.

    Args:
        probes: shape ``(K, B, *E)``.
        exact: whether the probes are the unit vectors, so that their contributions add up to the trace.
        chunk: products computed at a time.
    """

    probes: Tensor
    exact: bool
    chunk: int | None

    @property
    def columns(self) -> int:
        """Number of divergences per row: 1 if exact, else the number of probes."""
        return 1 if self.exact else self.probes.shape[0]

    @property
    def products(self) -> int:
        """Vector-Jacobian products per evaluation."""
        return self.probes.shape[0]

    def rows(self, rows: Tensor) -> "BoundTrace":
        """The cotangents of some rows of the batch."""
        return replace(self, probes=self.probes[:, rows])

    def __call__(self, f: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
        """Value and divergence of ``f`` at ``z``, by one forward pass and one product per probe.

        Args:
            f: field, ``(B, *E)`` to ``(B, *E)``, each row a function of its own row only.
            z: state, shape ``(B, *E)``.

        Returns:
            f(z), shape ``(B, *E)``, and the divergences, shape ``(B, columns)``.
        """
        value, divergence, _ = self.with_byproduct(lambda z: (f(z), z), z)
        return value, divergence

    def with_byproduct(self, f: Callable[[Tensor], tuple[Tensor, Tensor]], z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same for a field that returns a second tensor, which is handed through."""
        value, pullback, byproduct = vjp(f, z)

        def quadratic_form(probe: Tensor) -> Tensor:
            (product,) = pullback(probe)
            return sum_event(probe * product)

        # vmap costs more than it saves for a single probe, and not every network can pass it.
        if self.products == 1 or self.chunk == 1:
            forms = torch.stack([quadratic_form(probe) for probe in self.probes])
        else:
            forms = torch.func.vmap(quadratic_form, chunk_size=self.chunk)(self.probes)
        return value, forms.sum(0)[:, None] if self.exact else forms.mT, byproduct

    def combine(self, integrated: Tensor) -> tuple[Tensor, Tensor]:
        """Estimate and standard error from the integrated divergences ``(B, columns)``; NaN error for one probe."""
        if self.exact:
            return integrated[:, 0], torch.zeros_like(integrated[:, 0])
        count = integrated.shape[1]
        if count == 1:
            return integrated[:, 0], torch.full_like(integrated[:, 0], float("nan"))
        mean = integrated.mean(1)
        squares = (integrated - mean[:, None]).square().sum(1)  # std(1) warns of an empty batch
        return mean, (squares / (count * (count - 1))).sqrt()


class TraceEstimator(Protocol):
    """Anything that can fix its probes for a batch of states."""

    def bind(self, z: Tensor, generator: Randomness) -> BoundTrace:
        """Fix the probes for states of the shape, dtype and device of ``z``."""
        ...


@dataclass(frozen=True)
class Exact:
    r"""The exact trace: d vector-Jacobian products per evaluation.

    Args:
        chunk: products computed at a time; None is all at once, by vmap, which 1 does without.

    Example:
        >>> z = torch.randn(4, 3)
        >>> value, trace = Exact().bind(z, None)(lambda z: z**2, z)
        >>> torch.allclose(trace[:, 0], 2 * z.sum(1))
        True
    """

    chunk: int | None = None

    def bind(self, z: Tensor, generator: Randomness) -> BoundTrace:
        d = event_size(z.shape[1:])
        unit = torch.eye(d, dtype=z.dtype, device=z.device).reshape(d, 1, *z.shape[1:])
        return BoundTrace(unit.expand(d, *z.shape), True, self.chunk)


@dataclass(frozen=True)
class Hutchinson:
    r"""The trace by K independent Rademacher probes, exact for diagonal Jacobians.

    Args:
        probes: K >= 1; the standard error needs K >= 2.
        chunk: products computed at a time; None is all at once, by vmap, which 1 does without.
    """

    probes: int = 16
    chunk: int | None = None

    def __post_init__(self) -> None:
        validate_count("probes", self.probes)

    def bind(self, z: Tensor, generator: Randomness) -> BoundTrace:
        # Row by row, so that the first rows get the same probes in a larger batch.
        shape = (z.shape[0], self.probes, *z.shape[1:])
        signs = coins(shape, generator, z.device)
        return BoundTrace((2 * signs - 1).to(z.dtype).movedim(1, 0), False, self.chunk)


@dataclass(frozen=True)
class Quadrature:
    r"""Divergences at random nodes along a solved path, in a few large batches.

    A sweep places ``nodes`` nodes, antithetic pairs in ``nodes / 2`` equal strata of the path's coordinate (exact for
    integrands linear in each stratum, unbiased for all), with ``probes`` probes each that share one forward pass.
    Sweeps are independent, so their scatter is the error of the estimate: nodes, probes and all. The standard error is

    .. math::
        \mathrm{se} = \sqrt{\frac{R - 1}{R - 3}}\ \frac{\mathrm{sd}(\text{sweeps})}{\sqrt R},

    whose first factor makes the variance of (estimate - truth) / se one for R sweeps that are nearly normal.

    Args:
        nodes: M >= 2, even.
        probes: K >= 1, per node.
        sweeps: R >= 1; a standard error needs R >= 4.
        max_batch: rows of one network call at most.

    Example:
        >>> import ndm_ct
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
        >>> x = torch.zeros(1, 2, dtype=torch.float64)
        >>> value, info = ndm_ct.loglik(model, x, trace=Quadrature(sweeps=8), return_info=True)
        >>> bool((value - model.log_prob(x)).abs() < 5 * info.stderr + 1e-3)
        True
    """

    nodes: int = 16
    probes: int = 2
    sweeps: int = 8
    max_batch: int = 1024

    def __post_init__(self) -> None:
        for name in ("nodes", "probes", "sweeps", "max_batch"):
            validate_count(name, getattr(self, name))
        if self.nodes % 2:
            raise ValueError(f"nodes must be even, because they come in antithetic pairs, got {self.nodes}.")


def grid_bits(event_shape: tuple[int, ...]) -> Tensor:
    """c(i): the bits of each coordinate's place, ``(d,)``; the lowest bit of every axis first, last axis first."""
    axes = [torch.arange(size) for size in event_shape]
    places = torch.meshgrid(*axes, indexing="ij") if axes else ()
    code, position = torch.zeros(event_shape, dtype=torch.long), 0
    for bit in range(max(event_shape, default=1).bit_length()):
        for axis in reversed(range(len(event_shape))):
            if (event_shape[axis] - 1) >> bit:
                code = code | (((places[axis] >> bit) & 1) << position)
                position += 1
    return code.reshape(-1)


def hadamard(n: Tensor, code: Tensor) -> Tensor:
    r""":math:`H_n(i) = (-1)^{\langle n, c(i) \rangle}` as booleans, true for -1; n and code broadcast."""
    parity = n & code
    for shift in (32, 16, 8, 4, 2, 1):
        parity = parity ^ (parity >> shift)
    return (parity & 1).bool()


def resolve(trace: "str | TraceEstimator | Quadrature", event_shape: tuple[int, ...]) -> "TraceEstimator | Quadrature":
    """The estimator meant by ``trace``: a name of ``TRACES``, or an object of this module."""
    if not isinstance(trace, str):
        if not isinstance(trace, Quadrature) and not hasattr(trace, "bind"):
            raise TypeError(
                f"trace must be one of {', '.join(map(repr, TRACES))} or an object like divergence.Quadrature(sweeps=8)"
                f", got {type(trace).__name__}."
            )
        return trace
    choose("trace", trace, TRACES)
    if trace == "auto":
        trace = "exact" if event_size(event_shape) <= EXACT_UP_TO else "quadrature"
    return {"exact": Exact, "hutchinson": Hutchinson, "quadrature": Quadrature}[trace]()
