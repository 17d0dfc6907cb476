r"""An audit of likelihoods: what an estimator of log p gets right where the density is known.

A law has a model with the exact predictor, so an estimator sees what it sees of a trained network. For rows
:math:`x_i` with the known value :math:`\ell_i` and n estimates :math:`\hat\ell_{ij}` of each,

.. math::
    b = \frac{1}{Rn} \sum_{ij} (\hat\ell_{ij} - \ell_i), \qquad
    \mathrm{se}^2(b) = \frac{1}{R^2} \sum_i \frac{s_i^2}{n}, \qquad
    s_i^2 = \frac{1}{n-1} \sum_j (\hat\ell_{ij} - \bar\ell_i)^2 .

b is the bias on these rows, and :math:`s_i` the error that one value has. An estimator that reports errors
:math:`e_{ij}` should report :math:`s_i`: the ratio of their root mean squares tells.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ndm_ct._core.checks import choose, event_size, validate_count
from ndm_ct._core.seeds import derive_seeds, make_generator
from ndm_ct.model import NDM
from ndm_ct.quantisation import Quantisation
from ndm_ct.reference import Chain, GaussianMixture
from ndm_ct.schedules import LinearLogSNR

__all__ = ["LAWS", "Audit", "Law", "Verdict", "audit"]

Estimate = Callable[[NDM, Tensor, Quantisation | None, torch.Generator], Tensor | tuple[Tensor, Tensor]]
"""``estimate(model, x, bins, generator)``: log p in nats, ``(B,)``, alone or with its reported standard errors."""

CALIBRATED = 1.3
"""Factor within which a reported error is called right."""


@dataclass(frozen=True, kw_only=True)
class Law:
    """Data whose density is known, with a model whose density is known.

    Args:
        model: what the estimator gets.
        draw: ``draw(n, generator)``, n rows of data: float64, or integers.
        truth: the model's log p of such rows, nats, ``(B,)``.
        bins: of integer data, where the model has its levels.
        about: one line for tables.
    """

    model: NDM
    draw: Callable[[int, torch.Generator], Tensor]
    truth: Callable[[Tensor], Tensor]
    bins: Quantisation | None
    about: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What an estimator did on one law.

    Args:
        law: its name.
        bias: mean of estimate minus truth, nats per event.
        stderr: standard error of ``bias`` given the rows, by the scatter of the repeats.
        scatter: root mean square over the rows of the standard deviation of one value, nats.
        reported: root mean square of the reported standard errors; NaN if the estimator reports none.
        dimensions: d, for bits per dimension.
        evaluations: network evaluations per value.
        seconds: per value.
        bound: whether the estimator claims a lower bound of log p, which may be low but not high.
        tolerance: bias in bits per dimension that counts as none.
    """

    law: str
    bias: float
    stderr: float
    scatter: float
    reported: float
    dimensions: int
    evaluations: float
    seconds: float
    bound: bool
    tolerance: float

    @property
    def bits(self) -> float:
        """The error of the number that is published, bits per dimension: positive if it looks worse than it is."""
        return -self.bias / (self.dimensions * math.log(2.0))

    @property
    def z(self) -> float:
        """The bias in its standard errors."""
        return self.bias / self.stderr if self.stderr > 0.0 else math.copysign(math.inf, self.bias)

    @property
    def is_biased(self) -> bool:
        """Whether the bias is beyond the tolerance and beyond chance."""
        return not (abs(self.bits) <= self.tolerance or abs(self.z) <= 3.0)

    def words(self) -> str:
        """The verdict as sentences."""
        size = f"{abs(self.bias):.2g} ± {self.stderr:.1g} nats ({abs(self.bits):.3f} bits per dimension)"
        if not math.isfinite(self.bias):
            value = "Some values are not finite."
        elif not self.is_biased:
            value = (
                "No bias found."
                if abs(self.bits) <= self.tolerance
                else f"No bias found within {self.stderr:.1g} nats."
            )
        elif self.bias > 0.0:
            value = f"log p is too high by {size}" + (": this is no lower bound." if self.bound else ".")
        else:
            value = f"log p is too low by {size}" + (", as a bound may be." if self.bound else ".")
        return f"{value} {self._about_errors()}"

    def _about_errors(self) -> str:
        if self.scatter < 1e-3:
            return "Repeats agree."
        if math.isnan(self.reported):
            return f"One value scatters by {self.scatter:.2g} nats, and no error is reported."
        ratio = self.scatter / self.reported if self.reported > 0.0 else math.inf
        if 1.0 / CALIBRATED <= ratio <= CALIBRATED:
            return f"The reported error ({self.reported:.2g} nats) is right."
        how = f"{ratio:.2g} times too small" if ratio > 1.0 else f"{1.0 / ratio:.2g} times too large"
        return f"The reported error ({self.reported:.2g} nats) is {how}."


