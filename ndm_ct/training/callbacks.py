"""Callbacks of a training: what is called at its start, steps, validations, checkpoints and end.

A callback is any object with some of the methods of :class:`Callback`. Rows are dicts as in ``FitResult.history``. All
processes of a distributed training call their callbacks; those here write in the first one. Callbacks change no weight
of the training: its noise does not depend on the global generators.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ndm_ct._core.checks import validate_count
from ndm_ct.model import NDM
from ndm_ct.samplers.sample import sample
from ndm_ct.storage.atomic import PathLike

__all__ = ["CSV", "Callback", "Running", "Samples", "TensorBoard", "WandB"]

Row = dict[str, Any]

EVENTS = ("start", "step", "validation", "checkpoint", "end")


class Running(Protocol):
    """A training as callbacks see it."""

    model: NDM
    """The model, with the weights of the present step."""
    steps: int
    """Steps of the whole training."""
    options: Mapping[str, Any]
    """The options that determine the weights."""
    path: Path | None
    """The folder of the training."""
    is_main: bool
    """Whether this is the process that writes."""

    @property
    def step(self) -> int:
        """Steps done."""

    def averaged(self) -> AbstractContextManager[None]:
        """A context in which the model has its averaged weights."""

    def stop(self) -> None:
        """Stop after this step, with a checkpoint, as Ctrl-C does."""


class Callback:
    """The protocol of callbacks; a subclass overrides what it needs.

    Example:
        >>> import torch, ndm_ct
        >>> from ndm_ct.training import Callback
        >>> class UntilGood(Callback):
        ...     def step(self, training, row):
        ...         if row["loss"] < 100.0:
        ...             training.stop()
        >>> model = ndm_ct.NDM(ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2, width=8)), event_shape=(2,))
        >>> ndm_ct.fit(model, torch.randn(64, 2), steps=50, callbacks=[UntilGood()], progress=False).finished
        False
    """

    def start(self, training: Running, /) -> None:
        """Before the first step of this call; ``training.step`` is above 0 if it continues."""

    def step(self, training: Running, row: Row, /) -> None:
        """After every step.

        Args:
            training: the training.
            row: step, loss (nats per event), lr, grad_norm, seconds, and bits_per_dim for integer data.
        """

    def validation(self, training: Running, row: Row, /) -> None:
        """After every validation.

        Args:
            training: the training.
            row: as in ``FitResult.validation``.
        """

    def checkpoint(self, training: Running, path: Path, /) -> None:
        """After a checkpoint was written.

        Args:
            training: the training.
            path: its file.
        """

    def end(self, training: Running, result: Any, /) -> None:
        """After the last step of this call, also if it was stopped; not after an error.

        Args:
            training: the training.
            result: the ``FitResult``.
        """


class Hooks:
    """The callbacks of a training, by event.

    Args:
        callbacks: in the order in which they are called.

    Raises:
        TypeError: one has none of the methods.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self.by_event: dict[str, list[Callable[..., Any]]] = {event: [] for event in EVENTS}
        for place, callback in enumerate(callbacks):
            methods = {event: getattr(callback, event, None) for event in EVENTS}
            if isinstance(callback, type) or not any(map(callable, methods.values())):
                raise TypeError(
                    f"callbacks[{place}] is {callback!r}, expected an object with methods among {', '.join(EVENTS)}; "
                    "see ndm_ct.training.Callback."
                )
            for event, method in methods.items():
                idle = isinstance(callback, Callback) and getattr(type(callback), event) is getattr(Callback, event)
                if callable(method) and not idle:
                    self.by_event[event].append(method)

    def call(self, event: str, *arguments: Any) -> None:
        """Call all callbacks of an event."""
        for method in self.by_event[event]:
            method(*arguments)


class CSV(Callback):
    """A table with a line per step and per validation; a training that continues drops what it does again.

    Args:
        path: the file.
        every: steps between lines.
    """

    columns = (
        "step", "loss", "bits_per_dim", "lr", "grad_norm", "seconds", "validation_elbo", "validation_stderr",
        "validation_bits_per_dim",
    )  # fmt: skip

    def __init__(self, path: PathLike, *, every: int = 1) -> None:
        self.path, self.every = Path(path), validate_count("every", every)

    def start(self, training: Running, /) -> None:
        if not training.is_main:
            return
        kept: list[Row] = []
        if training.step and self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= training.step]
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(kept)

    def step(self, training: Running, row: Row, /) -> None:
        if row["step"] % self.every == 0:
            self._add(training, row)

    def validation(self, training: Running, row: Row, /) -> None:
        self._add(training, row)

    def _add(self, training: Running, row: Row) -> None:
        if training.is_main:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerow(row)


