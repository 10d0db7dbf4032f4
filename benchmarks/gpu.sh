#!/usr/bin/env bash
# What a CUDA device reaches, each part on its own, in at most 8 minutes: see gpu.py.
# Without a device: sh benchmarks/gpu.sh --dry-run runs every part with tiny models on the CPU.
set -u
cd "$(dirname "$0")/.."
exec python3 benchmarks/gpu.py "$@"
