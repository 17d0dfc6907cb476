r"""Small networks: enough for vectors, digits and small images.

A network is called ``net(z, t)`` with t of shape ``(B,)``, or ``net(x)`` if built with ``time=False`` (the features of
a separable transform). All start as the zero function. One built with ``classes=K`` takes ``label=`` too, ``(B,)``
integers from 0 to K - 1, and adds a learned vector to its embedding of time,

.. math::
    e(t, y) = e(t) + c_y, \qquad y \in \{-1, 0, \dots, K - 1\},

where -1 is "no label": the network is then the unconditional one, which :func:`ndm_ct.guided` needs and
``fit(cond_dropout=)`` trains.

References:
    He et al., Delving Deep into Rectifiers (the scale of initial weights), https://arxiv.org/abs/1502.01852
    Ronneberger, Fischer and Brox, U-Net, https://arxiv.org/abs/1505.04597
    Ho and Salimans, Classifier-Free Diffusion Guidance (one network with and without the label),
    https://arxiv.org/abs/2207.12598
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ndm_ct._core.checks import event_size, some, validate_count, validate_number, validate_shape
from ndm_ct._core.config import Configurable
from ndm_ct._core.keywords import keyword_names

__all__ = ["MLP", "TimeEmbedding", "UNet"]

Layer = TypeVar("Layer", bound=nn.Module)

_FREQUENCIES = 16
_GROUPS = 8
_MOST_LEVELS = 16
_NO_LABEL = -1

_INPUT_GAIN = 2.0  # more than He's: structure finer than the whole needs units that bend within it
_GAIN = math.sqrt(2.0)  # of He et al.


class TimeEmbedding(nn.Module, Configurable):
    r"""Features of t in [0, 1]: :math:`\sin \omega_k t, \cos \omega_k t`, then two linear layers.

    The frequencies run geometrically from :math:`\pi/2` to :math:`32\pi`: the slowest feature is monotone over the
    interval, the fastest resolves 1/64 of it, and time derivatives of a network stay of moderate size.

    Args:
        width: number of features.

    Example:
        >>> TimeEmbedding(8)(torch.linspace(0, 1, 3)).shape
        torch.Size([3, 8])
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = validate_count("width", width)
        self.hidden = nn.Linear(2 * _FREQUENCIES, width)
        self.output = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """``(B,)`` to ``(B, width)``, ready for a linear layer (the last operation is a SiLU)."""
        k = torch.arange(_FREQUENCIES, dtype=t.dtype, device=t.device) / (_FREQUENCIES - 1)
        phase = t[:, None] * (0.5 * math.pi * 64.0**k)
        features = torch.cat([phase.sin(), phase.cos()], dim=1)
        return functional.silu(self.output(functional.silu(self.hidden(features))))


