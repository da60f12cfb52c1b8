# Needs only Python >= 3.11 and make. VENV and PYTHON may be given: make test VENV=/tmp/v
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FLAGS ?= --bits=4
ARTIFACT ?= all
ORACLE ?= .oracle

.PHONY: run test setup check oracle bench results docs notebooks clean

run: setup            ## set up, then quantize the embedded OPT and print its table
	$(BIN)/python -m experiments.opt_ppl $(FLAGS)

test: setup           ## set up, then lint, type-check and run every test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --nbmake -n auto --dist=loadfile \
	  --no-loadscope-reorder notebooks tests

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[experiments,test]'
	touch $@

oracle: setup         ## compare with Hugging Face's Flax models, installed apart
	test -d $(ORACLE) || $(BIN)/python -m pip install --quiet --no-deps --target=$(ORACLE) \
	  transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2 \
	  requests urllib3 certifi charset-normalizer mamba2-jax==1.1.2
	PYTHONPATH=$(ORACLE) $(BIN)/python -m pytest -m oracle tests/oracle

bench: setup          ## time and memory of the decomposition, the coders and matmul
	$(BIN)/python -m benchmarks.core

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
	rm -rf $(VENV) $(ORACLE) site
