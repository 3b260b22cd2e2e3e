# Two commands matter: "make book" and "make test". Both need Python >= 3.11, git and make, no more.
# "make help" prints the targets with what stands after "##", in groups that "##@" begins, and the settings.

SHELL := /bin/bash
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOG := $(VENV)/pytest.log
FIRST_PAGE := _build/html/index.html

# One thread for each process: small tensors on two busy threads are slower than on one.
export OMP_NUM_THREADS := 1
export OMP_WAIT_POLICY := PASSIVE
export MKL_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1

.DEFAULT_GOAL := help
.PHONY: help venv book test lint types pytest browser check notebooks spread experiments format clean

##@ Begin here (each makes .venv first, 6.1 GB on Linux; README.md says how to take less)

help: ## Show this list
	@awk -F ':.*## ' '/^##@ / {printf "\n%s\n", substr($$0, 5)} \
	  /^[a-z0-9-]+:.*## / {printf "  make %-20s%s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\n%s\n' 'Settings, to be added to any of them'
	@printf '  %-25s%s\n' 'PYTHON=python3.12' 'the Python that .venv is made with' \
	  'CONSTRAINTS=FILE' 'the versions to install; constraints-lowest.txt has the lowest allowed' \
	  'ROBUSTOOD_ISA=oldest' 'another arithmetic: avx2 (default), oldest or native' \
	  'ROBUSTOOD_DATA=FOLDER' 'where packs of photographs lie (default data/cache); tests that lack one are skipped'

venv: $(STAMP) ## Make .venv and install everything into it

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "robustood needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e ".[book,test]"
	@touch $@

book: $(STAMP) ## Build the book as web pages
	$(BIN)/jupyter-book build -W -n --keep-going .
	@test -f $(FIRST_PAGE)
	@echo "The first page: $(FIRST_PAGE)"

test: lint types pytest ## Lint, types, unit tests and every notebook

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(STAMP)
	$(BIN)/ty check

pytest: $(STAMP)
	@set -o pipefail; $(BIN)/pytest --nbval -n 2 --dist loadfile | tee $(LOG)

##@ Before a change goes in

browser: $(STAMP) ## What looks at the built pages: Playwright and, where apt may install it, chromium
	$(BIN)/python -m pip install -q playwright==1.65.2 axe-playwright-python==0.1.8
	@command -v chromium > /dev/null || { test "$$(id -u)" = 0 && command -v apt-get > /dev/null && \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium > /dev/null; } || \
	  echo "no chromium: the tests in tests/browser will be skipped until one is on the path"

check: browser ## The slow suites, other libraries, all pages, and the notebooks in every arithmetic
	$(BIN)/python -m pip install -q --no-deps torchattacks==3.5.1 pytorch-ood==0.4.0 pyautoattack==0.2.0 \
	  foolbox==3.3.4 eagerpy==0.30.0 GitPython==3.2.1 gitdb==4.0.12 smmap==5.0.3 timm==1.0.31
	$(BIN)/pytest tests -m "slow or oracle" -n 2 --dist worksteal
	for isa in native oldest; do ROBUSTOOD_ISA=$$isa $(BIN)/pytest --nbval -n 2 --dist loadfile book || exit 1; done
	for each in attacks training aloe metrics detectors standard; do $(BIN)/python tests/benchmarks/bench_$$each.py || exit 1; done

notebooks: $(STAMP) ## Execute the notebooks whose source or modules changed
	$(BIN)/python book/_tools/refresh.py --stale

spread: $(STAMP) ## Measure how far printed numbers move with the arithmetic, where cells are new
	$(BIN)/python book/_tools/spread.py --stale

##@ Measure tables again

experiments: $(STAMP) ## List the tables that the book shows, or measure some again: NAME=digits_trades AGAIN=--again
	$(BIN)/python -m experiments $(NAME) $(AGAIN)

##@ Tidy up

format: $(STAMP) ## Format the code; notebooks are formatted when they are refreshed
	$(BIN)/ruff check --fix --exclude '*.ipynb' .
	$(BIN)/ruff format --exclude '*.ipynb' .

clean: ## Remove what was built (not .venv)
	rm -rf _build .pytest_cache .ruff_cache .hypothesis dist *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
