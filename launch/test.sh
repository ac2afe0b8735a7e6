#!/usr/bin/env bash
# Run all checks: ruff, mypy, shellcheck, hadolint, pytest. Every part runs; the last line lists those that failed.
#   ./launch/test.sh                      without the slow tests
#   ./launch/test.sh --full               with them
#   ./launch/test.sh tests/comm -k flat   other arguments go to pytest
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$SHOESTRING_ROOT"

selection=(-m "not slow")
pytest_arguments=()
for argument in "$@"; do
    if [[ "$argument" == --full ]]; then
        selection=()
    else
        pytest_arguments+=("$argument")
    fi
done

prepare_environment dev

# Tests start several processes each: one thread per process keeps them from competing for the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Tests never reach a network: no upload, no model hub.
export WANDB_MODE="${WANDB_MODE:-offline}" HF_HUB_OFFLINE=1

# Type checkers find the package by its folder's name, and this checkout may have any name.
mkdir -p build/typing
ln -sfn ../.. build/typing/shoestring

failed=()
# part NAME COMMAND...: run one check, print its time, remember whether it failed.
part() {
    local name="$1" began=$SECONDS outcome=passed
    shift
    printf '\n== %s\n' "$name"
    if ! "$@"; then
        outcome=FAILED
        failed+=("$name")
    fi
    printf -- '-- %s: %s in %d s\n' "$name" "$outcome" "$((SECONDS - began))"
}

part "ruff check" "$SHOESTRING_BIN/ruff" check .
part "ruff format" "$SHOESTRING_BIN/ruff" format --check .
part "mypy" "$SHOESTRING_BIN/mypy"
part "shellcheck" "$SHOESTRING_BIN/shellcheck" -x launch/*.sh benchmarks/*.sh launch/slurm/*.sbatch .ci/run
part "hadolint" "$SHOESTRING_BIN/hadolint" Dockerfile
# ${x[@]+...}: bash before 4.4 treats an empty array as unset.
part "pytest" "$SHOESTRING_BIN/python" -m pytest \
    ${selection[@]+"${selection[@]}"} ${pytest_arguments[@]+"${pytest_arguments[@]}"}

echo
if ((${#failed[@]})); then
    printf 'Failed:'
    printf ' [%s]' "${failed[@]}"
    echo
    exit 1
fi
echo "All checks passed."
