r"""A table and its model: rows to train on, scores, and rows drawn, in the units of the table.

The score of a row is the average of K draws u of the noise that fills bins and radii (:mod:`ndm_ct.columns.coding`),

.. math::
    \log p(x_T \mid x_O) = \log \frac1K \sum_{k=1}^K e^{w(x, u_k)}\, p(y(x, u_k) \mid x_O),

with strata: in every column one of the K draws lies in each of K equal parts. It is a lower bound in expectation, exact
as K grows, and exact for K = 1 if no target takes noise.

References:
    Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, https://arxiv.org/abs/1509.00519
    McKay, Beckman and Conover, Latin hypercube sampling, https://doi.org/10.1080/00401706.1979.10489755
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ndm_ct._core.noise import as_randomness, repeated
from ndm_ct._core.seeds import make_generator
from ndm_ct.columns.coding import Coding
from ndm_ct.columns.kinds import Column
from ndm_ct.columns.marginals import ColumnMap, InTurn, fit_column_map
from ndm_ct.columns.noise import compared, gamma_of
from ndm_ct.columns.parts import OBSERVED, TARGET, UNKNOWN, Categories, TableMap, TableNet
from ndm_ct.columns.repeats import is_repeating
from ndm_ct.likelihood import api as likelihood
from ndm_ct.model import NDM
from ndm_ct.nn import MLP, Preconditioned
from ndm_ct.samplers.sample import sample
from ndm_ct.schedules import Schedule
from ndm_ct.transforms import Flow, Identity, Transform

__all__ = ["SAMPLES", "Scored", "Table", "draw_noise", "fit_table", "row_generators"]

SAMPLES = 16
"""K, draws of the noise in a score."""

_MOST_COPIES, _NUMBERS = 32, 2**24
_ROWS_WANTED = 2**18
_GAMMA_MIN = -9.0
"""The noise of a table without real coordinates, where it means nothing."""
_LOG_NORMAL = 0.5 * math.log(2.0 * math.pi)
_EVERYTHING = 0.3
"""Share of the training rows of which all values that are there are targets."""


def fit_table(
    rows: np.ndarray, marginals: str, gamma_min: float | None, *, plain: np.ndarray | None = None, whiten: bool = True
) -> tuple[ColumnMap | None, float]:
    """The map of a table's columns, and the noise at t = 0 of the mapped rows.

    Args:
        rows: standardised rows ``(N, d)``.
        marginals: "spline", or "linear", for which there is no map.
        gamma_min: the noise, if it is given; None chooses it from the rows.
        plain: columns that repeated values may be found in, a bool for each; None is all.
        whiten: whether the map ends with whitening.
    """
    column_map = None
    if marginals == "spline":
        repeating = is_repeating(rows)
        column_map = fit_column_map(rows, repeating if plain is None else repeating & plain, whiten=whiten)
    if gamma_min is not None:
        return column_map, gamma_min
    y = compared(torch.from_numpy(rows)).double()
    return column_map, gamma_of(y if column_map is None else column_map(y)[0])


class Scored(NamedTuple):
    """What :meth:`Table.score` finds, nats, ``(N,)`` each.

    Args:
        log_p: log-densities, or log-probabilities.
        stderr: their standard errors.
        truncation: change of log p by the noise left at t = 0 (:class:`ndm_ct.LikelihoodInfo`); NaN where unknown.
    """

    log_p: np.ndarray
    stderr: np.ndarray
    truncation: np.ndarray


@dataclass
class Table:
    """A table's columns, how they are coded, and the map of its features.

    Args:
        coding: the change of variables.
        conditionals: whether the model has all conditionals.
        column_map: the map of the features, in float64; None is the identity.
        gamma_min: the noise at t = 0.
    """

    coding: Coding
    conditionals: bool
    column_map: ColumnMap | None = None
    gamma_min: float = _GAMMA_MIN

    @staticmethod
    def of(
        columns: Sequence[Column], numbers: np.ndarray, *, conditionals: bool = False, marginals: str = "spline",
        gamma_min: float | None = None, weights: np.ndarray | None = None, random: np.random.Generator,
    ) -> "Table":  # fmt: skip
        """Measure the scales and the map of a table.

        Args:
            columns: of the table.
            numbers: training rows ``(N, D)`` (:meth:`Coding.places_of`); NaN is missing.
            conditionals: whether the model has all conditionals. Then the features are not whitened.
            marginals: "spline" or "linear".
            gamma_min: the noise at t = 0; None chooses it from the rows.
            weights: of the rows, ``(N,)``.
            random: source of the noise.
        """
        coding = Coding(columns)
        noise = random.random((len(numbers), coding.noises))
        coding.fit_scale(numbers, noise, weights)
        z = coding.encode(numbers, noise).features
        if not z.shape[1]:
            return Table(coding, conditionals, None, _GAMMA_MIN if gamma_min is None else gamma_min)
        z = _filled(z, random)
        plain = np.array([columns[owner].is_plain for owner in coding.owners])
        return Table(coding, conditionals, *fit_table(z, marginals, gamma_min, plain=plain, whiten=not conditionals))

    def to_json(self) -> dict[str, Any]:
        """For :meth:`restored`; the map is part of the model."""
        return self.coding.to_json() | {"conditionals": self.conditionals, "gamma_min": self.gamma_min}

    @staticmethod
    def restored(entries: dict[str, Any], model: NDM) -> "Table":
        """The table of a model, from what :meth:`to_json` wrote."""
        inner = model.transform.flow if isinstance(model.transform, Flow) else None
        inner = inner.columns if isinstance(inner, TableMap) else inner
        column_map = copy.deepcopy(inner).double() if isinstance(inner, ColumnMap) else None
        return Table(Coding.restored(entries), bool(entries["conditionals"]), column_map, float(entries["gamma_min"]))

    def model(
        self, schedule: Schedule, *, width: int = 128, depth: int = 3, dropout: float = 0.0,
        flow: nn.Module | None = None, shares: Tensor | None = None,
    ) -> NDM:  # fmt: skip
        """The untrained model of the table, with weights from torch's global generator.

        Args:
            schedule: of the noise.
            width: of the networks' hidden layers.
            depth: number of residual blocks.
            dropout: probability of dropping a hidden unit in training.
            flow: an invertible map behind that of the columns.
            shares: of the categories (:meth:`shares`).
        """
        m, sizes = len(self.coding.owners), self.coding.sizes
        told = bool(sizes) or self.conditionals
        net: nn.Module = MLP(m, width, depth, dropout=dropout)
        if told:
            net = TableNet(m, sizes, self.conditionals, width, depth, dropout)
        parts: list[nn.Module] = (
            [] if self.column_map is None else [copy.deepcopy(self.column_map).to(torch.get_default_dtype())]
        )
        parts += [] if flow is None else [flow]
        inner = None if not parts else parts[0] if len(parts) == 1 else InTurn(*parts)
        if told:
            categories = Categories(sizes, m if self.conditionals else 0, width, dropout) if sizes else None
            if categories is not None and shares is not None:
                categories.start_at(shares)
            inner = TableMap(inner, categories)
        transform: Transform = Identity() if inner is None else Flow(inner)
        return NDM(Preconditioned(net), (max(m, 1),), transform=transform, schedule=schedule)

    def shares(self, numbers: np.ndarray) -> Tensor | None:
        """Shares of the categories of all columns, one after the other, with one row added to each; None without."""
        parts = []
        for place, size in zip(self.coding.categorical, self.coding.sizes, strict=True):
            codes = numbers[:, place]
            counts = np.bincount(codes[codes >= 0.0].astype(np.int64), minlength=size) + 1.0
            parts.append(counts / counts.sum())
        return torch.from_numpy(np.concatenate(parts)).float() if parts else None

    @property
    def copies(self) -> int:
        """Copies of a row to train on, each with noise and roles of its own, if there were only one row."""
        return _MOST_COPIES if self.coding.noises or self.conditionals else 1

    def training_rows(
        self, numbers: np.ndarray, random: np.random.Generator, copies: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor], np.ndarray]:
        """Rows for :func:`ndm_ct.fit`, their conditions, and the number of the row that each comes from.

        Args:
            numbers: ``(N, D)``.
            random: source of noise and roles.
            copies: of every row; None: as many as memory allows, up to 32.
        """
        n = max(len(numbers), 1)
        if copies is None:
            most = min(-(-_ROWS_WANTED // n), _NUMBERS // (n * max(1, numbers.shape[1])))
            copies = max(1, min(self.copies, most))
        places = np.tile(np.arange(len(numbers)), copies)
        numbers = numbers[places]
        roles = self._drawn_roles(numbers, random) if self.conditionals else None
        noise = random.random((len(numbers), self.coding.noises))
        x, cond, _ = self.inputs(numbers, noise, roles)
        return x.float(), {k: v.float() if v.is_floating_point() else v for k, v in cond.items()}, places

    def _drawn_roles(self, numbers: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Roles ``(N, D)``: all that is there a target, or each value as shares say that are drawn for every row."""
        n, d = numbers.shape
        there = ~np.isnan(numbers)
        shares = random.dirichlet(np.ones(3), n).cumsum(1)
        drawn = (random.random((n, d))[:, :, None] > shares[:, None, :2]).sum(2)
        drawn[random.random(n) < _EVERYTHING] = TARGET
        roles = np.where(there, drawn, UNKNOWN)
        without = np.flatnonzero(~(roles == TARGET).any(1))
        roles[without, np.where(there, random.random((n, d)), -1.0).argmax(1)[without]] = TARGET
        return np.where(there, roles, UNKNOWN)

    def inputs(
        self, numbers: np.ndarray, noise: np.ndarray, roles: np.ndarray | None = None
    ) -> tuple[Tensor, dict[str, Tensor], np.ndarray]:
        """The model's input, its conditions, and what is added to its log-density.

        Args:
            numbers: ``(N, D)``; NaN is missing.
            noise: ``(N, noises)``.
            roles: of every value, ``(N, D)``, for a model of all conditionals.

        Returns:
            x ``(N, max(m, 1))`` and conditions, float64; the addition ``(N,)``, nats; -inf where a target is a value
            without mass, NaN where an observed one is.
        """
        coding, coded = self.coding, self.coding.encode(numbers, noise)
        n, m = coded.features.shape
        cond: dict[str, Tensor] = {"codes": torch.from_numpy(coded.codes)} if coding.sizes else {}
        if roles is None:
            added = coded.weights.sum(1) + (_LOG_NORMAL if m == 0 else 0.0)
            added[~coded.possible.all(1)] = -np.inf
            x = coded.features if m else np.zeros((n, 1))
            return torch.from_numpy(x), cond, added
        own = np.concatenate([roles[:, coding.owners], roles[:, coding.categorical]], 1)
        middle = torch.from_numpy(coding.encode(numbers, np.full_like(noise, 0.5)).features)
        known = middle if self.column_map is None else self.column_map.scores(middle.T.contiguous())[0].T
        cond["roles"] = torch.from_numpy(own)
        cond["known"] = torch.where(cond["roles"][:, :m] == OBSERVED, known, 0.0)
        if coding.sizes:
            cond["codes"] = torch.where(cond["roles"][:, m:] == UNKNOWN, -1, cond["codes"])
        x = np.where(own[:, :m] == TARGET, coded.features, 0.0) if m else np.zeros((n, 1))
        added = np.where(roles == TARGET, coded.weights, 0.0).sum(1)
        added += _LOG_NORMAL * ((own[:, :m] != TARGET).sum(1) if m else 1)
        added[((roles == TARGET) & ~coded.possible).any(1)] = -np.inf
        added[((roles == OBSERVED) & ~coded.possible).any(1)] = np.nan
        return torch.from_numpy(x), cond, added

    def roles(self, numbers: np.ndarray, observed: Sequence[int], refusal: str) -> np.ndarray | None:
        """The roles of values to score, ``(N, D)``; None for a model without conditionals.

        Args:
            numbers: ``(N, D)``; NaN is missing.
            observed: places of the columns to condition on.
            refusal: what to tell if only a model of all conditionals could do it.

        Raises:
            ValueError: the model lacks conditionals, and values are missing or observed.
        """
        if not self.conditionals:
            if len(observed) or self.coding.has_gaps(numbers):
                raise ValueError(refusal)
            return None
        missing = np.isnan(numbers)
        roles = np.where(missing, UNKNOWN, TARGET)
        roles[:, observed] = np.where(missing[:, observed], UNKNOWN, OBSERVED)
        return roles

    def score(
        self, model: NDM, numbers: np.ndarray, noise: Tensor | None, *, roles: np.ndarray | None = None,
        generator: Any = None, **options: Any,
    ) -> Scored:  # fmt: skip
        """Log-density or log-probability of rows.

        Args:
            model: the model.
            numbers: ``(N, D)``.
            noise: ``(N, K, noises)``, uniform in (0, 1), of :func:`draw_noise`; None: no column takes noise.
            roles: of every value, ``(N, D)``.
            generator: one for every row, for estimated traces.
            options: of :func:`ndm_ct.loglik`; exact traces are taken at nodes of the path unless ``method`` is another.
        """
        n, K = len(numbers), 1 if noise is None else noise.shape[1]
        flat = np.zeros((n, 0)) if noise is None else noise.flatten(0, 1).cpu().double().numpy()
        again = None if roles is None else roles.repeat(K, 0)
        x, cond, added = self.inputs(numbers.repeat(K, 0), flat, again)
        values, errors, hidden = added.copy(), np.zeros(n * K), np.full(n * K, np.nan)
        possible = np.isfinite(added)  # the same for all K
        if possible.any():
            if generator is not None:
                own = [each for each, kept in zip(generator, possible[::K], strict=True) if kept]
                generator = repeated(as_randomness(own, len(own), model.device or "cpu", "score"), K)
            at = torch.from_numpy(possible)
            log_p, info = likelihood.loglik(  # type: ignore[call-overload]
                model, _as_of(model, x[at]), generator=generator, return_info=True,
                **({"method": "exponential"} | options),
                **{name: _as_of(model, value[at]) for name, value in cond.items()},
            )  # fmt: skip
            values[possible] += log_p.double().cpu().numpy()
            errors[possible] = info.stderr.double().cpu().numpy()
            hidden[possible] = info.truncation.double().cpu().numpy()
        return Scored(*_averaged(values.reshape(n, K), errors.reshape(n, K)), hidden.reshape(n, K).mean(1))

    def score_rows(
        self, model: NDM, numbers: np.ndarray, roles: np.ndarray | None, samples: int = SAMPLES, **options: Any
    ) -> Scored:
        """:meth:`score` with noise seeded by the rows themselves, so that equal rows get equal numbers.

        Args:
            model: the model.
            numbers: ``(N, D)``.
            roles: of every value, ``(N, D)``.
            samples: K.
            options: of :func:`ndm_ct.loglik`.
        """
        noise = draw_noise(row_generators(numbers, "bins"), samples, self.coding.noises)
        return self.score(
            model, numbers, noise, roles=roles, generator=row_generators(numbers, "row", model.device), **options
        )

    def draw_seeded(self, model: NDM, n: int, seed: int, **options: Any) -> np.ndarray:
        """:meth:`draw` with all noise from one seed.

        Args:
            model: the model.
            n: number of rows.
            seed: of the noise.
            options: further arguments of :meth:`draw`.
        """
        return self.draw(model, n, (make_generator(seed, "categories"), seed), **options)

    def draw(
        self, model: NDM, n: int, generators: Any, *, numbers: np.ndarray | None = None,
        roles: np.ndarray | None = None, **options: Any,
    ) -> np.ndarray:  # fmt: skip
        """Rows drawn from the model, ``(n, D)``: targets drawn, other values as they were.

        Args:
            model: the model.
            n: number of rows.
            generators: a generator for the categories and one for the rest, or for every row a pair of these.
            numbers: observed values ``(n, D)``; NaN is drawn. Only models of all conditionals have observed values.
            roles: of every value, ``(n, D)``, for models of all conditionals; None is what ``numbers`` says.
            options: of :func:`ndm_ct.sample`.
        """
        coding = self.coding
        given = np.full((n, len(coding.columns)), np.nan) if numbers is None else numbers
        if roles is None and self.conditionals:
            roles = np.where(np.isnan(given), TARGET, OBSERVED)
        _, cond, added = self.inputs(given, np.full((n, coding.noises), 0.5), roles)
        if np.isnan(added).any():
            raise ValueError(
                "given has a value that the model gives no mass: outside of bounds, or an unknown category."
            )
        first, second = generators
        cond = {name: _as_of(model, value) for name, value in cond.items()}
        flow = model.transform.flow if isinstance(model.transform, Flow) else None
        if coding.sizes:
            assert isinstance(flow, TableMap)
            assert flow.categories is not None
            uniform = _uniform(n, len(coding.sizes), first).to(cond["codes"].device)
            with torch.no_grad():
                cond["codes"] = flow.categories.draw(**cond, uniform=uniform)
        x = sample(model, n, generator=second, **options, **cond)  # type: ignore[call-overload]
        codes = cond["codes"].cpu().numpy() if coding.sizes else np.zeros((n, 0))
        drawn = coding.decode(x.double().cpu().numpy()[:, : len(coding.owners)], codes)
        return drawn if roles is None else np.where(roles == TARGET, drawn, given)


