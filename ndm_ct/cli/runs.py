r"""The folder of a run: a configuration and the model trained by it, enough to score and draw rows in their own units.

Rows of reals are standardised by the training rows, in every column of a table, by one mean m and one standard
deviation s for all coordinates of arrays with more axes; of d coordinates x in their own units

.. math::
    \log p(x) = \log p_{NDM}\Bigl(\frac{x - m}{s}\Bigr) - \sum_{i=1}^d \log s_i .

Integer levels become :math:`-\log P(x)` of their bins (:mod:`ndm_ct.quantisation`); the models are trained on the
centres, with :math:`\sigma_0/\alpha_0` a third of a bin's half-width.

``config.json`` holds the settings, the scale and the versions it began on; with the weights in ``model.safetensors`` it
makes the model, with the data the training.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ndm_ct import transforms
from ndm_ct._core.checks import choose, usable_device, validate_count
from ndm_ct._core.seeds import derive_seeds
from ndm_ct._core.versions import versions
from ndm_ct.data.sources import Standardised
from ndm_ct.files.formats import Rows, blocks, read
from ndm_ct.model import NDM
from ndm_ct.nn import MLP, Preconditioned, UNet
from ndm_ct.quantisation import Quantisation
from ndm_ct.schedules.fixed import LearnedLogSNR, LinearLogSNR, Schedule
from ndm_ct.storage import PathLike, RunFolder, load, write_atomically
from ndm_ct.training import PRECISIONS, FitResult, fit

__all__ = ["Run", "Settings", "fingerprint", "settings_from_file", "settings_of", "train"]

TRANSFORMS = ("identity", "separable", "neural", "scaling")
SCHEDULES = {"linear": LinearLogSNR, "learned": LearnedLogSNR}
HEADS = ("x", "moments")
FORMAT = 1


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """What a training depends on. Every field is an option of ``ndm-ct train`` and an entry of a configuration file."""

    data: str | None = _setting(None, "rows to train on: npy, npz, csv, tsv, parquet, idx, or a folder of images")
    array: str | None = _setting(None, "name of the array in an npz file that has several")
    levels: int | None = _setting(None, "values are integers 0 ... levels-1 (default: 256 for unsigned bytes)")
    transform: str = _setting("identity", f"F(x, t) of the forward process: {', '.join(TRANSFORMS)}")
    transform_width: int = _setting(8, "width of the network in F")
    head: str = _setting("x", f"what the network predicts: {', '.join(HEADS)}")
    schedule: str = _setting("linear", f"log-SNR over time: {', '.join(SCHEDULES)}")
    gamma_min: float | None = _setting(
        None, "log of the noise-to-signal ratio at t = 0 (default: -9, for integers by the width of a bin)"
    )
    gamma_max: float = _setting(5.0, "the same at t = 1")
    width: int | None = _setting(None, "of the network (default: 128 for vectors, 16 for images)")
    depth: int = _setting(3, "residual blocks of the perceptron for vectors")
    resolutions: int = _setting(2, "resolutions of the U-Net for images")
    dropout: float = _setting(0.0, "probability of dropping a hidden unit in training")
    steps: int = _setting(4000, "optimiser steps")
    batch_size: int | None = _setting(None, "rows per step (default: 1024 for vectors, 64 for images)")
    lr: float = _setting(2e-3, "peak learning rate")
    precision: str = _setting("full", f"of the networks in training: {', '.join(PRECISIONS)}")
    ema: float = _setting(0.999, "decay of the averaged weights")
    validation_fraction: float = _setting(0.1, "share of the rows held out for validation, the last ones; 0 for none")
    patience: int | None = _setting(None, "stop after so many validations, of twenty, without a better one")
    seed: int = _setting(0, "of everything random")

    def __post_init__(self) -> None:
        choose("transform", self.transform, TRANSFORMS)
        choose("head", self.head, HEADS)
        choose("schedule", self.schedule, SCHEDULES)
        choose("precision", self.precision, PRECISIONS)
        for name in ("transform_width", "depth", "resolutions", "steps"):
            validate_count(name, getattr(self, name))
        for name in ("width", "batch_size", "patience"):
            if getattr(self, name) is not None:
                validate_count(name, getattr(self, name))
        if not 0.0 <= self.validation_fraction < 1.0:
            raise ValueError(f"validation_fraction must be in [0, 1), got {self.validation_fraction!r}.")
        if self.head == "moments" and self.transform == "identity":
            raise ValueError("head='moments' needs a learned transform; choose one, or head='x'.")

    @staticmethod
    def of(entries: Mapping[str, Any], source: str) -> "Settings":
        """From the entries of a file.

        Raises:
            ValueError: an unknown entry, or a value of the wrong kind; ``source`` says where.
        """
        known = {each.name: each for each in fields(Settings)}
        for name, value in entries.items():
            if name not in known:
                raise ValueError(f"{source} has the unknown entry {name!r}; there are {', '.join(known)}.")
            kind = kind_of(known[name])
            wanted = int | float if kind is float else kind
            absent = value is None and known[name].default is None
            if isinstance(value, bool) or not (absent or isinstance(value, wanted)):
                raise ValueError(f"{source}: {name} must be of type {kind.__name__}, got {value!r}.")
        return Settings(**entries)


def kind_of(setting: Field[Any]) -> type:
    """str, int or float: the type of a setting that is not None."""
    return cast(type, next(kind for kind in (*get_args(setting.type), setting.type) if kind in (str, int, float)))


def settings_from_file(path: PathLike) -> dict[str, Any]:
    """Entries of a JSON or YAML file.

    Raises:
        ValueError: the file cannot be read as an object of settings.
        ImportError: YAML without PyYAML.
    """
    path = Path(path)
    text = path.read_text()
    if path.suffix == ".json":
        try:
            entries = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}.") from error
    elif path.suffix in (".yaml", ".yml"):
        try:
            import yaml
        except ImportError as error:
            raise ImportError("YAML needs PyYAML: pip install 'ndm-ct[files]', or write JSON.") from error
        try:
            entries = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {error}.") from error
    else:
        raise ValueError(f"{path} must end in .json, .yaml or .yml.")
    if not isinstance(entries, dict):
        raise ValueError(f"{path} holds a {type(entries).__name__}, expected entries by name.")
    return entries


@dataclass(frozen=True)
class Run:
    """A model and the units of its rows.

    Args:
        model: of standardised rows.
        settings: it was trained by.
        mean: m, shape ``(*E)`` or one number; None for levels.
        scale: s.
        bins: of integer data.
        columns: names of the columns of a table.
    """

    model: NDM
    settings: Settings
    mean: Tensor | None
    scale: Tensor | None
    bins: Quantisation | None
    columns: tuple[str, ...] | None

    @staticmethod
    def load(folder: PathLike) -> "Run":
        """The run in a folder.

        Raises:
            FileNotFoundError: the folder holds no run, or one whose training has not finished.
            ValueError: its configuration is damaged.
            CheckpointError: its model is.
        """
        folder = Path(folder)
        config = _config(folder)
        if not (folder / "model.safetensors").exists():
            raise FileNotFoundError(
                f"{str(folder)!r} holds a training that has not finished; go on with: ndm-ct train --out {folder}"
            )
        return _run(load(folder / "model.safetensors"), config)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns of a table, x0, x1, ... where it has none."""
        return self.columns or tuple(f"x{i}" for i in range(math.prod(self.model.event_shape)))

    @property
    def log_scale(self) -> float:
        r""":math:`\sum_i \log s_i`, nats."""
        if self.scale is None:
            return 0.0
        return float(self.scale.log().expand(self.model.event_shape).sum())

    def rows(self, path: PathLike, array: str | None = None) -> Any:
        """Rows of a file as the model takes them, standardised or levels.

        Raises:
            ValueError: rows of another kind or shape than those it was trained on.
        """
        return self.of(read(path, array), str(path))

    def of(self, rows: Rows, source: str) -> Any:
        """As :meth:`rows`, of what was read."""
        values = rows.values
        if tuple(values.shape[1:]) != self.model.event_shape:
            raise ValueError(
                f"{source} holds rows of shape {tuple(values.shape[1:])}, the model has {self.model.event_shape}."
            )
        if self.columns and rows.columns and rows.columns != self.columns:
            raise ValueError(
                f"{source} has the columns {', '.join(rows.columns)}, the model was trained on "
                f"{', '.join(self.columns)}."
            )
        if self.bins is not None:
            return _levels(rows, self.bins.levels, source).to(self.model.device)
        if rows.are_levels:
            raise ValueError(f"{source} holds unsigned bytes, the model was trained on real values.")
        assert self.mean is not None
        assert self.scale is not None
        lazy = Standardised(values, self.mean, self.scale, cast(torch.dtype, self.model.dtype), self.model.device)
        return lazy if isinstance(values, np.memmap) else lazy[:]

    def units(self, z: Tensor) -> Tensor:
        """Samples of the model in the units of the rows; levels as uint8, or int64 above 256 of them."""
        if self.bins is not None:
            return self.bins.nearest(z).to(torch.uint8 if self.bins.levels <= 256 else torch.int64)
        assert self.mean is not None
        assert self.scale is not None
        return z.double() * self.scale + self.mean


