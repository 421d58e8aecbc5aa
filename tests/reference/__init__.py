"""The specification in NumPy, float64: text model, vision tower, KVSmooth and PruneHal inside the cache. Read llama.py, kvsmooth.py,
prunehal.py, clip.py."""

from .clip import Clip, load_clip
from .kvsmooth import KVSmooth
from .llama import Session, Text, greedy, load_text
from .prunehal import PruneHal

__all__ = ["Clip", "KVSmooth", "PruneHal", "Session", "Text", "greedy", "load_clip", "load_text"]
