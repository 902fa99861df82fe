# Two commands: `make demo` and `make test`.  Each makes a virtual environment and installs what it needs.
#   make demo PYTHON=python3.12        another Python (3.10 to 3.13)
#   make test TORCH=torch==2.8.0       another torch (2.8 or newer)
#   make test-fast                     what to run while you work (two minutes on two cores)
#   make test-slow                     further cases of what `make test` tests, before each landing
# Tests run side by side, those that bring up a Slurm cluster one after another, when the machine is theirs.
# Where torch should be a CPU build, name PyTorch's CPU wheel index in PIP_EXTRA_INDEX_URL and TORCH=torch==2.13.0+cpu.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
RUN    := $(VENV)/bin/python
export OMP_NUM_THREADS ?= 1
PYTEST := $(RUN) -m pytest --durations 10
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo test test-fast test-slow lint grid speed gpt-proof vit-study clean

demo: $(VENV)/installed
	$(RUN) -m ringx demo --out demo_out

test: $(VENV)/installed-dev
	$(PYTEST) -m "not slow and not slurm" $(SIDE_BY_SIDE)
	$(PYTEST) -m "slurm and not slow"

test-fast: $(VENV)/installed-dev
	$(PYTEST) -m fast $(SIDE_BY_SIDE)

test-slow: $(VENV)/installed-dev
	$(PYTEST) -m "slow and not slurm" $(SIDE_BY_SIDE)
	$(PYTEST) -m "slow and slurm"

lint: $(VENV)/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

# The whole exactness grid: 1, 2, 3, 4 and 8 ranks, every layout, mask, dtype, head count and size (about an hour on 2 cores).
grid: $(VENV)/installed
	$(RUN) -m ringx verify --nproc 1,2,3,4,8 --grid --json demo_out/grid.json

# The README's speed table (about 15 minutes; needs 2 idle cores).
speed: $(VENV)/installed
	$(RUN) -m ringx bench --nproc 2 --seqlens 8192 --masks causal,full --layouts zigzag --dtypes bf16 --heads 8 --kv-heads 8 --head-dim 64 \
	    --reps 7 --out demo_out/speed --resume

# What the GPT trainer promises, with real processes: every mesh and algorithm, 20 kills, the cost of a step (half an hour; 2 idle cores).
# The rows of DeepSpeed need: .venv/bin/pip install -e .[zero]
gpt-proof: $(VENV)/installed
	$(RUN) script/gpt_proof.py product --out demo_out/gpt
	$(RUN) script/gpt_proof.py kills --out demo_out/gpt
	$(RUN) script/gpt_cost.py cp1 --out demo_out/gpt
	$(RUN) script/gpt_cost.py cp2 --out demo_out/gpt

# What the ViT app forecasts, and what small patches bring and cost (an hour; 2 idle cores).  ERA5=FILE: a month of hourly 2 m temperature.
vit-study: $(VENV)/installed
	$(if $(ERA5),$(RUN) script/vit_study.py era5 --data $(ERA5) --out demo_out/vit)
	$(RUN) script/vit_study.py default --out demo_out/vit
	$(RUN) script/vit_study.py patches --out demo_out/vit
	$(RUN) script/vit_study.py time --out demo_out/vit

# torch first: everything else must then accept the torch that is there.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip setuptools wheel
	$(RUN) -m pip install --quiet "$(TORCH)" numpy
	touch $@

$(VENV)/installed: $(VENV)/torch setup.py
	$(RUN) -m pip install --quiet -e ".[plot,apps]"
	touch $@

$(VENV)/installed-dev: $(VENV)/torch setup.py
	$(RUN) -m pip install --quiet -e ".[plot,apps,dev]"
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) demo_out build *.egg-info
