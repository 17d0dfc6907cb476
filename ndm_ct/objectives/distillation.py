r"""Distillation: three losses that train a flow map (:mod:`ndm_ct.flow_maps`), with a teacher or by itself.

A state :math:`z_t = \alpha F(x, t) + \sigma\epsilon` of the teacher's forward process is mapped to a time s < t, and
the mean D of the map is regressed on what two shorter steps give,

.. math::
    L = E\; w(t)\, \bigl\|D_\theta(z_t, t, s) - [w_u D_1 + (1 - w_u) D_2]\bigr\|^2, \qquad
    X_{u,s}(X_{t,u}(z)) = A z + B [w_u D_1 + (1 - w_u) D_2] .

==================  ==================  ============================  ==========================================
loss                ends of a step      :math:`D_1`, from t to u      :math:`D_2`, from u to s
==================  ==================  ============================  ==========================================
``"progressive"``   s one of N equal    the teacher's step (DDIM, or  the teacher's step
                    steps below t,      that of a map)
                    u halfway
``"consistency"``   any s, u one of N   the teacher's flow, midpoint  the map itself, without gradient
                    steps below t       rule
``"mean_flow"``     any s               :math:`U` on :math:`v - (t - s)(\partial_t U + (\nabla_z U) v)`, by one jvp
==================  ==================  ============================  ==========================================

The mean velocity U is regressed by the last one, where v is the velocity of the pair :math:`(x, \epsilon)` itself, or
that of the teacher's flow. A share of the rows has s = t: there D is the teacher's, or U is v. With a teacher that is
exact the first two losses are zero for the map of its flow; only "progressive" keeps the error of the teacher's steps.

F is the teacher's: a learned one makes the states, and the map follows the flow to which it led.

References:
    Salimans and Ho, Progressive Distillation for Fast Sampling of Diffusion Models, https://arxiv.org/abs/2202.00512
    Kim et al., Consistency Trajectory Models, https://arxiv.org/abs/2310.02279
    Geng et al., Mean Flows for One-step Generative Modeling, https://arxiv.org/abs/2505.13447
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ndm_ct._core.checks import choose, expand, sum_event, validate_count
from ndm_ct._core.conditioning import Conditioning
from ndm_ct._core.noise import GeneratorLike, Randomness, as_randomness, normal_like
from ndm_ct._core.noise import uniform as draw_uniform
from ndm_ct.flow_maps import carry, mean_slope, mean_velocity, mixed, slope, validate_map
from ndm_ct.model import NDM
from ndm_ct.objectives.regression import name_of
from ndm_ct.objectives.regression import uniform as uniform_times
from ndm_ct.objectives.time_samplers import low_discrepancy
from ndm_ct.prediction import validate_finite
from ndm_ct.schedules.base import Coefficients, Schedule

__all__ = ["LOSSES", "Distillation", "truncated_snr"]

LOSSES = ("progressive", "consistency", "mean_flow")
"""Names of losses."""

_TO_END = 0.25
"""Share of the rows of "consistency" whose steps end at t_min, as those of a sample in one step do."""

_SMALLEST = 1e-3
"""Added to a squared error by which rows of "mean_flow" are weighed."""


def truncated_snr(c: Coefficients) -> Tensor:
    r""":math:`\max(\alpha^2/\sigma^2, 1)`: errors of :math:`\epsilon` where there is little noise, else of x."""
    return (c.alpha / c.sigma).square().clamp(min=1.0)


@dataclass(frozen=True)
class Distillation:
    r"""What ``fit(objective=)`` minimises to make a flow map.

    Args:
        loss: one of ``LOSSES``.
        teacher: a trained model with the schedule and ``t_min`` of the map: any NDM, guided ones and flow maps
            included. "mean_flow" needs none. It stays as it is.
        steps: N, steps from 1 to ``t_min``: those that the map of "progressive" learns, and the length of the teacher's
            step for "consistency". Without effect for "mean_flow".
        weight: w, a function of the schedule's :class:`~ndm_ct.schedules.Coefficients` at t; None is
            :math:`\max(\alpha^2/\sigma^2, 1)`, and 1 for "mean_flow".
        power: p, by which rows of "mean_flow" are weighed by :math:`(\|\text{error}\|^2 + 10^{-3})^{-p}`. The paper
            takes 1 for images. Any p > 0 draws U from the mean towards the mode of what it is regressed on, so that
            the flow at s = t, and ``loglik``, are no longer those of the data.
        times: ``times(schedule, t_min, u)``, times for numbers u in [0, 1); without effect for "progressive".
        equal: share of the rows with s = t; without effect for "progressive".

    Raises:
        ValueError: an unknown loss; a teacher is missing; ``steps``, ``equal`` or ``power`` makes no sense.

    Example:
        >>> import torch, ndm_ct
        >>> teacher = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
        >>> net = ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2, width=8, until=True))
        >>> student = ndm_ct.NDM(net, (2,), schedule=teacher.schedule, t_min=teacher.t_min)
        >>> Distillation("consistency", teacher)(student, torch.zeros(5, 2), generator=0).shape
        torch.Size([5])
    """

    loss: str
    teacher: NDM | None = None
    steps: int = 16
    weight: Callable[[Coefficients], Tensor] | None = None
    times: Callable[[Schedule, float, Tensor], Tensor] = uniform_times
    equal: float = 0.25
    power: float = 0.0

    def __post_init__(self) -> None:
        choose("loss", self.loss, LOSSES)
        validate_count("steps", self.steps)
        if self.teacher is None and self.loss != "mean_flow":
            raise ValueError(f"loss={self.loss!r} needs a teacher, a trained model; 'mean_flow' needs none.")
        for name in ("equal", "power"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)!r}.")

    def __call__(self, model: NDM, x: Tensor, /, *, generator: GeneratorLike = None, **cond: Any) -> Tensor:
        """One estimate per row, times of low discrepancy over the batch.

        Args:
            model: the flow map, in the mode the caller chose.
            x: data, shape ``(B, *E)``.
            generator: source of times and noise.
            cond: conditioning, of teacher and map.

        Returns:
            Shape ``(B,)``; its mean is to be minimised.

        Raises:
            ValueError: the model is no flow map, or another process than the teacher's.
            PredictorError: a prediction is NaN or infinite (with time and rows).
        """
        given, source = model.validate(x, cond, type(self).__call__), self.teacher or model
        self._validate(model)
        generator = as_randomness(generator, len(x), x.device, "Distillation")
        t, s = self._ends(model, len(x), generator, x.device)
        with torch.no_grad(), source.evaluating():
            y, _ = source.to_latent(x, generator=generator, **given)
            z = source.process.along(y, **given).sample(t, eps := normal_like(y, generator))
        return self.at(model, y, z, t, s, eps, given)

    def at(self, model: NDM, y: Tensor, z: Tensor, t: Tensor, s: Tensor, eps: Tensor, cond: Conditioning) -> Tensor:
        """The loss of given rows, ``(B,)``.

        Args:
            model: the flow map.
            y: data or latents, ``(B, *E)``.
            z: states made of them, ``(B, *E)``.
            t: their times, float64, ``(B,)``.
            s: the times mapped to, ``(B,)``.
            eps: their noise, ``(B, *E)``.
            cond: conditioning.
        """
        if self.loss == "mean_flow":
            error, weight = self._mean_flow(model, y, z, t, s, eps, cond), self.weight
        else:
            error = mean_slope(model, z, t, s, **cond) - self._two_steps(model, z, t, s, cond)
            weight = self.weight or truncated_snr
        validate_finite(error, t)
        square = sum_event(error.square())
        if self.loss == "mean_flow":
            square = square * (square.detach() + _SMALLEST) ** -self.power
        return square if weight is None else weight(model.schedule(t)).to(square.dtype) * square

    def _ends(self, model: NDM, rows: int, generator: Randomness, device: torch.device) -> tuple[Tensor, Tensor]:
        """Times t and s of steps, float64."""
        u, low = low_discrepancy(rows, generator, device), model.t_min
        if self.loss == "progressive":
            last = (u * self.steps).floor()
            length = (1.0 - low) / self.steps
            return low + length * (last + 1.0), low + length * last
        others = draw_uniform((rows, 2), generator, torch.float64, device)
        first, second = (self.times(model.schedule, low, each) for each in (u, others[:, 0]))
        t, s = torch.maximum(first, second), torch.minimum(first, second)
        s = torch.where(others[:, 1] < self.equal, t, s)
        to_end = _TO_END if self.loss == "consistency" else 0.0
        return t, torch.where(others[:, 1] > 1.0 - to_end, low, s)

    def _two_steps(self, model: NDM, z: Tensor, t: Tensor, s: Tensor, cond: Conditioning) -> Tensor:
        """The mean D of a step from t to u and one from u to s."""
        assert self.teacher is not None
        progressive, schedule = self.loss == "progressive", model.schedule
        u = 0.5 * (t + s) if progressive else torch.maximum(s, t - (1.0 - model.t_min) / self.steps)
        here, between, end = schedule(t), schedule(u), schedule(s)
        with torch.no_grad(), self.teacher.evaluating():
            first = (mean_slope if progressive else _midpoint)(self.teacher, z, t, u, **cond)
            arrived = carry(z, first, here, between)
            if progressive:
                second = mean_slope(self.teacher, arrived, u, s, **cond)
        if not progressive:
            with torch.no_grad(), model.evaluating():
                second = mean_slope(model, arrived, u, s, **cond)
        return mixed(first, second, here, between, end)

    def _mean_flow(
        self, model: NDM, y: Tensor, z: Tensor, t: Tensor, s: Tensor, eps: Tensor, cond: Conditioning
    ) -> Tensor:
        """U minus what it is regressed on."""
        c = model.schedule(t)
        if self.teacher is None:
            velocity = expand(c.dalpha, y) * y + expand(c.dsigma, y) * eps
        else:
            with torch.no_grad(), self.teacher.evaluating():
                velocity = self.teacher.flow(z.dtype, **cond)(t, z)
        U, change = model.derivatives.jvp(mean_velocity(model, s, **cond), (z, t), (velocity, torch.ones_like(t)))
        return U - (velocity - expand(t - s, z) * change).detach()

    def _validate(self, model: NDM) -> None:
        validate_map(model)
        teacher = self.teacher
        if teacher is None:
            return
        if teacher.event_shape != model.event_shape or teacher.t_min != model.t_min:
            raise ValueError(
                f"teacher and map must agree, but the teacher has event_shape={teacher.event_shape}, "
                f"t_min={teacher.t_min:g}, the map {model.event_shape} and {model.t_min:g}."
            )
        t = torch.linspace(model.t_min, 1.0, 5, dtype=torch.float64, device=model.schedule.device)
        theirs, ours = (torch.stack([c.alpha, c.sigma]) for c in (teacher.schedule(t), model.schedule(t)))
        if not torch.allclose(theirs, ours, rtol=1e-9):
            raise ValueError("teacher and map have different schedules; build the map with schedule=teacher.schedule.")

    def describe(self) -> str:
        """Its settings, the same in every process, for a checkpoint to compare."""
        names = f"weight={name_of(self.weight)}, times={name_of(self.times)}"
        weights = [] if self.teacher is None else self.teacher.state_dict().values()
        teacher = sum(float(each.double().abs().sum()) for each in weights)
        own = f"{self.loss!r}, steps={self.steps}, equal={self.equal}, power={self.power}"
        return f"Distillation({own}, {names}, teacher={teacher:.9g})"


def _midpoint(teacher: NDM, z: Tensor, t: Tensor, u: Tensor, /, **cond: Any) -> Tensor:
    """The mean D of the teacher's flow over a step, by its value halfway; of a flow map its own."""
    if teacher.is_map:
        return mean_slope(teacher, z, t, u, **cond)
    middle = 0.5 * (t + u)
    halfway = carry(z, slope(teacher, z, t, **cond), teacher.schedule(t), teacher.schedule(middle))
    return slope(teacher, halfway, middle, **cond)
