r"""The precision of networks, which may be lower than that of the algebra around them.

States, times and sums are float32 or float64. A network in bfloat16 or float16, or one of several precisions, runs as
it is: :func:`run_network` casts the state, the time and the conditioning to the network's own precision, and its output
back. A predictor that does algebra around a network of its own sets ``runs_network`` and calls :func:`run_network`
there, so that only the inner network is cast.

For the length of a training step, :func:`networks_in` runs networks by autocast instead. Autocast around a whole loss
would round the algebra too, for instance the matrix products of ``Blur`` and the sum over the terms of ``Separable``.

This concerns networks that return a prediction or the features of a transform. Flows, encoders and decoders return
log-determinants and densities, and keep their precision.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ndm_ct._core.checks import first_parameter
from ndm_ct._core.conditioning import map_tensors, tensors_in
from ndm_ct._core.errors import PredictorError

__all__ = [
    "HALVES",
    "autocast_in_networks",
    "lowered",
    "networks_in",
    "resolution",
    "run_for_tensor",
    "run_network",
    "state_dtype",
]

HALVES = (torch.bfloat16, torch.float16)
"""Precisions of networks that are too low for states."""

_WIDE = (torch.float32, torch.float64)

_DTYPE: ContextVar[torch.dtype | None] = ContextVar("precision of networks", default=None)


@contextmanager
def networks_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Context manager: the networks of this thread run by autocast in ``dtype``; None changes nothing."""
    before = _DTYPE.set(dtype)
    try:
        yield
    finally:
        _DTYPE.reset(before)


@contextmanager
def autocast_in_networks(device: torch.device | None) -> Iterator[None]:
    """Context manager: an autocast that is on for a device concerns networks alone, and none of the algebra.

    Args:
        device: that of the states; None is the CPU.
    """
    kind = "cpu" if device is None else device.type
    if not torch.is_autocast_enabled(kind):
        yield
        return
    with networks_in(torch.get_autocast_dtype(kind)), torch.autocast(kind, enabled=False):
        yield


def state_dtype(*objects: Any) -> torch.dtype | None:
    """The precision of states for some networks: float32 or float64; None if they have no parameters.

    It is that of the first parameter; where that one is in half precision, that of the first which is not; and float32
    for networks in half precision throughout.
    """
    first = first_parameter(*objects)
    if first is None or first.dtype in _WIDE:
        return None if first is None else first.dtype
    parameters = (p for each in objects if isinstance(each, nn.Module) for p in each.parameters())
    return next((p.dtype for p in parameters if p.dtype in _WIDE), torch.float32)


def resolution(module: nn.Module | None, dtype: torch.dtype) -> float:
    """The relative rounding of what the networks of a module return for states of a dtype, here and now."""
    autocast = _DTYPE.get()
    found = {p.dtype for p in module.parameters()} if module is not None else set()
    found = found & {*_WIDE, *HALVES} | ({autocast} if autocast is not None else set())
    return max(torch.finfo(each).eps for each in (dtype, *found))


def run_network(network: Callable[..., Any], x: Tensor, /, *others: Any, **cond: Any) -> Any:
    """``network(x, *others, **cond)``, its output in the dtype of ``x``.

    The only tensor of a tuple, dict or dataclass is the output. What holds several is returned as it is.
    """
    if getattr(network, "runs_network", False) is True:
        return network(x, *others, **cond)
    dtype = _DTYPE.get()
    if dtype is None:
        return _lone(_in_own_precision(network, x, others, cond))
    with torch.autocast(x.device.type, dtype):
        output = network(x, *others, **cond)
    return _lone(_restored(output, [dtype], x))


def run_for_tensor(network: Callable[..., Any], x: Tensor, /, *others: Any, **cond: Any) -> Tensor:
    """:func:`run_network` for a network of one output.

    Raises:
        PredictorError: it returned several tensors or none.
    """
    output = run_network(network, x, *others, **cond)
    if isinstance(output, Tensor):
        return output
    raise PredictorError(
        f"the network returned a {type(output).__name__} with {len(list(tensors_in(output)))} tensors, expected one "
        "tensor or a tuple, dict or dataclass with one; pass a module around it that returns the one it estimates."
    )


def _lone(output: Any) -> Any:
    """The only tensor of an output; else the output as it is."""
    if isinstance(output, Tensor):
        return output
    found = list(tensors_in(output))
    return found[0] if len(found) == 1 else output


def lowered(value: Any, dtype: torch.dtype) -> Any:
    """The floating tensors of a value, of 32 bits or more, in another dtype; all else as it is."""
    return map_tensors(lambda each: each.to(dtype) if each.dtype in _WIDE else each, value)


@dataclass
class _Inputs:
    """The precisions in which a network may be called, the likeliest first.

    Args:
        seen: dtypes of the state and of the first parameter for which this holds.
        dtypes: those of the parameters.
        ways: dtype, and whether the time is cast to it too: networks that embed it do so in its own precision.
    """

    seen: tuple[torch.dtype, torch.dtype]
    dtypes: list[torch.dtype]
    ways: list[tuple[torch.dtype, bool]]


_INPUTS: WeakKeyDictionary[nn.Module, _Inputs] = WeakKeyDictionary()


def _inputs(network: Any, x: Tensor) -> _Inputs | None:
    """The precisions of a network, first that of the state, then the commonest; None if it has no parameters."""
    first = first_parameter(network)
    if first is None:
        return None
    known, seen = _INPUTS.get(network), (x.dtype, first.dtype)
    if known is None or known.seen != seen:
        counts = Counter(p.dtype for p in network.parameters() if p.dtype in (*_WIDE, *HALVES))
        ordered = sorted(counts, key=lambda dtype: (dtype != x.dtype, -counts[dtype]))
        ways = [(dtype, cast) for dtype in ordered for cast in (False, True) if dtype != x.dtype or not cast]
        _INPUTS[network] = known = _Inputs(seen, ordered, ways)
    return known if known.dtypes else None


def _in_own_precision(network: Callable[..., Any], x: Tensor, others: tuple[Any, ...], cond: dict[str, Any]) -> Any:
    inputs = _inputs(network, x)
    if inputs is None or inputs.dtypes == [x.dtype]:
        return network(x, *others, **cond)
    failure: Exception | None = None
    for way in inputs.ways:
        dtype, cast = way
        given = cond if dtype == x.dtype else lowered(cond, dtype)
        try:
            output = network(x.to(dtype), *(lowered(others, dtype) if cast else others), **given)
        except (RuntimeError, TypeError) as error:
            failure = error  # of the last way, in which all that is floating has one dtype
            continue
        inputs.ways.sort(key=lambda each: each != way)
        return _restored(output, inputs.dtypes, x)
    assert failure is not None
    raise failure


def _restored(output: Any, dtypes: list[torch.dtype], x: Tensor) -> Any:
    # Any other output dtype was chosen by the network itself and is rejected by the usual check.
    return map_tensors(lambda each: each.to(x.dtype) if each.dtype in dtypes else each, output)
