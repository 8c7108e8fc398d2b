#!/usr/bin/env bash
# Train on several GPUs of one machine, or as one of several machines:
#   tools/dist_train.sh CONFIG GPUS [options of tools/train.py]
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host PORT=29500 tools/dist_train.sh CONFIG GPUS ...
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
config=$1 gpus=$2
shift 2
exec bash "$(dirname "$0")/launch.sh" train.py "$gpus" "$config" --launcher pytorch "$@"
