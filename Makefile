# make test    the environment, the build and the whole test suite: nothing else is needed beforehand but Python and a C++ compiler
# make demo    the same set-up, then the main job: pictures by the embedded mini model, judged and timed, in out/demo
# make demo-diffusers  a stock diffusers SANA pipeline with the 1600M transformer, and the same one patched (SIZE= STEPS= MODEL=)
# make check   make test and every other check, with the time of each; PARTS="lint symbols" runs only those
# make build   recompiles what changed      make kernels  registers, spills, instructions and PTX of every CUDA kernel (needs nvcc)
# make lint    make format                  make clean    what builds left behind; VENV stays
PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
SIZE ?=
STEPS ?=
MODEL ?=
PARTS ?=
PYTEST_ARGS ?=
# One worker for each core, each with a thread of its own (tests/conftest.py): small models gain nothing from more.
WORKERS ?= -n logical --maxprocesses 8 --dist worksteal

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-torch-$(TORCH)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
CPP = $(shell git ls-files --cached --others --exclude-standard 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

.PHONY: demo demo-diffusers test check build kernels lint format clean
.DELETE_ON_ERROR:

test: build
	$(BIN)/python -m pytest $(WORKERS) $(PYTEST_ARGS)

demo: build
	$(BIN)/sana15 demo --out out/demo || { echo 'make demo-diffusers shows the kernels without a trained model'; exit 1; }

demo-diffusers: build
	$(BIN)/python benchmarks/demo_diffusers.py $(if $(SIZE),--size $(SIZE)) $(if $(STEPS),--steps $(STEPS)) $(if $(MODEL),--model $(MODEL))

check:
	$(PYTHON) scripts/check.py $(PARTS)

build: $(STAMP)
	$(BIN)/python setup.py -q build_ext --inplace

# The editable install only puts this folder on the path; `build` compiles into it, again and again.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo 'python3 -m venv failed; on Debian and Ubuntu: apt-get install python3-venv'; exit 1; }
	$(PIP) torch==$(TORCH)
	$(PIP) 'setuptools>=77' 'ninja' 'pybind11>=2.12' numpy
	SANA_EXT_BUILD=none $(PIP) --no-build-isolation -e '.[dev]'
	touch $@

kernels: $(STAMP)
	$(BIN)/python scripts/check_kernels.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_prose.py
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf build dist out *.egg-info sana_ext/*.so sana_ext/libsana_ext.json .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find sana_ext tests benchmarks scripts -name __pycache__ -prune -exec rm -rf {} +
