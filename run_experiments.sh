#!/usr/bin/env bash
# Set up what is missing, then run the experiments: --help tells which. Paths are taken from where the user stands.
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
source .ci/environment.sh
for argument in "$@"; do
    if [[ "$argument" == "--help" || "$argument" == "-h" ]] && ! find_ready_python requirements.txt; then
        "${python:-python3}" -c 'import ast; print(ast.get_docstring(ast.parse(open("sweep/__main__.py", "rb").read())))'
        echo "All flags are listed here once a first run has installed what is missing (requirements.txt) into .venv."
        exit
    fi
done
prepare_python requirements.txt
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
[[ "$python" == /* ]] || python=$PWD/$python
cd "$here"
exec "$python" -m sweep "$@"
