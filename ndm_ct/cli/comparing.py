r"""``ndm-ct compare``: which of two models is better on the rows of a file, by paired differences.

Each model scores the rows in its own units, standardised or mapped as it was trained, with the same seed, so that both
meet the same rows in the same order. The difference of a row, in the units of the data, is

.. math::
    d_i = \bigl(\ell^a_i + \textstyle\sum_j \log s^a_j\bigr) - \bigl(\ell^b_i + \sum_j \log s^b_j\bigr) .
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ndm_ct import plots
from ndm_ct.cli.models import load_run
from ndm_ct.cli.runs import Run
from ndm_ct.cli.score import evaluate_run
from ndm_ct.cli.tables import scored_rows
from ndm_ct.evaluation.results import figures, paired
from ndm_ct.storage import write_atomically

__all__ = ["run_compare"]


def run_compare(options: argparse.Namespace) -> int:
    runs = [load_run(options, name) for name in (options.model_a, options.model_b)]
    probabilities = [_of_probability(run) for run in runs]
    if probabilities[0] != probabilities[1]:
        raise ValueError(
            "the models have densities and probabilities of different columns, which do not compare: "
            f"{probabilities[0] or 'densities alone'} and {probabilities[1] or 'densities alone'} are probabilities."
        )
    folders = [None if options.out is None else options.out / name for name in "ab"]
    results = [_scores(options, run, folder) for run, folder in zip(runs, folders, strict=True)]
    both = _paired(results)
    if len(both) == 0:
        raise ValueError("no row was scored by both models; give more time, or see which rows fail: ndm-ct loglik.")
    finished = all(finished for _, finished in results)
    found = _compared(options, both, math.prod(runs[0].model.data_shape) if runs[0].bins is not None else None)
    print(_sentence(options, found))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out / "comparison.json", json.dumps(found | {"finished": finished}, indent=2).encode())
        try:
            _plot(both, found, options.out / "comparison.png")
        except ImportError:
            print('no picture: pip install "ndm-ct[demo]"', file=sys.stderr)
    return 0 if finished else 130


def _of_probability(run: Run) -> list[str]:
    """What a model gives probabilities of, in place of densities: columns, or whole rows of integers."""
    if run.table is not None:
        return [column.name for column in run.table.coding.columns if column.is_probability]
    return ["integers"] if run.bins is not None else []


def _scores(options: argparse.Namespace, run: Run, folder: Path | None) -> tuple[dict[int, float], bool]:
    """Negative log-likelihoods in the units of the file, nats, by the rows' numbers, and whether all were scored."""
    if run.table is not None:
        chosen, found = scored_rows(options, run)
        scores = zip(chosen.tolist(), (-found.log_p).tolist(), strict=True)
        return {place: value for place, value in scores if math.isfinite(value)}, True
    result, places = evaluate_run(options, run, folder)
    numbers = [places[index] for index in result.indices.tolist()]
    values = zip(numbers, (result.values + run.log_scale).tolist(), strict=True)
    return dict(values), result.finished


def _paired(results: list[tuple[dict[int, float], bool]]) -> Tensor:
    """Negative log-likelihoods of both models, ``(rows, 2)``, nats, of the rows that both have scored."""
    columns = [values for values, _ in results]
    shared = [place for place in columns[0] if place in columns[1]]
    return torch.tensor([[column[place] for column in columns] for place in shared], dtype=torch.float64).reshape(-1, 2)


def _compared(options: argparse.Namespace, both: Tensor, dims: int | None) -> dict[str, Any]:
    found = {
        "model_a": str(options.model_a), "model_b": str(options.model_b), "data": str(options.data),
        "bound": options.bound, "seed": options.seed, "rows": len(both),
    } | paired(*both.T)  # fmt: skip
    if dims is None:
        return found
    per_bit = dims * math.log(2.0)
    return found | {"bits_per_dim": found["difference"] / per_bit, "bits_stderr": found["stderr"] / per_bit}


def _sentence(options: argparse.Namespace, found: dict[str, Any]) -> str:
    d, error = found["difference"], found["stderr"]
    line = f"NLL a - b = {figures(d, error)} nats per row"
    if "bits_per_dim" in found:
        line += f" ({figures(found['bits_per_dim'], found['bits_stderr'])} bits/dim)"
    line += f"; a {figures(found['nll_a'], found['stderr_a'])}, b {figures(found['nll_b'], found['stderr_b'])}"
    line += f"; {found['rows']} rows\n"
    if not abs(d) > 2.0 * error:
        return line + "the rows do not tell the two apart: the difference is within two standard errors"
    better = options.model_a if d < 0.0 else options.model_b
    return line + f"{better} is better, by {abs(d) / error:.2g} standard errors"


def _plot(both: Tensor, found: dict[str, Any], path: Path) -> None:
    """The differences of single rows, and their mean with twice its error."""
    from matplotlib.figure import Figure

    d = (both[:, 0] - both[:, 1]).numpy()
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    bins = min(60, max(5, round(math.sqrt(len(d)))))
    axes.hist(d, bins=bins, range=tuple(np.quantile(d, [0.005, 0.995])), color="0.7")
    low, high = found["difference"] - 2 * found["stderr"], found["difference"] + 2 * found["stderr"]
    axes.axvspan(low, high, alpha=0.4, label="mean ± 2 standard errors")
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set(xlabel="NLL a - b of a row, nats (right of zero: b is better)", ylabel="rows")
    axes.legend()
    plots.save(figure, path)
