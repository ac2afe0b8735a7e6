#!/usr/bin/env bash
# From a fresh clone to a trained toy model and its bill, on a CPU. Arguments go to `shoestring train`, for example
#   ./launch/quickstart.sh training.tokens=100_000
# Each run starts over. The exit code is that of `shoestring train`.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$SHOESTRING_ROOT"

run_dir=runs/quickstart
for argument in "$@"; do
    if [[ "$argument" == training.run_dir=* ]]; then
        run_dir="${argument#*=}"
    fi
done

heading() {
    printf '\n== %s\n' "$1"
}

heading "Environment"
prepare_environment runtime

heading "Data"
"$SHOESTRING_BIN/shoestring" data prepare experiment=quickstart

heading "Training"
code=0
"$SHOESTRING_BIN/shoestring" train --fresh experiment=quickstart "$@" || code=$?

# A run that was stopped or failed has a bill too.
if [[ -d "$run_dir" ]]; then
    heading "What it cost"
    "$SHOESTRING_BIN/shoestring" budget "$run_dir" || echo "No bill could be printed (exit code $?)" >&2
fi
exit "$code"
