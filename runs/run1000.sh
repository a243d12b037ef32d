#!/usr/bin/env bash
# The $1000 tier: 32 layers, about 42 hours on a node of 8 H100 GPUs. The stages are those of speedrun.sh, the sizes these:
#
#   bash runs/run1000.sh                       in a screen or tmux session, and `2>&1 | tee run1000.log` to keep the output
#
# 34.9B tokens (ratio 20) x 4.8 characters are 670 shards, over 1,000 with what packing drops. 8 rows of 2,048 tokens are what is
# known to fit into a GPU of 80 GB.
set -euo pipefail
export DEPTH="${DEPTH:-32}" VOCAB_SIZE="${VOCAB_SIZE:-65536}" MAX_CHARS="${MAX_CHARS:-4000000000}"
export FIRST_SHARDS="${FIRST_SHARDS:-16}" SHARDS="${SHARDS:-1200}" DEVICE_BATCH_SIZE="${DEVICE_BATCH_SIZE:-8}"
exec bash "$(dirname "$0")/speedrun.sh"
