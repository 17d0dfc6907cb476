"""Objects that can be written to JSON and rebuilt: an object is its class name and its constructor's arguments.

A subclass of ``Configurable`` keeps every constructor argument under an attribute of the same name. Only classes of
this package are ever rebuilt, so reading a configuration executes nothing else.
"""

import importlib
import inspect
from typing import Any, ClassVar

import numpy as np

from ndm_ct._core.errors import CheckpointError
from ndm_ct._core.parallel import plain_class

__all__ = ["Configurable", "Unconfigurable", "from_config", "to_config"]


_PACKAGES = ("schedules", "transforms", "nn", "guidance", "presets", "adapters", "columns")
"""Packages with subclasses of :class:`Configurable`; the test of the start-up holds this list."""


class Unconfigurable(TypeError):
    """An object that JSON cannot describe (a user's own module or function)."""


class Configurable:
    """Mix-in: registers the subclass by name and reads its configuration off its attributes."""

    registry: ClassVar[dict[str, type["Configurable"]]] = {}

    names_in_files: ClassVar[dict[str, str]] = {}
    """Arguments that files call by another name, and that name."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.split(".")[0] == __name__.split(".")[0]:
            Configurable.registry[cls.__name__] = cls

    def config(self) -> dict[str, Any]:
        """``{"type": class name, argument: value, ...}``, JSON-serialisable."""
        cls = plain_class(self)
        if Configurable.registry.get(cls.__name__) is not cls:
            raise Unconfigurable(f"{cls.__name__} is not a class of this package.")
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)  # of an inherited __init__
        parameters = inspect.signature(cls).parameters.values()
        names = [parameter.name for parameter in parameters if parameter.kind not in variadic]
        return {"type": cls.__name__} | {
            self.names_in_files.get(name, name): to_config(getattr(self, name)) for name in names
        }


def to_config(value: Any) -> Any:
    """JSON form of a scalar, a sequence or a Configurable."""
    if isinstance(value, Configurable):
        return value.config()
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [to_config(item) for item in value]
    raise Unconfigurable(f"{type(value).__name__} cannot be written as JSON.")


def _class(name: str) -> type[Configurable] | None:
    """The registered class; the packages that define one are imported if they have not been."""
    if name not in Configurable.registry:
        for package in _PACKAGES:
            importlib.import_module(f"{__name__.split('.')[0]}.{package}")
    return Configurable.registry.get(name)


def from_config(value: Any) -> Any:
    """Rebuild what ``to_config`` wrote.

    Raises:
        CheckpointError: an unknown class, or arguments that its constructor rejects.
    """
    if isinstance(value, list):
        return tuple(from_config(item) for item in value)
    if not isinstance(value, dict):
        return value
    name = value.get("type")
    cls = _class(name) if isinstance(name, str) else None
    if cls is None:
        raise CheckpointError(f"the configuration names the class {name!r}, which this version does not have.")
    names = {written: today for today, written in cls.names_in_files.items()}
    arguments = {names.get(key, str(key)): from_config(item) for key, item in value.items() if key != "type"}
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the configuration of {name} does not fit its constructor: {error}") from error
