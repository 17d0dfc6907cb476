"""Everything that a training changes (weights, their average, optimiser, counters), and its checkpoints."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ndm_ct import objectives
from ndm_ct._core.errors import CheckpointError
from ndm_ct._core.parallel import Group
from ndm_ct._core.versions import versions
from ndm_ct.model import NDM
from ndm_ct.quantisation import rename_earlier
from ndm_ct.storage.atomic import PathLike
from ndm_ct.storage.folder import Journal, RunFolder
from ndm_ct.storage.tensors import compare_tensors, read, write
from ndm_ct.training.settings import OPTIMIZERS, Settings, default_warmup

__all__ = ["Folder", "Objective", "Row", "State"]

Row = dict[str, Any]
Objective = Callable[..., Tensor]

# Settings that early checkpoints do not have, with the values that they then had.
_LATER = {"cond_dropout": 0.0, "objective": None, "patience": None, "accumulate": 1, "precision": "full"}


class Folder(RunFolder):
    """The files of a training. Without a path nothing is written."""

    def __init__(self, path: PathLike | None, group: Group) -> None:
        super().__init__(path, group=group)
        self.rows: list[Row] = []

    @property
    def checkpoint(self) -> Path:
        """Everything that the next step depends on."""
        return self.path / "checkpoint.safetensors"

    @property
    def log(self) -> Journal:
        """Losses and validations."""
        return Journal(self.path / "log.jsonl")

    def rewind(self, step: int) -> None:
        """Drop rows of the log after ``step``, because they will be written again."""

        def rewound() -> list[Row]:
            rows = self.log.read(lambda _, row: (row, bool(row["step"] <= step)))
            kept = [row for row, done in rows if done]
            self.log.keep(len(kept))
            return kept

        if self.is_real:
            self.rows = self.group.of_main(rewound)

    def add(self, row: Row) -> None:
        """Add a row to the log."""
        self.rows.append(row)
        if self.is_real and self.group.is_main:
            self.log.add(row)


@dataclass(frozen=True, kw_only=True)
class _Progress:
    """The counters of a :class:`State`, as a checkpoint holds them."""

    step: int
    seconds: float
    pending: tuple[float, float, int]
    best: float
    waited: int

    @classmethod
    def from_json(cls, description: Mapping[str, Any], steps: int) -> "_Progress":
        """Read the counters of a training of ``steps`` steps.

        Raises:
            KeyError, TypeError, ValueError: the counters are missing or impossible.
        """
        loss, norm, pending = description["pending"]
        counts = {"step": description["step"], "pending": pending, "waited": description.get("waited", 0)}
        for name, value in counts.items():
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= steps:
                raise ValueError(f"{name} is {value!r}, expected an integer from 0 to {steps}")
        return cls(
            step=counts["step"], seconds=float(description["seconds"]), pending=(float(loss), float(norm), pending),
            best=float(description.get("best", -math.inf)), waited=counts["waited"],
        )  # fmt: skip


class State:
    """Everything that a training changes.

    Args:
        model: the model, trained in place.
        settings: settings of the training.
        objective: the loss; None is minus the ELBO.
        group: the processes of this training. All start from the weights of the first one.
    """

    def __init__(self, model: NDM, settings: Settings, objective: Objective | None, group: Group) -> None:
        self.model, self.settings, self.objective, self.group = model, settings, objective, group
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        group.broadcast_([tensor.data for tensor in model.state_dict(keep_vars=True).values()])
        self.optimizer = _optimizer(self.parameters, settings)
        self.device = self.parameters[0].device
        state = self.objective_state()
        group.broadcast_(list(state.values()))
        self.set_objective_state(state)
        self.average = _average(model, settings.ema)
        self.step, self.seconds = 0, 0.0
        self.pending = (0.0, 0.0, 0)  # sums of loss and gradient norm since the last row of the log, and their number
        self.best, self.waited = -math.inf, 0  # best validation, and how many since; with patience only
        self.best_weights: dict[str, Tensor] = {}

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done, or patience has ended."""
        patience = self.settings.patience
        return self.step == self.settings.steps or (patience is not None and self.waited >= patience)

    @property
    def averaged(self) -> NDM:
        """The model with averaged weights."""
        return self.model if self.average is None else cast(NDM, self.average.module)

    @property
    def minimised(self) -> Objective:
        """The objective, called as :func:`ndm_ct.loss`."""
        return self.objective or objectives.loss

    def objective_state(self) -> dict[str, Tensor]:
        """A copy of the objective's state; empty if it has none."""
        if not isinstance(self.objective, nn.Module):
            return {}
        return {name: tensor.to(self.device, copy=True) for name, tensor in self.objective.state_dict().items()}

    def set_objective_state(self, state: Mapping[str, Tensor]) -> None:
        """Replace the objective's state."""
        if state:
            cast(nn.Module, self.objective).load_state_dict(state)

    def update(self, loss: float, norm: float) -> None:
        """Move the weights along the gradient, and count the step.

        Args:
            loss: loss of the step, for the log.
            norm: norm of its gradient, for the log.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr_at(self.step)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step += 1
        self.pending = (self.pending[0] + loss, self.pending[1] + norm, self.pending[2] + 1)

    def keep_best(self, bound: float) -> None:
        """Keep the averaged weights if their validation is the best so far."""
        self.waited += 1
        if bound > self.best:
            self.best, self.waited = bound, 0
            self.best_weights = {name: tensor.clone() for name, tensor in self.averaged.state_dict().items()}

    def finish(self) -> None:
        """Put the best or the averaged weights into the model."""
        if self.best_weights:
            self.model.load_state_dict(self.best_weights)
        elif self.average is not None and self.step > 0:
            self.model.load_state_dict(self.averaged.state_dict())

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self.averaged.state_dict().items()}
        if isinstance(self.objective, nn.Module):
            tensors |= {f"objective.{name}": tensor for name, tensor in self.objective.state_dict().items()}
        return tensors

    def write(self, folder: Folder, identity: Row) -> None:
        """Write a checkpoint, in the main process.

        Args:
            folder: folder of the training.
            identity: settings that a training must have to continue from the checkpoint.
        """
        tensors = self._tensors() | {f"best.{name}": tensor for name, tensor in self.best_weights.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        description = {"kind": "training", "versions": versions(), "step": self.step, "seconds": self.seconds}
        description |= {"pending": self.pending, "settings": identity}
        if self.best_weights:
            description |= {"best": self.best, "waited": self.waited}
        self.group.of_main(lambda: write(folder.checkpoint, tensors, description))

    def restore(self, folder: Folder, identity: Row) -> None:
        """Continue from the checkpoint in the folder, if there is one, and drop later rows of the log.

        Args:
            folder: folder of the training.
            identity: settings of this training.

        Raises:
            ValueError: the checkpoint has other settings.
            CheckpointError: the checkpoint or the log is damaged. The model is unchanged.
        """
        file = folder.checkpoint
        saved = self.group.of_main(lambda: read(file, "training") if file.exists() else None)
        if saved is None:
            folder.rewind(0)
            return
        description, tensors = saved
        settings = description.get("settings")
        if not isinstance(settings, dict):
            raise CheckpointError(f"{file}: the settings are a {type(settings).__name__}, not an object.")
        before = _LATER | {"classes": identity["classes"]} | rename_earlier(settings)
        compared = _with_more_steps(before, identity)
        folder.compare(compared, identity)
        try:
            progress = _Progress.from_json(description, self.settings.steps)
            compare_tensors(self._expected(tensors), tensors)
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{file}: not the state of this training ({error}); move it away to start again."
            ) from error
        folder.rewind(progress.step)  # before the model changes, because the log may be damaged
        self._take(progress, tensors)
        if compared is not before:  # more steps are wanted, even if patience had ended
            self.waited = 0

    def _take(self, progress: _Progress, tensors: dict[str, Tensor]) -> None:
        self.model.load_state_dict(_under("model.", tensors))
        if self.average is not None:
            self.averaged.load_state_dict(_under("average.", tensors))
            self.average.n_averaged.fill_(progress.step)
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimizer.", tensors).items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        self.set_objective_state(_under("objective.", tensors))
        self.best_weights = _under("best.", tensors)
        for name, value in asdict(progress).items():
            setattr(self, name, value)

    def _expected(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that a checkpoint should have, with optimiser state only for parameters that had a gradient."""
        expected = self._tensors()
        if any(name.startswith("best.") for name in tensors):
            expected |= {f"best.{name}": tensor for name, tensor in self.model.state_dict().items()}
        moved = {name.split(".")[0] for name in _under("optimizer.", tensors)}
        ordered = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for index, parameter in enumerate(ordered):
            if str(index) in moved:
                state = {"step": torch.empty(()), "exp_avg": parameter, "exp_avg_sq": parameter}
                expected |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
        return expected


def _with_more_steps(saved: Row, identity: Row) -> Row:
    """The saved settings with the steps of this training, if more steps are all that is new in it."""
    steps, more = saved.get("steps"), identity["steps"]
    if not isinstance(steps, int) or steps >= more:
        return saved
    longer = saved | {"steps": more}
    if (saved.get("warmup"), identity["warmup"]) == (default_warmup(steps), default_warmup(more)):
        longer["warmup"] = identity["warmup"]
    return longer if all(longer.get(name) == value for name, value in identity.items()) else saved


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _optimizer(parameters: list[torch.nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    make: Callable[..., torch.optim.Optimizer] = OPTIMIZERS[settings.optimizer]
    return make([group for group in groups if group["params"]], lr=settings.lr)


def _average(model: NDM, decay: float) -> AveragedModel | None:
    if decay == 0.0:
        return None

    @torch.no_grad()
    def update(averaged: Any, current: Any, count: Tensor | int) -> None:
        n = int(count)
        if averaged[0].is_floating_point() or averaged[0].is_complex():
            torch._foreach_lerp_(averaged, current, 1.0 - min(decay, (1 + n) / (10 + n)))
        else:
            torch._foreach_copy_(averaged, current)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
