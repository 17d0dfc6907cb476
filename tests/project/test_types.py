"""A type checker knows what the public functions return."""

import pytest
from paths import ROOT, TESTS


def test_return_types_depend_on_return_info(tmp_path):
    api = pytest.importorskip("mypy.api")
    source = str(TESTS / "project" / "types_of_returns.py")
    out, error, code = api.run(["--config-file", str(ROOT / "pyproject.toml"), source])
    assert code == 0, out + error
