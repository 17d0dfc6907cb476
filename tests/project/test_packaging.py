"""The metadata agree: versions of Python and of the package, the source distribution, the commands of the texts."""

import contextlib
import io
import re
import tomllib

import matplotlib.image
import pytest
import torch
from paths import ROOT

import ndm_ct

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = {"lint-imports": "import-linter"}
"""The package of a command, where it has another name."""


def test_versions_of_python_agree():
    """The classifiers, the jobs of the continuous integration, the lowest version and the tools name the same ones."""
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job, pairs = workflow["jobs"]["all"], workflow["jobs"]["pairs"]
    matrix = job["strategy"]["matrix"]["python"]
    classified = [
        entry.rsplit(" ", 1)[1] for entry in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", entry)
    ]
    assert matrix == classified
    assert PROJECT["project"]["requires-python"] == f">={matrix[0]}"
    assert PROJECT["tool"]["mypy"]["python_version"] == matrix[0]
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + matrix[0].replace(".", "")
    assert f"({matrix[0]} to {matrix[-1]})" in (ROOT / ".ci" / "run").read_text()
    (step,) = [step for step in job["steps"] if "run" in step]
    assert step == {"run": ".ci/run", "env": {"PYTHON": "python${{ matrix.python }}"}}
    ends = {entry["versions"]: entry["python"] for entry in pairs["strategy"]["matrix"]["include"]}
    assert ends == {"lowest": matrix[0], "newest": matrix[-1]}
    assert pairs["steps"][-1]["run"] == ".ci/pair ${{ matrix.versions }}"


def test_versions_of_the_package_agree():
    """The version stands in the package alone; citation and changelog name it."""
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "ndm_ct/_core/versions.py"
    assert f"\nversion: {ndm_ct.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {ndm_ct.__version__} " in (ROOT / "CHANGELOG.md").read_text()


def test_every_dependency_has_a_lower_bound():
    """``.ci/pair lowest`` installs these bounds."""
    extras = PROJECT["project"]["optional-dependencies"]
    for entry in (*PROJECT["project"]["dependencies"], *extras["demo"], *extras["files"], *extras["test"]):
        assert entry.startswith("ndm-ct[") or re.match(r"[\w-]+>=[\d.]+(,|$)", entry), entry


def test_the_source_distribution_holds_what_is_there():
    """Every file or folder that it names exists. A build would silently leave out the others."""
    for pattern in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]:
        assert list(ROOT.glob(pattern.lstrip("/"))), pattern


def test_commands_for_contributors_are_those_of_the_continuous_integration():
    text, run = (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / ".ci" / "run").read_text()
    commands = re.search(r"```\n(.*?)```", text, re.DOTALL)[1].splitlines()
    setup, tests, checks = (line.split("#")[0].strip() for line in commands)
    assert re.search(r'-e "?\.\[dev\]', setup)
    assert setup.removeprefix("pip install ") in run
    assert tests == "python -m pytest -n auto"
    installed = " ".join(PROJECT["project"]["optional-dependencies"]["dev"])
    for check in checks.split(" && "):
        assert re.search(rf"^{re.escape(check)}$", run, re.MULTILINE), check
        command = check.split()[0]
        assert re.search(rf"\b{PACKAGES.get(command, command)}\b", installed), command


@pytest.mark.parametrize("script", ["run", "pair"])
def test_files_that_the_continuous_integration_names_exist(script):
    named = re.findall(r"(?<![\w/])tests/[\w/]+(?:\.py)?", (ROOT / ".ci" / script).read_text())
    assert len(named) > 3
    for name in named:
        assert (ROOT / name).exists(), name


def test_code_of_the_readme_runs(tmp_path, monkeypatch):
    """Blocks share their names, as in a notebook; trainings are cut short."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    with contextlib.redirect_stdout(io.StringIO()):
        for block in blocks:
            exec(re.sub(r"steps=2000", "steps=3, progress=False", block), names)
    assert (tmp_path / "ring.safetensors").exists()
    assert names["info"].nfe == 20


@pytest.mark.skipif(not (ROOT / "benchmarks" / "results").exists(), reason="a source distribution has no results")
def test_files_named_in_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(((?!https?:)[^)]+)\)", text)
    assert sum(link.endswith(".png") for link in links) == 3
    for name in {*links, *re.findall(r"\b((?:examples|benchmarks|tests)/[\w/]+\.py)\b", text)}:
        assert (ROOT / name).exists(), name
    for link in links:
        if link.endswith(".png"):
            assert matplotlib.image.imread(ROOT / link)[..., :3].std() > 0.02


def test_files_of_the_code_map_exist():
    """CONTRIBUTING says which files a new sampler, schedule or command touches."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text[text.index("| To add") :]
    named = re.findall(r"`((?:ndm_ct|tests|docs|benchmarks|examples)/[\w/.]+)`", table)
    assert len(named) > 15
    for name in named:
        assert (ROOT / name).exists(), name
