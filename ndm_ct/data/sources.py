"""Rows of data for training and evaluation: real values, or levels of integer data with their dequantisation."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ndm_ct import objectives
from ndm_ct._core.checks import as_tensor, as_time, event_size, validate_data, validate_dense
from ndm_ct._core.conditioning import Conditioning, Shared, tensors_in
from ndm_ct._core.keywords import validate_cond
from ndm_ct._core.noise import GeneratorLike
from ndm_ct.data.containers import (
    CondFrom,
    Items,
    Layout,
    Stream,
    as_rows,
    batched,
    fixed_seeds,
    open_container,
)
from ndm_ct.files import let_go
from ndm_ct.model import NDM
from ndm_ct.quantisation import Quantisation, resolve_optional
from ndm_ct.storage.tensors import hash_values

__all__ = ["Bins", "Source", "Standardised"]

_AT_ONCE = 2**22
"""Bytes of data that are checked or hashed at a time. Not more than that of a memory-mapped array is in memory."""

_PART = 32
"""Rows of a memory-mapped array that are read before its pages are released: a row at a random place brings up to a
megabyte or two of its neighbours into memory."""

_ITEMS = 8
"""Items of a dataset that processes compare."""


class Bins:
    """Conversion of data to the values on which the model is trained, and of nats to bits per dimension.

    Args:
        model: the model.
        quantisation: the bins of integer data, or their number on (-1, 1); None for real data.
        dequantisation: "uniform" adds noise in the bins, "process" takes the bin centres.
    """

    def __init__(self, model: NDM, quantisation: int | Quantisation | None, dequantisation: str) -> None:
        if quantisation is not None and dequantisation == "process" and model.transform.latent:
            raise ValueError(
                f"dequantisation='process' decodes levels from z_0, which holds latents of "
                f"{type(model.transform).__name__}; use 'uniform', or, for a decoder over levels, pass their values as "
                "real data."
            )
        self.model, self.dequantisation = model, dequantisation
        self.quantisation = resolve_optional(quantisation)
        if self.quantisation is not None:
            self.quantisation.validate_placed(model.adapted)
        self.dtype = model.dtype or torch.get_default_dtype()
        self.size = event_size(model.data_shape)

    def validate(self, x: Tensor, name: str) -> Tensor:
        """Check rows as the user gave them.

        Args:
            x: the rows.
            name: what messages call them.
        """
        validate_dense(x, name)
        if self.quantisation is None:
            if not (x.is_floating_point() or x.is_complex()):
                raise TypeError(
                    f"{name} has dtype {x.dtype}, but a density needs real data; for integer levels 0 ... L-1 pass "
                    "quantisation=L, else convert to a float dtype."
                )
            return self._validate_real(x, name)
        self.quantisation.validate(x, name)
        self._validate_real(x[:1].to(self.dtype), name)
        return x

    def _validate_real(self, x: Tensor, name: str) -> Tensor:
        return validate_data(x, self.model.data_shape, name=name, dtype=self.dtype, device=self.model.device)

    def real(self, x: Tensor, generator: GeneratorLike) -> Tensor:
        """Convert validated rows to real values.

        Args:
            x: the rows.
            generator: source of the noise in the bins.
        """
        if self.quantisation is None:
            return x
        if self.dequantisation == "uniform":
            return self.quantisation.uniform(x, self.dtype, generator)
        return self.quantisation.centres(x, self.dtype)

    def elbo(self, model: NDM, x: Tensor, generator: GeneratorLike, cond: Mapping[str, Any]) -> Tensor:
        """Lower bound on the log-density of real rows, or on the log-probability of integer rows, nats per event.

        Args:
            model: the model.
            x: rows as :meth:`real` returns them.
            generator: source of times and noise.
            cond: conditioning.
        """
        centres = self.quantisation is not None and self.dequantisation == "process"
        bound = objectives.elbo(
            model, x, quantisation=self.quantisation if centres else None, generator=generator, **cond
        )
        if self.quantisation is None or centres:
            return bound
        return bound + self.size * self.quantisation.uniform_offset

    def bits(self, nats: float) -> float:
        """Convert nats per event to bits per dimension."""
        return nats / (self.size * math.log(2.0))

    def bits_of_loss(self, loss: float) -> float | None:
        """Bits per dimension of a training loss; None if the loss does not bound a log-probability.

        On bin centres the loss includes the reconstruction term of a density, :math:`\\frac d2 (\\log 2 \\pi e +
        \\gamma_0)`. It is subtracted. The reconstruction term of the levels is left out, because it is negligible for a
        well-chosen :math:`\\gamma_0`.
        """
        if self.quantisation is None or self.model.prediction == "moments":
            return None
        if self.dequantisation == "uniform":
            return self.bits(loss - self.size * self.quantisation.uniform_offset)
        with torch.no_grad():
            gamma = float(self.model.schedule.gamma(as_time(self.model.t_min, self.model.device)))
        return self.bits(loss - 0.5 * self.size * (math.log(2.0 * math.pi * math.e) + gamma))


class Standardised:
    r"""Rows :math:`(x - m) / s` of a memory-mapped array, computed when they are read.

    Args:
        array: x, shape ``(N, *E)``.
        mean: m, float64, of a row's shape or one number.
        scale: s, float64, of a row's shape or one number.
        dtype: dtype of the rows.
        device: device of the rows; None is the CPU.
        rows: numbers of the rows of the array that count; None takes all.
    """

    def __init__(
        self, array: np.ndarray, mean: Tensor, scale: Tensor, dtype: torch.dtype, device: torch.device | None,
        rows: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self.array, self.mean, self.scale = array, mean.numpy(), scale.numpy()
        self.dtype, self.device = dtype, device
        self.rows = np.arange(len(array)) if rows is None else rows
        self.shape = (len(self.rows), *array.shape[1:])
        self.nbytes = array[:1].nbytes * len(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Any) -> Tensor:
        # In float64, because subtracting a mean much larger than the deviation loses digits.
        standardised = (self._read(self.rows[rows]) - self.mean) / self.scale
        return torch.from_numpy(standardised).to(self.device, self.dtype)

    def _read(self, rows: np.ndarray) -> np.ndarray:
        if not isinstance(self.array, np.memmap) or np.ndim(rows) == 0:
            return self.array[rows]
        parts = []
        for part in np.array_split(rows, len(rows) // _PART + 1):
            parts.append(np.asarray(self.array[part]))
            let_go(self.array)
        return np.concatenate(parts)


class Source:
    """Rows of data and their conditioning. All rows are checked at once; items of a dataset are checked as they come.

    Tensors stay where they are, and arrays are copied. A memory-mapped array, standardised or not, stays in its file,
    and its rows are read when they are needed. Items go to the device of the model.

    Args:
        data: tensor or array ``(N, *E)``, DataFrame, dataset of items, or iterable of items.
        cond: conditioning by name, with one row per row of data.
        bins: checks and converts the rows.
        name: what messages call the data.
        caller: the public function, whose name messages give.
        cond_from: which parts of an item or a table are conditions (``Layout`` of the containers).
        whole: whether to read an iterable to its end. Otherwise it is read in its order, again and again.
    """

    def __init__(
        self, data: Any, cond: Mapping[str, Any], bins: Bins, name: str, caller: Callable[..., Any],
        cond_from: CondFrom = None, whole: bool = True,
    ) -> None:  # fmt: skip
        self.bins, self.name, self.caller = bins, name, caller
        self.layout = Layout(cond_from, bins.model.cond_names, name)
        columns: Mapping[str, Any] = {}
        if not isinstance(data, Standardised):
            data, columns = open_container(data, self.layout, whole)
        self.data: Tensor | np.memmap | Standardised | Items | Stream
        if isinstance(data, Items | Stream):
            self.data = data
        else:
            self.data = data if isinstance(data, np.memmap | Standardised) else self._as_tensor(data)
            for rows, part in self._parts(self.data):
                bins.validate(part, f"{name}{rows}")
        self.is_stream = isinstance(self.data, Stream)
        self.rows: int = sys.maxsize if isinstance(self.data, Stream) else len(self.data)
        if self.rows < 1:
            raise ValueError(f"{name} has no rows.")
        if not isinstance(cond, Mapping):
            raise TypeError(f"cond must be a mapping of tensors by name, got {type(cond).__name__}.")
        taken = {key: as_tensor(value, bins.dtype, bins.model.device) for key, value in columns.items()}
        given = taken | {key: self._validated_cond(key, value) for key, value in cond.items()}
        self.cond = Conditioning(given, self.rows)
        validate_cond(self.cond, bins.model.cond_names, caller)

    def _as_tensor(self, data: Any) -> Tensor:
        data = self.bins.model.as_data(data)
        if isinstance(data, Tensor):
            return data.detach()
        raise TypeError(f"{self.name} must be a tensor or an array, got {type(data).__name__}.")

    def _parts(self, data: Tensor | np.memmap | Standardised) -> Iterator[tuple[str, Tensor]]:
        """The rows in order, with what messages call them: a tensor at once, a large mapped array in parts."""
        if isinstance(data, Tensor):
            yield "", data
            return
        if data.nbytes <= _AT_ONCE:
            yield "", self._mapped(data, ...)
            return
        size = max(1, _AT_ONCE // data[:1].nbytes)
        for start in range(0, len(data), size):
            yield f"[{start}:{start + size}]", self._mapped(data, slice(start, start + size))

    def _mapped(self, data: np.memmap | Standardised, rows: Any) -> Tensor:
        """Rows of a mapped array. Its pages are released afterwards."""
        part = self._as_tensor(data[rows])
        if isinstance(data, np.memmap):
            let_go(data)
        return part

    def _validated_cond(self, key: str, value: Any) -> Any:
        """Check one value of the conditioning: an array, or a dict, list or tuple of arrays.

        Every array must have one row per row of data. Shared values are returned as they are.

        Raises:
            ValueError: an array has another number of rows.
        """
        if isinstance(value, Shared):
            return value
        if self.is_stream:
            raise ValueError(
                f"cond={{{key!r}: ...}} has one row per row of {self.name}, which is a stream of unknown length. Let "
                "its items be pairs (x, value) or dicts, and name the condition in cond_from."
            )
        if isinstance(value, Mapping):
            return {name: self._validated_cond(f"{key}[{name!r}]", each) for name, each in value.items()}
        if isinstance(value, list | tuple) and any(isinstance(each, Tensor | Mapping | np.ndarray) for each in value):
            return [self._validated_cond(f"{key}[{place}]", each) for place, each in enumerate(value)]
        value = torch.as_tensor(value)
        if value.ndim < 1 or value.shape[0] != self.rows:
            raise ValueError(
                f"the conditioning {key!r} has shape {tuple(value.shape)}, expected one row for each of the "
                f"{self.rows} rows of {self.name}; mark a tensor that all rows share by ndm_ct.shared(tensor)."
            )
        return value

    def batch(self, rows: Tensor, generator: GeneratorLike) -> tuple[Tensor, Conditioning]:
        """Read rows as real values, with their conditioning.

        Args:
            rows: row numbers.
            generator: source of the noise in the bins of integer data.
        """
        if isinstance(self.data, Items | Stream):
            return self._items(self.data, rows, generator)
        x = self.data[rows] if isinstance(self.data, Tensor) else self._mapped(self.data, rows.numpy())
        return self.bins.real(x, generator), self.cond.take(rows)

    def _items(self, data: Items | Stream, rows: Tensor, generator: GeneratorLike) -> tuple[Tensor, Conditioning]:
        bins, items = self.bins, [self.layout.split(item) for item in data.read(rows)]
        device = bins.model.device
        x = bins.validate(as_rows([x for x, _ in items], self.name, bins.dtype, device), self.name)
        cond = batched([each for _, each in items], bins.dtype, device)
        validate_cond(cond, bins.model.cond_names, self.caller)
        twice = sorted(cond.keys() & self.cond.keys())
        if twice:
            raise ValueError(f"the conditions {twice} are in cond and in the items of {self.name}; pass them once.")
        whole = self.cond if self.is_stream else self.cond.take(rows)
        return bins.real(x, generator), Conditioning({**whole, **cond}, len(rows)) if cond else whole

    def first_and_last(self) -> Tensor:
        """Numbers of two rows, to try a model on; of a stream the first two."""
        return torch.tensor([0, 1 if self.is_stream else self.rows - 1])

    def fingerprint_with_items(self) -> dict[str, Any]:
        """What must agree between processes: the fingerprint, and digests of some items of a Dataset.

        The items are read with fixed seeds, so that random augmentation is the same in every process. An item that
        still differs from one reading to the next has no digest.
        """
        found = self.fingerprint()
        if isinstance(self.data, Items | Stream):
            last = _ITEMS - 1 if self.is_stream else self.rows - 1
            places = torch.linspace(0, last, min(last + 1, _ITEMS)).long()
            with fixed_seeds(0):
                once, again = ([self._digest(self.data, place) for place in places] for _ in range(2))
            found["items"] = [digest if digest == other else None for digest, other in zip(once, again, strict=True)]
        return found

    def _digest(self, data: Items | Stream, place: Tensor) -> str:
        """SHA-256 of an item, its conditions included."""
        x, cond = self.layout.split(data.read(place[None])[0])
        bins = self.bins
        row, given = as_rows([x], self.name, bins.dtype, None), batched([cond], bins.dtype, None)
        return hash_values([row, *tensors_in(given)])

    def fingerprint(self) -> dict[str, Any]:
        """What must agree for a training or an evaluation to continue; for a dataset it is only the length."""
        digests = {key: hash_values(tensors_in(value)) for key, value in self.cond.items()}
        if not isinstance(self.data, Items | Stream):
            digests[""] = hash_values(part for _, part in self._parts(self.data))
        return {"rows": None if self.is_stream else self.rows, "sha256": digests}
