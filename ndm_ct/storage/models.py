"""Models on disk: one safetensors file each, replaced atomically, read without executing anything.

A model's description names classes, of this library or registered by :func:`ndm_ct.register`, and their constructor
arguments. Only these classes are ever rebuilt. Anything else is marked ``"external"`` and has to be passed to
:func:`load`. What is external may have no weights that would tell it from another, so the file holds a few values of
the schedule, the volatility and the prior, and those passed have to agree.
"""

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ndm_ct._core.checks import event_size
from ndm_ct._core.config import EXTERNAL, Configurable, from_config, to_config
from ndm_ct._core.errors import CheckpointError
from ndm_ct._core.parallel import Group, is_sharded, plain_class, whole
from ndm_ct.model import NDM
from ndm_ct.prior import DataPrior
from ndm_ct.process import ForwardProcess
from ndm_ct.samplers.frozen import Residuals
from ndm_ct.schedules import Schedule
from ndm_ct.storage.atomic import PathLike
from ndm_ct.storage.tensors import compare_tensors, read, write
from ndm_ct.transforms import Transform
from ndm_ct.transforms.noise import as_noise_scale

__all__ = ["describe", "load", "load_residuals", "own_classes", "save"]

RESIDUALS = "residuals"
"""Name of the tensor that holds residuals, beside those of the model."""
_PREFIXES = {
    "predictor": "predictor.", "transform": "process.transform.", "schedule": "process.schedule.",
    "volatility": "process.volatility.", "noise_scale": "process.noise_scale.", "prior": "prior.",
}  # fmt: skip
"""Where the tensors of a part are, by its name."""
_OPTIONAL = ("noise_scale", "prior")
"""Parts that a description leaves out where a model has none of its own."""
_MARKED = ("schedule", "volatility", "prior")
"""Parts of which a file keeps marks if they have to be passed."""
_AGREEMENT = 1e-5
"""Relative difference of marks that rounding explains, on another device or by another version of torch."""
_MOST_OBJECTS = 1000
_OPERATION = 2**14
"""Bytes that an operation counts for while a model is made, because modules take memory and time too."""


def save(model: NDM, path: PathLike, *, residuals: Residuals | None = None) -> None:
    """Write a model, its weights and its configuration, to one file.

    The file is replaced as a whole: a process that is killed leaves the old file or the new one. Parts of your own
    classes are saved as weights only; pass them to :func:`load` again, or decorate the classes by
    :func:`ndm_ct.register`. A model wrapped by FSDP2 has to be saved in all processes; the first one writes the whole
    weights.

    Args:
        model: the model.
        path: file to write or replace.
        residuals: what ``discrete.estimate_residuals`` measured, to be kept in the same file. ``load`` leaves them
            aside and ``discrete.load_residuals`` reads them.

    Raises:
        TypeError: the model's state holds something that is not a tensor. Nothing is written.
        OSError: the file cannot be written. An existing file is unchanged.

    Example:
        >>> import tempfile, ndm_ct
        >>> model = ndm_ct.NDM(ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2)), event_shape=(2,))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ndm_ct.save(model, f"{folder}/model.safetensors")
        ...     ndm_ct.load(f"{folder}/model.safetensors").event_shape
        (2,)
    """
    state = model.state_dict()
    tensors = {name: whole(tensor) for name, tensor in state.items()}
    if any(map(is_sharded, state.values())) and not Group().is_main:
        return
    if residuals is not None:
        tensors[RESIDUALS] = torch.cat([residuals.times[None], residuals.moments, residuals.stderr])
    description = describe(model)
    marks = _marks(model, [name for name in _MARKED if _is_external(description.get(name))])
    write(path, tensors, {"kind": "model", "model": description | ({"marks": marks} if marks else {})})


