#!/usr/bin/env bash
# Set up what is missing, then run the experiments: --help tells which.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source .ci/environment.sh
prepare_python requirements.txt
exec "$python" -m sweep "$@"
