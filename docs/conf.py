"""Settings of Sphinx: `sphinx-build -W --keep-going docs build/site`; with NDM_CT_GALLERY=0 no example is run."""

import builtins
import importlib
import inspect
import os
import re
import shutil
from pathlib import Path
from typing import Any

import ndm_ct

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent / "benchmarks"

project = "ndm_ct"
version = release = ndm_ct.__version__
copyright = "The ndm_ct developers, Apache-2.0"  # noqa: A001
nitpicky = True
nitpick_ignore_regex = [("py:(class|obj|data|exc|attr)", ".*")]
nitpicky = True  # a docstring that names a function names one with an entry
nitpick_ignore_regex = [("py:(class|obj|data|exc|attr|mod)", ".*")]
extensions = [f"sphinx.ext.{name}" for name in ("autodoc", "autosummary", "mathjax", "napoleon")]
extensions += ["myst_parser", "sphinx_copybutton", "sphinx_gallery.gen_gallery", "sphinx-mathjax-offline"]
exclude_patterns = ["gallery/*.ipynb", "gallery/*.py", "sg_execution_times.rst", "gallery/sg_execution_times.rst"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = "ndm_ct"
html_show_sourcelink = False
html_css_files = ["site.css"]
html_static_path = ["_static"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # tables of measurements begin at any level

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
napoleon_custom_sections = [("Args of every method", "params_style")]


def reference() -> dict[str, list[tuple[str, str]]]:
    """For every module of the reference, what it exports: the directive and the shortest path to the name.

    A name that several modules export has its entry under ``ndm_ct`` or under the first of them.
    """
    modules = re.findall(r"^ +(ndm_ct\.\w+)$", (HERE / "reference" / "index.md").read_text(), re.MULTILINE)
    public = {name: getattr(ndm_ct, name) for name in ndm_ct.__all__}
    seen, found = {id(value): f"ndm_ct.{name}" for name, value in public.items()}, {}
    done = set[str]()
    for path in modules:
        found[path] = []
        module = importlib.import_module(path)
        verbs = [name for name, value in public.items() if getattr(value, "__module__", "").startswith(f"{path}.")]
        for name in dict.fromkeys([*verbs, *module.__all__]):
            value = public[name] if name in verbs else getattr(module, name)
            kind = "class" if inspect.isclass(value) else "function" if inspect.isroutine(value) else "data"
            entry = seen.setdefault(id(value), f"{path}.{name}")
            found[path].append(("see" if entry in done else kind, entry))
            done.add(entry)
    return found


def measurements() -> None:
    """One page for each question of ``benchmarks/README.md``: pictures, tables and files of every set of data."""
    shutil.rmtree(HERE / "results", ignore_errors=True)
    (HERE / "results").mkdir()
    index = (BENCHMARKS / "README.md").read_text().replace("# Benchmarks", "# Measurements", 1)
    questions = re.findall(r"^\| (\S.*?) \| `python benchmarks/(\w+)\.py", index, re.MULTILINE)
    index = re.sub(r"\]\(results/(\w+)/([\w-]+)/[^)]*\)", r"](\1.md#\2)", index).replace(".md#all)", ".md)")
    index += "\n```{toctree}\n:hidden:\n\n"
    for question, script in questions:
        text = f"# {question}\n"
        folders = [path for path in (BENCHMARKS / "results" / script).glob("*") if path.is_dir()]
        for folder in sorted(folders, key=lambda path: (path.name != "all", path.name)):
            where = Path("..", "..", folder.relative_to(HERE.parent))
            text += f"\n## {folder.name}\n" if folder.name != "all" else ""
            pictures = sorted(path.relative_to(folder) for path in folder.rglob("*.png"))
            text += "".join(f"\n![{path.stem}]({where}/{path})\n" for path in pictures)
            for path in sorted(folder.glob("*.md"), key=lambda path: path.stem != "results"):
                text += f"\n### {path.stem}\n" if path.stem != "results" else ""
                text += f"\n```{{include}} {where}/{path.name}\n:start-line: 1\n:heading-offset: 1\n```\n"
            files = sorted(path.name for path in folder.iterdir() if path.suffix in {".csv", ".json"})
            text += "\n" + ", ".join(f"[{name}]({where}/{name})" for name in files) + "\n"
        if folders:
            (HERE / "results" / f"{script}.md").write_text(text)
            index += f"{script.replace('_', ' ').capitalize()} <{script}>\n"
    (HERE / "results" / "index.md").write_text(index + "```\n")


measurements()
autosummary_context = {"reference": reference()}
ENTRIES = {path.rsplit(".", 1)[-1]: path for names in reference().values() for _, path in names}

builtins.__file__ = str(HERE.parent / "examples" / "script.py")  # type: ignore[attr-defined]  # sphinx-gallery sets none
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "plot_gallery": os.environ.get("NDM_CT_GALLERY") != "0",
    "download_all_examples": False,
    "show_signature": False,
}


def link_results(app: Any, name: str, source: list[str]) -> None:
    """Links to tables and pictures of measurements lead to the pages made of them."""
    if "/" not in name:
        found = r"(?<!!)(\[[^\]]*\]\()\.\./benchmarks/results/(\w+)/([\w-]+)/\w+\.(?:md|png)\)"
        source[0] = re.sub(found, r"\1results/\2.md#\3)", source[0]).replace(".md#all)", ".md)")


def mend_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep the lines of the section "References"; drop what a value has from its type."""
    if what == "data" and "\n".join(lines).strip() == inspect.getdoc(type(obj)):
        lines.clear()
    start = lines.index("References:") + 1 if "References:" in lines else len(lines)
    for number in range(start, len(lines)):
        if not lines[number].startswith("    "):
            break
        lines[number] = f"    | {lines[number].strip()}"


def find_entry(app: Any, env: Any, node: Any, content: Any) -> Any:
    """A short name in a docstring leads to its entry, whichever module that stands under."""
    if node.get("refdomain") != "py" or node["reftarget"] not in ENTRIES:
        return None
    path, role = ENTRIES[node["reftarget"]], node["reftype"]
    return env.get_domain("py").resolve_xref(env, node["refdoc"], app.builder, role, path, node, content)


def leave_out(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what scikit-learn adds to estimators, whose text points into its own guide."""
    return True if name.startswith("set_") and name.endswith("_request") else None


def setup(app: Any) -> None:
    app.connect("autodoc-skip-member", leave_out)
    app.connect("source-read", link_results)
    app.connect("missing-reference", find_entry)
    app.connect("autodoc-process-docstring", mend_docstring, priority=400)  # before napoleon
