"""What the package says of itself agrees: Python's versions, the source distribution, the commands of its texts."""

import re
import tomllib

import pytest
from paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = {"lint-imports": "import-linter"}
"""Where a command comes from, if its package has another name."""


def test_versions_of_python_agree():
    """Classifiers, the matrix of the continuous integration, the least version, and the tools'."""
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
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


def test_the_source_distribution_holds_what_is_there():
    """Every file or folder that it names exists, or a build would leave it out without a word."""
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
