"""A saved session is the old one or the new one, whole: after kill -9, on a full disk, in a folder that takes no files, with many
savers. KVS_KILLS=200 makes a campaign of the first test."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny

import pykvsmooth as kvs

KILLS = int(os.environ.get("KVS_KILLS", 5))
POLICY = kvs.KVSmooth(layers=[1, 2])
EXACT = 4096  # rows of float32 history: 16 MiB of file that cost no time to make
PROMPT = [1, 265, 270, 290]
OLD = list(range(260, 268))  # generated before the first save

SAVER = """
import json, sys
import pykvsmooth as kvs
model_path, path, prompt, ids = json.loads(sys.argv[1])
model = kvs.Model(model_path, mmproj=False, threads=1)
session = model.session(n_ctx=4200, kv_type="f32", policy=kvs.KVSmooth(layers=[1, 2]), exact_rows=4096)
session.feed(prompt)
print("ready", flush=True)
for id in ids:
    session.feed([id], generated=True)
    print("saving", flush=True)
    session.save(path)
    print("saved", flush=True)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kvs.Model]:
    """Of sessions that take some time to write: 17 MB."""
    path, _, _ = tiny.write_pair(tmp_path_factory.mktemp("large"), seed=4, vision=False, load=False, n_embd=128, n_head=8, n_head_kv=8)
    with kvs.Model(path, mmproj=False, threads=1) as model:
        yield model


def session_of(model: kvs.Model) -> kvs.Session:
    return kvs.Session(model, n_ctx=4200, kv_type="f32", policy=POLICY, exact_rows=EXACT)


def logits_of(model: kvs.Model, ids: list[int]) -> list[np.ndarray]:
    """After each of ids."""
    logits = []
    with session_of(model) as session:
        session.feed(PROMPT)
        for id in ids:
            session.feed([id], generated=True)
            logits.append(session.logits())
    return logits


def temporaries(path: Path) -> list[str]:
    return sorted(name for name in os.listdir(path.parent) if name != path.name)


@pytest.mark.slow
def test_kill_while_saving(large: kvs.Model, tmp_path: Path, rng: np.random.Generator) -> None:
    """Each time the file is the one before the save that was under way, or that one; what was half written goes with the next save."""
    path, ids = tmp_path / "session", [int(id) for id in rng.integers(260, 340, 40)]
    expected, kills, inside, new = logits_of(large, ids), 0, 0, 0
    while kills < KILLS or not inside:  # of a few, none may have hit a save
        assert kills < KILLS + 50
        kills += 1
        saver = subprocess.Popen(
            [sys.executable, "-c", SAVER, json.dumps([large.path, str(path), PROMPT, ids])],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert saver.stdout is not None
        lines = [saver.stdout.readline() for _ in range(3)]  # ready, saving, saved: now there is an old one
        assert lines == [b"ready\n", b"saving\n", b"saved\n"]
        time.sleep(rng.uniform(0, 0.25))
        saver.send_signal(signal.SIGKILL)
        said = saver.stdout.read().split()
        assert saver.wait() == -signal.SIGKILL
        begun, done = 1 + said.count(b"saving"), 1 + said.count(b"saved")
        with kvs.Session.load(large, path, policy=POLICY, exact_rows=EXACT) as session:
            there = session.n_past - len(PROMPT)
            assert there in (done, begun)
            np.testing.assert_array_equal(session.logits(), expected[there - 1])
            session.feed([ids[there]], generated=True)
            np.testing.assert_array_equal(session.logits(), expected[there])
            inside += begun > done
            new += begun > done and there == begun
            left = temporaries(path)
            assert len(left) <= 1 and (not left or begun > done)
            session.save(path)
            assert temporaries(path) == []
    print(f"{kills} kills, {inside} inside a save, {new} of them behind its rename")


# ---- a system that says no ----


@pytest.fixture
def old(large: kvs.Model, tmp_path: Path) -> Iterator[tuple[kvs.Session, Path]]:
    """A session, and a file of it as it was before."""
    path = tmp_path / "folder" / "session"
    path.parent.mkdir()
    with session_of(large) as session:
        session.feed(PROMPT)
        session.feed(OLD, generated=True)
        session.save(path)
        session.feed([300], generated=True)
        yield session, path


def refused(session: kvs.Session, path: Path, numbers: set[int], match: str) -> None:
    """The error is typed, nothing is left behind, the old file is whole."""
    before = path.read_bytes()
    with pytest.raises(kvs.SessionIOError, match=match) as caught:
        session.save(path)
    assert caught.value.errno in numbers and caught.value.path == str(path)
    assert temporaries(path) == [] and path.read_bytes() == before
    with kvs.Session.load(session.model, path, policy=POLICY, exact_rows=EXACT) as loaded:
        assert loaded.n_past == len(PROMPT) + len(OLD)


@pytest.mark.parametrize("room", [0, 1, 5000, 1 << 20, (16 << 20) + 4321])
def test_a_file_that_may_not_grow(old: tuple[kvs.Session, Path], room: int) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))  # Python ignores SIGXFSZ
    try:
        refused(*old, {errno.EFBIG}, "saving the session failed")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    old[0].save(old[1])


