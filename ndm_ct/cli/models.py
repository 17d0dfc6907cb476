"""The model that a command names: the folder of a run, a file of ``ndm_ct.save``, or a function that makes a model.

``package.module:function`` and ``file.py:function`` name a function without arguments that returns an ``NDM``. It is
found as Python finds modules, the current folder first, and is run: name only code that you trust. Rows of such a model
and of a file are in the model's own units: reals as they are, integers where ``--centres`` or ``--edges`` place them.
"""

import argparse
import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ndm_ct._core.checks import usable_device
from ndm_ct.cli.parser import UsageError
from ndm_ct.cli.runs import Run
from ndm_ct.cli.settings import Settings
from ndm_ct.model import NDM
from ndm_ct.quantisation import Quantisation
from ndm_ct.storage import load
from ndm_ct.storage.tensors import hash_state

__all__ = ["find_model", "is_model", "load_run"]

_FUNCTION = re.compile(r"(?P<module>[\w.]+|.+\.py):(?P<function>\w+)")
_PLACES = ("levels", "centres", "edges", "dequantisation")


def load_run(options: argparse.Namespace, name: str | None = None) -> Run:
    """The run that is named, its model on the device that is.

    Args:
        options: of the command.
        name: of the model; None is ``options.model``.

    Raises:
        UsageError: options that say where integers lie, for a run, which knows it; ``--given`` for a model of another
            kind than tables.
    """
    name = options.model if name is None else name
    given = {each: getattr(options, each, None) for each in _PLACES}
    run = find_model(name, given)
    if run.table is None and getattr(options, "given", None) is not None:
        raise UsageError("--given is for tables trained with --columns and --conditionals yes.")
    run.model.to(usable_device(options.device))
    return run


def is_model(name: str) -> bool:
    """Whether a model is named, and not a file of data."""
    path = Path(name)
    return path.suffix == ".safetensors" or (path / "config.json").exists() or _function_of(name) is not None


def _function_of(name: str) -> re.Match[str] | None:
    return None if Path(name).exists() else _FUNCTION.fullmatch(name)


def find_model(name: str, given: dict[str, Any]) -> Run:
    """The run of a folder, or the model of a file or of a function with its rows in its own units.

    Args:
        name: folder, file, or ``module:function``.
        given: the options ``levels``, ``centres``, ``edges`` and ``dequantisation``, None where not given.

    Raises:
        UsageError: options that a run of ``ndm-ct train`` has itself.
        FileNotFoundError: there is nothing of this name.
        TypeError: the function returns something else than an NDM.
    """
    path, function = Path(name), _function_of(name)
    given = dict.fromkeys(_PLACES) | given
    if function is None and not path.is_file():
        wrong = [f"--{each}" for each, value in given.items() if value is not None]
        if wrong:
            raise UsageError(f"{', '.join(wrong)}: a run of 'ndm-ct train' knows this itself; leave it out.")
        return Run.load(path)
    if function is None:
        model, identity = load(path), hashlib.sha256(path.read_bytes()).hexdigest()
    else:
        model, identity = _made(name, **function.groupdict())
    return Run(
        model, Settings(), None, None, _bins(given), None, dequantisation=given["dequantisation"] or "uniform",
        identity=identity,
    )  # fmt: skip


def _bins(given: dict[str, Any]) -> Quantisation | None:
    """Where the options place integers; None for real values."""
    if given["levels"] is None:
        wrong = [f"--{each}" for each in _PLACES[1:] if given[each] is not None]
        if wrong:
            raise UsageError(f"{', '.join(wrong)} places integers, of which there are --levels; give that too.")
        return None
    return Quantisation(given["levels"], centres=given["centres"], edges=given["edges"])


def _made(name: str, module: str, function: str) -> tuple[NDM, str]:
    """The model that a function makes, and a hash of its weights and of its file's text."""
    home = _imported(module)
    make: Callable[[], Any] | None = getattr(home, function, None)
    if not callable(make):
        raise UsageError(f"{name}: {module} has no function {function!r}.")
    model = make()
    if not isinstance(model, NDM):
        raise TypeError(f"{name} returned a {type(model).__name__}, expected an ndm_ct.NDM; see ndm_ct.adapters.")
    source = Path(home.__file__).read_bytes() if home.__file__ else b""
    return model.eval(), hashlib.sha256(source + hash_state(model.state_dict()).encode()).hexdigest()


def _imported(module: str) -> Any:
    if not module.endswith(".py"):
        if "" not in sys.path:
            sys.path.insert(0, "")  # the current folder, as python -m has it
        return importlib.import_module(module)
    path = Path(module)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {module!r}.")
    sys.path.insert(0, str(path.parent.resolve()))  # what it imports may lie beside it
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    home = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = home
    spec.loader.exec_module(home)
    return home
