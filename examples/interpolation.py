r"""Are samples new, and what lies between two images?
==================================================

The probability flow maps images to noise and back, one to one. Two test images are encoded, their codes are joined by
an arc,

.. math::
    z_1^{(u)} = \frac{\sin((1-u)\,\omega)}{\sin\omega} z_1^{(a)} + \frac{\sin(u\,\omega)}{\sin\omega} z_1^{(b)}, \qquad
    \cos\omega = \frac{\langle z_1^{(a)}, z_1^{(b)}\rangle}{|z_1^{(a)}|\,|z_1^{(b)}|} ,

and points of the arc are decoded. (A straight line would leave the shell on which Gaussian noise lies.) The straight
line between the pixels is a double exposure, drawn below for comparison. The log-density along both paths shows how
likely the model considers what lies between.

A model that memorised its training set would draw samples closer to training images than new images of the same kind
are. So the distance of every sample to its nearest training image is compared with that of test images. If the two
distributions agree, samples are not copies. The Kolmogorov-Smirnov statistic is printed with the value that it exceeds
with probability 5 % when they agree.

The model is a committed network for scikit-learn's 8x8 digits. ``python examples/interpolation.py`` takes under a
minute on one CPU core and writes ``interpolation.png``, ``interpolation_neighbours.png`` and ``interpolation.json``.

References:
    Song, Meng and Ermon, Denoising Diffusion Implicit Models, section 5.3, https://arxiv.org/abs/2010.02502
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor

import ndm_ct
from ndm_ct.quantisation import Quantisation

NETWORK = Path(__file__).parents[1] / "benchmarks" / "weights" / "digits.safetensors"


def digits() -> tuple[Tensor, Tensor]:
    """Levels 0 ... 16 of the 1,437 images that the network was trained on, and of the 360 others."""
    pixels = torch.as_tensor(load_digits().images, dtype=torch.uint8)[:, None]
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return pixels[order[:1437]], pixels[order[1437:]]


def show(axis: Axes, image: Tensor) -> None:
    """Draw an image with grey levels from -1 to 1, without ticks."""
    axis.imshow(image[0].numpy(), cmap="gray", vmin=-1.0, vmax=1.0)
    axis.set(xticks=[], yticks=[])


def arc(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    """Points on the arc between the codes a and b, one for each u; u = 0 is a, u = 1 is b."""
    cosine = (a * b).sum() / (a.norm() * b.norm())
    omega = torch.arccos(cosine.clamp(-1.0, 1.0))
    if float(omega) < 1e-4:  # the same direction: a straight line
        weights = 1.0 - u, u
    else:
        weights = torch.sin((1.0 - u) * omega) / omega.sin(), torch.sin(u * omega) / omega.sin()
    return sum(weight.reshape(-1, *(1,) * a.ndim) * end for weight, end in zip(weights, (a, b), strict=True))


def between(model: ndm_ct.NDM, x: Tensor, points: int) -> dict[str, Tensor]:
    """Images and their log-densities in nats along both paths, for the pairs of rows (0, 1), (2, 3), ..."""
    u = torch.linspace(0.0, 1.0, points)
    codes = ndm_ct.encode(model, x)
    pairs = list(zip(range(0, len(x) - 1, 2), range(1, len(x), 2), strict=True))
    arcs = torch.cat([ndm_ct.decode(model, arc(codes[i], codes[j], u)) for i, j in pairs])
    steps = u.reshape(-1, *(1,) * (x.ndim - 1))
    lines = torch.cat([(1.0 - steps) * x[i] + steps * x[j] for i, j in pairs])
    generator = torch.Generator().manual_seed(0)
    return {
        name: part.reshape(len(pairs), points, *part.shape[1:])
        for name, images in (("flow", arcs), ("pixels", lines))
        for name, part in ((name, images), (f"{name} logp", ndm_ct.loglik(model, images, generator=generator)))
    }


def nearest(x: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """Root mean square distance per pixel to the nearest training image, and the index of that image."""
    found = torch.cdist(x.flatten(1), train.flatten(1)).min(1)
    return found.values / math.sqrt(x[0].numel()), found.indices


def statistic(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Kolmogorov-Smirnov distance of two samples, and the value it exceeds with probability 5 % if they agree."""
    both = torch.cat([a, b]).sort().values
    below = [torch.searchsorted(part.sort().values, both, right=True) / len(part) for part in (a, b)]
    return float((below[0] - below[1]).abs().max()), 1.358 * math.sqrt(1.0 / len(a) + 1.0 / len(b))


