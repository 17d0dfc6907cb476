r"""A density estimator for tables, in the interface of scikit-learn.

.. math::
    \log p(x) = \log p_{NDM}\Bigl(\frac{x - m}{s}\Bigr) - \sum_i \log s_i

with mean m and standard deviation s of every column of the training rows, and the density :math:`p_{NDM}` of the
probability flow of a diffusion. The model has the rows pass a map of their quantiles first (:mod:`ndm_ct.columns`),
whose log-determinant is part of :math:`p_{NDM}`. The density is exact up to 32 columns and beyond that an unbiased
estimate.

Rounded columns, categories, bounds and circles have their own changes of variables, and rounded columns and categories
are scored by probabilities (:mod:`ndm_ct.columns`). With missing values the model learns all conditionals,
:math:`p(x_T \mid x_O)` for targets T and observed columns O, so that a row is scored by the values that it has.

References:
    Pedregosa et al., Scikit-learn: Machine Learning in Python, https://jmlr.org/papers/v12/pedregosa11a.html
    Kingma et al., Variational Diffusion Models, https://arxiv.org/abs/2107.00630
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted
from torch import nn

from ndm_ct._core.checks import choose, usable_device, validate_count
from ndm_ct._core.seeds import derive_seeds, seeded_weights
from ndm_ct.columns import (
    MARGINALS,
    SAMPLES,
    Coding,
    Scored,
    Table,
    columns_of,
    hidden_structure,
    summary,
)
from ndm_ct.estimator.diagnosed import Diagnosed
from ndm_ct.estimator.tables import framed, given_rows, index_of, place_of, read_numbers, read_rows, say_kinds, unit_of
from ndm_ct.model import NDM
from ndm_ct.nn import FromZuko
from ndm_ct.schedules.fixed import LinearLogSNR
from ndm_ct.training.fit import fit

__all__ = ["NDMDensity"]

_ROWS_AT_ONCE = 2048
_LEAST_VALIDATION = 10
_MOST_HELD_OUT = 1000
_NEEDS_CONDITIONALS = (
    "NaN (missing values), given= and impute need a model of all conditionals: fit with conditionals=True, or with "
    "rows of which some have missing values."
)


class NDMDensity(Diagnosed, DensityMixin, BaseEstimator):  # type: ignore[misc]
    r"""The density of rows of a table.

    Args:
        width: width of the perceptron's hidden layers.
        depth: number of its residual blocks.
        dropout: probability of dropping a hidden unit in training. It helps against overfitting of small tables.
        steps: largest number of optimiser steps.
        batch_size: rows per step.
        lr: peak learning rate.
        flow: number of spline transforms of an invertible :math:`F(x, t) = h(x)` that is learned too (with the package
            zuko). 0 takes the identity for F. Which is better depends on the table: compare the bounds in
            ``validation_`` of two fits with the same ``random_state``.
        marginals: "spline" takes every column through a smooth map of its quantiles to N(0, 1), and whitens the result.
            Narrow peaks, heavy tails and scales cost no accuracy then. "linear" standardises the columns alone.
        gamma_min: :math:`\gamma(0)`. The density is that of the mapped rows with noise of standard deviation
            :math:`e^{\gamma_{min}/2}`. None chooses it from the rows, between -14 and -9: an eighth of the width of
            the kernel that predicts each row best from the others.
        columns: kinds of columns, by their names, or by their numbers where they have none: a kind ("continuous",
            "rounded", "integer", "categorical", "circular", "constant", "left out"), or a dict of ``kind`` and its
            entries, such as ``{"kind": "circular", "period": 360}`` or ``{"kind": "continuous", "low": 0}``
            (:mod:`ndm_ct.columns.kinds` lists them). Columns that are not named are inferred, and a warning says how.
            A single kind holds for all columns.
        conditionals: whether the model learns all conditionals, for ``given=``, ``impute`` and missing values. "auto"
            does where the training rows have missing values. Columns are not whitened then.
        validation_fraction: share of the rows held out for early stopping. 0 trains all steps on all rows. So do tables
            of which fewer than ten rows would be held out.
        patience: number of validations without improvement (out of 20 in total) after which training stops early. None
            trains all steps.
        warm_start: whether ``fit`` goes on from the weights, and with the columns, of an earlier ``fit``.
        random_state: seed, or source of seeds, of weights, batches and held-out rows.
        device: device of torch; "auto" is a GPU if there is one.
        verbose: whether to show a progress bar.

    Attributes:
        model_: the :class:`~ndm_ct.NDM` of standardised rows, trained in float32, kept in float64.
        columns_: the kind of every column, :class:`ndm_ct.columns.Column`.
        summary_: a text with a line for every column: kind, range, missing values, and what is done.
        unit_: what a score is: the columns with a density and those with a probability.
        mean_: m of the columns with a density or bins, a number for each, two for circles.
        scale_: s of these.
        gamma_min_: :math:`\gamma(0)`.
        held_out_: rows held out for validation, a thousand at most, categories by their number.
        n_steps_: optimiser steps done.
        validation_: rows of the training's validation, see :class:`~ndm_ct.FitResult`.
        n_features_in_: number of columns.
        feature_names_in_: their names, if X was a table with names.

    Example:
        >>> rows = np.random.default_rng(0).normal(size=(200, 3)) * [1.0, 10.0, 100.0]
        >>> density = NDMDensity(width=16, steps=50, random_state=0).fit(rows)
        >>> density.score_samples(rows[:2]).shape, density.sample(5, random_state=1).shape
        ((2,), (5, 3))
    """

    def __init__(
        self,
        *,
        width: int = 128,
        depth: int = 3,
        dropout: float = 0.0,
        steps: int = 4000,
        batch_size: int = 1024,
        lr: float = 2e-3,
        flow: int = 0,
        marginals: str = "spline",
        gamma_min: float | None = None,
        columns: Any = None,
        conditionals: bool | str = "auto",
        validation_fraction: float = 0.1,
        patience: int | None = 4,
        warm_start: bool = False,
        random_state: Any = None,
        device: str = "auto",
        verbose: int | bool = False,
    ) -> None:
        self.width = width
        self.depth = depth
        self.dropout = dropout
        self.steps = steps
        self.batch_size = batch_size
        self.lr = lr
        self.flow = flow
        self.marginals = marginals
        self.gamma_min = gamma_min
        self.columns = columns
        self.conditionals = conditionals
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.warm_start = warm_start
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> "NDMDensity":
        """Train the density.

        Args:
            X: rows ``(n_samples, n_features)``, two or more: numbers, or a DataFrame or an array of objects with words.
                NaN, None and pandas' NA are missing values.
            y: ignored; part of scikit-learn's interface.
            sample_weight: weights of the rows, ``(n_samples,)``, at least 0; the density is that of rows repeated so
                often. Rows of weight 0 are left out. None weighs rows equally.

        A warning says which kinds of columns were inferred, and which columns have no density because their values
        repeat without being rounded.

        Raises:
            ValueError: scikit-learn does not accept the data, a parameter is out of range, or the device is missing.
            RuntimeError: the training diverged.
        """
        if not 0.0 <= self.validation_fraction < 1.0:
            raise ValueError(f"validation_fraction must be in [0, 1), got {self.validation_fraction!r}.")
        choose("marginals", self.marginals, MARGINALS)
        earlier: NDM | None = getattr(self, "model_", None) if self.warm_start else None
        values = read_rows(self, X, reset=earlier is None)
        if earlier is None:
            self.columns_ = columns_of(values, self.columns)
            self.summary_, self.unit_ = summary(self.columns_, values), unit_of(self.columns_)
            say_kinds(self, values)
        numbers, weights = _weighed(Coding(self.columns_).places_of(values), sample_weight)
        random = check_random_state(self.random_state)
        if earlier is None:
            self.table_ = _measure(self, numbers, weights, random)
            self.mean_, self.scale_ = self.table_.coding.mean, self.table_.coding.scale
            self.gamma_min_ = self.table_.gamma_min
        kept, held_out, options = _hold_out(self, len(numbers), weights, random)
        seed = int(random.randint(2**31 - 1))
        model = _untrained(self, seed, numbers).to(_device(self.device))
        if earlier is not None:
            model.load_state_dict(earlier.state_dict())
        draws = np.random.default_rng(derive_seeds(seed, "rows"))
        x, cond, places = self.table_.training_rows(numbers[kept], draws)
        if weights is not None:
            options["sample_weight"] = weights[kept][places]
        if len(held_out):
            options["validation"], options["validation_cond"], _ = self.table_.training_rows(
                numbers[held_out], draws, copies=1
            )
        result = fit(
            model, x, cond=cond, steps=self.steps, batch_size=self.batch_size, lr=self.lr, seed=seed,
            progress=bool(self.verbose), **options,
        )  # fmt: skip
        # In float64 the steps of the solver, and with them the scores, do not depend on the batch.
        self.model_ = model.eval().requires_grad_(False).double()
        self.n_steps_, self.validation_ = result.step, result.validation
        self.held_out_, self._anomalies = numbers[held_out[:_MOST_HELD_OUT]], None
        return self

    def set_output(self, *, transform: str | None = None) -> "NDMDensity":
        """Choose what rows and scores are given as, as in scikit-learn.

        Args:
            transform: "default" for arrays; "pandas" for DataFrames and Series with the columns' names and the index
                of X. None changes nothing.
        """
        if transform is not None:
            self._sklearn_output_config = {"transform": choose("transform", transform, ("default", "pandas"))}
        return self

    def score_samples(
        self, X: Any, *, given: Sequence[Any] = (), samples: int = SAMPLES, batch_size: int | None = None,
        return_std: bool = False,
    ) -> Any:  # fmt: skip
        """Log-density of every row of X, in nats per row in the units of X, shape ``(n_samples,)``.

        Of rounded columns and categories it is a probability (``unit_``). Missing values are integrated out. A value
        without mass, outside of bounds or of an unknown category, gives minus infinity. Beyond 32 columns, and with
        rounded or circular columns, the score is an estimate. The row itself seeds its noise, so equal rows get equal
        numbers.

        Args:
            X: rows ``(n_samples, n_features)``.
            given: columns to condition on; the score is that of the others given these. Needs ``conditionals``.
            samples: K, points in bins and on radii that are averaged, if there are rounded or circular columns. The
                expected score rises with K to the exact one, and the time is proportional to K.
            batch_size: rows scored at a time. The densities do not depend on it, memory and speed do; None bounds the
                memory.
            return_std: also return the standard errors of the estimates, ``(n_samples,)``, nats; 0 where exact.
        """
        numbers = read_numbers(self, X)
        observed = [place_of(self.table_, name) for name in given]
        found = self._scored(numbers, observed=observed, samples=samples, batch_size=batch_size)
        said = hidden_structure(found.truncation)
        if said:
            warnings.warn(said + ".", stacklevel=2)
        scores, errors = (framed(self, each, index_of(X)) for each in (found.log_p, found.stderr))
        return (scores, errors) if return_std else scores

    def _scored(
        self, numbers: np.ndarray, *, observed: Sequence[int] = (), samples: int = SAMPLES,
        batch_size: int | None = None,
    ) -> Scored:  # fmt: skip
        K = validate_count("samples", samples)
        size = max(1, _ROWS_AT_ONCE // K) if batch_size is None else validate_count("batch_size", batch_size)
        roles = self.table_.roles(numbers, observed, _NEEDS_CONDITIONALS)
        found = []
        for start in range(0, len(numbers), size):
            part = slice(start, start + size)
            own = None if roles is None else roles[part]
            found.append(self.table_.score_rows(self.model_, numbers[part], own, K, batch_size=batch_size))
        return Scored(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

    def score(self, X: Any, y: Any = None) -> float:
        """Mean of :meth:`score_samples`, nats per row; y is ignored."""
        return float(np.mean(self.score_samples(X)))

    def sample(self, n_samples: int = 1, random_state: Any = None, *, given: Mapping[Any, Any] | None = None) -> Any:
        """Draw rows, ``(n_samples, n_features)``, from the density that is scored.

        Args:
            n_samples: number of rows.
            random_state: seed or source of seeds.
            given: values by name of column, one or n_samples of each; the others are drawn given these. Needs
                ``conditionals``.

        Returns:
            An array of numbers, or of objects where columns hold words; a DataFrame after ``set_output``. Columns that
            were left out are NaN.
        """
        check_is_fitted(self)
        numbers = given_rows(self.table_, validate_count("n_samples", n_samples), given or {})
        return framed(self, self.table_.coding.values_of(self._draws(numbers, random_state)))

    def impute(self, X: Any, *, draws: int = 1, random_state: Any = None) -> Any:
        """Rows with their missing values drawn given the others. Needs ``conditionals``.

        Args:
            X: rows ``(n_samples, n_features)`` with missing values.
            draws: number of completed tables.
            random_state: seed or source of seeds.

        Returns:
            As of :meth:`sample`: ``(n_samples, n_features)``, or ``(draws, n_samples, n_features)`` for several draws.
        """
        numbers, count = read_numbers(self, X), validate_count("draws", draws)
        drawn = self.table_.coding.values_of(self._draws(np.tile(numbers, (count, 1)), random_state))
        return framed(self, drawn, index_of(X)) if count == 1 else drawn.reshape(count, *numbers.shape)

    def _draws(self, numbers: np.ndarray, random_state: Any) -> np.ndarray:
        """Rows with missing values drawn given the others; all of them without a model of conditionals."""
        if not (self.table_.conditionals or np.isnan(numbers).all()):
            raise ValueError(_NEEDS_CONDITIONALS)
        seed = int(check_random_state(random_state).randint(2**31 - 1))
        return self.table_.draw_seeded(self.model_, len(numbers), seed, numbers=numbers, batch_size=_ROWS_AT_ONCE)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags


def _weighed(numbers: np.ndarray, sample_weight: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows of positive weight, and their weights."""
    if sample_weight is None:
        return numbers, None
    weights = _check_sample_weight(sample_weight, numbers, dtype=np.float64)
    if (weights < 0.0).any() or (weights > 0.0).sum() < 2:
        raise ValueError("sample_weight must be at least 0, and positive for two or more rows.")
    return numbers[weights > 0.0], weights[weights > 0.0]


