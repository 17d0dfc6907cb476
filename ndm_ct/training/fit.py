r"""Training: minimise minus the ELBO, average the weights, and continue after being killed at any moment.

Step k (from 0) of K has the learning rate

.. math::
    \mathrm{lr}_k = \mathrm{lr} \cdot \min\Bigl(1, \frac{k + 1}{W}\Bigr)
    \cdot \Bigl(f + (1 - f)\, \tfrac12 \bigl(1 + \cos \pi p_k\bigr)\Bigr), \qquad
    p_k = \max\Bigl(0, \frac{k - W}{K - W}\Bigr)

with W steps of warm-up and final fraction f. :mod:`ndm_ct.training.averages` has the formula of averaged weights.

All randomness is a function of (seed, k): step k draws noise and times from a generator of its own, and epoch e has
its own permutation. So a training continues from weights, optimiser state and k alone, and gives the same bits as one
that was never interrupted.

With ``cond_dropout`` p, step k also draws a Bernoulli(p) for every row. Where it is one, the predictor's null values
replace the row's conditioning c. The loss is then

.. math::
    (1 - p)\, E\,L(\theta; x, c) + p\, E\,L(\theta; x, \varnothing) .

One network learns the conditional and the unconditional model, which :func:`ndm_ct.guided` combines.

References:
    Loshchilov and Hutter, SGDR (the cosine decay), https://arxiv.org/abs/1608.03983
    Loshchilov and Hutter, Decoupled Weight Decay Regularization, https://arxiv.org/abs/1711.05101
    Ho and Salimans, Classifier-Free Diffusion Guidance (algorithm 1), https://arxiv.org/abs/2207.12598
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from ndm_ct import objectives
from ndm_ct._core.checks import choose, validate_count
from ndm_ct._core.parallel import Group
from ndm_ct._core.seeds import make_generator
from ndm_ct.checking import verify
from ndm_ct.columns import repeated_values
from ndm_ct.data.containers import CondFrom
from ndm_ct.data.sources import Bins, Source
from ndm_ct.model import NDM
from ndm_ct.quantisation import DEQUANTISATIONS, Quantisation
from ndm_ct.storage.atomic import PathLike
from ndm_ct.training.callbacks import Hooks
from ndm_ct.training.loop import FitResult, Training
from ndm_ct.training.rates import OptimizerFactory, SchedulerFactory
from ndm_ct.training.settings import OWN, Intervals, Settings, default_warmup
from ndm_ct.training.state import Folder, Objective, Row, State
from ndm_ct.training.step import validate_weights

__all__ = ["FitResult", "fit"]


def fit(
    model: NDM,
    data: Any,
    *,
    steps: int,
    batch_size: int = 128,
    sample_weight: Any = None,
    lr: float | None = None,
    optimizer: str | OptimizerFactory = "adamw",
    weight_decay: float | None = None,
    grad_clip: float | None = 1.0,
    scheduler: SchedulerFactory | None = None,
    warmup: int | None = None,
    lr_final: float | None = None,
    ema: float | Sequence[float] = 0.999,
    cond: Mapping[str, Any] | None = None,
    cond_from: CondFrom = None,
    cond_dropout: float = 0.0,
    quantisation: int | Quantisation | None = None,
    dequantisation: str = "uniform",
    validation: Any = None,
    validation_cond: Mapping[str, Any] | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    run_dir: PathLike | None = None,
    checkpoint_every: int | None = None,
    keep_checkpoints: int | None = None,
    log_every: int = 100,
    callbacks: Sequence[Any] = (),
    resume: bool = True,
    seed: int = 0,
    accumulate: int | None = None,
    precision: str = "full",
    progress: bool = True,
    time_limit: float | None = None,
    objective: Objective | None = None,
) -> FitResult:
    """Train a model in place. Afterwards it holds the averaged weights (``ema > 0``), in the mode it had before.

    Residuals that ``discrete.estimate_residuals`` has measured before are those of other weights; measure them again.

    With ``run_dir`` the folder receives ``log.jsonl``, ``checkpoint.safetensors`` (weights, averaged weights and
    optimiser state) and at the end ``model.safetensors`` for :func:`ndm_ct.load`. The same call continues a training
    that was killed; with more ``steps`` it continues one that has finished. Ctrl-C, SIGTERM and SIGUSR1 finish the
    step, write a checkpoint and return with ``finished=False``.

    Networks may be compiled in place before: ``model.predictor.compile()``, ``model.transform.features.compile()``.
    The weights keep their names in files.

    Args:
        model: the model; on return trained, also if interrupted.
        data: the rows: a tensor or an array ``(N, *E)``; a DataFrame of pandas or polars; a map-style dataset, of
            torch, Hugging Face or your own, with ``__len__`` and ``__getitem__``; or an ``IterableDataset`` or a
            ``DataLoader``. Items are rows x ``(*E)``, tuples (x, value, ...) or dicts. Values are real, or integers
            together with ``quantisation``. Float arrays take the model's dtype. An iterable is read in its own order,
            and again from the start when it ends; batches of a ``DataLoader`` are cut into rows, and ``batch_size``
            counts. Every process of a distributed job passes all rows.
        steps: optimiser steps in total. If ``run_dir`` holds a training that differs only in having fewer steps, even
            a finished one, it goes on to this number: with its weights, averages, optimiser state and order of rows,
            and from there on with the learning rate of a training of this many steps.
        batch_size: rows per step, drawn without replacement within an epoch. An incomplete last batch is left out.
        sample_weight: weights of the rows, shape ``(N,)``, at least 0. The loss of a row is multiplied by its weight
            over the mean weight. Validation weighs rows equally.
        lr: peak learning rate; None is 1e-3.
        optimizer: "adamw" or "adam", or a function that makes a ``torch.optim.Optimizer`` of the parameters, such as
            ``lambda p: torch.optim.SGD(p, lr=0.1)``. It then sets its own learning rates, which warm-up and decay
            multiply.
        weight_decay: decay of the weights with two or more axes; None is 0.01. Biases, scales and schedules have none.
        grad_clip: largest norm of the gradient of the loss in nats per dimension. Larger gradients are scaled down to
            it. None does not clip.
        scheduler: a function that makes a scheduler of ``torch.optim.lr_scheduler`` of the optimiser, in place of
            warm-up and cosine decay. It moves on after every step, and has to depend on the number of steps alone.
        warmup: steps of linear warm-up; None is a tenth of ``steps``, at most 1000.
        lr_final: fraction of ``lr`` at the end of the cosine decay; None is 0.01.
        ema: decay of the averaged weights. Closer to 1 averages over more steps; 0 averages nothing.
        cond: conditioning by name, each with one row per row of ``data``.
        cond_from: which parts of an item, or which columns of a DataFrame, are conditioning: a name or several, which
            are keys or, for tuples, the parts after x in this order; a mapping of names to keys or places; or a
            function of an item that returns x and a dict. ``()`` takes x alone. None takes the second part of a pair
            if the model takes one condition, and keys by the names that the model takes; what is not clear raises.
        cond_dropout: probability that null values replace the conditioning of a row. The predictor gives these values
            in its attribute ``null``; networks of ``ndm_ct.nn`` with ``classes`` have it. 0.1 to 0.2 is usual for a
            model to be used with :func:`ndm_ct.guided`. Validation keeps all conditioning.
        quantisation: for integer data, the number of levels, whose bins fill (-1, 1), or a
            :class:`~ndm_ct.quantisation.Quantisation` that says where they lie.
        dequantisation: "uniform" trains on levels with noise uniform in their bins. "process" trains on the bin
            centres; the process' own noise at t_min fills the bins. Evaluate with the same word.
        validation: held-out data of the same kind. An iterable is read to its end.
        validation_cond: conditioning of the held-out data.
        validate_every: steps between validations of the averaged weights; None is a tenth of ``steps``.
        patience: number of validations without improvement after which training stops. The weights of the best
            validation are kept. None trains to the end and keeps the last weights.
        run_dir: folder of the training, made if missing. None writes nothing.
        checkpoint_every: steps between checkpoints; None is 1000.
        keep_checkpoints: number of checkpoints to keep; None is 1. The earlier ones are
            ``checkpoint-STEP.safetensors``; copied over ``checkpoint.safetensors``, one takes the training back.
        log_every: steps between rows of the history.
        callbacks: objects that are called at the start, steps, validations, checkpoints and end, as
            ``ndm_ct.training.Callback``. Beside it are ``CSV``, ``TensorBoard``, ``WandB`` and ``Samples``.
        resume: whether ``run_dir`` may hold a checkpoint to continue from. False raises a ValueError if it does.
        seed: of everything random, dropout included. The global generator of torch is left as it was.
        accumulate: number K of parts into which a batch is divided. Their gradients are added up. More parts need less
            memory. With several processes each takes K / processes of them. Up to rounding, the result depends on K
            and not on the number of processes. None is the number of processes.
        precision: "full", or "bf16-mixed": the predictor and the networks of ``Neural`` and ``Separable`` run under
            ``torch.autocast`` in bfloat16. Their outputs, everything computed from them, the loss, weights, averages
            and optimiser state stay in float32. So do flows, encoders, decoders and validation.
        progress: whether to show a progress bar.
        time_limit: seconds after which to stop with a checkpoint, as if interrupted.
        objective: the loss, called as ``objective(model, x, generator=generator, **cond)`` for one value per row. None
            is minus the ELBO, :func:`ndm_ct.loss`. :class:`~ndm_ct.objectives.Bound` is the same with importance
            sampling of the times, and :mod:`ndm_ct.presets` has published regressions. Validation always uses the
            ELBO. If the objective is a module with buffers, they are averaged over the parts of each step and saved in
            checkpoints.

    Returns:
        A :class:`FitResult`.

    Raises:
        TypeError: the data are integers and ``quantisation`` is None, or the data have the wrong type.
        ValueError: an argument is out of range or has no effect; the data do not fit the model; ``run_dir`` holds a
            checkpoint of other settings, which are named; or processes got different rows or arguments.
        CheckpointError: the checkpoint in ``run_dir`` is damaged.
        BlockingIOError: another process works in ``run_dir``.
        RuntimeError: loss, gradient or prediction became NaN or infinite. The last checkpoint is as it was.
    """
    cond, group = {} if cond is None else cond, Group()
    _refuse_ineffective(locals())
    steps = validate_count("steps", steps)
    hooks, rates = Hooks(callbacks), _rates(locals(), steps)
    settings = Settings(
        steps=steps, batch_size=batch_size, grad_clip=grad_clip, seed=seed, cond_dropout=cond_dropout,
        ema=tuple(ema) if isinstance(ema, Sequence) else ema, patience=patience, precision=precision,
        accumulate=group.size if accumulate is None else accumulate, **rates,
    )  # fmt: skip
    intervals = Intervals(
        validate_every=max(1, steps // 10) if validate_every is None else validate_every,
        checkpoint_every=1000 if checkpoint_every is None else checkpoint_every,
        keep_checkpoints=1 if keep_checkpoints is None else keep_checkpoints, log_every=log_every,
        time_limit=time_limit,
    )  # fmt: skip
    settings.validate_model(model)
    if objective is not None and not callable(objective):
        raise TypeError(f"objective must be callable as objective(model, x, ...), got {type(objective).__name__}.")
    bins = Bins(model, quantisation, choose("dequantisation", dequantisation, DEQUANTISATIONS))
    source = Source(data, cond, bins, "data", fit, cond_from, whole=False)
    if quantisation is None and hasattr(data, "columns"):
        _warn_of_repeats(source, list(data.columns))
    held_out = None
    if validation is not None:
        held_out = Source(validation, validation_cond or {}, bins, "validation", fit, cond_from)
    folder = Folder(run_dir, group)
    if group.size > 1:
        folder.compare_processes("fit", _shared_arguments(settings, intervals, source, held_out))
    _validate_parts(settings.accumulate, min(batch_size, source.rows), group)
    x, given = source.batch(source.first_and_last(), make_generator("check", device=model.device or "cpu"))
    settings.validate_dropout(model, given)
    verify(model, x, given, "fit")
    with folder.locked("checkpoint.safetensors", "a checkpoint", resume):
        own = None if isinstance(optimizer, str) else optimizer
        state = State(model, settings, None if objective is objectives.loss else objective, group, own, scheduler)
        training = Training(
            state=state, data=source, validation=held_out, folder=folder, intervals=intervals, hooks=hooks,
            weights=validate_weights(sample_weight, source),
        )  # fmt: skip
        return training.run(progress)


def _rates(given: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The options of learning rate and decay, with their defaults where nothing replaces them."""
    optimizer, scheduler = given["optimizer"], given["scheduler"]
    own = callable(optimizer)
    if not own and not isinstance(optimizer, str):
        raise TypeError(f"optimizer must be a name or a function of the parameters, got {type(optimizer).__name__}.")
    if scheduler is not None and not callable(scheduler):
        raise TypeError(f"scheduler must be a function of the optimiser, got {type(scheduler).__name__}.")
    defaults = {"lr": 1e-3, "weight_decay": 0.01, "warmup": default_warmup(steps), "lr_final": 0.01}
    replaced = dict.fromkeys(("lr", "weight_decay"), "an optimizer" if own else None)
    replaced |= dict.fromkeys(("warmup", "lr_final"), None if scheduler is None else "a scheduler")
    for name, by in replaced.items():
        if by is not None and given[name] is not None:
            raise ValueError(f"{name} has no effect with {by} of your own; set it there, or leave {name} out.")
        if by is not None:
            defaults[name] = None  # type: ignore[assignment]
    chosen = {name: default if given[name] is None else given[name] for name, default in defaults.items()}
    return chosen | {"optimizer": OWN if own else optimizer}


