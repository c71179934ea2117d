# Requires Python >= 3.11, pip and make. Each target installs what it needs once, as stamp files
# record.
#
#   make demo PYTHON=/path/to/python3.12    another interpreter
#   make test PYTEST_ARGS="-k merge"        additional arguments for pytest
#   make test WORKERS=8                     more processes, on a larger machine
#   make setup CONSTRAINTS=                 let pip choose torch (on CUDA machines)

PYTHON ?=
PYTEST_ARGS ?=
# Tests are many small computations: several single-threaded processes finish sooner than one
# process with many threads. One more than the two cores of CI, since tests of servers, ranks and
# time limits wait a third of their time.
WORKERS ?= 3
# No plugins but these two: others come with dependencies, and take a millisecond of every test.
PYTEST = OMP_NUM_THREADS=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(1)/python -m pytest \
	-p xdist -p _hypothesis_pytestplugin -n $(WORKERS) --dist loadgroup --no-loadscope-reorder
CONSTRAINTS ?= constraints/cpu.txt
DEMO_OUT ?= demo-output
# SMOKE=no: tests without the evaluation, which CI runs beside them.
SMOKE ?=
SMOKE_OUT ?= build/eval-smoke
SERVE_PORT ?= 8000
# Of results-real: how many evaluations run at a time, and samples of each task and length.
JOBS ?= 2
SAMPLES ?= 100
REAL_MODEL ?= build/smollm2
REAL_OUT ?= build/results-real

COMMA := ,
VENV := .venv
BIN := $(VENV)/bin
MATRIX := .venv-matrix
CLIENTS_DIR := .venv-clients
# Open WebUI is one more, of 3 GB, for Python 3.11 or 3.12: CLIENTS="newest openai-2 open-webui".
CLIENTS ?= newest openai-2
CELLS := newest transformers-5.17 torch-2.11

PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
REQUIREMENTS := pyproject.toml $(wildcard $(CONSTRAINTS))

export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM := false

# Sets the shell variable `python`, or reports what is missing and fails.
FIND_PYTHON = python=; seen=; \
	for candidate in $(if $(PYTHON),"$(PYTHON)",python3.13 python3.12 python3.11 python3); do \
	  version=$$("$$candidate" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) \
	    || continue; \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	    python=$$candidate; break; \
	  fi; \
	  seen="$$seen$${seen:+, }$$candidate is Python $$version"; \
	done; \
	if [ -z "$$python" ]; then \
	  seen=$${seen:-no Python was found$(if $(PYTHON), at $(PYTHON))}; \
	  echo "star-attention needs Python 3.11 or newer; $$seen." >&2; \
	  echo "Install it, or pass its path: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
	  exit 1; \
	fi

# $(call NEW_VENV,folder)
NEW_VENV = rm -rf "$(1)" && mkdir -p "$(dir $(1))" && \
	echo "creating $(1) with $$python ($$version)" && \
	{ "$$python" -m venv "$(1)" || { \
	  echo "$$python could not create a virtual environment. Install its venv and pip modules" >&2; \
	  echo "(on some systems: python3-venv), or choose another interpreter with PYTHON=" >&2; \
	  rm -rf "$(1)"; exit 1; }; }

# $(call INSTALL,extra): installs the package in editable form with one extra
# pip would compile 16,000 files on one core, two thirds of its time. Two are no valid Python.
INSTALL = echo "installing star-attention[$(1)] into $(VENV) (a few minutes the first time)"; \
	$(BIN)/python $(PIP_INSTALL) --no-compile $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) \
	  -e ".[$(1)]" && \
	{ $(BIN)/python -m compileall -q -j 0 $(VENV)/lib src >/dev/null 2>&1 || true; }

.NOTPARALLEL:
.PHONY: help setup demo serve eval-smoke results-real test test-slow test-clients check test-matrix clean

help:
	@echo "make demo         ask the bundled model about a long text; writes a page to $(DEMO_OUT)/"
	@echo "make serve        serve the bundled model over HTTP, and print a request to try"
	@echo "make test         run the fast tests, on the CPU"
	@echo "make test-slow    run the tests that take minutes"
	@echo "make test-clients run real clients against the server, in environments of their own"
	@echo "make test-matrix  run the fast tests on the oldest and newest transformers and torch"
	@echo "make eval-smoke   evaluate two tasks in about 20 seconds; writes a report to $(SMOKE_OUT)/"
	@echo "make results-real measure a real model, SmolLM2-135M; hours on a CPU, JOBS=14 on a GPU"
	@echo "make check        check format, lint, types and generated docs"
	@echo "make setup        create the development environment in $(VENV)/"
	@echo "make clean        remove environments, caches and outputs"

setup: $(VENV)/.stamp-dev

$(VENV)/.stamp-venv:
	@$(FIND_PYTHON); $(call NEW_VENV,$(VENV))
	@touch $@

$(VENV)/.stamp-demo: $(VENV)/.stamp-venv $(REQUIREMENTS)
	@$(call INSTALL,plot)
	@touch $@

