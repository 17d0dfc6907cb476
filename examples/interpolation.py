r"""Between two images, and back to the training set: are samples new?

.. math::
    z_1^{(u)} = \frac{\sin((1-u)\,\omega)}{\sin\omega} z_1^{(a)} + \frac{\sin(u\,\omega)}{\sin\omega} z_1^{(b)}, \qquad
    \cos\omega = \frac{\langle z_1^{(a)}, z_1^{(b)}\rangle}{|z_1^{(a)}|\,|z_1^{(b)}|} .

    python examples/interpolation.py                     # the digits, under a minute on one CPU core

The probability flow maps images to noise and back, one to one. Two test images are encoded, their codes joined by an
arc (a straight line would leave the shell on which Gaussian noise lies), and its points decoded. The same line in
pixels is a double exposure; it is drawn below for comparison. The log-density along both paths shows how likely the
model holds what lies between.

A model that has learned its training set by heart would make samples nearer to a training image than new images of the
same kind are. So every sample's distance to its nearest training image is set beside that of test images. If the two
distributions agree, samples are no copies; the Kolmogorov-Smirnov statistic and its 5 % bound say how well. Writes
`interpolation.png`, `interpolation_neighbours.png` and `interpolation.json`.

References:
    Song, Meng and Ermon, Denoising Diffusion Implicit Models, section 5.3, https://arxiv.org/abs/2010.02502
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

# The repository this file lies in, so that the script runs from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ndm_ct
from examples.common import IMAGE_NETWORKS, image_network, save, show


def arc(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    """Points ``(U, *E)`` on the arc between codes a and b ``(*E)`` at u ``(U,)``; its ends are a and b."""
    cosine = (a * b).sum() / (a.norm() * b.norm())
    omega = torch.arccos(cosine.clamp(-1.0, 1.0))
    if float(omega) < 1e-4:  # the same direction: a straight line
        weights = 1.0 - u, u
    else:
        weights = torch.sin((1.0 - u) * omega) / omega.sin(), torch.sin(u * omega) / omega.sin()
    return sum(weight.reshape(-1, *(1,) * a.ndim) * end for weight, end in zip(weights, (a, b), strict=True))


def between(model: ndm_ct.NDM, x: Tensor, points: int) -> dict[str, Tensor]:
    """Images and their log-densities, nats, along the arc of codes and along the line of pixels, for pairs of rows."""
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
    """Distance to the nearest training image, root mean square per pixel, and which it is."""
    found = torch.cdist(x.flatten(1), train.flatten(1)).min(1)
    return found.values / math.sqrt(x[0].numel()), found.indices


def statistic(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Kolmogorov and Smirnov's distance of two samples, and the value it exceeds with probability 5 % if they agree."""
    both = torch.cat([a, b]).sort().values
    below = [torch.searchsorted(part.sort().values, both, right=True) / len(part) for part in (a, b)]
    return float((below[0] - below[1]).abs().max()), 1.358 * math.sqrt(1.0 / len(a) + 1.0 / len(b))


def paths(found: dict[str, Tensor]) -> Figure:
    """For each pair the images of both paths and their log-densities."""
    pairs, points = found["flow"].shape[:2]
    figure = Figure(figsize=(0.62 * points + 3.2, 1.35 * pairs), layout="constrained")
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


def neighbours(samples: Tensor, train: Tensor, indices: Tensor, ours: Tensor, theirs: Tensor, path: Path) -> None:
    """Samples above their nearest training images, and the distribution of distances."""
    shown = min(10, len(samples))
    figure = Figure(figsize=(11, 2.5), layout="constrained")
    images, numbers = figure.subfigures(1, 2, width_ratios=(2.0, 1.0))
    axes = images.subplots(2, shown, squeeze=False)
    for row, part in enumerate((samples, train[indices])):
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
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=IMAGE_NETWORKS, default="digits")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--points", type=int, default=9, help="points of a path, its ends included (9)")
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/interpolation"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    model, split, bins = image_network(options.network)
    generator = torch.Generator().manual_seed(3)
    test = bins.uniform(split.test, torch.float32, generator)
    found = between(model, test[: 2 * options.pairs], options.points)
    middle = options.points // 2
    gap = found["flow logp"][:, middle] - found["pixels logp"][:, middle]
    samples = ndm_ct.sample(
        model, options.samples, method="unipc", nfe=30, grid="karras", denoise=True, generator=generator
    )
    train = bins.centres(split.train, torch.float32)
    (ours, indices), (theirs, _) = nearest(samples, train), nearest(bins.centres(split.test, torch.float32), train)
    distance, bound = statistic(ours, theirs)
    agree = "agree" if distance < bound else "differ"
    side = "nearer" if float(ours.median()) < float(theirs.median()) else "farther"
    reading = (
        f"Half-way between two test images the flow's image is {float(gap.mean()):.0f} nats likelier than the mean of "
        f"the two in pixels ({options.pairs} pairs).\nSamples lie {float(ours.median()):.3f} from their nearest "
        f"training image, test images {float(theirs.median()):.3f} (medians, rms per pixel): the distributions {agree} "
        f"(Kolmogorov-Smirnov {distance:.3f}, 5 % bound {bound:.3f})"
        + ("." if agree == "agree" else f"; samples are {side} than test images.")
    )
    neighbours(samples, train, indices, ours, theirs, options.out / "interpolation_neighbours.png")
    report = {
        "reading": reading, "network": options.network, "pairs": options.pairs, "middle_gap": gap.tolist(),
        "distance_samples": float(ours.median()), "distance_test": float(theirs.median()),
        "kolmogorov_smirnov": distance, "bound": bound, "seconds": time.perf_counter() - start,
    }  # fmt: skip
    return save(options.out, "interpolation", paths(found), report)


if __name__ == "__main__":
    main()
