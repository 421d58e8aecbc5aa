"""The parser, and what becomes of errors, Ctrl-C and a pipe that nobody reads any more.

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
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

from ..errors import KVSmoothError
from . import bench, caption, chat, convert, demo, depth, evaluate, info, inspect, quantize
from .escape import escaped, one_line
from .main import INTERRUPTED
from .options import UsageError, in_options
from .terminal import Ui, replace_closed_streams

PIPE_CLOSED = 141


class _Version(argparse.Action):
    """The library knows the version, and is not loaded for --help."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from .. import __version__

        print(f"pykvsmooth {__version__}")
        parser.exit()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Arguments may be names of files that a shell found."""
        super().error(one_line(message))


class _Log(logging.Handler):
    """Lines above a bar, as all that is said."""

    def __init__(self, ui: Ui) -> None:
        super().__init__()
        self._ui = ui

    def emit(self, record: logging.LogRecord) -> None:
        self._ui.err.print((escaped if record.exc_info else one_line)(self.format(record)), soft_wrap=True)


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pykvsmooth", description="Captions with fewer invented objects, from quantized LLaVA checkpoints, on this machine."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="caption | chat | convert | quantize | depth | demo | eval | bench | inspect | info"
    )
    for module in (caption, chat, convert, quantize, depth, demo, evaluate, bench, inspect, info):
        module.add_parser(commands)
    return parser


def run(argv: Sequence[str] | None) -> int:
    replace_closed_streams()
    ui = Ui()
    log = _Log(ui)
    debug = False
    try:
        if argv is None and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # until here pykvsmooth_start had it
            sys.unraisablehook = partial(_once_more, sys.unraisablehook)
        args = make_parser().parse_args(argv)
        ui.quiet, debug = getattr(args, "quiet", False), getattr(args, "debug", False)
        _configure(log, ui.quiet, debug)
        code: int = args.run(args, ui)
        return code
    except SystemExit as end:  # argparse
        return _flushed(ui, end.code if isinstance(end.code, int) else 2)
    except KeyboardInterrupt:
        return _interrupted(ui, at_once=argv is None)
    except BrokenPipeError:
        return _flushed(ui, PIPE_CLOSED)
    except UsageError as error:
        ui.error(f"{error} (pykvsmooth {args.command} --help)")
        return 2
    except Exception as error:
        if debug and argv is not None:
            raise
        if debug:
            ui.err.write(escaped(traceback.format_exc()))  # the message may quote a file
        else:
            ui.error(_sentence(error))
        return _flushed(ui, 1)
    finally:
        with contextlib.suppress(OSError):
            ui.clear()
        logging.getLogger("pykvsmooth").removeHandler(log)


def _once_more(hook: Callable[[Any], Any], unraisable: Any) -> None:
    """Python drops a KeyboardInterrupt that comes in a destructor or in a weak reference's callback: another comes when that is over."""
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Timer(0.005, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    else:
        hook(unraisable)


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
    if isinstance(error, ImportError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        where = os.fsdecode(error.filename) if error.filename else "output"
        return f"{where}: {error.strerror}"
    return f"{type(error).__name__}: {error} (--debug shows where)"


def _interrupted(ui: Ui, at_once: bool) -> int:
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C shall not show a traceback
    with contextlib.suppress(OSError):
        ui.clear()
    code = _flushed(ui, INTERRUPTED)
    if at_once:
        # The frames that the interrupt left still hold model and sessions, unclosed: the kernel takes their gigabytes back anyway.
        # Freeing them here and Python's own end take 50 ms more with a 7B model. All captions are written, the buffers are empty.
        os._exit(code)
    return code


def _flushed(ui: Ui, code: int) -> int:
    """Nothing may be left in a buffer: Python would flush it at exit and complain if nobody reads any more."""
    for screen in (ui.out, ui.err):
        try:
            screen.file.flush()
        except (OSError, ValueError) as error:
            code = code or (PIPE_CLOSED if isinstance(error, BrokenPipeError) else 1)
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), screen.file.fileno())
    return code
