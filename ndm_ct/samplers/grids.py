r"""Time grids: the N + 1 times of a sampler with N steps, from t = 1 down to :math:`t_{min}`.

With :math:`\rho = \sigma/\alpha` and :math:`u_i = i/N`,

===============  ======================================================================================================
``"uniform"``    :math:`t_i = 1 - u_i (1 - t_{min})`
``"quadratic"``  :math:`\sqrt{t_i} = 1 - u_i (1 - \sqrt{t_{min}})`
``"logsnr"``     :math:`\log \rho_i` evenly from :math:`\rho_{max}` to :math:`\rho_{min}`
``"karras"``     :math:`\rho_i^{1/7}` evenly from :math:`\rho_{max}` to :math:`\rho_{min}`
``"edm"``        as "karras", with :math:`\rho` between 0.002 s and 80 s as far as the model reaches
===============  ======================================================================================================

:math:`\rho_{max}` is :math:`\rho(1)`, at most 1000 s, and :math:`\rho_{min}` is :math:`\rho(t_{min})`. Every grid
begins at 1, where the prior is, and ends at :math:`t_{min}`. The scale s is the schedule's ``preserved_std``, which is
1 for variance-preserving schedules. With constant alpha s is infinite, and "karras" and "edm" are the same grid.

References:
    Song, Meng and Ermon, Denoising Diffusion Implicit Models, appendix D.2 (quadratic), https://arxiv.org/abs/2010.02502
    Lu et al., DPM-Solver (uniform log-SNR), https://arxiv.org/abs/2206.00927
    Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, eq. 5,
    https://arxiv.org/abs/2206.00364
"""

import math

import torch
from torch import Tensor

from ndm_ct._core import checks as _shapes
from ndm_ct.schedules.base import Schedule

__all__ = ["GRIDS", "time_grid"]

GRIDS = ("uniform", "logsnr", "quadratic", "karras", "edm")
"""Names of grids."""

Grid = str | Tensor

_KARRAS_POWER = 7.0
_EDM_RANGE = (0.002, 80.0)


def time_grid(schedule: Schedule, t_min: float, steps: int, grid: Grid = "uniform") -> Tensor:
    r"""The times of a sampler.

    Args:
        schedule: :math:`\alpha, \sigma`.
        t_min: the last time.
        steps: N.
        grid: a name of ``GRIDS``, or the N + 1 times themselves, decreasing from 1 to ``t_min``.

    Returns:
        Shape ``(N + 1,)``, float64, strictly decreasing.

    Raises:
        ValueError: the name is unknown, ``steps`` is below 1, or the times are not N + 1 numbers that decrease from 1
            to ``t_min``.

    Example:
        >>> from ndm_ct.schedules import LinearLogSNR
        >>> time_grid(LinearLogSNR(-5.0, 5.0), 0.0, 4)
        tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000], dtype=torch.float64)
    """
    _shapes.validate_count("steps", steps)
    if isinstance(grid, Tensor):
        return _validated(grid, t_min, steps, schedule.device)
    _shapes.choose("grid", grid, GRIDS)
    u = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64, device=schedule.device)
    if grid == "uniform":
        times = 1.0 + u * (t_min - 1.0)
    elif grid == "quadratic":
        times = (1.0 + u * (math.sqrt(t_min) - 1.0)) ** 2
    else:
        times = _by_noise(schedule, t_min, u, grid)
    times[0], times[-1] = 1.0, t_min
    if not bool((times.diff() < 0.0).all()):
        raise ValueError(
            f"grid={grid!r} with steps={steps} puts two of its times at the same place for this schedule; take fewer "
            "steps or grid='uniform'."
        )
    return times


def _by_noise(schedule: Schedule, t_min: float, u: Tensor, grid: str) -> Tensor:
    with torch.no_grad():
        ends = schedule(torch.tensor([1.0, t_min], dtype=torch.float64, device=u.device))
        high, low = (ends.sigma / ends.alpha).clamp(max=schedule.largest_noise)
        if grid == "logsnr":
            if float(low) == 0.0:
                raise ValueError(
                    f"grid='logsnr' has no last step to sigma = 0 at t_min={t_min:g}; take 'karras', 'edm', "
                    "'quadratic' or 'uniform'."
                )
            noise = torch.exp(high.log() + u * (low.log() - high.log()))
        else:
            unit = schedule.preserved_std
            if grid == "edm" and math.isfinite(unit):
                high, low = high.clamp(max=unit * _EDM_RANGE[1]), low.clamp(min=unit * _EDM_RANGE[0])
            power = 1.0 / _KARRAS_POWER
            noise = (high**power + u * (low**power - high**power)) ** _KARRAS_POWER
        return schedule.time_at(torch.atan(noise))


def _validated(grid: Tensor, t_min: float, steps: int, device: torch.device) -> Tensor:
    times = grid.detach().to(dtype=torch.float64, device=device)
    if times.ndim != 1 or len(times) != steps + 1:
        raise ValueError(
            f"grid has shape {tuple(times.shape)}, expected ({steps + 1},) for {steps} steps; leave steps out, "
            "it follows from the grid."
        )
    if not bool((times.diff() < 0.0).all()):
        raise ValueError(f"grid must decrease strictly, from 1 (noise) to t_min (data); got {times.tolist()}.")
    first, last = float(times[0]), float(times[-1])
    if first != 1.0 or last != t_min:
        raise ValueError(
            f"grid runs from {first!r} to {last!r}, but sampling starts at the prior, t = 1, and ends at t_min = "
            f"{t_min!r}; begin and end the grid there, or build the model with another t_min=."
        )
    return times
