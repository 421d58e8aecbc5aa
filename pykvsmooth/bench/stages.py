"""What is measured: a function for each stage, which gives its figures to Bench.repeat."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .. import box
from ..batch import Batch
from ..errors import DeviceError, UnsupportedModelError
from ..model import Model
from ..policies.kvsmooth import KVSmooth
from ..session import Session
from . import work
from .child import ChildError, busy_process, of_package, run_child
from .figures import Entry, Figure, ratio_interval
from .peer import LlamaCpp, PeerError, Setting, by_setting
from .roofs import MEMORY

if TYPE_CHECKING:
    from .run import Bench, Context

N_CTX = 1024  # of a caption
QUEUE = 16  # generated rows before KVSmooth has ranks for all that come
PROMPT = "Please describe the image in detail."
ORDERS = ((0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1))
ROUNDED = ("bf16", "amx_bf16", "f16_mma")  # units that round operands: not those of a tower in float32


def _ids(model: Model, n: int) -> list[int]:
    """Tokens that any vocabulary has: what they say does not matter for speed."""
    drawn: list[int] = np.random.default_rng(0).integers(min(3, model.n_vocab - 1), model.n_vocab, n).tolist()
    return drawn


def _grow(session: Session, rows: int) -> None:
    n = rows - session.n_past
    if n > 0:
        session.feed(_ids(session.model, n))


def _arithmetic(context: Context, there: bool) -> list[str]:
    """there: what is measured runs on the device whose roofs these are."""
    return [kind for kind in context.roofs.kinds if kind not in MEMORY] if there else []


def _tower_units(context: Context) -> list[str]:
    """Without those that round, where the tower does not."""
    exact = context.model.vision_precision == "f32"
    return [kind for kind in _arithmetic(context, context.bench.place.tower) if not (exact and kind in ROUNDED)]


def _memory(context: Context) -> Sequence[str]:
    return context.roofs.memory if context.bench.place.whole else ()


def _rivals(bench: Bench, settings: str, measure: Callable[[LlamaCpp, Setting], float]) -> dict[str, Callable[[], float]]:
    peer = bench.peer
    if peer is None:
        return {}
    return by_setting(getattr(peer, settings), lambda setting: measure(peer, setting))


# ---- the machine, and processes of their own ----


def roofs(bench: Bench, context: Context) -> None:
    units = {kind: "bytes/s" if kind in MEMORY else "operations/s" for kind in context.roofs.kinds}
    bench.repeat(
        context,
        *(
            Entry(Figure("roof", unit, context.threads, {"kind": kind}), partial(context.roofs.measure, kind))
            for kind, unit in units.items()
        ),
    )


def load(bench: Bench, context: Context) -> None:
    """Model(path) in a fresh process, and the first pass there. The first process goes on to a caption's memory instead, and has read the
    files: the others find them cached."""
    figure = Figure("load", "s", context.threads, more={"page_cache": "warm"})
    first_pass = Figure("first pass", "s", context.threads)
    asked = json.dumps({"mmproj": bench.mmproj or False, "threads": context.threads, **bench.asked})
    argv = [*of_package(f"{__package__}.probe"), bench.path, asked, bench.settings.kv_type]

    def measure() -> float:
        whole = [] if "peak_bytes" in figure.more else ["--whole"]
        found = json.loads(run_child([*argv, *whole], bench.settings.timeout).out)
        if whole:
            figure.more["peak_bytes"] = found["peak_bytes"]
        else:
            first_pass.values.append(float(found["first_pass_s"]))
        return float(found["load_s"])

    try:
        bench.repeat(context, Entry(figure, measure))
    finally:
        first_pass.error = figure.error
        bench.figures.append(first_pass)


def caption(bench: Bench, context: Context) -> None:
    """From the start of the process to its end: the picture is a file, the answer is text."""
    context.close_model()
    figure = Figure("caption", "s", context.threads, {"tokens": bench.settings.caption_tokens})
    with tempfile.TemporaryDirectory() as folder:
        image = bench.settings.image or _picture(folder)
        bench.repeat(
            context,
            Entry(
                figure,
                lambda: _caption(bench, figure, image),
                rivals=_rivals(bench, "cli_settings", lambda peer, setting: _peer_caption(bench, figure, peer, image, setting)),
            ),
        )


def _picture(folder: str) -> str:
    scenes = box.scenes()
    if scenes:
        return str(scenes[0]["picture"])
    path = os.path.join(folder, "noise.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)).save(path)
    return path


def _caption(bench: Bench, figure: Figure, image: str) -> float:
    _need_tower(bench)
    tokens = bench.settings.caption_tokens
    asked = {"--model": bench.path, "--mmproj": bench.mmproj, "--threads": figure.threads, "--max-tokens": tokens, "--n-ctx": N_CTX}
    asked |= {f"--{name.replace('_', '-')}": value for name, value in bench.asked.items()} | {"--kv-type": bench.settings.kv_type}
    options = [str(word) for option in asked.items() for word in option]
    ended = run_child([*of_package("pykvsmooth"), "caption", image, "--json", "--quiet", *options], bench.settings.timeout)
    try:
        stats = json.loads(ended.out.splitlines()[-1])["stats"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise ChildError(f"pykvsmooth caption: its output can't be read: {ended.out[-60:]!r}") from None
    figure.more |= {"tokens": stats["decode_tokens"], "peak_bytes": ended.peak_bytes, "stats": stats}
    figure.more["unequal"] = stats["decode_tokens"] != tokens  # the model ended it; a peer is told to go on
    return ended.seconds


def _peer_caption(bench: Bench, figure: Figure, peer: LlamaCpp, image: str, setting: Setting) -> float:
    pair = bench.path, _need_tower(bench)
    ended, _ = peer.caption(pair, figure.threads, image, PROMPT, bench.settings.caption_tokens, N_CTX, setting)
    figure.more.setdefault("peer_peak_bytes", {})[setting.name] = ended.peak_bytes
    return ended.seconds


def _need_tower(bench: Bench) -> str:
    if bench.mmproj is None:
        raise UnsupportedModelError(f"{bench.path}: no picture without an mmproj; give --mmproj FILE", bench.path)
    return bench.mmproj


# ---- one model in this process ----


def encode(bench: Bench, context: Context) -> None:
    """Another picture each time: the model remembers the embeddings of those that it has seen."""
    figure = Figure("encode", "s", context.threads)
    rng = np.random.default_rng(0)

    def measure() -> float:
        _need_tower(bench)
        size = int(context.model._info.image_size)
        picture = rng.integers(0, 256, (size, size, 3), np.uint8)
        begin = time.perf_counter()
        context.model.encode_image(picture)
        return time.perf_counter() - begin

    def peer_measure(peer: LlamaCpp, setting: Setting) -> float:
        _, seconds = peer.caption((bench.path, _need_tower(bench)), context.threads, image, PROMPT, 1, N_CTX, setting)
        if seconds is None:
            raise PeerError("llama-mtmd-cli: it does not say how long the picture took")
        return seconds

    with tempfile.TemporaryDirectory() as folder:
        image = bench.settings.image or _picture(folder)
        rivals = _rivals(bench, "cli_settings", peer_measure)
        operations = context.work.picture_operations
        figure.more["operations"] = operations
        bench.repeat(
            context,
            Entry(
                figure,
                measure,
                _tower_units(context),
                lambda seconds: operations / seconds,
                rivals,
            ),
        )


def prefill(bench: Bench, context: Context) -> None:
    with context.model.session(n_ctx=max(bench.settings.rows), kv_type=bench.settings.kv_type) as session:
        for rows in sorted(bench.settings.rows):
            _prefill_of(bench, context, session, rows)


def _prefill_of(bench: Bench, context: Context, session: Session, rows: int) -> None:
    operations = context.work.row_operations
    figure = Figure("prefill", "rows/s", context.threads, {"rows": rows}, more={"operations": operations * rows})

    def measure() -> float:
        session.reset()
        ids = _ids(context.model, rows)
        begin = time.perf_counter()
        session.feed(ids)
        return rows / (time.perf_counter() - begin)

    rivals = _rivals(bench, "bench_settings", lambda peer, setting: peer.prefill(bench.path, context.threads, rows, setting))
    bench.repeat(context, Entry(figure, measure, _arithmetic(context, bench.place.whole), lambda speed: speed * operations, rivals))


def decode(bench: Bench, context: Context) -> None:
    """One session that grows; each repetition's tokens are taken back, so that the next begins at the same depth."""
    depths = sorted(bench.settings.depths)
    with context.model.session(n_ctx=depths[-1] + bench.settings.tokens, kv_type=bench.settings.kv_type) as session:
        for depth in depths:
            _decode_at(bench, context, session, depth)


