# make setup | train | test | test-kernels | test-gpu | test-slurm | lint
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: setup train test test-kernels test-gpu test-slurm lint

setup: .venv/.installed
	$(BIN)/python -m launch.torchrun_script

.venv/.installed: pyproject.toml launch/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint launch/constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint launch/constraints.txt --editable '.[dev]'
	touch $@

train: setup
	$(BIN)/torchrun --nproc 2 train/main.py run.device=cpu run.dir=runs/demo data.held_out=0.02 \
		train.steps=200 train.global_batch_size=8 train.micro_batch_size=4

test: setup lint
	$(BIN)/python -m pytest -n 2 --dist loadfile
	$(BIN)/python -m tests.processors --quick

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-kernels: setup
	$(BIN)/python -m pip install --quiet --constraint launch/constraints.txt --editable '.[kernels]'
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/model/kernels tests/parallel/test_kernels.py
	$(BIN)/python -m pytest tests/model/kernels/test_budget.py

test-gpu: setup
	$(BIN)/python -m pytest -m gpu -rs

test-slurm: setup
	tests/launch/slurm/run.sh
