"""The first lines of the command `pykvsmooth`: from here on Ctrl-C ends it quietly, also while modules are still being read, which takes
several times as long as Python's own start. It stands beside the package pykvsmooth, because whatever is in that comes after its import."""

import os

INTERRUPTED = 130
try:
    import signal
except KeyboardInterrupt:
    os._exit(INTERRUPTED)


def _end(*_: object) -> None:
    os._exit(INTERRUPTED)  # nothing has been written yet


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
    signal.signal(signal.SIGINT, _end)


def main() -> int:
    from pykvsmooth.cli.main import main

    return main()
