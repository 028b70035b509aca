# README's commands. Everything runs in .venv, which the first of them makes.
PYTHON ?= python3
BIN := .venv/bin
SAMPLE := data/sample
FOLDERS := $(SAMPLE)/ILSVRC/Data/CLS-LOC

.PHONY: setup train lab test faults browser-test lint notebooks bench sample

setup: $(BIN)/.installed

train: sample
	$(BIN)/python scripts/train.py --data-dir $(FOLDERS) --backbone cspdarknet19 --recipe quick

lab: $(BIN)/.installed
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks/03_train_cspdarknet.ipynb

# The sample first: two notebooks at a time would draw it into one folder.
test: sample
	$(BIN)/pytest -n 2 -m "not faults and not browser"
	$(BIN)/pytest -n 2 --dist loadfile --nbval notebooks

faults: $(BIN)/.installed
	$(BIN)/pytest -n 2 -m faults tests

# Debian's Chromium with its driver, where they are missing; screenshots come into build/browser/.
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

bench: sample
	$(BIN)/python scripts/benchmark.py --data-dir $(FOLDERS)

# Drawn and sorted once; both commands do nothing where it is.
sample: $(BIN)/.installed
	$(BIN)/python -m utils.data.sample $(SAMPLE)
	$(BIN)/python scripts/imagenet.py --val_solution_path $(SAMPLE)/LOC_val_solution.csv --val_image_dir $(FOLDERS)/val

# Made last, so that an interrupted installation is taken up again.
$(BIN)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "error: Python %d.%d; needs 3.11 to 3.13: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --editable .
	touch $@
