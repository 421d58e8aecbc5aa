"""Prompts: the text that a template gives, where pictures go in it, and the ids as transformers' processor has them."""

import sys
from pathlib import Path

import pytest

import pykvsmooth as kvs
from pykvsmooth.template import IMAGE_MARK, Jinja, Raw, TemplateError, Vicuna, choose

# The processor template of llava-hf/llava-1.5-7b-hf in our own words: typed parts, pictures first.
PARTS = """{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}
{%- for part in m['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}
{%- for part in m['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}
{%- if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
# Content is plain text: as in the files of text models.
PLAIN = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]
{%- elif m['role'] == 'system' %}<<SYS>>{{ m['content'] }}<</SYS>>{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"""


def test_vicuna() -> None:
    t = Vicuna()
    assert t.first("What is it?", 1, None) == "USER: <image>\nWhat is it? ASSISTANT:"
    assert t.first("What is it?", 0, None) == "USER: What is it? ASSISTANT:"
    assert t.first("What is it?", 2, None) == "USER: <image>\n<image>\nWhat is it? ASSISTANT:"
    assert t.first("A <image> or B <image>?", 2, None) == "USER: A <image> or B <image>? ASSISTANT:"
    assert t.first("Hi", 0, kvs.VICUNA_SYSTEM).startswith("A chat between a curious user and an artificial intelligence assistant. ")
    assert t.first("Hi", 0, "Be kind.") == "Be kind. USER: Hi ASSISTANT:"
    assert t.next([], "And now?", 0) == "</s>USER: And now? ASSISTANT:"


def test_raw() -> None:
    assert Raw().first("Once upon", 0, None) == "Once upon"
    assert Raw().first("Once upon", 1, None) == IMAGE_MARK + "Once upon"
    with pytest.raises(ValueError, match="system"):
        Raw().first("Once upon", 0, "Be kind.")


def test_jinja_with_parts_equals_vicuna() -> None:
    pytest.importorskip("jinja2")
    t = Jinja(PARTS, "<s>", "</s>")
    assert t.first("What is it?", 1, None) == "USER: <image>\nWhat is it? ASSISTANT:"
    assert t.first("A <image> or B?", 1, None) == "USER: A <image> or B? ASSISTANT:"
    history = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "a dog with <image> on it"}]
    assert t.next(history, "And now?", 1) == " </s>USER: <image>\nAnd now? ASSISTANT:"


def test_jinja_with_plain_content() -> None:
    pytest.importorskip("jinja2")
    t = Jinja(PLAIN, "<s>", "</s>")
    assert t.first(" What is it? ", 1, "Be kind.") == "<s><<SYS>>Be kind.<</SYS>>[INST] <image>\n What is it? [/INST]".replace("? [", "? [")
    history = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "a dog"}]
    assert t.next(history, "And now?", 0) == "</s>[INST] And now? [/INST]"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "not valid"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "fails"),
        ("{{ messages.append(1) }}", "fails"),
        ("{{ nothing.of.this }}", "fails"),
        ("{% for i in range(10**9) %}x{% endfor %}", "fails"),
    ],
)
def test_bad_and_hostile_templates(source: str, message: str) -> None:
    pytest.importorskip("jinja2")
    with pytest.raises(TemplateError, match=message):
        Jinja(source).first("Hi", 0, None)


def test_template_that_leaves_the_answer_out() -> None:
    pytest.importorskip("jinja2")
    t = Jinja("{{ messages[-1]['content'] }}")
    with pytest.raises(TemplateError, match="leaves earlier answers out"):
        t.next([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "c", 0)


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(choose("auto", None), Vicuna)
    assert isinstance(choose("vicuna", PLAIN), Vicuna)
    assert isinstance(choose(None, PLAIN), Raw)
    with pytest.raises(ValueError, match="llama2"):
        choose("llama2", None)
    with pytest.raises(TypeError):
        choose(3, None)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "pykvsmooth.sandbox", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)  # as if it were not installed
    with pytest.raises(TemplateError, match=r"pykvsmooth\[chat\]"):
        choose("auto", PLAIN)
    assert isinstance(choose("auto", PARTS), Vicuna), "Vicuna's own template needs no jinja2"


def test_the_models_own_template(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    import tiny

    text, _, _ = tiny.write_pair(tmp_path, seed=1, vision=False, load=False, chat_template=PLAIN)
    with kvs.Model(text, mmproj=False) as model, model.session(n_ctx=200) as session:
        assert model.chat_template == PLAIN
        stream = session.generate("a dog", max_tokens=0)
        stream.result()
        with session._handle:
            pass
        ids = stream._generation.plan.prompt.ids.tolist()
        assert ids == [1, *model.tokenize("[INST] a dog [/INST]")], "BOS of the template and of the model are one"
        stream = session.generate("a dog", max_tokens=0, template="{{ messages[0]['content'] }}!")
        assert stream._generation.plan.prompt.ids.tolist() == [1, *model.tokenize("a dog!")]


def test_ids_equal_the_processors(shared_data: Path, tmp_path: Path) -> None:
    """LLaVA-1.5's ids: the pieces around the picture are tokenized one by one, each with SentencePiece's space in front. Written down
    from the processor's own tests: "USER: <image>\\nWhat is it? ASSISTANT:" begins 1 3148 1001 29901 29871 | picture | 29871 13 5618."""
    import gguf
    import numpy as np
    import tiny

    reader = gguf.GGUFReader(shared_data / "vocab" / "ggml-vocab-llama-spm.gguf")
    vocabulary = [
        (bytes(field.parts[i]).decode() if name == "tokens" else field.parts[i][0].item())
        for name in ("tokens", "scores", "token_type")
        for field in [reader.fields[f"tokenizer.ggml.{name}"]]
        for i in field.data
    ]
    n = len(vocabulary) // 3
    tokens, scores, kinds = vocabulary[:n], vocabulary[n : 2 * n], vocabulary[2 * n :]
    original, tiny.vocabulary = tiny.vocabulary, lambda n_vocab=None: (tokens, scores, kinds)
    try:
        text, mmproj, _ = tiny.write_pair(tmp_path, seed=2, load=False)
    finally:
        tiny.vocabulary = original
    with kvs.Model(text, mmproj=mmproj) as model, model.session(n_ctx=256) as session:
        image = np.zeros((56, 56, 3), np.uint8)

        def ids(prompt: str, **options: object) -> list[int]:
            return session.generate(prompt, max_tokens=0, **options)._generation.plan.prompt.ids.tolist()

        picture = [-1] * model.n_image
        assert ids("What is it?", image=image) == [
            *[1, 3148, 1001, 29901, 29871],
            *picture,
            *[29871, 13, 5618, 338, 372, 29973, 319, 1799, 9047, 13566, 29901],
        ]
        assert ids("Hello <image> and <image>", images=[image, image], template=None) == [
            1,
            15043,
            29871,
            *picture,
            29871,
            322,
            29871,
            *picture,
        ]
        assert ids("<image>", image=image, template=None) == [1, *picture]
        assert ids("a</s>b", template=None) == [1, 263, 2, 289], "control tokens by name, as in the processor"
        assert ids("<s>a", template=None) == [1, 263], "one BOS, also where the prompt writes it"
