r"""Checks of what the mathematics assumes about networks, transforms and schedules.

======================================  ===============================================================================
the network, in eval mode               gives the same answer twice; gives a row the same answer alone as in a batch;
                                        has the derivative in z that autograd reports; is finite at both ends; takes
                                        any time, not whole numbers alone; has the scale of what it estimates
                                        (adapted networks)
the schedule                            :math:`\alpha', \sigma'` are the derivatives of :math:`\alpha, \sigma`
the transform                           :math:`\dot F` is the derivative of F; :math:`F(x, 0) = x`; shapes and dtypes
======================================  ===============================================================================

``fit``, ``loglik``, ``encode``, ``decode`` and ``sample`` run them once per model, in a handful of evaluations of two
rows, and again after the model has changed. Derivatives are compared with central differences

.. math::
    \tfrac12 (f_+ - f_-), \qquad f_\pm = f(z \pm h u),

at two steps h. Their error is judged by how much the two differ and by the second difference
:math:`f_+ - 2 f + f_-`: both are large where the function bends, has a kink or is rounded, and there nothing is
reported.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ndm_ct import objectives
from ndm_ct._core.autodiff import slope_along
from ndm_ct._core.checks import append_axes, expand, sum_event
from ndm_ct._core.conditioning import Conditioning
from ndm_ct._core.errors import PredictorError
from ndm_ct._core.precision import resolution
from ndm_ct._core.seeds import make_generator
from ndm_ct.model import NDM
from ndm_ct.prediction import explain
from ndm_ct.transforms import Identity

__all__ = ["check", "verify", "warn_of_unreached"]

Purpose = Literal["likelihood", "flow", "sample", "fit"]


def check(model: NDM, x: Tensor, /, **cond: Any) -> None:
    """Check a model before work is spent on it: what ``fit`` and ``loglik`` check, and the gradients of the bound.

    Args:
        model: the model. ``NDM(..., checks=False)`` or ``model.checks = False`` turns the automatic checks off; this
            function runs them in any case.
        x: some data, shape ``(B, *E)``; two rows are used.
        cond: their conditioning.

    Raises:
        PredictorError: the network is random in eval mode, mixes the rows of a batch, hides a derivative, or is NaN
            or infinite at an end of the time interval.
        ValueError: the transform or the schedule has a wrong derivative, or F(x, 0) is not x.

    Warns:
        UserWarning: the bound has no gradient in some parameters, which are named; the network rounds its times to
            whole numbers; or its output has a scale that no denoiser of these data has.

    Example:
        >>> import ndm_ct
        >>> ndm_ct.check(ndm_ct.NDM(ndm_ct.nn.MLP(2), event_shape=(2,)), torch.randn(8, 2))
        >>> ndm_ct.check(ndm_ct.NDM(lambda z, t: z.detach(), event_shape=(2,)), torch.randn(8, 2))
        Traceback (most recent call last):
        ...
        ndm_ct._core.errors.PredictorError: the prediction depends on z, but autograd sees no dependence ...
    """
    given = model.validate(x, cond, check)
    model.checked.clear()
    verify(model, x, given, "likelihood" if model.transform.bijective else "flow", even_if_off=True)
    if model.t_noise > model.t_min:  # it has no bound
        return
    rows = _two_rows(len(x), x.device)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with model.evaluating(), torch.enable_grad(), _own_noise(x):
        loss = objectives.loss(model, x[rows], generator=0, **given.take(rows)).sum()
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            warn_of_unreached(name for name, g in zip(parameters, gradients, strict=True) if g is None)


def verify(
    model: NDM, start: Tensor, cond: Conditioning, purpose: Purpose, *, latent: bool = False, even_if_off: bool = False
) -> None:
    """Check a model for a purpose, unless the model as it is has passed before.

    Args:
        model: the model.
        start: data, shape ``(B, *data_shape)``.
        cond: their conditioning.
        purpose: "likelihood", "flow" (a solve without a density), "sample" or "fit". What a purpose does not need is
            not checked; what makes its result worse but not wrong is a warning.
        latent: whether ``start`` are latents, shape ``(B, *event_shape)``.
        even_if_off: check also if ``model.checks`` is False.

    Raises:
        PredictorError, ValueError: as in :func:`check`.
    """
    if len(start) > 0:
        model.initialise(start, cond)
    seen = _Seen.of(model, start, cond)
    if len(start) == 0 or not (model.checks or even_if_off) or seen.equals(model.checked.get(purpose)):
        return
    with model.evaluating(), torch.no_grad(), _own_noise(start):
        wrong, suspicious = _examined(model, start, cond, purpose, latent, even_if_off)
    if wrong:
        raise type(wrong[0])(" Also: ".join(str(each) for each in wrong))
    for each in suspicious:
        warnings.warn(str(each), stacklevel=4)
    model.checked[purpose] = seen


def warn_of_unreached(names: Iterable[str]) -> None:
    """Warn of parameters that a loss does not depend on.

    Args:
        names: of the parameters.
    """
    found = list(names)
    if found:
        some = ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
        warnings.warn(
            f"the loss does not depend on the parameters {some}, so training leaves them as they are; remove .detach() "
            "or torch.no_grad() before them, or freeze them with requires_grad_(False) if that is meant.",
            stacklevel=4,
        )


@dataclass(frozen=True)
class _Seen:
    """A model as it was checked: its parts by identity, their state by value."""

    parts: tuple[Any, ...]
    state: tuple[Any, ...]

    @classmethod
    def of(cls, model: NDM, start: Tensor, cond: Conditioning) -> "_Seen":
        modules = tuple(model.modules())[1:]
        versions = sum(0 if p.is_inference() else p._version for p in model.parameters())
        flags = tuple(module.training for module in modules)
        state = (start.dtype, start.device, start.shape[1:], tuple(cond), flags, versions)
        return cls((*modules, model.predictor), state)

    def equals(self, other: "_Seen | None") -> bool:
        """Whether the model has not changed."""
        same = other is not None and self.state == other.state and len(self.parts) == len(other.parts)
        return same and other is not None and all(a is b for a, b in zip(self.parts, other.parts, strict=True))


def _own_noise(like: Tensor) -> Any:
    """Nothing that networks draw here is taken from the caller's random numbers."""
    return torch.random.fork_rng([like.device] if like.device.type == "cuda" else [])


