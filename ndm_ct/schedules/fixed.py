r"""Noise schedules with known formulas, one that is learned, and one interpolated from a table.

References:
    Kingma et al., Variational Diffusion Models, https://arxiv.org/abs/2107.00630
    Song et al., Score-Based Generative Modeling through SDEs, https://arxiv.org/abs/2011.13456
    Nichol and Dhariwal, Improved Denoising Diffusion, https://arxiv.org/abs/2102.09672
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ndm_ct._core.checks import some, validate_count, validate_number
from ndm_ct.schedules.base import Coefficients, Schedule

__all__ = [
    "Cosine",
    "LearnedLogSNR",
    "LinearLogSNR",
    "Rectified",
    "StraightToNoise",
    "SubVariancePreserving",
    "Tabulated",
    "Trigonometric",
    "VarianceExploding",
    "VariancePreserving",
    "variance_preserving",
]


def variance_preserving(gamma: Tensor, dgamma: Tensor) -> Coefficients:
    r"""Coefficients with :math:`\alpha^2 + \sigma^2 = 1` from :math:`\gamma, \gamma'`."""
    alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
    return Coefficients(alpha, sigma, -0.5 * alpha * sigma**2 * dgamma, 0.5 * sigma * alpha**2 * dgamma)


def _increasing(name_low: str, low: float, name_high: str, high: float) -> None:
    for name, value in ((name_low, low), (name_high, high)):
        validate_number(name, value)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{name_low} must be below {name_high}, both finite; got {low!r} and {high!r}.")


class LinearLogSNR(Schedule):
    r"""Variance preserving, :math:`\gamma(t) = \gamma_{min} + (\gamma_{max} - \gamma_{min}) t`.

    Args:
        gamma_min: :math:`\gamma(0)`; for 8-bit data in [-1, 1], -13.3 puts the noise well below one bin.
        gamma_max: :math:`\gamma(1)`.
    """

    def __init__(self, gamma_min: float = -13.3, gamma_max: float = 5.0) -> None:
        super().__init__()
        _increasing("gamma_min", gamma_min, "gamma_max", gamma_max)
        self.gamma_min, self.gamma_max = gamma_min, gamma_max

    def forward(self, t: Tensor) -> Coefficients:
        slope = self.gamma_max - self.gamma_min
        return variance_preserving(self.gamma_min + slope * t, torch.full_like(t, slope))

    def time_at(self, angle: Tensor) -> Tensor:
        gamma = 2.0 * torch.tan(angle).log()
        return ((gamma - self.gamma_min) / (self.gamma_max - self.gamma_min)).clamp(0.0, 1.0)


class VariancePreserving(Schedule):
    r"""The VP-SDE: :math:`\alpha = e^{-B/2},\ \sigma^2 = 1 - e^{-B}`,
    :math:`B = \beta_{min} t + (\beta_{max}-\beta_{min}) t^2/2`.

    Args:
        beta_min: :math:`\beta(0)`.
        beta_max: :math:`\beta(1)`.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        super().__init__()
        _validate_beta(beta_min, beta_max)
        self.beta_min, self.beta_max = beta_min, beta_max

    def forward(self, t: Tensor) -> Coefficients:
        integral, beta = _linear_beta(t, self.beta_min, self.beta_max)
        alpha = torch.exp(-0.5 * integral)
        sigma = torch.sqrt(-torch.expm1(-integral))
        return Coefficients(alpha, sigma, -0.5 * beta * alpha, 0.5 * beta * alpha**2 / sigma)


class SubVariancePreserving(VariancePreserving):
    r"""The sub-VP SDE: :math:`\alpha = e^{-B/2},\ \sigma = 1 - e^{-B}`, with the B of :class:`VariancePreserving`.

    Args:
        beta_min: :math:`\beta(0)`.
        beta_max: :math:`\beta(1)`.
    """

    def forward(self, t: Tensor) -> Coefficients:
        integral, beta = _linear_beta(t, self.beta_min, self.beta_max)
        alpha = torch.exp(-0.5 * integral)
        return Coefficients(alpha, -torch.expm1(-integral), -0.5 * beta * alpha, beta * alpha**2)


