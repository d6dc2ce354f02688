# make setup   create .venv            make check   format, lint, types, import table,
#                                                   measures of the layout
# make demo    three minutes of speech pretraining, no data needed (or DATA=/path/to/folder);
#              MODALITY=image, text or joint for the others
# make test    what to run all day, on every core: no whole runs, no slow tests
# make test-all  everything but slow tests, as CI runs it
# make golden  write the kept first steps of the tiny configurations anew and print what changed
# make faults  every way of dying that a run survives, slow ones too (half an hour)
# make hostile  flip every byte of small packed folders, a run and an export, and use each copy (hours)
# make soak    500 steps with saves, validations and rollbacks: nothing may grow
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
RUNS ?= runs
DATA ?=
MODALITY ?= audio
# half of the tests' time is waiting: for launchers, data workers, limits that must pass; nproc obeys OMP_NUM_THREADS
TESTERS := $(shell cores=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2); \
	echo $$((cores < 6 ? cores * 3 / 2 : 8)))
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(TESTERS) --dist=loadfile --no-loadscope-reorder
DEMO := $(RUNS)/demo-$(MODALITY)
STAMP := .venv/.installed

.PHONY: setup demo test test-all check golden faults hostile soak

setup: $(STAMP)

$(STAMP): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet -e '.[audio,image,text,mpi,eval,asr,hub,onnx,demo,dev]'
	touch $(STAMP)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py
	$(BIN)/python -m tests.structure

test: $(STAMP)
	$(PYTEST) -m 'not run and not slow'

test-all: $(STAMP)
	$(PYTEST)

golden: $(STAMP)
	$(BIN)/python -m tests.runs.golden_curves

faults: $(STAMP)
	$(BIN)/python -m pytest -v -m 'slow or not slow' tests/runs/test_faults.py \
		tests/runs/test_surroundings.py tests/slurm \
		tests/preprocessing/test_pack_audio.py::test_full_disk_is_a_clear_error_and_finished_shards_go_on

hostile: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.hostile.sweep

soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak

demo: $(STAMP)
	$(BIN)/python -m d2v2ds.demo --modality $(MODALITY) --runs $(DEMO) $(if $(DATA),--data '$(DATA)')
