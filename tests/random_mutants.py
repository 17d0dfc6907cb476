"""Break random places of the core and see whether the tests notice: ``python tests/random_mutants.py [--count N]``.

A mutant changes one operator, constant, term, pair of arguments or statement of the core. The choice is a function of
``--seed``. The tests of the core first run once, and it is recorded which lines each of them runs. A mutant then meets
the tests that run its lines, the quick ones first, against a copy of the package, as for ``mutants.py``. A mutant that
survives is either a gap in the tests or the same program in other words; ``equivalents.toml`` lists the latter, each
with its reason.
"""

import argparse
import ast
import os
import random
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mutants import PACKAGE, TESTS, Mutant, MutantError, run

CORE = (
    "process.py", "dynamics.py", "quantisation.py", "divergence", "likelihood", "objectives", "samplers", "schedules",
    "solvers", "transforms",
)  # fmt: skip
"""Files and folders that are changed."""

CORE_TESTS = (
    "test_process.py", "test_noise_scale.py", "test_analytic.py", "test_units.py", "likelihood", "objectives",
    "samplers", "schedules", "solvers", "transforms", "_core/test_properties.py", "adapters/test_diffusers.py",
)  # fmt: skip
"""The tests that have to notice."""

MOST_TESTS = 60
"""Tests that a mutant meets at most."""

