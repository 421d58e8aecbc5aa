"""Pictures of scenes whose content is known, and captions of them: what the demo checkpoint is trained and judged on."""

from .catalogue import CLASSES, CONTEXTS, KINDS, Kind
from .grammar import PROMPT, caption, side
from .scene import SIZE, SPLITS, Object, Scene, scene

__all__ = ["CLASSES", "CONTEXTS", "KINDS", "PROMPT", "SIZE", "SPLITS", "Kind", "Object", "Scene", "caption", "scene", "side"]
