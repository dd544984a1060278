# make train    set up, then train configs/small.py: writes a model and samples to out/small in about five minutes
# make test     set up, then run the tests
# make gate     set up, then cross-compile the kernels for all supported GPUs, with each version of Triton in TRITONS
# make bench    set up, then run the benchmarks
# make gpu      on a GPU, in the current environment: kernel tests, training steps, benchmarks and tuning, in five minutes

PYTHON ?= python3
RESULTS ?= out/bench
BIN := .venv/bin
TRITONS := 3.6.0 3.7.1 3.9.0

train: .venv/ready
	$(BIN)/python train.py --config small.py

test: .venv/ready-test
	$(BIN)/python -m pytest -n auto --dist worksteal

gate: $(TRITONS:%=.venv/triton-%)
	for triton in $^; do PYTHONPATH=$$triton $(BIN)/python -m bench.compile || exit 1; done

.venv/triton-%: .venv/ready
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==$*

bench: .venv/ready-test
	$(BIN)/python -m pytest bench

gpu:
	$(PYTHON) -m bench.gpu --results $(RESULTS)

lint: .venv/ready-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# constraints.txt pins the versions that the tests passed with; pyproject.toml has the supported ranges.
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

.PHONY: train test gate bench gpu lint clean
