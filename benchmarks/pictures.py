r"""What a learned forward process does to images, and what it buys at the first step of sampling.

    python benchmarks/paper_claims.py --preset small --data digits --models diffusion,ndm-x --seeds 0
    python benchmarks/pictures.py --data digits

From two models trained by ``benchmarks/paper_claims.py``, the plain diffusion and the Neural Diffusion Model "x":

- ``transform_DATA.png``: :math:`F(x, t)` of test images at several times, and :math:`F(x, t) - x` below each row;
- ``first_step_DATA.png``: the predictions :math:`\hat x(z_1, 1)` from the same noise, by both, as in figure 2 of the
  paper, and the mean of the data. Numbers beside each row: the spread of the predictions over noise, in units of that
  of the data over images.

References:
    Bartosh, Vetrov and Naesseth, Neural Diffusion Models, figure 2, https://arxiv.org/abs/2310.08337
"""

import argparse
import json
from pathlib import Path

import paper_claims
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import ndm_ct
from ndm_ct.storage import write_atomically

RESULTS = Path(__file__).parent / "results"
TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)
SHOWN = 6


def at(t: float) -> Tensor:
    """A time."""
    return torch.tensor(t, dtype=torch.float64)


def draw(axis: Axes, image: Tensor, span: float = 1.0) -> None:
    """An image ``(1, H, W)``, grey from -span to span."""
    axis.imshow(image[0].numpy(), cmap="gray", vmin=-span, vmax=span)
    axis.set(xticks=[], yticks=[])


def transform_picture(model: ndm_ct.NDM, x: Tensor) -> Figure:
    """F(x, t) and its difference from x, a column per time."""
    with torch.no_grad():
        path = model.transform.along(x)
        states = [path(at(t).expand(len(x))) for t in TIMES]
    span = max(float((state - x).abs().max()) for state in states)
    figure = Figure(figsize=(1.1 * len(TIMES), 2.2 * len(x)), layout="constrained")
    axes = figure.subplots(2 * len(x), len(TIMES))
    for column, (t, state) in enumerate(zip(TIMES, states, strict=True)):
        axes[0, column].set_title(f"t = {t:g}", fontsize=8)
        for row in range(len(x)):
            draw(axes[2 * row, column], state[row])
            draw(axes[2 * row + 1, column], state[row] - x[row], span)
    axes[0, 0].set_ylabel("F(x, t)", fontsize=7)
    axes[1, 0].set_ylabel(f"F - x, ±{span:.2g}", fontsize=7)
    return figure


def spread(predictions: Tensor, x: Tensor) -> float:
    """Root of the mean variance of predictions over noise, in units of that of data over images."""
    return float((predictions.var(0).mean() / x.var(0).mean()).sqrt())


def first_step_picture(models: dict[str, ndm_ct.NDM], x: Tensor, noise: Tensor) -> tuple[Figure, dict[str, float]]:
    """Predictions of x from noise, a row per model."""
    figure = Figure(figsize=(1.1 * (SHOWN + 1), 1.3 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), SHOWN + 1, squeeze=False)
    spreads = {}
    for line, (name, model) in zip(axes, models.items(), strict=True):
        with torch.no_grad():
            predictions = model.predict_x(noise, at(1.0))
        spreads[name] = spread(predictions, x)
        draw(line[0], x.mean(0))
        for axis, image in zip(line[1:], predictions, strict=False):
            draw(axis, image)
        line[0].set_ylabel(f"{name}\n{spreads[name]:.3f}", fontsize=7)
    axes[0, 0].set_title("mean of data", fontsize=7)
    return figure, spreads


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    images = [name for name, recipe in paper_claims.RECIPES.items() if recipe.levels]
    parser.add_argument("--data", choices=images, default="digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cells", type=Path, default=Path("runs/paper_claims/small/cells"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    files = {
        name: options.cells / paper_claims.Cell(options.data, name, options.seed).name / "model.safetensors"
        for name in ("diffusion", "ndm-x")
    }
    missing = [str(file) for file in files.values() if not file.exists()]
    if missing:
        parser.error(f"no {' and no '.join(missing)}; train them by paper_claims.py --data {options.data}.")
    models = {name: ndm_ct.load(file) for name, file in files.items()}
    rows = paper_claims.rows_of(paper_claims.RECIPES[options.data])
    assert rows.bins is not None
    x = rows.bins.centres(rows.split.test, torch.float32)
    noise = torch.randn(1000, *x.shape[1:], generator=torch.Generator().manual_seed(options.seed))
    options.out.mkdir(parents=True, exist_ok=True)
    transform_picture(models["ndm-x"], x[:SHOWN]).savefig(options.out / f"transform_{options.data}.png", dpi=100)
    figure, spreads = first_step_picture(models, x, noise)
    figure.savefig(options.out / f"first_step_{options.data}.png", dpi=100)
    result = json.dumps({"data": options.data, "seed": options.seed, "spread": spreads}, indent=1)
    write_atomically(options.out / f"first_step_{options.data}.json", (result + "\n").encode())
    return spreads


if __name__ == "__main__":
    main()
