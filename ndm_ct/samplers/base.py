r"""The base class of samplers: noise levels, the network's prediction, and the walk down a time grid.

With the model's :math:`(\hat F, \hat{\dot F})`, :math:`\lambda = \log \alpha/\sigma` and

.. math::
    D = \hat F + \hat{\dot F} \Big/ \frac{d\lambda}{dt}, \qquad
    \hat\epsilon = \frac{z - \alpha D}{\sigma},

the probability flow is an integral of D alone, or of :math:`\hat\epsilon` alone, for every transform:

.. math::
    d\Bigl(\frac{z}{\sigma}\Bigr) = D\, d\Bigl(\frac{\alpha}{\sigma}\Bigr)
    \quad\Longleftrightarrow\quad
    d\Bigl(\frac{z}{\alpha}\Bigr) = \hat\epsilon\, d\Bigl(\frac{\sigma}{\alpha}\Bigr) .

If F is the identity, D is :math:`\hat x`, and these are the equations of DDIM, DPM-Solver++, DEIS and EDM. For other
transforms the same solvers integrate D.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ndm_ct._core.noise import GeneratorLike, Randomness, as_randomness
from ndm_ct.model import NDM
from ndm_ct.prediction import validate_finite
from ndm_ct.schedules.base import Level, levels

__all__ = ["Factor", "Sampler", "by_time", "exponential_euler", "inner_times", "steps_within", "walk"]

Callback = Callable[[float, Tensor], None]
Factor = float | Tensor
"""A coefficient at one time: a number, or a tensor with an axis for the rows if it varies over the event."""


class Sampler:
    """Base class of samplers, which take repeated steps from t to s < t.

    A multistep method remembers its last predictions. It uses them only if a step starts at the time at which the last
    step ended, so every walk starts anew. The caller may change the state between steps.

    Args:
        model: the model.
    """

    stages = 1
    """Network evaluations of a step."""

    uses_volatility = False
    """Whether steps depend on the model's volatility."""

    def __init__(self, model: NDM) -> None:
        self.model = model
        self.evaluations = 0
        self._levels: dict[float, Level] = {}
        self._transitions: dict[tuple[float, float], tuple[Factor, Factor]] = {}
        self._last_time = model.t_min
        self._plain = model.process.ordinary and model.prediction != "moments"

    def cost(self, steps: int) -> int:
        """Network evaluations of a walk of ``steps`` steps."""
        return self.stages * steps

    def prepare(self, grid: Tensor) -> None:
        """Evaluate the schedule on the whole grid at once. Steps work without this call, but are slower.

        Args:
            grid: float64 times, decreasing.
        """
        self.remember(self.visited(grid))
        self._last_time = float(grid[-1])
        if self.uses_volatility:
            self._remember_transitions(grid)

    def visited(self, grid: Tensor) -> Tensor:
        """All times at which a walk down the grid needs the schedule."""
        return grid

    def remember(self, times: Tensor) -> None:
        """Keep the schedule at float64 times ``(N,)``."""
        self._levels.update((level.t, level) for level in levels(self.model.schedule, times))

    def level(self, t: float | Tensor) -> Level:
        """The schedule at time t; it is evaluated once per time."""
        t = float(t)
        if t not in self._levels:
            self.remember(torch.tensor([t], dtype=torch.float64, device=self.model.schedule.device))
        return self._levels[t]

    def inside(self, t: Level, s: Level, node: float) -> Level:
        """The schedule inside the step from t to s; ``node`` is the share of the step, 0 at t and 1 at s."""
        if node in (0.0, 1.0):
            return s if node else t
        return self.level(t.t + node * (s.t - t.t))

    def transition(self, t: Level, s: Level) -> tuple[Factor, Factor]:
        r""":math:`\kappa, \tilde\sigma` of ``ForwardProcess.transition``; they are computed once per step."""
        if (t.t, s.t) not in self._transitions:
            self._remember_transitions(torch.stack([t.time, s.time]))
        return self._transitions[t.t, s.t]

    def _remember_transitions(self, grid: Tensor) -> None:
        with torch.no_grad():
            columns = self.model.process.transition(grid[1:], grid[:-1])
        self._transitions.update(zip(itertools.pairwise(grid.tolist()), by_time(*columns), strict=True))

    def moments(self, z: Tensor, level: Level, cond: dict[str, Any]) -> tuple[Tensor, Tensor]:
        r""":math:`\hat F` and :math:`\hat{\dot F}` at state z ``(B, *E)``, for one network evaluation.

        Raises:
            PredictorError: the prediction is NaN or infinite (with time and rows).
        """
        self.evaluations += 1
        F, dF = self.model.moments(z, level.time, **cond)
        validate_finite(F if self._plain else F + dF, level.time)
        return F, dF

    def predict(self, z: Tensor, level: Level, cond: dict[str, Any]) -> tuple[Tensor, Tensor]:
        r""":math:`\hat F` and D at state z, for one network evaluation. Raises as :meth:`moments`."""
        F, dF = self.moments(z, level, cond)
        return F, F if self._plain else F + level.slope * dF

    def drift(self, z: Tensor, level: Level, cond: dict[str, Any], half_rate: Factor | None = None) -> Tensor:
        r""":func:`ndm_ct.process.drift` at state z by one network evaluation. Coefficients are numbers, for speed."""
        F, dF = self.moments(z, level, cond)
        out = torch.add(level.dlog_sigma * z, F, alpha=level.dalpha - level.alpha * level.dlog_sigma)
        if not self._plain:
            out = torch.add(out, dF, alpha=level.alpha)
        return out if half_rate is None else self.plus(out, half_rate, torch.add(z, F, alpha=-level.alpha))

    def plus(self, y: Tensor, c: Factor, x: Tensor) -> Tensor:
        """y + c x, where c is diagonal in the transform's basis."""
        # A number takes one fast operation; torch.mul would make a tensor of it first.
        return torch.add(y, x, alpha=c) if isinstance(c, float) else y + self.model.transform.diagonal(c, x)

    def estimate(self, z: Tensor, t: float | Tensor, /, **cond: Any) -> Tensor:
        r""":math:`\hat x` at state z ``(B, *E)`` and time t, for one network evaluation.

        Raises:
            PredictorError: the prediction is NaN or infinite (with time and rows).
        """
        self.evaluations += 1
        time = self.level(t).time
        x = self.model.predict_x(z, time, **cond)
        validate_finite(x, time)
        return x

    def step(
        self, z: Tensor, t: float | Tensor, s: float | Tensor, /, *, generator: GeneratorLike = None, **cond: Any
    ) -> Tensor:
        r"""Draw :math:`z_s` given :math:`z_t`.

        Args:
            z: :math:`z_t`, shape ``(B, *E)``.
            t: the time, a number or a scalar tensor.
            s: the time stepped to, below t.
            generator: source of the noise, one or one per row.
            cond: conditioning.

        Returns:
            Shape of ``z``.

        Raises:
            ValueError: not 0 <= s < t <= 1.
        """
        generator = as_randomness(generator, len(z), z.device, "step")
        t, s = float(t), float(s)
        if not 0.0 <= s < t <= 1.0:
            raise ValueError(f"a step goes from t down to s, 0 <= s < t <= 1; got t={t!r}, s={s!r}.")
        return self._step(z, self.level(t), self.level(s), generator, cond)

    def _step(self, z: Tensor, t: Level, s: Level, generator: Randomness, cond: dict[str, Any]) -> Tensor:
        raise NotImplementedError


