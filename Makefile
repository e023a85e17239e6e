# proxt2i. `make` alone prints what there is.
PYTHON ?= python3
VENV ?= .venv
MIN_DISK_GB ?= 6
PIP_ARGS ?=
JOBS ?= 2

BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
SOURCES := setup.py pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*.* csrc/common/* csrc/cpu/* csrc/cuda/*)
CUDA_BUILD := build/cuda-check
REWARDS_CHECK := build/rewards-check
export PATH := $(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help venv test lint docs soak demo emulate rewards-check cuda-check gpu-check clean check-machine

help:
	@echo "make demo        draw a data set, train a model on it, tune it with GRPO, sample and evaluate (sets itself up first); ARGS=--no-grpo"
	@echo "make test        all tests, JOBS=$(JOBS) files at a time (sets itself up first); ARGS='-k name' goes to pytest (JOBS=0 with -s or --pdb)"
	@echo "make soak        kill -9 a two-rank run 20 times and compare it with an unbroken one, change its ranks, fill its disk; kill a curation; disturb a Slurm job (minutes); KILLS=20 MOMENTS=10"
	@echo "make lint        ruff and mypy (sets itself up first)"
	@echo "make docs        the documentation as a web site in build/site (sets itself up first); nothing in it is fetched from elsewhere"
	@echo "make venv        only the set-up: $(VENV) with everything that constraints.txt names, and the native extension"
	@echo "make emulate     run the CUDA kernels on the CPU, under sanitizers (make test does too; needs gcc); ARGS='-k name' goes to pytest"
	@echo "make rewards-check  compare our rewards with the public packages (installs those into $(REWARDS_CHECK)/venv; make test compares with the scores kept)"
	@echo "make cuda-check  compile the CUDA kernels for sm_80 and sm_90a, and say what they use (needs nvcc, no GPU)"
	@echo "make gpu-check   build the CUDA kernels for this GPU, test them and time them (needs nvcc and a torch with CUDA; sets nothing up)"
	@echo "make clean       remove $(VENV), build output and caches"
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) PIP_ARGS='$(PIP_ARGS)' (e.g. an index that has CPU builds of torch) MIN_DISK_GB=$(MIN_DISK_GB)"

# Everything that is missing is said at once, each with its fix.
check-machine:
	@problems=; say() { problems="$$problems  - $$1\n"; }; \
	if ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
	  say "no Python 3.10 or newer as '$(PYTHON)': apt-get install python3 python3-venv python3-dev, or make PYTHON=/path/to/python3.11"; \
	else \
	  "$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || say "$(PYTHON) has no venv module: apt-get install python3-venv"; \
	  include=$$("$(PYTHON)" -c 'import sysconfig; print(sysconfig.get_path("include"))'); \
	  [ -f "$$include/Python.h" ] || say "no Python headers ($$include/Python.h): apt-get install python3-dev"; \
	fi; \
	[ -n "$$CXX" ] || command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null \
	  || say "no C++ compiler: apt-get install g++"; \
	free=$$(df -Pk . | awk 'NR == 2 { print int($$4 / 1048576) }'); \
	[ -d "$(VENV)" ] || [ "$$free" -ge "$(MIN_DISK_GB)" ] \
	  || say "$$free GB of disk free here, and the set-up needs $(MIN_DISK_GB): free some, or put VENV=/elsewhere"; \
	if [ -n "$$problems" ]; then printf "proxt2i cannot be set up on this machine:\n$$problems" >&2; exit 1; fi

$(STAMP): $(SOURCES)
	@$(MAKE) --no-print-directory check-machine
	@[ -x "$(BIN)/python" ] || { echo "== making $(VENV)"; "$(PYTHON)" -m venv "$(VENV)"; }
	@echo "== installing (minutes the first time)"
	@"$(BIN)/python" -m pip install --disable-pip-version-check -q $(PIP_ARGS) -c constraints.txt \
	  setuptools wheel packaging cmake ninja pybind11 numpy "torch>=2.11"
	@"$(BIN)/python" -m pip install --disable-pip-version-check -q $(PIP_ARGS) -c constraints.txt --no-build-isolation -e '.[test,demo]'
	@touch $@

venv: $(STAMP)

# One thread a process: the tests are small, some start several ranks, and OpenMP's barriers crawl on a busy machine.
# Several files at a time, since many tests wait for something; a file's tests stay together, as they share what its fixtures made.
test: $(STAMP)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} PROXT2I_REQUIRE_NATIVE=1 "$(BIN)/python" -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# An extra of the installed package: pip adds what is missing and builds nothing.
$(VENV)/.installed-%: $(STAMP)
	@"$(BIN)/python" -m pip install --disable-pip-version-check -q $(PIP_ARGS) -c constraints.txt --no-build-isolation 'proxt2i[$*]'
	@touch $@

lint: $(VENV)/.installed-lint
	@"$(BIN)/ruff" check $(ARGS)
	@"$(BIN)/mypy" --cache-dir build/mypy

docs: $(VENV)/.installed-docs
	@NO_MKDOCS_2_WARNING=1 "$(BIN)/mkdocs" build -q --strict $(ARGS)
	@echo "the site: build/site/index.html"

soak: $(STAMP)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} PROXT2I_REQUIRE_NATIVE=1 KILLS=$(or $(KILLS),20) \
	  MOMENTS=$(or $(MOMENTS),10) \
	  "$(BIN)/python" -m pytest -q --timeout 3600 $(ARGS) tests/soak/soak.py tests/soak/curation.py tests/soak/slurm_soak.py

demo: $(STAMP)
	@"$(BIN)/python" -m proxt2i.embedded.demo $(ARGS)

emulate: $(STAMP)
	@"$(BIN)/python" tests/test_emulated.py $(ARGS)

# hpsv2 and image-reward want versions that nothing else here does, so they get an environment of their own.
$(REWARDS_CHECK)/.installed: $(wildcard tests/rewards_vs_packages/*.txt) constraints.txt
	@mkdir -p $(REWARDS_CHECK) && grep -E '^(torch|numpy|scipy|pillow)==' constraints.txt > $(REWARDS_CHECK)/constraints.txt
	@[ -x $(REWARDS_CHECK)/venv/bin/python ] || "$(PYTHON)" -m venv $(REWARDS_CHECK)/venv
	@$(REWARDS_CHECK)/venv/bin/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -c $(REWARDS_CHECK)/constraints.txt \
	  -r tests/rewards_vs_packages/requirements.txt
	@$(REWARDS_CHECK)/venv/bin/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) --no-deps --no-build-isolation \
	  -r tests/rewards_vs_packages/requirements-no-deps.txt
	@touch $@

rewards-check: $(STAMP) $(REWARDS_CHECK)/.installed
	@OMP_NUM_THREADS=1 $(REWARDS_CHECK)/venv/bin/python -W ignore tests/rewards_vs_packages/score_with_packages.py $(REWARDS_CHECK)
	@OMP_NUM_THREADS=1 PROXT2I_GOLDEN=$(REWARDS_CHECK)/golden.json "$(BIN)/python" -m pytest -q $(ARGS) tests/test_rewards_golden.py tests/rewards_vs_packages/tokens.py

# --clean-first: ptxas reports on a kernel only when it compiles it.
cuda-check: $(STAMP)
	@if ! command -v nvcc >/dev/null; then echo "cuda-check: skipped, nvcc is not on PATH"; else \
	  cmake -S . -B $(CUDA_BUILD) -G Ninja --log-level=WARNING -DPROXT2I_CUDA=CHECK -DPython_EXECUTABLE="$(BIN)/python" \
	  && "$(BIN)/python" csrc/cuda/resources.py cmake --build $(CUDA_BUILD) --target cuda_compile_check --clean-first \
	  && echo "cuda-check: compiled for sm_80 and sm_90a without warnings or spills"; fi

# Nothing is set up or fetched: the Python of $(VENV) if there is one, else $(PYTHON) with whatever it has.
gpu-check:
	@python="$(BIN)/python"; [ -x "$$python" ] || python="$(PYTHON)"; \
	command -v "$$python" >/dev/null || { echo "gpu-check: no '$$python': make gpu-check PYTHON=/path/to/python that has torch" >&2; exit 1; }; \
	exec "$$python" benchmarks/gpu_check.py $(ARGS)

clean:
	rm -rf "$(VENV)" build dist proxt2i/_C*.so proxt2i.egg-info .pytest_cache
