"""The settings of a training: each is declared once here, and is an option of ``ndm-ct train`` and of its files.

This module loads no torch, so that ``ndm-ct train --help`` answers at once.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, cast, get_args

__all__ = ["Settings", "settings_from_file"]

TRANSFORMS = ("identity", "separable", "neural", "scaling")
SCHEDULES = ("linear", "learned")
HEADS = ("x", "moments")
MARGINALS = ("spline", "linear")
PRECISIONS = ("full", "bf16-mixed")


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """What a training depends on. Every field is an option of ``ndm-ct train`` and an entry of a configuration file."""

    data: str | None = _setting(
        None, "rows: csv, tsv, txt (also .gz, .xz, .zip), parquet, npy, npz, idx, or a folder of images"
    )
    array: str | None = _setting(None, "name of the array in an npz file that has several")
    header: str | None = _setting(
        None, "the first line of a text table names the columns: yes, no (default: if it is words)"
    )
    levels: int | None = _setting(None, "values are integers 0 ... levels-1 (default: as many as images have)")
    columns: str | None = _setting(
        None, "kinds of a table's columns: a JSON or YAML file of kinds by name, or infer (default: all are real)"
    )
    conditionals: str | None = _setting(
        None, "with --columns: learn all conditionals, yes or no (default: yes if values are missing)"
    )
    marginals: str = _setting(
        "spline", f"columns of a table go through a map of their quantiles, or are only scaled: {', '.join(MARGINALS)}"
    )
    transform: str = _setting("identity", f"F(x, t) of the forward process: {', '.join(TRANSFORMS)}")
    transform_width: int = _setting(8, "width of the network in F")
    head: str = _setting("x", f"what the network predicts: {', '.join(HEADS)}")
    schedule: str = _setting("linear", f"log-SNR over time: {', '.join(SCHEDULES)}")
    gamma_min: float | None = _setting(
        None,
        "log of the noise-to-signal ratio at t = 0 (default: from the rows of a table, -14 to -9; by a bin's width)",
    )
    gamma_max: float = _setting(5.0, "log of the noise-to-signal ratio at t = 1")
    width: int | None = _setting(None, "width of the network (default: 128 for vectors, 16 for images)")
    depth: int = _setting(3, "residual blocks of the perceptron for vectors")
    resolutions: int = _setting(2, "resolutions of the U-Net for images")
    dropout: float = _setting(0.0, "probability of dropping a hidden unit in training")
    steps: int = _setting(4000, "optimiser steps")
    batch_size: int | None = _setting(None, "rows per step (default: 1024 for vectors, 64 for images)")
    lr: float = _setting(2e-3, "peak learning rate")
    precision: str = _setting("full", f"precision of the networks in training: {', '.join(PRECISIONS)}")
    ema: float = _setting(0.999, "decay of the averaged weights")
    validation_fraction: float = _setting(0.1, "share of the rows held out for validation, drawn at random; 0 for none")
    patience: int | None = _setting(None, "stop after so many validations, of twenty, without a better one")
    seed: int = _setting(0, "seed of all randomness")

    def __post_init__(self) -> None:
        from ndm_ct._core.checks import choose, validate_count  # only here: --help loads no torch

        choose("marginals", self.marginals, MARGINALS)
        if self.conditionals is not None:
            choose("conditionals", self.conditionals, ("yes", "no"))
            if self.columns is None:
                raise ValueError("conditionals has no effect without columns; give a schema, or columns=infer.")
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
        found = {}
        for given, value in entries.items():
            name = str(given).replace("-", "_")
            if name not in known:
                raise ValueError(f"{source} has the unknown entry {given!r}; there are {', '.join(known)}.")
            kind = kind_of(known[name])
            if kind is int and isinstance(value, float) and value.is_integer():
                value = int(value)  # 2e3
            if kind is str and isinstance(value, bool):
                value = "yes" if value else "no"  # as YAML reads these words
            wanted = int | float if kind is float else kind
            absent = value is None and known[name].default is None
            if isinstance(value, bool) or not (absent or isinstance(value, wanted)):
                raise ValueError(f"{source}: {name} must be of type {kind.__name__}, got {value!r}.")
            found[name] = value
        return Settings(**found)


def kind_of(setting: Field[Any]) -> type:
    """str, int or float: the type of a setting that is not None."""
    return cast(type, next(kind for kind in (*get_args(setting.type), setting.type) if kind in (str, int, float)))


def settings_from_file(path: str | Path) -> dict[str, Any]:
    """Entries of a JSON or YAML file.

    Raises:
        ValueError: the file cannot be read as an object of settings.
        ImportError: YAML without PyYAML.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            entries = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}.") from error
    elif path.suffix in (".yaml", ".yml"):
        entries = _from_yaml(text, path)
    else:
        raise ValueError(f"{path} must end in .json, .yaml or .yml.")
    if not isinstance(entries, dict):
        raise ValueError(f"{path} holds a {type(entries).__name__}, expected entries by name.")
    return entries


def _from_yaml(text: str, path: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("YAML needs PyYAML: pip install 'ndm-ct[files]', or write JSON.") from error

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """PyYAML follows YAML 1.1, in which 1e-3 is a word; YAML 1.2 and everyone else read a number."""

    number = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}.") from error