def by_time(first: Tensor, second: Tensor) -> Iterator[tuple[Factor, Factor]]:
    """Iterate over N times: the pair of coefficients at each."""
    return zip(*(each.tolist() if each.ndim == 1 else each.unsqueeze(1) for each in (first, second)), strict=True)


def inner_times(grid: Tensor, nodes: Iterable[float]) -> Tensor:
    """The times inside all intervals of a grid, at the shares ``nodes`` of each interval."""
    return torch.cat([grid[:0], *(grid[:-1] + node * grid.diff() for node in nodes if 0.0 < node < 1.0)])


def exponential_euler(z: Tensor, D: Tensor, t: Level, s: Level) -> Tensor:
    r"""The flow with D held fixed, :math:`z_s = \frac{\sigma_s}{\sigma_t} z + \alpha_s (1 - e^{-h}) D`, where
    :math:`h = \lambda_s - \lambda_t`. It also holds at alpha = 0 and at sigma = 0."""
    return torch.add(s.sigma / t.sigma * z, D, alpha=-s.alpha * math.expm1(t.log_snr - s.log_snr))


def walk(
    sampler: Sampler,
    z: Tensor,
    grid: Tensor,
    /,
    *,
    generator: GeneratorLike = None,
    callback: Callback | None = None,
    denoise: bool = False,
    **cond: Any,
) -> Tensor:
    r"""Take one step per interval of a decreasing grid.

    Args:
        sampler: any :class:`Sampler`.
        z: state at ``grid[0]``, shape ``(B, *E)``.
        grid: float64 times, decreasing.
        generator: source of the noise, one or one per row.
        callback: called with time and state before every step.
        denoise: return :math:`\hat x` at the start of the last step, in place of that step: the step to sigma = 0.
        cond: conditioning.

    Returns:
        The state at ``grid[-1]``, or :math:`\hat x`.
    """
    generator = as_randomness(generator, len(z), z.device, "walk")
    sampler.prepare(grid)
    times = grid.tolist()
    for t, s in itertools.pairwise(times):
        if callback is not None:
            callback(t, z)
        if denoise and s == times[-1]:
            return sampler.estimate(z, t, **cond)
        z = sampler.step(z, t, s, generator=generator, **cond)
    return z


def steps_within(sampler: Sampler, nfe: int, per_call: int = 1, denoise: bool = False) -> int:
    """The largest number of steps that takes at most ``nfe`` evaluations.

    Args:
        sampler: the sampler.
        nfe: network evaluations to spend.
        per_call: network evaluations of one prediction, which is 2 with guidance.
        denoise: as in :func:`walk`.

    Raises:
        ValueError: one step takes more than ``nfe``.
    """
    steps = nfe // per_call
    while steps > 0 and per_call * evaluations(sampler, steps, denoise) > nfe:
        steps -= 1
    if steps == 0:
        least = per_call * evaluations(sampler, 1, denoise)
        raise ValueError(
            f"nfe={nfe} is less than one step of {type(sampler).__name__}, which takes {least} evaluations."
        )
    return steps


def evaluations(sampler: Sampler, steps: int, denoise: bool) -> int:
    """Predictions of a :func:`walk` of ``steps`` steps."""
    if not denoise:
        return sampler.cost(steps)
    return 1 + (sampler.cost(steps - 1) if steps > 1 else 0)
