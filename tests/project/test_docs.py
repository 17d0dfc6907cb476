"""The code of the documentation runs, and prints what stands below it; the site's tools do what they say.

Trainings are cut short, and what such a page prints is then not compared.
"""

import ast
import contextlib
import importlib
import io
import os
import pkgutil
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from paths import ROOT, TESTS

import ndm_ct
from ndm_ct.cli import commands as cli
from ndm_ct.samplers import grids
from ndm_ct.samplers import sample as sampling

DOCS = ROOT / "docs"
PAGES = sorted(path.stem for path in DOCS.glob("*.md") if "```python" in path.read_text())
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)
TRAINED = re.compile(r"(\b(?:fit|alternate|NDMDensity)\(.*?\bsteps=)\d{3,}")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def assert_alike(printed: str, written: str) -> None:
    """The same words, and numbers that agree up to the rounding of another machine."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", written).split()
    for found, expected in zip(NUMBER.findall(printed), NUMBER.findall(written), strict=True):
        size = "e" in expected
        assert float(found) == pytest.approx(float(expected), rel=1.0 if size else 0.15, abs=0.0 if size else 0.011)


def test_commands_of_the_page_print_what_stands_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "command_line.md").read_text()
    shared = {}
    for code, _ in BLOCK.findall(text):
        exec(code, shared)
    (tmp_path / "wine.yaml").write_text("data: train.csv\nsteps: 2\n")
    commands = re.findall(r"^\$ ndm-ct (.*)\n((?:[^$`\n].*\n)*)", text, re.MULTILINE)
    assert len(commands) == 8
    for command, printed in commands:
        if "yaml" in command:
            pytest.importorskip("yaml")
        assert cli.main([*command.split(), "--quiet"]) == 0
        found = capsys.readouterr().out
        if printed:
            assert_alike(found, printed)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
def test_code_of_the_pages_runs(page, tmp_path, monkeypatch):
    text = (DOCS / f"{page}.md").read_text()
    for package in re.findall(r"^(?:from|import) (diffusers|pandas|zuko)\b", text, re.MULTILINE):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names, trained = {}, False
    for code, written in BLOCK.findall(text):
        trained = trained or bool(TRAINED.search(code))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(TRAINED.sub(r"\g<1>2", code), names)
        if written and not trained:
            assert_alike(printed.getvalue(), written)
        elif written:
            assert NUMBER.sub("#", printed.getvalue()).split() == NUMBER.sub("#", written).split()
        else:
            assert printed.getvalue() == ""


def test_names_in_the_pages_exist():
    """In tables too, whose code is not run."""
    text = "".join(path.read_text() for path in DOCS.glob("*.md"))
    modules = "ndm_ct|adapters|nn|objectives|presets|schedules|transforms"
    for name in set(re.findall(rf"(?<![\w./])(?:{modules})\.[\w.]+\w", text)):
        path = name if name.startswith("ndm_ct.") else f"ndm_ct.{name}"
        assert pkgutil.resolve_name(path) is not None
    for file, test in re.findall(r"`tests/([\w/]+\.py)::(\w+)`", text):
        assert f"def {test}(" in (TESTS / file).read_text(), test
    for method in re.findall(r'\bmethod="(\w+)"', text):
        assert method in sampling.METHODS, method
    for grid in re.findall(r'\bgrid="(\w+)"', text):
        assert grid in grids.GRIDS


def test_pages_with_code_are_those_that_have_some():
    without = {"comparison", "many_machines", "mathematics", "systems"}
    assert {path.stem for path in DOCS.glob("*.md")} - set(PAGES) == without


def test_names_in_docstrings_exist():
    """Also those of private functions, which the site does not show."""
    found = 0
    for name in ["ndm_ct", *(each.name for each in pkgutil.walk_packages(ndm_ct.__path__, "ndm_ct."))]:
        if name.endswith("__main__"):
            continue
        module = importlib.import_module(name)
        for owner, text in docstrings(ast.parse(Path(module.__file__).read_text())):
            for target in re.findall(r":(?:func|class|meth|mod):`~?\.?([^`]+)`", text):
                places = [target, f"{name}.{target}", f"{name}.{owner}.{target}"]
                places += [f"{name.rpartition('.')[0]}.{target}", f"ndm_ct.{target}"]
                assert any(resolves(place) for place in places), f"{name}, {owner}: {target}"
                found += 1
    assert found > 100


def docstrings(tree: ast.Module):
    """The docstrings of a module, its classes, methods and functions, each with the name of its class or function."""
    yield "", ast.get_docstring(tree) or ""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            for inner in (node, *(each for each in node.body if isinstance(each, ast.FunctionDef))):
                yield node.name, ast.get_docstring(inner) or ""


def resolves(path: str) -> bool:
    try:
        pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError):
        return False
    return path.startswith("ndm_ct")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built strictly without running examples."""
    pytest.importorskip("sphinx_gallery")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", out / "doctrees", DOCS, out / "html"]
    run = subprocess.run(command, env={**os.environ, "NDM_CT_GALLERY": "0"}, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    return out / "html"


def test_every_public_name_has_one_entry(site):
    lines = zlib.decompress((site / "objects.inv").read_bytes().split(b"zlib.\n", 1)[1]).decode().splitlines()
    kinds = ("py:module", "py:class", "py:exception", "py:function", "py:data")
    entries = [name for name, role, *_ in map(str.split, lines) if role in kinds]
    assert len(entries) == len(set(entries))
    for module in pkgutil.iter_modules(ndm_ct.__path__, "ndm_ct."):
        exported = getattr(importlib.import_module(module.name), "__all__", ())
        if module.name != "ndm_ct.cli" and exported:
            assert module.name in entries
            missing = [name for name in exported if not {f"ndm_ct.{name}", f"{module.name}.{name}"} & set(entries)]
            values = {id(pkgutil.resolve_name(entry)) for entry in entries if entry.startswith("ndm_ct.")}
            assert not [name for name in missing if id(pkgutil.resolve_name(f"{module.name}.{name}")) not in values]
    for name in set(ndm_ct.__all__):
        assert f"ndm_ct.{name}" in entries


def test_site_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        text = page.read_text()
        assert not re.findall(r"<(?:script|img|iframe)[^>]* src=.https?:|<link[^>]* href=.https?:", text), page
        for script in re.findall(r"<script[^>]* src=\"([^\"?]+)", text):
            assert (page.parent / script).exists(), (page, script)
        if 'class="math ' in text:
            assert "mathjax/tex-chtml.js" in text
    assert not re.search(r"@import|url\(.?https?:", "".join(path.read_text() for path in site.rglob("*.css")))
    assert (site / "searchindex.js").stat().st_size > 10_000


def test_every_example_is_in_the_gallery(site):
    gallery = (site / "gallery" / "index.html").read_text()
    assert "SyntaxError" not in gallery
    scripts = [path.stem for path in (ROOT / "examples").glob("*.py")]
    assert len(scripts) > 7
    for script in scripts:
        assert f'href="{script}.html' in gallery


def test_measurements_are_named_by_their_question(site):
    measured = [path.name for path in (ROOT / "benchmarks" / "results").iterdir() if path.is_dir()]
    assert len(measured) > 7
    pages = [(site / "results" / f"{name}.html").read_text() for name in measured]
    titles = [re.search(r"<title>(.*?) - ndm_ct", page)[1] for page in pages]
    assert len(set(titles)) == len(titles)
    assert all(title.endswith("?") for title in titles)
    for page in [*DOCS.glob("*.md"), ROOT / "README.md"]:
        for link in re.findall(r"\]\(((?:\.\./)?benchmarks/[^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), (page.name, link)
