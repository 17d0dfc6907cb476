"""What ``ndm-ct train`` says of a table's density after training, and the p-values of ``ndm-ct loglik``."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ndm_ct import plots
from ndm_ct._core.seeds import derive_seeds
from ndm_ct.cli.runs import Run
from ndm_ct.columns import (
    COMPARED,
    LEAST_COMPARED,
    Anomalies,
    Diagnosis,
    Scored,
    Values,
    diagnose,
    hidden_structure,
    row_generators,
)
from ndm_ct.files import Rows, spread_rows
from ndm_ct.likelihood.api import loglik
from ndm_ct.samplers.sample import sample
from ndm_ct.storage import write_atomically

__all__ = ["diagnose_run", "p_values", "say_hidden"]

NAME = "diagnosis.json"
_ROWS_AT_ONCE = 64


def say_hidden(truncations: np.ndarray) -> None:
    """Print a warning where the noise left at t = 0 hides structure of the data."""
    said = hidden_structure(truncations)
    if said:
        print(f"warning: {said}", file=sys.stderr)


def diagnose_run(run: Run, rows: Rows, held_out: np.ndarray, folder: Path) -> None:
    """Compare samples of a trained table with the rows held out, say what was found, and write it beside the model.

    Tables of fewer than 50 held-out rows, and arrays of more axes, are left alone.

    Args:
        run: what was trained.
        rows: all that was read.
        held_out: numbers of the rows held out.
        folder: of the run.
    """
    if rows.values.ndim != 2 or run.bins is not None or len(held_out) < LEAST_COMPARED:
        return
    random = np.random.default_rng(derive_seeds(run.settings.seed, "diagnosis"))
    chosen = np.sort(random.permutation(held_out)[:COMPARED])
    seed = int(random.integers(2**31))
    if run.table is None:
        numbers = spread_rows(rows.values, chosen, COMPARED).astype(np.float64)
        scored, samples = _plain(run, numbers, seed)
    else:
        table, model = run.table, run.model
        numbers = table.coding.places_of(Values(rows.values.astype(np.float64), run.names, rows.words))[chosen]
        roles = table.roles(numbers, [], "missing values need --conditionals yes.")
        scored = table.score_rows(model, numbers, roles, on_failure="nan")
        samples = table.draw_seeded(model, len(chosen), seed)
    found = diagnose(run.names, numbers, samples, Anomalies(scored.log_p, scored.stderr), scored.truncation, random)
    _write(found, chosen, folder)


def _plain(run: Run, numbers: np.ndarray, seed: int) -> tuple[Scored, np.ndarray]:
    """Scores of rows without kinds, in the units of the file, and as many samples."""
    assert run.mean is not None
    assert run.scale is not None
    x = ((torch.from_numpy(numbers) - run.mean) / run.scale).to(run.model.device, run.model.dtype)
    log_p, info = loglik(
        run.model, x, on_failure="nan", generator=row_generators(numbers, "row", run.model.device), return_info=True,
        batch_size=_ROWS_AT_ONCE,
    )  # fmt: skip
    columns = (each.double().cpu().numpy() for each in (log_p - run.log_scale, info.stderr, info.truncation))
    drawn = run.units(sample(run.model, len(numbers), generator=seed).cpu())
    return Scored(*columns), drawn.double().numpy()


def _write(found: Diagnosis, chosen: np.ndarray, folder: Path) -> None:
    """The verdict on the screen; numbers and a picture in the folder."""
    print(found)
    report = found.to_json() | {"rows": chosen.tolist()}
    write_atomically(folder / NAME, (json.dumps(report, indent=1) + "\n").encode())
    try:
        plots.save(plots.diagnosis(found), folder / "diagnosis.png")
    except ImportError as error:
        print(error, file=sys.stderr)


def p_values(model: str, scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rank of scores among those of the rows held out in training; nothing for models without a diagnosis.

    Args:
        model: the folder of the run.
        scores: columns ``log_p`` and ``stderr``.
    """
    path = Path(model) / NAME
    if not path.exists():
        return {}
    known = json.loads(path.read_text(encoding="utf-8"))
    held = Anomalies(np.array(known["scores"]), np.array(known["errors"]))
    return {"p_value": torch.from_numpy(held.p_values(scores["log_p"].numpy(), scores["stderr"].numpy())[0])}
