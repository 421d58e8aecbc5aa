"""The Python package as a caller sees it: answers, streams, conversations, reuse."""

import gc
import inspect
import logging
import math
import random
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import PROMPT, SMOOTH, answer, ids
from conftest import Pair
from PIL import Image
from twins import picture, timeline

import pykvsmooth as kvs
from pykvsmooth.text import AnswerText

WORDS = ["the", "a", "of", "in", "on", "man", "dog", "cat", "red", "blue", "big", "small", "table", "street", "car", "tree"]
STATS = {
    *("load_s", "encode_s", "prefill_s", "prefill_tokens", "decode_s", "decode_tokens"),
    *("tokens_per_s", "reused_tokens", "reused_images", "device", "peak_bytes"),
}


# ---- the model ----


def test_facts(model: kvs.Model, tiny_pair: Pair) -> None:
    assert (model.n_layer, model.n_embd, model.n_head, model.n_kv_head, model.head_dim, model.n_ctx_train) == (4, 64, 4, 4, 16, 512)
    assert model.device == "cpu" and "kernels" in model.device_reason and model.has_vision and model.n_image == 16
    assert model.metadata["general.architecture"] == "llama" and model.metadata["llama.block_count"] == 4
    assert model.chat_template is None and (model.bos_id, model.eos_id) == (1, 2)
    assert kvs.__version__.count(".") == 2
    seen: list[float] = []
    with kvs.Model(tiny_pair.text, tiny_pair.mmproj, progress=seen.append) as other:
        assert other.n_vocab == model.n_vocab and seen == sorted(seen) and seen[-1] == 1.0


