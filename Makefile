# make demo        the whole pipeline on a CPU, set-up included: two arms, one seed; prints the transfer table
# make study       four arms, six seeds, hours; goes on where it stopped
# make smollm2     the pipeline from SmolLM2-135M-Instruct, hours on a CPU
# make test        ruff and pytest, set-up included
# make toolchains  the compilers and interpreters that Debian packages (as root)
# make clean       forget the demo's and the study's runs and the environment

PYTHON ?= python3
# The build of torch to install, with any further arguments of pip: the demo needs no GPU.
TORCH ?= torch==2.13.0
PY := .venv/bin/python

SHELL := bash
.SHELLFLAGS := -o pipefail -c

.PHONY: demo smollm2 study references run gates test tests-with-sandboxes tests-beside interpreters toolchains clean
.DELETE_ON_ERROR:
.SECONDARY: # nothing that took long is removed as a step on the way

# --- set-up

.venv/installed: requirements.txt
	@$(PYTHON) -m venv .venv || { echo "error: no venv; on Debian: apt-get install python3-venv" >&2; exit 1; }
	.venv/bin/pip install -q $(TORCH) -r requirements.txt
	touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt
	.venv/bin/pip install -q -r tests/requirements.txt
	touch $@

.venv/installed-plots: .venv/installed
	.venv/bin/pip install -q matplotlib
	touch $@

# The interpreters of the corpus's PLs: root gets those that are missing, anyone else is told the command.
INTERPRETERS := python javascript ruby php perl lua bash tcl
interpreters:
	@missing=$$($(PYTHON) sandbox.py toolchains $(INTERPRETERS)) && if [ -n "$$missing" ]; then \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -qq; \
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing >/dev/null; \
	else echo "error: interpreters are missing; as root: apt-get install $$missing" >&2; exit 1; fi; fi

toolchains:
	apt-get update
	apt-get install -y --no-install-recommends $$($(PYTHON) sandbox.py toolchains)

# --- one run of the pipeline, in RUN: corpus, base, the arms with RL from each, evaluation.
# Each stage leaves a file that marks it as done, and is not run again while it stands. A stage that was
# interrupted goes on where it stopped; one whose input is newer than its start starts anew.

RUN ?= runs/own
SEED ?= 0
ARMS ?= source parallel
SPLIT ?= test
# A script that writes a pre-trained model's folder, in place of training base.
PRETRAINED ?=
# Further flags of each stage, and the threads of an arm, beside which another one may run.
CORPUS ?=
BASE ?=
SFT ?=
RL ?=
EVAL ?=
THREADS ?= 1
DATA := $(RUN)/data
MODELS := $(RUN)/base $(foreach arm,$(ARMS),$(RUN)/$(arm) $(RUN)/rl-$(arm))
ANEW = [ $(@D)/settings.json -nt $< ] || rm -rf $(@D)

run: $(RUN)/eval/eval.json

$(DATA)/languages.json: | .venv/installed
	$(PY) data.py make --seed $(SEED) --out $(DATA) $(CORPUS)

$(RUN)/base/summary.json: $(DATA)/languages.json
	@$(ANEW)
	$(if $(PRETRAINED),$(PY) $(PRETRAINED) $(@D) && touch $@,$(PY) sft.py --mixture base --seed $(SEED) --data $(DATA) --out $(@D) $(BASE))

$(ARMS:%=$(RUN)/%/summary.json): export OMP_NUM_THREADS = $(THREADS)
$(ARMS:%=$(RUN)/%/summary.json): $(RUN)/%/summary.json: $(RUN)/base/summary.json
	@$(ANEW)
	$(PY) sft.py --mixture $* --seed $(SEED) --data $(DATA) --model $(RUN)/base --out $(@D) $(SFT)

$(ARMS:%=$(RUN)/rl-%/summary.json): export OMP_NUM_THREADS = $(THREADS)
$(ARMS:%=$(RUN)/rl-%/summary.json): $(RUN)/rl-%/summary.json: $(RUN)/%/summary.json
	@$(ANEW)
	$(PY) rl.py --forkserver --seed $(SEED) --data $(DATA) --model $(RUN)/$* --out $(@D) --workers $(THREADS) $(RL)

$(RUN)/eval/eval.json: $(MODELS:%=%/summary.json)
	$(PY) eval.py --forkserver --data $(DATA) --models $(MODELS) --split $(SPLIT) --representations --out $(@D) $(EVAL) | sed '/^[|*]/d; /^$$/d'

