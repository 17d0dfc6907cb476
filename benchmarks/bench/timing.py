"""Times of calls that take turns, so that a slow moment of the machine slows all of them."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def timed(
    calls: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, np.ndarray]:
    """Seconds of each call in every round. The calls take turns, after one call each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if turn:
                seconds[name].append(clock() - start)
    return {name: np.array(own) for name, own in seconds.items()}


def fastest(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Least processor seconds of each call: other processes can only make a call slower."""
    return {name: float(own.min()) for name, own in timed(calls, repeats).items()}


def clock_of(device: torch.device) -> Callable[[], float]:
    """The processor time of this process, or for a GPU the wall time after the GPU has finished its work."""
    if device.type == "cpu":
        return time.process_time

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised
