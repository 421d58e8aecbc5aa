"""What a model, its sessions and what is given to them may cost at most: in one place, each with a default that no honest use meets."""

from __future__ import annotations

from dataclasses import dataclass, fields

from .checks import integer
from .errors import ImageLimitError, LimitError

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """Upper bounds, for Model(limits=...). What goes beyond one is a LimitError with its name, the value and what was allowed.

    model_bytes: of all files of a model together, mmproj included (they are mapped: it bounds what is read, not what is allocated).
    cache_bytes: of the caches of all open sessions of the model; None = the memory of the machine. image_pixels: width times height
    of a picture or depth map, checked before it is decoded; Pillow warns of files beyond PIL.Image.MAX_IMAGE_PIXELS and opens none
    beyond twice that, so that who wants more raises that, too. image_bytes: of its file, stream or bytes object. prompt_chars: of
    one message, system text or tokenized text.

    TypeError, ValueError for what is no positive integer.
    """

    model_bytes: int = 1 << 40
    cache_bytes: int | None = None
    image_pixels: int = 89_478_485  # Pillow's own warning mark: 256 MiB of RGB
    image_bytes: int = 512 << 20
    prompt_chars: int = 4 << 20

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None or field.name != "cache_bytes":
                object.__setattr__(self, field.name, integer(field.name, value, 1, (1 << 63) - 1))

    def check_text(self, what: str, text: str) -> None:
        if len(text) > self.prompt_chars:
            message = f"{what}: {len(text):,} characters are more than the {self.prompt_chars:,} that are allowed"
            raise LimitError(message, "prompt_chars", len(text), self.prompt_chars)

    def check_pixels(self, name: str, width: int, height: int) -> None:
        if width * height > self.image_pixels:
            message = f"{name}: {width} x {height} is more than {self.image_pixels:,} pixels; make it smaller first"
            raise ImageLimitError(message, "image_pixels", width * height, self.image_pixels)

    def check_bytes(self, name: str, n: int) -> None:
        if n > self.image_bytes:
            message = f"{name}: {n:,} bytes are more than the {self.image_bytes:,} that a picture may have; give a smaller file"
            raise ImageLimitError(message, "image_bytes", n, self.image_bytes)


STANDARD = Limits()
