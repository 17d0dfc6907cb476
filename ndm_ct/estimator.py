r"""A density estimator for tables, in the interface of scikit-learn.

.. math::
    \log p(x) = \log p_{NDM}\Bigl(\frac{x - m}{s}\Bigr) - \sum_i \log s_i

with mean m and standard deviation s of every column of the training rows, and the density :math:`p_{NDM}` of the
probability flow of a diffusion. The model has the rows pass a map of their quantiles first (:mod:`ndm_ct.columns`),
whose log-determinant is part of :math:`p_{NDM}`. The density is exact up to 32 columns and beyond that an unbiased
estimate.

References:
    Pedregosa et al., Scikit-learn: Machine Learning in Python, https://jmlr.org/papers/v12/pedregosa11a.html
    Kingma et al., Variational Diffusion Models, https://arxiv.org/abs/2107.00630
"""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ndm_ct._core.checks import choose, usable_device, validate_count
from ndm_ct._core.seeds import derive_seeds, make_generator
from ndm_ct.columns import MARGINALS, InTurn, fit_table, repeated_values
from ndm_ct.divergence import EXACT_UP_TO
from ndm_ct.likelihood import api as likelihood
from ndm_ct.model import NDM
from ndm_ct.nn import MLP, FromZuko, Preconditioned
from ndm_ct.samplers.sample import sample
from ndm_ct.schedules.fixed import LinearLogSNR
from ndm_ct.training.fit import fit
from ndm_ct.transforms import Flow, Identity, Transform

try:
    from sklearn.base import BaseEstimator, DensityMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
except ImportError as error:
    raise ImportError("ndm_ct.estimator needs scikit-learn 1.6 or later: pip install 'ndm-ct[demo]'.") from error

__all__ = ["NDMDensity"]

_ROWS_AT_ONCE = 2048
_LEAST_VALIDATION = 10
_CURE = "add noise uniform over the width of a bin, or leave them out"