@dataclass(frozen=True)
class Audit:
    """Verdicts on several laws; ``str`` prints them."""

    verdicts: tuple[Verdict, ...]

    def __str__(self) -> str:
        width = max((len(each.law) for each in self.verdicts), default=0)
        return "\n".join(f"{each.law:{width}}  {each.words()}" for each in self.verdicts)

    def to_json(self) -> list[dict[str, Any]]:
        """One record per law, with the verdict in words."""
        return [asdict(each) | {"bits": each.bits, "words": each.words()} for each in self.verdicts]


def audit(
    estimate: Estimate,
    /,
    laws: Iterable[str] | None = None,
    *,
    bound: bool = False,
    rows: int = 4,
    repeats: int = 100,
    batch_size: int = 100,
    tolerance: float = 0.005,
    seed: int = 0,
    progress: bool = True,
) -> Audit:
    """Try an estimator of log p on laws whose density is known.

    Args:
        estimate: ``estimate(model, x, bins, generator)``. ``model`` is an :class:`~ndm_ct.NDM` with an exact predictor;
            ``model.velocity``, ``model.score`` and ``model.predict_x`` are what a network gives. ``x`` has shape
            ``(B, *E)``. ``bins`` is None for densities; for integers it says where the model has its levels, and
            log P(x) is wanted. Returns log p in nats, ``(B,)``, or a pair with the standard errors it reports.
        laws: names of ``LAWS``; None is all.
        bound: whether the estimator claims a lower bound of log p.
        rows: rows per law.
        repeats: estimates of every row, each with other random numbers.
        batch_size: rows per call of ``estimate``.
        tolerance: bias, in bits per dimension, that counts as none.
        seed: of rows and random numbers. torch's global generator is seeded for every call and restored afterwards.
        progress: whether to show a progress bar.

    Returns:
        An :class:`Audit`.

    Raises:
        ValueError: an unknown law; an estimate that is not ``(B,)`` numbers.

    Example:
        >>> import ndm_ct
        >>> def mine(model, x, bins, generator):
        ...     return ndm_ct.loglik(model, x, rtol=1e-3, atol=1e-3)
        >>> print(ndm_ct.audit(mine, ["twonorm"], rows=2, repeats=2, progress=False))
        twonorm  No bias found. Repeats agree.
    """
    for name, value in (("rows", rows), ("batch_size", batch_size)):
        validate_count(name, value)
    if validate_count("repeats", repeats) < 2:
        raise ValueError("repeats=1 gives no scatter; take 2 or more.")
    chosen = list(LAWS) if laws is None else [choose("laws", name, LAWS) for name in laws]
    found = []
    for name in tqdm(chosen, desc="laws", disable=not progress):
        law = LAWS[name]()
        x = law.draw(rows, make_generator(seed, "audit", name))
        values, errors, cost, seconds = _repeated(estimate, law, x, repeats, batch_size, (seed, name))
        off = values - law.truth(x)[:, None]
        variance = off.var(1)
        found.append(
            Verdict(
                law=name, bias=float(off.mean()), stderr=float((variance.sum() / repeats).sqrt()) / rows,
                scatter=float(variance.mean().sqrt()), reported=float(errors.square().mean().sqrt()),
                dimensions=event_size(law.model.event_shape), evaluations=cost, seconds=seconds, bound=bound,
                tolerance=tolerance,
            )
        )  # fmt: skip
    return Audit(tuple(found))


def _repeated(
    estimate: Estimate, law: Law, x: Tensor, repeats: int, batch_size: int, words: tuple[int, str]
) -> tuple[Tensor, Tensor, float, float]:
    """Values and reported errors ``(rows, repeats)``, and evaluations and seconds per value."""
    every, values, errors = x.repeat_interleave(repeats, 0), list[Tensor](), list[Tensor]()
    start = time.perf_counter()
    with _counted(law.model) as count:
        for number, batch in enumerate(every.split(batch_size)):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seeds(*words, number, "global")[0])
                result = estimate(law.model, batch, law.bins, make_generator(*words, number, "own"))
            value, error = result if isinstance(result, tuple) else (result, torch.full((len(batch),), math.nan))
            for name, part in (("log p", value), ("its error", error)):
                if not isinstance(part, Tensor) or part.shape != (len(batch),):
                    raise ValueError(
                        f"estimate returned {name} as {getattr(part, 'shape', type(part).__name__)}, expected a tensor "
                        f"of shape ({len(batch)},): one number of nats per row."
                    )
            values.append(value.detach().double())
            errors.append(error.detach().double())
    seconds = (time.perf_counter() - start) / len(every)
    shape = (len(x), repeats)
    return torch.cat(values).reshape(shape), torch.cat(errors).reshape(shape), count[0] / len(every), seconds


@contextmanager
def _counted(model: NDM) -> Iterator[list[int]]:
    """Count the rows that the predictor gets."""
    predictor, count = model.predictor, [0]

    def counting(z: Tensor, t: Tensor) -> Tensor:
        count[0] += len(z)
        return predictor(z, t)

    model.predictor = counting
    try:
        yield count
    finally:
        model.predictor = predictor


