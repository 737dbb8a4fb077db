# make quickstart   set up, train a dictionary on a real model, measure it, show it
# make test         set up, run every test
# make check        lint, format, types

PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
WORKERS ?= 2
export VENV

.PHONY: quickstart test check format install clean

quickstart:
	@$(PYTHON) scripts/install.py demo
	@$(VENV)/bin/python scripts/quickstart.py --run.folder $(RUN)

test:
	@$(PYTHON) scripts/install.py demo dev triton36
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal

check:
	@$(PYTHON) scripts/install.py demo dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

format:
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info
