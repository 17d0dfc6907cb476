"""The loop of a training: steps with logs, validations and checkpoints, until it is finished or interrupted."""

import json
import math
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ndm_ct import objectives
from ndm_ct._core.parallel import Group
from ndm_ct._core.seeds import derive_seeds
from ndm_ct._core.signals import stop_signals
from ndm_ct.checking import warn_of_unreached
from ndm_ct.data.sources import Bins, Source
from ndm_ct.storage.models import describe, own_classes, save
from ndm_ct.storage.tensors import hash_values
from ndm_ct.training.averages import weights_of
from ndm_ct.training.callbacks import Hooks
from ndm_ct.training.settings import Intervals
from ndm_ct.training.state import Folder, Objective, Row, State
from ndm_ct.training.step import _VALIDATION, Gradient, clip_gradients

__all__ = ["FitResult", "Training"]


@dataclass(frozen=True)
class FitResult:
    """The result of :func:`ndm_ct.fit`.

    Args:
        step: optimiser steps completed, earlier runs of the same ``run_dir`` included.
        finished: whether all steps were done or patience ended; False if interrupted or out of time.
        history: rows with step, loss (nats per event, mean since the row before), lr, grad_norm, seconds, and
            bits_per_dim for integer data.
        validation: rows with step, validation_elbo (nats per event), validation_stderr, seconds, and
            validation_bits_per_dim for integer data.
        raw: the weights of the last step, by name, for ``model.load_state_dict``.
        averages: the averaged weights of the last step, for each decay of ``ema``.
    """

    step: int
    finished: bool
    history: tuple[Row, ...]
    validation: tuple[Row, ...]
    raw: dict[str, Tensor] = field(repr=False, compare=False, default_factory=dict)
    averages: dict[float, dict[str, Tensor]] = field(repr=False, compare=False, default_factory=dict)