def _warn_of_repeats(source: Source, columns: list[Any]) -> None:
    """Warn if columns of a DataFrame hold values that repeat."""
    if isinstance(source.data, Tensor):
        cure = "add noise uniform over a bin, leave them out, or pass whole numbers with quantisation="
        said = repeated_values(source.data.numpy(force=True), source.layout.columns(columns)[0], cure)
        if said:
            warnings.warn(said, stacklevel=3)


def _refuse_ineffective(arguments: Mapping[str, Any]) -> None:
    for name, needed in (
        ("validation_cond", "validation"),
        ("validate_every", "validation"),
        ("patience", "validation"),
        ("checkpoint_every", "run_dir"),
        ("keep_checkpoints", "run_dir"),
    ):
        if arguments[name] is not None and arguments[needed] is None:
            raise ValueError(f"{name} has no effect without {needed}; pass {needed}= or leave {name} out.")
    if arguments["dequantisation"] != "uniform" and arguments["quantisation"] is None:
        raise ValueError("dequantisation has no effect without quantisation; leave it out, or pass quantisation=.")


def _shared_arguments(settings: Settings, intervals: Intervals, data: Source, validation: Source | None) -> Row:
    """What must agree between processes, for the same rows to be shared out at the same steps."""
    bins = data.bins.quantisation
    return asdict(settings) | {
        "validate_every": intervals.validate_every,
        "checkpoint_every": intervals.checkpoint_every,
        "quantisation": None if bins is None else repr(bins),
        "dequantisation": data.bins.dequantisation,
        "data": data.fingerprint_with_items(),
        "validation": None if validation is None else validation.fingerprint_with_items(),
    }


def _validate_parts(accumulate: int, rows: int, group: Group) -> None:
    if accumulate % group.size:
        raise ValueError(
            f"accumulate={accumulate} parts of a batch cannot be shared equally by {group.size} processes; take a "
            "multiple of their number."
        )
    if accumulate > rows:
        raise ValueError(
            f"accumulate={accumulate} parts of a batch of {rows} rows would leave some empty; take fewer parts "
            "(left out, accumulate is the number of processes), or larger batches."
        )
