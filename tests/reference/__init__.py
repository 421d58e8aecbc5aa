"""The specification in NumPy, float64: the text model, the vision tower and KVSmooth inside the cache. Reading order: llama.py, kvsmooth.py, clip.py."""

from .clip import Clip, load_clip
from .kvsmooth import KVSmooth
from .llama import Session, Text, greedy, load_text

__all__ = ["Clip", "KVSmooth", "Session", "Text", "greedy", "load_clip", "load_text"]
