r"""Whether the levels of integer data lie where a network's training had them.

A network trained elsewhere knows its data as values :math:`x_k`, and the user says which. Every placement of the same
levels asks the same question of the network: find k from :math:`k + 2 m \epsilon`, noise of m bins' half-widths. A
denoiser answers best where it was trained,

.. math::
    L(\text{placement}) = E \Bigl\| \frac{\hat x(\alpha (x_k + m h \epsilon), t) - x_k}{h} \Bigr\|^2, \qquad
    \frac{\sigma_t}{\alpha_t} = m h .

So a placement with a smaller L than that of the user speaks against it.
"""

import math
import warnings

import torch
from torch import Tensor

from ndm_ct._core.checks import event_size
from ndm_ct._core.conditioning import Conditioning
from ndm_ct._core.seeds import make_generator
from ndm_ct.model import NDM
from ndm_ct.quantisation import Quantisation

__all__ = ["usual_placements", "verify_placement"]

ROWS = 32
"""Rows that are denoised, once per placement."""

HALF_WIDTHS = 2.0
"""m, where the noise at t_min allows it: the nearest levels are then told apart, but not without the others' help."""

SIGNIFICANT, NOTABLE = 5.0, 0.02
"""Standard errors, and share of L, by which another placement has to be better."""


def usual_placements(levels: int) -> list[Quantisation]:
    """Where ordinary preprocessing puts levels.

    Args:
        levels: their number.
    """
    ends = ((-1.0, 1.0), (0.0, 1.0))
    return [Quantisation(levels, centres=pair) for pair in ends] + [Quantisation(levels, edges=pair) for pair in ends]


def verify_placement(model: NDM, bins: Quantisation, x: Tensor, cond: Conditioning) -> None:
    """Compare the user's placement with the usual ones, once per model that was trained elsewhere.

    Args:
        model: the model.
        bins: the placement.
        x: integer data, shape ``(B, *E)``.
        cond: their conditioning.

    Warns:
        UserWarning: the network denoises better if the levels lie elsewhere.
    """
    if not (model.adapted and model.checks) or len(x) < 2 or model.checked.get("placement") == bins:
        return
    places = torch.arange(min(len(x), ROWS), device=x.device)
    others = [each for each in usual_placements(bins.levels) if each.edges != bins.edges]
    with model.evaluating(), torch.no_grad():
        losses = _losses(model, [bins, *others], x[places], cond.take(places))
    gain = losses[0] - losses[1:]
    mean, error = gain.mean(1), gain.std(1) / math.sqrt(len(places))
    best = int((mean - SIGNIFICANT * error).argmax())
    if mean[best] > SIGNIFICANT * error[best] and mean[best] > NOTABLE * losses[0].mean():
        warnings.warn(
            f"the network denoises better by {float(mean[best] / losses[0].mean()):.0%} if its levels lie elsewhere: "
            f"{bins} was given, {others[best]} fits better. Bits per dimension of misplaced levels are too large; look "
            "at the preprocessing of the training.",
            stacklevel=3,
        )
    model.checked["placement"] = bins


def _losses(model: NDM, placements: list[Quantisation], x: Tensor, cond: Conditioning) -> Tensor:
    """L of each placement and row, ``(placements, B)``, under common noise."""
    schedule, dtype = model.schedule, model.dtype or torch.get_default_dtype()
    least = schedule(torch.tensor(model.t_min, dtype=torch.float64, device=x.device))
    m = max([HALF_WIDTHS, *(float(least.sigma / least.alpha) / each.half_width for each in placements)])
    eps = torch.randn(x.shape, generator=make_generator("placement", device=x.device), dtype=dtype, device=x.device)
    found = []
    for bins in placements:
        angle = torch.tensor(math.atan(m * bins.half_width), dtype=torch.float64, device=x.device)
        t = schedule.time_at(angle).clamp(model.t_min, 1.0)
        c = schedule(t)
        centres = bins.centres(x, dtype)
        z = (c.alpha * centres + c.sigma * eps).to(dtype)
        error = (model.predict_x(z, t.expand(len(x)), **cond) - centres) / bins.half_width
        found.append(error.square().flatten(1).sum(1) / event_size(model.event_shape))
    return torch.stack(found)
