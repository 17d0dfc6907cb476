r"""Is a likely image one like those of the training?
=================================================

A small diffusion model scores test images of the data it was trained on ("inside": scikit-learn's digits) and of
another set ("outside": patches of two photographs), each image in bits per dimension with its standard error. One would
think that images from outside cost more bits. Sometimes they cost less, because density is high where images are
*simple*, whatever they show. Then bits per dimension alone are an anomaly score with an area under the ROC curve below
one half:

.. math::
    \text{bits/dim} = -\frac{\log_2 P(x)}{d}, \qquad
    \text{AUROC} = P(\text{score}_{outside} > \text{score}_{inside}) + \tfrac12 P(\text{equal}) .

The error bars tell whether that is a property of the model or the noise of the estimate. A remedy that needs only a
compressor: subtract the bits that zlib needs for the image, a measure of how complex it is. What is left is how much
better the model knows this kind of image than a general-purpose code does.

The error bars are those of the trace. They do not include the noise of the dequantisation, one point in each image's
bin; a few images are scored twice, with new random numbers for both, to show all of it.

``python examples/out_of_distribution.py`` takes under a minute on one CPU core and writes ``out_of_distribution.png``,
``out_of_distribution_images.png`` and ``out_of_distribution.json``. The known paradox shows with Fashion-MNIST against
MNIST: ``--fashion FOLDER --mnist FOLDER`` names the folders that hold the idx files of their test images.

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
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

import ndm_ct
from ndm_ct.divergence import Quadrature
from ndm_ct.files import idx

NETWORKS = Path(__file__).parents[1] / "benchmarks" / "weights"

TRACE = Quadrature(nodes=16, probes=1, sweeps=4)
"""The first four sweeps; images whose error is still too large get more."""

BATCH = 80
COLUMNS = 8
COLOURS = ("tab:blue", "tab:orange")


@dataclass(frozen=True)
class Scored:
    """Images of one set, their bits per dimension with standard errors, and the bits per dimension of zlib.

    ``again`` holds the bits of the first images, estimated once more with other random numbers.
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


def digits() -> Tensor:
    """Levels 0 ... 16 of the 360 digits that the network was not trained on, ``(N, 1, 8, 8)``."""
    pixels = torch.as_tensor(load_digits().images, dtype=torch.uint8)[:, None]
    return pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[1437:]]


def photo_patches(size: int = 8, levels: int = 17, shrink: int = 4) -> Tensor:
    """Patches of scikit-learn's two photographs as grey levels 0 ... levels - 1, ``(N, 1, size, size)``, shuffled."""
    patches = []
    for photo in load_sample_images().images:
        grey = torch.as_tensor(photo @ np.array([0.299, 0.587, 0.114]))[None, None]
        quantised = (avg_pool2d(grey, shrink)[0, 0] * levels / 256.0).long().to(torch.uint8)
        patches.append(quantised.unfold(0, size, size).unfold(1, size, size).reshape(-1, 1, size, size))
    pixels = torch.cat(patches)
    return pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]


def idx_images(folder: Path) -> Tensor:
    """Test images of a folder in MNIST's format, averaged down to 16x16, levels 0 ... 255."""
    found = sorted(folder.glob("t10k-images*idx3-ubyte*"))
    if not found:
        raise FileNotFoundError(f"there is no t10k-images idx file in {str(folder)!r}.")
    pixels = torch.as_tensor(idx(found[0]).copy())[:, None]
    return torch.cat([adaptive_avg_pool2d(part.double(), 16).round().to(torch.uint8) for part in pixels.split(4096)])


def image_sets(fashion: Path | None, mnist: Path | None) -> tuple[str, int, dict[str, Tensor]]:
    """Name of the network, number of levels, and the two sets of images, inside first."""
    if fashion is None or mnist is None:
        return "digits", 17, {"digits": digits(), "photo patches": photo_patches()}
    return "fashion", 256, {"Fashion-MNIST": idx_images(fashion), "MNIST": idx_images(mnist)}


def scored(
    model: ndm_ct.NDM, name: str, images: Tensor, levels: int, stderr: float | None, repeated: int, seed: int
) -> Scored:
    """Score every image, batch by batch, and the first ones once more."""
    generator, parts = torch.Generator().manual_seed(seed), []
    for batch in torch.cat([images, images[:repeated]]).split(BATCH):
        bits, info = ndm_ct.bits_per_dim(
            model, batch, quantisation=levels, stderr=stderr, trace=TRACE, generator=generator, return_info=True
        )
        parts.append(torch.stack([bits, info.stderr]).double())
    bits, errors = torch.cat(parts, 1)
    n, complexity = len(images), torch.tensor([zlib_bits(image) for image in images], dtype=torch.float64)
    return Scored(name, images, bits[:n], errors[:n], complexity, bits[n:])


def zlib_bits(image: Tensor) -> float:
    """Bits per dimension that zlib needs for an image."""
    return 8.0 * len(zlib.compress(image.numpy().tobytes(), 9)) / image.numel()


