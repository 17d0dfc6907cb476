r"""Where the times of a training objective are drawn: importance sampling that learns from the losses it sees.

A loss is an integral :math:`\int_0^1 l(v)\, dv` over a coordinate v of time (:func:`ndm_ct.objectives.times`: for the
bound, v is even in :math:`\gamma`). With v from a density p, :math:`l(v)/p(v)` is unbiased whatever p is, and its
second moment

.. math::
    \int_0^1 \frac{E[l^2 \mid v]}{p(v)}\, dv \ \ge\ \Bigl( \int_0^1 \sqrt{E[l^2 \mid v]}\, dv \Bigr)^2

is least for :math:`p \propto \sqrt{E[l^2 \mid v]}`. Here p is constant on n equal buckets.

References:
    Nichol and Dhariwal, Improved Denoising Diffusion Probabilistic Models, section 3.3 (loss history),
    https://arxiv.org/abs/2102.09672
    Kingma et al., Variational Diffusion Models, appendix I (low discrepancy), https://arxiv.org/abs/2107.00630
"""

import math

import torch
from torch import Tensor, nn

from ndm_ct._core.checks import validate_count
from ndm_ct._core.noise import Randomness, uniform

__all__ = ["LearnedBuckets", "LossHistory", "TimeSampler"]


def low_discrepancy(n: int, generator: Randomness, device: torch.device) -> Tensor:
    """n uniform numbers in [0, 1), float64: one in every interval of length 1/n.

    Args:
        n: how many.
        generator: one generator, or None for torch's own. With one per row the numbers are independent instead.
        device: of the result.
    """
    if not (generator is None or isinstance(generator, torch.Generator)):
        return uniform((n,), generator, torch.float64, device)
    shift = torch.rand((), dtype=torch.float64, device=device, generator=generator)
    return (shift + torch.arange(n, dtype=torch.float64, device=device) / max(n, 1)) % 1.0


class TimeSampler(nn.Module):
    """A piecewise constant density on [0, 1), uniform until a subclass learns better.

    Args:
        buckets: n.
        mix: share of the uniform distribution in the density: no weight exceeds 1/mix.
    """

    def __init__(self, buckets: int = 100, mix: float = 0.05) -> None:
        super().__init__()
        self.buckets = validate_count("buckets", buckets)
        if not 0.0 < mix <= 1.0:
            raise ValueError(f"mix must lie in (0, 1], got {mix!r}; it keeps every time possible.")
        self.mix = mix

    def share(self) -> Tensor:
        """Probability of every bucket before mixing, float64 ``(n,)``."""
        raise NotImplementedError

    def probabilities(self) -> Tensor:
        """Probability of every bucket, float64 ``(n,)``."""
        return (1.0 - self.mix) * self.share() + self.mix / self.buckets

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers v of this density from uniform ones in [0, 1), float64, by its quantile function, and 1/p(v)."""
        p = self.probabilities().to(u.device)
        ends = p.cumsum(0)
        k = torch.searchsorted(ends / ends[-1], u.contiguous(), right=True).clamp(max=self.buckets - 1)
        inside = ((u * ends[-1] - (ends[k] - p[k])) / p[k]).clamp(0.0, 1.0)
        # Below one: the end of a bucket belongs to the next.
        v = ((k + inside) / self.buckets).clamp(max=1.0 - 1e-12)
        return v, 1.0 / (self.buckets * p[k])

    def describe(self) -> str:
        """Its settings, for a checkpoint to compare."""
        return f"buckets={self.buckets}, mix={self.mix}"

    @torch.no_grad()
    def observe(self, v: Tensor, loss: Tensor) -> None:
        """Learn from losses l(v), not weighted, both ``(B,)``, drawn from this density."""
        k = (v.double() * self.buckets).long().clamp(0, self.buckets - 1)
        self._learn(k, loss.detach().double().square())

    def _learn(self, k: Tensor, square: Tensor) -> None:
        raise NotImplementedError


class LossHistory(TimeSampler):
    r"""The square root of a running mean of :math:`l^2` in every bucket; uniform until all have been visited.

    Args:
        buckets: n.
        mix: share of the uniform distribution.
        memory: batches over which the running mean forgets.
    """

    square: Tensor
    count: Tensor

    def __init__(self, buckets: int = 100, mix: float = 0.05, memory: int = 200) -> None:
        super().__init__(buckets, mix)
        self.memory = validate_count("memory", memory)
        for name in ("square", "count"):
            self.register_buffer(name, torch.zeros(buckets, dtype=torch.float64))

    def share(self) -> Tensor:
        """See :class:`TimeSampler`."""
        if not bool((self.count > 0.0).all()):
            return torch.full_like(self.count, 1.0 / self.buckets)
        root = (self.square / self.count).sqrt()
        total = root.sum()
        return root / total if float(total) > 0.0 else torch.full_like(root, 1.0 / self.buckets)

    def describe(self) -> str:
        """See :class:`TimeSampler`."""
        return f"{super().describe()}, memory={self.memory}"

    def _learn(self, k: Tensor, square: Tensor) -> None:
        keep, k, square = math.exp(-1.0 / self.memory), k.to(self.count.device), square.to(self.count.device)
        self.count.mul_(keep).index_add_(0, k, torch.ones_like(square))
        self.square.mul_(keep).index_add_(0, k, square)


class LearnedBuckets(TimeSampler):
    r"""A softmax of learned logits, by gradient descent on the logarithm of the second moment.

    With r the shares of the buckets in the batch's :math:`\sum (l/p)^2`, that gradient in the logits is
    :math:`p - r`; it vanishes in the mean where :math:`p_k^2 \propto E[l^2 \mid k]`.

    Args:
        buckets: n.
        mix: share of the uniform distribution.
        rate: step size of the descent.
    """

    logits: Tensor

    def __init__(self, buckets: int = 100, mix: float = 0.05, rate: float = 0.1) -> None:
        super().__init__(buckets, mix)
        if not rate > 0.0:
            raise ValueError(f"rate must be positive, got {rate!r}.")
        self.rate = rate
        self.register_buffer("logits", torch.zeros(buckets, dtype=torch.float64))

    def share(self) -> Tensor:
        """See :class:`TimeSampler`."""
        return self.logits.softmax(0)

    def describe(self) -> str:
        """See :class:`TimeSampler`."""
        return f"{super().describe()}, rate={self.rate}"

    def _learn(self, k: Tensor, square: Tensor) -> None:
        p = self.probabilities()
        k, square = k.to(p.device), square.to(p.device)
        weighted = torch.zeros_like(p).index_add_(0, k, square / p[k] ** 2)
        total = weighted.sum()
        if float(total) > 0.0:
            self.logits.add_(self.rate * (weighted / total - self.share()))
