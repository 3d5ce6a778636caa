# `make demo` and `make test` are all that a newcomer needs; both set up what they need, as root.
BENCHMARK := bench.epoch
BIN := .venv/bin
PYTEST := $(BIN)/coverage run -m pytest

.PHONY: help setup demo check test coverage bench sim kill-series switchovers scenarios injection-kills torture file-oracle many-files databases oracle test-kernels clean

SEEDS := 5000
ROUNDS := 120
EPOCHS := 700
KERNEL_EPOCHS := 24
SCALE := full

help:  ## what can be made
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup:  ## packages, .venv and a CRIU that works on this kernel; nothing is done twice
	@setup/setup.sh

demo: setup  ## a redis outlives its machine, before your eyes
	@$(BIN)/outlive demo

check: setup  ## lint, types, import rules, unit and sim tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/coverage erase
	$(PYTEST) tests/unit
	$(BIN)/pytest tests/sim

test: check  ## check, branch coverage of the unit tests, and the system tests
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report
	$(BIN)/pytest tests/system --durations=20

coverage: setup  ## branch coverage of unit and system tests together; a third slower than these tests alone
	$(BIN)/coverage erase
	$(PYTEST) tests/unit tests/system
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

bench: setup  ## benchmark an epoch; JSON on stdout
	@$(BIN)/python -m $(BENCHMARK) --output json

sim: setup  ## simulated clusters, SEEDS of them (5000), and as many of the model of output-commit
	@$(BIN)/python -m tests.sim.campaign --seeds $(SEEDS)
	@$(BIN)/python -m tests.sim.output_commit --seeds $(SEEDS)

kill-series: setup  ## signals at random moments of capture, ROUNDS of them (120); JSON on stdout
	@$(BIN)/python -m tests.campaigns.kill_series --rounds $(ROUNDS)

switchovers: setup  ## a redis that moves back and forth 20 times under a writing client; JSON on stdout
	@$(BIN)/python -m tests.campaigns.switchovers --rounds 20

scenarios: setup  ## what happens when something breaks, in the lab, one line for each; a table on stdout
	@$(BIN)/python -m tests.campaigns.scenarios --output table

injection-kills: setup  ## signals at random moments of an injection, ROUNDS of them (120); JSON on stdout
	@$(BIN)/python -m tests.campaigns.injection_kills --rounds $(ROUNDS)

torture: setup  ## crashes, power loss and errors of a store, restores, hostile wires, planted bugs; SCALE=short for seconds
	@$(BIN)/python -m tests.campaigns.torture --scale $(SCALE)

many-files: setup  ## a redis among a million files: first sync, epochs, host loss (needs 15 GB of disk)
	@$(BIN)/python -m tests.campaigns.many_files --files 1000000

databases: setup  ## SQLite and PostgreSQL lose their hosts under load, every way that they are tried
	DATABASES=all $(BIN)/pytest tests/system/test_files_databases.py

file-oracle: setup  ## files captured, laid out and restored, against the files themselves; on each file system
	@$(BIN)/python -m tests.campaigns.file_oracle --epochs 1000 --on ext4,xfs
	@$(BIN)/python -m tests.campaigns.file_oracle --epochs 200 --on btrfs,overlay,tmpfs

oracle: setup  ## the fast backend against stock CRIU, page for page, and planted bugs; EPOCHS of each of 3 seeds (700)
	@$(BIN)/python -m tests.campaigns.oracle --epochs $(EPOCHS)
	@$(BIN)/python -m tests.campaigns.oracle_planted

test-kernels: setup  ## the soft-dirty tracker on Debian 12's kernel 6.1, in qemu, against stock CRIU; JSON on stdout
	@$(BIN)/python -m tests.kernels --epochs $(KERNEL_EPOCHS)

clean:  ## remove what setup and the tools made in this checkout
	rm -rf .venv .criu .kernels native/build .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
