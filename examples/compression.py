r"""How short a code does a diffusion model give to images?
=======================================================

The bound of a model with T steps,

.. math::
    \text{bits/dim} = \frac{1}{d \ln 2} \Bigl( KL(q(z_1|x) \| p(z_1)) + \sum_{k=1}^T KL_k
    + E[-\ln p(x|z_0)] - d \ln w \Bigr), \qquad
    KL_k = KL\bigl(q(z_{t_{k-1}} | z_{t_k}, x) \,\|\, p(z_{t_{k-1}} | z_{t_k})\bigr) ,

is the average length of a code with T steps of bits-back or relative-entropy coding. Here x is an image with uniform
noise in bins of width w, as in training; bits-back coding recovers the bits of that noise. More steps give shorter
codes, down to the bound in continuous time. Two codes that exist are drawn for comparison: LZMA of all test images
together, and the ideal code for independent pixels with frequencies counted on the training set.

A decoder can show something before the end. After the steps from 1 down to t it knows :math:`z_t`, and its best guess
of the image is :math:`\hat x(z_t, t)`. The second curve is the error of that guess, root mean square in grey levels,
over the bits received so far. Towards the end the rate exceeds the length of the code, because it includes bits of the
noise in the bins, which the last term of the bound subtracts.

The model is a committed network for scikit-learn's 8x8 digits. ``python examples/compression.py`` takes under a minute
on one CPU core and writes ``compression.png``, ``compression_progress.png`` and ``compression.json``.

References:
    Ho, Jain and Abbeel, Denoising Diffusion Probabilistic Models, section 4.3, https://arxiv.org/abs/2006.11239

    Kingma et al., Variational Diffusion Models, section 6, https://arxiv.org/abs/2107.00630
"""

import argparse
import itertools
import json
import lzma
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor

import ndm_ct
from ndm_ct import objectives
from ndm_ct.quantisation import Quantisation

NETWORK = Path(__file__).parents[1] / "benchmarks" / "weights" / "digits.safetensors"
BINS = Quantisation(17)
SHOWN = 8


def digits() -> tuple[Tensor, Tensor]:
    """Levels 0 ... 16 of the 1,437 images that the network was trained on, and of the 360 others."""
    pixels = torch.as_tensor(load_digits().images, dtype=torch.uint8)[:, None]
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return pixels[order[:1437]], pixels[order[1437:]]


def lengths(model: ndm_ct.NDM, x: Tensor, steps: Sequence[int], samples: int) -> list[dict[str, Any]]:
    """Bits per dimension of the code with T steps and of the limit, with standard errors of the estimates."""
    d, found = x[0].numel(), []
    for count in (*steps, None):
        options = {"samples": samples, "generator": torch.Generator().manual_seed(0), "return_info": True}
        if count is None:
            bound, info = ndm_ct.elbo(model, x, **options)
        else:
            bound, info = objectives.elbo_discrete(model, x, steps=count, **options)
        bits = -(float(bound.mean()) + d * BINS.uniform_offset) / (d * math.log(2.0))
        error = float(info.stderr.square().sum().sqrt()) / len(x) / (d * math.log(2.0))
        found.append({"steps": count, "bits_per_dim": bits, "stderr": error})
    return found


def existing(train: Tensor, test: Tensor, levels: int = 17) -> dict[str, float]:
    """Bits per dimension of LZMA and of an ideal code for independent pixels."""
    packed = lzma.compress(test.contiguous().numpy().tobytes(), preset=9 | lzma.PRESET_EXTREME)
    counts = torch.stack([(train == level).sum(0) for level in range(levels)]).double() + 0.5
    log_p = (counts / counts.sum(0)).log2()
    ideal = -log_p.gather(0, test.long().flatten(1).reshape(len(test), *test.shape[1:])).mean()
    return {"LZMA": 8.0 * len(packed) / test.numel(), "independent pixels": float(ideal)}


