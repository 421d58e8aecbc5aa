"""A build of llama.cpp beside us: its llama-bench and llama-mtmd-cli on the same files, with the settings that it has.

Which flash attention and which weights (repacked or as they are) are faster differs from machine to machine and from depth to depth, so all
of them are tried, by the flags that --help of the build shows.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..session import KVType
from .child import ChildError, Ended, run_child

HELP_SECONDS = 60.0
ALL_LAYERS = 999
TRACE = "4"  # the verbosity at which llama-mtmd-cli closes with its figures
BENCH_CACHES = ("f16", "q8_0")  # of ours, those that -ctk of llama-bench takes; llama-mtmd-cli has all
_STAMP = r"^(\d+)\.(\d\d)\.(\d{3})\.(\d{3}) [A-Z] "  # of a line of its log: minutes, seconds, milliseconds, microseconds
_LOADED = re.compile(_STAMP + r"main: loading model:", re.MULTILINE)  # said behind loading and warming up
_ANSWERED = re.compile(_STAMP + r"llama_perf_context_print:", re.MULTILINE)
_ENCODED = re.compile(r"(?:encoding|encoded|encode)[^\n]*?(?:done )?in\s+([0-9.]+)\s*ms")


class PeerError(ChildError):
    """A tool of the peer is missing, fails, or says something that can't be read."""


@dataclass(frozen=True)
class Setting:
    """name: "flash attention off, repack on"; flags: what says so."""

    name: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class LlamaCpp:
    """folder: with the programs of a build. timeout: seconds for each run of one. gpu: the number of the one that it is to use, and
    gpu_layers: how many of the model's it has, None for all. Without gpu it finds none. kv_type: of its cache."""

    folder: str
    timeout: float = 1800.0
    gpu: int | None = None
    gpu_layers: int | None = None
    kv_type: KVType = "f16"

    def bench_settings(self) -> list[Setting]:
        """Of llama-bench. PeerError if it is missing, has no --help, or no such cache."""
        text = self._help("llama-bench")
        flash = ("on", "off") if re.search(r"-fa,[^\n]*<on\|off", text) else ("1", "0")
        return _settings(
            self._flash(flash) if "-fa," in text else [],
            _both("repack", "--repack", ("1", "0")) if "--repack" in text and self._on_cpu else [],
            self._cache("llama-bench", "-ctk," in text and self.kv_type in BENCH_CACHES),
        )

    def cli_settings(self) -> list[Setting]:
        """Of llama-mtmd-cli."""
        text = self._help("llama-mtmd-cli")
        flash = re.search(r"--flash-attn[^\n]*\[on\|off", text)
        repack = [Setting("repack on", ()), Setting("repack off", ("--no-repack",))] if "--no-repack" in text and self._on_cpu else []
        return _settings(self._flash(("on", "off")) if flash else [], repack, self._cache("llama-mtmd-cli", "-ctk," in text))

    def prefill(self, model: str, threads: int, rows: int, setting: Setting) -> float:
        """Rows per second."""
        return self._bench(model, threads, {"n_prompt": rows, "n_gen": 0, "n_depth": 0}, setting)

    def decode(self, model: str, threads: int, depth: int, tokens: int, setting: Setting) -> float:
        """Tokens per second from this depth on."""
        return self._bench(model, threads, {"n_prompt": 0, "n_gen": tokens, "n_depth": depth}, setting)

    def caption(
        self, pair: tuple[str, str], threads: int, image: str, prompt: str, tokens: int, n_ctx: int, setting: Setting
    ) -> tuple[Ended, float | None]:
        """(one whole run that makes so many tokens, seconds of them that went into the picture or None if it does not say so)"""
        ended = self._caption(pair, threads, image, prompt, tokens, n_ctx, setting)
        found = [float(text) for text in _ENCODED.findall(ended.err + ended.out)]
        return ended, sum(found) / 1000 if found else None

    def answer(self, pair: tuple[str, str], threads: int, image: str, prompt: str, tokens: int, n_ctx: int, setting: Setting) -> float:
        """Seconds from the model loaded to the last of so many tokens. PeerError if it does not say so."""
        known = self._help("llama-mtmd-cli")
        flags = [flag for flag in ("--log-prefix", "--log-timestamps") if flag in known]
        flags += ["--verbosity", TRACE] if "--verbosity" in known else []
        ended = self._caption(pair, threads, image, prompt, tokens, n_ctx, setting, flags)
        return read_answer(ended.err + ended.out)

    def _caption(
        self,
        pair: tuple[str, str],
        threads: int,
        image: str,
        prompt: str,
        tokens: int,
        n_ctx: int,
        setting: Setting,
        log: Sequence[str] = (),
    ) -> Ended:
        argv = ["-m", pair[0], "--mmproj", pair[1], "--image", image, "-p", prompt, "-n", tokens, "-c", n_ctx, "-t", threads, "--temp", 0]
        known = self._help("llama-mtmd-cli")
        more = ["--ignore-eos"] if "--ignore-eos" in known else []
        more += ["--chat-template", "vicuna"] if "--chat-template " in known else []  # LLaVA-1.5's; a file without a template is refused
        return self._run("llama-mtmd-cli", [*map(str, argv), *more, *log, *setting.flags])

    def _bench(self, model: str, threads: int, test: dict[str, int], setting: Setting) -> float:
        flags = ["-m", model, "-t", threads, "-p", test["n_prompt"], "-n", test["n_gen"], "-d", test["n_depth"], "-r", 1, "-o", "json"]
        return read_bench(self._run("llama-bench", [*map(str, flags), *setting.flags]).out, test)

    def _flash(self, words: tuple[str, str]) -> list[Setting]:
        """On alone for a quantized cache: llama.cpp refuses to begin without it."""
        return _both("flash attention", "-fa", words)[: 1 if self.kv_type == "q8_0" else 2]

    def _cache(self, tool: str, known: bool) -> list[Setting]:
        """Nothing for f16, which is what its tools take by themselves."""
        if self.kv_type == "f16":
            return []
        if not known:
            raise PeerError(f"{tool}: it has no {self.kv_type} cache, so it is left out")
        return [Setting(f"{self.kv_type} cache", ("-ctk", self.kv_type, "-ctv", self.kv_type))]

    @property
    def _on_cpu(self) -> bool:
        """Some layers: only there weights can be repacked."""
        return self.gpu is None or self.gpu_layers is not None

    def place_flags(self) -> list[str]:
        """What says which GPU, and how much of the model."""
        if self.gpu is None:
            return []
        return ["-ngl", str(ALL_LAYERS if self.gpu_layers is None else self.gpu_layers), "-sm", "none", "-mg", str(self.gpu)]

    def _run(self, tool: str, flags: Iterable[str]) -> Ended:
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""} if self.gpu is None else None
        try:
            return run_child([os.path.join(self.folder, tool), *flags, *self.place_flags()], self.timeout, env)
        except ChildError as error:
            raise PeerError(str(error)) from error

    def _help(self, tool: str) -> str:
        path = os.path.join(self.folder, tool)
        try:
            ended = run_child([path, "--help"], min(HELP_SECONDS, self.timeout))
        except ChildError as error:
            raise PeerError(str(error)) from error
        return ended.out + ended.err


