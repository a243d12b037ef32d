#!/usr/bin/env bash
# speedrun.sh (or run1000.sh) on several nodes of 8 GPUs under Slurm:
#
#   sbatch runs/slurm.sh                                          two nodes, as the lines below say
#   sbatch --nodes=4 --time=12:00:00 runs/slurm.sh run1000.sh     more nodes, and the other run file
#
# Submit it from the root of the repository, with NANOCHAT_BASE_DIR on a disk that all nodes share (see speedrun.sh). A job that
# is preempted or runs out of time gets SIGTERM: the training saves its step and ends (torchrun gives it 30 s; older steps stay
# as they were), the job is queued again, and goes on there. Never run by its authors, who had no such cluster.
#SBATCH --job-name=nanochat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=06:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@180
#SBATCH --output=nanochat-%j.log
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"

export NNODES="$SLURM_JOB_NUM_NODES"
hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
MASTER_ADDR="${hosts%%$'\n'*}" # the first
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
export RUN_FILE="runs/${1:-speedrun.sh}"

stopped=""
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM # to the training; Slurm tells this file alone
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK="$SLURM_PROCID" exec bash "$RUN_FILE"' &
code=0
wait "$!" || code=$?
if [[ -n "$stopped" ]]; then
    wait "$!" || code=$?        # the first wait ended with the signal, this one with the training
    scontrol requeue "$SLURM_JOB_ID" || true # where Slurm has not done it itself
fi
exit "$code"