def load(
    path: PathLike,
    *,
    predictor: Any = None,
    transform: Transform | None = None,
    schedule: Schedule | None = None,
    volatility: Any = None,
    noise_scale: Any = None,
    prior: Any = None,
) -> NDM:
    """Read a model that :func:`save` wrote. It is in eval mode, with the saved weights bit by bit.

    Args:
        path: the file.
        predictor: the network, if it is of a class of your own: build it as it was and pass it here. Its weights are
            replaced by those of the file. For a network that an adapter or ``nn.Preconditioned`` wrapped, pass the
            network alone.
        transform: the transform, if it is of a class of your own, or the network in it.
        schedule: the schedule, if it is of a class of your own or made of functions.
        volatility: the volatility, if it is a function or of a class of your own.
        noise_scale: the scale of the noise, if it is a function or of a class of your own.
        prior: the prior, if the model was given one.

    Raises:
        CheckpointError: the file is not a model of this library, is damaged, names unknown classes, or its tensors do
            not fit. Neither the file nor a module passed in has changed.
        ValueError: a part is missing, was passed although the file describes its own, or is a schedule, volatility or
            prior with other values than the one that was saved.
        FileNotFoundError: there is no such file.
        TypeError: ``path`` is neither a string nor a path.

    Example:
        >>> import tempfile, torch, ndm_ct
        >>> def net(z, t):
        ...     return 0.5 * z
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ndm_ct.save(ndm_ct.NDM(net, event_shape=(2,)), f"{folder}/model.safetensors")
        ...     ndm_ct.load(f"{folder}/model.safetensors", predictor=net).event_shape
        (2,)
    """
    description, tensors = read(path, "model")
    try:
        _residuals_of(tensors)
        given = {
            "predictor": predictor, "transform": transform, "schedule": schedule, "volatility": volatility,
            "noise_scale": as_noise_scale(noise_scale), "prior": prior,
        }  # fmt: skip
        return _rebuild(description["model"], tensors, given)
    except KeyError as error:
        raise CheckpointError(f"{path}: the description lacks the entry {error}.") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_residuals(path: PathLike) -> Residuals:
    """Read the residuals that ``save(model, path, residuals=...)`` wrote beside a model.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file is not a model of this library, is damaged, or holds no residuals.
        FileNotFoundError: there is no such file.
        TypeError: ``path`` is neither a string nor a path.

    Example:
        >>> import tempfile, ndm_ct
        >>> model = ndm_ct.NDM(ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2)), event_shape=(2,))
        >>> residuals = ndm_ct.discrete.estimate_residuals(model, torch.randn(20, 2), times=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ndm_ct.save(model, f"{folder}/model.safetensors", residuals=residuals)
        ...     torch.equal(load_residuals(f"{folder}/model.safetensors").moments, residuals.moments)
        True
    """
    _, tensors = read(path, "model")
    try:
        residuals = _residuals_of(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if residuals is None:
        raise CheckpointError(
            f"{path}: the file holds no residuals; measure them with ndm_ct.discrete.estimate_residuals(model, data) "
            "and keep them with ndm_ct.save(model, path, residuals=residuals)."
        )
    return residuals


def _residuals_of(tensors: dict[str, Tensor]) -> Residuals | None:
    """Take the residuals out of the tensors of a file."""
    table = tensors.pop(RESIDUALS, None)
    if table is None:
        return None
    if not (table.ndim == 2 and len(table) == 7 and table.shape[1] > 1 and table.is_floating_point()):
        raise CheckpointError(
            f"tensor {RESIDUALS!r} has shape {tuple(table.shape)} and dtype {table.dtype}, expected (7, N), floating: "
            "times, three moments and their errors."
        )
    return Residuals(table[0], table[1:4], table[4:])


def describe(model: NDM) -> dict[str, Any]:
    """Describe a model without its weights, JSON-serialisable."""
    own = {
        "transform": model.transform, "predictor": model.predictor, "schedule": model.schedule,
        "volatility": model.process.volatility,
    }  # fmt: skip
    own |= {} if model.noise_scale is None else {"noise_scale": model.noise_scale}
    own |= {"prior": model.prior} if model.has_custom_prior else {}
    parts = {name: _describe_part(part) for name, part in own.items()}
    return (
        parts
        | {"event_shape": list(model.event_shape), "prediction": model.prediction, "t_min": model.t_min}
        | ({"adapted": True} if model.adapted else {})
    )


def _describe_part(part: Any) -> Any:
    """The configuration of a part; of a wrapper around one object that cannot be described, with a gap for it."""
    own: list[Any] = []
    config = to_config(part, own)
    return EXTERNAL if len(own) > 1 or any(each is part for each in own) else config


def _is_external(config: Any) -> bool:
    """Whether a part, or the object inside it, has to be passed."""
    return config == EXTERNAL or json.dumps({"type": EXTERNAL}) in json.dumps(config)


def _marks(model: NDM, names: Iterable[str]) -> dict[str, list[float]]:
    """Values by which some of schedule, volatility and prior are told from others; none of a prior without density."""
    times = torch.linspace(0.15, 0.95, 5, dtype=torch.float64, device=model.device)
    z = torch.linspace(-1.5, 1.5, event_size(model.event_shape), device=model.device).reshape(1, *model.event_shape)
    marks: dict[str, Callable[[], Tensor]] = {
        "schedule": lambda: torch.cat([model.schedule.gamma(times), model.schedule(times).alpha]),
        "volatility": lambda: model.process.eta(times).double().reshape(len(times), -1).sum(1),
        "prior": lambda: model.log_prior(z.to(model.dtype or z.dtype)),
    }
    found = {}
    with model.evaluating(), torch.no_grad():
        for name in names:
            if name != "prior" or not isinstance(model.prior, DataPrior):
                found[name] = marks[name]().double().reshape(-1).tolist()
    return found


def _validate_marks(model: NDM, marks: Mapping[str, list[float]]) -> None:
    """Raise ValueError if a schedule, volatility or prior that was passed is not the one that was saved."""
    found = _marks(model, marks)
    for name, saved in marks.items():
        pairs = zip(saved, found[name], strict=True)
        if not all(math.isclose(a, b, rel_tol=_AGREEMENT, abs_tol=_AGREEMENT) for a, b in pairs):
            raise ValueError(
                f"{name} is not the one that was saved: it has the values {_numbers(found[name])} where the saved one "
                f"had {_numbers(saved)}; build it as it was."
            )


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values[:5])


