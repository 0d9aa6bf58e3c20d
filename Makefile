# make: says what there is. Everything runs in .venv, which is made once and again when the pins change.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
NOTEBOOKS = $(wildcard notebooks/*.ipynb solutions/*.ipynb exercises/*.ipynb)

# Worker processes with one thread each are faster than workers that fight for the same cores.
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -n $(WORKERS)

help:
	@echo "make course   run every notebook, without a window, and print the results (20 to 25 minutes on 2 cores, then 8)"
	@echo "make test     lint, unit tests, notebooks (25 to 30 minutes the first time on 2 cores, then 10)"
	@echo "make lab      open the course in JupyterLab"
	@echo "make progress list which exercises are done"
	@echo "make exercises  make exercises/ anew from solutions/"
	@echo "Each sets up .venv first if need be (a few minutes, once). PYTHON=python3.12 picks the interpreter."

course: .venv/stamp
	@echo "course: run every notebook; executed copies go to runs/course (20 to 25 minutes on 2 cores, then 8)"
	@$(BIN)/python -m minblip2.course.run

test: .venv/stamp
	@echo "test: lint, unit tests, notebooks (25 to 30 minutes the first time on 2 cores, then 10)"
	@$(BIN)/ruff check .
	@$(PYTEST) --dist loadfile
ifneq ($(NOTEBOOKS),)
	@echo "test: train the bridge that the notebooks look at (about 15 minutes, once; kept in runs/scenes)"
	@$(BIN)/python -m minblip2 train
	@$(PYTEST) --dist loadscope --nbval-lax --nbval-current-env --nbval-cell-timeout=300 $(NOTEBOOKS)
endif

exercises: .venv/stamp
	@$(BIN)/python exercises/make.py

progress: .venv/stamp
	@$(BIN)/python exercises/progress.py

lab: .venv/stamp
	@echo "lab: open the course in JupyterLab; stop it with Ctrl-C"
	@$(BIN)/jupyter lab --notebook-dir=.

# The lock is the shell's and dies with it, so two makes at once are safe and a killed one leaves nothing to clean up.
.venv/stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("minBLIP-2 needs Python 3.10 or newer, this is " + sys.version.split()[0] \
		+ ": name one with make PYTHON=...") if sys.version_info < (3, 10) else None'
	@exec 9>.venv.lock; $(PYTHON) -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'; \
	[ $@ -nt pyproject.toml ] && [ $@ -nt constraints.txt ] && exit 0; \
	echo "setup: install the pinned packages into .venv (once; minutes, PyTorch is the large one)"; \
	$(PYTHON) -m venv .venv && \
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[course,test]' && touch $@

.PHONY: help course test exercises progress lab
.DEFAULT_GOAL := help
