"""pykvsmooth bench: how fast, held against what this machine can do, and against a build of llama.cpp beside it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..errors import KVSmoothError
from . import options
from .escape import one_line
from .main import INTERRUPTED
from .records import dumps
from .terminal import Ui, bytes_text

if TYPE_CHECKING:
    from ..bench import Bench, Figure

STAGES = ("roofs", "load", "encode", "prefill", "decode", "policy", "beside", "sessions", "answer", "split", "caption")
EPILOG = """Everything is repeated, the first repetition is thrown away, medians are shown. Before and after each repetition the roofs are
measured again, and with --against llama.cpp's tools run in between, with flash attention and repacking on and off: the ratio is to the
best of these. Their cache is of the same type; q8_0 they take with flash attention only, and llama-bench has no f32.
On a GPU both models must fit beside each other. Measure on a machine where nothing else runs. Ctrl-C ends it and shows what there is.

roofs     what the device reads, multiplies and adds at best (a CPU by the kernels that KVS_CPU chooses)
load      a model, in a fresh process whose files are in the page cache; peak memory after a caption at --n-ctx 1024;
          first pass: the first token fed to a session there; on a CPU it brings the weights into the order that the kernels read
encode    a picture; prefill: prompts of --rows rows; decode: tokens behind --depths rows, of a session that grows
policy    seconds of a token with KVSmooth over those without, in turns, with a 95 % interval and the same of off against off
beside    seconds of a token while another process keeps one thread busy over those without it, in turns
sessions  answers that step together, from a prompt of --session-depth rows on
answer    a caption with the model loaded: from the picture's file to the last token; llama.cpp's by the times of its log
split     seconds of a token with half of the layers on the GPU, over what a model that is there as a whole and one on the CPU predict
caption   from the start of `pykvsmooth caption` to its end

