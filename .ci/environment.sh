# Sourced by run_experiments.sh and run_tests.sh: finds or makes a Python that has what a requirements file names.
#
#   source .ci/environment.sh; prepare_python requirements.txt; "$python" …
#
# 1. The active interpreter, if it lacks nothing, is used as it is: a virtual environment, a GPU machine's own torch.
# 2. Else ./.venv, made if it is not there; an active virtual environment is completed instead. Only what is missing is
#    installed, and nothing that is there already changes its version.

# The requirement lines (of a file and the files it includes) whose module the interpreter "$1" cannot find.
missing_requirements() {
    "$1" - "$2" <<'PYTHON'
import importlib.util
import pathlib
import re
import sys

MODULES = {"pillow": "PIL", "avalanche-lib": "avalanche"}  # where the names differ


def lines(path):
    for line in path.read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r"):
            yield from lines(path.parent / line[2:].strip())
        elif line:
            yield line


for line in lines(pathlib.Path(sys.argv[1])):
    name = re.match(r"[\w.-]+", line)[0].lower()
    # Looked for, not imported: torchvision beside another torch cannot be imported whole, and need not be.
    if importlib.util.find_spec(MODULES.get(name, name)) is None:
        # Beside a torch that is there, its own torchvision is wanted rather than the pinned one.
        print("torchvision" if name == "torchvision" and importlib.util.find_spec("torch") else line)
PYTHON
}

# The first of some commands that is Python 3.10 or newer.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python python3 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# Installs into "$1" what it lacks of the requirements file "$2".
complete_python() {
    local interpreter=$1 requirements=$2 missing scratch
    missing=$(missing_requirements "$interpreter" "$requirements") || return 1
    [ -n "$missing" ] || return 0
    echo "installing into $("$interpreter" -c 'import sys; print(sys.prefix)'):" $missing >&2
    "$interpreter" -m pip --version >/dev/null 2>&1 || "$interpreter" -m ensurepip --upgrade >/dev/null || return 1
    scratch=$(mktemp -d) || return 1
    echo "$missing" >"$scratch/missing.txt"
    "$interpreter" -c '
import importlib.metadata
for name in ("torch", "torchvision", "numpy", "scipy", "matplotlib", "pillow"):
    try:
        print(f"{name}=={importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        pass
' >"$scratch/kept.txt"
    "$interpreter" -m pip install --quiet --requirement "$scratch/missing.txt" --constraint "$scratch/kept.txt" >&2
    local status=$?
    rm -rf "$scratch"
    return $status
}

# Sets $python to an interpreter that has all of the requirements file "$1" already; else fails, installing nothing.
find_ready_python() {
    local candidate
    for candidate in "$(find_python)" .venv/bin/python; do
        if [ -x "$candidate" ]; then
            python=$candidate
            [ -n "$(missing_requirements "$python" "$1")" ] || return 0
        fi
    done
    return 1
}

# Sets $python to an interpreter that has all of the requirements file "$1"; ends the script where there is none.
prepare_python() {
    local requirements=$1 own=.venv/bin/python base
    if ! base=$(find_python); then
        echo "no Python 3.10 or newer found; install one, or name it: PYTHON=/path/to/python bash $0" >&2
        exit 2
    fi
    python=$base
    [ -z "$(missing_requirements "$python" "$requirements")" ] && return
    if [ ! -x "$own" ] && "$base" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'; then
        own=$base # a virtual environment is active
    elif ! "$own" -c '' >/dev/null 2>&1; then
        local share=()
        # A torch that belongs to the machine is used from within .venv, not installed a second time.
        "$base" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' && share=(--system-site-packages)
        echo "making .venv with $base" >&2
        if ! "$base" -m venv --clear "${share[@]}" .venv >&2; then
            echo "cannot make a virtual environment with $base; on Debian and Ubuntu: apt install python3-venv" >&2
            exit 2
        fi
    fi
    python=$own
    if ! complete_python "$python" "$requirements"; then
        echo "installing the requirements failed (see above); the same command tries again" >&2
        exit 2
    fi
}
