"""The specification in NumPy, float64: text model, vision tower, KVSmooth and DSCR inside the cache. Read llama.py, kvsmooth.py,
dscr.py, clip.py."""

from .clip import Clip, load_clip
from .dscr import DSCR
from .kvsmooth import KVSmooth
from .llama import Session, Text, greedy, load_text

__all__ = ["DSCR", "Clip", "KVSmooth", "Session", "Text", "greedy", "load_clip", "load_text"]
