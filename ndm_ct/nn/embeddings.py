r"""What networks are conditioned on: time, a class, a vector and a sequence.

A network adds embeddings of time t, label y and context c to one vector, which scales and shifts its hidden layers,

.. math::
    e(t, y, c) = e(t) + v_y + h(c), \qquad y \in \{-1, 0, \dots, K - 1\} .

-1 is "no label", and a context with a NaN is "no context", for which a learned vector stands. The network is then the
unconditional one, which :func:`ndm_ct.guided` needs and ``fit(cond_dropout=)`` trains. A sequence (of the vectors of a
text) is looked at by attention. A token with a NaN is no token, so shorter sequences are filled up with NaN.

References:
    Ho and Salimans, Classifier-Free Diffusion Guidance (one network with and without the label),
    https://arxiv.org/abs/2207.12598
    Vaswani et al., Attention Is All You Need, https://arxiv.org/abs/1706.03762
"""

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ndm_ct._core.checks import some, validate_count
from ndm_ct._core.config import Configurable
from ndm_ct._core.keywords import keyword_names

__all__ = ["Attention", "Network", "TimeEmbedding"]

_FREQUENCIES = 16
_NO_LABEL = -1


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
        return functional.silu(self.output(functional.silu(self.hidden(features.to(self.hidden.weight.dtype)))))


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


