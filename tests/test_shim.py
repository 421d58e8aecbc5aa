"""tests/shim, on which the kernels of native/cuda run without a GPU: its kernels in check.cu give what they must in every order of threads,
and what a GPU would not forgive ends the process with a message that names the kernel."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SHIM = Path(__file__).resolve().parent / "shim"
ORDERS = ["forward", "reverse", "random"]
CHECKS = ["places", "sum", "shuffle", "vote", "mma", "ldmatrix", "async", "half", "dot", "atomic", "graph", "early"]


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("no g++ or clang++ to compile the kernels with")
    return compiled(compiler, tmp_path_factory.mktemp("shim"), [], [])


@pytest.fixture(scope="module")
def check_races(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("no g++ to compile the kernels with")
    return compiled(compiler, tmp_path_factory.mktemp("races"), ["-DKVS_SHIM_RACES"], ["-fsanitize=thread"])


def compiled(compiler: str, folder: Path, flags: list[str], kernel_flags: list[str]) -> Path:
    flags = [*"-x c++ -std=c++17 -O1 -ffp-contract=off -Wall -Wextra -Werror -DKVS_SHIM".split(), f"-I{SHIM}", *flags]
    subprocess.run([compiler, *flags, *kernel_flags, "-c", str(SHIM / "check.cu"), "-o", str(folder / "check.o")], check=True)
    subprocess.run(
        [compiler, *flags, *map(str, sorted(SHIM.glob("*.cpp"))), "-x", "none", str(folder / "check.o"), "-o", str(folder / "check")],
        check=True,
    )
    return folder / "check"


def run(check: Path, name: str, order: str = "forward", **env: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "KVS_SHIM_ORDER": order, **env}
    return subprocess.run([check, name], env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CHECKS)
def test_results(check: Path, name: str, order: str) -> None:
    done = run(check, name, order)
    assert done.returncode == 0, done.stderr


FATAL = {
    "left_kernel": r"waits at __syncthreads \(line \d+\) for thread \(40, 0, 0\), which has returned",
    "branches_kernel": "waits at __syncthreads of line",
    "no_lane_kernel": "waits for lanes 00000080, which have returned",
    "short_warp_kernel": "the block ends at lanes 000000ff",
    "barrier_lane_kernel": "waits for lanes 00000008, which wait at __syncthreads",
    "two_kinds_kernel": "is at __syncwarp",
    "two_masks_kernel": "waits for lanes ffff0000",
    "own_lane_kernel": "leaves its own lane 0 out",
    "stranger_kernel": "from lane 4, which is not in mask 0000000f",
    "two_products_kernel": "kvs_mma_f16",
    "load_kernel": "kvs_load4: the address 0x[0-9a-f]+ is not a multiple of 4",
    "copy_kernel": "kvs_async16, global memory",
    "matrix_kernel": "kvs_ldmatrix_x4: the address",
    "behind_kernel": "wrote behind its 128 bytes of dynamic shared memory",
    "never_awaits_kernel": "no thread has waited for the kernel in front",
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", FATAL)
def test_what_no_kernel_may_do(check: Path, name: str, order: str) -> None:
    done = run(check, name, order)
    assert done.returncode == -6  # SIGABRT
    assert done.stderr.startswith(f"kvs shim: {name}")
    assert re.search(FATAL[name], done.stderr), done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("behind_device", "byte 400 of 400 on the device; the last kernel was store_kernel"),
        ("before_device", "byte -4 of 400 on the device; the last kernel was store_kernel"),
        ("freed_twice", "which is not there"),
        ("many_threads", "store_kernel: a block of 32 x 33 x 1 threads"),
        ("no_blocks", "store_kernel: a grid of 0 x 1 x 1 blocks"),
        ("many_blocks", "store_kernel: a grid of 1 x 65536 x 1 blocks"),
        ("much_shared", "store_kernel: 102400 bytes of dynamic shared memory"),
    ],
)
def test_what_no_host_may_do(check: Path, name: str, message: str) -> None:
    done = run(check, name)
    assert done.returncode == -6 and message in done.stderr


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["race", "unwritten", "unwritten_array", "early_wait"])
def test_what_is_forgotten_gives_wrong_numbers(check: Path, name: str, order: str) -> None:
    done = run(check, name, order)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CHECKS)
def test_what_is_right_has_no_races(check_races: Path, name: str, order: str) -> None:
    done = run(check_races, name, order)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("race", r"(reads|writes) shared memory at .* where thread \d+ of the same block has been"),
        ("unwritten", "reads shared memory at .* that nobody has written"),
        ("unwritten_array", "reads shared memory at .* that nobody has written"),
        ("blocks_kernel", "writes device memory at .* where thread 0 of another block has been"),
        ("read_blocks_kernel", "(reads|writes) device memory at .* where thread 0 of another block has been"),
        ("lanes_kernel", r"(reads|writes) shared memory at .* where thread \d+ of the same block has been"),
        ("mixed_kernel", r"(reads|writes) device memory at .* where thread \d+ of the same block has been"),
        ("unwritten_device", "reads device memory at .* that nobody has written"),
        ("writes_early_kernel", "writes device memory at .* before it has waited for the kernel in front"),
        ("reads_early_kernel", "reads device memory at .* which a kernel in front of it writes"),
    ],
)
def test_races(check: Path, check_races: Path, name: str, message: str, order: str) -> None:
    done = run(check_races, name, order)
    assert done.returncode == -6 and re.search(message, done.stderr), done.stderr
    assert run(check, name, order).returncode == 0


@pytest.mark.parametrize("name", ["written_too_soon", "read_too_soon", "freed_too_soon", "not_waited_for"])
def test_what_is_not_waited_for_gives_wrong_numbers(check: Path, name: str) -> None:
    done = run(check, name)
    assert done.returncode == 0, done.stderr
    done = run(check, name, KVS_SHIM_STREAMS="early")
    assert done.returncode == 1 and "saw it" in done.stderr, "what is done at once can't be too late"


@pytest.mark.parametrize(
    ("name", "env"),
    [
        ("errors", {}),
        ("events_wait", {}),
        ("second_fails", {"KVS_SHIM_FAIL": "cudaMalloc:2"}),
        ("stays_broken", {"KVS_SHIM_FAIL": "cudaStreamSynchronize:1"}),
        ("little_memory", {"KVS_SHIM_MEMORY": "1000000"}),
        ("turing", {"KVS_SHIM_SM": "75"}),
        ("no_device", {"KVS_SHIM_DEVICES": "0"}),
    ],
)
def test_the_runtime(check: Path, name: str, env: dict[str, str]) -> None:
    done = run(check, name, **env)
    assert done.returncode == 0, done.stderr


def test_a_random_order_can_be_repeated(check: Path) -> None:
    done = run(check, "left_kernel", "random")
    seed = done.stderr.rsplit("random:", 1)[1].rstrip(")\n")
    assert run(check, "left_kernel", f"random:{seed}").stderr == done.stderr
    assert "it can be forward" in run(check, "sum", "sideways").stderr
    assert "it can be late or early" in run(check, "sum", KVS_SHIM_STREAMS="never").stderr
