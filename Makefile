# Needs only Python >= 3.11 and make. VENV and PYTHON may be given: make test VENV=/tmp/v
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FLAGS ?= --bits=4
ARTIFACT ?= all
ORACLE ?= .oracle
TORCH ?= .oracle-torch

# All cores; compiled programs are kept in .pytest_cache (`make test CLEAR=1` empties it).
PYTEST := -m pytest -n auto --dist=loadfile --no-loadscope-reorder --durations=20 \
  $(if $(CLEAR),--cache-clear)
SLOW := -m 'slow and not oracle' tests

.PHONY: run test lint default slow second test-slow coverage setup oracle oracle-torch bench \
  peers results docs notebooks sanitize neon wheel clean

run: setup            ## set up, then quantize the embedded OPT and print its table
	$(BIN)/python -m experiments.opt_ppl $(FLAGS)

test: setup lint default  ## set up, then lint, type-check and run the default suite

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

default: setup
	$(BIN)/python $(PYTEST) tests

test-slow: setup docs slow second  ## the site, the slow tests, the default suite on another Python

slow: setup
	$(BIN)/python $(PYTEST) $(SLOW)

second: setup         ## the default suite on another Python, if there is one
	@python=$$(.ci/second-python $(BIN)/python); if [ -n "$$python" ]; then \
	  echo "The default suite on a second Python, $$python:"; \
	  $(MAKE) default PYTHON="$$python" VENV=$(VENV)-second; \
	else \
	  echo "No second Python (3.12 or newer): the default suite ran on one alone."; \
	fi

# Lines of kashin_jax that ran, in subprocesses too. BEFORE is the figure of the suite
# that took 25 minutes, all tests of it.
BEFORE ?= unknown
coverage: setup       ## line coverage of the default suite, and of both suites
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run $(PYTEST) tests
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --format=total > .coverage-default
	$(BIN)/python -m coverage run $(PYTEST) $(SLOW)
	$(BIN)/python -m coverage combine --quiet --append
	$(BIN)/python -m coverage report
	@echo "Line coverage of kashin_jax, per cent:"
	@echo "  default suite            $$(cat .coverage-default)"
	@echo "  default and slow suites  $$($(BIN)/python -m coverage report --format=total)"
	@echo "  the suite before them    $(BEFORE)"

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py $(wildcard kashin_jax/csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[experiments,test]'
	touch $@

# Address and undefined-behaviour sanitizers, of GCC: every read of the CPU kernel.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -O1
sanitize: setup       ## the tests of the CPU kernel, compiled to check what it reads
	mkdir -p build
	library=$$($(BIN)/python tests/cpu_kernel_build.py build $(SANITIZE)) && \
	KASHIN_JAX_KERNEL_LIBRARY=$$library ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  $(BIN)/python -m pytest -n0 -q tests/test_cpu_kernel.py

# Debian's g++-aarch64-linux-gnu and qemu-user; 64-bit ARM with Linux
# needs neither: make neon ARM_CXX=c++ ARM_RUN=env
ARM_CXX ?= aarch64-linux-gnu-g++
ARM_RUN ?= qemu-aarch64
neon:                 ## the CPU kernel for 64-bit ARM, emulated: NEON, plain C++ and float64
	@for tool in $(ARM_CXX) $(ARM_RUN); do command -v $$tool > /dev/null || { \
	  echo "make neon needs $$tool (Debian: g++-aarch64-linux-gnu, qemu-user)" >&2; exit 1; }; done
	mkdir -p build
	$(ARM_CXX) $$(cat kashin_jax/csrc/flags.txt) -static -Ikashin_jax/csrc \
	  -isystem kashin_jax/csrc/third_party kashin_jax/csrc/*.cc tests/neon_parity.cc \
	  -o build/neon-parity
	$(ARM_RUN) build/neon-parity

wheel: setup          ## dist/: a wheel with the CPU kernel for this platform, and one without
	$(BIN)/python -m build --wheel
	KASHIN_JAX_KERNELS=off $(BIN)/python -m build --wheel

oracle: setup $(ORACLE)/.installed  ## compare with models of other packages, installed apart
	PYTHONPATH=$(ORACLE) $(BIN)/python -m pytest -m oracle tests/oracle

# Hugging Face's Flax models; mamba2-jax; tunix, with what its import asks for.
$(ORACLE)/.installed: Makefile $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target=$(ORACLE) \
	  transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2 \
	  requests urllib3 certifi charset-normalizer mamba2-jax==1.1.2 \
	  google-tunix==0.1.7 qwix==0.1.8 google-metrax==0.2.4 clu==0.0.12 wrapt==2.5.2 \
	  tensorboardX==2.6.5 sentencepiece==0.2.3 perfetto==0.59.1
	touch $@

oracle-torch: setup $(TORCH)/.harness  ## compare with Hugging Face's torch models, and lm-eval's of them
	PYTHONPATH=$(TORCH) $(BIN)/python -m pytest -m oracle tests/oracle_torch

$(TORCH):
	$(BIN)/python -m pip install --quiet --target=$(TORCH) \
	  --extra-index-url=https://download.pytorch.org/whl/cpu torch==2.13.0+cpu

# What lm-evaluation-harness needs of its own backend for torch models.
$(TORCH)/.harness: | $(TORCH)
	$(BIN)/python -m pip install --quiet --no-deps --target=$(TORCH) accelerate==1.15.0
	touch $@

bench: setup          ## time and memory of the decomposition, the coders and matmul
	$(BIN)/python -m benchmarks.core

# Releases that the committed record was made with.
peers: setup          ## other libraries' products of packed weights, for benchmarks.peers
	test -d .peers || $(BIN)/python -m pip install --quiet --no-deps --target=.peers \
	  onnxruntime==1.32.0 onnx==1.23.2 xllamacpp==2026.10.11549

# Hours; one file by ARTIFACT=table2_opt. Data that cannot be shipped: DATA=FOLDER.
results: setup        ## make the committed results again, and what is rendered of them
	$(BIN)/python -m experiments.make_results --only=$(ARTIFACT) --data_dir=$(DATA)
	$(BIN)/python -m experiments.render

docs: $(VENV)/.docs    ## build the site into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

notebooks: setup      ## run the notebooks and keep their outputs
	$(BIN)/python notebooks/execute.py

clean:
	rm -rf $(VENV) $(VENV)-second $(ORACLE) $(TORCH) .peers build site
