# cxrpaper: `make paper` makes the study's tables and figures, `make test` proves them. Needs python3 >= 3.10 and make; the rest is installed into .venv
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
PYTHON ?= python3
PROFILE ?= smoke
CORES ?= $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
# GPUs here: those of CUDA_VISIBLE_DEVICES where it is set, else all
GPUS ?= $(shell { if [ -n "$${CUDA_VISIBLE_DEVICES+set}" ]; then tr , '\n' <<<"$$CUDA_VISIBLE_DEVICES" | grep -c .; else nvidia-smi -L 2>/dev/null | grep -c '^GPU'; fi; } || true)
# trainings that share a GPU: small networks do not fill it
SLOTS ?= 1
export SLOTS
# where the jobs run: local, or slurm (JOBS at a time at most; PARTITION and ACCOUNT where the cluster asks for them; MORE for any other option of Snakemake)
EXECUTOR ?= local
JOBS ?= 100
WHERE.local = --cores $(CORES) --resources gpu=$$(( $(GPUS) * $(SLOTS) ))
WHERE.slurm = --executor slurm --jobs $(JOBS) --latency-wait 60 --default-resources mem_mb=8000 runtime=240 $(PARTITION:%=slurm_partition='"%"') $(ACCOUNT:%=slurm_account='"%"')
WHERE = $(or $(WHERE.$(EXECUTOR)),$(error EXECUTOR=$(EXECUTOR) is not known: local or slurm))
UV := .uv/bin/uv
BIN := .venv/bin
# one `make paper` at a time: the kernel drops flock's lock when it is killed, Snakemake's own would stay; jobs do not inherit it (--close), a job left over has a lock of its own
LOCKED = $(shell command -v flock >/dev/null && echo flock --nonblock --close --conflict-exit-code 75 Snakefile)
# jobs on this machine are copies of one process that has imported PyTorch and the rest (nbs/appendix/machine/warm.ipynb)
WARM = $(if $(and $(filter local,$(EXECUTOR)),$(filter Linux,$(shell uname -s))),$(BIN)/cxr_warm)
SNAKEMAKE = $(LOCKED) $(WARM) $(BIN)/snakemake --nolock $(WHERE) --config study=config/$(PROFILE).yaml --rerun-incomplete --keep-going --show-failed-logs $(MORE)
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# kernels choose how pictures get into a page: with a backend named here none would
unexport MPLBACKEND
export PYTHONWARNINGS := ignore
export UV_HTTP_TIMEOUT := 300
# where it is set, every process compiles PyTorch and the rest from source: cxrpaper.training.finetune then takes 22 s of CPU to import instead of 9
unexport PYTHONDONTWRITEBYTECODE

# executes pages and stores them, each whole or not at all
STORE = $(BIN)/python tests/website/stored.py
ALL ?=
PARTS ?= 1
MIRROR ?=
.PHONY: help data paper plan measure verify reproduce crate test test-quick lab book appendix site readme lock bench clean
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 18