def auroc(inside: Tensor, outside: Tensor) -> tuple[float, float]:
    """Probability that an image from outside has the higher score, and its standard error (DeLong)."""
    wins = (outside[:, None] > inside).double() + 0.5 * (outside[:, None] == inside).double()
    variance = wins.mean(1).var() / len(outside) + wins.mean(0).var() / len(inside)
    return float(wins.mean()), math.sqrt(float(variance))


def roc(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of both sets above a threshold, as it falls through all scores."""
    thresholds = torch.cat([inside, outside, torch.tensor([math.inf])]).unique().flip(0)
    return tuple((scores >= thresholds[:, None]).double().mean(1) for scores in (inside, outside))


def reading(inside: Scored, outside: Scored, plain: tuple[float, float], corrected: tuple[float, float]) -> str:
    """Say in words which set is likelier, and how well the scores separate the sets."""
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


def _described(one: Scored, role: str) -> dict[str, Any]:
    mean, error = one.mean
    return {
        "name": one.name, "role": role, "mean": mean, "mean_stderr": error, "bits": one.bits.tolist(),
        "stderr": one.stderr.tolist(), "zlib": one.complexity.tolist(), "again": one.again.tolist(),
    }  # fmt: skip


def plot(inside: Scored, outside: Scored, plain: tuple[float, float], corrected: tuple[float, float]) -> Figure:
    """Draw histograms, some images with their error bars, and the ROC curves of both scores."""
    figure = plt.figure(figsize=(11, 5), layout="constrained")
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
    return figure


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


def grid(inside: Scored, outside: Scored) -> Figure:
    """Draw the most and the least likely images of both sets, each with its bits per dimension."""
    rows = {}
    for one in (inside, outside):
        order = one.bits.argsort()
        rows[f"{one.name},\nmost likely"] = one, order[:COLUMNS]
        rows[f"{one.name},\nleast likely"] = one, order.flip(0)[:COLUMNS]
    columns = max(len(chosen) for _, chosen in rows.values())
    white = float(max(inside.images.max(), outside.images.max()))
    figure = plt.figure(figsize=(1.1 * columns + 1.4, 1.3 * len(rows) + 0.4), layout="constrained")
    table = figure.subplots(len(rows), columns, squeeze=False)
    for axes, (label, (one, chosen)) in zip(table, rows.items(), strict=True):
        for axis in axes:
            axis.set(xticks=[], yticks=[])
        for axis, number in zip(axes, chosen.tolist(), strict=False):
            axis.imshow(one.images[number, 0].numpy(), cmap="gray", vmin=0, vmax=white)
            axis.set_title(f"{one.bits[number]:.3f} ± {one.stderr[number]:.3f}", fontsize=8)
        axes[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle(f"bits per dimension of single images, by a model of {inside.name}", fontsize=11)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Score, print and draw; return what the JSON file holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/examples/out_of_distribution"), help="folder to write to (%(default)s)")
    add("--fashion", type=Path, help="folder with the test images of Fashion-MNIST, scored in place of digits")
    add("--mnist", type=Path, help="folder with the test images of MNIST, scored in place of photo patches")
    add("--rows", type=int, default=64, help="images of each set (%(default)s)")
    add("--stderr", type=float, default=0.03, help="error bar to reach, bits per dimension (%(default)s)")
    add("--shown", type=int, default=6, help="images of each set drawn with error bars and scored twice (%(default)s)")
    add("--seed", type=int, default=0, help="of the choice of images and of the estimates")
    options = parser.parse_args(arguments)
    if options.rows < 2:
        parser.error(f"--rows must be at least 2, got {options.rows}; a spread needs two images.")
    if (options.fashion is None) != (options.mnist is None):
        parser.error("--fashion and --mnist go together.")
    try:
        network, levels, images = image_sets(options.fashion, options.mnist)
    except FileNotFoundError as error:
        parser.error(f"{error} Without --fashion and --mnist no files are needed.")
    model = ndm_ct.load(NETWORKS / f"{network}.safetensors").requires_grad_(False)
    generator, sets = torch.Generator().manual_seed(options.seed), []
    for name, pixels in images.items():
        chosen = pixels[torch.randperm(len(pixels), generator=generator)[: options.rows]]
        sets.append(scored(model, name, chosen, levels, options.stderr, options.shown, options.seed))
    inside, outside = sets
    plain = auroc(inside.bits, outside.bits)
    corrected = auroc(inside.bits - inside.complexity, outside.bits - outside.complexity)
    report = {
        "network": network, "levels": levels, "stderr": options.stderr, "seed": options.seed,
        "sets": [_described(one, role) for one, role in zip(sets, ("inside", "outside"), strict=True)],
        "auroc": {"bits": plain, "bits less zlib": corrected},
        "repeat_noise": repeat_noise(inside, outside) if options.shown else None,
        "reading": reading(inside, outside, plain, corrected), "torch": torch.__version__,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    plot(inside, outside, plain, corrected).savefig(options.out / "out_of_distribution.png", dpi=110)
    grid(inside, outside).savefig(options.out / "out_of_distribution_images.png", dpi=110)
    (options.out / "out_of_distribution.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    print(report["reading"])
    return report


if __name__ == "__main__":
    main()
