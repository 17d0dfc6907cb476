"""The code of the documentation runs, and prints what stands below it; the site's tools do what they say.

Trainings are cut short, and what such a page prints is then not compared.
"""

import contextlib
import io
import re
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(path.stem for path in DOCS.glob("*.md") if "```python" in path.read_text())
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)
TRAINED = re.compile(r"\bsteps=(\d{3,})")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def assert_alike(printed: str, written: str) -> None:
    """The same words, and numbers that agree to what another machine's rounding makes of them."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", written).split()
    for found, expected in zip(NUMBER.findall(printed), NUMBER.findall(written), strict=True):
        assert float(found) == pytest.approx(float(expected), rel=0.15, abs=0.011), printed


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
def test_code_of_the_pages_runs(page, tmp_path, monkeypatch):
    text = (DOCS / f"{page}.md").read_text()
    if "from diffusers" in text:
        pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    names, trained = {}, False
    for code, written in BLOCK.findall(text):
        trained = trained or bool(TRAINED.search(code))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(TRAINED.sub("steps=2", code).replace("fit(model, ", "fit(model, progress=False, data="), names)
        if written and not trained:
            assert_alike(printed.getvalue(), written)
        elif written:
            assert NUMBER.sub("#", printed.getvalue()).split() == NUMBER.sub("#", written).split()
        else:
            assert printed.getvalue() == ""


def test_pages_with_code_are_those_that_have_some():
    assert PAGES == ["error_bars", "index", "migrating"]