def read_bench(text: str, test: dict[str, int]) -> float:
    """Units per second of one test from llama-bench's JSON: a list with a record whose n_prompt, n_gen and n_depth are the test's.
    PeerError for anything else."""
    try:
        records: Any = json.loads(text)
        found = [record["avg_ts"] for record in records if all(record.get(key, 0) == value for key, value in test.items())]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise PeerError(f"llama-bench: its output is not the JSON that was expected: {text.strip()[:60]!r}") from None
    if len(found) != 1:
        raise PeerError(f"llama-bench: {len(found)} records of the test {test}, not one")
    if not isinstance(found[0], (int, float)) or not math.isfinite(found[0]) or found[0] <= 0:
        raise PeerError(f"llama-bench: {found[0]!r} is no speed")
    return float(found[0])


def read_answer(text: str) -> float:
    """Seconds between two lines of llama-mtmd-cli's log: the model is loaded, and the figures that stand behind the last token. The times
    that it prints there are no such sum: that of the prompt runs on while the picture is encoded. PeerError where one is missing."""
    begin, end = _LOADED.search(text), _ANSWERED.search(text)
    if not (begin and end):
        raise PeerError("llama-mtmd-cli: its log does not say when the model was loaded, or when the last token came")
    return _seconds(end) - _seconds(begin)


def _seconds(found: re.Match[str]) -> float:
    minutes, seconds, milli, micro = map(int, found.groups())
    return 60 * minutes + seconds + milli / 1e3 + micro / 1e6


def by_setting(settings: Callable[[], list[Setting]], measure: Callable[[Setting], float]) -> dict[str, Callable[[], float]]:
    """One measurement for each setting, by name. A tool that can't even show its help gives one that says so."""
    try:
        chosen = settings()
    except PeerError as error:
        return {"llama.cpp": _raises(error)}
    return {setting.name: partial(measure, setting) for setting in chosen}


def _raises(error: Exception) -> Callable[[], float]:
    def measure() -> float:
        raise error

    return measure


def _both(name: str, flag: str, words: tuple[str, str]) -> list[Setting]:
    return [Setting(f"{name} {state}", (flag, word)) for state, word in zip(("on", "off"), words, strict=True)]


def _settings(*choices: list[Setting]) -> list[Setting]:
    combined = itertools.product(*(choice for choice in choices if choice))
    return [
        Setting(", ".join(setting.name for setting in parts) or "as it is", tuple(flag for setting in parts for flag in setting.flags))
        for parts in combined
    ]
