r"""DDPM and DDIM: the model on a time grid, each step with the prediction frozen.

.. math::
    z_s = \alpha_s \hat F_s + \kappa (z_t - \alpha_t \hat F_t) + \tilde\sigma \epsilon, \qquad
    \kappa = \frac{\sqrt{\sigma_s^2 - \tilde\sigma^2}}{\sigma_t}, \qquad s < t .

DDPM takes the :math:`\tilde\sigma` of the model's own volatility (:mod:`ndm_ct.process`); DDIM takes
:math:`\eta_{DDIM}` times the DDPM value at volatility one. With :math:`\tilde\sigma = 0` the step is the first-order
exponential integrator of the probability flow.

References:
    Ho, Jain and Abbeel, Denoising Diffusion Probabilistic Models, https://arxiv.org/abs/2006.11239
    Song, Meng and Ermon, Denoising Diffusion Implicit Models, https://arxiv.org/abs/2010.02502
"""

import itertools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ndm_ct._shapes import expand
from ndm_ct.model import NDM

__all__ = ["DDIM", "DDPM", "Step", "walk"]


class Step(Protocol):
    """One step of a discrete sampler from t to s < t."""

    def step(self, z: Tensor, t: Tensor, s: Tensor, *, generator: torch.Generator | None = None, **cond: Any) -> Tensor:
        r"""Draw :math:`z_s` given :math:`z_t`.

        Args:
            z: :math:`z_t`, shape ``(B, *E)``.
            t: float64 scalar.
            s: float64 scalar below t.
            generator: source of the noise.
            cond: conditioning.
        """
        ...


class DDPM:
    r"""The ancestral step :math:`q(z_s \mid z_t, \hat x)` at the model's volatility; DDPM at volatility one.

    Args:
        model: the model.
    """

    def __init__(self, model: NDM) -> None:
        self.model = model

    def step(self, z: Tensor, t: Tensor, s: Tensor, *, generator: torch.Generator | None = None, **cond: Any) -> Tensor:
        """See :class:`Step`."""
        F_t, F_s = self.model.frozen(z, t, s, **cond)
        mean, std = self.model.process.posterior(z, F_s, F_t, s, t)
        noise = torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)
        return mean + self.model.transform.from_basis(expand(std, z) * self.model.transform.to_basis(noise))


class DDIM:
    r"""The step with :math:`\tilde\sigma = \eta_{DDIM}\, \sigma_s \sqrt{1 - e^{\gamma_s - \gamma_t}}`.

    Args:
        model: the model.
        eta: :math:`\eta_{DDIM}` in [0, 1]; 0 is deterministic, 1 is DDPM at volatility one.
    """

    def __init__(self, model: NDM, eta: float = 0.0) -> None:
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta of DDIM must lie in [0, 1], got {eta!r}.")
        self.model, self.eta = model, eta

    def step(self, z: Tensor, t: Tensor, s: Tensor, *, generator: torch.Generator | None = None, **cond: Any) -> Tensor:
        """See :class:`Step`."""
        F_t, F_s = self.model.frozen(z, t, s, **cond)
        at_t, at_s = self.model.schedule(t), self.model.schedule(s)
        std = self.eta * at_s.sigma * torch.sqrt(-torch.expm1(at_s.gamma - at_t.gamma))
        kappa = torch.sqrt(at_s.sigma**2 - std**2) / at_t.sigma
        mean = expand(at_s.alpha, z) * F_s + expand(kappa, z) * (z - expand(at_t.alpha, z) * F_t)
        if self.eta == 0.0:
            return mean
        return mean + expand(std, z) * torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)


def walk(
    sampler: Step,
    z: Tensor,
    grid: Tensor,
    *,
    generator: torch.Generator | None = None,
    callback: Callable[[float], None] | None = None,
    **cond: Any,
) -> Tensor:
    """Take one step per interval of a decreasing grid.

    Args:
        sampler: DDPM, DDIM or another :class:`Step`.
        z: state at ``grid[0]``, shape ``(B, *E)``.
        grid: float64 times, decreasing.
        generator: source of the noise.
        callback: called with the time before every step.
        cond: conditioning.

    Returns:
        The state at ``grid[-1]``.
    """
    for t, s in itertools.pairwise(grid):
        if callback is not None:
            callback(float(t))
        z = sampler.step(z, t, s, generator=generator, **cond)
    return z
