# make train    set up, then train a model that suits this machine: writes it and samples to out/ in about five minutes
# make test     set up, then run the tests
# make gate     set up, then cross-compile the kernels for all supported GPUs, with each version of Triton in TRITONS
# make bench    set up, then run the benchmarks
# make oldest   set up the oldest versions that pyproject.toml allows, then run some tests with them
# make gpu      on a GPU, in the current environment: kernel tests, training steps, benchmarks and tuning, in five minutes

# TORCH=cu126 or another of download.pytorch.org's indexes takes torch from there; runtime/install.py chooses otherwise.

PYTHON ?= python3
RESULTS ?= out/bench
BIN := .venv/bin
TRITONS := 3.6.0 3.7.1 3.9.0
OLDEST := $(addprefix tests/test_,config.py optim.py checkpoint.py tokenizer.py corpora.py micro_batch.py plan.py train.py)

train: .venv/ready
	$(BIN)/python train.py

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
	$(PYTHON) -P runtime/install.py .venv
	touch $@

.venv/ready-test: .venv/ready
	$(PYTHON) -P runtime/install.py .venv test experiments kernels parquet gguf
	touch $@

oldest: .venv-oldest/ready
	.venv-oldest/bin/python -m pytest -q $(OLDEST)

.venv-oldest/ready: pyproject.toml
	$(PYTHON) -P runtime/install.py --oldest .venv-oldest test kernels parquet
	touch $@

clean:
	rm -rf .venv .venv-oldest

.PHONY: train test gate bench oldest gpu lint clean
