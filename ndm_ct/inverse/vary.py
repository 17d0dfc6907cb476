r"""Variations of data by partial noising: :math:`z_t \sim q(z_t \mid x)` for some t, then the model's steps to 0.

The smaller t, the closer the result stays to x. For x drawn from the model's law so is the result, at every t.

References:
    Meng et al., SDEdit, https://arxiv.org/abs/2108.01073
"""

from typing import Any

import torch
from torch import Tensor

from ndm_ct._core.checks import choose, validate_count, validate_number
from ndm_ct._core.noise import GeneratorLike, as_randomness, rows_of
from ndm_ct.model import NDM
from ndm_ct.samplers import NAMES
from ndm_ct.samplers.base import walk

__all__ = ["vary"]


def vary(
    model: NDM,
    x: Tensor,
    /,
    t: float,
    *,
    method: str = "ddpm",
    steps: int = 50,
    generator: GeneratorLike = None,
    batch_size: int | None = None,
    **cond: Any,
) -> Tensor:
    """Noise data up to time t and denoise them again.

    Args:
        model: the model.
        x: data, ``(B, *E)``.
        t: the time, in (t_min, 1]: how far the result may leave x.
        method: a name of ``samplers.NAMES``.
        steps: steps from t down to ``t_min``, even in time.
        generator: source of all randomness: a seed, a generator, or one per row.
        batch_size: rows at a time; None is all.
        cond: conditioning of the result, for instance another class than that of x.

    Returns:
        Shape of ``x``.

    Raises:
        ValueError: t outside (t_min, 1]; an unknown method; a transform with latents.

    Example:
        >>> import torch, ndm_ct
        >>> model = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
        >>> ndm_ct.vary(model, torch.ones(3, 2), t=0.5, steps=10, generator=0).shape
        torch.Size([3, 2])
    """
    x = model.as_data(x)
    given = model.validate(x, cond, vary)
    validate_number("t", t)
    if not model.t_min < t <= 1.0:
        raise ValueError(f"t must lie in (t_min, 1] = ({model.t_min:g}, 1], got {t!r}.")
    if model.transform.latent:
        raise ValueError("vary needs a transform without latents: encode x, and vary in the space of the latents.")
    choose("method", method, NAMES)
    source = as_randomness(generator, len(x), x.device, "vary")
    times = torch.linspace(float(t), model.t_min, validate_count("steps", steps) + 1, dtype=torch.float64)
    size = max(len(x), 1) if batch_size is None else validate_count("batch_size", batch_size)
    results = [x[:0]]
    with model.evaluating(), torch.no_grad():
        for rows in torch.arange(len(x), device=x.device).split(size):
            own, noise = given.take(rows), rows_of(source, rows)
            z = model.process.sample(x[rows], times[0].to(x.device), generator=noise, **own)
            results.append(walk(NAMES[method](model), z, times.to(x.device), generator=noise, **own))
    return torch.cat(results)
