# The few commands for people and for CI. `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Test processes at once.
WORKERS ?= 2
READY := $(VENV)/.installed $(VENV)/.system

# Debian packages with the programs that the tests start: a real broker, fault injection, unit checks, keys
# in a (software) security module.
SYSTEM_PACKAGES := python3-venv mosquitto strace systemd softhsm2

# All scripts run, also after one that is over its limit; then those are named.
measure = over=; for script in $(1); do echo "== $$script"; $(BIN)/python "$$script" || over="$$over $$script"; done; \
	[ -z "$$over" ] || { echo "over a limit:$$over" >&2; exit 1; }

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(READY) ## Watch a model go through its whole life on this machine
	$(BIN)/python examples/fashion_mnist/demo.py

.PHONY: test
test: check ## Run all checks and all tests but the thorough ones
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'not thorough'

.PHONY: faults
faults: $(READY) ## Break everything on purpose: kills, disk, network, broker, clock, models
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile tests/faults

.PHONY: check
check: $(READY) ## Check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.PHONY: bench
bench: $(READY) ## Run every measurement in benchmarks/, one after the other
	@$(call measure,benchmarks/*.py benchmarks/update/*.py)

.PHONY: bench-update
bench-update: $(READY) ## Measure updates: deltas, activation, swaps under load, outbox, memory
	@$(call measure,benchmarks/update/*.py)

.PHONY: clean
clean: ## Remove the virtual environment and everything built
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.system: tools/system-packages Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo 'edgeward needs Python 3.11 or later; name one: make PYTHON=python3.12' >&2; exit 1; }
	@tools/system-packages $(PYTHON) $(SYSTEM_PACKAGES)
	@mkdir -p $(@D) && touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.system
	@echo 'installing the development environment into $(VENV) (once, about 600 MB)'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
