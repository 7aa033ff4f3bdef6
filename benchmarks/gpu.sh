#!/usr/bin/env bash
# What needs a CUDA GPU, in this order; each part prints a table and keeps its figures in benchmarks/results/gpu:
#
# 1. training, with DATA=cifar10-jpeg.tar.xz (or any --data of train.py at 32 px): the fast recipe in a cold process, from
#    the data on the disk to the saved state_dict (cold.json), and the classic recipe and a ResNet-18 (training.json);
# 2. serving: ResNet-18 at 224 px with GPU workers, beside stock TorchServe and the bare forward pass (serving.json);
# 3. parity: TorchScript and ONNX Runtime on CUDA, and TensorRT, with eager PyTorch on the CPU (parity.json). ONNX Runtime
#    needs onnxruntime-gpu in the place of onnxruntime; what is missing is listed as skipped.
#
#   DATA=… benchmarks/gpu.sh      on a machine with a GPU; PYTHON=… takes another than .venv/bin/python
#   benchmarks/gpu.sh --dry-run   the same on a CPU, as briefly as it goes, keeping nothing: the script itself works
#
# A part that fails does not keep the others from running; the exit code is then 1.
set -uo pipefail
case ${DATA:-} in /*) ;; *) [ ! -e "${DATA:-}" ] || DATA=$PWD/$DATA ;; esac
case ${PYTHON:-} in /*) ;; */*) PYTHON=$PWD/$PYTHON ;; esac
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-$PWD/.venv/bin/python}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

if [ "${1:-}" = --dry-run ]; then
  device=cpu arch=simplecnn results=$out DATA=digits epochs=1 rounds=1 seconds=1
else
  if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: PyTorch sees no CUDA GPU on this machine; --dry-run tries the script without one" >&2
    exit 2
  fi
  device=cuda arch=resnet18 results=$PWD/benchmarks/results/gpu epochs=10,40 rounds=3 seconds=5
  nvidia-smi --query-gpu=name,driver_version --format=csv
fi
mkdir -p "$results"
status=0

if [ -n "${DATA:-}" ]; then
  "$python" -m benchmarks.cold --data "$DATA" --epochs $epochs --rounds $rounds --device $device \
    --json "$results/cold.json" || status=1
  baselines=classic
  [ $device = cpu ] || baselines="classic,CIFAR ResNet-18 30 seconds"
  "$python" -m benchmarks.training --data "$DATA" --only "$baselines" --rounds 1 --device $device \
    --json "$results/training.json" || status=1
fi

"$python" -m benchmarks.serving --only gpu --rounds 1 --seconds $seconds --out "$results" || status=1

"$python" train.py --data digits --arch $arch --size 32 --epochs 2 --device $device --out "$out/digits" &&
  "$python" -m export "$out/digits" --verify all --fp16 || status=1
[ ! -e "$out/digits/export/parity.json" ] || cp "$out/digits/export/parity.json" "$results/parity.json"
exit $status
