r"""What does a learned forward process do?
=======================================

An ordinary diffusion adds noise to x. A Neural Diffusion Model adds noise to a learned transform of x,

.. math::  q(z_t \mid x) = N(\alpha_t F(x, t),\ \sigma_t^2 I), \qquad F(x, 0) = x .

The data are two half-circles, three times as wide as the prior N(0, I), and the schedule ends while a quarter of the
signal's variance is left. With F(x, t) = x the process then ends far from the prior. A learned F can end near it: watch
it draw the data together as t grows. Both models have the same predictor and the same training. The script prints the
log-likelihood of new points (exact, by the flow) and its lower bound, which the training maximises. It takes about a
minute on one CPU core.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import make_moons

import ndm_ct
from ndm_ct import nn, schedules, transforms


def trained(x: torch.Tensor, transform: transforms.Transform, steps: int) -> tuple[ndm_ct.NDM, ndm_ct.FitResult]:
    """A model with this transform, and the history of its training."""
    predictor = nn.Preconditioned(nn.MLP(2, width=64), data_std=3.0)
    model = ndm_ct.NDM(predictor, (2,), transform=transform, schedule=schedules.LinearLogSNR(-8.0, 1.0))
    return model, ndm_ct.fit(model, x, steps=steps, batch_size=256, lr=5e-3, ema=0.99, log_every=20, progress=False)


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Train, print and draw; return log-likelihood and bound of each model, in nats."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=800, help="optimiser steps of each model (800)")
    parser.add_argument("--out", type=Path, default=Path("runs/examples/learned_forward_process"), help="folder")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    points, half = make_moons(5000, noise=0.05, random_state=0)
    x = torch.as_tensor(3.0 * (points - points.mean(0)) / points.std(0), dtype=torch.float32)
    new, half, scores = x[4500:], half[4500:], {}
    plane = torch.cartesian_prod(*2 * [torch.linspace(-6.0, 6.0, 50)])
    figure, axes = plt.subplots(2, 4, figsize=(12, 6), layout="constrained")
    F = transforms.Separable(nn.MLP(2, width=64, outputs=2, time=False))
    for place, (name, transform) in enumerate({"F learned": F, "F(x, t) = x": transforms.Identity()}.items()):
        model, result = trained(x[:4500], transform, options.steps)
        logp, bound = ndm_ct.loglik(model, new), ndm_ct.elbo(model, new, samples=64).detach()
        scores[name] = [float(logp.mean()), float(bound.mean())]
        print(f"{name}: log-likelihood {scores[name][0]:.2f}, bound {scores[name][1]:.2f} nats")
        axes[1, 0].plot([row["step"] for row in result.history], [row["loss"] for row in result.history], label=name)
        density = ndm_ct.loglik(model, plane).reshape(50, 50).exp().T.numpy()
        axes[1, 1 + place].imshow(density, origin="lower", extent=(-6, 6, -6, 6), vmax=0.1)
        axes[1, 1 + place].set(title=f"density, {name}")
        axes[1, 3].scatter(*ndm_ct.sample(model, 500).T.numpy(), s=3, label=name)
    axes[1, 3].set(title="samples", xlim=(-6, 6), ylim=(-6, 6))
    axes[1, 0].set(title="loss, nats", xlabel="step", ylim=(3, 6))
    axes[1, 0].legend()
    for axis, t in zip(axes[0], (0.0, 0.3, 0.6, 1.0), strict=True):
        with torch.no_grad():
            axis.scatter(*F(new, torch.tensor(t)).T.numpy(), c=half, s=3, cmap="coolwarm")
        axis.set(title=f"F(x, {t:g})", xlim=(-6, 6), ylim=(-6, 6))
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "learned_forward_process.png", dpi=110)
    return scores


if __name__ == "__main__":
    main()
