r"""Pictures of what a model does: F and what it changes, samples, a training, a table's pairs, work against error.

Every function returns a matplotlib ``Figure`` that belongs to no window; ``save(figure, path)`` writes it as a whole or
not at all. They need ``pip install "ndm-ct[demo]"``.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ndm_ct.columns import Diagnosis
from ndm_ct.model import NDM
from ndm_ct.quantisation import Quantisation
from ndm_ct.storage.atomic import PathLike, as_path, write_atomically
from ndm_ct.training.loop import FitResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

__all__ = ["diagnosis", "forward_process", "image_rows", "pairs", "save", "training", "work_precision"]

_TIMES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
_MOST_POINTS = 2000
_RAREST = 10


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "ndm-ct[demo]".') from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: "Figure", path: PathLike) -> None:
    """Write a figure as png. The file is replaced as a whole, so a process that is killed leaves the old one.

    Args:
        figure: what a function of this module returned.
        path: file to write or replace.

    Raises:
        OSError: the file cannot be written.
    """
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    write_atomically(as_path("path", path), picture.getvalue())


def image_rows(
    rows: Mapping[str, Tensor], *, title: str = "", quantisation: int | Quantisation | None = None
) -> "Figure":
    """Rows of images, each with a label on its left.

    Args:
        rows: images by label, each ``(N, C, H, W)`` with one or three channels. Integers are levels; reals are drawn
            from -1 (black) to 1, or symmetrically further where a row exceeds that.
        title: above all rows.
        quantisation: the bins of integers, or their number; real images are drawn as their nearest levels. None draws
            reals as they are and integers from their least to their largest.

    Raises:
        ValueError: there are no rows, or one holds something else than images.

    Example:
        >>> import torch
        >>> from ndm_ct import plots
        >>> figure = plots.image_rows({"noise": torch.randn(4, 1, 8, 8)}, title="four images")
    """
    shapes = {label: tuple(images.shape) for label, images in rows.items()}
    if not shapes or any(len(shape) != 4 or shape[1] not in (1, 3) for shape in shapes.values()):
        raise ValueError(f"rows must hold images (N, C, H, W) of one or three channels, got {shapes}.")
    bins = Quantisation(quantisation) if isinstance(quantisation, int) else quantisation
    columns = max(len(images) for images in rows.values())
    figure = _figure(0.8 * columns + 1.6, 0.8 * len(rows) + 0.6)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(row, _grey_or_colour(images, bins), strict=False):
            axis.imshow(picture, cmap="gray", vmin=0.0, vmax=1.0)
        for axis in row:
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _grey_or_colour(images: Tensor, bins: Quantisation | None) -> np.ndarray:
    """The pictures with values in [0, 1], ``(N, H, W)`` or ``(N, H, W, 3)``."""
    values = images.detach().cpu()
    if bins is not None:
        levels = bins.nearest(values) if values.is_floating_point() else values
        shown = levels.double() / (bins.levels - 1)
    elif values.is_floating_point():
        limit = max(1.0, float(values.abs().max())) if values.numel() else 1.0
        shown = 0.5 + 0.5 * values.double() / limit
    else:
        low, high = values.min(), values.max()
        shown = (values - low).double() / max(1, int(high - low))
    return shown.clamp(0.0, 1.0).permute(0, 2, 3, 1).squeeze(-1).numpy()


def forward_process(model: NDM, x: Tensor, /, *, times: Sequence[float] = _TIMES, **cond: Any) -> "Figure":
    r"""What the transform does to data: :math:`F(x, t)`, and what it changes, :math:`F(x, t) - x`.

    Images are drawn as two rows of pictures per time, differences on one scale from blue (less) over white to red. Rows
    with two coordinates are points in the plane with lines from x to F; of more coordinates, the two that F changes
    most.

    Args:
        model: the model.
        x: data, shape ``(B, *E)``; ten images, or some hundred points, make a readable picture.
        times: the times t in [0, 1].
        cond: conditioning of the transform.

    Raises:
        ValueError: the transform has latents of another shape than the data.

    Example:
        >>> import torch, ndm_ct
        >>> from ndm_ct import plots
        >>> F = ndm_ct.transforms.Separable(ndm_ct.nn.MLP(2, outputs=2, time=False))
        >>> model = ndm_ct.NDM(ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2)), (2,), transform=F)
        >>> figure = plots.forward_process(model, torch.randn(100, 2), times=(0.0, 0.5, 1.0))
    """
    given = model.validate(x, cond, forward_process)
    with torch.no_grad(), model.evaluating():
        y, _ = model.to_latent(x, generator=0, **given)
        if y.shape != x.shape:
            raise ValueError(f"{type(model.transform).__name__} has latents of shape {tuple(y.shape[1:])}; plot those.")
        states = [model.transform(y, torch.tensor(t, dtype=torch.float64), **given).cpu() for t in times]
    return _changed_images(x.cpu(), states, times) if x.ndim == 4 else _changed_points(x.cpu(), states, times)


def _changed_images(x: Tensor, states: list[Tensor], times: Sequence[float]) -> "Figure":
    changes = [state - x for state in states]
    scale = max(1e-12, *(float(change.abs().max()) for change in changes))
    figure = _figure(0.8 * len(x) + 2.6, 1.6 * len(times) + 0.6)
    axes = figure.subplots(2 * len(times), len(x), squeeze=False)
    shown: Any = None
    for place, (t, state, change) in enumerate(zip(times, states, changes, strict=True)):
        for axis, picture in zip(axes[2 * place], _grey_or_colour(state, None), strict=True):
            axis.imshow(picture, cmap="gray", vmin=0.0, vmax=1.0)
        for axis, difference in zip(axes[2 * place + 1], change.mean(1), strict=True):
            shown = axis.imshow(difference.numpy(), cmap="coolwarm", vmin=-scale, vmax=scale)
        axes[2 * place, 0].set_ylabel(f"F(x, {t:g})", rotation=0, ha="right", va="center", fontsize=9)
        axes[2 * place + 1, 0].set_ylabel("F - x", rotation=0, ha="right", va="center", fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.colorbar(shown, ax=list(axes[1::2].flat), label="F - x", shrink=0.8)
    return figure


def _changed_points(x: Tensor, states: list[Tensor], times: Sequence[float]) -> "Figure":
    flat = [each.reshape(len(x), -1)[:_MOST_POINTS].double() for each in (x, *states)]
    total = sum((state - flat[0]).square().mean(0) for state in flat[1:])
    places = torch.as_tensor(total).argsort(descending=True, stable=True)[:2].sort().values
    data, *moved = (each[:, places].numpy() for each in flat)
    figure = _figure(3.0 * len(times), 3.2)
    axes = figure.subplots(1, len(times), squeeze=False, sharex=True, sharey=True)[0]
    for axis, t, state in zip(axes, times, moved, strict=True):
        if data.shape[1] == 1:  # one coordinate: F against x
            axis.scatter(data, state, s=4)
            axis.set(title=f"F(x, {t:g})", xlabel="x")
            continue
        lines = np.stack([data, state], axis=2)
        axis.plot(*lines[:200].transpose(1, 2, 0), color="0.85", linewidth=0.6, zorder=0)
        axis.scatter(*state.T, s=4)
        axis.set(title=f"F(x, {t:g})", xlabel=f"coordinate {int(places[0])}")
    axes[0].set_ylabel("F" if data.shape[1] == 1 else f"coordinate {int(places[1])}")
    return figure


def training(results: FitResult | Mapping[str, FitResult]) -> "Figure":
    """The curve of a training over steps and over seconds, with held-out bounds, their errors, and the best of them.

    Args:
        results: what :func:`ndm_ct.fit` returned, or several by name. The first tenth of the losses, which would set
            the scale, is left out. The best held-out bound, whose weights ``patience`` keeps, has a ring.

    Example:
        >>> import torch, ndm_ct
        >>> from ndm_ct import plots
        >>> model = ndm_ct.NDM(ndm_ct.nn.MLP(2), (2,))
        >>> result = ndm_ct.fit(model, torch.randn(50, 2), steps=5, log_every=1, progress=False)
        >>> figure = plots.training(result)
    """
    named = {"training": results} if isinstance(results, FitResult) else dict(results)
    bits = all("bits_per_dim" in row for result in named.values() for row in result.history)
    figure = _figure(9, 3.4)
    panels = figure.subplots(1, 2, sharey=True)
    for axis, key in zip(panels, ("step", "seconds"), strict=True):
        for name, result in named.items():
            _draw_training(axis, name, result, key, bits)
        axis.set_xlabel("seconds of training" if key == "seconds" else key)
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("bound, bits per dimension" if bits else "bound, nats per event")
    if panels[0].lines:
        panels[0].legend(fontsize=8)
    return figure


def _draw_training(axis: "Axes", name: str, result: FitResult, key: str, bits: bool) -> None:
    rows = result.history[len(result.history) // 10 :]
    values = [row["bits_per_dim" if bits else "loss"] for row in rows]
    (line,) = axis.plot([row[key] for row in rows], values, label=name, linewidth=0.9)
    if not result.validation:
        return
    held = [row["validation_bits_per_dim"] if bits else -row["validation_elbo"] for row in result.validation]
    nats = [row["validation_elbo"] for row in result.validation]
    ratio = [abs(value / nat) if bits and nat else 1.0 for value, nat in zip(held, nats, strict=True)]
    errors = [r * (row["validation_stderr"] or 0.0) for r, row in zip(ratio, result.validation, strict=True)]
    places, colour = [row[key] for row in result.validation], line.get_color()
    axis.errorbar(places, held, yerr=errors, fmt="o-", markersize=3, linewidth=0.9, color=colour, alpha=0.6,
                  label="held out")  # fmt: skip
    best = int(np.argmin(held))
    axis.plot(places[best], held[best], "o", markersize=10, markerfacecolor="none", color=colour, label="best")


def pairs(
    data: Tensor | np.ndarray, samples: Tensor | np.ndarray, /, *, names: Sequence[str] = (), most: int = 6
) -> "Figure":
    """Marginals and pairs of columns, of data and of samples.

    Args:
        data: rows ``(N, d)``.
        samples: rows of a model ``(M, d)``, in the same units.
        names: of the columns. Columns without a name are called x0, x1, ...
        most: columns to draw at most, the first ones.

    Raises:
        ValueError: the two differ in the number of columns.

    Example:
        >>> import torch
        >>> from ndm_ct import plots
        >>> figure = plots.pairs(torch.randn(300, 3), torch.randn(300, 3), names=("a", "b", "c"))
    """
    real, drawn = (np.asarray(each, dtype=np.float64) for each in (data, samples))
    if real.ndim != 2 or drawn.ndim != 2 or real.shape[1] != drawn.shape[1]:
        raise ValueError(f"data and samples must be tables of the same columns, got {real.shape} and {drawn.shape}.")
    d = min(most, real.shape[1])
    labels = [names[i] if i < len(names) else f"x{i}" for i in range(d)]
    figure = _figure(1.8 * d + 0.6, 1.8 * d + 0.4)
    _draw_pairs(figure, real[:, :d], drawn[:, :d], labels, np.empty((0, d)))
    return figure


def _draw_pairs(
    figure: "FigureBase", real: np.ndarray, drawn: np.ndarray, labels: Sequence[str], marked: np.ndarray
) -> None:
    """Marginals and pairs of all columns; the marked rows get rings, and are inside the axes."""
    d = len(labels)
    both = np.concatenate([real, drawn])
    inside = [np.append(np.nanquantile(both[:, i], [0.002, 0.998]), marked[:, i]) for i in range(d)]
    ranges = [(np.nanmin(values), np.nanmax(values)) for values in inside]
    axes = figure.subplots(d, d, squeeze=False, sharex="col")
    for i in range(d):
        for j in range(d):
            _draw_pair(axes[i, j], real, drawn, i, j, ranges)
            if i != j and len(marked):
                axes[i, j].scatter(marked[:, j], marked[:, i], s=18, facecolors="none", edgecolors="black",
                                   linewidths=0.7, label="rarest held-out rows")  # fmt: skip
            if i == d - 1:
                axes[i, j].set_xlabel(labels[j], fontsize=8)
        axes[i, 0].set_ylabel(labels[i] if i else "share", fontsize=8)
    handles, words = (a + b for a, b in zip(*(axes[0, k].get_legend_handles_labels() for k in {0, d - 1}), strict=True))
    figure.legend(handles, words, loc="outside upper right", ncols=3, fontsize=8)


def diagnosis(found: Diagnosis, /, *, most: int = 6) -> "Figure":
    """A page on a table's density: pairs of columns with the rarest rows marked, and what should be uniform.

    Args:
        found: what ``NDMDensity.diagnose`` returned.
        most: columns to draw at most: those in which samples and held-out rows differ most.

    The lower panels show, for each column, the share of samples below every held-out value. Bars of equal height mean
    equal laws; a hump means samples that are too wide, a trough samples that are too narrow, a slope a shift.

    Example:
        >>> import numpy as np
        >>> from ndm_ct import plots
        >>> from ndm_ct.estimator import NDMDensity
        >>> rows = np.random.default_rng(0).normal(size=(1000, 2))
        >>> density = NDMDensity(width=16, steps=50, random_state=0).fit(rows)
        >>> figure = plots.diagnosis(density.diagnose(n=100, random_state=0))
    """
    chosen = np.sort(np.argsort(-found.distances, kind="stable")[:most]).tolist()
    names = [found.names[k] for k in chosen]
    figure = _figure(1.8 * len(chosen) + 0.6, 1.8 * len(chosen) + 2.4)
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.8 * len(chosen) + 0.4, 2.0), squeeze=False)[:, 0]
    rarest = found.held_out[np.argsort(found.anomalies.scores, kind="stable")[:_RAREST]]
    _draw_pairs(upper, found.held_out[:, chosen], found.samples[:, chosen], names, rarest[:, chosen])
    for axis, place, name in zip(lower.subplots(1, len(chosen), squeeze=False)[0], chosen, names, strict=True):
        ranks = found.ranks[:, place]
        axis.hist(ranks[~np.isnan(ranks)], bins=10, range=(0.0, 1.0), density=True, color="0.6")
        axis.axhline(1.0, color="0.2", linewidth=0.8)
        axis.set(xlabel=name, yticks=[], xlim=(0.0, 1.0))
        axis.tick_params(labelsize=6)
    lower.suptitle("share of samples below a held-out value: flat if the laws are equal", fontsize=8)
    return figure


def _draw_pair(axis: "Axes", real: np.ndarray, drawn: np.ndarray, i: int, j: int, ranges: list[Any]) -> None:
    axis.tick_params(labelsize=6)
    if i == j:
        for values, label in ((real, "data"), (drawn, "samples")):
            axis.hist(values[:, i], bins=40, range=ranges[i], density=True, histtype="step", label=label)
        axis.set_yticks([])
        return
    for values in (real, drawn):
        axis.scatter(values[:_MOST_POINTS, j], values[:_MOST_POINTS, i], s=1.5, alpha=0.35, linewidths=0)
    axis.set(xlim=ranges[j], ylim=ranges[i])


def work_precision(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, work: str = "network evaluations",
    error: str = "error",
) -> "Figure":  # fmt: skip
    """Error against work, both on logarithmic axes with plain numbers: nearer the lower left is better.

    Args:
        curves: work and error of each method, by name.
        work: label of the work.
        error: label of the error.

    Raises:
        ValueError: a curve has a value that is not positive, which has no place on a logarithmic axis.

    Example:
        >>> from ndm_ct import plots
        >>> figure = plots.work_precision({"order two": ([10, 20, 40], [1e-2, 2.5e-3, 6e-4])}, error="nats")
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    wrong = [name for name, curve in curves.items() if not all(0.0 < v < math.inf for values in curve for v in values)]
    if wrong:
        raise ValueError(f"curves {wrong} have work or error that is not positive and finite; leave such points out.")
    figure = _figure(6, 4.2)
    axis = figure.subplots()
    for marker, (name, (x, y)) in zip("osD^vP*Xph" * len(curves), curves.items(), strict=False):
        axis.loglog(x, y, marker + "-", markersize=4, linewidth=1.0, label=name)
    axis.set(xlabel=work, ylabel=error)
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    return figure
