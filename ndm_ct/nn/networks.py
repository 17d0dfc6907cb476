r"""Small networks: enough for vectors, digits and small images.

A network is called ``net(z, t)`` with t of shape ``(B,)``, or ``net(x)`` if built with ``time=False`` (the features of
a separable transform). All start as the zero function. What they are conditioned on (:mod:`~ndm_ct.nn.embeddings`) is
chosen when they are built:

==============  ===============================================================  ======================================
built with      takes                                                            "none of it"
==============  ===============================================================  ======================================
``classes=K``   ``label=``, ``(B,)`` integers from 0 to K - 1                    -1
``context=K``   ``context=``, ``(B, K)``: any numbers, best of unit scale        a row with a NaN
``sequence=K``  ``sequence=``, ``(B, L, K)``: L vectors, such as those of words  a vector with a NaN
==============  ===============================================================  ======================================

References:
    He et al., Delving Deep into Rectifiers (the scale of initial weights), https://arxiv.org/abs/1502.01852
    Ronneberger, Fischer and Brox, U-Net, https://arxiv.org/abs/1505.04597
    Peebles and Xie, Scalable Diffusion Models with Transformers, https://arxiv.org/abs/2212.09748
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

from torch import Tensor, nn
from torch.nn import functional

from ndm_ct._core.checks import event_size, validate_count, validate_number, validate_shape
from ndm_ct.nn.embeddings import Attention, Network

__all__ = ["MLP", "UNet"]

Layer = TypeVar("Layer", bound=nn.Module)

_GROUPS = 8
_MOST_LEVELS = 16

_INPUT_GAIN = 2.0  # more than He's: structure finer than the whole needs units that bend within it
_GAIN = math.sqrt(2.0)  # of He et al.


class MLP(Network):
    r"""A residual perceptron over flattened events, SiLU throughout, time as scale and shift of the hidden layers.

    Initial weights have standard deviation :math:`2/\sqrt{n}` in the first layer, for inputs of about unit scale, and
    He's :math:`\sqrt{2/n}` in the hidden ones: with torch's :math:`1/\sqrt{3n}` a diffusion of eight Gaussians on a
    circle stays a ring for thousands of steps.

    Args:
        event_shape: E; an int for vectors.
        width: width of the hidden layers.
        depth: number of residual blocks.
        outputs: None: the output has the shape of z; K: it is ``(B, K, *E)``, as ``Separable`` and the head "moments"
            (K = 2) need.
        time: whether the network takes t.
        dropout: probability of dropping a hidden unit in training.
        classes: K: the network takes ``label=``, see this module's header; None: it takes none.
        context: K: the network takes ``context=``; None: it takes none.
        until: whether the network also takes ``until=``, the time at which a step ends that begins at t, for a flow map
            (:mod:`ndm_ct.samplers.maps`).

    Example:
        >>> import torch
        >>> MLP(2)(torch.ones(3, 2), torch.zeros(3))
        tensor([[0., 0.],
                [0., 0.],
                [0., 0.]], grad_fn=<ViewBackward0>)
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        width: int = 128,
        depth: int = 3,
        outputs: int | None = None,
        time: bool = True,
        dropout: float = 0.0,
        classes: int | None = None,
        context: int | None = None,
        until: bool = False,
    ) -> None:
        super().__init__()
        self.event_shape = validate_shape("event_shape", [event_shape] if isinstance(event_shape, int) else event_shape)
        self.width, self.depth = validate_count("width", width), validate_count("depth", depth)
        self.outputs, self.dropout = _validate_outputs(outputs), _validate_dropout(dropout)
        size = event_size(self.event_shape)
        embedding = self._set_embeddings(width, time, classes, context, until)
        self.input = _linear(size, width, _INPUT_GAIN)
        self.blocks = nn.ModuleList(_DenseBlock(width, embedding, dropout) for _ in range(depth))
        self.output = _zero(nn.Linear(width, size * (outputs or 1)))

    def forward(
        self, z: Tensor, t: Tensor | None = None, /, label: Tensor | None = None, context: Tensor | None = None,
        until: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """``(B, *E)`` to ``(B, *E)``, or ``(B, K, *E)`` with ``outputs=K``.

        Args:
            z: states, ``(B, *E)``.
            t: times, ``(B,)``; left out for a network with ``time=False``.
            label: integers ``(B,)`` from 0 to K - 1 for a network with ``classes=K``; -1 and None mean "no label".
            context: numbers ``(B, K)`` for a network with ``context=K``; a NaN in a row, and None, mean "no context".
            until: times ``(B,)`` at which steps end, for a network with ``until=True``; None is t.

        Raises:
            TypeError: t is missing, or given to a network without time; a condition that it was not built for.
            ValueError: label or context has the wrong shape or dtype, or is not a class of the network.
        """
        embedding = self._embed(z, t, label, context, until)
        h = self.input(z.flatten(1))
        for block in self.blocks:
            h = block(h, embedding)
        return self.output(functional.silu(h)).reshape(_output_shape(z, self.outputs))

    def validate_event(self, event_shape: tuple[int, ...]) -> None:
        if event_size(event_shape) != event_size(self.event_shape):
            raise ValueError(
                f"event_shape={event_shape} has {event_size(event_shape)} numbers, but the MLP was built for "
                f"event_shape={self.event_shape}; make the two agree."
            )


class _DenseBlock(nn.Module):
    r""":math:`h + W_2\,\mathrm{silu}(W_1 \mathrm{silu}(h)\,(1 + a(t)) + b(t))`."""

    def __init__(self, width: int, embedding: int | None, dropout: float) -> None:
        super().__init__()
        self.first, self.second = _linear(width, width, _GAIN), nn.Linear(width, width)
        self.modulation = nn.Linear(embedding, 2 * width) if embedding else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, embedding: Tensor | None) -> Tensor:
        inner = _modulate(self.first(functional.silu(h)), self.modulation, embedding)
        return h + self.second(self.dropout(functional.silu(inner)))


