"""python -m models.race_transformers --model MODEL.gguf [--device cuda] [--depth 640] [--tokens 32] [--repeat 7]

Seconds of a token here and in Hugging Face transformers, plain and under KVSmooth, in turns, with a 95 % interval of the ratio. Theirs is a
Llama of the file's shape with random weights, since only time matters: float16 on a GPU, float32 on a CPU; attention written out ("eager"),
as a method needs it that looks at its weights; a DynamicCache. Its smoothing (arXiv 2602.04268, equations 5 and 13 to 15) is done for all
layers at once and never waits for the GPU, which is faster than the paper's layer by layer. Both are fed the same ids, so that nobody
chooses any, and theirs waits for the GPU once, behind the last token. Both models must fit beside each other. Needs torch and transformers
(the extra "train").
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

import pykvsmooth as kvs
from pykvsmooth.bench import ratio_interval

QUEUE = 16  # generated rows before there are ranks for all that come
Tokens = Callable[[], float]  # feeds some, says how many seconds each took, and takes them back


class Smoother:
    """Strength by the rank of the row entropy among the last 15, EMA of the newest K and V."""

    def __init__(self, policy: kvs.KVSmooth, n_layer: int) -> None:
        self.layers = policy.resolve_layers(n_layer)
        self.window = policy.window
        self.least = max(policy.lambda_ref - policy.half_width, 0.0)
        self.most = min(policy.lambda_ref + policy.half_width, 1.0)
        self.queues: torch.Tensor | None = None  # (layers, up to window)

    def after(self, attentions: tuple[torch.Tensor, ...], cache: DynamicCache) -> None:
        p = torch.stack([attentions[i][0, :, -1] for i in self.layers]).float()  # (layers, heads, keys)
        entropy = -torch.special.xlogy(p, p).sum(-1).mean(-1, keepdim=True)
        self.queues = entropy if self.queues is None else torch.cat((self.queues, entropy), 1)[:, -self.window :]
        rank = (self.queues < entropy).sum(1) / self.queues.shape[1]
        strengths = rank.clamp(self.least, self.most).to(cache.layers[self.layers[0]].keys.dtype)
        for i, strength in zip(self.layers, strengths, strict=True):
            for rows in (cache.layers[i].keys, cache.layers[i].values):
                rows[:, :, -1].lerp_(rows[:, :, -2], strength)


def theirs(ours: kvs.Model, device: str) -> PreTrainedModel:
    """A model of the shape of ours."""
    config = LlamaConfig(
        vocab_size=ours.n_vocab,
        hidden_size=ours.n_embd,
        intermediate_size=int(ours._info.n_ff),
        num_hidden_layers=ours.n_layer,
        num_attention_heads=ours.n_head,
        num_key_value_heads=ours.n_kv_head,
        head_dim=ours.head_dim,
        max_position_embeddings=1 << 20,
    )
    dtype = torch.float32 if device == "cpu" else torch.float16
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    return model.eval()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def their_tokens(model: PreTrainedModel, ids: list[int], depth: int, tokens: int, policy: kvs.KVSmooth | None) -> Tokens:
    device = model.device
    fed = torch.tensor([ids], device=device)
    cache, smoother = DynamicCache(), policy and Smoother(policy, model.config.num_hidden_layers)

    def feed(columns: range) -> None:
        for i in columns:
            out = model(fed[:, i : i + 1], past_key_values=cache, use_cache=True, output_attentions=smoother is not None)
            if smoother:
                smoother.after(out.attentions, cache)

    @torch.inference_mode()
    def measure() -> float:
        wait(device)
        begin = time.perf_counter()
        feed(range(depth, depth + tokens))
        wait(device)
        seconds = time.perf_counter() - begin
        cache.crop(-tokens)  # so many less, in all versions
        return seconds / tokens

    with torch.inference_mode():
        model(fed[:, : depth - QUEUE], past_key_values=cache, use_cache=True, logits_to_keep=1)
        feed(range(depth - QUEUE, depth))
    return measure


def our_tokens(model: kvs.Model, ids: list[int], depth: int, tokens: int, policy: kvs.KVSmooth | None) -> Tokens:
    session = model.session(n_ctx=depth + tokens, policy=policy, exact_rows=tokens + 2)
    session.feed(ids[: depth - QUEUE])
    for id in ids[depth - QUEUE : depth]:
        session.feed([id], generated=True)

    def measure() -> float:
        begin = time.perf_counter()
        for id in ids[depth:]:
            session.feed([id], generated=True)
        seconds = time.perf_counter() - begin
        session.rewind(tokens)
        return seconds / tokens

    return measure


def race(entries: dict[str, Tokens], repeat: int) -> dict[str, list[float]]:
    """All in turns. The first round is thrown away."""
    rounds = [{name: measure() for name, measure in entries.items()} for _ in range(repeat + 1)][1:]
    return {name: [one[name] for one in rounds] for name in entries}


def line(name: str, mine: list[float], other: list[float]) -> str:
    ratio, low, high = ratio_interval(other, mine)
    here, there = (1e3 * statistics.median(values) for values in (mine, other))
    return f"| {name} | {here:.3g} ms | {there:.3g} ms | {ratio:.2f} x [{low:.2f}, {high:.2f}] |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="text model, GGUF")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="on a CPU, of both (default: what Model takes)")
    parser.add_argument("--depth", type=int, default=640, help="rows in the cache (default: 640)")
    parser.add_argument("--tokens", type=int, default=32, help="of each repetition (default: 32)")
    parser.add_argument("--repeat", type=int, default=7, help="repetitions that count (default: 7)")
    args = parser.parse_args()
    if args.depth <= QUEUE:
        parser.error(f"--depth must be more than {QUEUE}")
    with kvs.Model(args.model, mmproj=False, device=args.device, threads=args.threads) as ours:
        device = ours.device
        if device == "cpu":
            torch.set_num_threads(ours.threads)
        model, policies = theirs(ours, device), {"plain": None, "KVSmooth": kvs.KVSmooth()}
        ids = torch.randint(3, ours.n_vocab, (args.depth + args.tokens,), generator=torch.Generator().manual_seed(0)).tolist()
        entries = {}
        for name, policy in policies.items():
            entries[name, "ours"] = our_tokens(ours, ids, args.depth, args.tokens, policy)
            entries[name, "theirs"] = their_tokens(model, ids, args.depth, args.tokens, policy)
        found = race(entries, args.repeat)
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}, {str(model.dtype).removeprefix('torch.')}"
        print(f"{ours.device_reason}; {versions}; a token at depth {args.depth}, {args.repeat} rounds of {args.tokens}\n")
        print("| | ours | transformers | ahead |\n|---|---|---|---|")
        for name in policies:
            print(line(name, found[name, "ours"], found[name, "theirs"]))


if __name__ == "__main__":
    main()
