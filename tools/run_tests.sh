#!/usr/bin/env bash
# Set up the environment (see tools/setup_env.py) and run all checks and tests.
#   bash tools/run_tests.sh [--family openmmlab] [--ops build] [-- options of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
setup_options=()
case "${1:-}" in -h | --help)
    sed -n '2,3s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
esac
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    setup_options+=("$1")
    shift
done
[ $# -eq 0 ] || shift
python=$(python3 tools/setup_env.py --dev "${setup_options[@]}")
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
"$(dirname "$python")/zizmor" --offline --no-progress --quiet .github
"$python" -m check_jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
"$python" -m check_jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml
exec "$python" -m pytest "$@"
