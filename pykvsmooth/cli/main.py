"""The entry point. Here is only what Python always has: without rich, and with Ctrl-C while modules are read, one line has to do."""

from __future__ import annotations

import sys
from collections.abc import Sequence

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code. Without argv, as the process's own command, it ends that at once after Ctrl-C."""
    try:
        from .command import run
    except KeyboardInterrupt:
        return INTERRUPTED
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        if (sys.argv[1:] if argv is None else list(argv)) == ["demo"]:
            return _demo_plain()
        print("error: the command line needs the package rich: pip install 'pykvsmooth[cli]'", file=sys.stderr)
        return 1
    return run(argv)


def _demo_plain() -> int:
    """What can be shown right after the installation, before anything else is installed."""
    from . import demo_plain

    try:
        return demo_plain.run()
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
