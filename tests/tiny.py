"""Random LLaVA pairs of about a megabyte, written as GGUF files: a text model and its mmproj in any of the published forms."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from reference import Clip, Text, load_clip, load_text

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
TEXT = "the a of in on and with is are man woman dog cat red blue big small table street car tree USER ASSISTANT describe image"


@dataclass
class Weights:
    """What the NumPy reference runs: float64 of the values as they are stored."""

    text: Text
    clip: Clip | None


def vocabulary(n_vocab: int | None = None) -> tuple[list[str], list[float], list[int]]:
    """A small SentencePiece vocabulary: three control tokens, 256 bytes, characters, and merges that lead up to the words of TEXT."""
    tokens, types = ["<unk>", "<s>", "</s>"], [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    tokens += [f"<0x{i:02X}>" for i in range(256)]
    types += [gguf.TokenType.BYTE] * 256
    pieces = dict.fromkeys(("▁" + word)[:n] for word in TEXT.split() for n in range(2, len(word) + 2))
    pieces |= dict.fromkeys("▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"-<>/äé中")
    tokens += pieces
    types += [gguf.TokenType.NORMAL] * len(pieces)
    n_vocab = n_vocab or len(tokens)
    if n_vocab < len(tokens):
        raise ValueError(f"n_vocab {n_vocab} is less than the {len(tokens)} tokens of the vocabulary")
    types += [gguf.TokenType.UNUSED] * (n_vocab - len(tokens))
    tokens += [f"<unused{i}>" for i in range(n_vocab - len(tokens))]
    scores = [0.0 if t != gguf.TokenType.NORMAL else 0.0 - i for i, t in enumerate(types)]
    return tokens, scores, types


def random_blocks(rng: np.random.Generator, shape: tuple[int, ...], kind: T, std: float) -> np.ndarray:
    """Rows of K- or IQ4-quants with random bits, the float16 scales set so that the values have mean 0 and the wanted deviation."""
    size, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // size, n_bytes), dtype=np.uint8)
    at = {T.Q2_K: 80, T.Q3_K: 108, T.Q6_K: 208}.get(kind, 0)  # of d; the rest begin with it
    minimum = {T.Q2_K: (82, 1.5), T.Q4_K: (2, 7.5), T.Q5_K: (2, 15.5)}.get(kind)

    def deviation(scale: np.ndarray) -> float:
        for offset, factor in [(at, 1.0)] + ([minimum] if minimum else []):
            blocks[:, offset : offset + 2] = (scale * factor).astype(np.float16).view(np.uint8).reshape(-1, 2)
        return gguf.quants.dequantize(blocks, kind).std()

    scale = rng.choice([-1.0, 1.0], len(blocks)) * rng.uniform(0.5e-3, 1.5e-3, len(blocks))
    deviation(scale * (std / deviation(scale)))
    return blocks.reshape(*shape[:-1], -1)


def stored(rng: np.random.Generator, shape: tuple[int, ...], kind: T, std: float, mean: float = 0.0) -> tuple[np.ndarray, T]:
    """Random values as the file holds them. Vectors and what does not fit whole blocks become float32."""
    values = (rng.standard_normal(shape) * std + mean).astype(np.float32)
    if len(shape) == 1 or kind == T.F32:
        return values, T.F32
    if kind == T.F16:
        return values.astype(np.float16), T.F16
    if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] or len(shape) > 2:
        return values, T.F32
    try:
        return gguf.quants.quantize(values, kind), kind
    except NotImplementedError:
        return random_blocks(rng, shape, kind, std), kind


class Writer:
    """One GGUF file of random tensors: wide, so that attention is not uniform and the margins between tokens are not tiny."""

    def __init__(
        self, path: Path, arch: str, rng: np.random.Generator, kind: str, kinds: dict[str, str] | None = None, gain: float = 1.6
    ) -> None:
        self.path, self.rng, self.kind, self.kinds, self.gain = path, rng, T[kind.upper()], kinds or {}, gain
        self.gguf = gguf.GGUFWriter(path, arch)
        self.gguf.add_name("random " + arch)
        self.gguf.add_quantization_version(gguf.GGML_QUANT_VERSION)

    def tensor(self, name: str, *shape: int, std: float | None = None, mean: float = 0.0) -> None:
        std = std or (0.1 if len(shape) == 1 else self.gain / np.sqrt(np.prod(shape[1:])))
        kind = next((T[k.upper()] for part, k in self.kinds.items() if part in name), self.kind)
        data, kind = stored(self.rng, shape, kind, std, mean)
        self.gguf.add_tensor(name, data, raw_dtype=kind)

    def dense(self, name: str, rows: int, cols: int, bias: bool) -> None:
        self.tensor(name + ".weight", rows, cols)
        if bias:
            self.tensor(name + ".bias", rows)

    def norm(self, name: str, n: int, bias: bool = False) -> None:
        self.tensor(name + ".weight", n, mean=1.0)
        if bias:
            self.tensor(name + ".bias", n)

    def close(self) -> str:
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_tensors_to_file()
        self.gguf.close()
        return str(self.path)


def write_text(
    path: Path,
    rng: np.random.Generator,
    *,
    n_layer: int = 4,
    n_embd: int = 64,
    n_head: int = 4,
    n_head_kv: int = 4,
    head_dim: int | None = None,
    n_rot: int | None = None,
    n_ff: int = 160,
    n_vocab: int | None = None,
    n_ctx_train: int = 512,
    type: str = "f32",
    types: dict[str, str] | None = None,
    gain: float = 1.6,
    tied: bool = False,
    biases: bool = False,
    rope_theta: float = 10000.0,
    rope_scaling: tuple[str, float | Sequence[float]] | None = None,
    chat_template: str | None = None,
) -> str:
    """types: exceptions to type by a part of the tensor's name. rope_scaling: ("linear", factor) or ("llama3", n_rot / 2 factors)."""
    w = Writer(path, "llama", rng, type, types, gain)
    d = head_dim or n_embd // n_head
    tokens, scores, kinds = vocabulary(n_vocab)
    w.gguf.add_context_length(n_ctx_train)
    w.gguf.add_embedding_length(n_embd)
    w.gguf.add_block_count(n_layer)
    w.gguf.add_feed_forward_length(n_ff)
    w.gguf.add_head_count(n_head)
    w.gguf.add_head_count_kv(n_head_kv)
    w.gguf.add_layer_norm_rms_eps(1e-5)
    w.gguf.add_rope_dimension_count(n_rot or d)
    w.gguf.add_rope_freq_base(rope_theta)
    w.gguf.add_vocab_size(len(tokens))
    if head_dim:
        w.gguf.add_key_length(d)
        w.gguf.add_value_length(d)
    if rope_scaling and rope_scaling[0] == "linear":
        w.gguf.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.gguf.add_rope_scaling_factor(rope_scaling[1])
    elif rope_scaling:
        w.gguf.add_tensor("rope_freqs.weight", np.array(rope_scaling[1], np.float32))
    w.gguf.add_tokenizer_model("llama")
    w.gguf.add_tokenizer_pre("default")
    w.gguf.add_token_list(tokens)
    w.gguf.add_token_scores(scores)
    w.gguf.add_token_types(kinds)
    w.gguf.add_bos_token_id(1)
    w.gguf.add_eos_token_id(2)
    w.gguf.add_unk_token_id(0)
    w.gguf.add_add_bos_token(True)
    w.gguf.add_add_eos_token(False)
    if chat_template:
        w.gguf.add_chat_template(chat_template)
    w.tensor("token_embd.weight", len(tokens), n_embd, std=0.5)
    w.norm("output_norm", n_embd)
    if not tied:
        w.tensor("output.weight", len(tokens), n_embd)
    for i in range(n_layer):
        b = f"blk.{i}."
        w.norm(b + "attn_norm", n_embd)
        w.dense(b + "attn_q", n_head * d, n_embd, biases)
        w.dense(b + "attn_k", n_head_kv * d, n_embd, biases)
        w.dense(b + "attn_v", n_head_kv * d, n_embd, biases)
        w.dense(b + "attn_output", n_embd, n_head * d, biases)
        w.norm(b + "ffn_norm", n_embd)
        w.dense(b + "ffn_gate", n_ff, n_embd, biases)
        w.dense(b + "ffn_up", n_ff, n_embd, biases)
        w.dense(b + "ffn_down", n_embd, n_ff, biases)
    return w.close()


