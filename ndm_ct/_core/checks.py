"""Shapes, times and the wording of input errors: ``z`` is ``(B, *E)``, ``t`` is ``()`` or ``(B,)``."""

import difflib
import math
import numbers
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "append_axes",
    "as_tensor",
    "as_time",
    "bad_rows",
    "choose",
    "event_size",
    "expand",
    "expand_time",
    "first_parameter",
    "is_whole",
    "of_time",
    "sum_event",
    "unpack_numpy",
    "validate_count",
    "validate_data",
    "validate_dense",
    "validate_noise",
    "validate_number",
    "validate_positive",
    "validate_shape",
    "validate_time",
    "validate_values",
    "validate_visible",
]


def event_size(event_shape: Iterable[int]) -> int:
    """Number of scalars d in one event."""
    return math.prod(event_shape)


def expand(c: Tensor, like: Tensor) -> Tensor:
    """Give a coefficient of shape ``()``, ``(B,)`` or ``(B, *E')`` the rank and dtype of a state.

    Args:
        c: coefficient; its first axis goes with the rows of ``like``, further ones with the event's last.
        like: state, shape ``(B, *E)``.

    Returns:
        ``c`` viewed as ``(B, 1, ..., 1, *E')``, ready to multiply ``like``.
    """
    if 0 < c.ndim < like.ndim:
        c = c.reshape(c.shape[0], *(1,) * (like.ndim - c.ndim), *c.shape[1:])
    return c.to(dtype=like.dtype, device=like.device)


def append_axes(c: Tensor, reference: Tensor) -> Tensor:
    """Append axes to ``c`` (shape of t) until it broadcasts against a coefficient that may vary over the event."""
    return c.reshape((*c.shape, *(1,) * (reference.ndim - c.ndim)))


def expand_time(t: Tensor, z: Tensor) -> Tensor:
    """The time a network sees: shape ``(B,)``, dtype and device of ``z``."""
    return t.to(dtype=z.dtype, device=z.device).expand(z.shape[0])


def as_time(t: float | list[float] | Tensor, device: torch.device | None = None) -> Tensor:
    """A time as float64, the precision in which the library keeps all times."""
    return torch.as_tensor(t, dtype=torch.float64, device=device)


