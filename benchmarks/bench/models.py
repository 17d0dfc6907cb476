"""Plain diffusions and Neural Diffusion Models of a recipe, by names such as ``ndm-x+neural+F8``."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import ndm_ct
from ndm_ct import schedules, transforms
from ndm_ct.nn import MLP, FromZuko, Preconditioned, UNet
from ndm_ct.objectives.bound import Bound
from ndm_ct.objectives.time_samplers import LearnedBuckets, LossHistory
from ndm_ct.schedules.volatility import LearnedVolatility, Matched

from .recipes import Recipe, Rows

MODELS = ("diffusion", "matched", "ndm-x", "ndm-moments", "ndm-x-eta", "ndm-moments-eta", "ndm-flow")
SCHEDULES = {"cosine": schedules.Cosine, "vp": schedules.VariancePreserving, "rectified": schedules.Rectified}
TIMES = {"history": LossHistory, "buckets": LearnedBuckets}

ABLATIONS = (
    *(f"{base}+{name}" for name in (*SCHEDULES, "learned") for base in ("diffusion", "ndm-x", "ndm-x+neural")),
    "ndm-x+neural", "ndm-moments+neural", "ndm-x-eta+neural", "ndm-x+scaling",
    *(f"{base}+{name}" for name in TIMES for base in ("diffusion", "ndm-x")),
    *(f"ndm-x+F{width}" for width in (4, 16, 32, 128)),
    *(f"ndm-moments+R{weight:g}" for weight in (0.03, 0.3, 1, 3)),
)  # fmt: skip
"""Models that ``paper_claims.py --ablations`` adds to ``MODELS``."""

TERMS = 2
"""Terms of the separable transform."""


def models_of(recipe: Recipe) -> list[str]:
    """The names in ``MODELS`` that fit the data."""
    return [name for name in MODELS if recipe.flow is not None or name != "ndm-flow"]


@dataclass(frozen=True)
class Variant:
    """The meaning of a model's name: one of ``MODELS``, then changes of it behind plus signs."""

    base: str
    schedule: str = "linear"
    transform: str = "separable"
    transform_width: int | None = None
    times: str = "even"
    regressions: float = 0.1

    @staticmethod
    def parse(name: str) -> "Variant":
        """The variant of a name.

        Raises:
            ValueError: an unknown base or change, or a change of a transform that the base does not have.
        """
        base, *changes = name.split("+")
        learned = base.startswith("ndm") and base != "ndm-flow"  # models whose F can be changed
        found: dict[str, Any] = {"transform": "flow"} if base == "ndm-flow" else {}
        for change in changes:
            if change in SCHEDULES or change == "learned":
                found["schedule"] = change
            elif change in TIMES:
                found["times"] = change
            elif change in ("neural", "scaling") and learned:
                found["transform"] = change
            elif change.startswith("F") and change[1:].isdecimal() and learned:
                found["transform_width"] = int(change[1:])
            elif re.fullmatch(r"R\d+(\.\d+)?", change) and "moments" in base:
                found["regressions"] = float(change[1:])
            else:
                raise ValueError(f"{name}: {change!r} changes nothing in {base!r}")
        if base not in MODELS:
            raise ValueError(f"{name}: {base!r} is none of {', '.join(MODELS)}")
        return Variant(base, **found)

    @property
    def objective(self) -> Bound | None:
        """The objective for ``fit``; None: the library's."""
        sampler = TIMES[self.times]() if self.times in TIMES else None
        if "moments" in self.base:
            return Bound(sampler, regressions=(self.regressions, self.regressions))
        return None if sampler is None else Bound(sampler)


def build(name: str, recipe: Recipe, shape: tuple[int, ...], std: float, seed: int) -> ndm_ct.NDM:
    """An untrained model, one of ``MODELS`` or a variant, on rows of a shape and a standard deviation."""
    variant = Variant.parse(name)
    schedule, t_min = _schedule(variant, recipe)
    torch.manual_seed(seed)
    if not variant.base.startswith("ndm"):
        matched = variant.base == "matched"
        net = _matched_network(recipe, shape) if matched else network(recipe, shape, recipe.width, None)
        return ndm_ct.NDM(Preconditioned(net, data_std=std), shape, schedule=schedule, t_min=t_min)
    head = "moments" if "moments" in variant.base else "x"
    transform = _transform(variant, recipe, shape)
    net = network(recipe, shape, recipe.width, 2 if head == "moments" else None)
    volatility = LearnedVolatility() if variant.base.endswith("eta") else 1.0
    return ndm_ct.NDM(
        Preconditioned(net, prediction=head, data_std=std), shape, transform=transform, schedule=schedule,
        prediction=head,
        volatility=Matched() if variant.transform == "scaling" else volatility, t_min=t_min,
    )  # fmt: skip