def _levels(rows: Rows, levels: int, source: str) -> Tensor:
    values = rows.values if isinstance(rows.values, Tensor) else torch.as_tensor(np.array(rows.values))
    if values.is_floating_point():
        whole = values.round().long()
        if not torch.equal(whole.to(values.dtype), values):
            raise ValueError(f"{source} holds values that are no integers, but levels={levels} are given.")
        values = whole
    Quantisation(levels).validate(values, source)
    return values


def fingerprint(folder: PathLike) -> str:
    """SHA-256 of all that the scores and samples of a run depend on: its configuration and its model."""
    files = (Path(folder) / name for name in ("config.json", "model.safetensors"))
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def settings_of(folder: PathLike) -> Settings:
    """The settings of the run in a folder.

    Raises:
        FileNotFoundError, ValueError: there is no configuration, or a damaged one.
    """
    return Settings.of(_config(Path(folder))["settings"], "config.json")


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{str(folder)!r} holds no run (there is no {path.name}); make one by: ndm-ct train")
    try:
        config = json.loads(path.read_text())
        config["settings"] = asdict(Settings.of(config["settings"], str(path)))  # with those that are younger
        form, *_ = (config[name] for name in ("format", "mean", "scale", "levels", "columns", "event_shape"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no configuration of a run: {error}") from error
    if form != FORMAT:
        raise ValueError(f"{path} has format {form!r}, this version reads format {FORMAT}; update the library.")
    return config


def _run(model: NDM, config: dict[str, Any]) -> Run:
    mean, scale = (
        None if config[name] is None else torch.tensor(config[name], dtype=torch.float64) for name in ("mean", "scale")
    )
    bins = None if config["levels"] is None else Quantisation(config["levels"])
    columns = None if config["columns"] is None else tuple(config["columns"])
    return Run(model, Settings.of(config["settings"], "config.json"), mean, scale, bins, columns)


def build(settings: Settings, event_shape: tuple[int, ...], levels: int | None) -> NDM:
    """The untrained model of settings; torch's generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seeds(settings.seed, "weights")[0])
        return _built(settings, event_shape, levels)


def _built(settings: Settings, event_shape: tuple[int, ...], levels: int | None) -> NDM:
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
    predictor = network(width, 2 if settings.head == "moments" else None)
    return NDM(
        Preconditioned(predictor, prediction=settings.head), event_shape, transform=transform,
        schedule=_schedule(settings, levels), prediction=settings.head,
    )  # fmt: skip


def _schedule(settings: Settings, levels: int | None) -> Schedule:
    least = -9.0 if levels is None else -2.0 * math.log(3.02 * levels)
    gamma_min = least if settings.gamma_min is None else settings.gamma_min
    return SCHEDULES[settings.schedule](gamma_min, settings.gamma_max)


def train(
    settings: Settings, folder: PathLike, *, device: str | None = None, progress: bool = True,
    time_limit: float | None = None,
) -> tuple[Run, FitResult]:  # fmt: skip
    """Train a model in a folder, or go on with the training that is there.

    Args:
        settings: of the training; those of the folder have to be the same.
        folder: of the run, made if missing.
        device: of torch; None is the CPU.
        progress: whether to show a bar.
        time_limit: seconds after which to stop with a checkpoint.

    Raises:
        ValueError: settings that do not fit the data, other settings than those of the folder, no such device.
        FileNotFoundError, ImportError: as :func:`ndm_ct.files.formats.read`.
        BlockingIOError, CheckpointError, RuntimeError: as :func:`ndm_ct.fit`.
    """
    folder = Path(folder)
    if settings.data is None:
        raise ValueError("data is missing: what is the model to be trained on?")
    settings = replace(settings, data=str(Path(settings.data).resolve()))  # the run may go on from elsewhere
    rows = read(cast(str, settings.data), settings.array)
    levels = settings.levels or (256 if rows.are_levels else None)
    held_out = int(settings.validation_fraction * len(rows.values))
    event_shape = tuple(rows.values.shape[1:])
    train_rows = rows.values[: len(rows.values) - held_out]
    mean, scale = (None, None) if levels else _moments(replace(rows, values=train_rows), cast(str, settings.data))
    config = {
        "format": FORMAT, "settings": asdict(settings), "levels": levels, "mean": mean, "scale": scale,
        "columns": rows.columns, "event_shape": event_shape,
    }  # fmt: skip
    config = json.loads(json.dumps(config))
    model = build(settings, event_shape, levels)
    if device is not None:
        model.to(usable_device(device))
    run = _run(model, config)
    values = run.of(replace(rows, values=train_rows), cast(str, settings.data))
    images = len(event_shape) == 3
    options: dict[str, Any] = {}
    if run.bins is not None:
        options |= {"quantisation": run.bins, "dequantisation": "process"}
    if held_out:
        validation = run.of(replace(rows, values=rows.values[-held_out:]), cast(str, settings.data))
        options |= {"validation": validation, "validate_every": max(1, settings.steps // 20)}
    with _kept(config, folder):  # no sooner: settings that make no model leave no folder that insists on them
        result = fit(
            model, values, steps=settings.steps, lr=settings.lr, ema=settings.ema,
            batch_size=settings.batch_size or (64 if images else 1024), seed=settings.seed, patience=settings.patience,
            precision=settings.precision, run_dir=folder, checkpoint_every=500,
            log_every=max(1, settings.steps // 100), progress=progress,
            time_limit=time_limit, **options,
        )  # fmt: skip
    return run, result


def _moments(rows: Rows, source: str) -> tuple[Any, Any]:
    """Mean and standard deviation: of each column, or one for all coordinates; float64, in parts."""
    values = rows.values
    if len(values) < 2:
        raise ValueError(f"{source}: expected two or more rows to train on, which set the scale, got {len(values)}.")
    axes = 0 if values.ndim == 2 else tuple(range(values.ndim))

    def average(function: Callable[[np.ndarray], np.ndarray]) -> Any:
        found = [(len(block), function(block.astype(np.float64)).mean(axis=axes)) for _, block in blocks(values)]
        return np.average([part for _, part in found], axis=0, weights=[size for size, _ in found])

    mean = average(lambda block: block)
    scale = np.sqrt(average(lambda block: np.square(block - mean)))
    if not np.all(scale > 0.0):
        place = int(np.argmax(np.atleast_1d(scale <= 0.0)))
        name = rows.columns[place] if rows.columns else f"x{place}"
        raise ValueError(
            f"{source}: column {name!r} is constant over the training rows: it has no density. Leave it out."
        )
    return mean.tolist(), scale.tolist()


@contextmanager
def _kept(config: dict[str, Any], folder: Path) -> Iterator[None]:
    """Write the configuration, or compare it with the one that is there; one that no training accepts does not stay."""
    path = folder / "config.json"
    if path.exists():
        _compare(config, folder)
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


def _compare(config: dict[str, Any], folder: Path) -> None:
    known = _config(folder)
    saved, now = ({**each["settings"], **each, "settings": None} for each in (known, config))
    RunFolder(folder, repr(str(folder))).compare(saved, now)
