"""Many requests at once: the same answers as one by one, errors and ends of each, closing and cancelling from anywhere."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from answers import PROMPT, answer, ids
from conftest import Pair
from devices import DEVICE
from twins import picture

import pykvsmooth as kvs

# The CPU gives each row of a step the bits that it has alone. A GPU may add up in another order, and where a cache rounds that is seen
KV: Any = "f16" if DEVICE == "cpu" else "f32"


def requests_for(rng: np.random.Generator) -> list[Any]:
    image = picture(rng)
    return [
        "a dog",
        {"prompt": PROMPT, "image": image, "max_tokens": 9},
        {"prompt": "the street <image> and <image>", "images": [picture(rng), image], "max_tokens": 3},
        {"prompt": "a car", "temperature": 1.3, "seed": 5, "logprobs": 2},
        {"prompt": "a cat", "max_tokens": 1},
        {"prompt": "a tree", "system": "be kind.", "repetition_penalty": 1.4},
        {"prompt": "nothing", "max_tokens": 0},
    ]


@pytest.mark.parametrize("parallel", [1, 2, 4, 16])
def test_batch_equals_single_runs(model: kvs.Model, policy: kvs.KVSmooth | None, rng: np.random.Generator, parallel: int) -> None:
    requests = requests_for(rng)
    tokens: dict[int, list[kvs.Token]] = {i: [] for i in range(len(requests))}
    results: dict[int, kvs.Result] = {}
    live = 0
    for index, item in model.generate_batch(requests, n_ctx=300, kv_type=KV, policy=policy, parallel=parallel, max_tokens=12):
        assert index not in results
        if isinstance(item, kvs.Result):
            results[index] = item
        else:
            tokens[index].append(item)
            live = max(live, sum(bool(tokens[i]) and i not in results for i in tokens))
    assert sorted(results) == list(range(len(requests))) and live <= parallel
    for i, request in enumerate(requests):
        arguments = {"max_tokens": 12, **(request if isinstance(request, dict) else {"prompt": request})}
        single = answer(model, policy=policy, kv_type=KV, **arguments)
        assert ids(results[i]) == ids(single) and results[i].text == single.text, i
        assert results[i].tokens == tokens[i] and results[i].finish_reason == single.finish_reason
        assert np.allclose([t.entropy for t in tokens[i]], [t.entropy for t in single.tokens], atol=1e-5, equal_nan=True)


def test_speed_is_that_of_the_answer(model: kvs.Model) -> None:
    """A step that four share is no quarter of a step for each of them."""
    begin = time.perf_counter()
    batch = model.generate_batch(["a dog"] * 4, n_ctx=300, parallel=4, max_tokens=40)
    stats = [item.stats for _, item in batch if isinstance(item, kvs.Result)]
    seconds = time.perf_counter() - begin
    assert len(stats) == 4 and repr(batch) == "<pykvsmooth.Batch 0 running>"
    for one in stats:
        assert one.decode_tokens == 40 and one.decode_s < seconds and one.tokens_per_s == pytest.approx(40 / one.decode_s)
    assert sum(one.decode_s for one in stats) > seconds * 0.75  # prompts take the rest


def test_batch_draws_requests_as_it_goes(model: kvs.Model) -> None:
    drawn = []

    def requests() -> Iterator[str]:
        for i in range(50):
            drawn.append(i)
            yield f"a dog {i}"

    batch = model.generate_batch(requests(), n_ctx=100, parallel=2, max_tokens=3)
    assert drawn == []
    for _index, item in batch:
        if isinstance(item, kvs.Result):
            break
    assert len(drawn) <= 3 and not [s for s in model._sessions if not s.closed and s.n_ctx == 100]


def test_batch_errors(model: kvs.Model) -> None:
    bad = ["a dog", {"prompt": "b", "image": b"no picture"}, {"image": b""}, 5, {"prompt": "a " * 300}, "a cat"]
    with pytest.raises(kvs.ImageError):
        list(model.generate_batch(bad, n_ctx=100, max_tokens=2))
    items = list(model.generate_batch(bad, n_ctx=100, max_tokens=2, on_error="yield", parallel=2))
    ends = {i: type(item) for i, item in items if not isinstance(item, kvs.Token)}
    assert ends == {0: kvs.Result, 1: kvs.ImageError, 2: TypeError, 3: TypeError, 4: kvs.ContextOverflowError, 5: kvs.Result}
    for arguments in ({"parallel": 0}, {"on_error": "ignore"}, {"n_ctx": 0}, {"policy": kvs.KVSmooth(layers="9:")}):
        with pytest.raises(ValueError):
            model.generate_batch(["a"], **arguments)
    with pytest.raises(TypeError):
        model.generate_batch("a dog")


def test_batch_cancel(model: kvs.Model) -> None:
    batch = model.generate_batch(["a dog", "a cat", "a tree"], n_ctx=200, parallel=2, max_tokens=100, repetition_penalty=1.2)
    results = {}
    for n, (index, item) in enumerate(batch):
        if n == 5:
            batch.cancel()
        if isinstance(item, kvs.Result):
            results[index] = item.finish_reason
    assert results == {0: "cancelled", 1: "cancelled", 2: "cancelled"}


def test_cancel_before_and_between_requests(model: kvs.Model) -> None:
    for n_done in (0, 1):
        batch = model.generate_batch(["a", "b", "c"], n_ctx=100, parallel=1, max_tokens=2)
        ends = []
        if n_done == 0:
            batch.cancel()
        for index, item in batch:
            if isinstance(item, kvs.Result):
                ends.append((index, item.finish_reason, len(item.tokens), item.stats.device))
                batch.cancel()
        assert ends == [(i, "length" if i < n_done else "cancelled", 2 if i < n_done else 0, model.device) for i in range(3)]


def test_batch_defaults_are_checked_at_the_call(model: kvs.Model) -> None:
    with pytest.raises(TypeError, match=r"^generate_batch\(\) got an unexpected keyword argument 'bogus'"):
        model.generate_batch(["a"], bogus=1)
    for wrong in ({"temperature": -1}, {"temperature": 1e300}, {"repetition_penalty": 1e-300}, {"max_tokens": -1}, {"mode": "tile"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            model.generate_batch(["a"], **wrong)
    stops = model.generate_batch(["a", "b"], n_ctx=100, stop=iter(["x", "y"]), max_tokens=2)
    assert len([item for _, item in stops if isinstance(item, kvs.Result)]) == 2


def ends_of(batch: Any) -> dict[int, type]:
    return {index: type(item) for index, item in batch if not isinstance(item, kvs.Token)}


def open_sessions(model: kvs.Model) -> int:
    return sum(not session.closed for session in model._sessions)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kvs.Model]:
    """The embedding of token 300 is not a number."""
    path, _, _ = tiny.write_pair(tmp_path_factory.mktemp("poisoned"), seed=3, vision=False, load=False)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "token_embd.weight")
    np.memmap(path, np.float32, "r+", tensor.data_offset, tuple(tensor.shape[::-1]))[300] = np.nan
    with kvs.Model(path, mmproj=False, device=DEVICE) as model:
        model._end_ids = frozenset()
        yield model


@pytest.mark.parametrize("parallel", [1, 2, 4])
def test_an_error_ends_one_request(poisoned: kvs.Model, parallel: int) -> None:
    bad = poisoned.detokenize([300])
    assert 300 in poisoned.tokenize(bad)
    options: dict[str, Any] = {"n_ctx": 100, "max_tokens": 6, "parallel": parallel, "template": None}
    requests = ["the dog", {"prompt": "a cat", "temperature": 1e300}, {"prompt": f"on {bad}"}, "the dog", "a cat"]
    items = list(poisoned.generate_batch(requests, on_error="yield", **options))
    assert ends_of(items) == {0: kvs.Result, 1: ValueError, 2: kvs.NumericError, 3: kvs.Result, 4: kvs.Result}
    results = {index: item for index, item in items if isinstance(item, kvs.Result)}
    assert ids(results[0]) == ids(results[3]) == ids(answer(poisoned, "the dog", template=None, max_tokens=6))
    batch = poisoned.generate_batch(requests[2:], **options)
    with pytest.raises(kvs.NumericError):
        list(batch)
    assert next(batch, None) is None and open_sessions(poisoned) == 0


def test_an_error_of_the_joint_step_ends_all_in_it(model: kvs.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from pykvsmooth import batch as module

    real, calls = module.step, []

    def step(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise kvs.DeviceError("the device is gone")
        real(*args)

    monkeypatch.setattr(module, "step", step)
    batch = model.generate_batch(["a", "b", "c"], n_ctx=100, parallel=2, max_tokens=3, on_error="yield")
    assert ends_of(batch) == {0: kvs.DeviceError, 1: kvs.DeviceError, 2: kvs.Result}
    assert open_sessions(model) == 0


@pytest.mark.parametrize("n", [1, 2, 4])
def test_an_error_of_the_joint_draw_ends_one(model: kvs.Model, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """Whose it was is found out; the others draw what they would have drawn."""
    from pykvsmooth import batch as module

    real, calls = module.sample, []

    def sample(generations: list[Any], *args: Any) -> Any:
        calls.append(len(generations))
        if any(one.request.message == "b" and len(one.tokens) == 2 for one in generations):
            raise kvs.NumericError("not a number", "")
        return real(generations, *args)

    monkeypatch.setattr(module, "sample", sample)
    requests = [{"prompt": prompt, "seed": i} for i, prompt in enumerate("abcd")]
    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": 4}
    ends = {}
    for index, item in model.generate_batch(requests, n_ctx=100, kv_type=KV, parallel=n, on_error="yield", **options):
        if not isinstance(item, kvs.Token):
            ends[index] = item
    assert {index: type(end) for index, end in ends.items()} == {0: kvs.Result, 1: kvs.NumericError, 2: kvs.Result, 3: kvs.Result}
    assert set(calls) == {1, 2} if n == 2 else max(calls) == n
    for index in (0, 2, 3):
        assert ids(ends[index]) == ids(answer(model, kv_type=KV, **requests[index], **options))
    assert open_sessions(model) == 0


def test_a_session_that_is_gone_ends_one(model: kvs.Model) -> None:
    ends, batch = {}, model.generate_batch(["a", "b", "c"], n_ctx=100, parallel=3, max_tokens=4, on_error="yield")
    for n, (index, item) in enumerate(batch):
        if n == 2:
            batch._live[1].session._handle.close()
        if not isinstance(item, kvs.Token):
            ends[index] = type(item)
    assert ends == {0: kvs.Result, 1: kvs.ClosedError, 2: kvs.Result}


def test_close_frees_the_sessions(model: kvs.Model) -> None:
    batch = model.generate_batch(["a dog"], n_ctx=100)
    assert open_sessions(model) == 1
    for _ in range(2):
        batch.close()
        assert open_sessions(model) == 0 and next(batch, None) is None
    with model.generate_batch(["a dog"], n_ctx=100) as batch:
        pass
    assert open_sessions(model) == 0
    batch = model.generate_batch(["a dog", "a cat"], n_ctx=100, max_tokens=50)
    next(batch)
    batch.close()
    assert open_sessions(model) == 0 and list(batch) == []

    def requests() -> Iterator[str]:
        yield "a dog"
        closing.close()
        yield "a cat"

    closing = model.generate_batch(requests(), n_ctx=100, parallel=2, max_tokens=3)
    assert list(closing) == [] and open_sessions(model) == 0


@pytest.mark.parametrize("how", ["close", "cancel", "model"])
def test_ending_it_from_another_thread(tiny_pair: Pair, how: str) -> None:
    with kvs.Model(tiny_pair.text, mmproj=False, threads=2, device=DEVICE) as model:
        model._end_ids = frozenset()
        for _ in range(10):
            batch = model.generate_batch(["a dog", "a cat", "a tree"], n_ctx=4000, parallel=2, max_tokens=None, on_error="yield")
            ends: dict[int, Any] = {}
            started = threading.Event()

            def read(batch: Any = batch, ends: dict[int, Any] = ends, started: threading.Event = started) -> None:
                for index, item in batch:
                    started.set()
                    if not isinstance(item, kvs.Token):
                        ends[index] = item

            thread = threading.Thread(target=read, daemon=True)
            thread.start()
            started.wait()
            time.sleep(0.01)
            {"close": batch.close, "cancel": batch.cancel, "model": model.close}[how]()
            if how == "close":
                assert open_sessions(model) == 0
            thread.join(5)
            assert not thread.is_alive()
            if how != "close":
                assert {i: end.finish_reason for i, end in ends.items()} == dict.fromkeys(range(3), "cancelled")
            if how == "model":
                assert model.closed
                break