def _schedule(variant: Variant, recipe: Recipe) -> tuple[schedules.Schedule, float]:
    """The schedule, and the time at which it reaches the log-SNR at which the recipe's schedule begins."""
    if variant.schedule in SCHEDULES:
        schedule = SCHEDULES[variant.schedule]()
        angle = torch.tensor(math.atan(math.exp(0.5 * recipe.gamma[0])), dtype=torch.float64)
        return schedule, float(schedule.time_at(angle))
    kind = schedules.LearnedLogSNR if variant.schedule == "learned" else schedules.LinearLogSNR
    return kind(*recipe.gamma), 0.0


def _transform(variant: Variant, recipe: Recipe, shape: tuple[int, ...]) -> transforms.Transform:
    """The learned F of a variant."""
    width = variant.transform_width or recipe.transform_width
    if variant.transform == "flow":
        return _spline_flow(recipe, shape)
    if variant.transform == "scaling":
        return transforms.LearnedScaling(shape)
    if variant.transform == "neural":
        return transforms.Neural(network(recipe, shape, width, None))
    net = network(recipe, shape, width, TERMS, time=False)
    return transforms.Separable(net, transforms.PolynomialBasis(TERMS))


def network(recipe: Recipe, shape: tuple[int, ...], width: int, outputs: int | None, time: bool = True) -> nn.Module:
    """A U-Net for images, a perceptron for vectors."""
    if recipe.levels:
        return UNet(shape[0], width=width, levels=recipe.levels, outputs=outputs, time=time)
    return MLP(shape, width=width, outputs=outputs, time=time)


class Flat(nn.Module):
    """A flow h of vectors, applied to events of any shape: h(cx)/c of the flattened event."""

    def __init__(self, flow: nn.Module, scale: float) -> None:
        super().__init__()
        self.flow, self.scale = flow, scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and its log-determinant."""
        y, logdet = self.flow(self.scale * x.flatten(1))
        return y.reshape(x.shape) / self.scale, logdet

    def inverse(self, y: Tensor) -> Tensor:
        """x."""
        return self.flow.inverse(self.scale * y.flatten(1)).reshape(y.shape) / self.scale


def _spline_flow(recipe: Recipe, shape: tuple[int, ...]) -> transforms.Flow:
    """Autoregressive rational-quadratic splines of zuko."""
    if recipe.flow is None:
        raise ValueError("ndm-flow needs a recipe with a flow.")
    import zuko

    count, width, bins = recipe.flow
    hidden = (width,) * (1 if recipe.levels else 2)
    flow = zuko.flows.NSF(math.prod(shape), transforms=count, hidden_features=hidden, bins=bins)
    return transforms.Flow(Flat(FromZuko(flow), recipe.flow_scale))


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


class Sum(nn.Module):
    """Networks of the same arguments whose outputs are added."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """The sum."""
        return sum((part(z, t) for part in self.parts), torch.zeros_like(z))


def _matched_network(recipe: Recipe, shape: tuple[int, ...]) -> nn.Module:
    """The predictor of a plain diffusion with at least as many parameters as the largest NDM, and hardly more.

    One more channel enlarges a U-Net of width 16 by an eighth, far more than a small F has. The difference is therefore
    made up by a second, narrow U-Net.
    """
    names = [name for name in models_of(recipe) if name.startswith("ndm")]
    needed = max(parameters(build(name, recipe, shape, 1.0, 0)) for name in names)

    def least(of: Callable[[int], nn.Module], width: int) -> int:
        while parameters(of(width)) < needed:
            width += 1
        return width

    def alone(width: int) -> nn.Module:
        return network(recipe, shape, width, None)

    width = least(alone, recipe.width)
    if not recipe.levels or parameters(alone(width)) == needed:
        return alone(width)

    def together(other: int) -> nn.Module:
        return Sum(alone(width - 1), alone(other))

    return together(least(together, 1))


def fit(model: ndm_ct.NDM, name: str, recipe: Recipe, rows: Rows, *, steps: int, **settings: Any) -> ndm_ct.FitResult:
    """``ndm_ct.fit`` by a recipe; the name of the model decides the objective."""
    options = {"objective": Variant.parse(name).objective, "quantisation": rows.bins} | settings
    return ndm_ct.fit(
        model, rows.split.train, steps=steps, batch_size=recipe.batch_size, lr=recipe.lr, **options
    )  # fmt: skip
