r"""Docstrings as Markdown: an extension of griffe, which reads the package for the API reference.

The docstrings are Google style with pieces of reStructuredText. In their place stand

==========================================  =================================================
a role ``math``, a directive ``math``       ``\(...\)``, ``\[...\]``, for MathJax
roles ``func``, ``class``, ``meth``,        a link where the name has an entry, else code
``mod``
a directive ``code-block``                  a fence
a simple table                              a table of Markdown
``References:``, ``Args of every method:``  a list, one entry each
``Example:``                                ``Examples:``, under which griffe looks for doctests
``Args:`` of a ``NamedTuple``               ``Attributes:``, since griffe sees no constructor there
==========================================  =================================================
"""

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import griffe

FULL = 108
"""Sources wrap at 120 characters, and the text of a docstring is indented by 4 to 12."""

WITHOUT_PAGE = {"cli", "demo", "__main__"}
"""Modules that are command lines; they have no page in the reference, and no links lead to them."""

_ROLE = re.compile(r":(func|class|meth|mod):`(~?)([^`]+)`")
_MATH = re.compile(r":math:`([^`]+)`")
_DIRECTIVE = re.compile(r"^( *)\.\. (math|code-block)::[ ]*(\w*)\n((?:\1 +.*\n|\n)*)", re.MULTILINE)
_TABLE = re.compile(r"^( *)(=+(?: +=+)+)\n(.*?)\n\1\2\n(?=\n|\Z)", re.MULTILINE | re.DOTALL)
_BORDER = re.compile(r"^[= ]+$")


class Markdown(griffe.Extension):
    """Rewrites every docstring of a package once it has been read."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for each in objects(pkg):
            if isinstance(each, griffe.Function):
                each.overloads = None  # they repeat the signature, without its defaults
            if each.docstring:
                each.docstring.value = markdown(each.docstring.value, each, pkg)


def objects(owner: griffe.Object) -> Iterator[griffe.Object]:
    """The object and all it defines."""
    yield owner
    for member in owner.members.values():
        if not member.is_alias:
            yield from objects(member)


def markdown(text: str, owner: griffe.Object | None = None, package: griffe.Module | None = None) -> str:
    """A docstring's text as Markdown; without an owner there are no links."""
    text = text.rstrip() + "\n"
    text = _DIRECTIVE.sub(_directive, text)
    text = _TABLE.sub(_table, text)
    text = _MATH.sub(lambda found: rf"\({' '.join(found[1].split())}\)", text)
    text = _ROLE.sub(lambda found: _link(found, owner, package), text)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    if isinstance(owner, griffe.Class) and "NamedTuple" in map(str, owner.bases):
        text = re.sub(r"^Args:$", "Attributes:", text, flags=re.MULTILINE)
    text = re.sub(r"^(References|Args of every method):\n((?:    .*\n)+)", _list, text, flags=re.MULTILINE)
    return re.sub(r"^Returns:\n((?:    .*\n|\n)+)", _returns, text, flags=re.MULTILINE)


def _directive(found: re.Match[str]) -> str:
    indent, name, argument, body = found.groups()
    lines = [line.strip() if name == "math" else line[len(indent) + 4 :] for line in body.strip("\n").split("\n")]
    if name == "math":
        lines = [line for line in lines if line]
        if r"\\" in body and r"\begin" not in body:
            lines = [r"\begin{aligned}", *lines, r"\end{aligned}"]
    opening, closing = (r"\[", r"\]") if name == "math" else (f"```{argument}", "```")
    block = [opening, *lines, closing]
    return "\n" + "".join(f"{indent}{line}".rstrip() + "\n" for line in block) + "\n"


def _table(found: re.Match[str]) -> str:
    """A simple table; a row whose first cell is blank continues the row above."""
    indent, border, body = found.groups()
    columns = [(part.start(), part.end()) for part in re.finditer("=+", border)]
    columns[-1] = (columns[-1][0], 10_000)
    head, rows = [""] * len(columns), list[list[str]]()
    for full in body.split("\n"):
        line = full[len(indent) :]
        if _BORDER.match(line):
            (head,), rows = rows, []
            continue
        for (_, end), (start, _) in pairwise(columns):
            if line[end:start].strip():
                raise ValueError(f"a cell leaves its column in the table of a docstring: {line!r}")
        cells = [line[start:end].strip() for start, end in columns]
        if cells[0]:
            rows.append(cells)
        else:
            rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
    lines = [head, ["---"] * len(columns), *rows]
    return "\n" + "".join(f"{indent}| {' | '.join(map(cell, line))} |\n" for line in lines)


def cell(text: str) -> str:
    """A vertical bar would end the cell."""
    return text.replace(r"\|", r"\Vert ").replace("|", r"\vert ")


def _link(found: re.Match[str], owner: griffe.Object | None, package: griffe.Module | None) -> str:
    _, short, name = found.groups()
    shown = f"`{name.rsplit('.', 1)[-1] if short else name}`"
    target = _target(name, owner, package) if owner and package else None
    return f"[{shown}][{target}]" if target else shown


def _target(name: str, owner: griffe.Object, package: griffe.Module) -> str | None:
    """The path of what a role means, where that has an entry in the reference."""
    try:
        path = name if name.startswith(f"{package.name}.") else owner.resolve(name)
    except griffe.NameResolutionError:
        path = f"{owner.module.path}.{name}"
    try:
        found = package[path.removeprefix(f"{package.name}.")]
        found = found.final_target if found.is_alias else found
    except (KeyError, griffe.AliasResolutionError):
        raise ValueError(f"the docstring of {owner.path} names {name}, which does not exist") from None
    public = found.path.split(".")[1] not in WITHOUT_PAGE
    path = found.path
    while public and found is not package:
        public, found = found.is_public, found.parent
    return path if public else None


def _list(found: re.Match[str]) -> str:
    """A list, one entry each; an entry goes on where the line before was full and this one does not begin another."""
    lines = [line.strip() for line in found[2].splitlines()]
    entries = lines[:1]
    for line, before in zip(lines[1:], lines, strict=False):
        wrapped = len(before) + 1 + len(line.split()[0]) > FULL and "http" not in before
        whole = re.search(r"http|\(\d{4}\)", entries[-1]) and not line.startswith("http") and not line[0].islower()
        if wrapped and not whole:
            entries[-1] += f" {line}"
        else:
            entries.append(line)
    items = (re.sub(r"(https?://\S+[^\s,.;])", r"<\1>", entry) for entry in entries)
    return f"**{found[1]}**\n\n" + "".join(f"- {item}\n" for item in items)


def _returns(found: re.Match[str]) -> str:
    """Prose: what stands before a colon is no type."""
    return "Returns:\n" + found[1].replace(": ", "&#58; ")
