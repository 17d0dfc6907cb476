"""The version of this package, and those of all that a result depends on."""

import functools
import os
import platform
import subprocess
from pathlib import Path

__all__ = ["__version__", "versions"]

__version__ = "0.1.0"


@functools.cache
def versions() -> dict[str, str]:
    """Versions by name; the commit too, if this package lies in a git checkout that tracks it."""
    import numpy as np  # only here: the package tells its version without loading torch
    import torch

    found = {
        "ndm_ct": __version__, "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__
    }  # fmt: skip
    commit = _commit(Path(__file__).resolve())
    return found if commit is None else found | {"commit": commit}


def _commit(file: Path) -> str | None:
    """The commit that is checked out, with ``-dirty`` after it if files have changed since."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # another project's checkout may hold an installed copy
        return git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    except (OSError, subprocess.SubprocessError):  # git is missing, or this is not a checkout
        return None
