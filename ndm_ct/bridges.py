r"""Schrödinger bridges: the most likely diffusion between two laws, trained by simulating it.

A bridge has two policies. Z steers data at t = 0 towards the prior at t = 1, and :math:`\hat Z` steers the prior back:

.. math::
    dX = g Z(X, t)\,dt + g\,dW, \qquad dX = -g \hat Z(X, t)\,dt + g\,d\bar W,

where g is a constant. If both are the same process, with marginals :math:`p_t`, then

.. math::
    Z + \hat Z = g\,\nabla\log p_t, \qquad v = \tfrac12 g\,(Z - \hat Z),

where v is the velocity of the probability flow. :func:`alternate` trains one policy on paths of the other, in turns
(iterative proportional fitting). On paths of Z it minimises over :math:`\hat Z`

.. math::
    E \int_0^1 \tfrac12 \|\hat Z\|^2 + g\,\nabla\cdot\hat Z + Z \cdot \hat Z \; dt ,

whose minimum is :math:`g\,\nabla\log p_t - Z`; on paths of :math:`\hat Z` the same with the two exchanged. Networks
that start at zero make the Brownian motion :math:`g\,dW` the process to which the bridge is closest.

References:
    Chen, Liu and Theodorou, Likelihood Training of Schrödinger Bridge using Forward-Backward SDEs Theory,
    https://arxiv.org/abs/2110.11291
    De Bortoli et al., Diffusion Schrödinger Bridge, https://arxiv.org/abs/2106.01357
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ndm_ct._core.checks import as_time, choose, expand_time, sum_event, validate_count, validate_positive
from ndm_ct._core.config import Configurable
from ndm_ct._core.noise import GeneratorLike, Randomness, as_randomness, coins, rows_of, uniform, validate_single
from ndm_ct._core.seeds import derive_seeds
from ndm_ct._core.signals import until_interrupted
from ndm_ct.model import NDM
from ndm_ct.prediction import validate_finite
from ndm_ct.process import ProcessPath
from ndm_ct.schedules import Rectified
from ndm_ct.solvers.torchsde import SDE_METHODS, sdeint
from ndm_ct.storage.atomic import PathLike
from ndm_ct.training.fit import FitResult, fit

__all__ = ["HalfBridge", "Policies", "SchroedingerBridge", "alternate"]

POLICIES = ("forward", "backward")
Policy = Callable[[Tensor, Tensor], Tensor]


class Policies(Configurable, nn.Module):
    r"""The velocity :math:`\tfrac12 g\,(Z - \hat Z)` of two policies: the predictor of :class:`SchroedingerBridge`.

    Args:
        forward_policy: Z, ``(z (B, *E), t (B,)) -> (B, *E)``.
        backward_policy: :math:`\hat Z`, called in the same way.
        diffusion: g.

    Raises:
        ValueError: g is not a positive number.
        TypeError: a policy is not callable, or g not a number.
    """

    def __init__(self, forward_policy: Policy, backward_policy: Policy, diffusion: float = 1.0) -> None:
        super().__init__()
        for name, policy in (("forward_policy", forward_policy), ("backward_policy", backward_policy)):
            if not callable(policy):
                raise TypeError(f"{name} must be callable as policy(z, t), got {type(policy).__name__}.")
        validate_positive("diffusion", diffusion)
        self.forward_policy, self.backward_policy, self.diffusion = forward_policy, backward_policy, float(diffusion)

    def forward(self, z: Tensor, t: Tensor, /) -> Tensor:
        """The velocity at states ``(B, *E)`` and times ``(B,)``."""
        return 0.5 * self.diffusion * (self.forward_policy(z, t) - self.backward_policy(z, t))

    def as_model(self, event_shape: Sequence[int], prior: Any) -> "SchroedingerBridge":
        """The bridge of these policies, for :func:`ndm_ct.load`."""
        return SchroedingerBridge(
            self.forward_policy, self.backward_policy, event_shape, diffusion=self.diffusion, prior=prior
        )


class SchroedingerBridge(NDM):
    r"""A Schrödinger bridge as a model: its probability flow serves ``loglik``, ``encode``, ``decode`` and ``sample``.

    The likelihood is that of the flow from the prior. It is the likelihood of the process once both policies agree,
    which :func:`alternate` approaches. Methods of ``sample`` that draw noise do not know the policies and refuse;
    :meth:`simulate` draws by the SDE. There is no bound.

    Args:
        forward_policy: Z, ``(z (B, *E), t (B,)) -> (B, *E)``; it steers data to the prior.
        backward_policy: :math:`\hat Z`, called in the same way; it steers the prior to the data.
        event_shape: E.
        diffusion: g. A larger one forgets the start sooner and needs more steps; the paths become straight as g goes
            to 0.
        prior: as of :class:`ndm_ct.NDM`, the law at t = 1; :class:`ndm_ct.prior.DataPrior` is a second data set.
        checks: as of :class:`ndm_ct.NDM`.

    Raises:
        ValueError: g is not a positive number, or a network of ``ndm_ct.nn`` is for other events.
        TypeError: a policy is not callable.

    Example:
        >>> import torch, ndm_ct
        >>> from ndm_ct.bridges import SchroedingerBridge
        >>> bridge = SchroedingerBridge(ndm_ct.nn.MLP(2), ndm_ct.nn.MLP(2), (2,))
        >>> bridge.simulate(torch.zeros(3, 2), to="prior", steps=5, generator=0).shape
        torch.Size([3, 2])
    """

    predictor: Policies
    flow_only = True

    def __init__(
        self, forward_policy: Policy, backward_policy: Policy, event_shape: Sequence[int], *, diffusion: float = 1.0,
        prior: Any = None, checks: bool = True,
    ) -> None:  # fmt: skip
        for policy in (forward_policy, backward_policy):
            if hasattr(policy, "validate_event"):
                policy.validate_event(tuple(event_shape))
        super().__init__(
            Policies(forward_policy, backward_policy, diffusion), event_shape, schedule=Rectified(),
            prediction="velocity", prior=prior, t_min=0.0, checks=checks,
        )  # fmt: skip

    def policy(self, name: str, z: Tensor, t: Tensor, /) -> Tensor:
        r"""Z ("forward") or :math:`\hat Z` ("backward") at states ``(B, *E)`` and times ``()`` or ``(B,)``.

        Raises:
            PredictorError: the policy is NaN or infinite (with time and rows).
        """
        network = self.predictor.forward_policy if name == "forward" else self.predictor.backward_policy
        value = network(z, expand_time(t, z))
        if value.shape != z.shape:
            raise ValueError(f"the {name} policy returned shape {tuple(value.shape)} for states {tuple(z.shape)}.")
        validate_finite(value, as_time(t, z.device).expand(len(z)))
        return value

    def score(self, z: Tensor, t: float | Tensor, /, **cond: Any) -> Tensor:
        r""":math:`(Z + \hat Z)/g`, which is :math:`\nabla\log p_t` where the policies agree; arguments as of
        ``velocity``.
        """
        time, _ = self._flow_at(z, t, cond, self.score)
        return (self.policy("forward", z, time) + self.policy("backward", z, time)) / self.predictor.diffusion

    def prior_divergence(self, path: ProcessPath, x: Tensor, generator: GeneratorLike) -> Tensor:
        """NaN, ``(B,)``: how far the law at t = 1 is from the prior is not known; compare ``simulate`` with it."""
        return x.new_full((len(x),), float("nan"))

    def simulate(
        self, start: Tensor, *, to: str = "data", steps: int = 100, method: str = "heun",
        batch_size: int | None = None, generator: GeneratorLike = None,
    ) -> Tensor:  # fmt: skip
        r"""The ends of paths of one policy's SDE, by torchsde.

        Args:
            start: states ``(B, *E)`` at t = 1, such as draws of the prior, or at t = 0 for ``to="prior"``.
            to: "data" follows :math:`\hat Z` from t = 1 to 0, "prior" follows Z from 0 to 1.
            steps: equal steps of the solver.
            method: one of ``ndm_ct.solvers.SDE_METHODS``.
            batch_size: paths at a time; None is all. Memory is proportional to it.
            generator: a seed, a generator, or one per row.

        Returns:
            Shape of ``start``. Ctrl-C returns the batches that are finished, with a warning.

        Raises:
            ValueError: an unknown ``to`` or ``method``, ``steps`` or ``batch_size`` below one, or states that do not
                fit the model.
            SolverError: the state is not finite.
        """
        name = "backward" if choose("to", to, ("data", "prior")) == "data" else "forward"
        steps = validate_count("steps", steps)
        choose("method", method, SDE_METHODS)
        self.validate_state(start, {}, self.simulate, name="start")
        size = len(start) if batch_size is None else validate_count("batch_size", batch_size)
        source = as_randomness(generator, len(start), start.device, "simulate")
        grid = torch.linspace(*((1.0, 0.0) if to == "data" else (0.0, 1.0)), steps + 1, dtype=torch.float64)
        if len(start) == 0:
            return start.clone()

        def end(rows: Tensor) -> Tensor:
            return list(self.path(name, start[rows], grid, method, rows_of(source, rows)))[-1]

        with self.evaluating(), torch.no_grad():
            batches = torch.arange(len(start)).split(max(size, 1))
            return torch.cat(until_interrupted(((len(rows), end(rows)) for rows in batches), len(start)))

    def path(self, name: str, start: Tensor, grid: Tensor, method: str, generator: Randomness) -> Iterator[Tensor]:
        """The states of one policy's path after each interval of a grid of times, by one step of torchsde for each.

        Args:
            name: "forward" or "backward".
            start: states ``(B, *E)`` at the first time.
            grid: increasing times for "forward", decreasing ones for "backward".
            method: one of ``SDE_METHODS``.
            generator: source of the noise.
        """
        g = self.predictor.diffusion
        sign, diffusion = (g if name == "forward" else -g), torch.tensor(g, dtype=torch.float64, device=start.device)
        state = start
        for k in range(len(grid) - 1):
            state = sdeint(
                lambda t, z: sign * self.policy(name, z, t), lambda t, z: diffusion, state, grid[k : k + 2],
                method=method, generator=generator,
            ).state[0]  # fmt: skip
            yield state


@dataclass(frozen=True)
class HalfBridge:
    r"""What ``fit(objective=)`` minimises to train one policy of a :class:`SchroedingerBridge` on paths of the other.

    The times of a path are spread evenly, shifted together at random. The divergence is that of one random direction.
    The other policy is not trained. Memory is proportional to the rows of a step times ``steps``.

    Args:
        policy: the one to train: "backward" on paths of Z from rows of data, or "forward" on paths of
            :math:`\hat Z` from draws of the prior.
        steps: times of each path.
        method: torchsde's method, one of ``ndm_ct.solvers.SDE_METHODS``.

    Raises:
        ValueError: an unknown policy or method; ``steps`` below one.

    Example:
        >>> import torch, ndm_ct
        >>> from ndm_ct.bridges import HalfBridge, SchroedingerBridge
        >>> bridge = SchroedingerBridge(ndm_ct.nn.MLP(2), ndm_ct.nn.MLP(2), (2,))
        >>> HalfBridge("backward", steps=4)(bridge, torch.zeros(3, 2), generator=0).shape
        torch.Size([3])
    """

    policy: str = "backward"
    steps: int = 20
    method: str = "heun"

    def __post_init__(self) -> None:
        choose("policy", self.policy, POLICIES)
        choose("method", self.method, SDE_METHODS)
        validate_count("steps", self.steps)

    def __call__(self, model: NDM, x: Tensor, /, *, generator: GeneratorLike = None, **cond: Any) -> Tensor:
        """One estimate per row, nats, shape ``(B,)``; its mean is to be minimised.

        Args:
            model: a :class:`SchroedingerBridge`.
            x: data, shape ``(B, *E)``; for the forward policy they give the number of paths alone.
            generator: source of times, paths and directions: a seed or a generator.
            cond: none; a bridge has no conditioning.

        Raises:
            TypeError: the model is not a bridge, or one generator per row was given.
            PredictorError: a policy is NaN or infinite.
        """
        if not isinstance(model, SchroedingerBridge):
            raise TypeError(f"HalfBridge trains a SchroedingerBridge, got {type(model).__name__}.")
        model.validate(x, cond, type(self).__call__)
        source = as_randomness(generator, len(x), x.device, "HalfBridge")
        source = validate_single(source, "the times of all paths are drawn together")
        backward = self.policy == "backward"
        start = x if backward else model.sample_prior(len(x), generator=source, dtype=x.dtype, device=x.device)
        shift = uniform((1,), source, torch.float64, x.device).clamp(min=1e-6)
        times = (torch.arange(self.steps, device=x.device) + shift) / self.steps
        grid = torch.cat([torch.zeros_like(shift), times])
        other, grid = ("forward", grid) if backward else ("backward", 1.0 - grid)
        with torch.no_grad():
            states = torch.cat(list(model.path(other, start, grid, self.method, source)))
            t = grid[1:].repeat_interleave(len(x))
            drift = model.policy(other, states, t)
        probe = (2 * coins(tuple(states.shape), source, x.device) - 1).to(states)
        value, slope = model.derivatives.jvp(lambda z: model.policy(self.policy, z, t), (states,), (probe,))
        loss = sum_event(value * (0.5 * value + drift) + model.predictor.diffusion * probe * slope)
        return loss.reshape(self.steps, len(x)).mean(0)

    def describe(self) -> str:
        """Its settings, the same in every process, for a checkpoint to compare."""
        return repr(self)


def alternate(
    bridge: SchroedingerBridge, data: Any, *, stages: int = 8, steps: int = 500, path_steps: int = 20,
    method: str = "heun", run_dir: PathLike | None = None, seed: int = 0, **options: Any,
) -> list[FitResult]:  # fmt: skip
    r"""Train a bridge by turns: the backward policy on paths from the data, then the forward one, and so on.

    Each stage is one :func:`ndm_ct.fit` with the objective :class:`HalfBridge`. With ``run_dir`` each has a folder
    ``stage-K``; the same call continues in the stage and at the step at which it was stopped.

    Args:
        bridge: the bridge, trained in place.
        data: as of :func:`ndm_ct.fit`.
        stages: number of stages. The law at the far end approaches its target with each pair of them.
        steps: optimiser steps of a stage.
        path_steps: times of each simulated path.
        method: torchsde's method, one of ``ndm_ct.solvers.SDE_METHODS``.
        run_dir: folder of the training, made if missing. None writes nothing.
        seed: of everything random; each stage has noise of its own.
        options: of :func:`ndm_ct.fit`, such as ``lr``, ``batch_size`` or ``progress``.

    Returns:
        The result of each stage. After Ctrl-C or at a time limit the last one has ``finished=False``, and no later
        stage has begun.

    Raises:
        TypeError: not a bridge; an option that this function sets itself.
        ValueError: ``stages`` or ``steps`` below one, and all that :func:`ndm_ct.fit` raises.

    Example:
        >>> import torch, ndm_ct
        >>> from ndm_ct.bridges import SchroedingerBridge, alternate
        >>> bridge = SchroedingerBridge(ndm_ct.nn.MLP(1), ndm_ct.nn.MLP(1), (1,))
        >>> results = alternate(bridge, torch.randn(64, 1), stages=2, steps=1, path_steps=3, progress=False)
        >>> [result.finished for result in results]
        [True, True]
    """
    if not isinstance(bridge, SchroedingerBridge):
        raise TypeError(f"alternate trains a SchroedingerBridge, got {type(bridge).__name__}.")
    for name in ("objective", "validation"):
        if name in options:
            raise TypeError(f"alternate takes no {name}=: its objectives are HalfBridge, and a bridge has no bound.")
    objectives = [HalfBridge(name, path_steps, method) for name in reversed(POLICIES)]
    results: list[FitResult] = []
    for stage in range(validate_count("stages", stages)):
        folder = None if run_dir is None else Path(run_dir) / f"stage-{stage}"
        own = derive_seeds(seed, "stage", stage)[0] >> 1
        with _training(bridge, objectives[stage % 2].policy):
            results.append(
                fit(bridge, data, steps=steps, run_dir=folder, seed=own, objective=objectives[stage % 2], **options)
            )
        if not results[-1].finished:
            break
    return results


@contextmanager
def _training(bridge: SchroedingerBridge, policy: str) -> Iterator[None]:
    """Keep the parameters that the other policy has for itself from being trained."""
    parts = [bridge.predictor.forward_policy, bridge.predictor.backward_policy]
    trained, other = parts if policy == "forward" else parts[::-1]
    modules = [part for part in (trained, other) if isinstance(part, nn.Module)]
    own = set(trained.parameters()) if isinstance(trained, nn.Module) else set()
    frozen = [p for part in modules for p in part.parameters() if p.requires_grad and p not in own]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
