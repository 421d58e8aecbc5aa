"""How long after cancel() (or Ctrl-C) a call has ended: python tests/bench_cancel.py [--model X.gguf --mmproj Y.gguf]

With a pair: loading it, a picture's encoding, prompts of 640 and 4,000 rows, decoding. Always: calls that move rows of a cache of the shape
of 7B, over thin weights. Moments are drawn evenly from the first --within seconds, or from as long as the call takes.
Exit status 1: a call ended later than --limit after its cancel().
"""

import argparse
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.append(str(HERE.parent))  # last: what is installed is measured

import tiny

import pykvsmooth as kvs

DSCR = {"layers": ":", "coord_norm": "patch"}
RNG = np.random.default_rng()
LONGEST: dict[str, float] = {}  # seconds
Call = Callable[[], Any]
Attempt = Callable[[], tuple[Call, Call]]  # what is cancelled, and its cancel()


def interrupt() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def delay_of(call: Call, cancel: Call, moment: float) -> float | None:
    """Seconds from cancel() to the end of call(); None if that came first."""
    fired: list[float] = []
    over = threading.Event()

    def fire() -> None:
        if not over.wait(moment):
            fired.append(time.perf_counter())
            cancel()

    thread = threading.Thread(target=fire)
    thread.start()
    try:
        call()
    except (KeyboardInterrupt, kvs.CancelledError):
        pass
    end = time.perf_counter()
    over.set()
    thread.join()
    return max(0.0, end - fired[0]) if fired and fired[0] < end else None


def measure(name: str, n: int, seconds: float, attempt: Attempt) -> None:
    """The longest is kept in LONGEST."""
    delays: list[float] = []
    while len(delays) < n:
        delay = delay_of(*attempt(), float(RNG.uniform(0, seconds)))
        if delay is None:
            seconds *= 0.8
        else:
            delays.append(delay)
    p50, LONGEST[name] = np.median(delays), max(delays)
    print(f"{name:<22} n={n}  within {seconds:6.2f} s  p50 {p50 * 1e3:7.1f} ms  max {LONGEST[name] * 1e3:7.1f} ms", flush=True)


def picture(size: int = 336) -> np.ndarray:
    return RNG.integers(0, 256, (size, size, 3), np.uint8)


def of_a_pair(model_path: str, mmproj: str, device: str, n: int, within: float) -> None:
    def load() -> tuple[Call, Call]:
        gone = threading.Event()
        return lambda: kvs.Model(model_path, mmproj=mmproj, device=device, progress=lambda _: not gone.is_set()).close(), gone.set

    began = time.perf_counter()
    with kvs.Model(model_path, mmproj=mmproj, device=device) as model:
        measure("load", n, time.perf_counter() - began, load)
        model._end_ids = frozenset()
        known = picture()
        with model.session(n_ctx=4200, policy=kvs.KVSmooth.for_model(model)) as session:

            def answer(**request: Any) -> Attempt:
                def attempt() -> tuple[Call, Call]:
                    session.reset()
                    stream = session.generate(**{"prompt": "a dog", "max_tokens": None, "template": None, **request})
                    return stream.result, stream.cancel

                return attempt

            def encode() -> tuple[Call, Call]:
                return answer(image=picture())()

            def decode() -> tuple[Call, Call]:
                call, cancel = answer()()
                next(call.__self__)  # type: ignore[attr-defined]
                return call, cancel

            measure("encode", n, within, encode)
            model.encode_image(known)
            for rows in (640, 4000):
                words = "a dog " * (rows // 2)
                ids = model.tokenize(words)[: rows - model.n_image - 1]
                measure(f"prefill of {rows}", n, within, answer(prompt=model.detokenize(ids), image=known))
            measure("decode", n, within, decode)


def of_rows(device: str, n: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        text, mmproj, _ = tiny.write_pair(
            folder, seed=1, load=False, n_layer=32, n_head=32, n_head_kv=32, head_dim=128, image=336, gain=0.5, n_ctx_train=8192
        )
        file = Path(folder) / "session"
        with kvs.Model(text, mmproj=mmproj, device=device) as model:
            for rows in (640, 4000):
                with prepared(model, rows, kvs.PruneHal(reversible=True)) as session:
                    session.save(file)
                    for name, attempt in calls_on(session, file).items():
                        measure(f"{name} at {rows}", n, took(attempt), attempt)
            measure("DSCR after prefill", n, took(lambda: after_prefill(model)), lambda: after_prefill(model))


def prepared(model: kvs.Model, rows: int, policy: Any) -> kvs.Session:
    session = model.session(n_ctx=rows + 100, policy=policy)
    session.feed([1, 5])
    session.feed_image(picture())
    session.feed([5] * (rows - model.n_image - 2))
    session.feed([6] * 4, generated=True)
    assert session.prunings
    return session


def calls_on(session: kvs.Session, file: Path) -> dict[str, Attempt]:
    twins = [session]

    def on_twin(use: Callable[[kvs.Session], Any]) -> Attempt:
        """A change of a session: of one from the file, if the last attempt came through."""

        def attempt() -> tuple[Call, Call]:
            if not twins[-1].prunings:
                twins.pop().close()
                twins.append(kvs.Session.load(session.model, file, policy=session.policy))
            return lambda: use(twins[-1]), interrupt

        return attempt

    return {
        "fork": lambda: (lambda: session.fork().close(), interrupt),
        "save": lambda: (lambda: session.save(file.with_name("other")), interrupt),
        "load of a session": lambda: (lambda: kvs.Session.load(session.model, file, policy=session.policy).close(), interrupt),
        "restore": on_twin(lambda s: s.restore()),
        "rewind": on_twin(lambda s: s.rewind(4)),
    }


def after_prefill(model: kvs.Model) -> tuple[Call, Call]:
    session = model.session(n_ctx=700, policy=kvs.DSCR(**DSCR, phase="after_prefill"))
    session.feed_image(picture())
    session.feed([5, 6])
    return lambda: session.kv(0), interrupt


def took(attempt: Attempt) -> float:
    call, _ = attempt()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--mmproj")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-n", type=int, default=20, help="cancellations of each kind")
    parser.add_argument("--within", type=float, default=10.0, metavar="S")
    parser.add_argument("--limit", type=float, default=0.1, metavar="S")
    args = parser.parse_args()
    if args.model:
        of_a_pair(args.model, args.mmproj, args.device, args.n, args.within)
    of_rows(args.device, args.n)
    late = [name for name, seconds in LONGEST.items() if seconds > args.limit]
    if late:
        print(f"over {args.limit:g} s: {', '.join(late)}", file=sys.stderr)
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
