r"""Integer data: levels k = 0 ... L-1 as bins of a real interval.

.. math::
    x_k = lo + (hi - lo)\,\frac{k + \frac12}{L}, \qquad h = \frac{hi - lo}{2 L}

Level k owns the bin :math:`[x_k - h, x_k + h]`. Dequantisation ``"uniform"`` adds noise uniform in the bin,
:math:`\log P(k) \ge E[\log p(x_k + u)] + d \log 2h`. Dequantisation ``"process"`` adds the noise that the process
itself adds at :math:`t_{min}`, truncated to the bin: with :math:`z_0 = \alpha_0 x_k + \sigma_0 \epsilon`,
:math:`|\epsilon| \le \tau = h \alpha_0/\sigma_0`,

.. math::
    \log P(k) \ge E[\log p_0(z_0)]
    + d \Bigl( \tfrac12 \log 2 \pi e \sigma_0^2 + \log Z - \frac{\tau \phi(\tau)}{Z} \Bigr), \qquad
    Z = \operatorname{erf}(\tau/\sqrt 2) .

Use "uniform" for a model trained on uniformly noised data, and "process" for a model trained on the bin centres, whose
:math:`\sigma_0/\alpha_0` should be about a third of h.

References:
    Zheng et al., Improved Techniques for Maximum Likelihood Estimation for Diffusion ODEs, section 5,
    https://arxiv.org/abs/2305.03935
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ndm_ct._core.checks import (
    is_whole,
    some,
    sum_event,
    validate_dense,
    validate_number,
    validate_values,
)
from ndm_ct._core.noise import GeneratorLike, as_randomness, uniform

__all__ = ["DEQUANTISATIONS", "Quantisation", "rename_earlier", "resolve_optional", "resolve_quantisation"]

DEQUANTISATIONS = ("uniform", "process")
"""Names of ``dequantisation``."""

_EARLIER_NAMES = {"truncated-normal": "process", "centres": "process"}

_MOST_LEVELS = 2**32

_AT_ONCE = 2**22
"""Terms of the softmax over levels that are in memory at a time."""


@dataclass(frozen=True, init=False)
class Quantisation:
    """The bins of integer data: how many levels there are, and where the network's inputs have them.

    Give ``edges`` or ``centres``, not both. Bytes mapped by ``x / 127.5 - 1`` (``ToTensor`` and ``Normalize(.5, .5)``)
    have ``centres=(-1, 1)``; mapped by ``x / 255`` (``ToTensor`` alone) they have ``centres=(0, 1)``. Without either
    argument the bins fill (-1, 1), which is how :func:`ndm_ct.fit` places a number of levels.

    Args:
        levels: L >= 2, number of integer values.
        edges: (lo, hi), the lower edge of the first bin and the upper edge of the last.
        centres: (lo, hi), the values of the first level and of the last.

    Example:
        >>> bins = Quantisation(levels=4)
        >>> bins.centres(torch.tensor([0, 3]), torch.float64)
        tensor([-0.7500,  0.7500], dtype=torch.float64)
        >>> Quantisation(5, centres=(-1.0, 1.0)).centres(torch.tensor([0, 2]), torch.float32)
        tensor([-1.,  0.])
    """

    levels: int
    edges: tuple[float, float]
    placed: bool = field(repr=False, compare=False)  # whether edges or centres were given

    def __init__(
        self, levels: int = 256, *, edges: tuple[float, float] | None = None, centres: tuple[float, float] | None = None
    ) -> None:
        if not is_whole(levels) or not 2 <= levels <= _MOST_LEVELS:
            raise ValueError(f"levels must be an int of at least 2, and at most {_MOST_LEVELS}, got {levels!r}.")
        if edges is not None and centres is not None:
            raise ValueError(f"edges={edges!r} and centres={centres!r} both say where the levels lie; give one.")
        if centres is None:
            low, high = _validated_interval("edges", (-1.0, 1.0) if edges is None else edges)
        else:
            low, high = _validated_interval("centres", centres)
            half = 0.5 * (high - low) / (levels - 1)
            low, high = low - half, high + half
        object.__setattr__(self, "levels", int(levels))
        object.__setattr__(self, "edges", (low, high))
        object.__setattr__(self, "placed", edges is not None or centres is not None)

    def validate_placed(self, adapted: bool) -> None:
        """Raises ValueError if nobody said where the levels of an adapted network lie."""
        if adapted and not self.placed:
            L = self.levels
            raise ValueError(
                f"the network comes from elsewhere (ndm_ct.adapters), so quantisation has to say where its {L} levels "
                f"lie. Pass Quantisation({L}, centres=(-1, 1)) if it was trained on x / {(L - 1) / 2:g} - 1 (ToTensor "
                f"and Normalize(.5, .5)), centres=(0, 1) for x / {L - 1} (ToTensor alone), and edges=(-1, 1) if the "
                "bins filled (-1, 1)."
            )

    @property
    def half_width(self) -> float:
        """h, half the width of a bin."""
        return (self.edges[1] - self.edges[0]) / (2.0 * self.levels)

    def validate(self, x: Any, name: str = "x") -> Tensor:
        """Check that ``x`` is an integer tensor with values in [0, levels).

        Args:
            x: what was passed.
            name: name of the argument, for messages.

        Raises:
            TypeError: not a dense tensor, or not of an integer dtype.
            ValueError: values outside [0, levels), with their rows.
        """
        validate_dense(x, name)
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise TypeError(
                f"{name} has dtype {x.dtype}; with quantisation={self.levels}, bits per dimension are defined for "
                f"integer levels 0 ... {self.levels - 1}. Undo your scaling and convert with .to(torch.uint8), or use "
                "loglik for continuous data."
            )
        validate_values(x, name)
        if x.ndim == 0:
            raise ValueError(f"{name} has no axis of rows; expected shape (B, *E).")
        level = x.long()  # wide unsigned integers have few operations of their own, and their largest become negative
        outside = (level < 0) | (level >= self.levels)
        if bool(outside.any()):
            rows = torch.nonzero(outside.flatten(1).any(1) if x.ndim > 1 else outside).flatten().tolist()
            raise ValueError(
                f"{name} has values outside [0, {self.levels}) in rows {some(rows)} (smallest {int(level.min())}, "
                f"largest {int(level.max())}); pass a quantisation with enough levels."
            )
        return x

    def centres(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Bin centres :math:`x_k`, shape of ``x``.

        Args:
            x: integers from 0 to the number of levels less one.
            dtype: of the result.
        """
        low, high = self.edges
        return low + (high - low) * (x.to(dtype) + 0.5) / self.levels

    def nearest(self, x: Tensor) -> Tensor:
        """Levels of real values, int64: the bin each lies in, the outermost ones for values beyond."""
        return ((x.double() - self.edges[0]) / (2.0 * self.half_width)).floor().clamp(0, self.levels - 1).long()

    def validate_centres(self, x: Tensor, name: str = "x") -> None:
        """Check that real ``x`` are bin centres, up to the rounding of their dtype.

        Args:
            x: the values.
            name: name of the argument, for messages.

        Raises:
            ValueError: values elsewhere, with their rows, or more levels than the dtype tells apart.
        """
        width = 2.0 * self.half_width
        slack = 1e-3 + 2.0 * torch.finfo(x.dtype).eps * max(map(abs, self.edges)) / width
        if slack > 0.1:
            raise ValueError(f"{name} in {x.dtype} cannot tell {self.levels} levels apart; use torch.float64.")
        level = (x.double() - self.edges[0]) / width - 0.5
        away = (level - level.round()).abs() > slack
        away |= (level.round() < 0) | (level.round() >= self.levels)
        if bool(away.any()):
            rows = torch.nonzero(away.reshape(x.shape[0], -1).any(1)).flatten().tolist()
            raise ValueError(
                f"{name} is not at the bin centres of {self.levels} levels with edges {self.edges} in rows "
                f"{some(rows)} (values from {float(x.min()):.4g} to {float(x.max()):.4g}). A log-probability belongs "
                "to levels: pass quantisation.centres(levels); or say where they lie, for example Quantisation("
                f"{self.levels}, centres=(-1, 1)) for x / {(self.levels - 1) / 2:g} - 1; or leave quantisation out."
            )

    def decoder_log_prob(self, z: Tensor, x: Tensor, gamma: Tensor) -> Tensor:
        r"""Log-probability of levels under the softmax of :math:`-\tfrac12 e^{-\gamma} (z - x_k)^2`, nats, ``(B,)``.

        Levels farther from z than ten times :math:`e^{\gamma/2}` are left out: they are below the rounding. The others
        are summed a bounded number at a time.

        Args:
            z: :math:`z_0/\alpha_0`, shape ``(B, *E)``.
            x: the values of the levels, bin centres, shape ``(B, *E)``.
            gamma: broadcasts to z.
        """
        precision = torch.exp(-gamma).expand_as(z)
        noise = float(torch.exp(0.5 * gamma.detach()).max()) if gamma.numel() else 0.0
        reach = math.ceil(min(10.0 * noise / (2.0 * self.half_width), float(self.levels))) + 1
        count = min(2 * reach + 1, self.levels)
        steps = torch.arange(count, device=z.device)

        def log_sum(z: Tensor, precision: Tensor) -> Tensor:
            first = (self.nearest(z) - reach).clamp(0, self.levels - count)
            values = self.centres(first[:, None] + steps, z.dtype)
            return torch.logsumexp(-0.5 * (z[:, None] - values) ** 2 * precision[:, None], 1)

        parts = (part.flatten().split(max(1, _AT_ONCE // count)) for part in (z, precision))
        total = torch.cat([log_sum(*part) for part in zip(*parts, strict=True)]).reshape(z.shape)
        return sum_event(-0.5 * (z - x) ** 2 * precision - total)

    def uniform(self, x: Tensor, dtype: torch.dtype, generator: GeneratorLike) -> Tensor:
        """Bin centres plus noise uniform in the bin, shape of ``x``.

        Args:
            x: integers from 0 to the number of levels less one.
            dtype: of the result.
            generator: source of the noise: a seed, a generator, or one per row.
        """
        generator = as_randomness(generator, len(x), x.device, "uniform")
        noise = uniform(x.shape, generator, dtype, x.device)
        return self.centres(x, dtype) + (2.0 * noise - 1.0) * self.half_width

    @property
    def uniform_offset(self) -> float:
        """log 2h, nats per dimension: what uniform dequantisation adds to the log-density."""
        return math.log(2.0 * self.half_width)

    def truncated_normal(
        self, x: Tensor, alpha: float, sigma: float, dtype: torch.dtype, generator: GeneratorLike
    ) -> Tensor:
        r""":math:`z_0 = \alpha_0 x_k + \sigma_0 \epsilon` with :math:`|\epsilon| \le \tau`, by inverting its CDF.

        Args:
            x: integers from 0 to the number of levels less one.
            alpha: :math:`\alpha_0`.
            sigma: :math:`\sigma_0`.
            dtype: of the result.
            generator: source of the noise: a seed, a generator, or one per row.
        """
        tau = self.half_width * alpha / sigma
        generator = as_randomness(generator, len(x), x.device, "truncated_normal")
        u = uniform(x.shape, generator, torch.float64, x.device)
        mass = math.erf(tau / math.sqrt(2.0))
        eps = math.sqrt(2.0) * torch.erfinv((2.0 * u - 1.0) * mass)
        return (alpha * self.centres(x, torch.float64) + sigma * eps.clamp(-tau, tau)).to(dtype)

    def truncated_normal_offset(self, alpha: float, sigma: float) -> float:
        """Entropy of the truncated normal, nats per dimension: what it adds to the log-density."""
        tau = self.half_width * alpha / sigma
        mass = math.erf(tau / math.sqrt(2.0))
        density = math.exp(-0.5 * tau**2) / math.sqrt(2.0 * math.pi)
        return 0.5 * math.log(2.0 * math.pi * math.e * sigma**2) + math.log(mass) - tau * density / mass

    def truncated_normal_log_prob(self, z: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
        r"""Log-density of :math:`z_0` given its level under that truncated normal, float64, nats, ``(B,)``.

        Args:
            z: :math:`z_0`, shape ``(B, *E)``, inside the bins.
            x: the levels.
            alpha: :math:`\alpha_0`.
            sigma: :math:`\sigma_0`.
        """
        eps = (z.double() - alpha * self.centres(x, torch.float64)) / sigma
        mass = math.erf(self.half_width * alpha / sigma / math.sqrt(2.0))
        return -sum_event(0.5 * eps**2 + math.log(sigma * mass * math.sqrt(2.0 * math.pi)))


def _validated_interval(name: str, interval: Any) -> tuple[float, float]:
    message = f"{name} must be an interval (lo, hi) with lo < hi, got {interval!r}."
    if not (isinstance(interval, tuple | list) and len(interval) == 2):
        raise ValueError(message)
    low, high = interval
    for end in (low, high):
        validate_number(name, end)
    if not (low < high and math.isfinite(high - low)):
        raise ValueError(message)
    return float(low), float(high)


def resolve_quantisation(quantisation: Any) -> Quantisation:
    """The bins that a ``quantisation=`` option means: an object, or a number of levels whose bins fill (-1, 1).

    Raises:
        TypeError: neither an int nor a :class:`Quantisation`.
        ValueError: fewer than two levels, or too many.
    """
    if isinstance(quantisation, Quantisation):
        return quantisation
    if not is_whole(quantisation):
        raise TypeError(
            "quantisation must be a number of levels or an ndm_ct.quantisation.Quantisation, got "
            f"{type(quantisation).__name__}; pass quantisation=256."
        )
    try:
        return Quantisation(quantisation)
    except ValueError as error:
        raise ValueError(f"quantisation={quantisation!r} is not a number of levels: {error}") from error


def resolve_optional(quantisation: Any) -> Quantisation | None:
    """The bins that a ``quantisation=`` option means, where None is real-valued data."""
    return None if quantisation is None else resolve_quantisation(quantisation)


def rename_earlier(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from a file under the names of today: earlier ones of ``dequantisation`` and of the bins' edges."""
    name, bins = settings.get("dequantisation"), settings.get("quantisation")
    renamed = dict(settings)
    if isinstance(name, str):
        renamed["dequantisation"] = _EARLIER_NAMES.get(name, name)
    if isinstance(bins, Mapping):
        renamed["quantisation"] = {"edges" if key == "range" else key: value for key, value in bins.items()}
    return renamed
