"""Ways to a transform's time derivative and to the gradients of two losses, as calls to be timed."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ndm_ct import transforms

from .models import TERMS, network
from .recipes import Recipe

DIFFERENCE = 3e-4
"""Step of the central difference in time; of 1e-2, 3e-3, 1e-3, 3e-4 and 1e-4 the one with the least error."""


class PlainGroupNorm(nn.GroupNorm):
    """Normalisation of groups as one scale and shift per row and channel, in operations that have derivatives."""

    def forward(self, h: Tensor) -> Tensor:
        """Normalise states ``(B, C, *)``."""
        groups = h.flatten(1).unflatten(1, (self.num_groups, -1))
        mean = groups.mean(-1)
        spread = torch.rsqrt((groups * groups).mean(-1) - mean * mean + self.eps)
        each = self.num_channels // self.num_groups
        scale = spread.repeat_interleave(each, 1) * self.weight
        shift = self.bias - mean.repeat_interleave(each, 1) * scale
        shape = (*scale.shape, *(1,) * (h.ndim - 2))
        return torch.addcmul(shift.reshape(shape), h, scale.reshape(shape))


def _normalised(net: nn.Module, kind: str) -> nn.Module:
    """The network with its GroupNorms removed, or in plain operations."""
    for parent in list(net.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.GroupNorm):
                plain = PlainGroupNorm(module.num_groups, module.num_channels)
                setattr(parent, name, nn.Identity() if kind == "no GroupNorm" else plain)
    return net


def _network(recipe: Recipe, shape: tuple[int, ...], outputs: int | None = None, time: bool = True) -> nn.Module:
    """The recipe's network with its last layer drawn at random, because a zero layer has a zero derivative."""
    net = network(recipe, shape, recipe.width, outputs, time)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return net


def derivatives(recipe: Recipe, shape: tuple[int, ...], rows: int) -> dict[str, Callable[[], Any]]:
    """Ways to F and its time derivative: bare, and with the backward pass that a training needs."""
    torch.manual_seed(0)
    net, features = _network(recipe, shape), _network(recipe, shape, TERMS, time=False)
    neural, separable = transforms.Neural(net), transforms.Separable(features, transforms.PolynomialBasis(TERMS))
    x, t = torch.randn(rows, *shape), torch.rand(rows, dtype=torch.float64)
    ways: dict[str, tuple[nn.Module, Callable[[], tuple[Tensor, ...]]]] = {
        "network alone": (net, lambda: (net(x, t.to(x.dtype)),)),
        "Neural, forward mode": (net, partial(neural.with_derivative, x, t)),
        "Neural, central difference": (net, partial(_central_difference, net, x, t)),
        "Separable, analytic": (features, partial(separable.with_derivative, x, t)),
    }
    for kind in ("no GroupNorm", "plain GroupNorm") if recipe.levels else ():
        other = _normalised(copy.deepcopy(net), kind)
        ways[f"network, {kind}"] = (other, lambda other=other: (other(x, t.to(x.dtype)),))
        ways[f"Neural, forward mode, {kind}"] = (other, partial(transforms.Neural(other).with_derivative, x, t))

    def trained(module: nn.Module, way: Callable[[], tuple[Tensor, ...]]) -> Callable[[], Any]:
        weights = list(module.parameters())
        return lambda: torch.autograd.grad(sum(each.square().sum() for each in way()), weights)

    calls = {name: torch.no_grad()(way) for name, (_, way) in ways.items()}
    return calls | {f"{name}, and backward": trained(*way) for name, way in ways.items()}


def _central_difference(net: nn.Module, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The network's mean of two values in time and their difference quotient, one call of twice the rows."""
    times = torch.cat([t - DIFFERENCE, t + DIFFERENCE]).to(x.dtype)
    before, after = net(torch.cat([x, x]), times).chunk(2)
    return 0.5 * (before + after), (after - before) / (2.0 * DIFFERENCE)


def difference_error(recipe: Recipe, shape: tuple[int, ...]) -> float:
    """Error of the central difference in float32 relative to the derivative, root mean squares."""
    torch.manual_seed(0)
    net = _network(recipe, shape)
    x, t = torch.randn(64, *shape), torch.rand(64, dtype=torch.float64)
    with torch.no_grad():
        found = _central_difference(net, x, t)[1].double()
        net, x = net.double(), x.double()
        _, exact = torch.func.jvp(lambda time: net(x, time), (t,), (torch.ones_like(t),))
    return float((found - exact).norm() / exact.norm())


def gradients(recipe: Recipe, shape: tuple[int, ...], rows: int) -> dict[str, Callable[[], Any]]:
    """Ways to the gradients of two losses of which only the first reaches the state."""
    torch.manual_seed(0)
    net = _network(recipe, shape, 2)
    x, t, gain = torch.randn(rows, *shape), torch.rand(rows), torch.ones((), requires_grad=True)
    wanted = [*net.parameters(), gain]

    def first(output: Tensor) -> Tensor:
        return output.square().sum()

    def second(output: Tensor) -> Tensor:
        return output.abs().sum()

    def single() -> Any:
        return torch.autograd.grad(first(net(gain * x, t)), wanted)

    def two_evaluations() -> Any:
        z = gain * x
        return torch.autograd.grad(first(net(z, t)) + second(net(z.detach(), t)), wanted)

    def twice_the_rows() -> Any:
        z = gain * x
        one, other = net(torch.cat([z, z.detach()]), torch.cat([t, t])).chunk(2)
        return torch.autograd.grad(first(one) + second(other), wanted)

    def two_backward_passes() -> Any:
        z = gain * x
        state = z.detach().requires_grad_()
        output = net(state, t)
        bound = first(output)
        (through,) = torch.autograd.grad(bound, state, retain_graph=True)
        return torch.autograd.grad(bound + second(output) + (through * z).sum(), wanted)

    return {
        "one loss": single, "two evaluations": two_evaluations, "twice the rows": twice_the_rows,
        "two backward passes": two_backward_passes,
    }  # fmt: skip
