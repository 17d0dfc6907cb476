"""The scripts: one per question, none imports another, and every command that is written down is accepted."""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from paths import ROOT

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
FOLDER = ROOT / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
COMMAND = re.compile(r"python benchmarks/(\w+)\.py((?:[^`\n\\#{]|\\\n)*)")


def quoted():
    """Every command in scripts, documentation and results."""
    texts = [*FOLDER.rglob("*.py"), *FOLDER.rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    found = {match.groups() for path in texts for match in COMMAND.finditer(path.read_text())}
    return sorted(found)


def test_a_script_is_short_and_imports_no_other():
    assert len(SCRIPTS) <= 14
    for name in SCRIPTS:
        text = (FOLDER / f"{name}.py").read_text()
        assert len(text.splitlines()) <= 250, name
        tree = ast.parse(text)
        imported = {node.module.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {each.name for node in ast.walk(tree) if isinstance(node, ast.Import) for each in node.names}
        assert not imported & set(SCRIPTS), name
        assert not [node for node in tree.body if isinstance(node, ast.Try)], name


def test_no_function_is_long():
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.body[0].lineno < 50, (path.name, node.name)


def test_the_commands_of_every_script_are_written_down():
    assert {name for name, _ in quoted()} == set(SCRIPTS)


@pytest.mark.parametrize(("name", "arguments"), quoted())
def test_a_written_command_is_accepted(name, arguments, tmp_path, monkeypatch):
    module, words = importlib.import_module(name), shlex.split(arguments.replace("\\\n", " "))
    if name == "pictures":  # it takes what paper_claims.py has trained
        for model in ("diffusion", "ndm-x"):
            file = tmp_path / f"runs/paper_claims/small/cells/digits-{model}-0/model.safetensors"
            file.parent.mkdir(parents=True)
            file.touch()
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/cifar10.npz").touch()
    monkeypatch.chdir(tmp_path)
    assert module.parse(words)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).parse(["--help"])
    assert ended.value.code == 0
    assert f"python benchmarks/{name}.py" in capsys.readouterr().out


def test_a_script_runs_from_anywhere(tmp_path):
    command = [sys.executable, str(FOLDER / "steps_vs_fid.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "--samplers" in done.stdout


def report_of(folder):
    """The content of results.json, with a provenance."""
    report = json.loads((folder / "results.json").read_text())
    assert report["versions"]["torch"]
    assert report["versions"]["ndm_ct"]
    assert (folder / "results.md").read_text().startswith("# ")
    return report


def test_a_look_at_the_cost_of_sampling(tmp_path):
    sampling_cost = importlib.import_module("sampling_cost")
    sampling_cost.main(["--repeats", "1", "--steps", "4", "--rows", "2", "--out", str(tmp_path)])
    results = report_of(tmp_path)["results"]
    names = [row["sampler"] for row in results["perceptron"]]
    assert names == [*sampling_cost.NAMES, sampling_cost.TORCHSDE]
    assert all(row["walk_ms"] > 0.0 for rows in results.values() for row in rows)
    assert (tmp_path / "plot.png").stat().st_size > 5_000


def test_a_look_at_special_cases_is_kept(tmp_path, monkeypatch):
    special_cases = importlib.import_module("special_cases")
    arguments = ["--only", "vdm,edm", "--steps", "4", "--rows", "20", "--out", str(tmp_path / "out")]
    arguments += ["--cache", str(tmp_path / "cache")]
    first = special_cases.main(arguments)
    assert [row["preset"] for row in report_of(tmp_path / "out")["results"]] == ["vdm", "edm"]
    monkeypatch.setattr(special_cases, "measure", None)
    assert special_cases.main(arguments) == json.loads(json.dumps(first))


def test_a_look_at_posteriors_is_kept(tmp_path, monkeypatch):
    module = importlib.import_module("posterior")
    arguments = ["--dimensions", "2", "--problems", "2", "--samples", "16", "--steps", "12"]
    arguments += ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    first = module.main(arguments)
    assert [row["method"] for row in report_of(tmp_path / "out")["results"]] == list(module.METHODS)
    assert (tmp_path / "out" / "plot.png").stat().st_size > 5_000
    monkeypatch.setattr(module, "measure", None)
    assert module.main(arguments)["results"] == json.loads(json.dumps(first))["results"]


def test_a_posterior_of_the_benchmark_is_the_law_over_the_evidence():
    """Bayes' rule at two points: prior times likelihood over the evidence."""
    module = importlib.import_module("posterior")
    model, mask, y = module.mixture(3), torch.tensor([True, False, True]), torch.tensor([0.3, -0.5]).double()
    law, evidence = module.exact(model, mask, y)
    x = torch.tensor([[0.1, 0.2, 0.3], [0.5, -1.0, 0.0]]).double()
    prior, posterior = (each.marginals.log_prob(x, torch.zeros(1).double()) for each in (model, law))
    seen = torch.distributions.Normal(x[:, mask], module.NOISE).log_prob(y).sum(1)
    torch.testing.assert_close(posterior, prior + seen - evidence, atol=2e-3, rtol=0.0)  # noise at t_min


def test_a_look_at_the_audit_is_kept(tmp_path, monkeypatch):
    module = importlib.import_module("audit")
    protocols = ["ndm_ct", "undivided", "few steps"]
    arguments = [
        "--laws",
        "checkers",
        "--repeats",
        "8",
        "--rows",
        "2",
        "--protocols",
        *protocols,
        "--out",
        str(tmp_path),
    ]
    first = module.main(arguments)
    found = {name: verdicts[0] for name, verdicts in report_of(tmp_path)["results"].items()}
    assert list(found) == protocols
    assert abs(found["ndm_ct"]["bits"]) < 0.005
    assert found["undivided"]["bits"] < -0.5  # four probes summed: far too good
    assert found["ndm_ct"]["evaluations"] > found["few steps"]["evaluations"] == 8.0
    assert (tmp_path / "plot.png").stat().st_size > 5_000
    monkeypatch.setattr(module.ndm_ct, "audit", None)
    assert module.main(arguments)["results"] == first["results"]


def test_a_look_at_the_choice_of_times(tmp_path):
    time_samplers = importlib.import_module("time_samplers")
    time_samplers.main(["--networks", "digits", "--batches", "12", "--batch", "8", "--out", str(tmp_path)])
    results = report_of(tmp_path)["results"]["digits"]
    assert list(results) == ["uniform in gamma", "low discrepancy", "loss history", "learned buckets"]
    assert results["uniform in gamma"]["variance_ratio"] == 1.0
    assert results["low discrepancy"]["variance_ratio"] < 1.0


def test_a_look_at_the_cost_of_a_likelihood(tmp_path):
    likelihood_cost = importlib.import_module("likelihood_cost")
    arguments = ["--networks", "digits", "--rows", "2", "--repeats", "8", "--only", "quadrature"]
    tables = likelihood_cost.main([*arguments, "--out", str(tmp_path)])["digits"]
    assert [m.method for m in tables] == ["ndm_ct quadrature"] * 5
    assert min(m.rmse for m in tables) < 1.0 < min(m.vjps for m in tables)
    assert len(report_of(tmp_path)["steppers"]["digits"]) == 6


def test_exact_values_agree_with_the_committed_ones():
    """By fewer nodes, for two rows of the digits."""
    estimates, networks = (importlib.import_module(f"bench.{name}") for name in ("estimates", "networks"))
    model, x = networks.load("digits"), networks.NETWORKS["digits"].test_rows(16)
    committed = estimates.reference("digits", model, x, 64)
    found = estimates.exact(model, x[:2], 24)
    assert float((found - committed[:2]).abs().max()) < 0.05
