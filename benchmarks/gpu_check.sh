#!/usr/bin/env bash
# Check and measure a machine with one GPU, most valuable parts first, in at most eight minutes.
#   ./benchmarks/gpu_check.sh [--wheels DIR] [--out DIR] [--seconds 480] [--list]
# It uses PYTHON, else the first Python that has torch, and needs no network. Packages that training imports and this
# Python lacks are installed from the wheels in DIR into a temporary folder, which is deleted at the end.
# Each part has a time limit; its output is in OUT/PART.txt and its figures in OUT/PART.json, and each adds one line
# to OUT/summary.txt: outcome, seconds, exit code, part. A part is skipped if its limit exceeds the rest of --seconds.
# Without a GPU the parts that need one are `not here`.
# Exit code: 0; 1 if a mandatory part failed or was skipped; 2 for unknown arguments.
set -euo pipefail

root="$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
wheels="" out="" seconds=480 list=""

usage() {
    sed -n '2,4p' "${BASH_SOURCE[0]}" | sed 's/^# *//' >&2
    exit 2
}

while (($#)); do
    case "$1" in
        --list) list=yes ;;
        --wheels | --out | --seconds)
            (($# > 1)) || usage
            declare "${1#--}=$2"
            shift
            ;;
        *) usage ;;
    esac
    shift
done
[[ "$seconds" =~ ^[0-9]+$ ]] || usage

# choose_python: print the interpreter that has torch.
choose_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.13 "$root/.venv/bin/python"; do
        if "$candidate" -c 'import sys, importlib.util as u; sys.exit(u.find_spec("torch") is None)' 2>/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    echo "No Python here has torch. Run: PYTHON=/path/to/python $0" >&2
    return 1
}

# install_missing: install missing packages from the wheels into a temporary folder.
install_missing() {
    local package
    for package in $("$python" "$root/benchmarks/environment.py" --missing); do
        # A wheel's file has underscores where the package's name has dashes.
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --disable-pip-version-check \
            --target "$scratch/site" "$wheels/${package//-/_}"-*.whl >&2 ||
            echo "no wheel of $package in $wheels fits this Python" >&2
    done
}

# lacks NEED...: print the first of `gpu`, `hopper` and modules that this machine lacks; nothing if it has all.
lacks() {
    local need reason
    for need in "$@"; do
        reason=""
        case "$need" in
            gpu) [[ "$capability" != none ]] || reason="torch sees no GPU" ;;
            hopper) [[ "$capability" == "9.0" ]] || reason="needs a GPU of compute capability 9.0; here: $capability" ;;
            *) "$python" -c "import $need" 2>/dev/null || reason="$need is not installed" ;;
        esac
        if [[ -n "$reason" ]]; then
            echo "$reason"
            return 0
        fi
    done
}

# record OUTCOME SECONDS CODE PART TEXT: print one line of the summary.
record() {
    printf '%-9s %5s s  code %-4s %-16s %s\n' "$@" | tee -a "$out/summary.txt"
}

bad=()
# part NAME LIMIT mandatory|optional NEEDS COMMAND...: run one part, unless a need is missing or the time is too short.
part() {
    local name="$1" limit="$2" mandatory="$3" needs="$4" began=$SECONDS code=0 outcome=works text="" lacking
    shift 4
    if [[ -n "$list" ]]; then
        printf '%-16s %4s s  %-10s needs %s\n' "$name" "$limit" "$mandatory" "${needs:-nothing}"
        return 0
    fi
    # shellcheck disable=SC2086 # split into words
    lacking="$(lacks $needs)"
    if [[ -n "$lacking" ]]; then
        record "not here" 0 - "$name" "$lacking"
        return 0
    fi
    if ((limit > seconds - SECONDS)); then
        record skipped 0 - "$name" "may take $limit s, and $((seconds > SECONDS ? seconds - SECONDS : 0)) s are left"
        [[ "$mandatory" != mandatory ]] || bad+=("$name")
        return 0
    fi
    # The braces: the shell's message on a killed process goes to the same file.
    { timeout --kill-after=5 "$limit" "$@"; } >"$out/$name.txt" 2>&1 || code=$?
    if ((code)); then
        outcome=fails
        text="see $name.txt"
        ((code != 124 && code != 137)) || text="still running after $limit s; $text"
        [[ "$mandatory" != mandatory ]] || bad+=("$name")
    fi
    record "$outcome" "$((SECONDS - began))" "$code" "$name" "$text"
    ((code == 0)) || tail -n 12 "$out/$name.txt" | cut -c 1-300 | sed 's/^/    /'
}

