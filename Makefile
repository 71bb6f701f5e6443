# Every target sets up its own virtual environment in .venv when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: demo test test-slow check zoo bench bench-gpu schemas dist clean

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: $(INSTALLED)  ## the main job end to end on handwritten digits; writes demo/
	$(BIN)/python -m pipelines.demo

test: $(INSTALLED)  ## the tests, on the CPU, in two processes
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: $(INSTALLED)  ## tests that train, kill or measure
	$(BIN)/python -m pytest -q -m slow

check: $(INSTALLED)  ## format, lint, import contracts, strict types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini tests

zoo: $(INSTALLED)  ## every victim of the red team; needs runs/shards (python -m benchmarks.make_shards runs/shards)
	$(BIN)/python -m pipelines.red_team configs/red_team_*.yaml --results docs/results/red_team.csv --page docs/red_team.md

bench: $(INSTALLED)  ## throughput and memory beside their measured bounds
	$(BIN)/python -m benchmarks.scan
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.finetune

bench-gpu: $(INSTALLED)  ## every stage of a scan on a GPU, without Ray
	$(BIN)/python -m benchmarks.gpu

schemas: $(INSTALLED)  ## docs/schemas, made from the settings and records in the code
	$(BIN)/python -m sanitize.schemas docs/schemas

dist:  ## wheel and sdist in dist/, checked; needs nothing of what sanitize itself needs
	rm -rf dist build
	$(PYTHON) -m venv build/tools
	build/tools/bin/pip install --quiet --disable-pip-version-check build twine check-wheel-contents
	build/tools/bin/python -m build
	build/tools/bin/twine check --strict dist/*
	build/tools/bin/check-wheel-contents dist/*.whl

clean:
	rm -rf $(VENV) demo runs build dist *.egg-info
