"""Wall-clock time of a call."""

import statistics
import time
from collections.abc import Callable
from typing import Any

__all__ = ["median_seconds"]


def median_seconds(call: Callable[[], Any], repeats: int = 3, warmups: int = 1) -> float:
    """Median wall-clock seconds of ``call()`` over ``repeats`` calls, after ``warmups`` calls that do not count.

    Raises:
        ValueError: repeats below 1.

    Example:
        >>> median_seconds(lambda: None, repeats=5) >= 0.0
        True
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats!r}.")
    for _ in range(warmups):
        call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