def _token_seconds(session: Session, depth: int, tokens: int) -> float:
    """Of each of so many behind depth rows. They are taken back."""
    _grow(session, depth)
    begin = time.perf_counter()
    for id in _ids(session.model, tokens):
        session.feed([id], generated=True)
    seconds = time.perf_counter() - begin
    session.rewind(tokens)
    return seconds / tokens


def _decode_at(bench: Bench, context: Context, session: Session, depth: int) -> None:
    model, tokens = context.model, bench.settings.tokens
    read = context.work.token_bytes + work.cache_bytes(model, bench.settings.kv_type, depth + tokens / 2)
    figure = Figure("decode", "tokens/s", context.threads, {"depth": depth}, more={"bytes_per_token": read})

    def measure() -> float:
        return 1 / _token_seconds(session, depth, tokens)

    rivals = _rivals(bench, "bench_settings", lambda peer, setting: peer.decode(bench.path, context.threads, depth, tokens, setting))
    bench.repeat(context, Entry(figure, measure, _memory(context), lambda speed: speed * read, rivals))


def beside(bench: Bench, context: Context) -> None:
    """A token beside another process that keeps one thread busy against one without it, in turns."""
    model, rows, tokens = context.model, max(bench.settings.rows), bench.settings.tokens
    figure, turns = Figure("beside", "ratio", context.threads, {"depth": rows}), list[tuple[float, float]]()
    if bench.place.device == "cpu":
        figure.more["fair"] = _fair_share(context.threads, bench.machine["cores_allowed"])
    with model.session(n_ctx=rows + tokens, kv_type=bench.settings.kv_type) as session:

        def measure() -> float:
            alone = _token_seconds(session, rows, tokens)
            with busy_process():
                turns.append((alone, _token_seconds(session, rows, tokens)))
            return turns[-1][1] / alone

        try:
            bench.repeat(context, Entry(figure, measure))
        finally:
            if figure.values:
                alone, both = zip(*turns[1:], strict=True)
                found = {"alone_s": statistics.median(alone), "beside_s": statistics.median(both)}
                figure.more |= {"interval": ratio_interval(both, alone)[1:], **found}


