#!/usr/bin/env bash
# What needs a CUDA GPU: trains on it, exports, and compares TorchScript and ONNX Runtime on CUDA, and TensorRT where it
# is installed, with eager PyTorch on the CPU; then serves ResNet-18 at 224 px with GPU workers, beside stock TorchServe and
# the bare forward pass. With DATA=cifar10-jpeg.tar.xz (or any --data of train.py at 32 px) it also times the fast recipe:
# a cold process, from the data on the disk to the saved state_dict. Prints the tables and keeps them in benchmarks/results:
# gpu.json, gpu/serving.json and gpu/training.jsonl.
#
#   DATA=… benchmarks/gpu.sh      on a machine with a GPU; PYTHON=… takes another than .venv/bin/python
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
epochs="10 10 10 40"
if [ $device = cpu ]; then
  DATA=digits epochs=1
fi
mkdir -p "$results"
for count in ${DATA:+$epochs}; do
  started=$(date +%s.%N)
  "$python" train.py --data "$DATA" --recipe fast --epochs "$count" --device $device --json --out "$out/fast" | tail -1 |
    "$python" -c 'import json, sys, time
summary, started, epochs = json.loads(sys.stdin.read()), float(sys.argv[1]), int(sys.argv[2])
row = {"epochs": epochs, "test_accuracy": summary["test"]["accuracy"], "cold_seconds": time.time() - started,
       "training_seconds": summary["train"]["seconds"], "data_seconds": summary["train"]["data_seconds"]}
print(json.dumps(row))' "$started" "$count"
done | tee "$out/training.jsonl"
[ ! -s "$out/training.jsonl" ] || cp "$out/training.jsonl" "$results"
"$python" -m benchmarks.serving --only gpu --rounds 1 --seconds $seconds --out "$results"
if [ $device = cuda ]; then
  nvidia-smi --query-gpu=name,driver_version --format=csv
  mkdir -p benchmarks/results
  cp "$out/digits/export/parity.json" benchmarks/results/gpu.json
fi
