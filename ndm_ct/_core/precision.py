"""Networks in lower precision than the algebra around them, for the length of a training step.

Autocast around a whole loss would round the algebra too, for instance the matrix products of ``Blur`` and the sum over
the terms of ``Separable``. The three places that call a network go through :func:`run_network`, which enables autocast
for that call only and casts the output back to the input's dtype.

This concerns networks that return a prediction or the features of a transform. Flows, encoders and decoders return
log-determinants and densities, and keep their precision.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

__all__ = ["networks_in", "run_network"]

_DTYPE: ContextVar[torch.dtype | None] = ContextVar("precision of networks", default=None)


@contextmanager
def networks_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Context manager: the networks of this thread run by autocast in ``dtype``; None changes nothing."""
    before = _DTYPE.set(dtype)
    try:
        yield
    finally:
        _DTYPE.reset(before)


def run_network(network: Callable[..., Any], x: Tensor, /, *others: Any, **cond: Any) -> Any:
    """``network(x, *others, **cond)``, its output (a tensor, or a pair of them) in the dtype of ``x``."""
    dtype = _DTYPE.get()
    if dtype is None:
        return network(x, *others, **cond)
    with torch.autocast(x.device.type, dtype):
        output = network(x, *others, **cond)
    if isinstance(output, tuple | list):
        return type(output)(_restored(each, dtype, x) for each in output)
    return _restored(output, dtype, x)


def _restored(output: Any, dtype: torch.dtype, x: Tensor) -> Any:
    # Any other output dtype was chosen by the network itself and is rejected by the usual check.
    return output.to(x.dtype) if isinstance(output, Tensor) and output.dtype == dtype else output