@pytest.mark.parametrize("read_only", [False, True])
def test_a_full_and_a_read_only_disk(old: tuple[kvs.Session, Path], tmp_path: Path, read_only: bool) -> None:
    session, path = old
    disk = tmp_path / "disk"
    disk.mkdir()
    size = path.stat().st_size
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size + (1 << 20)}", "none", disk], capture_output=True).returncode:
        pytest.skip("this process may not mount a disk")
    try:
        (disk / "session").write_bytes(path.read_bytes())
        if read_only:
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        refused(
            session, disk / "session", {errno.EROFS if read_only else errno.ENOSPC}, "read-only|another path" if read_only else "space|room"
        )
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_takes_no_files(old: tuple[kvs.Session, Path]) -> None:
    session, path = old
    with tempfile.TemporaryDirectory() as folder:  # not below pytest's, which others can't enter
        there = Path(folder) / "session"
        there.write_bytes(path.read_bytes())
        os.chmod(there, 0o644)
        os.chmod(folder, 0o555)
        user = os.geteuid()
        if not user:
            os.seteuid(65534)
        try:
            refused(session, there, {errno.EACCES}, "permission|another path")
        finally:
            os.seteuid(user)
            os.chmod(folder, 0o755)


# ---- what killed processes leave ----


def test_only_what_nobody_writes_is_removed(old: tuple[kvs.Session, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    session, path = old
    names = [
        "session.123-4.tmp",
        "session.5-0.tmp",
        "session.12.tmp",
        "session.a-1.tmp",
        "session.1-2.tmp.x",
        "sessions.1-2.tmp",
        "x.1-2.tmp",
    ]
    for name in names:
        (path.parent / name).write_bytes(b"something")
    (path.parent / "session.7-7.tmp").mkdir()
    (path.parent / "session.8-8.tmp").symlink_to("x.1-2.tmp")
    with open(path.parent / names[1], "rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        session.save(path)
        assert temporaries(path) == sorted([*names[1:], "session.7-7.tmp", "session.8-8.tmp"])
    session.save(path)
    assert temporaries(path) == sorted([*names[2:], "session.7-7.tmp", "session.8-8.tmp"])
    monkeypatch.chdir(path.parent)
    (path.parent / names[0]).write_bytes(b"something")
    session.save("session")
    assert not (path.parent / names[0]).exists()


def test_many_save_to_one_path(model: kvs.Model, tmp_path: Path) -> None:
    """The last one wins; none takes another's temporary file for an abandoned one."""
    path, failures = tmp_path / "session", list[BaseException]()

    def save(n: int) -> None:
        try:
            with model.session(n_ctx=32) as session:
                session.feed([1] * n)
                for _ in range(40):
                    session.save(path)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(n,)) for n in (3, 4, 5, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and temporaries(path) == []
    with kvs.Session.load(model, path) as session:
        assert session.n_past in (3, 4, 5, 6)


# ---- whose file is this? ----


def test_other_files(model: kvs.Model, tmp_path: Path, rng: np.random.Generator) -> None:
    """Each kind of stranger has its own message."""
    path = tmp_path / "s"
    with model.session(n_ctx=32, policy=POLICY) as session:
        session.feed(PROMPT)
        session.save(path)
    whole = path.read_bytes()

    def fails(match: str, what: str, data: bytes = whole, policy: kvs.KVSmooth | None = POLICY, over: kvs.Model = model) -> None:
        path.write_bytes(data)
        with pytest.raises(kvs.SessionFileError, match=match) as caught:
            kvs.Session.load(over, path, policy=policy)
        assert caught.value.what == what and str(path) in str(caught.value)

    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 4
    fails("this is not a saved session", "magic", b"\x89PNG" + whole[4:])
    fails("this is not a saved session", "length", b"")
    fails("saved by a newer version", "version", whole[:8] + struct.pack("<I", 9) + whole[12:])
    fails("saved by another version", "version", whole[:8] + struct.pack("<I", 1) + whole[12:])
    fails("cut off", "length", whole[:-9])
    fails("damaged", "checksum", bytes(damaged))
    fails("no policy: load it with the same", "policy", policy=None)
    fails("lambda_ref", "lambda_ref", policy=kvs.KVSmooth(layers=[1, 2], lambda_ref=0.7))
    text, mmproj, _ = tiny.write_pair(tmp_path / "other", seed=int(rng.integers(1 << 30)), load=False)
    for pair, match, what in (
        ((model.path, False), "with another mmproj", "mmproj"),
        ((model.path, mmproj), "with another mmproj", "mmproj"),
        ((text, model.mmproj), "with another text model", "model"),
    ):
        with kvs.Model(pair[0], mmproj=pair[1]) as other:
            fails(match, what, over=other)
    path.write_bytes(whole)
    kvs.Session.load(model, path, policy=POLICY).close()


def test_memory_of_a_session_file(model: kvs.Model, tmp_path: Path) -> None:
    """A header may ask for a million rows: they cost no memory before they are there."""
    path = tmp_path / "s"
    with model.session(n_ctx=1 << 20) as session:
        session.feed(PROMPT)
        session.save(path)
    assert path.stat().st_size < 1 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with kvs.Session.load(model, path) as session:
        assert session.n_past == len(PROMPT)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB
