"""Train the networks that the benchmarks measure on, into ``benchmarks/weights/NAME.safetensors``.

python benchmarks/train_networks.py                # all five, about 2 hours on one CPU core
python benchmarks/train_networks.py fashion        # one of them
"""

import argparse
from pathlib import Path

from bench.networks import NETWORKS, train


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NETWORKS)}; default: all")
    parser.add_argument("--runs", type=Path, default=Path("runs/networks"), help="folder of logs and checkpoints")
    options = parser.parse_args(arguments)
    options.names = options.names or list(NETWORKS)
    if unknown := [name for name in options.names if name not in NETWORKS]:
        parser.error(f"{', '.join(unknown)} unknown; there are {', '.join(NETWORKS)}.")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Train the networks asked for; a training that was stopped is continued."""
    options = parse(arguments)
    for name in options.names:
        train(name, options.runs)


if __name__ == "__main__":
    main()
