"""The committed measurements of ``benchmarks/results`` as pages: a hook of mkdocs, ``on_config`` and ``on_files``."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def tables() -> list[str]:
    """The Markdown files, relative to the folder of results."""
    return sorted(path.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("*.md"))


def on_config(config: Any) -> None:
    """Put the tables into the navigation."""
    (entry,) = (entry for entry in config.nav if "Measurements" in entry)
    entry["Measurements"] = ["results/index.md", *(f"results/{name}" for name in tables())]


def on_files(files: Files, config: Any) -> Files:
    """Add the files, and an index with the question of each benchmark."""
    readme = (RESULTS.parent / "README.md").read_text()
    files.append(File.generated(config, "results/index.md", content=f"{readme}\n## Tables\n\n{_list()}"))
    for path in sorted(RESULTS.rglob("*")):
        if path.suffix in {".md", ".csv", ".png"}:
            name = path.relative_to(RESULTS).as_posix()
            files.append(File.generated(config, f"results/{name}", abs_src_path=str(path)))
    return files


def _list() -> str:
    pages = [f"- [{name.removesuffix('.md')}]({name})\n" for name in tables()]
    folders = sorted(path.parent.name for path in RESULTS.rglob("results.csv"))
    return "".join(pages + [f"- {each}: [lines]({each}/results.csv), [picture]({each}/plot.png)\n" for each in folders])