def paths(found: dict[str, Tensor]) -> Figure:
    """Draw the images of both paths and their log-densities, pair by pair."""
    pairs, points = found["flow"].shape[:2]
    figure = plt.figure(figsize=(0.62 * points + 3.2, 1.35 * pairs), layout="constrained")
    images, numbers = figure.subfigures(1, 2, width_ratios=(0.62 * points, 3.2))
    axes = images.subplots(2 * pairs, points, squeeze=False)
    for row in range(2 * pairs):
        name = ("flow", "pixels")[row % 2]
        for axis, image in zip(axes[row], found[name][row // 2], strict=True):
            show(axis, image)
        axes[row, 0].set_ylabel(name, fontsize=7)
    for pair, axis in enumerate(numbers.subplots(pairs, 1, squeeze=False)[:, 0]):
        for name, colour in (("flow", "tab:blue"), ("pixels", "tab:orange")):
            axis.plot(np.linspace(0.0, 1.0, points), found[f"{name} logp"][pair].numpy(), color=colour, label=name)
        axis.tick_params(labelsize=6)
        axis.grid(alpha=0.3)
        if pair == 0:
            axis.set_title("log-density, nats", fontsize=8)
            axis.legend(fontsize=6)
    return figure


def neighbours(samples: Tensor, nearest_images: Tensor, ours: Tensor, theirs: Tensor) -> Figure:
    """Draw samples above their nearest training images, and the distributions of distances."""
    shown = min(10, len(samples))
    figure = plt.figure(figsize=(11, 2.5), layout="constrained")
    images, numbers = figure.subfigures(1, 2, width_ratios=(2.0, 1.0))
    axes = images.subplots(2, shown, squeeze=False)
    for row, part in enumerate((samples, nearest_images)):
        for axis, image in zip(axes[row], part, strict=False):
            show(axis, image)
    axes[0, 0].set_ylabel("sample")
    axes[1, 0].set_ylabel("nearest")
    axis = numbers.subplots()
    for name, values in (("samples", ours), ("test images", theirs)):
        axis.plot(np.sort(values.numpy()), (np.arange(len(values)) + 1.0) / len(values), label=name)
    axis.set(xlabel="distance to the nearest training image", ylabel="share below")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and draw; return what the JSON file holds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=4, help="pairs of test images (4)")
    parser.add_argument("--points", type=int, default=9, help="points of a path, its ends included (9)")
    parser.add_argument("--samples", type=int, default=300, help="samples compared with the training set (300)")
    parser.add_argument("--out", type=Path, default=Path("runs/examples/interpolation"), help="folder (%(default)s)")
    options = parser.parse_args(arguments)
    model, bins, (train, test) = ndm_ct.load(NETWORK).requires_grad_(False), Quantisation(17), digits()
    generator = torch.Generator().manual_seed(3)
    found = between(model, bins.uniform(test, torch.float32, generator)[: 2 * options.pairs], options.points)
    middle = options.points // 2
    gap = found["flow logp"][:, middle] - found["pixels logp"][:, middle]
    samples = ndm_ct.sample(
        model, options.samples, method="unipc", nfe=30, grid="karras", denoise=True, generator=generator
    )
    train, test = (bins.centres(part, torch.float32) for part in (train, test))
    (ours, indices), (theirs, _) = nearest(samples, train), nearest(test, train)
    distance, bound = statistic(ours, theirs)
    side = "nearer" if float(ours.median()) < float(theirs.median()) else "farther"
    verdict = "agree" if distance < bound else f"differ, and samples are {side}"
    reading = (
        f"Half-way between two test images the flow's image is {float(gap.mean()):.0f} nats likelier than the mean of "
        f"the two in pixels ({options.pairs} pairs).\nSamples lie {float(ours.median()):.3f} from their nearest "
        f"training image, test images {float(theirs.median()):.3f} (medians, rms per pixel). The distributions "
        f"{verdict} (Kolmogorov-Smirnov {distance:.3f}, 5 % bound {bound:.3f})."
    )
    report = {
        "reading": reading, "pairs": options.pairs, "middle_gap": gap.tolist(),
        "distance_samples": float(ours.median()), "distance_test": float(theirs.median()),
        "kolmogorov_smirnov": distance, "bound": bound, "torch": torch.__version__,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    paths(found).savefig(options.out / "interpolation.png", dpi=110)
    neighbours(samples, train[indices], ours, theirs).savefig(options.out / "interpolation_neighbours.png", dpi=110)
    (options.out / "interpolation.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    print(reading)
    return report


if __name__ == "__main__":
    main()
