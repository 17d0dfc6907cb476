"""``ndm-ct sample``."""

import argparse
import io
import math
from functools import partial

import torch
from torch import Tensor

from ndm_ct.cli.batches import finished_columns, generators_of, load_run
from ndm_ct.cli.parser import UsageError
from ndm_ct.discrete import DDPM, load_residuals
from ndm_ct.files.formats import TABLES, write_table
from ndm_ct.samplers.sample import sample
from ndm_ct.storage import write_atomically

__all__ = ["run_sample"]


def run_sample(options: argparse.Namespace) -> int:
    run = load_run(options)
    images = len(run.model.event_shape) == 3
    if options.out.suffix not in (*TABLES, ".png"):
        raise UsageError(f"--out must end in {', '.join(TABLES)} or .png, got {str(options.out)!r}.")
    if (options.out.suffix == ".png") != images and options.out.suffix != ".npz":
        raise UsageError("images are written as .npz or .png." if images else "a png is for images; write a table.")

    method = options.method
    if method == "ddpm_analytic":
        method = partial(DDPM, variance="analytic", residuals=load_residuals(options.model / "model.safetensors"))

    def make(rows: slice) -> dict[str, Tensor]:
        n, generators = rows.stop - rows.start, generators_of(options, rows)
        z = sample(run.model, n, method=method, steps=options.steps, generator=generators)
        return {"x": run.units(z.cpu())}

    with finished_columns(options, options.n, {"method": options.method, "steps": options.steps}, make) as columns:
        x = columns["x"]
        if options.out.suffix == ".png":
            write_atomically(options.out, _png(x))
        elif len(run.model.event_shape) == 1:
            write_table(options.out, dict(zip(run.names, x.T, strict=True)))
        else:
            write_table(options.out, columns)
    print(f"{options.out}: {len(x)} rows by {options.method}")
    return 0


def _png(x: Tensor) -> bytes:
    """Images in a square, their values stretched over the grey levels."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("a png needs Pillow: pip install 'ndm-ct[files]', or write npz.") from error
    x = x.double()
    low, high = float(x.min()), float(x.max())
    x = ((x - low) / max(high - low, 1e-12) * 255.0).round().to(torch.uint8)
    across = math.ceil(math.sqrt(len(x)))
    blank = x.new_full((across * -(-len(x) // across) - len(x), *x.shape[1:]), 255)
    tiles = torch.nn.functional.pad(torch.cat([x, blank]), (1, 1, 1, 1), value=255)
    tiles = tiles.unflatten(0, (-1, across)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    data = io.BytesIO()
    Image.fromarray(tiles.squeeze(-1).numpy()).save(data, format="png")
    return data.getvalue()
