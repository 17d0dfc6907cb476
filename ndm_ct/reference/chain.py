r"""An exact model of integer data: levels along a hidden Markov chain.

.. math::
    P(k_1 \dots k_d) = \sum_{h_1 \dots h_d} \pi_{h_1} \prod_i T_{h_i h_{i+1}} \, [k_i = k(h_i)]

Every hidden state h shows one level k(h). The data x are the centres of the levels' bins, or points anywhere in the
bins with equal density. With noise, the likelihood of :math:`z_i` under a level is a normal density or a difference of
two normal distribution functions. So the forward algorithm gives :math:`\log p_t(z)`, and the backward algorithm gives
:math:`\hat x_i = E[x_i \mid z]`, both exactly in d steps.

A Gaussian AR(1) process in bins, a mixture of product laws, and checkers are chains.

References:
    Rabiner, A Tutorial on Hidden Markov Models (1989)
"""

import math

import torch
from torch import Tensor

from ndm_ct._core.checks import as_time
from ndm_ct._core.noise import GeneratorLike, as_randomness, normal_like, uniform
from ndm_ct.quantisation import Quantisation
from ndm_ct.reference.mixtures import Exact, ExactPredictor, MarginalPrior, numbers
from ndm_ct.schedules.base import Schedule
from ndm_ct.schedules.fixed import LinearLogSNR

__all__ = ["Chain"]

_TINY = 1e-290
"""Probabilities below this are taken for it; a level that is so far from z has no share in anything."""