--json writes all that was measured; the keys are described in pykvsmooth/bench/record.py."""
UNITS = {"s": "s", "tokens/s": "tok/s", "rows/s": "rows/s", "ratio": "x", "bytes/s": "GB/s", "operations/s": "Gop/s", "": ""}
NAMES = {
    "roof": "roof: {kind}",
    "prefill": "prefill of {rows} rows",
    "decode": "decode at depth {depth}",
    "policy": "KVSmooth on / off at {depth}",
    "beside": "beside a busy process at {depth}",
    "sessions": "{sessions} at once, depth {depth}",
    "answer": "caption of {tokens} tokens, model loaded",
    "split": "{gpu_layers} layers on the GPU, depth {depth}",
    "caption": "caption of {tokens} tokens",
}
KINDS = {"read": "read, 4 KiB pages", "read_huge": "read, huge pages"}  # of a CPU; the other roofs are called as they are
TRIAL = bytes(1 << 16)  # about as much as --json writes


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="how fast, against this machine's roofs and llama.cpp",
        description="Measures load, pictures, prompts, tokens, captions, and KVSmooth on against off.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="FILE", help="text model, GGUF (default: PYKVSMOOTH_MODEL, else the small one in the box)")
    parser.add_argument("--mmproj", metavar="FILE", help="its vision tower (default: as in caption)")
    options.add_place(parser)
    parser.add_argument("--threads", type=_threads, default=(), metavar="N[,N]", help="one run for each: 1,8 (default: what caption takes)")
    parser.add_argument("--kv-type", choices=("f16", "f32", "q8_0"), default="f16", help="of the cache, llama.cpp's too (default: f16)")
    parser.add_argument(
        "--precision",
        choices=("auto", "exact"),
        default="auto",
        help="of the vision tower, as in caption; llama.cpp has no such choice (default: auto)",
    )
    parser.add_argument("--only", type=_stages, default=(), metavar="STAGE[,]", help=f"some of {', '.join(STAGES)}")
    parser.add_argument("--depths", type=_numbers, default=(128, 640, 2048), metavar="N[,N]", help="of decode (default: 128,640,2048)")
    parser.add_argument(
        "--rows", type=_numbers, default=(640,), metavar="N[,N]", help="of prefill; the most: of policy, beside and split (default: 640)"
    )
    parser.add_argument("--sessions", type=_numbers, default=(1, 2, 4, 8), metavar="N[,N]", help="default: 1,2,4,8")
    parser.add_argument("--session-depth", type=options._rows, default=128, metavar="N", help="rows of their prompts (default: 128)")
    parser.add_argument("--tokens", type=options._positive, default=32, metavar="N", help="of each decode (default: 32)")
    parser.add_argument("--max-tokens", type=options._positive, default=128, metavar="N", help="of the caption (default: 128)")
    parser.add_argument("--image", metavar="FILE", help="of the caption (default: a scene of the box)")
    parser.add_argument("--repeat", type=options._positive, default=5, metavar="N", help="repetitions that count (default: 5)")
    parser.add_argument("--against", metavar="DIR", help="the folder with llama-bench and llama-mtmd-cli of a llama.cpp build")
    parser.add_argument("--timeout", type=options._positive, default=1800, metavar="S", help="for each process (default: 1800 s)")
    group = parser.add_argument_group("output")
    group.add_argument("--json", metavar="F.json", help="write all figures there")
    group.add_argument("--plot", metavar="F.png", help="draw them (.png, .pdf or .svg; needs matplotlib)")
    group.add_argument("--quiet", action="store_true", help="nothing on standard error but errors")
    group.add_argument("--debug", action="store_true", help="log what happens, and show the traceback of an error")
    parser.set_defaults(run=run)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(options._rows(part) for part in text.split(",")))


def _threads(text: str) -> tuple[int, ...]:
    found = _numbers(text)
    if max(found) > 1024:  # as Model
        raise argparse.ArgumentTypeError(f"must be at most 1024, not {max(found)}")
    return found


def _stages(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    for name in names:
        if name not in STAGES:
            raise argparse.ArgumentTypeError(f"there is no stage {name!r}; there are {', '.join(STAGES)}")
    return names


def run(args: argparse.Namespace, ui: Ui) -> int:
    from .. import drawing
    from ..bench import Bench, Settings

    if args.plot:
        drawing.check(args.plot)
    if args.json and not os.path.isdir(os.path.dirname(args.json) or "."):
        raise options.UsageError(f"--json {args.json}: there is no such folder")
    if args.against and not os.path.isdir(args.against):
        raise options.UsageError(f"--against {args.against}: there is no such folder")
    for path in filter(None, (args.json, args.plot)):
        _check_place(path)
    names = {field.name for field in fields(Settings)} - {"caption_tokens"}
    settings = Settings(**{name: getattr(args, name) for name in names}, caption_tokens=args.max_tokens)
    bench = Bench(settings, ui.status)
    _warn(ui, bench)
    try:
        bench.run()
    except KeyboardInterrupt:
        ui.clear()
        ui.note("interrupted: this is what there is")
    ui.clear()
    _show(args, ui, bench)
    if not bench.complete:
        return INTERRUPTED
    return 1 if any(figure.error for figure in bench.figures) else 0


def _warn(ui: Ui, bench: Bench) -> None:
    load, cache = bench.machine["load"], bench.machine["cache_bytes"]
    if load > 0.5:
        ui.note(f"other work runs on this machine (load {load:.1f}): these figures will be too low, and llama.cpp's, too")
    if bench.place.device == "cpu" and os.path.getsize(bench.path) < cache:
        ui.note(f"the whole model fits into the processor's cache of {bytes_text(cache)}: its shares of the memory's roof mean nothing")


def _show(args: argparse.Namespace, ui: Ui, bench: Bench) -> None:
    from ..bench import record

    _table(ui, bench)
    if args.json:
        _write(args.json, dumps(record(bench)) + "\n")
    if args.plot and any(figure.values for figure in bench.figures):
        from ..bench import plot

        plot.draw(bench, args.plot)


def _check_place(path: str) -> None:
    """Can it be written there? Before all the measuring, not after. Bytes are tried, for a full disk takes files without any."""
    if os.path.lexists(path) and not os.path.isfile(path):
        raise KVSmoothError(f"{path}: is no regular file and will not be replaced")
    with _part(path) as part, open(part, "wb") as file:
        file.write(TRIAL)


def _write(path: str, text: str) -> None:
    """Whole or not at all."""
    with _part(path) as part:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(part, path)


@contextmanager
def _part(path: str) -> Iterator[str]:
    """The name of a file beside it, which is gone afterwards. What the system refuses meanwhile is said of path."""
    part = f"{path}.part"
    try:
        yield part
    except OSError as error:
        raise KVSmoothError(f"{path}: can't be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            os.unlink(part)


# ---- the table ----


def _table(ui: Ui, bench: Bench) -> None:
    ui.put(f"{bench.path}\n{bench.machine['cpu']}\n")
    if bench.place.device != "cpu":
        ui.put(f"{bench.machine['cuda']}\n")
    ui.put(f"{_measured(bench)}\n")
    for threads in dict.fromkeys(figure.threads for figure in bench.figures):
        titles = [bench.place.text(threads), "median", "", "least .. most"]
        titles += ["of the roof", *(["llama.cpp", "ahead"] if bench.settings.against else []), ""]
        rows = [_row(figure, bench) for figure in bench.figures if figure.threads == threads]
        widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
        ui.put("\n")
        for i, row in enumerate([titles, *rows]):
            ui.put(_aligned(row, widths) + "\n", "" if i else "bold")


def _measured(bench: Bench) -> str:
    """As in "pykvsmooth 0.1.0 (c86eeb7), f16 cache, precision auto (bf16)": what it is, what was asked for and what came of it."""
    settings, commit, came = bench.settings, bench.origin.get("commit"), bench.model_facts.get("vision_precision")
    version = bench.origin["version"] + (f" ({commit})" if commit else "")
    precision = settings.precision + (f" ({came})" if came else "")
    alone = "; llama.cpp has no such choice" if settings.against and settings.precision != "auto" else ""
    return f"pykvsmooth {version}, {settings.kv_type} cache, precision {precision}{alone}"


def _aligned(row: list[str], widths: list[int]) -> str:
    """Names, units, shares and remarks to the left, figures to the right: those of llama.cpp, where they are, stand before the remarks."""
    figures = (1, 3, *range(5, len(row) - 1))
    cells = (cell.rjust(width) if i in figures else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
    return "  ".join(cells).rstrip()


def _row(figure: Figure, bench: Bench) -> list[str]:
    from ..bench.record import held_against

    scale = 1e-9 if figure.unit in ("bytes/s", "operations/s") else 1
    shares = ", ".join(f"{_median(figure.shares[kind]):.0%} {_kind(kind, bench)}" for kind in held_against(figure))
    row = [_name(figure, bench), *_values(figure.values, scale, figure.unit), shares]
    if bench.settings.against:
        peer = figure.best_peer()
        ahead = figure.ahead()
        row += [_number(_median(figure.peers[peer].values)) if peer else "", f"{_median(ahead):.2f} x" if ahead else ""]
    return [*row, one_line("; ".join(_remarks(figure, bench)))]


def _values(values: list[float], scale: float, unit: str) -> list[str]:
    if not values:
        return ["-", "", ""]
    ends = f"{_number(min(values) * scale)} .. {_number(max(values) * scale)}"
    return [_number(_median(values) * scale), UNITS[unit], ends]


def _kind(kind: str, bench: Bench) -> str:
    return KINDS.get(kind, kind) if bench.place.device == "cpu" else kind


def _name(figure: Figure, bench: Bench) -> str:
    at = {**figure.at, "kind": _kind(figure.at.get("kind", ""), bench)}
    return NAMES[figure.what].format(**at) if figure.at else figure.what


def _remarks(figure: Figure, bench: Bench) -> list[str]:
    from ..bench.record import against_one, seconds_per_block

    more, said = figure.more, [f"error: {figure.error}"] if figure.error else []
    block = seconds_per_block(figure, bench.model_facts) if figure.what == "encode" else None
    if block:
        said.append(f"{1000 * block:.3g} ms per block")
    if figure.what == "sessions" and figure.at.get("sessions", 1) > 1 and (ratios := against_one(figure, bench.figures)):
        said.append(f"{_median(ratios):.2f} x one")
    if more.get("peak_bytes"):
        said.append(f"peak {bytes_text(more['peak_bytes'])}")
    if "half_s" in more:
        said.append("a token: {half_s:.3g} s; all layers there {gpu_s:.3g}, none {cpu_s:.3g}".format(**more))
    if more.get("unequal"):
        said.append(f"the model ended it after {more['tokens']} tokens, so it is not compared")
    if "interval" in more:
        said.append("95 %: {:.3f} .. {:.3f}".format(*more["interval"]))
    if "control" in more:
        said += _policy_remarks(more)
    if "fair" in more:
        said.append(f"a fair share: {more['fair']:.2f}")
    if name := figure.best_peer():
        said.append(f"llama.cpp: {name}")
    return said + [f"llama.cpp, {name}: {peer.error}" for name, peer in figure.peers.items() if peer.error]


def _policy_remarks(more: dict[str, Any]) -> list[str]:
    control = more["control"]["interval"]
    counted = more["instructions"]
    instructions = counted if isinstance(counted, str) else f"{counted['ratio']:.4f}"
    return [f"off / off: {control[0]:.3f} .. {control[1]:.3f}", f"instructions: {instructions}"]


def _median(values: list[float]) -> float:
    from ..bench import spread

    return spread(values).median


def _number(value: float) -> str:
    """Three or four figures."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}" if value >= 1 else f"{value:.3g}"
