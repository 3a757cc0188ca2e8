# Everything runs from .venv, which each target sets up by itself on a machine with
# python3 (3.11 or newer), its headers and venv module, and a C compiler.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

MODULES := $(sort $(wildcard fluxres/*.py fluxres/*/*.py shell/fluxres_shell/*.py fluxres/status/page/* fluxres/status/page/vendor/*))

.PHONY: demo test check bench venv clean FORCE

venv: $(STAMP)

# Installed strictly editable: links to the sources, and no import hook that every command would pay for. So the
# set of modules is a dependency, their contents are not.
$(VENV)/.modules: FORCE
	@mkdir -p $(VENV)
	@echo '$(MODULES)' | cmp -s - $@ || echo '$(MODULES)' >$@

$(STAMP): pyproject.toml setup.py csrc/pidfd.c csrc/pidfd.h csrc/build_pidfd.py $(VENV)/.modules
	@command -v $(PYTHON) >/dev/null || { echo "make: cannot set up .venv: python3 is missing (Debian: apt-get install python3)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: cannot set up .venv: $$($(PYTHON) --version) is too old, 3.11 or newer is needed"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "make: cannot set up .venv: the venv module is missing (Debian: apt-get install python3-venv)"; exit 1; }
	@command -v $${CC:-cc} >/dev/null || { echo "make: cannot build csrc/: no C compiler (Debian: apt-get install gcc libc6-dev)"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' || { echo "make: cannot build csrc/: Python.h is missing (Debian: apt-get install python3-dev)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --config-settings editable_mode=strict
	@$(BIN)/python -m compileall -q build/__editable__*  # also where the environment says not to write bytecode
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests/unit tests/system tests/sim examples csrc setup.py
	$(BIN)/mypy -p tests.bench
	$(BIN)/python -m pytest tests/unit/test_imports.py

bench: $(STAMP)
	$(BIN)/python -m tests.bench

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
