"""pykvsmooth quantize: a GGUF file with its weights in fewer bits."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from . import options
from .convert import _terminated_as_interrupted
from .options import UsageError
from .terminal import Ui, bytes_text

if TYPE_CHECKING:
    from ..quantize import Quantized

EPILOG = """types: f32 f16 bf16 q8_0 q6_k q5_k_m q5_k_s q5_1 q5_0 q4_k_m q4_k_s q4_1 q4_0 q3_k_m q3_k_s q2_k; q3_k, q4_k and q5_k
mean the one with _m, which gives more bits to the matrices that need them. Norms, biases and the position embedding stay F32.
Exit: 0 done, 1 an error, 2 usage, 130 Ctrl-C; OUT is written whole or not at all."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "quantize",
        help="a GGUF file with fewer bits per weight",
        description="Writes the text model or mmproj IN to OUT with its matrices in another type.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("src", metavar="IN", help="GGUF of any type that loads, best F16 or F32; of a split file the first part")
    parser.add_argument("dst", metavar="OUT", help="GGUF, one file")
    parser.add_argument("--type", required=True, metavar="T", help="of the matrices, for example q8_0 or q4_k_m")
    parser.add_argument("--threads", type=options._positive, metavar="N", help="default: the processors that this process may use")
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, ui: Ui) -> int:
    from .. import quantize
    from ..errors import KVSmoothError

    def progress(tensor: str, done: int, total: int) -> None:
        ui.status(tensor, done, total)

    begin = time.monotonic()
    try:
        with _terminated_as_interrupted():
            result = quantize.quantize_file(args.src, args.dst, args.type, threads=args.threads, progress=progress)
    except ValueError as error:
        if isinstance(error, KVSmoothError):
            raise
        raise UsageError(_in_options(str(error))) from error
    ui.clear()
    _notes(ui, args, result)
    share = result.bytes_out / result.bytes_in
    ui.note(f"{bytes_text(result.bytes_in)} to {bytes_text(result.bytes_out)} ({share:.0%}) in {time.monotonic() - begin:.1f} s")
    return 0


def _in_options(message: str) -> str:
    for argument, option in (("mix", "--type"), ("src", "IN"), ("dst", "OUT")):
        message = option + message.removeprefix(argument) if message.startswith(argument) else message
    return message


def _notes(ui: Ui, args: argparse.Namespace, result: Quantized) -> None:
    if result.requantized and args.type.lower() != "f32":  # which holds the values of every type
        ui.note(f"{args.src} is quantized already, and errors add up: F16 or F32 files make better ones")
    if result.misfits:
        first, n = result.misfits[0], len(result.misfits)
        others = f" and {n - 1} more tensors have rows" if n > 1 else " has rows"
        ui.note(f"{first}{others} that are no whole blocks of the type: they got one of smaller blocks, or F16: no fewer bits")
