"""The command line as its users meet it: what goes where, exit codes, pipes, terminals and Ctrl-C."""

import io
import json
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Pair, endless
from PIL import Image
from rich.cells import cell_len

import pykvsmooth as kvs
from pykvsmooth import box
from pykvsmooth.cli import compare, escape, pictures, records, render, terminal

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "Please describe the image in detail."
ESC = "\x1b"


@pytest.fixture(scope="module")
def tiny_pair(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return endless(tiny_pair, tmp_path_factory.mktemp("endless"))


@pytest.fixture
def answer(tiny_pair: Pair) -> Callable[..., kvs.Result]:
    """The same answer through the package."""

    def go(image: Path, smooth: bool = True, max_tokens: int = 12, **options: object) -> kvs.Result:
        with kvs.Model(tiny_pair.text, mmproj=tiny_pair.mmproj) as model:
            policy = kvs.KVSmooth.for_model(model) if smooth else None
            with model.session(policy=policy) as session:
                return session.generate(PROMPT, image=image, max_tokens=max_tokens, **options).result()

    return go


def line(text: str) -> str:
    """As it is printed: the end of its line is its own, if it has one."""
    return text if text.endswith("\n") else text + "\n"


# ---- caption ----


def test_caption_goes_to_stdout_and_all_else_to_stderr(run, image, answer):
    got = run("caption", image, "--max-tokens", 12)
    assert (got.code, got.out) == (0, line(answer(image).text))
    assert re.search(r"encode .* s; prefill .* rows.*; 12 tokens at .* tok/s; cpu", got.err) and ESC not in got.err
    assert run("caption", image, "--max-tokens", 12, "--quiet").err == ""


def test_policy_and_its_options(run, image, answer):
    plain = run("caption", image, "--max-tokens", 12, "--policy", "off").out
    assert plain == line(answer(image, smooth=False).text)
    assert run("caption", image, "--max-tokens", 12, "--set", "kvsmooth.mode=fixed", "--set", "kvsmooth.lambda_fixed=0").out == plain
    with_seed = run("caption", image, "--max-tokens", 12, "--temperature", 1.5, "--seed", 5).out
    assert with_seed == line(answer(image, temperature=1.5, seed=5).text)


def test_json_for_one_and_for_many(run, image, folder, answer):
    got = run("caption", image, "--max-tokens", 12, "--json").lines
    *tokens, result = got
    expected = answer(image)
    assert [t["type"] for t in tokens] == ["token"] * 12 and result["type"] == "result"
    assert "".join(t["text"] for t in tokens) == result["caption"] == expected.text
    assert [t["id"] for t in tokens] == [t.id for t in expected.tokens]
    assert result["finish_reason"] == "length" and result["stats"]["decode_tokens"] == 12
    assert result["settings"]["policy"].startswith("KVSmooth(") and result["image"] == str(image)
    many = run("caption", folder, "--max-tokens", 3, "--json").lines
    assert [r["type"] for r in many] == ["result"] * 3
    many = run("caption", folder, "--max-tokens", 3, "--json-tokens").lines
    assert [r["type"] for r in many] == ["token", "token", "token", "result"] * 3


def test_json_has_null_where_python_has_nan():
    token = kvs.Token("x", 1, -1.0, float("nan"), float("nan"))
    assert json.loads(records.dumps(records.token_record("a", token)))["strength"] is None


def test_a_pruned_caption(run, image):
    """--policy prunehal, alone and stacked: when and why rows left, in the record of the caption."""
    for policy, names in (("prunehal", "prunehal.keep=0.5"), ("kvsmooth,prunehal", "prunehal.keep=0.5")):
        got = run("caption", image, "--json", "--max-tokens", 3, "--policy", policy, "--set", names)
        assert got.code == 0, got.err
        *tokens, caption = got.lines
        assert caption["stats"]["pruned"][0] == {"step": 1, "reason": "forced", "rows_before": 16, "rows_after": 8}
        assert all(0 < token["visual_mass"] < 1 for token in tokens if token["type"] == "token")


def test_folders_globs_and_bad_pictures(run, folder, image):
    got = run("caption", folder, "--max-tokens", 3)
    assert got.code == 0
    assert re.findall(r"^(\S*/\S+): ", got.out, re.M) == [str(folder / name) for name in ("a.webp", "b9.jpg", "b10.png")]
    assert "3 captioned" in got.err
    got = run("caption", folder / "b*", folder / "missing.png", folder / "notes.txt", folder / "none*", "--max-tokens", 3, "--json")
    assert got.code == 1
    assert [line["image"] for line in got.lines] == [str(folder / "b9.jpg"), str(folder / "b10.png")]
    errors = [line for line in got.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    assert "matches no file" in errors[0] and "no such file" in errors[1] and "is text" in errors[2]
    (folder / "empty").mkdir()
    got = run("caption", folder / "empty")
    assert got.code == 1 and "without pictures" in got.err and got.out == ""


def test_natural_order():
    assert sorted(["p10.png", "p9.png", "P1.png", "7"], key=pictures.natural) == ["7", "P1.png", "p9.png", "p10.png"]


def test_a_picture_from_standard_input(run, image):
    expected = run("caption", image, "--max-tokens", 8).out
    assert run("caption", "-", "--max-tokens", 8, stdin=image.read_bytes()).out == expected
    got = run("caption", "-", stdin=b"")
    assert got.code == 1 and "is empty" in got.err


def test_parallel_says_the_same(run, folder):
    def captions(*more: object) -> dict[str, str]:
        return {line["image"]: line["caption"] for line in run("caption", folder, "--max-tokens", 9, "--json", *more).lines}

    assert captions() == captions("--parallel", 2) == captions("--parallel", 8)
    got = run("caption", folder, folder / "notes.txt", "--parallel", 4, "--max-tokens", 2)
    assert got.code == 1 and "notes.txt: is text" in got.err and got.out.count("\n") >= 3


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["caption"],
        ["nonsense"],
        ["caption", "x.png", "--policy", "opera"],
        ["caption", "x.png", "--policy", "off,kvsmooth"],
        ["caption", "x.png", "--set", "kvsmooth.lambda_ref=2"],
        ["caption", "x.png", "--set", "kvsmooth.nothing=2"],
        ["caption", "x.png", "--set", "lambda_ref"],
        ["caption", "x.png", "--policy", "off", "--set", "kvsmooth.window=3"],
        ["caption", "x.png", "--set", "prunehal.keep=0.5"],
        ["caption", "x.png", "--policy", "prunehal", "--set", "prunehal.keep=0"],
        ["caption", "x.png", "--depth", "d.png"],
        ["caption", "x.png", "--temperature", "-1"],
        ["caption", "x.png", "--top-p", "7"],
        ["caption", "x.png", "--max-tokens", "0"],
        ["caption", "x.png", "--threads", "x"],
        ["caption", "x.png", "--device", "tpu"],
        ["caption", "x.png", "--compare", "--policy", "off"],
        ["caption", "x.png", "--compare", "--heat"],
        ["caption", "x.png", "--json", "--strengths"],
        ["caption", "-", "-"],
        ["caption", "x.png", "--out", "-"],
        ["caption", "x.png", "--prompt", "two <image> <image>"],
    ],
)
def test_usage_errors(run, argv):
    got = run(*argv)
    assert got.code == 2 and got.out == "" and "error: " in got.err and "ValueError" not in got.err


