#!/usr/bin/env bash
# A series of models that differ in depth alone, each at its default share of data: what does more compute buy?
#
#   bash runs/miniseries.sh [SERIES]                 depths 10 to 20 on a node of 8 GPUs; SERIES defaults to the date
#   DEPTHS="12 16" bash runs/miniseries.sh jan11     other depths; to go on with a series another day, give its name
#   SIZE=cpu-3min bash runs/miniseries.sh            on two CPU cores; cpu-20min for longer runs. See sweep.sh for all settings
#
# Writes below $NANOCHAT_BASE_DIR: a run for each depth, and <series>_miniseries_results/results.csv, taken from the runs' own
# records. `python -m nanochat.report compare TAG...` draws their curves.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/sweep.sh

series="${1:-${SERIES_NAME:-$(date +%F)}}"
case "$SIZE" in
gpu) depths="$(seq -s ' ' 10 20)" ratio=10.5 ;;
cpu-3min) depths="1 2 3" ratio=4 ;;
cpu-20min) depths="1 2 3 4" ratio=7 ;;
esac
read -ra depths <<< "${DEPTHS:-$depths}"
echo "series $series: depths ${depths[*]}"
trap 'sweep_table "${series}_miniseries_results" "${series}_miniseries_d[0-9]*"' EXIT # also when a run fails
for depth in "${depths[@]}"; do
    sweep_run "${series}_miniseries_d$depth" --depth="$depth" --target-param-data-ratio="${RATIO:-$ratio}"
done