class _Scalars(Callback):
    """Hands the numbers of steps and validations to :meth:`log`, by names that both have in common."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Write numbers of a step; called in every process."""
        raise NotImplementedError

    def step(self, training: Running, row: Row, /) -> None:
        self._add("training", row)

    def validation(self, training: Running, row: Row, /) -> None:
        self._add("validation", row)

    def _add(self, kind: str, row: Row) -> None:
        numbers = {name: value for name, value in row.items() if name != "step" and value is not None}
        self.log({f"{kind}/{name.removeprefix('validation_')}": each for name, each in numbers.items()}, row["step"])


class TensorBoard(_Scalars):
    """Scalars for TensorBoard: ``tensorboard --logdir FOLDER``.

    Args:
        folder: where event files are written; None is ``tensorboard`` in the folder of the training.

    Raises:
        ImportError: at the start, if the package is missing.
    """

    def __init__(self, folder: PathLike | None = None) -> None:
        self.folder = folder
        self.writer: Any = None

    def start(self, training: Running, /) -> None:
        if not training.is_main:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError('TensorBoard needs the package tensorboard: pip install "ndm-ct[logging]".') from error
        folder = _folder(self.folder, training, "tensorboard")
        self.writer = SummaryWriter(str(folder), purge_step=training.step + 1)

    def end(self, training: Running, result: Any, /) -> None:
        if self.writer is not None:
            self.writer.close()

    def log(self, values: dict[str, float], step: int) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)


class WandB(_Scalars):
    """Scalars for Weights & Biases, and the options of the training as the run's configuration.

    Args:
        options: of ``wandb.init``, such as ``project="digits"`` or ``mode="offline"``.

    Raises:
        ImportError: at the start, if the package is missing.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.run: Any = None

    def start(self, training: Running, /) -> None:
        if not training.is_main:
            return
        try:
            import wandb
        except ImportError as error:
            raise ImportError('WandB needs the package wandb: pip install "ndm-ct[logging]".') from error
        self.run = wandb.init(**{"config": dict(training.options)} | self.options)

    def end(self, training: Running, result: Any, /) -> None:
        if self.run is not None:
            self.run.finish()

    def log(self, values: dict[str, float], step: int) -> None:
        if self.run is not None:
            self.run.log(values, step=step)


class Samples(Callback):
    """Draws samples of the averaged weights every n steps, always from the same noise.

    Args:
        every: steps between draws.
        n: number of samples.
        to: called as ``to(step, x)`` with samples ``(n, *data_shape)``; None writes ``samples-STEP.npy`` into
            ``folder``.
        folder: None is ``samples`` in the folder of the training.
        seed: of the noise.
        options: of :func:`ndm_ct.sample`, such as ``method="unipc", steps=20`` or the conditioning.
    """

    def __init__(
        self, every: int, n: int, *, to: Callable[[int, Tensor], Any] | None = None, folder: PathLike | None = None,
        seed: int = 0, **options: Any,
    ) -> None:  # fmt: skip
        self.every, self.n, self.to = validate_count("every", every), validate_count("n", n), to
        self.folder, self.seed, self.options = folder, seed, options

    def start(self, training: Running, /) -> None:
        if self.to is None:
            _folder(self.folder, training, "samples")  # a missing place is told before the work

    def step(self, training: Running, row: Row, /) -> None:
        step = row["step"]
        if step % self.every and step != training.steps:
            return
        with torch.no_grad(), training.averaged(), training.model.evaluating():
            x = sample(training.model, self.n, generator=self.seed, **self.options)
        if not training.is_main:
            return
        if self.to is not None:
            self.to(step, x)
        else:
            np.save(_folder(self.folder, training, "samples") / f"samples-{step}.npy", x.numpy(force=True))


def _folder(given: PathLike | None, training: Running, name: str) -> Path:
    """A folder of a callback, made if missing."""
    if given is None and training.path is None:
        raise ValueError(f"folder is missing, and the training has none that could hold {name!r}; pass folder=.")
    folder = Path(given) if given is not None else Path(training.path or "") / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
