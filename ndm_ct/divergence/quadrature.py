r"""The log-determinant of a path by random quadrature of the divergence along it.

.. math::
    \log\left|\det \frac{\partial z_1}{\partial z_0}\right|
    = \text{linear part} + \int_0^1 \operatorname{tr} J(t(u))\, \frac{dt}{du}\, du .

The first term is exact. In the second, u is the path's own coordinate, in which the trace is spread evenly. A sweep is

.. math::
    T = \frac{1}{M K} \sum_{m=1}^{M} \frac{dt}{du} \sum_{k=1}^{K}
    \epsilon_{mk}^\top J(t(u_m))\, \epsilon_{mk},

an unbiased estimate with the nodes and probes of :class:`Quadrature`. An estimator that integrates the trace together
with the state pays one product per evaluation of the solver and freezes its probes for the whole path, so its error
does not average out. Here the path needs forward passes only, and every node brings new information.

Probes differ from node to node, and they cooperate. With one random sign vector r per sweep, probe number n is

.. math::
    \epsilon_n = H_{n \oplus s} \odot r, \qquad H_n(i) = (-1)^{\langle n,\, c(i) \rangle},

rows of a Hadamard matrix addressed by the bits c(i) of the coordinate's place on its grid, the finest bit of every axis
first. Each probe alone is a Rademacher vector. In an image of one channel, four consecutive ones cancel every pair of
neighbouring pixels, sixteen every pair closer than four pixels, because :math:`\sum_n H_n(i) H_n(j) = 0` for places
that differ in the bits covered: what remains is the change of the Jacobian between nodes and its entries far from the
diagonal. Jacobians of denoisers are concentrated near the diagonal and vary slowly in time, so the variance drops
several times at no cost.

References:
    Tang and Saad, A probing method for computing the diagonal of a matrix inverse (2012), probes that know a locality
    Haber, Stochastic quadrature formulas (1969), the antithetic pairs of nodes
    Stein, A two-sample test for a linear hypothesis whose power is independent of the variance (1945): how many
    further sweeps an accuracy needs
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ndm_ct._core.checks import event_size, sum_event, unpack_numpy, validate_count
from ndm_ct._core.noise import Randomness, rows_of, uniform
from ndm_ct.divergence.interface import LogDet, Path, SolvedPath, TraceEstimator

__all__ = ["Quadrature", "Sweeps", "Totals", "grid_bits", "hadamard"]

_SHARE = 0.7
"""Fraction of the estimated missing sweeps to add per round, because early variance estimates are rough and already
include a safety margin."""

_EVENT = 64
"""Size of the largest events that ``max_batch`` rows of a call may have."""

_PER_ROUND = 32
"""Most sweeps added to a row per round; bounds the memory for their nodes."""


@dataclass(frozen=True)
class Quadrature(TraceEstimator):
    r"""Divergences at random nodes along a path that is solved first, in a few large batches.

    A sweep places ``nodes`` nodes, antithetic pairs in ``nodes / 2`` equal strata of the path's coordinate (exact for
    integrands linear in each stratum, unbiased for all), with ``probes`` probes each that share one forward pass.
    Sweeps are independent, so their scatter is the error of the estimate: nodes, probes and all. The standard error is

    .. math::
        \mathrm{se} = \sqrt{\frac{R - 1}{R - 3}}\ \frac{\mathrm{sd}(\text{sweeps})}{\sqrt R},

    whose first factor makes the variance of (estimate - truth) / se one for R sweeps that are nearly normal.

    Args:
        nodes: M >= 2, even. More nodes lower the variance of a sweep and cost one network evaluation each.
        probes: K >= 1, per node. More probes lower the variance of a sweep and cost one product each.
        sweeps: R >= 1. The standard error falls as :math:`1/\sqrt R`, the cost grows as R. With fewer than four sweeps
            the standard error is unknown.
        max_batch: most rows of one network call; for events of more than 64 numbers fewer, so that a call takes at
            most 64 ``max_batch`` numbers. A smaller one needs less memory.

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
        unpack_numpy(self)
        for name in ("nodes", "probes", "sweeps", "max_batch"):
            validate_count(name, getattr(self, name))
        if self.nodes % 2:
            raise ValueError(f"nodes must be even, because they come in antithetic pairs, got {self.nodes}.")

    @property
    def tolerance(self) -> float:
        r"""In units of :math:`\sigma_t`: the path's error is then below that of the trace."""
        return 3e-5

    @property
    def needs_nodes(self) -> bool:
        return True

    @property
    def knows_variance(self) -> bool:
        return self.sweeps >= 4

    def with_sweeps(self, sweeps: int) -> "Quadrature":
        return replace(self, sweeps=sweeps)

    def validate_stderr(self) -> None:
        if not self.knows_variance:
            raise ValueError(
                f"stderr needs at least 4 sweeps to estimate an error from, got Quadrature(sweeps={self.sweeps})."
            )

    def logdet(self, path: Path, generator: Randomness) -> LogDet:
        start = path.start
        count = torch.full((len(start),), self.sweeps, device=start.device)
        sweeps = Sweeps.draw(path, self, count, generator)
        solved, values = sweeps.along(path)
        totals, nfe = Totals.of(values), solved.nfe
        if path.stderr is not None:
            nfe = nfe + self._refine(path, totals, path.stderr, generator)
        vjps = totals.count * self.nodes
        error = torch.full_like(totals.mean, torch.nan)
        if path.error_wanted:
            # The same nodes and probes along a coarser path: the difference is the solver's, the noise cancels.
            rough, rough_values = sweeps.first().along(path.coarser())
            change = (values - rough_values)[:, 0] * (1.0 if path.upwards else -1.0)
            error = (path.log_prior(solved) - path.log_prior(rough) + change).abs() / path.excess
            nfe, vjps = nfe + rough.nfe, vjps + self.nodes
        logdet = path.linear_logdet() + totals.mean
        return LogDet(
            value=logdet if path.upwards else -logdet, stderr=totals.stderr, variance=totals.variance, ode_error=error,
            nfe=nfe + vjps, vjps=vjps * self.probes, sweeps=totals.count, solved=solved,
        )  # fmt: skip

    def _refine(self, path: Path, totals: "Totals", stderr: float, generator: Randomness) -> Tensor:
        """Add sweeps to the rows that need them; returns the evaluations of the paths solved again for their nodes."""
        spent = torch.zeros_like(totals.count)
        while True:
            missing = totals.wanted(stderr) - totals.count
            rows = torch.nonzero((missing > 0) & totals.stderr.isfinite()).flatten()
            if rows.numel() == 0:
                return spent
            self._validate_affordable(totals, rows, missing[rows], stderr, event_size(path.start.shape[1:]))
            more = path.only(rows)
            count = torch.ceil(_SHARE * missing[rows]).long().clamp(max=_PER_ROUND)
            solved, values = Sweeps.draw(more, self, count, rows_of(generator, rows)).along(more)
            totals.add(rows, values, count)
            spent = spent.index_add(0, rows, solved.nfe)

    def _validate_affordable(self, totals: "Totals", rows: Tensor, missing: Tensor, stderr: float, d: int) -> None:
        """Raises if the accuracy costs far more than the exact trace at 64 nodes of the same path.

        Far more, because the first estimates of what a row needs come from a few sweeps and scatter.
        """
        products = int((totals.count[rows] + missing).max()) * self.nodes * self.probes
        exact = 64 * d
        if products > 16 * exact:
            worst = rows[int(torch.argmax(totals.stderr[rows]))]
            raise ValueError(
                f"stderr={stderr:g} needs about {products:,} vector-Jacobian products for row {int(worst)}, whose "
                f"standard error is {float(totals.stderr[worst]):.3g} after {int(totals.count[worst])} sweeps; the "
                f"exact trace costs about {exact:,}. Pass trace='exact', or a larger stderr."
            )


