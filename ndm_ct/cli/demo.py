r"""The demo: a Neural Diffusion Model on scikit-learn's digits beside a plain diffusion of the same size.

Both models see the same data, steps and noise schedule, and have about the same number of parameters. The NDM noises
:math:`F(x, t) = x + t f_1(x) + t^2 f_2(x)`, with f a learned network that starts at zero; the diffusion noises x.
The 8x8 images have 17 grey levels; models are trained on the bin centres, with the noise at t = 0 a third of a bin's
half-width, and test images are scored in bits per dimension by the probability flow (dequantisation "process")
and by the ELBO.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ndm_ct import nn
from ndm_ct.divergence import Hutchinson
from ndm_ct.likelihood.bits import bits_per_dim
from ndm_ct.model import NDM
from ndm_ct.quantisation import Quantisation
from ndm_ct.samplers.sample import sample
from ndm_ct.schedules.fixed import LinearLogSNR
from ndm_ct.training.fit import FitResult, fit
from ndm_ct.transforms import Separable

__all__ = ["STEPS", "run", "run_demo"]

STEPS = 900
LEVELS = 17
SHAPE = (1, 8, 8)
GAMMA_MIN = -2.0 * math.log(3.02 * LEVELS)
"""Noise at t = 0 a third of a bin's half-width: what dequantisation "process" needs."""

BINS = Quantisation(LEVELS)


@dataclass(frozen=True)
class Score:
    """Test bits per dimension of one model; ``_se`` are standard errors of the mean over images and estimates."""

    parameters: int
    seconds: float
    ode: float
    ode_se: float
    ode_nfe: int
    elbo: float
    elbo_se: float


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """scikit-learn's digits as integers 0 ... 16, ``(N, 1, 8, 8)``: 1437 for training, 360 for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the demo needs scikit-learn and matplotlib: pip install "ndm-ct[demo]"') from error
    images = torch.as_tensor(load_digits().images, dtype=torch.long)[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order[:1437]], images[order[1437:]]


def ndm(seed: int) -> NDM:
    """The Neural Diffusion Model: predictor and transform, each a small U-Net."""
    torch.manual_seed(seed)
    transform = Separable(nn.UNet(1, width=8, outputs=2, time=False))
    predictor = nn.Preconditioned(nn.UNet(1, width=16))
    return NDM(predictor, SHAPE, transform=transform, schedule=LinearLogSNR(GAMMA_MIN, 5.0))


def diffusion(seed: int) -> NDM:
    """The same model without a transform, its predictor widened to the same number of parameters."""
    torch.manual_seed(seed)
    return NDM(nn.Preconditioned(nn.UNet(1, width=18)), SHAPE, schedule=LinearLogSNR(GAMMA_MIN, 5.0))


MODELS: dict[str, Callable[[int], NDM]] = {"NDM": ndm, "diffusion": diffusion}


def run(
    out: Path, *, steps: int = STEPS, test_rows: int | None = None, seed: int = 0, progress: bool = True
) -> dict[str, Score]:
    """Train both models, print their scores, write ``report.json`` and the pictures into ``out``.

    Args:
        out: folder to write to. If a run was stopped, the same call continues it there.
        steps: optimiser steps per model. More steps take longer and lower the bits per dimension.
        test_rows: number of test images to score; None is all 360. Fewer are faster and give larger standard errors.
        seed: seed of the split, the initial weights, the training and the samples.
        progress: show progress bars.

    Returns:
        The scores by model.
    """
    train, test = digits(seed)
    test = test[:test_rows]
    models, fits, scores = {}, {}, {}
    with torch.random.fork_rng(devices=[]):
        for name, build in MODELS.items():
            model = build(seed)
            print(f"{name}: {_parameters(model):,} parameters, {steps} steps", flush=True)
            fits[name] = fit(
                model,
                train,
                steps=steps,
                batch_size=64,
                lr=2e-3,
                ema=0.998,
                quantisation=BINS,
                dequantisation="process",
                seed=seed,
                run_dir=out / name.lower(),
                checkpoint_every=200,
                log_every=max(1, min(20, steps // 10)),
                progress=progress,
            )
            if not fits[name].finished:
                raise KeyboardInterrupt
            models[name], scores[name] = model, _score(model, fits[name], test, seed)
    print(_table(scores, len(test)))
    _write(out, models, fits, scores, test, steps, seed)
    print(f"pictures and report in {out}/: samples.png, transformation.png, training.png, report.json")
    return scores


def _parameters(model: NDM) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _score(model: NDM, trained: FitResult, test: Tensor, seed: int) -> Score:
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"quantisation": LEVELS, "generator": generator, "return_info": True}
    elbo, _ = bits_per_dim(model, test, bound="elbo", samples=16, **options)
    ode, info = bits_per_dim(
        model, test, dequantisation="process", trace=Hutchinson(2), rtol=1e-4, atol=1e-4, **options
    )
    seconds = trained.history[-1]["seconds"]
    return Score(_parameters(model), seconds, *_mean(ode), info.nfe, *_mean(elbo))


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error; estimator noise, independent by rows, is in the spread."""
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def _table(scores: dict[str, Score], rows: int) -> str:
    lines = [
        f"test bits/dim of {rows} digits, mean ± standard error",
        f"{'':<10}{'probability flow':>20}{'ELBO':>20}{'parameters':>12}{'training':>10}",
    ]
    for name, s in scores.items():
        ode, elbo = f"{s.ode:.3f} ± {s.ode_se:.3f}", f"{s.elbo:.3f} ± {s.elbo_se:.3f}"
        lines.append(f"{name:<10}{ode:>20}{elbo:>20}{s.parameters:>12,}{s.seconds:>8.0f} s")
    return "\n".join(lines)


