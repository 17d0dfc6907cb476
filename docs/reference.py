"""Pages of the API reference, one for each public module, made when the site is built.

A hook of mkdocs: ``on_config`` fills the entry "Reference" of the navigation, ``on_files`` writes the pages.
"""

import ast
from pathlib import Path
from typing import Any

import rst
from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).parent.parent / "ndm_ct"

GROUPS = {
    "Use": (
        "likelihood", "bits", "evaluation", "objectives", "sampling", "training", "rows", "distributions", "estimator",
        "checkpoint", "adapters", "presets",
    ),
    "Model": (
        "model", "schedules", "transforms", "process", "dynamics", "volatility", "nn", "guidance", "reference",
        "quantisation", "regression", "transport", "timesampling",
    ),
    "Solvers": (
        "divergence", "quadrature", "trajectory", "rowwise", "solvers", "grids", "stepping", "samplers", "discrete",
    ),
}  # fmt: skip
"""Modules in the order of reading; those that are not here come last."""

ERRORS = ("SolverError", "PredictorError", "CheckpointError")
"""Defined in a private module, so they stand on the index."""


def modules() -> dict[str, list[str]]:
    """Names of all public modules and packages, by group."""
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    found = {name for name in found if not name.startswith("_")} - rst.WITHOUT_PAGE
    groups = {title: [name for name in names if name in found] for title, names in GROUPS.items()}
    rest = sorted(found.difference(*GROUPS.values()))
    return groups | ({"Others": rest} if rest else {})


def on_config(config: Any) -> None:
    """Put the pages into the navigation."""
    (entry,) = (entry for entry in config.nav if "Reference" in entry)
    entry["Reference"] = [
        "reference/index.md",
        *({title: [{name: f"reference/{name}.md"} for name in names]} for title, names in modules().items()),
    ]


def on_files(files: Files, config: Any) -> Files:
    """Write the pages."""
    tables = ""
    for title, names in modules().items():
        tables += f"\n## {title}\n\n| module | |\n|---|---|\n"
        for name in names:
            page = f"---\ntitle: {name}\n---\n\n::: ndm_ct.{name}\n{_options(name)}"
            files.append(File.generated(config, f"reference/{name}.md", content=page))
            tables += f"| [`ndm_ct.{name}`]({name}.md) | {_summary(name)} |\n"
    facade = ", ".join(f"[`{name}`][ndm_ct.{name}]" for name in _exported())
    errors = "".join(f"\n::: ndm_ct.{name}\n    options:\n      heading_level: 3\n" for name in ERRORS)
    text = f"# Reference\n\nBy name, from `ndm_ct` itself: {facade}.\n{tables}\n## Errors\n{errors}"
    files.append(File.generated(config, "reference/index.md", content=text))
    return files


def _source(name: str) -> ast.Module:
    path = PACKAGE / f"{name}.py"
    return ast.parse((path if path.exists() else PACKAGE / name / "__init__.py").read_text())


def _options(name: str) -> str:
    """Of a package: what it imports is documented with the module it comes from."""
    if not (PACKAGE / name).is_dir():
        return ""
    members = [path.stem for path in sorted((PACKAGE / name).glob("[a-z]*.py"))]
    members += [
        node.target.id
        for node in _source(name).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]
    return f"    options:\n      members: [{', '.join(members)}]\n"


def _summary(name: str) -> str:
    """The first paragraph of a module's docstring."""
    text = " ".join((ast.get_docstring(_source(name)) or "").split("\n\n")[0].split())
    return rst.cell(rst.markdown(text).strip().rstrip(".:,"))


def _exported() -> list[str]:
    """What ``from ndm_ct import ...`` gives, but modules, which have their own lines."""
    for node in _source("__init__").body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            found = sorted(ast.literal_eval(node.value), key=str.lower)
            return [name for name in found if not any(name in names for names in modules().values())]
    raise LookupError("ndm_ct/__init__.py has no __all__")
