r"""The density of what a deterministic sampler draws: that of its few steps, and not that of the flow they approximate.

A walk down a grid without noise is one map G from the prior's draw to the sample. Where G is invertible,

.. math::
    x = G(z_1), \qquad \log p_G(x) = \log p_1(z_1) - \log \left| \det \frac{\partial G}{\partial z_1} \right| .

The determinant is that of the Jacobian of the whole walk, so a multistep method needs no inverse of a single step. For
given x the equation :math:`G(z_1) = x` is solved by damped Newton steps, from the noise at which the flow puts x.

Warning:
    Few steps may fold: then several :math:`z_1` lead to the same x, and :math:`p_G` is the sum over them. The value
    here is the term of one of them, a lower bound. Steps that do not fold, all short enough ones, have one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ndm_ct._core.autodiff import Derivatives
from ndm_ct._core.checks import append_axes, event_size, sum_event, validate_count
from ndm_ct._core.conditioning import Conditioning
from ndm_ct._core.precision import resolution
from ndm_ct.checking import verify
from ndm_ct.divergence.nodes import rows_at_once
from ndm_ct.likelihood.path import Problem
from ndm_ct.model import NDM

__all__ = ["LARGEST", "invert", "jacobian", "log_density", "logabsdet", "validate_event"]

LARGEST = 64
"""Most dimensions of an event whose Jacobian is formed."""

ITERATIONS, SHORTEST = 60, 2.0**-10
"""Most Newton steps, and the share of a step below which a row has come as near as it can."""

Draw = Callable[[Tensor, torch.Generator], Tensor]
"""A walk from noise to data, and the source of its noise, if it takes any."""


def validate_event(event_shape: tuple[int, ...]) -> None:
    """Raise for events of more than ``LARGEST`` dimensions."""
    if event_size(event_shape) > LARGEST:
        raise ValueError(
            f"the density of a sampler's steps needs the Jacobian of the event, at most {LARGEST} dimensions; "
            f"event_shape={tuple(event_shape)} has {event_size(event_shape)}. Take ndm_ct.loglik, the density of the "
            "flow that the steps approximate."
        )


def jacobian(draw: Draw, z: Tensor, derivatives: Derivatives) -> tuple[Tensor, Tensor]:
    """A walk's end ``(B, *E)`` and its Jacobian ``(B, d, d)``.

    Args:
        draw: the walk; a row of its end depends on the same row of its start alone.
        z: its start, ``(B, *E)``.
        derivatives: how derivatives of the network are taken.

    Raises:
        ValueError: the walk draws noise.
    """
    generator = torch.Generator(z.device)
    before, d = generator.get_state(), event_size(z.shape[1:])

    def walk(z: Tensor) -> tuple[Tensor, Tensor]:
        end = draw(z, generator)
        return end, end

    units = torch.eye(d, dtype=z.dtype, device=z.device).reshape(d, 1, *z.shape[1:]).expand(d, *z.shape)
    end, rows, _ = derivatives.vjps(walk, z, units, lambda _, product: product, chunk=d)
    if not torch.equal(generator.get_state(), before):
        raise ValueError(
            "the sampler draws noise on its way, so that its samples have no density by a change of variables; take a "
            "deterministic method such as 'ddim', 'unipc' or 'heun'."
        )
    return end, rows.reshape(d, len(z), d).transpose(0, 1)


def logabsdet(matrices: Tensor) -> Tensor:
    """Logarithms of the absolute determinants, ``(B, d, d)`` to ``(B,)``."""
    return torch.linalg.slogdet(matrices).logabsdet


def invert(
    draw: Draw, x: Tensor, start: Tensor, derivatives: Derivatives, rounding: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The start of the walk that ends at x, by damped Newton steps, each row by itself.

    Args:
        draw: the walk.
        x: where it ends, ``(B, *E)``.
        start: first guess, ``(B, *E)``.
        derivatives: how derivatives of the network are taken.
        rounding: size of the rounding of x, ``(B,)``; rows end within 8 of it, or as near as they can.

    Returns:
        The starts ``(B, *E)``, Jacobians there ``(B, d, d)``, and whether the walk ends within 1000 roundings of x.
    """
    z, (end, matrices) = start, jacobian(draw, start, derivatives)
    share = torch.ones_like(rounding)
    for _ in range(ITERATIONS):
        distance = sum_event((end - x).square()).sqrt()
        going = (distance > 8.0 * rounding) & (share >= SHORTEST)
        if not bool(going.any()):
            break
        newton = torch.linalg.solve_ex(matrices, (end - x).flatten(1)).result.reshape(x.shape)
        ahead = append_axes(going & newton.flatten(1).isfinite().all(1), z)
        trial = torch.where(ahead, z - append_axes(share, z) * newton, z)
        end_there, matrices_there = jacobian(draw, trial, derivatives)
        better = going & (sum_event((end_there - x).square()).sqrt() < distance)
        z, end = torch.where(append_axes(better, z), trial, z), torch.where(append_axes(better, z), end_there, end)
        matrices = torch.where(better[:, None, None], matrices_there, matrices)
        share = torch.where(better, (2.0 * share).clamp(max=1.0), 0.5 * share)
    return z, matrices, sum_event((end - x).square()).sqrt() <= 1e3 * rounding


def log_density(
    model: NDM, walk: Callable[[Tensor, dict[str, Any], torch.Generator], Tensor], x: Tensor, cond: Conditioning,
    batch_size: int | None,
) -> Tensor:  # fmt: skip
    """Log-density of given data, nats, float64, ``(B,)``; NaN where no noise leads to a row.

    Args:
        model: the model whose prior is the law of the noise.
        walk: ``walk(z, cond, generator)``, from noise to data or latents.
        x: the data.
        cond: their conditioning.
        batch_size: rows at a time; None bounds the memory.

    Raises:
        ValueError: the walk draws noise; a large event; an Encoder; not a ``batch_size``.
    """
    validate_event(model.event_shape)
    if not model.transform.bijective:
        raise ValueError(f"{type(model.transform).__name__} is stochastic: log p(x) has only a bound, ndm_ct.elbo.")
    verify(model, x, cond, "likelihood")
    d = event_size(model.event_shape)
    size = rows_at_once(d, model.event_shape) if batch_size is None else validate_count("batch_size", batch_size)

    def part(x: Tensor, cond: Conditioning) -> Tensor:
        y, weight = model.to_latent(x, **cond)
        start = Problem(model, y, (model.t_min, 1.0), 1e-3, 1e-3, "ode", "nan", False, cond).transport().state[0]
        y = y.double()
        rounding = resolution(model, x.dtype) * (y.abs().flatten(1).amax(1) + model.unit)
        z, matrices, found = invert(
            lambda z, generator: walk(z, dict(cond), generator), y, start.nan_to_num(), model.derivatives, rounding
        )
        logp = model.log_prior(z) - logabsdet(matrices)
        return torch.where(found, logp if weight is None else logp + weight, torch.nan)

    with model.evaluating(), torch.no_grad():
        return torch.cat([part(x[rows], cond.take(rows)) for rows in torch.arange(len(x)).split(size)])
