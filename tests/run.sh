#!/usr/bin/env bash
# The whole suite in an environment of its own:   bash tests/run.sh [PYTEST OPTIONS]
# Tests that kill, fill or cut something (faults) run with -m faults, those that need several hosts with --hosts.
set -euo pipefail
. "$(dirname "$0")/../launch/venv.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
python -m flake8
python -m autopep8 --diff --exit-code --recursive shards pretrain finetune launch tests  # --in-place mends what it shows
python -m mypy
[ $# -gt 0 ] || set -- -m "not faults and not hosts" -n 2 --dist loadfile  # most tests keep one core busy
[ "$1" != --hosts ] || set -- -m hosts "${@:2}"
exec python -m pytest "$@"
