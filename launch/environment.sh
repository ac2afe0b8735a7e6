# shellcheck shell=bash
# Sourced by the other scripts: `source launch/environment.sh`, then `prepare_environment runtime`, or
# `prepare_environment dev` for the tools of launch/test.sh too.
#
# It creates `.venv` in the repository with the versions of requirements.lock and installs this tree in it, editable.
# Later calls do nothing until setup.cfg, pyproject.toml or requirements.lock change. PYTHON names the interpreter (3.11
# or newer). Files in `.venv` that belong to this script:
#   .installed-runtime, .installed-dev   the checksum of what was installed
#   .installing                          the process that installs; a killed installation leaves it behind
#   .install.log                         pip's output

SHOESTRING_ROOT="$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
SHOESTRING_BIN="$SHOESTRING_ROOT/.venv/bin"

# interpreter PYTHON: print its path, the one under a virtual environment; fail unless it is 3.11 or newer.
interpreter() {
    "$1" -c 'import os, sys; print(os.path.realpath(sys.executable)); sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# choose_python: print the interpreter that creates `.venv`.
choose_python() {
    local candidate candidates=(python3 python3.13 python3.12 python3.11)
    if [[ -n "${PYTHON:-}" ]]; then
        candidates=("$PYTHON")
    fi
    for candidate in "${candidates[@]}"; do
        if candidate="$(interpreter "$candidate")"; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    echo "Shoestring needs Python 3.11 or newer; ${candidates[0]} is not. Run: PYTHON=/path/to/python3.11 $0" >&2
    return 1
}

# installed_for: the checksum of everything that decides what is installed.
installed_for() {
    (cd "$SHOESTRING_ROOT" && cat setup.cfg pyproject.toml requirements.lock | cksum)
}

# is_usable: true if `.venv` is complete, was created here (a copied one runs the original's tree), and its interpreter
# runs and is the one that PYTHON, if set, names.
is_usable() {
    local used
    [[ ! -e "$SHOESTRING_ROOT/.venv/.installing" ]] &&
        head -n 3 "$SHOESTRING_BIN/pip" 2>/dev/null | grep -qF "$SHOESTRING_BIN/python" &&
        used="$(interpreter "$SHOESTRING_BIN/python")" &&
        [[ -z "${PYTHON:-}" || "$used" == "$(choose_python)" ]]
}

# fail_if_installing: fail if another process is installing into `.venv`.
fail_if_installing() {
    local other
    other="$(cat "$SHOESTRING_ROOT/.venv/.installing" 2>/dev/null)" || return 0
    if [[ -n "$other" ]] && kill -0 "$other" 2>/dev/null; then
        echo "Process $other is installing into $SHOESTRING_ROOT/.venv. Wait for it. If it is not, remove .venv." >&2
        return 1
    fi
}

# make_environment: create an empty `.venv`, and delete an old one.
make_environment() {
    local venv="$SHOESTRING_ROOT/.venv" python
    python="$(choose_python)" || return 1
    echo "Creating .venv with $("$python" --version)"
    rm -rf "$venv"
    mkdir "$venv"
    echo $$ >"$venv/.installing"
    if ! "$python" -m venv "$venv"; then
        echo "$python cannot create a virtual environment. On Debian and Ubuntu, install python3-venv." >&2
        return 1
    fi
}

# install_tree EXTRAS: install this tree with requirements.lock as the constraint. EXTRAS is empty or "[dev]".
install_tree() {
    local venv="$SHOESTRING_ROOT/.venv"
    local log="$venv/.install.log"
    echo $$ >"$venv/.installing"
    if (cd "$SHOESTRING_ROOT" &&
        "$SHOESTRING_BIN/python" -m pip install --no-input --disable-pip-version-check \
            --constraint requirements.lock --editable ".$1") >"$log" 2>&1; then
        rm "$venv/.installing"
        return 0
    fi
    # A failure before pip changed any package (no network, a wrong pin) leaves `.venv` complete: keep it.
    grep -q '^Installing collected packages' "$log" || rm "$venv/.installing"
    tail -n 15 "$log" >&2
    echo "The installation failed; its last lines are above, all output is in $log. Run this again to repair it." >&2
    return 1
}

# prepare_environment runtime|dev: create or update `.venv`.
prepare_environment() {
    local stamp="$SHOESTRING_ROOT/.venv/.installed" extras="" wanted
    if [[ "$1" == dev ]]; then
        extras="[dev]"
    fi
    if [[ -n "${PYTHON:-}" ]]; then
        choose_python >/dev/null || return 1
    fi
    wanted="$(installed_for)"
    if is_usable && [[ "$(cat "$stamp-$1" 2>/dev/null)" == "$wanted" ]]; then
        return 0
    fi
    fail_if_installing || return 1
    is_usable || make_environment || return 1
    echo "Installing Shoestring$extras into .venv (a minute or more the first time)"
    rm -f "$stamp"-*
    install_tree "$extras" || return 1
    echo "$wanted" >"$stamp-runtime"
    echo "$wanted" >"$stamp-$1"
}
