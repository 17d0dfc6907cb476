"""Seeds. Every seed and every generator that the library makes is derived here, from words.

A word is a number, a name or a string of bytes, for instance ``(seed, "sample", row)``. Words are hashed together and
never added, so that different words give unrelated noise.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["Word", "derive_seeds", "make_generator", "seed_networks", "seeded_weights"]

Word = int | str | bytes


def _sequence(words: tuple[Word, ...]) -> np.random.SeedSequence:
    """numpy's hash of the words; names and bytes enter as numbers of 64 bits."""
    return np.random.SeedSequence([_number(word) if isinstance(word, str | bytes) else word for word in words])


def _number(word: str | bytes) -> int:
    digest = hashlib.sha256(word.encode() if isinstance(word, str) else word).digest()
    return int.from_bytes(digest[:8], "little")


def derive_seeds(*words: Word, count: int = 1) -> list[int]:
    """Independent seeds of 64 bits that are a function of the words.

    Args:
        words: what the seeds are for; ints of at least 0, names or bytes. Words at the end that are 0 change nothing.
        count: number of seeds. A larger count leaves the first ones as they are.
    """
    return [int(seed) for seed in _sequence(words).generate_state(count, np.uint64)]


def make_generator(*words: Word, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose noise is a function of the words.

    On the CPU the words fill the whole state of the Mersenne twister. ``manual_seed`` would use 32 bits of a seed only,
    so that among 100,000 seeds two would be expected to give the same noise.

    Args:
        words: what the noise is for, as in :func:`derive_seeds`.
        device: device of the generator.
    """
    sequence = _sequence(words)
    generator = torch.Generator(device)
    generator.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
    if generator.device.type == "cpu":
        state = generator.get_state()
        twister = state.numpy()[_HEADER : _HEADER + 8 * _TWISTER].view(np.uint64)
        twister[:] = sequence.generate_state(_TWISTER, np.uint32)
        generator.set_state(state)
    return generator


def seed_networks(seed: int, device: torch.device) -> None:
    """Seed torch's own generators, from which networks draw dropout, on the CPU and on the device.

    ``torch.manual_seed`` would do it for all kinds of devices that might be there, and take longer than small networks.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)


@contextmanager
def seeded_weights(seed: int) -> Iterator[None]:
    """Make initial weights, drawn inside the block, a function of the seed; torch's own generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seeds(seed, "weights")[0])
        yield


# In the bytes of torch's CPU generator, 24 of bookkeeping precede the 624 numbers of its Mersenne twister.
_HEADER, _TWISTER = 24, 624