def _write(
    out: Path,
    models: dict[str, NDM],
    fits: dict[str, FitResult],
    scores: dict[str, Score],
    test: Tensor,
    steps: int,
    seed: int,
) -> None:
    report = {
        "data": {"set": "sklearn.datasets.load_digits", "levels": LEVELS, "train": 1437, "test": len(test)},
        "steps": steps,
        "seed": seed,
        "versions": {"torch": torch.__version__},
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "scores": {name: asdict(score) for name, score in scores.items()},
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    rows = {"test data": BINS.centres(test[:12], torch.float32)}
    for name, model in models.items():
        for method, grid in (("ode", None), ("ddpm", 100)):
            generator = torch.Generator().manual_seed(seed)
            rows[f"{name}, {method}"] = sample(model, 12, method=method, steps=grid, generator=generator)
    _grid(out / "samples.png", {name: images.clamp(-1.0, 1.0) for name, images in rows.items()}, "samples")
    _grid(out / "transformation.png", *_transformed(models["NDM"], BINS.centres(test[:12], torch.float32)))
    _curves(out / "training.png", fits, steps)


def _transformed(model: NDM, x: Tensor) -> tuple[dict[str, Tensor], str]:
    rows = {}
    with torch.no_grad(), model.evaluating():
        for t in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
            rows[f"t = {t:.1f}"] = model.transform(x, torch.tensor(t, dtype=torch.float64))
    return rows, "F(x, t) of test digits"


def _grid(path: Path, rows: dict[str, Tensor], title: str) -> None:
    """One row of images per entry, grey from -1 to 1, or symmetrically further where a row exceeds it."""
    from matplotlib.figure import Figure

    columns = max(len(images) for images in rows.values())
    figure = Figure(figsize=(0.8 * columns + 1.6, 0.8 * len(rows) + 0.6), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (label, images) in zip(axes, rows.items(), strict=True):
        limit = max(1.0, float(images.abs().max()))
        for axis, image in zip(row, images, strict=False):
            axis.imshow(image[0].numpy(), cmap="gray", vmin=-limit, vmax=limit)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def _curves(path: Path, fits: dict[str, FitResult], steps: int) -> None:
    """Training bound over steps and over seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axis, key in zip(figure.subplots(1, 2, sharey=True), ("step", "seconds"), strict=True):
        for name, trained in fits.items():
            axis.plot(*_series(trained, key), label=name, linewidth=1.2)
        axis.set_xlabel(key)
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("training bound, bits/dim")
    figure.axes[0].legend()
    figure.suptitle(f"digits, {steps} steps", fontsize=10)
    figure.savefig(path, dpi=110)


def _series(trained: FitResult, key: str) -> tuple[Sequence[float], Sequence[float]]:
    """The history without its first tenth, whose values would set the scale."""
    rows = trained.history[len(trained.history) // 10 :]
    return [row[key] for row in rows], [row["bits_per_dim"] for row in rows]


def run_demo(options: argparse.Namespace) -> int:
    run(
        options.out,
        steps=STEPS if options.steps is None else options.steps,
        test_rows=options.test_rows,
        seed=options.seed,
        progress=not options.quiet,
    )
    return 0
