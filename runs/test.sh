#!/usr/bin/env bash
# The tests, set-up included: no network after set-up, no GPU needed.
#
#   bash runs/test.sh                        all but the slow ones
#   bash runs/test.sh --slow                 all
#   bash runs/test.sh -k engine -x           whatever else pytest understands
#
# NANOCHAT_TEST_WORKERS: how many tests run at once (default: the number of cores, at most 4; 0 = one process, for a debugger).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/setup.sh

slow=no
for argument in "$@"; do # --slow is ours, wherever it stands; the rest is pytest's, in its order
    shift
    if [[ "$argument" == "--slow" ]]; then slow=yes; else set -- "$@" "$argument"; fi
done
if [[ "$slow" == no ]]; then set -- -m "not slow" "$@"; fi

cores="$(python -c 'import os; print(min(4, os.cpu_count() or 1))')"
workers="${NANOCHAT_TEST_WORKERS:-$cores}"
if [[ "$workers" -gt 1 ]]; then export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"; fi # several test processes share the machine
exec python -m pytest -n "$workers" "$@"
