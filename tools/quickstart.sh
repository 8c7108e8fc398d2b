#!/usr/bin/env bash
# From a fresh clone to a trained SViT Mask R-CNN with its AP and pictures, on a GPU or two CPU cores.
# Sets up .venv first (see tools/setup_env.py, whose options it takes). Can be run again cheaply.
#   bash tools/quickstart.sh [--family openmmlab] [--ops build] [--retrain]
set -euo pipefail
cd "$(dirname "$0")/.."
setup_options=() retrain=()
case " $* " in *" -h "* | *" --help "*)
    sed -n '2,4s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
esac
for option in "$@"; do
    if [ "$option" = --retrain ]; then retrain=(--retrain); else setup_options+=("$option"); fi
done
python=$(python3 tools/setup_env.py "${setup_options[@]}")
exec "$python" tools/quickstart.py "${retrain[@]}"