class _ChainMarginals:
    r"""The marginals :math:`p_t` and the posterior mean; float64 inside."""

    def __init__(
        self, start: Tensor, transition: Tensor, levels: Tensor, length: int, bins: Quantisation, filled: bool,
        schedule: Schedule,
    ) -> None:  # fmt: skip
        self.start, self.transition, self.levels, self.length = start, transition, levels, length
        self.bins, self.filled, self.schedule = bins, filled, schedule
        self.centres = bins.centres(torch.arange(bins.levels), torch.float64)

    def log_prob(self, z: Tensor, t: Tensor) -> Tensor:
        """log p_t(z), ``(B, d)`` to ``(B,)``."""
        share, _, largest = self._emissions(z.double(), t)
        return (self._forward(share)[1].log().sum(1) + largest.sum(1)).to(z.dtype)

    def posterior_mean(self, z: Tensor, t: Tensor) -> Tensor:
        """E[x | z_t = z], shape of ``z``."""
        share, place, _ = self._emissions(z.double(), t)
        before, after = self._forward(share)[0], self._backward(share)
        odds = before * after
        return ((odds * place[:, :, self.levels]).sum(2) / odds.sum(2)).to(z.dtype)

    def log_probability(self, k: Tensor) -> Tensor:
        """log P(k) of integers ``(B, d)``."""
        densities = self._forward((k[:, :, None] == self.levels).double())[1]
        return torch.where(densities > _TINY, densities.log(), -math.inf).sum(1)

    def draw(self, n: int, t: Tensor | None, generator: GeneratorLike) -> Tensor:
        """n draws of z_t (t of shape ``(1,)``), or of x where t is None; float64."""
        source = as_randomness(generator, n, self.start.device, "draw")
        x = self.centres[self.draw_levels(n, source)]
        if self.filled:
            x = x + 2.0 * self.bins.half_width * (uniform(x.shape, source, x.dtype, x.device) - 0.5)
        if t is None:
            return x
        c = self.schedule(t)
        return c.alpha * x + c.sigma * normal_like(x, source)

    def draw_levels(self, n: int, generator: GeneratorLike) -> Tensor:
        """n draws of the levels, int64, ``(n, d)``."""
        device = self.start.device
        u = uniform((n, self.length), as_randomness(generator, n, device, "draw"), torch.float64, device)
        state = torch.searchsorted(self.start.cumsum(0).expand(n, -1).contiguous(), u[:, :1].contiguous())
        states = [state.clamp(max=len(self.start) - 1)]
        for i in range(1, self.length):
            odds = self.transition[states[-1][:, 0]].cumsum(1)
            states.append(torch.searchsorted(odds, u[:, i : i + 1].contiguous()).clamp(max=len(self.start) - 1))
        return self.levels[torch.cat(states, 1)]

    def _forward(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """P(h_i | z_1 ... z_i) ``(B, d, H)``, and the density of z_i given those before it ``(B, d)``."""
        odds, states, densities = self.start * share[:, 0], list[Tensor](), list[Tensor]()
        for i in range(self.length):
            if i:
                odds = (states[-1] @ self.transition) * share[:, i]
            density = odds.sum(1, keepdim=True).clamp(min=_TINY)
            states.append(odds / density)
            densities.append(density)
        return torch.stack(states, 1), torch.cat(densities, 1)

    def _backward(self, share: Tensor) -> Tensor:
        """The density of z_{i+1} ... z_d given h_i, up to a factor, ``(B, d, H)``."""
        after = [torch.ones_like(share[:, 0])]
        for i in range(self.length - 1, 0, -1):
            new = (after[-1] * share[:, i]) @ self.transition.mT
            after.append(new / new.sum(1, keepdim=True))
        return torch.stack(after[::-1], 1)

    def _emissions(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Densities of z_i given the hidden states over the largest ``(B, d, H)``, E[x_i | level, z_i], log largest."""
        c = self.schedule(as_time(t).reshape(-1))
        alpha, sigma = c.alpha[:, None, None], c.sigma[:, None, None]
        if self.filled:
            density, place = self._of_bins(z[:, :, None] / alpha, sigma / alpha)
            log_density = density.clamp(min=_TINY).log() - alpha.log()
        else:
            log_density = -0.5 * ((z[:, :, None] - alpha * self.centres) / sigma).square()
            log_density = log_density - (sigma * math.sqrt(2.0 * math.pi)).log()
            place = self.centres.expand(log_density.shape)
        log_density = log_density[:, :, self.levels]
        largest = log_density.max(2, keepdim=True).values.detach()
        return (log_density - largest).exp(), place, largest[:, :, 0]

    def _of_bins(self, y: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Density of y = u + noise eps for u uniform in each bin, and E[u | y]."""
        h = self.bins.half_width
        low, high = (self.centres - h - y) / noise, (self.centres + h - y) / noise
        # In the tail where both are large and negative, so that differences keep their digits.
        flip = low + high > 0.0
        a, b = torch.where(flip, -high, low), torch.where(flip, -low, high)
        mass = 0.5 * (torch.erfc(-b * math.sqrt(0.5)) - torch.erfc(-a * math.sqrt(0.5)))
        peak = (torch.exp(-0.5 * low**2) - torch.exp(-0.5 * high**2)) / math.sqrt(2.0 * math.pi)
        mean = y + noise * peak / mass.clamp(min=_TINY)
        return mass / (2.0 * h), torch.maximum(torch.minimum(mean, self.centres + h), self.centres - h)


class Chain(Exact):
    r"""An NDM whose predictor is the exact posterior mean of levels along a hidden Markov chain.

    Args:
        start: :math:`\pi`, probabilities of the first hidden state, shape ``(H,)``, sum 1.
        transition: T, shape ``(H, H)``; row h holds the probabilities of the state after h.
        length: d, the number of integers of an event.
        bins: where the levels lie; its number of levels is the number of integers that may occur.
        levels: k(h), the level that each hidden state shows, int64 ``(H,)``; None is the state itself.
        filled: True spreads x evenly over the bins, as uniform dequantisation does; False puts x on the centres.
        schedule: None is the default of :class:`~ndm_ct.model.NDM`.
        t_min: None is the schedule's safe value.

    Raises:
        ValueError: the parameters are not probabilities, or do not fit each other.
        TypeError: parameters that are not numbers.

    Example:
        >>> import ndm_ct, torch
        >>> from ndm_ct.quantisation import Quantisation
        >>> stay = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
        >>> model = Chain(torch.tensor([0.5, 0.5]), stay, 3, Quantisation(2))
        >>> model.log_probability(torch.tensor([[0, 0, 1]])).exp()  # 0.5 * 0.9 * 0.1
        tensor([0.0450], dtype=torch.float64)
    """

    def __init__(
        self,
        start: Tensor,
        transition: Tensor,
        length: int,
        bins: Quantisation,
        *,
        levels: Tensor | None = None,
        filled: bool = True,
        schedule: Schedule | None = None,
        t_min: float | None = None,
    ) -> None:
        start, transition = numbers("start", start), numbers("transition", transition)
        H = start.numel()
        if start.shape != (H,) or transition.shape != (H, H):
            raise ValueError(
                f"start {tuple(start.shape)} and transition {tuple(transition.shape)} do not fit; expected (H,) and "
                "(H, H)."
            )
        for name, rows in (("start", start[None]), ("transition", transition)):
            if not bool((rows >= 0.0).all()) or not torch.allclose(rows.sum(1), torch.ones(len(rows)).double()):
                raise ValueError(f"{name} must hold probabilities of at least 0 that sum to 1 in every row.")
        shown = torch.arange(H) if levels is None else torch.as_tensor(levels)
        most = bins.levels - 1
        if shown.shape != (H,) or shown.is_floating_point() or not 0 <= int(shown.min()) <= int(shown.max()) <= most:
            raise ValueError(f"levels must be {H} integers from 0 to {most}, one per hidden state, got {levels}.")
        schedule = LinearLogSNR() if schedule is None else schedule
        marginals = _ChainMarginals(start, transition, shown.long(), length, bins, filled, schedule)
        super().__init__(
            ExactPredictor(marginals), (length,), schedule=schedule, prior=MarginalPrior(marginals), t_min=t_min
        )
        self.marginals, self.bins, self.filled = marginals, bins, filled

    def log_probability(self, k: Tensor) -> Tensor:
        r""":math:`\log P(k)` in nats, of integers.

        Args:
            k: levels, shape ``(B, d)``.

        Returns:
            Shape ``(B,)``, float64.
        """
        self.bins.validate(k)
        return self.marginals.log_probability(k)

    def sample_levels(self, n: int, *, generator: GeneratorLike = None) -> Tensor:
        """Draw integers from the chain, int64, shape ``(n, d)``.

        Args:
            n: number of draws.
            generator: a seed, a generator, or one per draw; None is torch's global generator.
        """
        return self.marginals.draw_levels(n, generator)
