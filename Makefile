# Everything from a fresh clone: `make demo` shows trainlint at work, `make test` checks the project.
# Needs python3 (3.10 or newer) with venv. The environment is made in .venv once; CPU is enough.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TORCH  := $(shell grep '^torch==' constraints.txt)
CODE   := src checks tests benchmarks examples
# Programs that are checked whole run beside the other tests.
WHOLE  := tests/fixtures tests/properties

.PHONY: help env demo test lint types unit systems fixtures build clean

help:
	@echo "make demo      trainlint on a misconfigured fine-tune; ends with the report on the screen"
	@echo "make test      lint, types and tests"
	@echo "make systems   tests on real programs in their own environments (minutes)"
	@echo "make lint | types | unit | fixtures | build | clean"

env: $(STAMP)

# torch first and pinned: nothing installed later may bring another one.
$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "trainlint needs Python 3.10 or newer; name one with: make PYTHON=python3.11 env"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
	  || { echo "python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable '.[test,lint,frameworks]'
	@touch $@

# trainlint exits 1 because the demo is broken on purpose; anything but that (or 0) is a failure of ours.
demo: $(STAMP)
	@$(BIN)/python examples/finetune/earlier_run.py
	@cd examples/finetune && PATH="$(abspath $(BIN)):$$PATH" \
	  trainlint check conf/config.yaml -- python train.py || test $$? -eq 1

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy

# $(1): options of pytest. $(2): folders that spend their time waiting, beside the rest too. Theirs is shown last.
define tests
	@$(BIN)/python -m pytest -q $(1) $(WHOLE) > $(VENV)/whole.log 2>&1 & whole=$$!; \
	  $(BIN)/python -m pytest -q $(1) $(2) > $(VENV)/waited.log 2>&1 & waited=$$!; \
	  $(BIN)/python -m pytest -q $(1) $(addprefix --ignore=,$(WHOLE) $(2)); failed=$$?; \
	  wait $$waited || failed=1; wait $$whole || failed=1; \
	  cat $(VENV)/waited.log $(VENV)/whole.log; exit $$failed
endef

unit: $(STAMP)
	$(call tests,,tests/launch tests/no_harm tests/cli)

# The proof of every check: each bad program gives exactly its findings, each good one none.
fixtures: $(STAMP)
	$(BIN)/python -m pytest -q -m "systems or not systems" tests/fixtures

systems: $(STAMP)
	$(call tests,-m systems,tests/systems)

build: $(STAMP)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist src/*.egg-info *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
