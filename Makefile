# Every command runs in .venv, which `make setup` creates.
PYTHON ?= python3
BIN := .venv/bin
SAMPLE := data/sample
FOLDERS := $(SAMPLE)/ILSVRC/Data/CLS-LOC

.PHONY: setup train lab test faults browser-test lint notebooks bench bounds sample

setup: $(BIN)/.installed

train: sample
	$(BIN)/python scripts/train.py --data-dir $(FOLDERS) --backbone cspdarknet19 --recipe quick

lab: $(BIN)/.installed
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks/03_train_cspdarknet.ipynb

test: sample
	$(BIN)/pytest -n 2 -m "not faults and not browser"
	$(BIN)/pytest -n 2 --dist loadfile --nbval notebooks

faults: $(BIN)/.installed
	$(BIN)/pytest -n 2 -m faults tests

# Installs Chromium and its driver on Debian if they are missing. Screenshots are in build/browser/.
browser-test: $(BIN)/.installed
	command -v chromium && command -v chromedriver || { \
	  command -v apt-get && [ "$$(id -u)" = 0 ] || \
	  { echo "error: needs chromium and chromedriver; Debian's root can install them by apt-get" >&2; exit 1; }; \
	  apt-get update && apt-get install --yes --no-install-recommends chromium chromium-driver; }
	$(BIN)/pytest -m browser tests

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

notebooks: $(BIN)/.installed
	$(BIN)/python scripts/run_notebooks.py

bench: $(BIN)/.installed
	$(BIN)/python scripts/benchmark.py

# The tests with the lowest versions that pyproject.toml allows, in an environment of 5 GB.
bounds: sample
	$(PYTHON) -m venv --clear build/bounds
	build/bounds/bin/python -m pip install --disable-pip-version-check uv
	build/bounds/bin/uv pip install --python build/bounds/bin/python --resolution lowest-direct --editable '.[lab,test]'
	build/bounds/bin/python -m pytest -m "not faults and not browser" tests

# Both commands do nothing if the sample exists and is sorted.
sample: $(BIN)/.installed
	$(BIN)/python -m utils.data.sample $(SAMPLE)
	$(BIN)/python scripts/imagenet.py --val_solution_path $(SAMPLE)/LOC_val_solution.csv --val_image_dir $(FOLDERS)/val

# Created last, so that an interrupted installation is repeated.
$(BIN)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "error: Python %d.%d; needs 3.11 to 3.13: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --editable .
	touch $@
