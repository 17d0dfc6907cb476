r"""The divergence of a field: :math:`\operatorname{tr} \partial f/\partial z`, exactly or by random probes.

.. math::
    \operatorname{tr} J = \sum_i e_i^\top J e_i = E_\epsilon[\epsilon^\top J \epsilon], \qquad
    E[\epsilon \epsilon^\top] = I .

This package does not depend on diffusion models; it works on any field. An estimator has one method that matters,
``logdet(path, generator)``: the log-determinant of the map from the start of a path to its end, with its error and its
cost (:mod:`ndm_ct.divergence.interface`). :class:`Exact` and :class:`Hutchinson` integrate the divergence together with
the state, or at nodes along a path with a grid (:mod:`ndm_ct.divergence.nodes`). :class:`Quadrature` solves the path
first and evaluates the divergence at random nodes along it.

References:
    Hutchinson, A Stochastic Estimator of the Trace of the Influence Matrix (1990)
    Grathwohl et al., FFJORD, https://arxiv.org/abs/1810.01367
"""

from ndm_ct._core.checks import choose, event_size
from ndm_ct.divergence.interface import LogDet, Path, TraceEstimator
from ndm_ct.divergence.probes import BoundTrace, Exact, Hutchinson
from ndm_ct.divergence.quadrature import Quadrature

__all__ = ["BoundTrace", "Exact", "Hutchinson", "LogDet", "Path", "Quadrature", "TraceEstimator", "resolve"]

EXACT_UP_TO = 32
"""Largest number of dimensions for which "auto" takes the exact trace."""

TRACES = ("auto", "exact", "hutchinson", "quadrature")


def resolve(
    trace: str | TraceEstimator, event_shape: tuple[int, ...], *, large: TraceEstimator | None = None
) -> TraceEstimator:
    """The estimator that ``trace`` names.

    Args:
        trace: a name of ``TRACES``, or an estimator, which is returned as it is.
        event_shape: shape of one event. "auto" is "exact" up to 32 dimensions.
        large: what "auto" is beyond 32 dimensions; None is ``Quadrature()``.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor an estimator.
    """
    if not isinstance(trace, str):
        if not isinstance(trace, TraceEstimator):
            raise TypeError(
                f"trace must be one of {', '.join(map(repr, TRACES))} or an object like divergence.Quadrature(sweeps=8)"
                f", got {type(trace).__name__}."
            )
        return trace
    choose("trace", trace, TRACES)
    if trace == "auto" and event_size(event_shape) <= EXACT_UP_TO:
        return Exact()
    if trace == "auto" and large is not None:
        return large
    names: dict[str, type[Exact | Hutchinson | Quadrature]] = {"exact": Exact, "hutchinson": Hutchinson}
    return names.get(trace, Quadrature)()
