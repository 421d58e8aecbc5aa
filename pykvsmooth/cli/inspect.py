"""pykvsmooth inspect: what is in a GGUF file, and whether and why it would load."""

from __future__ import annotations

import argparse
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size

from .escape import one_line
from .options import UsageError, add_place
from .terminal import Ui, bytes_text

VALUE_TYPES = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "array", "u64", "i64", "f64")
FIRST = 4  # elements of an array that are shown
LONGEST = 200  # characters of a value
EPILOG = "Exit: 0 it loads, or that is not known (--no-load, an mmproj alone), 1 it does not load, or an error, 2 usage, 130 Ctrl-C."


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="what is in a GGUF file, and does it load",
        description="Keys, tensors, sizes, whether and why the file would load, and what memory of the device that takes.",
        epilog=EPILOG,
    )
    parser.add_argument("file", metavar="FILE", help="text model or mmproj, GGUF")
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--model", metavar="FILE", help="for an mmproj: the text model to try it with (default: one beside it that fits)")
    load.add_argument("--no-load", action="store_true", help="read the file only, do not try to load it")
    add_place(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, ui: Ui) -> int:
    from .. import gguf

    if args.no_load and (args.device, args.gpu_layers) != ("auto", "auto"):
        raise UsageError("--device, --gpu-layers: say where it is loaded, not allowed with --no-load")
    with gguf.open_file(args.file) as file:
        facts = gguf.keys_of(file)
        if args.model and not _is_tower(facts):
            raise UsageError(f"--model {args.model}: is for an mmproj, and {args.file} is none")
        _keys(ui, args.file, file)
        _tensors(ui, file)
    if args.no_load:
        return 0
    answer, why = _would_load(args, facts)
    ui.put("loads: ", "bold")
    ui.put(one_line(why) + "\n")
    return 1 if answer is False else 0


def _is_tower(facts: dict[str, Any]) -> bool:
    return bool(facts.get("general.architecture") == "clip")


def _title(ui: Ui, text: str) -> None:
    ui.put(one_line(text), "bold")
    ui.put("\n")


