"""Estimates of log p: exact values, the library's estimators and its peers', with their costs."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import ndm_ct
from ndm_ct import divergence
from ndm_ct._core.conditioning import Conditioning
from ndm_ct.likelihood import budget, quadrature
from ndm_ct.likelihood import path as trajectory

from .peers import PEERS
from .runs import RESULTS


@dataclass(frozen=True)
class Estimate:
    """log p of the rows, its cost in passes per row, and its own standard error if it has one."""

    logp: Tensor
    forward: float
    vjps: float
    stderr: Tensor | None


Estimator = Callable[[ndm_ct.NDM, Tensor, torch.Generator], Estimate]


def problem(model: ndm_ct.NDM, x: Tensor, tol: float, method: str = "ode") -> trajectory.Problem:
    """The path of x from t_min to 1 at a tolerance."""
    return trajectory.Problem(model, x, (model.t_min, 1.0), tol, tol, method, "raise", False, Conditioning({}, len(x)))


def solve(model: ndm_ct.NDM, x: Tensor, tol: float, method: str = "ode", **options: Any) -> Any:
    """The path alone, without a trace."""
    path = problem(model, x, tol, method)
    with path.prepared():
        return path.transport(**options)


def exact(model: ndm_ct.NDM, x: Tensor, nodes: int) -> Tensor:
    """log p in float64: a path to 1e-9, the exact trace at Gauss-Legendre nodes of the quadrature's own coordinate."""
    double, x = copy.deepcopy(model).double(), x.double()
    if x[0].numel() <= divergence.EXACT_UP_TO:
        return ndm_ct.loglik(double, x, trace="exact", rtol=1e-9, atol=1e-9)
    places, weights = np.polynomial.legendre.leggauss(nodes)
    times, slope = quadrature.path_times(double, torch.tensor(0.5 * (1.0 + places)))
    path = problem(double, x, 1e-9)
    with path.prepared():
        solved = path.transport(times[:, None].expand(-1, len(x)))
        flow, bound = path.flow(), divergence.Exact(chunk=32).bind(x, None)
        traces = [
            bound.with_byproduct(flow.network_part(t), z)[1][:, 0] for t, z in zip(times, solved.nodes, strict=True)
        ]
        integral = (torch.tensor(0.5 * weights)[:, None] * slope[:, None] * torch.stack(traces)).sum(0)
        return double.log_prior(solved.state[0]) + quadrature.linear_logdet(double, x.device) + integral


def reference(name: str, model: ndm_ct.NDM, x: Tensor, nodes: int) -> Tensor:
    """The exact log-densities, kept with the results because they take minutes."""
    path = RESULTS / "likelihood_cost" / "all" / f"reference_{name}_{len(x)}_{nodes}.npy"
    if not path.exists():
        np.save(path, exact(model, x, nodes).numpy())
    return torch.as_tensor(np.load(path))


def ours(trace: Any, tolerance: float | None = None, method: str = "ode") -> Estimator:
    """Our likelihood with these options, without its error budget."""

    def estimate(model: ndm_ct.NDM, x: Tensor, generator: torch.Generator) -> Estimate:
        estimator = divergence.resolve(trace, model.event_shape)
        info = budget.measure(problem(model, x, tolerance or estimator.tolerance, method), estimator, generator)
        passes = info.row_nfe.double().mean(), info.row_vjps.double().mean()
        return Estimate(info.loglik.double(), *map(float, passes), info.stderr.double())

    return estimate


def peer(name: str, tolerance: float) -> Estimator:
    """A peer at its tolerance."""

    def estimate(model: ndm_ct.NDM, x: Tensor, generator: torch.Generator) -> Estimate:
        result = PEERS[name](model, x, tolerance, generator)
        return Estimate(result.logp, result.forward, result.vjps, None)

    return estimate


def methods(size: int) -> dict[tuple[str, str], Estimator]:
    """The estimators for events of ``size`` entries, by method and setting; exact traces only for small events."""
    table: dict[tuple[str, str], Estimator] = {}
    if size <= divergence.EXACT_UP_TO:
        for tolerance in (1e-3, 1e-4, 1e-5, 2e-6, 1e-7):
            table["ndm_ct exact", f"tol {tolerance:g}"] = ours("exact", tolerance)
        for tolerance in (1e-5, 2e-6, 1e-7):
            table["ndm_ct exact, dopri5", f"tol {tolerance:g}"] = ours("exact", tolerance, "dopri5")
        for name in ("flow_matching_exact", "zuko_exact", "torchdyn_exact", "torchdiffeq_exact"):
            # At 1e-7 zuko did not end within ten minutes: its steps are smaller than its network's rounding.
            for tolerance in (1e-3, 1e-5, 1e-6, 1e-7)[: 3 if name == "zuko_exact" else 4]:
                table[name, f"tol {tolerance:g}"] = peer(name, tolerance)
        return table
    for sizes in ((6, 1, 1), (16, 1, 4), (16, 2, 8), (32, 2, 8), (32, 4, 8)):
        table["ndm_ct quadrature", "x".join(map(str, sizes))] = ours(divergence.Quadrature(*sizes))
    table["ndm_ct hutchinson", "1 probe"] = ours(divergence.Hutchinson(1), 1e-5)
    for name in ("score_sde", "flow_matching", "zuko", "torchdyn"):
        # Their error is the probe's, whatever the tolerance: 1e-5 only where it is the usual protocol.
        for tolerance in (1e-2, 1e-3, 1e-5) if name == "score_sde" else (1e-2, 1e-3):
            table[name, f"tol {tolerance:g}"] = peer(name, tolerance)
    return table


def plot(table: list[Any]) -> Figure:
    """RMSE against seconds and against network passes, both axes logarithmic."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for method in dict.fromkeys(m.method for m in table):
        points = sorted((m for m in table if m.method == method), key=lambda m: m.seconds)
        style = {"marker": "o", "linewidth": 2.2} if points[0].ours else {"marker": "s", "linestyle": "--"}
        for axis, work in ((axes[0], [m.seconds for m in points]), (axes[1], [m.forward + m.vjps for m in points])):
            axis.plot(work, [m.rmse for m in points], label=method, **style)
    axes[0].set(xscale="log", yscale="log", xlabel="seconds per row", ylabel="RMSE of log p, nats")
    axes[1].set(xscale="log", yscale="log", xlabel="forward passes + products per row")
    for axis in axes:
        axis.grid(True, which="both", alpha=0.25)
    axes[1].legend(fontsize=8)
    figure.suptitle(f"log-likelihood on {table[0].network}: error against work")
    return figure
