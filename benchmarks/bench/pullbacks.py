"""What a network costs that torch.func cannot pass: every way to the same divergence, on one network."""

import statistics
from typing import Any

import torch

import ndm_ct
from ndm_ct._core.autodiff import WAYS
from ndm_ct.divergence import Exact, Hutchinson, TraceEstimator

from . import networks, runs
from .timing import timed

ESTIMATORS: dict[str, tuple[TraceEstimator, int]] = {
    "exact": (Exact(), 32), "exact, one by one": (Exact(chunk=1), 32), "one probe": (Hutchinson(probes=1), 32),
}  # fmt: skip
"""Estimators, and rows of a batch."""


def measure(name: str, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of one value and divergence by each way, and the ratio to torch.func, median over the repeats."""
    model, table = networks.load(name), []
    for label, (estimator, rows) in ESTIMATORS.items():
        x = torch.randn(rows, *model.event_shape, generator=torch.Generator().manual_seed(1))
        bound = estimator.bind(x, torch.Generator().manual_seed(0))

        def call(way: str, x: torch.Tensor = x, bound: ndm_ct.divergence.BoundTrace = bound) -> None:
            model.derivatives.way = way
            with torch.no_grad():
                part = model.flow().network_part(torch.full((len(x),), 0.5, dtype=torch.float64))
                bound.with_byproduct(part, x, model.derivatives)

        seconds = timed({way: lambda way=way: call(way) for way in WAYS}, repeats)
        table += [
            {
                "network": name, "trace": label, "way": way, "ms": 1e3 * float(own.min()),
                "ratio": statistics.median(own / seconds[WAYS[0]]),
            }
            for way, own in seconds.items()
        ]  # fmt: skip
        assert model.derivatives.way == WAYS[-1]
    return table


def markdown(table: list[dict[str, Any]]) -> list[str]:
    """A table of all networks."""
    cells = [(row["network"], row["trace"], row["way"], f"{row['ms']:.2f}", f"{row['ratio']:.2f}") for row in table]
    return runs.table(["network", "trace", "way", "ms", "of torch.func"], cells)
