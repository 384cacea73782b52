# `make demo` and `make test` work in a fresh clone: they install into .venv first.
# On a machine with an NVIDIA GPU: make install CONSTRAINTS= EXTRA=gpu

PYTHON ?= python3
CONSTRAINTS ?= constraints-cpu.txt
EXTRA ?= cpu
# Test modules, or benchmarks at toy size, that run side by side; one may start three ranks.
WORKERS ?= 2

BIN := .venv/bin
# DeepSpeed builds a library with the ninja that it finds, at the first start of a run; kept with what it was built for.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.venv/torch_extensions
STAMP := .venv/.installed
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.PHONY: help install demo test lint types bench-smoke gpu-check

help:
	@echo "make install      virtual environment in .venv with everything for development"
	@echo "make demo         the whole job on a corpus and a model that need no download, in runs/demo"
	@echo "make test         all tests"
	@echo "make lint types   ruff and mypy"
	@echo "make bench-smoke  the benchmarks at toy size"
	@echo "make gpu-check    tests and times of the CUDA kernels, steps of a 1B model; needs an NVIDIA GPU"

install: $(STAMP)

$(STAMP): pyproject.toml setup.py $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) -e ".[$(EXTRA),dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/grads-dist demo --overwrite

test: $(STAMP)
	$(BIN)/python -m pytest -q --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP)
	$(BIN)/mypy

# Of others, tests run the toy size, or it takes too long (benchmarks/README.md).
SMOKES := bench_estimate bench_select bench_callback bf16_honesty bench_probe bench_select_rivals bench_kernels

bench-smoke: $(STAMP)
	$(if $(findstring benchmarks,$(EXTRA)),,$(PIP_INSTALL) -q -e ".[$(EXTRA),benchmarks]")
	$(MAKE) --jobs $(WORKERS) --output-sync $(addprefix smoke-,$(SMOKES))

smoke-bench_estimate: ONLY = --only train
smoke-%:
	$(BIN)/python benchmarks/$*.py --smoke $(ONLY)

gpu-check: $(STAMP)
	$(BIN)/python benchmarks/gpu_check.py
