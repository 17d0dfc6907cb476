"""Tables and pictures of ``paper_claims.py``: differences of models from the matched diffusion, paired by seed."""

import math
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .models import ABLATIONS, MODELS
from .recipes import RECIPES, truth
from .runs import mean, table, with_error

STEP_COUNTS = (100, 50, 10)
"""Steps of samples, by "ddpm" and by "ddim"."""

Entry = dict[str, Any]


def place(name: str) -> tuple[int, str]:
    """The place of a data set or a model in the tables; unknown ones come last, by name."""
    known = [*RECIPES, *MODELS, *ABLATIONS]
    return (known.index(name), "") if name in known else (len(known), name)


def paired(entries: list[Entry], key: str, baseline: str = "matched") -> dict[tuple[str, str], tuple[float, float]]:
    """Mean difference from the baseline over common seeds, and its standard error, by data set and model."""
    values = {(e["data"], e["model"], e["seed"]): e[key][0] for e in entries}
    found = {}
    for name, model in dict.fromkeys((e["data"], e["model"]) for e in entries):
        seeds = [s for d, m, s in values if (d, m) == (name, model) and (name, baseline, s) in values]
        if seeds and model != baseline:
            found[name, model] = mean([values[name, model, s] - values[name, baseline, s] for s in seeds])
    return found


def at_equal_time(entries: list[Entry], seconds: dict[str, dict[str, float]], baseline: str = "matched") -> list[Entry]:
    """Validation bounds of every model after the time that the baseline of its seed was trained, off the curves.

    The bound is interpolated linearly between two points of a curve. For models that need longer, the learning rate has
    not reached its end by then; this favours the baseline.
    """
    ends = {(e["data"], e["seed"]): e["recipe"]["steps"] for e in entries if e["model"] == baseline}
    found = []
    for entry in entries:
        cost, last = seconds.get(entry["data"], {}), ends.get((entry["data"], entry["seed"]))
        if last is not None and {entry["model"], baseline} <= cost.keys():
            steps, values = np.array(entry["curve"]).T
            value = float(np.interp(last * cost[baseline] / cost[entry["model"]], steps, values))
            found.append({**entry, "at_time": (value, math.nan)})
    return found


