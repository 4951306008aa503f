# make demo    run the shipped model on the shipped photos; results in out/demo (no PyTorch needed)
# make test    all tests that need no GPU;                 PYTEST_ARGS="-k name -n 2" narrows or spreads them
# make lint    style and format;   make types    static types;   make check    all of these
# make demo-model PORTRAITS=portraits.tar   train the demo model again (100 minutes on two cores), export and measure it
# make cpu-table GOLDEN=DIRECTORY   the table of speed, quality and memory in benchmarks/results/cpu.* (an hour or two)
# make gpu-table GOLDEN=DIRECTORY   the same on a GPU, in benchmarks/results/<device>/
# make clean   remove the environment, the results and the caches
#
# All targets share the environment .venv, which they make with $(PYTHON) and fill with the versions in constraints.txt.
# The development environment holds PyTorch. On Linux, the public index serves its CUDA build, several GB. For the much
# smaller CPU build, name PyTorch's index for it:  PIP_EXTRA_INDEX_URL=<index of CPU builds> make test

PYTHON ?= python3
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test lint types check demo-model cpu-table gpu-table clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

demo: $(VENV)/.installed-run
	$(BIN)/restyle-deploy bench engines/demo-faces examples/photos -o out/demo --steps 1,2,3,5,10

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not gpu" $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.installed-dev
	$(BIN)/mypy

check: lint types test

# Keeping freed memory saves a third of the training time: tensors of 10 MB would be mapped and zeroed anew each time.
demo-model: $(VENV)/.installed-dev
	@test -f "$(PORTRAITS)" || { echo "name the archive: make demo-model PORTRAITS=portraits.tar" >&2; exit 1; }
	mkdir -p out
	MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=200000000 \
	    $(BIN)/python -m examples.demo_model.train "$(PORTRAITS)" out/demo-faces.pt
	$(BIN)/restyle-deploy export out/demo-faces.pt -o engines/demo-faces --overwrite
	$(BIN)/python -m benchmarks.demo_faces "$(PORTRAITS)"

# Without GOLDEN, which holds the weights of the official architectures, the table has the demo model only.
cpu-table: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.cpu $(if $(GOLDEN),--golden "$(GOLDEN)") --work out/cpu

# On a machine with a GPU; GOLDEN as above.
gpu-table: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.gpu $(if $(GOLDEN),--golden "$(GOLDEN)") --work out/gpu

clean:
	rm -rf $(VENV) out dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip comes last into a new environment, so an interrupted one is completed by the next run.
$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { \
	    echo "$(PYTHON) was not found; install Python 3.10 or later, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "Python 3.10 or later is needed, but $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	         "name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) has no venv module; install it (Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-run: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing what running needs into $(VENV) (about a minute)"
	@$(INSTALL) --editable '.[bench,onnxruntime]'
	@touch $@

# The development environment holds all that running needs.
$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing the development environment into $(VENV) (some minutes)"
	@$(INSTALL) --editable '.[dev]'
	@touch $(VENV)/.installed-run $@
