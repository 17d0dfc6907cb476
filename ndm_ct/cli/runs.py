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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ndm_ct._core.checks import some
from ndm_ct._core.seeds import derive_seeds
from ndm_ct.cli.settings import Settings
from ndm_ct.columns import Table
from ndm_ct.data.sources import Standardised
from ndm_ct.files import Rows
from ndm_ct.model import NDM
from ndm_ct.quantisation import Quantisation
from ndm_ct.storage import PathLike, load

__all__ = ["FORMAT", "Run", "fingerprint", "read_config", "run_of", "settings_of", "split"]

FORMAT = 3
"""Format of new configurations. Trainings of format 1 hold out the last rows; later they are drawn. Those of formats 1
and 2 have no map of the columns."""


@dataclass(frozen=True)
class Run:
    """A model and the units of its rows.

    Args:
        model: the model of standardised rows, or of levels.
        settings: the settings of its training.
        mean: m, shape ``(*E)`` or one number; None for levels, and for a model in the units of the data.
        scale: s, of the same shape; None likewise.
        bins: the bins of integer data; None for real values.
        columns: names of the columns of a table; None if it has none.
        dequantisation: noise in the bins of integer data.
        identity: hash of all that scores and samples depend on.
        table: the columns' kinds and codes, of a table that has them.
    """

    model: NDM
    settings: Settings
    mean: Tensor | None
    scale: Tensor | None
    bins: Quantisation | None
    columns: tuple[str, ...] | None
    dequantisation: str = "process"
    identity: str = ""
    table: Table | None = None

    @staticmethod
    def load(folder: PathLike) -> "Run":
        """Load the run of a folder.

        Raises:
            FileNotFoundError: the folder holds no run, or a run whose training has not finished.
            ValueError: the configuration is damaged.
            CheckpointError: the model is damaged.
        """
        folder = Path(folder)
        config = read_config(folder)
        if not (folder / "model.safetensors").exists():
            raise FileNotFoundError(
                f"{str(folder)!r} holds a training that has not finished; go on with: ndm-ct train --out {folder}"
            )
        return replace(run_of(load(folder / "model.safetensors"), config), identity=fingerprint(folder))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns of a table; x0, x1, ... if the table has none."""
        return self.columns or tuple(f"x{i}" for i in range(math.prod(self.model.event_shape)))

    @property
    def log_scale(self) -> float:
        r""":math:`\sum_i \log s_i`, nats."""
        if self.scale is None:
            return 0.0
        return float(self.scale.log().expand(self.model.event_shape).sum())

    def matched(self, rows: Rows, source: str) -> Rows:
        """The columns of a table that the model knows, by name and in its order, with a note on what that changed.

        Args:
            rows: what was read.
            source: where from, for messages.

        Raises:
            ValueError: a column that the model needs is missing.
        """
        needed, found = self.columns, rows.columns
        if not needed or not found or needed == found:
            return rows
        missing = [name for name in needed if name not in found]
        if missing:
            raise ValueError(
                f"{source} has the columns {', '.join(found)}, the model was trained on {', '.join(needed)}; "
                f"{some(missing)} {'is' if len(missing) == 1 else 'are'} missing."
            )
        others = [name for name in found if name not in needed]
        note = f"left out: {some(others)}" if others else "columns are taken in the model's order"
        values = rows.values[:, [found.index(name) for name in needed]]
        return replace(rows, values=values, columns=needed, notes=(*rows.notes, note))

    def of(self, rows: Rows, source: str, chosen: np.ndarray | None = None) -> Any:
        """Rows as the model takes them, standardised or levels.

        Args:
            rows: what was read.
            source: where from, for messages.
            chosen: numbers of the rows to take; None takes all.

        Raises:
            ValueError: rows of another kind or shape than those the model was trained on.
        """
        values = rows.values
        if rows.levels and values.ndim == 4 and values.shape[1] == 1 and self.model.event_shape[:1] == (3,):
            values = values.expand(-1, 3, -1, -1)  # grey pictures for a model of coloured ones
        if tuple(values.shape[1:]) != self.model.event_shape:
            raise ValueError(
                f"{source} holds rows of shape {tuple(values.shape[1:])}, the model has {self.model.event_shape}."
            )
        if self.bins is not None:
            return _levels(values if chosen is None else values[chosen], self.bins.levels, source).to(self.model.device)
        if rows.levels:
            raise ValueError(f"{source} holds integer levels of images, the model was trained on real values.")
        dtype = self.model.dtype or torch.get_default_dtype()
        lazy = Standardised(values, *self._units, dtype, self.model.device, chosen)
        return lazy if isinstance(values, np.memmap) else lazy[:]

    def units(self, z: Tensor) -> Tensor:
        """Samples of the model in the units of the rows; levels as uint8, or int64 above 256 of them."""
        if self.bins is not None:
            return self.bins.nearest(z).to(torch.uint8 if self.bins.levels <= 256 else torch.int64)
        mean, scale = self._units
        return z.double() * scale + mean

    @property
    def _units(self) -> tuple[Tensor, Tensor]:
        """m and s; zero and one for a model in the units of the data."""
        one = torch.ones((), dtype=torch.float64)
        return (0.0 * one if self.mean is None else self.mean), (one if self.scale is None else self.scale)


def _levels(given: Any, levels: int, source: str) -> Tensor:
    values = given if isinstance(given, Tensor) else torch.as_tensor(np.array(given))
    if values.is_floating_point():
        whole = values.round().long()
        if not torch.equal(whole.to(values.dtype), values):
            raise ValueError(f"{source} holds values that are no integers, but levels={levels} are given.")
        values = whole
    Quantisation(levels).validate(values, source)
    return values


def fingerprint(folder: PathLike) -> str:
    """SHA-256 of the configuration and the model of a run, on which all scores and samples depend."""
    files = (Path(folder) / name for name in ("config.json", "model.safetensors"))
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def settings_of(folder: PathLike) -> Settings:
    """The settings of the run in a folder.

    Raises:
        FileNotFoundError: the folder has no configuration.
        ValueError: the configuration is damaged.
    """
    return Settings.of(read_config(Path(folder))["settings"], "config.json")


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{str(folder)!r} holds no run (there is no {path.name}); make one by: ndm-ct train")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config["settings"] = asdict(Settings.of(config["settings"], str(path)))  # with those that are younger
        form, *_ = (config[name] for name in ("format", "mean", "scale", "levels", "columns", "event_shape"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the configuration of a run: {error}") from error
    if form not in range(1, FORMAT + 1):
        raise ValueError(f"{path} has format {form!r}, this version reads format {FORMAT}; update the library.")
    return config


def run_of(model: NDM, config: dict[str, Any]) -> Run:
    mean, scale = (
        None if config[name] is None else torch.tensor(config[name], dtype=torch.float64) for name in ("mean", "scale")
    )
    bins = None if config["levels"] is None else Quantisation(config["levels"])
    columns = None if config["columns"] is None else tuple(config["columns"])
    table = Table.restored(config["table"], model) if config.get("table") else None
    return Run(model, Settings.of(config["settings"], "config.json"), mean, scale, bins, columns, table=table)


def split(total: int, fraction: float, seed: int, *, drawn: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Draw the rows to hold out for validation, so that the order of a file plays no part.

    Args:
        total: number of rows.
        fraction: share of them to hold out, rounded down.
        seed: of the draw.
        drawn: False holds out the last rows, as trainings of format 1 did.

    Returns:
        The numbers of the rows to train on, and of those held out, both increasing.
    """
    held_out = int(fraction * total)
    if not drawn:
        return np.arange(total - held_out), np.arange(total - held_out, total)
    order = np.random.default_rng(derive_seeds(seed, "validation")).permutation(total)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
