"""What may edit a session's cache: one module a method, and the stack of those that act together."""

from importlib import import_module
from typing import Any

KINDS = {
    "kvsmooth": "KVSmooth",
    "dscr": "DSCR",
    "prunehal": "PruneHal",
}  # module and name in words -> class


def kind(name: str) -> Any:
    """The class of a policy; imported now, because it brings the shared library."""
    return getattr(import_module(f".{name}", __name__), KINDS[name])
