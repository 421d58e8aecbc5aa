"""What was measured: this package, the commit of its checkout, the library and its compiler."""

from __future__ import annotations

import mmap
import os
import re
from pathlib import Path

from .. import __version__
from .._native import library_path
from .child import ChildError, run_child

GIT_SECONDS = 10.0
_COMPILERS = re.compile(rb"(?:GCC: \(|clang version )[ -~]+")  # as .comment of an ELF file has them


def facts() -> dict[str, str]:
    """version and library (its file); commit and compiler, where they are known."""
    more = {"commit": commit(Path(__file__).resolve().parents[2]), "compiler": compiler(library_path)}
    return {"version": __version__, "library": str(library_path)} | {name: text for name, text in more.items() if text}


def commit(root: Path) -> str:
    """Of the checkout whose top is root, in short, "-dirty" behind it where its files are not those of the commit. Empty without git, or if
    root is no top: an installed package may lie in a folder of somebody else's checkout."""
    if not (root / ".git").exists():
        return ""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # a hook's GIT_DIR is another checkout
    try:
        asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
        return run_child(asked, GIT_SECONDS, {**env, "GIT_OPTIONAL_LOCKS": "0"}).out.strip()
    except ChildError:
        return ""


def compiler(library: Path) -> str:
    """As in "GCC: (Debian 12.2.0-14) 12.2.0"; several with "; " between. Empty where the file names none."""
    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return "; ".join(sorted({found.decode("ascii") for found in _COMPILERS.findall(data)}))