def test_errors_are_one_line_with_the_name(run, image, tiny_pair, tmp_path):
    text = tmp_path / "text.gguf"
    text.write_text("this is text")
    for options, says in (
        (["--model", tmp_path / "missing.gguf"], "missing.gguf"),
        (["--model", text], "text.gguf"),
        (["--model", tmp_path], str(tmp_path)),
        (["--model", tiny_pair.mmproj, "--mmproj", tiny_pair.text], "swapped"),
        (["--mmproj", text], "text.gguf"),
        (["--n-ctx", 20], "--n-ctx"),
        (["--set", "kvsmooth.layers=40:50"], "layers"),
        (["--device", "cuda:99"], "cuda:99"),
    ):
        got = run("caption", image, *options)
        assert (got.code, got.out) == (1, ""), options
        assert got.err.startswith("error: ") and got.err.count("\n") == 1 and says in got.err


def test_a_stack_of_policies_with_depth(run, image, tmp_path):
    """The caption is that of the library's stack; a depth map is one picture's."""
    with Image.open(image) as picture:
        gray = np.add.outer(np.arange(picture.height), np.arange(picture.width)).astype(np.uint16)
    Image.fromarray(gray).save(tmp_path / "depth.png")
    stack = ["--policy", "prunehal,dscr,kvsmooth", "--depth", tmp_path / "depth.png", "--set", "prunehal.keep=0.5"]
    got = run("caption", image, "--json", "--max-tokens", 12, *stack)
    assert got.code == 0, got.err
    record = json.loads(got.out.splitlines()[-1])
    with kvs.Model() as model:
        policies = [kvs.DSCR.for_model(model, depth=str(tmp_path / "depth.png")), kvs.PruneHal.for_model(model, keep=0.5)]
        with model.session(policy=[kvs.KVSmooth.for_model(model), *policies]) as session:
            told = session.generate(PROMPT, image=str(image), max_tokens=12).result()
    assert record["caption"] == told.text and told.stats.pruned
    got = run("caption", image, image, "--max-tokens", 2, *stack)
    assert got.code == 2 and "one map for 2 pictures" in got.err
    got = run("caption", image, "--policy", "dscr", "--depth", tmp_path / "none.png")
    assert got.code == 1 and "none.png" in got.err