def of_time(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Evaluate a user's function of time at float64 ``t``, in the dtype of its parameters if it has any."""
    parameter = first_parameter(function)
    if parameter is not None:
        return function(t.to(dtype=parameter.dtype, device=parameter.device)).to(torch.float64)
    return torch.as_tensor(function(t), dtype=torch.float64, device=t.device)


def first_parameter(*objects: Any) -> Tensor | None:
    """The first floating-point parameter of those objects that are modules; None if they have none."""
    modules = (each for each in objects if isinstance(each, nn.Module))
    return next((p for module in modules for p in module.parameters() if p.is_floating_point()), None)


def sum_event(y: Tensor) -> Tensor:
    """Sum over the event: ``(B, *E)`` to ``(B,)``."""
    return y.flatten(1).sum(1) if y.ndim > 1 else y


def bad_rows(y: Tensor) -> tuple[int, ...]:
    """Rows of ``(B, ...)`` with a NaN or an infinity."""
    if torch.compiler.is_compiling():  # a program that is exported or compiled does not look at values
        return ()
    y = y.detach()
    if math.isfinite(float(y.sum())):  # one pass; a sum that overflows is looked at again
        return ()
    finite = torch.isfinite(y)
    return tuple(torch.nonzero(~finite.reshape(y.shape[0], -1).all(1)).flatten().tolist())


def some(rows: Iterable[Any], limit: int = 8) -> str:
    """Row numbers, or names, for a message, at most ``limit`` of them."""
    rows = list(rows)
    return str(rows) if len(rows) <= limit else f"{rows[:limit]} and {len(rows) - limit} more"


def nearest(name: str, options: Iterable[str], cutoff: float = 0.6) -> str:
    """A "did you mean" clause, empty when nothing is close."""
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def choose(argument: str, name: object, options: Iterable[str]) -> str:
    """Return ``name`` if it is one of ``options``, else raise with the nearest valid name."""
    options = list(options)
    if isinstance(name, str) and name in options:
        return name
    hint = nearest(name, options) if isinstance(name, str) else ""
    raise ValueError(f"{argument}={name!r} is unknown{hint or '.'} Valid: {', '.join(map(repr, options))}.")


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, of Python or numpy."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def unpack_numpy(settings: Any) -> None:
    """Replace the numpy scalars among the fields of a dataclass by numbers of Python, which JSON can hold."""
    for each in fields(settings):
        value = getattr(settings, each.name)
        if isinstance(value, np.generic):
            object.__setattr__(settings, each.name, value.item())


def validate_count(argument: str, value: Any) -> int:
    """Return a whole number of at least one (steps, probes, samples) as an int; integers of numpy count."""
    if not is_whole(value):
        raise TypeError(f"{argument} must be an int, got {type(value).__name__} ({value!r}).")
    if not 1 <= value <= sys.maxsize:
        raise ValueError(f"{argument} must be at least 1{', and fit 64 bits' if value > 1 else ''}, got {value}.")
    return int(value)


def validate_number(argument: str, value: Any) -> None:
    """Raise unless the value is a real number. The caller checks its range.

    Args:
        argument: name of the argument, for messages.
        value: what was passed.

    Raises:
        TypeError: a word, a list, a tensor, a bool.
        ValueError: an int of more than 64 bits.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{argument} must be a number, got {type(value).__name__} ({value!r}).")
    if isinstance(value, numbers.Integral) and abs(int(value)) > sys.maxsize:
        raise ValueError(f"{argument} is an integer of more than 64 bits, {value}; write it as a float.")


def validate_positive(argument: str, value: Any, unit: str | None = None) -> None:
    """Raise unless the value is a positive and finite number.

    Args:
        argument: name of the argument, for messages.
        value: what was passed.
        unit: in which the value is counted, for messages.

    Raises:
        TypeError: not a number.
        ValueError: zero or less, NaN or infinite.
    """
    validate_number(argument, value)
    if not 0.0 < value < math.inf:
        expected = "positive and finite" if unit is None else f"a positive number of {unit}"
        raise ValueError(f"{argument} must be {expected}, got {value!r}.")


def validate_visible(argument: str, network: Any) -> None:
    """Raise TypeError for a partial or a bound method of a module: its parameters would be lost.

    Args:
        argument: name of the argument.
        network: its value.
    """
    hidden = getattr(network, "func", getattr(network, "__self__", None))
    if isinstance(hidden, nn.Module) and not isinstance(network, nn.Module):
        raise TypeError(
            f"{argument} hides an nn.Module ({type(hidden).__name__}) in a partial or a bound method, so its weights "
            "would not be trained, saved or moved; pass the module itself, or a module around it that calls the method "
            "in its forward, and conditioning as keywords."
        )


def validate_shape(argument: str, value: Any) -> tuple[int, ...]:
    """The sizes of a shape, each at least 1.

    Args:
        argument: name of the argument, for messages.
        value: what was passed.

    Raises:
        TypeError: not a sequence of whole numbers.
        ValueError: a size below 1.
    """
    sizes = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else (value,)
    if sizes == (value,) or not all(isinstance(size, numbers.Integral) for size in sizes):
        raise TypeError(f"{argument} must be a sequence of ints such as (2,) or (3, 32, 32), got {value!r}.")
    if not all(1 <= size <= sys.maxsize for size in sizes):
        raise ValueError(f"{argument} must have positive sizes, got {value!r}.")
    return tuple(map(int, sizes))


def as_tensor(x: Any, dtype: torch.dtype | None, device: torch.device | None) -> Any:
    """A numpy array as a tensor; anything else as it is.

    Args:
        x: what a user passed as data.
        dtype: of floating tensors; None keeps that of the array.
        device: of the tensor; None is the CPU.

    Raises:
        ValueError: a masked array with missing values, which a tensor cannot mark.
    """
    if not isinstance(x, np.ndarray):
        return x
    if np.ma.is_masked(x):
        masked = int(np.ma.getmaskarray(x).sum())
        raise ValueError(f"{masked} values are masked; drop such rows, or fill them in by x.filled(...).")
    kind: np.dtype = x.dtype.newbyteorder("=")
    if kind.kind == "u" and kind.itemsize > 1:  # torch has few operations for these
        kind = np.dtype(np.int64)
    elif kind.kind == "f" and kind.itemsize > 8:
        kind = np.dtype(np.float64)
    tensor = torch.from_numpy(np.array(x, dtype=kind, order="C"))
    return tensor.to(device, dtype if tensor.is_floating_point() else None)


def validate_dense(x: Any, name: str) -> Tensor:
    """Check that ``x`` is an ordinary tensor.

    Args:
        x: what was passed.
        name: name of the argument, for messages.

    Raises:
        TypeError: not a tensor, or a nested, sparse or quantised one.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}; use torch.as_tensor(...).")
    if x.is_nested or x.layout is not torch.strided or x.is_quantized:
        kind = "nested" if x.is_nested else "quantized" if x.is_quantized else str(x.layout)
        raise TypeError(f"{name} is a {kind} tensor, expected a dense one; convert it with its own method.")
    return x


