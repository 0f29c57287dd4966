# Each target does its own set-up: a .venv from requirements.lock, with Python 3.11 or newer.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test chaos check lint types lock clean

demo: .venv/ready
	$(BIN)/shard2vec demo

test: .venv/ready
	$(BIN)/pytest

# Kills, faults, races and rubbish, for about an hour; `make test` has a few of each.
chaos: .venv/ready
	$(BIN)/python tests/chaos.py

check: lint types test

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy pipeline jobs

.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# Names, versions and hashes of everything that is run and tested here; no addresses. Needs uv.
lock:
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--extra dev pyproject.toml --output-file requirements.lock

clean:
	rm -rf .venv demo