def write_mmproj(
    path: Path,
    rng: np.random.Generator,
    *,
    n_embd: int = 64,
    v_layer: int = 3,
    v_embd: int = 64,
    v_head: int = 4,
    v_ff: int = 128,
    image: int = 56,
    patch: int = 14,
    type: str = "f32",
    mmproj: str = "modern",
    feature_layer: int | None = None,
    blocks: int | None = None,
    use_gelu: bool | None = False,
    projector_type: str | None = "mlp",
) -> str:
    """v_layer: blocks of the tower as trained; a converted file holds one less, or blocks. mmproj "modern": right ffn names and,
    unless blocks is given, clip.vision.feature_layer. "legacy": as in 2023, fc1 named ffn_down and fc2 ffn_up, no feature_layer, no
    projector_type."""
    w = Writer(path, "clip", rng, type)
    modern, n = mmproj == "modern", blocks or v_layer - 1
    if modern and feature_layer is None and blocks is None:
        feature_layer = n
    w.gguf.add_bool("clip.has_text_encoder", False)
    w.gguf.add_bool("clip.has_vision_encoder", True)
    w.gguf.add_bool("clip.has_llava_projector", True)
    if modern and projector_type:
        w.gguf.add_string("clip.projector_type", projector_type)
    if use_gelu is not None:
        w.gguf.add_bool("clip.use_gelu", use_gelu)
    sizes = {"image_size": image, "patch_size": patch, "embedding_length": v_embd, "feed_forward_length": v_ff, "projection_dim": v_embd}
    for key, value in (sizes | {"block_count": n, "attention.head_count": v_head}).items():
        w.gguf.add_uint32("clip.vision." + key, value)
    w.gguf.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    w.gguf.add_array("clip.vision.image_mean", MEAN)
    w.gguf.add_array("clip.vision.image_std", STD)
    if feature_layer is not None:
        w.gguf.add_array("clip.vision.feature_layer", [feature_layer])
    w.tensor("v.class_embd", v_embd, std=0.5)
    w.tensor("v.patch_embd.weight", v_embd, 3, patch, patch)
    w.gguf.add_tensor("v.position_embd.weight", (rng.standard_normal(((image // patch) ** 2 + 1, v_embd)) * 0.5).astype(np.float32))
    w.norm("v.pre_ln", v_embd, bias=True)
    up, down = ("ffn_up", "ffn_down") if modern else ("ffn_down", "ffn_up")
    for i in range(n):
        b = f"v.blk.{i}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            w.dense(b + name, v_embd, v_embd, bias=True)
        w.norm(b + "ln1", v_embd, bias=True)
        w.norm(b + "ln2", v_embd, bias=True)
        w.dense(b + up, v_ff, v_embd, bias=True)
        w.dense(b + down, v_embd, v_ff, bias=True)
    w.dense("mm.0", n_embd, v_embd, bias=True)
    w.dense("mm.2", n_embd, n_embd, bias=True)
    return w.close()


MMPROJ_OPTIONS = (
    "v_layer",
    "v_embd",
    "v_head",
    "v_ff",
    "image",
    "patch",
    "mmproj",
    "feature_layer",
    "blocks",
    "use_gelu",
    "projector_type",
)


def write_pair(
    directory: str | Path, *, seed: int, v_type: str = "f32", vision: bool = True, load: bool = True, **options: object
) -> tuple[str, str | None, Weights | None]:
    """A text model and an mmproj that fit each other; options go to write_text and write_mmproj by their names. Gives both paths
    and the weights for the reference (None with load=False)."""
    directory, rng = Path(directory), np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    v_options = {name: options.pop(name) for name in MMPROJ_OPTIONS if name in options}
    text = write_text(directory / "text.gguf", rng, **options)
    mmproj = None
    if vision:
        n_embd = options.get("n_embd", 64)
        mmproj = write_mmproj(directory / "mmproj.gguf", rng, n_embd=n_embd, type=v_type, **v_options)
    weights = Weights(load_text(text), load_clip(mmproj) if mmproj else None) if load else None
    return text, mmproj, weights


def endless(path: str | Path) -> None:
    """Answers of a random model never end by themselves: the logit of </s> is always 0, and some other token's is above that."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path, "r+").tensors}
    tensors["output.weight"].data[2] = 0
