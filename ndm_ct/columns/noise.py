r"""The noise at t = 0, chosen from the data.

The density of a model is that of its data with noise of deviation :math:`\sigma_0`. N rows show no structure finer than
the width of the kernel that predicts each row best from the others,

.. math::
    h = \arg\max_h \sum_i \log \sum_{j \ne i} N(x_i; x_j, h^2 I),

so :math:`\sigma_0 = h/8` hides nothing that the data can show.

References:
    Silverman, Density Estimation for Statistics and Data Analysis, 1986, section 3.4.4
"""

import math

import torch
from torch import Tensor

__all__ = ["compared", "gamma_of"]

_ROWS = 1500
_PART = 8.0
_LEAST, _MOST = -14.0, -9.0


def compared(y: Tensor) -> Tensor:
    """The rows of ``y`` that :func:`gamma_of` looks at."""
    return y[:: -(-len(y) // _ROWS)]


def gamma_of(y: Tensor) -> float:
    r""":math:`\gamma_{min} = 2 \log(h/8)`, between -14 and -9, on a grid of quarters.

    Args:
        y: rows ``(N, d)`` as the model gets them, with unit variances; 1500 of them, evenly spaced, are compared. Rows
            that are equal do not count as neighbours.

    Example:
        >>> y = torch.linspace(-2.0, 2.0, 500).unsqueeze(1)
        >>> gamma_of(y), gamma_of(torch.cat([y, 1e-2 * y]))
        (-9.0, -12.75)
    """
    y = compared(y).double()
    squares = torch.cdist(y, y).square()
    squares[squares < 1e-20] = math.inf
    best, found = -math.inf, _MOST
    for quarter in range(int(4 * _LEAST), int(4 * _MOST) + 1):
        variance = (_PART * math.exp(quarter / 8.0)) ** 2
        fit = torch.logsumexp(-0.5 * squares / variance, 1) - 0.5 * y.shape[1] * math.log(variance)
        score = float(fit.clamp_min(-1e3).mean())
        if score > best:
            best, found = score, quarter / 4.0
    return found
