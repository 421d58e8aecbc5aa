"""pykvsmooth convert: a Hugging Face folder of LLaVA-1.5 to the GGUF pair."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from . import options
from .options import UsageError
from .terminal import Ui, bytes_text


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="a Hugging Face folder of LLaVA-1.5 to GGUF",
        description="Makes text model and mmproj of a checkpoint in the folder DIR: NAME-TYPE.gguf and mmproj-NAME-TYPE.gguf. Reads "
        "safetensors named as llava-hf, transformers or the original LLaVA name them.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="with config.json, safetensors and a tokenizer")
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="where the pair goes; made if need be")
    parser.add_argument(
        "--type",
        default="q8_0",
        metavar="T",
        help="of the text model: f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q4_k_m, q4_k_s, q3_k_m, q3_k_s, q2_k, q5_1, q5_0, q4_1, q4_0 "
        "(default: q8_0)",
    )
    parser.add_argument("--mmproj-type", metavar="T", help="of the mmproj (default: f16, or f32 with --type f32)")
    parser.add_argument("--name", metavar="NAME", help="of the model, in the files and of the files (default: the folder's)")
    parser.add_argument(
        "--vision", metavar="FOLDER", help="the CLIP model that the tower is, where the checkpoint does not hold it (liuhaotian's do not)"
    )
    parser.add_argument("--threads", type=options._positive, metavar="N", help="default: the processors that this process may use")
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, ui: Ui) -> int:
    from ..convert import convert
    from ..mixes import mix_name

    for option, kind in (("--type", args.type), ("--mmproj-type", args.mmproj_type or args.type)):
        try:
            mix_name(kind)
        except ValueError as error:
            raise UsageError(option + str(error).removeprefix("mix")) from error

    def progress(tensor: str, done: int, total: int) -> None:
        ui.status(tensor, done, total)

    begin = time.perf_counter()
    with _terminated_as_interrupted():
        paths = convert(
            args.folder,
            args.out,
            args.type,
            args.mmproj_type,
            name=args.name,
            vision=args.vision,
            threads=args.threads,
            progress=progress,
        )
    ui.clear()
    for path in paths:
        ui.put(f"{path}\n")
    sizes = " and ".join(bytes_text(os.path.getsize(path)) for path in paths)
    ui.note(f"{sizes} written in {time.perf_counter() - begin:.1f} s")
    return 0


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """kill ends the command by an exception, too, so that what is half written goes away."""

    def end(number: int, _: Any) -> None:
        sys.exit(128 + number)

    before = None
    with suppress(ValueError):  # not the main thread
        before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
