"""Where the tests and the project are, for tests that read files or start processes."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
