r"""The log-determinant of a known path by random quadrature of its divergence.

.. math::
    \log\left|\det \frac{\partial z_1}{\partial z_{t_{min}}}\right|
    = d \log \frac{\sigma_1}{\sigma_{t_{min}}} + \int_0^1 \operatorname{tr} J(t(u))\, \frac{dt}{du}\, du, \qquad
    J = \frac{\partial}{\partial z}
    \Bigl[\Bigl(\alpha' - \frac{\alpha \sigma'}{\sigma}\Bigr) \hat F + \alpha \hat{\dot F}\Bigr]_{z_t} .

The first term is exact. In the second u runs evenly through

.. math::
    \log \tan \tfrac12 \theta_t, \qquad \theta_t = \arctan(\sigma_t / \alpha_t),

half the log-SNR where there is little noise, the angle where there is little signal (there log-SNRs may be infinite,
and the trace is small). A sweep is

.. math::
    T = \frac{1}{M K} \sum_{m=1}^{M} \frac{dt}{du} \sum_{k=1}^{K}
    \epsilon_{mk}^\top J(t(u_m))\, \epsilon_{mk},

an unbiased estimate with the nodes and probes of :class:`~ndm_ct.divergence.Quadrature`. A likelihood that integrates
the trace beside the state pays one product per evaluation of the solver and freezes one probe for the whole path, so
its error does not average out; here the path needs forward passes only, and every node brings new information.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ndm_ct._core.autodiff import vjp
from ndm_ct._core.checks import as_time, event_size, sum_event
from ndm_ct._core.noise import Randomness, uniform
from ndm_ct.divergence import Quadrature, grid_bits, hadamard
from ndm_ct.dynamics import ProbabilityFlow
from ndm_ct.model import NDM

__all__ = ["Sweeps", "Totals", "linear_logdet", "path_times"]


def linear_logdet(model: NDM, device: torch.device) -> Tensor:
    r""":math:`d \log(\sigma_1/\sigma_{t_{min}})`: the log-determinant of the part of the flow that is linear in z."""
    sigma = model.schedule(as_time([model.t_min, 1.0], device)).sigma
    return event_size(model.event_shape) * (sigma[1] / sigma[0]).log()


def path_times(model: NDM, u: Tensor) -> tuple[Tensor, Tensor]:
    """t and dt/du of places u in [0, 1] along the path."""
    schedule = model.schedule
    with torch.no_grad():
        start, end = (schedule(as_time([model.t_min, 1.0], u.device)).angle / 2.0).tan().log()
        angle = 2.0 * torch.atan(torch.exp(start + (end - start) * u))
        t = schedule.time_at(angle).clamp(model.t_min, 1.0)
        return t, (end - start) * angle.sin() / schedule(t).dangle


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
        model: the model.
        estimator: sizes.
        times: t of each node, ``(S M, B)``, sweep by sweep.
        used: whether a row has that sweep, ``(S M, B)``.
        weights: dt/du / M of each node, ``(S M, B)``.
        shifts: s of each sweep, ``(B, S)``.
        signs: r of each sweep, true for -1, ``(B, S, d)``.
    """

    model: NDM
    estimator: Quadrature
    times: Tensor
    used: Tensor
    weights: Tensor
    shifts: Tensor
    signs: Tensor

    @classmethod
    def draw(cls, model: NDM, estimator: Quadrature, sweeps: Tensor, generator: Randomness) -> "Sweeps":
        """Fix nodes and probes; ``sweeps`` ``(B,)`` is the number each row needs."""
        d, M, device = event_size(model.event_shape), estimator.nodes, sweeps.device
        u = _blocks(sweeps, M // 2 + 1 + d, generator)
        B, S, _ = u.shape
        centre = (torch.arange(M // 2, dtype=torch.float64, device=device) + 0.5) / (M // 2)
        offset = 0.5 * u[..., : M // 2] / (M // 2)
        places = torch.stack([centre - offset, centre + offset], -1).reshape(B, S * M).mT
        times, slope = path_times(model, places)
        used = (torch.arange(S, device=device)[:, None] < sweeps).repeat_interleave(M, 0)
        patterns = 2 ** int(grid_bits(model.event_shape).max()).bit_length()
        return cls(
            model, estimator, times, used, slope / M,
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

    def integrals(self, states: Tensor, flow: Callable[[Tensor], ProbabilityFlow]) -> Tensor:
        """The sweeps' estimates of the integral, float64, ``(B, S)``; NaN where a row has fewer.

        Args:
            states: z at the nodes, ``(S M, B, *E)``.
            flow: the field of given rows.
        """
        node, row = torch.nonzero(self.used, as_tuple=True)
        pieces = [
            self._forms(states, n, r, flow(r))
            for n, r in zip(node.split(self.estimator.max_batch), row.split(self.estimator.max_batch), strict=True)
            if len(n) > 0
        ]
        forms = torch.cat(pieces) if pieces else self.weights.new_zeros(0)
        weighted = self.weights.new_full(self.times.shape, torch.nan).index_put((node, row), forms)
        return (weighted * self.weights).unflatten(0, (-1, self.estimator.nodes)).sum(1).mT

    def _forms(self, states: Tensor, node: Tensor, row: Tensor, flow: ProbabilityFlow) -> Tensor:
        """Mean over the probes of eps^T J eps at some nodes, float64, ``(b,)``."""
        z = states[node, row].to(flow.dtype)
        _, pullback, _ = vjp(flow.network_part(self.times[node, row]), z)

        def form(probe: Tensor) -> Tensor:
            (product,) = pullback(probe)
            return sum_event((probe * product).double())

        probes = self._probes(node, row).to(z.dtype).reshape(-1, *z.shape)
        # No vmap: the batch is large as it is, and not every network can pass it (channels_last weights, autocast).
        return torch.stack([form(probe) for probe in probes]).mean(0)

    def _probes(self, node: Tensor, row: Tensor) -> Tensor:
        """Signs ``(K, b, d)``."""
        M, K = self.estimator.nodes, self.estimator.probes
        sweep, place = node // M, node % M
        code = grid_bits(self.model.event_shape).to(node.device)
        number = place * K + torch.arange(K, device=node.device)[:, None]
        flips = hadamard((number ^ self.shifts[row, sweep])[..., None], code)
        return 1 - 2 * (flips ^ self.signs[row, sweep]).long()


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

    def add(self, rows: Tensor, sweeps: Tensor) -> None:
        """Take in further sweeps ``(b, S)`` of some rows, NaN where a row has fewer."""
        present = ~sweeps.isnan()
        more = present.sum(1)
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

    def wanted(self, stderr: float) -> Tensor:
        """Sweeps each row needs in all for this standard error, ``(B,)``."""
        n = self.count.double()
        return torch.ceil(n * (self.stderr / stderr).square()).long().clamp(min=1)
