"""``ndm-ct train``: settings and rows become a model in the folder of a run."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ndm_ct import plots, transforms
from ndm_ct._core.checks import usable_device
from ndm_ct._core.seeds import seeded_weights
from ndm_ct._core.versions import versions
from ndm_ct.cli.diagnosis import diagnose_run
from ndm_ct.cli.parser import UsageError
from ndm_ct.cli.runs import FORMAT, Run, read_config, run_of, settings_of, split
from ndm_ct.cli.settings import Settings, settings_from_file
from ndm_ct.cli.tables import prepare_table
from ndm_ct.columns import ROWS_LOOKED_AT, ColumnMap, fit_table, repeated_values
from ndm_ct.files import Rows, blocks, read, spread_rows
from ndm_ct.model import NDM
from ndm_ct.nn import MLP, Preconditioned, UNet
from ndm_ct.schedules.base import Schedule
from ndm_ct.schedules.fixed import LearnedLogSNR, LinearLogSNR
from ndm_ct.storage import PathLike, RunFolder, write_atomically
from ndm_ct.training import FitResult, fit

__all__ = ["build", "run_train", "train"]

_SCHEDULES = {"linear": LinearLogSNR, "learned": LearnedLogSNR}
_ROWS_OF_A_MAP = 200_000
_LEAST_ROWS_OF_A_MAP, _NUMBERS_OF_A_MAP = 1000, 2**18  # so that wide tables need little memory


def run_train(options: argparse.Namespace) -> int:
    settings = _settings(options)
    run, result, rows, held_out = train(
        settings, options.out, device=options.device, progress=not options.quiet, time_limit=options.time_limit
    )
    _plot_training(result, options.out / "training.png")
    if not result.finished:
        print(f"stopped at step {result.step} of {settings.steps}; go on with: ndm-ct train --out {options.out}")
        return 130
    print(f"trained {result.step} steps: {options.out / 'model.safetensors'}")
    diagnose_run(run, rows, held_out, options.out)
    if result.validation and run.table is None:
        last = result.validation[-1]
        nats = last["validation_elbo"] - run.log_scale
        bits = last.get("validation_bits_per_dim")
        print(
            f"validation bound: {-nats:.4g} nats per row" if bits is None else f"validation bound: {bits:.4f} bits/dim"
        )
    return 0


def _settings(options: argparse.Namespace) -> Settings:
    """Defaults, or the settings of the run that is there if no data are named; the file; the command line."""
    given = {each.name: getattr(options, each.name) for each in fields(Settings) if each.name in vars(options)}
    if given["data"] is None:
        del given["data"]
    if options.config is not None:
        given = settings_from_file(options.config) | given
    known = options.out / "config.json"
    if known.exists() and "data" not in given:
        return replace(settings_of(options.out), **given)
    settings = Settings.of(given, "the command line" if options.config is None else str(options.config))
    if settings.data is None:
        raise UsageError(
            f"what is the model to be trained on? Name a file, or an earlier run ({options.out} is not one)."
        )
    return settings


def _plot_training(result: FitResult, path: Path) -> None:
    try:
        plots.save(plots.training(result), path)
    except ImportError as error:
        print(f"no plot of the training: {error}", file=sys.stderr)


def build(
    settings: Settings, event_shape: tuple[int, ...], levels: int | None, column_map: ColumnMap | None = None
) -> NDM:
    """Build the untrained model. Its weights are drawn from the seed of the settings; torch's generator is left alone.

    Args:
        settings: of the training.
        event_shape: shape of one row. Three sizes mean images ``(C, H, W)`` and a U-Net, others a perceptron.
        levels: number of levels of integer data; None for real values. It sets the noise at t = 0.
        column_map: the map of the columns of a table; None for none.
    """
    with seeded_weights(settings.seed):
        return _built(settings, event_shape, levels, column_map)


def _built(settings: Settings, event_shape: tuple[int, ...], levels: int | None, column_map: ColumnMap | None) -> NDM:
    images = len(event_shape) == 3
    width = settings.width or (16 if images else 128)

    def network(width: int, outputs: int | None, time: bool = True) -> nn.Module:
        if images:
            return UNet(
                event_shape[0], width=width, levels=settings.resolutions, outputs=outputs, time=time,
                dropout=settings.dropout,
            )  # fmt: skip
        return MLP(event_shape, width=width, depth=settings.depth, outputs=outputs, time=time, dropout=settings.dropout)

    transform: transforms.Transform = transforms.Identity()
    if settings.transform == "separable":
        transform = transforms.Separable(network(settings.transform_width, 2, time=False))
    elif settings.transform == "neural":
        transform = transforms.Neural(network(settings.transform_width, None))
    elif settings.transform == "scaling":
        transform = transforms.LearnedScaling(event_shape)
    if column_map is not None:
        inner = transforms.Flow(column_map.to(torch.get_default_dtype()))
        transform = inner if settings.transform == "identity" else transforms.Composed(transform, inner)
    predictor = network(width, 2 if settings.head == "moments" else None)
    least = -9.0 if levels is None else -2.0 * math.log(3.02 * levels)
    schedule = _schedule(settings, least if settings.gamma_min is None else settings.gamma_min)
    return NDM(
        Preconditioned(predictor, prediction=settings.head), event_shape, transform=transform,
        schedule=schedule, prediction=settings.head,
    )  # fmt: skip


def _schedule(settings: Settings, gamma_min: float) -> Schedule:
    return _SCHEDULES[settings.schedule](gamma_min, settings.gamma_max)


def train(
    settings: Settings, folder: PathLike, *, device: str | None = None, progress: bool = True,
    time_limit: float | None = None,
) -> tuple[Run, FitResult, Rows, np.ndarray]:  # fmt: skip
    """Train a model in a folder, or go on with the training that is there.

    Args:
        settings: what the model depends on. If the folder already holds a training, its settings have to be the same.
        folder: folder of the run. It is made if it is missing, and receives settings, log, checkpoint and model.
        device: name of a torch device, such as "cuda"; None is the CPU.
        progress: show a progress bar.
        time_limit: seconds after which training stops with a checkpoint; the same call continues it.

    Returns:
        The run, what the training reports, all rows that were read, and the numbers of those held out.

    Raises:
        ValueError: the settings do not fit the data or differ from those in the folder, or the device does not exist.
        FileNotFoundError, ImportError: as :func:`ndm_ct.files.read`.
        BlockingIOError, CheckpointError, RuntimeError: as :func:`ndm_ct.fit`.
    """
    folder = Path(folder)
    if settings.data is None:
        raise ValueError("data is missing: what is the model to be trained on?")
    source = str(Path(settings.data).resolve())  # the run may go on from elsewhere
    schema = settings.columns
    settings = replace(
        settings, data=source, columns=schema if schema in (None, "infer") else str(Path(schema).resolve())
    )
    rows = read(source, settings.array, settings.header, words=settings.columns is not None)
    saved: dict[str, Any] = {"format": FORMAT, "mean": None}
    if (folder / "config.json").exists():
        saved = read_config(folder)
    form = saved["format"]
    chosen, held_out = split(len(rows.values), settings.validation_fraction, settings.seed, drawn=form > 1)
    _describe(rows, Path(source).name, len(held_out))
    if settings.columns is None:
        run, values, options, config = _prepared(settings, rows, chosen, held_out, saved)
    else:
        run, values, options, config = prepare_table(settings, rows, chosen, held_out, lambda g: _schedule(settings, g))
    if device is not None:
        run.model.to(usable_device(device))
        values = values.to(device) if settings.columns is not None else values
    images = rows.values.ndim == 4
    with _kept(config, folder):  # no sooner: settings that make no model leave no folder that insists on them
        result = fit(
            run.model, values, steps=settings.steps, lr=settings.lr, ema=settings.ema,
            batch_size=settings.batch_size or (64 if images else 1024), seed=settings.seed, patience=settings.patience,
            precision=settings.precision, run_dir=folder, checkpoint_every=500,
            log_every=max(1, settings.steps // 100), progress=progress,
            time_limit=time_limit, **options,
        )  # fmt: skip
    return run, result, rows, held_out


def _prepared(
    settings: Settings, rows: Rows, chosen: np.ndarray, held_out: np.ndarray, saved: dict[str, Any]
) -> tuple[Run, Any, dict[str, Any], dict[str, Any]]:
    """The run of rows without kinds, its model untrained; the rows to train on; options of ``fit``; the configuration.

    Args:
        settings: of the training.
        rows: what was read.
        chosen: numbers of the rows to train on.
        held_out: numbers of the others.
        saved: the configuration that is there.
    """
    levels, source = settings.levels or rows.levels, str(settings.data)
    if not levels and rows.values.ndim == 2:
        _warn_of_repeats(rows)
    config, column_map = _units(settings, rows, chosen, saved)
    own = replace(settings, gamma_min=config.get("gamma_0", settings.gamma_min))
    run = run_of(build(own, tuple(rows.values.shape[1:]), levels, column_map), config)
    options: dict[str, Any] = {}
    if run.bins is not None:
        options |= {"quantisation": run.bins, "dequantisation": "process"}
    if len(held_out):
        options |= {"validation": run.of(rows, source, held_out), "validate_every": max(1, settings.steps // 20)}
    return run, run.of(rows, source, chosen), options, config


def _units(
    settings: Settings, rows: Rows, chosen: np.ndarray, saved: dict[str, Any]
) -> tuple[dict[str, Any], ColumnMap | None]:
    """The configuration of a run, with the units of its rows, and the map of the columns of a table.

    A training that goes on keeps the units and the noise in which it began, to the last digit.
    """
    form, event_shape = saved["format"], tuple(rows.values.shape[1:])
    levels = settings.levels or rows.levels
    mean, scale = (None, None) if levels else _moments(rows, chosen, str(settings.data))
    if _same_but_for_rounding((mean, scale), saved):
        mean, scale = saved["mean"], saved["scale"]
    config = {
        "format": form, "settings": asdict(settings), "levels": levels, "mean": mean, "scale": scale,
        "columns": rows.columns, "event_shape": event_shape,
    }  # fmt: skip
    column_map = None
    if mean is not None and len(event_shape) == 1 and form > 2:
        column_map, gamma_min = _fit_columns(settings, rows, chosen, np.array(mean), np.array(scale))
        config["gamma_0"] = saved.get("gamma_0", gamma_min)
    return json.loads(json.dumps(config)), column_map


def _describe(rows: Rows, source: str, held_out: int) -> None:
    """Print what is trained on, what was decided for the user, and columns that have no density."""
    print(f"{source}: {len(rows.values)} rows of shape {tuple(rows.values.shape[1:])}", end="")
    print(f", of which {held_out}, drawn at random, are held out for validation" if held_out else "")
    for note in rows.notes:
        print(f"  {note}")


def _warn_of_repeats(rows: Rows) -> None:
    """Print that columns hold values that repeat, if some do."""
    cure = (
        "--columns infer scores rounded values and categories by their probability, and so does --levels N for whole "
        "numbers 0 ... N-1 throughout; to other columns add noise uniform over a bin, or leave them out"
    )
    said = repeated_values(spread_rows(rows.values, np.arange(len(rows.values)), ROWS_LOOKED_AT), rows.columns, cure)
    if said:
        print(f"warning: {said}", file=sys.stderr)


def _fit_columns(
    settings: Settings, rows: Rows, chosen: np.ndarray, mean: np.ndarray, scale: np.ndarray
) -> tuple[ColumnMap | None, float]:
    """The map of a table's columns, if the settings ask for it, and the noise at t = 0, from the rows to train on."""
    most = min(_ROWS_OF_A_MAP, max(_LEAST_ROWS_OF_A_MAP, _NUMBERS_OF_A_MAP // rows.values.shape[1]))
    z = (spread_rows(rows.values, chosen, most).astype(np.float64) - mean) / scale
    return fit_table(z, settings.marginals, settings.gamma_min)


def _moments(rows: Rows, chosen: np.ndarray, source: str) -> tuple[Any, Any]:
    """Mean and standard deviation of the chosen rows: of each column, or one for all coordinates; float64, in parts."""
    if len(chosen) < 2:
        raise ValueError(f"{source}: expected two or more rows to train on, which set the scale, got {len(chosen)}.")
    axes = 0 if rows.values.ndim == 2 else tuple(range(rows.values.ndim))

    def average(function: Callable[[np.ndarray], np.ndarray]) -> Any:
        found = [
            (len(part), function(part.astype(np.float64)).mean(axis=axes)) for _, part in blocks(rows.values, chosen)
        ]
        return np.average([part for _, part in found], axis=0, weights=[size for size, _ in found])

    extremes = [(part.min(axis=axes), part.max(axis=axes)) for _, part in blocks(rows.values, chosen)]
    low, high = (np.float64(function([each[place] for each in extremes], axis=0)) for place, function in
                 enumerate((np.min, np.max)))  # fmt: skip
    span = high - low
    constant = span <= 10.0 * np.finfo(rows.values.dtype).eps * np.maximum(abs(low), abs(high))
    if np.any(constant):
        place = int(np.argmax(np.atleast_1d(constant)))
        name = rows.columns[place] if rows.columns else f"x{place}"
        raise ValueError(
            f"{source}: column {name!r} is constant over the training rows: it has no density. Leave it out."
        )
    mean = low + span * average(lambda part: (part - low) / span)
    scale = span * np.sqrt(average(lambda part: np.square((part - mean) / span)))  # squares of x itself may overflow
    return mean.tolist(), scale.tolist()


def _same_but_for_rounding(moments: tuple[Any, Any], saved: dict[str, Any]) -> bool:
    """Whether mean and scale are those of a configuration, up to the order in which rows were summed."""
    if moments[0] is None or saved["mean"] is None or np.shape(moments[0]) != np.shape(saved["mean"]):
        return False
    (mean, scale), before = (np.array(each) for each in moments), (np.array(saved["mean"]), np.array(saved["scale"]))
    return bool(np.all(abs(mean - before[0]) <= 1e-12 * scale) and np.all(abs(scale - before[1]) <= 1e-12 * scale))


@contextmanager
def _kept(config: dict[str, Any], folder: Path) -> Iterator[None]:
    """Write the configuration, or compare it with the one that is there; one that no training accepts does not stay."""
    path = folder / "config.json"
    if path.exists():
        if _has_more_steps(config, folder):
            write_atomically(path, (json.dumps(config | {"versions": versions()}, indent=1) + "\n").encode())
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(config | {"versions": versions()}, indent=1) + "\n").encode())
    try:
        yield
    except (ValueError, TypeError):
        if not (folder / "checkpoint.safetensors").exists():
            path.unlink()
        raise


def _has_more_steps(config: dict[str, Any], folder: Path) -> bool:
    """Whether a configuration asks for more steps than the one in the folder.

    Raises:
        ValueError: it differs in anything else.
    """
    known = read_config(folder)
    saved, now = ({**each["settings"], **each, "settings": None} for each in (known, config))
    more = bool(now["steps"] > saved["steps"])
    differing = {name for name in now if saved.get(name) != now[name]}
    RunFolder(folder, repr(str(folder))).compare(
        saved | {"steps": now["steps"]} if differing == {"steps"} and more else saved, now
    )
    return more
