"""Gaussian noise from one generator for a batch, or from one generator per row."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Randomness", "normal_like", "rows_of", "validate_generator", "validate_randomness"]

Randomness = torch.Generator | Sequence[torch.Generator] | None
"""None is torch's global generator. With one generator per row, a row's noise does not depend on its batch."""


def normal_like(z: Tensor, generator: Randomness) -> Tensor:
    """Standard normal numbers of the shape, dtype and device of ``z`` ``(B, ...)``."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)
    if z.shape[0] == 0:
        return torch.empty_like(z)
    rows = [torch.randn(z.shape[1:], dtype=z.dtype, device=z.device, generator=each) for each in generator]
    return torch.stack(rows)


def rows_of(generator: Randomness, rows: Tensor) -> Randomness:
    """The randomness of some rows of the batch, given by their numbers."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    return [generator[row] for row in rows.tolist()]


def validate_generator(generator: Any) -> None:
    """Refuse what is neither a generator nor None, also where nothing is drawn from it.

    Raises:
        TypeError: anything else.
    """
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}; make one with "
            "torch.Generator().manual_seed(0)."
        )


def validate_randomness(generator: Randomness, n: int) -> Randomness:
    """Check that a sequence has one generator for each of n rows.

    Raises:
        TypeError: neither a generator nor a sequence of generators.
        ValueError: a sequence of the wrong length, or one with a generator twice.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if not isinstance(generator, Sequence) or not all(isinstance(each, torch.Generator) for each in generator):
        raise TypeError(
            f"generator must be a torch.Generator, a sequence of them or None, got {type(generator).__name__}; make "
            "one with torch.Generator().manual_seed(0)."
        )
    if len(generator) != n:
        raise ValueError(f"generator has {len(generator)} generators for {n} samples; pass one, or one per sample.")
    if len({id(each) for each in generator}) != n:
        raise ValueError(
            "generator holds the same generator twice, so rows would depend on each other; make one per sample."
        )
    return generator
