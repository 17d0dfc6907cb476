"""A state of several tensors as one matrix, and its norm row by row."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ndm_ct._core.checks import event_size

__all__ = ["Packing", "State"]

State = tuple[Tensor, ...]


@dataclass
class Packing:
    """Converts a state of several tensors ``(B, *)`` to one matrix ``(B, D)`` and back, for any B."""

    shapes: tuple[torch.Size, ...]
    widths: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.widths = tuple(event_size(shape[1:]) for shape in self.shapes)

    def pack(self, state: State) -> Tensor:
        parts = zip(state, self.widths, strict=True)
        return torch.cat([part.reshape(part.shape[0], width) for part, width in parts], 1)

    def unpack(self, y: Tensor) -> State:
        parts = y.split(self.widths, 1)
        return tuple(part.reshape(len(part), *shape[1:]) for part, shape in zip(parts, self.shapes, strict=True))

    def row_norms(self, y: Tensor) -> Tensor:
        """Root mean square of each part in each row, the larger of the parts: ``(B,)``. Carries no gradient."""
        parts = [part for part in y.detach().split(self.widths, 1) if part.shape[1] > 0]
        return torch.stack([part.square().mean(1) for part in parts] or [y.new_zeros(len(y))]).amax(0).sqrt()