def _two_rows(rows: int, device: torch.device) -> Tensor:
    return torch.tensor([0, rows - 1], device=device)


def _examined(
    model: NDM, start: Tensor, cond: Conditioning, purpose: Purpose, latent: bool, asked: bool
) -> tuple[list[Exception], list[Exception]]:
    """What is wrong, and what is only suspicious, for a purpose; if asked, also what the work would meet itself."""
    index = _two_rows(len(start), start.device)
    try:
        given = cond.take(index)
        y = start[index] if latent else model.to_latent(start[index], generator=0, **given)[0]
    except Exception:  # reported, in better words, by the work itself
        return [], []
    t, z = _states(model, y)
    promised = purpose in ("likelihood", "fit")
    wrong = [
        *_of_schedule(model, t), *_of_transform(model, y, t, given, promised=promised),
        *_of_noise_scale(model, y, t, given),
    ]  # fmt: skip
    network = _of_network(model, t, z, cond, index, len(start), derivative=purpose in ("likelihood", "fit"))
    trained = asked or model.adapted
    ends, doubtful = _of_output(model, t, y[:1], cond.take(index[:1].expand(9)), scaled=trained and not latent)
    if asked:
        network = network or ends
    elif model.adapted:
        doubtful = [*ends, *doubtful]
    if purpose in ("likelihood", "flow"):
        return [*wrong, *network], doubtful
    starts = [each for each in wrong if purpose == "fit" and isinstance(each, _OtherStart)]
    return [each for each in wrong if each not in starts], [*starts, *network, *doubtful]


def _states(model: NDM, y: Tensor) -> tuple[Tensor, Tensor]:
    """A time for each of two rows, on either side of where noise is as large as the data, and noisy data there."""
    size = float(y.double().square().mean().sqrt()) or 1.0
    t = model.t_min + (1.0 - model.t_min) * torch.linspace(0.05, 0.95, 37, dtype=torch.float64, device=y.device)
    gamma = model.schedule(t).gamma - 2.0 * torch.tensor(size).log().to(y.device)
    t = torch.stack([t[(gamma - place).abs().argmin()] for place in (-1.0, 1.0)])
    c, noise = model.schedule(t), _normal("states", y)
    return t, expand(c.alpha, y) * y + expand(c.sigma, y) * noise


def _normal(word: str, like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=make_generator("check", word), dtype=torch.float64).to(like)


