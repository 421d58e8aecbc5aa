"""What can be wrong with the data of an evaluation."""

from __future__ import annotations

from ..errors import KVSmoothError


class EvaluationError(KVSmoothError, ValueError):
    """Captions and truth that do not go together, or a file of them that can't be read. Attributes: path, line (0 where there is none)."""

    def __init__(self, message: str, path: str = "", line: int = 0) -> None:
        where = f"{path}: line {line}: " if line else f"{path}: " if path else ""
        super().__init__(where + message)
        self.path = path
        self.line = line
