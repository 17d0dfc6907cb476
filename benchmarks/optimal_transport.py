r"""How straight can a learned forward process make the paths of the flow, and at what likelihood?

    python benchmarks/optimal_transport.py                   # about 55 minutes on one CPU core; stop and continue
    python benchmarks/optimal_transport.py --preset smoke    # about a minute
    python benchmarks/optimal_transport.py --data mixture --seeds 0,1

``benchmarks/README.md`` describes the models and the measures. Cells that are finished are not computed again.
(Bartosh, Vetrov and Naesseth, Neural Diffusion Models, appendix E, https://arxiv.org/abs/2310.08337.)
"""

import argparse
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import data, pictures, runs
from bench.transport import (
    BATCH_ROWS,
    BATCH_SHARE,
    LATE,
    MODELS,
    Line,
    build,
    deviation,
    energies,
    paths,
    straightest,
    straightness,
    weightings,
)
from matplotlib.figure import Figure

import ndm_ct
from ndm_ct import objectives
from ndm_ct._core.seeds import derive_seeds
from ndm_ct.objectives.straight import Straight

EULER_STEPS, REFERENCE_STEPS, STRENGTH = 4, 100, 1.0
RAMP = (0.01, 0.03, 0.1, 0.3)
"""Shares of the penalty's strength in the first half of a training: at full strength from the start nothing moves."""


@dataclass(frozen=True)
class Size:
    """How much to compute: training, test rows, parts of samples, steps of a path, least straightness error."""

    steps: int
    batch_size: int
    rows: int
    parts: int
    part: int
    path_steps: int
    points: tuple[int, int]
    iterations: int
    seeds: tuple[int, ...]


PRESETS = {
    "smoke": Size(16, 64, 60, 4, 50, 20, (16, 8), 10, (0,)),
    "full": Size(6000, 512, 2000, 10, 1000, 100, (64, 24), 100, (0,)),
}

SETS: dict[str, tuple[Callable[[], data.Split], Line | None]]
SETS = {"mixture": (Line().split, Line()), "moons": (lambda: data.moons(60_000), None)}
"""Training and test rows, and the law where it is known."""


def fitted(name: str, kind: str, seed: int, options: argparse.Namespace, folder: Path) -> ndm_ct.NDM:
    """The trained model of a cell, trained here if it is not there yet."""
    split, size, strength = SETS[name][0](), PRESETS[options.preset], options.strength
    model = build(kind, split.train.shape[1], seed)
    stages: list[tuple[int, Straight | None]] = [(size.steps, None)]
    bound, rows = objectives.Bound(), size.batch_size
    if kind == "transport-batch":
        rows *= BATCH_ROWS
        objective, half = Straight(BATCH_SHARE * strength, bound, "batch"), size.steps // 2
        stages = [(half, objective), (size.steps - half, objective)]  # a warm restart
    elif kind.startswith("transport"):
        early = size.steps // (2 * len(RAMP))
        stages = [(early, Straight(strength * share, bound)) for share in RAMP]
        stages += [(size.steps - early * len(RAMP), Straight(strength, bound))]
    for k, (steps, penalised) in enumerate(stages):
        trained = ndm_ct.fit(
            model, split.train, steps=steps, batch_size=rows, lr=3e-3, warmup=min(50, steps), ema=0.99,
            weight_decay=0.0, seed=derive_seeds("stage", seed, k)[0] >> 1, objective=penalised,
            lr_final=0.01 if k == len(stages) - 1 else 0.5, run_dir=folder / f"stage-{k}", progress=not options.quiet,
        )  # fmt: skip
        if not trained.finished:  # Ctrl-C, which a training turns into a checkpoint
            raise KeyboardInterrupt
    return model.requires_grad_(False)


