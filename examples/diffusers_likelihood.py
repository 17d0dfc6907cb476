r"""A network of diffusers, trained by diffusers' own loop, says how probable an image is.

    python examples/diffusers_likelihood.py                    # about 5 minutes on one CPU core
    python examples/diffusers_likelihood.py --steps 100 --rows 8    # a look

The loop is that of diffusers' tutorial: ``DDPMScheduler.add_noise``, the network's guess of the noise, mean squared
error, AdamW; the data are scikit-learn's digits with uniform noise in the bins of their 17 grey levels. Then

.. code-block:: python

    model = ndm_ct.adapters.from_diffusers(unet, scheduler)
    bits, info = ndm_ct.bits_per_dim(model, images, levels=17, return_info=True)

gives for every image an upper bound of the bits per dimension and the standard error of its estimate. The mean over
test images is known to the error of the rows, and to that of the estimate, which is smaller; both are reported. Beside
it stands the bound of the reverse SDE (ELBO), of levels noised as in training, and diffusers' DDIM draws samples.
Writes ``diffusers_likelihood.png`` and ``diffusers_likelihood.json``; ``--save`` keeps the network.

References:
    von Platen et al., Diffusers, https://github.com/huggingface/diffusers
    Song et al., Score-Based Generative Modeling through SDEs, section 4.3, https://arxiv.org/abs/2011.13456
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import trange

# The repository this file lies in, so that the script runs from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ndm_ct
from benchmarks import data
from examples.common import save, show
from ndm_ct.quantisation import Quantisation

SHOWN = 10


def network() -> nn.Module:
    """A U-Net of diffusers for 8 x 8 images."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def train(net: nn.Module, scheduler: Any, levels: Tensor, bins: Quantisation, steps: int) -> list[float]:
    """The loop of diffusers' tutorial, with a cosine schedule of the learning rate; the losses."""
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    losses = []
    for _ in trange(steps, desc="training", disable=None):
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

    Of the density of levels with uniform noise in their bins, on which the network was trained: at the bins' centres,
    which it never saw, the bound is about 1.4 bits worse.
    """
    noised = bins.uniform(levels, torch.float32, torch.Generator().manual_seed(3))
    result = ndm_ct.evaluate(model, noised, bound="elbo", samples=64, progress=False)
    d = levels[0].numel()
    bit = d * math.log(2.0)
    return (result.nll - d * bins.uniform_offset) / bit, result.estimator_stderr / bit


@torch.no_grad()
def drawn(net: nn.Module, scheduler: Any, n: int) -> Tensor:
    """Samples by diffusers' DDIM, 50 steps."""
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler.from_config(scheduler.config)
    theirs.set_timesteps(50)
    z = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for k in theirs.timesteps:
        z = theirs.step(net(z, k).sample, k, z).prev_sample
    return z


def picture(x: Tensor, bits: Tensor, stderr: Tensor, samples: Tensor) -> Figure:
    """Test images with bits per dimension, from the most to the least probable, and samples."""
    order = bits.argsort()
    chosen = order[torch.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().long()]
    figure = Figure(figsize=(11, 5.6), layout="constrained")
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
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="optimiser steps (1500)")
    parser.add_argument("--rows", type=int, default=50, help="test images (50)")
    parser.add_argument("--save", type=Path, help="folder for the network, as diffusers writes it")
    parser.add_argument("--out", type=Path, default=Path("runs/diffusers_likelihood"))
    options = parser.parse_args(arguments)
    from diffusers import DDPMScheduler

    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    split, bins = data.digits(), Quantisation(17)
    torch.manual_seed(0)
    net, scheduler = network(), DDPMScheduler(clip_sample=False)
    losses = train(net, scheduler, split.train, bins, options.steps)
    net.eval().requires_grad_(False)
    if options.save is not None:
        net.save_pretrained(options.save)
    images = split.test[: options.rows]

    model = ndm_ct.adapters.from_diffusers(net, scheduler)
    bits, info = ndm_ct.bits_per_dim(
        model, images, levels=17, generator=torch.Generator().manual_seed(2), return_info=True
    )
    elbo, elbo_error = bound(model, images, bins)
    over_rows = float(bits.std()) / len(bits) ** 0.5
    of_estimate = float(info.stderr.square().sum().sqrt()) / len(bits)
    reading = (
        f"{len(bits)} test digits: {float(bits.mean()):.3f} bits per dimension, +- {over_rows:.3f} over images and "
        f"{of_estimate:.4f} of the estimate; the ELBO says {elbo:.3f}, +- {elbo_error:.3f} of its estimate."
    )
    report = {
        "reading": reading, "steps": options.steps, "loss": sum(losses[-100:]) / len(losses[-100:]),
        "bits_per_dim": float(bits.mean()), "stderr_rows": over_rows, "stderr_estimate": of_estimate,
        "elbo": elbo, "elbo_stderr_estimate": elbo_error, "rows": bits.tolist(),
        "rows_stderr": info.stderr.tolist(), "nfe": info.nfe, "seconds": time.perf_counter() - start,
    }  # fmt: skip
    figure = picture(bins.centres(images, torch.float32), bits, info.stderr, drawn(net, scheduler, SHOWN))
    return save(options.out, "diffusers_likelihood", figure, report)


if __name__ == "__main__":
    main()
