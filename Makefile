# The one vocabulary of commands, for people, hooks and CI. `make help` lists it.
# `make demo` and `make test` do all set-up themselves; stamps in .stamps make every step idempotent.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMPS := .stamps
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist worksteal
# CUDA 13 is what torch 2.13.0 from PyPI brings; NVRTC in its wheels compiles our kernels without a GPU.
# Not `all`: maturin asks pip for each requirement, and this package by its own name is on no index before it is built.
EXTRAS := torch,arrow,hf,trl,lightning,cli,testing,cuda13,test,dev
RUST   := Cargo.toml $(wildcard Cargo.lock) $(shell find rust -name '*.rs')

# The two ends of what is supported. Each has an environment of its own, with the wheel built from here: the newest
# interpreter on this machine with the newest of everything, and pyproject's lower bounds, exactly.
PYTHON_NEWEST ?= $(or $(call first-of,python3.14 python3.13 python3.12),$(PYTHON))
PYTHON_OLDEST ?= $(or $(call first-of,python3.11),$(PYTHON))
first-of = $(shell for p in $(1); do $$p -c 'import venv, ensurepip' 2>/dev/null && echo $$p && break; done)
NEWEST := all,cuda13,test,dev
OLDEST := all,cuda12,test,dev
SOURCE := pyproject.toml $(RUST) $(wildcard cuda/*) $(shell find python -name '*.py' -o -name '*.pyi')

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-rust test-python test-fast test-slowest flaky test-newest test-oldest test-ray ceilings deep check format docs bench wheel gpu-check gpu-peers gpu-train clean require

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

require:
	@command -v cargo >/dev/null || { echo "missing: cargo (Rust 1.88 or newer, https://rustup.rs)" >&2; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || { echo "missing: a C++ compiler (g++ 12 or newer)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	    || { echo "missing: Python >= 3.11 as '$(PYTHON)' (choose one with PYTHON=...)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "missing: the venv module of '$(PYTHON)'" >&2; exit 1; }

$(STAMPS)/torch: | require
	@mkdir -p $(STAMPS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	@touch $@

$(STAMPS)/package: pyproject.toml $(RUST) $(STAMPS)/torch | require
	$(BIN)/python -m pip install --quiet 'maturin>=1.14,<2'
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/maturin develop --release --extras $(EXTRAS)
	@touch $@

setup: require $(STAMPS)/package  ## create .venv with torch 2.13.0, build the package, install it with its extras

demo: setup  ## train a policy by DPO from start to report; DATA=pairs.jsonl.gz uses your file
	$(BIN)/dpo-ext demo $(if $(DATA),--data '$(DATA)')

test: test-rust test-python  ## all tests; the last line counts the GPU tests that did not run

test-rust: setup
	cargo test --release --quiet

test-python: setup
	$(PYTEST) --doctest-modules tests python/dpo_ext docs

test-fast: setup  ## the tests that a change breaks first, under 90 s: no process starts, nothing compiles, few examples
	DPO_EXT_EXAMPLES=8 $(PYTEST) --fast tests

test-slowest: setup  ## the Python tests, then the 30 of most CPU time
	$(PYTEST) --slowest 30 tests

flaky: setup  ## the Python tests in random order; SEED=n repeats the order of a run that failed
	$(PYTEST) -p randomly $(if $(SEED),--randomly-seed=$(SEED)) tests

.venv-newest/.stamp: $(SOURCE) | require
	test -x .venv-newest/bin/python || $(PYTHON_NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade pip
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager '.[$(NEWEST)]'
	@touch $@

.venv-oldest/.stamp: $(SOURCE) tests/support/lower_bounds.py | require
	test -x .venv-oldest/bin/python || $(PYTHON_OLDEST) -m venv .venv-oldest
	.venv-oldest/bin/python tests/support/lower_bounds.py > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/constraints.txt '.[$(OLDEST)]'
	@touch $@

test-newest: .venv-newest/.stamp  ## the Python tests with the newest version of everything, in .venv-newest
	.venv-newest/bin/python -m pytest -q -n 2 --dist worksteal tests

test-oldest: .venv-oldest/.stamp  ## the Python tests with the lower bounds of pyproject.toml, in .venv-oldest
	.venv-oldest/bin/python -m pytest -q -n 2 --dist worksteal tests

.venv-ray/.stamp: $(SOURCE) | require
	test -x .venv-ray/bin/python || $(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip install --quiet --upgrade pip
	.venv-ray/bin/python -m pip install --quiet '.[arrow,testing]' 'ray[data]>=2.50' 'pytest>=8' 'jinja2>=3.1'
	@touch $@

test-ray: .venv-ray/.stamp  ## the tests of the Ray Data job, with Ray in .venv-ray
	.venv-ray/bin/python -m pytest -q tests/data/test_encode_ray.py

ceilings: setup  ## what the CUDA kernels take of registers and instructions, measured anew without a GPU: the table of tests/logps/test_nvrtc.py
	PYTHONPATH=tests/support $(BIN)/python tests/logps/test_nvrtc.py

deep: setup flaky  ## the exhaustive tests: every code point for every tokenizer, every sabotage, long fuzzing, 5,000 examples a property
	DPO_EXT_DEEP=1 cargo test --release --lib bpe
	DPO_EXT_DEEP=1 cargo test --release --test fuzz
	DPO_EXT_DEEP=1 DPO_EXT_EXAMPLES=5000 $(PYTEST) tests

check: setup  ## format, clippy, ruff, mypy, stubtest, docs
	cargo fmt --check
	cargo clippy --release --quiet --features python --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --release --quiet --no-deps --document-private-items
	$(BIN)/ruff format --check python tests benches docs examples
	$(BIN)/ruff check python tests benches docs examples
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest dpo_ext._core
	$(BIN)/python docs/make_losses.py --check

docs: setup  ## write the pages and pictures that are generated: docs/losses, docs/*.svg
	$(BIN)/python docs/make_losses.py
	$(BIN)/python docs/make_plots.py

format:  ## format Rust and Python in place
	cargo fmt
	$(BIN)/ruff format python tests benches docs examples
	$(BIN)/ruff check --fix python tests benches docs examples

bench: setup  ## the CPU benchmarks, each verified before it is timed
	$(BIN)/python benches/logps.py
	$(BIN)/python benches/loss.py
	$(BIN)/python benches/linear.py
	$(BIN)/python benches/calls.py
	$(BIN)/python benches/attention.py
	$(BIN)/python benches/attention.py --row 32000
	$(BIN)/python benches/train.py
	$(BIN)/python benches/train.py --overhead
	cargo bench --bench tokenize

wheel: setup  ## the abi3 wheel, in dist/
	$(BIN)/maturin build --release --out dist

gpu-check: wheel  ## on a machine with a GPU, under 10 minutes: launches, correctness, the benches, memcheck; again, it goes on
	$(BIN)/python benches/gpu_check.py $(if $(MINUTES),--minutes $(MINUTES))

gpu-peers: setup  ## wheels of the peers and of compute-sanitizer into dist/peers, for a machine with a GPU and no net
	$(BIN)/python benches/gpu_peers.py

gpu-train: setup  ## on a machine with a GPU: steps of a 1B model beside stock TRL, under 10 minutes; MODEL=8b another
	$(BIN)/python benches/train.py --device cuda --model $(or $(MODEL),1b)

clean:  ## remove what the targets made, except .venv and its kin
	rm -rf $(STAMPS) dist demo_out target