# a corpus elsewhere stands in the place of the study's own: its data_root, such as data/open, is a link to it
DATA ?=
ROOT = $(shell sed -n 's/^data_root: *\([^ \#]*\).*/\1/p' config/$(PROFILE).yaml 2>/dev/null)
define link
	@[ -f config/$(PROFILE).yaml ] || { echo "PROFILE=$(PROFILE): no config/$(PROFILE).yaml; there are $$(cd config && grep -l '^profile:' *.yaml | sed 's/\.yaml//' | xargs)" >&2; exit 1; }
	@[ ! "$(DATA)" ] || { [ -d "$(DATA)" ] || { echo "DATA=$(DATA): no such folder" >&2; exit 1; }; [[ "$(ROOT)" == data/* ]] || { echo "DATA: config/$(PROFILE).yaml has no data_root below data/ that could be a link to it" >&2; exit 1; }; mkdir -p $$(dirname $(ROOT)); [ ! -e $(ROOT) ] || [ -L $(ROOT) ] || { echo "$(ROOT) is there already: remove it, or leave out DATA" >&2; exit 1; }; ln -sfn "$$(cd "$(DATA)" && pwd)" $(ROOT); }
endef

paper: .venv/installed ## every table and figure, from DICOM files to figures/ (PROFILE=smoke, PROFILE=open after make data, or PROFILE=study on a GPU; EXECUTOR=slurm on a cluster)
	$(link)
	@$(SNAKEMAKE) || { [ $$? != 75 ] || echo "another make paper is running in this folder" >&2; exit 1; }
	@echo "done: runs/$(PROFILE)/results.ipynb shows every table and figure; the files are in $$(sed -n 's/^figures: *\([^ #]*\).*/\1/p' config/$(PROFILE).yaml)/"

data: .venv/installed ## the open corpus, without an account: PARTS of NIH's twelve archives (2 GB the first, 45 GB all) and the RSNA's reads, into data/open (MIRROR= an address or a folder that holds the same files)
	@mkdir -p data
	@$(BIN)/papermill --log-level WARNING nbs/appendix/data/fetch.ipynb data/fetch.ipynb -p parts $(PARTS) -p download True $(if $(MIRROR),-p mirror "$(MIRROR)")

plan: .venv/installed ## what `make paper` would take now: trainings, what is done, time, GPU hours, disk, and the jobs
	@$(BIN)/cxr_plan config/$(PROFILE).yaml --gpus $(GPUS)
	@$(BIN)/snakemake --nolock --cores $(CORES) --config study=config/$(PROFILE).yaml --dry-run --quiet rules

measure: .venv/installed ## time each kind of training of the study on this machine, for the plan (into config/throughput.csv)
	@$(SNAKEMAKE) --forcerun costs -- costs

verify: .venv/installed ## recompute every table and figure from the saved runs; fails if figures/ differs
	@$(BIN)/cxr_verify config/$(PROFILE).yaml

reproduce: .venv/installed ## after make paper: the tables made here against the committed ones, cell by cell; fails if more lie outside than training again explains
	@$(BIN)/cxr_reproduce config/$(PROFILE).yaml

crate: .venv/installed ## a finished study to pass on: tables and figures with the runs, code and data digests behind each (crate/, RO-Crate and codecheck.yml)
	@$(BIN)/cxr_crate config/$(PROFILE).yaml

# a file of tests stays in one process, the longest first (tests/conftest.py); what measures time runs alone
test: .venv/installed ## every notebook, then the test suite
	OMP_NUM_THREADS=1 MPLBACKEND=agg $(BIN)/nbdev_test --n_workers 2 --timing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -ra --durations=15 -m 'not serial' -n 2 --dist loadfile --no-loadscope-reorder tests
	$(BIN)/python -m pytest -q -ra --durations=5 -m serial $$(grep -l mark.serial tests/test_*.py)

test-quick: .venv/installed ## for work in between: the tests that train nothing, in a few minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m 'not serial and not long' -n 2 --dist loadfile tests

lab: .venv/installed ## JupyterLab on nbs/index.ipynb
	$(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/nbs/index.ipynb $(MORE)

readme: .venv/installed ## README.md from nbs/index.ipynb, executed on what is in figures/ now
	@$(STORE) --all nbs/index.ipynb
	$(BIN)/python tests/readme.py README.md

book: .venv/installed ## the pages of the book, executed and stored with what they show, and README.md (a few minutes)
	@$(STORE) --all nbs/[0-9]*.ipynb nbs/appendix/paper/contents.ipynb
	@$(MAKE) readme

appendix: .venv/installed ## the pages of the appendix whose code changed since they were stored, executed and stored with what they show (ALL=1: every page, half an hour on two cores)
	@$(STORE) $(if $(ALL),--all) nbs/appendix/*/*.ipynb

# its own environment: what draws web pages is no part of the study's (tests/website/requirements.in)
site: .venv/installed .site/installed ## the web pages, offline: book, appendix, library, tables and figures, into _docs/ (two minutes); what is broken, empty or stale fails it
	@rm -rf .site/html && $(BIN)/python tests/website/pages.py .site/source
	@.site/env/bin/python -m sphinx -b html -q -W --keep-going -E -j 2 -c tests/website -d .site/doctrees .site/source .site/html
	@$(BIN)/python tests/website/check.py .site/html .site/source
	@rm -rf _docs && mv .site/html _docs
	@echo "done: _docs/index.html"

.site/installed: tests/website/requirements.lock .venv/installed
	@$(UV) venv --quiet --clear --python .venv/bin/python .site/env
	@$(UV) pip sync --quiet --python .site/env --require-hashes tests/website/requirements.lock
	@touch $@

lock: $(UV) ## requirements.lock from settings.ini: exact pins with hashes, for Linux, macOS and Windows
	$(PYTHON) tests/requirements.py | $(UV) pip compile --universal --python-version 3.11 --generate-hashes --no-annotate \
	    --custom-compile-command 'make lock' --quiet --output-file requirements.lock -
	$(UV) pip compile --universal --python-version 3.11 --generate-hashes --no-annotate \
	    --custom-compile-command 'make lock' --quiet --output-file tests/website/requirements.lock tests/website/requirements.in

bench: .venv/installed ## what is fast, against what: figures/benchmarks/benchmarks.md (ten minutes alone on two cores; MORE="steps moco" measures those only)
	OMP_NUM_THREADS=1 MPLBACKEND=agg $(BIN)/python tests/benchmark.py $(MORE)

clean: ## remove runs, phantoms, decoded stores and caches (not .venv, not figures, no corpus and no weights that were fetched)
	rm -rf runs data/phantom data/stores _docs .snakemake .pytest_cache nbs/.ipynb_checkpoints
	find . -name __pycache__ -not -path './.venv/*' -not -path './.uv/*' -prune -exec rm -rf {} +

$(UV):
	@command -v $(PYTHON) >/dev/null || { echo "missing: $(PYTHON). Install Python 3.10 or later (Debian and Ubuntu: apt-get install python3 python3-venv), or say which: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "too old: $$($(PYTHON) --version). cxrpaper needs Python 3.10 or later: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "missing: the venv module of $(PYTHON). Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "environment 1/4: uv, the installer"
	@$(PYTHON) -m venv .uv && .uv/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9 \
	    || { rm -rf .uv; echo "uv could not be installed: is the Python package index within reach?" >&2; exit 1; }

# what the environment is made of; the first `make` of several at once makes it, the others wait and find it made
ENVIRONMENT = requirements.lock setup.py settings.ini tests/needs_quarto.sh
ifndef MAKING
.venv/installed: $(ENVIRONMENT)
	@$$(command -v flock >/dev/null && echo flock setup.py) $(MAKE) --silent MAKING=1 .venv/installed
else
.venv/installed: $(ENVIRONMENT) $(UV)
	@avail=$$(df -Pk . | awk 'NR==2 {print int($$4/1048576)}'); [ -x .venv/bin/python ] || [ "$$avail" -ge 8 ] || { echo "too little room: $$avail GiB free here, the environment takes about 6 GiB (PyTorch with CUDA)" >&2; exit 1; }
	@echo "environment 2/4: .venv with Python >= 3.11"
	@.venv/bin/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || $(UV) venv --quiet --clear --seed --python "$$($(PYTHON) -c 'import sys; print(sys.executable if (3, 11) <= sys.version_info < (3, 14) else ">=3.11,<3.14")')" .venv \
	    || { echo "no Python from 3.11 to 3.13 was found and none could be downloaded: install one, or make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "environment 3/4: the locked packages"
	@$(UV) pip sync --python .venv --require-hashes requirements.lock
	@echo "environment 4/4: cxrpaper itself, editable"
	@$(UV) pip install --quiet --python .venv --no-deps --no-build-isolation --editable .
	@mkdir -p .venv/etc/ipython && echo 'c.IPKernelApp.log_level = 40  # else each kernel warns that it listens on this machine without encryption' > .venv/etc/ipython/ipython_kernel_config.py
	@for c in nbdev_docs nbdev_preview nbdev_readme; do cp tests/needs_quarto.sh $(BIN)/$$c; done
	@touch $@
endif
