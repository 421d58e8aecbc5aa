"""pykvsmooth depth: the depth map of a picture, from an ONNX model that the user has."""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

from . import options
from .escape import one_line
from .options import UsageError
from .pictures import STDIN, source_of
from .terminal import Ui

VARIABLE = "PYKVSMOOTH_DEPTH_MODEL"
EPILOG = f"""models: an ONNX file of Depth-Anything-V2 (such as onnx/model.onnx of onnx-community/depth-anything-v2-small, Apache-2.0) or of
MiDaS; none is in the box. Without --model the environment variable {VARIABLE} names it.
Near is bright. The map has the picture's size; --size and --multiple are for models that take any.
Exit: 0 done, 1 an error, 2 usage, 130 Ctrl-C; OUT is written whole or not at all."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "depth",
        help="the depth map of a picture, for the policy DSCR",
        description="Writes the depth of IMAGE to OUT, a gray PNG of 16 bits or a .npy file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("image", metavar="IMAGE", help="a picture, - for standard input")
    parser.add_argument("-o", "--out", metavar="OUT", required=True, help="depth.png or depth.npy")
    parser.add_argument("--model", metavar="FILE", default=os.environ.get(VARIABLE) or None, help="ONNX file of the depth model")
    parser.add_argument("--size", type=options._positive, default=518, metavar="N", help="short side that the model sees (default: 518)")
    parser.add_argument("--multiple", type=options._positive, default=14, metavar="N", help="of which both sides are (default: 14)")
    parser.add_argument("--threads", type=options._positive, metavar="N", help="default: as onnxruntime chooses")
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, ui: Ui) -> int:
    from .. import depth
    from ..depth_onnx import OnnxDepth
    from ..images import load_image

    if args.model is None:
        raise UsageError(f"depth needs the ONNX file of a depth model: --model FILE, or {VARIABLE}")
    try:
        depth.check_suffix(args.out)
        estimate = OnnxDepth(args.model, size=args.size, multiple=args.multiple, threads=args.threads)
    except ValueError as error:
        raise UsageError(str(error)) from error
    picture = load_image(source_of(args.image))
    begin = time.monotonic()
    ui.status(f"depth of {args.image}")
    values = estimate(picture)
    ui.clear()
    depth.save_map(args.out, values)
    name = "standard input" if args.image == STDIN else args.image
    ui.note(one_line(f"{name}: {picture.width} x {picture.height} to {args.out} in {time.monotonic() - begin:.1f} s"))
    return 0
