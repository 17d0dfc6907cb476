"""``ndm-ct compress`` and ``ndm-ct decompress``."""

import argparse

from ndm_ct.cli.batches import rows_of
from ndm_ct.cli.models import load_run
from ndm_ct.cli.parser import UsageError
from ndm_ct.codec import compress, decompress
from ndm_ct.files import write_table
from ndm_ct.storage import write_atomically

__all__ = ["run_compress", "run_decompress"]


def run_compress(options: argparse.Namespace) -> int:
    run = load_run(options)
    if run.bins is None:
        raise UsageError("the model is of real values; only integers can be compressed without loss.")
    x = rows_of(options, run, gaps=False).x
    content = compress(run.model, x, quantisation=run.bins, steps=options.steps, rows=options.batch_size)
    write_atomically(options.out, content)
    bits = 8 * len(content) / max(x.numel(), 1)
    print(f"{options.out}: {len(x)} rows in {len(content)} bytes, {bits:.3f} bits per dimension")
    return 0


def run_decompress(options: argparse.Namespace) -> int:
    run = load_run(options)
    if options.out.suffix.lower() != ".npz":
        raise UsageError(f"--out must end in .npz, got {str(options.out)!r}.")
    x = decompress(run.model, options.file.read_bytes())
    write_table(options.out, {"x": x.cpu()})
    print(f"{options.out}: {len(x)} rows")
    return 0
