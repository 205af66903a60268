# Two commands from a bare clone: `make demo` and `make test`. Each makes .venv with pinned versions first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Ranks of the demo; on a machine without GPUs one rank uses all cores.
RANKS ?= 1
# The demo's folders, so that a second run (another seed, say) can stand beside the first.
SHARDS := shards/digits
TEACHER := runs/digits_teacher_3
RUN := runs/digits_2to3

.PHONY: install demo demo-text test test-slow test-gpu-stand-in lint toys clean

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt requirements-pip.txt constraints.txt setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0] + ": make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements-pip.txt
	# A torch in a folder of PIP_FIND_LINKS goes first: pip would rather have one whose link tells its hash.
	$(BIN)/python -m pip install --quiet --require-hashes --no-index --no-deps -c requirements.txt torch 2>/dev/null || true
	$(BIN)/python -m pip install --quiet --require-hashes --no-build-isolation -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

demo: install
	$(BIN)/rdmd pack digits --out $(SHARDS)
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --num_gpus $(RANKS) rdmd_fast/train.py --config configs/digits/teacher_3.yaml
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --num_gpus $(RANKS) rdmd_fast/train.py --config configs/digits/rdmd_2to3.yaml
	$(BIN)/rdmd translate --model $(RUN)/export --input $(SHARDS)/2/test --output $(RUN)/translated
	$(BIN)/rdmd evaluate --model $(RUN)/export --teacher $(TEACHER)/export --source $(SHARDS)/2/test \
	  --target $(SHARDS)/3/test --judge $(SHARDS) --label 3 --out $(RUN)/report.json
	@echo "picture: $(RUN)/samples/final.png   numbers: $(RUN)/report.json   images: $(RUN)/translated"

# A text-to-image pipeline of digits, trained from nothing, then a sentence for a teacher.
PIPELINE := models/digits
TEXT_RUN := runs/digits_text_2to3
demo-text: install
	$(BIN)/rdmd pack digits --out shards/digits
	$(BIN)/rdmd pack digits --out shards/digits16 --resolution 16
	$(BIN)/python -m benchmarks.digits_pipeline --data shards/digits16 --judge shards/digits --out $(PIPELINE)
	$(BIN)/rdmd pack digits --out shards/digits_latents --resolution 16 --encoder $(PIPELINE)
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --num_gpus $(RANKS) rdmd_fast/train.py --config configs/digits/text_2to3.yaml
	$(BIN)/rdmd translate --model $(TEXT_RUN)/export --input shards/digits16/2/test --output $(TEXT_RUN)/translated
	$(BIN)/rdmd evaluate --outputs $(TEXT_RUN)/translated --source shards/digits/2/test --target shards/digits/3/test \
	  --judge shards/digits --label 3 --picture $(TEXT_RUN)/picture.png --out $(TEXT_RUN)/report.json

test: install
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-slow: install
	$(BIN)/python -m pytest -q -m slow

# The GPU path without a GPU: tests/gpu_stand_in/README.md. Needs a C++ compiler, and a CPU build of PyTorch.
test-gpu-stand-in: install
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "gpu_stand_in and not slow" tests/gpu_stand_in

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

# The 2-D problems, three minutes each, then measured against closed forms and exact optimal transport.
toys: install
	for name in gaussian_to_gaussian gaussian_to_8gaussians gaussian_to_swiss_roll two_moons_to_circles; do \
	  $(BIN)/python rdmd_fast/train.py --config configs/toy/$$name.yaml && $(BIN)/rdmd evaluate --run runs/toy/$$name || exit 1; \
	done

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
