# make train    set up, then train configs/small.py: a model and its samples in out/small, in about five minutes
# make test     set up, then run the tests
# make bench    set up, then run the benches

PYTHON ?= python3
BIN := .venv/bin

train: .venv/ready
	$(BIN)/python train.py --config small.py

test: .venv/ready-test
	$(BIN)/python -m pytest

bench: .venv/ready-test
	$(BIN)/python -m pytest bench

lint: .venv/ready-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# constraints.txt holds the versions that the tests passed with; pyproject.toml says what else should do.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nanofuse needs Python 3.11 or later; PYTHON=... names one")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt .
	touch $@

.venv/ready-test: .venv/ready
	$(BIN)/python -m pip install --quiet -c constraints.txt '.[test]'
	touch $@

clean:
	rm -rf .venv

.PHONY: train test bench lint clean
