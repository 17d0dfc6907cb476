"""Break the code on purpose and see whether the tests notice: ``python tests/mutants.py [--list] [--only NAME]``.

Every mutant of ``mutants.toml`` is one exact textual replacement, made in a copy of the package in a temporary folder;
the tests it names then run against the copy. A mutant is killed when one of them fails with an assertion or an error
that correct code could have. It survives when all of them pass. A replacement that does not apply exactly once, a test
that is not found, and a mutant that is not even valid code are errors of this script, never kills. The unbroken copy
must pass every test that is asked.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "ndm_ct"
TIME_LIMIT = 600.0

# Imports the package before pytest can put another one first, and makes sure that it is the copy.
CHILD = """
import pathlib, sys
copy = pathlib.Path(sys.argv[1]).resolve()
sys.path.insert(0, str(copy))
import ndm_ct
where = pathlib.Path(ndm_ct.__file__).resolve()
assert where.is_relative_to(copy), f"tests would run against {where}, not against the copy"
import pytest
sys.exit(int(pytest.main(sys.argv[2:])))
"""

# What a typing mistake in a mutant would raise; a kill by one of these says nothing about the tests.
NOT_A_KILL = ("NameError", "UnboundLocalError", "SyntaxError", "ImportError", "AttributeError", "TypeError")


class MutantError(Exception):
    """The script, not the package, is at fault."""


@dataclass(frozen=True)
class Mutant:
    """One way to be wrong.

    Args:
        name: what is wrong.
        file: file of the package.
        old: text that occurs exactly once in it.
        new: what replaces it.
        tests: ids of pytest, relative to this folder.
    """

    name: str
    file: str
    old: str
    new: str
    tests: list[str]


MUTANTS = tuple(Mutant(**each) for each in tomllib.loads((TESTS / "mutants.toml").read_text())["mutant"])


def mutated(mutant: Mutant, package: Path) -> str:
    """The mutant's file in ``package`` after the replacement."""
    source = (package / mutant.file).read_text()
    count = source.count(mutant.old)
    if count != 1:
        raise MutantError(f"{mutant.name}: {mutant.old!r} occurs {count} times in {mutant.file}, expected once.")
    return source.replace(mutant.old, mutant.new)


def run(tests: Iterable[str], mutant: Mutant | None) -> str | None:
    """Run tests against a copy of the package; the first failing test, or None if all pass.

    Raises:
        MutantError: pytest found no such test, or could not run it.
    """
    what = "the unbroken package" if mutant is None else mutant.name
    ids = [f"{TESTS}/{test}" for test in tests]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(PACKAGE, copy / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
        if mutant is not None:
            (copy / PACKAGE.name / mutant.file).write_text(mutated(mutant, copy / PACKAGE.name))
        environment = os.environ | {
            "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "1000", "PYTEST_ADDOPTS": "",
            "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",  # several run side by side
        }  # fmt: skip
        options = ["-x", "-q", "--tb=no", "-rf", "-p", "no:cacheprovider", f"--rootdir={TESTS.parent}"]
        result = subprocess.run(
            [sys.executable, "-c", CHILD, str(copy), *options, *ids], cwd=TESTS.parent, env=environment,
            capture_output=True, text=True, timeout=TIME_LIMIT, check=False,
        )  # fmt: skip
    if result.returncode == 0:
        return None
    failed = re.search(r"^FAILED \S*?test_(\w+)\.py::(.*?)(?: - (.*))?$", result.stdout, re.MULTILINE)
    if result.returncode != 1 or failed is None:
        raise MutantError(f"{what}: pytest ended with {result.returncode}.\n{result.stdout}{result.stderr}")
    file, test, reason = failed.groups(default="")
    if mutant is not None and reason.startswith(NOT_A_KILL):
        raise MutantError(f"{what}: {test} failed for {reason!r}, which is a mistake in the mutant.")
    return f"{file}::{test}" if mutant is not None else f"{file}::{test} ({reason})"


def timed(mutant: Mutant) -> tuple[str | None, float]:
    """What kills the mutant, and after how many seconds."""
    start = time.monotonic()
    return run(mutant.tests, mutant), time.monotonic() - start


def main(arguments: list[str] | None = None) -> int:
    """Run the mutants asked for and print the table; 1 if one survives."""
    parser = argparse.ArgumentParser(description="Break the package on purpose and see whether the tests notice.")
    parser.add_argument("--only", metavar="NAME", action="append", help="run this mutant (may be repeated)")
    parser.add_argument("--list", action="store_true", help="print the names and run nothing")
    parser.add_argument("--jobs", metavar="N", type=int, default=os.cpu_count(), help="mutants at a time (%(default)s)")
    options = parser.parse_args(arguments)
    names = [mutant.name for mutant in MUTANTS]
    if len(set(names)) != len(names):
        raise MutantError("two mutants have the same name.")
    unknown = set(options.only or []) - set(names)
    if unknown:
        parser.error(f"no mutant is called {', '.join(map(repr, sorted(unknown)))}; see --list")
    chosen = [mutant for mutant in MUTANTS if not options.only or mutant.name in options.only]
    if options.list:
        print("\n".join(mutant.name for mutant in chosen))
        return 0
    for mutant in chosen:  # all must apply, before any time is spent
        mutated(mutant, PACKAGE)
    failed = run(sorted({test for mutant in chosen for test in mutant.tests}), None)
    if failed is not None:
        raise MutantError(f"the unbroken package fails {failed}.")
    width = max(len(mutant.name) for mutant in chosen)
    print(f"{'mutant':{width}}  {'file':13}  {'seconds':>7}  killed by")
    survivors = 0
    pool = ThreadPoolExecutor(options.jobs)
    try:
        for mutant, (killer, seconds) in zip(chosen, pool.map(timed, chosen), strict=True):
            survivors += killer is None
            print(f"{mutant.name:{width}}  {mutant.file:13}  {seconds:7.1f}  {killer or 'SURVIVED'}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants killed.")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