def _as_of(model: NDM, value: Tensor) -> Tensor:
    """The tensor on the model's device, in its precision."""
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


def row_generators(rows: np.ndarray, word: str, device: Any = None) -> list[torch.Generator]:
    """A generator for every row, seeded by the word and the row, so that equal rows get equal noise."""
    return [make_generator(word, row.tobytes(), device=device or "cpu") for row in rows]


def draw_noise(generators: Sequence[torch.Generator], samples: int, noises: int) -> Tensor | None:
    """Numbers in (0, 1), ``(N, samples, noises)``, strata in every column; None if there are no noises.

    Args:
        generators: one for every row.
        samples: K.
        noises: numbers per draw.
    """
    if not noises:
        return None
    found = []
    for generator in generators:
        u = torch.rand(2, samples, noises, generator=generator, dtype=torch.float64, device=generator.device)
        found.append(((u[0].argsort(0) + u[1]) / samples).clamp(1e-9, 1.0 - 1e-9))
    return torch.stack(found) if found else torch.zeros(0, samples, noises)


def _uniform(n: int, count: int, generators: Any) -> Tensor:
    if isinstance(generators, torch.Generator):
        return torch.rand(n, count, generator=generators, device=generators.device, dtype=torch.float64)
    rows = [torch.rand(count, generator=each, device=each.device, dtype=torch.float64) for each in generators]
    return torch.stack(rows) if rows else torch.zeros(0, count)


def _averaged(values: np.ndarray, errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log of the mean of exponentials ``(N, K)``, and its standard error: of the estimates, and of the K draws."""
    if values.shape[1] == 1:
        return values[:, 0], errors[:, 0]
    K, best = values.shape[1], values.max(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        weights = np.where(np.isfinite(best), np.exp(values - best), 1.0)
    mean = weights.mean(1)
    share = weights / (K * mean[:, None])
    spread = (K * share).std(1, ddof=1) / math.sqrt(K)
    return best[:, 0] + np.log(mean), np.hypot(np.sqrt(np.square(share * errors).sum(1)), spread)


def _filled(z: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Features with other rows' values in the place of missing ones, for what is measured column by column."""
    z = z.copy()
    for column in z.T:
        missing = np.isnan(column)
        column[missing] = random.choice(column[~missing], int(missing.sum())) if not missing.all() else 0.0
    return z
