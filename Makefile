# `make demo` and `make test` need Python 3.11 or newer and nothing else: what they use is installed first,
# into the active virtual environment, or into .venv where none is active.
PYTHON3 ?= python3
VENV := $(or $(VIRTUAL_ENV),.venv)
INSTALLED := $(VENV)/.scbert-installed
DOCS_INSTALLED := $(VENV)/.scbert-docs-installed
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST_ARGS ?=

.PHONY: demo test quality style benchmark mini docs clean install

demo: $(INSTALLED)
	$(VENV)/bin/scbert demo

# pytest by its own script: `python -m pytest` would put the bare folder names on the import path
test: quality
	$(VENV)/bin/pytest $(PYTEST_ARGS)

quality: $(INSTALLED)
	$(VENV)/bin/ruff format --check --quiet .
	$(VENV)/bin/ruff check --quiet .

style: $(INSTALLED)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

benchmark: $(INSTALLED)
	$(VENV)/bin/python benchmarks/tokenizer_speed.py
	$(VENV)/bin/python benchmarks/speed.py --output benchmarks/results
	$(VENV)/bin/python benchmarks/performer_library.py
	$(VENV)/bin/python benchmarks/annotate_speed.py
	$(VENV)/bin/python benchmarks/finetune_speed.py
	cp benchmarks/results/speed.png docs/speed.png
	$(VENV)/bin/python benchmarks/speed_report.py benchmarks/results/speed.json docs/performance.md

# the models that ship, from the folder of their cells: make mini DATA=cells (two hours on one core; scratch in build/)
mini: $(INSTALLED)
	$(VENV)/bin/python scripts/make_mini.py $(DATA) --work build/mini
	$(VENV)/bin/python scripts/study_effects.py $(DATA)
	mkdir -p build/mini_choose && cp model_cards/scbert-mini/* build/mini_choose
	$(VENV)/bin/python scripts/study_effects.py $(DATA) --model build/mini_choose --without choose
	$(VENV)/bin/python scripts/pretraining_effect.py $(DATA) --work build/mini_effect --cell-axes build/mini_choose
	$(VENV)/bin/python scripts/pretraining_effect.py $(DATA) --work build/mini_effect --release model_cards/scbert-mini
	$(VENV)/bin/python scripts/make_pbmc.py $(DATA) --work build/pbmc
	$(VENV)/bin/python scripts/make_tissue.py $(DATA) --work build/tissue

# the documentation reads the package from source, and needs a folder of its name whatever the clone is called
docs: $(DOCS_INSTALLED)
	mkdir -p build/docs && ln -sfn ../.. build/docs/scbert
	$(VENV)/bin/mkdocs build --strict

install: $(INSTALLED)

$(VENV)/pyvenv.cfg:
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $$($(PYTHON3) --version) was found: make PYTHON3=python3.11" >&2; exit 1; }
	$(PYTHON3) -m venv $(VENV)

$(INSTALLED): $(VENV)/pyvenv.cfg setup.cfg pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	@touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	$(PIP) --editable '.[docs]'
	@touch $@

clean:
	rm -rf build dist site demo *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
