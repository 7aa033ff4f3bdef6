#!/usr/bin/env bash
# What needs a CUDA GPU: trains on it, exports, and compares TorchScript and ONNX Runtime on CUDA, and TensorRT where it
# is installed, with eager PyTorch on the CPU; then serves ResNet-18 at 224 px with GPU workers, beside stock TorchServe and
# the bare forward pass. Prints the tables and keeps them in benchmarks/results: gpu.json and gpu/serving.json.
#
#   benchmarks/gpu.sh             on a machine with a GPU; PYTHON=… takes another than .venv/bin/python
#   benchmarks/gpu.sh --dry-run   the same on a CPU, keeping nothing: shows that the script itself works
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
device=cuda
if [ "${1:-}" = --dry-run ]; then
  device=cpu
elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: PyTorch sees no CUDA GPU on this machine; --dry-run tries the script without one" >&2
  exit 2
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

"$python" train.py --data digits --arch resnet18 --size 32 --epochs 2 --device $device --out "$out/digits"
"$python" -m export "$out/digits" --verify all --fp16
if [ $device = cuda ]; then
  results=benchmarks/results/gpu seconds=5
else
  results=$out/results seconds=1
fi
"$python" -m benchmarks.serving --only gpu --rounds 1 --seconds $seconds --out "$results"
if [ $device = cuda ]; then
  nvidia-smi --query-gpu=name,driver_version --format=csv
  mkdir -p benchmarks/results
  cp "$out/digits/export/parity.json" benchmarks/results/gpu.json
fi
