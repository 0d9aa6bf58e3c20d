# make: says what there is. Everything runs in .venv, which is made once and again when the pins change.
PYTHON ?= python3
WORKERS ?= 2
# cpu: PyTorch without CUDA, which is most of what is fetched; or another name that `uv pip --torch-backend` knows
TORCH ?=
# options for JupyterLab, such as LAB="--no-browser --port 8890"
LAB ?=
BIN := .venv/bin
NOTEBOOKS = $(wildcard notebooks/*.ipynb notebooks/bonus/*.ipynb solutions/*.ipynb exercises/*.ipynb)

# Worker processes with one thread each are faster than workers that fight for the same cores.
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q --tb=short -n $(WORKERS)

help:
	@echo "make course   run every notebook, without a window, and print the results"
	@echo "make test     lint, unit tests, notebooks"
	@echo "make lab      open the course in JupyterLab, at lesson 00"
	@echo "make site     the course as web pages, with a bridge that runs in the browser"
	@echo "make progress list which exercises are done"
	@echo "make exercises  make exercises/ anew from solutions/"
	@echo "Each sets up .venv first if need be (a few minutes, once). PYTHON=python3.12 picks the interpreter."
	@echo "On Linux without an NVIDIA GPU add TORCH=cpu the first time: most of what is fetched is for such GPUs."

course: .venv/stamp
	@echo "course: run every notebook; executed copies go to runs/course"
	@$(BIN)/python -m minblip2.course.run

test: .venv/stamp
	@echo "test: lint, unit tests, notebooks"
	@$(BIN)/ruff check .
	@$(PYTEST) --dist loadfile
ifneq ($(NOTEBOOKS),)
	@echo "test: every notebook, looking at the bridge that ships or at your own in runs/scenes"
	@$(BIN)/python -c "from minblip2.course.lesson import prepare; prepare()"
	@$(PYTEST) --dist loadscope --nbval-lax --nbval-current-env --nbval-cell-timeout=300 $(NOTEBOOKS)
endif

exercises: .venv/stamp
	@$(BIN)/python exercises/make.py

site: .venv/stamp
	@echo "site: the course as web pages, with the live bridge, in site/html"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[site]'
	@$(BIN)/python -m minblip2.course.site

progress: .venv/stamp
	@$(BIN)/python exercises/progress.py

lab: .venv/stamp
	@echo "lab: open lesson 00 in JupyterLab; stop it with Ctrl-C"
	@$(BIN)/jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks/00_the_bridge.ipynb $(LAB)

# The lock is the shell's and dies with it, so two makes at once are safe and a killed one leaves nothing to clean up.
# uv knows where PyTorch keeps its builds for each device, and takes all else from where pip would.
.venv/stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("minBLIP-2 needs Python 3.10 or newer, this is " + sys.version.split()[0] \
		+ ": name one with make PYTHON=...") if sys.version_info < (3, 10) else None'
	@exec 9>.venv.lock; $(PYTHON) -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'; \
	[ $@ -nt pyproject.toml ] && [ $@ -nt constraints.txt ] && exit 0; \
	$(PYTHON) minblip2/course/setup_size.py "$(TORCH)"; \
	$(PYTHON) -m venv .venv && \
	if [ -n "$(TORCH)" ]; then \
		$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt uv && \
		$(BIN)/python -m uv pip install -q --python $(BIN)/python --torch-backend=$(TORCH) -c constraints.txt \
			-e '.[course,test]'; \
	else \
		$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[course,test]'; \
	fi && touch $@

.PHONY: help course test exercises progress lab site
.DEFAULT_GOAL := help
