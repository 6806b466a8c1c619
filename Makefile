# Two commands: `make demo` runs the main job, `make test` passes the tests. Each sets up .venv if it has to.
# `make test TORCH=2.11.0` passes them on another torch (with the Triton that it requires), in an environment of its own;
# TESTS="tests/kernels/test_op.py" names the files.
PYTHON ?= python3
ifdef TORCH
VENV := .venv-torch-$(TORCH)
else
VENV := .venv
endif
BIN := $(VENV)/bin

.PHONY: demo test clean

demo: $(VENV)/.installed
	$(BIN)/python -m mfpsn_fx demo

# What exercises the C++ kernels, but for how they are built
CPP_TESTS := tests/kernels/implementations/test_fused_cpu.py tests/passes/test_fuse_norms.py \
	$(addprefix tests/kernels/test_,kernels.py layer.py op.py) \
	-k '(fused_cpu or fused-cpp or test_layer) and not (TestBuild or memory_of)'

# Two processes of one thread each: one process leaves a second core idle most of the time, and threads of two would wait
# for each other. The interpreter of Triton 3.6 does not take numpy 2.4: on another torch, programs are only compiled.
test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(TESTS)
ifndef TESTS
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --another-level $(CPP_TESTS)
endif
ifeq ($(TORCH)$(TESTS),)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist worksteal \
		tests/kernels/implementations/test_fused_triton.py
endif

# The libraries whose networks we convert come without their dependencies: some would pull a second torch. Of aeon only
# the data is used.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; say which with: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifdef TORCH
	sed -e 's/^torch==.*/torch==$(TORCH)/' -e '/^triton==/d' constraints.txt > $(VENV)/constraints.txt
else
	cp constraints.txt $(VENV)/constraints.txt
endif
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps -c $(VENV)/constraints.txt spikingjelly snntorch norse nir nirtorch aeon
	touch $@

clean:
	rm -rf .venv .venv-torch-* build dist *.egg-info
