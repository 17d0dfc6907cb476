"""How each data set is modelled: sizes of networks, training, and rows in the form the library takes them."""

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ndm_ct
from ndm_ct.quantisation import Quantisation

from . import data


@dataclass(frozen=True)
class Recipe:
    """How a data set is modelled. All of it may be tuned on validation rows.

    Args:
        load: training and test rows.
        width: width of the predictor, of NDMs and of the plain diffusion.
        transform_width: width of the network in F.
        levels: resolutions of a U-Net; 0: a perceptron.
        steps: optimiser steps.
        batch_size: rows per step.
        lr: peak learning rate.
        gamma: ends of the log-SNR schedule.
        test_rows: rows on which the flow's likelihood is measured.
        samples: pairs of time and noise per test row for the bound.
        flow: transforms of the spline flow, width of their perceptrons and bins of the splines; None: no such model.
        flow_scale: factor on the values that the flow sees. Its splines bend in [-5, 5]; pixels lie in [-1, 1], where
            only two or three bins would act on them.
    """

    load: Callable[[], data.Split]
    width: int
    transform_width: int
    levels: int
    steps: int
    batch_size: int
    lr: float = 2e-3
    gamma: tuple[float, float] = (-9.0, 5.0)
    test_rows: int = 1000
    samples: int = 64
    flow: tuple[int, int, int] | None = None
    flow_scale: float = 1.0

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that a result depends on."""
        return json.loads(json.dumps({name: value for name, value in vars(self).items() if name != "load"}))


def small_images(name: str, size: int) -> Recipe:
    """The recipe of one of the two large image sets, shrunk to ``size``."""
    return Recipe(
        lambda: data.images(name, size), 16, 4, 2, 2500, 64, gamma=(-13.3, 5.0), test_rows=500, samples=4,
        flow=(1, 16, 8), flow_scale=4.0,
    )  # fmt: skip


def large_images(source: str) -> Recipe:
    """The recipe of images by name or path at full size: hours of a GPU."""
    return Recipe(
        lambda: data.dataset(source), 64, 16, 3, 100_000, 128, lr=1e-3, gamma=(-13.3, 5.0), test_rows=2000, samples=8,
        flow=(1, 64, 8), flow_scale=4.0,
    )  # fmt: skip


RECIPES = {
    "digits": Recipe(
        data.digits, 16, 2, 2, 3000, 64, gamma=(-8.0, 5.0), test_rows=360, samples=32, flow=(1, 16, 8), flow_scale=4.0
    ),
    "mnist": small_images("mnist", 14),
    "fashion-mnist": small_images("fashion-mnist", 14),
    "casp": Recipe(data.casp, 96, 64, 0, 2000, 1024, flow=(1, 64, 16)),
    "magic": Recipe(data.magic, 96, 64, 0, 2000, 1024, flow=(1, 64, 16)),
    "moons": Recipe(data.moons, 48, 32, 0, 1500, 1024, test_rows=2000, flow=(1, 48, 16), flow_scale=2.5),
    "checkers": Recipe(data.checkers, 48, 32, 0, 1500, 1024, flow=(1, 48, 16), flow_scale=2.5),
    "mnist-28": replace(small_images("mnist", 28), levels=3, steps=14_000, flow=(1, 64, 8)),
}

LONG = ("mnist-28",)
"""Compared with published numbers. Computed only where asked for, because it takes longer than all others together."""


def recipe_of(source: str, preset: str) -> Recipe:
    """The recipe of a data set by name, or of images by path.

    Raises:
        FileNotFoundError: there is neither a recipe nor a file of this name.
    """
    if preset == "full" and source in data.FOLDERS:
        return large_images(source)
    if source in RECIPES:
        return RECIPES[source]
    if not Path(source).exists():
        raise FileNotFoundError(f"{source} unknown; there are {', '.join(RECIPES)}, and images by their path")
    return large_images(source)


@dataclass(frozen=True)
class Rows:
    """A data set in the form the library takes it; ``validation`` is the last part of the training rows."""

    split: data.Split
    validation: Tensor
    bins: Quantisation | None
    std: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return tuple(self.split.train.shape[1:])


def rows_of(recipe: Recipe) -> Rows:
    """Training, validation (a tenth of the training rows, at most 2,000) and test rows."""
    whole = recipe.load()
    held_out = min(2000, len(whole.train) // 10)
    labels = None if whole.train_labels is None else whole.train_labels[:-held_out]
    split = replace(whole, train=whole.train[:-held_out], train_labels=labels)
    bins = None if split.levels is None else Quantisation(split.levels)
    std = 1.0 if bins is None else float(bins.centres(split.train[:5000], torch.float32).std())
    return Rows(split, whole.train[-held_out:], bins, std)


@functools.cache
def truth(name: str, on: str) -> tuple[float, float] | None:
    """Minus the mean true log-density of all test or validation rows with its standard error, where it is known."""
    recipe = RECIPES.get(name)
    if recipe is None or recipe.levels:
        return None
    rows = rows_of(recipe)
    if rows.split.log_density is None:
        return None
    values = -rows.split.log_density(rows.split.test if on == "test" else rows.validation)
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def unit(evaluation: ndm_ct.Evaluation, rows: Rows) -> tuple[float, float]:
    """A mean and its standard error: bits per dimension for dequantised integers, nats for vectors."""
    if rows.bins is None:
        return evaluation.nll, evaluation.stderr
    scale = rows.split.train[0].numel() * math.log(2.0)
    return evaluation.nll / scale - rows.bins.uniform_offset / math.log(2.0), evaluation.stderr / scale