def own_classes(model: NDM) -> dict[str, str]:
    """The classes of a model's modules that belong neither to this library nor to torch, at their first places.

    Each is named with the start of a hash of its source, where there is one outside installed packages. Comments and
    empty lines do not count.
    """
    found: dict[type[nn.Module], str] = {}
    for place, module in model.named_modules():
        cls = plain_class(module)
        if cls.__module__.split(".")[0] not in ("torch", __name__.split(".")[0]):
            found.setdefault(cls, place)
    return {place: f"{cls.__qualname__}{_source(cls)}" for cls, place in found.items()}


def _source(cls: type[nn.Module]) -> str:
    try:
        if "-packages" in (inspect.getsourcefile(cls) or ""):
            return ""
        lines = [line.rstrip() for line in inspect.getsource(cls).splitlines()]
    except (OSError, TypeError):  # typed into an interpreter
        return ""
    text = "\n".join(line for line in lines if line and not line.lstrip().startswith("#"))
    return f" (source {hashlib.sha256(text.encode()).hexdigest()[:8]})"


def _rebuild(config: Any, tensors: dict[str, Tensor], given: dict[str, Any]) -> NDM:
    if not isinstance(config, dict):
        raise CheckpointError(f"the model's description is a {type(config).__name__}, expected an object.")
    config = dict.fromkeys(_OPTIONAL) | config
    objects = json.dumps(config).count("{")
    if objects > _MOST_OBJECTS:
        raise CheckpointError(f"the description has {objects} objects, a model at most {_MOST_OBJECTS}.")
    for name, value in given.items():
        _validate_given(name, value, config[name])
    with _describing(), _Budget(tensors), torch.device("meta"):  # names and shapes without memory
        skeleton = _skeleton(_parts(config, given))
    _compare(skeleton, tensors, config)
    # Forked, so that the initial weights, soon replaced, take nothing from the caller's random numbers.
    with _describing(), torch.random.fork_rng(devices=[]):
        parts = _parts(config, given)
        own = getattr(parts["predictor"], "as_model", None)  # of a predictor that makes a subclass of NDM
        model = (
            NDM(
                parts["predictor"],
                config["event_shape"],
                transform=parts["transform"],
                schedule=parts["schedule"],
                volatility=parts["volatility"],
                noise_scale=parts["noise_scale"],
                prior=parts["prior"],
                prediction=config["prediction"],
                t_min=config["t_min"],
            )
            if own is None
            else own(config["event_shape"], parts["prior"])
        )
    model.adapted = config.get("adapted", False) is True
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(tensors[name].dtype)
    model.load_state_dict(tensors)
    _validate_marks(model, config.get("marks", {}))
    return model.eval()


@contextmanager
def _describing() -> Iterator[None]:
    """Report every error of a constructor as an error of the file."""
    try:
        yield
    except (CheckpointError, KeyError):  # the caller names a missing entry
        raise
    except Exception as error:
        raise CheckpointError(f"the description does not make a model: {error}") from error


class _Budget(TorchDispatchMode):
    """Raises when building a model takes far more memory or operations than the tensors of its file justify.

    An honest model takes a few times the memory of its file, a few operations per tensor, and a constant for tensors
    that are not saved, such as the bases of a ``Blur``.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = 2**27 + sum(32 * tensor.nbytes + 16 * _OPERATION for tensor in tensors.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.left -= _OPERATION + (result.nbytes if isinstance(result, Tensor) else 0)
        if self.left < 0:
            raise CheckpointError("the description asks for far more memory than the tensors of the file take.")
        return result


def _validate_given(name: str, value: Any, config: Any) -> None:
    if _is_external(config) and value is None:
        raise ValueError(
            f"the file holds only the weights of its {name}, which is not made of this library's classes; build it and "
            f"pass load(path, {name}=...)."
        )
    if not _is_external(config) and value is not None:
        kind = config.get("type") if isinstance(config, dict) else config
        raise ValueError(f"{name} was given, but the file describes its own ({kind}); leave {name} out.")


def _parts(config: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _part(config[name], given[name]) for name in _PREFIXES}


def _part(config: Any, given: Any) -> Any:
    """A part from its description and what was passed: the part itself, or the object inside it."""
    whole = config == EXTERNAL or (
        _is_external(config) and type(given).__name__ == config["type"] and isinstance(given, Configurable)
    )
    return given if whole else from_config(config, given)


def _skeleton(parts: dict[str, Any]) -> nn.Module:
    """A module with the state names of the model and without its behaviour."""
    skeleton = nn.Module()
    skeleton.process = ForwardProcess(
        parts["transform"], parts["schedule"], parts["volatility"], noise_scale=parts["noise_scale"]
    )
    for name in ("predictor", "prior"):
        if isinstance(parts[name], nn.Module):
            setattr(skeleton, name, parts[name])
    return skeleton


def _compare(skeleton: nn.Module, tensors: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    external = tuple(prefix for part, prefix in _PREFIXES.items() if _is_external(config[part]))
    # A network of this library takes the file's precision; one passed in keeps its own.
    compare_tensors(skeleton.state_dict(), tensors, lambda name: not name.startswith(external))
