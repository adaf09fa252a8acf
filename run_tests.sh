#!/usr/bin/env bash
# Set up what is missing, then check style and types, and run the tests. Arguments go to pytest: bash run_tests.sh -k memory
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
    echo "usage: bash run_tests.sh [PYTEST ARGUMENTS]"
    echo "Installs what is missing (requirements-dev.txt) into .venv, checks style with ruff and the library's types with mypy, runs the tests with pytest."
    echo "Examples: bash run_tests.sh -m 'not slow'    bash run_tests.sh tests/report -x"
    exit
fi
source .ci/environment.sh
prepare_python requirements-dev.txt
"$python" -m ruff check --quiet .
"$python" -m ruff format --check --quiet . || { echo "run: ruff format ." >&2; exit 1; }
"$python" -m mypy --no-error-summary
exec "$python" -m pytest "$@"