# --- the laws --------------------------------------------------------------------------------------------------------

_SCHEDULE = (-14.0, 10.0)
"""Log-SNR at the ends: the noise that is left, 0.001, hides nothing of these laws but points on a bin's edge."""


def _autoregressive(length: int, correlation: float, rows_from: float, about: str) -> Law:
    """A Gaussian AR(1) process of standard deviation 1/3 in 16 bins of (-1, 1)."""
    bins = Quantisation(16)

    def chain(r: float) -> Chain:
        centres = bins.centres(torch.arange(16), torch.float64)
        start = _bin_masses(torch.zeros(1, 1, dtype=torch.float64), 1.0 / 3.0, centres, bins.half_width)[0]
        moves = _bin_masses(r * centres[:, None], math.sqrt(1.0 - r**2) / 3.0, centres, bins.half_width)
        return _plain(Chain(start, moves, length, bins, schedule=LinearLogSNR(*_SCHEDULE)))

    model, data = chain(correlation), chain(rows_from)
    return Law(
        model=model, draw=lambda n, g: data.sample_levels(n, generator=g), truth=model.log_probability, bins=bins,
        about=about,
    )  # fmt: skip


def _bin_masses(mean: Tensor, std: float, centres: Tensor, h: float) -> Tensor:
    """Probabilities of bins under normal laws, the outermost bins open, ``(H, L)``."""
    edges = torch.special.ndtr((centres[1:] - h - mean) / std)
    ends = torch.zeros(len(mean), 1, dtype=torch.float64)
    return torch.cat([ends, edges, ends + 1.0], 1).diff(dim=1)


def _mixture_of_levels() -> Law:
    """Three templates of 16 levels, on the centres of 8 bins."""
    bins, generator = Quantisation(8), torch.Generator().manual_seed(0)
    tables = torch.softmax(2.0 * torch.randn(3, 8, generator=generator, dtype=torch.float64), 1)
    start = torch.cat([weight * table for weight, table in zip((0.5, 0.3, 0.2), tables, strict=True)])
    model = Chain(
        start, torch.block_diag(*(table.expand(8, 8) for table in tables)), 16, bins,
        levels=torch.arange(8).repeat(3), filled=False, schedule=LinearLogSNR(-6.4, 10.0),
    )  # fmt: skip
    return Law(
        model=_plain(model), draw=lambda n, g: model.sample_levels(n, generator=g), truth=model.log_probability,
        bins=bins, about="mixture of three product laws over 8 levels, on their centres, d = 16",
    )  # fmt: skip


def _twonorm() -> Law:
    """Breiman's twonorm: two unit normal laws in 20 dimensions, at +a and -a in every coordinate."""
    a = 2.0 / math.sqrt(20.0)
    means = torch.tensor([[a], [-a]]).expand(2, 20)
    model = _plain(
        GaussianMixture(
            torch.tensor([0.5, 0.5]), means, torch.eye(20).repeat(2, 1, 1), schedule=LinearLogSNR(*_SCHEDULE)
        )
    )

    def truth(x: Tensor) -> Tensor:
        squares = (x[:, None, :].double() - means.double()).square().sum(2)
        return torch.logsumexp(-0.5 * squares, 1) + math.log(0.5) - 10.0 * math.log(2.0 * math.pi)

    return Law(
        model=model, draw=lambda n, g: model.sample_data(n, generator=g), truth=truth, bins=None,
        about="twonorm, two normal laws, d = 20",
    )  # fmt: skip


def _checkers() -> Law:
    """Eight of the sixteen squares of a board on (-1, 1)."""
    bins, colour = Quantisation(4), (torch.arange(4)[:, None] + torch.arange(4)) % 2
    model = _plain(
        Chain(torch.full((4,), 0.25), (1.0 - colour.double()) / 2.0, 2, bins, schedule=LinearLogSNR(*_SCHEDULE))
    )

    return Law(
        model=model, draw=lambda n, g: model.marginals.draw(n, None, g),
        truth=lambda x: model.log_probability(bins.nearest(x)) - 2.0 * math.log(0.5), bins=None,
        about="checkers, uniform on eight squares, d = 2",
    )  # fmt: skip


def _plain(model: Any) -> Any:
    """The model without the checks at first use, which would count as evaluations."""
    model.checks = False
    return model


LAWS: dict[str, Callable[[], Law]] = {
    "ar64": lambda: _autoregressive(64, 0.9, 0.9, "Gaussian AR(1) in 16 bins, d = 64"),
    "ar64-wrong": lambda: _autoregressive(64, 0.7, 0.9, "the same rows, the predictor of another correlation"),
    "ar768": lambda: _autoregressive(768, 0.9, 0.9, "Gaussian AR(1) in 16 bins, d = 768"),
    "levels": _mixture_of_levels,
    "twonorm": _twonorm,
    "checkers": _checkers,
}
"""Laws by name: functions without arguments that make them."""
