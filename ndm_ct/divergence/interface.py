r"""What an estimator of the log-determinant is given, and what it returns.

.. math::
    \log\left|\det \frac{\partial z_{end}}{\partial z_{start}}\right| = \int \operatorname{tr} J(z_t, t)\, dt

The path is a :class:`Path`: it can be solved with or without divergences. The result is a :class:`LogDet`: value, error
and cost. An estimator is a :class:`TraceEstimator`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from ndm_ct._core.autodiff import Derivatives
from ndm_ct._core.noise import Randomness

if TYPE_CHECKING:
    from ndm_ct.divergence.probes import BoundTrace

__all__ = ["GridPath", "LogDet", "Path", "SolvedPath", "TraceEstimator"]


class SolvedPath(Protocol):
    """The end of a path, and what the solve cost. Failed rows are NaN in ``state`` and ``nodes``."""

    @property
    def state(self) -> tuple[Tensor, ...]:
        """The state at the end, float64, ``(B, *E)``, and for an augmented path the divergences ``(B, columns)``."""

    @property
    def nodes(self) -> Tensor | None:
        """States at the nodes asked for, ``(N, B, *E)``."""

    @property
    def error(self) -> Tensor | None:
        """The solver's estimate of its error of log p, nats, ``(B,)``; None if it has no estimate."""

    @property
    def nfe(self) -> Tensor:
        """Network evaluations of each row, ``(B,)``."""

    @property
    def accepted(self) -> Tensor:
        """Accepted steps of each row, ``(B,)``."""

    @property
    def rejected(self) -> Tensor:
        """Rejected steps of each row, ``(B,)``."""

    @property
    def failed(self) -> Tensor:
        """Rows whose solve failed, ``(B,)``."""


class GridPath(SolvedPath, Protocol):
    """A path that was solved on one grid for all rows; ``failed`` are the rows that it does not suit."""

    @property
    def slopes(self) -> Tensor | None:
        """f of the curve that the path follows, at the nodes asked for, ``(N, B, *E)``: its slope less the linear part.

        The field itself differs from it by the defect of the curve.
        """

    def with_rows(self, rows: Tensor, other: Any) -> SolvedPath:
        """The path with some rows solved otherwise; costs are added up."""


