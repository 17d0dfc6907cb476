"""The code of the documentation runs, and prints what stands below it; the site's tools do what they say.

Trainings are cut short, and what such a page prints is then not compared.
"""

import contextlib
import importlib
import inspect
import io
import pkgutil
import re
import sys

import pytest
from paths import ROOT, TESTS

from ndm_ct.cli import commands as cli
from ndm_ct.samplers import grids
from ndm_ct.samplers import sample as sampling

DOCS = ROOT / "docs"
PAGES = sorted(path.stem for path in DOCS.glob("*.md") if "```python" in path.read_text())
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)
TRAINED = re.compile(r"\bsteps=(\d{3,})")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def assert_alike(printed: str, written: str) -> None:
    """The same words, and numbers that agree to what another machine's rounding makes of them."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", written).split()
    for found, expected in zip(NUMBER.findall(printed), NUMBER.findall(written), strict=True):
        size = "e" in expected
        assert float(found) == pytest.approx(float(expected), rel=1.0 if size else 0.15, abs=0.0 if size else 0.011)


def test_commands_of_the_page_print_what_stands_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "command_line.md").read_text()
    exec(BLOCK.search(text)[1], {})
    (tmp_path / "wine.yaml").write_text("data: train.csv\nsteps: 2\n")
    commands = re.findall(r"^\$ ndm-ct (.*)\n((?:[^$`\n].*\n)*)", text, re.MULTILINE)
    assert len(commands) == 5
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
    for package in re.findall(r"^(?:from|import) (diffusers|zuko)\b", text, re.MULTILINE):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names, trained = {}, False
    for code, written in BLOCK.findall(text):
        trained = trained or bool(TRAINED.search(code))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(TRAINED.sub("steps=2", code), names)
        if written and not trained:
            assert_alike(printed.getvalue(), written)
        elif written:
            assert NUMBER.sub("#", printed.getvalue()).split() == NUMBER.sub("#", written).split()
        else:
            assert printed.getvalue() == ""


def test_names_in_the_pages_exist():
    """In tables too, whose code is not run."""
    text = "".join(path.read_text() for path in DOCS.glob("*.md"))
    modules = "ndm_ct|adapters|nn|objectives|presets|schedules"
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
    assert PAGES == ["command_line", "error_bars", "index", "migrating"]


@pytest.fixture
def tool(monkeypatch):
    """A module of docs/, which import each other."""
    pytest.importorskip("mkdocstrings_handlers")
    monkeypatch.syspath_prepend(DOCS)
    yield importlib.import_module
    for name in ("rst", "reference", "gallery", "results"):
        sys.modules.pop(name, None)


def test_docstrings_become_markdown(tool):
    text = r"""Sum :math:`a |
        b`, see :func:`f`.

    .. math::
        a &= b, \\
        c &= d

    =====  ======
    name   what
    =====  ======
    ``a``  :math:`|a|`
           more
    ``b``
    =====  ======

    References:
        One, A long title that goes on and on and on until the line that it stands in is full to the very end, and so on
        and on, https://arxiv.org/abs/1
        Two, https://arxiv.org/abs/2
    """
    found = tool("rst").markdown(inspect.cleandoc(text))
    assert found.startswith(r"Sum \(a | b\), see `f`.")
    assert "\\[\n\\begin{aligned}\na &= b, \\\\\nc &= d\n\\end{aligned}\n\\]\n" in found
    assert r"| ``a`` | \(\vert a\vert\) more |" in found
    assert "| name | what |\n| --- | --- |\n" in found
    assert found.endswith("and on, <https://arxiv.org/abs/1>\n- Two, <https://arxiv.org/abs/2>\n")
    with pytest.raises(ValueError, match="leaves its column"):
        tool("rst").markdown("=  =\nab c\n=  =\n")


def test_docstrings_of_the_library_are_converted_whole(tool):
    """Every name in them exists, and nothing is left that only Sphinx would understand."""
    rst, griffe = tool("rst"), tool("griffe")
    extensions = griffe.load_extensions(rst.Markdown)
    package = griffe.load("ndm_ct", search_paths=[str(DOCS.parent)], extensions=extensions)
    texts = [each.docstring.value for each in rst.objects(package) if each.docstring]
    assert len(texts) > 300
    for text in texts:
        assert not re.search(
            r":(math|func|class|meth|mod|attr|data|ref):`|^ *\.\. [a-z-]+::|^ *==+  ", text, re.MULTILINE
        )
    loglik = package["likelihood.loglik"].docstring.value
    assert r"\(\log p_{t_{min}}\) of the probability flow" in loglik
    assert "[`LikelihoodInfo`][ndm_ct.likelihood.LikelihoodInfo]" in loglik
    assert "[`bits_per_dim`]" not in package["cli.main"].docstring.value


def test_every_module_has_one_page(tool):
    names = [name for group in tool("reference").modules().values() for name in group]
    assert len(set(names)) == len(names)
    found = {
        path.stem for path in (DOCS.parent / "ndm_ct").iterdir() if path.stem[0] != "_" and path.name != "py.typed"
    }
    assert found - set(names) == {"cli", "demo"}


def test_every_example_is_in_the_gallery_and_changes_are_seen(tool, tmp_path, monkeypatch):
    monkeypatch.delenv("NDM_CT_GALLERY", raising=False)
    gallery = tool("gallery")
    scripts = gallery.examples()
    assert {path.stem for path in scripts} == {path.stem for path in (DOCS.parent / "examples").glob("*.py")} - {
        "common"
    }
    assert set(gallery.ARGUMENTS) == {path.stem for path in scripts}
    script = tmp_path / "an_example.py"
    script.write_text("import pathlib, sys; pathlib.Path(sys.argv[2], 'a.png').write_text('1')")
    monkeypatch.setattr(gallery, "KEPT", tmp_path / "kept")
    picture = gallery.made(script) / "a.png"
    picture.write_text("kept")
    assert gallery.made(script).joinpath("a.png").read_text() == "kept"
    script.write_text(script.read_text() + "  # changed")
    monkeypatch.setenv("NDM_CT_GALLERY", "0")
    assert gallery.made(script).joinpath("a.png").read_text() == "kept"
    monkeypatch.delenv("NDM_CT_GALLERY")
    assert gallery.made(script).joinpath("a.png").read_text() == "1"
    script.write_text("raise ValueError('no')")
    with pytest.raises(tool("mkdocs.exceptions").PluginError, match="ValueError: no"):
        gallery.made(script)
