"""Metadata and float64 values of one GGUF file, read by the gguf package: the truth that our own loader is held against."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np


class GGUFFile:
    def __init__(self, path: str | Path) -> None:
        reader = gguf.GGUFReader(str(path))
        self.keys = {name: field.contents() for name, field in reader.fields.items()}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def get(self, key: str, default: Any = None) -> Any:
        return self.keys.get(key, default)

    def tensor(self, name: str) -> np.ndarray:
        """Stored values, dequantized; the last axis is the row."""
        tensor = self._tensors[name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return values.reshape([int(n) for n in reversed(tensor.shape)]).astype(np.float64)

    def maybe(self, name: str) -> np.ndarray | float:
        """A bias, or 0 where the file has none."""
        return self.tensor(name) if name in self else 0.0
