"""Writes a random LLaVA pair of a few megabytes that streams English-looking nonsense: for trying the runtime without a checkpoint.

python models/random_pair.py FOLDER        -> FOLDER/text.gguf, FOLDER/mmproj.gguf
"""

import sys
from pathlib import Path

import gguf
import numpy as np

N_LAYER, N_EMBD, N_HEAD, N_FF = 8, 256, 8, 768
V_LAYER, V_EMBD, V_HEAD, V_FF, IMAGE, PATCH = 6, 128, 4, 512, 224, 14
WORDS = (
    "a the one two and with of in on near under above beside behind is are sits stands looks holds wears shows small large old young "
    "red green blue yellow white black brown bright dark wooden round open closed empty full cat dog bird horse person child table chair "
    "window door cup plate book lamp street tree flower field river bridge boat car bicycle train sky cloud sun light shadow wall floor "
    "kitchen garden room picture image photograph left right front background middle"
).split()


def vocabulary() -> tuple[list[str], list[float], list[int]]:
    t = gguf.TokenType
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    types = [t.UNKNOWN, t.CONTROL, t.CONTROL] + [t.BYTE] * 256
    pieces = [("▁" + word)[:n] for word in WORDS for n in range(2, len(word) + 2)]
    pieces += list("▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'-")
    pieces = list(dict.fromkeys(pieces))
    tokens, types = tokens + pieces, types + [t.NORMAL] * len(pieces)
    return tokens, [-float(i) for i in range(len(tokens))], types


class Writer:
    def __init__(self, path: Path, arch: str, seed: int) -> None:
        self.gguf, self.rng = gguf.GGUFWriter(str(path), arch), np.random.default_rng(seed)
        self.gguf.add_quantization_version(gguf.GGML_QUANT_VERSION)

    def add(self, name: str, values: np.ndarray, kind: gguf.GGMLQuantizationType) -> None:
        values = values.astype(np.float32)
        if values.ndim == 1:
            self.gguf.add_tensor(name, values)
        else:
            self.gguf.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    def matrix(self, name: str, rows: int, cols: int, gain: float = 1.0, kind=gguf.GGMLQuantizationType.Q8_0) -> None:
        self.add(name, self.rng.standard_normal((rows, cols)) * gain / np.sqrt(cols), kind)

    def vector(self, name: str, n: int, mean: float) -> None:
        self.add(name, self.rng.standard_normal(n) * 0.05 + mean, gguf.GGMLQuantizationType.F32)

    def close(self) -> None:
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_tensors_to_file()
        self.gguf.close()


