r"""The parts of a model of a table: its map to latents with the categories' probabilities, and its network.

With real coordinates x, categories c, and what is observed o (nothing, unless the model has all conditionals),

.. math::
    \log p(x, c \mid o) = \sum_j \log P(c_j \mid c_{<j}, o) + \log p(x \mid c, o) .

The first term is a network that ends in a softmax for every column, so it is exact, and every probability is one of a
sum of one. It stands beside the log-determinant of the map, so it is part of every bound and likelihood of the model.
The second term is the diffusion, which is told c and o.

**Roles.** A model of all conditionals is told the role of every coordinate: unknown, observed, or a target. The network
sees noisy targets and clean observed values, and returns zero elsewhere. With :class:`~ndm_ct.nn.Preconditioned` and a
variance-preserving schedule zero is the exact denoiser of N(0, 1), whose probability flow stands still: coordinates
that are not targets add the constant :math:`\log N(y_i; 0, 1)` to a log-density, and nothing to velocity and trace.

References:
    Li et al., ACFlow: Flow Models for Arbitrary Conditional Likelihoods, https://arxiv.org/abs/1909.06319
    Strauss and Oliva, Arbitrary Conditional Distributions with Energy, https://arxiv.org/abs/2102.04426
    Hoogeboom et al., Autoregressive Diffusion Models (any order), https://arxiv.org/abs/2110.02037
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ndm_ct._core.config import Configurable
from ndm_ct.columns.marginals import ColumnMap
from ndm_ct.nn import MLP

__all__ = ["OBSERVED", "TARGET", "UNKNOWN", "Categories", "TableMap", "TableNet"]

UNKNOWN, OBSERVED, TARGET = 0, 1, 2
"""Roles of a coordinate."""


class Categories(nn.Module, Configurable):
    r""":math:`\log P(c \mid o) = \sum_j \log P(c_j \mid c_{<j}, o)`: a perceptron with a softmax for every column.

    Args:
        sizes: number of categories of every column.
        features: number of real coordinates that may be observed; 0 for none.
        width: width of the hidden layers.
        dropout: probability of dropping a hidden unit in training.

    Example:
        >>> codes = torch.tensor([[0, 2], [1, 1]])
        >>> Categories((2, 3)).log_prob(codes).exp()  # before training: 1/2 times 1/3
        tensor([0.1667, 0.1667], grad_fn=<ExpBackward0>)
    """

    def __init__(self, sizes: Sequence[int], features: int = 0, width: int = 128, dropout: float = 0.0) -> None:
        super().__init__()
        self.sizes, self.features, self.width, self.dropout = tuple(sizes), features, width, dropout
        total = sum(self.sizes)
        self.layers = nn.Sequential(
            nn.Linear(total + 2 * features, width), nn.SiLU(), nn.Dropout(dropout),
            nn.Linear(width, width), nn.SiLU(), nn.Dropout(dropout),
        )  # fmt: skip
        self.output = nn.Linear(width, total)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def start_at(self, shares: Tensor) -> None:
        """Begin at the shares of the categories, those of all columns after each other."""
        with torch.no_grad():
            self.output.bias.copy_(shares.log())

    def log_prob(self, codes: Tensor, roles: Tensor | None = None, known: Tensor | None = None) -> Tensor:
        """Log-probability of the targets among the categories, nats, ``(B,)``.

        Args:
            codes: categories, ``(B, C)``; -1 is unknown.
            roles: of the real coordinates, then of the categories, ``(B, m + C)``; None: all categories are targets.
            known: latents of the real coordinates, ``(B, m)``, zero where they are not observed.
        """
        total = torch.zeros(len(codes), dtype=self.output.weight.dtype, device=codes.device)
        for place in range(len(self.sizes)):
            chosen = torch.log_softmax(self.logits(place, codes, roles, known), 1)
            own = chosen.gather(1, codes[:, place, None].clamp_min(0))[:, 0]
            total = total + (own if roles is None else torch.where(self._of(roles)[:, place] == TARGET, own, 0.0))
        return total

    def logits(self, place: int, codes: Tensor, roles: Tensor | None = None, known: Tensor | None = None) -> Tensor:
        """Unnormalised log-probabilities of a column's categories, ``(B, K)``, given the columns before and observed.

        Args:
            place: number of the column.
            codes: categories, ``(B, C)``; those of targets from this place on do not matter.
            roles: as for :meth:`log_prob`.
            known: as for :meth:`log_prob`.
        """
        earlier = torch.arange(len(self.sizes), device=codes.device) < place
        seen = earlier.expand_as(codes) if roles is None else (self._of(roles) == OBSERVED) | (
            earlier & (self._of(roles) == TARGET)
        )  # fmt: skip
        parts = one_hot(torch.where(seen, codes, -1), self.sizes)
        dtype = self.output.weight.dtype
        if self.features:
            assert roles is not None
            assert known is not None
            parts += [known.to(dtype), (roles[:, : self.features] == OBSERVED).to(dtype)]
        hidden = self.layers(torch.cat([part.to(dtype) for part in parts], 1))
        return self.output(hidden).split(self.sizes, 1)[place]

    def draw(self, codes: Tensor, uniform: Tensor, roles: Tensor | None = None, known: Tensor | None = None) -> Tensor:
        """Codes with the targets drawn, ``(B, C)``.

        Args:
            codes: categories that are observed, ``(B, C)``.
            uniform: numbers uniform in (0, 1), ``(B, C)``, which decide.
            roles: as for :meth:`log_prob`.
            known: as for :meth:`log_prob`.
        """
        codes = codes.clone()
        for place, size in enumerate(self.sizes):
            shares = self.logits(place, codes, roles, known).double().softmax(1).cumsum(1)
            drawn = torch.searchsorted(shares, uniform[:, place, None].double().contiguous())[:, 0].clamp(max=size - 1)
            target = True if roles is None else self._of(roles)[:, place] == TARGET
            codes[:, place] = torch.where(torch.as_tensor(target, device=codes.device), drawn, codes[:, place])
        return codes

    def _of(self, roles: Tensor) -> Tensor:
        """The roles of the categories."""
        return roles[:, -len(self.sizes) :]


def one_hot(codes: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Vectors ``(B, K)`` of the categories of every column; zero where a code is -1."""
    return [functional.one_hot(codes[:, k] + 1, size + 1)[:, 1:] for k, size in enumerate(sizes)]