def _norm(y: Tensor) -> Tensor:
    """Norm of each row, float64."""
    return y.double().reshape(len(y), -1).norm(dim=1)


# --- the network ------------------------------------------------------------------------------------------------------

_ROW_CURE = (
    "use layers that treat each row alone: GroupNorm, LayerNorm, or BatchNorm with running statistics "
    "(track_running_stats=True); take no mean or std over the first axis, and use the time of each row"
)


def _of_network(
    model: NDM, t: Tensor, z: Tensor, cond: Conditioning, index: Tensor, rows: int, *, derivative: bool
) -> list[Exception]:
    def part(z: Tensor, rows: Tensor) -> Tensor:
        """The network's part of the velocity of some of the two rows."""
        return model.flow(z.dtype, **cond.take(index[rows])).network_part(t[rows])(z)[0]

    both = torch.arange(2, device=z.device)
    small = resolution(model, z.dtype)
    try:
        first, second = part(z, both), part(z, both)
        nearby = part(z * (1.0 + small**0.5), both)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        explain(model, z, t, cond, rows, error)
        return []
    if not bool(torch.isfinite(first).all()):
        return []
    size = _norm(first)
    change = _norm(second - first)
    if bool((change > 256.0 * small * size).any()):
        return [
            PredictorError(
                f"the predictor gives different answers for the same z and t in eval mode ({_percent(change, size)} "
                "apart), so that its flow has no density and an adaptive solver may never end; remove the random "
                "numbers from it, or draw them in training only: nn.Dropout, or functional.dropout(h, p, "
                "training=self.training)."
            )
        ]
    tolerance = 3.0 * small**0.5 * size + 4.0 * _norm(nearby - first)
    try:
        change = _norm(part(z[1:], both[1:]) - first[1:])
    except Exception as error:
        if cond:  # of another length than the two rows: the work itself says more
            return []
        return [
            PredictorError(
                f"the predictor takes two rows, but not one row alone ({str(error).splitlines()[0][:200]}); rows are "
                f"solved with steps of their own, so {_ROW_CURE}."
            )
        ]
    if bool((change > tolerance[1:]).any()):
        return [
            PredictorError(
                f"the predictor's output for a row depends on the other rows of its batch (alone it is "
                f"{_percent(change, size[1:])} different), so that the result of a row would depend on its batch; "
                f"{_ROW_CURE}."
            )
        ]
    if not derivative:
        return []
    if model.prediction != "moments":  # the output itself: what the algebra adds to it may hide a lost derivative
        given = cond.take(index)
        found = _of_derivative(model, t, z, lambda z: model.output(z, t, **given))
        if found:
            return found
    return _of_derivative(model, t, z, lambda z: part(z, both))


def _of_derivative(model: NDM, t: Tensor, z: Tensor, part: Callable[[Tensor], Tensor]) -> list[Exception]:
    r"""Whether :math:`w^T J u` by autograd is that of a finite difference, for a direction u and two covectors w."""
    sigma = append_axes(model.schedule(t).sigma, z).to(z.dtype)
    size = (sigma**2 + (sum_event(z.square()) / max(1, z[:1].numel())).reshape(sigma.shape)).sqrt()
    direction = size * _normal("direction", z).sign()
    found, seen = torch.zeros(len(z), dtype=torch.bool, device=z.device), False
    try:
        value = part(z)
        slope, allowed = slope_along(lambda step: part(z + step * direction), value, resolution(model, z.dtype))
        along = slope / _norm(slope).clamp(min=1e-30).reshape(sigma.shape)
        covectors = torch.stack([along.to(value.dtype), _normal("covector", z).to(value.dtype)])
        _, products, _ = model.derivatives.vjps(
            lambda state: (part(state), state), z, covectors, lambda _, product: product
        )
        for covector, product in zip(covectors, products, strict=True):
            by_autograd = sum_event(product.double() * direction.double())
            found |= (by_autograd - sum_event(covector.double() * slope)).abs() > allowed
            seen |= bool(product.any())
    except Exception:
        return []
    if not bool(found.any()):
        return []
    how = "only a part of it" if seen else "no dependence"
    return [
        PredictorError(
            f"the prediction depends on z, but autograd sees {how} (at t={float(t[found][0]):.3g} its derivative is "
            "not that of a finite difference), so that its divergence and every density would be wrong; remove "
            "torch.no_grad(), .detach() or a conversion to numpy from the predictor, and mend a backward() of your own."
        )
    ]


