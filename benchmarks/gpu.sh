#!/usr/bin/env bash
# Everything that wants a GPU, in under ten minutes: kernels against plain PyTorch, one step, training at real shape.
# PEER_PYTHON: a python with sae_lens, to time SAELens on the same GPU. Rows go to benchmarks/results (or $OUT).
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
results=${OUT:-benchmarks/results}
mkdir -p "$results"
step() { printf '\n== %s (at %d s)\n' "$1" "$SECONDS"; }
status=0

step "machine"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
python3 -c 'import torch, triton, transformers; print(torch.__version__, triton.__version__, transformers.__version__)'

step "kernels and fused step against plain PyTorch, on the GPU"
timeout 150 python3 -m pytest -q -x -p no:cacheprovider -o filterwarnings= tests/test_kernels.py tests/test_fused.py || status=1

step "one step"
timeout 120 python3 benchmarks/train_step.py --device cuda --steps 20 --csv "$results/train_step.csv" \
    ${PEER_PYTHON:+--peer-python "$PEER_PYTHON"} || status=1

step "layer 10, then all twelve, at real shape"
timeout 200 python3 benchmarks/gpu_run.py --csv "$results/gpu_run.csv" || status=1

step "cells side by side against one after the other"
timeout 90 python3 benchmarks/ablate.py --device cuda --tokens 1000000 --csv "$results/ablate.csv" || status=1

step "reproduce tiny-res on the GPU: Ctrl-C, resume"
run=$(mktemp -d)/run
timeout --signal=INT 25 python3 -m saezoo reproduce tiny-res all --device cuda --out "$run" --offline
timeout 120 python3 -m saezoo reproduce tiny-res all --device cuda --out "$run" --offline --resume || status=1

step "done, status $status"
exit $status