def _fair_share(threads: int, cores: int) -> float:
    """How many times as long it takes where each thread, the other one too, gets as much of the cores as the next."""
    return max(1.0, (threads + 1) / max(threads, cores))


def answer(bench: Bench, context: Context) -> None:
    """As caption, with the model loaded and warm: from the picture's file to the last token, which is what a server's client waits for."""
    tokens = bench.settings.caption_tokens
    figure = Figure("answer", "s", context.threads, {"tokens": tokens})
    with tempfile.TemporaryDirectory() as folder, context.model.session(n_ctx=N_CTX, kv_type=bench.settings.kv_type) as session:
        image = bench.settings.image or _picture(folder)

        def peer_measure(peer: LlamaCpp, setting: Setting) -> float:
            figure.more["compared"] = "llama-mtmd-cli: by its log, from its model loaded and warmed up to its last token"
            pair = bench.path, _need_tower(bench)
            return peer.answer(pair, context.threads, image, PROMPT, tokens, N_CTX, setting)

        measure = partial(_answer, session, figure, image, tokens)
        bench.repeat(context, Entry(figure, measure, rivals=_rivals(bench, "cli_settings", peer_measure)))


def _answer(session: Session, figure: Figure, image: str, tokens: int) -> float:
    """With nothing left of the answer before: neither rows nor the picture's embedding."""
    session.reset()
    session.model._images.clear()
    begin = time.perf_counter()
    stream = session.generate(PROMPT, image=image, max_tokens=tokens)
    for _ in stream:
        pass
    seconds = time.perf_counter() - begin
    figure.more |= {"tokens": stream.stats.decode_tokens, "stats": dict(stream.stats)}
    figure.more["unequal"] = stream.stats.decode_tokens != tokens  # as in a caption
    return seconds


# ---- a model on two devices ----


def split(bench: Bench, context: Context) -> None:
    """A token of a model with half of its layers on the GPU, over what a model that is there as a whole and one that is on the CPU say of
    it: each device's layers at their own speed, the output matrix on the GPU. The three in turns, so they must fit beside each other."""
    gpu, depth, tokens = bench.place.device, max(bench.settings.rows), bench.settings.tokens
    if gpu == "cpu":
        raise DeviceError("layers are split between a GPU and the CPU; give --device cuda")
    layers, half = bench.place.layers, bench.place.layers // 2
    output = context.work.output_bytes / (context.work.token_bytes + work.cache_bytes(context.model, bench.settings.kv_type, depth))
    context.close_model()
    figure = Figure("split", "ratio", context.threads, {"depth": depth, "gpu_layers": half}, more={"output_share": output})
    places = {"gpu_s": (gpu, layers), "cpu_s": ("cpu", "auto"), "half_s": (gpu, half)}
    with ExitStack() as held:

        def session(device: str, gpu_layers: Any) -> Session:
            model = held.enter_context(Model(bench.path, False, threads=context.threads, device=device, gpu_layers=gpu_layers))
            return held.enter_context(model.session(n_ctx=depth + tokens, kv_type=bench.settings.kv_type))

        sessions, seconds = {name: session(*place) for name, place in places.items()}, {name: list[float]() for name in places}

        def measure() -> float:
            one = {name: _token_seconds(sessions[name], depth, tokens) for name in places}
            for name, value in one.items():
                seconds[name].append(value)
            figure.more |= {name: statistics.median(values[1:] or values) for name, values in seconds.items()}  # the first warms up
            return one["half_s"] / split_seconds(one["gpu_s"], one["cpu_s"], half / layers, output)

        bench.repeat(context, Entry(figure, measure))


