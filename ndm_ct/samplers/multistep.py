r"""DEIS, PNDM and UniPC.

DEIS (tAB) is exact in the linear part and extrapolates :math:`\hat\epsilon` by a polynomial through the last k
predictions; with Lagrange polynomials :math:`\ell_j` and :math:`\rho = \sigma/\alpha`,

.. math::
    z_s = \frac{\alpha_s}{\alpha_t} z_t + \alpha_s \sum_{j<k} C_j \hat\epsilon_j, \qquad
    C_j = \int_{\rho_t}^{\rho_s} \ell_j(x(\rho))\, d\rho, \qquad x = t \text{ or } \lambda .

PNDM takes the mean of that polynomial in t over the step, Adams-Bashforth's combination, as if it were constant:

.. math::
    \bar\epsilon = \frac{1}{s - t} \int_t^s \sum_j \ell_j(u)\, \hat\epsilon_j\, du, \qquad
    z_s = \phi(z_t, \bar\epsilon, t, s) = \frac{\alpha_s}{\alpha_t} z_t + \alpha_s (\rho_s - \rho_t) \bar\epsilon .

UniPC predicts as DPM-Solver++ does (:math:`P_k`: D a polynomial of degree k - 1 in :math:`\lambda`) and, once the
network has seen the predicted state, corrects it with that same evaluation, a polynomial of degree k.

References:
    Zhang and Chen, Fast Sampling of Diffusion Models with Exponential Integrator, https://arxiv.org/abs/2204.13902
    Liu et al., Pseudo Numerical Methods for Diffusion Models on Manifolds, https://arxiv.org/abs/2202.09778
    Zhao et al., UniPC, https://arxiv.org/abs/2302.04867
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ndm_ct._core.checks import choose
from ndm_ct._core.noise import Randomness
from ndm_ct.model import NDM
from ndm_ct.samplers.base import exponential_euler
from ndm_ct.samplers.exponential import Multistep
from ndm_ct.schedules.base import Level

__all__ = ["DEIS", "PNDM", "UniPC"]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


def combine(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """Weighted sum."""
    out = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        out = torch.add(out, value, alpha=weight)
    return out


def solve_vandermonde(r: Sequence[float], b: Sequence[float]) -> list[float]:
    r"""x with :math:`\sum_j r_j^k x_j = b_k`, by Bjoerck and Pereyra: for a few numbers much faster than numpy."""
    x, n = list(b), len(r)
    for k in range(n - 1):
        for i in range(n - 1, k, -1):
            x[i] -= r[k] * x[i - 1]
    for k in range(n - 2, -1, -1):
        for i in range(k + 1, n):
            x[i] /= r[i] - r[i - k - 1]
        for i in range(k, n - 1):
            x[i] -= x[i + 1]
    return x


class _Noise(Multistep):
    r"""A multistep method in :math:`\hat\epsilon`. Next to alpha = 0 it takes the DDIM step."""

    highest = 4

    def _epsilon(self, z: Tensor, t: Level, cond: dict[str, Any]) -> Tensor:
        _, D = self.predict(z, t, cond)
        return combine((1.0 / t.sigma, -t.alpha / t.sigma), (z, D))

    def _transfer(self, z: Tensor, epsilon: Tensor, t: Level, s: Level) -> Tensor:
        r""":math:`\phi(z, \epsilon, t, s)`."""
        return combine((s.alpha / t.alpha, s.alpha * (s.noise - t.noise)), (z, epsilon))

    def _ddim(self, z: Tensor, t: Level, s: Level, cond: dict[str, Any]) -> Tensor:
        _, D = self.predict(z, t, cond)
        return exponential_euler(z, D, t, s)


class DEIS(_Noise):
    r"""The multistep exponential integrator in :math:`\hat\epsilon`.

    Args:
        model: the model.
        order: predictions used, 1 (DDIM) to 4; the paper's tAB-k is order k + 1.
        variable: x, "t" as in the paper (tAB), or "log_snr".
    """

    def __init__(self, model: NDM, order: int = 3, variable: str = "t") -> None:
        super().__init__(model, order)
        self.variable = choose("variable", variable, ("t", "log_snr"))
        self._moments: dict[tuple[float, float], tuple[float, list[float]]] = {}

    def prepare(self, grid: Tensor) -> None:
        """See :class:`Sampler`; integrates the powers of x."""
        super().prepare(grid)
        self._integrate([self.level(t) for t in grid.tolist()])

    def _integrate(self, grid: Sequence[Level]) -> None:
        r"""A scale h and the means over :math:`\rho` of :math:`((x - x_t)/h)^k`, for every interval, by quadrature."""
        pairs = [(t, s) for t, s in itertools.pairwise(grid) if t.alpha > 0.0]
        if not pairs:
            return
        start, end = (np.array([[level.noise] for level in column]) for column in zip(*pairs, strict=True))
        x, first = self._variable(0.5 * (start + end) + 0.5 * (end - start) * _NODES), self._variable(start)
        h = x[:, -1:] - first
        moments = 0.5 * _WEIGHTS @ ((x - first) / h)[..., None] ** np.arange(self.order)
        keys = [(t.t, s.t) for t, s in pairs]
        self._moments.update(zip(keys, zip(h[:, 0].tolist(), moments.tolist(), strict=True), strict=True))

    def _variable(self, noise: np.ndarray) -> np.ndarray:
        r"""x where :math:`\sigma/\alpha` is ``noise``."""
        if self.variable == "log_snr":
            return -np.log(noise)
        schedule = self.model.schedule
        return schedule.time_at(torch.as_tensor(np.arctan(noise), device=schedule.device)).cpu().numpy()

    def _advance(self, z: Tensor, t: Level, s: Level, generator: Randomness, cond: dict[str, Any]) -> Tensor:
        if t.alpha == 0.0:
            return self._ddim(z, t, s, cond)
        if (t.t, s.t) not in self._moments:
            self._integrate([t, s])
        known = self._remember(t, self._epsilon(z, t, cond))
        h, moments = self._moments[t.t, s.t]
        x = [level.t if self.variable == "t" else level.log_snr for level, _ in known]
        shares = solve_vandermonde([(each - x[0]) / h for each in x], moments[: len(x)])
        scale = s.alpha * (s.noise - t.noise)
        return combine([s.alpha / t.alpha, *(scale * share for share in shares)], [z, *(value for _, value in known)])


class PNDM(_Noise):
    r"""Pseudo linear multistep: Adams-Bashforth of up to four predictions, and the DDIM transfer.

    On a uniform grid the weights are the paper's (55, -59, 37, -9)/24; on others those of the actual times.

    Args:
        model: the model.
        order: predictions used, 1 (DDIM) to 4.
        warmup: True: the first ``order - 1`` steps are pseudo Runge-Kutta steps of four evaluations (PNDM); False:
            they use what there is (iPNDM), as does a step to sigma = 0.
    """

    def __init__(self, model: NDM, order: int = 4, warmup: bool = True) -> None:
        super().__init__(model, order)
        self.warmup = warmup

    def cost(self, steps: int) -> int:
        """See :class:`Sampler`."""
        if not self.warmup:
            return steps
        first = 1 if self.level(1.0).alpha == 0.0 else 0
        return steps + 3 * min(max(0, steps - first), self.order - 1)

    def visited(self, grid: Tensor) -> Tensor:
        """See :class:`Sampler`."""
        return torch.cat([grid, 0.5 * (grid[:-1] + grid[1:])]) if self.warmup else grid

    def _advance(self, z: Tensor, t: Level, s: Level, generator: Randomness, cond: dict[str, Any]) -> Tensor:
        if t.alpha == 0.0:
            return self._ddim(z, t, s, cond)
        first = self._epsilon(z, t, cond)
        known = self._remember(t, first)
        if self.warmup and len(known) < self.order and s.sigma > 0.0:
            return self._transfer(z, self._runge_kutta(z, first, t, s, cond), t, s)
        # Of the integral over the step of the polynomial through the values known.
        r = [(level.t - t.t) / (s.t - t.t) for level, _ in known]
        weights = solve_vandermonde(r, [1.0 / (k + 1) for k in range(len(r))])
        return self._transfer(z, combine(weights, [value for _, value in known]), t, s)

    def _runge_kutta(self, z: Tensor, first: Tensor, t: Level, s: Level, cond: dict[str, Any]) -> Tensor:
        middle = self.level(0.5 * (t.t + s.t))
        second = self._epsilon(self._transfer(z, first, t, middle), middle, cond)
        third = self._epsilon(self._transfer(z, second, t, middle), middle, cond)
        fourth = self._epsilon(self._transfer(z, third, t, s), s, cond)
        return combine((1.0 / 6.0, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 6.0), (first, second, third, fourth))


class UniPC(Multistep):
    r"""The predictor-corrector with one evaluation per step.

    A step returns the predicted state; the next one, whose first act is to evaluate the network there, corrects it.
    The state at the end of a walk is therefore predicted only, and so is a state that is changed between two steps.

    Args:
        model: the model.
        order: k of the predictor, 1 to 3; its corrector has order k + 1.
        variant: B(h), "bh2" (:math:`e^{-h} - 1`) or "bh1" (:math:`-h`); it matters only where the paper replaces the
            solution of its linear system by 1/2 (a predictor of order 2, a corrector of order 1).
    """

    def __init__(self, model: NDM, order: int = 2, variant: str = "bh2") -> None:
        super().__init__(model, order)
        self.variant = choose("variant", variant, ("bh1", "bh2"))
        self._last: tuple[Tensor, Tensor, Level, Sequence[tuple[Level, Tensor]]] | None = None

    def _forget(self) -> None:
        super()._forget()
        self._last = None

    def _advance(self, z: Tensor, t: Level, s: Level, generator: Randomness, cond: dict[str, Any]) -> Tensor:
        _, D = self.predict(z, t, cond)
        if self._last is not None and (torch.compiler.is_compiling() or torch.equal(z, self._last[1])):
            before, _, start, known = self._last
            z = self._update(before, start, t, known, (t, D))
        known = self._remember(t, D)
        out = self._update(z, t, s, known, None)
        # A copy of the state returned, which the caller may change in place.
        self._last = (z, out.clone(), t, known) if math.isfinite(t.log_snr) else None
        return out

    def _update(
        self,
        z: Tensor,
        t: Level,
        s: Level,
        known: Sequence[tuple[Level, Tensor]],
        arrived: tuple[Level, Tensor] | None,
    ) -> Tensor:
        """From t to s with the predictions known at t, and that at s if it has been evaluated."""
        h, D = s.log_snr - t.log_snr, known[0][1]
        others = [*known[1:], *([arrived] if arrived is not None else [])]
        if not others or not math.isfinite(h):
            return exponential_euler(z, D, t, s)
        r = [(level.log_snr - t.log_snr) / h for level, _ in others]
        # A slope is (value - D) / r; the parts of D, its exponential Euler step's too, are summed as numbers.
        shares = [-s.alpha * weight / ratio for weight, ratio in zip(self._weights(r, h), r, strict=True)]
        own = -s.alpha * math.expm1(-h) - sum(shares)
        return combine([s.sigma / t.sigma, own, *shares], [z, D, *(value for _, value in others)])

    def _weights(self, r: Sequence[float], h: float) -> list[float]:
        r""":math:`B(h) \rho` with :math:`\sum_j r_j^{k-1} \rho_j B(h) = k!\, \varphi_{k+1}`, for slopes at r_j h."""
        B = math.expm1(-h) if self.variant == "bh2" else -h
        if len(r) == 1:
            return [0.5 * B]
        phi, moments, factorial = math.expm1(-h) / -h - 1.0, [], 1.0
        for k in range(1, len(r) + 1):
            factorial *= k
            moments.append(phi * factorial)
            phi = phi / -h - 1.0 / math.factorial(k + 1)
        return solve_vandermonde(r, moments)
