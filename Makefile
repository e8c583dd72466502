# Every target makes the virtual environment .venv, installs what it needs there, and runs.
# Another interpreter or another place: make test PYTHON=python3.12 VENV=.venv312

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
TEST := $(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal
TORCH := $(shell grep ^torch== tests/requirements.txt)
CSRC := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu)

# Of make gpu: where its results go, the commit where there is no git to ask, and DRY=1 for a rehearsal on a CPU.
COMMIT ?=
DRY ?=
OUT ?= $(if $(DRY),build/gpu,benchmarks/results)

.PHONY: help demo test coverage bench report gpu gpu-carry lint clean
help:
	@echo "make demo    sample digits with and without fastdiff and write a page about it"
	@echo "make test    run the tests; make coverage tells which lines they reach"
	@echo "make bench   run the benchmarks; results in build/benchmarks.json"
	@echo "make report  write the page of what was measured: of RESULTS=..., else of make bench, else of what is committed"
	@echo "make gpu     build, test and measure on a GPU, without network or .venv; results in OUT=benchmarks/results"
	@echo "make lint    check style, formatting and types"
	@echo "make clean   remove everything that the other targets made"

demo: $(VENV)/installed
	$(PY) examples/digits/demo.py

test: $(VENV)/installed
	$(TEST)

coverage: $(VENV)/installed
	$(TEST) --cov --cov-report=term

bench: $(VENV)/installed
	mkdir -p build
	OMP_PROC_BIND=close OMP_PLACES=cores $(PY) -m pytest benchmarks/bench_*.py --benchmark-json=build/benchmarks.json \
	    --benchmark-columns=median,iqr,rounds,iterations
	$(PY) benchmarks/summary.py build/benchmarks.json
	$(PY) benchmarks/kernels.py --json build/kernels.json

report: $(VENV)/installed
	$(PY) benchmarks/report.py $(RESULTS)

# On a bare machine: with the packages of PYTHON itself, and with what make gpu-carry has put into .gpu.
gpu:
	$(PYTHON) .ci/gpu.py --out "$(OUT)" --commit "$(COMMIT)" $(if $(DRY),--rehearse)

gpu-carry:
	$(PYTHON) .ci/gpu_carry.py

lint: $(VENV)/tools
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC) tests/*.cpp tests/*.h
	$(PY) -m mypy

clean:
	rm -rf $(VENV) .gpu build dist *.egg-info fastdiff/*.so .coverage .*_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Where there is no NVIDIA GPU, torch's CPU build spares some gigabytes; without its index, any build will do.
$(VENV)/tools: tests/requirements.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'fastdiff needs Python >= 3.10')"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	command -v nvidia-smi >/dev/null || $(PIP) install --quiet --no-deps --retries 0 --timeout 10 \
	    --index-url https://download.pytorch.org/whl/cpu $(TORCH) 2>/dev/null || true
	$(PIP) install --quiet -r tests/requirements.txt
	touch $@

# Two hosts without their dependencies: those that are needed are in tests/requirements.txt, and torchvision, which only
# their training needs, would bring another torch.
$(VENV)/installed: $(VENV)/tools tests/hosts.txt setup.py pyproject.toml $(CSRC)
	$(PIP) install --quiet --no-build-isolation --editable '.[dev,demo]'
	$(PIP) install --quiet --no-deps -r tests/hosts.txt
	touch $@
