"""pykvsmooth bench beside a build of llama.cpp: what its tools are asked, what they may say, and which of its settings count."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import Pair
from test_bench import ANSWER, QUICK, peer, script

from pykvsmooth.bench import Bench, Figure, LlamaCpp, Peer, PeerError, Settings, roofs
from pykvsmooth.bench.figures import Entry
from pykvsmooth.bench.peer import read_answer, read_bench

# llama-bench -p 0 -n 8 -d 64 -fa 0 -o json, build 0c1e570, without the keys that do not matter here
RECORDED = """[
  {
    "build_commit": "0c1e570", "build_number": 1, "cpu_info": "AMD EPYC", "gpu_info": "", "backends": "CPU",
    "model_filename": "scenes-llava-Q8_0.gguf", "model_type": "llama ?B Q8_0", "model_size": 7816192, "model_n_params": 7344384,
    "n_batch": 2048, "n_ubatch": 512, "n_threads": 2, "type_k": "f16", "type_v": "f16", "flash_attn": 0, "repack": false,
    "n_prompt": 0, "n_gen": 8, "n_depth": 64,
    "test_time": "2026-11-21T21:34:19Z",
    "avg_ns": 15822097233, "stddev_ns": 3467130033, "avg_ts": 0.947092, "stddev_ts": 0.914454,
    "samples_ns": [ 26624456224, 5019738243 ],
    "samples_ts": [ 0.300476, 1.59371 ]
  }
]
"""
# the lines that matter of llama-mtmd-cli --log-prefix --log-timestamps --verbosity 4, build 0c1e570: 4.898438 s, of which the prompt's
# time holds the picture's
LOGGED = """0.01.567.000 I cmn          init: llama threadpool init, n_threads = 2
0.01.684.218 I main: loading model: models/demo/scenes-llava-Q8_0.gguf
0.01.684.594 W WARN: This is an experimental CLI for testing multimodal capability.
0.03.206.261 I encoding mtmd batch, n_chunks = 1 (done = 1, total = 3)
0.04.102.173 I mtmd batch encoding done in 896 ms

 The picture shows a quiet bedroom with walls

