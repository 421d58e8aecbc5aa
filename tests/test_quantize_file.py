"""Whole GGUF files in fewer bits: what stays, what is loaded and stepped, what is refused, and that nothing half-written stays behind."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import gguf_write as gw
import numpy as np
import pytest
import tiny
from gguf import GGMLQuantizationType as T
from gguf_write import File, Tensor

import pykvsmooth as kvs
from pykvsmooth import gguf_in, gguf_out, mixes, quantize
from pykvsmooth.cli import main as cli
from pykvsmooth.quantize import encode, quantize_file

ROOT = Path(__file__).resolve().parents[1]
OWN_KEYS = {"general.file_type", "general.quantization_version", "general.alignment"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A pair whose rows are whole blocks of 256, but for one of 96 in the tower."""
    folder = tmp_path_factory.mktemp("wide")
    text, mmproj, _ = tiny.write_pair(folder, seed=7, n_layer=3, n_embd=256, n_ff=256, v_embd=96, v_ff=256, v_layer=2, image=28, load=False)
    assert mmproj
    return text, mmproj


def facts(path: Path | str) -> dict[str, object]:
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def tensors(path: Path | str) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values(tensor: gguf.ReaderTensor) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- what comes out ----


@pytest.mark.parametrize("mix", mixes.MIXES)
def test_a_pair_of_every_mix_loads_and_steps(mix: str, wide: tuple[str, str], tmp_path: Path, rng: np.random.Generator) -> None:
    text, mmproj = tmp_path / "text.gguf", tmp_path / "mmproj.gguf"
    for src, dst in zip(wide, (text, mmproj), strict=True):
        done = quantize_file(src, dst, mix, threads=2)
        assert (done.bytes_in, done.bytes_out) == (os.path.getsize(src), os.path.getsize(dst))
        assert facts(dst)["general.file_type"] == mixes.MIXES[mix].file_type
        n_layer = 3 if src == wide[0] else 0
        for name, tensor in tensors(dst).items():
            shape = tuple(int(n) for n in reversed(tensor.shape))
            assert tensor.tensor_type.name == mixes.tensor_type(name, shape, mix, n_layer), name
    with kvs.Model(text, mmproj=mmproj, device="cpu", threads=1) as model, model.session(n_ctx=64) as session:
        session.feed([1, 300])
        session.feed_image(rng.integers(0, 256, (28, 28, 3), np.uint8))
        assert np.isfinite(session.logits()).all()
        session.feed([301], generated=True)
        assert np.isfinite(session.logits()).all()


