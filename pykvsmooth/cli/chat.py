"""pykvsmooth chat: questions about a picture, one after the other."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from typing import Any

from ..errors import BusyError, ClosedError, ContextOverflowError, KVSmoothError
from . import options, render
from .terminal import Ui

HELP = """/image PATH  the picture that the next message is about
/reset       begin a new conversation (the picture stays)
/quit        leave (so does Ctrl-D)
\"\"\"          begins and ends a message of several lines
Ctrl-C stops an answer; at the prompt it leaves."""
FENCE = '"""'
_log = logging.getLogger("pykvsmooth")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk about a picture",
        description="A conversation, also from a pipe (a message per line).",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--image", metavar="FILE", help="the picture to talk about")
    options.add_model(parser)
    options.add_policy(parser)
    options.add_answer(parser)
    options.add_output(parser)
    parser.set_defaults(run=run)


class Chat:
    def __init__(self, args: argparse.Namespace, ui: Ui, session: Any, answer: dict[str, Any]) -> None:
        self.ui, self.session, self.answer = ui, session, answer
        self.map = args.depth if options.is_map(args.depth) else None  # of the first picture
        self.person = sys.stdin is not None and sys.stdin.isatty()
        if hasattr(sys.stdin, "reconfigure"):  # None when the shell closed it
            sys.stdin.reconfigure(errors="surrogateescape")  # else a wrong byte takes the lines behind it along
        self.picture: Any = None
        self.pending = False  # the picture goes with the next message
        self.failed = False

    def show(self, path: str) -> None:
        """Takes a picture. Decoded now, so that a bad one is known before the question, as is a model that sees none."""
        from ..images import load_image

        if self.map and self.picture is not None:
            raise KVSmoothError(f"--depth {self.map} is the map of the first picture; begin another chat, or give an ONNX model")
        self.session.model._vision_info()
        self.picture = load_image(os.path.expanduser(path))
        self.pending = True

    def loop(self) -> int:
        if self.person:
            _line_editing()
            self.ui.note("/help shows the commands; Ctrl-D leaves")
        while (message := self.read()) is not None:
            if not message.strip():
                continue
            try:
                if message.startswith("/") and "\n" not in message:
                    if not self.command(message):
                        break
                else:
                    self.ask(message)
            except (BusyError, ClosedError):
                raise
            except (KVSmoothError, ValueError) as error:  # ValueError: a message that can't be asked as it is
                self.fail(error)
        return 1 if self.failed and not self.person else 0

    def fail(self, error: Exception) -> None:
        self.failed = True
        _log.debug("where the next error comes from", exc_info=error)
        full = isinstance(error, ContextOverflowError) and self.session.n_past > 0
        self.ui.error(options.in_options(error) + ("; /reset begins a new conversation" if full else ""))

    def read(self) -> str | None:
        """The next message; None at the end of the input."""
        line = self.line("> ")
        if line is None or not line.lstrip().startswith(FENCE):
            return line
        lines = [line.lstrip().removeprefix(FENCE)]
        while not lines[-1].rstrip().endswith(FENCE):
            more = self.line("... ")
            if more is None:
                return "\n".join(lines).strip("\n")
            lines.append(more)
        lines[-1] = lines[-1].rstrip().removesuffix(FENCE)
        return "\n".join(lines).strip("\n")

    def line(self, prompt: str) -> str | None:
        self.ui.clear()
        try:
            if self.person and self.ui.out.is_terminal:
                return input(prompt)  # readline knows the prompt's width only if it writes it
            if self.person:
                self.ui.err.write(prompt)
            line = sys.stdin.readline() if sys.stdin is not None else ""
        except EOFError:
            line = ""
        except KeyboardInterrupt:
            self.ui.err.write("\n" if self.person else "")
            raise
        if not line:
            if self.person:
                self.ui.err.write("\n")
            return None
        return line.rstrip("\n")

    def command(self, message: str) -> bool:
        """False to leave."""
        name, _, rest = message.strip().partition(" ")
        if name in ("/quit", "/exit", "/bye"):
            return False
        if name == "/reset":
            self.session.reset()
            self.pending = self.picture is not None
            self.ui.note("a new conversation" + (" about the same picture" if self.pending else ""))
        elif name == "/image" and rest.strip():
            self.show(_path(rest.strip()))
            self.ui.note(f"the next message is about this picture ({self.picture.width} x {self.picture.height})")
        elif name == "/help":
            self.ui.note(HELP, style="")
        else:
            hint = "/image PATH" if name == "/image" else "/help shows the commands; a space in front sends it as a message"
            self.ui.note(f"{name}: {hint}", style="")
        return True

    def ask(self, message: str) -> None:
        _check_text(message)
        image = self.picture if self.pending else None
        painter = render.Plain(self.ui)
        first = self.session.n_past == 0  # also after /reset, and where Ctrl-C came before the first message was read
        answer = self.answer if first else {**self.answer, "system": None}
        stream = self.session.chat(message.strip(), image=image, **answer)
        self.ui.status("looking at the picture" if image is not None else "reading")
        try:
            for token in stream:
                painter.token(token)
        except KeyboardInterrupt:
            stream.close()
            painter.end()
            self.ui.note("(stopped)")
        else:
            painter.end()
        self.ui.clear()
        self.pending = self.pending and stream.stats.prefill_s == 0.0  # stopped before the picture was in the conversation
        if stream.finish_reason != "cancelled":
            self.ui.note(render.stats_line(stream.stats, stream.finish_reason or ""))


def _check_text(message: str) -> None:
    """KVSmoothError if bytes were typed that are no characters: Python keeps them as half ones."""
    try:
        message.encode()
    except UnicodeEncodeError as error:
        raise KVSmoothError(f"standard input is not {sys.stdin.encoding} text") from error


def _path(text: str) -> str:
    """A path as people write or drop it: perhaps quoted."""
    try:
        parts = shlex.split(text)
    except ValueError:
        return text
    return parts[0] if len(parts) == 1 else text


def _line_editing() -> None:
    try:
        import readline  # noqa: F401  arrow keys and history for input()
    except ImportError:
        pass


def run(args: argparse.Namespace, ui: Ui) -> int:
    from ..images import load_image

    changes, answer = options.policy_changes(args), options.answer_options(args)
    if args.image:
        load_image(args.image)  # before the model, which may take a while
    model = options.load_model(args, ui)
    policy = options.make_policy(args, model, changes)
    chat = Chat(args, ui, model.session(n_ctx=args.n_ctx, kv_type=args.kv_type, policy=policy), answer)
    if args.image:
        chat.show(args.image)
    return chat.loop()
