# make study [STUDY=quick] [DATA=folder] [RUNS=folder] [PROFILE=slurm]   compute a study: a name in studies/, or a path
#                                          to a YAML file; here, or as docs/grid.md says on a cluster
# make test [SLOW=1]                       lint and run the tests; SLOW: those of minutes too
# make lab                                 open the notebooks
# make bench                               measure speed, beside the figures to reach
# make coverage [SLOW=1]                   which lines no test runs, in any process: half an hour
# make site [EXECUTE=0]                    docs and executed notebooks as pages: runs/site/index.html
# Each makes the environment first, in .venv, with the versions of constraints.txt.

STUDY ?= quick
DATA ?= $(FMSAM_DATA)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TESTS = -m pytest -n auto --dist loadfile --no-loadscope-reorder $(if $(SLOW),,-m "not slow")
export FMSAM_DATA := $(if $(DATA),$(shell $(PYTHON) -c 'import os, sys; print(os.path.abspath(os.path.expanduser(sys.argv[1])))' "$(DATA)"),)

.PHONY: study test coverage lab bench site lint clean

study: $(VENV)/ready
	$(BIN)/python -m fmsam_lib.study "$(STUDY)" $(if $(RUNS),--runs "$(RUNS)") $(if $(PROFILE),--profile "$(PROFILE)")

test: lint $(VENV)/peers
	$(BIN)/python $(TESTS)

coverage: $(VENV)/peers
	$(BIN)/python -m pip install --quiet --disable-pip-version-check coverage
	-$(BIN)/python -m coverage run $(TESTS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --show-missing --skip-covered

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell *.md docs fmsam_lib notebooks benchmarks studies tests

lab: $(VENV)/ready
	$(BIN)/python -m jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks

bench: $(VENV)/peers # writes benchmarks/*.csv
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

# Minutes the first time. A notebook that has not changed is not executed again (rm -r runs/site-executed: all are);
# EXECUTE=0 executes none.
site: $(VENV)/site
	FMSAM_HEADLESS=1 $(BIN)/python -m sphinx -W --keep-going -n -q $(if $(filter 0,$(EXECUTE)),-D nb_execution_mode=off) -c docs . runs/site
	@echo "runs/site/index.html"

clean: # the environment and the caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .snakemake

$(VENV)/ready: pyproject.toml constraints.txt profiles/jupyter/overrides.json
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"error: expected Python 3.11 or newer, got {sys.version.split()[0]}: make PYTHON=/path/to/python3.11 ...")'
	@echo "setting up $(VENV): a few minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ants,test]'
	@mkdir -p $(VENV)/share/jupyter/lab/settings
	@cp profiles/jupyter/overrides.json $(VENV)/share/jupyter/lab/settings/ # no question about news
	@touch $@

# What tests and benchmarks compare with. Without their dependencies, which bring a second torch; see benchmarks/peers.py.
$(VENV)/peers: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt icon-registration unigradicon pytorch_optimizer
	@touch $@

$(VENV)/site: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[site]'
	@touch $@
