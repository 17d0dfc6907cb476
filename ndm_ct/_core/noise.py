"""Noise from one generator for a batch, or from one generator per row."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Randomness", "coins", "normal_like", "repeated", "rows_of", "uniform", "validate_randomness"]

Randomness = torch.Generator | Sequence[torch.Generator] | None
"""None is torch's global generator. With one generator per row, a row's noise does not depend on its batch."""

Draw = Callable[[tuple[int, ...], torch.Generator | None], Tensor]
"""Random numbers of a shape."""


def drawn(shape: tuple[int, ...], generator: Randomness, draw: Draw) -> Tensor:
    """What ``draw`` makes of ``shape`` ``(B, ...)`` and a generator; or its rows, each from its own generator."""
    if shape[0] == 0:
        return draw(shape, None)
    if generator is None or isinstance(generator, torch.Generator):
        return draw(shape, generator)
    return torch.stack([draw(shape[1:], each) for each in generator])


def normal_like(z: Tensor, generator: Randomness) -> Tensor:
    """Standard normal numbers of the shape, dtype and device of ``z`` ``(B, ...)``."""
    return drawn(z.shape, generator, lambda shape, g: torch.randn(shape, dtype=z.dtype, device=z.device, generator=g))


def uniform(shape: tuple[int, ...], generator: Randomness, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers in [0, 1) of this shape ``(B, ...)``."""
    return drawn(shape, generator, lambda shape, g: torch.rand(shape, dtype=dtype, device=device, generator=g))


def coins(shape: tuple[int, ...], generator: Randomness, device: torch.device) -> Tensor:
    """Zeros and ones of this shape ``(B, ...)``, int64."""
    return drawn(shape, generator, lambda shape, g: torch.randint(0, 2, shape, device=device, generator=g))


def rows_of(generator: Randomness, rows: Tensor) -> Randomness:
    """The randomness of some rows of the batch, given by their numbers."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    return [generator[row] for row in rows.tolist()]


def repeated(generator: Randomness, times: int) -> Randomness:
    """The randomness of a batch in which every row stands so many times, one after the other."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    return [each for each in generator for _ in range(times)]


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
        raise ValueError(f"generator has {len(generator)} generators for {n} rows; pass one, or one per row.")
    if len({id(each) for each in generator}) != n:
        raise ValueError(
            "generator holds the same generator twice, so rows would depend on each other; make one per row."
        )
    return generator
