# make demo: a fleet of unequal devices fine-tunes a real model on this machine
# make test: the test suite, by WORKERS processes, each of which takes a file of tests at a time;
# three keep two cores busy, as tests of deployments wait for other processes
# bytecode is kept whatever the environment says, as tests start hundreds of processes
# make slow: tests that take long, one after the other; full disks and slow links ask for root

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 3

.PHONY: demo test slow lint clean

demo: $(VENV)/.installed
	$(BIN)/python -m simulations.demo

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

slow: $(VENV)/.installed
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(BIN)/python -m simulations.flower_env
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
