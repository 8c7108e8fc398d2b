#!/usr/bin/env bash
# Evaluate under SLURM:
#   GPUS=16 GPUS_PER_NODE=8 tools/slurm_test.sh PARTITION NAME CONFIG CHECKPOINT [options of tools/test.py]
# CPUS_PER_TASK and SRUN_ARGS are passed on to srun.
set -euo pipefail
if [ $# -lt 4 ]; then
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
partition=$1 job_name=$2 config=$3 checkpoint=$4
shift 4
gpus=${GPUS:-8}
# Bash would run a command that stands in a number.
for number in "$gpus" "${GPUS_PER_NODE:-1}"; do
    if ! [[ $number =~ ^[0-9]+$ ]]; then
        echo "GPUS and GPUS_PER_NODE must be whole numbers, found $number" >&2
        exit 2
    fi
done
gpus_per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
# SRUN_ARGS holds several words on purpose.
# shellcheck disable=SC2086
exec srun -p "$partition" --job-name="$job_name" \
    --gres="gpu:$gpus_per_node" --ntasks="$gpus" --ntasks-per-node="$gpus_per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-4}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    python -u "$(dirname "$0")/test.py" "$config" "$checkpoint" --launcher slurm "$@"
