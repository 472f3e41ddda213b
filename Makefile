# The commands of the house. `make run` and `make test` need nothing but Debian 12 with Python 3.11 and make:
# they install what is missing (as root through apt, else they print the line to type) and set up a virtual environment.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3.11
BIN := .venv/bin
# Most tests wait for other processes: two at once take little more than half of the time.
ABREAST := -n logical --maxprocesses 4 --dist worksteal

# What nginx needs to run us; what the tests need beside it.
RUN_PACKAGES := nginx libnginx-mod-http-lua lua-resty-core lua-cjson python3-venv
TEST_PACKAGES := $(RUN_PACKAGES) lua-busted lua-check openssl curl faketime iproute2 iptables keepalived
BENCH_PACKAGES := $(TEST_PACKAGES) haproxy wrk

.PHONY: help run test test-all lint bench clean packages-run packages-test packages-bench

help: ## say what there is
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

run: packages-run .venv/.run ## restart three live backends under traffic, and look around
	@exec $(BIN)/headgate demo $${ONCE:+--once}

test: packages-test .venv/.dev ## the quick tests
	$(BIN)/python -m pytest $(ABREAST) -m "not slow and not container"

test-all: test ## the slow ones and those with containers, too
	$(BIN)/python -m pytest -m "slow or container"

lint: packages-test .venv/.dev ## style, types, rooms, Lua
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	luacheck lua tests/lua

bench: packages-bench .venv/.dev ## the table of figures
	$(BIN)/python -m tests.bench

clean: ## remove the virtual environment and everything that was built
	rm -rf .venv build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

packages-run:
	@.ci/packages $(RUN_PACKAGES)

packages-test:
	@.ci/packages $(TEST_PACKAGES)

packages-bench:
	@.ci/packages $(BENCH_PACKAGES)

# Made anew when the list of packages changes, or when the checkout has moved (a virtual environment holds its own path).
.venv/.at: ALWAYS
	@if [ "$$(cat .venv/.at 2>/dev/null)" != "$$PWD" ]; then \
	  echo "making .venv"; rm -rf .venv; $(PYTHON) -m venv .venv; printf %s "$$PWD" > .venv/.at; fi

.venv/.run: .venv/.at pyproject.toml constraints.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	@touch $@

.venv/.dev: .venv/.at pyproject.toml constraints.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ .venv/.run

.PHONY: ALWAYS
ALWAYS:
