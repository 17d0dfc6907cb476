r"""Exponential averages of the weights over the steps of a training, one for each decay.

After n updates the averages of decay d follow

.. math::
    \bar\theta \leftarrow d_n \bar\theta + (1 - d_n) \theta, \qquad
    d_n = \min\Bigl(d, \frac{1 + n}{10 + n}\Bigr), \quad d_0 = 0 .

Buffers are averaged like weights; integers are copied.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ndm_ct._core.parallel import copy_whole, is_sharded

__all__ = ["Averages", "load_weights", "weights_of"]

Weights = dict[str, Tensor]


def weights_of(model: nn.Module) -> Weights:
    """The tensors of a model's state themselves, by name; tied weights have several names."""
    return {name: each for name, each in model.state_dict(keep_vars=True).items() if isinstance(each, Tensor)}


@torch.no_grad()
def load_weights(model: nn.Module, weights: Weights) -> None:
    """Copy tensors by name into a model; sharded ones take their part."""
    for name, tensor in weights_of(model).items():
        copy_whole(tensor, weights[name])


class Averages:
    """The averaged weights of a model.

    Args:
        model: the model in training.
        decays: d of each average, without 0.
    """

    def __init__(self, model: nn.Module, decays: Sequence[float]) -> None:
        self.model, self.decays = model, tuple(decays)
        self.weights: list[Weights] = [self._copies() for _ in self.decays]

    def _copies(self) -> Weights:
        """Copies of the present weights; names that share a tensor share its copy."""
        copies: dict[int, Tensor] = {}
        found = weights_of(self.model)
        for tensor in found.values():
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.detach().clone()
        return {name: copies[id(tensor)] for name, tensor in found.items()}

    @torch.no_grad()
    def update(self, n: int) -> None:
        """Take the present weights into the averages.

        Args:
            n: number of updates before this one.
        """
        present = weights_of(self.model)
        for decay, weights in zip(self.decays, self.weights, strict=True):
            gain = 1.0 - min(decay, (1 + n) / (10 + n)) if n else 1.0
            for averaged, current in _alike(weights, present):
                if n and (averaged[0].is_floating_point() or averaged[0].is_complex()):
                    torch._foreach_lerp_(averaged, current, gain)
                else:
                    for target, tensor in zip(averaged, current, strict=True):
                        target.copy_(tensor)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Put the first averages into the model; afterwards it has its own weights again."""
        if not self.decays:
            yield
            return
        own = self._copies()
        load_weights(self.model, self.weights[0])
        try:
            yield
        finally:
            load_weights(self.model, own)


def _alike(weights: Weights, present: Weights) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Averages and present weights in groups that one operation takes, each tensor once."""
    pairs = {id(averaged): (averaged, present[name].detach()) for name, averaged in weights.items()}
    groups: dict[object, tuple[list[Tensor], list[Tensor]]] = {}
    for averaged, current in pairs.values():
        kind = (averaged.device, averaged.dtype, is_sharded(averaged))
        first, second = groups.setdefault(kind, ([], []))
        first.append(averaged)
        second.append(current)
    return list(groups.values())