def test_no_model_and_no_tower(run, image, monkeypatch, tiny_pair, tmp_path):
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(Path(tiny_pair.text).read_bytes())
    monkeypatch.delenv("PYKVSMOOTH_MMPROJ")
    got = run("caption", image, "--model", alone)
    assert got.code == 1 and "--mmproj" in got.err
    monkeypatch.delenv("PYKVSMOOTH_MODEL")
    monkeypatch.setattr(box, "FOLDERS", ())
    got = run("caption", image)
    assert got.code == 1 and "--model" in got.err and "PYKVSMOOTH_MODEL" in got.err


@pytest.mark.parametrize("how", [[], ["--parallel", 2], ["--compare"]], ids=str)
def test_debug_shows_the_traceback(run, image, tmp_path, how):
    """And the other pictures are done, as without it."""
    got = run("caption", tmp_path / "missing.png", image, "--debug", "--max-tokens", 2, *how)
    assert got.code == 1 and "Traceback" in got.err and f"{image}:" in got.out
    assert re.search(r"^error: \S*missing\.png: no such file", got.err, re.M)
    with pytest.raises(kvs.ModelFileNotFoundError):
        run("caption", image, "--model", tmp_path / "missing.gguf", "--debug")


@pytest.mark.parametrize("how", [[], ["--parallel", 2], ["--compare"]], ids=str)
def test_a_heading_is_one_line(run, folder, how):
    names = [folder / "line\nfeed.png", folder / "\x1b[2Jerase.png"]
    for name in names:
        name.write_bytes((folder / "b10.png").read_bytes())
    got = run("caption", *names, "--max-tokens", 2, *how)
    assert got.code == 0 and ESC not in got.out + got.err
    assert f"{folder}/line feed.png:" in got.out and f"{folder}/\\x1b[2Jerase.png:" in got.out


# ---- captions.jsonl ----


def test_out_goes_on_where_it_stopped(run, folder, tmp_path):
    out = tmp_path / "captions.jsonl"
    first = run("caption", folder / "a.webp", "--out", out, "--max-tokens", 4)
    assert first.code == 0 and first.out == ""
    kept = out.read_bytes()
    with open(out, "ab") as file:
        file.write(b'{"image": "half a li')
    got = run("caption", folder, "--out", out, "--max-tokens", 4)
    assert got.code == 0 and "unfinished line" in got.err and "1 of 3 pictures" in got.err
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert out.read_bytes().startswith(kept)
    assert [Path(line["image"]).name for line in lines] == ["a.webp", "b9.jpg", "b10.png"]
    again = out.read_bytes()
    assert run("caption", folder, "--out", out, "--max-tokens", 4, "--parallel", 3).code == 0
    assert out.read_bytes() == again  # how many step together does not change the words
    assert run("caption", folder, "--out", out, "--max-tokens", 5, "--parallel", 3).code == 0
    assert len(out.read_text().splitlines()) == 6


