r"""Training: minimise minus the ELBO, keep an average of the weights, survive being killed at any moment.

Step k (from 0) of K has the learning rate

.. math::
    \mathrm{lr}_k = \mathrm{lr} \cdot \min\Bigl(1, \frac{k + 1}{W}\Bigr)
    \cdot \Bigl(f + (1 - f)\, \tfrac12 \bigl(1 + \cos \pi p_k\bigr)\Bigr), \qquad
    p_k = \max\Bigl(0, \frac{k - W}{K - W}\Bigr)

with W steps of warm-up and final fraction f. After n updates the averaged weights follow

.. math::
    \bar\theta \leftarrow d_n \bar\theta + (1 - d_n) \theta, \qquad
    d_n = \min\Bigl(\mathrm{ema}, \frac{1 + n}{10 + n}\Bigr), \quad d_0 = 0 .

All randomness is a function of (seed, k): step k draws noise and times from a generator of its own, and epoch e has
its own permutation. A training is therefore resumed from weights, optimiser state and k alone, and continues with the
bits of a training that was never interrupted.

With ``cond_dropout`` p, step k also draws a Bernoulli(p) for every row: where it is one, the row's conditioning c is
replaced by the predictor's null values, and the loss is

.. math::
    (1 - p)\, E\,L(\theta; x, c) + p\, E\,L(\theta; x, \varnothing) :

one network learns the conditional and the unconditional model, which :func:`ndm_ct.guided` combines.

References:
    Loshchilov and Hutter, SGDR (the cosine decay), https://arxiv.org/abs/1608.03983
    Loshchilov and Hutter, Decoupled Weight Decay Regularization, https://arxiv.org/abs/1711.05101
    Ho and Salimans, Classifier-Free Diffusion Guidance (algorithm 1), https://arxiv.org/abs/2207.12598
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from ndm_ct import objectives
from ndm_ct._core.checks import choose, validate_count, validate_number, validate_positive
from ndm_ct._core.errors import CheckpointError, PredictorError
from ndm_ct._core.parallel import Group
from ndm_ct._core.precision import networks_in
from ndm_ct._core.seeds import derive_seeds
from ndm_ct._core.signals import stop_signals
from ndm_ct._core.versions import versions
from ndm_ct.data.sources import DEQUANTISATIONS, Bins, Source
from ndm_ct.guidance import nulled
from ndm_ct.model import NDM
from ndm_ct.nn import null_of
from ndm_ct.quantisation import Quantisation
from ndm_ct.storage.atomic import PathLike
from ndm_ct.storage.folder import Journal, RunFolder
from ndm_ct.storage.models import describe, save
from ndm_ct.storage.tensors import compare_tensors, read, write

__all__ = ["FitResult", "fit"]

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}

# Last words of the seeds, one per use of randomness; numpy pads short seeds with zeros, so none is 0.
_EPOCH, _VALIDATION, _PART = 1, 2, 3

# Settings younger than some checkpoints, with the values that leave them out.
_LATER = {"cond_dropout": 0.0, "objective": None, "patience": None, "accumulate": 1, "precision": "full"}

PRECISIONS = {"full": None, "bf16-mixed": torch.bfloat16}
"""What the networks of a training are evaluated in, by the names of Lightning; None is the dtype of the weights."""

Row = dict[str, Any]
Objective = Callable[..., Tensor]


@dataclass(frozen=True)
class FitResult:
    """What a training did.

    Args:
        step: optimiser steps completed, earlier runs of the same ``run_dir`` included.
        finished: whether all steps were done, or patience ended (not if interrupted or out of time).
        history: rows with step, loss (nats per event, mean since the row before), lr, grad_norm, seconds, and
            bits_per_dim for integer data.
        validation: rows with step, validation_elbo (nats per event), validation_stderr, seconds, and
            validation_bits_per_dim for integer data.
    """

    step: int
    finished: bool
    history: tuple[Row, ...]
    validation: tuple[Row, ...]


@dataclass(frozen=True)
class _Settings:
    """The numbers that determine the weights."""

    steps: int
    batch_size: int
    lr: float
    optimizer: str
    weight_decay: float
    grad_clip: float | None
    warmup: int
    lr_final: float
    ema: float
    seed: int
    cond_dropout: float
    patience: int | None
    accumulate: int
    precision: str

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            validate_count(name, getattr(self, name))
        for name in ("lr", "weight_decay", "grad_clip", "warmup", "lr_final", "ema", "cond_dropout"):
            if (value := getattr(self, name)) is not None or name != "grad_clip":
                validate_number(name, value)
        if self.patience is not None:
            validate_count("patience", self.patience)
        choose("optimizer", self.optimizer, OPTIMIZERS)
        _validate_precision(self.precision)
        for name, ok, expected in (
            ("lr", self.lr > 0.0, "positive"),
            ("weight_decay", self.weight_decay >= 0.0, "at least 0"),
            ("grad_clip", self.grad_clip is None or self.grad_clip > 0.0, "positive, or None for no clipping"),
            ("warmup", 0 <= self.warmup <= self.steps, "between 0 and steps"),
            ("lr_final", 0.0 <= self.lr_final <= 1.0, "a fraction of lr in [0, 1]"),
            ("ema", 0.0 <= self.ema < 1.0, "in [0, 1), 0 for no average"),
            ("seed", isinstance(self.seed, int) and self.seed >= 0, "an int of at least 0"),
            ("cond_dropout", 0.0 <= self.cond_dropout < 1.0, "a probability in [0, 1)"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}.")

    def lr_at(self, step: int) -> float:
        """Learning rate of step ``step``, counted from 0."""
        ramp = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        progress = max(0.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.lr * ramp * (self.lr_final + (1.0 - self.lr_final) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def fit(
    model: NDM,
    data: Any,
    *,
    steps: int,
    batch_size: int = 128,
    lr: float = 1e-3,
    optimizer: str = "adamw",
    weight_decay: float = 0.01,
    grad_clip: float | None = 1.0,
    warmup: int | None = None,
    lr_final: float = 0.01,
    ema: float = 0.999,
    cond: Mapping[str, Any] | None = None,
    cond_dropout: float = 0.0,
    quantisation: Quantisation | None = None,
    dequantisation: str = "uniform",
    validation: Any = None,
    validation_cond: Mapping[str, Any] | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    run_dir: PathLike | None = None,
    checkpoint_every: int | None = None,
    log_every: int = 100,
    resume: bool = True,
    seed: int = 0,
    accumulate: int | None = None,
    precision: str = "full",
    progress: bool = True,
    time_limit: float | None = None,
    objective: Objective | None = None,
) -> FitResult:
    """Train a model in place. Afterwards it holds the averaged weights (``ema > 0``), in the mode it had before.

    Residuals that ``discrete.estimate_residuals`` has measured are dropped: they were those of other weights.

    With ``run_dir`` the folder receives ``log.jsonl``, ``checkpoint.safetensors`` (weights, averaged weights and
    optimiser state) and at the end ``model.safetensors`` for :func:`ndm_ct.load`. The same call continues a training
    that was killed. Ctrl-C finishes the step, writes a checkpoint and returns.

    Networks may be compiled before, in place: ``model.predictor.compile()``, ``model.transform.features.compile()``;
    files, averaged weights and :func:`ndm_ct.load` are those of the networks as they were. (``torch.compile(module)``
    returns a wrapper, under whose name the weights would be saved.)

    Args:
        model: the model; on return trained, also if interrupted.
        data: tensor or array ``(N, *E)``, or a map-style ``Dataset`` whose items are tensors ``(*E)``. Real values,
            or integers together with ``quantisation``. A float array takes the model's dtype.
        steps: optimiser steps in total.
        batch_size: rows per step, drawn without replacement within an epoch; an incomplete last batch is left out.
        lr: peak learning rate.
        optimizer: "adamw" or "adam".
        weight_decay: of the weights with two or more axes; biases, scales and schedules have none.
        grad_clip: largest norm of the gradient of the loss in nats per dimension; None for no clipping.
        warmup: steps of linear warm-up; None is a tenth of ``steps``, at most 1000.
        lr_final: fraction of ``lr`` at the end of the cosine decay.
        ema: decay of the averaged weights; 0 keeps none.
        cond: conditioning by name, each with one row per row of ``data``.
        cond_dropout: probability with which a row of a batch gets, in the place of its conditioning, the values that
            mean none: those that the predictor names in its attribute ``null`` (networks of ``ndm_ct.nn`` with
            ``classes`` have it). 0.1 to 0.2 is usual for a model that is to be ``guided``; validation drops none.
        quantisation: the bins of integer data.
        dequantisation: which evaluation integer data are prepared for: "uniform" noise in the bins, or the bin
            "centres" for truncated-normal dequantisation.
        validation: held-out data of the same kind.
        validation_cond: its conditioning.
        validate_every: steps between validations of the averaged weights; None is a tenth of ``steps``.
        patience: stop after so many validations without a better one, and keep the weights of the best; None trains
            to the end, and keeps the last.
        run_dir: folder of the training, made if missing.
        checkpoint_every: steps between checkpoints; None is 1000.
        log_every: steps between rows of the history.
        resume: continue from the checkpoint in ``run_dir``; False refuses a folder that has one.
        seed: of everything random, dropout included; the global generator of torch is left as it was.
        accumulate: K parts that a batch is cut into, whose gradients are added up: less memory, or work for several
            processes, each of which takes K / processes of them. The result depends on K, but not on the number of
            processes, beyond rounding. None is the number of processes.
        precision: "full", or "bf16-mixed": the predictor and the networks of ``Neural`` and ``Separable`` run under
            ``torch.autocast`` in bfloat16. Their outputs, everything computed from them, the loss, weights, averages
            and optimiser state stay in float32, as do flows, encoders and decoders, and validation.
        progress: whether to show a progress bar.
        time_limit: seconds after which to stop with a checkpoint, as if interrupted.
        objective: what is minimised, called as ``objective(model, x, generator=generator, **cond)`` for one value per
            row, such as a :class:`~ndm_ct.objectives.Regression` (:mod:`ndm_ct.presets` has the published ones);
            None is minus the ELBO, :func:`ndm_ct.loss`, and :class:`~ndm_ct.objectives.Bound` the same with importance
            sampling of the times. Validation is by the ELBO whatever it is. A module may have a state (buffers): a step
            leaves the mean of what its parts make of it, and checkpoints hold it.

    Returns:
        A :class:`FitResult`.

    Raises:
        TypeError: integer data without ``quantisation``, or data of the wrong type.
        ValueError: an argument out of range or without effect; data that do not fit the model; a checkpoint of other
            settings, which are named.
        CheckpointError: the checkpoint in ``run_dir`` is damaged.
        BlockingIOError: another process is at work in ``run_dir``.
        RuntimeError: loss, gradient or prediction became NaN or infinite; the last checkpoint is as it was.
    """
    cond = {} if cond is None else cond
    group = Group()
    accumulate = group.size if accumulate is None else validate_count("accumulate", accumulate)
    if accumulate % group.size:
        raise ValueError(
            f"accumulate={accumulate} parts of a batch cannot be shared equally by {group.size} processes; take a "
            "multiple of their number."
        )
    settings = _Settings(
        validate_count("steps", steps), batch_size, lr, optimizer, weight_decay, grad_clip,
        min(1000, steps // 10) if warmup is None else warmup, lr_final, ema, seed, cond_dropout, patience,
        accumulate, precision,
    )  # fmt: skip
    if not isinstance(model, NDM):
        raise TypeError(f"model must be an ndm_ct.NDM, got {type(model).__name__}.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model has no parameter that requires a gradient: there is nothing to train.")
    _refuse_ineffective(locals())
    if PRECISIONS[precision] is not None and model.dtype not in (None, torch.float32):
        raise ValueError(
            f"precision={precision!r} has no effect on networks of {model.dtype}; convert the model with .float(), or "
            "leave precision out."
        )
    if cond_dropout > 0.0:
        _validate_droppable(model, cond)
    if time_limit is not None:
        validate_positive("time_limit", time_limit, "seconds")
    if objective is not None and not callable(objective):
        raise TypeError(f"objective must be callable as objective(model, x, ...), got {type(objective).__name__}.")
    bins = Bins(model, quantisation, choose("dequantisation", dequantisation, DEQUANTISATIONS))
    source = Source(data, cond, bins, "data", fit)
    if accumulate > (rows := min(batch_size, source.rows)):
        raise ValueError(
            f"accumulate={accumulate} parts of a batch of {rows} rows would leave some empty; take fewer parts "
            "(left out, accumulate is the number of processes), or larger batches."
        )
    held_out = None if validation is None else Source(validation, validation_cond or {}, bins, "validation", fit)
    intervals = (
        validate_count("validate_every", max(1, steps // 10) if validate_every is None else validate_every),
        validate_count("checkpoint_every", 1000 if checkpoint_every is None else checkpoint_every),
        validate_count("log_every", log_every),
    )
    own = None if objective is objectives.loss else objective
    folder = _Folder(run_dir, group)
    with folder.locked(folder.checkpoint.name if folder.is_real else "", "a checkpoint", resume):
        training = _Training(model, settings, source, held_out, bins, own, folder, *intervals)
        return training.run(progress and group.is_main, math.inf if time_limit is None else time_limit)


def _refuse_ineffective(arguments: Mapping[str, Any]) -> None:
    for name, needed in (
        ("validation_cond", "validation"),
        ("validate_every", "validation"),
        ("patience", "validation"),
        ("checkpoint_every", "run_dir"),
    ):
        if arguments[name] is not None and arguments[needed] is None:
            raise ValueError(f"{name} has no effect without {needed}; pass {needed}= or leave {name} out.")
    if arguments["dequantisation"] != "uniform" and arguments["quantisation"] is None:
        raise ValueError("dequantisation has no effect without quantisation; it is for integer data.")


def _validate_droppable(model: NDM, cond: Mapping[str, Any]) -> None:
    null = null_of(model.predictor)
    if not cond:
        raise ValueError("cond_dropout has no effect without cond; pass cond={name: tensor} or leave cond_dropout out.")
    if not null:
        raise ValueError(
            "cond_dropout needs a predictor that says what 'no conditioning' is, and this one has no dict null; "
            'build the network with classes=K, or give it a dict such as null = {"label": -1}.'
        )
    if not null.keys() & cond.keys():
        raise ValueError(
            f"cond_dropout has no effect on cond={sorted(cond)}: the predictor's null names {sorted(null)}; give a "
            "null value for what is to be dropped."
        )


def _validate_precision(name: Any) -> None:
    if "16" in str(name) and "bf" not in str(name):
        raise ValueError(
            f"precision={name!r} is not offered: gradients underflow in float16 unless the loss is scaled; take "
            "'bf16-mixed', which has the range of float32."
        )
    choose("precision", name, PRECISIONS)


class _Folder(RunFolder):
    """The files of a training; without a path nothing is written."""

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
        """Drop rows of the log after ``step``, which will be written again."""

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


def _described(objective: Objective) -> str:
    """Something that changes with the objective, for a checkpoint to compare."""
    if hasattr(objective, "describe"):
        return str(objective.describe())
    return str(getattr(objective, "__qualname__", type(objective).__qualname__))


class _Interrupt:
    """Turns the first Ctrl-C, SIGTERM or SIGUSR1 into a request, so that a step is never left half done."""

    def __init__(self) -> None:
        self.requested = False

    def caught(self) -> AbstractContextManager[None]:
        return stop_signals(self._request)

    def _request(self, *_: Any) -> None:
        if self.requested:  # the second one is impatient
            raise KeyboardInterrupt
        self.requested = True


@dataclass(frozen=True)
class _Progress:
    """How far a training had come when it wrote its checkpoint; the fields are those of :class:`_Training`."""

    step: int
    seconds: float
    pending: tuple[float, float, int]
    best: float
    waited: int

    @classmethod
    def from_json(cls, description: Mapping[str, Any], steps: int) -> "_Progress":
        """Read it from a description; raises KeyError, TypeError or ValueError if that is no progress of ``steps``."""
        loss, norm, pending = description["pending"]
        counts = {"step": description["step"], "pending": pending, "waited": description.get("waited", 0)}
        for name, value in counts.items():
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= steps:
                raise ValueError(f"{name} is {value!r}, expected an integer from 0 to {steps}")
        sums = (float(loss), float(norm), pending)
        best = float(description.get("best", -math.inf))
        return cls(counts["step"], float(description["seconds"]), sums, best, counts["waited"])


class _Training:
    """The state of a training and its loop."""

    def __init__(
        self,
        model: NDM,
        settings: _Settings,
        data: Source,
        validation: Source | None,
        bins: Bins,
        objective: Objective | None,
        folder: _Folder,
        validate_every: int,
        checkpoint_every: int,
        log_every: int,
    ) -> None:
        self.model, self.settings, self.data, self.validation = model, settings, data, validation
        self.bins, self.objective, self.folder, self.group = bins, objective, folder, folder.group
        self.validate_every, self.checkpoint_every, self.log_every = validate_every, checkpoint_every, log_every
        self.model.residuals = None  # of weights that are about to change
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.group.broadcast_([tensor.data for tensor in model.state_dict(keep_vars=True).values()])
        self.optimizer = _optimizer(self.parameters, settings)
        self.device = self.parameters[0].device
        state = self._state()
        self.group.broadcast_(list(state.values()))
        self._set_state(state)
        self.average = _average(model, settings.ema)
        self.step, self.seconds, self.updating = 0, 0.0, False
        self.pending = (0.0, 0.0, 0)  # sums of loss and gradient norm since the last row, and their number
        self.best, self.waited = -math.inf, 0  # of validations, and how many since; with patience only
        self.best_weights: dict[str, Tensor] = {}
        self.identity: Row = {}
        self._permutation: tuple[int, Tensor] = (-1, torch.empty(0))
        if folder.is_real:
            self.identity = json.loads(json.dumps(self._identity()))
            self._restore()

    def run(self, progress: bool, time_limit: float) -> FitResult:
        settings, start, before, interrupt = self.settings, time.monotonic(), self.seconds, _Interrupt()
        modes = [(module, module.training) for module in self.model.modules()]
        bar = tqdm(total=settings.steps, initial=self.step, disable=not progress, unit="step", dynamic_ncols=True)
        devices = [self.device] if self.device.type == "cuda" else []
        self.model.train()
        try:
            with bar, interrupt.caught(), torch.random.fork_rng(devices):
                while not self._finished():
                    late = time.monotonic() - start >= time_limit
                    if self.group.any(interrupt.requested or late, self.device):
                        break
                    loss = self._advance()
                    self.seconds = before + time.monotonic() - start
                    bits = self._bits(loss)
                    bar.set_postfix({"loss": loss} if bits is None else {"bits/dim": bits}, refresh=False)
                    bar.update()
                    self._report()
        except KeyboardInterrupt:
            if self.updating:  # the weights are those of no step; the last checkpoint stands
                raise
        finally:
            for module, training in modes:
                module.training = training
        finished = self._finished()
        if self.folder.is_real:
            self._checkpoint()
        if self.best_weights:
            self.model.load_state_dict(self.best_weights)
        elif settings.ema > 0.0 and self.step > 0:
            self.model.load_state_dict(self._averaged().state_dict())
        if self.folder.is_real and finished:
            self.group.of_main(lambda: save(self.model, self.folder.path / "model.safetensors"))
        history = tuple(row for row in self.folder.rows if "loss" in row)
        return FitResult(self.step, finished, history, tuple(row for row in self.folder.rows if "loss" not in row))

    def _finished(self) -> bool:
        patience = self.settings.patience
        return self.step == self.settings.steps or (patience is not None and self.waited >= patience)

    def _advance(self) -> float:
        """One step; returns its loss."""
        self.optimizer.zero_grad()
        loss, state = self._differentiated()
        self._validate_finite("loss", loss)
        largest = math.inf if self.settings.grad_clip is None else self.settings.grad_clip
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, largest)
        self._validate_finite("gradient norm", norm)
        self.updating = True
        self._set_state(state)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr_at(self.step)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step += 1
        self.pending = (self.pending[0] + loss.item(), self.pending[1] + norm.item(), self.pending[2] + 1)
        self.updating = False
        return loss.item()

    def _differentiated(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, its gradient in the parameters, and the objective's next state.

        In parts, and those in several processes. Every part begins at the same state, and the next one is the mean of
        what they make of it, so that it does not matter which process takes which part.
        """
        rows, before = self._rows(), self._state()
        total, failure = torch.zeros((), dtype=torch.float64, device=self.device), None
        after = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in before.items()}
        try:
            for part, own in self.group.share(rows.tensor_split(self.settings.accumulate)):
                loss = self._loss(part, own) * (len(own) / len(rows))
                (loss / self.bins.size).backward()  # nats per dimension, so that one grad_clip suits every event
                total += loss.detach()
                for name, tensor in self._state().items():
                    after[name] += tensor
                self._set_state(before)
        except PredictorError as error:  # the others have to know
            failure = PredictorError(f"at step {self.step}: {error}{self._kept()}")
            failure.__cause__ = error
        finally:
            self._set_state(before)  # until the step is done
        if self.group.any(failure is not None, self.device):
            raise failure or RuntimeError(f"another process failed at step {self.step}.{self._kept()}")
        self._sum_gradients(total)
        self.group.sum_(list(after.values()))
        return total, {name: _like(after[name] / self.settings.accumulate, before[name]) for name in before}

    def _state(self) -> dict[str, Tensor]:
        """A copy of the objective's state; empty if it has none."""
        if not isinstance(self.objective, nn.Module):
            return {}
        return {name: tensor.to(self.device, copy=True) for name, tensor in self.objective.state_dict().items()}

    def _set_state(self, state: Mapping[str, Tensor]) -> None:
        if state:
            cast(nn.Module, self.objective).load_state_dict(state)

    def _sum_gradients(self, total: Tensor) -> None:
        """Over the processes; parameters that no process used have none."""
        if self.group.size == 1:
            return
        used = torch.tensor([float(p.grad is not None) for p in self.parameters], device=self.device)
        self.group.sum_([used, total])
        theirs = [p for p, count in zip(self.parameters, used.tolist(), strict=True) if count]
        for p in theirs:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self.group.sum_([cast(Tensor, p.grad) for p in theirs])

    def _loss(self, part: int, rows: Tensor) -> Tensor:
        """Mean over the rows of a part, with randomness that is the part's own."""
        own, others = derive_seeds(self.settings.seed, self.step, *((part, _PART) if part else ()), count=2)
        generator = torch.Generator(self.device).manual_seed(own)
        torch.manual_seed(others)  # dropout, and whatever else the networks draw
        x, given = self.data.batch(rows, generator)
        cond = self._dropped(given, len(x), generator)
        minimised: Objective = self.objective or objectives.loss
        with networks_in(PRECISIONS[self.settings.precision]):
            return minimised(self.model, x, generator=generator, **cond).mean()

    def _dropped(self, cond: Mapping[str, Any], rows: int, generator: torch.Generator) -> Mapping[str, Any]:
        """The conditioning of a batch, null in some rows, the same ones for every name."""
        if self.settings.cond_dropout == 0.0:  # and nothing is drawn
            return cond
        drop = torch.rand(rows, generator=generator, device=generator.device) < self.settings.cond_dropout
        null = {
            name: nulled(name, cond[name], value)
            for name, value in null_of(self.model.predictor).items()
            if name in cond
        }
        return {**cond} | {
            name: torch.where(drop.to(value.device).reshape(-1, *(1,) * (value.ndim - 1)), value, cond[name])
            for name, value in null.items()
        }

    def _validate_finite(self, name: str, value: Tensor) -> None:
        if not bool(torch.isfinite(value)):
            raise RuntimeError(
                f"the {name} became {value.item()} at step {self.step}; lower lr (now {self.settings.lr:g}), set "
                f"grad_clip, or check the networks for overflow.{self._kept()}"
            )

    def _kept(self) -> str:
        return f" The last checkpoint in {self.folder.path} is intact." if self.folder.is_real else ""

    def _rows(self) -> Tensor:
        """Rows of this step's batch."""
        size = min(self.settings.batch_size, self.data.rows)
        epoch, index = divmod(self.step, self.data.rows // size)
        if self._permutation[0] != epoch:
            generator = torch.Generator().manual_seed(derive_seeds(self.settings.seed, epoch, _EPOCH)[0])
            self._permutation = (epoch, torch.randperm(self.data.rows, generator=generator))
        return self._permutation[1][index * size : (index + 1) * size]

    def _report(self) -> None:
        """Log, validate and save where this step is due."""
        last = self.step == self.settings.steps
        if self.step % self.log_every == 0 or last:
            self._log()
        if self.validation is not None and (self.step % self.validate_every == 0 or last):
            self._validate(self.validation)
        if self.folder.is_real and self.step % self.checkpoint_every == 0 and not last:
            self._checkpoint()

    def _log(self) -> None:
        loss, norm, count = self.pending
        row: Row = {"step": self.step, "loss": loss / count}
        bits = self._bits(loss / count)
        if bits is not None:
            row["bits_per_dim"] = bits
        lr = self.settings.lr_at(self.step - 1)
        self.folder.add(row | {"lr": lr, "grad_norm": norm / count, "seconds": self.seconds})
        self.pending = (0.0, 0.0, 0)

    def _bits(self, loss: float) -> float | None:
        bound = self.objective is None or isinstance(self.objective, objectives.Bound)
        return self.bins.bits_of_loss(loss) if bound else None

    def _validate(self, source: Source) -> None:
        """The ELBO of the averaged weights, every time with the same noise."""
        model = self._averaged()
        bound = torch.zeros(source.rows, dtype=torch.float64, device=self.device)
        with torch.no_grad(), model.evaluating():
            for place, rows in self.group.share(torch.arange(source.rows).split(self.settings.batch_size)):
                (seed,) = derive_seeds(self.settings.seed, place, _VALIDATION)
                generator = torch.Generator(self.device).manual_seed(seed)
                x, cond = source.batch(rows, generator)
                bound[rows.to(self.device)] = self.bins.elbo(model, x, generator, cond).double()
        self.group.sum_([bound])
        mean = bound.mean().item()
        stderr = bound.std().item() / math.sqrt(len(bound)) if len(bound) > 1 else None
        row: Row = {"step": self.step, "validation_elbo": mean, "validation_stderr": stderr}
        if self.bins.quantisation is not None:
            row["validation_bits_per_dim"] = self.bins.bits(-mean)
        self.folder.add(row | {"seconds": self.seconds})
        if self.settings.patience is not None:
            self._compare(mean)

    def _compare(self, bound: float) -> None:
        """Keep the weights if they are the best so far."""
        self.waited += 1
        if bound > self.best:
            self.best, self.waited = bound, 0
            self.best_weights = {name: tensor.clone() for name, tensor in self._averaged().state_dict().items()}

    def _averaged(self) -> NDM:
        return self.model if self.average is None else cast(NDM, self.average.module)

    def _identity(self) -> Row:
        """All that determines the weights of every step."""
        bins = self.bins.quantisation
        return asdict(self.settings) | {
            "objective": None if self.objective is None else _described(self.objective),
            "data": self.data.fingerprint(),
            "quantisation": None if bins is None else [bins.levels, *bins.range],
            "dequantisation": self.bins.dequantisation,
            "model": describe(self.model),
            "tensors": {name: [str(t.dtype), list(t.shape)] for name, t in self.model.state_dict().items()},
        }

    def _checkpoint(self) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self._averaged().state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best_weights.items()}
        if isinstance(self.objective, nn.Module):
            tensors |= {f"objective.{name}": tensor for name, tensor in self.objective.state_dict().items()}
        description = {
            "versions": versions(),
            "step": self.step,
            "seconds": self.seconds,
            "pending": self.pending,
            "settings": self.identity,
        }
        if self.best_weights:
            description |= {"best": self.best, "waited": self.waited}
        content = {"kind": "training"} | description
        self.group.of_main(lambda: write(self.folder.checkpoint, tensors, content))

    def _restore(self) -> None:
        file = self.folder.checkpoint
        saved = self.group.of_main(lambda: read(file, "training") if file.exists() else None)
        if saved is None:
            self.folder.rewind(0)
            return
        description, tensors = saved
        self._validate_settings(description.get("settings"))
        try:
            progress = _Progress.from_json(description, self.settings.steps)
            compare_tensors(self._expected(tensors), tensors)
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder.checkpoint}: not the state of this training ({error}); move it away to start again."
            ) from error
        self.folder.rewind(progress.step)  # here, for a damaged log leaves the model as it was
        self.model.load_state_dict(_under("model.", tensors))
        if self.average is not None:
            self._averaged().load_state_dict(_under("average.", tensors))
            self.average.n_averaged.fill_(progress.step)
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimizer.", tensors).items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        if isinstance(self.objective, nn.Module):
            self.objective.load_state_dict(_under("objective.", tensors))
        self.step, self.seconds, self.pending = progress.step, progress.seconds, progress.pending
        self.best_weights = _under("best.", tensors)
        self.best, self.waited = progress.best, progress.waited

    def _expected(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a checkpoint of this training holds; of the optimiser, for the parameters that had a gradient."""
        weights = self.model.state_dict()
        expected = {f"model.{name}": tensor for name, tensor in weights.items()}
        if self.average is not None:
            expected |= {f"average.{name}": tensor for name, tensor in weights.items()}
        if any(name.startswith("best.") for name in tensors):
            expected |= {f"best.{name}": tensor for name, tensor in weights.items()}
        if isinstance(self.objective, nn.Module):
            expected |= {f"objective.{name}": tensor for name, tensor in self.objective.state_dict().items()}
        moved = {name.split(".")[0] for name in _under("optimizer.", tensors)}
        ordered = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for index, parameter in enumerate(ordered):
            if str(index) in moved:
                state = {"step": torch.empty(()), "exp_avg": parameter, "exp_avg_sq": parameter}
                expected |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
        return expected

    def _validate_settings(self, saved: Any) -> None:
        if not isinstance(saved, dict):
            raise CheckpointError(
                f"{self.folder.checkpoint}: the settings are a {type(saved).__name__}, not an object."
            )
        self.folder.compare(_LATER | saved, self.identity)


def _like(mean: Tensor, tensor: Tensor) -> Tensor:
    """A mean in the dtype of what it is the mean of."""
    return (mean if tensor.is_floating_point() else mean.round()).to(tensor.dtype)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _optimizer(parameters: list[torch.nn.Parameter], settings: _Settings) -> torch.optim.Optimizer:
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
