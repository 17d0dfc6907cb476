r"""The divergence of a field: :math:`\operatorname{tr} \partial f/\partial z`, exactly or by random probes.

.. math::
    \operatorname{tr} J = \sum_i e_i^\top J e_i = E_\epsilon[\epsilon^\top J \epsilon], \qquad
    E[\epsilon \epsilon^\top] = I .

This module knows no diffusion model. An estimator is bound to a batch, which fixes its probes; the bound object
returns the field's value and one divergence per probe. With K independent Rademacher probes the mean over probes is
unbiased, and its standard error is that of K independent numbers, also after integration along a path on which the
probes are frozen (adaptive solvers need a deterministic field, so probes never change inside a solve).

References:
    Hutchinson, A Stochastic Estimator of the Trace of the Influence Matrix (1990)
    Grathwohl et al., FFJORD, https://arxiv.org/abs/1810.01367
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ndm_ct._autodiff import vjp
from ndm_ct._shapes import choose, event_size, sum_event, validate_count

__all__ = ["BoundTrace", "Exact", "Hutchinson", "TraceEstimator", "resolve"]

EXACT_UP_TO = 32
"""Largest event for which "auto" takes the exact trace: twice the products of the default 16 probes, without noise."""


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

    def __call__(self, f: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
        """Value and divergence of ``f`` at ``z``, by one forward pass and one product per probe.

        Args:
            f: field, ``(B, *E)`` to ``(B, *E)``, each row a function of its own row only.
            z: state, shape ``(B, *E)``.

        Returns:
            f(z), shape ``(B, *E)``, and the divergences, shape ``(B, columns)``.
        """
        value, pullback = vjp(f, z)

        def quadratic_form(probe: Tensor) -> Tensor:
            (product,) = pullback(probe)
            return sum_event(probe * product)

        forms = torch.func.vmap(quadratic_form, chunk_size=self.chunk)(self.probes)
        return value, forms.sum(0)[:, None] if self.exact else forms.mT

    def combine(self, integrated: Tensor) -> tuple[Tensor, Tensor]:
        """Estimate and standard error from the integrated divergences ``(B, columns)``; NaN error for one probe."""
        if self.exact:
            return integrated[:, 0], torch.zeros_like(integrated[:, 0])
        count = integrated.shape[1]
        if count == 1:
            return integrated[:, 0], torch.full_like(integrated[:, 0], float("nan"))
        return integrated.mean(1), integrated.std(1) / count**0.5


class TraceEstimator(Protocol):
    """Anything that can fix its probes for a batch of states."""

    def bind(self, z: Tensor, generator: torch.Generator | None) -> BoundTrace:
        """Fix the probes for states of the shape, dtype and device of ``z``."""
        ...


@dataclass(frozen=True)
class Exact:
    r"""The exact trace: d vector-Jacobian products per evaluation.

    Args:
        chunk: products computed at a time; None is all at once.

    Example:
        >>> z = torch.randn(4, 3)
        >>> value, trace = Exact().bind(z, None)(lambda z: z**2, z)
        >>> torch.allclose(trace[:, 0], 2 * z.sum(1))
        True
    """

    chunk: int | None = None

    def bind(self, z: Tensor, generator: torch.Generator | None) -> BoundTrace:
        d = event_size(z.shape[1:])
        unit = torch.eye(d, dtype=z.dtype, device=z.device).reshape(d, 1, *z.shape[1:])
        return BoundTrace(unit.expand(d, *z.shape), True, self.chunk)


@dataclass(frozen=True)
class Hutchinson:
    r"""The trace by K independent Rademacher probes, exact for diagonal Jacobians.

    Args:
        probes: K >= 1; the standard error needs K >= 2.
        chunk: products computed at a time; None is all at once.
    """

    probes: int = 16
    chunk: int | None = None

    def __post_init__(self) -> None:
        validate_count("probes", self.probes)

    def bind(self, z: Tensor, generator: torch.Generator | None) -> BoundTrace:
        # Row by row, so that the first rows get the same probes in a larger batch.
        shape = (z.shape[0], self.probes, *z.shape[1:])
        signs = torch.randint(0, 2, shape, generator=generator, device=z.device)
        return BoundTrace((2 * signs - 1).to(z.dtype).movedim(1, 0), False, self.chunk)


def resolve(trace: "str | TraceEstimator", event_shape: tuple[int, ...]) -> TraceEstimator:
    """The estimator meant by ``trace``: "auto", "exact", "hutchinson", or an object of this module."""
    if not isinstance(trace, str):
        if not hasattr(trace, "bind"):
            raise TypeError(
                f"trace must be 'auto', 'exact', 'hutchinson' or an object like divergence.Hutchinson(probes=16), got "
                f"{type(trace).__name__}."
            )
        return trace
    choose("trace", trace, ("auto", "exact", "hutchinson"))
    if trace == "auto":
        trace = "exact" if event_size(event_shape) <= EXACT_UP_TO else "hutchinson"
    return Exact() if trace == "exact" else Hutchinson()
