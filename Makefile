# Two commands do everything on a bare machine (python3, a C++ compiler, make):
#   make bench    set up, build, run the main benchmark
#   make test     set up, build, run all tests
#
# make paper repeats the paper's comparisons, make gpu does what needs a GPU, make dist writes a source
# distribution and a wheel for many GPUs.
#
# The interpreter's torch is used if it has one >= 2.11; else .venv is made with torch 2.13.0.
# PYTHON=... selects another interpreter. Nothing is downloaded for what is already present.
PYTHON ?= python3
TORCH := torch==2.13.0

HAS_TORCH := $(shell $(PYTHON) -c "from importlib.metadata import version as v; \
  print(tuple(int(n) for n in v('torch').split('.')[:2]) >= (2, 11), v('torch'))" 2>/dev/null)
ifeq ($(firstword $(HAS_TORCH)),True)
PY := $(PYTHON)
else
PY := $(CURDIR)/.venv/bin/python
READY := $(PY)
endif
# Tools that pip puts beside the interpreter (cmake, ninja) come first.
export PATH := $(dir $(shell command -v $(PY) || echo $(PY))):$(PATH)
export PYTHONPATH := $(CURDIR)/python:$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

# One folder per interpreter: its stamps and its CMake build.
STAMPS := build/$(subst /,_,$(PY))
SOURCES := $(shell find csrc cmake -type f -not -name '*.pyc') CMakeLists.txt python/fused_rmsnorm/VERSION
export FUSED_RMSNORM_BUILD_DIR := $(STAMPS)/cmake
# What else decides what is built: a change of it builds anew.
SETTINGS := CUDA=$(FUSED_RMSNORM_CUDA) archs=$(TORCH_CUDA_ARCH_LIST) torch=$(lastword $(HAS_TORCH)) \
  nvcc=$(or $(CUDACXX),$(shell command -v nvcc)) CXX=$(CXX)
ifneq ($(MAKECMDGOALS),clean)
$(shell mkdir -p $(STAMPS); echo '$(SETTINGS)' | cmp -s - $(STAMPS)/settings || \
  echo '$(SETTINGS)' > $(STAMPS)/settings)
endif
ENSURE = $(PY) requirements/ensure.py

.PHONY: build bench bench-full paper models gpu test fuzz mutants docs plots dist wheel matrix lint format clean

build: $(STAMPS)/built

bench: $(STAMPS)/built $(STAMPS)/benchmarks-requirements
	$(PY) -m benchmarks.norms

bench-full: $(STAMPS)/built $(STAMPS)/benchmarks-requirements
	$(PY) -m benchmarks.norms --full
	$(PY) -m benchmarks.compile_modes

# The paper's models, claims and properties. PAPER_ARGS, e.g. --only time --scale 1: at their published sizes
paper: $(STAMPS)/built $(STAMPS)/benchmarks-requirements
	$(PY) -m benchmarks.paper $(PAPER_ARGS)

# Models of transformers, with their norms swapped and without. MODELS_ARGS, e.g. --models llama --layers 4
models: $(STAMPS)/built $(STAMPS)/benchmarks-requirements
	$(PY) -m benchmarks.models $(MODELS_ARGS)

# On a machine with a GPU: build, test, compute-sanitizer, benchmark. GPU_ARGS, e.g. --stages bench.
# Works with what is there, without a network: a stage that lacks something says what and fails alone.
gpu: export PIP_RETRIES ?= 0
gpu: | $(READY)
	-$(ENSURE) requirements/test.txt benchmarks/requirements.txt
	$(PY) -m benchmarks.gpu $(GPU_ARGS)

# A file of tests is one worker's; as many workers as processors, where pytest-xdist is there.
WORKERS ?= $(shell nproc)
# Threads that wait for each other sleep. Spinning, they take the processors from the other workers' compilers,
# and a test of half a minute took five.
test: export OMP_WAIT_POLICY ?= passive
test: $(STAMPS)/built $(STAMPS)/requirements-test $(STAMPS)/benchmarks-requirements
	$(PY) -m pytest $(if $(shell $(PY) -c "import xdist; print(1)" 2>/dev/null),-n $(WORKERS) --dist loadfile) \
	  $(PYTEST_ARGS)

