r"""A small diffusion transformer.

An image is cut into patches, which are the states of a transformer. In every block the embedding e of time and
conditioning scales and shifts what attention and perceptron see,

.. math::
    h \leftarrow h + \mathrm{attention}\bigl((1 + a_1)\,\mathrm{norm}(h) + b_1\bigr), \qquad
    h \leftarrow h + \mathrm{perceptron}\bigl((1 + a_2)\,\mathrm{norm}(h) + b_2\bigr),

with a and b linear in e. The last layers of both are zero at the start, so that every block starts as the identity.

References:
    Peebles and Xie, Scalable Diffusion Models with Transformers, https://arxiv.org/abs/2212.09748
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ndm_ct._core.checks import validate_count, validate_shape
from ndm_ct.nn.embeddings import Attention, Network

__all__ = ["DiT"]


class DiT(Network):
    """A small diffusion transformer for images; it starts as the zero function.

    Args:
        event_shape: (C, H, W); H and W are multiples of ``patch``.
        patch: side of a patch.
        width: length of a state; a multiple of 4 and of ``heads``.
        depth: number of blocks.
        heads: heads of the attention.
        outputs: None: the output has the shape of z; K: it is ``(B, K, C, H, W)``.
        time: whether the network takes t.
        classes: K: the network takes ``label=`` (:mod:`ndm_ct.nn.networks`); None: it takes none.
        context: K: the network takes ``context=``; None: it takes none.
        sequence: K: the network takes ``sequence=``, to which patches attend in every block; None: it takes none.
        until: whether the network also takes ``until=``, the time at which a step ends that begins at t, for a flow map
            (:mod:`ndm_ct.samplers.maps`).

    Raises:
        ValueError: the sides are not multiples of the patch, or the width not one of 4 and of the heads.

    Example:
        >>> DiT((1, 8, 8), patch=2, width=16, depth=1)(torch.ones(2, 1, 8, 8), torch.zeros(2)).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self, event_shape: Sequence[int], patch: int = 2, width: int = 64, depth: int = 4, heads: int = 4,
        outputs: int | None = None, time: bool = True, classes: int | None = None, context: int | None = None,
        sequence: int | None = None, until: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.event_shape, self.patch = validate_shape("event_shape", event_shape), validate_count("patch", patch)
        self.width, self.depth, self.heads = validate_count("width", width), validate_count("depth", depth), heads
        self.outputs = None if outputs is None else validate_count("outputs", outputs)
        self.sequence = None if sequence is None else validate_count("sequence", sequence)
        if len(self.event_shape) != 3 or any(side % patch for side in self.event_shape[1:]):
            raise ValueError(f"event_shape={self.event_shape} must be (C, H, W), H and W multiples of patch={patch}.")
        if width % 4:
            raise ValueError(f"width={width} must be a multiple of 4, two waves along each side.")
        channels, height, across = self.event_shape
        embedding = self._set_embeddings(width, time, classes, context, until)
        self.input = nn.Conv2d(channels, width, patch, stride=patch)
        self.register_buffer("places", _places(height // patch, across // patch, width), persistent=False)
        self.blocks = nn.ModuleList(_Block(width, heads, embedding, sequence) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, channels * (outputs or 1) * patch**2)
        for parameter in self.output.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self, z: Tensor, t: Tensor | None = None, /, label: Tensor | None = None, context: Tensor | None = None,
        sequence: Tensor | None = None, until: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """``(B, C, H, W)`` to ``(B, C, H, W)``, or ``(B, K, C, H, W)`` with ``outputs=K``.

        Args:
            z: images, ``(B, C, H, W)``.
            t: times, ``(B,)``; left out for a network with ``time=False``.
            label: integers ``(B,)`` from 0 to K - 1 for a network with ``classes=K``; -1 and None mean "no label".
            context: numbers ``(B, K)`` for a network with ``context=K``; a NaN in a row, and None, mean "no context".
            sequence: tokens ``(B, L, K)`` for a network with ``sequence=K``; one with a NaN is no token.

        Raises:
            TypeError: t is missing, or given to a network without time; a condition that it was not built for.
            ValueError: z or a condition has the wrong shape or dtype, or the label is not a class of the network.
        """
        self.validate_event(tuple(z.shape[1:]))
        self._validate_sequence(sequence, z)
        embedding = self._embed(z, t, label, context, until)
        h = self.input(z)
        rows, columns = h.shape[2:]
        h = h.flatten(2).mT + self.places.to(h.dtype)
        for block in self.blocks:
            h = block(h, embedding, sequence)
        patches = self.output(self.norm(h)).reshape(len(z), rows, columns, -1, self.patch, self.patch)
        images = patches.permute(0, 3, 1, 4, 2, 5).reshape(len(z), -1, *z.shape[2:])
        return images if self.outputs is None else images.reshape(len(z), self.outputs, *z.shape[1:])

    def validate_event(self, event_shape: tuple[int, ...]) -> None:
        if event_shape != self.event_shape:
            raise ValueError(
                f"event_shape={event_shape} does not fit DiT(event_shape={self.event_shape}); make the two agree."
            )


class _Block(nn.Module):
    """Attention, attention to a sequence, and a perceptron, each modulated by the embedding."""

    def __init__(self, width: int, heads: int, embedding: int | None, sequence: int | None) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.tokens = None if sequence is None else Attention(width, heads, sequence)
        self.norm = nn.LayerNorm(width)
        self.first, self.second = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)
        self.modulation = None if embedding is None else nn.Linear(embedding, 4 * width)

    def forward(self, h: Tensor, embedding: Tensor | None, sequence: Tensor | None) -> Tensor:
        scale, shift, scale_inner, shift_inner = (
            (0.0,) * 4 if self.modulation is None else self.modulation(embedding)[:, None].chunk(4, dim=2)
        )
        h = self.attention(h, scale=scale, shift=shift)
        if self.tokens is not None:
            h = self.tokens(h, sequence)
        inner = self.norm(h) * (1.0 + scale_inner) + shift_inner
        return h + self.second(functional.gelu(self.first(inner)))


def _places(rows: int, columns: int, width: int) -> Tensor:
    """Waves along both sides, ``(rows * columns, width)``."""
    rate = torch.exp(-math.log(1e4) * torch.arange(width // 4) / (width // 4))
    waves = [torch.arange(count)[:, None] * rate for count in (rows, columns)]
    down, right = (torch.cat([wave.sin(), wave.cos()], 1) for wave in waves)
    both = torch.cat([down[:, None].expand(-1, columns, -1), right[None].expand(rows, -1, -1)], 2)
    return both.reshape(rows * columns, width)
