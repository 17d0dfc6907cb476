"""``ndm-ct info``."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ndm_ct.cli.models import find_model, is_model
from ndm_ct.cli.runs import Run, settings_of
from ndm_ct.cli.settings import Settings
from ndm_ct.files import read

__all__ = ["run_info"]


def run_info(options: argparse.Namespace) -> int:
    path = Path(options.path)
    if is_model(options.path):
        found = _of_run(path) if path.is_dir() else _of_model(find_model(options.path, {}))
        for name, value in found.items():
            print(f"{name + ':':14} {value}")
        return 0
    rows = read(path, options.array, options.header)
    values = rows.values
    print(f"rows:          {len(values)}\nshape:         {tuple(values.shape[1:])}\ndtype:         {values.dtype}")
    if rows.columns or values.ndim == 2:
        array = np.asarray(values, dtype=np.float64)
        for i in range(array.shape[1]):
            name = rows.columns[i] if rows.columns else f"x{i}"
            column = array[:, i]
            print(f"{name + ':':14} {column.mean():.6g} ± {column.std():.6g}, {column.min():.6g} to {column.max():.6g}")
    else:
        print(f"values:        {values.min()} to {values.max()}")
    for note in rows.notes:
        print(f"note:          {note}")
    return 0


def _of_run(folder: Path) -> dict[str, Any]:
    settings = settings_of(folder)
    changed = {name: value for name, value in asdict(settings).items() if value != getattr(Settings(), name)}
    found: dict[str, Any] = {"settings": ", ".join(f"{name}={value}" for name, value in changed.items()) or "defaults"}
    log = folder / "log.jsonl"
    last = (
        [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")][-1:]
        if log.exists()
        else []
    )
    found["training"] = f"step {last[0]['step']} of {settings.steps}" if last else "not begun"
    if not (folder / "model.safetensors").exists():
        return found | {"model": f"none yet; go on with: ndm-ct train --out {folder}"}
    return found | _of_model(Run.load(folder))


def _of_model(run: Run) -> dict[str, Any]:
    model = run.model
    return {
        "model": f"predictor {type(model.predictor).__name__}, head {model.prediction}, events {model.event_shape}",
        "forward": f"F {type(model.transform).__name__}, schedule {type(model.schedule).__name__}",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}, of these in F "
                      f"{sum(p.numel() for p in model.transform.parameters()):,}",
        "data": f"{run.bins.levels} levels" if run.bins else f"real values, columns {', '.join(run.names[:8])}",
    }  # fmt: skip
