"""Keywords: what a callable accepts, and the errors for an option or a condition that does not exist."""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import nn

from ndm_ct._core.checks import nearest

__all__ = ["accepted_by", "keyword_names", "options_of", "public_options", "validate_cond"]


def keyword_names(function: Callable[..., Any], skip: int) -> tuple[frozenset[str], bool]:
    """Keywords a callable accepts after its first ``skip`` arguments, and whether it takes ``**kwargs``.

    A module that passes its keywords on to another module reports in a method ``cond_names()`` what that one accepts.
    """
    if isinstance(function, nn.Module) and hasattr(function, "cond_names"):
        return cast(Any, function).cond_names()
    target = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return frozenset(), True
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = frozenset(p.name for p in parameters[skip:] if p.kind in by_name)
    return names, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def accepted_by(names: tuple[frozenset[str], bool], cond: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of the conditioning that a network accepts; ``names`` is its :func:`keyword_names`."""
    own, anything = names
    return cond if anything else {key: value for key, value in cond.items() if key in own}


def options_of(function: Callable[..., Any]) -> frozenset[str]:
    """Names of a function's keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


@functools.cache
def public_options() -> frozenset[str]:
    """Options of every public function of the library, and the settings of ``Quantisation`` and ``Hutchinson``.

    A predictor with ``**kwargs`` must not swallow them: an option of another function is a mistake here.
    """
    package = importlib.import_module(__name__.partition(".")[0])
    members = [getattr(where, name) for where in (package, package.discrete) for name in where.__all__]
    options = (options_of(each) for each in members if inspect.isfunction(each))
    settings = (
        keyword_names(each, 0)[0] for each in (package.quantisation.Quantisation, package.divergence.Hutchinson)
    )
    return frozenset().union(*options, *settings)


def validate_cond(cond: Mapping[str, Any], names: tuple[frozenset[str], bool], caller: Callable[..., Any]) -> None:
    """Raise for a conditioning keyword that nobody accepts, or that is an option of another function.

    Args:
        cond: the keywords caught by ``**cond``.
        names: keywords that the predictor or the transform name in their signatures, and whether one of them takes
            ``**kwargs``.
        caller: the public function, whose options could have been meant.

    Raises:
        TypeError: naming the keyword, the options of the function and the names that the networks take.
    """
    own, anything = names
    for key in cond:
        if key in own:
            continue
        options = options_of(caller)
        if key in public_options():
            raise TypeError(
                f"{caller.__name__}() has no option {key!r}; options: {', '.join(sorted(options))}. As a conditioning "
                "it would have to be named by the predictor."
            )
        hint = nearest(key, options, cutoff=0.75) or nearest(key, own, cutoff=0.75)
        if hint or not anything:
            accepted = ", ".join(map(repr, sorted(own))) or "none"
            raise TypeError(
                f"{caller.__name__}() got the keyword {key!r}{hint or ';'} it is not an option of this function, and "
                f"the predictor does not name it (conditioning keywords it names: {accepted})."
            )