def _rows(ui: Ui, rows: Sequence[tuple[str, ...]]) -> None:
    """Aligned. A table of rich would fold or cut long names, and people grep for them."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        ui.put("  " + "  ".join(map(set_cell_size, row, widths)).rstrip() + "\n")


# ---- keys ----


def _keys(ui: Ui, path: str, file: Any) -> None:
    from .._native import ffi, lib, string

    n = lib.kvs_gguf_n_keys(file)
    _title(ui, f"{path}: GGUF v{lib.kvs_gguf_version(file)}, {bytes_text(os.path.getsize(path))}")
    _title(ui, f"{n} keys")
    keys = [ffi.new("kvs_gguf_key *") for _ in range(n)]
    for i, key in enumerate(keys):
        lib.kvs_gguf_key_at(file, i, key)
    _rows(ui, [(one_line(string(key.name)), _type_text(key), _value_text(file, i, key)) for i, key in enumerate(keys)])


def _type_text(key: Any) -> str:
    from .._native import lib

    if key.type != lib.KVS_GGUF_ARRAY:
        return VALUE_TYPES[key.type]
    return f"{VALUE_TYPES[key.element_type]}[{key.count}]"


def _value_text(file: Any, i: int, key: Any) -> str:
    from .. import gguf
    from .._native import lib

    if key.type != lib.KVS_GGUF_ARRAY:
        return _short(gguf._value(file, i, 0, key.type))
    if key.element_type == lib.KVS_GGUF_ARRAY:
        return "[[...], ...]"
    shown = [_short(gguf._value(file, i, j, key.element_type)) for j in range(min(key.count, FIRST))]
    return f"[{', '.join(shown)}{', ...' if key.count > FIRST else ''}]"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.7g}"
    if isinstance(value, str):
        rest = f"... ({len(value)} characters)" if len(value) > LONGEST else ""
        return '"' + one_line(value[:LONGEST].replace("\n", "\\n").replace("\t", "\\t")) + '"' + rest
    return str(value)


# ---- tensors ----


def _each_tensor(file: Any) -> Iterator[Any]:
    from .._native import ffi, lib

    tensor = ffi.new("kvs_gguf_tensor *")
    for i in range(lib.kvs_gguf_n_tensors(file)):
        lib.kvs_gguf_tensor_at(file, i, tensor)
        yield tensor


def _type_name(kind: int) -> str:
    from .._native import ffi, lib, string

    name = lib.kvs_type_name(kind)
    return string(name) if name != ffi.NULL else f"type {kind} (does not load)"


def _tensors(ui: Ui, file: Any) -> None:
    from .._native import string

    rows = []
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])  # tensors, elements, bytes
    for t in _each_tensor(file):
        shape = list(t.dims)[: t.n_dims]
        elements = math.prod(shape)
        kind, size = _type_name(t.type), bytes_text(t.bytes) if t.bytes >= 0 else "unknown"
        rows.append((one_line(string(t.name)), kind, " x ".join(map(str, shape)), f"{size:>10}"))
        for at, amount in enumerate((1, elements, max(t.bytes, 0))):
            totals[kind][at] += amount
    _title(ui, f"{len(rows)} tensors (dims: row length first)")
    _rows(ui, rows)
    _totals(ui, totals)


def _totals(ui: Ui, totals: dict[str, list[int]]) -> None:
    elements, size = sum(t[1] for t in totals.values()), sum(t[2] for t in totals.values())
    if not elements:
        return
    _title(ui, f"{elements:,} weights in {bytes_text(size)}: {8 * size / elements:.2f} bits per weight")
    rows = []
    for kind, (n, count, part) in sorted(totals.items(), key=lambda item: -item[1][2]):
        bits = f"{8 * part / count:.2f} bits per weight" if count else ""
        rows.append((kind, f"{n:5} tensors", f"{bytes_text(part):>10}", f"{part / max(size, 1):6.1%}", bits))
    _rows(ui, rows)


# ---- would it load? ----


def _would_load(args: argparse.Namespace, facts: dict[str, Any]) -> tuple[bool | None, str]:
    """Does it (None: not known), and the sentence that says so."""
    return _load_tower(args, facts) if _is_tower(facts) else _try(args, args.file, False)


def _try(args: argparse.Namespace, model: str, mmproj: Any) -> tuple[bool, str]:
    """The only test that can be trusted: loading it."""
    from ..errors import KVSmoothError
    from ..model import Model

    try:
        with Model(model, mmproj=mmproj, device=args.device, gpu_layers=args.gpu_layers) as loaded:
            sight = f"; one picture is {loaded.n_image} rows" if loaded.has_vision else "; text only, give it an mmproj to see pictures"
            depth = f"{loaded.n_layer} layers, width {loaded.n_embd}, {loaded.n_vocab} tokens, trained for {loaded.n_ctx_train} rows"
            where = f"device {loaded.device} ({loaded.device_reason}); {_memory(loaded)}"
            return True, f"yes, in {loaded.load_s:.2f} s: {depth}{sight}; {where}"
    except KVSmoothError as error:
        return False, f"no: {error}"


def _memory(model: Any) -> str:
    from ..machine import available_bytes

    plan = model.memory_plan
    parts = [
        f"{bytes_text(plan.weights)} weights",
        f"{bytes_text(plan.cache)} cache of {plan.n_ctx} rows",
        f"{bytes_text(plan.work)} working space",
    ]
    if plan.reserve:
        parts.append(f"{bytes_text(plan.reserve)} for the device itself")
    free = f"{bytes_text(plan.free)} were free" if plan.free else f"{bytes_text(available_bytes())} are available"
    return f"memory {bytes_text(plan.needed)} ({', '.join(parts)}), {free}"


def _load_tower(args: argparse.Namespace, facts: dict[str, Any]) -> tuple[bool | None, str]:
    """An mmproj loads with a text model only: with the one that was named, or with one in its folder whose width fits."""
    from .. import gguf

    path = args.file
    folder = os.path.dirname(path) or "."
    names = [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(".gguf")]
    texts = [args.model] if args.model else [n for n in names if not os.path.samefile(n, path) and not _misfit(gguf, path, n)]
    if not texts:
        kind = facts.get("clip.projector_type", "without a projector_type")
        return None, f"not known: this is an mmproj ({kind}), and no text model in {folder} fits it; give one with --model"
    answer, why = _try(args, texts[0], path)
    return answer, f"with {texts[0]}: {why}"


def _misfit(gguf: Any, mmproj: str, text: str) -> bool:
    from pathlib import Path

    from ..errors import KVSmoothError

    try:
        metadata = gguf.read_metadata(text)
    except KVSmoothError:
        return True
    return metadata.get("general.architecture") == "clip" or bool(gguf._misfit(Path(mmproj), metadata))
