r"""How raw outputs of a network become a prediction: the bound after a short training, for every way.

    python benchmarks/heads.py --data casp --steps 2000 --out benchmarks/results/heads/casp       # 20 minutes
    python benchmarks/heads.py --data digits --steps 1500 --out benchmarks/results/heads/digits   # 20 minutes
    python benchmarks/heads.py --data casp --steps 3                                             # a look

With raw outputs n, :math:`n_1, n_2`, and :math:`c` the coefficients of :class:`ndm_ct.nn.Preconditioned`, for F the
identity

============  =========================================================================================================
``x``         :math:`\hat x = n(z)`
``eps``       :math:`\hat x = (z - \sigma n(z))/\alpha`
``v``         :math:`\hat x = (\alpha z - \sigma n(z))/(\alpha^2 + \sigma^2)`
``edm``       :math:`\hat x = c_{skip} z - c_{out} n(c_{in} z)`, the library's ``Preconditioned``
============  =========================================================================================================

and for head "moments" with the learned F of ``paper_claims.py``

================  =====================================================================================================
``raw``           :math:`(n_1(z), n_2(z))`
``eps + raw``     :math:`((z - \sigma n_1(z))/\alpha,\ n_2(z))`
``edm + raw``     :math:`(c_{skip} z - c_{out} n_1(c_{in} z),\ n_2(c_{in} z))`, the library's ``Preconditioned``
``edm + rate``    the same with :math:`\gamma' n_2`: the bound sees :math:`\dot F/\gamma'`
``edm + edm``     the same with :math:`c_{out} n_2`
================  =====================================================================================================

All train on the same batches, times and noise, by the recipes of ``paper_claims.py`` cut short, under the library's
objective. Reported is the validation NELBO at the end (bits per dimension or nats), as the difference from the
library's way, paired by seed, with its standard error over seeds. Writes ``heads.json`` and ``heads.md`` into
``--out``; run again, the same command continues after the last training that ended.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import paper_claims
import torch
from torch import Tensor, nn

import ndm_ct
from ndm_ct._core.checks import expand
from ndm_ct.objectives.bound import Bound
from ndm_ct.storage import write_atomically

WAYS = {
    "diffusion": ("edm", "x", "eps", "v"),
    "ndm-moments": ("edm + raw", "raw", "eps + raw", "edm + rate", "edm + edm"),
}
"""Ways of each model; the first is the library's."""
OBJECTIVE = Bound()


class Head(nn.Module):
    """The pair of head "moments" from raw outputs, one of the ways above.

    Args:
        net: ``net(z, t)``, returning ``(B, 2, *E)``.
        way: one of ``WAYS["ndm-moments"]``.
        schedule: of the model.
        data_std: s.
    """

    def __init__(self, net: nn.Module, way: str, schedule: ndm_ct.schedules.Schedule, data_std: float) -> None:
        super().__init__()
        self.net, self.way, self.schedule, self.data_std = net, way, schedule, data_std

    def forward(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Estimates of F and of its time derivative, each of the shape of z."""
        c, s = self.schedule(t.double()), self.data_std
        spread = torch.sqrt((c.alpha * s) ** 2 + c.sigma**2)
        out = c.sigma * s / spread
        edm = self.way.startswith("edm")
        first, second = self.net(expand(1.0 / spread, z) * z if edm else z, t).unbind(1)
        if edm:
            first = expand(c.alpha * s**2 / spread**2, z) * z - expand(out, z) * first
        elif self.way.startswith("eps"):
            first = (z - expand(c.sigma, z) * first) / expand(c.alpha, z)
        scales = {"edm + rate": c.dgamma, "edm + edm": out}
        return first, expand(scales.get(self.way, torch.ones_like(out)), z) * second


def build(
    name: str, way: str, recipe: paper_claims.Recipe, shape: tuple[int, ...], std: float, seed: int
) -> ndm_ct.NDM:
    """An untrained model whose network is read in one of the ways."""
    model = paper_claims.build(name, recipe, shape, std, seed)
    if way == WAYS[name][0]:
        return model
    if name == "diffusion":
        return ndm_ct.NDM(model.predictor.net, shape, schedule=model.schedule, prediction=way)
    head = Head(model.predictor.net, way, model.schedule, std)
    return ndm_ct.NDM(head, shape, transform=model.transform, schedule=model.schedule, prediction="moments")


def bound(model: ndm_ct.NDM, recipe: paper_claims.Recipe, rows: paper_claims.Rows, steps: int, seed: int) -> float:
    """Validation NELBO after a training; infinite if the training failed."""
    try:
        trained = ndm_ct.fit(
            model, rows.split.train, steps=steps, batch_size=recipe.batch_size, lr=recipe.lr, seed=seed, ema=0.99,
            objective=OBJECTIVE, quantisation=rows.bins, validation=rows.validation, validate_every=steps,
            progress=False,
        )  # fmt: skip
    except RuntimeError as error:  # loss or prediction became infinite
        print(error)
        return float("inf")
    last = trained.validation[-1]
    return float(last.get("validation_bits_per_dim", -last["validation_elbo"]))


def markdown(results: dict[str, dict[str, dict[str, list[float]]]], steps: int) -> str:
    """Mean bounds, and paired differences from the library's way."""
    lines = [f"# Raw outputs to predictions, {steps} steps", "", "| data | model | way | NELBO | difference |"]
    lines.append("|---|---|---|---|---|")
    for data, models in results.items():
        for name, ways in models.items():
            own = np.array(ways[WAYS[name][0]])
            for way, values in ways.items():
                gap = np.array(values) - own
                error = gap.std(ddof=1) / len(gap) ** 0.5 if len(gap) > 1 else float("nan")
                lines.append(f"| {data} | {name} | {way} | {np.mean(values):.4f} | {gap.mean():+.4f} ± {error:.4f} |")
    return "\n".join([*lines, ""])


def begun(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The report of an earlier run with these settings, or an empty one."""
    if not path.exists():
        return {"settings": settings, "results": {}}
    report: dict[str, Any] = json.loads(path.read_text())
    if report["settings"] != settings:
        there = report["settings"]
        raise SystemExit(f"{path} holds results of {there}, not of {settings}: give another --out, or delete it.")
    return report


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["casp", "digits"], choices=list(paper_claims.RECIPES))
    parser.add_argument("--models", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/heads"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {"steps": options.steps, "objective": OBJECTIVE.describe(), "torch": torch.__version__}
    report = begun(options.out / "heads.json", settings)
    for data in options.data:
        recipe = paper_claims.RECIPES[data]
        rows = paper_claims.rows_of(recipe)
        shape = tuple(rows.split.train.shape[1:])
        for name, seed in itertools.product(options.models, range(options.seeds)):
            ways = report["results"].setdefault(data, {}).setdefault(name, {way: [] for way in WAYS[name]})
            for way, bounds in ways.items():
                if seed < len(bounds):
                    continue
                model = build(name, way, recipe, shape, rows.std, seed)
                bounds.append(bound(model, recipe, rows, options.steps, seed))
                print(f"{data}, {name}, {way}, seed {seed}: {bounds[-1]:.4f}", flush=True)
                write_atomically(options.out / "heads.json", (json.dumps(report, indent=1) + "\n").encode())
    write_atomically(options.out / "heads.md", markdown(report["results"], options.steps).encode())
    return report


if __name__ == "__main__":
    main()
