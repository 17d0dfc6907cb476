"""Objects that can be written to JSON and rebuilt: an object is its class name and its constructor's arguments.

A subclass of ``Configurable`` keeps every constructor argument under an attribute of the same name. Only classes of
this package, and those that the reading program registered itself, are ever rebuilt. Reading a configuration executes
nothing else.
"""

import importlib
import inspect
from typing import Any, ClassVar, TypeVar

import numpy as np

from ndm_ct._core.errors import CheckpointError
from ndm_ct._core.parallel import plain_class

__all__ = ["EXTERNAL", "Configurable", "Unconfigurable", "from_config", "register", "to_config"]

T = TypeVar("T")

EXTERNAL = "external"
"""What a configuration has in place of an object that it cannot describe."""

_PACKAGES = ("schedules", "transforms", "nn", "guidance", "presets", "adapters", "columns", "bridges")
"""Packages with subclasses of :class:`Configurable`; the test of the start-up holds this list."""


class Unconfigurable(TypeError):
    """An object that JSON cannot describe (a user's own module or function)."""


class Configurable:
    """Mix-in: registers the subclass by name and reads its configuration off its attributes."""

    registry: ClassVar[dict[str, type]] = {}

    names_in_files: ClassVar[dict[str, str]] = {}
    """Arguments that files call by another name, and that name."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.split(".")[0] == __name__.split(".")[0]:
            Configurable.registry[cls.__name__] = cls

    def config(self, own: list[Any] | None = None) -> dict[str, Any]:
        """``{"type": class name, argument: value, ...}``, JSON-serialisable.

        Args:
            own: as for :func:`to_config`.
        """
        return _config(self, own)


def register(cls: type[T]) -> type[T]:
    """Let saved models describe objects of your own class, so that :func:`ndm_ct.load` rebuilds them by itself.

    It is a class decorator. The class may be a schedule, transform, scale of the noise, volatility, prior or network.
    It keeps every argument of its constructor under an attribute of the same name; arguments are numbers, words,
    tuples, or objects of this library and of registered classes. The file holds the name of the class and no code, so
    the program that loads has to import the module with the class first.

    Args:
        cls: the class. Registering it again, as a notebook cell does that runs again, replaces it.

    Returns:
        The class.

    Raises:
        TypeError: ``cls`` is not a class, or its constructor takes ``*args`` or ``**kwargs``.
        ValueError: the name is that of a class of this library, or of another class that is registered.

    Example:
        >>> import ndm_ct
        >>> @ndm_ct.register
        ... class Shifted(ndm_ct.schedules.LinearLogSNR):
        ...     def __init__(self, shift):
        ...         super().__init__(-10.0 + shift, 5.0 + shift)
        ...         self.shift = shift
    """
    if not isinstance(cls, type):
        raise TypeError(f"register decorates a class, got {type(cls).__name__}.")
    own = vars(cls).get("__init__")
    if own is not None and any(each.kind in _VARIADIC for each in inspect.signature(own).parameters.values()):
        raise TypeError(f"{cls.__name__} takes *args or **kwargs, whose values no file can name; name its arguments.")
    known = _class(cls.__name__)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(
            f"{known.__module__} has a class {cls.__name__} already, and files name classes without their module; "
            "give yours another name."
        )
    Configurable.registry[cls.__name__] = cls
    return cls


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _config(value: Any, own: list[Any] | None) -> dict[str, Any]:
    cls = plain_class(value)
    if Configurable.registry.get(cls.__name__) is not cls:
        raise Unconfigurable(f"{cls.__name__} is not a class of this package, nor registered by ndm_ct.register.")
    names = [each.name for each in inspect.signature(cls).parameters.values() if each.kind not in _VARIADIC]
    in_files = getattr(cls, "names_in_files", {})
    try:
        return {"type": cls.__name__} | {
            in_files.get(name, name): to_config(getattr(value, name), own) for name in names
        }
    except AttributeError as error:
        raise Unconfigurable(
            f"{cls.__name__} does not keep its constructor's arguments as attributes: {error}."
        ) from error


def to_config(value: Any, own: list[Any] | None = None) -> Any:
    """JSON form of a scalar, a sequence or an object.

    Args:
        value: what to describe.
        own: a list that gets the objects which cannot be described; ``{"type": "external"}`` stands in their place.
            None raises.

    Raises:
        Unconfigurable: there is such an object, and no list.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [to_config(item, own) for item in value]
    try:
        if isinstance(value, Configurable):
            return value.config(own)
        return _config(value, own)
    except Unconfigurable:
        if own is None:
            raise
    own.append(value)
    return {"type": EXTERNAL}


def _class(name: str) -> type | None:
    """The registered class; the packages that define one are imported if they have not been."""
    if name not in Configurable.registry:
        for package in _PACKAGES:
            importlib.import_module(f"{__name__.split('.')[0]}.{package}")
    return Configurable.registry.get(name)


def from_config(value: Any, own: Any = None) -> Any:
    """Rebuild what ``to_config`` wrote.

    Args:
        value: the configuration.
        own: the object that takes the place of one that could not be described.

    Raises:
        CheckpointError: an unknown class, or arguments that its constructor rejects.
    """
    if isinstance(value, list):
        return tuple(from_config(item, own) for item in value)
    if not isinstance(value, dict):
        return value
    name = value.get("type")
    if name == EXTERNAL:
        return own
    cls = _class(name) if isinstance(name, str) else None
    if cls is None:
        raise CheckpointError(
            f"the configuration names the class {name!r}, which this version does not have. If it is yours, import "
            "the module that registers it (ndm_ct.register) before loading."
        )
    names = {written: today for today, written in getattr(cls, "names_in_files", {}).items()}
    arguments = {names.get(key, str(key)): from_config(item, own) for key, item in value.items() if key != "type"}
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the configuration of {name} does not fit its constructor: {error}") from error
