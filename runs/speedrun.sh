#!/usr/bin/env bash
# The $100 tier: a ChatGPT of 20 layers, trained in about 4 hours on a node of 8 H100 GPUs.
#
#   bash runs/speedrun.sh                      in a screen or tmux session, and `2>&1 | tee speedrun.log` to keep the output
#   WANDB_RUN=speedrun bash runs/speedrun.sh   the same, logged to wandb
#
# On several nodes, run it on each, e.g. by runs/slurm.sh, with the same settings and
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host-of-node-0 bash runs/speedrun.sh      MASTER_PORT: 29500, unless given
#
# All nodes must share NANOCHAT_BASE_DIR (a network disk): node 0 writes checkpoints, tokenizer and report there, and the others
# read them; it also prepares the data and does what takes one process, while they wait for its marks. Shards may lie on each
# node's own disk: make base_data in the base directory a link to a folder there, and every node downloads for itself.
# The repository may be shared or not. NODE_TIMEOUT: seconds to wait for the other nodes (default 3600). Midtraining has 524,288
# tokens a step, for 1, 2, 4 or 8 nodes of 8 GPUs; with RL=1 at most 2, as a step of it has 16 questions.
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
NNODES="${NNODES:-1}"
NODE_RANK="$((NNODES > 1 ? ${NODE_RANK:--1} : 0))"
nodes="$NANOCHAT_BASE_DIR/.stages" # where the nodes leave their marks

# across_nodes ARGUMENTS...: torchrun on all nodes. Which node this is does not count into the name of a stage.
across_nodes() {
    torchrun --nnodes="$NNODES" --node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}" \
        --rdzv-conf="timeout=${NODE_TIMEOUT:-3600}" --nproc-per-node="$NPROC_PER_NODE" "$@"
}

# await_nodes RANK...: until they have left their marks in the base directory, which shows that it is shared.
await_nodes() {
    local node
    for node in "$@"; do
        until [[ -e "$nodes/node$node" ]]; do
            if [[ "$SECONDS" -gt "${NODE_TIMEOUT:-3600}" ]]; then
                echo "node $node has not come to $NANOCHAT_BASE_DIR in $SECONDS s: start this file there too, and set" \
                    "NANOCHAT_BASE_DIR to a folder that all nodes share" >&2
                exit 2
            fi
            sleep "${NODE_POLL:-5}"
        done
    done
}

if [[ "$NNODES" -gt 1 ]]; then
    if [[ -z "${MASTER_ADDR:-}" || "$NODE_RANK" -lt 0 || "$NODE_RANK" -ge "$NNODES" ]]; then
        echo "with NNODES=$NNODES set MASTER_ADDR to the host of node 0, and NODE_RANK to 0 .. $((NNODES - 1)) on each node" >&2
        exit 2
    fi
    mkdir -p "$nodes"
    rm -f "$nodes/node$NODE_RANK"
    trap 'exit 143' TERM        # after the command that runs: the training gets the signal too, and saves
    if [[ "$NODE_RANK" -gt 0 ]]; then await_nodes 0; fi # they may share the repository: set up one after the other
fi
source runs/setup.sh            # .venv and dependencies: the one place for it

if [[ "$NNODES" -gt 1 ]]; then
    touch "$nodes/node$NODE_RANK"
    await_nodes $(seq 0 $((NNODES - 1)))
    train=(across_nodes -m)
else
    train=(torchrun --standalone --nproc_per_node="$NPROC_PER_NODE" -m)
fi
device_batch_size="${DEVICE_BATCH_SIZE:-32}"
most=$((32 / NNODES))           # 32 rows x 2,048 tokens x 8 GPUs of one node are a whole step of midtraining
if [[ "$NNODES" -gt 1 && "$device_batch_size" -gt "$most" ]]; then device_batch_size="$most"; fi
chat=(--run="$WANDB_RUN" --model-tag="$TAG" --resume --save-every=200)

# Two minutes that find what would fail later: memory, disk, compiler, network between the ranks.
stage preflight "${train[@]}" scripts.base_train -- --preflight=machine --depth="$DEPTH" --device-batch-size="$device_batch_size" \
    --target-param-data-ratio=20 --save-every=2000
stage report-reset python -m nanochat.report reset

# The tokenizer reads 2e9 characters, 8 shards of 250M. Pretraining of d20 needs 8.7B tokens (ratio 20) x 4.8 characters, 167
# shards; packing drops about 35 % of the text, hence 257, and some to spare. They come while the tokenizer is trained.
# --prepare also fetches the conversations about who the model is, 1,000 synthetic ones: put your own in their place first.
stage data-first python -m nanochat.dataset -n "${FIRST_SHARDS:-8}" --prepare
if [[ "$NODE_RANK" -eq 0 ]]; then
    python -m nanochat.dataset -n "${SHARDS:-280}" &
    download=$!
    trap 'kill "$download" 2>/dev/null || true' EXIT
fi
stage tokenizer python -m scripts.tok_train --max-chars="${MAX_CHARS:-2000000000}" --vocab-size="${VOCAB_SIZE:-32768}"
stage tokenizer-eval python -m scripts.tok_eval
if [[ "$NODE_RANK" -eq 0 ]]; then
    wait "$download" || { touch "$nodes/failed"; echo "the download failed; to go on, run this file again" >&2; exit 1; }
    trap - EXIT
fi
if [[ "$NNODES" -gt 1 ]]; then
    stage data true             # node 0's mark: all shards are there
    if [[ "$NODE_RANK" -gt 0 && -L "$NANOCHAT_BASE_DIR/base_data" ]]; then python -m nanochat.dataset -n "${SHARDS:-280}"; fi
fi

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
