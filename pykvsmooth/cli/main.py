"""The entry point: the parser, and what becomes of errors, Ctrl-C and a pipe that nobody reads any more.

Exit codes: 0 done, 1 an error (one line on standard error; --debug shows the traceback), 2 usage, 130 Ctrl-C, 141 the reader of
standard output went away (what a shell shows for a program that SIGPIPE ended).
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from .. import __version__
from ..errors import KVSmoothError
from . import caption, chat, info, inspect
from .options import UsageError, in_options
from .terminal import Ui

INTERRUPTED, PIPE_CLOSED = 130, 141


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pykvsmooth", description="Captions with fewer invented objects, from quantized LLaVA checkpoints, on this machine."
    )
    parser.add_argument("--version", action="version", version=f"pykvsmooth {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="caption | chat | inspect | info")
    for module in (caption, chat, inspect, info):
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    ui = Ui()
    handler = logging.StreamHandler(ui.err.stream)
    debug = False
    try:
        args = make_parser().parse_args(argv)
        ui.quiet, debug = getattr(args, "quiet", False), getattr(args, "debug", False)
        _configure(handler, ui.quiet, debug)
        code: int = args.run(args, ui)
        ui.out.stream.flush()
        return code
    except SystemExit as end:  # argparse
        return _flushed(ui, end.code if isinstance(end.code, int) else 2)
    except KeyboardInterrupt:
        _ignore_interrupts()
        with contextlib.suppress(OSError):
            ui.restore()
        return _flushed(ui, INTERRUPTED)
    except BrokenPipeError:
        return _flushed(ui, PIPE_CLOSED)
    except UsageError as error:
        ui.error(f"{error} (pykvsmooth {args.command} --help)")
        return 2
    except Exception as error:
        if debug:
            raise
        ui.error(_sentence(error))
        return _flushed(ui, 1)
    finally:
        logging.getLogger("pykvsmooth").removeHandler(handler)


def _configure(handler: logging.Handler, quiet: bool, debug: bool) -> None:
    from PIL import Image

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit speaks, as an error
    handler.setFormatter(logging.Formatter("%(name)s: %(levelname)s: %(message)s"))
    logger = logging.getLogger("pykvsmooth")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.ERROR if quiet else logging.WARNING)


def _sentence(error: Exception) -> str:
    if isinstance(error, KVSmoothError):
        return in_options(error)
    if isinstance(error, OSError) and error.strerror:
        where = os.fsdecode(error.filename) if error.filename else "output"
        return f"{where}: {error.strerror}"
    return f"{type(error).__name__}: {error} (--debug shows where)"


def _ignore_interrupts() -> None:
    """A second Ctrl-C while the process ends shall not show a traceback."""
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _flushed(ui: Ui, code: int) -> int:
    """Nothing may be left in a buffer: Python would flush it at exit and complain if nobody reads any more."""
    for screen in (ui.out, ui.err):
        try:
            screen.stream.flush()
        except (OSError, ValueError) as error:
            code = code or (PIPE_CLOSED if isinstance(error, BrokenPipeError) else 1)
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), screen.stream.fileno())
    return code


if __name__ == "__main__":
    sys.exit(main())
