# Every target works on a fresh machine: it first makes .venv and installs what it needs, once.
# The steps stand in .ci/. A variable goes on the command line: make pretrain RANKS=4

.DEFAULT_GOAL := help
.PHONY: help setup pretrain test lint format bench clean

help:  ## show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile
	@echo "PYTHON=  interpreter for .venv      PYTEST_ARGS=  what pytest runs"
	@echo "RANKS=   ranks that pretrain starts (must divide 128)  MASTER_PORT=  port where they meet"

setup:  ## make .venv and install tsmoe with its development tools
	@sh .ci/setup

pretrain: setup  ## pretrain a tiny model on the embedded corpus, then evaluate it zero-shot
	@sh .ci/pretrain

test: setup  ## lint, types, and all tests this machine can run
	@sh .ci/test

lint: setup  ## lint and types only
	@sh .ci/lint

format: setup  ## rewrite the code in the house style
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

bench: setup  ## list the benchmarks and how to run one
	@for script in benchmarks/*.py; do \
		[ -e "$$script" ] || { echo "benchmarks/ holds no script"; break; }; \
		printf '.venv/bin/python %s\n' "$$script"; \
		sed -n '1s/^"""\([^"]*\).*/    \1/p' "$$script"; \
	done

clean:  ## remove caches and build folders (.venv and runs stay)
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
