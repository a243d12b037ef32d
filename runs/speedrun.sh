#!/usr/bin/env bash
# The $100 tier: a ChatGPT of 20 layers, trained in about 4 hours on a node of 8 H100 GPUs.
#
#   bash runs/speedrun.sh                      in a screen or tmux session, and `2>&1 | tee speedrun.log` to keep the output
#   WANDB_RUN=speedrun bash runs/speedrun.sh   the same, logged to wandb
#
# Never run by its authors, who had no such node: the stages were run on CPUs, and their CUDA paths only with stand-ins.
# Writes below $NANOCHAT_BASE_DIR (default ~/.cache/nanochat) and ./report.md. Safe to run again: complete stages are kept, and
# a training that was cut off goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."

export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
export NPROC_PER_NODE="${NPROC_PER_NODE:-8}"
WANDB_RUN="${WANDB_RUN:-dummy}" # "dummy" = no wandb
DEPTH="${DEPTH:-20}"
TAG="${TAG:-d$DEPTH}"
source runs/setup.sh            # .venv and dependencies: the one place for it

train=(torchrun --standalone --nproc_per_node="$NPROC_PER_NODE" -m)
device_batch_size="${DEVICE_BATCH_SIZE:-32}"
chat=(--run="$WANDB_RUN" --model-tag="$TAG" --resume --save-every=200)

stage report-reset python -m nanochat.report reset

# The tokenizer reads 2e9 characters, 8 shards of 250M. Pretraining of d20 needs 8.7B tokens (ratio 20) x 4.8 characters, 167
# shards; packing drops about 35 % of the text, hence 257, and some to spare. They come while the tokenizer is trained.
# --prepare also fetches the conversations about who the model is, 1,000 synthetic ones: put your own in their place first.
stage data-first python -m nanochat.dataset -n "${FIRST_SHARDS:-8}" --prepare
python -m nanochat.dataset -n "${SHARDS:-280}" &
download=$!
trap 'kill "$download" 2>/dev/null || true' EXIT
stage tokenizer python -m scripts.tok_train --max-chars="${MAX_CHARS:-2000000000}" --vocab-size="${VOCAB_SIZE:-32768}"
stage tokenizer-eval python -m scripts.tok_eval
wait "$download" || { echo "the download failed; to go on, run this file again" >&2; exit 1; }
trap - EXIT

stage base-train "${train[@]}" scripts.base_train -- --run="$WANDB_RUN" --depth="$DEPTH" --model-tag="$TAG" \
    --device-batch-size="$device_batch_size" --target-param-data-ratio=20 --lanes=64 --resume --save-every=2000
stage base-loss "${train[@]}" scripts.base_loss -- --model-tag="$TAG"
stage base-eval "${train[@]}" scripts.base_eval -- --model-tag="$TAG"

stage mid "${train[@]}" scripts.mid_train -- "${chat[@]}" --device-batch-size="$device_batch_size"
stage mid-eval "${train[@]}" scripts.chat_eval -- --source=mid --model-tag="$TAG"
stage sft "${train[@]}" scripts.chat_sft -- "${chat[@]}" --source=mid
stage sft-eval "${train[@]}" scripts.chat_eval -- --source=sft --model-tag="$TAG"
if [[ -n "${RL:-}" ]]; then # RL=1: some hours more, better at school arithmetic alone
    stage rl "${train[@]}" scripts.chat_rl -- "${chat[@]}"
    stage rl-eval "${train[@]}" scripts.chat_eval -- --source=rl --model-tag="$TAG" --task-name=GSM8K
fi
stage report python -m nanochat.report generate

echo "Talk to it: source .venv/bin/activate; export NANOCHAT_BASE_DIR=$NANOCHAT_BASE_DIR; python -m scripts.chat_cli"