class TableMap(nn.Module, Configurable):
    """The map of a table for :class:`~ndm_ct.transforms.Flow`; the categories' log-probability is part of its weight.

    Args:
        columns: the map of the real coordinates, without whitening if there are roles; None is the identity.
        categories: of the other columns; None without them.
    """

    def __init__(self, columns: nn.Module | None = None, categories: Categories | None = None) -> None:
        super().__init__()
        self.columns, self.categories = columns, categories

    def forward(
        self, x: Tensor, /, codes: Tensor | None = None, roles: Tensor | None = None, known: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Latents ``(B, m)`` and the weight ``(B,)``, nats: log-determinant and log-probability of the categories.

        Coordinates that are not targets stay as they are.

        Args:
            x: standardised features, ``(B, m)``.
            codes: categories, ``(B, C)``; -1 is unknown.
            roles: ``(B, m + C)``; None: all are targets.
            known: observed latents, ``(B, m)``.
        """
        y, weight = x, torch.zeros_like(x[:, 0])
        if self.columns is not None and roles is None:
            y, weight = self.columns(x)
        elif isinstance(self.columns, ColumnMap) and roles is not None:
            target = roles[:, : x.shape[1]] == TARGET
            scores, logs = self.columns.scores(x.T.contiguous())
            y, weight = torch.where(target, scores.T, x), torch.where(target, logs.T, 0.0).sum(1)
        if self.categories is not None and codes is not None:
            weight = weight + self.categories.log_prob(codes, roles, known).to(weight)
        return y, weight

    def inverse(
        self, y: Tensor, /, codes: Tensor | None = None, roles: Tensor | None = None, known: Tensor | None = None
    ) -> Tensor:
        """Features of latents ``(B, m)``; arguments as of the map."""
        if self.columns is None:
            return y
        x = self.columns.inverse(y)  # type: ignore[operator]
        return x if roles is None else torch.where(roles[:, : y.shape[1]] == TARGET, x, y)


class TableNet(nn.Module, Configurable):
    """The network of a table: a perceptron of the latents that is told categories, and what is observed.

    Args:
        features: number m of real coordinates; 0 for a table of categories, whose one latent means nothing.
        sizes: number of categories of every column.
        conditionals: whether it is told roles and observed latents.
        width: width of the hidden layers.
        depth: number of residual blocks.
        dropout: probability of dropping a hidden unit in training.
    """

    def __init__(
        self, features: int, sizes: Sequence[int] = (), conditionals: bool = False, width: int = 128, depth: int = 3,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.features, self.sizes, self.conditionals = features, tuple(sizes), conditionals
        self.width, self.depth, self.dropout = width, depth, dropout
        told = sum(self.sizes) + (3 * features if conditionals else 0)
        self.net = MLP(features, width, depth, dropout=dropout, context=told or None) if features else None

    def forward(
        self, z: Tensor, t: Tensor, /, codes: Tensor | None = None, roles: Tensor | None = None,
        known: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The shape of z, zero where a coordinate is not a target; arguments as of :class:`TableMap`."""
        if self.net is None:
            return torch.zeros_like(z)
        told = [] if codes is None else one_hot(codes, self.sizes)
        if not self.conditionals or roles is None or known is None:
            return self.net(z, t, context=torch.cat(told, 1).to(z.dtype)) if told else self.net(z, t)
        target, observed = (roles[:, : self.features] == role for role in (TARGET, OBSERVED))
        known = known.to(z.dtype)
        context = torch.cat([*told, target, observed, known], 1).to(z.dtype)
        return target * self.net(torch.where(target, z, known), t, context=context)

    def validate_event(self, event_shape: tuple[int, ...]) -> None:
        """Raise ValueError unless an event is a vector with one entry for each feature."""
        if event_shape != (max(self.features, 1),):
            raise ValueError(
                f"event_shape={event_shape}, but the network was built for {max(self.features, 1)} columns."
            )
