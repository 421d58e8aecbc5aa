"""The specification in NumPy, float64: text model, vision tower, KVSmooth inside the cache. Read llama.py, kvsmooth.py, clip.py."""

from .clip import Clip, load_clip
from .kvsmooth import KVSmooth
from .llama import Session, Text, greedy, load_text

__all__ = ["Clip", "KVSmooth", "Session", "Text", "greedy", "load_clip", "load_text"]
