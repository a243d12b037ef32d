#!/usr/bin/env bash
# Budgets of training FLOPs x depths: which model size is best for a budget, and how do size and data grow with it?
#
#   bash runs/scaling_laws.sh [LABEL]                        4 budgets x 7 depths on a node of 8 GPUs; LABEL defaults to the date
#   BUDGETS="1e18" DEPTHS="8 10" bash runs/scaling_laws.sh   others; to go on with a sweep another day, give its label
#   SIZE=cpu-3min bash runs/scaling_laws.sh                  on two CPU cores; cpu-20min for longer runs. See sweep.sh for settings
#
# Writes below $NANOCHAT_BASE_DIR: the runs, and scaling_laws_results_<label>/results.csv, taken from the runs' own records, which
# dev/scaling_analysis.ipynb reads.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/sweep.sh

label="${1:-${LABEL:-$(date +%F)}}"
case "$SIZE" in
gpu)
    budgets="1e18 2.15e18 4.64e18 1e19" depths="8 10 12 14 16 18 20"
    flags+=(--eval-tokens=$((100 * 524288)))
    ;;
cpu-3min) budgets="3e11 1e12" depths="1 2 3 4" ;;
cpu-20min) budgets="5e11 1e12 2e12" depths="1 2 3 4 5" ;;
esac
read -ra budgets <<< "${BUDGETS:-$budgets}"
read -ra depths <<< "${DEPTHS:-$depths}"
echo "sweep $label: budgets ${budgets[*]}, depths ${depths[*]}"
trap 'sweep_table "scaling_laws_results_$label" "scaling_${label}_[0-9]*_d[0-9]*"' EXIT # also when a run fails
for budget in "${budgets[@]}"; do
    for depth in "${depths[@]}"; do
        sweep_run "scaling_${label}_${budget}_d$depth" --depth="$depth" --target-flops="$budget" --target-param-data-ratio=-1
    done
done