def test_what_comes_through_a_pipe_is_never_there_already(run, folder, image, tmp_path):
    """Its name says nothing about the picture."""
    out, pipe = tmp_path / "captions.jsonl", tmp_path / "pipe"
    os.mkfifo(pipe)
    for n, name in enumerate(("b10.png", "b9.jpg", "b9.jpg"), 1):
        picture = (folder / name).read_bytes()
        assert run("caption", "-", "--out", out, "--max-tokens", 2, stdin=picture).code == 0
        threading.Thread(target=pipe.write_bytes, args=(picture,), daemon=True).start()
        assert run("caption", pipe, "--out", out, "--max-tokens", 2).code == 0
        with open(folder / name) as file:
            assert run("caption", f"/dev/fd/{file.fileno()}", "--out", out, "--max-tokens", 2).code == 0
        assert len(out.read_text().splitlines()) == 3 * n
    got = run("caption", image, "-", "--out", out, "--max-tokens", 2, stdin=image.read_bytes())
    assert "already" not in got.err
    got = run("caption", image, "-", "--out", out, "--max-tokens", 2, stdin=image.read_bytes())
    assert "1 of 2 pictures" in got.err and len(out.read_text().splitlines()) == 12


def test_precision_is_a_setting(run, image, tmp_path):
    """Files from before it was noted have lines of the default, and go on."""
    out = tmp_path / "captions.jsonl"
    for options in ([], ["--precision", "exact"], ["--precision", "auto"], ["--precision", "exact"]):
        assert run("caption", image, "--out", out, "--max-tokens", 2, *options).code == 0
    assert [json.loads(line)["settings"].get("precision") for line in out.read_text().splitlines()] == [None, "exact"]


@pytest.mark.parametrize(
    "content", ["not json\n", "[1, 2]\n", '{"a": 1}\n', "a last line without an end", '{"image": "x", "settings": {}}\nabc']
)
def test_out_never_destroys_another_file(run, image, tmp_path, content):
    out = tmp_path / "mine.txt"
    out.write_text(content)
    got = run("caption", image, "--out", out)
    assert got.code == 1 and "no caption of ours" in got.err and out.read_text() == content


def test_out_belongs_to_one_process(run, image, tmp_path):
    out = tmp_path / "captions.jsonl"
    with records.caption_file(str(out)):
        got = run("caption", image, "--out", out)
    assert got.code == 1 and "another pykvsmooth" in got.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_an_error(run, image):
    got = run("caption", image, "--out", "/dev/full", "--max-tokens", 2)
    assert got.code == 1 and "No space left" in got.err and "/dev/full" in got.err


# ---- comparison ----


def words_of(text: str) -> list[str]:
    return re.findall(r"\S+", text)


def test_compare_on_a_pipe(run, image, answer):
    got = run("caption", image, "--compare", "--max-tokens", 12)
    assert got.code == 0 and ESC not in got.out
    plain, smoothed = re.fullmatch(r"plain:\n(.*)smoothed:\n(.*)", got.out, re.S).groups()
    for shown, smooth in ((plain, False), (smoothed, True)):
        text = escape.escaped(answer(image, smooth=smooth).text)
        bare = [words_of(re.sub(r"[\[\]{}+-]", "", one)) for one in (shown, text)]  # the words may have such marks of their own
        assert bare[0] == bare[1]
    both = run("caption", image, "--compare", "--max-tokens", 12, "--json").lines
    assert [line["settings"]["policy"] == "off" for line in both] == [True, False]


def test_differences_are_marked():
    left, right = compare.marked_words("a red cat sits here", "a dog sits here now")
    assert left == [("a", False), ("red", True), ("cat", True), ("sits", False), ("here", False)]
    assert right == [("a", False), ("dog", True), ("sits", False), ("here", False), ("now", True)]


# ---- terminals ----