def markdown(entries: list[Entry], seconds: dict[str, dict[str, float]], on: str) -> str:
    """Tables: absolute values, and paired differences from the matched diffusion."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry["data"], entry["model"]), []).append(entry)
    rows = []
    for (name, model), cells in groups.items():
        means = (f"{np.mean([cell[key][0] for cell in cells]):.4f}" for key in ("nelbo", "nll"))
        step = seconds.get(name, {}).get(model)
        rows.append((name, model, len(cells), cells[0]["parameters"], *means, f"{1e3 * step:.1f}" if step else ""))
    lines = [f"# Does a learned forward process improve the likelihood? ({on} rows)", ""]
    lines += table(["data", "model", "seeds", "parameters", "NELBO", "flow NLL", "ms / step"], rows)
    for name, (value, error) in {name: value for name, _ in groups if (value := truth(name, on))}.items():
        lines += ["", f"The true density of {name} has {value:.4f} ± {error:.4f} on all {on} rows."]
    bounds, nlls = (paired(entries, key) for key in ("nelbo", "nll"))
    lines += ["", "Differences from the matched diffusion, paired by seed (negative is better):", ""]
    rows = [(*key, _signed(gap), _signed(nlls[key])) for key, gap in bounds.items()]
    lines += table(["data", "model", "NELBO", "flow NLL"], rows)
    if timed := paired(at_equal_time(entries, seconds), "at_time"):
        lines += ["", "Validation bound at equal training time:", ""]
        lines += table(["data", "model", "difference"], [(*key, _signed(gap)) for key, gap in timed.items()])
    return "\n".join([*lines, *_sampled(entries), ""])


def _signed(gap: tuple[float, float]) -> str:
    return with_error(*gap, sign="+")


def _sampled(entries: list[Entry]) -> list[str]:
    """Tables of what was measured on samples."""
    lines = []

    def key(entry: Entry) -> tuple[Any, ...]:
        return entry["data"], entry["model"], entry["seed"]

    if drawn := [entry for entry in entries if entry["sde_ode"]]:
        lines += ["", "Energy distance between samples of flow and SDE, over its scatter where they have one law:", ""]
        rows = [(*key(e), f"{e['sde_ode']['value'] / e['sde_ode']['stderr']:.1f}") for e in drawn]
        lines += table(["data", "model", "seed", "distance"], rows)
    if classified := [entry for entry in entries if entry["fd"]]:
        columns = [(method, str(steps)) for method in ("ddpm", "ddim") for steps in STEP_COUNTS]
        rows = [(*key(e), *(f"{e['fd'][method][steps]:.3f}" for method, steps in columns)) for e in classified]
        lines += ["", "FD(cnn), extrapolated:", ""]
        lines += table(["data", "model", "seed", *map(" ".join, columns)], rows)
    return lines


def curves(entries: list[Entry], seconds: dict[str, dict[str, float]]) -> Figure:
    """Validation bounds over steps and, where timed, over seconds, a row of panels per data set."""
    names, models = (list(dict.fromkeys(entry[key] for entry in entries)) for key in ("data", "model"))
    models.sort(key=place)
    colours = colormaps["tab10"] if len(models) <= 10 else colormaps["turbo"].resampled(len(models))
    columns = 2 if any(name in seconds for name in names) else 1
    height = max(3.2 * len(names), 0.6 + 0.18 * len(models))
    figure = Figure(figsize=(2.0 + 4.75 * columns, height), layout="constrained")
    lines = {}
    for name, axes in zip(names, figure.subplots(len(names), columns, squeeze=False), strict=True):
        for entry in (entry for entry in entries if entry["data"] == name):
            steps, values = np.array(entry["curve"])[1:].T
            style = {"color": colours(models.index(entry["model"])), "linewidth": 0.9}
            (lines[entry["model"]],) = axes[0].plot(steps, values, **style)
            if entry["model"] in seconds.get(name, {}):
                axes[1].plot(seconds[name][entry["model"]] * steps, values, **style)
        axes[0].set(title=name, xlabel="steps", ylabel="validation bound, one draw per row")
        if columns == 2:
            axes[1].set(xlabel="seconds of training")
        for axis in axes:
            axis.grid(alpha=0.3)
    figure.legend([lines[model] for model in models], models, loc="outside right upper", fontsize=7)
    return figure


def differences(entries: list[Entry]) -> Figure | None:
    """Differences from the matched diffusion with two standard errors over seeds, a panel per data set."""
    gaps = {"NELBO": paired(entries, "nelbo"), "flow NLL": paired(entries, "nll")}
    names = list(dict.fromkeys(name for name, _ in gaps["NELBO"]))
    if not names:
        return None
    models = sorted({model for _, model in gaps["NELBO"]}, key=place)
    images = {entry["data"]: entry["recipe"]["levels"] > 0 for entry in entries}
    columns = min(len(names), 4)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.0 + 2.3 * columns, rows * (1.0 + 0.24 * len(models))), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for name, axes in zip(names, panels, strict=False):
        for (label, found), marker, lift in zip(gaps.items(), "os", (-0.12, 0.12), strict=True):
            heights = np.array([row for row, model in enumerate(models) if (name, model) in found])
            values, errors = np.array([found[name, models[row]] for row in heights]).T
            bars = 2.0 * np.nan_to_num(errors)
            axes.errorbar(values, heights + lift, xerr=bars, fmt=marker, markersize=4, label=label)
        axes.axvline(0.0, color="0.4", linewidth=0.8)
        unit = "bits/dim" if images[name] else "nats"
        axes.set(title=f"{name}, {unit}", yticks=range(len(models)), yticklabels=models, ylim=(len(models) - 0.5, -0.5))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(alpha=0.3)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)
    figure.supxlabel("difference from the matched diffusion", fontsize=9)
    return figure
