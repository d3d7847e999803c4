# Everything runs in .venv. Set-up runs again only when pyproject.toml changes or `make clean` was called.
# `make PYTHON=python3.12 setup` picks another interpreter.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY := .venv/bin/python
# Of what is installed a tenth is ever imported: bytecode is written then, where Python may.
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-engine test-storage test-rest install-test check fuzz soak chaos setup setup-l2 setup-vllm clean

demo: .venv/.stamp-demo
	@$(MAKE) --no-print-directory setup-vllm || echo "vLLM for the CPU cannot be installed here: the demo goes on without it"
	$(PY) scripts/demo.py

# Two at once, and the third when one of them is over: three at once are hardly quicker, and too much for some deadlines.
test: check setup-l2 setup-vllm
	@$(MAKE) --no-print-directory -j2 --keep-going --output-sync=target test-engine test-rest test-storage

test-engine:
	$(PY) -m pytest -q -m vllm

test-storage:
	$(PY) -m pytest -q tests/storage

test-rest:
	$(PY) -m pytest -q -m "not vllm" --ignore tests/storage

install-test: setup
	$(PY) scripts/check_install.py

check: setup
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

fuzz: setup
	$(PY) -m pytest -q -s tests/fuzz --fuzz-seconds 600 --timeout 1500

# 4 hours of eight engines side by side.
soak: setup-vllm
	$(PY) -m pytest -q -s tests/integration/test_soak.py --soak-seconds 14400 --soak-engines 8

chaos: setup-vllm
	$(PY) -m pytest -q -s tests/chaos_vllm --chaos-seconds 600

setup: .venv/.stamp-dev

# Looks each time: what it installs is outside .venv.
setup-l2: setup
	@$(PY) scripts/setup_l2_servers.py

setup-vllm: .venv/.stamp-vllm

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(PY):
	$(PYTHON) -m venv .venv
	-$(PIP) --upgrade pip  # that of Python 3.11 takes twice as long

.venv/.stamp-demo: pyproject.toml | $(PY)
	$(PIP) --editable '.[tokenizer]'
	touch $@

.venv/.stamp-dev: pyproject.toml | $(PY)
	$(PIP) --editable '.[dev]'
	touch $@ .venv/.stamp-demo

.venv/.stamp-vllm: scripts/setup_vllm_cpu.py .venv/.stamp-dev
	@$(PY) scripts/setup_vllm_cpu.py
	touch $@