# Random calls of everything public, judged by the definition. FUZZ_ARGS, e.g. --seed 7 --calls 100000,
# --sanitize (under AddressSanitizer and UBSan), --soak (training for --seconds): docs/broken.md
fuzz: $(STAMPS)/built $(STAMPS)/requirements-test
	$(PY) -m fuzz $(FUZZ_ARGS)

# Faults planted into a copy of the sources: does a test notice each? MUTANTS_ARGS, e.g. --layers cpu --only fold,
# or --write, which keeps the table docs/mutants.md
mutants: $(STAMPS)/built $(STAMPS)/requirements-test
	$(PY) -m mutants $(MUTANTS_ARGS)

# The documentation, as a site in build/site. It needs neither torch nor the build, and has an environment
# of its own; a warning is an error. mkdocs-material gets fixes until May 2027; zensical, by the same people, reads
# mkdocs.yml, too.
DOCS_PY := $(CURDIR)/build/docs-env/bin/python
docs: | $(DOCS_PY)
	$(DOCS_PY) requirements/ensure.py requirements/docs.txt
	NO_MKDOCS_2_WARNING=1 $(DOCS_PY) -m mkdocs build --strict
	@echo "the documentation: build/site/index.html"

# The plots of the documentation, from the committed results: docs/plots
plots: $(STAMPS)/benchmarks-requirements
	$(PY) -m benchmarks.plots

# The wheel fits this Python and this torch, and GPUs from sm_80 on, also if it is built where torch has
# no CUDA; FUSED_RMSNORM_CUDA=0 makes one for CPUs. The system's CMake serves, too: what is needed is
# checked here, for "build" would look for Python packages only.
dist: export TORCH_CUDA_ARCH_LIST ?= 8.0;9.0;10.0;12.0+PTX
dist: export FUSED_RMSNORM_CUDA ?= 1
dist: $(STAMPS)/requirements-build
	$(ENSURE) requirements/dist.txt
	$(PY) -m build --no-isolation --skip-dependency-check

# One wheel for all of these versions of torch, tried with each in a fresh environment (5 GB each, one
# after the other). Its CUDA half follows FUSED_RMSNORM_CUDA.
TORCHES ?= 2.11 2.12 2.13 2.14
wheel: export TORCH_CUDA_ARCH_LIST ?= 8.0;9.0;10.0;12.0+PTX
wheel: $(STAMPS)/requirements-build
	$(ENSURE) requirements/dist.txt
	$(PY) release/wheel.py $(TORCHES)

# Compilers, Pythons and torches of this machine: docs/matrix.md. MATRIX_ARGS, e.g. g++-12 3.11/2.13
matrix: $(STAMPS)/requirements-build
	$(PY) release/matrix.py $(MATRIX_ARGS)

lint: $(STAMPS)/requirements-lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs clang-format --dry-run --Werror

format: $(STAMPS)/requirements-lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs clang-format -i

clean:
	rm -rf build dist python/fused_rmsnorm/lib python/fused_rmsnorm/include python/fused_rmsnorm/share \
	  python/fused_rmsnorm/*.so python/*.egg-info

$(CURDIR)/.venv/bin/python:
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)

$(DOCS_PY):
	$(PYTHON) -m venv --system-site-packages build/docs-env

$(STAMPS)/requirements-%: requirements/%.txt requirements/build.txt | $(READY)
	$(ENSURE) $<
	@mkdir -p $(@D) && touch $@

$(STAMPS)/benchmarks-requirements: benchmarks/requirements.txt | $(READY)
	$(ENSURE) $<
	@mkdir -p $(@D) && touch $@

$(STAMPS)/built: $(SOURCES) $(STAMPS)/settings $(STAMPS)/requirements-build
	$(PY) cmake/build.py
	@rm -f build/*/built && touch $@
