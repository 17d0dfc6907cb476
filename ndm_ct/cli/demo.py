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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ndm_ct import nn, plots
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
    plots.save(plots.image_rows(rows, title="samples", quantisation=BINS), out / "samples.png")
    changed = plots.forward_process(models["NDM"], BINS.centres(test[:10], torch.float32), times=(0.0, 0.5, 1.0))
    plots.save(changed, out / "transformation.png")
    plots.save(plots.training(fits), out / "training.png")


def run_demo(options: argparse.Namespace) -> int:
    run(
        options.out,
        steps=STEPS if options.steps is None else options.steps,
        test_rows=options.test_rows,
        seed=options.seed,
        progress=not options.quiet,
    )
    return 0
