r"""One path of the probability flow, by this library's solver or torchdiffeq's, with or without its log-determinant.

.. math::
    \dot z = v(z, t), \qquad
    \frac{d}{dt} \log\left|\det \frac{\partial z_t}{\partial z_{t_0}}\right| = \operatorname{div} v .

==================  ================================================================================================
``"ode"``           every row with its own steps (:mod:`ndm_ct.solvers.ode`)
``"exponential"``   one grid for all rows, which do not see each other (:mod:`ndm_ct.likelihood.exponential`); rows that
                    it does not suit by "ode"
``"dopri5"`` etc.   torchdiffeq, one step size for the batch (:mod:`ndm_ct.solvers.torchdiffeq`)
==================  ================================================================================================

"ode" also estimates the error of :math:`\log p`: a local error e of the state changes it by
:math:`\langle s, e \rangle`, where s is the model's score, and one of the log-determinant by itself.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ndm_ct._core.autodiff import Derivatives, tensors_behind
from ndm_ct._core.checks import choose, expand, validate_positive
from ndm_ct._core.conditioning import Conditioning
from ndm_ct.divergence import BoundTrace
from ndm_ct.divergence.interface import SolvedPath
from ndm_ct.dynamics import ProbabilityFlow
from ndm_ct.likelihood import exponential
from ndm_ct.likelihood.quadrature import linear_logdet, noise_scale, path_times
from ndm_ct.model import NDM
from ndm_ct.solvers import ADAPTIVE_METHODS, Solution, odeint, odeint_rows
from ndm_ct.solvers.packing import State

__all__ = ["METHODS", "TOLERANCE", "Problem"]

TOLERANCE = 2e-6
"""Default rtol and atol of a path without a log-determinant."""

NODES = 200.0
"""Error of log p that nodes along a path may leave, in units of rtol + atol: 0.012 nats at the default."""

METHODS = ("ode", "exponential", *ADAPTIVE_METHODS)
"""Names of ``method``."""

Differentiable = bool | Literal["adjoint"]

_LEAST_STEPS = {"adaptive_heun": 400, "bosh3": 60, "dopri8": 10}
"""Least number of steps where a gradient is wanted, at the default tolerance; 20 for methods of order 5."""


@dataclass(frozen=True)
class Problem:
    """A path to solve: from where to where, how accurately, by which back-end, with or without a graph."""

    model: NDM
    start: Tensor
    interval: tuple[float, float]
    rtol: float
    atol: float
    method: str
    on_failure: str
    differentiable: Differentiable
    cond: Conditioning
    callback: Callable[[float], None] | None = None
    stderr: float | None = None
    error_wanted: bool = False

    def __post_init__(self) -> None:
        choose("method", self.method, METHODS)
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            validate_positive(name, value)
        choose("on_failure", self.on_failure, ("raise", "nan"))
        if not isinstance(self.differentiable, bool):
            choose("differentiable", self.differentiable, ("adjoint",))
        if self.on_failure == "nan" and self.method not in ("ode", "exponential"):
            raise ValueError(
                f"on_failure='nan' has no effect with method={self.method!r}, whose rows share their steps and fail "
                "together; use method='ode'."
            )
        if self.differentiable == "adjoint" and self.method == "ode":
            raise ValueError("differentiable='adjoint' needs a torchdiffeq method; pass method='dopri5'.")
        if self.differentiable and self.method == "exponential":
            raise ValueError("method='exponential' keeps no graph; pass method='ode' with differentiable.")
        if self.differentiable and torch.is_inference_mode_enabled():
            raise RuntimeError(
                "differentiable=True keeps a graph, which torch.inference_mode() forbids; leave that mode."
            )

    @property
    def upwards(self) -> bool:
        """Whether the path goes from data to noise."""
        return self.interval[1] > self.interval[0]

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """The model in eval mode; without a graph unless it is asked for, and then with one to what is trained."""
        with self.model.evaluating(), torch.set_grad_enabled(bool(self.differentiable)):
            yield

    def flow(self, rows: Tensor | None = None) -> ProbabilityFlow:
        """The field of some rows; None is all."""
        return self.model.flow(self.start.dtype, **(self.cond if rows is None else self.cond.take(rows)))

    def only(self, rows: Tensor) -> "Problem":
        """The problem of some rows."""
        return replace(self, start=self.start[rows], cond=self.cond.take(rows))

    def coarser(self) -> "Problem":
        """The same path with ten times the tolerances."""
        return replace(self, rtol=10.0 * self.rtol, atol=10.0 * self.atol, callback=None)

    @property
    def excess(self) -> float:
        """The coarser path's error over that of this one, less one.

        The multistep method's error falls by the fourth power of the step on average and by less in single rows. Taken
        as the second power, the estimate is less than a third of the error in under five rows of a hundred.
        """
        return 10.0 ** (2.0 / exponential.ORDER) - 1.0 if self.method == "exponential" else 1.0

    def coordinate(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Times t, and dt/du, of places u in [0, 1]."""
        return path_times(self.model, u)

    def linear_logdet(self) -> Tensor:
        """The log-determinant of the part of the flow that is linear in z, going up."""
        return linear_logdet(self.model, self.start.device)

    def score(self, t: Tensor, z: Tensor, byproduct: Tensor, rows: Tensor) -> Tensor:
        """The score of some rows from the by-product of :meth:`network_part`."""
        return self.flow(rows).score(t, z, byproduct)

    def network_part(self, t: Tensor, rows: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """The rest of the velocity of some rows at times t ``(b,)``."""
        return self.flow(rows).network_part(t)

    @property
    def derivatives(self) -> Derivatives:
        """How derivatives of the network are taken."""
        return self.model.derivatives

    def ends(self, solved: SolvedPath) -> tuple[Tensor, Tensor]:
        """The data end and the noise end of the path, float64; zero in failed rows.

        A prior may raise on NaN, and NaN would reach the gradients of its parameters.
        """
        start = self.start.double()
        end = torch.where(solved.failed.reshape(-1, *(1,) * (start.ndim - 1)), 0.0, solved.state[0])
        return (start, end) if self.upwards else (end, start)

    def log_prior(self, solved: SolvedPath) -> Tensor:
        """Log-density of the noise end, nats, float64, ``(B,)``."""
        return self.model.log_prior(self.ends(solved)[1])

    def transport(self, nodes: Tensor | None = None, *, in_noise_units: bool = False) -> Solution:
        r"""Solve for the path alone; states are float64.

        Args:
            nodes: times ``(N, B)`` at which the state is wanted too; only for "ode".
            in_noise_units: whether the tolerance is ``rtol + atol`` times :math:`\sigma_t`, the scale of the density;
                only for "ode".
        """

        if self.method == "exponential":
            return self._exponential(nodes, in_noise_units)

        def field(t: Tensor, state: State, rows: Tensor | None) -> tuple[State, None]:
            return (self.flow(rows).velocity(t, state[0]),), None

        return self._solve(field, (self.start.double(),), nodes, in_noise_units)

    @property
    def has_grid(self) -> bool:
        """Whether the method is "exponential" and the flow has the form for it."""
        return self.method == "exponential" and exponential.applies(self.model)

    @property
    def allowed(self) -> float:
        """Error of log p that nodes along the path may leave, nats."""
        return NODES * (self.rtol + self.atol)

    def on_grid(self, nodes: Tensor | None, *, with_slopes: bool = True) -> Solution:
        """Solve by "exponential" alone; ``failed`` are rows that neither the grid nor one twice as fine suits."""
        solved = self._multistep(nodes, 1, with_slopes)
        rows = torch.nonzero(solved.failed).flatten()
        if len(rows) == 0:
            return solved
        finer = self.only(rows)._multistep(None if nodes is None else nodes[:, rows], 2, with_slopes)
        return solved.with_rows(rows, finer)

    def _multistep(self, nodes: Tensor | None, refined: int, with_slopes: bool) -> Solution:
        return exponential.transport(
            self.model, self.flow, self.start.double(), self.interval, self.rtol + self.atol, nodes, self.callback,
            refined=refined, with_slopes=with_slopes,
        )  # fmt: skip

    def _exponential(self, nodes: Tensor | None, in_noise_units: bool) -> Solution:
        """By one grid for all rows; rows that it does not suit by "ode"."""

        def adaptive(path: Problem, rows: Tensor | None) -> Solution:
            some = nodes if nodes is None or rows is None else nodes[:, rows]
            return path.transport(some, in_noise_units=in_noise_units)

        if not self.has_grid:
            return self._adaptively(None, adaptive)
        solved = self.on_grid(nodes, with_slopes=False)
        rows = torch.nonzero(solved.failed).flatten()
        return solved if len(rows) == 0 else solved.with_rows(rows, self._adaptively(rows, adaptive))

    def _adaptively(self, rows: Tensor | None, solve: Callable[["Problem", Tensor | None], Solution]) -> Solution:
        """Solve some rows by "ode"; None is all. A failure is told with the rows' numbers in this batch."""
        adaptive = replace(self, method="ode")
        if rows is None:
            return solve(adaptive, None)
        solved = solve(replace(adaptive.only(rows), on_failure="nan"), rows)
        if self.on_failure == "raise" and bool(solved.failed.any()):
            solve(adaptive, None)  # raises
        return solved

    def augmented(self, bound: BoundTrace, rows: Tensor | None = None) -> Solution:
        """Solve for state and log-determinants ``(B, columns)`` together, probes frozen; both are float64.

        Args:
            bound: the divergences of the whole batch.
            rows: the rows to solve, with "exponential"; None is all. The method is then "ode".
        """
        if self.method == "exponential":
            # Adaptive steps without the noise for a unit need the tolerance that is their default.
            finer = replace(self, rtol=min(self.rtol, TOLERANCE), atol=min(self.atol, TOLERANCE))
            return finer._adaptively(
                rows, lambda path, some: path.augmented(bound if some is None else bound.rows(some))
            )
        z = self.start.double()

        def field(t: Tensor, state: State, rows: Tensor | None) -> tuple[State, State]:
            flow, trace = self.flow(rows), bound if rows is None else bound.rows(rows)
            part, divergence, F = trace.with_byproduct(flow.network_part(t), state[0], flow.derivatives)
            linear = flow.linear_divergence(t, self.model.event_shape)
            velocity = flow.assemble(t, state[0], part)
            with torch.no_grad():
                share = torch.full_like(divergence, 1.0 / max(1, bound.columns))
                gradient = (flow.score(t, state[0], F), share)
            return (velocity, expand(linear, divergence) + divergence), gradient

        return self._solve(field, (z, z.new_zeros(z.shape[0], bound.columns)), None, False)

    def _solve(
        self,
        field: Callable[[Tensor, State, Tensor | None], tuple[State, State | None]],
        state: State,
        nodes: Tensor | None,
        in_noise_units: bool,
    ) -> Solution:
        """Solve for the first tensor in the model's unit, so that tolerances do not depend on the unit of the data."""
        rtol, atol = (max(tolerance, self._rounding) for tolerance in (self.rtol, self.atol))
        options: dict[str, Any] = {"rtol": rtol, "atol": atol, "callback": self.callback}
        options["grid"] = self._grid() if self.differentiable else None
        unit = self.model.unit

        def times(factor: float, state: State) -> State:
            return (factor * state[0], *state[1:])

        def scaled(t: Tensor, state: State, rows: Tensor | None) -> tuple[State, State | None]:
            slope, gradient = field(t, times(unit, state), rows)
            return times(1.0 / unit, slope), None if gradient is None else times(unit, gradient)

        def shared(t: Tensor, state: State) -> State:
            # The adjoint equation is solved in the backward pass, long after prepared() has been left.
            with self.model.evaluating():
                return scaled(t, state, None)[0]

        start = times(1.0 / unit, state)
        if self.method == "ode":
            scale = (lambda t: noise_scale(self.model, t).detach() / unit) if in_noise_units else None
            solved = odeint_rows(
                scaled, start, *self.interval, scale=scale, nodes=nodes, on_failure=self.on_failure, **options
            )
        else:
            adjoint = self._adjoint_tensors(scaled, start) if self.differentiable == "adjoint" else None
            solved = odeint(shared, start, *self.interval, method=self.method, adjoint=adjoint, **options)
        at_nodes = None if solved.nodes is None else unit * solved.nodes
        return replace(solved, state=times(unit, solved.state), nodes=at_nodes)

    @property
    def _rounding(self) -> float:
        """Four units of rounding of a network that is the velocity: smaller steps would only follow its rounding.

        Other fields have a part that is linear in z and not rounded to the network's precision.
        """
        return 4.0 * torch.finfo(self.start.dtype).eps if self.model.prediction == "velocity" else 0.0

    def _grid(self) -> Tensor:
        """Times that bound the steps where a gradient is wanted.

        The error of a step is that of the value. A gradient depends on more: on every feature that the network has of
        t, even if its output is zero, as it is before training. At the default tolerance two cells are at most 1/20 of
        the interval, and 1/8 of :meth:`coordinate`, in which the path changes evenly where t_min is approached. Other
        tolerances change the number of cells as they would change that of steps.
        """
        order = ADAPTIVE_METHODS.get(self.method, 5)
        steps = _LEAST_STEPS.get(self.method, 20) * (TOLERANCE / self.rtol) ** (1.0 / order)
        low, high, device = min(self.interval), max(self.interval), self.start.device
        even = torch.linspace(low, high, 2 * math.ceil(steps) + 1, dtype=torch.float64, device=device)
        places = torch.linspace(0.0, 1.0, 2 * math.ceil(0.4 * steps) + 1, dtype=torch.float64, device=device)
        narrow = self.coordinate(places[1:-1])[0].detach()
        return torch.cat([even, narrow[(narrow > low) & (narrow < even[2])]]).sort().values

    def _adjoint_tensors(
        self, field: Callable[[Tensor, State, Tensor | None], tuple[State, State | None]], state: State
    ) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            start = tuple(part.detach().requires_grad_() for part in state)
            t = torch.tensor(self.interval[0], dtype=torch.float64, device=state[0].device)
            return tensors_behind(field(t, start, None)[0], start, self.cond.tensors)