class Training:
    """A training in a folder, continued from the checkpoint there.

    Args:
        state: weights, optimiser and counters.
        data: rows to train on.
        validation: held-out rows.
        folder: a locked folder, or one without a path.
        intervals: steps between reports, and the time limit.
        hooks: what is called on the way.
        weights: of the rows, with mean 1; None weighs them equally.
    """

    def __init__(
        self, *, state: State, data: Source, validation: Source | None, folder: Folder, intervals: Intervals,
        hooks: Hooks, weights: Tensor | None,
    ) -> None:  # fmt: skip
        self.hooks, self.weights, self.interrupt = hooks, weights, _Interrupt()
        self.state, self.settings, self.group = state, state.settings, state.group
        self.validation, self.folder, self.intervals = validation, folder, intervals
        self.bins: Bins = data.bins
        self.remark = f" The last checkpoint in {folder.path} is intact." if folder.is_real else ""
        self.gradient = Gradient(state, data, self.remark, weights)
        self.updating = False
        self.identity: Row = {}
        if folder.is_real:
            self.identity = json.loads(json.dumps(self._identity(data)))
            state.restore(folder, self.identity)
        self.written = state.step  # the step of the checkpoint that is there
        self.view = _View(self)

    def run(self, progress: bool) -> FitResult:
        """Take steps; on return the model has the averaged or the best weights.

        Args:
            progress: whether to show a progress bar.
        """
        state, model = self.state, self.state.model
        modes = [(module, module.training) for module in model.modules()]
        devices = [state.device] if state.device.type == "cuda" else []
        model.train()
        try:
            with torch.random.fork_rng(devices):
                self._loop(progress and self.group.is_main)
        except KeyboardInterrupt:
            if self.updating:  # the weights are between two steps, so the last checkpoint is kept
                raise
        finally:
            for module, training in modes:
                module.training = training
        if self.folder.is_real:
            self._checkpoint()
        raw = {name: tensor.detach().clone() for name, tensor in weights_of(model).items()}
        state.finish()
        if self.folder.is_real and state.is_finished:
            self._save()
        rows = self.folder.rows
        history, validation = (tuple(row for row in rows if ("loss" in row) is losses) for losses in (True, False))
        averages = dict(zip(state.averages.decays, state.averages.weights, strict=True))
        result = FitResult(
            step=state.step, finished=state.is_finished, history=history, validation=validation, raw=raw,
            averages=averages,
        )  # fmt: skip
        self.hooks.call("end", self.view, result)
        return result

    def _checkpoint(self) -> None:
        """Write a checkpoint; earlier ones are kept if that is wanted."""
        if self.written and self.written != self.state.step:
            self.group.of_main(lambda: self.folder.keep_earlier(self.written, self.intervals.keep_checkpoints))
        self.state.write(self.folder, self.identity)
        self.written = self.state.step
        self.hooks.call("checkpoint", self.view, self.folder.checkpoint)

    def _save(self) -> None:
        """Write the model; all processes have to hand over their parts of a sharded one."""
        model, path = self.state.model, self.folder.path / "model.safetensors"
        if self.state.is_sharded:
            save(model, path)
        else:
            self.group.of_main(lambda: save(model, path))

    def _loop(self, progress: bool) -> None:
        state, start, before, interrupt = self.state, time.monotonic(), self.state.seconds, self.interrupt
        limit = math.inf if self.intervals.time_limit is None else self.intervals.time_limit
        total = self.settings.steps
        bar = tqdm(total=total, initial=state.step, disable=not progress, unit="step", dynamic_ncols=True)
        with bar, interrupt.caught():
            self.hooks.call("start", self.view)
            while not state.is_finished:
                late = time.monotonic() - start >= limit
                if self.group.any(interrupt.requested or late, state.device):
                    return
                loss, norm = self._advance()
                state.seconds = before + time.monotonic() - start
                bits = self._bits(loss)
                bar.set_postfix({"loss": loss} if bits is None else {"bits/dim": bits}, refresh=False)
                bar.update()
                if self.hooks.by_event["step"]:
                    self.hooks.call("step", self.view, self._row(loss, norm))
                self._report()

    def _advance(self) -> tuple[float, float]:
        """Take a step; returns its loss and the norm of its gradient."""
        state, clip = self.state, self.settings.grad_clip
        state.optimizer.zero_grad()
        loss, objective = self.gradient.compute()
        if state.model.checks and state.step == 0:
            warn_of_unreached(name for name, p in state.model.named_parameters() if p.requires_grad and p.grad is None)
        self._validate_finite("loss", loss)
        norm = clip_gradients(state.parameters, math.inf if clip is None else clip)
        self._validate_finite("gradient norm", norm)
        self.updating = True
        state.set_objective_state(objective)
        state.update(loss.item(), norm.item())
        self.updating = False
        return loss.item(), norm.item()

    def _validate_finite(self, name: str, value: Tensor) -> None:
        if not bool(torch.isfinite(value)):
            raise RuntimeError(
                f"the {name} became {value.item()} at step {self.state.step}; lower lr (now {self.settings.lr:g}), set "
                f"grad_clip, or check the networks for overflow.{self.remark}"
            )

    def _report(self) -> None:
        """Log, validate and save where this step is due."""
        step, intervals = self.state.step, self.intervals
        last = step == self.settings.steps
        if step % intervals.log_every == 0 or last:
            self._log()
        if self.validation is not None and (step % intervals.validate_every == 0 or last):
            self._validate(self.validation)
        if self.folder.is_real and step % intervals.checkpoint_every == 0 and not last:
            self._checkpoint()

    def _log(self) -> None:
        state = self.state
        loss, norm, count = state.pending
        self.folder.add(self._row(loss / count, norm / count))
        state.pending = (0.0, 0.0, 0)

    def _row(self, loss: float, norm: float) -> Row:
        state, bits = self.state, self._bits(loss)
        row: Row = {"step": state.step, "loss": loss} | ({} if bits is None else {"bits_per_dim": bits})
        return row | {"lr": state.lr, "grad_norm": norm, "seconds": state.seconds}

    def _bits(self, loss: float) -> float | None:
        objective = self.state.objective
        bound = objective is None or isinstance(objective, objectives.Bound)
        return self.bins.bits_of_loss(loss) if bound else None

    def _validate(self, source: Source) -> None:
        """Log the ELBO of the averaged weights. The noise is the same in every validation."""
        model, device = self.state.model, self.state.device
        bound = torch.zeros(source.rows, dtype=torch.float64, device=device)
        batches = torch.arange(source.rows).split(self.settings.batch_size)
        # Of a sharded model every process has to call the networks equally often, so each takes every batch.
        group = Group(alone=True) if self.state.is_sharded else self.group
        with torch.no_grad(), self.state.averages.in_use(), model.evaluating():
            for place, rows in group.share(batches):
                (seed,) = derive_seeds(self.settings.seed, place, _VALIDATION)
                generator = torch.Generator(device).manual_seed(seed)
                x, cond = source.batch(rows, generator)
                bound[rows.to(device)] = self.bins.elbo(model, x, generator, cond).double()
        group.sum_([bound])
        mean = bound.mean().item()
        stderr = bound.std().item() / math.sqrt(len(bound)) if len(bound) > 1 else None
        row: Row = {"step": self.state.step, "validation_elbo": mean, "validation_stderr": stderr}
        if self.bins.quantisation is not None:
            row["validation_bits_per_dim"] = self.bins.bits(-mean)
        row["seconds"] = self.state.seconds
        self.folder.add(row)
        self.hooks.call("validation", self.view, dict(row))
        if self.settings.patience is not None:
            self.state.keep_best(mean)

    def _identity(self, data: Source) -> Row:
        """Everything that determines the weights of every step."""
        bins, objective, model = self.bins.quantisation, self.state.objective, self.state.model
        return (
            asdict(self.settings)
            | self.state.made
            | {
                "sample_weight": None if self.weights is None else hash_values([self.weights]),
                "objective": None if objective is None else _described(objective),
                "data": data.fingerprint(),
                "quantisation": None if bins is None else [bins.levels, *bins.edges],
                "dequantisation": self.bins.dequantisation,
                "model": describe(model),
                "classes": own_classes(model),
                "tensors": {name: [str(t.dtype), list(t.shape)] for name, t in model.state_dict().items()},
            }
        )


class _View:
    """A training as callbacks see it (``Running`` of the callbacks)."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self.model, self.steps = training.state.model, training.settings.steps
        self.options = asdict(training.settings)
        self.path = training.folder.path if training.folder.is_real else None
        self.is_main = training.group.is_main

    @property
    def step(self) -> int:
        return self._training.state.step

    def averaged(self) -> AbstractContextManager[None]:
        return self._training.state.averages.in_use()

    def stop(self) -> None:
        self._training.interrupt.requested = True


def _described(objective: Objective) -> str:
    """Text by which a checkpoint recognises its objective."""
    if hasattr(objective, "describe"):
        return str(objective.describe())
    return str(getattr(objective, "__qualname__", type(objective).__qualname__))


class _Interrupt:
    """Turns the first Ctrl-C, SIGTERM or SIGUSR1 into a request to stop after the current step."""

    def __init__(self) -> None:
        self.requested = False

    def caught(self) -> AbstractContextManager[None]:
        return stop_signals(self._request)

    def _request(self, *_: Any) -> None:
        if self.requested:  # a second signal stops at once
            raise KeyboardInterrupt
        self.requested = True
