"""The options of a training: which of them determine the weights, and which values they may have."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ndm_ct._core.checks import choose, is_whole, unpack_numpy, validate_count, validate_number, validate_positive
from ndm_ct.model import NDM
from ndm_ct.nn import null_of

__all__ = ["OPTIMIZERS", "OWN", "PRECISIONS", "Intervals", "Settings", "default_warmup"]

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}

OWN = "your own"
"""Name of an optimiser that the user makes."""

PRECISIONS = {"full": None, "bf16-mixed": torch.bfloat16}
"""Dtype of the networks during training, by Lightning's names for it; None is the dtype of their weights."""


def default_warmup(steps: int) -> int:
    """Steps of warm-up of a training that does not name them."""
    return min(1000, steps // 10)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of :func:`ndm_ct.fit` that determine the weights."""

    steps: int
    batch_size: int
    lr: float | None
    optimizer: str
    weight_decay: float | None
    grad_clip: float | None
    warmup: int | None
    lr_final: float | None
    ema: float | tuple[float, ...]
    seed: int
    cond_dropout: float
    patience: int | None
    accumulate: int
    precision: str

    def __post_init__(self) -> None:
        unpack_numpy(self)
        for name in ("steps", "batch_size", "accumulate"):
            validate_count(name, getattr(self, name))
        if self.patience is not None:
            validate_count("patience", self.patience)
        for name in ("lr", "weight_decay", "grad_clip", "warmup", "lr_final", "cond_dropout"):
            if (value := getattr(self, name)) is not None:
                validate_number(name, value)
        choose("optimizer", self.optimizer, (*OPTIMIZERS, OWN))
        _validate_precision(self.precision)
        for name, ok, expected in (
            ("lr", self.lr is None or self.lr > 0.0, "positive"),
            ("weight_decay", self.weight_decay is None or self.weight_decay >= 0.0, "at least 0"),
            ("grad_clip", self.grad_clip is None or self.grad_clip > 0.0, "positive, or None for no clipping"),
            ("warmup", self.warmup is None or 0 <= self.warmup <= self.steps, "between 0 and steps"),
            ("lr_final", self.lr_final is None or 0.0 <= self.lr_final <= 1.0, "a fraction of lr in [0, 1]"),
            ("ema", self._has_decays(), "in [0, 1), 0 for no average, or several different decays in (0, 1)"),
            ("seed", is_whole(self.seed) and self.seed >= 0, "an int of at least 0"),
            (
                "cond_dropout",
                self.cond_dropout is not None and 0.0 <= self.cond_dropout < 1.0,
                "a probability in [0, 1)",
            ),
        ):
            if not ok:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}.")

    @property
    def decays(self) -> tuple[float, ...]:
        """The decays of the averaged weights."""
        return self.ema if isinstance(self.ema, tuple) else (self.ema,) if self.ema else ()

    def _has_decays(self) -> bool:
        several = isinstance(self.ema, tuple)
        for decay in self.ema if isinstance(self.ema, tuple) else (self.ema,):
            validate_number("ema", decay)
        return (
            all(0.0 < decay < 1.0 for decay in self.decays)
            and len(set(self.decays)) == len(self.decays)
            and (not several or bool(self.decays))
        )

    def lr_at(self, step: int, base: float) -> float:
        """Learning rate of step ``step``, counted from 0, of parameters whose optimiser has the rate ``base``."""
        warmup, final = self.warmup or 0, 1.0 if self.lr_final is None else self.lr_final
        ramp = min(1.0, (step + 1) / warmup) if warmup else 1.0
        progress = max(0.0, (step - warmup) / max(1, self.steps - warmup))
        return base * ramp * (final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress)))

    def validate_model(self, model: Any) -> None:
        """Check that the settings have an effect on the model.

        Args:
            model: the model to train.

        Raises:
            TypeError: ``model`` is not an NDM.
            ValueError: the model has nothing to train, or an option has no effect.
        """
        if not isinstance(model, NDM):
            raise TypeError(f"model must be an ndm_ct.NDM, got {type(model).__name__}.")
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("model has no parameter that requires a gradient: there is nothing to train.")
        if any(p.requires_grad and p.dtype == torch.float16 for p in model.parameters()):
            raise ValueError(
                "the weights are float16, in which the steps of Adam become NaN; train model.float() (with "
                "precision='bf16-mixed' for speed), and convert the trained model with .half()."
            )
        if PRECISIONS[self.precision] is not None and model.network_dtype not in (None, torch.float32):
            raise ValueError(
                f"precision={self.precision!r} has no effect on networks of {model.network_dtype}; convert the model "
                "with .float(), or leave precision out."
            )

    def validate_dropout(self, model: NDM, cond: Mapping[str, Any]) -> None:
        """Check that conditioning can be dropped, if it is to be.

        Args:
            model: the model to train.
            cond: conditioning of some rows.

        Raises:
            ValueError: the option has no effect.
        """
        if self.cond_dropout > 0.0:
            _validate_droppable(model, cond)


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """Options of :func:`ndm_ct.fit` that do not change the weights: steps between reports, and the time limit."""

    validate_every: int
    checkpoint_every: int
    keep_checkpoints: int
    log_every: int
    time_limit: float | None

    def __post_init__(self) -> None:
        unpack_numpy(self)
        for name in ("validate_every", "checkpoint_every", "keep_checkpoints", "log_every"):
            validate_count(name, getattr(self, name))
        if self.time_limit is not None:
            validate_positive("time_limit", self.time_limit, "seconds")


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