def progress(model: ndm_ct.NDM, x: Tensor, steps: int) -> tuple[list[float], list[float], dict[float, Tensor]]:
    """Rate in bits per dimension, error of the guess in grey levels, and guesses of the first images by rate."""
    generator = torch.Generator().manual_seed(1)
    unit = 1.0 / (x[0].numel() * math.log(2.0))
    grid, _ = objectives.times(model, torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64))
    rate, rates, errors, guesses = float(objectives.prior_term(model, x).mean()), [], [], {}
    for place, (t, s) in enumerate(itertools.pairwise(grid)):
        c = model.schedule(t)
        eps = torch.randn(x.shape, generator=generator)
        guess = model.predict_x((c.alpha * x + c.sigma * eps).float(), t)
        rates.append(unit * rate)
        errors.append(float((guess - x).square().mean().sqrt()) / (2.0 * BINS.half_width))
        if place % max(1, steps // 8) == 0:
            guesses[rates[-1]] = guess[:SHOWN]
        rate += float(objectives.transition_kl(model, x, s.expand(len(x)), t.expand(len(x)), eps).mean())
    return rates, errors, guesses


def curves(codes: list[dict[str, Any]], others: dict[str, float], rates: list[float], errors: list[float]) -> Figure:
    """Draw the code length over steps, and the error of the guess over the rate."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
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
    right.plot(rates, errors)
    right.set(xlabel="bits per dimension so far", ylabel="rms error of the guess, grey levels")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return figure


def pictures(x: Tensor, guesses: dict[float, Tensor]) -> Figure:
    """Draw what a decoder would show after so many bits, above the images."""
    rows = [*guesses.items(), (math.nan, x[:SHOWN])]
    figure, axes = plt.subplots(
        len(rows), SHOWN, figsize=(0.8 * SHOWN + 1.2, 0.8 * len(rows)), squeeze=False, layout="constrained"
    )
    for line, (bits, images) in zip(axes, rows, strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image[0].numpy(), cmap="gray", vmin=-1.0, vmax=1.0)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel("image" if math.isnan(bits) else f"{bits:.2f}", rotation=0, ha="right", va="center")
    figure.suptitle("guesses after so many bits per dimension", fontsize=9)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and draw; return what the JSON file holds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=128, help="test images (128)")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 30, 100, 300, 1000], help="values of T")
    parser.add_argument("--samples", type=int, default=16, help="transitions drawn per image and T (16)")
    parser.add_argument("--out", type=Path, default=Path("runs/examples/compression"), help="folder (%(default)s)")
    options = parser.parse_args(arguments)
    model, (train, test) = ndm_ct.load(NETWORK).requires_grad_(False), digits()
    x = BINS.uniform(test[: options.rows], torch.float32, torch.Generator().manual_seed(2))
    codes = lengths(model, x, options.steps, options.samples)
    rates, errors, guesses = progress(model, x, max(options.steps[0], 100))
    others = existing(train, test)
    half = next(rate for rate, error in zip(rates, errors, strict=True) if error < 0.5 * errors[0])
    first, limit = codes[0], codes[-1]
    reading = (
        f"digits: {limit['bits_per_dim']:.3f} ± {limit['stderr']:.3f} bits per dimension in continuous time, "
        f"{first['bits_per_dim']:.3f} with {first['steps']} steps; LZMA {others['LZMA']:.3f}, independent pixels "
        f"{others['independent pixels']:.3f}.\nHalf of the error is gone after {half:.3f} bits per dimension, "
        f"{half / limit['bits_per_dim']:.0%} of the code."
    )
    report = {
        "reading": reading, "rows": len(x), "codes": codes, "existing": others, "rates": rates, "errors": errors,
        "torch": torch.__version__,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    curves(codes, others, rates, errors).savefig(options.out / "compression.png", dpi=110)
    pictures(x, guesses).savefig(options.out / "compression_progress.png", dpi=110)
    (options.out / "compression.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    print(reading)
    return report


if __name__ == "__main__":
    main()
