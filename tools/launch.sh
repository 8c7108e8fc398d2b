#!/usr/bin/env bash
# What dist_train.sh and dist_test.sh share: start a tool in several processes of this machine.
#   tools/launch.sh TOOL GPUS [arguments of the tool]
set -euo pipefail
tool=$1 gpus=$2 port=${PORT:-29500}
shift 2
if ! command -v torchrun > /dev/null; then
    echo "there is no torchrun: activate the environment first (source .venv/bin/activate)" >&2
    exit 1
fi
if ! [[ $port =~ ^[0-9]+$ ]]; then
    echo "PORT must be a number, found '$port'" >&2
    exit 2
fi
# Where torchrun would end in a traceback. Only the first machine listens.
if [ "${NODE_RANK:-0}" = 0 ] && (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; then
    echo "port $port is in use, perhaps by another run on this machine. Choose another by setting" \
        "PORT=$((10#$port + 1)) before the command." >&2
    exit 1
fi
# Not `python -m`, which imports modules from the current folder first.
exec torchrun \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$gpus" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="$port" \
    "$(dirname "$0")/$tool" "$@"
