# Everything a checkout needs: python3 >= 3.11, python3-venv and make. `make help` lists the targets.

PYTHON ?= python3
VENV   ?= .venv
# A package index for torch alone: https://download.pytorch.org/whl/cpu has builds without CUDA.
TORCH_INDEX ?=
# Passed on to pytest or to the demo: make test ARGS="-k grid"
ARGS   ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP   := $(BIN)/python -m pip --disable-pip-version-check
# TensorRT-RTX has wheels for Linux x86-64 (and Windows); elsewhere, and only there, setup goes on without it.
PLATFORM = $(shell uname -s)-$(shell uname -m)
RTX      = $(if $(filter Linux-x86_64,$(PLATFORM)),trt-rtx)
# A genuine Triton server that needs no GPU, for the tests: unpacked beside $(VENV), never into it, with the NumPy 1 that
# its Python back end wants.
SERVER         := .tritonserver
SERVER_VERSION := 0.7.0
SERVER_STAMP   := $(SERVER)/.installed-$(SERVER_VERSION)
# No progress bars where nobody watches them.
QUIET := $(if $(CI),--progress-bar off)

# The lower bounds of pyproject.toml, apart, and the tests of what depends on other packages most.
OLDEST       := .venv-oldest
OLDEST_STAMP := $(OLDEST)/.installed
OLDEST_TESTS := $(addprefix tests/test_, $(addsuffix .py, \
  check_optimised checkpoint cli cpu_target data export hold_quantizers huggingface models onnx_file passes pipeline \
  plot trace triton_repository))

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest lint types check families setup clean $(SERVER)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  The first use installs everything into $(VENV) (a few minutes, about 6 GB). Without CUDA it is about 1.5 GB:"
	@echo "  make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu    (after 'make clean', if set up before)"

demo: $(STAMP) ## quantise, export, build and check a small ViT on this machine
	@$(BIN)/python scripts/demo.py $(ARGS)

test: $(STAMP) $(SERVER_STAMP) ## run pytest
	@$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

# Warnings are no errors here: old packages warn of each other.
test-oldest: $(OLDEST_STAMP) ## run some tests with the oldest versions that pyproject.toml allows
	@$(OLDEST)/bin/python -m pytest -n auto --dist worksteal -W ignore::DeprecationWarning -W ignore::FutureWarning \
	  $(OLDEST_TESTS) $(ARGS)

lint: $(STAMP) ## run ruff: rules and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(STAMP) ## run mypy in strict mode
	@$(BIN)/mypy

check: lint types test ## lint, types and test

families: $(STAMP) ## look at every architecture of timm and write docs/families.md (minutes)
	@$(BIN)/python scripts/families.py

setup: $(STAMP) ## only install

# The stamp is removed first and made last: an interrupted setup is taken up again by the next make.
$(STAMP): pyproject.toml constraints.txt
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: gplq needs Python 3.11 or newer; '$(PYTHON) --version' says: $$($(PYTHON) --version 2>&1)" >&2; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 3; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "error: $(PYTHON) has no venv or ensurepip module. On Debian and Ubuntu: apt install python3-venv" >&2; exit 3; }
	@echo "==> Installing gplq into $(VENV), once: some minutes, about 6 GB of disk with the CUDA build of torch."
	@echo "    CPU only, about 1.5 GB: make $(MAKECMDGOALS) TORCH_INDEX=https://download.pytorch.org/whl/cpu"
	@$(PYTHON) -m venv $(VENV)
ifneq ($(TORCH_INDEX),)
	@echo "==> torch and torchvision from $(TORCH_INDEX)"
	@$(PIP) install $(QUIET) --no-deps --index-url $(TORCH_INDEX) -c constraints.txt torch torchvision
endif
	@echo "==> gplq and everything else, in the versions of constraints.txt"
	@$(if $(RTX),,echo "    without TensorRT-RTX, which has no wheels for $(PLATFORM): engines will be reported as skipped")
	@$(PIP) install $(QUIET) -e '.[cpu,openvino,$(RTX:%=%,)triton,report,dev]' -c constraints.txt
	@touch $@
	@echo "==> Ready."

# As above, with exactly the lower bounds. The first setup takes minutes and gigabytes again, if torch comes with CUDA.
$(OLDEST_STAMP): pyproject.toml constraints-oldest.txt
	@rm -f $@
	@echo "==> gplq and everything else, in the versions of constraints-oldest.txt, into $(OLDEST)"
	@$(PYTHON) -m venv $(OLDEST)
ifneq ($(TORCH_INDEX),)
	@$(OLDEST)/bin/python -m pip install $(QUIET) --no-deps --index-url $(TORCH_INDEX) -c constraints-oldest.txt \
	  torch torchvision
endif
	@$(OLDEST)/bin/python -m pip install $(QUIET) -e '.[cpu,openvino,$(RTX:%=%,)triton,report,datasets]' \
	  pytest pytest-timeout pytest-xdist jsonschema junitparser justhtml markdown-it-py -c constraints-oldest.txt
	@touch $@

$(SERVER): $(SERVER_STAMP)

# Where the wheel does not install, the tests that need it are skipped and say so; in CI that is a failure.
$(SERVER_STAMP): | $(STAMP)
	@rm -rf $(SERVER)
	@echo "==> Triton server into $(SERVER), for the tests: 150 MB"
	@mkdir -p $(SERVER)
	@{ $(PIP) install $(QUIET) --no-deps --target $(SERVER) nvidia-pytriton==$(SERVER_VERSION) && \
	  $(PIP) install $(QUIET) --no-deps --target $(SERVER)/packages numpy==1.26.4; } || [ -z "$(CI)" ]
	@touch $@

clean: ## remove the virtual environment and all caches
	rm -rf $(VENV) $(OLDEST) $(SERVER) build .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
