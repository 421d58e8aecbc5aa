"""The specification in NumPy, float64: text model, vision tower, and KVSmooth, DSCR and PruneHal inside the cache. Read llama.py,
kvsmooth.py, dscr.py, prunehal.py, clip.py."""

from .clip import Clip, load_clip
from .dscr import DSCR
from .kvsmooth import KVSmooth
from .llama import Session, Text, greedy, load_text
from .prunehal import PruneHal

__all__ = ["DSCR", "Clip", "KVSmooth", "PruneHal", "Session", "Text", "greedy", "load_clip", "load_text"]
