# Everything starts from Python >= 3.11, pip and make. Each target does its own set-up once; stamp files remember it.
#
#   make demo PYTHON=/path/to/python3.12    another interpreter
#   make test PYTEST_ARGS="-k merge"        more arguments for pytest
#   make test WORKERS=8                     on a larger machine
#   make setup CONSTRAINTS=                 pip's own choice of torch (for CUDA machines)

PYTHON ?=
PYTEST_ARGS ?=
# Tests are many small computations: processes of one thread each finish them sooner than one process of many.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(1)/python -m pytest -n $(WORKERS) --dist loadgroup
CONSTRAINTS ?= constraints/cpu.txt
DEMO_OUT ?= demo-output
SMOKE_OUT ?= build/eval-smoke

VENV := .venv
BIN := $(VENV)/bin
MATRIX := .venv-matrix
CELLS := newest transformers-5.17 torch-2.11

PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
REQUIREMENTS := pyproject.toml $(wildcard $(CONSTRAINTS))

export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM := false

# Sets the shell variable `python`, or explains what is missing.
FIND_PYTHON = python=; seen=; \
	for candidate in $(if $(PYTHON),"$(PYTHON)",python3.13 python3.12 python3.11 python3); do \
	  version=$$("$$candidate" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || continue; \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then python=$$candidate; break; fi; \
	  seen="$$seen$${seen:+, }$$candidate is Python $$version"; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "star-attention needs Python 3.11 or newer; $${seen:-no Python was found$(if $(PYTHON), at $(PYTHON))}." >&2; \
	  echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
	  exit 1; \
	fi

# $(call NEW_VENV,folder)
NEW_VENV = rm -rf "$(1)" && mkdir -p "$(dir $(1))" && \
	echo "creating $(1) with $$python ($$version)" && \
	{ "$$python" -m venv "$(1)" || { \
	  echo "$$python could not create a virtual environment; its venv and pip modules are needed (some systems" >&2; \
	  echo "package them apart, as python3-venv), or name another interpreter with PYTHON=" >&2; rm -rf "$(1)"; exit 1; }; }

# $(call INSTALL,extra): the package in editable form with one extra
INSTALL = echo "installing star-attention[$(1)] into $(VENV) (a few minutes the first time)"; \
	$(BIN)/python $(PIP_INSTALL) $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[$(1)]"

.NOTPARALLEL:
.PHONY: help setup demo eval-smoke test test-slow check test-matrix clean

help:
	@echo "make demo         ask the bundled model about a long text; pictures and a page in $(DEMO_OUT)/"
	@echo "make eval-smoke   two tasks, two methods, 1K and 2K, in about 20 seconds; a report in $(SMOKE_OUT)/"
	@echo "make test         the tests that need no accelerator and no patience"
	@echo "make check        format, lint, types, generated docs"
	@echo "make test-matrix  the tests on the newest and the oldest supported transformers and torch"
	@echo "make test-slow    the tests that take minutes"
	@echo "make setup        the development environment in $(VENV)/"
	@echo "make clean        remove environments, caches and outputs"

setup: $(VENV)/.stamp-dev

$(VENV)/.stamp-venv:
	@$(FIND_PYTHON); $(call NEW_VENV,$(VENV))
	@touch $@

$(VENV)/.stamp-demo: $(VENV)/.stamp-venv $(REQUIREMENTS)
	@$(call INSTALL,plot)
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-venv $(REQUIREMENTS)
	@$(call INSTALL,test)
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-venv $(REQUIREMENTS)
	@$(call INSTALL,dev)
	@touch $@

demo: export HF_HUB_OFFLINE := 1
demo: $(VENV)/.stamp-demo
	$(BIN)/star-attention demo --out $(DEMO_OUT)

# (Anew each time: in a folder that has its answers there would be nothing to do.)
eval-smoke: export HF_HUB_OFFLINE := 1
eval-smoke: $(VENV)/.stamp-test
	rm -rf $(SMOKE_OUT)
	$(BIN)/star-attention eval ruler -m models/needle-17m --dtype float32 --device cpu --out $(SMOKE_OUT) \
	  --task niah_single_1,vt --length 1k,2k --samples 2 --max-new-tokens 32 --variants dense,star:/4

test: export HF_HUB_OFFLINE := 1
test: $(VENV)/.stamp-test
	$(call PYTEST,$(BIN)) $(PYTEST_ARGS)
	$(if $(PYTEST_ARGS),,@$(MAKE) --no-print-directory eval-smoke)

test-slow: export HF_HUB_OFFLINE := 1
test-slow: $(VENV)/.stamp-test
	$(call PYTEST,$(BIN)) -m "slow and not gpu" $(PYTEST_ARGS)

check: $(VENV)/.stamp-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m star_attention.cli.docs --check

# The matrix: one environment per cell. A failing cell does not hide the others; the last lines name every verdict.
test-matrix:
	@verdicts=; status=0; \
	for cell in $(CELLS); do \
	  if $(MAKE) --no-print-directory matrix-$$cell; then verdicts="$$verdicts\n  passed  $$cell"; \
	  else verdicts="$$verdicts\n  FAILED  $$cell"; status=1; fi; \
	done; \
	printf "test-matrix:$$verdicts\n"; exit $$status

.PHONY: $(CELLS:%=matrix-%)
$(CELLS:%=matrix-%): export HF_HUB_OFFLINE := 1
$(CELLS:%=matrix-%): matrix-%: $(MATRIX)/%/.stamp
	@echo "== $*"
	@$(MATRIX)/$*/bin/python -c 'import sys, torch, transformers; \
	  print("python", sys.version.split()[0], "torch", torch.__version__, "transformers", transformers.__version__)'
	$(call PYTEST,$(MATRIX)/$*/bin) $(PYTEST_ARGS)

# "newest" is a moving target, so pip is asked again on every run.
matrix-newest: $(MATRIX)/newest/.upgraded
.PHONY: $(MATRIX)/newest/.upgraded
$(MATRIX)/newest/.upgraded: $(MATRIX)/newest/.stamp
	@$(MATRIX)/newest/bin/python $(PIP_INSTALL) -c constraints/cpu.txt --upgrade transformers

$(MATRIX)/newest/.stamp: pyproject.toml constraints/cpu.txt
	@$(FIND_PYTHON); $(call NEW_VENV,$(@D))
	@$(@D)/bin/python $(PIP_INSTALL) -c constraints/cpu.txt -e ".[test]"
	@touch $@

$(MATRIX)/transformers-5.17/.stamp: pyproject.toml constraints/transformers-5.17.txt
	@$(FIND_PYTHON); $(call NEW_VENV,$(@D))
	@$(@D)/bin/python $(PIP_INSTALL) -c constraints/transformers-5.17.txt -e ".[test]"
	@touch $@

# torch 2.11 for Linux is offered as a CUDA build. Alone it is 0.5 GB, with all that it asks for five times that; the
# script lets it load without the rest (it needs a C compiler), and changes nothing where pip found a CPU build.
$(MATRIX)/torch-2.11/.stamp: pyproject.toml constraints/torch-2.11.txt scripts/cuda_stand_ins.py
	@$(FIND_PYTHON); $(call NEW_VENV,$(@D))
	@$(@D)/bin/python $(PIP_INSTALL) -c constraints/torch-2.11.txt --no-deps torch \
	  "nvidia-cuda-runtime; sys_platform == 'linux'"
	@$(@D)/bin/python scripts/cuda_stand_ins.py
	@$(@D)/bin/python $(PIP_INSTALL) -c constraints/torch-2.11.txt -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) $(MATRIX) $(DEMO_OUT) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
