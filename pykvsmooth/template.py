"""Prompt templates: from a question and its pictures to the text that the model was trained on, with <image> marks in it.

The text is then cut at the marks and each piece is tokenized on its own, control tokens included, as transformers' processor
does: every piece gets SentencePiece's space in front, BOS stands once at the very beginning.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any, Protocol

from .checks import utf8
from .errors import KVSmoothError

IMAGE_MARK = "<image>"
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_ANSWER = "@@pykvsmooth-answer@@"  # stands for an answer whose tokens are in the cache already
_log = logging.getLogger("pykvsmooth")

Message = dict[str, str]  # role: system | user | assistant; content: text, <image> marks in it


class TemplateError(KVSmoothError, ValueError):
    """A chat template can't be used: jinja2 is missing, or the template fails."""


class Template(Protocol):
    def first(self, message: str, n_images: int, system: str | None) -> str:
        """The text of a conversation's first message, up to where the answer begins."""

    def next(self, history: list[Message], message: str, n_images: int) -> str:
        """What follows after the last answer of history: its end, the message, and the beginning of the next answer."""


def place_marks(message: str, n_images: int, glue: str) -> str:
    """Without marks of its own a message has its pictures in front, each followed by glue."""
    return message if IMAGE_MARK in message else (IMAGE_MARK + glue) * n_images + message


class Raw:
    """template=None: the prompt as it is."""

    def first(self, message: str, n_images: int, system: str | None) -> str:
        if system is not None:
            raise ValueError("system needs a template: with template=None write it into the prompt")
        return place_marks(message, n_images, "")

    def next(self, history: list[Message], message: str, n_images: int) -> str:
        return place_marks(message, n_images, "")


class Vicuna:
    """LLaVA-1.5's: [system ]USER: <image>\\n{prompt} ASSISTANT:, answers end with </s>."""

    def first(self, message: str, n_images: int, system: str | None) -> str:
        front = f"{system} " if system else ""
        return f"{front}USER: {place_marks(message, n_images, chr(10))} ASSISTANT:"

    def next(self, history: list[Message], message: str, n_images: int) -> str:
        return f"</s>USER: {place_marks(message, n_images, chr(10))} ASSISTANT:"


class Jinja:
    """A model's own tokenizer.chat_template, in jinja2's sandbox. Templates for text (content is a string) and for parts (content is
    a list of typed parts) are told apart by a trial.

    A template comes with a file of a stranger, so it is bounded (sandbox.py): 64 Ki characters of source; a second of processor time for
    a rendering; values of at most 1 Mi characters and 16 Mi of them in all, plus a multiple of the conversation; the filters and string
    methods that chat templates use. Whatever is beyond that, or fails in any way, is a TemplateError."""

    def __init__(self, source: str, bos: str = "", eos: str = "") -> None:
        self._names = {"bos_token": bos, "eos_token": eos}
        self._template = _compile(source)
        self._typed = False
        self._typed = self._takes_parts()

    def first(self, message: str, n_images: int, system: str | None) -> str:
        messages = [{"role": "system", "content": system}] if system else []
        return self._render([*messages, self._user(message, n_images)])

    def next(self, history: list[Message], message: str, n_images: int) -> str:
        if not history or history[-1]["role"] != "assistant":
            raise ValueError("history must end with an answer")
        answered = [*history[:-1], {"role": "assistant", "content": _ANSWER}]
        text = self._render([*answered, self._user(message, n_images)])
        if text.count(_ANSWER) != 1:
            raise TemplateError("the chat template leaves earlier answers out or repeats them; use template='vicuna' or generate()")
        return text.split(_ANSWER)[1]

    def _user(self, message: str, n_images: int) -> dict[str, Any]:
        if self._typed and IMAGE_MARK not in message and n_images:
            return {"role": "user", "content": [{"type": "image"}] * n_images + [{"type": "text", "text": message}]}
        return {"role": "user", "content": place_marks(message, n_images, "\n")}

    def _takes_parts(self) -> bool:
        probe = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _ANSWER}]}]
        try:
            text = self._render(probe)
        except TemplateError:
            return False
        return text.count(_ANSWER) == 1 and IMAGE_MARK in text and "'type'" not in text

    def _render(self, messages: list[dict[str, Any]]) -> str:
        if self._typed:
            messages = [{**m, "content": _as_parts(m["content"])} for m in messages]
        try:
            return str(self._template.render(messages=messages, add_generation_prompt=True, **self._names))
        except Exception as error:  # a template is a program of the model's maker: whatever it raises is about the template
            raise TemplateError(f"the chat template fails: {_reason(error)}; use template='vicuna' or template=None") from error


_jinja = lru_cache(maxsize=8)(Jinja)  # compiling takes as long as dozens of tokens of a small model


def _as_parts(content: Any) -> list[dict[str, str]]:
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _compile(source: str) -> Any:
    try:
        from .sandbox import Compiled
    except ImportError:
        raise TemplateError(
            "the model has a chat template of its own, which needs jinja2: pip install 'pykvsmooth[chat]', "
            "or choose template='vicuna' or template=None"
        ) from None
    try:
        return Compiled(source)
    except Exception as error:  # also what Python's own compiler and the stack's limit have to say
        raise TemplateError(f"the chat template is not valid: {_reason(error)}; use template='vicuna' or template=None") from error


def _reason(error: Exception) -> str:
    """A template can raise errors with messages of its own."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."


def _is_vicuna(source: str) -> bool:
    """Is this one of the ways in which Vicuna's template is written? Then ours does without jinja2."""
    return ("ASSISTANT:" in source and "USER:" in source) or ("upper()" in source and ("': '" in source or '": "' in source))


def choose(template: str | None, own: str | None, bos: str = "", eos: str = "") -> Template:
    """template: "auto" (the model's own, else Vicuna), "vicuna", None (raw), or the text of a jinja2 template.

    Without jinja2 "auto" still serves models whose own template is Vicuna's; for any other it is a TemplateError, because a
    wrong prompt gives worse answers and nobody would notice.
    """
    if template is None:
        return Raw()
    utf8("template", template)
    if template == "vicuna" or (template == "auto" and not own):
        return Vicuna()
    if template != "auto":
        if "{{" not in template and "{%" not in template:
            raise ValueError(f'template must be "auto", "vicuna", None or a jinja2 template, not {template[:60]!r}')
        return _jinja(template, bos, eos)
    try:
        return _jinja(own or "", bos, eos)
    except TemplateError:
        if not _is_vicuna(own or ""):
            raise
        _log.info("the model's chat template is Vicuna's: the built-in one is used")
        return Vicuna()
