"""Any text as a chat template: python tests/fuzz/fuzz_template.py [-max_total_time=60] tests/corpus/template (see fuzz_image.py)."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

from fuzz.drive import instrumented, main

with instrumented():
    from pykvsmooth.template import TemplateError, choose

HISTORY = [{"role": "user", "content": "<image>\na"}, {"role": "assistant", "content": "b"}]


def try_one(data: bytes) -> None:
    """TemplateError for a template that can't be used; ValueError for a text that is none."""
    text = data.decode("utf-8", "replace")
    with suppress(TemplateError):
        template = choose("auto", text, "<s>", "</s>")
        assert isinstance(template.first("a dog", 1, "be brief"), str)
        assert isinstance(template.next(HISTORY, "and <image> this", 1), str)
    with suppress(TemplateError, ValueError):
        choose(text, None)


if __name__ == "__main__":
    main(try_one)
