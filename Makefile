# make demo        the whole pipeline on a CPU, set-up included; prints the transfer table
# make test        ruff and pytest, set-up included
# make toolchains  the compilers and interpreters that Debian packages (as root)
# make clean       forget the demo's results and the environment

PYTHON ?= python3
# A build for CPUs is enough for the demo; on a GPU machine give the build you want.
TORCH ?= torch==2.13.0
PY := .venv/bin/python
RUN := runs/demo
DATA := $(RUN)/data

.PHONY: demo test toolchains clean
.DELETE_ON_ERROR:

demo: $(RUN)/eval/table.md
	@cat $<

# --- set-up

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv || { echo "error: no venv; on Debian: apt-get install python3-venv" >&2; exit 1; }
	.venv/bin/pip install -q "$(TORCH)" -r requirements.txt
	touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt
	.venv/bin/pip install -q -r tests/requirements.txt
	touch $@

# --- the demo: each stage leaves a file that marks it as done, and is not run again while it stands

STAGES := base source rl-source parallel rl-parallel

$(DATA)/languages.json: | .venv/installed
	$(PY) data.py make --out $(DATA)

$(RUN)/base/summary.json: $(DATA)/languages.json
	$(PY) sft.py --mixture base --data $(DATA) --out $(RUN)/base

$(RUN)/source/summary.json $(RUN)/parallel/summary.json: $(RUN)/%/summary.json: $(RUN)/base/summary.json
	$(PY) sft.py --mixture $* --data $(DATA) --model $(RUN)/base --out $(RUN)/$*

$(RUN)/rl-source/summary.json $(RUN)/rl-parallel/summary.json: $(RUN)/rl-%/summary.json: $(RUN)/%/summary.json
	$(PY) rl.py --data $(DATA) --model $(RUN)/$* --out $(RUN)/rl-$*

$(RUN)/eval/table.md: $(STAGES:%=$(RUN)/%/summary.json)
	$(PY) eval.py --data $(DATA) --models $(STAGES:%=$(RUN)/%) --out $(RUN)/eval

# --- the rest

test: .venv/installed-tests
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PY) -m pytest

clean:
	rm -rf .venv runs/demo