def _percent(change: Tensor, size: Tensor) -> str:
    return f"{100.0 * float((change / size.clamp(min=1e-30)).max()):.2g} %"


_INSTANT, _NUDGE = 2.0**-15, 2.0**-12
"""A change of the time, and relative of the state, that a float32 network sees."""

_SCALE = 30.0
"""How much larger than what it estimates an output may be; the square, how much smaller: it may not be trained yet."""


def _of_output(
    model: NDM, t: Tensor, y: Tensor, cond: Conditioning, *, scaled: bool
) -> tuple[list[Exception], list[Exception]]:
    """What is wrong and what is doubtful in the output for one row: at both ends, and at other times at one state."""
    times = torch.cat([t.new_tensor([model.t_min, 1.0]), t, t + _INSTANT, t.new_tensor([1.0]), t[:1].expand(2)])
    c, noise = model.schedule(times), _normal("output", y)
    z = append_axes(c.alpha, y).to(y) * y + append_axes(c.sigma, y).to(y) * noise
    z = torch.cat([z[:2], z[2:3].expand(5, *y.shape[1:]), (1.0 + _NUDGE) * z[2:3], (1.0 + 2.0 * _NUDGE) * z[2:3]])
    try:
        output = model.moments(z, times, **cond)[0] if model.prediction == "moments" else model.output(z, times, **cond)
    except Exception:
        return [], []
    bad = ~torch.isfinite(output[:2]).reshape(2, -1).all(1)
    if bool(bad.any()):
        return [
            PredictorError(
                f"the predictor returned NaN or inf at t={float(times[:2][bad][0]):.6g}, an end of the time interval, "
                f"where sigma={float(c.sigma[:2][bad][0]):.3g}; look for a division or logarithm of t, 1 - t or sigma "
                "in it, or use the schedule and t_min that it was trained with."
            )
        ], []
    scale = _of_scale(model, y, noise, times[2:3], output[2:3]) if scaled else []
    return [], [*_of_times(model, times[2:], *output[2:].split((2, 2, 1, 2))), *scale]


def _of_times(
    model: NDM, times: Tensor, output: Tensor, later: Tensor, last: Tensor, nudged: Tensor
) -> list[Exception]:
    """Whether the output at a state is the same an instant later, but not at all times, and is smooth in the state.

    A network that rounds the state too, to half precision, is not meant.
    """
    once, twice = (nudged - output[:1]).double()
    smooth = bool((twice - 2.0 * once).norm() < 0.1 * twice.norm())
    still = smooth and torch.equal(output, later)
    moves = not (torch.equal(output[:1], output[1:]) and torch.equal(output[:1], last))
    coarse = resolution(model, output.dtype) > torch.finfo(torch.float32).eps
    if coarse or not (still and moves) or getattr(model.predictor, "nearest", False):
        return []
    return [
        PredictorError(
            f"the predictor rounds its times to whole numbers: its output is the same at t={float(times[0]):.6g} and "
            f"{_INSTANT:.1g} later, though not at every t. If it counts the steps of a table, use adapters.from_eps or "
            "from_v with nearest=True; if its times end at 1000, use from_velocity with time_scale=1000."
        )
    ]


def _of_scale(model: NDM, y: Tensor, noise: Tensor, t: Tensor, output: Tensor) -> list[Exception]:
    """Whether the output has the size of what it estimates, where noise is as large as the data."""
    c = model.schedule(t)
    alpha, sigma, dalpha, dsigma = (append_axes(each, y).to(y) for each in (c.alpha, c.sigma, c.dalpha, c.dsigma))
    targets = {"x": y, "eps": noise, "v": alpha * noise - sigma * y, "velocity": dalpha * y + dsigma * noise}
    if model.prediction not in targets or not bool(y.any()):
        return []
    ratio = float(_norm(output) / _norm(targets[model.prediction]))
    if ratio <= _SCALE and (ratio >= _SCALE**-2 or ratio == 0.0 or not model.adapted):
        return []
    return [
        PredictorError(
            f"the predictor's output is {ratio:.2g} times as large as what prediction={model.prediction!r} estimates "
            f"for these data at t={float(t):.3g}, as that of no denoiser is. See whether the data are in the units "
            "that it was trained in (0 to 255, 0 to 1, -1 to 1), and whether it predicts x, the noise or a velocity."
        )
    ]


# --- the schedule and the transform ---------------------------------------------------------------------------------