# shoestring: the command's arguments for a Python in which it is not installed.
shoestring=(-m shoestring.launch.cli)
# The quickstart on one rank: 20 steps of 8 short sequences, each step's loss in the metrics.
run=(experiment=quickstart topology=single schedule=1f1b schedule.micro_batch_size=2 training.global_batch_size=8
    training.tokens=10_240 training.sequence_length=64 training.evaluate_every=0
    training.sample_tokens=0 training.checkpoint_every=1000 telemetry.log_every=1
    telemetry.wandb.mode=disabled budget.stop_at=null)

# train NAME OVERRIDE...: print the arguments of a run in the directory NAME.
train() {
    printf '%s\0' "${shoestring[@]}" train --fresh "${run[@]}" data.prepared="$scratch/data" \
        training.run_dir="$scratch/runs/$1" "${@:2}"
}

if [[ -z "$list" ]]; then
    python="$(choose_python)"
    scratch="$(mktemp -d)"
    trap 'rm -rf "$scratch"' EXIT
    out="${out:-gpu_check_$(date +%Y%m%d_%H%M%S)}"
    mkdir -p "$out" "$scratch/path" "$scratch/runs" "$scratch/site"
    out="$(cd "$out" && pwd)"
    : >"$out/summary.txt"
    [[ -z "$wheels" ]] || wheels="$(cd "$wheels" && pwd)"
    # The package is this folder, whatever its name.
    ln -s "$root" "$scratch/path/shoestring"
    export PYTHONPATH="$scratch/path:$scratch/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
    [[ -z "$wheels" ]] || install_missing
    capability="$("$python" -c 'import torch
print(".".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else "none")')"
    cd "$scratch" # runs write into the working directory
else
    python=python scratch=SCRATCH out=OUT capability=none
fi
mapfile -d '' -t on_cpu < <(train cpu training.device=cpu precision=fp32)
mapfile -d '' -t in_bf16 < <(train bf16 training.device=cuda precision=bf16)
mapfile -d '' -t in_fp8 < <(train fp8 training.device=cuda precision=fp8)
# Train the named run with the following arguments, then compare its losses with the CPU run's.
# shellcheck disable=SC2016 # expanded by the shell that runs under the time limit
compared='name="$1" python="$2" root="$3" && shift 3 && "$python" "$@" &&
    "$python" "$root/benchmarks/compare_losses.py" "runs/$name" runs/cpu --within 0.02'

# Only files with GPU tests: others import packages that may be missing.
mapfile -t gpu_tests < <(grep -rl --include='test_*.py' 'mark\.gpu' "$root/tests")

part environment 40 mandatory "" "$python" "$root/benchmarks/environment.py"
part doctor 40 mandatory "" "$python" "${shoestring[@]}" doctor
part bring_up 200 mandatory "" "$python" "$root/benchmarks/bring_up.py" --json "$out/bring_up.json"
part data 60 mandatory "" "$python" "${shoestring[@]}" data prepare experiment=quickstart \
    data.prepared="$scratch/data"
part train_cpu 90 mandatory "" "$python" "${on_cpu[@]}"
part train_bf16 60 mandatory gpu bash -c "$compared" bash bf16 "$python" "$root" "${in_bf16[@]}"
part train_fp8 90 mandatory hopper bash -c "$compared" bash fp8 "$python" "$root" "${in_fp8[@]}"
part gpu_tests 120 mandatory "gpu pytest" "$python" -m pytest -q -rs -m gpu -p no:cacheprovider --rootdir "$root" \
    -c "$root/setup.cfg" "${gpu_tests[@]}"
part fp8_kernels 60 optional hopper "$python" "$root/benchmarks/fp8_kernels.py" --json "$out/fp8_kernels.json"
part v3_layer 60 optional hopper "$python" "$root/benchmarks/v3_layer.py" --repetitions 5 --json "$out/v3_layer.json"
part memory 60 optional gpu "$python" "${shoestring[@]}" memory --measure "${run[@]}" \
    training.device=cuda precision=bf16

[[ -z "$list" ]] || exit 0
if ((${#bad[@]})); then
    echo "mandatory parts failed or skipped: ${bad[*]}; results are in $out" | tee -a "$out/summary.txt"
    exit 1
fi
echo "all mandatory parts that can run here passed; results are in $out" | tee -a "$out/summary.txt"