BINARY = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*"}
COMPARED = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not",
    ast.IsNot: "is",
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One change of a source: from where to where, and what stands there instead."""

    line: int
    start: int
    stop: int
    text: str
    what: str


class Source:
    """A file of the package as bytes, in which places of the syntax tree are found."""

    def __init__(self, path: Path) -> None:
        self.text = path.read_bytes()
        self.tree = ast.parse(self.text)
        lines = self.text.splitlines(keepends=True)
        self.starts = [sum(map(len, lines[:number])) for number in range(len(lines) + 1)]

    def place(self, node: ast.AST) -> tuple[int, int]:
        """First and last byte of a node."""
        return (
            self.starts[node.lineno - 1] + node.col_offset,
            self.starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def piece(self, node: ast.AST) -> str:
        """The text of a node."""
        start, stop = self.place(node)
        return self.text[start:stop].decode()

    def replaced(self, node: ast.AST, text: str, what: str) -> Change:
        """The change that puts ``text`` in the place of a node."""
        return Change(node.lineno, *self.place(node), text, what)

    def changes(self) -> list[Change]:
        """Every change of this file, in the order of the file."""
        found = [change for node in self._code(self.tree) for change in self._of(node)]
        return sorted(found, key=lambda change: (change.start, change.what, change.text))

    def mutated(self, change: Change) -> str:
        """The whole file after a change."""
        return (self.text[: change.start] + change.text.encode() + self.text[change.stop :]).decode()

    def _code(self, node: ast.AST) -> Iterator[ast.AST]:
        """Nodes that run: no annotations, no messages of errors, no lists of names."""
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_comment"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.JoinedStr | ast.Import):
                    continue
                if isinstance(child, ast.Assign | ast.AnnAssign) and isinstance(node, ast.Module):
                    continue
                yield child
                yield from self._code(child)

    def _of(self, node: ast.AST) -> Iterator[Change]:
        if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
            left, right = self.piece(node.left), self.piece(node.right)
            if isinstance(node.left, ast.BinOp | ast.Constant | ast.Name | ast.Call | ast.Attribute | ast.Subscript):
                sign = BINARY[type(node.op)]
                yield self.replaced(node, f"(({left}) {sign} ({right}))", f"{left} {sign} {right}")
            if isinstance(node.op, ast.Add | ast.Sub):
                yield self.replaced(node, f"({left})", f"{self.piece(node)} without its last term")
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARED:
            sign = COMPARED[type(node.ops[0])]
            text = f"({self.piece(node.left)} {sign} {self.piece(node.comparators[0])})"
            yield self.replaced(node, text, text)
        elif isinstance(node, ast.BoolOp):
            sign = " or " if isinstance(node.op, ast.And) else " and "
            text = f"({sign.join(f'({self.piece(each)})' for each in node.values)})"
            yield self.replaced(node, text, text)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
            yield self.replaced(node, f"({self.piece(node.operand)})", f"{self.piece(node)} without its sign")
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            value = (not node.value) if isinstance(node.value, bool) else node.value * 2 if node.value else 1
            yield self.replaced(node, f"({value!r})", f"{node.value!r} as {value!r}")
        elif (
            isinstance(node, ast.Call) and len(node.args) > 1 and not any(isinstance(a, ast.Starred) for a in node.args)
        ):
            yield from self._swapped(node)
        elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
            yield self.replaced(node, "pass", f"without {self.piece(node)}")

    def _swapped(self, call: ast.Call) -> Iterator[Change]:
        if len(call.args) < 2 or any(isinstance(each, ast.Starred) for each in call.args):
            return
        first, second = call.args[:2]
        (start, _), (_, stop) = self.place(first), self.place(second)
        text = f"{self.piece(second)}, {self.piece(first)}"
        if self.piece(first) != self.piece(second):
            yield Change(call.lineno, start, stop, text, f"arguments swapped: {text}")


def candidates() -> list[tuple[Mutant, range]]:
    """Every mutant of the core, without tests, and the lines that it changes."""
    found = []
    for room in CORE:
        path = PACKAGE / room
        for file in [path] if path.is_file() else sorted(path.glob("*.py")):
            source = Source(file)
            name = file.relative_to(PACKAGE).as_posix()
            for change in source.changes():
                label = f"{name}:{change.line} {' '.join(change.what.split())}"
                lines = range(change.line, change.line + 1 + source.text.count(b"\n", change.start, change.stop))
                found.append((Mutant(label, name, source.text.decode(), source.mutated(change), []), lines))
    return found


class Record:
    """Which lines every test of the core runs, and how long it takes.

    Args:
        folder: where the record is kept. A missing record is made.
    """

    def __init__(self, folder: Path) -> None:
        self.data, self.log = folder / "coverage", folder / "durations.txt"
        if not self.log.exists():
            folder.mkdir(parents=True, exist_ok=True)
            self._make()
        self.seconds: dict[str, float] = defaultdict(float)
        for seconds, test in re.findall(r"^([\d.]+)s \w+ +(\S.*)$", self.log.read_text(), re.MULTILINE):
            self.seconds[test] += float(seconds)

    def tests(self, file: str, lines: range) -> list[str]:
        """The tests that run one of the lines of a file of the package, the quick ones first."""
        from coverage import CoverageData

        data = CoverageData(basename=str(self.data))
        data.read()
        contexts = data.contexts_by_lineno(str(PACKAGE / file))
        found = {context.split("|")[0] for line in lines for context in contexts.get(line, ())} - {""}
        quick = sorted(found, key=lambda test: (self.seconds[test], test))[:MOST_TESTS]
        return [test.removeprefix(f"{TESTS.name}/") for test in quick]

    def _make(self) -> None:
        options = ["--cov=ndm_ct", "--cov-context=test", "--cov-report=", "--durations=0", "--durations-min=0", "-q"]
        options += ["-n", "0", "--dist", "no"]  # with workers the record would not say which test ran a line
        tests = [f"{TESTS.name}/{test}" for test in CORE_TESTS]
        result = subprocess.run(
            [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider", *tests], cwd=TESTS.parent,
            env=os.environ | {"COVERAGE_FILE": str(self.data), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if result.returncode:
            raise MutantError(f"the unbroken package fails its tests.\n{result.stdout}{result.stderr}")
        self.log.write_text(result.stdout)


def outcome(mutant: Mutant, lines: range, record: Record, reasons: dict[str, str]) -> str:
    """What became of a mutant: who noticed it, why it is equivalent, or SURVIVED."""
    if mutant.name in reasons:
        return f"equivalent: {reasons[mutant.name]}"
    tests = record.tests(mutant.file, lines)
    if not tests:
        return "SURVIVED: no test runs the line"
    try:
        return run(tests, Mutant(mutant.name, mutant.file, mutant.old, mutant.new, tests)) or "SURVIVED"
    except MutantError as error:  # code that cannot run at all is noticed too
        return f"noticed: {str(error).splitlines()[0][:100]}"
    except subprocess.TimeoutExpired:
        return "noticed: does not end"


def main(arguments: list[str] | None = None) -> int:
    """Run the mutants and print what became of each; 1 if more than 3 % survive without a reason."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="mutants (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time (default: %(default)s)")
    parser.add_argument(
        "--record", type=Path, default=TESTS.parent / "build" / "mutants",
        help="folder of the record of what tests run; delete it after the code has changed (default: %(default)s)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    known = tomllib.loads((TESTS / "equivalents.toml").read_text()).get("equivalent", [])
    reasons = {each["name"]: each["reason"] for each in known}
    chosen = random.Random(options.seed).sample(candidates(), options.count)
    record, survivors = Record(options.record), 0
    with ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda each: outcome(*each, record, reasons), chosen)
        for (mutant, _), result in zip(chosen, results, strict=True):
            survivors += result.startswith("SURVIVED")
            print(f"{mutant.name[:110]:110}  {result}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} random mutants noticed or equivalent.")
    return int(survivors > 0.03 * len(chosen))


if __name__ == "__main__":
    sys.exit(main())
