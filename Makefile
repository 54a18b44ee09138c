# make demo        the whole pipeline on a CPU, set-up included; prints the transfer table
# make test        ruff and pytest, set-up included
# make seeds       the demo with seeds 1, 2 and 3, each with problems of its own; prints mean and range
# make toolchains  the compilers and interpreters that Debian packages (as root)
# make clean       forget the demo's results and the environment

PYTHON ?= python3
# The build of torch to install, with any further arguments of pip: the demo needs no GPU.
TORCH ?= torch==2.13.0
PY := .venv/bin/python
SEED ?= 0
SEEDS ?= 1 2 3
RUN := runs/demo$(if $(filter-out 0,$(SEED)),-$(SEED))
DATA := $(RUN)/data

.PHONY: demo seeds test tests-with-sandboxes tests-beside toolchains clean
.DELETE_ON_ERROR:
ifeq ($(filter tests-%,$(MAKECMDGOALS)),)
.NOTPARALLEL: # a stage uses all cores
endif

demo: $(RUN)/eval/table.md
	@cat $<

# --- set-up

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv || { echo "error: no venv; on Debian: apt-get install python3-venv" >&2; exit 1; }
	.venv/bin/pip install -q $(TORCH) -r requirements.txt
	touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt
	.venv/bin/pip install -q -r tests/requirements.txt
	touch $@

# --- the demo: each stage leaves a file that marks it as done, and is not run again while it stands.
# A stage that was interrupted goes on where it stopped; one whose input is newer than its start starts anew.

STAGES := base source rl-source parallel rl-parallel
ANEW = [ $(@D)/settings.json -nt $< ] || rm -rf $(@D)

$(DATA)/languages.json: | .venv/installed
	$(PY) data.py make --seed $(SEED) --out $(DATA)

$(RUN)/base/summary.json: $(DATA)/languages.json
	@$(ANEW)
	$(PY) sft.py --mixture base --seed $(SEED) --data $(DATA) --out $(RUN)/base

$(RUN)/source/summary.json $(RUN)/parallel/summary.json: $(RUN)/%/summary.json: $(RUN)/base/summary.json
	@$(ANEW)
	$(PY) sft.py --mixture $* --seed $(SEED) --data $(DATA) --model $(RUN)/base --out $(RUN)/$*

$(RUN)/rl-source/summary.json $(RUN)/rl-parallel/summary.json: $(RUN)/rl-%/summary.json: $(RUN)/%/summary.json
	@$(ANEW)
	$(PY) rl.py --seed $(SEED) --data $(DATA) --model $(RUN)/$* --out $(RUN)/rl-$*

$(RUN)/eval/table.md: $(STAGES:%=$(RUN)/%/summary.json)
	$(PY) eval.py --data $(DATA) --models $(STAGES:%=$(RUN)/%) --problems 60 --out $(RUN)/eval >/dev/null

seeds:
	for seed in $(SEEDS); do $(MAKE) demo SEED=$$seed || exit; done
	$(PY) eval.py --join $(foreach s,$(SEEDS),runs/demo$(if $(filter-out 0,$s),-$s)/eval/eval.json)

# --- the rest

# Files that start no sandbox run beside the others, which count what sandboxes leave on the machine; of these
# come first the tests that wait for time limits more than they compute.
BESIDE := $(patsubst %,tests/test_%.py,kernels llama memory model sft)
FIRST := $(wildcard tests/test_sandbox*.py)
OTHERS := $(filter-out $(BESIDE) $(FIRST),$(wildcard tests/test_*.py))

test: .venv/installed-tests
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(MAKE) --no-print-directory --jobs=2 tests-with-sandboxes tests-beside

tests-%: export OMP_NUM_THREADS = 1

tests-with-sandboxes:
	$(PY) -m pytest $(FIRST) $(OTHERS)

tests-beside: # without a GPU the first call only compiles the kernels; shown when all is done
	@log=$$(mktemp) && { $(PY) -m pytest $(BESIDE) && TRITON_INTERPRET=1 $(PY) -m pytest tests/test_kernels.py; } >$$log 2>&1; \
	status=$$?; cat $$log; rm $$log; exit $$status

toolchains:
	apt-get update
	apt-get install -y --no-install-recommends $$($(PYTHON) sandbox.py toolchains)

clean:
	rm -rf .venv runs/demo runs/demo-*
