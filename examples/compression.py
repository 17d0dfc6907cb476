r"""How short a code does a diffusion model give to images, and what is seen on the way?

.. math::
    \text{bits/dim} = \frac{1}{d \ln 2} \Bigl( KL(q(z_1|x) \| p(z_1)) + \sum_{k=1}^T KL_k
    + E[-\ln p(x|z_0)] - d \ln w \Bigr), \qquad
    KL_k = KL\bigl(q(z_{t_{k-1}} | z_{t_k}, x) \,\|\, p(z_{t_{k-1}} | z_{t_k})\bigr) .

    python examples/compression.py                       # the digits, under a minute on one CPU core
    python examples/compression.py --rows 360 --steps 10 100 1000

The bound of a model with T steps is the length of a code that an encoder with T bits-back or relative-entropy coding
steps reaches on average; x is the image with uniform noise in bins of width w, as in training, which bits-back coding
gets back. More steps give shorter codes, down to the bound in continuous time (T = infinity). Beside it the lengths of
two codes that exist: LZMA of all test images together, and the ideal code for independent pixels with frequencies
counted on the training set.

A decoder need not wait for all of it. After the steps from t = 1 down to t it knows :math:`z_t`, for the bits of the
prior term and of the :math:`KL_k` so far, and its best guess is :math:`\hat x(z_t, t)`: a progressive code. The curve
is the distortion of that guess, root mean square in grey levels, over the rate. Towards the end the rate exceeds the
length of the code: those bits are of the noise in the bins, which the last term gives back. Writes `compression.png`,
`compression_progress.png` and `compression.json`.

References:
    Ho, Jain and Abbeel, Denoising Diffusion Probabilistic Models, section 4.3, https://arxiv.org/abs/2006.11239
    Kingma et al., Variational Diffusion Models, section 6, https://arxiv.org/abs/2107.00630
"""

import argparse
import itertools
import lzma
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

# The repository this file lies in, so that the script runs from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ndm_ct
from benchmarks import data
from examples.common import IMAGE_NETWORKS, image_network, save, show
from ndm_ct import objectives
from ndm_ct.quantisation import Quantisation

SHOWN = 8


def lengths(
    model: ndm_ct.NDM, x: Tensor, bins: Quantisation, steps: Sequence[int], samples: int
) -> list[dict[str, Any]]:
    """Bits per dimension of the code with T steps, and in the limit, with standard errors of the estimate."""
    unit = 1.0 / (x[0].numel() * math.log(2.0))
    found = []
    for count in (*steps, None):
        generator = torch.Generator().manual_seed(0)
        common = {"samples": samples, "generator": generator, "return_info": True}
        bound, info = (
            ndm_ct.elbo(model, x, **common) if count is None
            else objectives.elbo_discrete(model, x, steps=count, **common)
        )  # fmt: skip
        error = float(info.stderr.square().sum().sqrt()) / len(x)
        offset = x[0].numel() * bins.uniform_offset
        found.append({"steps": count, "bits_per_dim": -unit * (float(bound.mean()) + offset), "stderr": unit * error})
    return found


def existing(split: data.Split) -> dict[str, float]:
    """Bits per dimension of LZMA, and of an ideal code for independent pixels."""
    assert split.levels is not None
    packed = lzma.compress(split.test.contiguous().numpy().tobytes(), preset=9 | lzma.PRESET_EXTREME)
    counts = torch.stack([(split.train == level).sum(0) for level in range(split.levels)]).double() + 0.5
    log_p = (counts / counts.sum(0)).log2()
    ideal = -log_p.gather(0, split.test.long().flatten(1).reshape(len(split.test), *split.test.shape[1:])).mean()
    return {"LZMA": 8.0 * len(packed) / split.test.numel(), "independent pixels": float(ideal)}