class Terminal(io.StringIO):
    """Stands for a terminal of a given width."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., terminal.Ui]:
    def make(width: int = 40, **environment: str) -> terminal.Ui:
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("COLUMNS", str(width))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "stdout", Terminal())
        monkeypatch.setattr(sys, "stderr", Terminal())
        return terminal.Ui()

    return make


def token(text: str, entropy: float = 1.0, strength: float | None = 0.9) -> kvs.Token:
    return kvs.Token(text, 5, -1.0, entropy, strength)


def paint(ui: terminal.Ui, tokens: list[kvs.Token], heat: bool = True, bars: bool = True) -> str:
    painter = render.Painted(ui, heat, (0.7, 1.0) if bars else None)
    for one in tokens:
        painter.token(one)
    painter.end()
    painter.legend()
    return ui.out.file.getvalue()


def without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*[mK]", "", text)


def random_tokens(rng: np.random.Generator, n: int) -> list[kvs.Token]:
    parts = ["a", " red", " cat", "s", " and", " 中文字", "é", ".", "\n", " extraordinarily-long-word-without-end", "", " "]
    return [token(parts[i], rng.uniform(0, 4), rng.uniform(0.7, 1)) for i in rng.integers(0, len(parts), n)]


@pytest.mark.parametrize("width", [12, 20, 40, 200])
def test_painted_text_is_the_text(screen, rng, width):
    tokens = random_tokens(rng, 80)
    shown = without_codes(paint(screen(width), tokens, bars=False))
    assert all(cell_len(line) < width for line in shown.splitlines())
    assert re.sub(r"\s", "", shown) == re.sub(r"\s", "", "".join(t.text for t in tokens))


@pytest.mark.parametrize("width", [12, 20, 40, 200])
def test_bars_stand_under_their_words(screen, rng, width):
    tokens = [t for t in random_tokens(rng, 80) if t.text != "\n"]
    lines = without_codes(paint(screen(width), tokens, heat=False)).splitlines()
    for text, bars in zip(lines[::2], lines[1::2], strict=True):
        assert set(bars) <= set(render.BARS + " ")
        assert cell_len(text.rstrip()) == len(bars)


def test_heat_shades_by_rank_and_has_a_legend(screen):
    ui = screen(100)
    shown = paint(ui, [token(f" w{i}", entropy=i) for i in range(16)], bars=False)
    assert shown.startswith("w0") and "48;5;197m" in shown
    low_last = paint(screen(100), [token(f" w{i}", entropy=-i) for i in range(16)], bars=False)
    assert ESC not in low_last
    assert "row entropy" in ui.err.file.getvalue() and "0.00 to 15.00 nats" in ui.err.file.getvalue()


def test_no_color_is_respected(screen, rng):
    ui = screen(60, NO_COLOR="1")
    ui.error("x")
    assert ESC not in paint(ui, random_tokens(rng, 50)) + ui.err.file.getvalue()


def test_colours_are_for_terminals_only(run, image, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    got = run("caption", image, image, "--max-tokens", 3, "--strengths")
    assert got.code == 0 and ESC not in got.out + got.err


def test_the_model_does_not_drive_the_terminal(screen):
    ui = screen()
    render.Plain(ui).token(token("a\x1b[2Jb\x07\x9b\u202ec\r\n\td"))
    assert ui.out.file.getvalue() == "a\\x1b[2Jb\\x07\\x9b\\u202ec\\r\n\td"
    assert paint(screen(), [token("\x1b]0;x\x07")]).startswith("\\x1b]0;x\\x07")
    assert escape.one_line("a\nb\x1b") == "a b\\x1b"


@pytest.mark.parametrize("total", [None, 7])
def test_status_is_one_line_that_goes_away(screen, total):
    ui = screen(30)
    ui.status("[red]x\x1b[2J" * 9, 1, total)
    shown = re.split(r"\r|\x1b\[2K", without_codes(ui.err.file.getvalue()))
    assert all(cell_len(line) <= 30 for line in shown) and f"{ESC}[2J" not in ui.err.file.getvalue()
    assert "[red]x" in shown[-1] or total  # no markup in the names of files
    ui.put("caption")
    assert ui.err.file.getvalue().endswith("\r\x1b[1A\x1b[2K") and ui.out.file.getvalue() == "caption"
    assert "\x1b[?25" not in ui.err.file.getvalue()  # the cursor stays
    ui.quiet = True
    before = ui.err.file.getvalue()
    ui.status("y")
    assert ui.err.file.getvalue() == before


@pytest.mark.parametrize(("width", "beside"), [(100, True), (40, False), (20, False)])
def test_compare_fits_the_terminal(screen, width, beside):
    ui = screen(width)
    stats = kvs.Stats(device="cpu")
    texts = ["a red cat sits on the mat " * 5, "a dog sits on 中文 mat averyveryverylongwordthatfillslines " * 5]
    compare.show(ui, *(kvs.Result(text, [], "stop", stats) for text in texts), ("plain", "smoothed"))
    lines = without_codes(ui.out.file.getvalue()).splitlines()
    assert all(cell_len(line) <= width for line in lines)
    assert ("plain" in lines[0] and "smoothed" in lines[0]) is beside
    assert "\x1b[31m" in ui.out.file.getvalue() and "\x1b[32m" in ui.out.file.getvalue()


@pytest.mark.parametrize("how", [["--compare"], ["--strengths"]], ids=str)
def test_a_terminal_of_no_columns_is_one_that_is_not_known(run, image, monkeypatch, how):
    monkeypatch.setenv("COLUMNS", "80")
    expected = run("caption", image, "--quiet", "--max-tokens", 12, *how).out
    monkeypatch.setenv("COLUMNS", "0")
    assert run("caption", image, "--quiet", "--max-tokens", 12, *how).out == expected != ""


# ---- inspect and info ----


def test_inspect(run, tiny_pair, tmp_path):
    got = run("inspect", tiny_pair.text)
    assert got.code == 0 and got.err == ""
    assert re.search(r'general\.architecture +str +"llama"', got.out) and re.search(
        r"blk\.0\.attn_q\.weight +F32 +64 x 64 +16\.0 KiB", got.out
    )
    assert re.search(r"tokenizer\.ggml\.tokens +str\[\d+\] +\[\"<unk>\", .*, \.\.\.\]", got.out)
    assert "bits per weight" in got.out and "loads: yes" in got.out
    got = run("inspect", tiny_pair.mmproj, "--model", tiny_pair.text)
    assert "loads: with" in got.out and "one picture is 16 rows" in got.out
    assert "loads:" not in run("inspect", tiny_pair.text, "--no-load").out
    alone = tmp_path / "mmproj.gguf"
    alone.write_bytes(Path(tiny_pair.mmproj).read_bytes())
    assert "no text model" in run("inspect", alone).out


def test_inspect_says_why_not(run, tiny_pair, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(Path(tiny_pair.text).read_bytes()[:-5000])
    got = run("inspect", cut)
    assert (got.code == 1 and "cut.gguf" in got.err) or "loads: no" in got.out
    other = tmp_path / "other.gguf"
    other.write_bytes(Path(tiny_pair.text).read_bytes().replace(b"llama", b"mamba"))
    got = run("inspect", other)
    assert got.code == 1 and re.search(r"loads: no: .*mamba", got.out)
    cut.write_text("hello")
    got = run("inspect", cut)
    assert got.code == 1 and got.err.count("\n") == 1 and "cut.gguf" in got.err


def test_info(run):
    got = run("info")
    assert got.code == 0 and got.err == ""
    facts = dict(line.split(": ", 1) for line in got.out.splitlines())
    assert facts["pykvsmooth"].startswith(kvs.__version__)
    assert re.search(r"; kernels: (base|avx2|avx512|amx)", facts["cpu"])
    assert re.match(r"archs .*; (available|unavailable: .+)", facts["cuda"])
    assert {"library", "threads", "memory", "python", "packages"} <= set(facts)


def test_version(run):
    assert run("--version").out == f"pykvsmooth {kvs.__version__}\n"


# ---- chat ----


def test_chat_on_a_pipe(run, image, tiny_pair):
    script = f'what is it?\n"""two\nlines"""\n/nonsense\n/reset\n\nagain\n/image {image}\nand now?\n/quit\nnever read\n'
    got = run("chat", "--image", image, "--max-tokens", 6, stdin=script.encode())
    assert got.code == 0
    expected = []
    with kvs.Model(tiny_pair.text, mmproj=tiny_pair.mmproj) as model, model.session(policy=kvs.KVSmooth.for_model(model)) as session:
        for message, picture in (("what is it?", image), ("two\nlines", None), ("", None), ("again", image), ("and now?", image)):
            if message:
                expected.append(session.chat(message, image=picture, max_tokens=6).result().text)
            else:
                session.reset()
    assert got.out == "".join(text + ("" if text.endswith("\n") else "\n") for text in expected)
    assert "/nonsense" in got.err and "> " not in got.err


def test_chat_says_at_once_that_a_text_model_sees_nothing(run, tiny_pair, image, monkeypatch, tmp_path):
    monkeypatch.delenv("PYKVSMOOTH_MMPROJ", raising=False)
    text = tmp_path / "text.gguf"
    text.symlink_to(tiny_pair.text)
    got = run("chat", "--model", text, "--max-tokens", 3, stdin=f"/image {image}\nhello\n".encode())
    assert got.code == 1 and "no mmproj file" in got.err and got.out.strip()  # and the next message is answered


@pytest.mark.parametrize(("option", "value", "why"), [("--n-ctx", 2 << 20, "at most 1048576"), ("--max-tokens", "x", "a whole number")])
def test_numbers_that_make_no_sense(run, image, option, value, why):
    got = run("caption", image, option, value)
    assert got.code == 2 and f"{option}: must be {why}" in got.err


def test_chat_goes_on_after_an_error(run, tmp_path):
    got = run("chat", "--max-tokens", 3, stdin=f"/image {tmp_path}/missing.png\nhello\n".encode())
    assert got.code == 1 and "missing.png: no such file" in got.err and got.out.strip()


def test_a_system_sentence_is_the_conversations(run, tiny_pair):
    got = run("chat", "--system", "be kind", "--max-tokens", 6, stdin=b"one\ntwo\n/reset\nthree\nfour\n")
    assert (got.code, got.err.count("error")) == (0, 0)
    expected = []
    with kvs.Model(tiny_pair.text, mmproj=tiny_pair.mmproj) as model, model.session(policy=kvs.KVSmooth.for_model(model)) as session:
        for message, system in (("one", "be kind"), ("two", None), ("", None), ("three", "be kind"), ("four", None)):
            if message:
                expected.append(session.chat(message, system=system, max_tokens=6).result().text)
            else:
                session.reset()
    assert got.out == "".join(map(line, expected))


def test_a_depth_map_is_of_the_first_picture(run, image, tmp_path):
    depth = str(tmp_path / "depth.png")
    Image.new("L", Image.open(image).size, 7).save(depth)
    talk = f"one\n/image {image}\n/reset\ntwo\n".encode()
    got = run("chat", "--policy", "dscr", "--depth", depth, "--image", image, "--max-tokens", 2, stdin=talk)
    assert got.code == 1 and got.err.count("error: ") == 1 and "is the map of the first picture; begin another chat" in got.err
    assert len(got.out.splitlines()) >= 2  # about the first one, twice


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (b"what is <image> this?", "1 <image> marks for 0 pictures"),
        (b"caf\xe9", "standard input is not utf-8 text"),
        (b'"""two\nli\xffnes"""', "standard input is not utf-8 text"),
    ],
)
@pytest.mark.parametrize("debug", [[], ["--debug"]], ids=str)
def test_chat_goes_on_after_a_message_that_can_not_be_asked(run, message, why, debug):
    expected = run("chat", "--max-tokens", 6, stdin=b"hello\nand now?\n").out
    got = run("chat", "--max-tokens", 6, *debug, stdin=b"hello\n" + message + b"\nand now?\n")
    assert got.code == 1 and got.out == expected
    (error,) = [line for line in got.err.splitlines() if line.startswith("error: ")]
    assert why in error and ("Traceback" in got.err) is bool(debug)


def test_a_full_chat_is_told_of_reset(run):
    """Where the first message is too long, that would not help."""
    got = run("chat", "--n-ctx", 60, "--max-tokens", 40, stdin=b"hello\n" * 4 + b"/reset\nhello\n")
    assert got.code == 1 and "context overflow" in got.err and "/reset begins a new conversation" in got.err
    got = run("chat", "--n-ctx", 4, stdin=b"hello\n")
    assert got.code == 1 and "context overflow" in got.err and "/reset" not in got.err
