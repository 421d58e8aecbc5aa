"""LLaMA with a KV cache, one row or many at a time. H query heads, G KV heads, D = head size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .dscr import DSCR
from .gguf_file import GGUFFile
from .kvsmooth import KVSmooth
from .prunehal import Answer, PruneHal

Array = np.ndarray


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def softmax(scores: Array) -> Array:
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rotate(x: Array, positions: Array, inv_freq: Array) -> Array:
    """RoPE of x (n, heads, D) as GGUF files of architecture llama want it: the pairs are (0, 1), (2, 3), ..."""
    angle = positions[:, None, None] * inv_freq
    cos, sin = np.cos(angle), np.sin(angle)
    y = x.copy()
    n_rot = 2 * len(inv_freq)
    even, odd = x[..., 0:n_rot:2], x[..., 1:n_rot:2]
    y[..., 0:n_rot:2] = even * cos - odd * sin
    y[..., 1:n_rot:2] = even * sin + odd * cos
    return y


def row_entropy(p: Array, exclude_self: bool) -> Array:
    """-sum p ln p in nats of each row p (..., n_keys); its own key is the last one."""
    if exclude_self:
        rest = p[..., :-1].sum(-1, keepdims=True)
        p = np.divide(p[..., :-1], rest, out=np.zeros_like(p[..., :-1]), where=rest > 0)
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)


@dataclass
class Text:
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    rms_eps: float
    inv_freq: Array
    token_embd: Array
    output_norm: Array
    output: Array
    layers: list[dict[str, Array]]


LAYER = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")


def load_text(path: str | Path) -> Text:
    f = GGUFFile(path)
    n_head, n_embd = f.get("llama.attention.head_count"), f.get("llama.embedding_length")
    head_dim = f.get("llama.attention.key_length", n_embd // n_head)
    n_rot = f.get("llama.rope.dimension_count", head_dim)
    inv_freq = f.get("llama.rope.freq_base", 10000.0) ** (-np.arange(0, n_rot, 2) / n_rot)
    if f.get("llama.rope.scaling.type") == "linear":
        inv_freq = inv_freq / f.get("llama.rope.scaling.factor")
    if "rope_freqs.weight" in f:
        inv_freq = inv_freq / f.tensor("rope_freqs.weight")
    token_embd = f.tensor("token_embd.weight")
    layers = [
        {name: f.tensor(f"blk.{i}.{name}.weight") for name in LAYER}
        | {name + ".bias": f.maybe(f"blk.{i}.{name}.bias") for name in LAYER if not name.endswith("norm")}
        for i in range(f.get("llama.block_count"))
    ]
    return Text(
        n_layer=len(layers),
        n_head=n_head,
        n_head_kv=f.get("llama.attention.head_count_kv", n_head),
        head_dim=head_dim,
        rms_eps=f.get("llama.attention.layer_norm_rms_epsilon"),
        inv_freq=inv_freq,
        token_embd=token_embd,
        output_norm=f.tensor("output_norm.weight"),
        output=f.tensor("output.weight") if "output.weight" in f else token_embd,
        layers=layers,
    )


def store_f16(x: Array) -> Array:
    return x.astype(np.float32).astype(np.float16).astype(np.float64)


def store_q8_0(x: Array) -> Array:
    """Blocks of 32 within a row of one head, the last one perhaps shorter: a float16 scale, and int8 values taken against it."""
    y = np.empty_like(x)
    for i in range(0, x.shape[-1], 32):
        block = x[..., i : i + 32]
        d = store_f16(np.abs(block).max(-1, keepdims=True) / 127)
        y[..., i : i + 32] = d * np.clip(np.rint(np.divide(block, d, out=np.zeros_like(block), where=d > 0)), -127, 127)
    return y


STORES: dict[str, Callable[[Array], Array]] = {
    "f32": lambda x: x.astype(np.float32).astype(np.float64),
    "f16": store_f16,
    "q8_0": store_q8_0,
}


@dataclass
class LayerCache:
    k: Array  # (rows, G, D) as stored, K after RoPE
    v: Array
    exact_k: Array  # (rows, G, D) what the next row is mixed with: the smoothed row, or the raw one under one_step
    exact_v: Array
    exact_o: Array  # (rows, H, D) the same for attention outputs
    raw_k: Array  # (rows, G, D) before any smoothing: telemetry for tests
    raw_v: Array
    live: Array  # (rows, G) bool: False where PruneHal has dropped a row of a picture; it is never seen again
    entropy: list[Array] = field(default_factory=list)  # per row (n_group,)
    strength: list[Array] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)  # per row: keys that it saw
    mass: list[float] = field(default_factory=list)  # per row: head-mean share of attention on rows of pictures
    newest: Array | None = None  # (H, rows) attention of the newest row


class Session:
    """One timeline. The same lower floor as pykvsmooth.Session: feed, logits, kv, entropies, strengths."""

    def __init__(
        self,
        text: Text,
        policy: KVSmooth | None = None,
        kv_type: str = "f32",
        dscr: DSCR | None = None,
        prune: PruneHal | None = None,
    ) -> None:
        self.text, self.policy, self.store = text, policy, STORES[kv_type]
        kv, o = np.zeros((0, text.n_head_kv, text.head_dim)), np.zeros((0, text.n_head, text.head_dim))
        self.layers = [LayerCache(kv, kv, kv, kv, o, kv, kv, np.zeros((0, text.n_head_kv), bool)) for _ in range(text.n_layer)]
        self.ids: list[int] = []  # -1 for an image row
        self.generated: list[bool] = []
        self.queue: list[int] = []  # rows whose entropies have entered the queue, in order
        self.prune = prune
        self.pictures: list[tuple[int, int]] = []  # first row and rows of each
        self.answer: Answer | None = None  # None: the newest picture's prompt has not ended
        self.prunings: list[tuple[int, str, int, int]] = []  # row, reason, rows of pictures before and after
        self.observed: tuple[bool, list[Array]] | None = None  # for tests: was pruned behind this step, (G, rows) live of each layer
        self.prompt_start = 0  # first row of the prompt that has not ended yet
        self.smoothed_on = policy.layer_set(text.n_layer) if policy else set()
        self.dscr, self.refined_on = dscr, dscr.layer_set(text.n_layer) if dscr else set()
        self.n_refined = 0  # of them, after the prefill
        self.n_group = text.n_head_kv if policy and policy.entropy_heads == "per_kv_group" else 1

    @property
    def n_past(self) -> int:
        return len(self.ids)

    def feed(self, rows: Sequence[int] | Array, generated: bool = False) -> None:
        """Token ids, or embeddings (n, E) of a picture."""
        embeddings = isinstance(rows, np.ndarray) and rows.ndim == 2
        ids = [-1] * len(rows) if embeddings else [int(i) for i in rows]
        x = rows.astype(np.float64) if embeddings else self.text.token_embd[ids]
        if embeddings:
            return self._feed_picture(ids, x)
        if not generated:
            return self._run(ids, x, False)
        self.end_prefill()
        for i, id in enumerate(ids):  # strictly one by one: row t + 1 must see the smoothed row t
            self._run([id], x[i : i + 1], True)
            if self.answer:
                self._prune_after_step()

    def _feed_picture(self, ids: list[int], x: Array) -> None:
        first, n = self.n_past, len(ids)
        self.pictures.append((first, n))
        self.answer = None
        self._run(ids, x, False)
        if self.dscr and self.dscr.phase == "before_question":
            for layer in self.refined_on:
                self._refine(layer, len(self.pictures) - 1)

    def _refine(self, layer: int, picture: int) -> None:
        """DSCR on one layer's rows of a picture: what is stored is mixed, and what comes out is the next mix's exact row, too."""
        c, (first, n) = self.layers[layer], self.pictures[picture]
        rows, positions = slice(first, first + n), np.arange(first, first + n)
        k, v = self.dscr.refined(c.k[rows], c.v[rows], picture, lambda k, sign: rotate(k, sign * positions, self.text.inv_freq))
        c.exact_k[rows], c.exact_v[rows] = k, v
        c.k[rows], c.v[rows] = self.store(k), self.store(v)

    def new_turn(self) -> None:
        if self.policy and self.policy.queue_scope == "turn":
            self.queue = []

    def end_prefill(self) -> None:
        """Once after a prompt, before anybody looks at it: warm_start, smooth_prompt."""
        last, first = self.n_past - 1, self.prompt_start
        self.prompt_start = self.n_past
        if self.dscr and self.dscr.phase == "after_prefill":
            for picture in range(self.n_refined, len(self.pictures)):
                for layer in self.refined_on:
                    self._refine(layer, picture)
            self.n_refined = len(self.pictures)
        if self.prune and self.pictures and self.answer is None:
            a = self._attention_to_pictures()
            self.answer = Answer(self.prune, [a], a)
        if not self.policy or first > last:
            return
        n = max(self.policy.warm_rows(), self.policy.smooth_prompt == "last_token")
        self.queue += range(max(first, last + 1 - n), last + 1)
        if self.policy.smooth_prompt == "last_token" and last > 0:
            for layer in self.smoothed_on:
                self._smooth(layer, last, None)

    def logits(self) -> Array:
        self.end_prefill()
        return self._logits

    def kv(self, layer: int) -> tuple[Array, Array]:
        self.end_prefill()
        c = self.layers[layer]
        k, v = (np.stack([side[c.live[:, g], g] for g in range(self.text.n_head_kv)]) for side in (c.k, c.v))
        return k, v

    def positions(self, layer: int) -> Array:
        """(G, rows): indices of the rows that are there."""
        return np.stack([np.flatnonzero(live) for live in self.layers[layer].live.T])

    def entropies(self) -> Array:
        """(n_generated, n_layer)"""
        return self._telemetry("entropy")

    def strengths(self) -> Array:
        return self._telemetry("strength")

    def visual_masses(self) -> Array:
        return self._telemetry("mass")

    def _telemetry(self, what: str) -> Array:
        self.end_prefill()
        rows = [i for i, g in enumerate(self.generated) if g]
        return np.array([[getattr(c, what)[i].mean() for c in self.layers] for i in rows]).reshape(len(rows), len(self.layers))

    def _run(self, ids: list[int], x: Array, generated: bool) -> None:
        """The layer loop, for prefill and decode."""
        t, first = self.text, self.n_past
        self.ids += ids
        self.generated += [generated] * len(ids)
        if generated:
            self.queue.append(first)
            self.prompt_start = first + 1
        positions = np.arange(first, first + len(ids))
        for i, w in enumerate(t.layers):
            h = rms_norm(x, w["attn_norm"], t.rms_eps)
            q, k, v = ((h @ w[name].T + w[name + ".bias"]).reshape(len(ids), -1, t.head_dim) for name in ("attn_q", "attn_k", "attn_v"))
            self._append(i, rotate(k, positions, t.inv_freq), v)
            if ids[0] < 0 and self.dscr and self.dscr.phase == "in_layer" and i in self.refined_on:
                self._refine(i, len(self.pictures) - 1)
            out, entropy = self._attention(i, rotate(q, positions, t.inv_freq))
            self._record(i, entropy, out)
            if generated and i in self.smoothed_on:
                out = self._smooth(i, first, out)
            x = x + out.reshape(len(ids), -1) @ w["attn_output"].T + w["attn_output.bias"]
            h = rms_norm(x, w["ffn_norm"], t.rms_eps)
            gate, up = h @ w["ffn_gate"].T + w["ffn_gate.bias"], h @ w["ffn_up"].T + w["ffn_up.bias"]
            x = x + (silu(gate) * up) @ w["ffn_down"].T + w["ffn_down.bias"]
        self._logits = rms_norm(x[-1], t.output_norm, t.rms_eps) @ t.output.T

    def _append(self, layer: int, k: Array, v: Array) -> None:
        c = self.layers[layer]
        c.k, c.v = np.concatenate([c.k, self.store(k)]), np.concatenate([c.v, self.store(v)])
        c.exact_k, c.exact_v = np.concatenate([c.exact_k, k]), np.concatenate([c.exact_v, v])
        c.raw_k, c.raw_v = np.concatenate([c.raw_k, k]), np.concatenate([c.raw_v, v])
        c.live = np.concatenate([c.live, np.ones((len(k), self.text.n_head_kv), bool)])

    def _attention(self, layer: int, q: Array) -> tuple[Array, Array]:
        """q (n, H, D), the newest n rows -> outputs (n, H, D), row entropies (n, H). Each row sees itself and all before."""
        c, n = self.layers[layer], len(q)
        repeat = self.text.n_head // self.text.n_head_kv
        k, v = c.k.repeat(repeat, axis=1), c.v.repeat(repeat, axis=1)
        scores = np.einsum("qhd,khd->qhk", q, k) / np.sqrt(self.text.head_dim)
        scores = np.where(c.live.repeat(repeat, axis=1).T, scores, -np.inf)
        visual = self._visual(len(k))
        out, entropy = np.empty_like(q), np.empty(q.shape[:2])
        exclude = self.policy is not None and not self.policy.entropy_include_self
        for i in range(n):
            p = softmax(scores[i, :, : len(k) - n + i + 1])
            out[i] = np.einsum("hk,khd->hd", p, v[: p.shape[1]])
            entropy[i] = row_entropy(p, exclude)
            c.seen.append(int(c.live[: p.shape[1], 0].sum()))
            c.mass.append(p[:, visual[: p.shape[1]]].sum(1).mean())
        c.newest = p
        return out, entropy

    def _record(self, layer: int, entropy: Array, out: Array) -> None:
        c = self.layers[layer]
        c.entropy += list(entropy.reshape(len(entropy), self.n_group, -1).mean(-1))
        c.strength += [np.full(self.n_group, np.nan) for _ in entropy]
        c.exact_o = np.concatenate([c.exact_o, out])

    def _smooth(self, layer: int, index: int, out: Array | None) -> Array | None:
        """KVSmooth on row index, right after its attention; gives the attention output to go on with."""
        p, c = self.policy, self.layers[layer]
        after_prompt = index > 0 and not self.generated[index - 1]
        skip_first = p.first_token == "skip" and after_prompt and self.generated[index]
        if index == 0 or skip_first or self.ids[index] in p.skip_token_ids:
            return out  # ranked, as part of the queue; strength stays NaN
        queue = self.queue[-p.window :]
        values = [p.ranked(c.entropy[i], c.seen[i]) for i in queue]
        lam = np.array([p.strength([z[g] for z in values], index, layer) for g in range(self.n_group)])
        c.strength[index] = lam
        if "k" in p.target:
            before = c.exact_k[index - 1 : index]
            before = rotate(before, np.array([1.0]), self.text.inv_freq) if p.rope_mode == "relative" else before
            self._replace(c, "k", index, p.mixed(c.exact_k[index], before[0], lam[:, None]))
        if "v" in p.target:
            self._replace(c, "v", index, p.mixed(c.exact_v[index], c.exact_v[index - 1], lam[:, None]))
        if "o" in p.target:
            out = p.mixed(out[0], c.exact_o[index - 1], lam[:, None])[None]
            if p.ema == "recursive":
                c.exact_o[index] = out[0]
        return out

    # ---- PruneHal ----

    def _visual(self, n: int) -> Array:
        visual = np.zeros(n, bool)
        for first, rows in self.pictures:
            visual[first : first + rows] = True
        return visual

    def _live_rows(self, layer: int, g: int) -> Array:
        """Indices of the rows of pictures that are there."""
        return np.flatnonzero(self._visual(self.n_past) & self.layers[layer].live[:, g])

    def _attention_to_pictures(self) -> Array:
        """A_l of the newest row in the pruned layers: mass per row of a picture that it saw."""
        on = self.prune.layer_list(self.text.n_layer)
        return np.array([self.layers[i].mass[-1] / len(self._live_rows(i, 0)) for i in on])

    def _prune_after_step(self) -> None:
        on, n_groups = self.prune.layer_list(self.text.n_layer), self.text.n_head_kv
        before = len(self._live_rows(on[0], 0))
        reason, share, count = self.answer.step(self._attention_to_pictures(), before, self.observed and self.observed[0])
        if reason is None:
            return
        p = np.stack([self.layers[i].newest.reshape(n_groups, -1, self.n_past) for i in on])
        scores = self.prune.scores(p)
        picture = np.searchsorted([first for first, _ in self.pictures], np.arange(self.n_past), side="right")
        for row, layer in zip(scores, on, strict=True):
            for g in range(n_groups):
                live = self._live_rows(layer, g)
                nudge = self.prune.tolerance * self.observed[1][layer][g][live] if self.observed else 0.0
                stays = self.prune.choose(row[g][live] + nudge, picture[live], count, share)
                self.layers[layer].live[live[~stays], g] = False
        self.prunings.append((self.n_past - 1, reason, before, len(self._live_rows(on[0], 0))))

    def _replace(self, c: LayerCache, side: str, index: int, row: Array) -> None:
        getattr(c, side)[index] = self.store(row)
        if self.policy.ema == "recursive":
            getattr(c, "exact_" + side)[index] = row


def greedy(session: Session, n: int) -> tuple[list[int], list[Array]]:
    """n tokens, each fed back; the logits before the first and after each."""
    tokens, logits = [], [session.logits()]
    for _ in range(n):
        tokens.append(int(logits[-1].argmax()))
        session.feed(tokens[-1:], generated=True)
        logits.append(session.logits())
    return tokens, logits
