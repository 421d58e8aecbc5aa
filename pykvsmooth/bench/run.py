"""The order of things: for each number of threads, stage by stage, each figure again and again with its roofs and its peers in between."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from .. import gguf, machine
from ..errors import KVSmoothError
from ..model import Model, Precision
from ..session import KVType
from . import origin, stages
from .counter import Instructions
from .figures import Entry, Figure, Peer, spread
from .peer import LlamaCpp
from .roofs import Roofs
from .work import Work, of_model

STAGES: dict[str, Callable[[Bench, Context], None]] = {
    "roofs": stages.roofs,
    "load": stages.load,
    "encode": stages.encode,
    "prefill": stages.prefill,
    "decode": stages.decode,
    "policy": stages.policy,
    "beside": stages.beside,
    "sessions": stages.sessions,
    "answer": stages.answer,
    "split": stages.split,
    "caption": stages.caption,
}
BEHIND = 0.85  # of its best setting: a setting of the peer that is slower is not run again
RACED = 3  # repetitions that count before one is called slower: bandwidth may change by half from one run to the next


@dataclass(frozen=True)
class Settings:
    """What is measured.

    model, mmproj, device, gpu_layers, precision: as for Model. kv_type: of each session's cache, and of the peer's. threads: one or
    several; () = what Model takes. depths: rows before the tokens of a decode. rows: of each prefill, the most of them also before the
    tokens of the policy, the split, and those beside a busy process. sessions: how many step together, from session_depth rows on.
    tokens: of each decode, caption_tokens: of the caption of image (None: a scene of the box, else noise). repeat: repetitions that
    count. only: names of STAGES, () = all there is on this device. against: folder of a llama.cpp build. timeout: seconds for each
    process.
    """

    model: str | None = None
    mmproj: str | None = None
    device: str = "auto"
    gpu_layers: int | Literal["auto"] = "auto"
    precision: Precision = "auto"
    kv_type: KVType = "f16"
    threads: tuple[int, ...] = ()
    depths: tuple[int, ...] = (128, 640, 2048)
    rows: tuple[int, ...] = (640,)
    sessions: tuple[int, ...] = (1, 2, 4, 8)
    session_depth: int = 128
    tokens: int = 32
    caption_tokens: int = 128
    image: str | None = None
    repeat: int = 5
    only: tuple[str, ...] = ()
    against: str | None = None
    timeout: float = 1800.0


@dataclass(frozen=True)
class Place:
    """Where a model runs. device: "cpu" or "cuda:N". threads: if nobody says how many. gpu_layers: of its layers. tower: the vision
    tower is there, too."""

    device: str
    threads: int
    gpu_layers: int
    layers: int
    tower: bool

    @property
    def whole(self) -> bool:
        """All layers are on one device: its roofs are theirs."""
        return self.device == "cpu" or self.gpu_layers == self.layers

    def text(self, threads: int) -> str:
        """As in "2 threads", "cuda:0", "cuda:0 with 12 of 32 layers, 2 threads"."""
        host = f"{threads} thread{'' if threads == 1 else 's'}"
        if self.device == "cpu":
            return host
        return self.device if self.whole else f"{self.device} with {self.gpu_layers} of {self.layers} layers, {host}"


class Context:
    """What the stages of one number of threads share: the roofs, and the model while a stage of this process wants it."""

    def __init__(self, bench: Bench, threads: int) -> None:
        self.bench = bench
        self.threads = threads
        self._open = ExitStack()
        self.roofs = self._open.enter_context(Roofs(threads, device=bench.place.device))

    @cached_property
    def model(self) -> Model:
        place = self.bench.place
        layers = "auto" if place.device == "cpu" else place.gpu_layers  # all figures are of the same
        model = self.bench.open(self.threads, device=place.device, gpu_layers=layers)
        model._end_ids = frozenset()  # answers are as long as they were asked for
        self._open.enter_context(model)
        self.bench.note_model(model)
        return model

    @property
    def work(self) -> Work:
        return self.bench.work or self.bench.note_model(self.model)

    def close_model(self) -> None:
        """For measurements in processes of their own."""
        if "model" in self.__dict__:
            self.model.close()
            del self.model

    def close(self) -> None:
        self._open.close()


class Bench:
    """One run. figures: what there is so far. progress(text, done, total) is called before each repetition.

    Raises what Model raises for files that can't be loaded. What goes wrong later is the error of its figure.
    """

    def __init__(self, settings: Settings, progress: Callable[[str, int, int], Any] | None = None) -> None:
        self.settings = settings
        self.figures: list[Figure] = []
        self.machine = machine.facts()
        self.origin = origin.facts()
        self.model_facts: dict[str, Any] = {}
        self.work: Work | None = None
        self.complete = False
        self.path = gguf.model_path(settings.model)
        self.mmproj = gguf.find_mmproj(self.path, gguf.read_metadata(self.path), settings.mmproj).path
        self.counter = Instructions()
        self._progress = progress
        self._done = self._total = 0

    def run(self) -> None:
        threads = self.settings.threads or (self.place.threads,)
        chosen = [name for name in STAGES if name in (self.settings.only or self._usual)]
        self._total = len(threads) * sum(self._measurements(name) for name in chosen)
        try:
            for n in threads:
                self._run(Context(self, n), chosen)
            self.complete = True
        finally:
            self.counter.close()

    @property
    def _usual(self) -> set[str]:
        """What there is to measure where nobody says what."""
        return set(STAGES) - ({"split"} if self.place.device == "cpu" else set())

    def _run(self, context: Context, chosen: list[str]) -> None:
        try:
            for name in chosen:
                begun = self._done
                try:
                    STAGES[name](self, context)
                except (KVSmoothError, OSError, ValueError) as error:
                    self.figures.append(Figure(name, "", context.threads, error=str(error)))
                self._done = begun + self._measurements(name)  # a figure may have ended early
        finally:
            context.close()

    @property
    def asked(self) -> dict[str, Any]:
        """As Model takes it in another process, where less may be free: "auto" layers are found anew."""
        return {"device": self.place.device, "gpu_layers": self.settings.gpu_layers, "precision": self.settings.precision}

    @cached_property
    def place(self) -> Place:
        found = self._found_place(self.settings.device)
        if found.device == "cpu":
            return found
        with Roofs(device=found.device) as roofs:  # which will be there when the model is loaded to be measured
            roofs.measure(roofs.memory[0], 1e-3)
            return self._found_place(found.device)

    def _found_place(self, device: str) -> Place:
        with self.open(None, device=device, gpu_layers=self.settings.gpu_layers) as model:
            threads = model.threads or self.machine["cores_allowed"]  # a GPU that has all of it needs none; peers take some
            tower = model.device == "cpu" or "vision tower" not in model.device_reason  # else it says that the CPU has it
            return Place(model.device, threads, model.n_gpu_layers, model.n_layer, tower)

    @cached_property
    def peer(self) -> LlamaCpp | None:
        if self.settings.against is None:
            return None
        peer = LlamaCpp(self.settings.against, self.settings.timeout, kv_type=self.settings.kv_type)
        if self.place.device == "cpu":
            return peer
        return replace(peer, gpu=int(self.place.device.partition(":")[2]), gpu_layers=None if self.place.whole else self.place.gpu_layers)

    def open(self, threads: int | None, **place: Any) -> Model:
        return Model(self.path, mmproj=self.mmproj or False, threads=threads, precision=self.settings.precision, **place)

    def _measurements(self, stage: str) -> int:
        figures = {"prefill": len(self.settings.rows), "decode": len(self.settings.depths), "sessions": len(self.settings.sessions)}
        return figures.get(stage, 1) * (self.settings.repeat + 1)

    def note_model(self, model: Model) -> Work:
        self.work = self.work or of_model(model)
        self.model_facts = {
            "path": self.path,
            "mmproj": self.mmproj,
            "weight_bytes": model.weight_bytes,
            **asdict(self.work),
            "device": model.device,
            "device_reason": model.device_reason,
            "gpu_layers": model.n_gpu_layers,
            "layers": model.n_layer,
            "vision_blocks": int(model._info.n_vision_layer),
            "image_rows": model.n_image,
            "vision_precision": model.vision_precision if model.has_vision else None,
            "kv_type": self.settings.kv_type,
        }
        return self.work

    # ---- repetitions ----

    def step(self, figure: Figure, repetition: int) -> None:
        """Says what comes."""
        if self._progress is not None:
            at = "".join(f", {name} {value}" for name, value in figure.at.items())
            counted = f"repetition {repetition} of {self.settings.repeat}" if repetition else "warming up"
            self._progress(f"{figure.what}{at}, {self.place.text(figure.threads)}: {counted}", self._done, self._total)
        self._done += 1

    def repeat(self, context: Context, *entries: Entry) -> None:
        """Measures all entries in turn, as often as asked for and once before, which does not count. What goes wrong ends its figure."""
        self.figures += [entry.figure for entry in entries]
        for repetition in range(self.settings.repeat + 1):
            for entry in entries:
                if entry.figure.error:
                    continue
                self.step(entry.figure, repetition)
                try:
                    _measure(entry, context.roofs, counts=repetition > 0)
                except (KVSmoothError, OSError, ValueError) as error:
                    entry.figure.error = str(error)


def _measure(entry: Entry, roofs: Roofs, counts: bool) -> None:
    figure = entry.figure
    before = [roofs.measure(kind) for kind in entry.roofs]
    value = entry.measure()
    after = [roofs.measure(kind) for kind in entry.roofs]
    if counts:
        figure.values.append(value)
        for kind, *both in zip(entry.roofs, before, after, strict=True):
            roof = sum(both) / 2
            figure.roofs.setdefault(kind, []).append(roof)
            figure.shares.setdefault(kind, []).append(entry.used(value) / roof)
    for name, measure in entry.rivals.items():
        _race(figure.peers.setdefault(name, Peer()), measure, counts)
    _drop_slow(figure)


def _race(peer: Peer, measure: Callable[[], float], counts: bool) -> None:
    """A peer that fails is out of it; ours goes on."""
    if peer.error or peer.dropped:
        return
    try:
        value = measure()
    except KVSmoothError as error:
        peer.error = str(error)
        return
    if counts:
        peer.values.append(value)


def _drop_slow(figure: Figure) -> None:
    """Pair by pair with the best: what the machine did in a repetition is common to both."""
    name = figure.best_peer()
    if name is None:
        return
    best = figure.peers[name].values
    for peer in figure.peers.values():
        ratios = [b / value if figure.lower_is_better else value / b for b, value in zip(best, peer.values, strict=False)]
        if len(ratios) >= RACED:
            peer.dropped |= spread(ratios).median < BEHIND
