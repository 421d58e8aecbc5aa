"""How fast this runtime is on this machine, held against what the machine can do, and against a build of llama.cpp beside it.

    bench = Bench(Settings(model="llava.gguf", mmproj="mmproj.gguf", threads=(1, 2)))
    bench.run()            # fills bench.figures, one after the other; after Ctrl-C those that there are so far are whole
    record(bench)          # the dict that `pykvsmooth bench --json` writes

Everything is repeated, and the first repetition is thrown away. The roofs that a figure is held against are measured again right before
and after each repetition, and peers run in turns with it: the speed of a machine changes by the minute. The record's keys are described in
record.py.
"""

from .figures import Figure, Peer, Spread, ratio_interval, spread
from .peer import LlamaCpp, PeerError
from .record import record
from .roofs import Roofs
from .run import STAGES, Bench, Settings

__all__ = [
    "STAGES",
    "Bench",
    "Figure",
    "LlamaCpp",
    "Peer",
    "PeerError",
    "Roofs",
    "Settings",
    "Spread",
    "ratio_interval",
    "record",
    "spread",
]
