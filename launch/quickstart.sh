#!/usr/bin/env bash
# Train a toy model on a CPU from a fresh clone, and print what it cost. Arguments are those of `shoestring train`:
#   ./launch/quickstart.sh training.tokens=100_000 data.prepared=data/mine
# Overrides are passed to `shoestring data prepare` too. Each run starts over. The exit code is that of
# `shoestring train`, or 2 if the data cannot be prepared.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$SHOESTRING_ROOT"

run_dir=runs/quickstart
described=()  # overrides, and --config-dir with its directory
previous=""
for argument in "$@"; do
    if [[ "$argument" == training.run_dir=* ]]; then
        run_dir="${argument#*=}"
    fi
    if [[ "$argument" != -* || "$argument" == --config-dir* ]] && [[ "$previous" != --cfg ]]; then
        described+=("$argument")
    fi
    previous="$argument"
done

heading() {
    printf '\n== %s\n' "$1"
}

heading "Environment"
prepare_environment runtime

heading "Data"
"$SHOESTRING_BIN/shoestring" data prepare experiment=quickstart ${described[@]+"${described[@]}"}

heading "Training"
code=0
"$SHOESTRING_BIN/shoestring" train --fresh experiment=quickstart "$@" || code=$?

# A run that was stopped or failed has a cost too; one that was not started (exit code 2) has none.
if [[ "$code" != 2 && -d "$run_dir" ]]; then
    heading "Cost"
    "$SHOESTRING_BIN/shoestring" budget "$run_dir" || echo "The cost could not be printed (exit code $?)" >&2
fi
exit "$code"
