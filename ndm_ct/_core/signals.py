"""Requests to stop: Ctrl-C, and SIGTERM and SIGUSR1, by which schedulers announce the end of a job."""

import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

__all__ = ["stop_signals", "until_interrupted"]

T = TypeVar("T")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


_REPLACED = (signal.SIG_DFL, signal.default_int_handler, _interrupt)
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")  # Windows has no SIGUSR1


@contextmanager
def stop_signals(handler: Callable[[int, FrameType | None], Any] = _interrupt) -> Iterator[None]:
    """Call a handler on Ctrl-C, SIGTERM and SIGUSR1 while the block runs.

    A handler that the program has set itself keeps its signal. Outside the main thread the block changes nothing.

    Args:
        handler: called with the signal's number and a frame; by default it raises KeyboardInterrupt.
    """
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before = {number: current for number in numbers if (current := signal.getsignal(number)) in _REPLACED}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, current in before.items():
            signal.signal(number, current)


def until_interrupted(batches: Iterable[tuple[int, T]], n: int, *, stacklevel: int = 3) -> list[T]:
    """The batches that are finished when all are, or when Ctrl-C stops the work, which is then said.

    Args:
        batches: number of samples and result of each, made one after the other.
        n: number of samples in all.
        stacklevel: of the warning.

    Raises:
        KeyboardInterrupt: no batch is finished.
    """
    done, results = 0, []
    try:
        for count, result in batches:
            results.append(result)
            done += count
    except KeyboardInterrupt:
        if not results:
            raise
        warnings.warn(f"interrupted: {done} of {n} samples are finished and returned.", stacklevel=stacklevel)
    return results