0.06.582.656 I llama_perf_context_print:        load time =    1525.03 ms
0.06.582.694 I llama_perf_context_print: prompt eval time =    4881.67 ms /    80 tokens (   61.02 ms per token,    16.39 tokens per second)
0.06.582.724 I llama_perf_context_print:        eval time =       9.59 ms /     7 runs   (    1.37 ms per token,   729.85 tokens per second)
"""
ENCODES = "echo a picture; echo 'mtmd batch encoding done in 1500 ms' >&2"


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofs, "available_bytes", lambda: 64 << 20)


def test_llama_bench_as_it_was_recorded():
    assert read_bench(RECORDED, {"n_prompt": 0, "n_gen": 8, "n_depth": 64}) == 0.947092


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not the JSON"),
        ("Segmentation fault", "not the JSON"),
        ("[1, 2]", "not the JSON"),
        ("7", "not the JSON"),
        ("[" * 100000, "not the JSON"),
        ("{}", "0 records"),
        ("[]", "0 records"),
        (RECORDED.replace('"n_gen": 8', '"n_gen": 9'), "0 records"),
        (RECORDED.replace("]\n}", "]}").replace('"avg_ts"', '"ts"'), "not the JSON"),
        (RECORDED.replace("0.947092", "0"), "no speed"),
        (RECORDED.replace("0.947092", "NaN"), "no speed"),
        (RECORDED.replace("0.947092", '"fast"'), "no speed"),
    ],
)
def test_llama_bench_as_it_may_be(text, says):
    with pytest.raises(PeerError, match=says):
        read_bench(text, {"n_prompt": 0, "n_gen": 8, "n_depth": 64})


def test_the_log_of_an_answer():
    """Between two lines, over full minutes, too."""
    assert read_answer(LOGGED) == pytest.approx(4.898438)
    assert read_answer(LOGGED.replace("0.06.582.656", "12.00.000.000")) == pytest.approx(720 - 1.684218)
    for missing in ("main: loading model", "llama_perf_context_print: ", "0.01.684.218 I "):
        with pytest.raises(PeerError, match="its log does not say when"):
            read_answer(LOGGED.replace(missing, ""))


def test_settings_are_what_the_build_has(tmp_path):
    build = LlamaCpp(str(peer(tmp_path / "bin")))
    assert [setting.flags for setting in build.bench_settings()] == [
        ("-fa", "on", "--repack", "1"),
        ("-fa", "on", "--repack", "0"),
        ("-fa", "off", "--repack", "1"),
        ("-fa", "off", "--repack", "0"),
    ]
    assert [setting.flags for setting in build.cli_settings()] == [
        ("-fa", "on"),
        ("-fa", "on", "--no-repack"),
        ("-fa", "off"),
        ("-fa", "off", "--no-repack"),
    ]
    script(tmp_path / "bin" / "llama-bench", "#!/bin/sh\necho '-fa, --flash-attn <0|1>'")
    assert [(setting.name, setting.flags) for setting in build.bench_settings()] == [
        ("flash attention on", ("-fa", "1")),
        ("flash attention off", ("-fa", "0")),
    ]
    script(tmp_path / "bin" / "llama-bench", "#!/bin/sh\necho usage")
    assert [(setting.name, setting.flags) for setting in build.bench_settings()] == [("as it is", ())]


def test_settings_of_a_cache(tmp_path):
    """Its type is said where it is not what the tools take by themselves; a quantized one needs flash attention."""
    build = LlamaCpp(str(peer(tmp_path / "bin")), kv_type="q8_0")
    cache = ("-ctk", "q8_0", "-ctv", "q8_0")
    assert [(setting.name, setting.flags) for setting in build.bench_settings()] == [
        ("flash attention on, repack on, q8_0 cache", ("-fa", "on", "--repack", "1", *cache)),
        ("flash attention on, repack off, q8_0 cache", ("-fa", "on", "--repack", "0", *cache)),
    ]
    assert [setting.flags for setting in build.cli_settings()] == [("-fa", "on", *cache), ("-fa", "on", "--no-repack", *cache)]
    wide = replace(build, kv_type="f32")
    assert [setting.flags[-4:] for setting in wide.cli_settings()] == [("-ctk", "f32", "-ctv", "f32")] * 4
    with pytest.raises(PeerError, match="llama-bench: it has no f32 cache, so it is left out"):
        wide.bench_settings()
    script(tmp_path / "bin" / "llama-bench", "#!/bin/sh\necho '-fa, --flash-attn <0|1>'")
    with pytest.raises(PeerError, match="llama-bench: it has no q8_0 cache, so it is left out"):
        build.bench_settings()


def test_a_peer_has_the_same_cache(run, tmp_path):
    folder = peer(tmp_path / "bin", ANSWER, ENCODES)
    argv = ["bench", *QUICK, "--max-tokens", 3, "--against", folder]
    got = run(*argv, "--only", "prefill,decode,caption", "--kv-type", "q8_0", "--precision", "exact")
    assert got.code == 0 and "; llama.cpp has no such choice\n" in got.out
    assert "llama.cpp: flash attention on, repack off, q8_0 cache" in got.out
    for tool in ("llama-bench", "llama-mtmd-cli"):
        log = (folder / f"{tool}.log").read_text().splitlines()
        assert log and all("-fa on" in line and line.endswith("-ctk q8_0 -ctv q8_0") for line in log)
    got = run(*argv, "--only", "prefill", "--kv-type", "f32")
    row = next(line for line in got.out.splitlines() if line.startswith("prefill of 24 rows"))
    assert got.code == 0 and "llama-bench: it has no f32 cache, so it is left out" in row and "no such choice" not in got.out


def raced(tiny_pair: Pair, unit: str, repeat: int, **rivals: list[float]) -> dict[str, Peer]:
    """Peers that gave these values, the first of each thrown away."""
    figure = Figure("decode", unit, 1)
    entry = Entry(figure, lambda: 1.0, rivals={name: iter(values).__next__ for name, values in rivals.items()})
    Bench(Settings(tiny_pair.text, repeat=repeat)).repeat(SimpleNamespace(roofs=None), entry)
    return figure.peers


def test_a_setting_is_dropped_after_three_repetitions(tiny_pair):
    """The second repetition falls into a time of half the bandwidth for one that is as good: it stays. The third is slow and goes."""
    found = raced(tiny_pair, "tokens/s", 5, best=[1, 10, 10, 10, 10, 10], hit=[1, 5, 9.8, 9.9, 9.8, 9.8], slow=[1, 8, 8, 8])
    assert [(len(peer.values), peer.dropped) for peer in found.values()] == [(5, False), (5, False), (3, True)]
    found = raced(tiny_pair, "s", 4, best=[1, 1, 1, 1, 1], hit=[1, 2, 1.1, 1.1, 1.1], slow=[1, 1.3, 1.3, 1.3])
    assert [(len(peer.values), peer.dropped) for peer in found.values()] == [(4, False), (4, False), (3, True)]
    found = raced(tiny_pair, "tokens/s", 2, best=[1, 10, 10], slow=[1, 1, 1])
    assert not found["slow"].dropped and len(found["slow"].values) == 2


def test_a_setting_is_held_against_the_best_pair_by_pair(tiny_pair):
    """After three the medians are 6.7 and 8; of the pairs' ratios the median is 0.99."""
    found = raced(tiny_pair, "tokens/s", 4, best=[1, 10, 8, 5, 9], near=[1, 9.9, 6.7, 5, 9])
    assert not found["near"].dropped and len(found["near"].values) == 4


