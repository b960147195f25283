# Everything happens in an environment of the project's own: .venv, made on first use.
#   make demo    a daemon, a few runs, a watcher: the whole thing in a minute
#   make test    all tests; with CI set, the short ones on the newest Python as well
#   make test-long  for the night: the long ones too, 20 fault rounds, mutants,
#                audit, and agents
#   make check   ruff, mypy, import-linter
#   make lock    writes requirements.lock anew: the newest versions that pyproject.toml allows
#   make audit   an SBOM (build/sbom.json), and known advisories of what is locked
#   make man     writes docs/man from the help texts
#   make keys    writes the key list of docs/configuration.md from config/schema.py
#   make bench   the benchmarks
#   make fuzz    what comes in from outside, by coverage and by many examples: SECONDS=60
#   make faults  random load while everything fails; SEED=, ROUNDS=, PROFILE= (embedded,
#                shared, mixed), REPORT= (a document whose figures are written)
#   make mutants whether a test fails for each guard of tests/guards.toml that is taken
#                away, in a copy of the tree; GUARDS= (names of some)
#   make agents  drives real agents (Claude Code, Codex, OpenCode, and by ACP) against a model on
#                loopback, and counts what kills cost; installs them from npm, in AGENTS_CACHE
#                (~/.cache/runctl-agents), 1 GB; ten minutes. WRITE=1 writes the figures into
#                docs/agents.md
#   make clean   removes whatever these made
# PYTHON names the interpreter of .venv (3.11 or newer). JOBS: so many tests at once, most of
# which wait for processes; 0 for one after the other.

PYTHON ?= python3
JOBS   ?= $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 2)))
NEWEST  = python3.14 python3.13 python3.12
PIP     = -m pip install --quiet --disable-pip-version-check
BIN     = .venv/bin
READY   = .venv/.ready
READY_NEWEST = .venv-newest/.ready

.PHONY: demo test test-long test-newest check lock audit man keys bench fuzz faults mutants agents \
    clean
.DEFAULT_GOAL := test

demo: $(READY)
	$(BIN)/runctl demo

test: $(READY)
	$(BIN)/python -m pytest -q -n $(JOBS)
	@if [ -n "$${CI:-}" ]; then $(MAKE) --no-print-directory test-newest; fi

test-long: $(READY)
	RUNCTL_LONG=1 $(BIN)/python -m pytest -q -n $(JOBS)
	$(MAKE) --no-print-directory faults SEED=1 ROUNDS=20
	$(MAKE) --no-print-directory mutants
	$(MAKE) --no-print-directory audit
	$(MAKE) --no-print-directory agents

# The newest Python there is, unless it is the one that `make test` has just used.
# A candidate must run (a pyenv shim may not) and be able to make environments.
test-newest: $(READY)
	@ours=$$($(BIN)/python -c 'import sys; print("python%d.%d" % sys.version_info[:2])'); \
	for name in $(NEWEST); do \
	    [ "$$name" != "$$ours" ] || continue; \
	    for python in "$$(command -v $$name || true)" "$$HOME"/.pyenv/versions/*/bin/$$name; do \
	        [ -x "$$python" ] && "$$python" -c 'import ensurepip, venv' 2>/dev/null || continue; \
	        echo "short tests on $$("$$python" --version) ($$python)"; \
	        exec $(MAKE) --no-print-directory short-on NEWEST_PYTHON="$$python"; \
	    done; \
	done; \
	echo "short tests on a newer Python: skipped, none of $(NEWEST) was found besides $$ours"

.PHONY: short-on
short-on:
	@if [ ! -e $(READY_NEWEST) ] || [ pyproject.toml -nt $(READY_NEWEST) ] || \
	    [ "$$(cat $(READY_NEWEST))" != "$(NEWEST_PYTHON)" ]; then \
	    set -e; rm -rf .venv-newest; \
	    "$(NEWEST_PYTHON)" -m venv .venv-newest; \
	    .venv-newest/bin/python $(PIP) -e '.[dev]'; \
	    echo "$(NEWEST_PYTHON)" > $(READY_NEWEST); \
	fi
	.venv-newest/bin/python -m pytest -q -n $(JOBS) -m short

check: $(READY) .typing/.ready
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini tests bench faults agents
	PYTHONPATH=.typing $(BIN)/lint-imports

# For Linux and macOS, whatever this machine is. The second file is what building takes.
LOCK = .venv-lock/bin/uv pip compile --quiet --no-config --universal --python-version 3.11 \
    --upgrade --generate-hashes --no-annotate --custom-compile-command 'make lock'
lock: .venv-lock/.ready
	$(LOCK) pyproject.toml --extra gateway -o requirements.lock
	$(PYTHON) -c 'import sys, tomllib; \
	    print(*tomllib.load(sys.stdin.buffer)["build-system"]["requires"], sep="\n")' \
	    < pyproject.toml | $(LOCK) - -o requirements-build.lock

.venv-lock/.ready:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python $(PIP) 'uv==0.13.9'
	@touch $@

audit:
	@if $(PYTHON) -m venv .venv-audit && \
	    .venv-audit/bin/python $(PIP) 'pip-audit==2.10.1' 'cyclonedx-bom==7.5.0' 2>/dev/null; \
	then .venv-audit/bin/python tests/audit.py build/sbom.json; \
	else echo "audit: skipped, pip-audit and cyclonedx-bom cannot be had here"; fi

man: $(READY)
	$(BIN)/python docs/manpages.py

keys: $(READY)
	$(BIN)/python docs/configkeys.py

bench: $(READY) .venv/.bench
	$(BIN)/python -m bench

.venv/.bench: $(READY)
	$(BIN)/python $(PIP) -e '.[bench]'
	touch $@

# atheris has wheels for some Pythons on Linux only: where there is none, the target says
# so and goes on. What is found is kept in tests/corpus, which `make test` replays.
SECONDS ?= 60
EXAMPLES ?= 500
fuzz: $(READY)
	-@$(BIN)/python $(PIP) --only-binary :all: -e '.[fuzz]' 2>/dev/null
	RUNCTL_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -q tests/test_bounds.py
	$(BIN)/python tests/fuzz.py $(SECONDS)

faults: $(READY)
	PYTHONPATH=tests $(BIN)/python -m faults $(if $(SEED),--seed $(SEED)) \
	    $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(PROFILE),--profile $(PROFILE)) \
	    $(if $(REPORT),--report $(REPORT)) $(if $(FOLDER),--folder $(FOLDER))

agents: $(READY)
	$(BIN)/python -m agents $(if $(WRITE),--write)

mutants: $(READY)
	$(BIN)/python tests/mutants.py $(GUARDS)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(PYTHON) is missing or older than 3.11: run make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || \
	    { echo "$(PYTHON) -m venv failed: on Debian, apt install python3-venv" >&2; exit 1; }
	$(BIN)/python $(PIP) -e '.[dev]'
	@touch $@

# mypy and import-linter do not see through an editable install: give them the folders
# under the names they are installed with.
.typing/.ready:
	@mkdir -p .typing/runctl
	@for folder in config protocol client cli supervisor gateway; do ln -sfn ../../$$folder .typing/runctl/$$folder; done
	@echo '*' > .typing/.gitignore
	@touch $@

clean:
	rm -rf .venv .venv-newest .venv-lock .venv-audit .typing .bench build dist runctl.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
