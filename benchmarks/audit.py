r"""Which published ways to compute log p give the right number, and the right error?

    python benchmarks/audit.py                                      # about an hour on one CPU core
    python benchmarks/audit.py --laws checkers twonorm --repeats 20  # minutes

Eleven protocols score laws of known density through exact predictors: see ``bench/protocols.py`` and
:func:`ndm_ct.audit`. The run continues where it was stopped.
"""

import argparse
import math
from typing import Any

import torch
from bench import runs
from bench.protocols import PROTOCOLS
from matplotlib.figure import Figure

import ndm_ct
from ndm_ct.auditing import LAWS

TICKS = (-1.0, -0.1, 0.0, 0.1, 1.0)


def plot(found: dict[str, list[dict[str, Any]]], laws: list[str]) -> Figure:
    """Error of the published number in bits per dimension, and the scatter of one value, a panel per law."""
    figure = Figure(figsize=(3.4 * len(laws), 0.36 * len(found) + 1.6), layout="constrained")
    panels = figure.subplots(1, len(laws), squeeze=False, sharey=True)[0]
    for axis, law in zip(panels, laws, strict=True):
        for place, verdicts in enumerate(found.values()):
            own = next(each for each in verdicts if each["law"] == law)
            unit = own["dimensions"] * math.log(2.0)
            if not math.isfinite(own["bits"]):
                axis.text(0.0, place, "not finite", ha="center", va="center", fontsize=8)
                continue
            colour = "tab:red" if "too" in own["words"].split(". ")[0] else "tab:green"
            axis.errorbar(own["bits"], place, xerr=own["scatter"] / unit, fmt="o", color=colour, capsize=3, ms=5)
        axis.axvline(0.0, color="black", linewidth=0.8)
        axis.set_xscale("symlog", linthresh=0.01)
        axis.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axis.set(title=law, xlabel="error, bits per dimension")
        axis.grid(alpha=0.3)
    panels[0].set_yticks(range(len(found)), list(found))
    panels[0].invert_yaxis()
    figure.suptitle("mean error (red: beyond chance) and scatter of one value (bars)", fontsize=10)
    return figure


def lines(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The table and the verdicts in words."""
    rows = []
    for name, verdicts in found.items():
        for each in verdicts:
            unit = each["dimensions"] * math.log(2.0)
            error = runs.with_error(each["bits"], each["stderr"] / unit, 4, "+")
            cost = f"{each['evaluations']:.0f}", f"{each['seconds']:.3f}"
            scatter = f"{each['scatter']:.2g}", f"{each['reported']:.2g}"
            rows.append((name, each["law"], error, *scatter, *cost, each["words"]))
    head = ["protocol", "law", "error, bits/dim", "scatter, nats", "reported", "evaluations", "seconds", "in words"]
    return runs.table(head, rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = runs.Parser(__doc__, runs.RESULTS / "audit" / "all")
    add = parser.add_argument
    add("--laws", nargs="*", default=list(LAWS), choices=list(LAWS), help="laws to score")
    add("--protocols", nargs="*", default=list(PROTOCOLS), choices=list(PROTOCOLS), help="protocols to try")
    add("--rows", type=int, default=4, help="rows of every law (4)")
    add("--repeats", type=int, default=25, help="estimates of every row (25)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; returns the report."""
    options = parse(arguments)
    torch.set_num_threads(1)
    settings = {"rows": options.rows, "repeats": options.repeats}
    found: dict[str, list[dict[str, Any]]] = {}
    for name in options.protocols:
        protocol, bound, _ = PROTOCOLS[name]
        found[name] = []
        for law in options.laws:

            def score(protocol: Any = protocol, bound: bool = bound, law: str = law) -> dict[str, Any]:
                result = ndm_ct.audit(protocol, [law], bound=bound, progress=False, **settings)
                return result.to_json()[0]

            cell = options.out / "cells" / f"{law}-{name.replace(' ', '').replace(',', '')}.json"
            found[name].append(runs.kept(cell, settings, score))
            print(f"{name:14} {law:11} {found[name][-1]['words']}", flush=True)
    about = [f"- {law}: {LAWS[law]().about}" for law in options.laws]
    what = [f"- {name}: {PROTOCOLS[name][2]}" for name in options.protocols]
    text = "\n".join(
        ["# Audit of likelihoods", "", *lines(found), "", "Laws:", "", *about, "", "Protocols:", "", *what]
    )
    figures = {"plot": plot(found, options.laws)}
    return runs.write_report(options.out, {"settings": settings, "results": found}, text, figures)


if __name__ == "__main__":
    main()