def test_against_a_peer(run, tmp_path):
    """The best of its settings is what counts; those that are far behind are not run to the end."""
    folder = peer(tmp_path / "bin", ANSWER)
    out = tmp_path / "b.json"
    got = run("bench", *QUICK, "--only", "prefill,decode", "--repeat", 4, "--against", folder, "--json", out)
    assert got.code == 0, got.err
    prefill, *decodes = json.loads(out.read_text())["figures"]
    for figure in (prefill, *decodes):
        assert figure["peer"] == "flash attention on, repack off" and figure["peers"][figure["peer"]]["values"] == [20.0] * 4
        assert figure["peers"]["flash attention off, repack on"] | {"value": None} == {
            "value": None,
            "values": [1.0] * 3,
            "error": "",
            "dropped": True,
        }
        assert figure["ahead"]["median"] == pytest.approx(np.median(figure["values"]) / 20)
    assert "llama.cpp: flash attention on, repack off" in got.out and got.out.count("20") >= 3
    log = (folder / "llama-bench.log").read_text().splitlines()
    assert sum("-d 9 " in line and "-n 2 " in line and "-t 1 " in line for line in log) == 17  # four settings four times, then one
    assert sum("-p 24 -n 0 -d 0" in line for line in log) == 17


def test_pictures_and_captions_of_a_peer(run, tmp_path):
    folder = peer(tmp_path / "bin", cli=ENCODES)
    out = tmp_path / "b.json"
    got = run("bench", *QUICK, "--only", "encode,caption", "--max-tokens", 3, "--against", folder, "--json", out)
    encode, caption = json.loads(out.read_text())["figures"]
    assert all(one["values"] == [1.5] for one in encode["peers"].values()) and len(encode["peers"]) == 4, got.err
    assert encode["ahead"]["median"] == pytest.approx(1.5 / encode["values"][0])
    assert encode["more"]["operations"] > 0 and encode["more"]["s_per_block"] == pytest.approx(encode["values"][0] / 2)
    assert caption["more"]["unequal"] is (caption["more"]["tokens"] < 3) and caption["peer"]
    log = (folder / "llama-mtmd-cli.log").read_text().splitlines()
    assert len(log) == 16 and all("--ignore-eos" in line and "--temp 0" in line for line in log)
    assert sum("-n 3 " in line for line in log) == 8 and sum("--no-repack" in line for line in log) == 8