def test_device_is_logged_once(tiny_pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pykvsmooth"), kvs.Model(tiny_pair.text, mmproj=False) as model:
        records = [r for r in caplog.records if r.name == "pykvsmooth"]
        assert len(records) == 1 and model.device_reason in records[0].getMessage()


def test_words(model: kvs.Model) -> None:
    assert model.tokenize("a dog", add_bos=True) == [1, *model.tokenize("a dog")]
    assert model.tokenize("</s>", special=True) == [2] and len(model.tokenize("</s>")) > 1
    for text in ("a dog", " a dog", "  two", "näïve 中文 \U0001f600", "", "\n", "\x00zero"):
        assert model.detokenize(model.tokenize(text)) == text
    assert model.token_bytes(2) == b"" and model.token_bytes(2, special=True) == b"</s>" and model.token_bytes(3) == b"\x00"
    assert model.detokenize([1, *model.tokenize("a dog"), 2]) == "a dog"


def test_pictures_of_every_kind(model: kvs.Model, rng: np.random.Generator, tmp_path: Path) -> None:
    pixels = picture(rng)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = model.encode_image(pixels)
    assert expected.shape == (model.n_image, model.n_embd) and expected.dtype == np.float32 and expected.flags.writeable
    data = (tmp_path / "a.png").read_bytes()
    with open(tmp_path / "a.png", "rb") as file:
        for image in (tmp_path / "a.png", str(tmp_path / "a.png"), data, file, Image.fromarray(pixels)):
            assert np.array_equal(model.encode_image(image), expected)
    expected[:] = 0
    assert model.encode_image(pixels).any(), "what a caller does to the array must not reach the cache"
    wide = np.concatenate([pixels, pixels], axis=1)
    assert not np.array_equal(model.encode_image(wide, mode="pad"), model.encode_image(wide, mode="crop"))


def test_a_swapped_picture_is_encoded_again(model: kvs.Model, rng: np.random.Generator, tmp_path: Path) -> None:
    path = tmp_path / "same name.png"
    answers = []
    with model.session(n_ctx=200) as session:
        for pixels in (picture(rng), picture(rng)):
            Image.fromarray(pixels).save(path)
            stream = session.generate("what is it", image=path, max_tokens=8)
            answers.append(ids(stream.result()))
            assert stream.stats.reused_images == 0
            assert answers[-1] == ids(answer(model, "what is it", image=pixels, max_tokens=8))
    assert answers[0] != answers[1]


def test_image_cache_is_bounded(model: kvs.Model) -> None:
    from pykvsmooth.model import _ImageCache

    cache = _ImageCache(budget=3 * 400, pictures=8)
    for i in range(9):
        cache.put(bytes([i]), np.full(100, i, np.float32))
        assert cache.get(bytes([0])) is not None, "used last, so it stays"
    assert [i for i in range(9) if cache.get(bytes([i])) is not None] == [0, 7, 8] and cache._bytes == 1200
    cache = _ImageCache(budget=10**6, pictures=2)
    for i in range(9):
        cache.put(bytes([i]), np.full(100, i, np.float32))
    assert [i for i in range(9) if cache.get(bytes([i])) is not None] == [7, 8] and cache._bytes == 800


# ---- answers ----


def test_tokens_and_result(model: kvs.Model, policy: kvs.KVSmooth | None, rng: np.random.Generator) -> None:
    with model.session(n_ctx=400, policy=policy) as session:
        stream = session.generate(PROMPT, image=picture(rng), max_tokens=24)
        tokens = list(stream)
        result = stream.result()
        assert 1 <= len(tokens) <= 24 and result.tokens == tokens and result.finish_reason in ("length", "stop")
        assert result.text == "".join(t.text for t in tokens) == stream.result().text
        fed = [t for t in tokens if not math.isnan(t.entropy)]
        assert timeline(session)[-len(fed) :] == [t.id for t in fed], "every token is in the cache, the last one, too"
        layers = [1, 2] if policy else [0, 1, 2, 3]
        assert np.allclose([t.entropy for t in fed], session.entropies()[:, layers].mean(axis=1), atol=1e-6)
        if policy:
            assert np.allclose([t.strength for t in fed], session.strengths()[:, layers].mean(axis=1), atol=1e-6)
            assert all(0.7 - 1e-6 <= t.strength <= 1 for t in fed)
        else:
            assert all(t.strength is None for t in tokens) and np.isnan(session.strengths()).all()
        assert all(t.logprob <= 0 and t.top_logprobs == () for t in tokens)
        assert np.allclose([t.visual_mass for t in fed], session.visual_masses().mean(axis=1), atol=1e-6)
        assert all(0 < t.visual_mass < 1 for t in fed)


def test_stats(model: kvs.Model, rng: np.random.Generator) -> None:
    result = answer(model, image=picture(rng), max_tokens=10)
    stats = result.stats
    assert set(dict(stats)) >= STATS and stats["device"] == stats.device == "cpu"
    n_text = len(model.tokenize("USER: ")) + len(model.tokenize(f"\n{PROMPT} ASSISTANT:"))
    assert stats.prefill_tokens == 1 + n_text + model.n_image and stats.reused_tokens == stats.reused_images == 0
    assert stats.decode_tokens == sum(not math.isnan(t.entropy) for t in result.tokens)
    assert stats.encode_s > 0 and stats.prefill_s > 0 and stats.decode_s > 0 and stats.load_s > 0 and stats.peak_bytes > 1 << 20
    assert stats.tokens_per_s == pytest.approx(stats.decode_tokens / stats.decode_s)
    with pytest.raises(KeyError):
        stats["nothing"]


def test_greedy_is_the_argmax_of_logits(model: kvs.Model) -> None:
    result = answer(model, template=None, max_tokens=12)
    with model.session(n_ctx=400) as session:
        session.feed([1, *model.tokenize(PROMPT)])
        for token in result.tokens:
            logits = session.logits().astype(np.float64)
            assert token.id == logits.argmax()
            assert token.logprob == pytest.approx(logits[token.id] - np.log(np.exp(logits - logits.max()).sum()) - logits.max(), abs=1e-4)
            session.feed([token.id], generated=True)


def test_top_logprobs(model: kvs.Model) -> None:
    for token in answer(model, max_tokens=6, logprobs=5, temperature=1.5, seed=3).tokens:
        assert len(token.top_logprobs) == 5
        values = [value for _, value in token.top_logprobs]
        assert values == sorted(values, reverse=True) and token.logprob <= values[0] + 1e-6
        for id, value in token.top_logprobs:
            assert id != token.id or value == pytest.approx(token.logprob, abs=1e-6)


def test_seeds(model: kvs.Model) -> None:
    hot = {"temperature": 1.5, "max_tokens": 16}
    first, again, other = (ids(answer(model, seed=seed, **hot)) for seed in (7, 7, 8))
    assert first == again != other
    with model.session(seed=5) as a, model.session(seed=5) as b, model.session(seed=6) as c, model.session() as d, model.session() as e:
        one, two, three, four, five = (ids(s.generate(PROMPT, **hot).result()) for s in (a, b, c, d, e))
        assert one == two != three and four != five
        assert ids(a.generate(PROMPT, **hot).result()) != one, "the session's stream of random numbers goes on"
        assert ids(a.generate(PROMPT, seed=7, **hot).result()) == first
    assert ids(answer(model, seed=-1, **hot)) == ids(answer(model, seed=2**64 - 1, **hot))


def test_samplers_narrow_the_choice(model: kvs.Model) -> None:
    greedy = ids(answer(model, max_tokens=10))
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert ids(answer(model, max_tokens=10, temperature=2.0, seed=1, **narrow)) == greedy
    seen = ids(answer(model, max_tokens=40, repetition_penalty=1e6))
    assert len(set(seen)) == len(seen), "no id comes twice under an enormous penalty"


def test_ends(model: kvs.Model) -> None:
    assert answer(model, max_tokens=0).tokens == []
    length = answer(model, max_tokens=3, repetition_penalty=1.2)
    assert length.finish_reason == "length" and length.stats.decode_tokens == 3
    n = len(model.tokenize(PROMPT)) + 1
    for spare in (1, 2, 5):
        with model.session(n_ctx=n + spare) as session:
            result = session.generate(PROMPT, template=None, max_tokens=50, repetition_penalty=1.2).result()
            assert result.finish_reason == "context" and result.stats.decode_tokens == spare and session.n_past == session.n_ctx
            assert session.generate("a", template=None, max_tokens=1).result().tokens, "a full session takes the next prompt"


def test_end_of_sequence_is_not_fed(model: kvs.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ids(answer(model, max_tokens=6, repetition_penalty=1.5))
    monkeypatch.setattr(model, "_end_ids", frozenset({plain[4]}))
    with model.session() as session:
        stream = session.generate(PROMPT, max_tokens=6, repetition_penalty=1.5)
        result = stream.result()
        assert result.finish_reason == "stop" and timeline(session)[-4:] == plain[:4] and stream.stats.decode_tokens == 4


def test_text_only_and_raw_and_system(model: kvs.Model) -> None:
    with model.session(n_ctx=400) as session:
        session.generate("a dog", template=None, max_tokens=0).result()
        assert timeline(session) == [1, *model.tokenize("a dog")]
        session.generate("a dog", max_tokens=0).result()
        assert timeline(session) == [1, *model.tokenize("USER: a dog ASSISTANT:")]
        session.generate("a dog", system=kvs.VICUNA_SYSTEM, max_tokens=0).result()
        assert timeline(session) == [1, *model.tokenize(kvs.VICUNA_SYSTEM + " USER: a dog ASSISTANT:")]


def test_several_pictures_at_any_place(model: kvs.Model, rng: np.random.Generator, policy: kvs.KVSmooth | None) -> None:
    a, b = picture(rng), picture(rng)
    with model.session(n_ctx=400, policy=policy) as session, model.session(n_ctx=400, policy=policy) as by_hand:
        result = session.generate("first <image> then <image>", images=[a, b], template=None, max_tokens=8).result()
        by_hand.feed([1, *model.tokenize("first ")])
        by_hand.feed_image(a)
        by_hand.feed(model.tokenize(" then "))
        by_hand.feed_embeddings(model.encode_image(b))
        assert int(by_hand.logits().argmax()) == result.tokens[0].id
        by_hand.feed(ids(result), generated=True)
        assert timeline(by_hand) == timeline(session)
        assert np.array_equal(by_hand.strengths(), session.strengths(), equal_nan=True)
        for layer in range(4):
            assert all(np.allclose(x, y, atol=1e-2) for x, y in zip(by_hand.kv(layer), session.kv(layer), strict=True))
    swapped = answer(model, "first <image> then <image>", policy, images=[b, a], template=None, max_tokens=8)
    assert ids(swapped) != ids(result)
    front = answer(model, "what", policy, images=[a, b], template=None, max_tokens=4)
    assert ids(front) == ids(answer(model, "<image><image>what", policy, images=[a, b], template=None, max_tokens=4))


def test_names_of_options(model: kvs.Model) -> None:
    """The typed **options are the keywords of generate(), and a wrong name is told as Python tells it."""
    from pykvsmooth.options import AnswerOptions, Options, RequestOptions

    assert list(AnswerOptions.__annotations__) == list(Options.__dataclass_fields__)
    assert set(RequestOptions.__annotations__) == set(inspect.signature(kvs.Session.generate).parameters) - {"self"}
    with model.session() as session:
        for call in (session.generate, session.chat, session.agenerate, session.achat):
            with pytest.raises(TypeError, match=rf"{call.__name__}\(\) got an unexpected keyword argument 'bogus'"):
                call("m", bogus=3)
            for wrong in ({"temperature": 1e300}, {"repetition_penalty": 1e-300}, {"top_p": 1e-300}):
                with pytest.raises(ValueError, match=rf"{next(iter(wrong))}.* in float32"):
                    call("m", **wrong)


# ---- text ----


@pytest.mark.parametrize("seed", range(20))
def test_streamed_text_equals_the_whole(seed: int) -> None:
    """Bytes cut anywhere, broken UTF-8 among them, with stop strings: the pieces join to the text before the first stop string, and
    nothing that was shown has to be taken back."""
    dice = random.Random(seed)
    alphabet = [*"abc \n", "ä", "中", "\U0001f600", "e\u0301"]
    text = "".join(dice.choice(alphabet) for _ in range(60))
    data = bytearray(text.encode())
    if seed % 3 == 0:
        data[dice.randrange(len(data))] = 0xFF
    stops = ["".join(dice.choice(alphabet) for _ in range(dice.randint(1, 4))) for _ in range(dice.randint(0, 3))]
    expected = bytes(data).decode("utf-8", "replace").removeprefix(" ")
    cuts = [expected.find(stop) for stop in stops if stop in expected]
    expected = expected[: min(cuts)] if cuts else expected
    pieces, shown, at = AnswerText(True, stops), "", 0
    while at < len(data):
        n = dice.randint(1, 3)
        shown += pieces.push(bytes(data[at : at + n]))
        assert expected.startswith(shown)
        at += n
    assert shown + pieces.push(b"", True) == expected and pieces.stopped == bool(cuts)


def test_stop_strings(model: kvs.Model) -> None:
    options = {"max_tokens": 30, "repetition_penalty": 1.3}
    plain = answer(model, **options)
    assert len(plain.text) > 8
    stop = plain.text[4:7]
    result = answer(model, stop=stop, **options)
    assert result.finish_reason == "stop" and result.text == plain.text[: plain.text.index(stop)] and len(result.tokens) < len(plain.tokens)
    assert answer(model, stop=["never in there", stop], **options).text == result.text
    held = answer(model, stop=[plain.text[-3:] + "never"], **options)
    assert held.text == plain.text, "what was held back comes at the end"


# ---- streams ----


def test_nothing_runs_before_the_first_token_and_after_the_loop(model: kvs.Model) -> None:
    with model.session() as session:
        stream = session.generate(PROMPT, max_tokens=100, repetition_penalty=1.2)
        assert session.n_past == 0 and stream.finish_reason is None
        for i, _ in enumerate(stream):
            if i == 4:
                break
        assert stream.finish_reason == "cancelled" and len(stream.result().tokens) == 5
        n = session.n_past
        time.sleep(0.01)
        assert session.n_past == n
        assert session.generate("a dog", max_tokens=1).result().tokens


def test_stream_as_context_manager_and_garbage(model: kvs.Model) -> None:
    with model.session() as session:
        with session.generate(PROMPT, max_tokens=100) as stream:
            next(stream)
        assert stream.finish_reason == "cancelled"
        stream = session.generate(PROMPT, max_tokens=100)
        next(stream)
        with pytest.raises(kvs.BusyError, match="close"):
            session.generate("a dog")
        for use in (lambda: session.feed([5]), lambda: session.rewind(1), lambda: session.reset(), lambda: session.chat("a")):
            with pytest.raises(kvs.BusyError):
                use()
        assert session.entropies().shape[0] == 1 and session.logits().shape == (model.n_vocab,), "reading is no disturbance"
        assert session.fork().n_past == session.n_past
        del stream
        session.generate("a dog", max_tokens=1).result()
        old, new = session.generate("a", max_tokens=5), session.generate("b", max_tokens=5)
        next(new)
        with pytest.raises(kvs.BusyError):
            next(old)
        new.close()
        assert len(old.result().tokens) >= 1


def test_objects_go_when_nobody_holds_them(model: kvs.Model) -> None:
    gc.disable()  # references alone must do
    try:
        session = model.session()
        stream = session.generate(PROMPT, max_tokens=3)
        stream.result()
        watched = [weakref.ref(session), weakref.ref(session._handle)]
        del session, stream
        assert all(ref() is None for ref in watched)
    finally:
        gc.enable()


def test_cancel_between_tokens(model: kvs.Model) -> None:
    with model.session() as session:
        stream = session.generate(PROMPT, max_tokens=100, repetition_penalty=1.2)
        seen = []
        for token in stream:
            seen.append(token)
            if len(seen) == 3:
                stream.cancel()
        result = stream.result()
        assert result.finish_reason == "cancelled" and result.tokens == seen and len(seen) == 3
        early = session.generate(PROMPT)
        early.cancel()
        assert early.result().finish_reason == "cancelled" and early.result().tokens == []


def test_a_cancelled_prefill_has_its_time(model: kvs.Model) -> None:
    with model.session(n_ctx=30000) as session:
        stream = session.generate("a dog " * 6000, template=None)
        threading.Timer(0.05, stream.cancel).start()
        stats = stream.result().stats
        assert stats.finish_reason == "cancelled" and 0.01 < stats.prefill_s < 5 and session.n_past == stats.prefill_tokens == 0


# ---- reuse ----


def test_common_prefix_is_reused(model: kvs.Model, policy: kvs.KVSmooth | None, rng: np.random.Generator) -> None:
    image = picture(rng)
    first, second = "describe the car", "describe the dog and the tree"
    with model.session(n_ctx=400, policy=policy) as session:
        session.generate(first, image=image, max_tokens=10).result()
        before = timeline(session)
        result = session.generate(second, image=image, max_tokens=10).result()
        stats, after = result.stats, timeline(session)
        common = next(i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)
        assert stats.reused_tokens == common and stats.reused_images == 1 and stats.encode_s == 0.0
        assert stats.prefill_tokens + stats.reused_tokens + stats.decode_tokens == len(after)
        fresh = answer(model, second, policy, image=image, max_tokens=10)
        assert ids(fresh) == ids(result) and fresh.text == result.text
        assert [t.strength for t in fresh.tokens] == [t.strength for t in result.tokens]
        again = session.generate(second, image=image, max_tokens=10).result()
        assert again.stats.prefill_tokens == 1 and ids(again) == ids(fresh), "the last row is computed again, nothing else"


def test_reuse_never_crosses_smoothed_rows(model: kvs.Model, policy: kvs.KVSmooth | None) -> None:
    """The second prompt continues with the very tokens of the first answer."""
    prompt = "a dog and a cat"
    options = {"template": None, "max_tokens": 6}
    with model.session(n_ctx=400, policy=policy) as session:
        first = session.generate(prompt, **options).result()
        n_prompt = 1 + len(model.tokenize(prompt))
        rows = timeline(session)
        longer = session.generate(prompt + " " + first.text, **options)
        longer.result()
        common = next((i for i, (a, b) in enumerate(zip(rows, timeline(session), strict=False)) if a != b), len(rows))
        n_longer = longer.stats.prefill_tokens + longer.stats.reused_tokens
        common = min(common, n_longer - 1)  # the last row of a prompt is always computed
        assert longer.stats.reused_tokens == (common if policy is None else min(common, n_prompt))
        assert ids(longer.result()) == ids(answer(model, prompt + " " + first.text, policy, **options))


@pytest.mark.parametrize(
    "marks",
    [
        {"warm_start": ("prompt_rows", 6)},
        {"warm_start": "last_prompt_row", "queue_scope": "session"},
        {"smooth_prompt": "last_token"},
        {"smooth_prompt": "last_token", "warm_start": ("prompt_rows", 4), "queue_scope": "session"},
        {"target": "o"},
        {"ema": "one_step", "first_token": "skip"},
    ],
    ids=str,
)
def test_reuse_under_policies_that_mark_the_prompt(model: kvs.Model, marks: dict[str, Any], rng: np.random.Generator) -> None:
    """Prompts that end inside each other, so that the end of one is in the middle of the next."""
    policy = kvs.KVSmooth(layers=[1, 2, 3], **marks)
    text = " ".join(rng.choice(WORDS, 24))
    with model.session(n_ctx=400, policy=policy) as session:
        for n in (60, 90, 70, 70, 100):
            options = {"template": None, "max_tokens": 8}
            result = session.generate(text[:n], **options).result()
            fresh = answer(model, text[:n], policy, **options)
            assert ids(result) == ids(fresh)
            assert np.allclose([t.entropy for t in result.tokens], [t.entropy for t in fresh.tokens], atol=2e-3)


def test_reuse_is_for_whole_pictures(model: kvs.Model, rng: np.random.Generator) -> None:
    a, b = picture(rng), picture(rng)
    with model.session(n_ctx=400) as session:
        session.generate("see <image>", image=a, template=None, max_tokens=0).result()
        n = session.n_past
        same = session.generate("see <image>", image=a, template=None, max_tokens=4).result()
        assert same.stats.reused_tokens == n - model.n_image and same.stats.reused_images == 1, "a picture at the end is fed again, whole"
        session.rewind(session.n_past - n + 3)  # now it ends inside the picture
        cut = session.generate("see <image>", image=a, template=None, max_tokens=4).result()
        assert cut.stats.reused_tokens == n - model.n_image and ids(cut) == ids(same)
        other = session.generate("see <image>", image=b, template=None, max_tokens=4).result()
        assert other.stats.reused_tokens == n - model.n_image and other.stats.reused_images == 0
        assert ids(other) == ids(answer(model, "see <image>", image=b, template=None, max_tokens=4))


# ---- conversations ----


def test_chat_keeps_turns(model: kvs.Model, policy: kvs.KVSmooth | None, rng: np.random.Generator) -> None:
    image = picture(rng)
    options = {"max_tokens": 6, "repetition_penalty": 1.2}
    with model.session(n_ctx=400, policy=policy) as session, model.session(n_ctx=400, policy=policy) as by_hand:
        first = session.chat("what is it", image=image, system="be kind.", **options).result()
        rows = session.n_past
        assert ids(first) == ids(answer(model, "what is it", policy, image=image, system="be kind.", **options))
        second = session.chat("and now", **options).result()
        delta = model.tokenize("</s>USER: and now ASSISTANT:", special=True)
        assert second.stats.prefill_tokens == len(delta) and second.stats.encode_s == 0.0
        assert timeline(session)[rows : rows + len(delta)] == delta
        # the same rows by hand
        by_hand.generate("what is it", image=image, system="be kind.", **options).result()
        by_hand.feed(delta)
        assert int(by_hand.logits().argmax()) == second.tokens[0].id or options["repetition_penalty"] != 1.0
        third = session.chat("<image> too", image=image, **options).result()
        assert third.stats.reused_images == 1 and third.stats.prefill_tokens > model.n_image
        assert [m["role"] for m in session._chat.turns] == ["system", *["user", "assistant"] * 3]
        assert session._chat.turns[2]["content"] == first.text
        with pytest.raises(ValueError, match="system"):
            session.chat("more", system="be rude.")
        session.reset()
        assert session.n_past == 0
        assert ids(session.chat("what is it", image=image, system="be kind.", **options).result()) == ids(first)


def test_chat_and_other_calls(model: kvs.Model) -> None:
    options = {"max_tokens": 4}
    with model.session(n_ctx=400) as session:
        session.chat("a dog", **options).result()
        session.feed([5])
        with pytest.raises(ValueError, match=r"reset\(\)"):
            session.chat("a cat", **options)
        session.rewind(1)
        twin = session.fork()
        a, b = session.chat("a cat", **options).result(), twin.chat("a cat", **options).result()
        assert ids(a) == ids(b) and len(twin._chat.turns) == 4
        session.generate("a tree", **options).result()
        n = len(model.tokenize("USER: a cat ASSISTANT:")) + 1
        fresh = session.chat("a cat", **options)
        fresh.result()
        assert fresh.stats.prefill_tokens + fresh.stats.reused_tokens == n, "generate() ended the conversation"
        stream = session.chat("a tree", max_tokens=100)
        next(stream)
        stream.close()
        assert session.chat("a cat", **options).result().tokens, "an answer that was cut short counts as it is"
        one, two = session.chat("a", **options), session.chat("a", **options)
        one.result()
        rows = session.n_past
        two.result()
        assert timeline(session)[rows] == 2, "the second stream was started after the first one's turn"


# ---- the lower floor ----


def test_generated_rows_that_do_not_fit(model: kvs.Model, policy: kvs.KVSmooth | None) -> None:
    with model.session(n_ctx=8, policy=policy) as session:
        session.feed([1, 5, 6])
        with pytest.raises(kvs.ContextOverflowError, match="9") as caught:
            session.feed([5] * 6, generated=True)
        assert (caught.value.needed, caught.value.n_ctx, session.n_past, session.n_generated) == (9, 8, 3, 0)
        session.feed([5] * 5, generated=True)
        assert (session.n_past, session.n_generated) == (8, 5)


# ---- fork, rewind, save ----


def test_fork_and_load_go_on_alike(model: kvs.Model, policy: kvs.KVSmooth | None, rng: np.random.Generator, tmp_path: Path) -> None:
    hot = {"temperature": 1.2, "max_tokens": 8, "template": None}
    with model.session(n_ctx=300, policy=policy, kv_type="q8_0", seed=3) as session:
        session.generate(PROMPT, image=picture(rng), **hot).result()
        session.save(tmp_path / "s.kvs")
        others = [session.fork(), kvs.Session.load(model, tmp_path / "s.kvs", policy=policy)]
        assert (others[1].n_ctx, others[1].kv_type, others[1].n_past) == (300, "q8_0", session.n_past)
        prompt = "another"
        expected = session.generate(prompt, **hot).result()
        for other in others:
            assert ids(other.generate(prompt, **hot).result()) == ids(expected)
            other.close()


def test_stream_equals_feeding(model: kvs.Model, policy: kvs.KVSmooth | None, rng: np.random.Generator) -> None:
    image = picture(rng)
    with model.session(n_ctx=300, policy=policy, kv_type="f32") as session, model.session(n_ctx=300, policy=policy, kv_type="f32") as floor:
        result = session.generate(f"<image>{PROMPT}", image=image, template=None, max_tokens=20, repetition_penalty=1.1).result()
        floor.feed([1])
        floor.feed_image(image)
        floor.feed(model.tokenize(PROMPT))
        floor.feed([t.id for t in result.tokens if not math.isnan(t.entropy)], generated=True)
        assert np.allclose(session.entropies(), floor.entropies(), atol=1e-4)
        assert np.allclose(session.logits(), floor.logits(), atol=1e-3)
        assert np.array_equal(session.positions(0), np.arange(session.n_past))


# ---- long runs ----


@pytest.mark.slow
def test_memory_is_flat_over_300_captions(model: kvs.Model, rng: np.random.Generator) -> None:
    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc here")
    sizes = []
    with model.session(n_ctx=300, policy=SMOOTH) as session:
        for i in range(300):
            session.generate(PROMPT, image=picture(rng), max_tokens=8).result()
            with model.session(n_ctx=300, policy=SMOOTH) as own:
                own.generate(PROMPT, image=picture(rng), max_tokens=2).result()
            if i in (60, 299):
                sizes.append(resident())
    assert sizes[1] < sizes[0] * 1.01, sizes
    assert threading.active_count() < 20