class _LabelEmbedding(nn.Module):
    """A learned vector for every class, and one for "no label".

    Args:
        classes: K.
        width: length of the vectors.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.vectors = nn.Embedding(classes + 1, width)  # the first is that of no label

    def forward(self, label: Tensor | None, z: Tensor) -> Tensor:
        """Embed labels ``(B,)`` as ``(B, width)``. None stands for "no label" in every row of ``z``."""
        if label is None:
            label = torch.full((z.shape[0],), _NO_LABEL, device=z.device)
        else:
            self._validate(label, z)
        return self.vectors(label.long() - _NO_LABEL)

    def _validate(self, label: Any, z: Tensor) -> None:
        labels = f"integers from 0 to {self.classes - 1}, or {_NO_LABEL} for no label"
        if not isinstance(label, Tensor):
            raise ValueError(
                f"label is a {type(label).__name__}, expected a tensor of shape (B,) of {labels}; for one label for "
                "all rows pass torch.full((B,), label)."
            )
        if label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
            raise ValueError(f"label has dtype {label.dtype}, expected {labels}; convert it with .long().")
        if label.shape != z.shape[:1]:
            raise ValueError(
                f"label has shape {tuple(label.shape)}, expected ({z.shape[0]},), one label per row; pass class "
                "numbers, not one-hot vectors, and label.expand(B) for one label for all rows."
            )
        if label.device != z.device:
            raise ValueError(f"label is on device {label.device}, z on {z.device}; move it with .to({z.device}).")
        self._validate_range(label.detach().long(), labels)

    def _validate_range(self, label: Tensor, labels: str) -> None:
        if torch.compiler.is_compiling():  # a look at the values would cut the graph in two
            return
        outside = (label < _NO_LABEL) | (label >= self.classes)
        try:
            wrong = bool(outside.any())
        except RuntimeError:  # in a vmap over the labels, whose values nobody can look at
            return
        if wrong:
            rows = torch.nonzero(outside).flatten().tolist()
            raise ValueError(
                f"label is {int(label[rows[0]])} in row {rows[0]} (outside in rows {some(rows)}), expected {labels}; "
                "number the classes from 0, or build the network with more classes."
            )


class _Network(nn.Module, Configurable):
    """What the networks share: the embedding of time and label, and what they say about their conditioning."""

    classes: int | None
    embedding: TimeEmbedding | None
    labels: _LabelEmbedding | None

    @property
    def null(self) -> dict[str, int]:
        """The conditioning that means none, by name; empty for a network without classes."""
        return {} if self.classes is None else {"label": _NO_LABEL}

    def cond_names(self) -> tuple[frozenset[str], bool]:
        """Conditioning keywords the network accepts (``label`` only with classes), and whether it accepts any."""
        names, anything = keyword_names(self.forward, 2)
        return (names - {"label"} if self.classes is None else names), anything

    def config(self) -> dict[str, Any]:
        """As of every configurable object; a network without classes does not mention them, as files never did."""
        config = super().config()
        return {name: value for name, value in config.items() if name != "classes" or value is not None}

    def _set_embeddings(self, width: int, time: bool, classes: int | None) -> int | None:
        """Make the embeddings and return the width of the vector that modulates the blocks; None without one."""
        self.time, self.classes = time, None if classes is None else validate_count("classes", classes)
        self.embedding = TimeEmbedding(width) if time else None
        self.labels = None if classes is None else _LabelEmbedding(classes, width)
        return None if self.embedding is None and self.labels is None else width

    def validate_event(self, event_shape: tuple[int, ...]) -> None:
        """Raise if the events have another shape than the network was built for. The network is not run.

        Args:
            event_shape: E of the model.

        Raises:
            ValueError: the shapes differ; the message names both.
        """
        raise NotImplementedError

    def _embed(self, z: Tensor, t: Tensor | None, label: Tensor | None) -> Tensor | None:
        name = type(self).__name__
        if self.embedding is None and t is not None:
            raise TypeError(f"this {name} was built with time=False but got a time; call net(x).")
        if self.embedding is not None and t is None:
            raise TypeError(f"{name} needs a time: call net(z, t), or build it with time=False.")
        if self.labels is None and label is not None:
            raise TypeError(f"this {name} was built without classes but got a label; build it with classes=K.")
        time = None if self.embedding is None else self.embedding(t)
        if self.labels is None:
            return time
        vector: Tensor = self.labels(label, z)
        return vector if time is None else time + vector


class MLP(_Network):
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

    Example:
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
    ) -> None:
        super().__init__()
        self.event_shape = validate_shape("event_shape", [event_shape] if isinstance(event_shape, int) else event_shape)
        self.width, self.depth = validate_count("width", width), validate_count("depth", depth)
        self.outputs, self.dropout = _validate_outputs(outputs), _validate_dropout(dropout)
        size = event_size(self.event_shape)
        embedding = self._set_embeddings(width, time, classes)
        self.input = _linear(size, width, _INPUT_GAIN)
        self.blocks = nn.ModuleList(_DenseBlock(width, embedding, dropout) for _ in range(depth))
        self.output = _zero(nn.Linear(width, size * (outputs or 1)))

    def forward(self, z: Tensor, t: Tensor | None = None, /, label: Tensor | None = None) -> Tensor:
        """``(B, *E)`` to ``(B, *E)``, or ``(B, K, *E)`` with ``outputs=K``.

        Args:
            z: states, ``(B, *E)``.
            t: times, ``(B,)``; left out for a network with ``time=False``.
            label: integers ``(B,)`` from 0 to K - 1 for a network with ``classes=K``; -1 and None mean "no label".

        Raises:
            TypeError: t is missing, or given to a network without time; a label given to one without classes.
            ValueError: the label has the wrong shape or dtype, or is not a class of the network.
        """
        embedding = self._embed(z, t, label)
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


class UNet(_Network):
    """A small convolutional U-Net: a residual block down and one up per resolution, up only at the highest.

    Convolutions of stride 2 change the resolution, skip connections are sums. The highest
    resolution, where a channel costs most, has ``width`` channels, all others four times as many. The defaults make
    0.19 million parameters.

    Args:
        channels: C of the images ``(C, H, W)``. Sides that are not multiples of ``2**(levels - 1)`` are padded with
            zeros; the output has the shape of z.
        width: channels at the highest resolution.
        levels: number of resolutions.
        outputs: None: the output has the shape of z; K: it is ``(B, K, C, H, W)``.
        time: whether the network takes t.
        dropout: probability of dropping a hidden unit in training.
        classes: K: the network takes ``label=``, see this module's header; None: it takes none.

    Example:
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
    ) -> None:
        super().__init__()
        self.channels, self.width = validate_count("channels", channels), validate_count("width", width)
        self.levels, self.outputs = validate_count("levels", levels), _validate_outputs(outputs)
        if levels > _MOST_LEVELS:
            raise ValueError(f"levels must be at most {_MOST_LEVELS}, got {levels}; each halves the sides of images.")
        self.dropout = _validate_dropout(dropout)
        widths = [width if level == 0 else 4 * width for level in range(levels)]
        embedding = self._set_embeddings(4 * width, time, classes)
        self.input = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList(_ConvolutionBlock(w, embedding, dropout) for w in widths[1:])
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(_ConvolutionBlock(w, embedding, dropout) for w in widths)
        self.grow = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairwise(widths))
        self.norm = _group_norm(width)
        self.output = _zero(nn.Conv2d(width, channels * (outputs or 1), 3, padding=1))

    def forward(self, z: Tensor, t: Tensor | None = None, /, label: Tensor | None = None) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C, H, W)``, or ``(B, K, C, H, W)`` with ``outputs=K``.

        Args:
            z: images, ``(B, C, H, W)``.
            t: times, ``(B,)``; left out for a network with ``time=False``.
            label: integers ``(B,)`` from 0 to K - 1 for a network with ``classes=K``; -1 and None mean "no label".

        Raises:
            TypeError: t is missing, or given to a network without time; a label given to one without classes.
            ValueError: z is not an image of these channels; the label has the wrong shape or dtype, or is not a class
                of the network.
        """
        self._validate(z)
        embedding = self._embed(z, t, label)
        h = self.input(self._padded(z))
        skips = []
        for shrink, block in zip(self.shrink, self.down, strict=True):
            skips.append(h)
            h = block(shrink(h), embedding)
        for level in reversed(range(self.levels)):
            if level < self.levels - 1:
                h = self.grow[level](h) + skips[level]
            h = self.up[level](h, embedding)
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