# What a run ends with: the table of reserved words, where the rest is, and what its phrases say of claim (b).
define show
	@echo; awk -v RS= -v ORS='\n\n' '/^\*\*greedy pass@1, reserved words/ { print; getline; print }' $(1)/eval/table.md
	@echo "all tables: $(1)/eval/table.md   the figure: $(1)/eval/transfer.png"
	@sed -n 's/^parallel less source/this seed: &/p' $(1)/eval/table.md
endef

# --- the demo

# Smaller than the study: half of its SFT, three quarters of its RL, two thirds of its reserved problems, two arms,
# one seed. SEED, SPLIT and THREADS count; what else is to differ, give to run.
DEMO := runs/demo-$(SEED)-$(SPLIT)
demo: interpreters .venv/installed-plots
	@echo "A base model; for each arm (source: python alone, parallel: each function in four PLs) SFT and RL in python; evaluation"
	@$(MAKE) --no-print-directory --jobs=2 run RUN=$(DEMO) ARMS="source parallel" SFT="--tokens 1000000" RL="--steps 30" EVAL="--problems 40 --plots"
	$(call show,$(DEMO))
	@sed -n 's/^parallel less source.*/the study: &; see README.md/p' results/study/joined.md

# --- the same from a model that was really pre-trained, sized for two hours on two cores; on a GPU give SFT, RL and EVAL

smollm2: interpreters .venv/installed-tests
	@$(MAKE) --no-print-directory --jobs=2 run RUN=runs/smollm2 PRETRAINED=tests/smollm2.py \
		SFT="$(or $(SFT),--replay 0 --tokens 100000 --batch 2048 --lr 1e-4)" \
		RL="$(or $(RL),--steps 15 --prompts 8 --samples 8 --informative 4 --rounds 2 --lr 1e-5 --warmup 3 --max-new-tokens 128 --eval-problems 5)" \
		EVAL="--plots $(or $(EVAL),--problems 20)"
	$(call show,runs/smollm2)

# --- the study: two seeds at a time, each with a thread of its own

SEEDS ?= 7 8 9 10 11 12
STUDY ?= results/study
STUDY_ARMS ?= source multi crossed parallel

study: interpreters .venv/installed-tests
	$(MAKE) --no-print-directory --jobs=2 $(SEEDS:%=$(STUDY)/seed-%.json)
	$(PY) eval.py --join $(SEEDS:%=$(STUDY)/seed-%.json) --out $(STUDY) --plots

# Reference rows, two seeds each: a base that shows each function in all PLs; one that borrows a tenth of its words from
# the other community; another source PL; and RL in a target PL itself, which is what transfer could reach.
references:
	$(MAKE) study SEEDS="7 8" STUDY=results/aligned STUDY_ARMS="source parallel" CORPUS="--base-programs all"
	$(MAKE) study SEEDS="7 8" STUDY=results/borrowed STUDY_ARMS="source parallel" CORPUS="--borrowed 0.1"
	$(MAKE) study SEEDS="7 8" STUDY=results/ruby STUDY_ARMS="source parallel" CORPUS="--sft ruby python javascript php"
	$(MAKE) study SEEDS="7 8" STUDY=results/oracle STUDY_ARMS=source RL="--languages ruby"

# The same as the study on dev problems and dev seeds, to choose settings by; says which gates hold.
gates: interpreters .venv/installed
	$(MAKE) --no-print-directory study SEEDS="101 102 103" STUDY=results/gates SPLIT=dev
	$(PY) tests/gates.py runs/gates-101 runs/gates-102 runs/gates-103

$(STUDY)/seed-%.json: export OMP_NUM_THREADS = 1
$(STUDY)/seed-%.json: | .venv/installed
	+@mkdir -p $(@D)
	+$(MAKE) --no-print-directory --jobs=1 run RUN=runs/$(STUDY:results/%=%)-$* SEED=$* ARMS="$(STUDY_ARMS)"
	cp runs/$(STUDY:results/%=%)-$*/eval/eval.json $@

# --- tests

# Files that start no sandbox run beside the others, which count what sandboxes leave on the machine; of these
# come first the tests that wait for time limits more than they compute.
BESIDE := $(patsubst %,tests/test_%.py,chat kernels llama memory model sft)
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

clean:
	rm -rf .venv runs/demo-* runs/study-*