def test_values_are_those_of_encode(wide: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a tensor comes in many pieces."""
    monkeypatch.setattr(quantize, "CHUNK", 1000)
    quantize_file(wide[0], tmp_path / "out.gguf", "q5_k_m", threads=3)
    before = tensors(wide[0])
    for name, tensor in tensors(tmp_path / "out.gguf").items():
        if tensor.tensor_type != T.F32:
            np.testing.assert_array_equal(tensor.data, encode(before[name].data, tensor.tensor_type.name))
        else:
            np.testing.assert_array_equal(tensor.data, before[name].data)


def test_all_metadata_stay(wide: tuple[str, str], tmp_path: Path) -> None:
    for src in wide:
        quantize_file(src, tmp_path / "out.gguf", "q4_0")
        old, new = facts(src), facts(tmp_path / "out.gguf")
        assert {k: v for k, v in old.items() if k not in OWN_KEYS} == {k: v for k, v in new.items() if k not in OWN_KEYS}
        assert new["general.quantization_version"] == 2
        assert list(tensors(src)) == list(tensors(tmp_path / "out.gguf"))


def test_metadata_of_every_type(tmp_path: Path) -> None:
    f = File(
        {
            "general.architecture": (gw.STRING, "llama"),
            "a.u8": (gw.U8, 255),
            "a.i8": (gw.I8, -128),
            "a.u16": (gw.U16, 65535),
            "a.i16": (gw.I16, -32768),
            "a.u32": (gw.U32, 2**32 - 1),
            "a.i32": (gw.I32, -(2**31)),
            "a.f32": (gw.F32, 0.1),
            "a.bool": (gw.BOOL, 1),
            "a.text": (gw.STRING, "süß\0\x1b[2J"),
            "a.empty_text": (gw.STRING, ""),
            "a.no_utf8": (gw.STRING, b"\x02\0\0\0\0\0\0\0\xff\xfe"),
            "a.u64": (gw.U64, 2**63 - 1),
            "a.i64": (gw.I64, -(2**63)),
            "a.f64": (gw.F64, 0.1),
            "a.texts": (gw.ARRAY, (gw.STRING, ["a", "", "▁b"])),
            "a.halves": (gw.ARRAY, (gw.F32, [0.1, -1e30])),
            "a.bools": (gw.ARRAY, (gw.BOOL, [0, 1])),
            "a.bytes": (gw.ARRAY, (gw.U8, [0, 200])),
            "a.long": (gw.ARRAY, (gw.I64, list(range(3000)))),
            "a.nothing": (gw.ARRAY, (gw.I32, [])),
        },
        {"x.weight": Tensor((64, 2))},
    )
    source = gguf_in.read(f.write(tmp_path / "in.gguf"))
    quantize_file(tmp_path / "in.gguf", tmp_path / "out.gguf", "q8_0")
    result = gguf_in.read(str(tmp_path / "out.gguf"))
    mine = {key.name: key for key in result.keys if key.name not in OWN_KEYS}
    assert mine == {key.name: key for key in source.keys if key.name != "a.nothing"}


def test_a_tensor_of_the_wanted_type_is_copied(wide: tuple[str, str], tmp_path: Path) -> None:
    quantize_file(wide[0], tmp_path / "a.gguf", "q4_k_m")
    again = quantize_file(tmp_path / "a.gguf", tmp_path / "b.gguf", "q4_k_m")
    assert not again.requantized
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert quantize_file(tmp_path / "a.gguf", tmp_path / "c.gguf", "q4_k_s").requantized
    before, after = tensors(tmp_path / "a.gguf"), tensors(tmp_path / "c.gguf")
    for name, tensor in after.items():
        scale = np.abs(values(before[name])).max()
        np.testing.assert_allclose(values(tensor), values(before[name]), atol=0.1 * scale)


def test_rows_without_whole_blocks_are_told(tiny_pair: object, tmp_path: Path) -> None:
    done = quantize_file(tiny_pair.text, tmp_path / "out.gguf", "q4_k_m")  # type: ignore[attr-defined]
    assert set(done.misfits) == {name for name, t in tensors(tmp_path / "out.gguf").items() if t.tensor_type != T.F32}
    assert {t.tensor_type.name for t in tensors(tmp_path / "out.gguf").values()} == {"F32", "Q5_0", "Q8_0"}


def test_a_split_file_becomes_one(wide: tuple[str, str], tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "s.gguf", "llama", split_max_tensors=8)
    for key in gguf_in.read(wide[0]).keys:
        if key.name != "general.architecture":
            element = None if key.element is None else gguf.GGUFValueType(key.element)
            writer.add_key_value(key.name, key.value, gguf.GGUFValueType(key.type), element)
    for name, tensor in tensors(wide[0]).items():
        writer.add_tensor(name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first = tmp_path / "s-00001-of-00004.gguf"
    quantize_file(first, tmp_path / "joined.gguf", "q8_0")
    quantize_file(wide[0], tmp_path / "whole.gguf", "q8_0")
    assert (tmp_path / "joined.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    with pytest.raises(kvs.ModelFormatError, match="give the first one"):
        quantize_file(tmp_path / "s-00002-of-00004.gguf", tmp_path / "out.gguf", "q8_0")
    with pytest.raises(ValueError, match=r"dst: .* is the file that is read"):
        quantize_file(first, tmp_path / "s-00003-of-00004.gguf", "q8_0")
    (tmp_path / "s-00003-of-00004.gguf").replace(tmp_path / "s-00004-of-00004.gguf")
    with pytest.raises(kvs.ModelFileNotFoundError, match=r"s-00003-of-00004\.gguf"):
        quantize_file(first, tmp_path / "out.gguf", "q8_0")
    (tmp_path / "s-00003-of-00004.gguf").write_bytes((tmp_path / "s-00002-of-00004.gguf").read_bytes())
    with pytest.raises(kvs.ModelFormatError, match="not part 3 of 4"):
        quantize_file(first, tmp_path / "out.gguf", "q8_0")
    assert not (tmp_path / "out.gguf").exists()


def test_progress(wide: tuple[str, str], tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    quantize_file(wide[1], tmp_path / "out.gguf", "q8_0", progress=lambda *step: seen.append(step))
    names = list(tensors(wide[1]))
    assert seen == [(name, i, len(names)) for i, name in enumerate(names)]


# ---- what is refused, and leaves nothing ----


def small(**tensors: Tensor) -> File:
    return File({"general.architecture": (gw.STRING, "llama")}, {f"{name}.weight": t for name, t in tensors.items()})


def test_a_value_that_cannot_be_stored(tmp_path: Path) -> None:
    data = np.zeros((3, 64), np.float32)
    data[2, 5] = np.nan
    f = small(a=Tensor((64, 3)), b=Tensor((64, 3), data=data.tobytes()))
    src = f.write(tmp_path / "in.gguf")
    with pytest.raises(kvs.ModelFormatError, match=r"in\.gguf: b\.weight: row 2, column 5: Q8_0 holds finite") as caught:
        quantize_file(src, tmp_path / "out.gguf", "q8_0")
    assert (caught.value.path, caught.value.what) == (str(src), "b.weight")
    assert left(tmp_path) == ["in.gguf"]


def test_a_file_that_shrinks(wide: tuple[str, str], tmp_path: Path) -> None:
    src = tmp_path / "in.gguf"
    src.write_bytes(Path(wide[0]).read_bytes())

    def shrink(_name: str, i: int, _n: int) -> None:
        if i == 5:
            os.truncate(src, os.path.getsize(src) // 2)

    with pytest.raises(kvs.ModelFormatError, match="the file has become shorter"):
        quantize_file(src, tmp_path / "out.gguf", "q8_0", progress=shrink)
    assert left(tmp_path) == ["in.gguf"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_exception_on_the_way(kind: type[BaseException], wide: tuple[str, str], tmp_path: Path) -> None:
    dst = tmp_path / "out.gguf"
    dst.write_bytes(b"the old one")

    def stop(_name: str, i: int, _n: int) -> None:
        if i == 12:
            raise kind

    with pytest.raises(kind):
        quantize_file(wide[0], dst, "q4_k_m", progress=stop)
    assert left(tmp_path) == ["out.gguf"]
    assert dst.read_bytes() == b"the old one"


def test_a_full_disk(wide: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(tmp_path)
    none_left = os.statvfs_result([*real[:4], 1, *real[5:]])
    monkeypatch.setattr(os, "statvfs", lambda _: none_left)
    with pytest.raises(kvs.ModelFileError, match="bytes are needed, its disk has") as caught:
        quantize_file(wide[0], tmp_path / "out.gguf", "q8_0")
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(kvs.ModelFileError, match=r"out\.gguf: can't be written: No space left"):
        quantize_file(wide[0], tmp_path / "out.gguf", "q8_0")
    assert left(tmp_path) == []


def test_a_read_only_file_system(run: Callable[..., tuple[int, str, str]], wide: tuple[str, str], tmp_path: Path, monkeypatch) -> None:
    """It refuses to open the file, and to delete what is not there: the first of both is what is said, of the file that was asked for."""

    def refused(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "out.gguf.1.tmp")

    monkeypatch.setattr(gguf.GGUFWriter, "open_output_file", refused)
    monkeypatch.setattr(os, "unlink", refused)
    dst = tmp_path / "out.gguf"
    assert run(wide[0], dst, "--type", "q8_0") == (1, "", f"error: {dst}: can't be written: Read-only file system\n")


def test_places_that_cannot_be_written(wide: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, match in (("folder", "no regular file"), ("pipe", "no regular file"), ("none/out.gguf", "No such file or directory")):
        with pytest.raises(kvs.ModelFileError, match=match):
            quantize_file(wide[1], tmp_path / name, "q8_0")
    (tmp_path / "same.gguf").symlink_to(wide[1])
    with pytest.raises(ValueError, match="is the file that is read"):
        quantize_file(wide[1], tmp_path / "same.gguf", "q8_0")
    assert left(tmp_path) == ["folder", "pipe", "same.gguf"]


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    broken = {
        "none.gguf": kvs.ModelFileNotFoundError,
        "text.gguf": kvs.ModelFormatError,
        "nameless.gguf": kvs.ModelFormatError,
        "foreign.gguf": kvs.UnsupportedModelError,
    }
    (tmp_path / "text.gguf").write_text("no model at all, but long enough")
    File({}, {"a.weight": Tensor((64, 3))}).write(tmp_path / "nameless.gguf")
    gw.BLOCKS[24] = (1, 1)
    small(a=Tensor((64, 3), kind=24)).write(tmp_path / "foreign.gguf")
    del gw.BLOCKS[24]
    for name, error in broken.items():
        with pytest.raises(error, match=name):
            quantize_file(tmp_path / name, tmp_path / "out.gguf", "q8_0")
    with pytest.raises(kvs.UnsupportedModelError, match=r"a\.weight: its type, number 24"):
        quantize_file(tmp_path / "foreign.gguf", tmp_path / "out.gguf", "q8_0")
    assert not (tmp_path / "out.gguf").exists()


def test_metadata_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_in, "MAX_VALUES", 100)
    f = small(a=Tensor((64, 3)))
    f.keys["x.long"] = (gw.ARRAY, (gw.U8, [0] * 100))
    with pytest.raises(kvs.UnsupportedModelError, match=r"x\.long: more than 100 values"):
        quantize_file(f.write(tmp_path / "in.gguf"), tmp_path / "out.gguf", "q8_0")


def test_without_the_gguf_package(wide: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'pykvsmooth\[convert\]'"):
        quantize_file(wide[1], tmp_path / "out.gguf", "q8_0")


def test_the_writer_counts(tmp_path: Path) -> None:
    spec = gguf_out.Spec("a.weight", (2, 32), "Q8_0")
    assert spec.n_bytes == 68
    with pytest.raises(ValueError, match="has 69 bytes, the tensor waits for 68"), gguf_out.create(tmp_path / "o", "llama") as out:
        out.begin([spec])
        out.write(np.zeros(69, np.uint8))
    with pytest.raises(ValueError, match="1 tensors have no data"), gguf_out.create(tmp_path / "o", "llama") as out:
        out.begin([spec])
        out.write(np.zeros(67, np.uint8))
    assert left(tmp_path) == []


# ---- the command ----


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def go(*argv: object) -> tuple[int, str, str]:
        code = cli.main(["quantize", *map(str, argv)])
        return code, *capsys.readouterr()

    return go


def test_the_command(run: Callable[..., tuple[int, str, str]], wide: tuple[str, str], tmp_path: Path) -> None:
    code, out, err = run(wide[0], tmp_path / "a.gguf", "--type", "Q4_K", "--threads", 2)
    assert (code, out) == (0, "")
    assert err.startswith(f"{os.path.getsize(wide[0]) / 2**20:.1f} MiB to ") and err.count("\n") == 1
    code, _, err = run(wide[1], tmp_path / "b.gguf", "--type", "q6_k")
    assert code == 0 and "more tensors have rows that are no whole blocks of the type" in err
    code, _, err = run(tmp_path / "a.gguf", tmp_path / "c.gguf", "--type", "q2_k")
    assert code == 0 and "is quantized already, and errors add up" in err
    for kind, warns in (("F32", False), ("f16", True)):  # F16 does not hold all products of a scale and a level
        code, _, err = run(tmp_path / "a.gguf", tmp_path / f"{kind}.gguf", "--type", kind)
        assert code == 0 and ("errors add up" in err) is warns
    assert run(wide[0], tmp_path / "d.gguf", "--type", "q8_0", "--quiet") == (0, "", "")


def test_errors_in_one_line(run: Callable[..., tuple[int, str, str]], wide: tuple[str, str], tmp_path: Path) -> None:
    dst = tmp_path / "out.gguf"
    for arguments, code, text in (
        ((wide[0], dst, "--type", "q9"), 2, "--type must be one of f32, f16"),
        ((wide[0], dst), 2, "--type"),
        ((wide[0], wide[0], "--type", "q8_0"), 2, "OUT: "),
        (("", dst, "--type", "q8_0"), 2, "IN: is empty"),
        ((tmp_path / "none.gguf", dst, "--type", "q8_0"), 1, "none.gguf: cannot be opened"),
        ((wide[0], tmp_path / "none" / "out.gguf", "--type", "q8_0"), 1, "out.gguf: can't be written: No such file"),
        ((__file__, dst, "--type", "q8_0"), 1, "not with GGUF"),
    ):
        got, out, err = run(*arguments)
        assert (got, out) == (code, "") and text in err and "Traceback" not in err, err
        assert err.count("error:") == 1
    assert left(tmp_path) == []


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_signal_leaves_nothing_behind(number: int, code: int, tmp_path: Path) -> None:
    """The process is stopped while its file grows: 64 Mi values take it longer than that."""
    src, dst = tmp_path / "in.gguf", tmp_path / "out.gguf"
    f = small(**{f"t{i}": Tensor((4096, 1024), data=b"") for i in range(16)})
    for i, tensor in enumerate(f.tensors.values()):
        tensor.offset = i << 24
    src.write_bytes(f.header())
    os.truncate(src, os.path.getsize(src) + 32 + (16 << 24))  # zeros that take no room on the disk
    command = [sys.executable, "-m", "pykvsmooth", "quantize", str(src), str(dst), "--type", "q6_k", "--threads", "1"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    try:
        end = time.monotonic() + 60
        while not any(".tmp" in name for name in left(tmp_path)) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (code, b"", b"")
    assert left(tmp_path) == ["in.gguf"]
