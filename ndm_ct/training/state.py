"""Everything that a training changes (weights, their average, optimiser, counters), and its checkpoints."""

import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ndm_ct import objectives
from ndm_ct._core.errors import CheckpointError
from ndm_ct._core.parallel import Group, copy_whole, is_sharded, reshard, shard_like, whole
from ndm_ct._core.versions import versions
from ndm_ct.model import NDM
from ndm_ct.quantisation import rename_earlier
from ndm_ct.storage.atomic import PathLike
from ndm_ct.storage.folder import Journal, RunFolder
from ndm_ct.storage.tensors import compare_tensors, read, write
from ndm_ct.training.averages import Averages, load_weights, weights_of
from ndm_ct.training.rates import OptimizerFactory, Rates, SchedulerFactory, describe_options, make_optimizer
from ndm_ct.training.settings import OWN, Settings, default_warmup

__all__ = ["Folder", "Objective", "Row", "State"]

T = TypeVar("T")
Row = dict[str, Any]
Objective = Callable[..., Tensor]

# Settings that early checkpoints do not have, with the values that they then had.
_LATER = {"cond_dropout": 0.0, "objective": None, "patience": None, "accumulate": 1, "precision": "full",
          "scheduler": None, "sample_weight": None}  # fmt: skip


class Folder(RunFolder):
    """The files of a training. Without a path nothing is written."""

    def __init__(self, path: PathLike | None, group: Group) -> None:
        super().__init__(path, group=group)
        self.rows: list[Row] = []

    @property
    def checkpoint(self) -> Path:
        """Everything that the next step depends on."""
        return self.path / "checkpoint.safetensors"

    def keep_earlier(self, step: int, keep: int) -> None:
        """Keep the checkpoint of an earlier step under a name of its own, and remove the oldest ones.

        Args:
            step: of the checkpoint that is there.
            keep: how many checkpoints there may be, with the one to be written.
        """
        if keep > 1 and self.checkpoint.exists():
            earlier = self.path / f"checkpoint-{step}.safetensors"
            earlier.unlink(missing_ok=True)
            try:
                os.link(self.checkpoint, earlier)
            except OSError:  # a file system without links
                shutil.copyfile(self.checkpoint, earlier)
            kept = sorted(self.path.glob("checkpoint-*.safetensors"), key=lambda path: int(path.stem.split("-")[1]))
            for path in kept[: 1 - keep]:
                path.unlink()

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
        optimizer: makes the optimiser; None makes the one that the settings name.
        scheduler: makes the scheduler; None follows the learning rate of the settings.
    """

    def __init__(
        self, model: NDM, settings: Settings, objective: Objective | None, group: Group,
        optimizer: OptimizerFactory | None = None, scheduler: SchedulerFactory | None = None,
    ) -> None:  # fmt: skip
        self.model, self.settings, self.objective, self.group = model, settings, objective, group
        reshard(model)  # the checks of the model have run it
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        _validate_shards(self.parameters, group)
        group.broadcast_([tensor.data for tensor in model.state_dict(keep_vars=True).values()])
        self.optimizer = make_optimizer(self.parameters, settings, optimizer)
        self.rates, self.lr = Rates(self.optimizer, settings, scheduler), 0.0
        self.made = {
            "optimizer": describe_options(self.optimizer, self.optimizer.defaults) if optimizer else settings.optimizer,
            "scheduler": describe_options(self.rates.scheduler, vars(self.rates.scheduler)) if scheduler else None,
        }
        # As checkpoints number them.
        self.ordered = self.parameters if optimizer else sorted(self.parameters, key=lambda p: p.ndim < 2)
        self.device = self.parameters[0].device
        state = self.objective_state()
        group.broadcast_(list(state.values()))
        self.set_objective_state(state)
        self.averages = Averages(model, settings.decays)
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
    def is_sharded(self) -> bool:
        """Whether FSDP2 keeps a part of the weights in each process."""
        return any(map(is_sharded, self.parameters))

    @property
    def chosen(self) -> dict[str, Tensor]:
        """The weights that the model gets in the end: the first averages, or those of the last step."""
        return (
            self.averages.weights[0]
            if self.averages.weights
            else {name: each.detach() for name, each in weights_of(self.model).items()}
        )

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
        self.lr = self.rates.set(self.step)
        self.optimizer.step()
        self.rates.advance()
        self.averages.update(self.step)
        self.step += 1
        self.pending = (self.pending[0] + loss, self.pending[1] + norm, self.pending[2] + 1)

    def keep_best(self, bound: float) -> None:
        """Keep the averaged weights if their validation is the best so far."""
        self.waited += 1
        if bound > self.best:
            self.best, self.waited = bound, 0
            self.best_weights = {name: tensor.clone() for name, tensor in self.chosen.items()}

    def finish(self) -> None:
        """Put the best or the averaged weights into the model."""
        if self.step > 0:
            load_weights(self.model, self.best_weights or self.chosen)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for prefix, weights in zip(_prefixes(self.averages), self.averages.weights, strict=True):
            tensors |= {f"{prefix}{name}": tensor for name, tensor in weights.items()}
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
        numbers: dict[str, Any] = {}
        for index, state in self._optimizer_state().items():
            for name, value in state.items():
                (tensors if isinstance(value, Tensor) else numbers)[f"optimizer.{index}.{name}"] = value
        description = {"kind": "training", "versions": versions(), "step": self.step, "seconds": self.seconds}
        description |= {"pending": self.pending, "settings": identity, "optimizer": numbers}
        if self.best_weights:
            description |= {"best": self.best, "waited": self.waited}
        entire = {name: whole(tensor) for name, tensor in tensors.items()}
        self.group.of_main(lambda: write(folder.checkpoint, entire, description))

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
        self._take(progress, tensors, description.get("optimizer", {}))
        if compared is not before:  # more steps are wanted, even if patience had ended
            self.waited = 0

    def _take(self, progress: _Progress, tensors: dict[str, Tensor], numbers: Mapping[str, Any]) -> None:
        load_weights(self.model, _under("model.", tensors))
        for prefix, weights in zip(_prefixes(self.averages), self.averages.weights, strict=True):
            for name, tensor in _under(prefix, tensors).items():
                copy_whole(weights[name], tensor)
        own = {
            id(p): place for place, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"])
        }
        state: dict[int, dict[str, Any]] = {}
        for name, value in {**_under("optimizer.", tensors), **_under("optimizer.", numbers)}.items():
            index, key = name.split(".", 1)
            p = self.ordered[int(index)]
            alike = isinstance(value, Tensor) and value.shape == p.shape
            state.setdefault(own[id(p)], {})[key] = shard_like(value, p) if alike else value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        self.set_objective_state(_under("objective.", tensors))
        weights = weights_of(self.model)
        best = _under("best.", tensors)
        self.best_weights = {name: shard_like(tensor, weights[name].detach()) for name, tensor in best.items()}
        for name, value in asdict(progress).items():
            setattr(self, name, value)
        self.rates.advance(progress.step)

    def _optimizer_state(self) -> dict[int, dict[str, Any]]:
        """The optimiser's state of each parameter that has one, by its number."""
        state = self.optimizer.state
        return {index: dict(state[p]) for index, p in enumerate(self.ordered) if p in state}

    def _expected(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that a checkpoint should have, with optimiser state only for parameters that had a gradient."""
        expected = self._tensors()
        if any(name.startswith("best.") for name in tensors):
            expected |= {f"best.{name}": tensor for name, tensor in self.model.state_dict().items()}
        moved = {name.split(".")[0] for name in _under("optimizer.", tensors)}
        if self.settings.optimizer == OWN:  # whose state only it knows
            return expected | {name: each for name, each in tensors.items() if name.startswith("optimizer.")}
        for index, parameter in enumerate(self.ordered):
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
    if saved.get("scheduler") and identity["scheduler"]:  # it may span the steps
        longer["scheduler"] = identity["scheduler"]
    if (saved.get("warmup"), identity["warmup"]) == (default_warmup(steps), default_warmup(more)):
        longer["warmup"] = identity["warmup"]
    return longer if all(longer.get(name) == value for name, value in identity.items()) else saved


def _under(prefix: str, tensors: Mapping[str, T]) -> dict[str, T]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _validate_shards(parameters: list[nn.Parameter], group: Group) -> None:
    sizes = {int(cast(Any, p).device_mesh.size()) for p in parameters if is_sharded(p)}
    if sizes - {group.size}:
        raise ValueError(
            f"the model is sharded over {' and '.join(map(str, sorted(sizes)))} processes, and ndm_ct.fit works in "
            f"{group.size}; pass fully_shard a mesh of all processes."
        )


def _prefixes(averages: Averages) -> list[str]:
    """How names of the averages begin in a checkpoint."""
    return [f"average{place or ''}." for place in range(len(averages.decays))]
