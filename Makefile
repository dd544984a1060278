# make train    set up, then train configs/small.py: a model and its samples in out/small, in about five minutes
# make test     set up, then run the tests
# make bench    set up, then run the benches
# make gpu      on a GPU, with what is installed: the kernels' tests, their bench and a short training run

PYTHON ?= python3
RESULTS ?= bench/results
BIN := .venv/bin

train: .venv/ready
	$(BIN)/python train.py --config small.py

test: .venv/ready-test
	$(BIN)/python -m pytest -n auto --dist worksteal

bench: .venv/ready-test
	$(BIN)/python -m pytest bench

gpu:
	$(PYTHON) -m bench.gpu --results $(RESULTS)

lint: .venv/ready-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# constraints.txt holds the versions that the tests passed with; pyproject.toml says what else should do.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nanofuse needs Python 3.11 or later; PYTHON=... names one")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt .
	touch $@

.venv/ready-test: .venv/ready
	$(BIN)/python -m pip install --quiet -c constraints.txt '.[test,experiments]'
	touch $@

clean:
	rm -rf .venv

.PHONY: train test bench gpu lint clean