def validate_values(x: Tensor, name: str) -> None:
    """Raise if a tensor is on the device "meta" and so has no values."""
    if x.is_meta:
        raise ValueError(f"{name} is on device meta, which holds no values; make it on the CPU or an accelerator.")


def with_float64(device: torch.device) -> torch.device:
    """The device. Raises ValueError if it has no float64, in which times, states and log-determinants are kept."""
    if device.type == "mps":
        raise ValueError(
            f"the device {device} has no float64, in which times, states and log-determinants are computed; leave the "
            f"model on the CPU and run the network alone on {device}: "
            f"NDM(lambda z, t: net(z.to({str(device)!r}), t.to({str(device)!r})).cpu(), event_shape)."
        )
    return device


def usable_device(device: Any) -> torch.device:
    """The device by that name. Raises ValueError if it is not available, or has no float64."""
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:  # the last from builds without the device
        raise ValueError(
            f"device={device!r} is not available on this machine ({str(error).splitlines()[0]}); use 'cpu'."
        ) from error
    return with_float64(found)


def validate_data(
    x: Any, event_shape: tuple[int, ...], *, name: str = "x", dtype: torch.dtype | None, device: torch.device | None
) -> Tensor:
    """Check that ``x`` is real, finite data of shape ``(B, *event_shape)`` on the model's device and dtype.

    Args:
        x: the data.
        event_shape: E of the model.
        name: the argument's name in messages.
        dtype: dtype of the model's parameters; None for a model without parameters accepts any floating dtype.
        device: device of the model's parameters; None for a model without parameters accepts any device.

    Raises:
        TypeError: not a tensor, or integer, bool or complex.
        ValueError: wrong shape, dtype, device, or NaN/inf in named rows.
    """
    with_float64(validate_dense(x, name).device)
    if not x.is_floating_point():
        raise TypeError(
            f"{name} has dtype {x.dtype}, but a density needs real data; convert with {name}.to(torch.float32), "
            "or call bits_per_dim for integer data."
        )
    if torch.finfo(x.dtype).bits < 32:
        raise TypeError(
            f"{name} has dtype {x.dtype}, whose digits do not carry a density; convert it with {name}.float(). "
            "Networks in half precision need no such data: states are float32, and cast where the network is called."
        )
    if x.ndim != len(event_shape) + 1 or tuple(x.shape[1:]) != event_shape:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, expected (B, {', '.join(map(str, event_shape))}) for "
            f"event_shape={event_shape}; add a batch dimension or reshape the events."
        )
    if device is not None and x.device != device:
        raise ValueError(f"{name} is on device {x.device}, the model on {device}; move one with .to({str(device)!r}).")
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"{name} has dtype {x.dtype}, the model {dtype}; convert one with .to({dtype}).")
    validate_values(x, name)
    rows = bad_rows(x)
    if rows:
        raise ValueError(f"{name} has NaN or inf in rows {some(rows)}; drop or repair them.")
    return x


def validate_time(t: float | Tensor, t_min: float, like: Tensor) -> Tensor:
    """Check a user's time: ``()`` or ``(B,)``, inside [t_min, 1]; returns it in float64."""
    time = as_time(t, like.device)
    if time.ndim > 1 or (time.ndim == 1 and time.shape[0] != like.shape[0]):
        raise ValueError(f"t has shape {tuple(time.shape)}, expected () or ({like.shape[0]},), one time per row.")
    if not torch.compiler.is_compiling() and not bool(((time >= t_min) & (time <= 1.0)).all()):
        raise ValueError(
            f"t must lie in [t_min, 1] = [{t_min:g}, 1], got values in [{float(time.min()):g}, {float(time.max()):g}]; "
            "t = 0 is data, t = 1 is noise."
        )
    return time


def validate_noise(what: str, t_min: float, t_noise: float) -> None:
    """Raise unless the data end has noise.

    Args:
        what: what needs it, for the message.
        t_min: the data end.
        t_noise: the least time with noise.

    Raises:
        ValueError: ``t_noise`` is later than ``t_min``.
    """
    if t_noise > t_min:
        raise ValueError(
            f"{what} needs noise at the data end, but sigma = 0 at t_min={t_min:g}; build the model with "
            f"t_min={t_noise:.3g}, or use what follows the probability flow alone: loglik, encode, decode and sample "
            "with method='ode'."
        )
