r"""What does a learned forward process do to images, and to the first step of sampling?

    python benchmarks/paper_claims.py --preset small --data digits --models diffusion,ndm-x --seeds 0
    python benchmarks/pictures.py --data digits

Takes two models that the first command trained. ``benchmarks/README.md`` describes the pictures.
"""

import argparse
from pathlib import Path

import torch
from bench import recipes, runs
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import ndm_ct

TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)
SHOWN = 6


def show(axis: Axes, image: Tensor, span: float = 1.0) -> None:
    """Draw an image ``(1, H, W)``, grey from -span to span."""
    axis.imshow(image[0].numpy(), cmap="gray", vmin=-span, vmax=span)
    axis.set(xticks=[], yticks=[])


def transform_picture(model: ndm_ct.NDM, x: Tensor) -> Figure:
    """F(x, t) and its difference from x, a column per time."""
    with torch.no_grad():
        path = model.transform.along(x)
        states = [path(torch.full((len(x),), t, dtype=torch.float64)) for t in TIMES]
    span = max(float((state - x).abs().max()) for state in states)
    figure = Figure(figsize=(1.1 * len(TIMES), 2.2 * len(x)), layout="constrained")
    axes = figure.subplots(2 * len(x), len(TIMES))
    for column, (t, state) in enumerate(zip(TIMES, states, strict=True)):
        axes[0, column].set_title(f"t = {t:g}", fontsize=8)
        for row in range(len(x)):
            show(axes[2 * row, column], state[row])
            show(axes[2 * row + 1, column], state[row] - x[row], span)
    axes[0, 0].set_ylabel("F(x, t)", fontsize=7)
    axes[1, 0].set_ylabel(f"F - x, ±{span:.2g}", fontsize=7)
    return figure


def spread(predictions: Tensor, x: Tensor) -> float:
    """Root of the mean variance of predictions over noise, in units of that of data over images."""
    return float((predictions.var(0).mean() / x.var(0).mean()).sqrt())


def first_step_picture(models: dict[str, ndm_ct.NDM], x: Tensor, noise: Tensor) -> tuple[Figure, dict[str, float]]:
    """Predictions of x from noise, a row per model."""
    figure = Figure(figsize=(1.1 * (SHOWN + 1), 1.3 * len(models)), layout="constrained")
    axes, spreads = figure.subplots(len(models), SHOWN + 1, squeeze=False), {}
    for line, (name, model) in zip(axes, models.items(), strict=True):
        with torch.no_grad():
            predictions = model.predict_x(noise, torch.tensor(1.0, dtype=torch.float64))
        spreads[name] = spread(predictions, x)
        for axis, image in zip(line, [x.mean(0), *predictions], strict=False):
            show(axis, image)
        line[0].set_ylabel(f"{name}\n{spreads[name]:.3f}", fontsize=7)
    axes[0, 0].set_title("mean of data", fontsize=7)
    return figure, spreads


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = runs.Parser(__doc__)
    add, images = parser.add_argument, [name for name, recipe in recipes.RECIPES.items() if recipe.levels]
    add("--data", default="digits", choices=images)
    add("--seed", type=int, default=0, help="seed of the cells (0)")
    add("--cells", type=Path, default=Path("runs/paper_claims/small/cells"), help="trained cells")
    options = parser.parse_args(arguments)
    options.out = options.out or runs.RESULTS / "pictures" / options.data
    names = {name: f"{options.data}-{name}-{options.seed}" for name in ("diffusion", "ndm-x")}
    options.files = {name: options.cells / folder / "model.safetensors" for name, folder in names.items()}
    missing = [str(file) for file in options.files.values() if not file.exists()]
    if missing:
        parser.error(f"no {' and no '.join(missing)}; train them by paper_claims.py --data {options.data}.")
    return options


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Draw and write; returns the spreads."""
    options = parse(arguments)
    models = {name: ndm_ct.load(file) for name, file in options.files.items()}
    rows = recipes.rows_of(recipes.RECIPES[options.data])
    assert rows.bins is not None
    x = rows.bins.centres(rows.split.test, torch.float32)
    noise = torch.randn(1000, *x.shape[1:], generator=torch.Generator().manual_seed(options.seed))
    first_step, spreads = first_step_picture(models, x, noise)
    report = runs.provenance() | {"data": options.data, "seed": options.seed, "spread": spreads}
    runs.write_json(options.out / "results.json", report)
    runs.save_figure(transform_picture(models["ndm-x"], x[:SHOWN]), options.out / "transform.png", dpi=100)
    runs.save_figure(first_step, options.out / "first_step.png", dpi=100)
    return spreads


if __name__ == "__main__":
    main()
