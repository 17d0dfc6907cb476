"""``ndm-ct sample``."""

import argparse
from functools import partial
from pathlib import Path

from torch import Tensor

from ndm_ct.cli.batches import conditions, finished_columns, generators_of, written_conditions
from ndm_ct.cli.models import load_run
from ndm_ct.cli.parser import UsageError
from ndm_ct.cli.tables import draw_table
from ndm_ct.discrete import DDPM, load_residuals
from ndm_ct.files import TABLES, write_picture, write_table
from ndm_ct.samplers.sample import sample

__all__ = ["run_sample"]

_YOUNGER = ("nfe", "grid", "guidance", "denoise")
"""Options that finished batches of earlier versions do not mention."""


def run_sample(options: argparse.Namespace) -> int:
    run = load_run(options)
    images = len(run.model.event_shape) == 3
    ending = options.out.suffix.lower()
    if ending not in (*TABLES, ".png"):
        raise UsageError(f"--out must end in {', '.join(TABLES)} or .png, got {str(options.out)!r}.")
    if (ending == ".png") != images and ending != ".npz":
        raise UsageError("images are written as .npz or .png." if images else "a png is for images; write a table.")
    if run.table is not None:
        return draw_table(options, run)

    method = options.method
    if method == "ddpm_analytic":
        method = partial(DDPM, variance="analytic", residuals=load_residuals(_weights(Path(options.model))))

    def make(rows: slice) -> dict[str, Tensor]:
        n, generators = rows.stop - rows.start, generators_of(options, range(rows.start, rows.stop))
        z = sample(
            run.model, n, method=method, steps=options.steps, nfe=options.nfe, grid=options.grid,
            guidance=options.guidance, denoise=options.denoise, generator=generators, **conditions(options, n, run),
        )  # fmt: skip
        return {"x": run.units(z.cpu())}

    settings = {name: getattr(options, name) for name in ("method", "steps", *_YOUNGER)}
    settings = {name: value for name, value in settings.items() if name not in _YOUNGER or value not in (None, False)}
    with finished_columns(options, run, options.n, settings | written_conditions(options), make) as columns:
        x = columns["x"]
        if ending == ".png":
            write_picture(options.out, x, run.bins.levels if run.bins else None)
        elif len(run.model.event_shape) == 1:
            write_table(options.out, dict(zip(run.names, x.T, strict=True)))
        else:
            write_table(options.out, columns)
    print(f"{options.out}: {len(x)} rows by {options.method}")
    return 0


def _weights(model: Path) -> Path:
    return model / "model.safetensors" if model.is_dir() else model
