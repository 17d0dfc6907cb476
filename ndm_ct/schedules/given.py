r"""Noise schedules given by a user's functions of time.

A schedule needs :math:`\alpha, \sigma` and their time derivatives. Here the functions are given and torch
differentiates them, once per evaluation, in forward mode:

.. math::
    (\alpha_t, \sigma_t) \mapsto (\alpha_t, \sigma_t, \alpha'_t, \sigma'_t), \qquad
    \log\mathrm{SNR} = \lambda(t) \mapsto \gamma = -\lambda, \quad
    \alpha^2 = \frac{1}{1 + e^{\gamma}}, \quad \sigma^2 = \frac{1}{1 + e^{-\gamma}} .
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ndm_ct._core.checks import of_time
from ndm_ct._core.config import Unconfigurable
from ndm_ct.schedules.base import Coefficients, Schedule
from ndm_ct.schedules.fixed import variance_preserving

__all__ = ["FromFunctions", "FromLogSNR"]

Function = Callable[[Tensor], Any]


class _Given(Schedule):
    """A schedule of functions that no file describes."""

    def config(self, own: list[Any] | None = None) -> dict[str, Any]:
        raise Unconfigurable(f"{type(self).__name__} holds functions of its user.")


class FromFunctions(_Given):
    r"""The schedule of two functions, :math:`\alpha(t)` and :math:`\sigma(t)`; torch finds their derivatives.

    Time runs from data at 0 to noise at 1. If yours runs the other way, pass ``lambda t: alpha(1 - t)``.

    Args:
        alpha: float64 time of any shape to :math:`\alpha_t`, of the same shape, or to one number; made of torch
            operations. It may be an ``nn.Module``, whose parameters are then trained with the model.
        sigma: likewise :math:`\sigma_t`, not negative. :math:`\sigma/\alpha` must increase.

    Raises:
        TypeError: a function is not callable, or does not take tensors.
        ValueError: a function returns another shape, NaN or a negative number, or :math:`\sigma/\alpha` does not
            increase by the derivatives that torch finds.

    Example:
        >>> import torch
        >>> schedule = FromFunctions(lambda t: 1 - t**2, lambda t: t)
        >>> schedule(torch.tensor(0.5, dtype=torch.float64)).dalpha
        tensor(-1., dtype=torch.float64)
    """

    def __init__(self, alpha: Function, sigma: Function) -> None:
        super().__init__()
        self._alpha, self._sigma = _function("alpha", alpha), _function("sigma", sigma)
        _validate(self)

    def forward(self, t: Tensor) -> Coefficients:
        alpha, dalpha = _with_derivative("alpha", self._alpha, t)
        sigma, dsigma = _with_derivative("sigma", self._sigma, t)
        return Coefficients(alpha, sigma, dalpha, dsigma)


class FromLogSNR(_Given):
    r"""The variance-preserving schedule of a function :math:`\lambda(t) = \log \alpha_t^2/\sigma_t^2`.

    Args:
        log_snr: float64 time of any shape to :math:`\lambda`, of the same shape and decreasing; made of torch
            operations. It may be an ``nn.Module``, whose parameters are then trained with the model.

    Raises:
        TypeError: the function is not callable, or does not take tensors.
        ValueError: it returns another shape or NaN, or does not decrease by the derivative that torch finds.

    Example:
        >>> import torch
        >>> schedule = FromLogSNR(lambda t: 10 - 15 * t)
        >>> schedule.gamma(torch.tensor(1.0, dtype=torch.float64))
        tensor(5., dtype=torch.float64)
    """

    def __init__(self, log_snr: Function) -> None:
        super().__init__()
        self._log_snr = _function("log_snr", log_snr)
        _validate(self)

    def forward(self, t: Tensor) -> Coefficients:
        log_snr, rate = _with_derivative("log_snr", self._log_snr, t)
        return variance_preserving(-log_snr, -rate)


def _function(name: str, function: Any) -> Function:
    if not callable(function):
        raise TypeError(f"{name} must be callable, {name}(t) with t of any shape, got {type(function).__name__}.")
    return function


def _with_derivative(name: str, function: Function, t: Tensor) -> tuple[Tensor, Tensor]:
    """The function of time and its derivative, each float64 and of the shape of t."""

    def evaluate(time: Tensor) -> Tensor:
        try:
            value = of_time(function, time)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{name} must take a tensor of times: {error}; make it of torch's functions, not numpy's."
            ) from error
        if value.shape not in (time.shape, torch.Size()):
            raise ValueError(
                f"{name} returned shape {tuple(value.shape)} for times of shape {tuple(time.shape)}; return the shape "
                "of t, or one number."
            )
        return value + torch.zeros_like(time)  # a number, which has no derivative, too

    t = t.contiguous()  # a time that is expanded to a batch has no place for its derivative
    both = torch.func.jvp(evaluate, (t,), (torch.ones_like(t),))
    return both[0], both[1]


def _validate(schedule: Schedule) -> None:
    """Raise unless the schedule is finite and its noise grows, looked at inside the interval."""
    with torch.no_grad():
        t = torch.linspace(0.0, 1.0, 66, dtype=torch.float64, device=schedule.device)[1:-1].reshape(32, 2)
        c = schedule(t)
    for name, value in (("alpha", c.alpha), ("sigma", c.sigma)):
        if not bool((value.isfinite() & (value > 0.0)).all()):
            raise ValueError(f"{name} must be positive and finite inside (0, 1), got {float(value.min()):g}.")
    growing = (c.wronskian > 0.0) & c.wronskian.isfinite()
    if not bool(growing.all()):
        raise ValueError(
            f"sigma/alpha must increase with t, which it does not at t={float(t[~growing][0]):.3g}, by the derivatives "
            "that torch finds. If your time runs from noise to data, pass functions of 1 - t; if a function uses "
            ".item() or .detach(), torch sees no derivative."
        )
