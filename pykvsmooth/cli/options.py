"""The options that caption and chat share, and what becomes of them: a model, a policy, and the arguments of an answer."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from .. import errors
from ..policies import KINDS, kind
from .terminal import Ui

if TYPE_CHECKING:
    from ..model import Model

PROMPT = "Please describe the image in detail."
Changes = dict[str, dict[str, Any]]  # parameters that --set gives, by policy


class UsageError(Exception):
    """The command line asks for something that makes no sense: exit code 2."""


def add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="FILE", help="text model, GGUF (default: PYKVSMOOTH_MODEL, else the one in the box)")
    group.add_argument(
        "--mmproj", metavar="FILE", help="its vision tower (default: PYKVSMOOTH_MMPROJ, else the one mmproj*.gguf beside the model)"
    )
    add_place(group)
    group.add_argument("--threads", type=_positive, metavar="N", help="default: the processors that this process may use")
    group.add_argument(
        "--precision",
        choices=("auto", "exact"),
        default="auto",
        help="of the vision tower: auto (bf16 where this CPU is fast at it, f16 on a GPU, unless the weights are F32) or exact (float32)",
    )
    group.add_argument("--n-ctx", type=_rows, default=2048, metavar="N", help="rows of context: prompt, picture and answer (default: 2048)")
    group.add_argument("--kv-type", choices=("f16", "f32", "q8_0"), default="f16", help="type of the KV cache (default: f16)")


def add_place(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--device",
        type=_device,
        default="auto",
        metavar="D",
        help="auto, cpu, cuda or cuda:N (default: auto, a GPU if there is one; not yet run on one, cpu is what is tested)",
    )
    group.add_argument(
        "--gpu-layers",
        type=_layers,
        default="auto",
        metavar="N",
        help="of the text model's layers, so many on the GPU (default: auto, those that fit)",
    )


def add_policy(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("policy of the KV cache")
    group.add_argument(
        "--policy",
        type=_policies,
        default=["kvsmooth"],
        metavar="P[,P]",
        help=f"off, or some of {', '.join(KINDS)}, each as the model asks for (default: kvsmooth)",
    )
    group.add_argument(
        "--set", action="append", default=[], metavar="POLICY.NAME=VALUE", help="for example kvsmooth.lambda_ref=0.8; may be repeated"
    )
    group.add_argument("--depth", metavar="FILE", help="for dscr: the picture's depth as PNG or .npy, or an ONNX model that gives it")


def add_answer(parser: argparse.ArgumentParser, max_tokens: int = 512) -> None:
    group = parser.add_argument_group("answer")
    group.add_argument("--system", metavar="TEXT", help='a system sentence in front ("vicuna" stands for Vicuna\'s own)')
    group.add_argument("--max-tokens", type=_positive, default=max_tokens, metavar="N", help=f"default: {max_tokens}")
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 takes the most probable token (default: 0)")
    group.add_argument("--top-k", type=int, default=0, metavar="N", help="0 for all (default: 0)")
    group.add_argument("--top-p", type=float, default=1.0, metavar="X", help="default: 1")
    group.add_argument("--min-p", type=float, default=0.0, metavar="X", help="default: 0")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="1 for none (default: 1)")
    group.add_argument("--seed", type=int, metavar="N", help="of the sampler, for each answer anew")
    group.add_argument("--image-mode", choices=("pad", "crop", "stretch"), default="pad", help="to the model's square (default: pad)")


def add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--quiet", action="store_true", help="nothing on standard error but errors")
    group.add_argument("--debug", action="store_true", help="log what happens, and show the traceback of an error")


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _device(text: str) -> str:
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, cuda or cuda:N, not {text!r}")
    return text


def _layers(text: str) -> int | Literal["auto"]:
    return "auto" if text == "auto" else 0 if text == "0" else _positive(text)


def _rows(text: str) -> int:
    value, most = _positive(text), 1 << 20  # as Model.session
    if value > most:
        raise argparse.ArgumentTypeError(f"must be at most {most}, not {value}")
    return value


def _policies(text: str) -> list[str]:
    names = [name.strip().lower() for name in text.split(",")]
    for name in names:
        if name != "off" and name not in KINDS:
            raise argparse.ArgumentTypeError(f"there is no policy {name!r}; there are off, {', '.join(KINDS)}")
    if len(set(names)) < len(names) or ("off" in names and len(names) > 1):
        raise argparse.ArgumentTypeError("each policy once, and off alone")
    return [name for name in names if name != "off"]


def answer_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of Session.generate and chat; checked here, so that a bad value is a usage error."""
    from .. import VICUNA_SYSTEM
    from ..options import Options

    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    options = {name: getattr(args, name) for name in names}
    try:
        Options(**options)
    except ValueError as error:
        raise UsageError(str(error)) from error
    system = VICUNA_SYSTEM if args.system == "vicuna" else args.system
    return {**options, "mode": args.image_mode, "system": system}


