# Sourced by miniseries.sh and scaling_laws.sh: what a sweep over many base runs needs, and at which size.
#
#   SIZE=gpu          (default) a node of 8 GPUs, FineWeb-Edu
#   SIZE=cpu-3min     tinyworld on two CPU cores: shows that all works
#   SIZE=cpu-20min    the same, with runs long enough to compare
#
# Other settings: NPROC_PER_NODE (processes, any number that divides the rows of a step), DEPTHS, WANDB_RUN, NANOCHAT_BASE_DIR,
# SKIP_SETUP=1 (data and tokenizer are there), BASE_FLAGS (more flags for every run).
# Safe to run again: finished runs are kept, one that was cut off goes on, and the table is written anew.

SIZE="${SIZE:-gpu}"
case "$SIZE" in
gpu)
    export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}" NPROC_PER_NODE="${NPROC_PER_NODE:-8}"
    prepare=(python -m nanochat.dataset -n "${SHARDS:-1000}" --prepare)
    tokenizer=(--max-chars=2000000000 --vocab-size=32768)
    flags=(--lanes=64 --core-metric-every=999999 --core-metric-max-per-task=-1 --sample-every=-1 --save-every=1000)
    ;;
cpu-3min | cpu-20min)
    export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat/sweep}" NPROC_PER_NODE="${NPROC_PER_NODE:-1}"
    prepare=(python -m dev.tinyworld.generate --facts "${FACTS:-1000}")
    tokenizer=(--max-chars=20000000 --vocab-size="${VOCAB_SIZE:-1024}")
    flags=(--aspect-ratio=32 --head-dim=32 --max-seq-len=128 --window-pattern=L --total-batch-size=2048 --lanes=8
        --device-batch-size=$((16 / NPROC_PER_NODE)) --weight-decay=0.02 --compile=off --eval-every=250
        --eval-tokens=32768 --core-metric-every=999999 --core-metric-max-per-task=20 --sample-every=-1 --save-every=500)
    ;;
*)
    echo "SIZE must be gpu, cpu-3min or cpu-20min, got '$SIZE'" >&2
    exit 2
    ;;
esac
source runs/setup.sh # .venv and dependencies: the one place for it

if [[ -z "${SKIP_SETUP:-}" ]]; then
    stage sweep-data "${prepare[@]}"
    if [[ ! -e "$NANOCHAT_BASE_DIR/tokenizer/tokenizer.json" ]]; then # one that is there belongs to other runs too
        stage sweep-tokenizer python -m scripts.tok_train "${tokenizer[@]}"
    fi
fi
train=(python -m scripts.base_train)
if [[ "$NPROC_PER_NODE" -gt 1 ]]; then train=(torchrun --standalone --nproc_per_node="$NPROC_PER_NODE" -m scripts.base_train --); fi

# sweep_run TAG FLAGS...: one base run. Its stage follows no other one, so that the list of runs may grow and shrink.
sweep_run() {
    local tag="$1" name=dummy
    shift
    if [[ -n "${WANDB_RUN:-}" ]]; then name="${WANDB_RUN}_$tag"; fi
    STAGE_CHAIN=""
    # shellcheck disable=SC2086
    stage "$tag" "${train[@]}" --run="$name" --model-tag="$tag" --resume --keep-last=1 "${flags[@]}" "$@" ${BASE_FLAGS:-}
}

# sweep_table FOLDER PATTERN: write FOLDER/results.csv, a row for every run with such a tag, those of earlier calls too.
sweep_table() {
    local tags=("$NANOCHAT_BASE_DIR"/base_checkpoints/$2)
    python -m dev.scaling_laws --out "$NANOCHAT_BASE_DIR/$1/results.csv" "${tags[@]##*/}"
}