class NDMDensity(DensityMixin, BaseEstimator):  # type: ignore[misc]
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
        validation_fraction: share of the rows held out for early stopping. 0 trains all steps on all rows. So do tables
            of which fewer than ten rows would be held out.
        patience: number of validations without improvement (out of 20 in total) after which training stops early. None
            trains all steps.
        random_state: seed, or source of seeds, of weights, batches and held-out rows.
        device: device of torch; "auto" is a GPU if there is one.
        verbose: whether to show a progress bar.

    Attributes:
        model_: the :class:`~ndm_ct.NDM` of standardised rows, trained in float32, kept in float64.
        mean_: m, shape ``(n_features,)``.
        scale_: s, shape ``(n_features,)``; 1 for constant columns.
        gamma_min_: :math:`\gamma(0)`.
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
        validation_fraction: float = 0.1,
        patience: int | None = 4,
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
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> "NDMDensity":
        """Train the density.

        Args:
            X: rows ``(n_samples, n_features)``, two or more.
            y: ignored; part of scikit-learn's interface.
            sample_weight: weights of the rows, ``(n_samples,)``, at least 0; the density is that of rows repeated so
                often. Rows of weight 0 are left out. None weighs rows equally.

        Columns whose values repeat have no density; a warning names them.

        Raises:
            ValueError: scikit-learn does not accept the data, a parameter is out of range, or the device is missing.
            RuntimeError: the training diverged.
        """
        if not 0.0 <= self.validation_fraction < 1.0:
            raise ValueError(f"validation_fraction must be in [0, 1), got {self.validation_fraction!r}.")
        choose("marginals", self.marginals, MARGINALS)
        rows = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        said = repeated_values(rows, getattr(self, "feature_names_in_", None), _CURE)
        if said:
            warnings.warn(said, stacklevel=2)
        weights = None
        if sample_weight is not None:
            weights = _check_sample_weight(sample_weight, rows, dtype=np.float64)
            if (weights < 0.0).any() or (weights > 0.0).sum() < 2:
                raise ValueError("sample_weight must be at least 0, and positive for two or more rows.")
            rows, weights = rows[weights > 0.0], weights[weights > 0.0]
        random = check_random_state(self.random_state)
        self.mean_, spread = rows.mean(axis=0), rows.std(axis=0)
        self.scale_ = np.where(spread > 10.0 * np.finfo(np.float64).eps * np.abs(rows).max(axis=0), spread, 1.0)
        z = torch.from_numpy((rows - self.mean_) / self.scale_).float()
        z, options = self._hold_out(z, weights, random)
        seed = int(random.randint(2**31 - 1))
        with torch.random.fork_rng([]):
            torch.manual_seed(derive_seeds(seed, "weights")[0])
            net = MLP(z.shape[1], width=self.width, depth=self.depth, dropout=self.dropout)
            transform = self._transform(z)
        model = NDM(
            Preconditioned(net), (z.shape[1],), transform=transform, schedule=LinearLogSNR(self.gamma_min_, 5.0)
        )
        model.to(self._device())
        result = fit(
            model, z, steps=self.steps, batch_size=self.batch_size, lr=self.lr, seed=seed, progress=bool(self.verbose),
            **options,
        )  # fmt: skip
        # In float64 the steps of the solver, and with them the scores, do not depend on the batch.
        self.model_ = model.eval().requires_grad_(False).double()
        self.n_steps_, self.validation_ = result.step, result.validation
        return self

    def _hold_out(
        self, z: Tensor, weights: np.ndarray | None, random: np.random.RandomState
    ) -> tuple[Tensor, dict[str, Any]]:
        """The rows to train on, and the options of the training that weigh them and hold the others out.

        Rows that are held out are drawn again by their weights, because validation weighs rows equally.
        """
        held_out = int(self.validation_fraction * len(z))
        if held_out < _LEAST_VALIDATION:
            return z, {} if weights is None else {"sample_weight": weights}
        order = random.permutation(len(z))
        kept, others = order[held_out:], order[:held_out]
        options: dict[str, Any] = {"validate_every": max(1, self.steps // 20), "patience": self.patience}
        if weights is not None:
            others = random.choice(others, held_out, p=weights[others] / weights[others].sum())
            options["sample_weight"] = weights[kept]
        return z[torch.from_numpy(kept)], options | {"validation": z[torch.from_numpy(others)]}

    def _transform(self, z: Tensor) -> Transform:
        """The transform F for standardised rows z. It sets the noise at t = 0, which depends on F(z)."""
        column_map, self.gamma_min_ = fit_table(z.numpy(), self.marginals, self.gamma_min)
        parts: list[nn.Module] = [] if column_map is None else [column_map.float()]
        if self.flow:
            parts.append(self._spline_flow(z.shape[1]))
        if not parts:
            return Identity()
        return Flow(parts[0] if len(parts) == 1 else InTurn(*parts))

    def _spline_flow(self, columns: int) -> nn.Module:
        try:
            import zuko
        except ImportError as error:
            raise ImportError(f"flow={self.flow!r} needs zuko: pip install zuko, or take flow=0.") from error
        hidden = (max(8, self.width // 2),) * 2
        return FromZuko(zuko.flows.NSF(columns, transforms=self.flow, hidden_features=hidden))

    def score_samples(
        self, X: Any, *, batch_size: int | None = None, return_std: bool = False
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Log-density of every row of X, in nats per row in the units of X, shape ``(n_samples,)``.

        Beyond 32 columns it is an estimate. The row itself seeds its noise, so equal rows get equal numbers.

        Args:
            X: rows ``(n_samples, n_features)``.
            batch_size: rows scored at a time. The densities do not depend on it, memory and speed do; None bounds the
                memory.
            return_std: also return the standard errors of the estimates, ``(n_samples,)``, nats; 0 up to 32 columns.
        """
        z = self._standardised(X)
        size = _ROWS_AT_ONCE if batch_size is None else validate_count("batch_size", batch_size)
        found: list[tuple[Tensor, ...]] = []
        for part in z.split(size):
            options: dict[str, Any] = {"batch_size": batch_size, "generator": self._generators(part)}
            if return_std:
                log_p, info = likelihood.loglik(self.model_, part, return_info=True, **options)
                found.append((log_p, info.stderr))
            else:
                found.append((likelihood.loglik(self.model_, part, **options),))
        scores, *std = (torch.cat(parts).double().cpu().numpy() for parts in zip(*found, strict=True))
        scores = scores - np.log(self.scale_).sum()
        return (scores, std[0]) if return_std else scores

    def score(self, X: Any, y: Any = None) -> float:
        """Mean of :meth:`score_samples`, nats per row; y is ignored."""
        return float(np.mean(self.score_samples(X)))

    def sample(self, n_samples: int = 1, random_state: Any = None) -> np.ndarray:
        """Draw rows, ``(n_samples, n_features)``, from the density that is scored.

        Args:
            n_samples: number of rows.
            random_state: seed or source of seeds.
        """
        check_is_fitted(self)
        seed = int(check_random_state(random_state).randint(2**31 - 1))
        z = sample(self.model_, n_samples, batch_size=_ROWS_AT_ONCE, generator=seed)
        return z.double().cpu().numpy() * self.scale_ + self.mean_

    def _standardised(self, X: Any) -> Tensor:
        check_is_fitted(self)
        rows = validate_data(self, X, dtype=np.float64, reset=False)
        return torch.from_numpy((rows - self.mean_) / self.scale_).to(self.model_.device)

    def _generators(self, z: Tensor) -> list[torch.Generator] | None:
        if z.shape[1] <= EXACT_UP_TO:
            return None
        device = self.model_.device or "cpu"
        return [make_generator("row", row.tobytes(), device=device) for row in z.cpu().numpy()]

    def _device(self) -> torch.device:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        return usable_device(default if self.device == "auto" else self.device)