def write_text(path: Path, seed: int) -> None:
    w = Writer(path, "llama", seed)
    tokens, scores, types = vocabulary()
    g = w.gguf
    g.add_name("random LLaVA (its words mean nothing)")
    g.add_context_length(2048)
    g.add_embedding_length(N_EMBD)
    g.add_block_count(N_LAYER)
    g.add_feed_forward_length(N_FF)
    g.add_head_count(N_HEAD)
    g.add_layer_norm_rms_eps(1e-5)
    g.add_rope_dimension_count(N_EMBD // N_HEAD)
    g.add_vocab_size(len(tokens))
    g.add_tokenizer_model("llama")
    g.add_token_list(tokens)
    g.add_token_scores(scores)
    g.add_token_types(types)
    g.add_bos_token_id(1)
    g.add_eos_token_id(2)
    g.add_unk_token_id(0)
    w.matrix("token_embd.weight", len(tokens), N_EMBD, 16.0)
    head = w.rng.standard_normal((len(tokens), N_EMBD)) * 2.5 / np.sqrt(N_EMBD)
    words = np.array([piece[1:] in WORDS and piece.startswith("▁") for piece in tokens])
    head[~words] *= 0.05  # whole words only, so that it reads like a sentence
    w.add("output.weight", head, gguf.GGMLQuantizationType.Q8_0)
    w.vector("output_norm.weight", N_EMBD, 1.0)
    for i in range(N_LAYER):
        p = f"blk.{i}."
        w.vector(p + "attn_norm.weight", N_EMBD, 1.0)
        w.vector(p + "ffn_norm.weight", N_EMBD, 1.0)
        for name, gain in (("attn_q", 1.6), ("attn_k", 1.6), ("attn_v", 1.0), ("attn_output", 1.0)):
            w.matrix(p + name + ".weight", N_EMBD, N_EMBD, gain)
        w.matrix(p + "ffn_gate.weight", N_FF, N_EMBD)
        w.matrix(p + "ffn_up.weight", N_FF, N_EMBD)
        w.matrix(p + "ffn_down.weight", N_EMBD, N_FF)
    w.close()


def write_mmproj(path: Path, seed: int) -> None:
    w = Writer(path, "clip", seed)
    g, half = w.gguf, gguf.GGMLQuantizationType.F16
    g.add_bool("clip.has_text_encoder", False)
    g.add_bool("clip.has_vision_encoder", True)
    g.add_bool("clip.has_llava_projector", True)
    g.add_string("clip.projector_type", "mlp")
    g.add_bool("clip.use_gelu", False)
    sizes = {"image_size": IMAGE, "patch_size": PATCH, "embedding_length": V_EMBD, "feed_forward_length": V_FF, "projection_dim": V_EMBD}
    for key, value in {**sizes, "block_count": V_LAYER, "attention.head_count": V_HEAD}.items():
        g.add_uint32("clip.vision." + key, value)
    g.add_array("clip.vision.feature_layer", [V_LAYER])
    g.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    g.add_array("clip.vision.image_mean", [0.48145466, 0.4578275, 0.40821073])
    g.add_array("clip.vision.image_std", [0.26862954, 0.26130258, 0.27577711])
    patch = w.rng.standard_normal((V_EMBD, 3, PATCH, PATCH)) / np.sqrt(3 * PATCH * PATCH)
    g.add_tensor("v.patch_embd.weight", patch.astype(np.float16))
    w.vector("v.class_embd", V_EMBD, 0.0)
    w.matrix("v.position_embd.weight", (IMAGE // PATCH) ** 2 + 1, V_EMBD, 4.0, half)
    for name in ["v.pre_ln"] + [f"v.blk.{i}.{ln}" for i in range(V_LAYER) for ln in ("ln1", "ln2")]:
        w.vector(name + ".weight", V_EMBD, 1.0)
        w.vector(name + ".bias", V_EMBD, 0.0)
    shapes = {"attn_q": (V_EMBD, V_EMBD), "attn_k": (V_EMBD, V_EMBD), "attn_v": (V_EMBD, V_EMBD), "attn_out": (V_EMBD, V_EMBD)}
    shapes |= {"ffn_up": (V_FF, V_EMBD), "ffn_down": (V_EMBD, V_FF)}
    dense = [(f"v.blk.{i}.{name}", *shape) for i in range(V_LAYER) for name, shape in shapes.items()]
    for name, rows, cols in [*dense, ("mm.0", N_EMBD, V_EMBD), ("mm.2", N_EMBD, N_EMBD)]:
        w.matrix(name + ".weight", rows, cols, 1.0, half)
        w.vector(name + ".bias", rows, 0.0)
    w.close()


def write_pair(folder: Path, seed: int = 1) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    text, mmproj = folder / "text.gguf", folder / "mmproj.gguf"
    for write, path, of in ((write_text, text, seed), (write_mmproj, mmproj, seed + 1)):
        part = path.with_suffix(".part")  # a file that was left half written must not be taken for the model
        write(part, of)
        part.replace(path)
    return text, mmproj


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for written in write_pair(Path(sys.argv[1])):
        print(written, f"{written.stat().st_size / 1e6:.1f} MB")