def test_an_answer_of_a_peer(run, tmp_path):
    """Its log is asked for with times; a build whose log has none is left out, and ours stays."""
    folder, out = peer(tmp_path / "bin", cli=f"cat >&2 <<'END'\n{LOGGED}\nEND"), tmp_path / "b.json"
    argv = ["bench", *QUICK, "--only", "answer", "--max-tokens", 3, "--against", folder, "--json", out]
    got = run(*argv)
    (answer,) = json.loads(out.read_text())["figures"]
    assert got.code == 0 and all(one["values"] == pytest.approx([4.898438]) for one in answer["peers"].values()) and answer["peer"]
    assert answer["ahead"]["median"] == pytest.approx(4.898438 / answer["values"][0])
    stats = answer["more"]["stats"]
    assert stats["decode_tokens"] == 3 and stats["reused_images"] == stats["reused_tokens"] == 0  # each is a whole one
    assert answer["values"][0] >= stats["encode_s"] + stats["prefill_s"] + stats["decode_s"] and "by its log" in answer["more"]["compared"]
    log = (folder / "llama-mtmd-cli.log").read_text().splitlines()
    assert len(log) == 8 and all("-n 3 " in line and "--log-prefix --log-timestamps --verbosity 4" in line for line in log)
    script(folder / "llama-mtmd-cli", "#!/bin/sh\necho a picture")
    got = run(*argv)
    assert got.code == 0 and "its log does not say when" in got.out and json.loads(out.read_text())["figures"][0]["values"]


@pytest.mark.parametrize(
    ("bench", "says"),
    [
        ("kill -ABRT $$", "died of SIGABRT"),
        ("echo warming up >&2; exit 1", "ended with status 1: warming up"),
        ("echo '| model | t/s |'", "not the JSON"),
        ("head -c 100000 /dev/urandom", "not the JSON"),
        ("exec sleep 60", "not finished after 1 s"),
        (None, "can't be started: No such file"),
        ("help", "ended with status 1: no help here"),
    ],
    ids=["crash", "failure", "table", "noise", "hang", "missing", "helpless"],
)
def test_a_peer_that_fails_does_not_stop_the_rest(run, tmp_path, bench, says):
    folder = peer(tmp_path / "bin", bench or "")
    if bench is None:
        (folder / "llama-bench").unlink()
    if bench == "help":
        script(folder / "llama-bench", "#!/bin/sh\necho no help here >&2; exit 1")
    out = tmp_path / "b.json"
    argv = ["bench", *QUICK, "--only", "prefill,policy", "--against", folder, "--timeout", 1, "--json", out]
    got = run(*argv)
    assert got.code == 0, got.err
    prefill, policy = json.loads(out.read_text())["figures"]
    assert prefill["peers"] and all(says in one["error"] and not one["values"] for one in prefill["peers"].values())
    assert prefill["values"] and prefill["peer"] is prefill["ahead"] is None and policy["values"]
    row = next(line for line in got.out.splitlines() if line.startswith("prefill of 24 rows"))
    assert says in row and "llama.cpp" in row


def test_a_picture_whose_time_the_peer_does_not_say(run, tmp_path):
    folder = peer(tmp_path / "bin", cli="echo a picture")
    got = run("bench", *QUICK, "--only", "encode", "--against", folder)
    assert got.code == 0 and "it does not say how long the picture took" in got.out
