"""What the dataclasses of the policies share."""

from __future__ import annotations

from dataclasses import fields
from typing import Any


class Parameters:
    """Base of frozen dataclasses that check their fields in __post_init__, and show those that are not the defaults."""

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        changed = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default)  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(changed)})"
