"""The first lines of the command `pykvsmooth`: from here on Ctrl-C ends it quietly, also while modules are still being read, which takes
several times as long as Python's own start. A package beside pykvsmooth, whose import would come first, and imports nothing that is not
there already."""

import os
from _signal import SIGINT, default_int_handler, getsignal, signal

INTERRUPTED = 130


def _end(*_: object) -> None:
    os._exit(INTERRUPTED)  # nothing has been written yet


if getsignal(SIGINT) is default_int_handler:  # not where a shell has it ignored
    signal(SIGINT, _end)


def main() -> int:
    from pykvsmooth.cli.main import main

    return main()
