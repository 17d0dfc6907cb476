r"""The reverse SDE :math:`dz = (v - \tfrac12 g^2 s)\,dt + g\,d\bar w`, one step of an SDE solver per interval.

A step from alpha = 0 or to sigma = 0, where the coefficients are infinite, is the frozen-prediction transition of
:mod:`ndm_ct.discrete`, which forgets :math:`z_t` as the SDE would.
"""

from typing import Any

import torch
from torch import Tensor

from ndm_ct import solvers
from ndm_ct._noise import Randomness
from ndm_ct._shapes import choose
from ndm_ct.discrete import DDPM
from ndm_ct.model import NDM
from ndm_ct.stepping import Level, Sampler

__all__ = ["SDE"]


class SDE(Sampler):
    """One step of torchsde.

    Args:
        model: the model.
        method: "euler" (Euler-Maruyama), "heun" (stochastic Heun), "midpoint" or "srk" (Roessler's scheme for
            additive noise, strong order 1.5).
    """

    uses_volatility = True

    def __init__(self, model: NDM, method: str = "heun") -> None:
        super().__init__(model)
        self.method = choose("method", method, solvers.SDE_METHODS)
        self.stages = solvers.SDE_METHODS[method][1]
        self._first = DDPM(model)

    def cost(self, steps: int) -> int:
        """See :class:`Sampler`; the step from alpha = 0 takes one evaluation."""
        return self.stages * steps - (self.stages - 1 if self.level(1.0).alpha == 0.0 else 0)

    def _step(self, z: Tensor, t: Level, s: Level, generator: Randomness, cond: dict[str, Any]) -> Tensor:
        if t.alpha == 0.0 or s.sigma == 0.0:
            self.evaluations += 1
            return self._first.step(z, t.t, s.t, generator=generator, **cond)
        sde, transform = self.model.reverse_sde(z.dtype, **cond), self.model.transform
        solution = solvers.sdeint(
            sde.drift, sde.diffusion, transform.to_basis(z), torch.stack([t.time, s.time]), method=self.method,
            generator=generator,
        )  # fmt: skip
        self.evaluations += solution.evaluations
        return transform.from_basis(solution.state[0])