def _validate_beta(beta_min: float, beta_max: float) -> None:
    for name, value in (("beta_min", beta_min), ("beta_max", beta_max)):
        validate_number(name, value)
    if not 0.0 < beta_min <= beta_max < math.inf:
        raise ValueError(f"0 < beta_min <= beta_max must hold, got {beta_min!r} and {beta_max!r}.")


def _linear_beta(t: Tensor, beta_min: float, beta_max: float) -> tuple[Tensor, Tensor]:
    slope = beta_max - beta_min
    return t * (beta_min + 0.5 * slope * t), beta_min + slope * t


class VarianceExploding(Schedule):
    r"""The VE-SDE: :math:`\alpha = 1,\ \sigma = \sigma_{min} (\sigma_{max}/\sigma_{min})^t`.

    Args:
        sigma_min: :math:`\sigma_0 > 0`.
        sigma_max: :math:`\sigma_1`, well above the spread of the data.
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        super().__init__()
        validate_number("sigma_min", sigma_min)
        if not sigma_min > 0.0:
            raise ValueError(f"sigma_min must be positive, got {sigma_min!r}.")
        _increasing("sigma_min", sigma_min, "sigma_max", sigma_max)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def forward(self, t: Tensor) -> Coefficients:
        rate = math.log(self.sigma_max / self.sigma_min)
        sigma = self.sigma_min * torch.exp(rate * t)
        return Coefficients(torch.ones_like(t), sigma, torch.zeros_like(t), rate * sigma)


class Cosine(Schedule):
    r"""The cosine schedule: :math:`\alpha = \cos\theta/\cos\theta_0,\ \sigma^2 = 1 - \alpha^2`,
    :math:`\theta = \frac{\pi}{2}\frac{t + s}{1 + s}`; :math:`\alpha_1 = 0`.

    Args:
        offset: s, which keeps the noise from vanishing too fast near t = 0.
    """

    def __init__(self, offset: float = 0.008) -> None:
        super().__init__()
        validate_number("offset", offset)
        if not 0.0 <= offset < 1.0:
            raise ValueError(f"offset must lie in [0, 1), got {offset!r}.")
        self.offset = offset

    def forward(self, t: Tensor) -> Coefficients:
        rate = 0.5 * math.pi / (1.0 + self.offset)
        start = rate * self.offset
        scale = math.cos(start)
        # cos(theta) = sin(pi/2 - theta), exact as t -> 1, and cos^2 a - cos^2 b = sin(b - a) sin(b + a) as t -> 0.
        alpha = torch.sin(rate * (1.0 - t)) / scale
        dalpha = -rate * torch.sin(start + rate * t) / scale
        sigma = torch.sqrt(torch.sin(rate * t) * torch.sin(2.0 * start + rate * t)) / scale
        return Coefficients(alpha, sigma, dalpha, -alpha * dalpha / sigma)


class Rectified(Schedule):
    r"""The straight path of flow matching and rectified flow: :math:`\alpha = 1 - t,\ \sigma = t`."""

    def forward(self, t: Tensor) -> Coefficients:
        one = torch.ones_like(t)
        return Coefficients(1.0 - t, t, -one, one)

    def time_at(self, angle: Tensor) -> Tensor:
        return (torch.sin(angle) / (torch.sin(angle) + torch.cos(angle))).clamp(0.0, 1.0)


class Trigonometric(Schedule):
    r"""The trigonometric interpolant: :math:`\alpha = \cos(\pi t/2),\ \sigma = \sin(\pi t/2)`."""

    def forward(self, t: Tensor) -> Coefficients:
        rate = 0.5 * math.pi
        alpha, sigma = torch.sin(rate * (1.0 - t)), torch.sin(rate * t)
        return Coefficients(alpha, sigma, -rate * sigma, rate * alpha)


class StraightToNoise(Schedule):
    r"""Straight means and geometric noise: :math:`\alpha = 1 - (1 - \alpha_1) t,\ \sigma = \delta^{1 - t}` (NFDM).

    With :math:`\alpha_1 > 0` the log-SNR stays finite, which a scale of the noise needs.

    Args:
        delta: :math:`\delta = \sigma(0)`; :math:`\sigma(1) = 1`.
        end: :math:`\alpha_1 = \alpha(1)`.

    References:
        Bartosh, Vetrov and Naesseth, Neural Flow Diffusion Models, https://arxiv.org/abs/2404.12940
    """

    def __init__(self, delta: float = 0.01, end: float = 1e-3) -> None:
        super().__init__()
        for name, value in (("delta", delta), ("end", end)):
            validate_number(name, value)
            if not 0.0 < value < 1.0:
                raise ValueError(f"{name} must lie in (0, 1), got {value!r}.")
        self.delta, self.end = delta, end

    def forward(self, t: Tensor) -> Coefficients:
        rate = -math.log(self.delta)
        sigma = torch.exp(-rate * (1.0 - t))
        slope = -(1.0 - self.end)
        return Coefficients(1.0 + slope * t, sigma, torch.full_like(t, slope), rate * sigma)


class LearnedLogSNR(Schedule):
    r"""Variance preserving with a learned monotone :math:`\gamma` between fixed or learned ends.

    .. math::
        \gamma(t) = \gamma_{min} + (\gamma_{max} - \gamma_{min}) \frac{h(t) - h(0)}{h(1) - h(0)}, \qquad
        h(t) = a_0 t + \sum_k a_k \operatorname{sigmoid}(b_k (t - c_k)), \quad a, b > 0 .

    It starts nearly linear: the sigmoids begin with a small share of h. With F the identity the bound depends on the
    ends alone; between them :math:`\gamma` matters to the variance of its estimate if times are drawn evenly in t. Here
    times are drawn uniformly in :math:`\gamma`; their density can be learned (:mod:`ndm_ct.objectives.time_samplers`).

    Args:
        gamma_min: :math:`\gamma(0)`.
        gamma_max: :math:`\gamma(1)`.
        features: number of sigmoids.
        learn_ends: whether :math:`\gamma(0)` and :math:`\log(\gamma(1) - \gamma(0))` are learned too, from there. Use
            it for integer data decoded over levels, or for densities that are smooth at the scale of the smallest
            noise; otherwise the bound improves without limit as :math:`\gamma(0)` decreases.

    References:
        Kingma et al., Variational Diffusion Models, section 6 and appendix H, https://arxiv.org/abs/2107.00630
    """

    def __init__(
        self, gamma_min: float = -13.3, gamma_max: float = 5.0, features: int = 32, learn_ends: bool = False
    ) -> None:
        super().__init__()
        _increasing("gamma_min", gamma_min, "gamma_max", gamma_max)
        validate_count("features", features)
        self.gamma_min, self.gamma_max, self.features, self.learn_ends = gamma_min, gamma_max, features, learn_ends
        if learn_ends:
            self.first = nn.Parameter(torch.tensor(float(gamma_min)))
            self.log_range = nn.Parameter(torch.tensor(math.log(gamma_max - gamma_min)))
        self.slope = nn.Parameter(torch.tensor(1.0))
        self.weight = nn.Parameter(torch.full((features,), math.log(0.1 / features)))
        self.steepness = nn.Parameter(torch.full((features,), 2.0))
        self.centre = nn.Parameter(torch.linspace(0.0, 1.0, features))

    def _h(self, t: Tensor) -> tuple[Tensor, Tensor]:
        slope = functional.softplus(self.slope.double())
        weight, steepness = self.weight.double().exp(), self.steepness.double().exp()
        bump = torch.sigmoid(steepness * (t[..., None] - self.centre.double()))
        value = slope * t + (weight * bump).sum(-1)
        return value, slope + (weight * steepness * bump * (1.0 - bump)).sum(-1)

    def forward(self, t: Tensor) -> Coefficients:
        value, rate = self._h(t)
        ends, _ = self._h(torch.tensor([0.0, 1.0], dtype=t.dtype, device=t.device))
        first: float | Tensor = self.gamma_min
        total: float | Tensor = self.gamma_max - self.gamma_min
        if self.learn_ends:
            first, total = self.first.double(), self.log_range.double().exp()
        slope = total / (ends[1] - ends[0])
        return variance_preserving(first + slope * (value - ends[0]), slope * rate)


class Tabulated(Schedule):
    r"""The schedule of a network trained in discrete time, made continuous: its log-SNR, interpolated.

    The k-th of K table entries sits at t = k/(K-1). Between them :math:`\gamma` is the monotone cubic of Fritsch and
    Butland, so :math:`\gamma'` is continuous and positive. Variance preserving.

    Args:
        alphas_cumprod: :math:`\alpha_k^2`, K >= 2 strictly decreasing values in (0, 1), least noise first.

    References:
        Fritsch and Butland, A Method for Constructing Local Monotone Piecewise Cubic Interpolants (1984)
    """

    def __init__(self, alphas_cumprod: Sequence[float] | Tensor) -> None:
        super().__init__()
        table = as_table(alphas_cumprod)
        if table.numel() < 2:
            raise ValueError(f"alphas_cumprod needs at least 2 entries, got {table.numel()}.")
        wrong = torch.nonzero(~((table > 0) & (table < 1) & torch.cat([table[:1] > 0, table.diff() < 0])))
        if len(wrong) > 0:
            k = int(wrong[0])
            near = ", ".join(f"{value:.6g}" for value in table[max(0, k - 1) : k + 2].tolist())
            raise ValueError(
                "alphas_cumprod must lie strictly between 0 and 1 and decrease strictly, noise growing; entries "
                f"{some(wrong.flatten().tolist())} do not ({near} around entry {k}). "
                "A table rounded to few digits has equal entries: pass it in float64."
            )
        self.alphas_cumprod = tuple(table.tolist())
        # Plain attributes, not buffers: .half() or .float() on the model must not round the table.
        self._gamma = torch.log1p(-table) - table.log()
        self._slope = _monotone_slopes(self._gamma)

    def forward(self, t: Tensor) -> Coefficients:
        gamma_table, slope_table = self._gamma.to(t.device), self._slope.to(t.device)
        intervals = gamma_table.numel() - 1
        position = t * intervals
        k = position.detach().floor().clamp(0, intervals - 1).long()
        u = position - k
        y0, y1 = gamma_table[k], gamma_table[k + 1]
        d0, d1 = slope_table[k], slope_table[k + 1]
        c2, c3 = 3.0 * (y1 - y0) - 2.0 * d0 - d1, d0 + d1 - 2.0 * (y1 - y0)
        gamma = y0 + u * (d0 + u * (c2 + u * c3))
        return variance_preserving(gamma, (d0 + u * (2.0 * c2 + 3.0 * u * c3)) * intervals)


def as_table(alphas_cumprod: Sequence[float] | Tensor) -> Tensor:
    """The entries of a table, float64, on the CPU.

    Raises:
        TypeError: neither a sequence of numbers nor a tensor.
    """
    try:
        return torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu").detach().flatten()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"alphas_cumprod must be a sequence of numbers or a tensor ({error}).") from error


def _monotone_slopes(y: Tensor) -> Tensor:
    """Slopes at unit-spaced knots that keep a Hermite cubic monotone: harmonic means, one-sided at the ends."""
    secant = y.diff()
    inner = 2.0 * secant[:-1] * secant[1:] / (secant[:-1] + secant[1:])
    return torch.cat([secant[:1], inner, secant[-1:]])