def policy_label(args: argparse.Namespace) -> str:
    """What captions under the policy are called beside plain ones."""
    return "smoothed" if args.policy == ["kvsmooth"] else "+".join(args.policy)


def policy_changes(args: argparse.Namespace, pictures: int = 1) -> Changes:
    """What --set and --depth ask of each policy that is on, checked as far as it can be without a model. pictures: how many timelines
    begin with a picture of their own; a depth map is one picture's."""
    changes: Changes = {name: {} for name in args.policy}
    for item in args.set:
        key, equals, value = item.partition("=")
        policy, dot, name = key.strip().partition(".")
        if not equals or not dot:
            raise UsageError(f"--set {item}: write it as kvsmooth.NAME=VALUE")
        if policy not in changes:
            raise UsageError(f"--set {item}: the policy {policy!r} is not on; --policy gives {', '.join(args.policy) or 'off'}")
        names = [field.name for field in dataclasses.fields(kind(policy))]
        if name not in names:
            raise UsageError(f"--set {item}: {policy} has no {name!r}; it has {', '.join(names)}")
        changes[policy][name] = _value(value.strip())
    if args.depth is not None:
        if "dscr" not in changes:
            raise UsageError("--depth is for the policy dscr: --policy dscr, or dscr among others")
        changes["dscr"]["depth"] = _depth(args.depth, pictures)
    _policies_of(lambda name: kind(name)(**changes[name]), changes)
    return changes


def check_captioning(args: argparse.Namespace) -> None:
    """--out and --prompt of the commands that caption."""
    if args.out == "-":
        raise UsageError("--out - would be a file of that name; --json writes to standard output")
    if (marks := args.prompt.count("<image>")) > 1:
        raise UsageError(f"--prompt has {marks} <image> marks; a caption is of one picture, so one mark at most")


def is_map(depth: str | None) -> bool:
    """Is --depth the map of one picture, and not a model that gives each its own?"""
    return depth is not None and not depth.lower().endswith(".onnx")


def _depth(path: str, pictures: int) -> Any:
    import pykvsmooth

    if not is_map(path):
        return pykvsmooth.OnnxDepth(path)
    if pictures > 1:
        raise UsageError(f"--depth {path}: one map for {pictures} pictures; give one picture, or an ONNX model")
    return path


def _policies_of(make: Callable[[str], Any], changes: Changes) -> list[Any]:
    try:
        return [make(name) for name in changes]
    except (TypeError, ValueError) as error:
        if isinstance(error, errors.KVSmoothError):
            raise
        raise UsageError(f"--set: {error}") from error


def _value(text: str) -> Any:
    """3, 0.5, true, none, [1, 2]; everything else is text."""
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named and text != "none":  # "none" is a word that several options take
        return named[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


_IN_OPTIONS = (("Model(path)", "--model FILE [--mmproj FILE]"), ("mmproj=", "--mmproj FILE"), ("n_ctx", "--n-ctx N"))


def in_options(error: object) -> str:
    """The library's message; where it speaks of an argument, the option that stands for it is named, too."""
    text = str(error)
    return text + next((f" (here: {option})" for word, option in _IN_OPTIONS if word in text), "")


def make_policy(args: argparse.Namespace, model: Model, changes: Changes) -> Any:
    """None, the one policy, or the list of those that --policy names, as the model asks for them."""
    made = _policies_of(lambda name: kind(name).for_model(model, **changes[name]), changes)
    return made if len(made) > 1 else made[0] if made else None


def load_model(args: argparse.Namespace, ui: Ui) -> Model:
    """The commands close neither the model nor its sessions: the process ends with them, and after Ctrl-C at once."""
    from ..model import Model

    def progress(fraction: float) -> None:
        ui.status(f"loading the model: {fraction:.0%}")

    try:
        model = Model(
            args.model,
            mmproj=args.mmproj,
            device=args.device,
            gpu_layers=args.gpu_layers,
            threads=args.threads,
            progress=progress,
            precision=args.precision,
        )
    except ValueError as error:
        if isinstance(error, errors.KVSmoothError):
            raise
        raise UsageError(str(error)) from error
    ui.clear()
    return model
