r"""How probable does a network of diffusers find an image?
=======================================================

The training loop is that of diffusers' tutorial: ``DDPMScheduler.add_noise``, the network's guess of the noise, mean
squared error, AdamW. The data are scikit-learn's digits with uniform noise in the bins of their 17 grey levels. Then

.. code-block:: python

    model = ndm_ct.adapters.from_diffusers(unet, scheduler)
    bins = Quantisation(17, edges=(-1.0, 1.0))  # as in training; centres=(-1, 1) for x / 8 - 1 without noise
    bits, info = ndm_ct.bits_per_dim(model, images, quantisation=bins, return_info=True)

gives an upper bound of the bits per dimension of every image, and the standard error of the estimate. The mean over
test images has two standard errors: one because there are finitely many images, and a smaller one of the estimate; both
are printed. The bound of the reverse SDE (ELBO) is printed for comparison, and diffusers' DDIM draws samples.

``python examples/diffusers_likelihood.py`` takes about a minute on one CPU core, with a short training that leaves
room for improvement; ``--steps 1500 --rows 50`` takes five. It writes ``diffusers_likelihood.png`` and
``diffusers_likelihood.json``; ``--save`` keeps the network.

References:
    von Platen et al., Diffusers, https://github.com/huggingface/diffusers

    Song et al., Score-Based Generative Modeling through SDEs, section 4.3, https://arxiv.org/abs/2011.13456
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import ndm_ct
from ndm_ct.quantisation import Quantisation

SHOWN = 10


def digits() -> tuple[Tensor, Tensor]:
    """Levels 0 ... 16 of 1,437 images for training and 360 for testing."""
    pixels = torch.as_tensor(load_digits().images, dtype=torch.uint8)[:, None]
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return pixels[order[:1437]], pixels[order[1437:]]


def show(axis: Axes, image: Tensor) -> None:
    """Draw an image with grey levels from -1 to 1, without ticks."""
    axis.imshow(image[0].numpy(), cmap="gray", vmin=-1.0, vmax=1.0)
    axis.set(xticks=[], yticks=[])


def network() -> nn.Module:
    """A U-Net of diffusers for 8 x 8 images."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def train(net: nn.Module, scheduler: Any, levels: Tensor, bins: Quantisation, steps: int) -> list[float]:
    """Train by the loop of diffusers' tutorial, with a cosine schedule of the learning rate; return the losses."""
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(levels), (64,), generator=generator)
        clean = bins.uniform(levels[rows], torch.float32, generator)
        noise = torch.randn(clean.shape, generator=generator)
        k = torch.randint(scheduler.config.num_train_timesteps, (64,), generator=generator)
        guess = net(scheduler.add_noise(clean, noise, k), k, return_dict=False)[0]
        loss = functional.mse_loss(guess, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        decay.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def bound(model: ndm_ct.NDM, levels: Tensor, bins: Quantisation) -> tuple[float, float]:
    """The ELBO in bits per dimension, and the standard error of its estimate.

    The levels get uniform noise in their bins, as in training. At the centres of the bins, which the network never saw,
    the bound is about 1.4 bits worse.
    """
    noised = bins.uniform(levels, torch.float32, torch.Generator().manual_seed(3))
    result = ndm_ct.evaluate(model, noised, bound="elbo", samples=64, progress=False)
    d = levels[0].numel()
    bit = d * math.log(2.0)
    return (result.nll - d * bins.uniform_offset) / bit, result.estimator_stderr / bit


@torch.no_grad()
def drawn(net: nn.Module, scheduler: Any, n: int) -> Tensor:
    """Draw samples by 50 steps of diffusers' DDIM."""
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler.from_config(scheduler.config)
    theirs.set_timesteps(50)
    z = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for k in theirs.timesteps:
        z = theirs.step(net(z, k).sample, k, z).prev_sample
    return z


def picture(x: Tensor, bits: Tensor, stderr: Tensor, samples: Tensor) -> Figure:
    """Draw test images from the most to the least probable, samples, and the bits per dimension of all images."""
    order = bits.argsort()
    chosen = order[torch.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().long()]
    figure = plt.figure(figsize=(11, 5.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.0, 1.5))
    axes = upper.subplots(2, SHOWN, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, row in zip(axes[0], chosen, strict=False):
        axis.set_axis_on()
        show(axis, x[row])
        axis.set_title(f"{float(bits[row]):.2f}", fontsize=8)
    for axis, image in zip(axes[1], samples, strict=False):
        axis.set_axis_on()
        show(axis, image)
    upper.suptitle("test images with bits per dimension; samples", fontsize=9)
    axis = lower.subplots()
    axis.errorbar(range(len(bits)), bits[order], yerr=2.0 * stderr[order], fmt=".", capsize=2)
    axis.set(xlabel="test images, in order", ylabel="bits per dimension, two standard errors")
    axis.grid(alpha=0.3)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, score, print and draw; return what the JSON file holds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps (200)")
    parser.add_argument("--rows", type=int, default=8, help="test images (8)")
    parser.add_argument("--save", type=Path, help="folder for the network, in the format of diffusers")
    parser.add_argument("--out", type=Path, default=Path("runs/examples/diffusers_likelihood"), help="folder")
    options = parser.parse_args(arguments)
    from diffusers import DDPMScheduler

    (train_levels, test), bins = digits(), Quantisation(17, edges=(-1.0, 1.0))
    torch.manual_seed(0)
    net, scheduler = network(), DDPMScheduler(clip_sample=False)
    losses = train(net, scheduler, train_levels, bins, options.steps)
    net.eval().requires_grad_(False)
    if options.save is not None:
        net.save_pretrained(options.save)
    images = test[: options.rows]
    model = ndm_ct.adapters.from_diffusers(net, scheduler)
    bits, info = ndm_ct.bits_per_dim(
        model, images, quantisation=bins, generator=torch.Generator().manual_seed(2), return_info=True
    )
    elbo, elbo_error = bound(model, images, bins)
    over_rows = float(bits.std()) / len(bits) ** 0.5
    of_estimate = float(info.stderr.square().sum().sqrt()) / len(bits)
    reading = (
        f"{len(bits)} test digits: {float(bits.mean()):.3f} bits per dimension, ± {over_rows:.3f} over images and "
        f"± {of_estimate:.4f} of the estimate. The ELBO gives {elbo:.3f}, ± {elbo_error:.3f} of its estimate."
    )
    report = {
        "reading": reading, "steps": options.steps, "loss": sum(losses[-100:]) / len(losses[-100:]),
        "bits_per_dim": float(bits.mean()), "stderr_rows": over_rows, "stderr_estimate": of_estimate,
        "elbo": elbo, "elbo_stderr_estimate": elbo_error, "rows": bits.tolist(),
        "rows_stderr": info.stderr.tolist(), "nfe": info.nfe, "torch": torch.__version__,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    figure = picture(bins.centres(images, torch.float32), bits, info.stderr, drawn(net, scheduler, SHOWN))
    figure.savefig(options.out / "diffusers_likelihood.png", dpi=110)
    (options.out / "diffusers_likelihood.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    print(reading)
    return report


if __name__ == "__main__":
    main()
