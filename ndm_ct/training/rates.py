"""Optimisers by name or made by the user, and the learning rate of every step."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ndm_ct._core.parallel import is_sharded
from ndm_ct.training.settings import OPTIMIZERS, Settings

__all__ = ["OptimizerFactory", "Rates", "SchedulerFactory", "describe_options", "make_optimizer"]

OptimizerFactory = Callable[[Any], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


def make_optimizer(
    parameters: Sequence[nn.Parameter], settings: Settings, factory: OptimizerFactory | None
) -> torch.optim.Optimizer:
    """The optimiser of a training.

    Args:
        parameters: what is trained. Sharded and whole ones come in groups of their own.
        settings: of the training.
        factory: makes the optimiser of parameters, or of groups of them; None makes the one that the settings name.

    Raises:
        TypeError: the factory returned something else.
        ValueError: the optimiser holds other parameters.
    """
    kinds = [[p for p in parameters if is_sharded(p) is sharded] for sharded in (False, True)]
    if factory is not None:
        made = factory([{"params": kind} for kind in kinds] if all(kinds) else list(parameters))
        if not isinstance(made, torch.optim.Optimizer) or isinstance(made, torch.optim.LBFGS):
            raise TypeError(
                f"optimizer must return a torch.optim.Optimizer whose step needs no closure, got {type(made).__name__}."
            )
        held = {id(p) for group in made.param_groups for p in group["params"]}
        if not any(id(p) in held for p in parameters):
            raise ValueError("optimizer must hold the parameters that it is called with, but it holds none of them.")
        return made
    groups = [
        {"params": [p for p in kind if (p.ndim >= 2) is decays], "weight_decay": decay}
        for kind in kinds
        for decays, decay in ((True, settings.weight_decay), (False, 0.0))
    ]
    make: Callable[..., torch.optim.Optimizer] = OPTIMIZERS[settings.optimizer]
    return make([group for group in groups if group["params"]], lr=settings.lr)


class Rates:
    """The learning rate of every step: of the settings, times the rates of a user's optimiser, or of a scheduler.

    Args:
        optimizer: the optimiser.
        settings: of the training.
        factory: makes the scheduler; None follows the settings.

    Raises:
        TypeError: the factory returned something else, or a scheduler that needs more than the number of the step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, settings: Settings, factory: SchedulerFactory | None) -> None:
        self.optimizer, self.settings = optimizer, settings
        self.base = [float(group["lr"]) for group in optimizer.param_groups]
        self.scheduler = None if factory is None else factory(optimizer)
        plateau = isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        if factory is not None and (plateau or not hasattr(self.scheduler, "step")):
            raise TypeError(
                "scheduler must return a torch.optim.lr_scheduler.LRScheduler that depends on the step alone, got "
                f"{type(self.scheduler).__name__}."
            )

    def set(self, step: int) -> float:
        """Set the rates of a step, counted from 0; returns that of the first group."""
        groups = self.optimizer.param_groups
        if self.scheduler is None:
            for group, base in zip(groups, self.base, strict=True):
                group["lr"] = self.settings.lr_at(step, base)
        return float(groups[0]["lr"])

    def advance(self, steps: int = 1) -> None:
        """Move the scheduler on."""
        if self.scheduler is not None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")  # of steps done before
                for _ in range(steps):
                    self.scheduler.step()


def describe_options(made: Any, options: dict[str, Any]) -> list[Any]:
    """The class of an optimiser or scheduler and those of its options that JSON holds."""
    kinds = bool | int | float | str
    simple = {
        name: list(value) if isinstance(value, tuple | list) else value
        for name, value in sorted(options.items())
        if isinstance(value, kinds) or (isinstance(value, tuple | list) and all(isinstance(v, kinds) for v in value))
    }
    return [type(made).__name__, simple]
