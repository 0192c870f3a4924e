# shellcheck shell=bash
# Sourced by every run.sh. Modules are found from the repository's root, wherever one stands; PYTHON chooses the interpreter,
# by default that of `make demo`. `need N USAGE "$@"` ends with the usage unless there are N arguments or more.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if [[ -z ${PYTHON:-} && -x $root/.venv/bin/python ]]; then PYTHON=$root/.venv/bin/python; fi
python=${PYTHON:-python3}

run() { "$python" -m "experiments.$1" "${@:2}"; } # NAME.SCRIPT and its arguments
jsfdd() { "$python" -m jsfdd.commands.cli "$@"; }

need() {
    local number=$1 usage=$2
    shift 2
    if (($# < number)); then
        echo "usage: run.sh $usage" >&2
        exit 2
    fi
}
