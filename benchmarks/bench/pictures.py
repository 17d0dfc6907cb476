"""Pictures and tables of distances over network evaluations, and grids of images."""

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from . import schedulers
from .runs import mean

Entry = dict[str, Any]


def summarise(rows: list[Entry], reference_steps: int | None) -> list[Entry]:
    """Means over seeds by model, sampler, steps and features.

    ``..._seeds_se`` is the standard error of the mean by the spread over seeds. ``fd_inf_se`` and ``kid_se`` are those
    of one cell by its own parts and include the uncertainty of the reference. ``excess`` is ``fd`` minus that of the
    same sampler at the reference steps, seed by seed.
    """
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        key = row["features"], row["model"], row["sampler"], row["steps"]
        groups.setdefault(key, {})[row["seed"]] = row
    summary = []
    for (name, model, sampler, steps), cells in groups.items():
        entry = {"features": name, "model": model, "sampler": sampler, "steps": steps, "seeds": len(cells)}
        entry["nfe"] = next(iter(cells.values()))["nfe"]
        for column in ("fd", "fd_inf", "kid"):
            entry |= _mean(column, [cell[column] for cell in cells.values()])
        for column in ("fd_inf_se", "kid_se"):
            entry[column] = float(np.sqrt(np.mean([cell[column] ** 2 for cell in cells.values()])))
        at_reference = groups.get((name, model, sampler, reference_steps), {})
        common = [seed for seed in cells if seed in at_reference]
        if reference_steps is not None and common:
            entry |= _mean("excess", [cells[seed]["fd"] - at_reference[seed]["fd"] for seed in common])
        summary.append(entry)
    return summary


def _mean(column: str, values: list[float]) -> dict[str, float | None]:
    value, error = mean(values)
    return {column: value, f"{column}_seeds_se": error if len(values) > 1 else None}


def distances(summary: list[Entry], labels: dict[str, str], title: str) -> Figure:
    """Evaluations against the extrapolated distance and against KID, a row per feature network."""
    names = list(dict.fromkeys(entry["features"] for entry in summary))
    figure = Figure(figsize=(13, 4.2 * len(names)), layout="constrained")
    for name, axes in zip(names, figure.subplots(len(names), 2, squeeze=False), strict=True):
        entries = [entry for entry in summary if entry["features"] == name]
        for axis, column, label in zip(
            axes, ("fd_inf", "kid"), (f"{labels[name]}, extrapolated", f"KID({name})"), strict=True
        ):
            _draw(axis, entries, column)
            axis.set(xlabel="network evaluations per sample", ylabel=label)
    handles, texts = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside right upper", fontsize=8)
    figure.suptitle(title)
    return figure


def _draw(axis: Any, entries: list[Entry], column: str) -> None:
    """One line per model and sampler, diffusers' dashed."""
    for model, sampler in dict.fromkeys((entry["model"], entry["sampler"]) for entry in entries):
        points = [entry for entry in entries if (entry["model"], entry["sampler"]) == (model, sampler)]
        points.sort(key=lambda point: point["nfe"])
        theirs = sampler.startswith(schedulers.PREFIX)
        axis.errorbar(
            [point["nfe"] for point in points], [point[column] for point in points],
            yerr=[point[f"{column}_seeds_se"] or point[f"{column}_se"] for point in points],
            label=f"{model}, {sampler}", linestyle="--" if theirs else "-", marker="s" if theirs else "o",
            markersize=4, capsize=2,
        )  # fmt: skip
    lowest = min(entry[column] for entry in entries)
    if lowest > 0.0:
        axis.set_yscale("log")
    else:  # an unbiased distance may be negative: values of that size are noise and drawn linearly
        axis.set_yscale("symlog", linthresh=max(-lowest, 1e-12))
    axis.set_xscale("log")
    ticks = sorted({entry["steps"] for entry in entries})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.grid(alpha=0.3)


def grid(rows: dict[str, Tensor], levels: int, title: str) -> Figure:
    """A grid of images, one labelled row each."""
    columns = max(len(images) for images in rows.values())
    channels, height, width = next(iter(rows.values())).shape[1:]
    # One canvas with white lines between the images: an axis for each of them would take seconds to draw.
    canvas = torch.ones(len(rows) * (height + 1) - 1, columns * (width + 1) - 1, channels)
    for row, images in enumerate(rows.values()):
        for column, image in enumerate(images):
            top, left = row * (height + 1), column * (width + 1)
            canvas[top : top + height, left : left + width] = image.permute(1, 2, 0) / (levels - 1.0)
    figure = Figure(figsize=(0.7 * columns + 1.4, 0.7 * len(rows) + 0.5), layout="constrained")
    axis = figure.subplots()
    axis.imshow(canvas.numpy(), cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([(row + 0.5) * (height + 1) - 1.0 for row in range(len(rows))], list(rows), fontsize=8)
    axis.tick_params(length=0)
    axis.set_frame_on(False)
    figure.suptitle(title, fontsize=9)
    return figure


def lines(summary: list[Entry], labels: dict[str, str]) -> str:
    """Extrapolated distances for the terminal: a line per model and sampler, a column per number of steps."""
    text = []
    for name, metric in labels.items():
        entries = [entry for entry in summary if entry["features"] == name]
        steps = sorted({entry["steps"] for entry in entries})
        found = {(entry["model"], entry["sampler"], entry["steps"]): entry for entry in entries}
        pairs = list(dict.fromkeys((entry["model"], entry["sampler"]) for entry in entries))
        width = max(len(f"{model}, {sampler}") for model, sampler in pairs) + 2
        text += ["", f"{metric}, extrapolated", " " * width + "".join(f"{step:>10}" for step in steps)]
        for model, sampler in pairs:
            values = (found.get((model, sampler, step)) for step in steps)
            line = "".join(f"{value['fd_inf']:10.4g}" if value else " " * 10 for value in values)
            text.append(f"{f'{model}, {sampler}':<{width}}{line}")
    return "\n".join(text[1:])


def draw_paths(axis: Any, states: np.ndarray) -> None:
    """Paths ``(N, B, d)``: on the line over histograms in time, in the plane with their ends."""
    if states.shape[2] == 2:
        axis.scatter(*states[-1, :1000].T, s=1.5, color="lightgrey")
        axis.scatter(*states[0, :1000].T, s=1.5, color="tab:blue")
        axis.plot(states[:, :60, 0], states[:, :60, 1], color="black", linewidth=0.6)
        axis.set(aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
        return
    edges = np.linspace(-3.0, 3.0, 81)
    density = np.stack([np.histogram(z, edges, density=True)[0] for z in states[..., 0]], 1)
    axis.imshow(density, origin="lower", extent=(0, 1, -3, 3), aspect="auto", cmap="Blues", vmax=0.8)
    order = states[0, :, 0].argsort()
    chosen = order[(np.linspace(0.01, 0.99, 25) * (len(order) - 1)).astype(int)]
    axis.plot(np.linspace(0.0, 1.0, len(states)), states[:, chosen, 0], color="black", linewidth=0.6)
    axis.set(xlabel="time, from data to prior", ylabel="z", ylim=(-3, 3))