def run(name: str, kind: str, seed: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train and measure one cell."""
    (load, line), size = SETS[name], PRESETS[options.preset]
    split = load()
    model = fitted(name, kind, seed, options, folder)
    x = split.test[: size.rows]
    states = paths(model, x, size.path_steps)
    entry: dict[str, Any] = {
        "data": name, "model": kind, "seed": seed, "parameters": sum(p.numel() for p in model.parameters()),
        "straightness": float(straightness(states)), "nll": (-ndm_ct.loglik(model, x).double()).tolist(),
        "nelbo": float(-ndm_ct.elbo(model, x, samples=16).mean()),
    }  # fmt: skip
    if line is not None:
        entry["entropy"] = (-line.law.log_prob(x.double())).tolist()
        entry["deviation_rms"], entry["deviation_max"] = deviation(states, line.monotone_map(x))
    chord = (states[-1] - states[0]).square().sum(1).mean()
    entry |= {"distance": entry["straightness"] * float(chord), "bounds": weightings(model, x)}
    for steps in (EULER_STEPS, REFERENCE_STEPS):
        entry[f"energy_{steps}"] = energies(model, steps, split.test, size.parts, size.part)
    np.save(folder / "paths.npy", states[:: size.path_steps // 20].float().numpy())
    return entry


def summary(entry: dict[str, Any], entries: list[dict[str, Any]]) -> dict[str, Any]:
    """A cell's numbers, with differences from the rectified diffusion of its data and seed where there is one."""
    few, many = f"energy_{EULER_STEPS}", f"energy_{REFERENCE_STEPS}"
    row = {key: value for key, value in entry.items() if key not in ("nll", "entropy", few, many)}

    def add(key: str, values: Any) -> None:
        row[key], row[f"{key}_se"] = runs.mean(values)

    nll, energy = np.array(entry["nll"]), np.array(entry[few])
    add("nll", nll)
    if "entropy" in entry:
        add("excess", nll - np.array(entry["entropy"]))
    add("energy_few", energy)
    add("energy_many", entry[many])
    same = [e for e in entries if (e["data"], e["seed"]) == (entry["data"], entry["seed"])]
    for reference in (e for e in same if e["model"] == "rectified"):
        add("nll_gap", nll - np.array(reference["nll"]))
        add("energy_gap", energy - np.array(reference[many]))
        row["straightness_ratio"] = reference["straightness"] / entry["straightness"]
    return row


def markdown(rows: list[dict[str, Any]], least: dict[str, dict[str, float]], command: str) -> str:
    """The tables."""

    def cell(row: dict[str, Any], key: str, digits: int, error: bool = False) -> str:
        if key not in row:
            return ""
        return runs.with_error(row[key], row[f"{key}_se"], digits) if error else f"{row[key]:.{digits}f}"

    each = (f"{name} {value['straightness']:.4f} ({value['deviation']:.3f})" for name, value in least.items())
    lines = ["# Dynamic optimal transport", "", f"`{command}`", ""]
    lines += ["Least straightness error found in one dimension, over all F, by schedule (its deviation, rms): "]
    lines += [", ".join(each) + ".", ""]
    head = ["data", "model", "seed", "straightness error", "rectified / this", "deviation, rms", "deviation, max"]
    head += ["NLL", "NLL - rectified", "NLL - entropy", "NELBO", "energy, 4 steps", "4 steps - rectified's 100"]
    columns = [("straightness", 4), ("straightness_ratio", 3), ("deviation_rms", 3), ("deviation_max", 3), ("nll", 4)]
    columns += [("nll_gap", 4, True), ("excess", 4, True), ("nelbo", 4), ("energy_few", 5, True)]
    columns += [("energy_gap", 5, True)]
    keys = [[row[key] for key in ("data", "model", "seed")] for row in rows]
    lines += runs.table(head, [(*key, *(cell(row, *c) for c in columns)) for key, row in zip(keys, rows, strict=True)])
    lines += [
        "",
        "The squared distance from straight paths and bounds on it from the acceleration, by weight over time; ",
    ]
    lines[-1] += "in brackets the standard deviation over rows with one time each, relative to the mean:"
    head = ["data", "model", "seed", "distance", "τ(1-τ)/2, times of that density", "τ(1-τ)/2, the ELBO's times"]
    head += ["1/π², even times", "1/π², the ELBO's times"]
    kinds = ("legendre, own", "legendre, bound", "even, own", "even, bound")
    bounds = [[f"{row['bounds'][k]['mean']:.4f} ({row['bounds'][k]['scatter']:.1f})" for k in kinds] for row in rows]
    cells = [(*k, f"{row['distance']:.4f}", *four) for k, row, four in zip(keys, rows, bounds, strict=True)]
    return "\n".join([*lines, "", *runs.table(head, cells), ""])


def plot(entries: list[dict[str, Any]], work: Path) -> Figure:
    """Densities and paths over time on the line, paths in the plane: diffusions and transport."""
    kinds = [kind for kind in ("diffusion", "rectified", *LATE) if any(e["model"] == kind for e in entries)]
    names = [name for name in SETS if any(e["data"] == name for e in entries)]
    columns = max(1, len(kinds))
    figure = Figure(figsize=(4.2 * columns, 3.6 * len(names)), layout="constrained")
    for name, axes in zip(names, figure.subplots(len(names), columns, squeeze=False), strict=True):
        for kind, axis in zip(kinds, axes, strict=False):
            cells = [e for e in entries if (e["data"], e["model"]) == (name, kind)]
            if not cells:
                axis.set_axis_off()
                continue
            states = np.load(work / f"{name}-{kind}-{cells[0]['seed']}" / "paths.npy")
            pictures.draw_paths(axis, states)
            axis.set_title(f"{name}, {kind}: straightness error {cells[0]['straightness']:.3g}", fontsize=9)
    return figure


def least_errors(size: Size) -> dict[str, dict[str, float]]:
    """The least straightness error by model, and the deviation it comes with."""
    found = {}
    for kind in ("diffusion", "rectified", *LATE):
        model = build(kind, 1, 0)
        states = straightest(Line(), model.schedule, model.t_min, size.points, size.iterations)
        found[kind] = {"straightness": float(straightness(states)), "deviation": deviation(states, states[-1])[0]}
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = runs.Parser(__doc__, runs.RESULTS / "optimal_transport" / "all")
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="full")
    add("--data", type=runs.names(SETS), default=list(SETS), help=f"of {', '.join(SETS)}; several by commas")
    add("--models", type=runs.names(MODELS), default=list(MODELS[:4]), help=f"of {', '.join(MODELS)} (the first four)")
    add("--seeds", type=runs.numbers, help="default: those of the preset")
    add("--strength", type=float, default=STRENGTH, help=f"of the penalty ({STRENGTH:g})")
    add("--work", type=Path, help="trainings; default: runs/optimal_transport/PRESET")
    add("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    options.seeds = options.seeds or PRESETS[options.preset].seeds
    options.work = options.work or Path("runs/optimal_transport") / options.preset
    if options.models == ["transport-batch"] and "mixture" not in options.data:
        parser.error("transport-batch is for --data mixture; add it, or another of --models.")
    return options


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, measure and write what is not finished; returns the report."""
    options = parse(arguments)
    torch.set_num_threads(1)
    size, entries = PRESETS[options.preset], []
    for seed, name, kind in ((s, n, k) for s in options.seeds for n in options.data for k in options.models):
        if kind == "transport-batch" and SETS[name][1] is None:
            print(f"{name}, {kind}: left out, {kind} is for the line only", flush=True)
            continue
        folder = options.work / f"{name}-{kind}-{seed}"
        settings = {"size": asdict(size), "strength": options.strength}
        make = functools.partial(run, name, kind, seed, options, folder)
        entries.append(runs.kept(folder / "result.json", settings, make))
        print(f"{name}, {kind}, seed {seed}: straightness error {entries[-1]['straightness']:.4f}", flush=True)
    least: dict[str, dict[str, float]] = {}
    if "mixture" in options.data:
        least = runs.kept(options.work / "least.json", asdict(size), lambda: least_errors(size))
    chosen = {name: ",".join(map(str, getattr(options, name))) for name in ("data", "models", "seeds")}
    chosen = {"preset": options.preset, **chosen, "strength": f"{options.strength:g}"}
    command = " ".join(f"--{name} {value}" for name, value in chosen.items())
    order = {name: place for place, name in enumerate([*SETS, *MODELS])}
    entries.sort(key=lambda e: (order[e["data"]], order[e["model"]], e["seed"]))
    rows, figure = [summary(entry, entries) for entry in entries], plot(entries, options.work)
    report = {"size": asdict(size), "command": command, "least": least, "cells": rows}
    return runs.write_report(options.out, report, markdown(rows, least, command), {"plot": figure})


if __name__ == "__main__":
    main()