$(VENV)/.stamp-serve: $(VENV)/.stamp-venv $(REQUIREMENTS)
	@$(call INSTALL,serve)
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-venv $(REQUIREMENTS)
	@$(call INSTALL,test)
	@touch $@ $(VENV)/.stamp-serve $(VENV)/.stamp-demo

# It has what the smaller ones have.
$(VENV)/.stamp-dev: $(VENV)/.stamp-venv $(REQUIREMENTS)
	@$(call INSTALL,dev)
	@touch $@ $(VENV)/.stamp-test $(VENV)/.stamp-serve $(VENV)/.stamp-demo

$(VENV)/.stamp-real: $(VENV)/.stamp-venv $(REQUIREMENTS)
	@$(call INSTALL,real-model$(COMMA)eval$(COMMA)plot)
	@touch $@

demo: export HF_HUB_OFFLINE := 1
demo: $(VENV)/.stamp-demo
	$(BIN)/star-attention demo --out $(DEMO_OUT)

# The line works in a second terminal, once the server says that it serves.
serve: export HF_HUB_OFFLINE := 1
serve: $(VENV)/.stamp-serve
	@echo "Ask it, in another terminal:"
	@echo "  curl http://127.0.0.1:$(SERVE_PORT)/v1/chat/completions \\"
	@echo "    -d '{\"messages\": [{\"role\": \"user\", \"content\":" \
	  "\"The secret number for otter is 1234567. What is the secret number for otter?\"}]}'"
	$(BIN)/star-attention serve -m models/needle-17m --port $(SERVE_PORT)

# Starts from an empty folder: a run resumes, and a finished one would have nothing left to do.
eval-smoke: export HF_HUB_OFFLINE := 1
eval-smoke: $(VENV)/.stamp-test
	rm -rf $(SMOKE_OUT)
	$(BIN)/star-attention eval ruler -m models/needle-17m --dtype float32 --device cpu \
	  --task niah_single_1,vt --length 1k,2k --samples 2 --max-new-tokens 32 \
	  --variants dense,star:/4 --out $(SMOKE_OUT)

$(REAL_MODEL)/config.json: | $(VENV)/.stamp-real
	$(BIN)/python scripts/real_model.py $(REAL_MODEL)

# Runs resume: a second call goes on where the first one ended.
results-real: $(REAL_MODEL)/config.json
	$(BIN)/python scripts/results.py --set real --model $(REAL_MODEL) --out $(REAL_OUT) \
	  --jobs $(JOBS) --samples $(SAMPLES)

test: export HF_HUB_OFFLINE := 1
test: $(VENV)/.stamp-test
	$(call PYTEST,$(BIN)) $(PYTEST_ARGS)
	$(if $(PYTEST_ARGS)$(filter no,$(SMOKE)),,@$(MAKE) --no-print-directory eval-smoke)

test-slow: export HF_HUB_OFFLINE := 1
test-slow: $(VENV)/.stamp-test
	$(call PYTEST,$(BIN)) -m "slow and not gpu" $(PYTEST_ARGS)

# Real clients, in environments of their own.
test-clients: export HF_HUB_OFFLINE := 1
test-clients: $(VENV)/.stamp-test $(CLIENTS:%=$(CLIENTS_DIR)/%/.stamp) $(CLIENTS_DIR)/node/.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m clients tests/clients $(PYTEST_ARGS)

$(CLIENTS:%=$(CLIENTS_DIR)/%/.stamp): $(CLIENTS_DIR)/%/.stamp: tests/clients/%.txt
	@$(FIND_PYTHON); $(call NEW_VENV,$(@D))
	@$(@D)/bin/python $(PIP_INSTALL) $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -r $<
	@touch $@

# Without npm its clients are left out.
$(CLIENTS_DIR)/node/.stamp: tests/clients/node.json
	@if command -v npm >/dev/null; then \
	  rm -rf $(@D) && mkdir -p $(@D) && cp $< $(@D)/package.json && \
	  (cd $(@D) && npm install --silent --no-audit --no-fund) && touch $@; fi

check: $(VENV)/.stamp-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m star_attention.cli.docs --check

# One environment per cell. All cells run, even after a failure; the last lines list every result.
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
	  print("python", sys.version.split()[0], "torch", torch.__version__, \
	    "transformers", transformers.__version__)'
	$(call PYTEST,$(MATRIX)/$*/bin) $(PYTEST_ARGS)

# The newest release changes, so every run upgrades.
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

# For Linux, pip offers torch 2.11 as a CUDA build: 0.5 GB alone, five times that with its
# dependencies. The script lets it load without them (and needs a C compiler); it leaves a CPU build
# unchanged.
$(MATRIX)/torch-2.11/.stamp: pyproject.toml constraints/torch-2.11.txt scripts/cuda_stand_ins.py
	@$(FIND_PYTHON); $(call NEW_VENV,$(@D))
	@$(@D)/bin/python $(PIP_INSTALL) -c constraints/torch-2.11.txt --no-deps torch \
	  "nvidia-cuda-runtime; sys_platform == 'linux'"
	@$(@D)/bin/python scripts/cuda_stand_ins.py
	@$(@D)/bin/python $(PIP_INSTALL) -c constraints/torch-2.11.txt -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) $(MATRIX) $(CLIENTS_DIR) $(DEMO_OUT) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
