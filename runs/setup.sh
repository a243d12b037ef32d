#!/usr/bin/env bash
# Everything the project needs, in .venv at the root of the repository: the one place for it.
#
#   bash runs/setup.sh          make .venv and install into it (again: a fraction of a second when nothing changed)
#   source runs/setup.sh        the same, then activate it; the run files do this, and use `stage` below
#
# torch comes first, in the build that fits the machine, then requirements.lock. Uses uv when you have it, else python -m venv
# and pip, each with your own configuration of package indexes (pip.conf, uv.toml, their environment variables).
# Settings: PYTHON (the interpreter to start from), NPROC_PER_NODE (processes that share this machine).

# Several processes on one machine would fight for its cores; a single one should have them all.
if [[ "${NPROC_PER_NODE:-1}" -gt 1 ]]; then export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"; fi

# stage NAME COMMAND...: run COMMAND, unless this very command, after the same stages before it, is already complete in this base
# directory. A failed stage ends the run file; running the file again goes on there. With several nodes, which must share the base
# directory, a COMMAND that is not across_nodes is run by node 0 alone, and the others wait for its mark.
STAGE_CHAIN=""
stage() {
    local name="$1" started="$SECONDS" code=0 node=0 line stamp
    shift
    if [[ "${NNODES:-1}" -gt 1 ]]; then node="$NODE_RANK"; fi
    line="$(printf '%q ' "$@")"
    STAGE_CHAIN="$(printf '%s\n' "$STAGE_CHAIN" "$name $line" | cksum)" # a changed stage makes those after it run again
    stamp="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}/.stages/$name"
    if [[ -f "$stamp" && "$(cat "$stamp")" == "$line"$'\n'"$STAGE_CHAIN" ]]; then
        echo "=== $name: complete already"
        return 0
    fi
    if [[ "$node" -gt 0 && "$1" != across_nodes ]]; then
        echo "=== $name: waiting for node 0"
        until [[ -f "$stamp" && "$(cat "$stamp")" == "$line"$'\n'"$STAGE_CHAIN" ]]; do
            if [[ "${stamp%/*}/failed" -nt "${stamp%/*}/node$node" ]]; then # since this node has joined
                echo "=== $name: node 0 failed; to go on from here, run this again on all nodes" >&2
                exit 1
            fi
            sleep "${NODE_POLL:-5}"
        done
        return 0
    fi
    echo "=== $name: $line"
    "$@" || code=$?
    if [[ $code -ne 0 ]]; then
        echo "=== $name: failed with exit code $code after $((SECONDS - started)) s; to go on from here, run it again" >&2
        if [[ "${NNODES:-1}" -gt 1 && "$node" -eq 0 ]]; then touch "${stamp%/*}/failed"; fi
        exit "$code"
    fi
    if [[ "$node" -eq 0 ]]; then
        mkdir -p "${stamp%/*}"
        printf '%s\n' "$line" "$STAGE_CHAIN" > "$stamp.new" && mv "$stamp.new" "$stamp"
    fi
    echo "=== $name: done in $((SECONDS - started)) s"
}

_setup_say() { echo "setup: $*" >&2; }

_setup_good_python() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

# Print the first interpreter that will do. Names may be there without working (version managers), so each one is tried.
_setup_find_python() {
    local candidate
    for candidate in "${PYTHON:-python3.11}" python3.11 python3.12 python3.13 python3 python; do
        if _setup_good_python "$candidate"; then echo "$candidate"; return 0; fi
    done
    return 1
}

_setup_make_venv() {
    local root="$1" python
    python="$(_setup_find_python)" || python=""
    if command -v uv >/dev/null; then
        uv venv --quiet --clear --seed --python "${python:-3.11}" "$root/.venv" && return 0 # without a python uv fetches one
    fi
    if [[ -z "$python" ]]; then
        _setup_say "Python 3.11, 3.12 or 3.13 is needed and none was found; install one, or name it:" \
            "PYTHON=/path/to/python bash runs/setup.sh"
        return 1
    fi
    rm -rf "$root/.venv"
    "$python" -m venv "$root/.venv" && return 0
    _setup_say "'$python -m venv' failed; on Debian and Ubuntu install it with: apt-get install python3-venv"
    return 1
}

# _setup_install PYTHON ARGUMENTS...: with uv when there is one and it can, else with pip.
# uv does not read PIP_FIND_LINKS, where a machine may keep its own builds of torch.
_setup_install() {
    local python="$1" links="${PIP_FIND_LINKS:-}"
    shift
    if command -v uv >/dev/null; then
        uv pip install --python "$python" ${links:+--find-links "$links"} "$@" && return 0
        _setup_say "uv could not install; trying pip"
    fi
    "$python" -m pip install --quiet --progress-bar on "$@"
}

# Say what is about to come over the line: without a GPU the CPU build will do, but not every package index offers it.
_setup_announce_torch() {
    local python="$1" torch="$2" plan
    plan="$("$python" -m pip install --dry-run --quiet --ignore-installed --report - "$torch" 2>/dev/null)" || return 0
    if [[ "$plan" != *'"name": "nvidia-'* ]]; then # a name in the list of packages to install
        _setup_say "installing $torch (CPU build, about 0.2 GB)"
    elif nvidia-smi -L >/dev/null 2>&1; then
        _setup_say "installing $torch for CUDA: about 3 GB to download, 5 GB on disk"
    else
        _setup_say "installing $torch: your package index offers only the CUDA build (about 3 GB to download, 5 GB on disk)," \
            "which works without a GPU too; for a CPU build stop here and set PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS to a place with one"
    fi
}

_setup_install_torch() {
    local python="$1" torch version links="${PIP_FIND_LINKS:-}"
    torch="$(sed -n 's/^torch = \["\(torch==[^"]*\)"\]$/\1/p' "$2/pyproject.toml")"
    version="$("$python" -c 'import importlib.metadata as m; print(m.version("torch").split("+")[0])' 2>/dev/null)"
    [[ "torch==$version" == "$torch" ]] && return 0
    if command -v uv >/dev/null; then # uv can look at the machine and choose the build by itself, where it can reach those builds
        _setup_say "installing $torch in the build for this machine (0.2 GB for a CPU, about 3 GB for CUDA)"
        uv pip install --quiet --python "$python" --torch-backend=auto ${links:+--find-links "$links"} "$torch" 2>/dev/null \
            && return 0
        _setup_say "uv could not choose a build; taking what the package index offers"
    fi
    _setup_announce_torch "$python" "$torch"
    _setup_install "$python" "$torch"
}

_setup_main() {
    local root python stamp key
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    python="$root/.venv/bin/python"
    stamp="$root/.venv/.setup-complete"
    key="$(cat "$root/requirements.lock" "$root/pyproject.toml" | cksum)"
    if [[ ! -f "$stamp" || "$(cat "$stamp")" != "$key" ]] || ! _setup_good_python "$python"; then
        if ! _setup_good_python "$python"; then _setup_make_venv "$root" || return 1; fi
        _setup_install_torch "$python" "$root" || { _setup_say "torch could not be installed; see the message above"; return 1; }
        _setup_say "installing the packages of requirements.lock"
        _setup_install "$python" --quiet --no-deps --require-hashes -r "$root/requirements.lock" \
            || { _setup_say "the packages of requirements.lock could not be installed; see the message above"; return 1; }
        echo "$key" > "$stamp"
        _setup_say "complete"
    fi
    # shellcheck disable=SC1091
    source "$root/.venv/bin/activate"
}

_setup_main || return 1 2>/dev/null || exit 1 # return where this file is sourced, exit where it is run
