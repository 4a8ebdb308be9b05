# All targets install into .venv first.
# make demo: localise a simulated drive; RIG=six: with six cameras; MODEL=ccvpe-pinhole-small: with that model.
# make demo-adapt: record, adapt, and swap the weights on the running node; RIG and MODEL as for make demo.
# make test: the tests, in minutes.   make test-slow: those that take longer.   make lint: ruff and mypy.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: demo demo-adapt test test-slow lint clean

# A file's tests share their fixtures, so a file stays with one worker. One worker more than there are cores, since
# tests of nodes wait a lot; each takes about 1 GB.
WORKERS := $(shell echo $$(($$(nproc) + 1)))
PYTEST := $(VENV)/bin/python -m pytest --numprocesses $(WORKERS) --maxprocesses 4 --dist loadfile

demo: $(STAMP)
	$(VENV)/bin/python -m xview_loc.demo.localize $(if $(RIG),--rig $(RIG)) $(if $(MODEL),--model $(MODEL))

demo-adapt: $(STAMP)
	$(VENV)/bin/python -m xview_loc.demo.adapt $(if $(RIG),--rig $(RIG)) $(if $(MODEL),--model $(MODEL))

test: $(STAMP)
	$(PYTEST) -m "not slow"

test-slow: $(STAMP)
	$(PYTEST) -m slow

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# torch goes first and exactly: a range takes gigabytes of CUDA libraries.
$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "xview_loc needs Python 3.10 or newer: set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null \
	  || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq python3-venv; } \
	  || { echo "Python's venv module is missing: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q torch==2.13.0
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[ros,dev]'
	@touch $@

clean:
	rm -rf $(VENV) demo_output build install log *.egg-info