class _OtherStart(ValueError):
    """F(x, 0) is not x."""


def _of_schedule(model: NDM, t: Tensor) -> list[Exception]:
    name, found = type(model.schedule).__name__, []
    t = torch.cat([t, model.t_min + (1.0 - model.t_min) * t.new_tensor([0.2, 0.5, 0.8])])
    for field in ("alpha", "sigma"):

        def value(t: Tensor, field: str = field) -> Tensor:
            return getattr(model.schedule(t), field)[:, None].float()  # learned schedules compute in float32

        given = getattr(model.schedule(t), f"d{field}")
        off = _wrong_rate(value, given[:, None], t, torch.finfo(torch.float32).eps)
        if bool(off.any()):
            found.append(
                ValueError(
                    f"the schedule {name} returns d{field} = {float(given[off][0]):.4g} at t={float(t[off][0]):.3g}, "
                    f"which is not the time derivative of its {field}; return the derivative with respect to t in "
                    "[0, 1]."
                )
            )
    return list(found)


def _of_transform(model: NDM, y: Tensor, t: Tensor, cond: Conditioning, *, promised: bool) -> list[Exception]:
    transform, name = model.transform, type(model.transform).__name__
    if isinstance(transform, Identity):
        return []
    try:
        F, (F_again, dF) = transform(y, t, **cond), transform.with_derivative(y, t, **cond)
        at_zero = transform(y, torch.zeros_like(t), **cond)
    except Exception:
        return []
    for value, what in ((F, "F"), (F_again, "F with its derivative"), (dF, "the derivative of F")):
        if value.shape != y.shape or value.dtype != y.dtype:
            return [
                ValueError(
                    f"the transform {name} returned {what} of shape {tuple(value.shape)}, {value.dtype}, expected "
                    f"{tuple(y.shape)}, {y.dtype}, those of x."
                )
            ]
    if not bool(torch.isfinite(torch.stack([F, dF, at_zero])).all()):
        return []
    found: list[Exception] = []
    if bool((_norm(F_again - F) > 1e-2 * _norm(F)).any()):
        found.append(
            ValueError(f"forward() and with_derivative() of the transform {name} disagree about F(x, t); mend one.")
        )
    elif bool(_wrong_rate(lambda time: transform(y, time, **cond), dF, t, resolution(model, y.dtype)).any()):
        found.append(
            ValueError(
                f"with_derivative() of the transform {name} returns another dF/dt than a finite difference of F; "
                "leave the method out to have the derivative computed, or mend it (a network inside must not detach t)."
            )
        )
    if promised and bool((_norm(at_zero - y) > 1e-3 * _norm(y)).any()):
        found.append(
            _OtherStart(
                f"the transform {name} has F(x, 0) different from x ({_percent(_norm(at_zero - y), _norm(y))} apart), "
                "so that loglik(x) would not be the density of x; write F(x, t) = x + t * (...), or subtract F(x, 0) "
                "and add x."
            )
        )
    return found


def _of_noise_scale(model: NDM, y: Tensor, t: Tensor, cond: Conditioning) -> list[Exception]:
    scale = model.noise_scale
    if scale is None:
        return []
    try:
        r, (r_again, dr) = scale(y, t, **cond), scale.with_derivative(y, t, **cond)
    except Exception:  # reported by the work itself
        return []
    if not bool(torch.isfinite(torch.stack([r, r_again, dr])).all()):
        return [ValueError("the noise_scale returned NaN or inf for log S, or for its time derivative, at the data.")]
    if bool((_norm(r_again - r) > 1e-2 * _norm(r) + 1e-6).any()):
        return [ValueError("forward() and with_derivative() of the noise_scale disagree about log S; mend one.")]
    if bool(_wrong_rate(lambda time: scale(y, time, **cond), dr, t, resolution(model, y.dtype)).any()):
        return [
            ValueError(
                "with_derivative() of the noise_scale returns another time derivative of log S than a finite "
                "difference; leave the method out to have it computed, or mend it (a network inside must not detach t)."
            )
        ]
    return []


def _wrong_rate(function: Callable[[Tensor], Tensor], rate: Tensor, t: Tensor, eps: float) -> Tensor:
    """Rows in which ``rate`` is not the time derivative of ``function``."""
    slope, allowed = slope_along(lambda step: function(t + step), function(t), eps)
    return _norm(rate - slope) > allowed