def split_seconds(gpu: float, cpu: float, on_gpu: float, output: float) -> float:
    """Of a token with this share of the layers on the GPU, from its seconds on either device alone. output: the share of what is read for
    it that is not the layers', and of its time, since memory is what limits it."""
    return (1 - output) * (on_gpu * gpu + (1 - on_gpu) * cpu) + output * gpu


# ---- the policy ----


def policy(bench: Bench, context: Context) -> None:
    """A token with KVSmooth against one without it, in turns, and against itself one without it for the noise. Each repetition forks
    the three sessions anew: where their caches lie in memory may matter, too."""
    model, rows, tokens = context.model, max(bench.settings.rows), bench.settings.tokens
    figure = Figure("policy", "ratio", context.threads, {"depth": rows})
    with ExitStack() as held:
        off, on = (
            held.enter_context(model.session(n_ctx=rows + QUEUE + tokens, kv_type=bench.settings.kv_type, policy=chosen))
            for chosen in (None, KVSmooth.for_model(model))
        )
        for session in (off, on):
            _grow(session, rows)
            session.feed(_ids(model, QUEUE), generated=True)
        bench.figures.append(figure)
        kept = [list[_Turn]() for _ in range(3)]
        for repetition in range(bench.settings.repeat + 1):
            bench.step(figure, repetition)
            turns = _turns(bench, (off, on, off), tokens)
            if repetition:
                for old, new in zip(kept, turns, strict=True):
                    old += new
                _note_policy(figure, kept, bench.counter.why if bench.place.device == "cpu" else "a GPU does not count them")


@dataclass(frozen=True)
class _Turn:
    """A token. instructions: None where they can't be counted."""

    seconds: float
    instructions: int | None


def _turns(bench: Bench, sessions: Sequence[Session], tokens: int) -> list[list[_Turn]]:
    """The tokens of a fork of each session."""
    turns: list[list[_Turn]] = [[] for _ in sessions]
    with ExitStack() as held:
        forks = [held.enter_context(session.fork()) for session in sessions]
        for i, id in enumerate(_ids(sessions[0].model, tokens)):
            for k in ORDERS[i % len(ORDERS)]:
                before, begin = bench.counter.read(), time.perf_counter()
                forks[k].feed([id], generated=True)
                seconds, after = time.perf_counter() - begin, bench.counter.read()
                turns[k].append(_Turn(seconds, None if before is None or after is None else after - before))
    return turns


def _note_policy(figure: Figure, turns: list[list[_Turn]], why: str) -> None:
    """turns: without the policy, with it, and without it once more."""
    off, on, control = ([turn.seconds for turn in one] for one in turns)
    figure.values = [b / a for a, b in zip(off, on, strict=True)]
    counts = [[turn.instructions for turn in one if turn.instructions] for one in turns[:2]]
    figure.more = {
        "interval": ratio_interval(on, off)[1:],
        "off_s": statistics.median(off),
        "on_s": statistics.median(on),
        "control": _ratio(control, off),
        "instructions": f"not available: {why}" if why else _ratio(counts[1], counts[0]),
    }


def _ratio(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    median, *interval = ratio_interval(a, b)
    return {"ratio": median, "interval": interval}


# ---- many sessions ----


def sessions(bench: Bench, context: Context) -> None:
    """Answers that step together, all of them at the same depth: one more token for each session of each batch, batch by batch."""
    tokens, text = bench.settings.tokens, _text_of(context.model, bench.settings.session_depth)
    depth, kv_type = len(context.model.tokenize(text)), bench.settings.kv_type
    n_ctx = depth + (bench.settings.repeat + 1) * tokens + 8
    with ExitStack() as held:
        entries = []
        for n in bench.settings.sessions:
            batch = held.enter_context(
                context.model.generate_batch([text] * n, n_ctx=n_ctx, kv_type=kv_type, parallel=n, template=None, max_tokens=None)
            )
            figure = Figure("sessions", "tokens/s", context.threads, {"sessions": n, "depth": depth})
            entries.append(Entry(figure, partial(_advance, batch, n * tokens)))
        bench.repeat(context, *entries)


def _text_of(model: Model, n: int) -> str:
    """Words of about n tokens."""
    words = 1
    while len(model.tokenize(" a" * words)) < n:
        words += 1
    return " a" * words


def _advance(batch: Batch, n: int) -> float:
    """Tokens per second of the next n."""
    begin = time.perf_counter()
    for _ in range(n):
        next(batch)
    return n / (time.perf_counter() - begin)
