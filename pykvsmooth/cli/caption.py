"""pykvsmooth caption: pictures in, captions out."""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from .. import errors
from . import compare, options, render
from .escape import one_line
from .pictures import STDIN, expand, named, source_of
from .records import CaptionFile, caption_file, caption_record, dumps, file_facts, precision_facts, token_record
from .terminal import Ui

if TYPE_CHECKING:
    from ..model import Model
    from ..session import Session
    from ..stats import Result, Token

_log = logging.getLogger("pykvsmooth")
DESCRIPTION = """Captions pictures. The words go to standard output as they come, all else to standard error."""
EPILOG = """pictures: files, folders (the pictures in them, by name), globs, and - for standard input.

--json prints a line {"type": "result", "image": ..., "caption": ...} per picture, and for a single picture a line
{"type": "token", "text": ..., "entropy": ..., "strength": ...} per token before it; --json-tokens does that for many pictures, too.
--out F.jsonl appends a line per picture; pictures that it already holds with the same settings are skipped, so the same
command goes on where an earlier one was stopped. Exit: 0 done, 1 an error (the other pictures are done), 2 usage, 130 Ctrl-C."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "caption", help="caption pictures", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a file, a folder, a glob, or - for standard input")
    parser.add_argument("--prompt", default=options.PROMPT, metavar="TEXT", help=f'default: "{options.PROMPT}"')
    options.add_model(parser)
    options.add_policy(parser)
    options.add_answer(parser)
    options.add_output(parser)
    show = parser.add_argument_group("what to show")
    show.add_argument("--heat", action="store_true", help="shade words by the entropy of their attention rows (colour terminals)")
    show.add_argument("--strengths", action="store_true", help="bars of the smoothing strength under each line")
    show.add_argument("--compare", action="store_true", help="the plain caption beside the policy's, differences marked")
    show.add_argument("--json", action="store_true", help="JSON lines instead of text")
    show.add_argument("--json-tokens", action="store_true", help="like --json, with the tokens of every picture")
    show.add_argument("--out", metavar="F.jsonl", help="append captions to this file; resumes where it stopped")
    show.add_argument("--parallel", type=options._positive, default=1, metavar="N", help="pictures that step together (default: 1)")
    parser.set_defaults(run=run)


@dataclass
class Job:
    """What is the same for all pictures of one run."""

    args: argparse.Namespace
    ui: Ui
    model: Model
    policy: Any
    answer: dict[str, Any]
    out: CaptionFile | None = None
    names: list[str] = field(default_factory=list)
    failed: int = 0
    done: int = 0
    begin: float = field(default_factory=time.monotonic)

    @property
    def json(self) -> bool:
        return bool(self.args.json or self.args.json_tokens)

    @property
    def token_lines(self) -> bool:
        return bool(self.args.json_tokens or (self.args.json and len(self.names) == 1))

    def settings(self, policy: Any) -> dict[str, Any]:
        """All that the words of a caption depend on, but for the picture."""
        seed = {} if self.args.temperature > 0 else {"seed": None}
        files = {"model": file_facts(self.model.path), "mmproj": file_facts(self.model.mmproj)}
        place = {"n_ctx": self.args.n_ctx, "kv_type": self.args.kv_type, **precision_facts(self.args.precision)}
        return {**files, "prompt": self.args.prompt, "policy": repr(policy) if policy else "off", **self.answer, **seed, **place}

    def fail(self, name: str, error: Exception) -> None:
        self.failed += 1
        _log.debug("where the next error comes from", exc_info=error)
        self.ui.error(options.in_options(named(name, error)))

    @property
    def has_bar(self) -> bool:
        """Where captions stream to the same terminal, they are the progress; many at once come whole, after minutes perhaps."""
        if self.args.parallel > 1:
            return True
        return len(self.names) > 1 and (self.out is not None or not self.ui.out.is_terminal)

    def progress(self, name: str) -> None:
        if self.has_bar:
            self.ui.status(name, self.done + self.failed, len(self.names))

    def session(self, policy: Any) -> Session:
        return self.model.session(n_ctx=self.args.n_ctx, kv_type=self.args.kv_type, policy=policy)

    def header(self, name: str, end: str = " ") -> None:
        """Whose caption comes: a title on a terminal, the begin of its line on a pipe."""
        title = one_line(f"{name}:")  # a line feed in it would look like a caption's
        if self.ui.out.is_terminal:
            self.ui.put("\n" if self.done else "")
            self.ui.put(title, "bold")
            self.ui.put("\n")
        else:
            self.ui.put(f"{title}{end}")

    def line(self, record: dict[str, Any]) -> None:
        self.ui.put(dumps(record) + "\n")


def run(args: argparse.Namespace, ui: Ui) -> int:
    _check(args)
    names, wrong = expand(args.images)
    changes, answer = options.policy_changes(args, len(names)), options.answer_options(args)
    for text in wrong:
        ui.error(text)
    if not names:
        return 1
    with caption_file(args.out) as out:
        model = options.load_model(args, ui)
        job = Job(args, ui, model, options.make_policy(args, model, changes), answer, out, names)
        _skip_done(job)
        if job.names:
            (compare.compare_all if args.compare else _caption_together if args.parallel > 1 else _caption_each)(job)
        _summary(job)
    return 1 if wrong or job.failed else 0


def _check(args: argparse.Namespace) -> None:
    shown = [name for name in ("heat", "strengths") if getattr(args, name)]
    if args.images.count(STDIN) > 1:
        raise options.UsageError("- (standard input) can be given once")
    if STDIN in args.images:
        source_of(STDIN)  # says so at once if nothing can come from there
    options.check_captioning(args)
    if args.compare and not args.policy:
        raise options.UsageError("--compare needs a policy to compare with: --policy kvsmooth")
    for one, others in (
        ("compare", ["out", "json_tokens", "parallel", *shown]),
        ("json", shown),
        ("json_tokens", shown),
        ("out", shown),
        ("parallel", shown),
    ):
        clash = [name for name in others if _asked(args, name)] if _asked(args, one) else []
        if clash:
            raise options.UsageError(f"--{one.replace('_', '-')} and --{clash[0].replace('_', '-')} do not go together")


def _asked(args: argparse.Namespace, name: str) -> bool:
    return bool(args.parallel > 1 if name == "parallel" else getattr(args, name))


def _skip_done(job: Job) -> None:
    if job.out is None:
        return
    settings = job.settings(job.policy)
    if job.out.cut:
        job.ui.note(f"{job.out.path}: an unfinished line of an earlier run was cut off")
    todo = [name for name in job.names if not job.out.has(name, settings)]
    if len(todo) < len(job.names):
        job.ui.note(f"{len(job.names) - len(todo)} of {len(job.names)} pictures are in {job.out.path} already")
    job.names = todo


def _summary(job: Job) -> None:
    job.ui.clear()
    if job.done + job.failed > 1:
        failed = f", {job.failed} failed" if job.failed else ""
        job.ui.note(f"{job.done} captioned{failed} in {timedelta(seconds=int(time.monotonic() - job.begin))}")


# ---- one after the other ----


def _caption_each(job: Job) -> None:
    session = job.session(job.policy)
    for name in job.names:
        job.progress(name)
        try:
            result = _stream(job, session, name)
        except (errors.ImageError, errors.ContextOverflowError) as error:
            job.fail(name, error)
            continue
        _finish(job, name, result)


def _stream(job: Job, session: Session, name: str) -> Result:
    """A caption, shown while it comes. After Ctrl-C the words so far stay and the line ends."""
    painter = _painter(job)
    stream = session.generate(job.args.prompt, image=source_of(name), **job.answer)
    if not job.has_bar:
        job.ui.status(f"looking at {name}")
    begun = False
    try:
        for token in stream:
            if not begun and painter is not None and len(job.names) > 1:
                job.header(name)
            begun = True
            if painter is not None:
                painter.token(token)
            if job.token_lines:
                job.line(token_record(name, token))
    finally:
        if painter is not None and (begun or stream.finish_reason not in (None, "cancelled")):
            painter.end()
    if painter is not None:
        painter.legend()
    return stream.result()


def _painter(job: Job) -> Any:
    if job.json or job.out:
        return None
    args, ui = job.args, job.ui
    if args.heat and not ui.out.colour and not job.done:
        ui.note("--heat: no colours here (not a colour terminal, or NO_COLOR is set)")
    if args.strengths and "kvsmooth" not in args.policy and not job.done:
        ui.note("--strengths: KVSmooth is off, so there are none")
    if args.strengths or (args.heat and ui.out.colour):
        return render.Painted(ui, args.heat, render.strength_range(job.policy) if args.strengths and "kvsmooth" in args.policy else None)
    return render.Plain(ui)


def _finish(job: Job, name: str, result: Result) -> None:
    job.done += 1
    record = caption_record(name, result, job.settings(job.policy))
    if job.out:
        job.out.add(record)
    if job.json:
        job.line({"type": "result", **record})
    if not job.out or len(job.names) == 1:
        prefix = one_line(f"{name}: ") if len(job.names) > 1 and not job.ui.out.is_terminal else ""
        job.ui.note(prefix + render.stats_line(result.stats, result.finish_reason))


# ---- many at once ----


def _caption_together(job: Job) -> None:
    """Whole captions, as they finish: the words of several pictures would run into one another."""
    requests = ({"image": source_of(name), "prompt": job.args.prompt} for name in job.names)
    batch = job.model.generate_batch(
        requests,
        n_ctx=job.args.n_ctx,
        kv_type=job.args.kv_type,
        policy=job.policy,
        parallel=min(job.args.parallel, len(job.names)),
        on_error="yield",
        **job.answer,
    )
    job.progress("")
    for index, item in batch:
        _take(job, job.names[index], item)


def _take(job: Job, name: str, item: Token | Result | Exception) -> None:
    from ..stats import Token

    if isinstance(item, Token):
        if job.token_lines:
            job.line(token_record(name, item))
        return
    if isinstance(item, Exception):
        if not isinstance(item, (errors.ImageError, errors.ContextOverflowError)):
            raise item
        job.fail(name, item)
    else:
        if not job.json and not job.out:
            job.header(name)
            job.ui.put(job.ui.out.safe(item.text) + "\n")
        _finish(job, name, item)
    job.progress(name)
