"""Which pictures are meant: files, folders, globs, and - for standard input."""

from __future__ import annotations

import glob
import os
import re
import sys
from typing import Any

from ..errors import ImageError

SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".avif", ".jp2")
)
STDIN = "-"


def expand(names: list[str]) -> tuple[list[str], list[str]]:
    """(pictures in order, what is wrong with the rest). A folder stands for the pictures in it, by name; folders in it are left out."""
    pictures: list[str] = []
    wrong: list[str] = []
    for name in names:
        if name == STDIN or os.path.isfile(name):
            pictures.append(name)
        elif os.path.isdir(name):
            found = [os.path.join(name, entry) for entry in os.listdir(name) if os.path.splitext(entry)[1].lower() in SUFFIXES]
            pictures += sorted(filter(os.path.isfile, found), key=natural)
            if not found:
                wrong.append(f"{name}: a folder without pictures (.jpg, .png, .webp ...; folders in it are not searched)")
        elif glob.has_magic(name) and not os.path.exists(name):
            matches = sorted(filter(os.path.isfile, glob.glob(name, recursive=True)), key=natural)
            pictures += matches
            if not matches:
                wrong.append(f"{name}: matches no file")
        else:
            pictures.append(name)  # load_image says what is wrong with it, or it is a pipe such as <(command)
    return pictures, wrong


def natural(name: str) -> list[Any]:
    """img2 before img10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def source_of(name: str) -> Any:
    """What the library takes as the picture of that name."""
    if name != STDIN:
        return name
    if sys.stdin is None or sys.stdin.isatty():
        state = "closed" if sys.stdin is None else "a terminal"
        raise ImageError(f"-: standard input is {state}; pipe a picture into it: pykvsmooth caption - < picture.jpg")
    return sys.stdin.buffer


def named(name: str, error: Exception) -> str:
    """One line that says which picture."""
    text = str(error) or type(error).__name__
    return text if name in text or name == STDIN else f"{name}: {text}"
