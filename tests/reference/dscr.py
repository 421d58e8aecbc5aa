"""DSCR (ICLR 2026, openreview FHTt9ipAra) with every switch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass
class DSCR:
    """The arguments of pykvsmooth.DSCR that act on the cache. depths: one (n,) a picture, NaN for padding, or None."""

    depths: Sequence[Array | None]
    grid: tuple[int, int]  # (width, height)
    sigma_d: float = 0.6
    sigma_s: float = 0.6
    alpha: float = 0.6
    beta: float = 0.8
    layers: str | Sequence[int] = "10:"
    kernel: str = "sum"
    gamma: float = 1.0
    rope_mode: str = "post"
    phase: str = "before_question"
    coord_norm: str = "unit"
    patch_size: int = 14
    target: str = "kv"

    def layer_set(self, n_layer: int) -> set[int]:
        if isinstance(self.layers, str):
            return set(range(n_layer)[slice(*(int(part) if part else None for part in self.layers.split(":")))])
        return {i % n_layer for i in self.layers}

    def coordinates(self) -> Array:
        """(n, 2) of the patches, row by row"""
        width, height = self.grid
        x, y = (a.reshape(-1).astype(float) for a in np.meshgrid(np.arange(width), np.arange(height)))
        most = np.array([max(width - 1, 1), max(height - 1, 1)])
        place = np.stack([x, y], 1)
        return {"unit": place / most, "signed": 2 * place / most - 1, "patch": place, "pixel": place * self.patch_size}[self.coord_norm]

    def weights(self, depth: Array | None) -> Array:
        """w (n, n), w_ij = what patch i gives to patch j: columns sum to one, the diagonal is zero; padding neither gives nor takes."""
        s = self.coordinates()
        d = np.zeros(len(s)) if depth is None else np.asarray(depth, np.float64)
        f_d = np.exp(-((d[:, None] - d) ** 2) / (2 * self.sigma_d**2))  # 1 where depth is unknown, or the same for all
        f_s = np.exp(-((s[:, None] - s) ** 2).sum(-1) / (2 * self.sigma_s**2))
        w = f_d**self.alpha + f_s**self.beta if self.kernel == "sum" else f_d**self.alpha * f_s**self.beta
        w[np.isnan(w)] = 0
        np.fill_diagonal(w, 0)
        return np.divide(w, w.sum(0), out=np.zeros_like(w), where=w.sum(0) > 0)

    def refined(self, k: Array, v: Array, picture: int, turn: Callable[[Array, int], Array]) -> tuple[Array, Array]:
        """k, v (n, G, D) as they are stored -> what they become; turn(k, 1) applies the rotation of each row's position, turn(k, -1)
        takes it back."""
        w = self.weights(self.depths[picture])
        taken = w.sum(0) > 0
        pre = self.rope_mode == "pre"
        k_hat = np.einsum("ij,igd->jgd", w, turn(k, -1) if pre else k)
        k_hat = turn(k_hat, 1) if pre else k_hat
        v_hat = np.einsum("ij,igd->jgd", w, v)
        k_new, v_new = k.copy(), v.copy()
        if "k" in self.target:
            k_new[taken] = ((1 - self.gamma) * k + self.gamma * k_hat)[taken]
        if "v" in self.target:
            v_new[taken] = ((1 - self.gamma) * v + self.gamma * v_hat)[taken]
        return k_new, v_new
