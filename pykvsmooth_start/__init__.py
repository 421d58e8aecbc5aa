"""The first lines of the command `pykvsmooth`: from here on Ctrl-C ends it quietly, also while modules are still being read, which takes
several times as long as Python's own start. It stands beside the package pykvsmooth, because whatever is in that comes after its import,
and imports nothing that must be read: the module signal itself takes enum, functools and collections."""

import os
from _signal import SIGINT, default_int_handler, getsignal, signal  # type: ignore[import-not-found]

INTERRUPTED = 130


def _end(*_: object) -> None:
    os._exit(INTERRUPTED)  # nothing has been written yet


if getsignal(SIGINT) is default_int_handler:  # not where a shell has it ignored
    signal(SIGINT, _end)


def main() -> int:
    from pykvsmooth.cli.main import main

    return main()
