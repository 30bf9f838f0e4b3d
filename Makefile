# make run                  train the main system in its quickest form, on this machine
# make run CONFIG=configs/supervised_isic_small.yaml ARGS="engine.iterations=50"
# make test                 the tests; make check adds lint and types
# make test-processors      the numerical ones with the kernels of other processors, as a table
# make gpu                  whether everything holds on this machine's GPU, and how fast: nine minutes
#
# Every target first sets up .venv, which needs nothing but make and a Python 3.11 to
# 3.13 with pip and venv. With PYTHON=python3.12 it is of that Python, and made anew
# where it was of another. Package indexes come from UV_* or, where those aren't set,
# from PIP_INDEX_URL, PIP_EXTRA_INDEX_URL and PIP_FIND_LINKS.

PYTHON ?= python3
CONFIG ?= configs/e2eaug_isic_small_quick.yaml
ARGS ?=
TEST_WORKERS ?= 2

BIN := .venv/bin
STAMP := .venv/.installed
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
VERSION := import platform; print(platform.python_version())

# A Python that was asked for is taken or refused; else the first that serves is taken,
# and a .venv that is there stays.
ifeq ($(origin PYTHON),file)
PYTHONS := $(PYTHON) python3.13 python3.12 python3.11
else
PYTHONS := $(PYTHON)
IN_VENV := $(if $(wildcard $(BIN)/python),$(shell $(BIN)/python -c '$(VERSION)'))
ifneq ($(IN_VENV),)
ifneq ($(IN_VENV),$(shell $(PYTHON) -c '$(VERSION)' 2>/dev/null))
ANEW := yes
.PHONY: $(BIN)/uv
endif
endif
endif

# uv reads none of pip's settings, and it is uv that installs all but itself.
comma := ,
space := $(subst ,, )
ifeq ($(UV_DEFAULT_INDEX)$(UV_INDEX_URL),)
ifneq ($(PIP_INDEX_URL),)
export UV_DEFAULT_INDEX := $(PIP_INDEX_URL)
endif
endif
ifeq ($(UV_INDEX)$(UV_EXTRA_INDEX_URL),)
ifneq ($(PIP_EXTRA_INDEX_URL),)
export UV_INDEX := $(PIP_EXTRA_INDEX_URL)
endif
endif
ifeq ($(UV_FIND_LINKS),)
ifneq ($(PIP_FIND_LINKS),)
export UV_FIND_LINKS := $(subst $(space),$(comma),$(PIP_FIND_LINKS))
endif
endif
ifeq ($(SSL_CERT_FILE),)
ifneq ($(PIP_CERT),)
export SSL_CERT_FILE := $(PIP_CERT)
endif
endif

.PHONY: install run test test-processors gpu lint format types docs check clean
.DEFAULT_GOAL := install

install: $(STAMP)

run: $(STAMP)
	@$(BIN)/python -m mlseg.run $(CONFIG) $(ARGS)

# One thread per worker: the networks of the tests are too small to share out. Neighbours stay in one
# process, so that what they share is made once. Bytecode is written also where Python is told to write
# none: each of the tests' some hundred processes would compile the same modules.
test: $(STAMP)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_WORKERS) \
		--dist worksteal $(ARGS)

test-processors: $(STAMP)
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python tests/processors.py --cores $(TEST_WORKERS) $(ARGS)

gpu: $(STAMP)
	@$(BIN)/python benchmarks/gpu.py $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy can't follow package_dir, so it checks links that stand as the installed package
# does; sed turns its paths back into the repository's.
CHECKED := benchmarks examples tests
LINKED := rm -rf build/types && mkdir -p build/types/mlseg && \
	ln -s $(CURDIR)/mlseg/* $(CURDIR)/problems $(CURDIR)/engines build/types/mlseg && \
	ln -s $(CHECKED:%=$(CURDIR)/%) build/types
types: $(STAMP)
	@$(LINKED)
	@cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.mypy_cache mlseg $(CHECKED) >report; status=$$?; \
	sed -e 's#^mlseg/problems/#problems/#' -e 's#^mlseg/engines/#engines/#' report; exit $$status

# The site, in build/site; a warning is an error.
docs: $(STAMP)
	@$(LINKED)
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(BIN)/mkdocs build --quiet

check: lint types test

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# uv, not pip: pip heeds betty-ml's "Python below 3.11" and falls back to a broken 0.1.1.
# The import at the end checks the result and leaves it compiled, also where Python is
# told to write no bytecode: each run, and each of the tests' processes, would compile them anew.
#
# A distribution "mlseg" is an old install of this one or, on the public index, a stranger's.
$(STAMP): setup.py setup.cfg pyproject.toml constraints.txt $(BIN)/uv
	@$(BIN)/uv pip uninstall --quiet --python $(BIN)/python mlseg && rm -rf mlseg.egg-info
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraints constraints.txt \
		--build-constraints constraints.txt --editable '.[dev]'
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -W ignore -c \
		'import mlseg.run, mlseg.predict, scipy.ndimage, scipy.spatial, torchmetrics, \
			torch._dynamo, torch.utils.tensorboard'
	@touch $@

$(BIN)/uv:
	@if test -n "$(ANEW)" || ! test -x $(BIN)/python; then \
		for python in $(PYTHONS); do \
			if $$python -c '$(SUPPORTED)' 2>/dev/null; then found=$$python; break; fi; \
		done; \
		if test -z "$$found"; then \
			echo "mlseg needs Python 3.11 to 3.13, and '$(PYTHON)' is" \
				"$$($(PYTHON) --version 2>/dev/null || echo missing);" \
				"name one with: make PYTHON=/path/to/python3.12" >&2; exit 1; \
		fi; \
		if test -n "$(ANEW)"; then \
			echo ".venv has Python $(IN_VENV): made anew with $$($$found --version)" >&2; \
			rm -rf .venv; \
		fi; \
		$$found -m venv .venv >/dev/null || { rm -rf .venv; \
			echo "$$found can't make a virtual environment; on Debian and Ubuntu install" \
				"its package python3-venv" >&2; exit 1; }; \
	elif ! $(BIN)/python -c '$(SUPPORTED)'; then \
		echo "mlseg needs Python 3.11 to 3.13, and .venv has $$($(BIN)/python --version);" \
			"remove it with: make clean" >&2; exit 1; \
	fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