class UNet(Network):
    """A small convolutional U-Net: a residual block down and one up per resolution, up only at the highest.

    Convolutions of stride 2 change the resolution, skip connections are sums. The highest
    resolution, where a channel costs most, has ``width`` channels, all others four times as many. The defaults make
    0.19 million parameters. With ``attention`` the pixels of the lowest resolutions attend to each other, and to a
    sequence.

    Args:
        channels: C of the images ``(C, H, W)``. Sides that are not multiples of ``2**(levels - 1)`` are padded with
            zeros; the output has the shape of z.
        width: channels at the highest resolution.
        levels: number of resolutions.
        outputs: None: the output has the shape of z; K: it is ``(B, K, C, H, W)``.
        time: whether the network takes t.
        dropout: probability of dropping a hidden unit in training.
        classes: K: the network takes ``label=``, see this module's header; None: it takes none.
        context: K: the network takes ``context=``; None: it takes none.
        sequence: K: the network takes ``sequence=``; None: it takes none.
        attention: at how many of the resolutions, from the lowest, pixels attend; None: at one with a sequence, else at
            none.
        heads: heads of the attention.
        until: whether the network also takes ``until=``, the time at which a step ends that begins at t, for a flow map
            (:mod:`ndm_ct.samplers.maps`).

    Example:
        >>> import torch
        >>> net = UNet(1, width=8)
        >>> net(torch.ones(2, 1, 8, 8), torch.zeros(2)).abs().max()
        tensor(0., grad_fn=<MaxBackward1>)
    """

    def __init__(
        self,
        channels: int,
        width: int = 16,
        levels: int = 2,
        outputs: int | None = None,
        time: bool = True,
        dropout: float = 0.0,
        classes: int | None = None,
        context: int | None = None,
        sequence: int | None = None,
        attention: int | None = None,
        heads: int = 4,
        until: bool = False,
    ) -> None:
        super().__init__()
        self.channels, self.width = validate_count("channels", channels), validate_count("width", width)
        self.levels, self.outputs = validate_count("levels", levels), _validate_outputs(outputs)
        if levels > _MOST_LEVELS:
            raise ValueError(f"levels must be at most {_MOST_LEVELS}, got {levels}; each halves the sides of images.")
        self.dropout = _validate_dropout(dropout)
        widths = [width if level == 0 else 4 * width for level in range(levels)]
        embedding = self._set_embeddings(4 * width, time, classes, context, until)
        self.input = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList(_ConvolutionBlock(w, embedding, dropout) for w in widths[1:])
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(_ConvolutionBlock(w, embedding, dropout) for w in widths)
        self.grow = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairwise(widths))
        self._set_attention(widths, sequence, attention, heads)
        self.norm = _group_norm(width)
        self.output = _zero(nn.Conv2d(width, channels * (outputs or 1), 3, padding=1))

    def _set_attention(self, widths: list[int], sequence: int | None, attention: int | None, heads: int) -> None:
        self.sequence = None if sequence is None else validate_count("sequence", sequence)
        self.attention, self.heads = attention, heads
        count = int(sequence is not None) if attention is None else attention
        if not int(sequence is not None) <= count <= self.levels:
            raise ValueError(
                f"attention={attention!r} must be a number of resolutions, at most levels={self.levels}, and at least "
                "one for a network with a sequence."
            )
        attending = enumerate(widths[-count:] if count else [], self.levels - count)
        self.attend = nn.ModuleDict({str(level): _PixelAttention(width, heads, sequence) for level, width in attending})

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
            until: times ``(B,)`` at which steps end, for a network with ``until=True``; None is t.

        Raises:
            TypeError: t is missing, or given to a network without time; a condition that it was not built for.
            ValueError: z is not an image of these channels; a condition has the wrong shape or dtype, or the label is
                not a class of the network.
        """
        self._validate(z)
        self._validate_sequence(sequence, z)
        embedding = self._embed(z, t, label, context, until)
        h = self.input(self._padded(z))
        skips = []
        for shrink, block in zip(self.shrink, self.down, strict=True):
            skips.append(h)
            h = block(shrink(h), embedding)
        for level in reversed(range(self.levels)):
            if level < self.levels - 1:
                h = self.grow[level](h) + skips[level]
            h = self.up[level](h, embedding)
            if str(level) in self.attend:
                h = self.attend[str(level)](h, sequence)
        output = self.output(functional.silu(self.norm(h)))[..., : z.shape[2], : z.shape[3]]
        return output.reshape(_output_shape(z, self.outputs))

    def validate_event(self, event_shape: tuple[int, ...]) -> None:
        if len(event_shape) != 3 or event_shape[0] != self.channels:
            raise ValueError(
                f"event_shape={event_shape} does not fit UNet(channels={self.channels}), which takes "
                f"({self.channels}, H, W); make the two agree."
            )

    def _validate(self, z: Tensor) -> None:
        if z.ndim != 4 or z.shape[1] != self.channels:
            raise ValueError(
                f"UNet(channels={self.channels}) got an input of shape {tuple(z.shape)}, expected "
                f"(B, {self.channels}, H, W); make the two agree."
            )

    def _padded(self, z: Tensor) -> Tensor:
        """Zeros below and to the right, up to sides that can be halved ``levels - 1`` times."""
        factor = 2 ** (self.levels - 1)
        down, right = -z.shape[2] % factor, -z.shape[3] % factor
        return functional.pad(z, (0, right, 0, down)) if down or right else z


class _ConvolutionBlock(nn.Module):
    """Two convolutions with normalisation, time as scale and shift between them."""

    def __init__(self, width: int, embedding: int | None, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = _group_norm(width), _group_norm(width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * width) if embedding else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, embedding: Tensor | None) -> Tensor:
        inner = self.norm2(self.first(functional.silu(self.norm1(h))))
        inner = functional.silu(_modulate(inner, self.modulation, embedding))
        return h + self.second(self.dropout(inner))


class _PixelAttention(nn.Module):
    """Attention of pixels to each other, and then to a sequence."""

    def __init__(self, width: int, heads: int, sequence: int | None) -> None:
        super().__init__()
        self.pixels = Attention(width, heads)
        self.tokens = None if sequence is None else Attention(width, heads, sequence)

    def forward(self, h: Tensor, sequence: Tensor | None) -> Tensor:
        pixels = self.pixels(h.flatten(2).mT)
        if self.tokens is not None:
            pixels = self.tokens(pixels, sequence)
        return pixels.mT.reshape(h.shape)


def _validate_outputs(outputs: int | None) -> int | None:
    return None if outputs is None else validate_count("outputs", outputs)


def _validate_dropout(dropout: float) -> float:
    validate_number("dropout", dropout)
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must be a probability, got {dropout!r}.")
    return dropout


def _output_shape(z: Tensor, outputs: int | None) -> tuple[int, ...]:
    return tuple(z.shape) if outputs is None else (z.shape[0], outputs, *z.shape[1:])


def _modulate(h: Tensor, layer: nn.Module | None, embedding: Tensor | None) -> Tensor:
    r""":math:`h\,(1 + a) + b`, one pair (a, b) per row and channel."""
    if layer is None:
        return h
    both = layer(embedding)
    scale, shift = both.reshape(*both.shape, *(1,) * (h.ndim - 2)).chunk(2, dim=1)
    return h * (1.0 + scale) + shift


class _GroupNorm(nn.GroupNorm):
    """A group normalisation that runs in the dtype of its weights, as under autocast on GPUs.

    Autocast on CPUs passes it inputs of lower precision than its weights, and its forward derivative would then differ
    in dtype from its value.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def _group_norm(channels: int) -> nn.GroupNorm:
    return _GroupNorm(math.gcd(channels, _GROUPS), channels)


def _linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    """Weights and biases uniform with standard deviation gain / sqrt(inputs); torch's own layers have 1/sqrt(3)."""
    layer = nn.Linear(inputs, outputs)
    for parameter in layer.parameters():
        parameter.detach().mul_(math.sqrt(3.0) * gain)
    return layer


def _zero(layer: Layer) -> Layer:
    """Zero weight and bias, so that a network starts as the zero function."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
