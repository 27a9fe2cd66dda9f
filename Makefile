# make demo        raw text -> shards -> a model that is trained, killed, resumed, validated and sampled
# make test        the tests, 10 minutes on 2 fast cores, 25 on slow ones
# make test-slow   the tests that take minutes each
# make test-long   more layouts, kills and jobs of what those show: before a release
# make check       ruff and mypy
# make docs        writes docs/config.md and parts of docs/{architecture,evaluation,runbook}.md anew
# make clean       removes .venv and caches; runs and data stay
#
# Each makes its own .venv on first use. With another interpreter: make demo PYTHON=python3.12
PYTHON ?= python3
# Free space that the installation asks for, in GB: an estimate for torch with CUDA; without CUDA it takes 2.6, 3 will do.
DISK_GB ?= 6

# Tests are run side by side, one for each core. The slow ones often wait, for a cluster or a time limit: one more.
SIDE_BY_SIDE := -n logical --maxprocesses 4 --dist worksteal
AND_ONE_MORE = -n $(shell $(PYTHON) -c 'import os; print(min(4, 1 + os.cpu_count()))') --dist worksteal

VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# Its interpreter may be gone, and its scripts carry the path of the folder they were made in.
SOUND := $(RUN) -c '' 2>/dev/null && grep -qsF "$$(pwd -P)/$(VENV)/" $(VENV)/bin/pip
# Who names an interpreter gets its version; who names none keeps the one that is there.
ifneq ($(origin PYTHON),file)
VERSION := -c 'import sys; print(sys.version_info[:2])' 2>/dev/null
SOUND := $(SOUND) && [ "$$($(RUN) $(VERSION))" = "$$($(PYTHON) $(VERSION))" ]
endif

$(shell $(SOUND) || rm -f $(STAMP))

.PHONY: demo test test-slow test-long check docs clean

demo: $(STAMP)
	@$(RUN) -m launch.demo

test: $(STAMP)
	@$(RUN) -m pytest $(SIDE_BY_SIDE)

test-slow: $(STAMP)
	@$(RUN) -m pytest $(AND_ONE_MORE) -m "slow and not long" --durations 25

test-long: $(STAMP)
	@$(RUN) -m pytest $(AND_ONE_MORE) -m long

check: $(STAMP)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

docs: $(STAMP)
	@$(RUN) -m docs.generate_config
	@$(RUN) -m docs.generate_architecture
	@$(RUN) -m docs.generate_evaluation
	@$(RUN) -m docs.generate_runbook

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(SOUND) || { $(check_machine); $(tell_anew); rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	@echo "Installing into $(VENV): some minutes, once"
	@$(RUN) -m pip install -c constraints.txt -e '.[data,corpus,eval,ray,tracking,test,dev]' || { $(tell_failed); }
	@touch $@

define tell_anew
[ ! -e $(VENV) ] || echo "Making $(VENV) anew: it is damaged, of another folder or of another Python"
endef

define tell_failed
echo "error: the installation failed, pip says why above; it needs a package index (the network, or PIP_INDEX_URL)" >&2; \
exit 1
endef

define check_machine
fail() { echo "error: $$*" >&2; exit 1; }; \
command -v $(PYTHON) >/dev/null || fail "no $(PYTHON) here; Gradus needs Python 3.11 or newer: make PYTHON=/path/to/python3"; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
  fail "$$($(PYTHON) --version) is too old; Gradus needs 3.11 or newer: make PYTHON=/path/to/python3"; \
$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
  fail "$(PYTHON) has no venv module; install it (on Debian and Ubuntu: python3-venv), or make PYTHON=/path/to/python3"; \
free=$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1048576)}'); \
[ $$free -ge $(DISK_GB) ] || \
  fail "$$free GB free in $$PWD, the installation asks for $(DISK_GB): make room, or make DISK_GB=3 without CUDA"
endef