def _measure(
    density: NDMDensity, numbers: np.ndarray, weights: np.ndarray | None, random: np.random.RandomState
) -> Table:
    """Scales and map of the table."""
    gaps = Coding(density.columns_).has_gaps(numbers)
    if density.conditionals not in (True, False, "auto"):
        raise ValueError(f"conditionals must be True, False or 'auto', got {density.conditionals!r}.")
    conditionals = gaps if density.conditionals == "auto" else bool(density.conditionals)
    if gaps and not conditionals:
        raise ValueError("X contains NaN, missing values, which need conditionals=True or 'auto', got False.")
    if conditionals and density.flow:
        raise ValueError(f"flow={density.flow!r} cannot be had with conditionals; take flow=0.")
    return Table.of(
        density.columns_, numbers, conditionals=conditionals, marginals=density.marginals,
        gamma_min=density.gamma_min, weights=weights, random=np.random.default_rng(random.randint(2**31 - 1)),
    )  # fmt: skip


def _hold_out(
    density: NDMDensity, n: int, weights: np.ndarray | None, random: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Numbers of the rows to train on and of those held out, and the options of the training that go with them.

    Rows that are held out are drawn again by their weights, because validation weighs rows equally.
    """
    held_out = int(density.validation_fraction * n)
    if held_out < _LEAST_VALIDATION:
        return np.arange(n), np.arange(0), {}
    order = random.permutation(n)
    kept, others = order[held_out:], order[:held_out]
    if weights is not None:
        others = random.choice(others, held_out, p=weights[others] / weights[others].sum())
    return kept, others, {"validate_every": max(1, density.steps // 20), "patience": density.patience}


def _untrained(density: NDMDensity, seed: int, numbers: np.ndarray) -> NDM:
    table = density.table_
    with seeded_weights(seed):
        return table.model(
            LinearLogSNR(table.gamma_min, 5.0), width=density.width, depth=density.depth, dropout=density.dropout,
            flow=_spline_flow(density, len(table.coding.mean)) if density.flow else None, shares=table.shares(numbers),
        )  # fmt: skip


def _spline_flow(density: NDMDensity, columns: int) -> nn.Module:
    try:
        import zuko
    except ImportError as error:
        raise ImportError(f"flow={density.flow!r} needs zuko: pip install zuko, or take flow=0.") from error
    hidden = (max(8, density.width // 2),) * 2
    return FromZuko(zuko.flows.NSF(columns, transforms=density.flow, hidden_features=hidden))


def _device(name: str) -> torch.device:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return usable_device(default if name == "auto" else name)
