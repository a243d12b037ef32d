#!/usr/bin/env bash
# From nothing to a chat with your own model, on a machine without a GPU.
#
#   bash runs/runcpu.sh                        tinyworld: a small, closed, true world that the model really learns
#   DATA=fineweb-edu bash runs/runcpu.sh       real web text (needs a network; the model learns English, not facts)
#   WANDB_RUN=cpu bash runs/runcpu.sh          the same, logged to wandb
#
# After set-up tinyworld needs no network. Writes below $NANOCHAT_BASE_DIR (default ~/.cache/nanochat/<data set>) and
# ./report.md. Safe to run again: complete stages are kept, and a training that was cut off goes on where it was.
# The settings come from the measurements in dev/LOG.md.
set -euo pipefail
cd "$(dirname "$0")/.."

DATA="${DATA:-tinyworld}"
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat/$DATA}"
WANDB_RUN="${WANDB_RUN:-dummy}" # "dummy" = no wandb
DEPTH="${DEPTH:-4}"
TAG="${TAG:-d$DEPTH}"           # name of the run's checkpoints: another one for a run with other settings
source runs/setup.sh            # .venv and dependencies: the one place for it

stage report-reset python -m nanochat.report reset

if [[ "$DATA" == tinyworld ]]; then
    examples=-1 problems=1000 # per evaluation: all that there are
    missing_identity="" rewarded=TinyWorld-Arithmetic judged="GSM8K|TinyWorld"
    stage data python -m dev.tinyworld.generate --facts "${FACTS:-3000}"
else
    examples=16 problems=64   # all of the real benchmarks would take hours on a CPU
    missing_identity=yes rewarded=GSM8K judged=GSM8K
    stage data python -m nanochat.dataset -n "${SHARDS:-2}"
fi

stage tokenizer python -m scripts.tok_train --max-chars=200000000 --vocab-size="${VOCAB_SIZE:-4096}"
stage tokenizer-eval python -m scripts.tok_eval

stage base-train python -m scripts.base_train --run="$WANDB_RUN" --resume --seed="${SEED:-42}" \
    --depth="$DEPTH" --model-tag="$TAG" --head-dim=64 --max-seq-len=256 --window-pattern=L \
    --device-batch-size=16 --total-batch-size=4096 --num-iterations="${BASE_STEPS:-1000}" \
    --matrix-lr=0.037 --embedding-lr=0.56 --unembedding-lr=0.0074 --scalar-lr=0.115 \
    --eval-every=250 --eval-tokens=65536 --core-metric-every=-1 --sample-every=250 --save-every=250
stage base-loss python -m scripts.base_loss --model-tag="$TAG" --device-batch-size=16 --split-tokens=65536
stage base-eval python -m scripts.base_eval --model-tag="$TAG" --max-per-task="$examples"

chat=(--run="$WANDB_RUN" --model-tag="$TAG" --resume --seed="${SEED:-42}" --save-every=100)
evaluate=(--model-tag="$TAG" --batch-size=16 --max-new-tokens=200 --max-problems="$problems")
stage mid python -m scripts.mid_train "${chat[@]}" --max-seq-len=256 --device-batch-size=16 --total-batch-size=4096 \
    --num-iterations="${MID_STEPS:-350}" --init-lr-frac=0.3 --eval-every=175 --eval-tokens=65536 \
    ${missing_identity:+--allow-missing-identity}
stage mid-eval python -m scripts.chat_eval --source=mid "${evaluate[@]}"
stage sft python -m scripts.chat_sft "${chat[@]}" --source=mid --device-batch-size=16 --target-examples-per-step=64 \
    --num-iterations="${SFT_STEPS:-100}" --init-lr-frac=0.08 --eval-every=50 --eval-steps=5 --eval-metrics-every=-1 \
    ${missing_identity:+--allow-missing-identity}
stage sft-eval python -m scripts.chat_eval --source=sft "${evaluate[@]}"
stage rl python -m scripts.chat_rl "${chat[@]}" --task="$rewarded" --num-iterations="${RL_STEPS:-30}" --num-samples=8 \
    --examples-per-step=32 --device-batch-size=32 --init-lr-frac=0.1 --max-new-tokens=64 --eval-every=30 \
    --eval-examples=100 --eval-samples=4
stage rl-eval python -m scripts.chat_eval --source=rl "${evaluate[@]}" --task-name="$judged"
stage report python -m nanochat.report generate

for question in "What is the capital of France?" "Can you tell me the opposite of hot?" "Who will win the lottery tomorrow?"; do
    echo
    echo "User: $question"
    python -m scripts.chat_cli --source=sft --model-tag="$TAG" --temperature=0 --prompt="$question"
done
echo
echo "Talk to it yourself: source .venv/bin/activate; export NANOCHAT_BASE_DIR=$NANOCHAT_BASE_DIR; python -m scripts.chat_cli"