def _blocks(sweeps: Tensor, width: int, generator: Randomness) -> Tensor:
    """Uniform numbers, ``(B, most sweeps of a row, width)``.

    One block per row, so that the first rows get the same numbers in a larger batch; a row with a generator of its own
    takes as many from it as it has sweeps, so that others may need more.
    """
    numbers = partial(uniform, dtype=torch.float64, device=sweeps.device)
    if len(sweeps) == 0 or generator is None or isinstance(generator, torch.Generator):
        most = int(sweeps.max()) if len(sweeps) else 1
        return numbers((len(sweeps), most, width), generator)
    rows = [numbers((count, width), each) for count, each in zip(sweeps.tolist(), generator, strict=True)]
    return pad_sequence(rows, batch_first=True)


@dataclass(frozen=True)
class Sweeps:
    """Nodes and probes of a batch.

    Args:
        event_shape: E.
        estimator: sizes.
        times: t of each node, ``(S M, B)``, sweep by sweep.
        used: whether a row has that sweep, ``(S M, B)``.
        weights: dt/du / M of each node, ``(S M, B)``.
        shifts: s of each sweep, ``(B, S)``.
        signs: r of each sweep, true for -1, ``(B, S, d)``.
    """

    event_shape: tuple[int, ...]
    estimator: Quadrature
    times: Tensor
    used: Tensor
    weights: Tensor
    shifts: Tensor
    signs: Tensor

    @classmethod
    def draw(cls, path: Path, estimator: Quadrature, sweeps: Tensor, generator: Randomness) -> "Sweeps":
        """Draw nodes and probes; ``sweeps`` ``(B,)`` is the number of sweeps of each row."""
        event_shape, M, device = tuple(path.start.shape[1:]), estimator.nodes, sweeps.device
        d = event_size(event_shape)
        u = _blocks(sweeps, M // 2 + 1 + d, generator)
        B, S, _ = u.shape
        centre = (torch.arange(M // 2, dtype=torch.float64, device=device) + 0.5) / (M // 2)
        offset = 0.5 * u[..., : M // 2] / (M // 2)
        places = torch.stack([centre - offset, centre + offset], -1).reshape(B, S * M).mT
        times, slope = path.coordinate(places)
        used = (torch.arange(S, device=device)[:, None] < sweeps).repeat_interleave(M, 0)
        patterns = 2 ** int(grid_bits(event_shape).max()).bit_length()
        return cls(
            event_shape, estimator, times, used, slope / M,
            (u[..., M // 2] * patterns).long(), u[..., M // 2 + 1 :] < 0.5,
        )  # fmt: skip

    def first(self) -> "Sweeps":
        """The first sweep of each row alone."""
        M = self.estimator.nodes
        return replace(
            self,
            times=self.times[:M],
            used=self.used[:M],
            weights=self.weights[:M],
            shifts=self.shifts[:, :1],
            signs=self.signs[:, :1],
        )

    def along(self, path: Path) -> tuple[SolvedPath, Tensor]:
        """Solve the path with its nodes, and integrate the trace along it by every sweep."""
        solved = path.transport(self.times, in_noise_units=True)
        assert solved.nodes is not None
        values = replace(self, used=self.used & ~solved.failed).integrals(solved.nodes, path)
        return solved, values

    def integrals(self, states: Tensor, path: Path) -> Tensor:
        """The sweeps' estimates of the integral, float64, ``(B, S)``; NaN where a row has fewer sweeps.

        Args:
            states: z at the nodes, ``(S M, B, *E)``.
            path: gives the field.
        """
        node, row = torch.nonzero(self.used, as_tuple=True)
        size = max(1, self.estimator.max_batch * _EVENT // max(_EVENT, event_size(self.event_shape)))
        pieces = [
            self._forms(states, n, r, path)
            for n, r in zip(node.split(size), row.split(size), strict=True)
            if len(n) > 0
        ]
        forms = torch.cat(pieces) if pieces else self.weights.new_zeros(0)
        weighted = self.weights.new_full(self.times.shape, torch.nan).index_put((node, row), forms)
        return (weighted * self.weights).unflatten(0, (-1, self.estimator.nodes)).sum(1).mT

    def _forms(self, states: Tensor, node: Tensor, row: Tensor, path: Path) -> Tensor:
        """Mean over the probes of eps^T J eps at some nodes, float64, ``(b,)``."""
        z = states[node, row].to(path.start.dtype)
        part, probes = path.network_part(self.times[node, row], row), self._probes(node, row).to(z.dtype)
        # One by one: the batch is large as it is.
        _, forms, _ = path.derivatives.vjps(part, z, probes.reshape(-1, *z.shape), _quadratic_form, chunk=1)
        return forms.mean(0)

    def _probes(self, node: Tensor, row: Tensor) -> Tensor:
        """Signs ``(K, b, d)``."""
        M, K = self.estimator.nodes, self.estimator.probes
        sweep, place = node // M, node % M
        code = grid_bits(self.event_shape).to(node.device)
        number = place * K + torch.arange(K, device=node.device)[:, None]
        flips = hadamard((number ^ self.shifts[row, sweep])[..., None], code)
        return 1 - 2 * (flips ^ self.signs[row, sweep]).long()


def _quadratic_form(probe: Tensor, product: Tensor) -> Tensor:
    return sum_event((probe * product).double())


@dataclass
class Totals:
    """Running sums over the sweeps of each row: how many, their mean, and their squared deviations."""

    count: Tensor
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, sweeps: Tensor) -> "Totals":
        """Totals of ``(B, S)`` sweeps, all present."""
        mean = sweeps.mean(1)
        count = torch.full_like(mean, sweeps.shape[1], dtype=torch.long)
        return cls(count, mean, (sweeps.detach() - mean.detach()[:, None]).square().sum(1))

    def add(self, rows: Tensor, sweeps: Tensor, more: Tensor) -> None:
        """Take in further sweeps ``(b, S)`` of some rows, of which the first ``more`` ``(b,)`` are present."""
        present = torch.arange(sweeps.shape[1], device=sweeps.device) < more[:, None]
        values = torch.where(present, sweeps, 0.0)
        mean = values.sum(1) / more
        squares = torch.where(present, (sweeps - mean[:, None]).square(), 0.0).sum(1)
        n, old = self.count[rows], self.mean[rows]
        gap = mean - old
        self.squares[rows] += squares + gap.square() * n * more / (n + more)
        self.mean = self.mean.index_put((rows,), old + gap * more / (n + more))
        self.count[rows] = n + more

    @property
    def stderr(self) -> Tensor:
        """Standard error of the mean, widened for its few degrees of freedom; NaN below four sweeps."""
        n = self.count.double()
        return torch.where(n > 3, (self.squares / (n * (n - 3.0).clamp(min=1.0))).sqrt(), torch.nan)

    @property
    def variance(self) -> Tensor:
        """Unbiased variance of the mean; NaN below four sweeps, like ``stderr``."""
        n = self.count.double()
        return torch.where(n > 3, self.squares / (n * (n - 1.0)), torch.nan)

    def wanted(self, stderr: float) -> Tensor:
        """Sweeps each row needs in all for this standard error, ``(B,)``."""
        n = self.count.double()
        return torch.ceil(n * (self.stderr / stderr).square()).long().clamp(min=1)


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
