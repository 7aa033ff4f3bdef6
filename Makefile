# make demo            everything once, on bundled digits
# make test            lint, types and the tests, the real TorchServe included, three files at a time, as the tests of
#                      servers wait a third of their time (JOBS=1: one at a time, with its name)
# make test-all        the tests besides that need large programs of their own: Ray, a browser, Node, a C++ compiler
# make test-portable   the numerical tests again, as other processors round: 20 minutes on two cores
# make serve RUN=runs/digits [PORT=9000]
# make check           lint and types only
# make bench [DATA=…]  training (over 2 hours) and int8, whose figures stand in docs/performance.md
# make bench-serving   ours against stock TorchServe, LitServe and BentoML: half an hour, and nothing else on the machine
# make bench-reliability    load, bursts, faults, attacks: 25 minutes, and nothing else on the machine
# make setup           only the environment; TORCH=cpu takes PyTorch's small CPU-only build

PYTHON ?= python3
JOBS   ?= 3
RUN    ?= runs/digits
DATA   ?= cifar10
UV      = 0.13.9
BIN     = .venv/bin

# What other processors would compute, on this one: ATen's plain kernels and random numbers, MKL's sums in the order that
# is the same everywhere, oneDNN's convolutions without AVX-512 and without AVX. Each changes results here.
PORTABLE  = "ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE" ONEDNN_MAX_CPU_ISA=AVX2 ONEDNN_MAX_CPU_ISA=SSE41
NUMERICAL = architectures augmentation backends batchnorm calibration dataset_frames distributed evaluation explanations \
	export fastnet features golden handler head_fit metrics oblong pixel_rules predictor preprocessing recipes reduced runtimes \
	train training_step
TOOLCHAINS = client_batch client_cpp client_node client_web
PARALLEL  = $(if $(filter-out 1,$(JOBS)),--numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder)

.PHONY: demo test test-all test-portable check lint serve bench bench-serving bench-reliability setup lock clean
.DELETE_ON_ERROR:

demo: .venv/ready
	$(BIN)/python demo.py --at-least 0.95

# mypy, half a minute on a fresh clone, runs beside the tests, which leave a core idle now and then.
test: .venv/ready lint
	$(BIN)/mypy & types=$$!; $(BIN)/python -m pytest $(PARALLEL) $(TOOLCHAINS:%=--ignore=tests/test_%.py); tests=$$?; \
		wait $$types && exit $$tests

test-all: .venv/ready
	$(BIN)/python -m pytest $(PARALLEL) $(TOOLCHAINS:%=tests/test_%.py)

# The variables do not reach ONNX Runtime: its integer kernels run on a processor without VNNI, which QEMU emulates.
test-portable: .venv/ready
	for settings in $(PORTABLE); do echo "== $$settings"; \
		env $$settings $(BIN)/python -m pytest $(PARALLEL) -m "not server and not anywhere" $(NUMERICAL:%=tests/test_%.py) || exit; done
	@if command -v qemu-x86_64 > /dev/null && [ "$$(uname -m)" = x86_64 ]; then \
		INT8_EMULATOR="qemu-x86_64 -cpu Haswell" $(BIN)/python -m pytest -m int8 tests/test_reduced.py; \
	else echo "SKIPPED: int8 on a processor without VNNI; on x86-64: apt-get install qemu-user"; fi

check: .venv/ready lint
	$(BIN)/mypy

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

serve: .venv/ready
	$(BIN)/python serve.py $(RUN) $(if $(PORT),--port $(PORT))

bench: .venv/ready
	$(BIN)/python -m benchmarks.training --data $(DATA)
	$(BIN)/python -m benchmarks.reduced

bench-serving: .venv/ready .venv-peers/ready
	$(BIN)/python -m benchmarks.serving --peers .venv-peers/bin/python

bench-reliability: .venv/ready
	$(BIN)/python -m benchmarks.reliability

setup: .venv/ready

# uv, and not pip: it is many times faster, and it takes torch and torchvision from the same index, so that they match.
# With TORCH=cpu it takes them from PyTorch's own CPU index, without the CUDA libraries.
ifeq ($(TORCH),cpu)
TORCH_PINS = --torch-backend cpu $$(sed -n 's/^\(torch\(vision\)\{0,1\}==[^ ]*\).*/\1/p' requirements-torch.lock)
else
TORCH_PINS = -r requirements-torch.lock
endif

.venv/ready: requirements.lock requirements-torch.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name one: make PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV)
	VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet -r requirements.lock $(TORCH_PINS)
	@touch $@

.venv-peers/ready: benchmarks/peers/requirements.lock
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	VIRTUAL_ENV=.venv-peers $(BIN)/uv pip install --quiet -r benchmarks/peers/requirements.lock
	@touch $@

# Pins for every Python from 3.10 and every platform, with hashes, without an index's name. torch, torchvision and their
# CUDA libraries stand in a file of their own, so that another build of them can be chosen. The peers compute with the same.
lock:
	cat requirements.lock requirements-torch.lock > requirements.all  # pins are kept unless UPGRADE=--upgrade
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-annotate --no-header \
		--extra dev $(UPGRADE) pyproject.toml -o requirements.all
	awk '/^[a-z]/ {torch = /^(torch==|torchvision==|triton==|nvidia-|cuda-)/} \
		{print > (torch ? "requirements-torch.lock" : "requirements.lock")}' requirements.all
	rm requirements.all
	$(BIN)/uv pip compile --quiet --no-config --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
		$(UPGRADE) -c requirements.lock -c requirements-torch.lock \
		benchmarks/peers/requirements.in -o benchmarks/peers/requirements.lock

clean:
	rm -rf .venv .venv-peers .mypy_cache .pytest_cache .ruff_cache .hypothesis
