"""Models in folders with their cards, and what would be sent to the Hub; nothing here needs a network."""

import json
import sys
from pathlib import Path

import pytest
import torch

import ndm_ct


def model(**options):
    torch.manual_seed(0)
    return ndm_ct.NDM(ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2, width=8)), (2,), **options)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def front(card):
    """The entries at the top of a card."""
    return dict(line.split(": ", 1) for line in card.split("---\n")[1].splitlines())


@pytest.fixture(scope="module")
def evaluation():
    return ndm_ct.evaluate(
        model(), torch.randint(0, 8, (40, 2)), quantisation=8, bound="elbo", samples=2, progress=False
    )  # fmt: skip


def test_a_folder_holds_the_model_and_a_card_with_the_numbers(tmp_path, evaluation):
    made = model()
    made.save_pretrained(tmp_path / "a" / "b", evaluation=evaluation, data="made-up levels")
    found = ndm_ct.NDM.from_pretrained(tmp_path / "a" / "b")
    assert same(found, made)
    assert not found.training
    text = (tmp_path / "a" / "b" / "README.md").read_text()
    assert f"| {evaluation.nll:.6g} ± {evaluation.stderr:.2g} |" in text
    assert f"| bits per dimension | {evaluation.bits_per_dim:.6g} ± {evaluation.bits_stderr:.2g} |" in text
    assert "| rows scored | 40 |" in text
    assert "## Evaluation on made-up levels" in text
    entries = front(text)
    assert json.loads(entries["library_name"]) == "ndm_ct"
    (result,) = json.loads(entries["model-index"])[0]["results"]
    assert {each["type"]: each["value"] for each in result["metrics"]} == {
        "nll": evaluation.nll, "nll_stderr": evaluation.stderr, "bits_per_dim": evaluation.bits_per_dim,
    }  # fmt: skip
    made.save_pretrained(tmp_path / "a" / "b")
    assert "Evaluation" not in (tmp_path / "a" / "b" / "README.md").read_text()


def test_the_card_is_valid_for_the_hub(tmp_path, evaluation):
    hub = pytest.importorskip("huggingface_hub")
    model().save_pretrained(tmp_path, evaluation=evaluation, data="made-up levels")
    loaded = hub.ModelCard.load(tmp_path / "README.md")
    assert loaded.data.library_name == "ndm_ct"
    assert {each.metric_type: each.metric_value for each in loaded.data.eval_results}["nll"] == evaluation.nll


def test_networks_of_ones_own_are_passed_in(tmp_path):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, z, t):
            return self.layer(z)

    made = ndm_ct.NDM(Own(), (2,))
    made.save_pretrained(str(tmp_path))
    assert same(ndm_ct.NDM.from_pretrained(str(tmp_path), predictor=Own()), made)
    with pytest.raises(ValueError, match="predictor"):
        ndm_ct.NDM.from_pretrained(tmp_path)


def test_what_cannot_be_is_named(tmp_path, monkeypatch):
    for name in ("nowhere", "/no/such/folder", "./model", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no folder, and no model of the Hugging Face Hub"):
            ndm_ct.NDM.from_pretrained(name)
    with pytest.raises(TypeError, match=r"evaluation must be the result of .*, got float"):
        model().save_pretrained(tmp_path / "x", evaluation=1.0)
    assert not (tmp_path / "x").exists()
    with pytest.raises(FileNotFoundError):
        ndm_ct.NDM.from_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: ndm_ct.NDM.from_pretrained("owner/name"), lambda: model().push_to_hub("owner/name")):
        with pytest.raises(ImportError, match=r'pip install "ndm-ct\[hub\]"'):
            call()


def test_pushed_and_fetched_as_a_folder(tmp_path, monkeypatch, evaluation):
    """The package's own mix-in, with a folder in the place of the Hub."""
    hub = pytest.importorskip("huggingface_hub")
    made, sent = model(), {}

    def upload(self, *, repo_id, folder_path, **options):
        for file in Path(folder_path).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        sent.update(options, repo_id=repo_id)
        return "https://example.org/commit"

    monkeypatch.setattr(
        hub.HfApi, "create_repo", lambda self, repo_id, **options: hub.RepoUrl(f"https://hf.co/{repo_id}")
    )
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload)
    assert made.push_to_hub("owner/name", evaluation=evaluation, commit_message="first") == "https://example.org/commit"
    assert sent["repo_id"] == "owner/name"
    assert sent["commit_message"] == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "model.safetensors"]
    assert f"{evaluation.nll:.6g}" in (tmp_path / "README.md").read_text()
    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, options["revision"]))
        return str(tmp_path / filename)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    assert same(ndm_ct.NDM.from_pretrained("owner/name", revision="v1"), made)
    assert asked == [("owner/name", "v1")]
