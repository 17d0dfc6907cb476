r"""The divergence along a path from probes that are fixed before the solve: all unit vectors, or random signs.

An estimator is bound to a batch, which fixes its probes. The bound object returns the field's value and one divergence
per probe. With K independent Rademacher probes the mean over probes is unbiased, and its standard error is that of K
independent numbers, also after integration along a path (adaptive solvers need a deterministic field, so probes never
change during a solve).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ndm_ct._core.autodiff import Derivatives
from ndm_ct._core.checks import event_size, sum_event, unpack_numpy, validate_count
from ndm_ct._core.noise import GeneratorLike, Randomness, as_randomness, coins
from ndm_ct.divergence.interface import LogDet, Path, SolvedPath, TraceEstimator
from ndm_ct.divergence.nodes import logdet_at_nodes

__all__ = ["BoundTrace", "Exact", "Hutchinson"]


def quadratic_form(probe: Tensor, product: Tensor) -> Tensor:
    r""":math:`\epsilon^\top J \epsilon` of each row from :math:`\epsilon` and :math:`\epsilon^\top J`, ``(B,)``."""
    return sum_event(probe * product)


@dataclass(frozen=True)
class BoundTrace:
    """Cotangents for a batch of states, fixed for the length of a solve.

    Args:
        probes: shape ``(K, B, *E)``.
        exact: whether the probes are the unit vectors, so that their contributions add up to the trace.
        chunk: products computed at a time; None is all at once, by vmap; 1 is one by one, without vmap.
    """

    probes: Tensor
    exact: bool
    chunk: int | None

    @property
    def columns(self) -> int:
        """Number of divergences per row: 1 if exact, else the number of probes."""
        return 1 if self.exact else self.probes.shape[0]

    @property
    def vjps(self) -> int:
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

    def with_byproduct(
        self, f: Callable[[Tensor], tuple[Tensor, Tensor]], z: Tensor, derivatives: Derivatives | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Value, divergence and by-product of a field that returns a by-product as its second tensor.

        Args:
            f: the field.
            z: state, shape ``(B, *E)``.
            derivatives: remembers what f can pass; None finds it anew.
        """
        derivatives = Derivatives() if derivatives is None else derivatives
        value, forms, byproduct = derivatives.vjps(f, z, self.probes, quadratic_form, chunk=self.chunk)
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

    def logdet(self, path: Path) -> LogDet:
        """Integrate the divergences along a path: at nodes if it has a grid, else together with the state."""
        return logdet_at_nodes(path, self) if path.has_grid else self.of_augmented(path.augmented(self))

    def of_augmented(self, solved: SolvedPath) -> LogDet:
        """The log-determinant of a path that was solved together with it."""
        value, stderr = self.combine(solved.state[1])
        error = torch.full_like(value, torch.nan) if solved.error is None else solved.error
        nfe = solved.nfe
        return LogDet(
            value=value, stderr=stderr, variance=stderr.square(), ode_error=error, nfe=nfe, vjps=nfe * self.vjps,
            sweeps=torch.zeros_like(nfe), solved=solved,
        )  # fmt: skip


@dataclass(frozen=True)
class Exact(TraceEstimator):
    r"""The exact trace: d vector-Jacobian products wherever it is taken.

    Args:
        chunk: products computed at a time. A smaller number needs less memory and more time. None is all at once, by
            vmap; 1 is one by one.

    Example:
        >>> z = torch.randn(4, 3)
        >>> value, trace = Exact().bind(z, None)(lambda z: z**2, z)
        >>> torch.allclose(trace[:, 0], 2 * z.sum(1))
        True
    """

    chunk: int | None = None

    @property
    def knows_variance(self) -> bool:
        return True

    def validate_stderr(self) -> None:
        """Accept every standard error: that of the exact trace is zero."""

    def logdet(self, path: Path, generator: Randomness) -> LogDet:
        return self.bind(path.start.double(), generator).logdet(path)

    def bind(self, z: Tensor, generator: Randomness) -> BoundTrace:
        """The unit vectors of an event, for states of the shape, dtype and device of ``z``."""
        d = event_size(z.shape[1:])
        unit = torch.eye(d, dtype=z.dtype, device=z.device).reshape(d, 1, *z.shape[1:])
        return BoundTrace(unit.expand(d, *z.shape), True, self.chunk)


@dataclass(frozen=True)
class Hutchinson(TraceEstimator):
    r"""The trace by K independent Rademacher probes, which are exact for diagonal Jacobians.

    Args:
        probes: K >= 1. The standard error falls as :math:`1/\sqrt K`, the cost grows as K. With one probe the standard
            error is unknown.
        chunk: products computed at a time; as in :class:`Exact`.
    """

    probes: int = 16
    chunk: int | None = None

    def __post_init__(self) -> None:
        unpack_numpy(self)
        validate_count("probes", self.probes)

    @property
    def knows_variance(self) -> bool:
        return self.probes > 1

    def logdet(self, path: Path, generator: Randomness) -> LogDet:
        return self.bind(path.start.double(), generator).logdet(path)

    def bind(self, z: Tensor, generator: GeneratorLike) -> BoundTrace:
        """Draw the probes for states of the shape, dtype and device of ``z``."""
        generator = as_randomness(generator, len(z), z.device, "bind")
        # Row by row, so that the first rows get the same probes in a larger batch.
        shape = (z.shape[0], self.probes, *z.shape[1:])
        signs = coins(shape, generator, z.device)
        return BoundTrace((2 * signs - 1).to(z.dtype).movedim(1, 0), False, self.chunk)