def progress(
    model: ndm_ct.NDM, x: Tensor, bins: Quantisation, steps: int
) -> tuple[list[float], list[float], dict[float, Tensor]]:
    """Rate in bits per dimension and distortion in grey levels on the way down, and guesses of the first images."""
    generator = torch.Generator().manual_seed(1)
    unit = 1.0 / (x[0].numel() * math.log(2.0))
    grid, _ = objectives.times(model, torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64))
    rate, rates, distortions, guesses = float(objectives.prior_term(model, x).mean()), [], [], {}
    for place, (t, s) in enumerate(itertools.pairwise(grid)):
        c = model.schedule(t)
        eps = torch.randn(x.shape, generator=generator)
        guess = model.predict_x((c.alpha * x + c.sigma * eps).float(), t)
        rates.append(unit * rate)
        distortions.append(float((guess - x).square().mean().sqrt()) / (2.0 * bins.half_width))
        if place % max(1, steps // 8) == 0:
            guesses[rates[-1]] = guess[:SHOWN]
        rate += float(objectives.transition_kl(model, x, s.expand(len(x)), t.expand(len(x)), eps).mean())
    return rates, distortions, guesses


def curves(
    codes: list[dict[str, Any]], others: dict[str, float], rates: list[float], distortions: list[float]
) -> Figure:
    """Code length over steps, and distortion over rate."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    finite = [code for code in codes if code["steps"] is not None]
    left.errorbar(
        [code["steps"] for code in finite], [code["bits_per_dim"] for code in finite],
        yerr=[2.0 * code["stderr"] for code in finite], marker="o", capsize=3, label="diffusion, T steps",
    )  # fmt: skip
    left.axhline(codes[-1]["bits_per_dim"], color="tab:blue", linestyle=":", label="continuous time")
    for place, (name, value) in enumerate(others.items(), start=1):
        left.axhline(value, color=f"C{place}", linestyle="--", label=name)
    left.set(xscale="log", xlabel="steps T", ylabel="bits per dimension", ylim=(0.0, None))
    left.legend(fontsize=8)
    right.plot(rates, distortions)
    right.set(xlabel="bits per dimension so far", ylabel="rms error of the guess, grey levels")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return figure


def pictures(x: Tensor, guesses: dict[float, Tensor], path: Path) -> None:
    """What the decoder would show after so many bits, and the images."""
    rows = [*guesses.items(), (math.nan, x[:SHOWN])]
    figure = Figure(figsize=(0.8 * SHOWN + 1.2, 0.8 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), SHOWN, squeeze=False)
    for line, (bits, images) in zip(axes, rows, strict=True):
        for axis, image in zip(line, images, strict=True):
            show(axis, image)
        line[0].set_ylabel("image" if math.isnan(bits) else f"{bits:.2f}", rotation=0, ha="right", va="center")
    figure.suptitle("guesses after so many bits per dimension", fontsize=9)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=IMAGE_NETWORKS, default="digits")
    parser.add_argument("--rows", type=int, default=128, help="test images (128)")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 30, 100, 300, 1000])
    parser.add_argument("--samples", type=int, default=16, help="transitions drawn per image and T (16)")
    parser.add_argument("--out", type=Path, default=Path("runs/compression"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    model, split, bins = image_network(options.network)
    x = bins.uniform(split.test[: options.rows], torch.float32, torch.Generator().manual_seed(2))
    with torch.no_grad():
        codes = lengths(model, x, bins, options.steps, options.samples)
        rates, distortions, guesses = progress(model, x, bins, max(options.steps[0], 100))
    others = existing(split)
    half = next(rate for rate, distortion in zip(rates, distortions, strict=True) if distortion < 0.5 * distortions[0])
    limit = codes[-1]
    code = f"{limit['bits_per_dim']:.3f} +- {limit['stderr']:.3f} bits per dimension"
    reading = (
        f"{options.network}: {code} in continuous time, "
        f"{codes[0]['bits_per_dim']:.3f} with {codes[0]['steps']} steps; LZMA {others['LZMA']:.3f}, independent pixels "
        f"{others['independent pixels']:.3f}.\nHalf of the distortion is gone after {half:.3f} bits per dimension, "
        f"{half / limit['bits_per_dim']:.0%} of the code."
    )
    pictures(x, guesses, options.out / "compression_progress.png")
    report = {
        "reading": reading, "network": options.network, "rows": len(x), "codes": codes, "existing": others,
        "rates": rates, "distortions": distortions, "seconds": time.perf_counter() - start,
    }  # fmt: skip
    return save(options.out, "compression", curves(codes, others, rates, distortions), report)


if __name__ == "__main__":
    main()
