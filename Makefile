# One environment for everything; `make demo` is the place to start.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FOLDERS := storage inference evaluation corpus server training ui sagemaker lambda
PYTEST_ARGS ?= -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all lint format app api soak bench bench-gpu clean local-aws aws-validate aws-package aws-deploy aws-delete

$(VENV)/base: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/dev: $(VENV)/base requirements-dev.txt requirements-aws.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt -r requirements-aws.txt
	touch $@

demo: $(VENV)/base          ## train on the sample stories, then write with that model and with the one that comes along
	@$(BIN)/python -m inference.quantize 2>/dev/null &
	$(BIN)/python train.py --preset sample
	@for model in $$(ls -dt runs/sample*/ | head -n 1)best models/victorian-mini; do \
		printf '\n--- %s ---\n' "$$model"; \
		$(BIN)/python generate.py --model "$$model" --prompt "The old house stood" --max-tokens 125 --seed 1 || exit; \
	done
	@printf '\nThe first text is by the model trained just now, on the sample stories (0.7 MB); the second comes along, and learned from 69 novels.\n%s\n' \
		"Yours, of your books, in an hour: $(BIN)/python train.py --input my_books/ --minutes 60"

test: $(VENV)/dev           ## the tests, without those marked slow
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow"
	@echo "left out: the tests marked slow; all of them run with: make test-all"

test-all: $(VENV)/dev       ## all tests, as CI runs them
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/dev           ## style, spelling and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy $(wildcard *.py) $(FOLDERS) $(wildcard benchmarks/*.py)

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

app: $(VENV)/base           ## the app in a browser
	@$(BIN)/python -m inference.quantize 2>/dev/null &
	$(BIN)/streamlit run app.py

api: $(VENV)/base           ## the server on 127.0.0.1:8000
	$(BIN)/python api.py

soak: $(VENV)/dev           ## five minutes of killing and resuming a training run
	$(BIN)/python -m pytest tests/training/test_resume.py -k kill --soak 300

# NANOGPT=FOLDER: also beside a checkout of nanoGPT; SHAKESPEARE=FILE: the race to a loss; DATA=FOLDER: recipes on prepared texts
bench: $(VENV)/dev          ## the published figures, on this machine's processor (about 15 minutes)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	$(BIN)/python benchmarks/train_step.py --seconds 60 $(if $(NANOGPT),--nanogpt $(NANOGPT))
	$(BIN)/python benchmarks/decode.py --seconds 120
	$(BIN)/python benchmarks/engine_ceiling.py
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/startup.py
	$(if $(SHAKESPEARE),$(BIN)/python benchmarks/shakespeare.py --text $(SHAKESPEARE))
	$(if $(DATA),$(BIN)/python benchmarks/recipes.py --data $(DATA) --also-tuned)

# GPU_PYTHON=python3: an interpreter that has the packages already, where the index cannot be reached
GPU_PYTHON ?= $(BIN)/python
bench-gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/dev)  ## the GPU's tests and figures (about 8 minutes)
	@if ! $(GPU_PYTHON) -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
		echo "no NVIDIA GPU here: nothing was tested or measured"; exit 0; fi; \
	code=0; \
	$(GPU_PYTHON) -m pytest -m gpu tests/test_gpu.py tests/inference/test_cuda_graphs.py || code=1; \
	$(GPU_PYTHON) benchmarks/train_gpu.py $(if $(NANOGPT),--nanogpt $(NANOGPT)) || code=1; \
	$(GPU_PYTHON) benchmarks/decode.py --device cuda --streams 1 64 --seconds 45 || code=1; \
	exit $$code

# IN_LAMBDA=1: the worker itself writes, without SageMaker's runtime
local-aws: $(VENV)/base     ## gateway, Lambda and SageMaker's runtime on this machine
	$(BIN)/python lambda/local_stack.py $(if $(MODEL),--model $(MODEL)) $(if $(IN_LAMBDA),--in-lambda)

aws-validate: $(VENV)/dev
	$(BIN)/cfn-lint lambda/template.yaml
	$(BIN)/python -m pytest tests/aws/test_template.py

aws-package: $(VENV)/base
	$(BIN)/python lambda/deploy_relay.py --package

# IN_LAMBDA=MODEL_FOLDER: no endpoint, the model writes in Lambda
aws-deploy: $(VENV)/base
	$(BIN)/python lambda/deploy_relay.py --bucket $(BUCKET) $(if $(ENDPOINT),--endpoint $(ENDPOINT)) \
		$(if $(IN_LAMBDA),--in-lambda $(IN_LAMBDA)) \
		$(if $(MODE),--mode $(MODE)) $(if $(MAX_TOKENS),--max-tokens $(MAX_TOKENS)) $(if $(TOKEN),--new-token $(TOKEN))

aws-delete: $(VENV)/base
	$(BIN)/python lambda/deploy_relay.py --bucket $(BUCKET) --delete

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
