#!/usr/bin/env bash
# Evaluate on several GPUs of one machine, or as one of several machines:
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of tools/test.py]
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host PORT=29500 tools/dist_test.sh CONFIG CHECKPOINT GPUS ...
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
config=$1 checkpoint=$2 gpus=$3
shift 3
exec bash "$(dirname "$0")/launch.sh" test.py "$gpus" "$config" "$checkpoint" --launcher pytorch "$@"
