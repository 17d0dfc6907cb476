"""The gallery: every example, run when the site is built, with its pictures, what it read off them, and its source.

A hook of mkdocs: ``on_config`` fills the entry "Gallery" of the navigation, ``on_files`` runs the examples and writes
the pages. An example runs again only if it, what examples share, or the library has changed; its files lie in
``build/gallery``. All of them take about five minutes on one CPU core. ``NDM_CT_GALLERY=0 mkdocs build`` runs none and
shows what an earlier build left.
"""

import ast
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import rst
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "build" / "gallery"

ARGUMENTS = {
    "likelihood_solvers": "",
    "sampling_solvers": "",
    "sde_against_ode": "",
    "time_grids": "",
    "compression": "",
    "interpolation": "",
    "out_of_distribution": "--network digits",
    "diffusers_likelihood": "--steps 200 --rows 8",
}
"""What examples run with, in the order of the gallery. One that is not here comes last and runs with its defaults."""

INTRODUCTION = """
Each example is one script in `examples/`; it answers one question, measures the answer and draws it. The numbers and
pictures here were made when this site was built, with one thread.
"""

LIMIT = 600
"""Seconds for one example."""

_COMMANDS = re.compile(r"(?:^    python .*\n)+", re.MULTILINE)

log = logging.getLogger("mkdocs.hooks.gallery")


def examples() -> list[Path]:
    """The scripts, in the order of the gallery."""
    order = list(ARGUMENTS)
    found = [path for path in (ROOT / "examples").glob("*.py") if "def main(" in path.read_text()]
    return sorted(found, key=lambda path: (order.index(path.stem) if path.stem in order else len(order), path.stem))


def on_config(config: Any) -> None:
    """Put the pages into the navigation."""
    (entry,) = (entry for entry in config.nav if "Gallery" in entry)
    entry["Gallery"] = ["gallery/index.md", *(f"gallery/{path.stem}.md" for path in examples())]


def on_files(files: Files, config: Any) -> Files:
    """Run what has changed and write the pages."""
    index = f"# Gallery\n\n{INTRODUCTION}\n"
    for script in examples():
        folder = made(script)
        pictures = sorted(folder.glob("*.png"), key=lambda picture: (picture.stem != script.stem, picture.stem))
        for picture in pictures:
            files.append(File.generated(config, f"gallery/{picture.name}", abs_src_path=str(picture)))
        title, _, text = ast.get_docstring(ast.parse(script.read_text())).partition("\n")
        page = _page(script, title, text, folder, pictures)
        files.append(File.generated(config, f"gallery/{script.stem}.md", content=page))
        shown = f"[![{title}]({pictures[0].name}){{ width=480 }}]({script.stem}.md)\n\n" if pictures else ""
        index += f"## [{title}]({script.stem}.md)\n\n{shown}"
    files.append(File.generated(config, "gallery/index.md", content=index))
    return files


def made(script: Path) -> Path:
    """The folder with the files of an example, run if they are not there or older than what they come from."""
    folder = KEPT / script.stem
    stamp, digest = folder / "digest", _digest(script)
    if (stamp.exists() and stamp.read_text() == digest) or os.environ.get("NDM_CT_GALLERY") == "0":
        return folder
    command = [sys.executable, str(script), *ARGUMENTS.get(script.stem, "").split(), "--out", str(folder)]
    log.info("Running %s", " ".join(command[1:]))
    start = time.monotonic()
    settings = {"OMP_NUM_THREADS": "1", **os.environ, "MPLBACKEND": "Agg"}
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    run = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=settings, cwd=ROOT, check=False)
    if run.returncode != 0:
        raise PluginError(f"{script.name} failed:\n{run.stderr[-2000:]}")
    stamp.write_text(digest)
    log.info("%s took %.0f s", script.name, time.monotonic() - start)
    return folder


def _digest(script: Path) -> str:
    """Of everything the result depends on, but the machine and the versions of packages."""
    shared = [ROOT / "examples" / "common.py", *(ROOT / "benchmarks" / "bench").glob("*.py")]
    weights = sorted((ROOT / "benchmarks" / "weights").glob("*.safetensors"))
    sources = [script, *sorted(shared), *weights, *sorted((ROOT / "ndm_ct").rglob("*.py"))]
    together = hashlib.sha256(ARGUMENTS.get(script.stem, "").encode())
    for path in sources:
        together.update(path.read_bytes())
    return together.hexdigest()


def _page(script: Path, title: str, text: str, folder: Path, pictures: list[Path]) -> str:
    report = folder / f"{script.stem}.json"
    reading = json.loads(report.read_text())["reading"] if report.exists() else "*Not run in this build.*"
    shown = "\n\n".join(f"![{title}]({picture.name})" for picture in pictures)
    text = _COMMANDS.sub(lambda found: f"```\n{textwrap.dedent(found[0])}```\n", text)
    command = " ".join(["python", f"examples/{script.name}", ARGUMENTS.get(script.stem, "")]).strip()
    source = "".join(f"    {line}\n" for line in script.read_text().splitlines())
    return (
        f"# {title}\n\n{shown}\n\n{reading}\n\nThis page shows what `{command}` wrote when the site was built.\n\n"
        f'## About\n{rst.markdown(text)}\n??? example "examples/{script.name}"\n\n    ```python\n{source}    ```\n'
    )
