# A fresh machine needs Python 3.10 or newer and make; everything else goes into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE = 1
export PYTHONSAFEPATH = 1

.PHONY: demo test readers quick lint check clean

demo: $(VENV)/.installed  ## quantize a trained pipeline to 4 bits, sample from it, compare it with the original
	PATH="$(abspath $(BIN)):$$PATH" sh scripts/demo

test: $(VENV)/.installed-dev  ## the whole test suite, file by file on all cores
	$(BIN)/python -m pytest -n auto --dist loadfile

readers: $(VENV)/.readers  ## exports read by other libraries, which the other tests do without: diffusers imports some at once
	PYTHONPATH=$(VENV)/readers $(BIN)/python -m pytest tests/export -k "quanto or torchao or bitsandbytes or openvino"

lint: $(VENV)/.installed-dev  ## format, lint, types
	PATH="$(abspath $(BIN)):$$PATH" sh scripts/lint

quick: $(VENV)/.installed-dev  ## the tests that take less than a few seconds each
	$(BIN)/python -m pytest -m "not slow"

check: $(VENV)/.installed-dev  ## the whole gate: lint and test
	PATH="$(abspath $(BIN)):$$PATH" sh scripts/check

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -qq -c constraints.txt -e ".[dev,train]"
	touch $@

$(VENV)/.readers: $(VENV)/.installed-dev
	$(BIN)/python -m pip install -qq -c constraints.txt --no-deps --target $(VENV)/readers optimum-quanto bitsandbytes torchao ninja openvino
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
