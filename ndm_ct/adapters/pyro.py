"""Distributions of this library in models of Pyro.

References:
    Bingham et al., Pyro: Deep Universal Probabilistic Programming, https://arxiv.org/abs/1810.09538
"""

import functools
import types
from typing import Any

from ndm_ct.distributions import NDMDistribution

__all__ = ["for_pyro"]


def for_pyro(distribution: NDMDistribution) -> Any:
    r"""A distribution with the methods that ``pyro.sample`` needs; density and samples are as they were.

    Args:
        distribution: of :func:`ndm_ct.distribution`.

    Returns:
        An :class:`~ndm_ct.distributions.NDMDistribution` that is a ``TorchDistributionMixin`` too; so are its
        expansions.

    Raises:
        ImportError: Pyro is not installed.
        TypeError: not a distribution of :func:`ndm_ct.distribution`.

    Example:
        >>> import pyro  # doctest: +SKIP
        >>> def program(x):  # doctest: +SKIP
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("x", for_pyro(ndm_ct.distribution(model)), obs=x)
    """
    if not isinstance(distribution, NDMDistribution):
        raise TypeError(
            f"distribution must come from ndm_ct.distribution(model), got {type(distribution).__name__}; a model "
            "itself has to go through it."
        )
    return _kind()(
        distribution.model, distribution.batch_shape, distribution.cond, distribution.options, distribution.generator
    )


@functools.cache
def _kind() -> type[Any]:
    """The class with Pyro's methods after those of the distribution, whose ``expand`` knows the conditioning."""
    try:
        from pyro.distributions.torch_distribution import TorchDistributionMixin
    except ImportError as error:
        raise ImportError("this adapter needs Pyro: pip install 'pyro-ppl>=1.9'.") from error
    return types.new_class("PyroNDMDistribution", (NDMDistribution, TorchDistributionMixin))