class Path(Protocol):
    r"""A path :math:`\dot z = a(t)\, z + f(z, t)` that can be solved, with ``start``, direction and accuracy fixed.

    The divergence of the linear part is known, so estimators look at that of f alone.
    """

    @property
    def start(self) -> Tensor:
        """States at the start, ``(B, *E)``, in the network's dtype."""

    @property
    def upwards(self) -> bool:
        """Whether time increases along the path. :meth:`linear_logdet` and :meth:`coordinate` assume that it does."""

    @property
    def stderr(self) -> float | None:
        """The standard error asked for, nats; None leaves it to the estimator."""

    @property
    def error_wanted(self) -> bool:
        """Whether an estimate of the solver's own error is worth a second, coarser solve."""

    @property
    def derivatives(self) -> Derivatives:
        """How derivatives of the network are taken."""

    def transport(self, nodes: Tensor | None = None, *, in_noise_units: bool = False) -> SolvedPath:
        """Solve for the state alone.

        Args:
            nodes: times ``(N, B)`` at which the state is wanted too.
            in_noise_units: whether tolerances are relative to the scale of the noise at t, not to one.
        """

    @property
    def has_grid(self) -> bool:
        """Whether the path is solved on one grid for all rows, and divergences are taken at nodes along it."""

    @property
    def allowed(self) -> float:
        """Error of the log-determinant that nodes along the path may leave, nats."""

    def on_grid(self, nodes: Tensor) -> GridPath:
        """Solve for the state alone on one grid for all rows, with the state and its slope at times ``(N, B)``."""

    def augmented(self, bound: "BoundTrace", rows: Tensor | None = None) -> SolvedPath:
        """Solve for state and log-determinants together, one column for each divergence of ``bound``.

        Args:
            bound: the divergences of the whole batch.
            rows: the rows to solve; None is all.
        """

    def score(self, t: Tensor, z: Tensor, byproduct: Tensor, rows: Tensor) -> Tensor:
        """The score of some rows at times t ``(b,)`` and states z, by the by-product of :meth:`network_part`."""

    def only(self, rows: Tensor) -> "Path":
        """The path of some rows."""

    def coarser(self) -> "Path":
        """The same path with ten times the tolerances."""

    @property
    def excess(self) -> float:
        """How many times the difference from the coarser path is larger than the error of this one; 1 to be careful."""

    def coordinate(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Times t, and dt/du, of places u in [0, 1], which spread the trace evenly over the path."""

    def network_part(self, t: Tensor, rows: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """The map z to f(z, t), and a by-product, of some rows at times t ``(b,)``."""

    def linear_logdet(self) -> Tensor:
        """The log-determinant of the linear part, ``()``."""

    def log_prior(self, solved: SolvedPath) -> Tensor:
        """Log-density of the noise end of the path once it is solved, nats, ``(B,)``."""


@dataclass(frozen=True, kw_only=True)
class LogDet:
    r"""A log-determinant, its error and its cost.

    Args:
        value: :math:`\log|\det \partial z_{end}/\partial z_{start}|`, nats, ``(B,)``.
        stderr: its standard error, ``(B,)``; 0 for an exact trace, NaN where it is unknown.
        variance: an unbiased estimate of its variance, ``(B,)``, NaN where it is unknown. ``stderr`` may be larger than
            the root of it, because few independent numbers estimate an error badly.
        ode_error: estimate of the size of the solver's error of log p, ``(B,)``; NaN where it is unknown.
        nfe: network evaluations of each row, ``(B,)``.
        vjps: vector-Jacobian products of each row, ``(B,)``.
        sweeps: sweeps of each row, ``(B,)``; 0 for estimators without sweeps.
        solved: the solved path.
    """

    value: Tensor
    stderr: Tensor
    variance: Tensor
    ode_error: Tensor
    nfe: Tensor
    vjps: Tensor
    sweeps: Tensor
    solved: SolvedPath


@runtime_checkable
class TraceEstimator(Protocol):
    """An estimator of the log-determinant of a path.

    To write one, subclass it and define :meth:`logdet`; the other members have defaults.

    Example:
        >>> import torch, ndm_ct
        >>> from ndm_ct.divergence import BoundTrace, TraceEstimator
        >>> class GaussianProbes(TraceEstimator):
        ...     def logdet(self, path, generator):
        ...         probes = torch.randn(64, *path.start.shape, dtype=torch.float64, generator=generator)
        ...         return BoundTrace(probes, exact=False, chunk=None).logdet(path)
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
        >>> x = torch.zeros(1, 2, dtype=torch.float64)
        >>> value, info = ndm_ct.loglik(model, x, trace=GaussianProbes(), return_info=True)
        >>> bool((value - model.log_prob(x)).abs() < 5 * info.stderr + 1e-3)
        True
    """

    @property
    def tolerance(self) -> float:
        """Default rtol and atol of the path."""
        return 2e-6

    @property
    def needs_nodes(self) -> bool:
        """Whether it needs states at times of its own in every row; not every solver can visit them."""
        return False

    @property
    def sweeps(self) -> int:
        """Independent estimates that are averaged; 0 if their number cannot be changed by :meth:`with_sweeps`."""
        return 0

    @property
    def knows_variance(self) -> bool:
        """Whether ``LogDet.variance`` is known."""
        return False

    def with_sweeps(self, sweeps: int) -> "TraceEstimator":
        """The same estimator with another number of sweeps."""
        raise TypeError(f"{type(self).__name__} has no sweeps, so their number cannot be changed to {sweeps}.")

    def validate_stderr(self) -> None:
        """Raises ValueError if it cannot reach a standard error that is asked for."""
        raise ValueError(
            f"stderr= needs an estimator that can add sweeps; {type(self).__name__} cannot. Use trace='quadrature'."
        )

    def logdet(self, path: Path, generator: Randomness) -> LogDet:
        """Solve the path and estimate its log-determinant.

        Args:
            path: the path.
            generator: source of nodes and probes: None, one generator, or a sequence with one for each row, from which
                that row alone is drawn.
        """
        ...
