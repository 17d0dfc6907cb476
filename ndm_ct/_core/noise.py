"""Noise from one generator for a batch, or from one generator per row."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ndm_ct._core.seeds import make_generator

__all__ = [
    "GeneratorLike",
    "Randomness",
    "as_randomness",
    "by_row",
    "coins",
    "normal_like",
    "repeated",
    "rows_of",
    "uniform",
    "validate_single",
]

Randomness = torch.Generator | Sequence[torch.Generator] | None
"""None is torch's global generator. With one generator per row, a row's noise does not depend on its batch."""

GeneratorLike = int | Randomness
"""What ``generator=`` takes in every public function: a seed, a generator, one generator per row, or None."""


class Rows(tuple[torch.Generator, ...]):
    """One generator per row, checked; repeated rows share theirs."""

    __slots__ = ()


Draw = Callable[[tuple[int, ...], torch.Generator | None], Tensor]
"""Random numbers of a shape."""


def drawn(shape: tuple[int, ...], generator: Randomness, draw: Draw) -> Tensor:
    """Draw a batch ``(B, ...)`` from one generator, or each row from its own."""
    if shape[0] == 0:
        return draw(shape, None)
    if generator is None or isinstance(generator, torch.Generator):
        return draw(shape, generator)
    return torch.stack([draw(shape[1:], each) for each in generator])


def normal_like(z: Tensor, generator: Randomness) -> Tensor:
    """Standard normal numbers of the shape, dtype and device of ``z``.

    Args:
        z: states, shape ``(B, ...)``.
        generator: the source of all rows, a sequence with one for each row, or None for torch's global generator.

    Returns:
        Shape of ``z``; with one generator per row, a row does not depend on the others.
    """
    if generator is None:  # torch.export takes this draw alone where the number of rows is open
        return torch.randn_like(z, memory_format=torch.contiguous_format)
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
    places = rows.tolist()
    if places == list(range(len(generator))):
        return generator
    return Rows(generator[place] for place in places)


def by_row(generator: Randomness, device: torch.device | str) -> Callable[[Tensor], Randomness]:
    """A function from numbers of rows to one generator for each, by one number drawn from a single generator.

    A row's noise is then the same in every part of every batch whose first rows are these.
    """
    if not (generator is None or isinstance(generator, torch.Generator)):
        return lambda rows: rows_of(generator, rows)
    source = "cpu" if generator is None else generator.device
    word = int(torch.randint(2**62, (), generator=generator, device=source))
    return lambda rows: Rows(make_generator(word, "row", row, device=device) for row in rows.tolist())


def validate_single(generator: Randomness, why: str) -> torch.Generator | None:
    """The randomness of draws that are made together.

    Args:
        generator: the randomness.
        why: the end of the message, why rows cannot have generators of their own.

    Raises:
        TypeError: it is one generator per row.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    raise TypeError(f"generator must be a seed or one torch.Generator: {why}.")


def repeated(generator: Randomness, times: int) -> Randomness:
    """The randomness of a batch in which every row is repeated ``times`` times, its copies next to each other."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    return Rows(each for each in generator for _ in range(times))


def as_randomness(generator: GeneratorLike, n: int | None, device: torch.device | str, use: str) -> Randomness:
    """The randomness that ``generator=`` stands for; a public function calls this once, before its first draw.

    Args:
        generator: a seed, a generator, one generator per row, or None.
        n: number of rows; None if it is not known yet.
        device: device of the noise.
        use: name of the calling function. It is hashed together with a seed, so that the same seed gives independent
            noise in ``sample`` and in ``loglik``.

    Raises:
        TypeError: generator is something else.
        ValueError: a seed below 0; a sequence of the wrong length, or one with the same generator twice.
    """
    if generator is None or isinstance(generator, torch.Generator | Rows):
        return generator
    if isinstance(generator, int | np.integer) and not isinstance(generator, bool):
        if generator < 0:
            raise ValueError(f"generator={generator} is a negative seed; pass an int of at least 0.")
        return make_generator(int(generator), use, device=device)
    if not isinstance(generator, Sequence) or not all(isinstance(each, torch.Generator) for each in generator):
        raise TypeError(
            f"generator must be an int (a seed), a torch.Generator or a sequence of one torch.Generator per row, got "
            f"{type(generator).__name__}; for one result again and again pass generator=0."
        )
    if n is not None and len(generator) != n:
        raise ValueError(f"generator has {len(generator)} generators for {n} rows; pass one, or one per row.")
    if len({id(each) for each in generator}) != len(generator):
        raise ValueError(
            "generator holds the same generator twice, so rows would depend on each other; make one per row."
        )
    return Rows(generator)