class _ContextEmbedding(nn.Module):
    """Two layers from K numbers, and a learned vector for "no context".

    Args:
        size: K.
        width: length of the vectors.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size = size
        self.hidden, self.output = nn.Linear(size, width), nn.Linear(width, width)
        self.none = nn.Parameter(torch.zeros(width))

    def forward(self, context: Tensor | None, z: Tensor) -> Tensor:
        """Embed a context ``(B, K)`` as ``(B, width)``; a row with a NaN, and None, are "no context"."""
        if context is None:
            return self.none.expand(z.shape[0], -1)
        if not isinstance(context, Tensor) or context.shape != (z.shape[0], self.size):
            came = f"shape {tuple(context.shape)}" if isinstance(context, Tensor) else f"a {type(context).__name__}"
            raise ValueError(
                f"context is {came}, expected a tensor of shape ({z.shape[0]}, {self.size}), one row of numbers for "
                "each row of z; put several conditions together with torch.cat."
            )
        context = context.to(self.none.dtype)
        known = ~context.isnan().any(1, keepdim=True)
        embedded = self.output(functional.silu(self.hidden(context.nan_to_num(0.0))))
        return torch.where(known, embedded, self.none)


class Attention(nn.Module):
    r"""Attention of a network's states to themselves, or to a sequence, added to them.

    It is written as two products and a softmax, because torch's fused kernels have no forward derivative.

    Args:
        width: C, length of a state.
        heads: number of heads; must divide C.
        sequence: K, length of a token of the sequence; None is attention to the states themselves.
    """

    def __init__(self, width: int, heads: int, sequence: int | None = None) -> None:
        super().__init__()
        if width % validate_count("heads", heads):
            raise ValueError(f"heads={heads} must divide the {width} channels that attend.")
        self.heads = heads
        self.norm, self.query = nn.LayerNorm(width), nn.Linear(width, width)
        self.keys, self.output = nn.Linear(sequence or width, 2 * width), nn.Linear(width, width)
        self.none = None if sequence is None else nn.Parameter(torch.zeros(2 * width))
        for parameter in self.output.parameters():  # so that it starts as nothing
            nn.init.zeros_(parameter)

    def forward(
        self, h: Tensor, sequence: Tensor | None = None, scale: Tensor | float = 0.0, shift: Tensor | float = 0.0
    ) -> Tensor:
        """The states ``(B, N, C)`` and what they found, by ``(1 + scale) norm(h) + shift``.

        They look at each other or at the sequence ``(B, L, K)``, of which a token with a NaN is not seen.
        """
        states = self.norm(h) * (1.0 + scale) + shift
        hidden: Tensor | None = None
        if self.none is None:
            pairs = self.keys(states)
        else:  # behind a learned token, which alone is there without a sequence
            pairs = self.none.expand(len(h), 1, -1)
            if sequence is not None:
                hidden = functional.pad(sequence.isnan().any(2), (1, 0))[:, None, None, :]
                pairs = torch.cat([pairs, self.keys(sequence.to(h.dtype).nan_to_num(0.0))], 1)
        key, value = (self._split(each) for each in pairs.chunk(2, dim=2))
        query = self._split(self.query(states))
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        found = (scores.softmax(-1) @ value).transpose(1, 2).reshape(h.shape)
        return h + self.output(found)

    def _split(self, h: Tensor) -> Tensor:
        """``(B, N, C)`` to ``(B, heads, N, C/heads)``."""
        return h.reshape(*h.shape[:2], self.heads, -1).transpose(1, 2)


class Network(nn.Module, Configurable):
    """What the networks share: embeddings of time and conditioning, and what they say about their conditioning."""

    classes: int | None
    context: int | None
    sequence: int | None = None
    until: bool
    embedding: TimeEmbedding | None
    ends: TimeEmbedding | None
    labels: _LabelEmbedding | None
    contexts: _ContextEmbedding | None

    _unmentioned = ("classes", "context", "sequence", "attention", "heads", "until")
    """Arguments that a description leaves out at their defaults, as files did before the arguments were there."""

    @property
    def null(self) -> dict[str, float]:
        """The conditioning that means none, by name; empty for a network without conditioning."""
        known = {"label": self.classes, "context": self.context, "sequence": self.sequence}
        return {name: _NO_LABEL if name == "label" else math.nan for name, given in known.items() if given is not None}

    def cond_names(self) -> tuple[frozenset[str], bool]:
        """Conditioning keywords the network accepts, those that it was built for, and whether it accepts any."""
        names, anything = keyword_names(self.forward, 2)
        return names & {*self.null, *(["until"] if self.until else [])}, anything

    def config(self, own: list[Any] | None = None) -> dict[str, Any]:
        """As of every configurable object; arguments at their defaults that earlier files lack are not mentioned."""
        defaults = {name: each.default for name, each in inspect.signature(type(self)).parameters.items()}
        config = super().config(own)
        return {k: value for k, value in config.items() if k not in self._unmentioned or value != defaults[k]}

    def _set_embeddings(
        self, width: int, time: bool, classes: int | None, context: int | None, until: bool
    ) -> int | None:
        """Make the embeddings and return the width of the vector that modulates the blocks; None without one."""
        if until and not time:
            raise ValueError("until=True needs time=True: a network of a flow map takes both ends of its step.")
        self.time, self.classes = time, None if classes is None else validate_count("classes", classes)
        self.context = None if context is None else validate_count("context", context)
        self.embedding = TimeEmbedding(width) if time else None
        self.labels = None if classes is None else _LabelEmbedding(classes, width)
        self.contexts = None if context is None else _ContextEmbedding(context, width)
        self.until, self.ends = until, None
        if until:  # it starts as nothing, so that a network with the weights of one without it is that network
            self.ends = TimeEmbedding(width)
            for parameter in self.ends.output.parameters():
                nn.init.zeros_(parameter)
        return None if self.embedding is None and classes is None and context is None else width

    def validate_event(self, event_shape: tuple[int, ...]) -> None:
        """Raise if the events have another shape than the network was built for. The network is not run.

        Args:
            event_shape: E of the model.

        Raises:
            ValueError: the shapes differ; the message names both.
        """
        raise NotImplementedError

    def _embed(
        self, z: Tensor, t: Tensor | None, label: Tensor | None, context: Tensor | None = None,
        until: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        name = type(self).__name__
        if self.embedding is None and t is not None:
            raise TypeError(f"this {name} was built with time=False but got a time; call net(x).")
        if self.embedding is not None and t is None:
            raise TypeError(f"{name} needs a time: call net(z, t), or build it with time=False.")
        if self.labels is None and label is not None:
            raise TypeError(f"this {name} was built without classes but got a label; build it with classes=K.")
        if self.contexts is None and context is not None:
            raise TypeError(f"this {name} was built without a context but got one; build it with context=K.")
        if self.ends is None and until is not None:
            raise TypeError(f"this {name} was built for single times but got until; build it with until=True.")
        parts: list[Tensor] = [] if self.embedding is None else [self.embedding(t)]
        if self.ends is not None:
            parts.append(self.ends(t if until is None else until))
        if self.labels is not None:
            parts.append(self.labels(label, z))
        if self.contexts is not None:
            parts.append(self.contexts(context, z))
        return sum(parts[1:], parts[0]) if parts else None

    def _validate_sequence(self, sequence: Tensor | None, z: Tensor) -> None:
        if sequence is None:
            return
        if self.sequence is None:
            raise TypeError(f"this {type(self).__name__} was built without a sequence; build it with sequence=K.")
        if not isinstance(sequence, Tensor) or sequence.ndim != 3 or sequence.shape[::2] != (len(z), self.sequence):
            came = f"shape {tuple(sequence.shape)}" if isinstance(sequence, Tensor) else f"a {type(sequence).__name__}"
            raise ValueError(
                f"sequence is {came}, expected a tensor of shape ({len(z)}, L, {self.sequence}), one sequence of "
                "tokens for each row of z; fill shorter ones up with NaN."
            )
